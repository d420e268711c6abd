"""The table in docs/parity.md is whole and within the tolerances: `make parity` was run when a row was added."""

import re
from pathlib import Path

from parity import rows

TABLE = Path(__file__).resolve().parents[2] / "docs" / "parity.md"


def test_every_row_of_the_command_stands_in_the_table_and_none_is_over_its_tolerance():
    found = dict(re.findall(r"^\| ([^|]+?) \| ([^|]+\|[^|]+\|[^|]+) \|$", TABLE.read_text(), flags=re.M))
    for _, name, _ in rows():
        forward, gradient, in_a_batch = (cell.strip() for cell in found[name].split("|"))
        assert float(forward) <= 1e-5, name
        assert float(gradient or 0) <= 1e-9 and float(in_a_batch or 0) <= 1e-5, name

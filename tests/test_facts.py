"""What a reader meets in the code stays within limits: tests/facts.py counts, `make facts` shows."""

import re
import sys
from pathlib import Path

import facts
import pytest

ROOT = Path(__file__).parents[1]

SOURCE = '''"""Say what is here.

Not code.
"""

import os


def first(a, b, *, c=1):
    # Not code either.
    if a and b or c:
        return [second(x) for x in a if x]
    return os.name


class Box:
    def open(self, key):
        """Open the box."""
        assert key


def second(x):
    return x
'''
COMMAND = "def run(x):\n    return x\n\ndef __dir__():\n    pass\n"  # names that may stand in several files


def test_facts_are_those_of_the_source(tmp_path):
    (tmp_path / "a.py").write_text(SOURCE)
    (tmp_path / "cli").mkdir()
    (tmp_path / "cli/b.py").write_text(COMMAND)
    (tmp_path / "cli/c.py").write_text(COMMAND + "\ndef second():\n    pass\n")
    found = facts.measure(tmp_path)
    assert (found.files, found.code, found.above, found.twice) == (3, 10 + 4 + 6, 1, ["second"])
    first, *_ = (f for f in found.functions if f.name.endswith(":first"))
    # 1, the if, its two operators, the comprehension
    assert (first.lines, first.complexity, first.parameters) == (5, 5, 3)
    (method,) = (f for f in found.functions if f.name.endswith(":open"))
    assert (method.complexity, method.parameters) == (2, 1)
    assert [text.partition(":")[0] for text in found.passed_bars()] == ["names with two meanings"]


def function(name: str, *, lines: int = 2, branches: int = 0, parameters: int = 0) -> str:
    """The source of a function of this size."""
    body = ["    while 1: pass"] * branches + ["    pass"] * (lines - 1 - branches)
    return "\n".join([f"def {name}({', '.join(f'p{i}' for i in range(parameters))}):", *body, ""])


def limits() -> list[int]:
    """The limits as docs/design.md says them."""
    said = (
        r"has at most (\d+) lines, at most (\d+) functions have a complexity over (\d+), at most (\d+) have more "
        r"than (\d+) parameters, and at most (\d+) definitions are used above"
    )
    (found,) = re.findall(said, " ".join((ROOT / "docs/design.md").read_text(encoding="utf-8").split()))
    return [int(number) for number in found]


@pytest.mark.parametrize("kind", ["lines", "complexity", "parameters", "above"])
def test_what_passes_a_limit_of_the_design_is_named(tmp_path, monkeypatch, capsys, kind):
    longest, complex_, complexity, many, parameters, above = limits()
    most = {"lines": longest, "complexity": complex_, "parameters": many, "above": above}[kind]
    told = {
        "lines": f"the longest function has {most + 1} lines",
        "complexity": f"{most + 1} functions of complexity over {complexity}",
        "parameters": f"{most + 1} functions of over {parameters} parameters",
        "above": f"{most + 1} definitions used above their place",
    }[kind]

    def source(number: int) -> str:
        names = [f"f{i}" for i in range(number)]
        if kind == "lines":
            return function("f", lines=number)
        if kind == "above":
            return f"def f(): {', '.join(names)}\n" + "\n".join(map(function, names))
        size = {"parameters": parameters + 1} if kind == "parameters" else {"branches": complexity}
        return "\n".join(function(name, lines=complexity + 2, **size) for name in names)

    monkeypatch.setattr(sys, "argv", ["facts.py", str(tmp_path), "--bars"])
    for number, expected in ((most, []), (most + 1, [told])):
        (tmp_path / "a.py").write_text(function("short") + source(number))
        assert facts.measure(tmp_path).passed_bars() == expected
        assert facts.main() == len(expected) and capsys.readouterr().out.startswith("files 1, lines ")


def test_the_package_keeps_the_limits():
    assert facts.measure(ROOT / "ser").passed_bars() == []

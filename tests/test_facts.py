"""What a reader meets in the code stays within limits: tests/facts.py counts, `make facts` shows."""

from pathlib import Path

import facts

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


def test_facts_are_those_of_the_source(tmp_path):
    (tmp_path / "a.py").write_text(SOURCE)
    (tmp_path / "cli").mkdir()
    for name in ("b", "c"):
        (tmp_path / "cli" / f"{name}.py").write_text("def run(x):\n    return x\n\ndef second():\n    pass\n")
    found = facts.measure(tmp_path)
    assert (found.files, found.code, found.above, found.twice) == (3, 10 + 8, 1, ["second"])
    first, *_ = (f for f in found.functions if f.name.endswith(":first"))
    # 1, the if, its two operators, the comprehension
    assert (first.lines, first.complexity, first.parameters) == (5, 5, 3)
    (method,) = (f for f in found.functions if f.name.endswith(":open"))
    assert (method.complexity, method.parameters) == (2, 1)
    assert [text.partition(":")[0] for text in found.passed_bars()] == ["names with two meanings"]


def test_the_package_keeps_the_limits():
    assert facts.measure(ROOT / "ser").passed_bars() == []

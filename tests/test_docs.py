"""README and docs/: their links lead somewhere, their commands exist, and README's map has every file."""

import re
from pathlib import Path

import pytest

from ser.cli import COMMANDS, load_command, make_parser

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])


def without_code(text: str) -> str:
    """Return the page without its blocks of code."""
    return re.sub(r"^( *)```.*?^\1```$", "", text, flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """Return the anchors of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", without_code(page.read_text()), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(page: Path) -> list[list[str]]:
    """Return the words of each `ser` command in the shell blocks of a page, without comments."""
    found = []
    for block in re.findall(r"^ *```sh\n(.*?)^ *```$", page.read_text(), flags=re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            match = re.search(r"(?:^|-m |; )\s*(ser [a-z].*)$", line.partition(" #")[0].strip())
            found += [match[1].split()] if match else []
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        target, _, anchor = link.partition("#")
        if not target.startswith("http"):
            there = (page.parent / target).resolve() if target else page
            assert there.exists(), link
            assert not anchor or anchor in anchors(there), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_their_flags_exist(page):
    for _, name, *words in commands(page):
        assert name in COMMANDS
        known = set()
        passes_on = name in ("crossval", "crosscorpus")  # what they do not know, to train
        for module in (name, "train") if passes_on else (name,):
            parser = make_parser("", None)
            load_command(module).add_arguments(parser)
            known |= {flag for action in parser._actions for flag in action.option_strings}
        flags = {word.strip("[]").partition("=")[0] for word in words if word.strip("[").startswith("--")}
        assert flags <= known, (name, flags - known)


def test_the_map_of_readme_has_every_file_of_the_package_and_no_other():
    block = (ROOT / "README.md").read_text().partition("## Files")[2].partition("```")[2].partition("```")[0]
    named = re.findall(r"\bser/\S+\.py\b", re.sub(r"earlier import path of \S+", "", block))
    there = [path for path in (ROOT / "ser").rglob("*.py") if path.stat().st_size]
    assert sorted(named) == sorted(path.relative_to(ROOT).as_posix() for path in there)

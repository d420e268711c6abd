"""README and docs/: their links, commands, flags and scripts exist, and README's map has every file."""

import re
from pathlib import Path

import pytest

from ser.cli import COMMANDS, load_command, make_parser

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])
FLAGS_OF_OTHERS = {"--rdzv-id", "--nnodes", "--shutdown-timeout", "--signal"}  # of torchrun and Slurm
FLAGS_OF_OTHERS |= {"--count"}  # of tests/soak/
EARLIER = ("CHANGELOG.md", "results.md")  # which name scripts of earlier versions


def without_code(text: str) -> str:
    """Return the page without its blocks of code."""
    return re.sub(r"^( *)```.*?^\1```$", "", text, flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """Return the anchors of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", without_code(page.read_text()), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def lines_of_code(page: Path) -> list[str]:
    """Return the lines of the shell blocks of a page, without comments, and all code inside of its sentences."""
    blocks = re.findall(r"^ *```sh\n(.*?)^ *```$", page.read_text(), flags=re.M | re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    spans = re.findall(r"`([^`]+)`", without_code(page.read_text()))
    return [line.partition(" #")[0].strip() for line in lines] + [" ".join(span.split()) for span in spans]


def commands(page: Path) -> list[list[str]]:
    """Return the words of each `ser` command of a page."""
    matches = (re.search(r"(?:^|-m |; )\s*(ser [a-z].*)$", line) for line in lines_of_code(page))
    return [match[1].split() for match in matches if match]


def flags(words: list[str]) -> set[str]:
    """Return the flags among words, without their values."""
    return {word.strip("[]").partition("=")[0] for word in words if word.strip("[").startswith("--")}


def known_flags(name: str) -> set[str]:
    """Return the flags of a command; crossval and crosscorpus pass on those of `ser train`."""
    parser = make_parser("", None)
    load_command(name).add_arguments(parser)
    own = {flag for action in parser._actions for flag in action.option_strings}
    return own | known_flags("train") if name in ("crossval", "crosscorpus") else own


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
        assert flags(words) <= known_flags(name), (name, flags(words) - known_flags(name))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_in_sentences_exist(page):
    known = FLAGS_OF_OTHERS.union(*map(known_flags, COMMANDS))
    named = {flag for line in lines_of_code(page) if line.startswith("--") for flag in flags(line.split())}
    assert named <= known, named - known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_targets_of_make_and_scripts_exist(page):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M)
    for line in lines_of_code(page):
        program, *words = line.split() or [""]
        if program == "make":
            assert {word for word in words if "=" not in word} <= {*targets}, line
        elif program == "python" and words[0].endswith(".py") and page.name not in EARLIER:
            assert "NAME" in words[0] or (ROOT / words[0]).is_file(), line


def test_the_map_of_readme_has_every_file_of_the_package_and_no_other():
    block = (ROOT / "README.md").read_text().partition("## Files")[2].partition("```")[2].partition("```")[0]
    named = re.findall(r"\bser/\S+\.py\b", re.sub(r"earlier import path of \S+", "", block))
    there = [path for path in (ROOT / "ser").rglob("*.py") if path.stat().st_size]
    assert sorted(named) == sorted(path.relative_to(ROOT).as_posix() for path in there)

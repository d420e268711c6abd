"""Define what the cells of a manifest mean: missing values, quotation marks, and names of columns.

`ser.data.manifest` applies these rules.
"""

import codecs
import csv
import difflib
import math
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ser.data.text import nfc

# Programs write these for a missing value. "None", "NA" and "null" are also words, so they may be a text.
MISSING_LABELS = frozenset({"nan", "NaN", "NA", "N/A", "null", "NULL", "None", "-"})
MISSING_TEXTS = frozenset({"nan", "NaN"})

# Names that others give to our columns, reduced to lower-case letters and digits. They serve only for hints.
OFTEN_CALLED = {
    "emotion": "emotion emotions emo emotionlabel emotionclass label labels class category emotionid",
    "text": "text transcript transcripts transcription sentence utterance words rawtext normalizedtext",
    "speaker": "speaker speakers speakerid spk spkid spkr spkrid speakername clientid actor actorid",
    "id": "id uttid utteranceid",
    "start": "start starttime begin onset",
    "end": "end endtime stop offset",
    "arousal": "arousal activation aro act emoact",
    "dominance": "dominance dom emodom",
    "valence": "valence val emoval",
}

# A whole number that became a float is written as 1.0 or 1e+16. (pandas makes floats of a column with a gap.)
WHOLE_FLOAT = re.compile(r"-?(0|[1-9][0-9]*)\.0+|-?[1-9](\.[0-9]+)?e\+[0-9]+")

MAX_LINE_BYTES = 1024 * 1024
MAX_PATH = 4096  # no longer path can exist
MAX_SHOWN = 20  # names in one line


# ------------------------------------------------------------------------------------------------------ cells


class Missing:
    """Find and count the cells that mean a missing value.

    Attributes:
        literal: whether all cells are taken as they are written.
        cells: column -> cell -> how often it was found.
    """

    def __init__(self, *, literal: bool) -> None:
        """Begin without a cell."""
        self.literal = literal
        self.cells: dict[str, Counter[str]] = {}

    def __call__(self, column: str, cell: str, *, count: int = 1) -> bool:
        """Tell whether this cell, which occurs ``count`` times, means a missing value."""
        cell = cell.strip()
        if self.literal or cell not in (MISSING_TEXTS if column == "text" else MISSING_LABELS):
            return False
        self.cells.setdefault(column, Counter())[cell] += count
        return True

    def lines(self) -> list[str]:
        """Return a line that lists the cells which were taken as missing."""
        shown = []
        for column, cells in self.cells.items():
            shown += [f"{column} {', '.join(f'{cell!r} ({count})' for cell, count in sorted(cells.items()))}"]
        how = "cells that are taken as empty (--literal-labels takes them as they stand)"
        return [f"  {how}: {'; '.join(shown)}"] if shown else []


def whole(name: str) -> str:
    """Turn "1.0" into "1"; other names stay."""
    if not WHOLE_FLOAT.fullmatch(name) or not math.isfinite(float(name)):
        return name
    whole = name.partition(".")[0] if "e" not in name else str(int(float(name)))
    return "0" if whole == "-0" else whole


# ---------------------------------------------------------------------------------------------------- columns


def often_called(name: str, ours: Sequence[str]) -> str:
    """Find the column of ``ours`` that the column ``name`` is probably meant to be, or ""."""
    key = "".join(c for c in unicodedata.normalize("NFKC", name).casefold() if c.isalnum())
    exact = [column for column in ours if key in OFTEN_CALLED.get(column, "").split()]
    near = difflib.get_close_matches(key, [column for column in ours if len(column) > 3], n=1, cutoff=0.8)
    return next(iter([*exact, *near]), "")


# -------------------------------------------------------------------------------------------- quotation marks


@dataclass(frozen=True)
class Quoting:
    """Describe what quotation marks mean in a TSV.

    Attributes:
        seen: whether a cell begins with a quotation mark.
        broken: the first line in which such a cell does not end with one; 0: all of them do.
    """

    seen: bool = False
    broken: int = 0

    def lines(self) -> list[str]:
        """Return a line that says which of the two meanings was chosen."""
        if self.broken:
            why = f"those in line {self.broken} do not enclose a cell (Common Voice does not quote)"
            return [f"  quotation marks are characters, as {why}"]
        return ["  quotation marks quote, as they enclose cells everywhere (pandas does so)"] if self.seen else []

    def remark(self) -> str:
        """Word the end of an error that may follow from the meaning."""
        why = f"quotation marks are characters here, as those in line {self.broken} do not enclose a cell"
        return f"; {why}" if self.broken else ""


def find_quoting(file: BinaryIO) -> Quoting:
    """Read a TSV once to find out what its quotation marks mean, and go back to its beginning.

    They enclose cells if every cell that begins with one ends with one on the same line, and marks inside are
    doubled.
    """
    number = width = 0
    found = Quoting()
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        opens = line.startswith(b'"') or b'\t"' in line
        if len(line) > MAX_LINE_BYTES:
            break  # as reading stops there
        if width and not opens:
            continue
        text = line.decode(errors="replace")
        try:
            cells = len(next(csv.reader([text], delimiter="\t", strict=True), []))
        except csv.Error:
            cells = 0  # like a blank line; but a blank line does not open a quotation
        width = width or cells
        if opens and (not cells or cells != width == text.count("\t") + 1):
            found = Quoting(seen=True, broken=number)
            break
        found = Quoting(seen=found.seen or opens)
    file.seek(0)
    return found


def swallowed(lines: Sequence[str], names: Sequence[str], delimiter: str) -> int:
    """Find a line inside a row that looks like a separate row, which hints at an open quote; 0: there is none.

    If the first line and another one have all fields, with files of the same type, both are taken for rows. No
    known text holds such a line.
    """
    place = names.index("file")
    cells = [line.rstrip("\r\n").split(delimiter) for line in lines]
    kinds = [Path(row[place].strip('" ')).suffix.lower() if len(row) == len(names) else "" for row in cells]
    return next((i for i, kind in enumerate(kinds) if i and kind and kind == kinds[0]), 0)


# ------------------------------------------------------------------------------------------------------ files


class Files:
    """Find recordings whose names have another Unicode form on the disk than in the manifest.

    (Macs decompose names.) A folder is listed at most once, and only if a name that is not ASCII was not found.
    """

    def __init__(self) -> None:
        """Begin without a listing."""
        self.listings: dict[str, dict[str, str]] = {}  # folder -> composed name -> name, "" where there are two

    def find(self, file: Path) -> Path:
        """Return the file under its name on the disk, or unchanged if it does not exist."""
        if len(str(file)) > MAX_PATH or os.path.lexists(file):
            return file
        found = file.anchor
        for name in file.parts[1:]:
            there = os.path.join(found, name)  # noqa: PTH118 (a million Path objects are a gigabyte)
            if not name.isascii() and not os.path.lexists(there):
                there = os.path.join(found, self._listing(found).get(nfc(name)) or name)  # noqa: PTH118
            found = there
        return Path(found) if os.path.lexists(found) else file

    def _listing(self, folder: str) -> dict[str, str]:
        """List a folder: composed name -> name on the disk, of names that are not ASCII."""
        if folder not in self.listings:
            listing = self.listings[folder] = {}
            with suppress(OSError, ValueError):
                for name in os.listdir(folder):  # noqa: PTH208
                    if not name.isascii():
                        listing[nfc(name)] = "" if nfc(name) in listing else name
        return self.listings[folder]

"""Read and check the list of utterances, the manifest, before training, and report all bad rows at once.

A manifest is CSV with a header (tab-separated if its name ends in .tsv) or JSON (.jsonl, .json: an object per
line, or one array of objects). Only `file` is required. `emotion`, `text`, `speaker`, `id`, `start` and `end`
(seconds), `arousal`, `dominance` and `valence` (numbers on any scale) are our columns, and other columns are kept:

    file,emotion,text,speaker
    wav/03a01Fa.wav,happiness,Der Lappen liegt auf dem Eisschrank.,03

The rules of reading:

- The file is UTF-8, with or without a byte order mark. Any line ends and blank lines are allowed.
- A CSV quotes fields as usual. A TSV does so if every field that begins with a quotation mark ends with one on the
  same line; else the mark is a character.
- An empty cell (or JSON null, or NaN) means None. So do the labels and texts that programs write for a missing
  value (`ser.data.cells.MISSING_LABELS`, `MISSING_TEXTS`).
- Spaces around labels and numbers are ignored, and labels are converted to NFC. A speaker that is a whole number
  written as a float (1.0) becomes the whole number.
- The default id is the file as it is written, with ``#start-end`` for an excerpt.
- Columns without a name are ignored.
- If a file does not exist, its name is tried in the other Unicode form (NFC, NFD).
- The paper's three-column CSV (``file,emotion,text`` with labels e0..e3) is read without changes: if all labels of
  a manifest are among e0, e1, e2, e3, they become neutral, happy, angry, sad.
"""

from __future__ import annotations

import codecs
import csv
import functools
import gc
import json
import math
import os
import re
import shlex
import stat
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ser.data.cells import (
    MAX_LINE_BYTES,
    MAX_SHOWN,
    Files,
    Missing,
    Quoting,
    find_quoting,
    often_called,
    swallowed,
    whole,
)
from ser.data.labels import DIMENSIONS, label_columns, label_kinds
from ser.data.text import did_you_mean, nfc, unique_names
from ser.errors import ConfigError, ManifestError, Tell, brief_repr, shorten, summary
from ser.files import StrPath, csv_line, replace_file

COLUMNS = ("file", "emotion", "text", "speaker", "id", "start", "end", *DIMENSIONS)

# The labels in the manifests of Cai et al. -> names, which are stored instead.
PAPER_EMOTIONS = {"e0": "neutral", "e1": "happy", "e2": "angry", "e3": "sad"}

# A Mac takes both Unicode forms of a name for the same file.
ONE_FILE_IN_ANY_FORM = sys.platform == "darwin"

# A manifest may have millions of rows, so only the length of a line is limited. The csv module limits fields.
NO_TEXT = re.compile("[\0\ud800-\udfff]")  # a NUL, or half a surrogate pair
MAX_CELL = 128 * 1024
MAX_ARRAY_BYTES = 256 * 1024 * 1024  # a JSON array is read into memory as a whole
MAX_COLUMNS = 1000

MAX_LISTED = 50

# Each word also permits what the words before it permit.
OVERLAPS = ("none", "speakers", "utterances")

# NaN is not JSON, but Python writes it for a missing value in a pandas frame that became dicts.
DECODER = json.JSONDecoder(
    object_pairs_hook=unique_names, parse_constant=lambda name: None if name == "NaN" else float(name)
)

_Row = tuple[int, dict[str, str | None]]  # number of a line or item, name of a column -> cell


def known_columns() -> tuple[str, ...]:
    """Return our columns: `COLUMNS`, and those of rows that were added to `LABELS`."""
    return tuple(dict.fromkeys((*COLUMNS, *label_columns())))


@dataclass(frozen=True, slots=True, init=False)
class Utterance:
    """Hold one row: a recording or an excerpt of it, and its labels.

        Utterance("turn-1", Path("a.wav"), emotion="happy", text="SO IT IS", end=2.5)

    Attributes:
        id: unique in its manifest.
        file: the recording.
        start: where the excerpt begins, in seconds; None: at the beginning.
        end: where the excerpt ends, in seconds; None: at the end.
        labels: column -> label, for known labels of the columns in `ser.data.labels.LABELS`; never None.
        extra: the other columns that are not empty.
    """

    id: str
    file: Path
    start: float | None
    end: float | None
    labels: dict[str, Any] = field(hash=False)
    extra: dict[str, str] = field(hash=False)

    def __init__(
        self,
        id: str,
        file: Path,
        *,
        start: float | None = None,
        end: float | None = None,
        labels: Mapping[str, Any] | None = None,
        extra: dict[str, str] | None = None,
        **columns: str | float | None,
    ) -> None:
        """Make a row; ``columns`` are labels by name and replace those in ``labels``; None means no label."""
        if columns:
            for name in columns.keys() - label_columns():
                raise TypeError(f"Utterance has no {name!r}{did_you_mean(name, label_columns())}")
            labels = {**(labels or {}), **columns}
        known = {name: value for name, value in labels.items() if value is not None} if labels else {}
        for name, value in zip(self.__slots__, (id, file, start, end, known, extra or {}), strict=True):
            object.__setattr__(self, name, value)

    def relabelled(self, **columns: str | float | None) -> Utterance:
        """Return a copy of the row with these labels changed; None removes a label."""
        return Utterance(
            self.id, self.file, start=self.start, end=self.end, labels=self.labels, extra=self.extra, **columns
        )

    @property
    def emotion(self) -> str | None:
        """Return the name of the class, None if unlabelled."""
        return self.labels.get("emotion")

    @property
    def text(self) -> str | None:
        """Return the transcript as the corpus has it, None if there is none."""
        return self.labels.get("text")

    @property
    def speaker(self) -> str | None:
        """Return the speaker's name, None if unknown."""
        return self.labels.get("speaker")

    @property
    def corpus(self) -> str:
        """Return the name of the corpus, empty if unknown."""
        return self.extra.get("corpus", "")


def value_of(utterance: Utterance, column: str) -> Any:
    """Return the value of one of our columns, None if there is none."""
    return getattr(utterance, column) if column in utterance.__slots__ else utterance.labels.get(column)


@dataclass(frozen=True)
class Overlap:
    """Hold what two sets of utterances share.

    Attributes:
        speakers: the names in both sets, sorted. Utterances without a speaker are ignored.
        utterances: ids, in the second set, of recordings (file, start, end) that are also in the first set.
    """

    speakers: list[str]
    utterances: list[str]


class _Problems:
    """Collect faults of rows: all are counted, and the first `MAX_LISTED` are kept."""

    def __init__(self) -> None:
        """Begin without a fault."""
        self.listed: list[str] = []
        self.count = 0

    def add(self, where: str, what: str) -> None:
        """Count a fault."""
        self.count += 1
        if len(self.listed) < MAX_LISTED:
            self.listed.append(f"{where}: {what}")

    def raise_if_any(self, headline: str) -> None:
        """Raise ManifestError with all faults, if there is one."""
        if self.count:
            more = self.count - len(self.listed)
            rest = [f"and {more} more"] if more else []
            raise ManifestError("\n  ".join([f"{headline} ({self.count}):", *self.listed, *rest]))


# ---------------------------------------------------------------------------------------------------- reading


@contextmanager
def collector_paused() -> Iterator[None]:
    """Pause the garbage collector: rows make no cycles, and it would look through all of them again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def check_regular(path: Path, expected: str) -> None:
    """Refuse a path that is not a regular file: reading a pipe may wait for ever, and a device has no end.

    Raises:
        ManifestError: ``path`` is a folder, a pipe, a device or a socket; the message says what was ``expected``.
        OSError: ``path`` does not exist.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        kind = kinds.get(stat.S_IFMT(mode), "a device")
        advice = "" if stat.S_ISDIR(mode) else "; save its content to a file, and give the name of that"
        raise ManifestError(f"{path}: not a regular file but {kind}, expected {expected}{advice}")


def _separator(path: Path) -> str:
    """Return the separator of fields for a manifest of this name; "" for JSON."""
    return {".tsv": "\t", ".jsonl": "", ".json": ""}.get(path.suffix.lower(), ",")


def _unknown_column(name: str) -> str:
    """Say that a name is not one of our columns, and which one is similar."""
    ours = known_columns()
    return f"no column of ours is called {name!r}{did_you_mean(name, ours)}; ours are {', '.join(ours)}"


class _Renaming:
    """Map the column names of a manifest to ours, as `columns` says."""

    def __init__(self, path: Path, columns: Mapping[str, str]) -> None:
        """Check `columns`. Raises ManifestError for a name that is not ours, or one column with two names."""
        self.path, self.columns = path, columns
        self.found: list[str] = []  # the manifest's names, once they are known
        self.remark = ""  # a text that is added to errors about these names
        self.ours = {theirs: ours for ours, theirs in columns.items()}
        for unknown in [ours for ours in columns if ours not in known_columns()]:
            raise ManifestError(f"{path}: {_unknown_column(unknown)}")
        if len(self.ours) < len(columns):
            raise ManifestError(f"{path}: one column cannot be two of ours: {dict(columns)}")

    def __call__(self, theirs: str) -> str:
        """Return our name of a column."""
        return self.ours.get(theirs, f"{theirs}_original" if theirs in self.columns else theirs)

    def check(self, found: Sequence[str]) -> None:
        """Check that `found`, the manifest's names, has every column that is asked for."""
        self.found = list(found)
        missing = []
        for ours, theirs in {"file": "file", **self.columns}.items():
            if theirs not in found:
                meant = f" (to be our {ours!r})" if theirs != ours else ""
                missing.append(f"no column {theirs!r}{meant}{did_you_mean(theirs, self.found[:MAX_COLUMNS])}")
        if missing:
            hint = "" if len(found) > 1 else "; fields are separated by commas, in a .tsv file by tabs"
            raise ManifestError(
                f"{self.path}: {'; '.join(missing)}; the columns are {brief_repr(self.found)}{hint}; other names "
                f"can be given as columns, such as file=path{self.remark}"
            )

    def lines(self, also: Sequence[str] = ()) -> list[str]:
        """Return lines that say which columns were read as what, which were not read, and what they may mean.

        ``also`` are further columns that are read.
        """
        theirs = {self(name): name for name in self.found}
        read = [ours for ours in (*known_columns(), *also) if ours in theirs]
        unread = [ours for ours in known_columns() if ours not in theirs]
        others = [name for name in self.found if name and self(name) not in read]
        shown = [c if c == theirs[c] else f"{c} (from {brief_repr(theirs[c])})" for c in read]
        nameless = self.found.count("")
        rest = [f"{nameless} without a name"] if nameless else []
        left = summary([*map(brief_repr, others), *rest], MAX_SHOWN) or "none"
        hints = []
        for name in others[:MAX_COLUMNS]:
            if name not in self.columns and (ours := often_called(name, unread)):
                pair = f"{ours}={name}"
                pair = shlex.quote(pair) if pair.isprintable() else brief_repr(pair)
                hints.append(f"  {brief_repr(name)} is not read; did you mean --columns {pair}?")
        return [f"{self.path}: columns read: {', '.join(shown)}; not read: {left}", *hints[:MAX_SHOWN]]


class _Unreadable(Exception):
    """Stop reading after a line."""


class _Lines:
    """Decode the lines of a file with their ends. Damaged lines are reported, and their numbers are kept."""

    def __init__(self, file: BinaryIO, problems: _Problems) -> None:
        """Start before the first line."""
        self.file, self.problems = file, problems
        self.number = 0
        self.damaged: set[int] = set()
        self.recent: list[str] = []  # the latest lines, which the reader clears

    def __iter__(self) -> Iterator[str]:
        """Yield line by line. Raises _Unreadable after a line that is too long."""
        while line := self.file.readline(MAX_LINE_BYTES + 1):
            self.number += 1
            if len(line) > MAX_LINE_BYTES:
                what = f"longer than {MAX_LINE_BYTES} bytes; the rest of the manifest was not read"
                self.problems.add(f"line {self.number}", what)
                raise _Unreadable
            try:
                text = line.decode("utf-8-sig" if self.number == 1 else "utf-8")
                what = "holds a NUL character" if "\0" in text else ""
            except UnicodeDecodeError as error:
                text = line.decode(errors="replace")
                what = f"not UTF-8: byte 0x{line[error.start]:02x} at position {error.start}"
            if what:
                self.damaged.add(self.number)
                self.problems.add(f"line {self.number}", f"{what}; save the manifest as UTF-8")
            self.recent.append(text)
            yield text


def _header(path: Path, line: int, found: list[str], renaming: _Renaming) -> list[str]:
    """Return the names of the columns: ours, or else the manifest's; "" for a column without a name."""
    if len(found) > MAX_COLUMNS:
        raise ManifestError(f"{path}: line {line}: {len(found)} columns, at most {MAX_COLUMNS} are possible")
    renaming.check(found)
    names = [renaming(name) for name in found]
    for name in filter(None, names):
        if names.count(name) > 1:
            raise ManifestError(f"{path}: line {line}: the column {brief_repr(name)} stands twice")
    return names


def _csv_fault(error: csv.Error) -> str:
    """Return the error of the csv module with advice for the author of a manifest."""
    if "new-line" in str(error):  # the module's own advice is for programmers
        return "a carriage return outside quotes ends no line; save the manifest with line feeds"
    return f"{error}; is a quote left open, or one inside a field not doubled?"


def _row_fault(cells: list[str], lines: list[str], names: list[str], delimiter: str, first: int) -> str:
    """Say why the cells of some lines, from number `first` on, are not a row; "" if they are one."""
    if len(cells) != len(names):
        return f"{len(cells)} fields, but the header has {len(names)}"
    if len(lines) > 1 and (held := swallowed(lines, names, delimiter)):
        return f"a quoted cell holds line {first + held}, which looks like a row of its own; is a quote left open?"
    return ""


def _csv_rows(
    path: Path, file: BinaryIO, renaming: _Renaming, problems: _Problems, quoting: Quoting
) -> Iterator[_Row]:
    """Yield the line number and the cells of each row with the right number of fields."""
    lines, delimiter = _Lines(file, problems), _separator(path)
    reader = csv.reader(
        lines, delimiter=delimiter, quoting=csv.QUOTE_NONE if quoting.broken else csv.QUOTE_MINIMAL, strict=True
    )
    names: list[str] | None = None
    while True:
        lines.recent.clear()
        first = reader.line_num + 1
        try:
            cells = next(reader)
        except (StopIteration, _Unreadable):
            return
        except csv.Error as error:
            problems.add(f"line {first}", _csv_fault(error))
            if "limit" in str(error):
                problems.add(f"line {reader.line_num}", "the rest of the manifest was not read")
                return
            continue
        if not cells:
            continue
        damaged = lines.damaged and not lines.damaged.isdisjoint(range(first, reader.line_num + 1))
        if names is None:
            if damaged:
                return
            names = _header(path, first, [cell.strip() for cell in cells], renaming)
        elif damaged:
            continue
        elif fault := _row_fault(cells, lines.recent, names, delimiter, first):
            problems.add(f"line {first}", fault)
        else:
            yield first, {name: cell for name, cell in zip(names, cells, strict=True) if name}


def _json_lines(file: BinaryIO, problems: _Problems) -> Iterator[tuple[int, Any]]:
    """Yield (line number, value) of each line that is JSON."""
    lines = _Lines(file, problems)
    for text in lines:
        lines.recent.clear()
        if text.strip() and lines.number not in lines.damaged:
            try:
                yield lines.number, DECODER.decode(text)
            except (ValueError, RecursionError) as error:
                problems.add(f"line {lines.number}", f"not a JSON row: {shorten(str(error), 200)}")


def _is_array(file: BinaryIO) -> bool:
    """Tell whether a JSON file is one array, and go back to its beginning."""
    head = file.read(64)
    file.seek(0)
    return head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


def _array_items(file: BinaryIO, problems: _Problems) -> Iterator[tuple[int, Any]]:
    """Yield (position from 1, value) of each item of a JSON array, as pandas writes it with orient="records"."""
    content = file.read(MAX_ARRAY_BYTES + 1)
    if len(content) > MAX_ARRAY_BYTES:
        what = f"is larger than {MAX_ARRAY_BYTES} bytes; write one object per line (.jsonl)"
        problems.add("the JSON array", what)
        return
    try:
        yield from enumerate(DECODER.decode(content.decode("utf-8-sig").strip()), 1)
    except (ValueError, RecursionError) as error:
        problems.add("the array", f"cannot be read: {shorten(str(error), 200)}")


def _cell(name: str, value: Any, renaming: _Renaming) -> str | None:
    """Return a JSON value as the string that a CSV would hold: 1 is "1", 1.0 "1.0", true "true"."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, dict | list) or (isinstance(value, float) and not math.isfinite(value)):
        numbers = ("start", "end", *label_columns("numbers")) if isinstance(value, float) else ()
        if renaming(name) in set(known_columns()).difference(numbers):
            raise ValueError(f"{brief_repr(name)} is {brief_repr(value)}, expected a string or number")
    return json.dumps(value, ensure_ascii=False)


def _is_text(value: str | None) -> bool:
    """Tell whether a manifest can hold a value: one without NUL and half surrogate pairs."""
    return value is None or NO_TEXT.search(value) is None


def _json_rows(file: BinaryIO, unit: str, renaming: _Renaming, problems: _Problems) -> Iterator[_Row]:
    """Yield the number and the cells of each JSON object, which is a line or an item of the array."""
    every_name: dict[str, None] = {}
    try:
        for number, values in (_array_items if unit == "item" else _json_lines)(file, problems):
            try:
                if not isinstance(values, dict):
                    raise ValueError(f"found {brief_repr(values)}, expected one object per {unit}")
                count = len(values)
                values = {name.strip(): value for name, value in values.items()}
                every_name.update(dict.fromkeys(values))
                cells = {renaming(name): _cell(name, value, renaming) for name, value in values.items()}
                if len(cells) < count:
                    raise ValueError(f"two of {brief_repr(list(values))} become one column")
                if not all(_is_text(part) for pair in cells.items() for part in pair):
                    raise ValueError("half a surrogate pair or a NUL, which is no text")
            except (ValueError, RecursionError) as error:
                problems.add(f"{unit} {number}", f"not a JSON row: {shorten(str(error), 200)}")
                continue
            yield number, {name: cell for name, cell in cells.items() if name}
    except _Unreadable:
        return
    if every_name:
        renaming.check(list(every_name))


@functools.lru_cache
def _label(cell: str | None) -> str | None:
    """Normalise a name for comparison. With the cache, all rows with the same name share one string."""
    return None if cell is None else nfc(cell.strip())


def _cell_number(
    name: str, cell: str | None, found: list[str], missing: Missing | None = None, *, least: float = -math.inf
) -> float | None:
    """Read a cell as a number; a fault is added to `found`."""
    if cell is None:
        return None
    try:
        number = math.nan if "_" in cell else float(cell)
    except ValueError:
        number = math.nan
    if math.isfinite(number) and number >= least:
        return number
    if missing is not None and missing(name, cell):
        return None
    found.append(f"{name} is {brief_repr(cell)}, expected {'a number' if least else 'seconds, 0 or more'}")
    return None


def _default_id(file: str, start: float | None, end: float | None) -> str:
    """Return the default id of a row: its file, with the times of an excerpt."""
    if start is None and end is None:
        return file
    return f"{file}#{'' if start is None else start}-{'' if end is None else end}"


@functools.lru_cache
def why_no_corpus(name: str) -> str:
    """Say why a name cannot be that of a corpus; "" where it can."""
    if not name.strip() or not name.isprintable():
        return "is no name"
    return "holds a /, which divides corpus and name" if "/" in name else ""


def _utterance(
    cells: dict[str, str | None],
    folder: Path,
    found: list[str],
    missing: Missing,
    kinds: Mapping[str, str],
    corpus: str = "",
) -> Utterance:
    """Make an utterance from a row; faults are added to `found`. ``kinds`` are `label_kinds`.

    If several corpora are read, ``corpus`` is that of rows without a cell in this column, and ids begin with it.
    """
    full: dict[str, Any] = {name: cell for name, cell in cells.items() if cell and not cell.isspace()}
    name = full.pop("file", "")
    if not name:
        found.append("has no file")
    start, end = (_cell_number(part, full.pop(part, None), found, least=0) for part in ("start", "end"))
    labels: dict[str, Any] = {}
    for column in [column for column in kinds if column in full]:
        cell = full.pop(column)
        if kinds[column] == "numbers":
            labels[column] = _cell_number(column, cell, found, missing)
        elif kinds[column] == "class":  # for emotions and speakers, `with_names` decides later
            none = column not in ("emotion", "speaker") and missing(column, cell)
            labels[column] = None if none else _label(cell)
        elif not (len(cell) < 8 and missing(column, cell)):  # only short texts can mean a missing one
            labels[column] = cell
    if end is not None and end <= (start or 0.0):
        found.append(f"end {end} is not after start {start or 0.0}")
    id = full.pop("id", None) or _default_id(name, start, end)
    extra = dict(full)  # a copy, which takes less memory than the dict that items were removed from
    if corpus:
        extra["corpus"] = named = _label(extra.get("corpus")) or corpus
        id = f"{named}/{id}"
        if why := why_no_corpus(named):
            found.append(f"the corpus {brief_repr(named)} {why}")
    return Utterance(id, folder / name, start=start, end=end, labels=labels, extra=extra)


def map_for(label_map: Mapping[str, Any], column: str) -> dict[str, str | None]:
    """Return the part of a label map about emotions or speakers: name as written -> its name, or None."""
    if column == "speaker":
        speakers = label_map.get("speaker")
        return dict(speakers) if isinstance(speakers, Mapping) else {}
    return {old: new for old, new in label_map.items() if not isinstance(new, Mapping)}


def _change(name: str, to: str | None) -> str:
    """Say which name, or no label, replaces a name."""
    return f"{brief_repr(name)} is {'no label' if to is None else brief_repr(to)}"


def _new_names(
    column: str, counts: Counter[str], names: Mapping[str, str | None], missing: Missing, lines: list[str]
) -> dict[str, str | None]:
    """Return old -> new for the labels of a column that change, by the map or else by the rules of reading.

    Args:
        column: emotion or speaker.
        counts: label -> how many rows have it.
        names: the map, see `map_for`.
        missing: tells which labels mean a missing one.
        lines: lines for the user are added to it.
    """
    new = {name: names[name] for name in counts if name in names}
    if new:
        changes = shorten(", ".join(f"{_change(n, to)} ({counts[n]})" for n, to in new.items()), 200)
        lines.append(f"  --map, {column}: {changes}")
    new |= {n: None for n in counts if n not in new and missing(column, n, count=counts[n])}
    floats = {}
    if column == "speaker" and not missing.literal:
        floats = {n: whole(n) for n in counts if n not in new and whole(n) != n}
    if floats:
        new |= {n: names.get(to, to) for n, to in floats.items()}
        changes = shorten(", ".join(_change(n, to) for n, to in floats.items()), 200)
        lines.append(f"  speakers that are whole numbers written as floats are those: {changes}")
    return new


def unknown_in_map(
    label_map: Mapping[str, Any], utterances: Sequence[Utterance], columns: Sequence[str] = ("emotion", "speaker")
) -> list[str]:
    """Point at names of a map that no utterance has, before the map is applied."""
    lines = []
    for column in columns:
        if names := map_for(label_map, column):
            known = dict.fromkeys(name for u in utterances if (name := u.labels.get(column)) is not None)
            known |= dict.fromkeys(map(whole, known)) if column == "speaker" else {}
            for name in [name for name in names if name not in known][:MAX_SHOWN]:
                near = did_you_mean(name, list(known)[:MAX_COLUMNS])
                lines.append(f"  --map: no {column} here is called {brief_repr(name)}{near}")
    return lines


def with_names(
    utterances: list[Utterance], label_map: Mapping[str, Any], missing: Missing, lines: list[str]
) -> list[Utterance]:
    """Rename the labels of the utterances by `label_map` and the rules of reading.

    Each name is handled once, however many rows have it. Lines for the user are added to `lines`.
    """
    for column in ("emotion", "speaker"):
        counts: Counter[str] = Counter(name for u in utterances if (name := u.labels.get(column)) is not None)
        new = _new_names(column, counts, map_for(label_map, column), missing, lines)
        labels = {new.get(name, name) for name in counts} - {None}
        if column == "emotion" and labels and labels <= PAPER_EMOTIONS.keys():
            new = {name: PAPER_EMOTIONS.get(new.get(name, name) or "") for name in counts}
        if new:
            changed: dict[str | None, Any] = {name: {column: to} for name, to in new.items()}
            labelled = ((u, u.labels.get(column)) for u in utterances)
            utterances = [u.relabelled(**changed[name]) if name in changed else u for u, name in labelled]
    return utterances


def _audio(utterance: Utterance) -> tuple[str, float, float | None]:
    """Return a key that identifies a recording: path, start and end."""
    name = os.path.normpath(utterance.file.absolute())
    if ONE_FILE_IN_ANY_FORM and not name.isascii():
        name = nfc(name)
    return name, utterance.start or 0.0, utterance.end


def _why_unusable(file: Path) -> str:
    """Say why a path is not a regular file; "" if it is one."""
    try:
        return "" if stat.S_ISREG(file.stat().st_mode) else "is not a regular file"
    except FileNotFoundError:
        return "does not exist"
    except OSError as error:
        return f"cannot be found: {error.strerror}"


class _Checks:
    """Check a row against other rows and against the disk."""

    def __init__(self, *, check_files: bool, unit: str) -> None:
        """Begin without a row; ``unit`` is the word for a row in messages, such as "line"."""
        self.check_files, self.unit = check_files, unit
        self.ids: dict[str, int] = {}
        self.audio: dict[tuple[str, float, float | None], int] = {}
        self.unusable: dict[str, str] = {}  # file -> why or "", so a file with many excerpts is looked up once

    def of(self, utterance: Utterance, number: int) -> Iterator[str]:
        """Yield the faults of the utterance in line (or at position) `number`."""
        first_id = self.ids.setdefault(utterance.id, number)
        first_audio = self.audio.setdefault(_audio(utterance), number)
        if first_audio != number:
            yield f"the same recording (file, start, end) is {self.unit} {first_audio} already"
        elif first_id != number:
            yield f"the id {brief_repr(utterance.id)} is that of {self.unit} {first_id} already"
        if self.check_files:
            name = str(utterance.file)
            if name not in self.unusable:
                self.unusable[name] = _why_unusable(utterance.file)
            if why := self.unusable[name]:
                yield f"the file {brief_repr(name)} {why}"


def _checked_utterances(
    rows: Iterable[_Row], folder: Path, missing: Missing, checks: _Checks, problems: _Problems, corpus: str
) -> list[Utterance]:
    """Make an utterance from each row, with the file's name as on the disk; report the faults of the row."""
    files, kinds = Files(), label_kinds()
    utterances: list[Utterance] = []
    for line, cells in rows:
        found: list[str] = []
        utterance = _utterance(cells, folder, found, missing, kinds, corpus)
        if not found:
            name = cells["file"]
            if name is not None and not name.isascii():
                utterance = replace(utterance, file=files.find(utterance.file))
            found += checks.of(utterance, line)
        for what in found:
            problems.add(f"{checks.unit} {line}", what)
        utterances.append(utterance)
    return utterances


def read_unnamed(
    path: Path,
    *,
    root: StrPath | None,
    columns: Mapping[str, str],
    check_files: bool,
    missing: Missing,
    corpus: str = "",
) -> tuple[list[Utterance], list[str]]:
    """Read the rows of a manifest with their labels as they are written, and what a user should know of it.

    Args:
        path, root, columns, check_files: as of `read_manifest`, which names the labels too.
        missing: knows which numbers and texts are none.
        corpus: where several corpora meet, that of rows without a cell in the column `corpus`; see
            `ser.data.several`.
    """
    folder = Path(path.parent if root is None else root).absolute()
    renaming, quoting = _Renaming(path, columns), Quoting()
    problems = _Problems()
    try:
        check_regular(path, "a CSV or JSON lines manifest")
        if not folder.is_dir():
            raise ManifestError(f"{path}: its recordings should be in {folder}, which is not a folder")
        with path.open("rb") as file:
            if _separator(path) == "\t":
                quoting = find_quoting(file)
                renaming.remark = quoting.remark()
            unit = "line" if _separator(path) or not _is_array(file) else "item"
            if _separator(path):
                rows = _csv_rows(path, file, renaming, problems, quoting)
            else:
                rows = _json_rows(file, unit, renaming, problems)
            checks = _Checks(check_files=check_files, unit=unit)
            utterances = _checked_utterances(rows, folder, missing, checks, problems, corpus)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        cause = error.strerror if isinstance(error, OSError) else error
        raise ManifestError(f"{path}: cannot read the manifest: {cause}") from error
    problems.raise_if_any(f"{path}: the manifest cannot be used, these are its problems{quoting.remark()}")
    if not utterances:
        raise ManifestError(f"{path}: the manifest has no rows")
    return utterances, [*renaming.lines(["corpus"] if corpus else []), *quoting.lines()]


@collector_paused()
def read_manifest(
    path: StrPath,
    *,
    root: StrPath | None = None,
    columns: Mapping[str, str] | None = None,
    check_files: bool = True,
    literal_labels: bool = False,
    label_map: Mapping[str, Any] | None = None,
    tell: Tell | None = None,
) -> list[Utterance]:
    """Read the utterances of a manifest, in its order. The module's docstring has the rules.

    Args:
        path: .tsv is tab-separated; .jsonl and .json hold one object per line, or one array of objects; any other
            name is CSV.
        root: the folder that relative files start from; by default the manifest's own.
        columns: our name -> the manifest's, e.g. ``{"text": "transcript"}``. If the manifest also has a column
            `text`, it is kept among the other columns as ``text_original``.
        check_files: whether every file must exist. (No file is opened; `ser.audio` does that.)
        literal_labels: take labels and texts as they are written, even those of `ser.data.cells.MISSING_LABELS`
            and `MISSING_TEXTS`, and speakers such as 1.0.
        label_map: emotion as written -> its name, None for no label; under "speaker", the same for speakers. See
            `ser.data.spellings.parse_map`.
        tell: is called with lines for the user, such as which columns were read.

    Returns:
        At least one utterance; the paths are absolute.

    Raises:
        ManifestError: the manifest is not a regular file, has no rows or lacks a column; or rows are bad, of which
            the message lists the first 50 with their lines. A row is bad if its id or (file, start, end) occurred
            before, its file is missing, start or end is not a number, negative or reversed, the number of fields
            is wrong, bytes are not UTF-8, or JSON does not parse.
    """
    missing = Missing(literal=literal_labels)
    utterances, notes = read_unnamed(
        Path(path), root=root, columns=columns or {}, check_files=check_files, missing=missing
    )
    unknown = unknown_in_map(label_map or {}, utterances)
    utterances = with_names(utterances, label_map or {}, missing, notes)
    notes += unknown
    if tell is not None:
        for note in [*notes, *missing.lines()]:
            tell(note)
    return utterances


def parse_columns(pairs: Iterable[str]) -> dict[str, str]:
    """Read ``["text=transcript", ...]``, as given on a command line, as ``{"text": "transcript", ...}``.

    Raises:
        ConfigError: there is no "="; or the name before it is not one of ours, or stands twice.
    """
    columns: dict[str, str] = {}
    for pair in pairs:
        ours, equals, theirs = (part.strip() for part in pair.partition("="))
        if not equals or not ours or not theirs:
            raise ConfigError(f"expected OURS=THEIRS, such as text=transcript, found {pair!r}")
        if ours not in known_columns():
            raise ConfigError(_unknown_column(ours))
        if ours in columns:
            raise ConfigError(f"the column {ours!r} is given twice: {columns[ours]!r} and {theirs!r}")
        columns[ours] = theirs
    return columns


# ---------------------------------------------------------------------------------------------------- writing


def _read_otherwise(utterance: Utterance, missing: Missing) -> Iterator[str]:
    """Say which labels `read_manifest` would change."""
    advice = "write and read it with literal_labels"
    for column in sorted(utterance.labels.keys() & label_columns("class", "text")):
        value = utterance.labels[column]
        if missing(column, value):
            yield f"{column} {brief_repr(value)} would be read as none; {advice}"
        elif column == "speaker" and not missing.literal and whole(value) != value:
            yield f"speaker {brief_repr(value)} would be read as {whole(value)!r}; {advice}"


def _cells(utterance: Utterance, folder: Path) -> dict[str, str | float]:
    """Return column -> value, for known values."""
    file = utterance.file.absolute()
    cells: dict[str, str | float | None] = {name: value_of(utterance, name) for name in known_columns()}
    cells["file"] = file.relative_to(folder).as_posix() if file.is_relative_to(folder) else str(file)
    return {name: value for name, value in {**utterance.extra, **cells}.items() if value is not None}


def _can_name_a_column(name: str, separator: str) -> bool:
    """Tell whether an extra column can have this name."""
    torn = separator == "\t" and "\n" in name
    return name not in ("", *known_columns()) and name == name.strip() and _is_text(name) and not torn


def _misfits(texts: Mapping[str, str], line: str, names: Sequence[str], separator: str) -> Iterator[str]:
    """Say why a manifest with these columns cannot hold a row, given as a mapping and as a line."""
    if separator == "\t" and any("\n" in text for text in texts.values()):
        yield "holds a line end, which cannot stand in a .tsv; write a .csv or .jsonl"
    elif separator and "\n" in line[:-1] and swallowed(line.split("\n"), names, separator):
        yield "holds a line that looks like a row of the manifest; write a .jsonl"
    if not all(map(_is_text, texts.values())):
        yield "holds a NUL or half a surrogate pair"
    elif max(map(len, texts.values())) > MAX_CELL or len(line.encode()) > MAX_LINE_BYTES:
        yield "is too long for a manifest"


def _written_lines(
    utterances: list[Utterance], folder: Path, names: list[str], separator: str, literal: bool, problems: _Problems
) -> Iterator[str]:
    """Yield the line of each utterance that would be read back unchanged; report the faults of the others."""
    checks, kinds = _Checks(check_files=False, unit="utterance"), label_kinds()
    missing = Missing(literal=literal)
    for number, utterance in enumerate(utterances, 1):
        cells = _cells(utterance, folder)
        texts = {name: str(value) for name, value in cells.items()}
        line = json.dumps(cells, ensure_ascii=False) + "\n"
        if separator:
            line = csv_line(map(cells.get, names), separator)
        found: list[str] = []
        # Check the utterance as the reader will see it.
        found += _read_otherwise(_utterance({**texts}, folder, found, Missing(literal=True), kinds), missing)
        found += [*checks.of(utterance, number), *_misfits(texts, line, names, separator)]
        for what in found:
            problems.add(f"utterance {number} {brief_repr(utterance.id)}", what)
        if not found:
            yield line


def write_manifest(
    path: StrPath, utterances: Iterable[Utterance], *, root: StrPath | None = None, literal_labels: bool = False
) -> None:
    """Write a manifest that `read_manifest` reads as the same utterances; whole or not at all.

    They are exactly the same if they have absolute paths and no empty strings, like those of `read_manifest`.
    Columns that are empty in every row are left out of a CSV.

    Args:
        path: .tsv, .jsonl, .json or CSV, as for `read_manifest`.
        utterances: at least one.
        root: files inside this folder are written relative to it, by default to the manifest's folder. Pass the
            same folder to read the manifest.
        literal_labels: whether the manifest will also be read with this, so that "None" can be a label.

    Raises:
        ManifestError: there are no utterances; `read_manifest` would refuse or change a row; a manifest cannot
            hold a value (a NUL, half a surrogate pair, longer than 128 KiB; in a TSV a line end); an extra column
            has one of our names; or the file cannot be written.
    """
    path = Path(path)
    folder = Path(path.parent if root is None else root).absolute()
    utterances = list(utterances)
    if not utterances:
        raise ManifestError(f"{path}: there are no utterances to write")
    used = {"file", "id", *(name for name in known_columns() for u in utterances if value_of(u, name) is not None)}
    others = dict.fromkeys(name for u in utterances for name in u.extra)
    names, separator = [*(name for name in known_columns() if name in used), *others], _separator(path)
    problems = _Problems()
    for name in others:
        if not _can_name_a_column(name, separator):
            problems.add(f"extra column {brief_repr(name)}", "is not a name of its own")
    try:
        with replace_file(path) as file:
            file.write(csv_line(names, separator) if separator else "")
            file.writelines(_written_lines(utterances, folder, names, separator, literal_labels, problems))
            problems.raise_if_any(f"{path}: nothing was written, these are the problems")
    except OSError as error:
        raise ManifestError(f"{path}: cannot write the manifest: {error.strerror or error}") from error


# --------------------------------------------------------------------------------------------------- checking


def check_labels(
    utterances: Iterable[Utterance],
    *,
    emotions: Iterable[str] | None = None,
    speakers: Iterable[str] | None = None,
) -> None:
    """Check that every emotion and speaker is a known one. An unlabelled utterance (None) is fine.

    Args:
        utterances: those of any manifest.
        emotions: the classes of the model; None: any.
        speakers: the speakers of the model; None: any.

    Raises:
        ManifestError: a label is not known; the message has the first 50 utterances, and for each label the most
            similar known one.
    """
    problems = _Problems()
    given = {"emotion": emotions, "speaker": speakers}
    known = {kind: set(names) for kind, names in given.items() if names is not None}
    for utterance in utterances:
        for kind, names in known.items():
            label = utterance.labels.get(kind)
            if label is not None and label not in names:
                near = did_you_mean(label, names) if problems.count < MAX_LISTED else ""
                problems.add(f"utterance {brief_repr(utterance.id)}", f"unknown {kind} {brief_repr(label)}{near}")
    lists = "; ".join(f"the {kind}s are {brief_repr(sorted(names))}" for kind, names in known.items())
    problems.raise_if_any(f"{lists}; these are other labels, which --map can rename or drop")


def check_distinct(utterances: Sequence[Utterance]) -> None:
    """Refuse ids and recordings (file, start, end) that stand in two of several manifests.

    Raises:
        ManifestError: one message lists the first 50.
    """
    problems = _Problems()
    suspect: set[int] = set()  # rows whose digest another row has: of a million rows, hardly any
    for digests in ((hash(u.id) for u in utterances), (hash(_audio(u)) for u in utterances)):
        numbers = np.fromiter(digests, np.int64, len(utterances))
        order = np.argsort(numbers, kind="stable")
        equal = np.flatnonzero(np.diff(numbers[order]) == 0)
        suspect.update(order[equal].tolist(), order[equal + 1].tolist())
    ids: set[str] = set()
    audio: dict[tuple[str, float, float | None], str] = {}
    for u in (utterances[i] for i in sorted(suspect)):
        first = audio.setdefault(_audio(u), u.id)
        if u.id in ids:
            problems.add(f"utterance {brief_repr(u.id)}", "its id stands in two manifests of one corpus")
        elif first != u.id:
            problems.add(f"utterance {brief_repr(u.id)}", f"is the same recording as {brief_repr(first)}")
        ids.add(u.id)
    problems.raise_if_any("the manifests cannot be used together, these are their problems")


def find_overlap(train: Iterable[Utterance], other: Iterable[Utterance]) -> Overlap:
    """Find the speakers and the recordings of `other` that are also in `train`.

    Recordings are compared by path and exact times. Copies with another name, and excerpts that only overlap, are
    not found.
    """
    train, other = list(train), list(other)
    speakers = {u.speaker for u in train if u.speaker is not None} & {u.speaker for u in other}
    audio = {_audio(u) for u in train}
    return Overlap(sorted(speakers), [u.id for u in other if _audio(u) in audio])


def check_overlap(
    train: Iterable[Utterance], other: Iterable[Utterance], *, allow: str = "none", name: str = "valid"
) -> Overlap:
    """Check that training shares no speaker and no recording with `other`, unless this is allowed.

    Args:
        train: utterances to learn from.
        other: utterances to evaluate on.
        allow: "none", "speakers" (shared speakers, but no shared recording) or "utterances" (both).
        name: the name of `other` in the message.

    Returns:
        What is shared, so that a result can report it.

    Raises:
        ManifestError: more is shared than `allow` permits.
        ConfigError: `allow` is another word.
    """
    if allow not in OVERLAPS:
        near = did_you_mean(allow, OVERLAPS)
        raise ConfigError(f"allow must be one of {', '.join(OVERLAPS)}, not {allow!r}{near}")
    overlap = find_overlap(train, other)
    for kind, shared in vars(overlap).items():
        if shared and OVERLAPS.index(allow) < OVERLAPS.index(kind):
            shown = summary(map(brief_repr, shared), MAX_LISTED)
            need = "utterances" if overlap.utterances else "speakers"
            raise ManifestError(
                f"{name}: {len(shared)} {kind} stand in training too: {shown}. Figures would be too good. "
                f"Split the manifests by speaker, or allow it with --allow-overlap {need}"
            )
    return overlap

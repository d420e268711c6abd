"""Compare corpora: plan which is trained on and which is tested, and hold the results.

    cells = plan_cells(utterances, folds=5)            # of several corpora, see `ser.data.several`
    results = [score(utterances, cell, predicted_of(cell), heard, resamples=1000) for cell in cells]
    print(table(results))

A cell has a training set (a corpus, or all others) and a corpus that is tested. Its figure is the unweighted
accuracy over the classes that both have. All cells of a column test the same utterances, as far as their classes
are in common. This module does not know whether a linear head or a whole model is trained.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ser.data.manifest import Utterance
from ser.data.selection import Selection
from ser.data.several import default_name
from ser.errors import ConfigError, SerError, printable, shorten, summary
from ser.files import csv_line, finite, replace_file
from ser.folder import is_preset
from ser.scores.card import read_record, trained_on
from ser.scores.probe import deal
from ser.scores.report import Figures, Outcomes, intervals

OTHERS = "all others"  # the row of cells that leave the tested corpus out
PART_COLUMNS = ("part", "split")  # of a manifest, whose value "test" says what is tested
VALIDATION = ("valid", "validation", "dev")  # values by which a whole training chooses its weights
FIGURES = ("unweighted_accuracy", "accuracy", "macro_f1")
LONGEST_NAME = 16  # characters of a corpus in the table


# ------------------------------------------------------------------------------------------------------- cells


@dataclass(frozen=True)
class Piece:
    """Hold the numbers of the training utterances and of the test utterances."""

    train: tuple[int, ...]
    test: tuple[int, ...]


@dataclass(frozen=True)
class Cell:
    """Describe a cell.

    Attributes:
        row: its training set for people: the name of a corpus, or `OTHERS`.
        train: the corpora that are trained on.
        test: the corpus that is tested.
        classes: those that both have.
        pieces: what is learnt from and tested; several where a corpus is divided into folds of its speakers.
        left_out: utterances of "train" and "test" that have another class, or within a corpus no known speaker.
        why_empty: why there is no figure; "" where there is one.
    """

    row: str
    train: tuple[str, ...]
    test: str
    classes: tuple[str, ...]
    pieces: tuple[Piece, ...]
    left_out: Mapping[str, int] = field(default_factory=dict, hash=False)
    why_empty: str = ""

    @property
    def within(self) -> bool:
        """Tell whether training and test are of one corpus."""
        return self.train == (self.test,)


def part_of(utterance: Utterance) -> str:
    """Return "test" or "valid" if the manifest says so in one of `PART_COLUMNS`, else ""."""
    values = {utterance.extra.get(name, "").casefold() for name in PART_COLUMNS}
    return "test" if "test" in values else "valid" if values.intersection(VALIDATION) else ""


def with_own_parts(utterances: Sequence[Utterance]) -> tuple[list[Utterance], list[str]]:
    """Leave out further test sets of a corpus: those that have a part and no split, though others have a split.

    Returns:
        The other utterances, and lines that say what is left out, and which corpora have a test part.
    """
    divided = {u.corpus for u in utterances if "split" in u.extra}
    parts: dict[str, list[str]] = {}
    kept = []
    for u in utterances:
        if u.corpus in divided and "part" in u.extra and "split" not in u.extra:
            parts.setdefault(u.corpus, []).append(u.extra["part"])
        else:
            kept.append(u)
    lines = []
    for name, values in parts.items():
        why = "utterances have a part, but no split, and are left out"
        lines.append(f"{name}: {len(values)} {why}: {summary(sorted({*values}))}")
    tested = list(dict.fromkeys(u.corpus for u in kept if part_of(u) == "test"))
    own = "its own test part is" if len(tested) == 1 else "their own test parts are"
    return kept, lines + ([f"{summary(tested)}: {own} tested (column part or split)"] if tested else [])


def sides(utterances: Sequence[Utterance], rows: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return the training rows and the test rows of a corpus; without a test part, both are all rows."""
    tested = [i for i in rows if part_of(utterances[i]) == "test"]
    others = [i for i in rows if part_of(utterances[i]) != "test"]
    return (others, tested) if tested and others else ([*rows], [*rows])


def divided(
    utterances: Sequence[Utterance], train: Sequence[int], test: Sequence[int], folds: int
) -> tuple[list[Piece], str]:
    """Divide one corpus so that it can be learnt and tested; or say why it cannot be.

    Its own test part is tested, or its speakers are divided into folds, each of which is tested once.
    """
    if set(train).isdisjoint(test):
        return [Piece(tuple(train), tuple(test))], ""
    known = [i for i in test if utterances[i].speaker is not None]
    parts = deal([str(utterances[i].speaker) for i in known], folds) if folds > 1 else np.zeros(0, np.int64)
    count = len(np.unique(parts))
    if folds < 2:
        return [], "--folds 0 leaves it out"
    if count < 2:
        return [], "the corpus has only one speaker" if known else "the speakers are not known"
    rows = np.array(known)
    return [Piece(tuple(rows[parts != k].tolist()), tuple(rows[parts == k].tolist())) for k in range(count)], ""


def cell_of(
    utterances: Sequence[Utterance],
    row: str,
    learnt: Mapping[str, Sequence[int]],
    test: tuple[str, Sequence[int]],
    folds: int,
) -> Cell:
    """Make the cell of a training set, corpora with their rows, and a tested corpus with its rows."""
    (name, tested), train = test, [i for rows in learnt.values() for i in rows]
    both = {utterances[i].emotion for i in train} & {utterances[i].emotion for i in tested}
    classes = tuple(sorted(str(emotion) for emotion in both))
    sets = {"train": train, "test": tested}
    kept = {part: [i for i in rows if utterances[i].emotion in both] for part, rows in sets.items()}
    pieces, why = [Piece(tuple(kept["train"]), tuple(kept["test"]))], ""
    if len(classes) < 2:
        pieces, why = [], f"the corpora have {len(classes)} class{'' if len(classes) == 1 else 'es'} in common"
    elif (name,) == tuple(learnt):
        pieces, why = divided(utterances, kept["train"], kept["test"], folds)
    used = {"train": {i for p in pieces for i in p.train}, "test": {i for p in pieces for i in p.test}}
    left_out = {part: len(rows) - len(used[part]) for part, rows in sets.items()} if pieces else {}
    return Cell(row, tuple(learnt), name, classes, tuple(pieces), left_out, why)


def plan_cells(utterances: Sequence[Utterance], *, folds: int) -> list[Cell]:
    """Make all cells, row by row: test each training set on each corpus, and all others on the one left out.

    Args:
        utterances: of several corpora, all with an emotion.
        folds: the number of folds of speakers for a corpus without a test part; 0: nothing is tested within it.

    Raises:
        ConfigError: a corpus has the name `OTHERS`.
    """
    rows: dict[str, list[int]] = {}
    for i, u in enumerate(utterances):
        rows.setdefault(u.corpus, []).append(i)
    if OTHERS in rows:
        raise ConfigError(f"the corpus {OTHERS!r} has the name of a row of the table; name it in a JSON list")
    both = {name: sides(utterances, of_corpus) for name, of_corpus in rows.items()}
    sets = {name: {name: both[name][0]} for name in rows}
    cells = [cell_of(utterances, row, sets[row], (name, both[name][1]), folds) for row in rows for name in rows]
    if len(rows) > 2:  # of two corpora, the other one is all others
        for name in rows:
            others = {other: both[other][0] for other in rows if other != name}
            cells.append(cell_of(utterances, OTHERS, others, (name, both[name][1]), folds))
    return cells


# ------------------------------------------------------------------------------------ what the model has heard


@cache
def real_path(path: Path) -> str:
    """Return the path without symbolic links; it is asked for in every cell."""
    return os.path.realpath(path)


def speaker_keys(utterance: Utterance, corpus: str) -> set[tuple[str, ...]]:
    """Return keys by which the speaker and the recording of an utterance are found in other manifests.

    A speaker is the same where the name is the same in the same corpus, or in the same folder of recordings.
    """
    keys: set[tuple[str, ...]] = {("file", real_path(utterance.file))}
    if utterance.speaker is not None:
        name = utterance.speaker.removeprefix(f"{corpus}/")
        keys |= {("corpus", corpus, name), ("folder", real_path(utterance.file.parent), name)}
    return keys


@dataclass(frozen=True)
class Heard:
    """Hold what a model has heard in training.

    Attributes:
        keys: `speaker_keys` of all utterances that are known to be in its training.
        unknown: why there may be others; "" where there are none.
    """

    keys: frozenset[tuple[str, ...]] = frozenset()
    unknown: str = ""

    def speakers(self, utterances: Iterable[Utterance]) -> set[str]:
        """Return those who were heard: speakers, and ids of utterances whose speaker is not known."""
        named: dict[str, set[tuple[str, ...]]] = {}
        for u in utterances:
            named.setdefault(u.speaker or u.id, set()).update(speaker_keys(u, u.corpus))
        return {name for name, keys in named.items() if not self.keys.isdisjoint(keys)}


def heard_by(model: str | Path) -> Heard:
    """Find the training data of a model, and of the models that it began from, back to random weights.

    Validation data count too if they chose the weights, as those in best/.

    Args:
        model: a preset, or a model folder that is on this machine.
    """
    keys: set[tuple[str, ...]] = set()
    seen: set[Path] = set()
    try:
        while not is_preset(model):
            folder = Path(model).resolve()
            record = None if folder in seen else read_record(folder)
            named = None if record is None else trained_on(record)
            if record is None or named is None:
                return Heard(frozenset(keys), f"{model} does not say what it was trained on")
            valid = record["settings"].get("valid") if record.get("weights") == "best" else None
            for one in [named, *([Selection.from_dict(valid)] if valid else [])]:
                corpus, rows = default_name(one.data), one.utterances(check_files=False)
                keys |= {key for u in rows for key in speaker_keys(u, u.corpus or corpus)}
            seen.add(folder)
            model = str(record["settings"].get("init"))
    except SerError as error:
        return Heard(frozenset(keys), shorten(str(error), 200))
    return Heard(frozenset(keys))


# ----------------------------------------------------------------------------------------------------- results


@dataclass(frozen=True)
class Result:
    """Hold the result of a cell.

    Attributes:
        cell: which.
        figures: name -> value, of `FIGURES`; empty without a figure.
        interval: the 95 % interval of the UA by bootstrap over speakers; None where one or none is known.
        utterances, speakers: that were tested, and how many are known.
        unread: utterances of the test that could not be read.
        heard_by_head: speakers of the test who are in the training of this cell.
        heard_by_model: those whom the model itself heard before; None: not known.
        lacking: folds whose training lacks a class, since all its speakers are tested.
        penalties: those of the linear heads.
    """

    cell: Cell
    figures: Mapping[str, float] = field(default_factory=dict)
    interval: tuple[float, float] | None = None
    utterances: int = 0
    speakers: int = 0
    unread: int = 0
    heard_by_head: int = 0
    heard_by_model: int | None = None
    lacking: int = 0
    penalties: tuple[float, ...] = ()

    @property
    def ua(self) -> float | None:
        """Return the unweighted accuracy, or None without a figure."""
        return self.figures.get("unweighted_accuracy")

    @property
    def marks(self) -> str:
        """Return the marks of the figure, letters that `MARKS` explains."""
        flags = {"*": self.cell.within, "t": self.heard_by_head, "m": self.heard_by_model}
        return "".join(mark for mark, holds in flags.items() if holds) if self.figures else ""

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON holds it."""
        cell, empty = self.cell, {"why_empty": self.cell.why_empty} if self.cell.why_empty else {}
        content: dict[str, Any] = {"row": cell.row, "train": [*cell.train], "test": cell.test}
        content |= {"within": cell.within, "classes": [*cell.classes]} | empty
        if not self.figures:
            return content
        return finite(
            content
            | {"chance": 1 / len(cell.classes), **self.figures}
            | {"interval_speakers": self.interval and [*self.interval]}
            | {"utterances": self.utterances, "speakers": self.speakers, "unread": self.unread}
            | {"trained_on": max(len(piece.train) for piece in cell.pieces), "folds": len(cell.pieces)}
            | {"folds_lacking_a_class": self.lacking}
            | {"left_out": dict(cell.left_out), "penalties": [*self.penalties]}
            | {"speakers_heard_by_head": self.heard_by_head, "speakers_heard_by_model": self.heard_by_model}
        )


MARKS = {
    "*": "training and test are of one corpus: no test speaker is in training, unless the corpus itself defines "
    "the test part",
    "t": "some test speakers are in the training set of this cell",
    "m": "the model itself has heard some speakers of the test in its own training",
}


def score(
    utterances: Sequence[Utterance],
    cell: Cell,
    predicted: Mapping[int, str],
    heard: Heard,
    *,
    resamples: int,
    penalties: Sequence[float] = (),
) -> Result:
    """Compute the figures of a cell.

    Args:
        utterances: those that the numbers in the cell mean.
        cell: which.
        predicted: number of a tested utterance -> class; those that could not be read are not in it.
        heard: what the model heard in its own training.
        resamples: of the bootstrap.
        penalties: of the linear heads, for the record.
    """
    everything = [i for piece in cell.pieces for i in piece.test]
    tested = [utterances[i] for i in everything if i in predicted]
    if not tested:
        why = "no recording of the training or of the test could be read"
        return Result(replace(cell, why_empty=cell.why_empty or why))
    records = [
        {"id": u.id, "emotion": u.emotion, "speaker": u.speaker, "predicted": predicted[i]}
        for i, u in zip((i for i in everything if i in predicted), tested, strict=True)
    ]
    outcomes = Outcomes.of(cell.classes, records)
    figures, speakers = Figures(outcomes), outcomes.text["speaker"]
    values = figures()
    known = set(speakers) - {""}
    interval = None
    if all(speakers) and len(known) > 1:
        low, high = intervals(figures, speakers, resamples=resamples)["unweighted_accuracy"]
        interval = (low, high)
    repeated: set[str | None] = set()
    lacking = 0
    for piece in cell.pieces:
        lacking += {utterances[i].emotion for i in piece.train} != {*cell.classes}
        repeated |= {utterances[i].speaker for i in piece.train} & {utterances[i].speaker for i in piece.test}
    by_model = len(heard.speakers(tested))
    return Result(
        cell,
        {name: values[name] for name in FIGURES},
        interval,
        len(tested),
        len(known),
        len(everything) - len(tested),
        len(repeated - {None}),
        None if heard.unknown and not by_model else by_model,
        lacking,
        tuple(penalties),
    )


# ----------------------------------------------------------------------------------------------------- writing


def grid(results: Sequence[Result]) -> tuple[list[str], list[str], dict[tuple[str, str], Result]]:
    """Return the names of the rows and of the columns, and (row, column) -> result."""
    cells = {(result.cell.row, result.cell.test): result for result in results}
    rows, columns = (list(dict.fromkeys(pair[i] for pair in cells)) for i in (0, 1))
    return rows, columns, cells


def most_classes(results: Sequence[Result]) -> int:
    """Return the largest number of classes that a cell with a figure has."""
    return max((len(result.cell.classes) for result in results if result.figures), default=0)


def chance_text(results: Sequence[Result]) -> str:
    """Return the accuracy of guessing, such as "0.25 (0.33 with 3 classes)"."""
    counts = sorted({len(result.cell.classes) for result in results if result.figures}, reverse=True)
    fewer = [f"{1 / count:.2f} with {count}" for count in counts[1:]]
    return f"{1 / counts[0]:.2f}" + (f" ({', '.join(fewer)} classes)" if fewer else "") if counts else "-"


def cell_texts(result: Result | None, most: int) -> tuple[str, str]:
    """Write a cell of the table: the figure with its marks, and the interval."""
    if result is None or result.ua is None:
        return "-", ""
    count = len(result.cell.classes)
    fewer = "" if count == most else f" of {count}"
    low_high = "" if result.interval is None else "{:.2f}-{:.2f}".format(*result.interval)
    return f"{result.ua:.3f}{result.marks}", f"{low_high}{fewer}"


def heard_text(results: Sequence[Result], unknown: str) -> str:
    """Say in a word or two how many speakers of a column the model has heard."""
    known = [r for r in results if r.figures]
    most = max(known, key=lambda r: r.heard_by_model or 0, default=None)
    if most is None or most.heard_by_model is None:
        return "unknown" if unknown or most is not None else "-"
    return f"{most.heard_by_model} of {most.speakers}" if most.heard_by_model else "none"


def table_lines(results: Sequence[Result], unknown: str = "") -> list[str]:
    """Write the matrix, a row for each training set, and below it what is known of each tested corpus."""
    rows, columns, cells = grid(results)
    most = most_classes(results)
    lines = [["train \\ test", *(shorten(printable(name), LONGEST_NAME) for name in columns)]]
    for row in rows:
        pairs = [cell_texts(cells.get((row, column)), most) for column in columns]
        lines += [[shorten(printable(row), LONGEST_NAME), *(value for value, _ in pairs)]]
        lines += [["", *(interval for _, interval in pairs)]]
    of_column = {c: [cells[r, c] for r in rows if (r, c) in cells] for c in columns}
    for title, count in (("utterances", "utterances"), ("speakers", "speakers")):
        lines.append([title, *(str(max(getattr(r, count) for r in of_column[c])) for c in columns)])
    lines.append(["model heard", *(heard_text(of_column[c], unknown) for c in columns)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines
    ]


def notes(results: Sequence[Result], unknown: str = "") -> list[str]:
    """Say what has to be known about the figures: chance, classes, marks, and what is left out."""
    with_figures = [r for r in results if r.figures]
    lines = [f"chance: {chance_text(results)}"]
    sets: dict[tuple[str, ...], list[str]] = {}
    for result in with_figures:
        sets.setdefault(result.cell.classes, []).append(f"{result.cell.row} > {result.cell.test}")
    for classes, places in sorted(sets.items(), key=lambda item: -len(item[1])):
        where = f"{len(places)} cells" if len(places) > 4 else summary(places)
        lines.append(printable(f"{len(classes)} classes in common, {', '.join(classes)}: {where}"))
    if any(n for r in with_figures for n in r.cell.left_out.values()):
        counted = "crosscorpus.csv counts them for each cell"
        lines.append(f"utterances of other classes are left out of training and test; {counted}")
    marks = "".join(r.marks for r in with_figures)
    lines += [f"{mark}  {text}" for mark, text in MARKS.items() if mark in marks]
    lines += [f"what the model heard is unknown: {printable(unknown)}"] if unknown else []
    if unread := max((r.unread for r in with_figures), default=0):
        lines.append(f"up to {unread} utterances of a cell could not be read and are in no figure")
    for r in with_figures:
        if r.lacking:
            folds = f"{r.lacking} of {len(r.cell.pieces)} folds"
            lines.append(
                printable(f"{r.cell.row} > {r.cell.test}: the training of {folds} lacks a class of the test")
            )
    why = {f"{r.cell.row} > {r.cell.test}: {r.cell.why_empty}": r for r in results if r.cell.why_empty}
    return [*lines, *(printable(f"no figure for {line}") for line in why)]


def to_dict(results: Sequence[Result], about: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of crosscorpus.json: what was asked, the matrix of UA, and every cell."""
    rows, columns, cells = grid(results)
    matrix = {row: {c: cells[row, c].ua for c in columns if (row, c) in cells} for row in rows}
    return {**about, "unweighted_accuracy": finite(matrix), "cells": [result.to_dict() for result in results]}


def write_csv(path: Path, results: Sequence[Result]) -> None:
    """Write a line for each cell."""
    names = ["row", "test", "classes", "chance", *FIGURES, "low", "high", "utterances", "speakers", "unread"]
    names += ["trained_on", "folds", "folds_lacking_a_class", "left_out_train", "left_out_test"]
    names += ["speakers_heard_by_head", "speakers_heard_by_model", "why_empty"]
    with replace_file(path) as file:
        file.write(csv_line(names))
        for result in results:
            values = result.to_dict()
            low_high = values.get("interval_speakers") or (None, None)
            values |= {"low": low_high[0], "high": low_high[1], "classes": " ".join(values["classes"])}
            values |= {f"left_out_{part}": count for part, count in values.get("left_out", {}).items()}
            file.write(csv_line(values.get(name) for name in names))

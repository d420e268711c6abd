"""Compute figures from predictions, with intervals, calibration, parts and comparisons.

This file has, from the top: sums over utterances; the table of how heads are scored; outcomes (a few numbers per
utterance); figures; intervals by bootstrap; the report and its table; the comparison of two. Every figure can be
computed again from the predictions file.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ser.data.labels import LABELS
from ser.data.manifest import Utterance, check_regular
from ser.data.text import Rewriting
from ser.errors import ConfigError, ManifestError, printable
from ser.files import csv_line, finite, replace_file
from ser.recognizer import Prediction, Recognizer
from ser.scores.counts import ccc_summands, character_errors, class_figures, concordance, ratio, word_errors

CHUNK = 8192  # utterances that are in memory at the same time
CALIBRATION_BINS = 15  # as in Guo et al., 2017
RESAMPLES = 1000
MAX_COUNTS = 4_000_000  # counts (resamples x utterances) that are in memory at the same time
MANY_CLASSES = 100  # with more classes there is no confusion matrix
MOST_LISTED = 20  # labels, classes or confusions in a line or a list
LENGTHS = (0.0, 2.0, 4.0, 8.0, math.inf)  # limits of the parts by length, in seconds
# Columns of the predictions file by which figures are reported in parts, if no others are named.
SEEN_TEXT = "seen_text"  # whether training had the transcript
PARTS = ("kind", SEEN_TEXT)
CORPUS = "corpus"  # the column of parts if there are several corpora

# (least, most) of a column's numbers
SHARE, COUNT, NUMBER = (0.0, 1.0), (0.0, math.inf), (-math.inf, math.inf)
EXPECTED = {SHARE: "a number from 0 to 1", COUNT: "a number from 0", NUMBER: "a finite number"}


# ---------------------------------------------------------------------------------------------------- sums


class Sums(NamedTuple):
    """Describe M sums over utterances, and the figures that are functions of these sums.

    Attributes:
        summands: rows -> what each of these n utterances adds to the sums, (n, M).
        figures: the sums of R resamples (R, M) -> name -> (R,).
    """

    summands: Callable[[slice], NDArray[np.float64]]
    figures: Callable[[NDArray[np.float64]], dict[str, NDArray[np.float64]]]


def calibration_summands(confidence: NDArray[np.float64], right: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return 1, correctness and confidence in the columns of each utterance's bin: (N,) each -> (N, 3 * bins)."""
    place = np.clip(np.ceil(confidence * CALIBRATION_BINS).astype(np.int64) - 1, 0, CALIBRATION_BINS - 1)
    inside = place[:, None] == np.arange(CALIBRATION_BINS)
    blocks = [inside, inside * right[:, None], inside * confidence[:, None]]
    return np.concatenate(blocks, axis=1, dtype=np.float64)


def expected_calibration_error(totals: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compute the ECE, 0..1: (R, 3 * bins) sums of `calibration_summands` -> (R,), NaN without utterances.

    The ECE is the mean over equal bins of confidence of |accuracy - confidence|, weighted by their sizes (Guo et
    al., *On Calibration of Modern Neural Networks*, ICML 2017, eq. 3, with 15 bins).
    """
    count, right, confidence = np.split(totals, 3, axis=1)
    return ratio(np.abs(right - confidence).sum(1), count.sum(1))


def class_pairs(names: Sequence[str], reference: Iterable[str], predicted: Iterable[str]) -> NDArray[np.int64]:
    """Return each utterance's label and prediction as class numbers, both -1 if one is no class: (N, 2)."""
    index = {name: i for i, name in enumerate(names)}
    columns = [[index.get(name, -1) for name in column] for column in (reference, predicted)]
    pairs = np.array(columns, np.int64).T
    return np.where(np.all(pairs >= 0, axis=1, keepdims=True), pairs, -1)


def number_scored(pairs: NDArray[np.int64]) -> int:
    """Count the utterances whose label and prediction are classes, in `class_pairs`."""
    return int((pairs[:, 0] >= 0).sum())


def class_sums(
    names: Sequence[str], pairs: NDArray[np.int64], confidence: NDArray[np.float64] | None = None, prefix: str = ""
) -> Sums:
    """Return the sums of a classification head, for `class_figures` and calibration.

    Args:
        names: the names of the classes.
        pairs: (N, 2), as `class_pairs` returns them.
        confidence: (N,) the probability of the predicted class; None: not known.
        prefix: the beginning of the figures' names.
    """
    scored = pairs[:, 0] >= 0
    right = scored & (pairs[:, 0] == pairs[:, 1])
    classes = np.unique(pairs[scored])  # (C,) the classes that occur; a model may have thousands more

    def summands(rows: slice) -> NDArray[np.float64]:
        """Return (n, 3 C + 3 bins): correct, in the reference, recognised, for each class; and calibration."""
        reference, predicted = (pairs[rows, i, None] == classes for i in (0, 1))
        blocks: list[NDArray[Any]] = [reference & right[rows, None], reference, predicted]
        if confidence is not None:
            binned = calibration_summands(np.nan_to_num(confidence[rows]), right[rows])
            blocks.append(binned * scored[rows, None])
        return np.concatenate(blocks, axis=1, dtype=np.float64)

    def figures(sums: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
        """Compute the figures of `class_figures`, the ECE, and precision and recall of each class."""
        if not len(classes):
            return {}
        totals, binned = np.split(sums, [3 * len(classes)], axis=1)
        totals = totals.reshape(len(sums), 3, -1)
        values = class_figures(totals, len(names))
        values |= {} if confidence is None else {"ece": expected_calibration_error(binned)}
        undefined = np.full(len(sums), np.nan)
        for kind, whole in (("precision", totals[:, 2]), ("recall", totals[:, 1])):
            of_class = dict(zip(classes.tolist(), ratio(totals[:, 0], whole).T, strict=True))
            values |= {f"{kind} {name}": of_class.get(i, undefined) for i, name in enumerate(names)}
        return {f"{prefix}{name}": value for name, value in values.items()}

    return Sums(summands, figures)


def rate_sums(name: str, part: NDArray[Any], whole: NDArray[Any]) -> Sums:
    """Return the sums of a rate such as edits per word, from part and whole, (N,) each, NaN where unknown."""
    return Sums(
        lambda rows: np.nan_to_num(np.stack([part[rows], whole[rows]], 1)), lambda sums: {name: ratio(*sums.T)}
    )


def concordance_sums(name: str, labels: NDArray[np.float64], predictions: NDArray[np.float64]) -> Sums:
    """Return the sums for the CCC of a number; labels and predictions are (N,), NaN where unknown."""

    def summands(rows: slice) -> NDArray[np.float64]:
        """Return what each utterance adds to the moments: (n, 6)."""
        y, p = (torch.from_numpy(x[rows, None]) for x in (labels, predictions))
        return ccc_summands(p.nan_to_num(), y.masked_fill(~p.isfinite(), torch.nan))[:, :, 0].T.numpy()

    return Sums(summands, lambda sums: {f"ccc {name}": concordance(torch.from_numpy(sums.T.copy())).numpy()})


# ------------------------------------------------------------------------------- the table of scored heads


@dataclass(frozen=True)
class Answer:
    """Hold what a row of the predictions file is made from.

    Attributes:
        labels: column of the manifest -> label.
        reference: the transcript as far as the vocabulary can write it; empty for none.
        prediction: what was recognised.
        speakers: the speakers that the model knows.
    """

    labels: Mapping[str, Any]
    reference: str
    prediction: Prediction
    speakers: Sequence[str]


@dataclass(frozen=True)
class Measure:
    """Describe how a head is scored: its columns in the predictions file, and what is summed of them.

    Attributes:
        texts: its columns of texts, "" where unknown.
        numbers: its columns of numbers, NaN where unknown -> their range.
        cells: `Answer` -> the values of these columns.
        sums: outcomes -> one `Sums` for each figure that can be computed.
        judged: outcomes -> name -> how many items the figures count.
    """

    texts: tuple[str, ...]
    numbers: Mapping[str, tuple[float, float]]
    cells: Callable[[Answer], dict[str, Any]]
    sums: Callable[[Outcomes], Sequence[Sums]]
    judged: Callable[[Outcomes], dict[str, int]] = lambda outcomes: {}


def emotion_cells(row: Answer) -> dict[str, Any]:
    """Return label, predicted emotion and all probabilities."""
    predicted, probabilities = row.prediction.emotion, row.prediction.probabilities or {}
    cells = {"emotion": row.labels.get("emotion"), "predicted": predicted}
    cells |= {f"p_{name}": probability for name, probability in probabilities.items()}
    return cells | {"confidence": cells.get(f"p_{predicted}")}


def emotion_pairs(outcomes: Outcomes) -> NDArray[np.int64]:
    """Return `class_pairs` of the emotion head."""
    return class_pairs(outcomes.emotions, outcomes.text["emotion"], outcomes.text["predicted"])


def transcript_cells(row: Answer) -> dict[str, Any]:
    """Return reference and transcript, and their edits."""
    reference, transcript = row.reference, row.prediction.transcript
    if transcript is None or not reference:
        return {"transcript": transcript}
    words, characters = word_errors(reference, transcript), character_errors(reference, transcript)
    cells = {"reference": reference, "transcript": transcript, "word_edits": words.edits, "words": words.length}
    return cells | {"character_edits": characters.edits, "characters": characters.length}


def transcript_sums(outcomes: Outcomes) -> list[Sums]:
    """Return the sums of word and character error rate, if there are references."""
    columns = {"wer": ("word_edits", "words"), "cer": ("character_edits", "characters")}
    parts = {name: [outcomes.numbers[c] for c in pair] for name, pair in columns.items()}
    return [rate_sums(name, edits, whole) for name, (edits, whole) in parts.items() if np.nan_to_num(whole).any()]


def speaker_cells(row: Answer) -> dict[str, Any]:
    """Return whether the speaker is recognised, if the model knows the speaker."""
    speaker, answer = row.labels.get("speaker"), row.prediction.speaker
    return {"speaker_right": int(answer == speaker)} if answer is not None and speaker in row.speakers else {}


def speaker_sums(outcomes: Outcomes) -> list[Sums]:
    """Return the sums of the speaker head's accuracy, if the model knows a speaker."""
    right = outcomes.numbers["speaker_right"]
    known = np.isfinite(right)
    return [rate_sums("speaker_accuracy", right, known)] if known.any() else []


def measure_of_classes(head: str, columns: Sequence[str]) -> Measure:
    """Describe a classification head that was added. The names of its figures begin with the head's name.

    The predictions file has the label in the column of the manifest, and the predicted class in HEAD_predicted.
    """
    both = label, predicted = columns[0], f"{head}_predicted"

    def named_pairs(outcomes: Outcomes) -> tuple[list[str], NDArray[np.int64]]:
        texts = [outcomes.text[column] for column in both]
        names = sorted({*texts[0], *texts[1]} - {""})
        return names, class_pairs(names, *texts)

    return Measure(
        both,
        {},
        lambda row: {label: row.labels.get(label), predicted: row.prediction.others.get(head)},
        lambda outcomes: [class_sums(*named_pairs(outcomes), prefix=f"{head} ")],
        lambda outcomes: {head: number_scored(named_pairs(outcomes)[1])},
    )


def measure_of_numbers(head: str, columns: Sequence[str]) -> Measure:
    """Describe a head of numbers, which is scored by the concordance of each column.

    The predictions file has the label of the column "age" in age, and the prediction in age_predicted.
    """

    def cells(row: Answer) -> dict[str, Any]:
        numbers = row.prediction.dimensions if head == "dimensions" else row.prediction.others.get(head)
        values = {name.lower(): value for name, value in (numbers or {}).items()}  # some models spell Arousal
        known = [name for name in columns if name in values]
        return {n: row.labels.get(n) for n in known} | {f"{n}_predicted": values[n] for n in known}

    def sums(outcomes: Outcomes) -> list[Sums]:
        pairs = {name: [outcomes.numbers[c] for c in (name, f"{name}_predicted")] for name in columns}
        return [concordance_sums(n, *pair) for n, pair in pairs.items() if np.isfinite(pair).all(0).any()]

    names = (*columns, *(f"{name}_predicted" for name in columns))
    return Measure((), dict.fromkeys(names, NUMBER), cells, sums)


# head -> how it is scored; other heads are scored by the kind of their labels
MEASURES = {
    "emotion": Measure(
        ("emotion", "predicted"),
        {"confidence": SHARE},
        emotion_cells,
        lambda outcomes: [class_sums(outcomes.emotions, emotion_pairs(outcomes), outcomes.numbers["confidence"])],
        lambda outcomes: {"emotion": number_scored(emotion_pairs(outcomes))},
    ),
    "ctc": Measure(
        ("reference", "transcript"),
        dict.fromkeys(("word_edits", "words", "character_edits", "characters"), COUNT),
        transcript_cells,
        transcript_sums,
        lambda outcomes: {"words": int(np.nansum(outcomes.numbers["words"]))},
    ),
    "speaker": Measure(
        (),
        {"speaker_right": SHARE},
        speaker_cells,
        speaker_sums,
        lambda outcomes: {"speaker": int(np.isfinite(outcomes.numbers["speaker_right"]).sum())},
    ),
}
MEASURES_OF_KINDS = {"class": measure_of_classes, "numbers": measure_of_numbers}


def measures() -> list[Measure]:
    """Return how each head is scored: its row in `MEASURES`, or the usual measure for its kind of labels."""
    return [
        MEASURES.get(head) or MEASURES_OF_KINDS[label.kind](head, label.columns)
        for head, label in LABELS.items()
        if head in MEASURES or label.kind in MEASURES_OF_KINDS
    ]


def text_columns(parts: Iterable[str]) -> tuple[str, ...]:
    """Return the columns of texts of a predictions file; ``parts`` are columns by which figures are reported."""
    of_heads = (column for measure in measures() for column in measure.texts)
    return tuple(dict.fromkeys(["id", "file", "speaker", *parts, *of_heads]))


def number_columns() -> dict[str, tuple[float, float]]:
    """Return the columns of numbers of a predictions file -> their range."""
    return {"seconds": COUNT} | {name: span for m in measures() for name, span in m.numbers.items()}


def checked_rows(
    reader: csv.DictReader[str], ranges: Mapping[str, tuple[float, float]]
) -> Iterator[dict[str, str]]:
    """Yield the rows of a predictions file. Raises ValueError for a wrong number of cells, or a bad number."""
    for record in reader:
        where = f"line {reader.line_num}"
        if None in record or None in record.values():
            raise ValueError(f"{where}: has more or fewer cells than the header")
        for name, (least, most) in ranges.items():
            try:
                value = float(record[name] or 0)
            except ValueError:
                value = math.inf
            if math.isinf(value) or value < least or value > most:  # NaN is neither
                expected = EXPECTED[least, most]
                raise ValueError(f"{where}: {name} is {record[name][:40]!r}; expected {expected}, or nothing")
        yield record


def as_row(recognizer: Recognizer, utterance: Utterance, reference: str, prediction: Prediction) -> dict[str, Any]:
    """Make one row of the predictions file, with None for unknown values.

    The row also has the extra columns of the manifest, since figures may be reported by them.
    """
    row: dict[str, Any] = dict(utterance.extra) | dict.fromkeys((*text_columns([SEEN_TEXT]), *number_columns()))
    row |= {"id": utterance.id, "file": str(utterance.file), "speaker": utterance.speaker}
    row["seconds"] = prediction.seconds
    answer = Answer(utterance.labels, reference, prediction, recognizer.speakers)
    return row | {name: cell for measure in measures() for name, cell in measure.cells(answer).items()}


# ------------------------------------------------------------------------------------------------- outcomes


@dataclass
class Outcomes:
    """Hold the outcome of N utterances, which are rows of the predictions file, as arrays of length N.

    Attributes:
        emotions: class names in the model's order.
        text: the columns of `text_columns`, and the corpus, "" where unknown.
        numbers: the columns of `number_columns`, NaN where unknown. confidence is the probability of the predicted
            emotion; speaker_right is 1 or 0 for an utterance by a speaker that the model knows.
        parts: the columns of texts by which figures are reported in parts.
    """

    emotions: list[str]
    text: dict[str, NDArray[np.object_]]
    numbers: dict[str, NDArray[np.float64]]
    parts: tuple[str, ...] = PARTS

    def __len__(self) -> int:
        return len(self.numbers["seconds"])

    def part(self, rows: NDArray[Any]) -> Outcomes:
        """Return some rows, selected by ``rows``: a mask (N,), or the numbers of rows in order."""
        text, numbers = ({name: c[rows] for name, c in columns.items()} for columns in (self.text, self.numbers))
        return Outcomes(self.emotions, text, numbers, self.parts)

    def relabelled(self, names: Mapping[str, str | None]) -> Outcomes:
        """Return the outcomes with other names of emotions, in labels and predictions.

        None removes a label. A prediction keeps its name then, since it is still wrong for another label.
        """
        if not names:
            return self
        new = {old: old if name is None else name for old, name in names.items()}
        labels = [names.get(name, name) or "" for name in self.text["emotion"]]
        answers = [new.get(name, name) for name in self.text["predicted"]]
        columns = {"emotion": np.array(labels, object), "predicted": np.array(answers, object)}
        emotions = list(dict.fromkeys(new.get(name, name) for name in self.emotions))
        return Outcomes(emotions, self.text | columns, self.numbers, self.parts)

    @classmethod
    def of(
        cls, emotions: Sequence[str], records: Sequence[Mapping[str, Any]], parts: Sequence[str] = PARTS
    ) -> Outcomes:
        """Make outcomes from rows of a predictions file."""
        shared: dict[str, str] = {}  # equal strings are stored once, since a million rows have few labels

        def number(value: Any) -> float:  # NaN and infinity (a score that overflowed) count as unknown
            return float(value) if value not in ("", None) and math.isfinite(float(value)) else math.nan

        def texts(column: str) -> NDArray[np.object_]:
            return np.array([shared.setdefault(v, v) for r in records for v in [r.get(column) or ""]], object)

        return cls(
            list(emotions),
            {column: texts(column) for column in (*text_columns(parts), CORPUS)},
            {name: np.array([number(r.get(name)) for r in records], np.float64) for name in number_columns()},
            tuple(parts),
        )

    @classmethod
    def joined(cls, several: Sequence[Outcomes]) -> Outcomes:
        """Join several outcomes, in their order. The classes must be the same."""
        if not several:
            raise ConfigError("there are no predictions to judge")
        first = several[0]
        for one in several:
            if one.emotions != first.emotions:
                raise ConfigError(f"classes differ: {first.emotions} and {one.emotions}")
        text = {name: np.concatenate([one.text[name] for one in several]) for name in first.text}
        numbers = {name: np.concatenate([one.numbers[name] for one in several]) for name in first.numbers}
        return cls(first.emotions, text, numbers, first.parts)

    @classmethod
    def read(cls, path: Path, parts: Sequence[str] = PARTS) -> Outcomes:
        """Read a predictions file. Raises ConfigError if it is not a valid one."""
        try:
            return cls._read(path, parts)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
        except ManifestError as error:
            raise ConfigError(str(error)) from None
        except (ValueError, csv.Error) as error:
            raise ConfigError(f"{path}: is no sound predictions file: {error}") from None

    @classmethod
    def _read(cls, path: Path, parts: Sequence[str]) -> Outcomes:
        check_regular(path, "a predictions file")
        with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets begin it with a byte order mark
            reader = csv.DictReader(file)
            header, numbers = reader.fieldnames or [], number_columns()
            if missing := [name for name in (*text_columns(parts), *numbers) if name not in header]:
                raise ConfigError(f"{path}: is no predictions file, it lacks the columns {', '.join(missing)}")
            if twice := [name for name, count in Counter(header).items() if count > 1]:
                raise ConfigError(f"{path}: is no predictions file, it has several columns {', '.join(twice)}")
            probabilities = [name for name in header if name.startswith("p_")]
            emotions = [name.removeprefix("p_") for name in probabilities]
            rows = checked_rows(reader, numbers | dict.fromkeys(probabilities, SHARE))
            chunks = itertools.chain(iter(lambda: list(itertools.islice(rows, CHUNK)), []), [[]])
            return cls.joined([cls.of(emotions, chunk, parts) for chunk in chunks])


def write_rows(
    path: Path, chunks: Iterable[list[dict[str, Any]]], emotions: Sequence[str], parts: Sequence[str] = PARTS
) -> Outcomes:
    """Write the predictions file from chunks of rows, which `as_row` makes, and return the outcomes."""
    columns = [*text_columns(parts), *number_columns(), *(f"p_{name}" for name in emotions)]
    kept = []
    with replace_file(path) as file:
        file.write(csv_line(columns))
        for rows in chunks:
            file.writelines(csv_line([finite(row.get(name)) for name in columns]) for row in rows)
            kept.append(Outcomes.of(emotions, rows, parts))
    return Outcomes.joined(kept)


# -------------------------------------------------------------------------------------------------- figures


class Figures:
    """Compute every figure of some outcomes from sums over utterances.

        figures = Figures(outcomes)
        figures()                                # each utterance counts once
        figures(weights)                         # (N,): how often each utterance counts
        figures.of(figures.totals(weights))      # weights (R, N), R resamples at once -> name -> (R,)

    Accuracies, error rates, calibration and concordance are functions of such sums, so a bootstrap of a thousand
    resamples is one matrix product.
    """

    def __init__(self, outcomes: Outcomes) -> None:
        """Take the sums of every head that has labels."""
        self.size = len(outcomes)
        self.sums = [sums for measure in measures() for sums in measure.sums(outcomes)]
        self.widths = [sums.summands(slice(0)).shape[1] for sums in self.sums]
        self.chunk = max(1, min(CHUNK, MAX_COUNTS // max(sum(self.widths), 1)))
        self._kept: NDArray[np.float64] | None = None  # the summands, if all utterances are one chunk

    def chunks(self) -> Iterator[tuple[slice, NDArray[np.float64]]]:
        """Yield rows, and what each of these n utterances adds to each sum, (n, M)."""
        for first in range(0, self.size, self.chunk):
            rows, summands = slice(first, first + self.chunk), self._kept
            if summands is None:
                summands = np.concatenate([s.summands(rows) for s in self.sums], axis=1, dtype=np.float64)
            if self.size <= self.chunk:
                self._kept = summands
            yield rows, summands

    def totals(self, weights: NDArray[Any]) -> NDArray[np.float64]:
        """Return the sums of R resamples; weights (R, N) say how often an utterance counts: -> (R, M)."""
        totals = np.zeros((len(weights), sum(self.widths)))
        for rows, summands in self.chunks():
            totals += weights[:, rows] @ summands
        return totals

    def totals_by(self, members: NDArray[np.int64], count: int) -> NDArray[np.float64]:
        """Return the sums of each of `count` groups, (G, M); ``members`` (N,) is the group of each utterance."""
        totals = np.zeros((count, sum(self.widths)))
        for rows, summands in self.chunks():
            np.add.at(totals, members[rows], summands)
        return totals

    def of(self, totals: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
        """Compute figures from sums: (R, M) -> name -> (R,), NaN if undefined; only those with labels."""
        blocks = np.split(totals, np.cumsum(self.widths)[:-1], axis=1)
        both = zip(self.sums, blocks, strict=True)
        return {name: value for sums, block in both for name, value in sums.figures(block).items()}

    def __call__(self, weights: NDArray[Any] | None = None) -> dict[str, float]:
        """Return the figures by name; only those with labels."""
        weights = np.ones(self.size) if weights is None else weights
        return {name: float(value[0]) for name, value in self.of(self.totals(weights[None])).items()}


# ------------------------------------------------------------------------------------------------ intervals


def resampled(
    figures: Sequence[Figures],
    groups: Sequence[str] | NDArray[np.object_] | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[dict[str, NDArray[np.float64]]]:
    """Compute the figures of many resamples with replacement (Efron, 1979).

    Returns name -> (resamples,) for each of ``figures``.

    Args:
        figures: those of the same N utterances; all use the same resamples.
        groups: (N,) the speaker of each utterance: whole speakers are drawn, since utterances of a speaker are not
            independent. None: utterances are drawn.
        resamples: the number of resamples.
        seed: the seed of the draws.
    """
    if resamples < 1 or seed < 0:
        raise ConfigError(f"resamples is {resamples} and seed {seed}; expected 1 or more, and 0 or more")
    generator = np.random.default_rng(seed)
    units = figures[0].size
    if groups is not None:
        names, members = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
        units = len(names)
        by_group = [f.totals_by(members, units) for f in figures]
    at_once = max(1, MAX_COUNTS // max(units, 1))
    totals: list[list[NDArray[np.float64]]] = [[] for _ in figures]
    for first in range(0, resamples, at_once):
        counts = np.empty((min(at_once, resamples - first), units))
        for row in counts:
            row[:] = np.bincount(generator.integers(0, units, units), minlength=units)
        for place, f in enumerate(figures):
            totals[place].append(f.totals(counts) if groups is None else counts @ by_group[place])
    return [f.of(np.concatenate(parts)) for f, parts in zip(figures, totals, strict=True)]


def percentiles(drawn: Mapping[str, NDArray[np.float64]]) -> dict[str, list[float]]:
    """Return name -> the 2.5 % and 97.5 % percentiles of the defined values; NaN if there are none."""
    defined = {name: values[np.isfinite(values)] for name, values in drawn.items()}
    return {n: np.percentile(v, [2.5, 97.5]).tolist() if v.size else [math.nan] * 2 for n, v in defined.items()}


def intervals(
    figures: Figures, groups: Sequence[str] | NDArray[np.object_] | None = None, **options: int
) -> dict[str, list[float]]:
    """Compute 95 % percentile intervals by bootstrap: name -> [low, high]. Options are those of `resampled`.

    A resample in which a figure is undefined is left out of its interval.
    """
    return percentiles(resampled([figures], groups, **options)[0])


# --------------------------------------------------------------------------------------------------- report


Interval = list[float | None]  # both ends; None if no resample has the figure


@dataclass(frozen=True)
class Figure:
    """Hold a figure and its 95 % intervals by bootstrap over utterances and over speakers; None if undefined."""

    value: float | None
    interval_utterances: Interval
    interval_speakers: Interval | None = None


@dataclass(frozen=True)
class Part:
    """Hold the figures of some of the utterances, such as the long ones."""

    utterances: int
    figures: dict[str, float | None]


@dataclass(frozen=True)
class KnownTurns:
    """Hold the speaker head's figures on held-out utterances of the training speakers."""

    utterances: int
    speakers: int
    judged: dict[str, int]
    figures: dict[str, Figure]


def plain(value: Any) -> Any:
    """Convert a value of a report to plain data for JSON."""
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


@dataclass
class Report:
    """Hold all figures of some outcomes. Fields are named and ordered as in report.json.

    Attributes:
        utterances: their number.
        emotions: class names in the model's order.
        resamples, seed: those of the bootstrap.
        speakers: the number of different known speakers.
        figures: name -> figure; only those with labels.
        judged: "emotion", "words", "speaker" -> how many of them the figures count.
        other_labels: emotion label that is not a class of the model -> how many utterances have it.
        parts: name such as "length: 0 to 2 s" -> the figures of these utterances.
        confusion: (K, K) counts, with rows for the reference; None for more than `MANY_CLASSES`.
        confused: [reference, recognised, count], the most frequent first; None for fewer classes.
        calibration: count, accuracy and confidence of each bin of confidence that is not empty.
        about: what was evaluated, for the record: model, selection, protocol, fold, part.
        training_is_assumed: whether ``shared_with_training`` refers to the fold's training part, because the model
            does not say what it was trained on.
        shared_with_training: kind (recordings, speakers ...) -> share that is also in training; None: not known.
        unread: recordings that were left out, as they cannot be read.
        rewriting: changes to the references, to fit the vocabulary.
        known_turns: figures of a speaker head that does not know the speakers of this part.
    """

    utterances: int
    emotions: list[str]
    resamples: int
    seed: int
    speakers: int
    figures: dict[str, Figure]
    judged: dict[str, int]
    other_labels: dict[str, int] = field(default_factory=dict)
    confusion: list[list[int]] | None = None
    confused: list[list[Any]] | None = None
    calibration: list[dict[str, Any]] | None = None
    parts: dict[str, Part] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    training_is_assumed: bool | None = None
    shared_with_training: dict[str, float | None] | None = None
    unread: int | None = None
    rewriting: Rewriting = field(default_factory=Rewriting)
    known_turns: KnownTurns | None = None

    def value(self, name: str) -> float | None:
        """Return a figure's value; None if it is undefined or missing."""
        figure = self.figures.get(name)
        return None if figure is None else figure.value

    @property
    def trained_on_some(self) -> bool:
        """Tell whether the model was trained on recordings that it is evaluated on."""
        shared = self.shared_with_training or {}
        return any((shared.get(kind) or 0.0) > 0 for kind in ("recordings", "copies"))

    def to_dict(self) -> dict[str, Any]:
        """Return the report as report.json has it; fields that are None are left out."""
        spread = {"about": self.about, "rewriting": self.rewriting.to_dict()}  # their items are on the top level
        content: dict[str, Any] = {}
        for name, value in vars(self).items():
            content |= spread[name] if name in spread else {} if value is None else {name: plain(value)}
        return content

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Report:
        """Invert `to_dict`."""
        names, rewriting = {f.name for f in fields(cls)}, Rewriting.of(content)
        values = {name: value for name, value in content.items() if name in names}
        about = {name: v for name, v in content.items() if name not in names | rewriting.to_dict().keys()}

        def figures(of: Mapping[str, Any]) -> dict[str, Figure]:
            return {name: Figure(**figure) for name, figure in of["figures"].items()}

        if turns := values.get("known_turns"):
            values["known_turns"] = KnownTurns(**turns | {"figures": figures(turns)})
        values["parts"] = {name: Part(**part) for name, part in content["parts"].items()}
        return cls(**values | {"figures": figures(content), "rewriting": rewriting, "about": about})

    @classmethod
    def read(cls, path: Path) -> Report:
        """Read a report.json. Raises ConfigError if it is not a valid one."""
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path}: is no sound report: {error!r}") from None


def parts_of(outcomes: Outcomes) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """Yield (name, rows) of each part of the outcomes that is reported separately."""
    for column in outcomes.parts:
        values = outcomes.text[column]
        names = sorted(set(values) - {""})
        # A column with a single value divides nothing, but it is important if all transcripts were seen.
        for name in names if len(names) > 1 or column == SEEN_TEXT else ():
            yield f"{column.replace('_', ' ')}: {name}", values == name
    seconds = outcomes.numbers["seconds"]
    for low, high in itertools.pairwise(LENGTHS):
        rows = (seconds >= low) & (seconds < high)
        if rows.any():
            yield f"length: {low:g} to {high:g} s" if high < math.inf else f"length: from {low:g} s", rows


def confusion(names: Sequence[str], pairs: NDArray[np.int64]) -> dict[str, Any]:
    """Count how often each class (row) was recognised as each class (column), for `Report`.

    "confusion" is the matrix. For more than `MANY_CLASSES` there is "confused" instead, a list of [reference,
    recognised, count] for the pairs that occurred, the most frequent first.
    """
    size, pairs = len(names), pairs[pairs[:, 0] >= 0]
    if size <= MANY_CLASSES:
        cells = np.bincount(pairs @ [size, 1], minlength=size * size)
        return {"confusion": cells.reshape(size, size).tolist()}
    pairs, counts = np.unique(pairs, axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return {"confused": [[names[pairs[i, 0]], names[pairs[i, 1]], int(counts[i])] for i in order]}


def calibration(pairs: NDArray[np.int64], confidence: NDArray[np.float64]) -> list[dict[str, Any]]:
    """Return how many utterances each bin of confidence (N,) has, and their accuracy and mean confidence."""
    scored = pairs[:, 0] >= 0
    bins = calibration_summands(confidence[scored], (pairs[:, 0] == pairs[:, 1])[scored]).sum(0).reshape(3, -1)
    return [{"count": int(n), "accuracy": r / n, "confidence": c / n} for n, r, c in bins.T.tolist() if n]


def report(outcomes: Outcomes, *, resamples: int = RESAMPLES, seed: int = 0) -> Report:
    """Compute all figures of some outcomes with their intervals, and those of the parts."""
    figures = Figures(outcomes)
    values = figures()
    interval = partial(intervals, figures, resamples=resamples, seed=seed)
    by_utterance = interval() if values else {}
    speakers = outcomes.text["speaker"]
    by_speaker = interval(speakers) if values and all(speakers) and len(set(speakers)) > 1 else {}
    pairs = emotion_pairs(outcomes)
    of_classes: dict[str, Any] = {}
    if number_scored(pairs):
        bins = calibration(pairs, outcomes.numbers["confidence"])
        of_classes = confusion(outcomes.emotions, pairs) | {"calibration": bins}
    labels = Counter(outcomes.text["emotion"])
    return Report(
        utterances=len(outcomes),
        emotions=outcomes.emotions,
        resamples=resamples,
        seed=seed,
        speakers=len(set(speakers) - {""}),
        figures={
            name: Figure(finite(value), finite(by_utterance[name]), finite(by_speaker.get(name)))
            for name, value in values.items()
        },
        judged={name: count for measure in measures() for name, count in measure.judged(outcomes).items()},
        other_labels={name: n for name, n in labels.most_common() if name not in {"", *outcomes.emotions}},
        parts={
            name: Part(int(rows.sum()), finite(Figures(outcomes.part(rows))()))
            for name, rows in parts_of(outcomes)
        },
        **of_classes,
    )


# --------------------------------------------------------------------------------------- a report in words


TITLES = {
    "accuracy": "accuracy (WA)",
    "unweighted_accuracy": "unweighted accuracy (UA)",
    "macro_f1": "macro F1",
    "ece": "expected calibration error",
    "wer": "word error rate",
    "cer": "character error rate",
    "speaker_accuracy": "speaker accuracy",
}


def title_of(name: str) -> str:
    """Return the readable name of a figure."""
    concordance_of = name.removeprefix("ccc ")
    return TITLES.get(name, name if concordance_of == name else f"concordance (CCC), {concordance_of}")


def four_digits(value: float | None) -> str:
    """Write a figure with four digits; a dash for none."""
    return "-" if value is None else f"{value:.4f}"


def interval_text(interval: Sequence[float | None] | None) -> str:
    """Write both ends of an interval; a dash for none."""
    return "-" if interval is None else f"{four_digits(interval[0])} to {four_digits(interval[1])}"


def shares(kinds: Mapping[str, float | None]) -> str:
    """Write the shares of kinds (speakers, transcripts ...) that are also in another part; None is unknown."""
    return ", ".join(f"{kind} {'unknown' if s is None else f'{100 * s:.1f} %'}" for kind, s in kinds.items())


def shared_line(result: Report) -> str:
    """Return a line that says how much of the evaluated data the model knows from training."""
    shared = result.shared_with_training
    if shared is None:
        return "what the model was trained on is not known: it does not name it (ser evaluate --train does)"
    assumed = " (taken to be the fold's: the model does not say)" if result.training_is_assumed else ""
    warning = "WARNING: trained on recordings that are judged, so these figures say nothing about others. "
    return f"{warning if result.trained_on_some else ''}known from training{assumed}: {shares(shared)}"


def first_few(items: Sequence[str]) -> str:
    """List the first `MOST_LISTED` items, and say how many more there are."""
    more = len(items) - MOST_LISTED
    return ", ".join(items[:MOST_LISTED]) + (f" and {more} more" if more > 0 else "")


def emotion_notes(result: Report) -> list[str]:
    """Say which emotions are in no figure, and why."""
    scored, others = result.judged["emotion"], result.other_labels
    count = sum(others.values())
    without = result.utterances - scored - count
    if not others:
        return [f"emotions are judged on {scored}: the others have no label"] if scored and without else []
    if not result.emotions:
        return [f"the model recognises no emotions: the labels of {count} utterances are in no figure"]
    labels = first_few([f"{name!r} x{n}" for name, n in others.items()])
    if scored:
        unlabelled = f", and {without} have no label" if without else ""
        text = f"emotions are judged on {scored}: {count} have one that is no class of the model ({labels})"
        return [printable(f"{text}{unlabelled}")]
    text = f"WARNING: no emotion is judged: none of the labels of {count} utterances is a class of the model"
    classes = first_few([repr(name) for name in result.emotions])
    return [text, printable(f"  labels:  {labels}"), printable(f"  classes: {classes}")]


def figure_lines(result: Report) -> list[str]:
    """Write a line for each figure; with many classes, leave out precision and recall of each."""
    lines = [f"{'':32}{'':>7}   95 % over utterances   over speakers"]
    left_out = ("precision ", "recall ") if len(result.emotions) > MANY_CLASSES else ()
    for name, figure in result.figures.items():
        if not name.startswith(left_out):
            utterances, speakers = map(interval_text, (figure.interval_utterances, figure.interval_speakers))
            title = printable(title_of(name))
            lines.append(f"{title:32}{four_digits(figure.value):>7}   {utterances:20}   {speakers}")
    return lines


def confusion_lines(result: Report) -> list[str]:
    """Write the confusion matrix, or with many classes the most frequent pairs."""
    if result.confusion is not None:
        names = [printable(name) for name in result.emotions]
        width = max(6, *(len(name) + 1 for name in names))
        lines = ["", "confusion (rows: reference)", " " * width + "".join(f"{n:>{width}}" for n in names)]
        for name, row in zip(names, result.confusion, strict=True):
            lines.append(f"{name:{width}}" + "".join(f"{n:>{width}}" for n in row))
        return lines
    if result.confused is None:
        return []
    pairs = [f"{printable(a)} as {printable(b)}: {n}" for a, b, n in result.confused[:MOST_LISTED]]
    return ["", f"of {len(result.emotions)} classes, what was recognised most often:", *pairs]


def part_lines(result: Report) -> list[str]:
    """Write a line for each part."""
    if not result.parts:
        return []
    lines = ["", f"{'part':32}{'n':>7}{'WA':>9}{'UA':>9}{'WER':>9}"]
    for name, part in result.parts.items():
        cells = [four_digits(part.figures.get(key)) for key in ("accuracy", "unweighted_accuracy", "wer")]
        lines.append(f"{printable(name):32}{part.utterances:>7}" + "".join(f"{cell:>9}" for cell in cells))
    return lines


def table(result: Report) -> str:
    """Write a report as text. Control characters in labels are replaced."""
    lines = [f"{result.utterances} utterances, {result.speakers} speakers", *emotion_notes(result)]
    lines += [*figure_lines(result), *confusion_lines(result), *part_lines(result)]
    return "\n".join([*lines, *map(printable, result.rewriting.notes())])


# ----------------------------------------------------------------------------------------------- comparison


def mcnemar(only_first: int, only_second: int) -> float:
    """Compute the two-sided exact p of McNemar's test.

    Under the null hypothesis, each utterance that only one of the two recognises correctly is on either side with
    probability 1/2.
    """
    total, least = only_first + only_second, min(only_first, only_second)
    if not total:
        return 1.0
    # log C(n, k) - n log 2, summed in the tail
    logs = [
        math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1) - total * math.log(2)
        for k in range(least + 1)
    ]
    return min(1.0, 2 * math.fsum(math.exp(value) for value in logs))


def without_corpora(outcomes: Outcomes) -> Outcomes:
    """Return the outcomes with the ids that a corpus has alone, without "corpus/", if they stay different."""
    pairs = zip(outcomes.text["id"], outcomes.text[CORPUS], strict=True)
    ids = [name.removeprefix(f"{corpus}/") for name, corpus in pairs]
    unique = len(set(ids)) == len(ids)
    return replace(outcomes, text=outcomes.text | {"id": np.array(ids, object)}) if unique else outcomes


def in_order_of(first: Outcomes, second: Outcomes) -> Outcomes:
    """Return the second outcomes in the order of the first.

    Ids of several corpora, which are corpus/name, are paired with those of one of them, which are names.

    Raises ConfigError if the two do not have the same utterances with the same labels.
    """
    ways = (first, second), (first, without_corpora(second)), (without_corpora(first), second)
    for one, other in ways:
        order = {name: i for i, name in enumerate(other.text["id"])}
        if len(order) == len(other) and set(order) == set(one.text["id"]):
            break
    else:
        raise ConfigError("the two reports are not of the same utterances, so no utterance can be paired")
    ordered = second.part(np.array([order[name] for name in one.text["id"]], np.int64))
    if any(first.text["emotion"] != ordered.text["emotion"]):
        raise ConfigError("the two reports have different labels for some utterances")
    return ordered


def compare_predictions(
    first: Outcomes, second: Outcomes, *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Any]:
    """Test whether two sets of predictions of the same utterances differ by more than chance.

    The tests are McNemar's exact test on the utterances that only one of the two recognises correctly (McNemar,
    1947), and a paired bootstrap of the differences, the second minus the first.

    Raises ConfigError if the two do not have the same utterances with the same labels.
    """
    second = in_order_of(first, second)
    labelled = first.text["emotion"] != ""
    right = [(o.text["emotion"] == o.text["predicted"])[labelled] for o in (first, second)]
    only_first, only_second = int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())
    figures = [Figures(first), Figures(second)]
    before, after = (f() for f in figures)
    common = [name for name in before if name in after]
    drawn = resampled(figures, resamples=resamples, seed=seed)
    spans = percentiles({name: drawn[1][name] - drawn[0][name] for name in common})
    return finite(
        {
            "utterances": len(first),
            "only_first_right": only_first,
            "only_second_right": only_second,
            "mcnemar_p": mcnemar(only_first, only_second),
            "differences": {n: {"value": after[n] - before[n], "interval": spans[n]} for n in common},
        }
    )

"""From predictions to figures that one can defend: intervals, calibration, parts, comparisons.

Read from the top: sums over utterances; the table of how heads are scored; outcomes (a few numbers per
utterance); figures of them; intervals by bootstrap; the report and its table; the comparison of two. The
predictions file is the source: every figure can be computed from it again.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Protocol

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

CHUNK = 8192  # utterances that are evaluated together: what is held at once
CALIBRATION_BINS = 15  # as in Guo et al., 2017
RESAMPLES = 1000
MAX_COUNTS = 4_000_000  # of utterances in resamples that are held at once
MANY_CLASSES = 100  # above, nothing is kept or shown of each pair of classes
MOST_LISTED = 20  # labels, classes or confusions in a line or a list
LENGTHS = (0.0, 2.0, 4.0, 8.0, math.inf)  # seconds: the parts by length
# Columns of the predictions file by whose values figures are reported apart, if no others are named.
SEEN_TEXT = "seen_text"  # whether training had the transcript
PARTS = ("kind", SEEN_TEXT)

# (least, most) of a column's numbers
SHARE, COUNT, NUMBER = (0.0, 1.0), (0.0, math.inf), (-math.inf, math.inf)
EXPECTED = {SHARE: "a number from 0 to 1", COUNT: "a number from 0", NUMBER: "a finite number"}


# ---------------------------------------------------------------------------------------------------- sums


class Sums(Protocol):
    """Describe what is added up over utterances for a head. Its figures are functions of the sums alone."""

    width: int  # M, how many sums

    def summands(self, rows: slice) -> NDArray[np.float64]:
        """Return what each of these utterances adds: (n, M)."""

    def figures(self, sums: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
        """Compute the figures of R resamples: (R, M) sums -> name -> (R,)."""


def calibration_summands(confidence: NDArray[np.float64], right: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return 1, right or not, and confidence in the columns of an utterance's bin: (N,) each -> (N, 3 * bins)."""
    place = np.clip(np.ceil(confidence * CALIBRATION_BINS).astype(np.int64) - 1, 0, CALIBRATION_BINS - 1)
    inside = place[:, None] == np.arange(CALIBRATION_BINS)
    return np.concatenate(
        [inside, inside * right[:, None], inside * confidence[:, None]], axis=1, dtype=np.float64
    )


def expected_calibration_error(totals: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compute the ECE, 0..1: (R, 3 * bins) sums of `calibration_summands` -> (R,), NaN without utterances.

    The ECE is the mean over equal bins of confidence of |accuracy - confidence|, weighted by their sizes (Guo et
    al., *On Calibration of Modern Neural Networks*, ICML 2017, eq. 3, with 15 bins).
    """
    count, right, confidence = np.split(totals, 3, axis=1)
    return ratio(np.abs(right - confidence).sum(1), count.sum(1))


class ClassSums:
    """Sums of a head of classes: those of `class_figures`, and of calibration where probabilities are known.

    Attributes:
        scored: (N,) the utterances whose label and prediction are both classes.
        right: (N,) those of them that are recognised rightly.
        pairs: (scored, 2) the numbers of both classes.
        confidence: (N,) the probability of the predicted class; None: not known.
    """

    def __init__(
        self,
        names: Sequence[str],
        reference: Iterable[str],
        predicted: Iterable[str],
        confidence: NDArray[np.float64] | None = None,
        prefix: str = "",
    ) -> None:
        """Take (N,) labels, predictions and confidences; ``prefix`` begins the figures' names."""
        self.names, self.confidence, self.prefix = names, confidence, prefix
        index = {name: i for i, name in enumerate(names)}
        pairs = np.array(
            [[index.get(name, -1) for name in column] for column in (reference, predicted)], np.int64
        ).T.reshape(-1, 2)
        self.scored = np.all(pairs >= 0, axis=1)
        self.right = np.logical_and(self.scored, pairs[:, 0] == pairs[:, 1])
        self.pairs = pairs[self.scored]
        # Sums are kept of the classes that occur: a model may have thousands more.
        self.classes = np.unique(self.pairs)  # (C,)
        place = np.full(len(index) + 1, -1)  # in `classes`; the last for -1, no class
        place[self.classes] = np.arange(len(self.classes))
        self.places = np.where(self.scored[:, None], place[pairs], -1)  # (N, 2)
        self.width = 3 * len(self.classes) + (0 if confidence is None else 3 * CALIBRATION_BINS)

    def summands(self, rows: slice) -> NDArray[np.float64]:
        """Return (n, 3 C + 3 bins): right, in the reference, recognised as it; and those of calibration."""
        reference, predicted = (self.places[rows, i, None] == np.arange(len(self.classes)) for i in (0, 1))
        blocks: list[NDArray[Any]] = [reference & self.right[rows, None], reference, predicted]
        if self.confidence is not None:
            confidence = np.nan_to_num(self.confidence[rows])
            blocks.append(calibration_summands(confidence, self.right[rows]) * self.scored[rows, None])
        return np.concatenate(blocks, axis=1, dtype=np.float64)

    def figures(self, sums: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
        """Compute the figures of `class_figures`, the ECE, and precision and recall of each class."""
        if not self.scored.any():
            return {}
        totals, binned = np.split(sums, [3 * len(self.classes)], axis=1)
        totals = totals.reshape(len(sums), 3, -1)
        values = class_figures(totals, len(self.names))
        values |= {} if self.confidence is None else {"ece": expected_calibration_error(binned)}
        for kind, whole in (("precision", totals[:, 2]), ("recall", totals[:, 1])):
            values |= dict.fromkeys((f"{kind} {name}" for name in self.names), np.full(len(sums), np.nan))
            of_class = ratio(totals[:, 0], whole)
            values |= {f"{kind} {self.names[c]}": of_class[:, i] for i, c in enumerate(self.classes)}
        return {f"{self.prefix}{name}": value for name, value in values.items()}

    def confusion(self) -> dict[str, Any]:
        """Count how often which class (row) was recognised as which (column), as `Report` has it.

        "confusion" is the matrix; of more than `MANY_CLASSES` there is "confused" in its place, a list of
        [reference, recognised, count] of what occurred, the most frequent first.
        """
        size = len(self.names)
        if size <= MANY_CLASSES:
            cells = np.bincount(self.pairs @ [size, 1], minlength=size * size)
            return {"confusion": cells.reshape(size, size).tolist()}
        pairs, counts = np.unique(self.pairs, axis=0, return_counts=True)
        order = np.argsort(-counts, kind="stable")
        return {"confused": [[self.names[pairs[i, 0]], self.names[pairs[i, 1]], int(counts[i])] for i in order]}

    def calibration(self) -> list[dict[str, Any]]:
        """Return how many utterances each bin of confidence has, and their accuracy and mean confidence."""
        assert self.confidence is not None
        binned = calibration_summands(self.confidence[self.scored], self.right[self.scored]).sum(0)
        bins = binned.reshape(3, -1).T.tolist()
        return [{"count": int(n), "accuracy": r / n, "confidence": c / n} for n, r, c in bins if n]


class RatioSums:
    """Sums of a rate, such as edits per word: a part and the whole of each utterance, (N,) each."""

    width = 2

    def __init__(self, name: str, part: NDArray[Any], whole: NDArray[Any]) -> None:
        self.name, self.part, self.whole = name, part, whole

    def summands(self, rows: slice) -> NDArray[np.float64]:
        """Return both numbers of each utterance, 0 where they are unknown: (n, 2)."""
        return np.nan_to_num(np.stack([self.part[rows], self.whole[rows]], 1))

    def figures(self, sums: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
        """Divide the sum of the parts by the sum of the wholes."""
        return {self.name: ratio(*sums.T)}


class ConcordanceSums:
    """Sums of the CCC of a number: its labels and its predictions, (N,) each, NaN where unknown."""

    width = 6

    def __init__(self, name: str, labels: NDArray[np.float64], predictions: NDArray[np.float64]) -> None:
        self.name, self.labels, self.predictions = name, labels, predictions

    def summands(self, rows: slice) -> NDArray[np.float64]:
        """Return what each utterance adds to the moments: (n, 6)."""
        labels, predictions = (torch.from_numpy(x[rows, None]) for x in (self.labels, self.predictions))
        labels = labels.masked_fill(~predictions.isfinite(), torch.nan)
        return ccc_summands(predictions.nan_to_num(), labels)[:, :, 0].T.numpy()

    def figures(self, sums: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
        """Compute the concordance."""
        return {f"ccc {self.name}": concordance(torch.from_numpy(sums.T.copy())).numpy()}


# ------------------------------------------------------------------------------- the table of scored heads


@dataclass(frozen=True)
class Answer:
    """What a row of the predictions file is made of.

    Attributes:
        labels: column of the manifest -> label.
        reference: the transcript as far as the vocabulary can write it; empty for none.
        prediction: what was recognised.
        speakers: those whom the model knows.
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
        numbers: its columns of numbers, NaN where unknown -> the range they must be in.
        cells: what a row has in these columns.
        sums: outcomes -> one `Sums` for each of its figures that can be computed.
        judged: outcomes -> name -> how many items its figures count.
    """

    texts: tuple[str, ...]
    numbers: Mapping[str, tuple[float, float]]
    cells: Callable[[Answer], dict[str, Any]]
    sums: Callable[[Outcomes], Sequence[Sums]]
    judged: Callable[[Outcomes], dict[str, int]] = lambda outcomes: {}


def emotion_cells(row: Answer) -> dict[str, Any]:
    """Return label, predicted emotion and all probabilities."""
    prediction = row.prediction
    cells = {f"p_{name}": probability for name, probability in (prediction.probabilities or {}).items()}
    confidence = cells.get(f"p_{prediction.emotion}")
    return cells | {
        "emotion": row.labels.get("emotion"),
        "predicted": prediction.emotion,
        "confidence": confidence,
    }


def emotion_sums(outcomes: Outcomes) -> ClassSums:
    """Return the sums of the emotion head."""
    text = outcomes.text
    return ClassSums(outcomes.emotions, text["emotion"], text["predicted"], outcomes.numbers["confidence"])


def transcript_cells(row: Answer) -> dict[str, Any]:
    """Return both texts and their edits."""
    transcript = row.prediction.transcript
    if transcript is None or not row.reference:
        return {"transcript": transcript}
    words, characters = word_errors(row.reference, transcript), character_errors(row.reference, transcript)
    cells = {
        "reference": row.reference,
        "transcript": transcript,
        "word_edits": words.edits,
        "words": words.length,
    }
    return cells | {"character_edits": characters.edits, "characters": characters.length}


def transcript_sums(outcomes: Outcomes) -> list[Sums]:
    """Return the sums of word and character error rate, where there are references."""
    columns = {"wer": ("word_edits", "words"), "cer": ("character_edits", "characters")}
    rates = [RatioSums(name, *(outcomes.numbers[c] for c in pair)) for name, pair in columns.items()]
    return [rate for rate in rates if np.nan_to_num(rate.whole).any()]


def speaker_cells(row: Answer) -> dict[str, Any]:
    """Return whether the speaker is recognised, if the model knows the speaker."""
    speaker, answer = row.labels.get("speaker"), row.prediction.speaker
    return {"speaker_right": int(answer == speaker)} if answer is not None and speaker in row.speakers else {}


def speaker_sums(outcomes: Outcomes) -> list[Sums]:
    """Return the sums of the speaker head's accuracy, where the model knows a speaker."""
    right = outcomes.numbers["speaker_right"]
    known = np.isfinite(right)
    return [RatioSums("speaker_accuracy", right, known)] if known.any() else []


def measure_of_classes(head: str, column: str) -> Measure:
    """Describe a head of classes that somebody added. The names of its figures begin with the head's.

    The predictions file has the label in ``column`` of the manifest, and beside it the class in HEAD_predicted.
    """
    predicted = f"{head}_predicted"

    def sums(outcomes: Outcomes) -> list[ClassSums]:
        labels, answers = outcomes.text[column], outcomes.text[predicted]
        return [ClassSums(sorted({*labels, *answers} - {""}), labels, answers, prefix=f"{head} ")]

    return Measure(
        (column, predicted),
        {},
        lambda row: {column: row.labels.get(column), predicted: row.prediction.others.get(head)},
        sums,
        lambda outcomes: {head: int(sums(outcomes)[0].scored.sum())},
    )


def measure_of_numbers(head: str, columns: Sequence[str]) -> Measure:
    """Describe a head of numbers, which is scored by the concordance of each of its columns.

    The predictions file has the label of the column "age" in age, and the prediction in age_predicted.
    """

    def cells(row: Answer) -> dict[str, Any]:
        numbers = row.prediction.dimensions if head == "dimensions" else row.prediction.others.get(head)
        values = {name.lower(): value for name, value in (numbers or {}).items()}
        known = [name for name in columns if name in values]  # some models spell Arousal
        return {n: row.labels.get(n) for n in known} | {f"{n}_predicted": values[n] for n in known}

    def sums(outcomes: Outcomes) -> list[Sums]:
        pairs = {name: [outcomes.numbers[c] for c in (name, f"{name}_predicted")] for name in columns}
        both = {name: pair for name, pair in pairs.items() if np.isfinite(pair).all(0).any()}
        return [ConcordanceSums(name, *pair) for name, pair in both.items()]

    names = (*columns, *(f"{name}_predicted" for name in columns))
    return Measure((), dict.fromkeys(names, NUMBER), cells, sums)


# head -> how it is scored; see `measures` for other heads
MEASURES = {
    "emotion": Measure(
        ("emotion", "predicted"),
        {"confidence": SHARE},
        emotion_cells,
        lambda outcomes: [emotion_sums(outcomes)],
        lambda outcomes: {"emotion": int(emotion_sums(outcomes).scored.sum())},
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


def measures() -> list[Measure]:
    """Return how each head is scored: its row in `MEASURES`, or what its kind of labels (`LABELS`) asks for."""
    chosen = []
    for head, label in LABELS.items():
        if head in MEASURES:
            chosen.append(MEASURES[head])
        elif label.kind == "class":
            chosen.append(measure_of_classes(head, label.columns[0]))
        elif label.kind == "numbers":
            chosen.append(measure_of_numbers(head, label.columns))
    return chosen


def text_columns(parts: Iterable[str]) -> tuple[str, ...]:
    """Return the columns of texts of a predictions file; ``parts`` are those by which figures are reported."""
    of_heads = (column for measure in measures() for column in measure.texts)
    return tuple(dict.fromkeys(["id", "file", "speaker", *parts, *of_heads]))


def number_columns() -> dict[str, tuple[float, float]]:
    """Return the columns of numbers of a predictions file -> the range they must be in."""
    columns = {"seconds": COUNT}
    for measure in measures():
        columns |= measure.numbers
    return columns


def check_row(record: Mapping[str, Any], emotions: Sequence[str], where: str) -> None:
    """Raise ValueError for what cannot be a row of a predictions file."""
    if None in record or None in record.values():
        raise ValueError(f"{where}: has more or fewer cells than the header")
    for name, (least, most) in (number_columns() | {f"p_{emotion}": SHARE for emotion in emotions}).items():
        try:
            value = float(record[name] or 0)
        except ValueError:
            value = math.inf
        if math.isinf(value) or value < least or value > most:  # NaN is neither
            expected = EXPECTED[least, most]
            raise ValueError(f"{where}: {name} is {record[name][:40]!r}; expected {expected}, or nothing")


def as_row(recognizer: Recognizer, utterance: Utterance, reference: str, prediction: Prediction) -> dict[str, Any]:
    """Make one row of the predictions file; None where there is nothing to say.

    The row has the manifest's further columns too: they may be parts that figures are reported by.
    """
    row: dict[str, Any] = dict(utterance.extra) | dict.fromkeys((*text_columns([SEEN_TEXT]), *number_columns()))
    row |= {"id": utterance.id, "file": str(utterance.file), "speaker": utterance.speaker}
    row |= {"seconds": prediction.seconds}
    answer = Answer(utterance.labels, reference, prediction, recognizer.speakers)
    for measure in measures():
        row |= measure.cells(answer)
    return row


# ------------------------------------------------------------------------------------------------- outcomes


@dataclass
class Outcomes:
    """Hold what became of each utterance: one row of the predictions file each, as arrays of equal length N.

    Attributes:
        emotions: class names in the model's order.
        text: the columns of `text_columns`, "" where unknown.
        numbers: the columns of `number_columns`, NaN where unknown. confidence is the probability of the predicted
            emotion; speaker_right is 1 or 0 for an utterance by a speaker that the model knows.
        probabilities: (N, K) float32.
        parts: the columns of texts by whose values figures are reported apart.
    """

    emotions: list[str]
    text: dict[str, NDArray[np.object_]]
    numbers: dict[str, NDArray[np.float64]]
    probabilities: NDArray[np.float32]
    parts: tuple[str, ...] = PARTS

    def __len__(self) -> int:
        return len(self.numbers["seconds"])

    def part(self, rows: NDArray[Any]) -> Outcomes:
        """Return some rows: where ``rows`` (N,) is True, or those of these numbers in their order."""
        return Outcomes(
            self.emotions,
            {name: column[rows] for name, column in self.text.items()},
            {name: column[rows] for name, column in self.numbers.items()},
            self.probabilities[rows],
            self.parts,
        )

    @classmethod
    def of(
        cls, emotions: Sequence[str], records: Sequence[Mapping[str, Any]], parts: Sequence[str] = PARTS
    ) -> Outcomes:
        """Take rows of a predictions file."""
        names = list(emotions)
        shared: dict[str, str] = {}  # one string for all equal ones: a million rows share few labels

        def number(value: Any) -> float:  # NaN and infinity, of scores that overflowed, are unknown
            return float(value) if value not in ("", None) and math.isfinite(float(value)) else math.nan

        def texts(column: str) -> NDArray[np.object_]:
            return np.array([shared.setdefault(v, v) for r in records for v in [r.get(column) or ""]], object)

        probabilities = np.array([[number(r.get(f"p_{name}")) for name in names] for r in records], np.float32)
        return cls(
            names,
            {column: texts(column) for column in text_columns(parts)},
            {name: np.array([number(r.get(name)) for r in records], np.float64) for name in number_columns()},
            probabilities.reshape(len(records), len(names)),
            tuple(parts),
        )

    @classmethod
    def joined(cls, several: Sequence[Outcomes]) -> Outcomes:
        """Put all rows together, in their order. The classes must be the same."""
        if not several:
            raise ConfigError("there are no predictions to judge")
        first = several[0]
        for one in several:
            if one.emotions != first.emotions:
                raise ConfigError(f"classes differ: {first.emotions} and {one.emotions}")
        return cls(
            first.emotions,
            {name: np.concatenate([one.text[name] for one in several]) for name in first.text},
            {name: np.concatenate([one.numbers[name] for one in several]) for name in first.numbers},
            np.concatenate([one.probabilities for one in several]),
            first.parts,
        )

    @classmethod
    def read(cls, path: Path, parts: Sequence[str] = PARTS) -> Outcomes:
        """Read a predictions file. Raises ConfigError where it is none."""
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
            header = reader.fieldnames or []
            missing = [name for name in (*text_columns(parts), *number_columns()) if name not in header]
            if missing:
                raise ConfigError(f"{path}: is no predictions file, it lacks the columns {', '.join(missing)}")
            if twice := [name for name, count in Counter(header).items() if count > 1]:
                raise ConfigError(f"{path}: is no predictions file, it has several columns {', '.join(twice)}")
            emotions = [name.removeprefix("p_") for name in header if name.startswith("p_")]
            chunks, records = [], []
            for record in reader:
                check_row(record, emotions, f"line {reader.line_num}")
                records.append(record)
                if len(records) == CHUNK:
                    chunks.append(cls.of(emotions, records, parts))
                    records = []
            return cls.joined([*chunks, cls.of(emotions, records, parts)])


def write_rows(
    path: Path, chunks: Iterable[list[dict[str, Any]]], emotions: Sequence[str], parts: Sequence[str] = PARTS
) -> Outcomes:
    """Write the predictions file, chunk by chunk of rows as `as_row` makes them, and keep the numbers."""
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
    """Compute every figure of some outcomes from sums over utterances, as a bootstrap needs it.

        figures = Figures(outcomes)
        figures()                                # each utterance once
        figures(weights)                         # (N,): how often each counts
        figures.of(figures.totals(weights))      # weights (R, N), R resamples at once -> name -> (R,)

    Accuracies, error rates, calibration and concordance all follow from such sums, so a thousand resamples are
    one matrix product.
    """

    def __init__(self, outcomes: Outcomes) -> None:
        """Take the sums of every head that has labels."""
        self.size = len(outcomes)
        self.sums = [sums for measure in measures() for sums in measure.sums(outcomes)]
        self.widths = [sums.width for sums in self.sums]
        self.chunk = max(1, min(CHUNK, MAX_COUNTS // max(sum(self.widths), 1)))
        self._kept = self._summands(slice(None)) if self.size <= self.chunk else None

    def _summands(self, rows: slice) -> NDArray[np.float64]:
        """Return what each of these utterances adds to each sum: (n, M)."""
        if (kept := getattr(self, "_kept", None)) is not None:
            return kept
        return np.concatenate([sums.summands(rows) for sums in self.sums], axis=1, dtype=np.float64)

    def totals(self, weights: NDArray[Any]) -> NDArray[np.float64]:
        """Sum with each utterance counted as often as its weight says: (R, N) -> (R, M)."""
        totals = weights[:, : self.chunk] @ self._summands(slice(0, self.chunk))
        for first in range(self.chunk, self.size, self.chunk):
            rows = slice(first, first + self.chunk)
            totals += weights[:, rows] @ self._summands(rows)
        return totals

    def totals_by(self, members: NDArray[np.int64], count: int) -> NDArray[np.float64]:
        """Sum over each of `count` groups, of which ``members`` (N,) names one for each utterance: (G, M)."""
        totals = np.zeros((count, sum(self.widths)))
        for first in range(0, self.size, self.chunk):
            rows = slice(first, first + self.chunk)
            np.add.at(totals, members[rows], self._summands(rows))
        return totals

    def of(self, totals: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
        """Compute (R, M) sums -> name -> (R,), NaN where it is undefined; only what there are labels for."""
        blocks = np.split(totals, np.cumsum(self.widths)[:-1], axis=1)
        values: dict[str, NDArray[np.float64]] = {}
        for sums, block in zip(self.sums, blocks, strict=True):
            values |= sums.figures(block)
        return values

    def __call__(self, weights: NDArray[Any] | None = None) -> dict[str, float]:
        """Return the figures by name; only what there are labels for."""
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
        figures: of the same N utterances; the resamples are the same for all of them.
        groups: (N,) the speaker of each: whole speakers are drawn, as utterances of one are not independent. None:
            utterances are drawn.
        resamples: how many.
        seed: of the draws.
    """
    if resamples < 1 or seed < 0:
        raise ConfigError(f"resamples is {resamples} and seed {seed}; expected 1 or more, and 0 or more")
    generator = np.random.default_rng(seed)
    size = figures[0].size
    if groups is None:
        units = size
        at_once = max(1, MAX_COUNTS // max(size, 1))
    else:
        names, members = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
        units, at_once = len(names), max(1, MAX_COUNTS // len(names))
        by_group = [f.totals_by(members, units) for f in figures]
    totals: list[list[NDArray[np.float64]]] = [[] for _ in figures]
    for first in range(0, resamples, at_once):
        counts = np.empty((min(at_once, resamples - first), units))
        for row in counts:
            row[:] = np.bincount(generator.integers(0, units, units), minlength=units)
        for place, f in enumerate(figures):
            totals[place].append(f.totals(counts) if groups is None else counts @ by_group[place])
    return [f.of(np.concatenate(parts)) for f, parts in zip(figures, totals, strict=True)]


def percentiles(drawn: Mapping[str, NDArray[np.float64]]) -> dict[str, tuple[float, float]]:
    """Return name -> the 2.5 % and 97.5 % percentiles of the values that are defined; NaN without any."""
    spans = {}
    for name, values in drawn.items():
        defined = values[np.isfinite(values)]
        low, high = np.percentile(defined, [2.5, 97.5]) if defined.size else (math.nan, math.nan)
        spans[name] = (float(low), float(high))
    return spans


def intervals(
    figures: Figures,
    groups: Sequence[str] | NDArray[np.object_] | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """Compute 95 % percentile intervals by the bootstrap, as `resampled`: name -> (low, high).

    A resample in which a figure is undefined is left out of it.
    """
    return percentiles(resampled([figures], groups, resamples=resamples, seed=seed)[0])


# --------------------------------------------------------------------------------------------------- report


Interval = list[float | None]  # both ends; None where no resample has the figure


@dataclass(frozen=True)
class Figure:
    """A figure with its 95 % intervals by bootstrap over utterances and over speakers; None where undefined."""

    value: float | None
    interval_utterances: Interval
    interval_speakers: Interval | None = None


@dataclass(frozen=True)
class Part:
    """The figures of some of the utterances, such as the long ones."""

    utterances: int
    figures: dict[str, float | None]


@dataclass(frozen=True)
class KnownTurns:
    """The speaker head's figures on turns that were held out of the speakers in training."""

    utterances: int
    speakers: int
    judged: dict[str, int]
    figures: dict[str, Figure]


def plain(value: Any) -> Any:
    """Return a value of a report as JSON holds it."""
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    return plain(asdict(value)) if is_dataclass(value) and not isinstance(value, type) else value


@dataclass
class Report:
    """All figures of some outcomes. Fields are named and ordered as in report.json.

    Attributes:
        utterances: how many.
        emotions: class names in the model's order.
        resamples, seed: of the bootstrap.
        speakers: how many different ones are known.
        figures: name -> figure; only what there are labels for.
        judged: "emotion", "words", "speaker" -> how many of them the figures count.
        other_labels: emotion labels that are no class of the model -> how many utterances have it.
        parts: such as "length: 0 to 2 s" -> the figures of these utterances.
        confusion: (K, K) counts, rows the reference; None of more than `MANY_CLASSES`.
        confused: [reference, recognised, count], the most frequent first; None of fewer classes.
        calibration: count, accuracy and confidence of each bin of confidence that is not empty.
        about: what was evaluated, for the record: model, selection, protocol, fold, part.
        training_is_assumed: whether ``shared_with_training`` is of the fold's training part, as the model does not
            say what it was trained on.
        shared_with_training: kind (recordings, speakers ...) -> share that training has too; None: not known.
        unread: recordings that were left out, as they cannot be read.
        rewriting: what was changed in the references so that the vocabulary can write them.
        known_turns: of a speaker head that does not know the speakers.
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
        """Return a figure's value; None where it is undefined or there is none."""
        figure = self.figures.get(name)
        return None if figure is None else figure.value

    @property
    def trained_on_some(self) -> bool:
        """Whether the model was trained on recordings that it is evaluated on."""
        shared = self.shared_with_training or {}
        return max((shared.get(kind) or 0.0 for kind in ("recordings", "copies")), default=0.0) > 0

    def to_dict(self) -> dict[str, Any]:
        """Return it as report.json has it. What is None is left out."""
        content: dict[str, Any] = {}
        for name in (f.name for f in fields(self)):
            value = getattr(self, name)
            if name in ("about", "rewriting"):  # whose items stand among the others
                content |= value if name == "about" else value.to_dict()
            elif value is not None:
                content[name] = plain(value)
        return content

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Report:
        """Invert `to_dict`."""
        names = {f.name for f in fields(cls)}
        rewriting = Rewriting.of(content)
        values = {name: value for name, value in content.items() if name in names}
        others = {name: v for name, v in content.items() if name not in names and name not in rewriting.to_dict()}

        def figures(of: Mapping[str, Any]) -> dict[str, Figure]:
            return {name: Figure(**figure) for name, figure in of["figures"].items()}

        if turns := values.get("known_turns"):
            values["known_turns"] = KnownTurns(**turns | {"figures": figures(turns)})
        values["parts"] = {name: Part(**part) for name, part in content["parts"].items()}
        return cls(**values | {"figures": figures(content), "rewriting": rewriting, "about": others})

    @classmethod
    def read(cls, path: Path) -> Report:
        """Read a report.json. Raises ConfigError where it is none."""
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path}: is no sound report: {error!r}") from None


def parts_of(outcomes: Outcomes) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """Yield (name, rows) of each part of the outcomes that is reported by itself."""
    for column in outcomes.parts:
        values = outcomes.text[column]
        names = sorted(set(values) - {""})
        # Figures on seen transcripts alone are worth a line; a column with a single value divides nothing.
        for name in names if len(names) > 1 or column == SEEN_TEXT else ():
            yield f"{column.replace('_', ' ')}: {name}", values == name
    seconds = outcomes.numbers["seconds"]
    for low, high in itertools.pairwise(LENGTHS):
        rows = (seconds >= low) & (seconds < high)
        if rows.any():
            yield f"length: {low:g} to {high:g} s" if high < math.inf else f"length: from {low:g} s", rows


def report(outcomes: Outcomes, *, resamples: int = RESAMPLES, seed: int = 0) -> Report:
    """Compute all figures of some outcomes with their intervals, and those of the parts."""
    figures = Figures(outcomes)
    values = figures()
    by_utterance = intervals(figures, resamples=resamples, seed=seed) if values else {}
    speakers = outcomes.text["speaker"]
    known = len(outcomes) > 0 and all(speakers) and len(set(speakers)) > 1
    by_speaker = intervals(figures, speakers, resamples=resamples, seed=seed) if values and known else {}
    emotion = emotion_sums(outcomes)
    labels = Counter(outcomes.text["emotion"])
    judged: dict[str, int] = {}
    for measure in measures():
        judged |= measure.judged(outcomes)
    return Report(
        utterances=len(outcomes),
        emotions=outcomes.emotions,
        resamples=resamples,
        seed=seed,
        speakers=len(set(speakers) - {""}),
        figures={
            name: Figure(
                finite(value),
                finite(list(by_utterance.get(name, (math.nan, math.nan)))),
                finite(list(by_speaker[name])) if name in by_speaker else None,
            )
            for name, value in values.items()
        },
        judged=judged,
        other_labels={name: n for name, n in labels.most_common() if name not in {"", *outcomes.emotions}},
        **(emotion.confusion() | {"calibration": emotion.calibration()} if emotion.scored.any() else {}),
        parts={
            name: Part(int(rows.sum()), finite(Figures(outcomes.part(rows))()))
            for name, rows in parts_of(outcomes)
        },
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
    """Return how people call a figure."""
    concordance_of = name.removeprefix("ccc ")
    return TITLES.get(name, name if concordance_of == name else f"concordance (CCC), {concordance_of}")


def four_digits(value: float | None) -> str:
    """Write a figure with four digits; a dash for none."""
    return "-" if value is None else f"{value:.4f}"


def interval_text(interval: Sequence[float | None] | None) -> str:
    """Write both ends of an interval; a dash for none."""
    return "-" if interval is None else f"{four_digits(interval[0])} to {four_digits(interval[1])}"


def shares(kinds: Mapping[str, float | None]) -> str:
    """Write, by kind (speakers, transcripts ...), the share that stands in another part too; None is unknown."""
    return ", ".join(f"{kind} {'unknown' if s is None else f'{100 * s:.1f} %'}" for kind, s in kinds.items())


def shared_line(result: Report) -> str:
    """Say in a line what the model of a report knows from training of what it is evaluated on."""
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
    """Write a line for each figure. Of many classes, precision and recall of each are left out."""
    lines = [f"{'':32}{'':>7}   95 % over utterances   over speakers"]
    many = len(result.emotions) > MANY_CLASSES
    for name, figure in result.figures.items():
        if many and name.startswith(("precision ", "recall ")):
            continue
        over_utterances, over_speakers = map(interval_text, (figure.interval_utterances, figure.interval_speakers))
        title = printable(title_of(name))
        lines.append(f"{title:32}{four_digits(figure.value):>7}   {over_utterances:20}   {over_speakers}")
    return lines


def confusion_lines(result: Report) -> list[str]:
    """Write which class was recognised as which: as a matrix, or of many classes the most frequent pairs."""
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
    """Write a report for people. Labels are foreign: each is on its line, and commands no terminal."""
    lines = [f"{result.utterances} utterances, {result.speakers} speakers", *emotion_notes(result)]
    lines += [*figure_lines(result), *confusion_lines(result), *part_lines(result)]
    return "\n".join([*lines, *map(printable, result.rewriting.notes())])


# ----------------------------------------------------------------------------------------------- comparison


def mcnemar(only_first: int, only_second: int) -> float:
    """Compute the two-sided exact p of McNemar's test.

    Under chance, each utterance that only one of the two has right is on either side with probability 1/2.
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


def in_order_of(first: Outcomes, second: Outcomes) -> Outcomes:
    """Return the second outcomes in the order of the first.

    Raises ConfigError where they are not of the same utterances with the same labels.
    """
    order = {name: i for i, name in enumerate(second.text["id"])}
    if len(order) != len(second) or set(order) != set(first.text["id"]):
        raise ConfigError("the two reports are not of the same utterances, so no utterance can be paired")
    ordered = second.part(np.array([order[name] for name in first.text["id"]], np.int64))
    if any(first.text["emotion"] != ordered.text["emotion"]):
        raise ConfigError("the two reports have different labels for some utterances")
    return ordered


def compare_predictions(
    first: Outcomes, second: Outcomes, *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Any]:
    """Test whether two sets of predictions of the same utterances differ by more than chance.

    This is McNemar's exact test on the utterances that one has right and the other wrong (McNemar, 1947), and a
    paired bootstrap of the differences, the second minus the first.

    Raises ConfigError where they are not of the same utterances with the same labels.
    """
    second = in_order_of(first, second)
    labelled = first.text["emotion"] != ""
    right = [(o.text["emotion"] == o.text["predicted"])[labelled] for o in (first, second)]
    only_first, only_second = int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())
    figures = [Figures(first), Figures(second)]
    values = [f() for f in figures]
    drawn = resampled(figures, resamples=resamples, seed=seed)
    spans = percentiles({name: drawn[1][name] - drawn[0][name] for name in drawn[0] if name in drawn[1]})
    return finite(
        {
            "utterances": len(first),
            "only_first_right": only_first,
            "only_second_right": only_second,
            "mcnemar_p": mcnemar(only_first, only_second),
            "differences": {
                name: {"value": values[1][name] - value, "interval": list(spans[name])}
                for name, value in values[0].items()
                if name in values[1]
            },
        }
    )

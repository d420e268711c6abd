"""From predictions to figures that one can defend: intervals, calibration, parts, comparisons.

Read from the top: outcomes (a few numbers per utterance), figures of them, intervals by bootstrap, the report, its
table, and the comparison of two. The predictions file is the source: every figure can be computed from it again.
"""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ser.data.manifest import Utterance
from ser.data.text import clean
from ser.errors import ConfigError
from ser.files import replace_file
from ser.recognizer import Prediction, Recognizer
from ser.train.distributed import World
from ser.train.loop import evaluate
from ser.train.metrics import ClassificationCounts, character_errors, word_errors

CHUNK = 8192  # utterances that are evaluated together: what is held at once
CALIBRATION_BINS = 15  # as in Guo et al., 2017
RESAMPLES = 1000
LENGTHS = (0.0, 2.0, 4.0, 8.0, math.inf)  # seconds: the parts by length

# Columns of the predictions file beside p_<emotion> for each class; what is not known is empty.
TEXT_COLUMNS = ("id", "file", "speaker", "kind", "seen_text", "emotion", "predicted", "reference", "transcript")
NUMBER_COLUMNS = ("seconds", "confidence", "word_edits", "words", "character_edits", "characters", "speaker_right")


# ------------------------------------------------------------------------------------------------- outcomes


@dataclass
class Outcomes:
    """What became of each utterance: one row of the predictions file each, as arrays of equal length N.

    Attributes:
        emotions: class names in the model's order.
        text: the columns of `TEXT_COLUMNS`, "" where unknown.
        numbers: the columns of `NUMBER_COLUMNS`, NaN where unknown. confidence is the probability of the predicted
            emotion; speaker_right is 1 or 0 for an utterance by a speaker that the model knows.
        probabilities: (N, K) float32.
    """

    emotions: list[str]
    text: dict[str, NDArray[np.object_]]
    numbers: dict[str, NDArray[np.float64]]
    probabilities: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.numbers["seconds"])

    def part(self, rows: NDArray[np.bool_]) -> Outcomes:
        """The rows where ``rows`` (N,) is True."""
        return Outcomes(
            self.emotions,
            {name: column[rows] for name, column in self.text.items()},
            {name: column[rows] for name, column in self.numbers.items()},
            self.probabilities[rows],
        )

    @classmethod
    def of(cls, emotions: Sequence[str], records: Sequence[Mapping[str, Any]]) -> Outcomes:
        """From rows of a predictions file."""
        names = list(emotions)
        shared: dict[str, str] = {}  # one string for all equal ones: a million rows share few labels

        def number(value: Any) -> float:
            return math.nan if value in ("", None) else float(value)

        return cls(
            names,
            {
                column: np.array([shared.setdefault(v, v) for r in records for v in [r.get(column) or ""]], object)
                for column in TEXT_COLUMNS
            },
            {column: np.array([number(r.get(column)) for r in records], np.float64) for column in NUMBER_COLUMNS},
            np.array([[number(r.get(f"p_{name}")) for name in names] for r in records], np.float32).reshape(
                len(records), len(names)
            ),
        )

    @classmethod
    def joined(cls, parts: Sequence[Outcomes]) -> Outcomes:
        """All rows of all parts, in their order. Their classes must be the same."""
        if not parts:
            raise ConfigError("there are no predictions to judge")
        for part in parts:
            if part.emotions != parts[0].emotions:
                raise ConfigError(f"classes differ: {parts[0].emotions} and {part.emotions}")
        return cls(
            parts[0].emotions,
            {name: np.concatenate([p.text[name] for p in parts]) for name in TEXT_COLUMNS},
            {name: np.concatenate([p.numbers[name] for p in parts]) for name in NUMBER_COLUMNS},
            np.concatenate([p.probabilities for p in parts]),
        )

    @classmethod
    def read(cls, path: Path) -> Outcomes:
        """A predictions file. Raises ConfigError where it is none."""
        try:
            return cls._read(path)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
        except (ValueError, csv.Error) as error:
            raise ConfigError(f"{path}: is no sound predictions file: {error}") from None

    @classmethod
    def _read(cls, path: Path) -> Outcomes:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            found = reader.fieldnames or []
            missing = [name for name in (*TEXT_COLUMNS, *NUMBER_COLUMNS) if name not in found]
            if missing:
                raise ConfigError(f"{path}: is no predictions file, it lacks the columns {', '.join(missing)}")
            emotions = [name.removeprefix("p_") for name in found if name.startswith("p_")]
            parts, records = [], []
            for record in reader:
                records.append(record)
                if len(records) == CHUNK:
                    parts.append(cls.of(emotions, records))
                    records = []
            return cls.joined([*parts, cls.of(emotions, records)])


def judge(
    recognizer: Recognizer,
    utterances: Sequence[Utterance],
    *,
    world: World | None = None,
    seen_texts: frozenset[str] | None = None,
    workers: int = 0,
    progress: bool = False,
) -> Iterator[list[dict[str, Any]]]:
    """Rows of the predictions file, in the order of the utterances, a chunk at a time: memory is bounded.

    Every rank calls this and gets every row; each utterance is recognised exactly once.

    Args:
        recognizer: the model.
        utterances: rows of a manifest.
        world: the ranks that share the work.
        seen_texts: transcripts that training had, cleaned as the model cleans; None: not known.
        workers: processes per rank that decode audio.
        progress: show a bar per chunk.
    """

    for first in range(0, len(utterances), CHUNK):
        chunk = utterances[first : first + CHUNK]
        found = evaluate(recognizer, chunk, world=world, workers=workers, keep_rows=True, progress=progress)
        rows = []
        for utterance, reference, prediction in found.rows:
            row = as_row(recognizer, utterance, reference, prediction)
            if seen_texts is not None:
                text = clean(utterance.text or "", orthography=recognizer.orthography, tags=recognizer.tags)
                row["seen_text"] = "" if not text else "seen" if text in seen_texts else "unseen"
            rows.append(row)
        yield rows


def as_row(recognizer: Recognizer, utterance: Utterance, reference: str, prediction: Prediction) -> dict[str, Any]:
    """One row of the predictions file; None where there is nothing to say."""
    row: dict[str, Any] = dict.fromkeys((*TEXT_COLUMNS, *NUMBER_COLUMNS))
    row |= {
        "id": utterance.id,
        "file": str(utterance.file),
        "seconds": prediction.seconds,
        "speaker": utterance.speaker,
        "kind": utterance.extra.get("kind"),
        "emotion": utterance.emotion,
        "predicted": prediction.emotion,
    }
    for name, probability in (prediction.probabilities or {}).items():
        row[f"p_{name}"] = probability
        if name == prediction.emotion:
            row["confidence"] = probability
    if prediction.transcript is not None:
        row["transcript"] = prediction.transcript
        if reference:
            words, characters = (
                word_errors(reference, prediction.transcript),
                character_errors(reference, prediction.transcript),
            )
            row |= {"reference": reference, "word_edits": words.edits, "words": words.length}
            row |= {"character_edits": characters.edits, "characters": characters.length}
    if prediction.speaker is not None and utterance.speaker in recognizer.speakers:
        row["speaker_right"] = int(prediction.speaker == utterance.speaker)
    return row


# -------------------------------------------------------------------------------------------------- figures


def expected_calibration_error(
    confidence: NDArray[np.float64], right: NDArray[np.bool_], weights: NDArray[np.int64] | None = None
) -> float:
    """ECE, 0..1: the mean over equal bins of confidence of |accuracy - confidence|, weighted by their sizes.

    Guo et al., *On Calibration of Modern Neural Networks*, ICML 2017, eq. 3, with 15 bins. NaN without utterances.
    """
    count, accuracy, mean = calibration(confidence, right, weights)
    return float((np.abs(accuracy - mean) * count).sum() / count.sum()) if count.sum() else math.nan


def calibration(
    confidence: NDArray[np.float64], right: NDArray[np.bool_], weights: NDArray[np.int64] | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Per bin of confidence, (bins,) each: how many utterances, their accuracy, their mean confidence."""
    counted = np.ones(len(confidence)) if weights is None else weights.astype(np.float64)
    place = np.clip(np.ceil(confidence * CALIBRATION_BINS).astype(np.int64) - 1, 0, CALIBRATION_BINS - 1)

    def total(values: NDArray[Any]) -> NDArray[np.float64]:
        return np.bincount(place, weights=counted * values, minlength=CALIBRATION_BINS).astype(np.float64)

    count = total(np.ones(len(confidence)))
    divisor = np.maximum(count, 1e-300)
    return count, total(right) / divisor, total(confidence) / divisor


class Figures:
    """Every figure of some outcomes as a function of how often each utterance counts: what a bootstrap needs.

        figures = Figures(outcomes)
        figures()                          # each utterance once
        figures(rng.multinomial(...))      # a resample

    What does not depend on the weights is computed once.
    """

    def __init__(self, outcomes: Outcomes) -> None:
        self.emotions = outcomes.emotions
        index = {name: i for i, name in enumerate(outcomes.emotions)}
        reference = np.array([index.get(name, -1) for name in outcomes.text["emotion"]], np.int64)
        predicted = np.array([index.get(name, -1) for name in outcomes.text["predicted"]], np.int64)
        self.judged = (reference >= 0) & (predicted >= 0)
        self.cells = (reference * len(index) + predicted)[self.judged]
        self.right = (reference == predicted)[self.judged]
        self.confidence = outcomes.numbers["confidence"][self.judged]
        self.errors = {
            name: (np.nan_to_num(outcomes.numbers[edits]), np.nan_to_num(outcomes.numbers[length]))
            for name, edits, length in (("wer", "word_edits", "words"), ("cer", "character_edits", "characters"))
        }
        self.speaker = outcomes.numbers["speaker_right"]
        self.size = len(outcomes)

    def confusion(self, weights: NDArray[np.int64]) -> ClassificationCounts:
        """Over the utterances whose label is a class of the model."""
        size = len(self.emotions)
        cells = np.bincount(self.cells, weights=weights[self.judged], minlength=size * size)
        return ClassificationCounts(cells.astype(np.int64).reshape(size, size))

    def __call__(self, weights: NDArray[np.int64] | None = None) -> dict[str, float]:
        """By name; only what there are labels for."""
        weights = np.ones(self.size, np.int64) if weights is None else weights
        found: dict[str, float] = {}
        if self.judged.any():
            counts, judged = self.confusion(weights), weights[self.judged]
            found |= {
                "accuracy": counts.accuracy,
                "unweighted_accuracy": counts.unweighted_accuracy,
                "macro_f1": counts.macro_f1,
                "ece": expected_calibration_error(self.confidence, self.right, judged),
            }
            found |= {f"precision {n}": float(v) for n, v in zip(self.emotions, counts.precision, strict=True)}
            found |= {f"recall {n}": float(v) for n, v in zip(self.emotions, counts.recall, strict=True)}
        for name, (edits, length) in self.errors.items():
            if length.any():
                total = float(length @ weights)
                found[name] = float(edits @ weights) / total if total else math.nan
        known = np.isfinite(self.speaker)
        if known.any():
            total = int(weights[known].sum())
            found["speaker_accuracy"] = float(self.speaker[known] @ weights[known]) / total if total else math.nan
        return found


# ------------------------------------------------------------------------------------------------ intervals


def intervals(
    figures: Callable[[NDArray[np.int64]], dict[str, float]],
    size: int,
    groups: Sequence[str] | NDArray[np.object_] | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """95 % percentile intervals by the bootstrap (Efron, 1979): the figures of many resamples with replacement.

    Args:
        figures: of weights (N,).
        size: N, the number of utterances.
        groups: (N,) the speaker of each: whole speakers are drawn, as utterances of one are not independent. None:
            utterances are drawn.
        resamples: how many.
        seed: of the draws.

    Returns:
        name -> (low, high); a resample in which a figure is undefined is left out of it.
    """
    generator = np.random.default_rng(seed)
    members = None
    if groups is not None:
        _, members = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    drawn: dict[str, list[float]] = {}
    for _ in range(resamples):
        units = size if members is None else int(members.max()) + 1
        counts = np.bincount(generator.integers(0, units, units), minlength=units)
        for name, value in figures(counts if members is None else counts[members]).items():
            if math.isfinite(value):
                drawn.setdefault(name, []).append(value)
    return {name: (float(low), float(high)) for name, values in drawn.items()
            for low, high in [np.percentile(values, [2.5, 97.5])]}  # fmt: skip


# --------------------------------------------------------------------------------------------------- report


def report(outcomes: Outcomes, *, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Any]:
    """All figures of some outcomes with their intervals, and by parts, as plain data for JSON."""
    figures = Figures(outcomes)
    found: dict[str, Any] = {"utterances": len(outcomes), "emotions": outcomes.emotions}
    values = figures()
    by_utterance = intervals(figures, len(outcomes), resamples=resamples, seed=seed)
    speakers = outcomes.text["speaker"]
    known = len(outcomes) > 0 and all(speakers) and len(set(speakers)) > 1
    by_speaker = intervals(figures, len(outcomes), speakers, resamples=resamples, seed=seed) if known else {}
    found["speakers"] = len(set(speakers) - {""})
    found["figures"] = {
        name: {
            "value": value,
            "interval_utterances": list(by_utterance.get(name, (math.nan, math.nan))),
            "interval_speakers": list(by_speaker[name]) if name in by_speaker else None,
        }
        for name, value in values.items()
    }
    found["judged"] = {
        "emotion": int(figures.judged.sum()),
        "words": int(figures.errors["wer"][1].sum()),
        "speaker": int(np.isfinite(figures.speaker).sum()),
    }
    if figures.judged.any():
        found["confusion"] = figures.confusion(np.ones(len(outcomes), np.int64)).confusion.tolist()
        count, accuracy, mean = calibration(figures.confidence, figures.right)
        found["calibration"] = [
            {"count": int(n), "accuracy": float(a), "confidence": float(c)}
            for n, a, c in zip(count, accuracy, mean, strict=True)
            if n
        ]
    found["parts"] = {
        name: {"utterances": int(rows.sum()), "figures": Figures(outcomes.part(rows))()}
        for name, rows in parts(outcomes)
    }
    return finite(found)


def parts(outcomes: Outcomes) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """(name, rows) of each part of the outcomes that is reported by itself."""
    for column in ("kind", "seen_text"):
        values = outcomes.text[column]
        names = sorted(set(values) - {""})
        for name in names if len(names) > 1 or (names and column == "seen_text") else ():
            yield f"{column.replace('_', ' ')}: {name}", values == name
    seconds = outcomes.numbers["seconds"]
    for low, high in itertools.pairwise(LENGTHS):
        rows = (seconds >= low) & (seconds < high)
        if rows.any():
            yield f"length: {low:g} to {high:g} s" if high < math.inf else f"length: from {low:g} s", rows


def finite(value: Any) -> Any:
    """As JSON can hold it: None for NaN."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


TITLES = {
    "accuracy": "accuracy (WA)",
    "unweighted_accuracy": "unweighted accuracy (UA)",
    "macro_f1": "macro F1",
    "ece": "expected calibration error",
    "wer": "word error rate",
    "cer": "character error rate",
    "speaker_accuracy": "speaker accuracy",
}


def table(found: Mapping[str, Any]) -> str:
    """A report as people read it."""
    lines = [f"{found['utterances']} utterances, {found['speakers']} speakers"]
    lines.append(f"{'':32}{'':>7}   95 % over utterances   over speakers")

    def show(value: float | None) -> str:
        return "-" if value is None else f"{value:.4f}"

    for name, entry in found["figures"].items():
        spans = [entry["interval_utterances"], entry["interval_speakers"]]
        shown = ["-" if s is None else f"{show(s[0])} to {show(s[1])}" for s in spans]
        lines.append(f"{TITLES.get(name, name):32}{show(entry['value']):>7}   {shown[0]:20}   {shown[1]}")
    if "confusion" in found:
        width = max(6, *(len(name) + 1 for name in found["emotions"]))
        lines += [
            "",
            "confusion (rows: reference)",
            " " * width + "".join(f"{n:>{width}}" for n in found["emotions"]),
        ]
        for name, row in zip(found["emotions"], found["confusion"], strict=True):
            lines.append(f"{name:{width}}" + "".join(f"{n:>{width}}" for n in row))
    if found["parts"]:
        lines += ["", f"{'part':32}{'n':>7}{'WA':>9}{'UA':>9}{'WER':>9}"]
        for name, part in found["parts"].items():
            cells = (part["figures"].get(key) for key in ("accuracy", "unweighted_accuracy", "wer"))
            lines.append(f"{name:32}{part['utterances']:>7}" + "".join(f"{show(c):>9}" for c in cells))
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------- comparison


def compare(first: Outcomes, second: Outcomes, *, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Any]:
    """Whether two sets of predictions of the same utterances differ by more than chance.

    McNemar's exact test on the utterances that one has right and the other wrong (McNemar, 1947), and a paired
    bootstrap of the differences, the second minus the first.

    Raises ConfigError where they are not of the same utterances with the same labels.
    """
    order = {name: i for i, name in enumerate(second.text["id"])}
    if len(order) != len(second) or set(order) != set(first.text["id"]):
        raise ConfigError("the two reports are not of the same utterances, so no utterance can be paired")
    rows = np.array([order[name] for name in first.text["id"]], np.int64)
    ordered = Outcomes(
        second.emotions,
        {name: column[rows] for name, column in second.text.items()},
        {name: column[rows] for name, column in second.numbers.items()},
        second.probabilities[rows],
    )
    if any(first.text["emotion"] != ordered.text["emotion"]):
        raise ConfigError("the two reports have different labels for some utterances")
    labelled = first.text["emotion"] != ""
    right = [(o.text["emotion"] == o.text["predicted"])[labelled] for o in (first, ordered)]
    only_first, only_second = int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())
    a, b = Figures(first), Figures(ordered)

    def differences(weights: NDArray[np.int64] | None = None) -> dict[str, float]:
        x, y = a(weights), b(weights)
        return {name: y[name] - x[name] for name in x if name in y}

    spans = intervals(differences, len(first), resamples=resamples, seed=seed)
    return finite(
        {
            "utterances": len(first),
            "only_first_right": only_first,
            "only_second_right": only_second,
            "mcnemar_p": mcnemar(only_first, only_second),
            "differences": {
                name: {"value": value, "interval": list(spans.get(name, (math.nan, math.nan)))}
                for name, value in differences().items()
            },
        }
    )


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided exact p: under chance each discordant utterance falls on either side with probability 1/2."""
    total, least = only_first + only_second, min(only_first, only_second)
    if not total:
        return 1.0
    # log C(n, k) - n log 2, summed in the tail
    logs = [
        math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1) - total * math.log(2)
        for k in range(least + 1)
    ]
    return min(1.0, 2 * math.fsum(math.exp(value) for value in logs))


def write_rows(path: Path, chunks: Iterable[list[dict[str, Any]]], emotions: Sequence[str]) -> Outcomes:
    """Write the predictions file from `judge`, and keep the numbers."""

    columns = [*TEXT_COLUMNS, *NUMBER_COLUMNS, *(f"p_{name}" for name in emotions)]
    kept = []
    with replace_file(path) as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        for rows in chunks:
            writer.writerows(rows)
            kept.append(Outcomes.of(emotions, rows))
    return Outcomes.joined(kept)

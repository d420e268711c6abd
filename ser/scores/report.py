"""From predictions to figures that one can defend: intervals, calibration, parts, comparisons.

Read from the top: outcomes (a few numbers per utterance), figures of them, intervals by bootstrap, the report, its
table, and the comparison of two. The predictions file is the source: every figure can be computed from it again.
"""

from __future__ import annotations

import csv
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ser.data.labels import DIMENSIONS
from ser.data.manifest import Utterance, check_regular
from ser.data.text import Rewriting
from ser.errors import ConfigError, ManifestError, printable
from ser.files import csv_line, finite, replace_file
from ser.recognizer import Prediction, Recognizer
from ser.scores.counts import ccc_summands, character_errors, concordance, ratio, word_errors

CHUNK = 8192  # utterances that are evaluated together: what is held at once
CALIBRATION_BINS = 15  # as in Guo et al., 2017
RESAMPLES = 1000
MAX_COUNTS = 4_000_000  # of utterances in resamples that are held at once
MANY_CLASSES = 100  # above, nothing is kept or shown of each pair of classes
LENGTHS = (0.0, 2.0, 4.0, 8.0, math.inf)  # seconds: the parts by length

# Columns of the predictions file beside p_<emotion> for each class; what is not known is empty.
TEXT_COLUMNS = ("id", "file", "speaker", "kind", "seen_text", "emotion", "predicted", "reference", "transcript")
NUMBER_COLUMNS = (
    "seconds", "confidence", "word_edits", "words", "character_edits", "characters", "speaker_right",
    *DIMENSIONS, *(f"{name}_predicted" for name in DIMENSIONS),
)  # fmt: skip


def check_row(record: Mapping[str, Any], emotions: Sequence[str], where: str) -> None:
    """Raise ValueError for what cannot be a row of a predictions file."""
    if None in record or None in record.values():
        raise ValueError(f"{where}: has more or fewer cells than the header")
    for name in (*NUMBER_COLUMNS, *(f"p_{emotion}" for emotion in emotions)):
        try:
            value = float(record[name] or 0)
        except ValueError:
            value = math.inf
        least, most, expected = -math.inf, math.inf, "a finite number"
        if name in ("confidence", "speaker_right") or name not in NUMBER_COLUMNS:
            least, most, expected = 0, 1, "a number from 0 to 1"
        elif not name.startswith(DIMENSIONS):
            least, expected = 0, "a number from 0"
        if math.isinf(value) or value < least or value > most:  # NaN is neither
            raise ValueError(f"{where}: {name} is {record[name][:40]!r}; expected {expected}, or nothing")


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

        def number(value: Any) -> float:  # NaN and infinity, of scores that overflowed, are unknown
            return float(value) if value not in ("", None) and math.isfinite(float(value)) else math.nan

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
        except ManifestError as error:
            raise ConfigError(str(error)) from None
        except (ValueError, csv.Error) as error:
            raise ConfigError(f"{path}: is no sound predictions file: {error}") from None

    @classmethod
    def _read(cls, path: Path) -> Outcomes:
        check_regular(path, "a predictions file")
        with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets begin it with a byte order mark
            reader = csv.DictReader(file)
            found = reader.fieldnames or []
            missing = [name for name in (*TEXT_COLUMNS, *NUMBER_COLUMNS) if name not in found]
            if missing:
                raise ConfigError(f"{path}: is no predictions file, it lacks the columns {', '.join(missing)}")
            if twice := [name for name, count in Counter(found).items() if count > 1]:
                raise ConfigError(f"{path}: is no predictions file, it has several columns {', '.join(twice)}")
            emotions = [name.removeprefix("p_") for name in found if name.startswith("p_")]
            parts, records = [], []
            for record in reader:
                check_row(record, emotions, f"line {reader.line_num}")
                records.append(record)
                if len(records) == CHUNK:
                    parts.append(cls.of(emotions, records))
                    records = []
            return cls.joined([*parts, cls.of(emotions, records)])


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
    for name, value in (prediction.dimensions or {}).items():
        if (ours := name.lower()) in DIMENSIONS:  # some models spell Arousal
            row |= {ours: utterance.labels.get(ours), f"{ours}_predicted": value}
    if prediction.speaker is not None and utterance.speaker in recognizer.speakers:
        row["speaker_right"] = int(prediction.speaker == utterance.speaker)
    return row


# -------------------------------------------------------------------------------------------------- figures


def _calibration_summands(confidence: NDArray[np.float64], right: NDArray[np.bool_]) -> NDArray[np.float64]:
    """(N,) each -> (N, 3 * bins): in the columns of an utterance's bin 1, whether it is right, its confidence."""
    place = np.clip(np.ceil(confidence * CALIBRATION_BINS).astype(np.int64) - 1, 0, CALIBRATION_BINS - 1)
    inside = place[:, None] == np.arange(CALIBRATION_BINS)
    return np.concatenate(
        [inside, inside * right[:, None], inside * confidence[:, None]], axis=1, dtype=np.float64
    )


def expected_calibration_error(totals: NDArray[np.float64]) -> NDArray[np.float64]:
    """ECE, 0..1: the mean over equal bins of confidence of |accuracy - confidence|, weighted by their sizes.

    Guo et al., *On Calibration of Modern Neural Networks*, ICML 2017, eq. 3, with 15 bins. NaN without utterances.
    (R, 3 * bins) sums of `_calibration_summands` -> (R,).
    """
    count, right, confidence = np.split(totals, 3, axis=1)
    return ratio(np.abs(right - confidence).sum(1), count.sum(1))


class Figures:
    """Every figure of some outcomes, as a function of sums over utterances: what a bootstrap needs.

        figures = Figures(outcomes)
        figures()                                # each utterance once
        figures(weights)                         # (N,): how often each counts
        figures.of(figures.totals(weights))      # weights (R, N), R resamples at once -> name -> (R,)

    Accuracies, error rates, calibration and concordance all follow from such sums, so a thousand resamples are
    one matrix product.
    """

    def __init__(self, outcomes: Outcomes) -> None:
        self.outcomes, self.emotions, self.size = outcomes, outcomes.emotions, len(outcomes)
        index = {name: i for i, name in enumerate(outcomes.emotions)}
        reference = np.array([index.get(name, -1) for name in outcomes.text["emotion"]], np.int64)
        predicted = np.array([index.get(name, -1) for name in outcomes.text["predicted"]], np.int64)
        self.judged = (reference >= 0) & (predicted >= 0)
        self.right = self.judged & (reference == predicted)
        self.pairs = np.stack([reference, predicted], 1)[self.judged]  # (judged, 2)
        # Sums are kept of the classes that occur: a model may have thousands more.
        self.classes = np.unique(self.pairs)  # (C,)
        place = np.full(len(index) + 1, -1)  # in `classes`; the last for -1, no class
        place[self.classes] = np.arange(len(self.classes))
        self.places = np.where(self.judged[:, None], place[np.stack([reference, predicted], 1)], -1)  # (N, 2)
        numbers = outcomes.numbers
        self.rates = {
            name: (part, whole)
            for name, part, whole in (
                ("wer", numbers["word_edits"], numbers["words"]),
                ("cer", numbers["character_edits"], numbers["characters"]),
                ("speaker_accuracy", numbers["speaker_right"], np.isfinite(numbers["speaker_right"])),
            )
            if np.nan_to_num(whole).any()
        }
        self.dimensions = [
            name
            for name in DIMENSIONS
            if (np.isfinite(numbers[name]) & np.isfinite(numbers[f"{name}_predicted"])).any()
        ]
        self.widths = [3 * len(self.classes), 3 * CALIBRATION_BINS, *[2] * len(self.rates)]
        self.widths += [6] * len(self.dimensions)
        self.chunk = max(1, min(CHUNK, MAX_COUNTS // sum(self.widths)))
        self._kept = self._summands(slice(None)) if self.size <= self.chunk else None

    def _summands(self, rows: slice) -> NDArray[np.float64]:
        """(n, M): what each of these utterances adds to each sum."""
        if (kept := getattr(self, "_kept", None)) is not None:
            return kept
        numbers, right = self.outcomes.numbers, self.right[rows, None]
        confidence = np.nan_to_num(numbers["confidence"][rows])
        true, found = (self.places[rows, i, None] == np.arange(len(self.classes)) for i in (0, 1))
        blocks = [
            np.concatenate([true & right, true, found], axis=1),
            _calibration_summands(confidence, self.right[rows]) * self.judged[rows, None],
        ]
        blocks += [np.nan_to_num(np.stack([part[rows], whole[rows]], 1)) for part, whole in self.rates.values()]
        for name in self.dimensions:
            labels, predictions = (torch.from_numpy(numbers[n][rows, None]) for n in (name, f"{name}_predicted"))
            labels = labels.masked_fill(~predictions.isfinite(), torch.nan)
            blocks.append(ccc_summands(predictions.nan_to_num(), labels)[:, :, 0].T.numpy())
        return np.concatenate(blocks, axis=1, dtype=np.float64)

    def totals(self, weights: NDArray[Any]) -> NDArray[np.float64]:
        """The sums with each utterance counted as often as its weight says: (R, N) -> (R, M)."""
        found = weights[:, : self.chunk] @ self._summands(slice(0, self.chunk))
        for first in range(self.chunk, self.size, self.chunk):
            rows = slice(first, first + self.chunk)
            found += weights[:, rows] @ self._summands(rows)
        return found

    def totals_by(self, members: NDArray[np.int64], count: int) -> NDArray[np.float64]:
        """The sums of each of `count` groups, of which ``members`` (N,) names one for each utterance: (G, M)."""
        found = np.zeros((count, sum(self.widths)))
        for first in range(0, self.size, self.chunk):
            rows = slice(first, first + self.chunk)
            np.add.at(found, members[rows], self._summands(rows))
        return found

    def of(self, totals: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
        """(R, M) sums -> name -> (R,), NaN where it is undefined; only what there are labels for."""
        found: dict[str, NDArray[np.float64]] = {}
        blocks = iter(np.split(totals, np.cumsum(self.widths)[:-1], axis=1))
        right, true, recognised = np.split(next(blocks), 3, axis=1)  # (R, C) each
        binned = next(blocks)
        if self.judged.any():
            count = true.sum(1)
            recall, precision = ratio(right, true), ratio(right, recognised)
            f1 = np.nan_to_num(ratio(2 * right, true + recognised)).sum(1) / len(self.emotions)
            found |= {
                "accuracy": ratio(right.sum(1), count),
                # As `ClassificationCounts`: over the classes that occur, and over all.
                "unweighted_accuracy": ratio(np.nan_to_num(recall).sum(1), np.isfinite(recall).sum(1)),
                "macro_f1": np.where(count > 0, f1, np.nan),
                "ece": expected_calibration_error(binned),
            }
            for kind, values in (("precision", precision), ("recall", recall)):
                found |= dict.fromkeys((f"{kind} {name}" for name in self.emotions), np.full(len(totals), np.nan))
                found |= {f"{kind} {self.emotions[c]}": values[:, i] for i, c in enumerate(self.classes)}
        for name in self.rates:
            found[name] = ratio(*next(blocks).T)
        for name in self.dimensions:
            found[f"ccc {name}"] = concordance(torch.from_numpy(next(blocks).T.copy())).numpy()
        return found

    def __call__(self, weights: NDArray[Any] | None = None) -> dict[str, float]:
        """By name; only what there are labels for."""
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
    """The figures of many resamples with replacement (Efron, 1979): name -> (resamples,) for each of `figures`.

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
    """name -> the 2.5 % and 97.5 % percentiles of the values that are defined; NaN without any."""
    found = {}
    for name, values in drawn.items():
        defined = values[np.isfinite(values)]
        low, high = np.percentile(defined, [2.5, 97.5]) if defined.size else (math.nan, math.nan)
        found[name] = (float(low), float(high))
    return found


def intervals(
    figures: Figures,
    groups: Sequence[str] | NDArray[np.object_] | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """95 % percentile intervals by the bootstrap, as `resampled`: name -> (low, high).

    A resample in which a figure is undefined is left out of it.
    """
    return percentiles(resampled([figures], groups, resamples=resamples, seed=seed)[0])


def confusion(pairs: NDArray[np.int64], emotions: Sequence[str]) -> dict[str, Any]:
    """Count how often which class (row) was recognised as which (column), as a report has it.

    ``pairs`` is (N, 2). "confusion" is the matrix; of more than `MANY_CLASSES` there is "confused" in its place, a
    list of [reference, recognised, count] of what occurred, the most frequent first.
    """
    size = len(emotions)
    if size <= MANY_CLASSES:
        cells = np.bincount(pairs @ [size, 1], minlength=size * size)
        return {"confusion": cells.reshape(size, size).tolist()}
    found, counts = np.unique(pairs, axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return {"confused": [[emotions[found[i, 0]], emotions[found[i, 1]], int(counts[i])] for i in order]}


# --------------------------------------------------------------------------------------------------- report


def report(outcomes: Outcomes, *, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Any]:
    """All figures of some outcomes with their intervals, and by parts, as plain data for JSON."""
    figures = Figures(outcomes)
    found: dict[str, Any] = {"utterances": len(outcomes), "emotions": outcomes.emotions}
    found |= {"resamples": resamples, "seed": seed}
    values = figures()
    by_utterance = intervals(figures, resamples=resamples, seed=seed) if values else {}
    speakers = outcomes.text["speaker"]
    known = len(outcomes) > 0 and all(speakers) and len(set(speakers)) > 1
    by_speaker = intervals(figures, speakers, resamples=resamples, seed=seed) if values and known else {}
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
        "words": int(np.nansum(outcomes.numbers["words"])),
        "speaker": int(np.isfinite(outcomes.numbers["speaker_right"]).sum()),
    }
    labels = Counter(outcomes.text["emotion"])
    classes = {"", *outcomes.emotions}
    found["other_labels"] = {name: count for name, count in labels.most_common() if name not in classes}
    if figures.judged.any():
        found |= confusion(figures.pairs, outcomes.emotions)
        confidence, right = outcomes.numbers["confidence"][figures.judged], figures.right[figures.judged]
        bins = _calibration_summands(confidence, right).sum(0).reshape(3, -1).T
        found["calibration"] = [
            {"count": int(n), "accuracy": r / n, "confidence": c / n} for n, r, c in bins.tolist() if n
        ]
    found["parts"] = {
        name: {"utterances": int(rows.sum()), "figures": Figures(outcomes.part(rows))()}
        for name, rows in parts(outcomes)
    }
    return finite(found)


TITLES = {
    "accuracy": "accuracy (WA)",
    "unweighted_accuracy": "unweighted accuracy (UA)",
    "macro_f1": "macro F1",
    "ece": "expected calibration error",
    "wer": "word error rate",
    "cer": "character error rate",
    "speaker_accuracy": "speaker accuracy",
    **{f"ccc {name}": f"concordance (CCC), {name}" for name in DIMENSIONS},
}


def shares(kinds: Mapping[str, float | None]) -> str:
    """By kind (speakers, transcripts, ...), the share that stands in another part too; None where unknown."""
    return ", ".join(f"{kind} {'unknown' if s is None else f'{100 * s:.1f} %'}" for kind, s in kinds.items())


def trained_on_some(found: Mapping[str, Any]) -> bool:
    """Whether the model of a report was trained on recordings that it is judged on."""
    shared = found.get("shared_with_training") or {}
    return max((shared.get(kind) or 0.0 for kind in ("recordings", "copies")), default=0.0) > 0


def shared_line(found: Mapping[str, Any]) -> str:
    """What the model of a report knows from training of what it is judged on, in a line."""
    shared = found.get("shared_with_training")
    if shared is None:
        return "what the model was trained on is not known: it does not name it (evaluate.py --train does)"
    assumed = " (taken to be the fold's: the model does not say)" if found.get("training_is_assumed") else ""
    warning = "WARNING: trained on recordings that are judged, so these figures say nothing about others. "
    return f"{warning if trained_on_some(found) else ''}known from training{assumed}: {shares(shared)}"


def emotions_judged(found: Mapping[str, Any]) -> list[str]:
    """Say which emotions are in no figure, and why."""
    judged, others, known = found["judged"]["emotion"], found.get("other_labels", {}), found["emotions"]
    count = sum(others.values())
    without = found["utterances"] - judged - count
    if not others:
        return [f"emotions are judged on {judged}: the others have no label"] if judged and without else []
    if not known:
        return [f"the model recognises no emotions: the labels of {count} utterances are in no figure"]
    listed = ", ".join(f"{name!r} x{n}" for name, n in itertools.islice(others.items(), 20))
    listed += f" and {len(others) - 20} more" if len(others) > 20 else ""
    if judged:
        unlabelled = f", and {without} have no label" if without else ""
        text = f"emotions are judged on {judged}: {count} have one that is no class of the model ({listed})"
        return [printable(f"{text}{unlabelled}")]
    classes = ", ".join(map(repr, known[:20])) + (f" and {len(known) - 20} more" if len(known) > 20 else "")
    text = f"WARNING: no emotion is judged: none of the labels of {count} utterances is a class of the model"
    return [text, printable(f"  labels:  {listed}"), printable(f"  classes: {classes}")]


def table(found: Mapping[str, Any]) -> str:
    """A report as people read it. Labels are foreign: each is on its line, and commands no terminal."""
    lines = [f"{found['utterances']} utterances, {found['speakers']} speakers"]
    lines += emotions_judged(found)
    lines.append(f"{'':32}{'':>7}   95 % over utterances   over speakers")

    def show(value: float | None) -> str:
        return "-" if value is None else f"{value:.4f}"

    many = len(found["emotions"]) > MANY_CLASSES
    for name, entry in found["figures"].items():
        if many and name.startswith(("precision ", "recall ")):
            continue
        spans = [entry["interval_utterances"], entry["interval_speakers"]]
        shown = ["-" if s is None else f"{show(s[0])} to {show(s[1])}" for s in spans]
        title = printable(TITLES.get(name, name))
        lines.append(f"{title:32}{show(entry['value']):>7}   {shown[0]:20}   {shown[1]}")
    if "confusion" in found:
        names = [printable(name) for name in found["emotions"]]
        width = max(6, *(len(name) + 1 for name in names))
        lines += ["", "confusion (rows: reference)", " " * width + "".join(f"{n:>{width}}" for n in names)]
        for name, row in zip(names, found["confusion"], strict=True):
            lines.append(f"{name:{width}}" + "".join(f"{n:>{width}}" for n in row))
    if "confused" in found:
        lines += ["", f"of {len(found['emotions'])} classes, what was recognised most often:"]
        for reference, recognised, count in found["confused"][:20]:
            lines.append(f"{printable(reference)} as {printable(recognised)}: {count}")
    if found["parts"]:
        lines += ["", f"{'part':32}{'n':>7}{'WA':>9}{'UA':>9}{'WER':>9}"]
        for name, part in found["parts"].items():
            cells = (part["figures"].get(key) for key in ("accuracy", "unweighted_accuracy", "wer"))
            lines.append(f"{printable(name):32}{part['utterances']:>7}" + "".join(f"{show(c):>9}" for c in cells))
    lines += map(printable, Rewriting.of(found).notes())
    return "\n".join(lines)


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
    figures = [Figures(first), Figures(ordered)]
    a, b = (f() for f in figures)
    drawn_a, drawn_b = resampled(figures, resamples=resamples, seed=seed)
    spans = percentiles({name: drawn_b[name] - drawn_a[name] for name in drawn_a if name in drawn_b})
    return finite(
        {
            "utterances": len(first),
            "only_first_right": only_first,
            "only_second_right": only_second,
            "mcnemar_p": mcnemar(only_first, only_second),
            "differences": {
                name: {"value": b[name] - value, "interval": list(spans[name])}
                for name, value in a.items()
                if name in b
            },
        }
    )


def write_rows(path: Path, chunks: Iterable[list[dict[str, Any]]], emotions: Sequence[str]) -> Outcomes:
    """Write the predictions file from `evaluated_rows`, and keep the numbers."""

    columns = [*TEXT_COLUMNS, *NUMBER_COLUMNS, *(f"p_{name}" for name in emotions)]
    kept = []
    with replace_file(path) as file:
        file.write(csv_line(columns))
        for rows in chunks:
            file.writelines(csv_line([finite(row.get(name)) for name in columns]) for row in rows)
            kept.append(Outcomes.of(emotions, rows))
    return Outcomes.joined(kept)

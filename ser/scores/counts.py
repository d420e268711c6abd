"""Accuracy, F1 and error rates as counts that can be summed.

A mean of means over unequal parts is wrong. So nothing is averaged before the end: batches, ranks and resamples
add what each utterance counts, and figures are computed from the sums. Validation during training and reports use
the same formulas: `class_figures`, `ratio` of edits and lengths, and `concordance`. WA and UA are the field's
names for the weighted and the unweighted accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ser.data.labels import labels_vary
from ser.errors import ConfigError


def edit_distance(reference: Sequence[Any], hypothesis: Sequence[Any]) -> tuple[int, int, int]:
    """Count substitutions, deletions and insertions on a shortest way from `reference` to `hypothesis`.

    Of several shortest ways, the way with the fewest substitutions is taken, which has the most matches. Other
    programs may choose another way: only the sum is the same everywhere (Levenshtein, 1966).

    Args:
        reference: words, characters or other hashable items, n of them.
        hypothesis: likewise, m of them.

    The time is n row operations of m numbers; the memory is m numbers.
    """
    n, m = len(reference), len(hypothesis)
    numbers: dict[Any, int] = {}
    r = [numbers.setdefault(item, len(numbers)) for item in reference]
    h = np.array([numbers.setdefault(item, len(numbers)) for item in hypothesis], dtype=np.int64)
    # The cost of a way is edits * unit + substitutions, so that the smallest has the fewest edits first. With
    # deletions - insertions = n - m that gives all three numbers from the last cell, without a way back.
    unit = n + m + 1
    inserted = np.arange(m + 1, dtype=np.int64) * unit
    row = inserted
    for item in r:
        # From the row above: straight down is a deletion, diagonally a match or a substitution ...
        best = row + unit
        np.minimum(best[1:], row[:-1] + np.where(h == item, 0, unit + 1), out=best[1:])
        # ... and along the row insertions: best[j] = min over i <= j of best[i] + (j - i) * unit.
        row = np.minimum.accumulate(best - inserted) + inserted
    edits, substitutions = divmod(int(row[-1]), unit)
    deletions = (edits - substitutions + n - m) // 2
    return substitutions, deletions, edits - substitutions - deletions


@dataclass(frozen=True)
class ErrorRateCounts:
    """Hold the edits between hypotheses and references, and the length of the references: WER or CER.

    Attributes:
        edits: substitutions + deletions + insertions.
        length: words (WER) or characters (CER) of the references.
    """

    edits: int = 0
    length: int = 0

    def __add__(self, other: ErrorRateCounts) -> ErrorRateCounts:
        """Count both parts together."""
        if not isinstance(other, ErrorRateCounts):
            return NotImplemented
        return ErrorRateCounts(self.edits + other.edits, self.length + other.length)

    @property
    def rate(self) -> float:
        """Edits / length: 0 is perfect, insertions can take it above 1; nan without references."""
        return self.edits / self.length if self.length else math.nan


def word_errors(reference: str, hypothesis: str) -> ErrorRateCounts:
    """Count the word errors of one utterance. Words are what whitespace separates; case counts."""
    words = reference.split()
    return ErrorRateCounts(sum(edit_distance(words, hypothesis.split())), len(words))


def character_errors(reference: str, hypothesis: str) -> ErrorRateCounts:
    """Count the character errors of one utterance. Spaces count, except at the ends."""
    characters = reference.strip()
    return ErrorRateCounts(sum(edit_distance(characters, hypothesis.strip())), len(characters))


def ratio(part: NDArray[Any], whole: NDArray[Any]) -> NDArray[np.float64]:
    """Divide ``part`` by ``whole``, with NaN where the whole is 0."""
    return np.divide(part, whole, out=np.full(np.broadcast(part, whole).shape, np.nan), where=whole > 0)


def class_figures(totals: NDArray[Any], num_classes: int) -> dict[str, NDArray[np.float64]]:
    """Return the figures of a head of classes: (..., 3, C) totals -> name -> (...), NaN without utterances.

    - accuracy: WA, the share of utterances that are right.
    - unweighted_accuracy: UA, the mean recall over the classes that occur in the reference.
    - macro_f1: the mean over all classes of F1 = 2 right / (in the reference + predicted). A class that neither
      occurs nor is predicted counts as 0, as in scikit-learn's ``f1_score(average="macro", labels=range(K),
      zero_division=0)``. So a part of a corpus that lacks a class scores lower for it: sum the counts of all folds
      first.

    Args:
        totals: as `ClassificationCounts` has them. Classes that neither occur nor are predicted may be left out.
        num_classes: how many classes the head has.
    """
    right, reference, predicted = np.moveaxis(totals, -2, 0)
    count = reference.sum(-1)
    recall = ratio(right, reference)
    f1 = np.nan_to_num(ratio(2 * right, reference + predicted)).sum(-1) / max(num_classes, 1)
    return {
        "accuracy": ratio(right.sum(-1), count),
        "unweighted_accuracy": ratio(np.nan_to_num(recall).sum(-1), np.isfinite(recall).sum(-1)),
        "macro_f1": np.where(count > 0, f1, np.nan),
    }


@dataclass(frozen=True, eq=False)
class ClassificationCounts:
    """What became of each class's utterances, and the figures that follow from it.

    There are three numbers for each class and none for each pair of classes, so thousands of classes need little
    memory.

    Attributes:
        totals: (3, K) int64: of each class, the utterances that are recognised rightly, those of the reference
            and those that were recognised as it. Read-only.
    """

    totals: NDArray[np.int64]

    def __post_init__(self) -> None:
        """Check the totals, and copy them, so that nobody changes the counts afterwards."""
        totals = np.asarray(self.totals)
        sound = totals.ndim == 2 and len(totals) == 3 and np.issubdtype(totals.dtype, np.integer)
        if not sound or (totals < 0).any() or (totals[0] > totals[1:]).any():
            raise ConfigError(
                "counts of classes are (3, K) integers from 0, of right ones no more than there are; found "
                f"{totals.dtype} {totals.shape}"
            )
        totals = totals.astype(np.int64, copy=True)
        totals.setflags(write=False)
        object.__setattr__(self, "totals", totals)

    @classmethod
    def zeros(cls, num_classes: int) -> ClassificationCounts:
        """Count no utterance: a sum begins here, and a rank without utterances adds this."""
        return cls(np.zeros((3, num_classes), dtype=np.int64))

    @classmethod
    def from_labels(cls, reference: ArrayLike, predicted: ArrayLike, *, num_classes: int) -> ClassificationCounts:
        """Count (B,) reference and (B,) predicted classes, integers in 0..K-1 (arrays or CPU tensors).

        Raises:
            ConfigError: different lengths, or a class out of range; utterances without a label are to be left
                out by the caller, who knows them.
        """
        pairs = [np.asarray(reference), np.asarray(predicted)]
        if pairs[0].shape != pairs[1].shape or pairs[0].ndim != 1:
            raise ConfigError(
                f"expected as many references as predictions, found {pairs[0].shape} and {pairs[1].shape}"
            )
        if pairs[0].size == 0:
            return cls.zeros(num_classes)
        for name, labels in zip(("reference", "predicted"), pairs, strict=True):
            wrong = labels[(labels < 0) | (labels >= num_classes) | (labels != labels.astype(np.int64))]
            if wrong.size:
                raise ConfigError(f"{name} class {wrong[0]} is not one of 0..{num_classes - 1}")
        true, recognised = (labels.astype(np.int64) for labels in pairs)
        counted = (true[true == recognised], true, recognised)
        return cls(np.stack([np.bincount(classes, minlength=num_classes) for classes in counted]))

    def __add__(self, other: ClassificationCounts) -> ClassificationCounts:
        """Count the utterances of both."""
        if not isinstance(other, ClassificationCounts):
            return NotImplemented
        if self.totals.shape != other.totals.shape:
            sizes = self.totals.shape[1], other.totals.shape[1]
            raise ConfigError(f"cannot add counts of {sizes[0]} and of {sizes[1]} classes")
        return ClassificationCounts(self.totals + other.totals)

    def __eq__(self, other: object) -> bool:
        """Compare the numbers."""
        if not isinstance(other, ClassificationCounts):
            return NotImplemented
        return np.array_equal(self.totals, other.totals)

    __hash__ = None  # type: ignore[assignment]

    @property
    def count(self) -> int:
        """The number of utterances."""
        return int(self.totals[1].sum())

    @property
    def figures(self) -> dict[str, float]:
        """`class_figures` of these counts: name -> value in 0..1, nan without utterances."""
        return {name: float(value) for name, value in class_figures(self.totals, self.totals.shape[1]).items()}


def weighted(known: Tensor, utterance_weights: Tensor | None) -> Tensor:
    """Return the weight of each label that is known, 0 for the others: known (B, K) bool -> (B, K) float64."""
    if utterance_weights is None:
        return known.double()
    return known * utterance_weights.to(known.device, torch.float64, non_blocking=True)[:, None]


def ccc_summands(predictions: Tensor, labels: Tensor, utterance_weights: Tensor | None = None) -> Tensor:
    """Return what each utterance adds to `ccc_moments`: (6, B, K)."""
    known = labels.isfinite()
    weights = weighted(known, utterance_weights)
    p, y = predictions.detach().double(), labels.double().masked_fill(~known, 0.0)
    return torch.stack([weights, weights * p, weights * y, weights * p * p, weights * y * y, weights * p * y])


def ccc_moments(predictions: Tensor, labels: Tensor, utterance_weights: Tensor | None = None) -> Tensor:
    """Return the sums that concordance needs: predictions p and labels y, both (B, K) -> (6, K) float64.

    These are n and the sums of p, y, p^2, y^2 and p y over the labelled utterances; an unknown label is NaN.
    ``utterance_weights`` (B,) are 0 for an utterance that only keeps a rank busy.
    """
    return ccc_summands(predictions, labels, utterance_weights).sum(1)


def concordance(moments: Tensor) -> Tensor:
    """Return the CCC of each dimension, from -1 to 1: `ccc_moments` (6, K) of all utterances -> (K,) float64.

        CCC = 2 cov(p, y) / (var p + var y + (mean p - mean y)^2)

    Variances are divided by n (Lin, Biometrics 1989, eq. 3). The CCC is NaN where fewer than two utterances have a
    label, or the labels do not vary.
    """
    n, p, y, pp, yy, py = moments
    varies = labels_vary(n, y, yy)
    p, y = p / n, y / n
    ccc = 2 * (py / n - p * y) / ((pp / n - p * p) + (yy / n - y * y) + (p - y).square())
    return ccc.masked_fill(~varies, torch.nan)

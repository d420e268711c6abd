"""Compute accuracy, F1, error rates and concordance from counts that can be summed.

A mean of means over unequal parts is wrong. So nothing is averaged before the end: batches, ranks and resamples
add the counts of utterances, and figures are computed from the sums. Validation during training and reports use
the same formulas: `class_figures`, `ratio` of edits and lengths, and `concordance`. WA and UA are the weighted and
the unweighted accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ser.data.labels import labels_vary


def edit_distance(reference: Sequence[Any], hypothesis: Sequence[Any]) -> tuple[int, int, int]:
    """Count substitutions, deletions and insertions in a shortest alignment of `reference` and `hypothesis`.

    Of several shortest alignments, the one with the fewest substitutions, and so the most matches, is taken. Other
    programs may choose another one: only the sum is always the same (Levenshtein, 1966).

    Args:
        reference: n words, characters or other hashable items.
        hypothesis: m such items.

    The time is that of n operations on rows of m numbers; the memory is m numbers.
    """
    n, m = len(reference), len(hypothesis)
    numbers: dict[Any, int] = {}
    r = [numbers.setdefault(item, len(numbers)) for item in reference]
    h = np.array([numbers.setdefault(item, len(numbers)) for item in hypothesis], dtype=np.int64)
    # The cost of an alignment is edits * unit + substitutions, so the fewest edits count first. Since deletions -
    # insertions = n - m, the last cell gives all three numbers, without tracing the alignment back.
    unit = n + m + 1
    inserted = np.arange(m + 1, dtype=np.int64) * unit
    row = inserted
    for item in r:
        # A step down from the row above is a deletion, a diagonal step is a match or a substitution, ...
        best = row + unit
        np.minimum(best[1:], row[:-1] + np.where(h == item, 0, unit + 1), out=best[1:])
        # ... and steps along the row are insertions: best[j] = min over i <= j of best[i] + (j - i) * unit.
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
        """Add the counts of two parts."""
        if not isinstance(other, ErrorRateCounts):
            return NotImplemented
        return ErrorRateCounts(self.edits + other.edits, self.length + other.length)

    @property
    def rate(self) -> float:
        """Return edits / length: 0 is perfect, insertions can make it larger than 1; nan without references."""
        return self.edits / self.length if self.length else math.nan


def word_errors(reference: str, hypothesis: str) -> ErrorRateCounts:
    """Count the word errors of one utterance. Words are separated by whitespace; case matters."""
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
    """Return the figures of a classification head: (..., 3, C) totals -> name -> (...), NaN without utterances.

    - accuracy: WA, the share of utterances that are recognised correctly.
    - unweighted_accuracy: UA, the mean recall over the classes that occur in the reference.
    - macro_f1: the mean over all classes of F1 = 2 correct / (in the reference + predicted). A class that neither
      occurs nor is predicted counts as 0, as in scikit-learn's ``f1_score(average="macro", labels=range(K),
      zero_division=0)``. So a part of a corpus that lacks a class gets a lower score: sum the counts of all folds
      first.

    Args:
        totals: those of `ClassificationCounts`. Classes that neither occur nor are predicted may be left out.
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
    """Hold the counts of each class, and compute figures from them.

    There are three numbers for each class, and no confusion matrix, so thousands of classes need little memory.

    Attributes:
        totals: (3, K) int64: for each class, the utterances that are recognised correctly, those that have it in
            the reference, and those that are recognised as it.
    """

    totals: NDArray[np.int64]

    @property
    def count(self) -> int:
        """Return the number of utterances."""
        return int(self.totals[1].sum())

    @property
    def figures(self) -> dict[str, float]:
        """Return `class_figures` of these counts: name -> value in 0..1, nan without utterances."""
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

    Variances are divided by n (Lin, Biometrics 1989, eq. 3). The CCC is NaN if fewer than two utterances have a
    label, or the labels do not vary.
    """
    n, p, y, pp, yy, py = moments
    varies = labels_vary(n, y, yy)
    p, y = p / n, y / n
    ccc = 2 * (py / n - p * y) / ((pp / n - p * p) + (yy / n - y * y) + (p - y).square())
    return ccc.masked_fill(~varies, torch.nan)

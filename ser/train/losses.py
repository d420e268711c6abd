"""The losses of the heads. Each returns ``(sum, count)``; the loop divides once.

The objective of an update is

    CE(emotion) + alpha * CTC(text) + beta * CE(speaker) + gamma * (1 - CCC(dimensions))

(Cai et al., 2021, eq. 4, and extensions), each of the first three terms its sum over the update's utterances on
all ranks divided by its own count there: utterances with a label (the sum of their class weights where classes
are weighted), utterances with a transcript that fits. So neither the split into micro-batches and ranks nor
an utterance that lacks a label changes the weight of another.

The concordance correlation coefficient is no sum over utterances. It follows from six sums (`ccc_moments`), which
a first pass without gradient adds up over the whole update; the gradient at each prediction follows from them
(`ccc_loss`).

With every label present and no options this is the mean over utterances of ``CE + alpha * CTC``, CTC being the
negative log-likelihood of the whole transcript, which is what the paper's setting of one utterance per
device computes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ser.data.dataset import NO_LABEL
from ser.errors import TextError
from ser.scores.counts import concordance, weighted


def at_least_float32(x: Tensor) -> Tensor:
    """Softmax over half-precision scores loses the small probabilities that CTC sums over."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def classification_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    class_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    utterance_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Summed cross entropy and what to divide it by.

    Args:
        logits: (B, K).
        labels: (B,) int64, `NO_LABEL` where unknown.
        class_weights: (K,) or None.
        label_smoothing: 0..1, as in `torch.nn.functional.cross_entropy`.
        utterance_weights: (B,), 0 for an utterance that only keeps a rank busy; None: all 1.

    Returns:
        sum (), and count (): labelled utterances, or the sum of their class weights. sum / count is what
        ``F.cross_entropy(..., reduction="mean")`` gives.
    """
    logits = at_least_float32(logits)
    known = (labels != NO_LABEL).to(logits.dtype)
    if utterance_weights is not None:
        known = known * utterance_weights.to(logits, non_blocking=True)
    losses = F.cross_entropy(
        logits,
        labels,
        weight=None if class_weights is None else class_weights.to(logits, non_blocking=True),
        reduction="none",
        label_smoothing=label_smoothing,
        ignore_index=NO_LABEL,
    )
    per_label = 1.0 if class_weights is None else class_weights.to(logits, non_blocking=True)[labels.clamp(min=0)]
    return (losses * known).sum(), (known * per_label).sum().detach()


def ctc_feasible(targets: Tensor, target_lengths: Tensor, num_frames: Tensor) -> Tensor:
    """(B,) bool: has a transcript, and it fits its frames. All arguments on the CPU.

    A transcript of L symbols with r equal neighbours needs L + r frames, since CTC must put a blank between
    equal symbols (Graves et al., 2006). targets (B, L), target_lengths (B,), num_frames (B,).
    """
    if targets.shape[1] == 0:
        return torch.zeros_like(target_lengths, dtype=torch.bool)
    inside = torch.arange(1, targets.shape[1]) < target_lengths[:, None]
    repeats = ((targets[:, 1:] == targets[:, :-1]) & inside).sum(1)
    return (target_lengths > 0) & (target_lengths + repeats <= num_frames)


def ctc_loss(
    logits: Tensor,
    num_frames: Tensor,
    targets: Tensor,
    target_lengths: Tensor,
    *,
    blank: int = 0,
    per_character: bool = False,
    utterance_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Summed CTC loss over the utterances whose transcript fits, and their number.

    Args:
        logits: (B, T, V) on any device.
        num_frames: (B,) valid frames, on the CPU.
        targets: (B, L) symbols, on the CPU, anything past each length.
        target_lengths: (B,), 0 where there is no transcript, on the CPU.
        blank: id of the blank symbol.
        per_character: divide each utterance's loss by its length. Not what the paper does: long and short
            transcripts then weigh alike.
        utterance_weights: (B,), 0 for an utterance that only keeps a rank busy; None: all 1.

    Returns:
        sum () of negative log-likelihoods (float32 or wider, outside autocast), count ().

    Raises:
        TextError: a target is the blank or outside the vocabulary, which would corrupt memory in the kernel.
    """
    vocab_size = logits.shape[-1]
    inside = torch.arange(targets.shape[1]) < target_lengths[:, None]
    bad = inside & ((targets < 0) | (targets >= vocab_size) | (targets == blank))
    if bool(bad.any()):
        row, column = (int(i) for i in bad.nonzero()[0])
        raise TextError(
            f"symbol {int(targets[row, column])} at position {column} of transcript {row} cannot be a CTC target: "
            f"symbols are 0..{vocab_size - 1} without the blank {blank}"
        )
    feasible = ctc_feasible(targets, target_lengths, num_frames)
    weights = (
        feasible.to(torch.float64) if utterance_weights is None else feasible * utterance_weights.cpu().double()
    )
    # Rows that do not count get an empty target, whose loss is finite, so that its product with 0 is 0.
    lengths = torch.where(weights > 0, target_lengths, 0)
    with torch.autocast(logits.device.type, enabled=False):
        log_probs = at_least_float32(logits).log_softmax(-1).transpose(0, 1)  # (T, B, V)
        kept = torch.where(inside & (weights > 0)[:, None], targets, 1 if blank == 0 else 0)
        losses = F.ctc_loss(
            log_probs,
            kept.to(logits.device, non_blocking=True),
            num_frames,
            lengths,
            blank=blank,
            reduction="none",
        )  # (B,)
        if per_character:
            losses = losses / lengths.clamp(min=1).to(losses)
        used = weights.to(losses, non_blocking=True)
        return (losses * used).sum(), used.sum().detach()


def ccc_loss(
    predictions: Tensor, labels: Tensor, moments: Tensor, utterance_weights: Tensor | None = None
) -> Tensor:
    """A scalar whose gradient is that of the mean over dimensions of 1 - CCC, CCC being that of ``moments``.

    A dimension whose CCC is undefined adds 0. With D the denominator in `concordance`,

        d CCC / d p_i = 2 / (n D) * ((y_i - mean y) - CCC * (p_i - mean y))

    which depends on the other utterances through the moments alone: so each micro-batch on each rank contributes
    its predictions, times these fixed coefficients. The scalar's value means nothing.

    Args:
        predictions: (B, K) of one micro-batch.
        labels: (B, K), NaN where unknown.
        moments: (6, K) of the whole update on all ranks, with these predictions in it.
        utterance_weights: (B,), as in `ccc_moments`.
    """
    ccc = concordance(moments)
    n, p, y, pp, yy, _ = moments
    p, y = p / n, y / n
    denominator = (pp / n - p * p) + (yy / n - y * y) + (p - y).square()
    known = labels.isfinite() & ccc.isfinite()
    weights = weighted(known, utterance_weights)
    wanted = labels.double().masked_fill(~known, 0.0) - y
    slope = 2 / (n * denominator) * (wanted - ccc * (predictions.detach().double() - y))  # (B, K)
    coefficients = -(weights * slope).masked_fill(~known, 0.0) / labels.shape[1]
    return (coefficients.to(predictions.dtype) * predictions).sum()

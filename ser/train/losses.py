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

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ser.data.dataset import NO_LABEL, Batch
from ser.errors import ConfigError, TextError
from ser.models.multitask import HEADS, MultiTaskModel, Outputs
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


def check_classes(model: MultiTaskModel, batch: Batch) -> None:
    """Refuse a label that is no class (ConfigError): a kernel would end the process, far from here."""
    heads = model.heads_config
    for kind, labels, classes in (
        ("emotion", batch.emotions, heads.num_emotions),
        ("speaker", batch.speakers, heads.num_speakers),
    ):
        wrong = (labels != NO_LABEL) & ((labels < 0) | (labels >= classes))
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0, 0])
            index = batch.indices[row] if batch.indices else row
            raise ConfigError(
                f"utterance {index} has {kind} {int(labels[row])}; the model's {classes} are 0 to {classes - 1}, "
                f"{NO_LABEL} is unknown"
            )


@dataclass(frozen=True)
class Objective:
    """What is minimised: the sum of each task's loss divided by its count, by these weights.

    The loss of dimensions is no such sum; see `run_update`.
    """

    weights: dict[str, float]  # by head; 0: not trained
    label_smoothing: float = 0.0
    class_weights: Tensor | None = None  # (K,) of the emotion loss
    ctc_per_character: bool = False
    blank: int = 0

    def sums(self, outputs: Outputs, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """(sum, count) of each task but dimensions that has a weight above 0, in one micro-batch."""
        found = {}
        if outputs.emotion is not None and self.weights.get("emotion"):
            found["emotion"] = classification_loss(
                outputs.emotion,
                batch.emotions,
                class_weights=None
                if self.class_weights is None
                else self.class_weights.to(outputs.emotion.device, non_blocking=True),
                label_smoothing=self.label_smoothing,
                utterance_weights=batch.weights,
            )
        if outputs.ctc is not None and self.weights.get("ctc"):
            found["ctc"] = ctc_loss(
                outputs.ctc,
                outputs.num_frames,
                batch.targets,
                batch.target_lengths,
                blank=self.blank,
                per_character=self.ctc_per_character,
                utterance_weights=batch.weights,
            )
        if outputs.speaker is not None and self.weights.get("speaker"):
            found["speaker"] = classification_loss(
                outputs.speaker, batch.speakers, utterance_weights=batch.weights
            )
        return found

    def counts(self, model: MultiTaskModel, batches: Sequence[Batch]) -> Tensor:
        """What `sums` will return as counts, added up over micro-batches, from labels alone: (4,) float64.

        Of dimensions: the labels.
        """
        total = torch.zeros(len(HEADS), dtype=torch.float64)
        for batch in batches:
            check_classes(model, batch)
            known = (batch.emotions != NO_LABEL).double().cpu()
            if self.class_weights is not None:
                known = known * self.class_weights.double()[batch.emotions.clamp(min=0).cpu()]
            frames = model.config.num_frames(batch.num_samples)
            fits = ctc_feasible(batch.targets, batch.target_lengths, frames).double()
            speaks = (batch.speakers != NO_LABEL).double().cpu()
            rated = batch.dimensions.isfinite().double().sum(1).cpu()
            total += (torch.stack([known, fits, speaks, rated]) * batch.weights.double()).sum(1)
        return total

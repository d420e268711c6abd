"""Compute the losses of the heads. Each loss returns ``(sum, count)``; the loop divides once.

The objective of an update is

    CE(emotion) + alpha * CTC(text) + beta * CE(speaker) + gamma * (1 - CCC(dimensions))

This extends eq. 4 of Cai et al. (2021). Each of the first three terms is a sum over the utterances of the update,
on all ranks, divided by a count. The count is the number of utterances with a label, or with a transcript that
fits its frames. (With class weights it is the sum of the weights of the labels.) So neither the split into
micro-batches and ranks nor an utterance without a label changes the weight of the others.

The concordance correlation coefficient (CCC) is not a sum over utterances. It is computed from six sums
(`ccc_moments`), which a first pass without gradient adds up over the whole update. The gradient with respect to
each prediction is computed from the same sums (`ccc_loss`).

With all labels and the default options, emotion and text give the mean over utterances of ``CE + alpha * CTC``,
where CTC is the negative log-likelihood of the whole transcript. The paper, with one utterance per device,
computes the same.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ser.data.dataset import Batch
from ser.data.labels import LABELS, NO_LABEL
from ser.errors import ConfigError, TextError
from ser.models.heads import HEADS
from ser.models.multitask import MultiTaskModel, Outputs
from ser.scores.counts import concordance, weighted


def at_least_float32(x: Tensor) -> Tensor:
    """Convert half-precision scores to float32: in half precision CTC would lose small probabilities."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def classification_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    class_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    focal: float = 0.0,
    adjustment: Tensor | None = None,
    utterance_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the sum of the cross entropy, and the count to divide it by.

    Args:
        logits: (B, K).
        labels: (B,) int64, `NO_LABEL` where unknown.
        class_weights: (K,) or None.
        label_smoothing: 0..1, as in `torch.nn.functional.cross_entropy`.
        focal: gamma of Lin et al., Focal loss for dense object detection, ICCV 2017, eq. 4: the loss of an
            utterance is multiplied by (1 - p) ** gamma, p being the probability of its class. 0 changes nothing.
        adjustment: (K,) is added to the scores; tau * log of the classes' shares gives the logit-adjusted loss of
            Menon et al., Long-tail learning via logit adjustment, ICLR 2021, eq. 10. None changes nothing.
        utterance_weights: (B,), 0 for an utterance that only keeps a rank busy; None: all 1.

    Returns:
        sum () and count (): the number of labelled utterances, or the sum of their class weights. sum / count
        equals ``F.cross_entropy(..., reduction="mean")``.
    """
    logits = at_least_float32(logits)
    if adjustment is not None:
        logits = logits + adjustment.to(logits, non_blocking=True)
    known = (labels != NO_LABEL).to(logits.dtype)
    if utterance_weights is not None:
        known = known * utterance_weights.to(logits, non_blocking=True)
    weights = None if class_weights is None else class_weights.to(logits, non_blocking=True)
    losses = F.cross_entropy(
        logits, labels, weights, ignore_index=NO_LABEL, reduction="none", label_smoothing=label_smoothing
    )
    if focal:
        p = logits.softmax(-1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
        losses = losses * (1 - p).clamp(min=0) ** focal  # which has no slope where p is 1, in place of NaN
    per_label = 1.0 if weights is None else weights[labels.clamp(min=0)]
    return (losses * known).sum(), (known * per_label).sum().detach()


def ctc_feasible(targets: Tensor, target_lengths: Tensor, num_frames: Tensor) -> Tensor:
    """Tell which utterances (B,) have a transcript that fits its frames. All arguments are on the CPU.

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
    """Compute the summed CTC loss over the utterances whose transcript fits, and their number.

    Args:
        logits: (B, T, V) on any device.
        num_frames: (B,) valid frames, on the CPU.
        targets: (B, L) symbols, on the CPU; what stands past each length is ignored.
        target_lengths: (B,), 0 where there is no transcript, on the CPU.
        blank: id of the blank symbol.
        per_character: divide each utterance's loss by its length, so that long and short transcripts weigh
            alike. The paper does not do this.
        utterance_weights: (B,), 0 for an utterance that only keeps a rank busy; None: all 1.

    Returns:
        sum () of negative log-likelihoods (float32 or wider, outside autocast), count ().

    Raises:
        TextError: a target is the blank or outside the vocabulary; torch's kernel would corrupt memory.
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
    weights = feasible.double() if utterance_weights is None else feasible * utterance_weights.cpu().double()
    # Rows of weight 0 get an empty target: its loss is finite, so loss times weight is 0 and not NaN.
    lengths = torch.where(weights > 0, target_lengths, 0)
    with torch.autocast(logits.device.type, enabled=False):
        log_probs = at_least_float32(logits).log_softmax(-1).transpose(0, 1)  # (T, B, V)
        kept = torch.where(inside & (weights > 0)[:, None], targets, 1 if blank == 0 else 0)
        kept = kept.to(logits.device, non_blocking=True)
        losses = F.ctc_loss(log_probs, kept, num_frames, lengths, blank, reduction="none")  # (B,)
        if per_character:
            losses = losses / lengths.clamp(min=1).to(losses)
        used = weights.to(losses, non_blocking=True)
        return (losses * used).sum(), used.sum().detach()


def ccc_loss(
    predictions: Tensor, labels: Tensor, moments: Tensor, utterance_weights: Tensor | None = None
) -> Tensor:
    """Return a scalar whose gradient is that of the mean over dimensions of 1 - CCC. Its value means nothing.

    A dimension whose CCC is undefined adds 0. With D the denominator in `concordance`,

        d CCC / d p_i = 2 / (n D) * ((y_i - mean y) - CCC * (p_i - mean y))

    The other utterances enter this derivative only through the moments. So the scalar of a micro-batch is the sum
    of its predictions times these derivatives, which are held constant.

    Args:
        predictions: (B, K) of one micro-batch.
        labels: (B, K), NaN where unknown.
        moments: (6, K) of the whole update on all ranks, these predictions included.
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
    """Refuse a label that is not a class (ConfigError); on a GPU it would abort the process later, unexplained."""
    sizes = model.heads_config.sizes
    for head, labels in batch.labels.items():
        if LABELS[head].kind != "class":
            continue
        wrong = (labels != NO_LABEL) & ((labels < 0) | (labels >= sizes[head]))
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0, 0])
            index = batch.indices[row] if batch.indices else row
            raise ConfigError(
                f"utterance {index} has {head} {int(labels[row])}; the model's {sizes[head]} are 0 to "
                f"{sizes[head] - 1}, {NO_LABEL} is unknown"
            )


@dataclass(frozen=True)
class Objective:
    """Hold the objective: the weighted sum over heads of each head's loss, divided by its count.

    The loss of dimensions has no such form; see `ser.train.update.run_update`.
    """

    weights: dict[str, float]  # by head; 0: not trained
    label_smoothing: float = 0.0
    class_weights: Tensor | None = None  # (K,) of the emotion loss
    focal: float = 0.0  # this and the next one: of the emotion loss, see `classification_loss`
    adjustment: Tensor | None = None  # (K,)
    ctc_per_character: bool = False
    blank: int = 0

    def sums(self, outputs: Outputs, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """Return (sum, count) of a micro-batch for each head whose loss is a sum and has a weight above 0."""
        options: dict[str, Any] = {"weights": batch.weights, "num_frames": outputs.num_frames, "objective": self}
        return {
            head: loss.sums(outputs.scores[head], batch.labels[head], **options)
            for head, loss in LOSSES.items()
            if head in outputs.scores and self.weights.get(head) and loss.sums is not None
        }

    def counts(self, model: MultiTaskModel, batches: Sequence[Batch]) -> Tensor:
        """Return the counts of `sums`, added up over micro-batches; they need labels and lengths only.

        The result is (len(HEADS),) float64, in the order of `HEADS`. For dimensions it is the number of labels.
        """
        total = torch.zeros(len(HEADS), dtype=torch.float64)
        for batch in batches:
            check_classes(model, batch)
            frames = model.config.num_frames(batch.num_samples)
            nothing = torch.zeros(len(frames), dtype=torch.float64)
            each = [
                LOSSES[head].counts(batch.labels[head].cpu(), frames, self) if head in batch.labels else nothing
                for head in HEADS
            ]  # (B,) of each head
            total += (torch.stack(each) * batch.weights.double()).sum(1)
        return total


def emotion_loss(scores: Tensor, labels: Tensor, *, weights: Tensor, num_frames: Tensor, objective: Objective):
    """Return `classification_loss` with the options of the objective."""
    options: dict[str, Any] = {"label_smoothing": objective.label_smoothing, "focal": objective.focal}
    options |= {"class_weights": objective.class_weights, "adjustment": objective.adjustment}
    return classification_loss(scores, labels, utterance_weights=weights, **options)


def class_loss(scores: Tensor, labels: Tensor, *, weights: Tensor, num_frames: Tensor, objective: Objective):
    """Return `classification_loss` without options."""
    return classification_loss(scores, labels, utterance_weights=weights)


def transcript_loss(scores: Tensor, labels: Tensor, *, weights: Tensor, num_frames: Tensor, objective: Objective):
    """Return `ctc_loss` of symbols (B, L)."""
    options: dict[str, Any] = {"blank": objective.blank, "per_character": objective.ctc_per_character}
    lengths = (labels != NO_LABEL).sum(1)
    return ctc_loss(scores, num_frames, labels, lengths, utterance_weights=weights, **options)


def count_emotions(labels: Tensor, num_frames: Tensor, objective: Objective) -> Tensor:
    """Return 1 for each known class, or the weight of the class where classes are weighted, (B,)."""
    known = (labels != NO_LABEL).double()
    if objective.class_weights is None:
        return known
    return known * objective.class_weights.double()[labels.clamp(min=0)]


def count_transcripts(labels: Tensor, num_frames: Tensor, objective: Objective) -> Tensor:
    """Return 1 for each transcript that fits its audio, (B,)."""
    return ctc_feasible(labels, (labels != NO_LABEL).sum(1), num_frames).double()


def count_labels(labels: Tensor, num_frames: Tensor, objective: Objective) -> Tensor:
    """Return the number of known labels of each utterance, (B,): at most 1 for a class, K for dimensions."""
    return labels.isfinite().double().sum(1) if labels.is_floating_point() else (labels != NO_LABEL).double()


@dataclass(frozen=True)
class Loss:
    """Describe how a head learns.

    Attributes:
        sums: the loss, called as ``sums(scores, labels, weights=, num_frames=, objective=)``. It returns the sum
            over a micro-batch, and the count to divide it by. scores are the output of the head, (B, K) or
            (B, T, V); labels are `Batch.labels` of the head; weights (B,) are 0 for an utterance that only keeps a
            rank busy; num_frames (B,) are the valid frames, on the CPU; objective has the options of the losses.
            None: the concordance loss, which needs the whole update; see `ser.train.update.run_update`.
        counts: (labels, num_frames, objective) -> (B,) float64, what each utterance adds to the count of
            ``sums``. It is called before the forward pass, so the count of the whole update is known first.
        weight: the weight of the loss, or the name of the field of `TrainConfig` that holds the weight.
    """

    sums: Callable[..., tuple[Tensor, Tensor]] | None
    counts: Callable[[Tensor, Tensor, Objective], Tensor] = count_labels
    weight: float | str = 1.0


# head -> how it learns
LOSSES = {
    "emotion": Loss(emotion_loss, count_emotions),
    "ctc": Loss(transcript_loss, count_transcripts, weight="alpha"),
    "speaker": Loss(class_loss, weight="beta"),
    "dimensions": Loss(None, weight="gamma"),
}

"""One update: the losses of its micro-batches on all ranks, and one step of the optimizer.

Every loss is a sum that is divided by the count of the whole update on all ranks, known before the first backward
pass, so the gradient is the same however the update is cut into micro-batches and ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ser.data.dataset import Batch
from ser.models.heads import HEADS
from ser.models.masking import spec_augment
from ser.models.multitask import MultiTaskModel, Outputs
from ser.scores.counts import ccc_moments, concordance
from ser.train.distributed import World
from ser.train.losses import Objective, at_least_float32, ccc_loss
from ser.train.resources import SMALLER_MODEL, memory_explained

SMALLER_UPDATES = (
    "Try --micro-batch 1 (the effective batch stays), --max-seconds to drop the longest training utterances, "
    "--activation-checkpointing, --amp bf16; a run that has a checkpoint continues from it"
)


@dataclass
class UpdateResult:
    """What one update did; the loss sums stay on the device until they are shown."""

    losses: dict[str, Tensor]  # sum over this rank's utterances, divided by the count of the whole update
    grad_norm: float
    skipped: bool = False  # the gradient was not finite on some rank, so no rank made the step
    overflow: bool = False  # and all losses were finite: float16 overflowed, and the scale was halved
    stop: bool = False  # some rank was asked to stop


def step_of_optimizer(
    optimizer: torch.optim.Optimizer,
    trained: Sequence[nn.Parameter],
    losses: dict[str, Tensor],
    world: World,
    scaler: torch.amp.GradScaler,
    *,
    clip: float,
    stop: bool,
) -> UpdateResult:
    """Clip the gradient and make the step, on all ranks or none."""
    scaler.unscale_(optimizer)
    # The norm is the same on every rank, so all skip the same updates. Reading it is the one wait per update.
    norm = float(torch.nn.utils.clip_grad_norm_(trained, clip or math.inf))
    skipped, overflow = not math.isfinite(norm), False
    if skipped:  # rare and known to all ranks, so a further exchange costs nothing
        broken = not all(bool(loss.isfinite()) for loss in losses.values())
        overflow = scaler.is_enabled() and not world.sum(torch.tensor(float(broken)))
    if skipped and not overflow:
        scaler.update(scaler.get_scale())  # as it was: the scale is not to blame
    else:  # after an overflow the scaler leaves the step out by itself, and halves its scale
        scaler.step(optimizer)
        scaler.update()
    return UpdateResult(losses, norm, skipped, overflow, stop=stop)


def draw_masks(model: MultiTaskModel, batch: Batch, *, seed: int, epoch: int) -> dict[str, Tensor | None]:
    """SpecAugment masks of a batch on its device; none for a frozen encoder."""
    if not model.wav2vec2.training:
        return {"mask_time": None, "mask_feature": None}
    frames = model.config.num_frames(batch.num_samples)
    time, feature = spec_augment(model.config, frames, batch.indices, seed=seed, epoch=epoch)
    device = batch.waveforms.device
    return {
        "mask_time": None if time is None else time.to(device, non_blocking=True),
        "mask_feature": None if feature is None else feature.to(device, non_blocking=True),
    }


def mix(*numbers: int) -> int:
    """A well-spread seed from several small numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def run_update(
    wrapped: nn.Module,
    model: MultiTaskModel,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    objective: Objective,
    world: World,
    *,
    scaler: torch.amp.GradScaler,
    amp: str = "off",
    clip: float = 0.0,
    seed: int = 0,
    epoch: int = 0,
    step: int = 0,
    names: Sequence[str] = (),
    stop: bool = False,
) -> UpdateResult:
    """Forward and backward over this rank's micro-batches of one update, then one optimizer step.

    ``wrapped`` is ``model`` under DistributedDataParallel, or ``model``. The batches are on the CPU or the device.
    Where dimensions are trained, a first pass without gradient finds what their loss needs to know of the whole
    update. Out of memory is a ResourceError; ``names`` are those of the dataset's utterances, for its message.
    ``stop``: this rank was asked to; it travels with the counts, so all ranks learn of it in one update.
    """
    optimizer.zero_grad(set_to_none=True)
    asked = torch.tensor([float(stop)], dtype=torch.float64)
    *counts, asked_to_stop = world.sum(torch.cat([objective.counts(model, batches), asked])).tolist()
    count_of = dict(zip(HEADS, counts, strict=True))
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp)

    def forward(network: nn.Module, number: int, batch: Batch) -> Outputs:
        masks = draw_masks(model, batch, seed=seed, epoch=epoch)
        # Dropout and LayerDrop: a function of where we are, not of what was drawn before.
        torch.manual_seed(mix(seed, step, number, world.rank))
        with torch.autocast(world.device.type, dtype=dtype) if dtype else nullcontext():
            return network(**batch.inputs, **masks)

    losses: dict[str, Tensor] = {}
    moments = torch.zeros(6, model.heads_config.num_dimensions, dtype=torch.float64, device=world.device)
    if objective.weights.get("dimensions") and count_of["dimensions"]:
        with torch.no_grad():
            for number, batch in enumerate(batches):
                with memory_explained(SMALLER_UPDATES, batch, names):
                    batch = batch.to(world.device)
                    predictions = forward(model, number, batch).dimensions
                    assert predictions is not None
                    moments += ccc_moments(predictions, batch.labels["dimensions"], batch.weights)
        moments = world.sum(moments.cpu())
        ccc = concordance(moments)
        if bool(ccc.isnan().all()):  # too few labels, or equal ones: they give no gradient
            count_of["dimensions"] = 0.0
        # Of the whole update: each rank's share of it, for what is shown is summed over ranks.
        losses["dimensions"] = (1 - ccc).nan_to_num().mean() / world.size
        moments = moments.to(world.device)
    for number, batch in enumerate(batches):
        last = number == len(batches) - 1
        with world.no_sync(wrapped, last=last), memory_explained(SMALLER_UPDATES, batch, names):
            batch = batch.to(world.device)
            outputs = forward(wrapped, number, batch)
            loss = torch.zeros((), device=world.device)
            for name, (total, _) in objective.sums(outputs, batch).items():
                share = total / max(count_of[name], 1e-12)
                losses[name] = losses[name] + share.detach() if name in losses else share.detach()
                loss = loss + objective.weights[name] * share
            if outputs.dimensions is not None and objective.weights.get("dimensions"):
                rated = ccc_loss(
                    at_least_float32(outputs.dimensions), batch.labels["dimensions"], moments, batch.weights
                )
                loss = loss + objective.weights["dimensions"] * rated
            # DistributedDataParallel averages over ranks; the counts are already those of all ranks.
            scaler.scale(loss * world.size).backward()
    for parameter in model.untrained_by([n for n, weight in objective.weights.items() if weight and count_of[n]]):
        parameter.grad = None  # a zero gradient is not no gradient to AdamW
    trained = [p for p in model.parameters() if p.grad is not None]
    if not trained:  # no label of any task in the whole update
        return UpdateResult(losses, 0.0, stop=asked_to_stop > 0)
    size = 8e-9 * sum(p.numel() for p in trained)
    doing = f"in the optimizer's step: beside the weights and gradients it keeps {size:.2f} GB in its first one"
    with memory_explained(SMALLER_MODEL, doing=doing):
        return step_of_optimizer(optimizer, trained, losses, world, scaler, clip=clip, stop=asked_to_stop > 0)

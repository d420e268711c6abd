"""Compute one update: the losses of its micro-batches on all ranks, and one step of the optimizer.

Every loss is a sum that is divided by the count of the whole update on all ranks. This count is known before the
first backward pass, so the gradient does not depend on how micro-batches and ranks share the update.
"""

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
from ser.train.checkpoint import Progress
from ser.train.distributed import World
from ser.train.losses import Objective, at_least_float32, ccc_loss
from ser.train.resources import SMALLER_MODEL, memory_explained

SMALLER_UPDATES = (
    "Try --micro-seconds 1 (the effective batch stays), --max-seconds to drop the longest training utterances, "
    "--activation-checkpointing, --amp bf16; a run that has a checkpoint continues from it"
)
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Learner:
    """Hold what an update changes, and what it needs for that, on one rank."""

    model: MultiTaskModel
    wrapped: nn.Module  # the model under DistributedDataParallel; with one process the model itself
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    objective: Objective
    world: World
    amp: str = "off"  # a key of AUTOCAST turns mixed precision on
    clip: float = 0.0  # the largest norm of the gradient; 0: no limit
    seed: int = 0
    names: Sequence[str] = ()  # ids of the dataset's utterances, for messages


@dataclass
class UpdateResult:
    """Describe what one update did; the losses stay on the device until they are shown."""

    losses: dict[str, Tensor]  # sum over this rank's utterances, divided by the count of the whole update
    grad_norm: float
    skipped: bool = False  # the gradient was not finite on some rank, so no rank made the step
    overflow: bool = False  # skipped with finite losses: float16 overflowed, and the scale was halved
    stop: bool = False  # some rank was asked to stop


def draw_masks(model: MultiTaskModel, batch: Batch, *, seed: int, epoch: int) -> dict[str, Tensor | None]:
    """Draw the SpecAugment masks of a batch, on its device; a frozen encoder gets none."""
    if not model.wav2vec2.training:
        return {"mask_time": None, "mask_feature": None}
    frames = model.config.num_frames(batch.num_samples)
    time, feature = spec_augment(model.config, frames, batch.places, seed=seed, epoch=epoch)
    masks, device = {"mask_time": time, "mask_feature": feature}, batch.waveforms.device
    return {name: None if m is None else m.to(device, non_blocking=True) for name, m in masks.items()}


def mix(*numbers: int) -> int:
    """Make one well-spread seed of several small numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def forward(learner: Learner, network: nn.Module, batch: Batch, number: int, progress: Progress) -> Outputs:
    """Run micro-batch ``number`` of the update, which is on the device, through the network."""
    masks = draw_masks(learner.model, batch, seed=learner.seed, epoch=progress.epoch)
    # Dropout and LayerDrop depend on the position in the run, and not on what was drawn before.
    torch.manual_seed(mix(learner.seed, progress.step, number, learner.world.rank))
    dtype = AUTOCAST.get(learner.amp)
    with torch.autocast(learner.world.device.type, dtype=dtype) if dtype else nullcontext():
        return network(**batch.inputs, **masks)


def moments_of_dimensions(learner: Learner, batches: Sequence[Batch], progress: Progress) -> Tensor:
    """Return `ccc_moments` of the whole update on all ranks, on the CPU: (6, K), from a pass without gradient."""
    model, world = learner.model, learner.world
    moments = torch.zeros(6, model.heads_config.num_dimensions, dtype=torch.float64, device=world.device)
    with torch.no_grad():
        for number, batch in enumerate(batches):
            with memory_explained(SMALLER_UPDATES, batch, learner.names):
                batch = batch.to(world.device)
                predictions = forward(learner, model, batch, number, progress).dimensions
                assert predictions is not None
                moments += ccc_moments(predictions, batch.labels["dimensions"], batch.weights)
    return world.sum(moments.cpu())


def backward(
    learner: Learner, batch: Batch, outputs: Outputs, count_of: dict[str, float], moments: Tensor
) -> dict[str, Tensor]:
    """Add the gradient of one micro-batch; return its share of each loss except that of dimensions."""
    weights, world = learner.objective.weights, learner.world
    loss = torch.zeros((), device=world.device)
    shares = {}
    for name, (total, _) in learner.objective.sums(outputs, batch).items():
        share = total / max(count_of[name], 1e-12)
        shares[name] = share.detach()
        loss = loss + weights[name] * share
    if outputs.dimensions is not None and weights.get("dimensions"):
        rated = ccc_loss(at_least_float32(outputs.dimensions), batch.labels["dimensions"], moments, batch.weights)
        loss = loss + weights["dimensions"] * rated
    # DistributedDataParallel averages gradients over ranks. The counts are sums over ranks, so this is undone.
    learner.scaler.scale(loss * world.size).backward()
    return shares


def step_of_optimizer(learner: Learner, trained: Sequence[nn.Parameter], result: UpdateResult) -> UpdateResult:
    """Clip the gradient and make the step, on all ranks or on none; complete the result."""
    optimizer, scaler, world = learner.optimizer, learner.scaler, learner.world
    scaler.unscale_(optimizer)
    # The norm is the same on every rank, so all skip the same updates. Only here does the CPU wait for the GPU.
    result.grad_norm = float(torch.nn.utils.clip_grad_norm_(trained, learner.clip or math.inf))
    result.skipped = not math.isfinite(result.grad_norm)
    if result.skipped:  # this is rare and known to all ranks, so another exchange is cheap
        broken = not all(bool(loss.isfinite()) for loss in result.losses.values())
        result.overflow = scaler.is_enabled() and not world.sum(torch.tensor(float(broken)))
    if result.skipped and not result.overflow:
        scaler.update(scaler.get_scale())  # unchanged, since the scale is not the cause
    else:  # after an overflow the scaler itself leaves out the step and halves the scale
        scaler.step(optimizer)
        scaler.update()
    return result


def run_update(
    learner: Learner, batches: Sequence[Batch], progress: Progress, *, stop: bool = False
) -> UpdateResult:
    """Run forward and backward over this rank's micro-batches of one update, then make one optimizer step.

    Where dimensions are trained, a first pass without gradient computes the moments of the whole update, which
    their loss needs.

    Args:
        learner: the model, its optimizer, and the objective.
        batches: this rank's micro-batches, on the CPU or the device.
        progress: where the run stands; its step and epoch seed dropout and masks.
        stop: whether this rank was asked to stop. It is sent with the counts, so all ranks know it in the same
            update.

    Raises:
        ResourceError: memory ran out; the message names the utterances.
    """
    model, world, weights = learner.model, learner.world, learner.objective.weights
    learner.optimizer.zero_grad(set_to_none=True)
    asked = torch.tensor([float(stop)], dtype=torch.float64)
    *counts, asks = world.sum(torch.cat([learner.objective.counts(model, batches), asked])).tolist()
    count_of = dict(zip(HEADS, counts, strict=True))
    result = UpdateResult({}, 0.0, stop=asks > 0)
    moments = torch.zeros(6, model.heads_config.num_dimensions, dtype=torch.float64)
    if weights.get("dimensions") and count_of["dimensions"]:
        moments = moments_of_dimensions(learner, batches, progress)
        ccc = concordance(moments)
        if bool(ccc.isnan().all()):  # too few labels, or equal ones: they give no gradient
            count_of["dimensions"] = 0.0
        # This is the loss of the whole update. The log sums losses over ranks, so it is divided by their number.
        result.losses["dimensions"] = (1 - ccc).nan_to_num().mean() / world.size
    moments = moments.to(world.device)
    for number, batch in enumerate(batches):
        last = number == len(batches) - 1
        with world.no_sync(learner.wrapped, last=last), memory_explained(SMALLER_UPDATES, batch, learner.names):
            batch = batch.to(world.device)
            outputs = forward(learner, learner.wrapped, batch, number, progress)
            for name, share in backward(learner, batch, outputs, count_of, moments).items():
                result.losses[name] = result.losses[name] + share if name in result.losses else share
    for parameter in model.untrained_by([name for name, weight in weights.items() if weight and count_of[name]]):
        parameter.grad = None  # with a zero gradient, AdamW would still change the parameter
    trained = [p for p in model.parameters() if p.grad is not None]
    if not trained:  # the whole update has no label of any task
        return result
    size = 8e-9 * sum(p.numel() for p in trained)
    doing = f"in the optimizer's step: beside the weights and gradients it keeps {size:.2f} GB in its first one"
    with memory_explained(SMALLER_MODEL, doing=doing):
        return step_of_optimizer(learner, trained, result)

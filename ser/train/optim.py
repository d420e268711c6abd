"""Make the optimizer with its parameter groups, and the learning rate as a function of the step."""

import math
from collections.abc import Callable

import torch
from torch import nn

from ser.errors import ConfigError


def linear(step: int, total: int, warmup: float) -> float:
    """Let the rate rise linearly to its peak and fall linearly to 0, as the paper does (section 3.2).

    The first update has a rate above 0.
    """
    rising = round(warmup * total)
    if step < rising:
        return (step + 1) / rising
    return max(0.0, (total - step) / max(1, total - rising))


# Name of a schedule -> the learning rate at an update, as a share of its peak. ``step`` counts from 0 to
# ``total`` - 1; ``warmup`` is the rising share of ``total``. A schedule is a pure function, so a resumed run needs
# no scheduler state.
SCHEDULES: dict[str, Callable[[int, int, float], float]] = {"linear": linear}


def parameter_groups(
    model: nn.Module, *, rate: float, head_rate: float, weight_decay: float
) -> list[dict[str, object]]:
    """Divide the parameters for AdamW: encoder and heads have their own rates, and only matrices decay.

    Parameters with fewer than two dimensions larger than 1 (biases, norms, the mask embedding) do not decay: they
    are scales and offsets, which need not be small.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            in_encoder = name.startswith("wav2vec2.")
            decays = sum(size > 1 for size in parameter.shape) >= 2
            groups.setdefault((in_encoder, decays), []).append(parameter)
    return [
        {
            "params": parameters,
            "peak": rate if in_encoder else head_rate or rate,
            "lr": 0.0,
            "weight_decay": weight_decay if decays else 0.0,
        }
        for (in_encoder, decays), parameters in groups.items()
    ]


def make_optimizer(
    model: nn.Module, *, rate: float, head_rate: float, weight_decay: float, beta2: float
) -> torch.optim.AdamW:
    """Make an AdamW over `parameter_groups`."""
    groups = parameter_groups(model, rate=rate, head_rate=head_rate, weight_decay=weight_decay)
    device = next(model.parameters()).device
    return torch.optim.AdamW(groups, betas=(0.9, beta2), eps=1e-8, fused=device.type in ("cpu", "cuda"))


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set the rate of every group to ``factor`` times its peak; ConfigError unless the factor is at least 0."""
    if not 0 <= factor < math.inf:
        raise ConfigError(f"the schedule gave {factor}; expected a factor of the peak rate, from 0")
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor

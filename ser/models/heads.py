"""What stands on the encoder: pooling over valid frames, and the linear heads.

Shapes: B batch, T frames, D hidden size, K classes, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ser.errors import ConfigError

POOLINGS = {"mean": 1, "mean+std": 2}  # name -> how many times the hidden size it gives


def pool(hidden: Tensor, num_frames: Tensor, method: str) -> Tensor:
    """One vector per utterance from its valid frames: hidden (B, T, D), num_frames (B,) -> (B, D) or (B, 2D).

    "mean" is what the code of Cai et al. does (their text says sum; a sum grows with the length). "mean+std"
    appends the standard deviation over time, as in x-vectors (Snyder et al., 2018). In float32 or wider: a
    mean over a thousand frames loses digits in half precision.
    """
    if method not in POOLINGS:
        raise ConfigError(f"pooling is {method!r}; expected one of {', '.join(POOLINGS)}")
    hidden = hidden.float() if hidden.dtype in (torch.float16, torch.bfloat16) else hidden
    count = num_frames.to(hidden.device, non_blocking=True)[:, None]  # (B, 1)
    padding = (torch.arange(hidden.shape[1], device=hidden.device) >= count)[..., None]  # (B, T, 1)
    mean = hidden.masked_fill(padding, 0.0).sum(1) / count  # (B, D)
    if method == "mean":
        return mean
    centred = (hidden - mean[:, None]).masked_fill(padding, 0.0)
    # The floor keeps the gradient finite where a channel is constant, as in an utterance of one frame.
    std = (centred.square().sum(1) / count).clamp(min=1e-7).sqrt()
    return torch.cat([mean, std], dim=-1)


def new_linear(inputs: int, outputs: int, initializer_range: float) -> nn.Linear:
    """A head: normal(0, initializer_range) weights and zero bias."""
    layer = nn.Linear(inputs, outputs)
    nn.init.normal_(layer.weight, std=initializer_range)
    nn.init.zeros_(layer.bias)
    return layer

"""Dropout (Srivastava et al., 2014) whose masks are cheap on a CPU too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Of a mask's element: four are cut from a 64-bit word, where torch's CPU kernel draws a word for each and takes a
# tenth of a training step for it. The probability is a multiple of 2**-16 then: 0.1 becomes 0.100006.
LEVELS = 1 << 16


def dropout(x: Tensor, p: float, training: bool = True) -> Tensor:
    """x with each element zeroed with probability ``p`` and the others divided by 1 - p; x itself in evaluation.

    On a CPU ``p`` is rounded to a multiple of 2**-16, and what remains is scaled by just what was drawn for.
    """
    if not training or p <= 0:
        return x
    if x.device.type != "cpu" or p >= 1:
        return F.dropout(x, p)
    return CheapDropout.apply(x, round(p * LEVELS))


class CheapDropout(torch.autograd.Function):
    """`dropout` with ``dropped`` of 65,536 levels; a byte per element is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dropped: int) -> Tensor:  # noqa: D102
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64)
        words.random_(torch.iinfo(torch.int64).min, None)  # all 64 bits
        levels = words.view(torch.int16)[: x.numel()].view(x.shape)
        keep = levels >= dropped - LEVELS // 2
        ctx.save_for_backward(keep)
        ctx.scale = LEVELS / (LEVELS - dropped)
        return masked(x, keep, ctx.scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # noqa: D102
        (keep,) = ctx.saved_tensors
        return masked(grad, keep, ctx.scale), None


def masked(x: Tensor, keep: Tensor, scale: float) -> Tensor:
    """x * keep * scale; converting bytes to floats first is several times faster than mixing types."""
    return (keep.view(torch.uint8).to(x.dtype) * x).mul_(scale)


class Dropout(nn.Module):
    """`dropout` with probability ``p``, in training only."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Of any shape."""
        return dropout(x, self.p, self.training)

    def extra_repr(self) -> str:
        """As `nn.Dropout` has it."""
        return f"p={self.p}"

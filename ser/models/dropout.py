"""Dropout (Srivastava et al., 2014) whose masks are cheap on a CPU too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# So many neighbours in a mask are compared with thresholds of their own. No multiple of what a model is wide, so
# that this holds for the elements of a row or column too, which are added up.
PERIOD = 8 * 127
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by their size in bytes


def is_cheap(x: Tensor, p: float) -> bool:
    """Whether masks are drawn here: on a CPU, and for probabilities that a byte can hold."""
    return x.device.type == "cpu" and 0 < p < 0.99


def draw_mask(shape: torch.Size, p: float) -> Tensor:
    """Of ``shape``, int8: 0 with probability ``p``, else -1, which is all bits.

    Eight elements are cut from a 64-bit word, where torch's CPU kernel draws a word for each and takes a tenth of
    a training step for it. An element is dropped if its 7 bits are below a threshold of 128 p. That is no whole
    number, so thresholds are drawn too, one of its two neighbours: each element has the probability ``p``.
    """
    count = shape.numel()
    words = torch.empty(-(-count // PERIOD), PERIOD // 8, dtype=torch.int64)
    words.random_(torch.iinfo(torch.int64).min, None)  # all 64 bits
    thresholds = torch.rand(PERIOD).add_(128 * p).to(torch.int8)
    # In place and in bytes: -128 to -1, plus the threshold, of which the sign is spread to all bits.
    mask = words.view(torch.int8).bitwise_or_(-128).add_(thresholds).bitwise_right_shift_(7)
    return mask.flatten()[:count].view(shape)


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """x where the mask is -1, and 0 where it is 0: bits are several times faster than products on a CPU."""
    integer = INTEGERS[x.element_size()]
    return mask.to(integer).bitwise_and_(x.view(integer)).view(x.dtype)


class CheapDropout(torch.autograd.Function):
    """`dropout`; a byte per element is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, scale: float) -> Tensor:  # noqa: D102
        ctx.save_for_backward(mask)
        ctx.scale = scale
        return masked(x, mask).mul_(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # noqa: D102
        (mask,) = ctx.saved_tensors
        return masked(grad, mask).mul_(ctx.scale), None, None


def dropout(x: Tensor, p: float, training: bool = True) -> Tensor:
    """x with each element zeroed with probability ``p``, the others divided by 1 - p; x itself in evaluation."""
    if not training or p <= 0:
        return x
    if not is_cheap(x, p):
        return F.dropout(x, p)
    return CheapDropout.apply(x, draw_mask(x.shape, p), 1 / (1 - p))


def _gelu_dropout(x: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    y = F.gelu(x)
    return y if mask is None else masked(y, mask).mul_(scale)


class GeluDropoutLinear(torch.autograd.Function):
    """Compute `gelu_dropout_linear` without saving the product's input, which follows from x and the mask."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, x: Tensor, mask: Tensor | None, scale: float, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, mask, weight)  # so that activation checkpointing can free all of it
        ctx.scale = scale
        return F.linear(_gelu_dropout(x, mask, scale), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(  # noqa: D102
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, None, None, Tensor | None, Tensor | None]:
        x, mask, weight = ctx.saved_tensors
        for_x, _, _, for_weight, for_bias = ctx.needs_input_grad
        rows = grad.flatten(0, -2)  # (..., D) -> (N, D)
        grad_x = grad_weight = None
        if for_weight:
            grad_weight = rows.t().mm(_gelu_dropout(x, mask, ctx.scale).flatten(0, -2))
        if for_x:
            grad_x = rows.mm(weight).view(x.shape)
            if mask is not None:
                grad_x = masked(grad_x, mask).mul_(ctx.scale)
            grad_x = torch.ops.aten.gelu_backward(grad_x, x)
        return grad_x, None, None, grad_weight, rows.sum(0) if for_bias else None


def gelu_dropout_linear(x: Tensor, p: float, linear: nn.Linear) -> Tensor:
    """Compute ``linear(dropout(gelu(x), p))``; on a CPU, keep x and the mask, and not the product's input.

    The backward pass computes that input again: in a feed-forward layer it is four times as wide as the rest.
    """
    autocast = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else linear.weight.dtype
    on_cpu = is_cheap(x, p) or (x.device.type == "cpu" and p <= 0)
    if not (on_cpu and x.requires_grad and x.dtype == dtype and type(linear) is nn.Linear):
        return linear(dropout(F.gelu(x), p))
    mask = draw_mask(x.shape, p) if p > 0 else None
    bias = None if linear.bias is None else linear.bias.to(dtype)
    return GeluDropoutLinear.apply(x, mask, 1 / (1 - p), linear.weight.to(dtype), bias)


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

"""Strided convolutions over time as matrix products, and a first layer whose group norm costs nothing.

Activations stand as (B, T, C), channels last: a window of neighbouring frames is then a row of memory, norms over
channels and the transformer need no transposition, and each product runs at the machine's full rate.

Shapes: B batch, S samples or T frames in, N frames out, C channels in, O channels out, K kernel size, s stride.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv1d_weight, conv2d_input


def windows_of(x: Tensor, size: int, stride: int) -> Tensor:
    """x (B, S, 1) -> (B, N, K), a view of its windows."""
    return x[..., 0].unfold(1, size, stride)


class Kernel(NamedTuple):
    """A convolution's weights, laid out for its products."""

    matrix: Tensor  # (K * C, O); after a group norm is folded in (B, K, O), one for each utterance
    bias: Tensor | None  # (O,)
    size: int  # K
    stride: int
    mean: Tensor | None = None  # (B, 1, K), what the folded norm subtracts from windows

    @staticmethod
    def of(conv: nn.Conv1d) -> Kernel:
        """Those of a convolution that has no group norm."""
        matrix = conv.weight.permute(2, 1, 0).flatten(0, 1)
        return Kernel(matrix, conv.bias, conv.kernel_size[0], conv.stride[0])

    @staticmethod
    def normalised(conv: nn.Conv1d, norm: nn.GroupNorm, x: Tensor, lengths: Tensor) -> Kernel:
        """Those of a convolution of one channel with the group norm after it, one channel a group, folded in.

        A channel's mean over time is its kernel times the mean window, and its variance is the kernel on both
        sides of the windows' covariance. So the statistics come from the windows (K numbers a frame in place of O)
        and what is large is written once and not read again. They are those of valid frames, whatever else is in
        the batch, and are computed in float64. A bias of the convolution falls out with the mean.

        x (B, S, 1), of which lengths (B,) make the valid frames: N' of each utterance.
        """
        size, stride = conv.kernel_size[0], conv.stride[0]
        windows = windows_of(x, size, stride).double()  # (B, N, K)
        count = lengths.to(x.device, non_blocking=True)[:, None, None]
        padding = torch.arange(windows.shape[1], device=x.device)[:, None] >= count  # (B, N, 1)
        mean = windows.masked_fill(padding, 0.0).sum(1, keepdim=True) / count
        centred = (windows - mean).masked_fill(padding, 0.0)
        covariance = centred.transpose(1, 2) @ centred / count  # (B, K, K)
        weight = conv.weight.flatten(1)  # (O, K)
        variance = ((weight.double() @ covariance) * weight).sum(-1).clamp(min=0)  # (B, O)
        scale = torch.rsqrt(variance + norm.eps).to(weight.dtype) * norm.weight
        bias = norm.bias if conv.bias is None else norm.bias + conv.bias[:0].sum()  # in the graph, as `untouched`
        matrix = (weight * scale[..., None]).transpose(1, 2)  # (B, K, O)
        return Kernel(matrix, bias, size, stride, mean.to(x.dtype))

    def row(self, index: int) -> Kernel:
        """For the utterance ``index`` of the batch alone."""
        if self.mean is None:
            return self
        return self._replace(matrix=self.matrix[index, None], mean=self.mean[index, None])


class StridedConv(torch.autograd.Function):
    """The convolution as ceil(K / s) products, one for each s taps of the kernel.

    The frames that s taps see are s * C neighbouring numbers, and those of the next output frame the s * C after
    them: x itself, read as a matrix. No window is copied, neither here nor in the backward pass.
    """

    @staticmethod
    def parts(x: Tensor, count: int, size: int, stride: int) -> Iterator[tuple[slice, Tensor]]:
        """(rows of the matrix, x as (B, N, taps * C)) of each product: row n has the frames from n * s + first."""
        batch, frames, channels = x.shape
        for first in range(0, size, stride):
            taps, start = min(stride, size - first), x.storage_offset() + first * channels
            shape, strides = (batch, count, taps * channels), (frames * channels, stride * channels, 1)
            yield slice(first * channels, (first + taps) * channels), x.as_strided(shape, strides, start)

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Tensor, size: int, stride: int) -> Tensor:  # noqa: D102
        ctx.save_for_backward(x, matrix)
        ctx.size, ctx.stride = size, stride
        y = x.new_empty(len(x), (x.shape[1] - size) // stride + 1, matrix.shape[1])
        for rows, view in StridedConv.parts(x, y.shape[1], size, stride):
            y.baddbmm_(view, matrix[rows].expand(len(x), -1, -1), beta=int(rows.start > 0))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:  # noqa: D102
        (x, matrix), grad = ctx.saved_tensors, grad.contiguous()
        shape = (grad.shape[1], ctx.size, ctx.stride)
        grad_x = grad_matrix = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.zeros_like(x)
            for rows, view in StridedConv.parts(grad_x, *shape):
                view.baddbmm_(grad, matrix[rows].T.expand(len(x), -1, -1))
        if ctx.needs_input_grad[1]:
            grad_matrix = torch.empty_like(matrix)
            for rows, view in StridedConv.parts(x, *shape):
                torch.sum(torch.bmm(view.transpose(1, 2), grad), 0, out=grad_matrix[rows])
        return grad_x, grad_matrix, None, None


def strided_conv(x: Tensor, kernel: Kernel) -> Tensor:
    """`F.conv1d` without padding, x (B, T, C) -> (B, N, O) with N = (T - K) // s + 1."""
    matrix, bias, size, stride, mean = kernel
    if mean is not None and bias is not None:
        return torch.baddbmm(bias, windows_of(x, size, stride) - mean, matrix)
    if x.shape[-1] == 1:  # samples: their windows are so small that they may as well be copied
        return nn.functional.linear(windows_of(x, size, stride), matrix.T, bias)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, matrix = x.to(dtype), matrix.to(dtype)
    x = StridedConv.apply(x.contiguous(), matrix, size, stride)
    return x if bias is None else x + bias.to(x.dtype)


def row_image(x: Tensor) -> Tensor:
    """(B, T, C) -> (B, C, 1, T), a view with strides that oneDNN takes for channels last."""
    return x.contiguous()[:, None].permute(0, 3, 1, 2)


def row_kernel(weight: Tensor) -> Tensor:
    """(O, C / groups, K) -> (O, C / groups, 1, K), laid out so."""
    return weight[:, :, None].contiguous(memory_format=torch.channels_last)


class GroupedConv(torch.autograd.Function):
    """`grouped_conv` on a CPU: oneDNN's kernels for images of one row, channels last, take half the time.

    Not so for the gradient of the weights, which takes more than twice the time there: that one is `F.conv1d`'s.
    A row and not a column: of columns, oneDNN 3.12 leaves in bf16 what stood in memory (test_convolution.py).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, padding: int, groups: int) -> Tensor:  # noqa: D102
        ctx.save_for_backward(x, weight)
        ctx.padding, ctx.groups = padding, groups
        y = nn.functional.conv2d(row_image(x), row_kernel(weight), padding=(0, padding), groups=groups)
        return y.squeeze(2).transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:  # noqa: D102
        (x, weight), grad = ctx.saved_tensors, grad.contiguous()
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            options = {"padding": (0, ctx.padding), "groups": ctx.groups}
            image = conv2d_input(row_image(x).shape, row_kernel(weight), row_image(grad), **options)
            grad_x = image.squeeze(2).transpose(1, 2)
        if ctx.needs_input_grad[1]:
            options = {"padding": ctx.padding, "groups": ctx.groups}
            grad_weight = conv1d_weight(x.transpose(1, 2), weight.shape, grad.transpose(1, 2), **options)
        return grad_x, grad_weight, None, None


def grouped_conv(x: Tensor, conv: nn.Conv1d) -> Tensor:
    """A convolution of stride 1 in groups, such as that of positions: x (B, T, C) -> (B, N, O)."""
    if x.device.type != "cpu":
        return conv(x.transpose(1, 2)).transpose(1, 2)
    weight, bias = conv.weight, conv.bias
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        x, weight = x.to(dtype), weight.to(dtype)
    x = GroupedConv.apply(x, weight, int(conv.padding[0]), conv.groups)
    return x if bias is None else x + bias.to(x.dtype)

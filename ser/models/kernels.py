"""Compute operations of torch faster and in less memory on a CPU.

The model (`ser.models.wav2vec2`) calls `dropout`, `attention`, `conv1d`, `group_norm` and so on, which mean the
same as torch's functions of these names. Only `in_use` decides whether this file computes them in its own way. On
a GPU, and when a graph is recorded (``torch.export``, ``torch.compile``), each of them is torch's operation.

Activations are (B, T, C), channels last. A window of neighbouring frames is then one row of memory, norms over
channels and the transformer need no transposition, and matrix products run at full speed.

Shapes: B batch, S samples or T frames in, N frames out, C channels in, O channels out, K kernel size, s stride,
H attention heads, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.grad import conv1d_weight, conv2d_input
from torch.utils.checkpoint import checkpoint

from ser.models.config import Wav2Vec2Config, conv_length

# A dropout mask has this many thresholds, which repeat. The number is not a multiple of a model's width, so the
# elements of one row or column, which are added up, do not share a threshold.
PERIOD = 8 * 127
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # size in bytes -> type

# From this number of frames on (5 s), attention weights are computed again in the backward pass. Those of shorter
# utterances are small, compared with the other activations that a layer keeps.
LONG = 250

# How many outputs of the first convolution are computed at a time without gradient: 4 MiB, about a core's cache.
# At base size, twice or half of it takes 1 to 3 % more time, and all at once 7 %.
PIECE = 1 << 20


def in_use(x: Tensor) -> bool:
    """Tell whether the kernels of this file are used for ``x``: on a CPU, if no graph is recorded."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def recomputed(function: Callable, *inputs: Any, enabled: bool) -> Tensor:
    """Call ``function``; if ``enabled`` and a gradient is needed, call it again in the backward pass."""
    if enabled and torch.is_grad_enabled():
        return checkpoint(function, *inputs, use_reentrant=False)
    return function(*inputs)


def as_autocast(x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors, converted to autocast's type if it is enabled for the device of ``x``."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return tuple(each if dtype is None else each.to(dtype) for each in (x, *others))


# ---------------------------------------------------------------------------------------------- dropout


def draw_mask(shape: torch.Size, p: float) -> Tensor:
    """Draw a mask of ``shape``, int8: 0 with probability ``p``, else -1, in which all bits are set.

    One random 64-bit word gives eight elements. (torch's CPU kernel draws a word for each element, which takes a
    tenth of a training step.) An element is dropped if its 7 bits are below the threshold 128 p. Since 128 p is
    not a whole number, thresholds are rounded up or down at random, so that the probability is exactly ``p``.
    """
    count = shape.numel()
    words = torch.empty(-(-count // PERIOD), PERIOD // 8, dtype=torch.int64)
    words.random_(torch.iinfo(torch.int64).min, None)  # all 64 bits
    thresholds = torch.rand(PERIOD).add_(128 * p).to(torch.int8)
    # In place, per byte: take a number from -128 to -1, add the threshold, and copy the sign to all bits.
    mask = words.view(torch.int8).bitwise_or_(-128).add_(thresholds).bitwise_right_shift_(7)
    return mask.flatten()[:count].view(shape)


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """Return x where the mask is -1, else 0; on a CPU, bits are several times faster than a product."""
    integer = INTEGERS[x.element_size()]
    return mask.to(integer).bitwise_and_(x.view(integer)).view(x.dtype)


class ByteDropout(torch.autograd.Function):
    """Compute `dropout`, keeping one byte per element for the backward pass."""

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


def fits_a_byte(x: Tensor, p: float) -> bool:
    """Tell whether `draw_mask` can be used for dropout on ``x`` with probability ``p``."""
    return in_use(x) and 0 < p < 0.99


def dropout(x: Tensor, p: float, training: bool = True) -> Tensor:
    """Zero elements of x with probability ``p`` and divide the others by 1 - p; in evaluation, return x.

    See Srivastava et al., JMLR 2014.
    """
    if not training or p <= 0:
        return x
    if not fits_a_byte(x, p):
        return F.dropout(x, p)
    return ByteDropout.apply(x, draw_mask(x.shape, p), 1 / (1 - p))


class Dropout(nn.Dropout):
    """Apply `dropout` with probability ``p``, in training only."""

    def forward(self, input: Tensor) -> Tensor:
        """Drop elements of ``input``, of any shape."""
        return dropout(input, self.p, self.training)


# ---------------------------------------------------------------------------------------------- feed-forward


def gelu_dropped(x: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Compute ``dropout(gelu(x))`` with a given mask."""
    y = F.gelu(x)
    return y if mask is None else masked(y, mask).mul_(scale)


class GeluDropoutLinear(torch.autograd.Function):
    """Compute `gelu_dropout_linear` without saving the input of the linear layer, only x and the mask."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, x: Tensor, mask: Tensor | None, scale: float, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, mask, weight)  # so that activation checkpointing can free all of it
        ctx.scale = scale
        return F.linear(gelu_dropped(x, mask, scale), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        x, mask, weight = ctx.saved_tensors
        for_x, _, _, for_weight, for_bias = ctx.needs_input_grad
        rows = grad.flatten(0, -2)  # (..., D) -> (N, D)
        grad_x = grad_weight = None
        if for_weight:
            grad_weight = rows.t().mm(gelu_dropped(x, mask, ctx.scale).flatten(0, -2))
        if for_x:
            grad_x = rows.mm(weight).view(x.shape)
            if mask is not None:
                grad_x = masked(grad_x, mask).mul_(ctx.scale)
            grad_x = torch.ops.aten.gelu_backward(grad_x, x)
        return grad_x, None, None, grad_weight, rows.sum(0) if for_bias else None


def gelu_dropout_linear(x: Tensor, p: float, linear: nn.Linear) -> Tensor:
    """Compute ``linear(dropout(gelu(x), p))``; on a CPU, keep x and the mask, not the linear layer's input.

    The backward pass computes this input again, since it is four times as wide as other activations.
    """
    autocast = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else linear.weight.dtype
    served = fits_a_byte(x, p) or (in_use(x) and p <= 0)
    if not (served and x.requires_grad and x.dtype == dtype and type(linear) is nn.Linear):
        return linear(dropout(F.gelu(x), p))
    mask = draw_mask(x.shape, p) if p > 0 else None
    bias = None if linear.bias is None else linear.bias.to(dtype)
    return GeluDropoutLinear.apply(x, mask, 1 / (1 - p), linear.weight.to(dtype), bias)


# ---------------------------------------------------------------------------------------------- attention


def attention_weights(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """Return the attention weights (B, H, T, T) of q, already scaled, and k, both (B, H, T, D/H)."""
    scores = q @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill_(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1).to(q.dtype)


class AttentionWithDropout(torch.autograd.Function):
    """Compute `attention`; for long utterances the (T, T) weights are not kept but computed again.

    Their memory grows with the square of the length: in a layer of base, 2 MB for 5 s and 80 MB for 30 s, in bf16.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float) -> Tensor:  # noqa: D102
        ctx.p, ctx.random_state = p, torch.get_rng_state()
        q, v = q * q.shape[-1] ** -0.5, v * (1 / (1 - p))
        weights = attention_weights(q, k, mask)
        kept = draw_mask(weights.shape, p)
        ctx.save_for_backward(q, k, v, mask, *((weights, kept) if q.shape[2] < LONG else ()))
        return masked(weights, kept) @ v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None, None]:  # noqa: D102
        q, k, v, mask, *saved = ctx.saved_tensors
        if saved:
            weights, kept = saved
        else:
            weights = attention_weights(q, k, mask)
            with torch.random.fork_rng(devices=[]):
                torch.set_rng_state(ctx.random_state)
                kept = draw_mask(weights.shape, ctx.p)
        grad_v = (masked(weights, kept).transpose(-2, -1) @ grad).mul_(1 / (1 - ctx.p))
        of_weights = masked(grad @ v.transpose(-2, -1), kept)
        of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
        grad_q = (of_scores @ k).mul_(q.shape[-1] ** -0.5)
        grad_mask = of_scores.sum_to_size(mask.shape) if mask is not None and ctx.needs_input_grad[3] else None
        return grad_q, of_scores.transpose(-2, -1) @ q, grad_v, grad_mask, None


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float) -> Tensor:
    """Compute `F.scaled_dot_product_attention` with dropout ``p`` on the weights; q, k and v are (B, H, T, D/H).

    On a CPU it is written out in the two cases in which torch is slow: with dropout, which has no fused kernel,
    and in bf16, in which the fused kernel is no faster than in float32.
    """
    if not in_use(q) or (p <= 0 and q.dtype != torch.bfloat16):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)
    if fits_a_byte(q, p):
        return AttentionWithDropout.apply(q, k, v, mask, p)
    weights = attention_weights(q * q.shape[-1] ** -0.5, k, mask)
    return F.dropout(weights, p) @ v if p > 0 else weights @ v


# ---------------------------------------------------------------------------------------------- packing


def packed_lengths(hidden: Tensor, padding: Tensor | None) -> list[int] | None:
    """Return the lengths for `pack_frames` if padded utterances, hidden (B, T, D), should be packed, else None.

    On a GPU, packing would launch kernels for each utterance, with new shapes each time.
    """
    return (~padding).sum(1).tolist() if padding is not None and in_use(hidden) else None


def pack_frames(padded: Tensor, lengths: Sequence[int]) -> Tensor:
    """Join the valid frames of all utterances: (B, T, D) -> (1, sum of lengths, D)."""
    return torch.cat([row[:length] for row, length in zip(padded.unbind(), lengths, strict=True)])[None]


def unpack_frames(packed: Tensor, lengths: Sequence[int], size: int) -> Tensor:
    """Undo `pack_frames`: (1, sum of lengths, D) -> (B, size, D), with zeros after the end of an utterance."""
    rows = packed[0].split(lengths)
    return torch.stack([F.pad(row, (0, 0, 0, size - length)) for row, length in zip(rows, lengths, strict=True)])


# ---------------------------------------------------------------------------------------------- convolutions


def centred(x: Tensor, num_frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Subtract from x (B, T, C) its mean over the valid frames, num_frames (B,).

    Returns the difference, which is 0 where a frame is padding, the mean (B, 1, C) and the count of valid frames
    (B, 1, 1).
    """
    count = num_frames.to(x.device, non_blocking=True)[:, None, None]
    padding = torch.arange(x.shape[1], device=x.device)[:, None] >= count  # (B, T, 1)
    mean = x.masked_fill(padding, 0.0).sum(1, keepdim=True) / count
    return (x - mean).masked_fill(padding, 0.0), mean, count


def group_norm(x: Tensor, num_frames: Tensor, norm: nn.GroupNorm) -> Tensor:
    """Normalise each channel of x (B, T, O) by its statistics over the valid frames, num_frames (B,).

    `F.group_norm` with one channel per group does the same for a single utterance; in a batch it counts padding.
    """
    wide, _, count = centred(x.float() if x.dtype in (torch.float16, torch.bfloat16) else x, num_frames)
    variance = wide.square().sum(1, keepdim=True) / count  # (B, 1, O)
    return (wide * (torch.rsqrt(variance + norm.eps) * norm.weight) + norm.bias).to(x.dtype)


def windows_of(x: Tensor, size: int, stride: int) -> Tensor:
    """Return the windows of x (B, S, 1) as a view, (B, N, K)."""
    return x[..., 0].unfold(1, size, stride)


class Kernel(NamedTuple):
    """Hold the weights of a convolution, arranged for matrix products."""

    matrix: Tensor  # (K * C, O); with a folded group norm (B, K, O), one for each utterance
    bias: Tensor | None  # (O,)
    size: int  # K
    stride: int
    mean: Tensor | None = None  # (B, 1, K), which a folded norm subtracts from windows

    @staticmethod
    def of(conv: nn.Conv1d) -> Kernel:
        """Build the kernel of a convolution without group norm."""
        return Kernel(conv.weight.permute(2, 1, 0).flatten(0, 1), conv.bias, conv.kernel_size[0], conv.stride[0])

    @staticmethod
    def normalised(conv: nn.Conv1d, norm: nn.GroupNorm, x: Tensor, num_frames: Tensor) -> Kernel:
        """Build the kernel of a convolution of one channel, with the `group_norm` after it folded in.

        With w the kernel of a channel, m the mean window and C the covariance of windows, the channel has the mean
        w m and the variance w C w^T over time. So statistics are computed from the windows (K numbers per frame
        instead of O), and the large output is written once and not read again. Statistics are those of the valid
        frames, in float64. The convolution's bias cancels, since the norm subtracts the mean.

        x is (B, S, 1); of its windows, the first num_frames (B,) are valid.
        """
        size, stride = conv.kernel_size[0], conv.stride[0]
        windows, mean, count = centred(windows_of(x, size, stride).double(), num_frames)  # (B, N, K)
        covariance = windows.transpose(1, 2) @ windows / count  # (B, K, K)
        weight = conv.weight.flatten(1)  # (O, K)
        variance = ((weight.double() @ covariance) * weight).sum(-1).clamp(min=0)  # (B, O)
        scale = torch.rsqrt(variance + norm.eps).to(weight.dtype) * norm.weight
        bias = norm.bias if conv.bias is None else norm.bias + conv.bias[:0].sum()  # keeps conv.bias in the graph
        matrix = (weight * scale[..., None]).transpose(1, 2)  # (B, K, O)
        return Kernel(matrix, bias, size, stride, mean.to(x.dtype))

    def row(self, index: int) -> Kernel:
        """Return the kernel for a batch of only the utterance ``index``."""
        if self.mean is None:
            return self
        return self._replace(matrix=self.matrix[index, None], mean=self.mean[index, None])


class StridedConv(torch.autograd.Function):
    """Compute a convolution as ceil(K / s) matrix products, one for each group of s taps of the kernel.

    The inputs of s taps are s * C neighbouring numbers, and the next output frame has the s * C numbers after
    these. So x itself is read as a matrix, and no window is copied, neither here nor in the backward pass.
    """

    @staticmethod
    def parts(x: Tensor, count: int, size: int, stride: int) -> Iterator[tuple[slice, Tensor]]:
        """Yield (rows of the kernel's matrix, a view (B, N, taps * C) of x) for each product.

        Row n of the view begins with the frame n * s + first.
        """
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
    """Compute `F.conv1d` without padding by products: x (B, T, C) -> (B, N, O) with N = (T - K) // s + 1."""
    matrix, bias, size, stride, mean = kernel
    if mean is not None and bias is not None:
        return torch.baddbmm(bias, windows_of(x, size, stride) - mean, matrix)
    if x.shape[-1] == 1:  # windows of samples are so small that copying them is cheap
        return F.linear(windows_of(x, size, stride), matrix.T, bias)
    x, matrix = as_autocast(x, matrix)
    x = StridedConv.apply(x.contiguous(), matrix, size, stride)
    return x if bias is None else x + bias.to(x.dtype)


def row_image(x: Tensor) -> Tensor:
    """View (B, T, C) as (B, C, 1, T), with strides that oneDNN recognises as channels last."""
    return x.contiguous()[:, None].permute(0, 3, 1, 2)


def row_kernel(weight: Tensor) -> Tensor:
    """Rearrange (O, C / groups, K) as (O, C / groups, 1, K), channels last."""
    return weight[:, :, None].contiguous(memory_format=torch.channels_last)


class GroupedConv(torch.autograd.Function):
    """Compute a grouped convolution by oneDNN's kernels for images of one row, which take half the time.

    The gradient of the weights is that of `F.conv1d`, since for images it takes more than twice the time. The
    image is a row and not a column, because for columns in bf16 oneDNN 3.12 returns uninitialised memory
    (test_convolution.py).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, padding: int, groups: int) -> Tensor:  # noqa: D102
        ctx.save_for_backward(x, weight)
        ctx.padding, ctx.groups = padding, groups
        y = F.conv2d(row_image(x), row_kernel(weight), padding=(0, padding), groups=groups)
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


def conv1d(x: Tensor, conv: nn.Conv1d) -> Tensor:
    """Apply a convolution to (B, T, C) instead of (B, C, T): x (B, T, C) -> (B, N, O).

    There are kernels for the two kinds in the model: strided without padding, and grouped with stride 1.
    """
    if not in_use(x):
        return conv(x.transpose(1, 2)).transpose(1, 2)
    if conv.groups == 1 and not conv.padding[0]:
        return strided_conv(x, Kernel.of(conv))
    x, weight = as_autocast(x, conv.weight)
    x = GroupedConv.apply(x, weight, int(conv.padding[0]), conv.groups)
    return x if conv.bias is None else x + conv.bias.to(x.dtype)


# ---------------------------------------------------------------------------------------------- feature encoder


def conv_layer(x: Tensor, kernel: Kernel, norm: nn.Module) -> Tensor:
    """Compute a layer of the feature encoder, x (B, T, C) -> (B, N, O); the kernel includes a group norm."""
    x = strided_conv(x, kernel)
    return F.gelu(norm(x) if isinstance(norm, nn.LayerNorm) else x)


def in_pieces(
    config: Wav2Vec2Config, kernels: list[Kernel], norms: list[nn.Module], x: Tensor, num_frames: Tensor
) -> Tensor:
    """Compute the feature encoder piece by piece in time, one utterance after the other.

    A piece stays in the processor's cache from the first layer to the last, and padding is not computed. Pieces
    are independent, since frames of the last layer do not depend on each other. Only the result's memory grows
    with the length.
    """
    hop, field = math.prod(config.conv_stride), config.min_samples
    frames = max(1, PIECE // (config.conv_dim[0] * hop // config.conv_stride[0]))
    features: Tensor | None = None
    for row, count in enumerate(num_frames.tolist()):
        own = [kernel.row(row) for kernel in kernels]
        for start in range(0, count, frames):
            end = min(start + frames, count)
            piece = x[row, None, start * hop : (end - 1) * hop + field]
            for kernel, norm in zip(own, norms, strict=True):
                piece = conv_layer(piece, kernel, norm)
            if features is None:
                features = piece.new_zeros(len(x), int(num_frames.max()), piece.shape[-1])
            features[row, start:end] = piece[0]
    assert features is not None
    return features


def feature_encoder(
    config: Wav2Vec2Config, layers: Sequence[Any], x: Tensor, num_samples: Tensor, *, recompute: bool
) -> Tensor:
    """Compute the feature encoder, x (B, S, 1) -> (B, T, C), with folded group norm; `in_pieces` if frozen.

    Each layer has a convolution, ``conv``, and a norm, ``layer_norm``.
    """
    counts = conv_length(num_samples, config.conv_kernel[0], config.conv_stride[0])
    norms = [layer.layer_norm for layer in layers]
    kernels = [
        Kernel.normalised(layer.conv, norm, x, counts) if isinstance(norm, nn.GroupNorm) else Kernel.of(layer.conv)
        for layer, norm in zip(layers, norms, strict=True)
    ]
    if not (torch.is_grad_enabled() and any(kernel.matrix.requires_grad for kernel in kernels)):
        return in_pieces(config, kernels, norms, x, config.num_frames(num_samples))
    for kernel, norm in zip(kernels, norms, strict=True):
        x = recomputed(conv_layer, x, kernel, norm, enabled=recompute)
    return x

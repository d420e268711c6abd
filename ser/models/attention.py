"""Self-attention: plain, and WavLM's with a gated relative position bias.

Shapes: B batch, T frames, D hidden size, H attention heads. ``attend`` is True where a frame is valid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ser.models.config import Wav2Vec2Config
from ser.models.dropout import draw_mask, is_cheap, masked

# Frames (5 s) from which on attention's weights are computed twice in a training step on a CPU. Those of shorter
# utterances are little beside what else a layer keeps.
LONG = 250


def attention_weights(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """q, already scaled, and k (B, H, T, D/H), what each query takes of each key: (B, H, T, T)."""
    scores = q @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill_(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1).to(q.dtype)


class AttentionWithDropout(torch.autograd.Function):
    """`attention` on a CPU, of which nothing (T, T) is kept for long utterances: the backward pass finds it again.

    Memory would grow with the square of the length: 2 MB in a layer of base for 5 s and 80 for 30 s, in bf16.
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
        q, k, v, mask, *found = ctx.saved_tensors
        if found:
            weights, kept = found
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
    """`F.scaled_dot_product_attention` with dropout ``p`` on the weights; all (B, H, T, D/H).

    It is written out on a CPU where torch is slow: with dropout, for which there is no fused kernel, and in bf16,
    which the fused one multiplies at the rate of float32.
    """
    if q.device.type != "cpu" or (p <= 0 and q.dtype != torch.bfloat16):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)
    if is_cheap(q, p):
        return AttentionWithDropout.apply(q, k, v, mask, p)
    weights = attention_weights(q * q.shape[-1] ** -0.5, k, mask)
    return F.dropout(weights, p) @ v if p > 0 else weights @ v


class Attention(nn.Module):
    """Multi-head self-attention over the valid frames."""

    def __init__(self, config: Wav2Vec2Config) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.dropout = config.attention_dropout
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, H, T, D/H)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def mask(self, hidden: Tensor, attend: Tensor | None, bias: Tensor | None) -> Tensor | None:
        """What `scaled_dot_product_attention` takes: here a boolean mask, and no position bias."""
        return attend

    def forward(
        self,
        hidden: Tensor,
        attend: Tensor | None,
        bias: Tensor | None = None,
        lengths: Sequence[int] | None = None,
    ) -> Tensor:
        """hidden (B, T, D), attend (B, 1, 1, T) or None, bias (1, H, T, T) or None -> (B, T, D).

        With ``lengths`` hidden is (1, sum of lengths, D), utterances one after another, each of which attends to
        itself.
        """
        if torch.is_autocast_enabled(hidden.device.type):  # once, and not for each of the three
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        q, k, v = (self.split_heads(p(hidden)) for p in (self.q_proj, self.k_proj, self.v_proj))  # (B,H,T,D/H)
        if lengths is None:
            x = self.attended(attend, bias, hidden, q, k, v).transpose(1, 2)  # (B, T, H, D/H)
        else:
            parts = zip(hidden.split(lengths, 1), *(each.split(lengths, 2) for each in (q, k, v)), strict=True)
            x = torch.cat([self.attended(None, bias, *part).transpose(1, 2) for part in parts], dim=1)
        return self.out_proj(x.flatten(2))

    def attended(
        self, attend: Tensor | None, bias: Tensor | None, hidden: Tensor, q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        """`attention` of whole utterances, (B, H, T, D/H), as the configuration has it."""
        mask = self.mask(hidden, attend, bias)
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(q.dtype)  # half precision under autocast
        return attention(q, k, v, mask, self.dropout if self.training else 0.0)


class GatedAttention(Attention):
    """WavLM's attention: a learnt bias for each relative position, opened and closed by each query frame.

    Chen et al., *WavLM: Large-Scale Self-Supervised Pre-Training for Full Stack Speech Processing*, JSTSP 2022,
    section III-B. The bias comes from an embedding that the first layer owns; each layer has gates of its own.
    """

    def __init__(self, config: Wav2Vec2Config, *, owns_embedding: bool) -> None:
        super().__init__(config)
        self.num_buckets, self.max_distance = config.num_buckets, config.max_bucket_distance
        self.gru_rel_pos_const = nn.Parameter(torch.ones(1, self.num_heads, 1, 1))
        self.gru_rel_pos_linear = nn.Linear(config.hidden_size // self.num_heads, 8)
        if owns_embedding:
            self.rel_attn_embed = nn.Embedding(self.num_buckets, self.num_heads)

    def buckets(self, offsets: Tensor) -> Tensor:
        """Classes of relative positions: key minus query in frames -> 0..num_buckets-1, of the same shape.

        Half of the classes are for each direction. Of a half, the first half has a class per distance and the
        others grow logarithmically up to max_distance (Raffel et al., T5, JMLR 2020, section 2.1).
        """
        each = self.num_buckets // 2
        exact = each // 2
        distance = offsets.abs()
        # In the reference's order of operations: a boundary would else fall on its other side.
        share = torch.log(distance.clamp(min=1).float() / exact) / math.log(self.max_distance / exact)
        far = (exact + (share * (each - exact)).long()).clamp(max=each - 1)
        return torch.where(distance < exact, distance, far) + each * (offsets > 0)

    def position_bias(self, frames: int) -> Tensor:
        """(1, H, T, T), from the embedding of the first layer."""
        device = self.rel_attn_embed.weight.device
        values = self.rel_attn_embed(self.buckets(torch.arange(1 - frames, frames, device=device)))  # (2T-1, H)
        position = torch.arange(frames, device=device)
        offsets = position[None, :] - position[:, None]  # key minus query
        return F.embedding(offsets + frames - 1, values).permute(2, 0, 1)[None]

    def mask(self, hidden: Tensor, attend: Tensor | None, bias: Tensor | None) -> Tensor | None:
        """The gated bias, (B, H, T, T), minus infinity where a key is padding."""
        assert bias is not None
        bias = bias[..., : hidden.shape[1], : hidden.shape[1]]  # that of a shorter utterance
        gates = self.gru_rel_pos_linear(self.split_heads(hidden)).unflatten(-1, (2, 4)).sum(-1)  # (B, H, T, 2)
        update, reset = gates.sigmoid().split(1, dim=-1)  # (B, H, T, 1)
        mask = (update * (reset * self.gru_rel_pos_const - 1.0) + 2.0) * bias  # (B, H, T, T)
        return mask if attend is None else mask.masked_fill(~attend, -math.inf)

"""Define the encoder, wav2vec 2.0 and its relatives: waveform in, one hidden vector per 20 ms out.

The model is that of Baevski et al., *wav2vec 2.0: A Framework for Self-Supervised Learning of Speech
Representations*, NeurIPS 2020 (section 2; appendix A for masking, B for the sizes). HuBERT, WavLM and data2vec
differ in the positional convolution, the attention (WavLM) and the norms, see `ARCHITECTURES` in
`ser.models.config`. The file is in the order of a forward pass: feature encoder, feature projection, positional
convolution, attention, feed-forward, transformer layer, and last the whole encoder.

Shapes:
    B batch    S samples at 16 kHz    T frames (one per 320 samples = 20 ms)
    C channels of a convolution       D hidden size    H attention heads    F feed-forward size

Conventions:
  * Module attributes are the keys of Hugging Face checkpoints and configuration fields are those of
    config.json, so loading is a strict ``load_state_dict``.
  * ``padding_mask`` is True where a frame is padding. ``num_samples`` and ``num_frames`` are (B,) int64
    on the CPU, so that decisions about lengths need not wait for a GPU.
  * An utterance gives the same output alone and in any padded batch. In the reference implementations,
    padding changes the statistics of the first group norm and the mean over time; here it does not. For a
    single unpadded utterance the outputs are the same.
  * `ser.models.kernels` has torch's operations under torch's names, and computes them faster on a CPU.
  * ``torch.export`` records the computation of a GPU, for any lengths (tests/test_export.py).
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ser.errors import AudioError, ConfigError
from ser.models import kernels
from ser.models.config import Wav2Vec2Config, conv_length
from ser.models.kernels import Dropout


def padding_mask(lengths: Tensor, size: int, device: torch.device) -> Tensor | None:
    """Return (B, size) bool, True past each length; None if nothing is padded. ``lengths`` is on the CPU.

    A recorded graph (``torch.export``) is for all lengths, so it always has the mask.
    """
    if not torch.compiler.is_compiling() and bool((lengths >= size).all()):
        return None
    return torch.arange(size, device=device) >= lengths.to(device, non_blocking=True)[:, None]


def zero_padding(hidden: Tensor, padding: Tensor | None) -> Tensor:
    """Set hidden (B, T, D) to zero where padding (B, T), or None, is True."""
    return hidden if padding is None else hidden.masked_fill(padding[..., None], 0.0)


def untouched(module: nn.Module) -> Tensor:
    """Return a zero that depends on every parameter of ``module``.

    DistributedDataParallel expects a gradient for every parameter in every step. If a layer is skipped, this zero
    is added to the output, and the layer's parameters get a gradient of zero. It is a sum over empty slices, so it
    costs nothing and is 0 for any weights.
    """
    return sum((p.flatten()[:0].sum() for p in module.parameters() if p.requires_grad), torch.zeros(()))


# ---------------------------------------------------------------------------------------------- feature encoder


class ConvLayer(nn.Module):
    """Compute one convolution of the feature encoder, with its norm if it has one, and GELU."""

    def __init__(self, config: Wav2Vec2Config, index: int) -> None:
        super().__init__()
        channels = config.conv_dim[index]
        before, size, stride = (1, *config.conv_dim)[index], config.conv_kernel[index], config.conv_stride[index]
        self.conv = nn.Conv1d(before, channels, kernel_size=size, stride=stride, bias=config.conv_bias)
        # Both norms are called layer_norm in the checkpoints, and neither uses layer_norm_eps.
        if config.feat_extract_norm == "layer":
            self.layer_norm: nn.Module = nn.LayerNorm(channels)
        elif index == 0:
            self.layer_norm = nn.GroupNorm(channels, channels)
        else:
            self.layer_norm = nn.Identity()

    def forward(self, x: Tensor, num_frames: Tensor) -> Tensor:
        """Compute x (B, T, C) -> (B, T', C'), of which num_frames (B,) are valid."""
        x = kernels.conv1d(x, self.conv)
        if isinstance(self.layer_norm, nn.GroupNorm):
            return F.gelu(kernels.group_norm(x, num_frames, self.layer_norm))
        return F.gelu(self.layer_norm(x))


class FeatureEncoder(nn.Module):
    """Compute seven convolutions, which turn 16,000 samples a second into 50 vectors (paper section 2)."""

    def __init__(self, config: Wav2Vec2Config) -> None:
        super().__init__()
        self.config = config
        self.conv_layers = nn.ModuleList(ConvLayer(config, i) for i in range(len(config.conv_dim)))
        self.activation_checkpointing = False

    def forward(self, waveforms: Tensor, num_samples: Tensor) -> tuple[Tensor, Tensor]:
        """Compute waveforms (B, S), num_samples (B,) -> features (B, T, C), num_frames (B,).

        Valid frames never see padding: `conv_length` counts only the windows that end before the padding begins.
        """
        x, num_frames = waveforms[..., None], num_samples  # (B, S, 1)
        recompute = self.activation_checkpointing and self.training
        layers: list[Any] = [*self.conv_layers]
        if kernels.in_use(x):  # the same function, with the group norm folded into the first convolution
            features = kernels.feature_encoder(self.config, layers, x, num_samples, recompute=recompute)
            return features, self.config.num_frames(num_samples)
        for layer in layers:
            num_frames = conv_length(num_frames, layer.conv.kernel_size[0], layer.conv.stride[0])
            x = kernels.recomputed(layer, x, num_frames, enabled=recompute)
        return x, num_frames


class FeatureProjection(nn.Module):
    """Project the channels of the convolutions to the hidden size: norm, linear, dropout."""

    def __init__(self, config: Wav2Vec2Config) -> None:
        super().__init__()
        channels = config.conv_dim[-1]
        norm = nn.LayerNorm(channels, eps=config.layer_norm_eps) if config.feat_proj_layer_norm else nn.Identity()
        self.layer_norm = norm
        self.projection = nn.Linear(channels, config.hidden_size)
        self.dropout = Dropout(config.feat_proj_dropout)

    def forward(self, features: Tensor) -> Tensor:
        """Project (B, T, C) -> (B, T, D)."""
        return self.dropout(self.projection(self.layer_norm(features)))


# ---------------------------------------------------------------------------------------------- transformer


def positional_conv(config: Wav2Vec2Config, size: int) -> nn.Conv1d:
    """Build a grouped convolution over time of hidden vectors, with a kernel of ``size`` frames."""
    channels, groups = config.hidden_size, config.num_conv_pos_embedding_groups
    return nn.Conv1d(channels, channels, kernel_size=size, padding=size // 2, groups=groups)


class PositionalConvolution(nn.Module):
    """Encode relative positions by a wide grouped convolution over time (section 2, "Contextualized ...")."""

    def __init__(self, config: Wav2Vec2Config) -> None:
        super().__init__()
        self.conv = positional_conv(config, config.num_conv_pos_embeddings)
        self.batch_norm = nn.BatchNorm1d(config.hidden_size) if config.conv_pos_batch_norm else None
        if self.batch_norm is None:
            # When weights are loaded, the parametrization also accepts the older names weight_g and weight_v.
            self.conv = nn.utils.parametrizations.weight_norm(self.conv, dim=2)

    def forward(self, hidden: Tensor, padding: Tensor | None) -> Tensor:
        """Compute hidden (B, T, D), padding (B, T) -> (B, T, D)."""
        if self.batch_norm is not None:
            # Always use the running statistics, since those of a batch would depend on batch composition. The norm
            # changes zeros, so padding is set to zero after it.
            norm = self.batch_norm
            hidden = F.batch_norm(
                hidden.transpose(1, 2), norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
            ).transpose(1, 2)
        x = kernels.conv1d(zero_padding(hidden, padding), self.conv)
        return F.gelu(x[:, : hidden.shape[1]])  # with an even kernel there is one frame too many


class PositionalLayer(nn.Module):
    """Compute one of data2vec's positional convolutions, with a norm without parameters (Baevski et al., 2022)."""

    def __init__(self, config: Wav2Vec2Config) -> None:
        super().__init__()
        self.conv = positional_conv(config, config.conv_pos_kernel_size)

    def forward(self, hidden: Tensor, padding: Tensor | None) -> Tensor:
        """Compute hidden (B, T, D), padding (B, T) -> (B, T, D)."""
        x = kernels.conv1d(zero_padding(hidden, padding), self.conv)[:, : hidden.shape[1]]
        return F.gelu(F.layer_norm(x, x.shape[2:]))


class PositionalStack(nn.Module):
    """Encode relative positions as data2vec does, by five small convolutions instead of a wide one."""

    def __init__(self, config: Wav2Vec2Config) -> None:
        super().__init__()
        self.layers = nn.ModuleList(PositionalLayer(config) for _ in range(config.num_conv_pos_embeddings))

    def forward(self, hidden: Tensor, padding: Tensor | None) -> Tensor:
        """Compute hidden (B, T, D), padding (B, T) -> (B, T, D)."""
        for layer in self.layers:
            hidden = layer(hidden, padding)
        return hidden


# The classes that a row of `ARCHITECTURES` may name. Each takes (config), and (hidden, padding) in forward.
POSITIONS: dict[str, type[nn.Module]] = {"convolution": PositionalConvolution, "stack": PositionalStack}


class Attention(nn.Module):
    """Compute multi-head self-attention over the valid frames."""

    def __init__(self, config: Wav2Vec2Config, index: int) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.dropout = config.attention_dropout
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def split_heads(self, x: Tensor) -> Tensor:
        """Reshape (B, T, D) -> (B, H, T, D/H)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def position_bias(self, frames: int) -> Tensor | None:
        """Return a bias for the attention scores, (1, H, T, T), or None.

        Only the first layer's method is called, and all layers share its result. So only layer 0 may have
        parameters for it, and the bias must be on their device.
        """
        return None

    def mask(self, hidden: Tensor, attend: Tensor | None, bias: Tensor | None) -> Tensor | None:
        """Return the attention mask: ``attend``, or the bias with minus infinity where a key is padding."""
        if bias is None:
            return attend
        bias = bias[..., : hidden.shape[1], : hidden.shape[1]]  # an utterance may be shorter than the longest
        return bias if attend is None else bias.masked_fill(~attend, -math.inf)

    def forward(
        self, hidden: Tensor, attend: Tensor | None, bias: Tensor | None = None, lengths: list[int] | None = None
    ) -> Tensor:
        """Compute hidden (B, T, D), attend (B, 1, 1, T) or None, bias (1, H, T, T) or None -> (B, T, D).

        ``attend`` is True where a frame is valid. With ``lengths``, hidden is (1, sum of lengths, D): utterances
        are joined, and each attends only to itself (`kernels.pack_frames`).
        """
        (hidden,) = kernels.as_autocast(hidden)  # convert once, and not for each of the three projections
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
        """Compute `kernels.attention` for whole utterances, (B, H, T, D/H), with this layer's mask and dropout."""
        mask = self.mask(hidden, attend, bias)
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(q.dtype)  # which is half precision under autocast
        return kernels.attention(q, k, v, mask, self.dropout if self.training else 0.0)


class GatedAttention(Attention):
    """Compute WavLM's attention, with a learnt bias for each relative position, gated by each query frame.

    See Chen et al., *WavLM: Large-Scale Self-Supervised Pre-Training for Full Stack Speech Processing*, JSTSP
    2022, section III-B. The bias comes from an embedding in the first layer; each layer has gates of its own.
    """

    def __init__(self, config: Wav2Vec2Config, index: int) -> None:
        super().__init__(config, index)
        self.num_buckets, self.max_distance = config.num_buckets, config.max_bucket_distance
        self.gru_rel_pos_const = nn.Parameter(torch.ones(1, self.num_heads, 1, 1))
        self.gru_rel_pos_linear = nn.Linear(config.hidden_size // self.num_heads, 8)
        if index == 0:
            self.rel_attn_embed = nn.Embedding(self.num_buckets, self.num_heads)

    def buckets(self, offsets: Tensor) -> Tensor:
        """Classify relative positions: key minus query in frames -> 0..num_buckets-1, of the same shape.

        Each direction has half of the classes. Half of these are for one distance each; the others cover ranges
        that grow logarithmically up to max_distance (Raffel et al., T5, JMLR 2020, section 2.1).
        """
        each = self.num_buckets // 2
        exact = each // 2
        distance = offsets.abs()
        # The order of operations is that of the reference: another order rounds differently, and could put a
        # distance at a boundary into the neighbouring bucket.
        share = torch.log(distance.clamp(min=1).float() / exact) / math.log(self.max_distance / exact)
        far = (exact + (share * (each - exact)).long()).clamp(max=each - 1)
        return torch.where(distance < exact, distance, far) + each * (offsets > 0)

    def position_bias(self, frames: int) -> Tensor:
        """Return the bias of all layers before their gates, (1, H, T, T); only the first layer can do this."""
        device = self.rel_attn_embed.weight.device
        values = self.rel_attn_embed(self.buckets(torch.arange(1 - frames, frames, device=device)))  # (2T-1, H)
        position = torch.arange(frames, device=device)
        offsets = position[None, :] - position[:, None]  # key minus query
        return F.embedding(offsets + frames - 1, values).permute(2, 0, 1)[None]

    def mask(self, hidden: Tensor, attend: Tensor | None, bias: Tensor | None) -> Tensor | None:
        """Return the gated bias, (B, H, T, T), which is minus infinity where a key is padding."""
        bias = super().mask(hidden, None, bias)
        gates = self.gru_rel_pos_linear(self.split_heads(hidden)).unflatten(-1, (2, 4)).sum(-1)  # (B, H, T, 2)
        update, reset = gates.sigmoid().split(1, dim=-1)  # (B, H, T, 1)
        bias = (update * (reset * self.gru_rel_pos_const - 1.0) + 2.0) * bias  # (B, H, T, T)
        return super().mask(hidden, attend, bias)


# The classes that a row of `ARCHITECTURES` may name. Each takes (config, index of its layer).
ATTENTIONS: dict[str, type[Attention]] = {"plain": Attention, "gated": GatedAttention}


class FeedForward(nn.Module):
    """Apply two linear layers with GELU between them, to each frame separately."""

    def __init__(self, config: Wav2Vec2Config) -> None:
        super().__init__()
        self.intermediate_dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.intermediate_dropout = Dropout(config.activation_dropout)
        self.output_dense = nn.Linear(config.intermediate_size, config.hidden_size)
        self.output_dropout = Dropout(config.hidden_dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        """Compute (B, T, D) -> (B, T, D), with (B, T, F) between."""
        hidden = self.intermediate_dense(hidden)
        p = self.intermediate_dropout.p if self.training else 0.0
        return self.output_dropout(kernels.gelu_dropout_linear(hidden, p, self.output_dense))


class TransformerLayer(nn.Module):
    """Apply attention and feed-forward with residuals; norms come after each sum (post) or before it (pre)."""

    def __init__(self, config: Wav2Vec2Config, index: int) -> None:
        super().__init__()
        self.pre_norm = config.do_stable_layer_norm
        self.attention = ATTENTIONS[config.architecture.attention](config, index)
        self.dropout = Dropout(config.hidden_dropout)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward = FeedForward(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden: Tensor, *context: Any) -> Tensor:
        """Compute hidden (B, T, D), and the other arguments of `Attention`, -> (B, T, D)."""
        if self.pre_norm:
            hidden = hidden + self.dropout(self.attention(self.layer_norm(hidden), *context))
            return hidden + self.feed_forward(self.final_layer_norm(hidden))
        hidden = self.layer_norm(hidden + self.dropout(self.attention(hidden, *context)))
        return self.final_layer_norm(hidden + self.feed_forward(hidden))


class Transformer(nn.Module):
    """Add positions, then apply the layers. Checkpoints call this part ``encoder``."""

    def __init__(self, config: Wav2Vec2Config) -> None:
        super().__init__()
        self.pre_norm = config.do_stable_layer_norm
        self.layerdrop = config.layerdrop
        self.pos_conv_embed = POSITIONS[config.architecture.positions](config)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout)
        self.layers = nn.ModuleList(TransformerLayer(config, i) for i in range(config.num_hidden_layers))
        self.activation_checkpointing = False

    def final_norm(self, hidden: Tensor) -> Tensor:
        """Apply the norm after the last layer, which only pre-norm transformers have: (B, T, D) -> (B, T, D)."""
        return self.layer_norm(hidden) if self.pre_norm else hidden

    def forward(self, hidden: Tensor, padding: Tensor | None, num_layers: int | None = None) -> list[Tensor]:
        """Compute hidden (B, T, D), padding (B, T) -> the first layer's input and each layer's output, (B, T, D).

        The encoder's result is `final_norm` of the last one. ``num_layers`` limits the layers that are computed.
        """
        hidden = zero_padding(hidden, padding)
        hidden = hidden + self.pos_conv_embed(hidden, padding)
        if not self.pre_norm:
            hidden = self.layer_norm(hidden)
        hidden = self.dropout(hidden)
        attend = None if padding is None else ~padding[:, None, None, :]  # (B, 1, 1, T)
        layers: list[Any] = [*self.layers]
        bias = layers[0].attention.position_bias(hidden.shape[1])  # (1, H, T, T) or None, for all layers
        recompute = self.activation_checkpointing and self.training

        size, lengths = hidden.shape[1], kernels.packed_lengths(hidden, padding)
        if lengths is not None:  # the layers see no padding
            hidden, attend = kernels.pack_frames(hidden, lengths), None
        outputs = [hidden]
        for layer in layers[:num_layers]:
            # LayerDrop (Fan et al., 2020), drawn on the CPU. A skipped layer stays in the graph, so that
            # DistributedDataParallel need not search for unused parameters.
            if self.training and self.layerdrop > 0 and float(torch.rand(())) < self.layerdrop:
                hidden = hidden + untouched(layer).to(hidden.device)
            else:
                hidden = kernels.recomputed(layer, hidden, attend, bias, lengths, enabled=recompute)
            outputs.append(hidden)
        return outputs if lengths is None else [kernels.unpack_frames(output, lengths, size) for output in outputs]


class Wav2Vec2(nn.Module):
    """Encode waveforms to one vector per 20 ms, with any architecture that the configuration names.

        encoder = Wav2Vec2(Wav2Vec2Config.named("base"))
        hidden, num_frames = encoder(waveforms, num_samples)

    Its weights are random; `ser.load_encoder` reads those of a folder.
    """

    def __init__(self, config: Wav2Vec2Config) -> None:
        super().__init__()
        self.config = config
        self.feature_extractor = FeatureEncoder(config)
        self.feature_projection = FeatureProjection(config)
        if config.has_mask_embedding:
            self.masked_spec_embed = nn.Parameter(torch.empty(config.hidden_size))
        self.encoder = Transformer(config)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new weights as the reference does (normal 0.02 for linear layers, Kaiming for convolutions)."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=self.config.initializer_range)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
            elif isinstance(module, ConvLayer):
                nn.init.kaiming_normal_(module.conv.weight)
                if module.conv.bias is not None:
                    bound = (module.conv.in_channels * module.conv.kernel_size[0]) ** -0.5
                    nn.init.uniform_(module.conv.bias, -bound, bound)
        bound = self.feature_projection.projection.in_features**-0.5
        for parameter in self.feature_projection.projection.parameters():
            nn.init.uniform_(parameter, -bound, bound)
        for module in self.encoder.pos_conv_embed.modules():
            if isinstance(module, nn.Conv1d):
                drawn = torch.randn_like(module.weight) * (
                    2 / math.sqrt(module.kernel_size[0] * module.in_channels)
                )
                if nn.utils.parametrize.is_parametrized(module):
                    module.weight = drawn  # sets g and v
                else:
                    module.weight.copy_(drawn)
                assert module.bias is not None
                nn.init.zeros_(module.bias)
        if self.config.has_mask_embedding:
            nn.init.uniform_(self.masked_spec_embed)

    @torch.no_grad()
    def round_weights(self, dtype: torch.dtype) -> None:
        """Convert the weights once to ``dtype`` and to the memory layout that the convolutions use.

        Under autocast this would be done again for each batch; the outputs are equal. A rounded model can predict,
        but must not be trained or saved.
        """
        for module in [*self.encoder.modules()]:
            if isinstance(module, nn.Linear):
                module.to(dtype)
            elif isinstance(module, nn.Conv1d):
                if nn.utils.parametrize.is_parametrized(module):
                    nn.utils.parametrize.remove_parametrizations(module, "weight")
                module.weight.data = module.weight.to(dtype).transpose(1, 2).contiguous().transpose(1, 2)
        for layer in [*self.feature_extractor.conv_layers][1:]:  # the first one's folded norm needs exact weights
            assert isinstance(layer, ConvLayer)
            weight = layer.conv.weight
            weight.data = weight.to(dtype).permute(2, 1, 0).contiguous().permute(2, 1, 0)

    def activation_checkpointing(self, enabled: bool) -> None:
        """Let layers recompute activations in the backward pass: less memory, about a third more time."""
        self.feature_extractor.activation_checkpointing = enabled
        self.encoder.activation_checkpointing = enabled

    def layers(
        self,
        waveforms: Tensor | None = None,
        num_samples: Tensor | Iterable[int] | None = None,
        *,
        features: Tensor | None = None,
        mask_time: Tensor | None = None,
        mask_feature: Tensor | None = None,
        num_layers: int | None = None,
        final_norm: bool = True,
    ) -> tuple[list[Tensor], Tensor]:
        """Encode like `forward`, but return the transformer's input and each layer's output, and num_frames.

        These are num_hidden_layers + 1 tensors. In a pre-norm model the last one has the final norm, unless
        ``final_norm`` is False. ``num_layers`` limits the layers that are computed. ``features`` (B, T, C), the
        feature encoder's output for utterances of ``num_samples``, may be given instead of waveforms.
        """
        if features is None:
            assert waveforms is not None
            num_samples = self._check(waveforms, num_samples)
            padding = padding_mask(num_samples, waveforms.shape[1], waveforms.device)
            if padding is not None:  # so values there, even NaN, have no effect
                waveforms = waveforms.masked_fill(padding, 0.0)
            features, num_frames = self.feature_extractor(waveforms, num_samples)  # (B, T, C)
        else:
            num_frames = self.config.num_frames(torch.as_tensor(num_samples, device="cpu"))
            if features.shape[:2] != (len(num_frames), int(num_frames.max())):
                raise AudioError(
                    f"features have shape {tuple(features.shape)}; expected ({len(num_frames)}, "
                    f"{int(num_frames.max())}, C) for {num_frames.tolist()} frames"
                )
        hidden = self.feature_projection(features)  # (B, T, D)
        hidden = self._mask(hidden, mask_time, mask_feature)
        padding = padding_mask(num_frames, hidden.shape[1], hidden.device)
        outputs = self.encoder(hidden, padding, num_layers)
        if final_norm and len(outputs) > self.config.num_hidden_layers:
            outputs[-1] = self.encoder.final_norm(outputs[-1])
        return outputs, num_frames

    def forward(
        self,
        waveforms: Tensor,
        num_samples: Tensor | Iterable[int] | None = None,
        *,
        mask_time: Tensor | None = None,
        mask_feature: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Encode a batch.

        Args:
            waveforms: (B, S) float, 16 kHz, preprocessed (usually to zero mean and unit variance per
                utterance). Values past ``num_samples`` have no effect.
            num_samples: (B,) valid samples of each, at least `Wav2Vec2Config.min_samples` (400) and at most
                S; preferably a CPU tensor or a list. None: all S.
            mask_time: (B, T) bool, True where the frame is replaced by the mask embedding (SpecAugment).
            mask_feature: (B, D) bool, True where the channel is zeroed in all frames.

        Returns:
            hidden (B, T, D), one vector per 320 samples, and num_frames (B,) int64 on the CPU, the valid
            frames; the frames after them hold no information.

        Raises:
            AudioError: an utterance is too short for one frame, or lengths do not fit the batch.
        """
        outputs, num_frames = self.layers(waveforms, num_samples, mask_time=mask_time, mask_feature=mask_feature)
        return outputs[-1], num_frames

    def _check(self, waveforms: Tensor, num_samples: Tensor | Iterable[int] | None) -> Tensor:
        """Return num_samples as (B,) int64 on the CPU, or raise AudioError for a wrong shape, type or length."""
        if waveforms.ndim != 2 or not waveforms.is_floating_point():
            raise AudioError(
                f"waveforms have shape {tuple(waveforms.shape)} and type {waveforms.dtype}; expected (B, S) floats"
            )
        weights = self.feature_projection.projection.weight.dtype
        if waveforms.dtype != weights and not torch.is_autocast_enabled(waveforms.device.type):
            raise AudioError(
                f"waveforms are {waveforms.dtype} and the model is {weights}; convert with waveforms.to({weights})"
            )
        batch, size = waveforms.shape
        if num_samples is None:
            num_samples = torch.full((batch,), size)
        elif not isinstance(num_samples, Tensor):
            num_samples = torch.tensor(list(num_samples))
        num_samples = num_samples.to("cpu", torch.int64)
        if num_samples.shape != (batch,):
            raise AudioError(
                f"num_samples has shape {tuple(num_samples.shape)}; expected ({batch},), one per waveform"
            )
        if torch.compiler.is_compiling():  # values are unknown when a graph is recorded; its caller checks lengths
            return num_samples
        for row, count in enumerate(num_samples.tolist()):
            if not self.config.min_samples <= count <= size:
                raise AudioError(
                    f"utterance {row} of the batch has {count} samples; at least {self.config.min_samples} make "
                    f"the first frame, and the batch is {size} long"
                )
        return num_samples

    def _mask(self, hidden: Tensor, mask_time: Tensor | None, mask_feature: Tensor | None) -> Tensor:
        """Apply SpecAugment (Park et al., 2019) to the projected features, hidden (B, T, D)."""
        if mask_time is not None:
            if not self.config.has_mask_embedding:
                raise ConfigError("mask_time needs a mask embedding: mask_time_prob or mask_feature_prob above 0")
            hidden = torch.where(mask_time[..., None], self.masked_spec_embed.to(hidden.dtype), hidden)
        elif self.training and self.config.has_mask_embedding and self.masked_spec_embed.requires_grad:
            hidden = hidden + self.masked_spec_embed[:0].sum()  # a zero, as in `untouched`, for its gradient
        if mask_feature is not None:
            hidden = hidden.masked_fill(mask_feature[:, None, :], 0.0)
        return hidden

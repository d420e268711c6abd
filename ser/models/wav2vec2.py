"""wav2vec 2.0: waveform in, one hidden vector per 20 ms out.

Baevski et al., *wav2vec 2.0: A Framework for Self-Supervised Learning of Speech Representations*,
NeurIPS 2020 (section 2 for the model, appendix A for masking, B for the sizes). Read it from the top:
configuration, feature encoder, positional convolution, transformer layer, and the whole last.

Shapes:
    B batch    S samples at 16 kHz    T frames (one per 320 samples = 20 ms)
    C channels of a convolution       D hidden size    H attention heads    F feed-forward size

Conventions:
  * Module attributes are the keys of Hugging Face checkpoints and configuration fields are those of
    config.json, so loading is a strict ``load_state_dict``.
  * ``padding_mask`` is True where a frame is padding. ``num_samples`` and ``num_frames`` are (B,) int64
    and live on the CPU: what depends on lengths is decided there, without waiting for a GPU.
  * An utterance gives the same output alone and in any padded batch. Where the reference
    implementations let padding in (the first group norm's statistics, the mean over time), this one
    does not; on a single unpadded utterance the two agree.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ser.errors import AudioError, ConfigError

# Keys that would change the computation in a way this file does not implement, and the values at which
# they change nothing. Anything else is refused by name.
NEUTRAL_VALUES: dict[str, tuple] = {
    "model_type": ("wav2vec2",),
    "add_adapter": (False, None),
    "adapter_attn_dim": (None,),
    "hidden_act": ("gelu",),
    "feat_extract_activation": ("gelu",),
    "use_weighted_layer_sum": (False, None),
    "feat_proj_layer_norm": (True,),
    "conv_pos_batch_norm": (False,),
    "is_decoder": (False, None),
    "add_cross_attention": (False, None),
}


@dataclass(frozen=True)
class Wav2Vec2Config:
    """What decides the computation of the encoder; names and defaults are those of config.json."""

    # feature encoder (paper section 2, "Feature encoder")
    conv_dim: tuple[int, ...] = (512, 512, 512, 512, 512, 512, 512)
    conv_kernel: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    conv_stride: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    conv_bias: bool = False
    feat_extract_norm: str = "group"  # "group": after the first convolution only; "layer": after each
    # transformer
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    do_stable_layer_norm: bool = False  # False: norm after each residual sum (post); True: before (pre)
    layer_norm_eps: float = 1e-5
    num_conv_pos_embeddings: int = 128  # kernel of the positional convolution, in frames
    num_conv_pos_embedding_groups: int = 16
    # dropout, 0..1
    feat_proj_dropout: float = 0.0
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    activation_dropout: float = 0.1
    final_dropout: float = 0.1  # before the heads
    layerdrop: float = 0.1
    # SpecAugment: the share of frames (or hidden channels) to mask, in spans of a fixed length
    apply_spec_augment: bool = True
    mask_time_prob: float = 0.05
    mask_time_length: int = 10
    mask_time_min_masks: int = 2
    mask_feature_prob: float = 0.0
    mask_feature_length: int = 10
    mask_feature_min_masks: int = 0
    # initialisation of new layers
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        """Refuse what cannot be built, with the numbers; nothing is allocated before this."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(field.default, tuple):
                ok = isinstance(value, list | tuple) and all(type(v) is int for v in value)
                if ok:
                    object.__setattr__(self, field.name, tuple(value))
            elif isinstance(field.default, float):
                ok = type(value) in (int, float) and math.isfinite(value)
            else:
                ok = type(value) is type(field.default)
            if not ok:
                kind = (
                    "a list of whole numbers" if isinstance(field.default, tuple) else type(field.default).__name__
                )
                raise ConfigError(f"{field.name} is {value!r}; expected {kind}, such as {field.default!r}")
        sizes = {n: (getattr(self, n),) for n in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
        sizes |= {n: (getattr(self, n),) for n in ("intermediate_size", "num_conv_pos_embeddings")}
        sizes |= {n: (getattr(self, n),) for n in ("num_conv_pos_embedding_groups", "mask_time_length")}
        sizes |= {n: getattr(self, n) for n in ("conv_dim", "conv_kernel", "conv_stride")}
        sizes["mask_feature_length"] = (self.mask_feature_length,)
        for name, values in sizes.items():
            if not values or len(values) > 64 or not all(1 <= v <= 65_536 for v in values):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; sizes from 1 to 65,536 can be built")
        if self.num_hidden_layers > 512:
            raise ConfigError(f"num_hidden_layers is {self.num_hidden_layers}; at most 512 can be built")
        if not len(self.conv_dim) == len(self.conv_kernel) == len(self.conv_stride):
            raise ConfigError(
                f"conv_dim, conv_kernel and conv_stride need equal lengths, one entry per convolution; found "
                f"{len(self.conv_dim)}, {len(self.conv_kernel)} and {len(self.conv_stride)}"
            )
        for name in ("num_attention_heads", "num_conv_pos_embedding_groups"):
            if self.hidden_size % getattr(self, name):
                raise ConfigError(
                    f"hidden_size {self.hidden_size} is not a multiple of {name} {getattr(self, name)}"
                )
        if self.feat_extract_norm not in ("group", "layer"):
            raise ConfigError(f"feat_extract_norm is {self.feat_extract_norm!r}; expected 'group' or 'layer'")
        for name in (field.name for field in fields(self) if field.name.endswith(("dropout", "prob", "drop"))):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected a share from 0 to 1")
        if self.layer_norm_eps <= 0 or self.initializer_range <= 0:
            raise ConfigError("layer_norm_eps and initializer_range must be above 0")
        if min(self.mask_time_min_masks, self.mask_feature_min_masks) < 0:
            raise ConfigError("mask_time_min_masks and mask_feature_min_masks must be 0 or more")

    @classmethod
    def from_dict(cls, values: dict) -> Wav2Vec2Config:
        """Take the encoder's part of a config.json; other keys (tokenizer, pre-training heads) are left.

        Raises ConfigError for a key that changes the computation in a way that is not implemented, and for
        values of a wrong type or size.
        """
        for key, neutral in NEUTRAL_VALUES.items():
            if key in values and values[key] not in neutral:
                raise ConfigError(
                    f"the configuration sets {key} = {values[key]!r}, which changes the computation and is not "
                    f"supported; supported: {' or '.join(repr(v) for v in neutral)}"
                )
        names = {field.name for field in fields(cls)}
        return cls(**{key: value for key, value in values.items() if key in names})

    @classmethod
    def named(cls, name: str) -> Wav2Vec2Config:
        """The preset called ``name``: small, base or large."""
        if name not in PRESETS:
            close = difflib.get_close_matches(name, PRESETS, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"no preset is called {name!r}; there are {', '.join(PRESETS)}{hint}")
        return PRESETS[name]

    def to_dict(self) -> dict:
        """The fields as config.json holds them."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def num_frames(self, num_samples: Tensor) -> Tensor:
        """Frames that ``num_samples`` (any shape, int64) give: 0 below `min_samples`, then one per hop."""
        for kernel, stride in zip(self.conv_kernel, self.conv_stride, strict=True):
            num_samples = conv_length(num_samples, kernel, stride)
        return num_samples

    @property
    def min_samples(self) -> int:
        """Samples that make the first frame: 400 (25 ms) for every public checkpoint."""
        samples = 1
        for kernel, stride in zip(reversed(self.conv_kernel), reversed(self.conv_stride), strict=True):
            samples = (samples - 1) * stride + kernel
        return samples

    @property
    def has_mask_embedding(self) -> bool:
        """Whether checkpoints of this configuration hold ``masked_spec_embed``."""
        return self.mask_time_prob > 0 or self.mask_feature_prob > 0


PRESETS: dict[str, Wav2Vec2Config] = {
    # For CPUs, tests and corpora of minutes: trained from scratch, under two million parameters. The
    # convolutions widen as their frame rate falls, so that each costs about the same; pre-norm, because it
    # trains from scratch at a high rate without care.
    "small": Wav2Vec2Config(
        conv_dim=(32, 48, 64, 96, 128, 160, 192),
        conv_kernel=(10, 3, 3, 3, 3, 2, 2),
        conv_stride=(5, 2, 2, 2, 2, 2, 2),
        conv_bias=False,
        feat_extract_norm="group",
        hidden_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=512,
        do_stable_layer_norm=True,
        layer_norm_eps=1e-5,
        num_conv_pos_embeddings=32,
        num_conv_pos_embedding_groups=16,
        feat_proj_dropout=0.0,
        hidden_dropout=0.1,
        attention_dropout=0.0,
        activation_dropout=0.0,
        final_dropout=0.1,
        layerdrop=0.0,
        apply_spec_augment=True,
        mask_time_prob=0.05,
        mask_time_length=5,
        mask_time_min_masks=1,
        mask_feature_prob=0.0,
        mask_feature_length=10,
        mask_feature_min_masks=0,
        initializer_range=0.02,
    ),
    # wav2vec2-base, as the paper fine-tunes it.
    "base": Wav2Vec2Config(
        conv_dim=(512, 512, 512, 512, 512, 512, 512),
        conv_kernel=(10, 3, 3, 3, 3, 2, 2),
        conv_stride=(5, 2, 2, 2, 2, 2, 2),
        conv_bias=False,
        feat_extract_norm="group",
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
        do_stable_layer_norm=False,
        layer_norm_eps=1e-5,
        num_conv_pos_embeddings=128,
        num_conv_pos_embedding_groups=16,
        feat_proj_dropout=0.1,
        hidden_dropout=0.1,
        attention_dropout=0.1,
        activation_dropout=0.1,
        final_dropout=0.1,
        layerdrop=0.1,
        apply_spec_augment=True,
        mask_time_prob=0.05,
        mask_time_length=10,
        mask_time_min_masks=2,
        mask_feature_prob=0.0,
        mask_feature_length=10,
        mask_feature_min_masks=0,
        initializer_range=0.02,
    ),
    # wav2vec2-large-960h, the paper's second model: large, and yet group norm and post-norm. (The lv60,
    # robust and XLS-R checkpoints are layer norm and pre-norm; their folders say so.)
    "large": Wav2Vec2Config(
        conv_dim=(512, 512, 512, 512, 512, 512, 512),
        conv_kernel=(10, 3, 3, 3, 3, 2, 2),
        conv_stride=(5, 2, 2, 2, 2, 2, 2),
        conv_bias=False,
        feat_extract_norm="group",
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        do_stable_layer_norm=False,
        layer_norm_eps=1e-5,
        num_conv_pos_embeddings=128,
        num_conv_pos_embedding_groups=16,
        feat_proj_dropout=0.1,
        hidden_dropout=0.1,
        attention_dropout=0.1,
        activation_dropout=0.1,
        final_dropout=0.1,
        layerdrop=0.1,
        apply_spec_augment=True,
        mask_time_prob=0.05,
        mask_time_length=10,
        mask_time_min_masks=2,
        mask_feature_prob=0.0,
        mask_feature_length=10,
        mask_feature_min_masks=0,
        initializer_range=0.02,
    ),
}


def conv_length(length: Tensor, kernel: int, stride: int) -> Tensor:
    """Positions at which a window of ``kernel`` fits into ``length``, every ``stride``; 0 if none does."""
    return (torch.div(length - kernel, stride, rounding_mode="floor") + 1).clamp(min=0)


def padding_mask(lengths: Tensor, size: int, device: torch.device) -> Tensor | None:
    """(B, size) bool, True past each length; None where nothing is padded. ``lengths`` is on the CPU."""
    if bool((lengths >= size).all()):
        return None
    return torch.arange(size, device=device) >= lengths.to(device, non_blocking=True)[:, None]


def untouched(module: nn.Module) -> Tensor:
    """A zero that depends on every parameter of ``module``.

    Adding it keeps the graph of a step the same for DistributedDataParallel when a module is skipped: its
    parameters then have a gradient, which is zero. The sum is over an empty slice, so it costs nothing and
    stays 0 whatever the weights hold.
    """
    return sum((p.flatten()[:0].sum() for p in module.parameters() if p.requires_grad), torch.zeros(()))


def masked_group_norm(x: Tensor, padding: Tensor, norm: nn.GroupNorm) -> Tensor:
    """``norm`` with one channel per group, whose mean and variance see valid frames only.

    x (B, C, T), padding (B, T) bool. Returns (B, C, T). In float32 also under autocast, as `F.group_norm`.
    """
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    count = (~padding).sum(-1)[:, None, None]
    x = x.masked_fill(padding[:, None], 0.0)
    mean = x.sum(-1, keepdim=True) / count
    centred = (x - mean).masked_fill(padding[:, None], 0.0)
    variance = centred.square().sum(-1, keepdim=True) / count
    scale = torch.rsqrt(variance + norm.eps) * norm.weight[:, None]
    return (centred * scale + norm.bias[:, None]).to(norm.weight.dtype)


class ConvLayer(nn.Module):
    """One convolution of the feature encoder, with its norm if it has one, and GELU."""

    def __init__(self, config: Wav2Vec2Config, index: int) -> None:
        super().__init__()
        channels = config.conv_dim[index]
        self.conv = nn.Conv1d(
            config.conv_dim[index - 1] if index else 1,
            channels,
            kernel_size=config.conv_kernel[index],
            stride=config.conv_stride[index],
            bias=config.conv_bias,
        )
        # Both norms are called layer_norm in the checkpoints, and neither uses layer_norm_eps.
        if config.feat_extract_norm == "layer":
            self.layer_norm: nn.Module = nn.LayerNorm(channels)
        elif index == 0:
            self.layer_norm = nn.GroupNorm(channels, channels)
        else:
            self.layer_norm = nn.Identity()

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, C, T), lengths (B,) -> (B, C', T'), (B,)."""
        x = self.conv(x)  # (B, C', T')
        lengths = conv_length(lengths, self.conv.kernel_size[0], self.conv.stride[0])
        if isinstance(self.layer_norm, nn.LayerNorm):
            x = self.layer_norm(x.transpose(1, 2)).transpose(1, 2)
        elif isinstance(self.layer_norm, nn.GroupNorm):
            padding = padding_mask(lengths, x.shape[-1], x.device)
            x = self.layer_norm(x) if padding is None else masked_group_norm(x, padding, self.layer_norm)
        return F.gelu(x), lengths


class FeatureEncoder(nn.Module):
    """Seven convolutions: 16,000 samples a second become 50 feature vectors (paper section 2)."""

    def __init__(self, config: Wav2Vec2Config) -> None:
        super().__init__()
        self.conv_layers = nn.ModuleList(ConvLayer(config, i) for i in range(len(config.conv_dim)))
        self.activation_checkpointing = False

    def forward(self, waveforms: Tensor, num_samples: Tensor) -> tuple[Tensor, Tensor]:
        """waveforms (B, S), num_samples (B,) -> features (B, T, C), num_frames (B,).

        Every valid frame is made of valid samples alone: a window that reaches into the padding starts
        past the last frame that `conv_length` counts.
        """
        x, lengths = waveforms[:, None], num_samples  # (B, 1, S)
        for layer in self.conv_layers:
            x, lengths = maybe_checkpoint(self, layer, x, lengths)
        return x.transpose(1, 2), lengths


class FeatureProjection(nn.Module):
    """From conv channels to the hidden size: norm, linear, dropout."""

    def __init__(self, config: Wav2Vec2Config) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(config.conv_dim[-1], eps=config.layer_norm_eps)
        self.projection = nn.Linear(config.conv_dim[-1], config.hidden_size)
        self.dropout = nn.Dropout(config.feat_proj_dropout)

    def forward(self, features: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, D)."""
        return self.dropout(self.projection(self.layer_norm(features)))


class PositionalConvolution(nn.Module):
    """Relative positions by a wide grouped convolution over time (paper section 2, "Contextualized ...")."""

    def __init__(self, config: Wav2Vec2Config) -> None:
        super().__init__()
        conv = nn.Conv1d(
            config.hidden_size,
            config.hidden_size,
            kernel_size=config.num_conv_pos_embeddings,
            padding=config.num_conv_pos_embeddings // 2,
            groups=config.num_conv_pos_embedding_groups,
        )
        # The parametrization's own load hook accepts weight_g / weight_v, the older spelling, as well.
        self.conv = nn.utils.parametrizations.weight_norm(conv, dim=2)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D); the caller has zeroed padded frames."""
        x = self.conv(hidden.transpose(1, 2))
        return F.gelu(x[..., : hidden.shape[1]]).transpose(1, 2)  # an even kernel gives one frame too many


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

    def forward(self, hidden: Tensor, attend: Tensor | None) -> Tensor:
        """hidden (B, T, D), attend (B, 1, 1, T) True = valid, or None -> (B, T, D)."""
        batch, frames, size = hidden.shape

        def split(x: Tensor) -> Tensor:
            return x.view(batch, frames, self.num_heads, size // self.num_heads).transpose(1, 2)

        q, k, v = (
            split(self.q_proj(hidden)),
            split(self.k_proj(hidden)),
            split(self.v_proj(hidden)),
        )  # (B,H,T,D/H)
        dropout = self.dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=attend, dropout_p=dropout)  # (B, H, T, D/H)
        return self.out_proj(x.transpose(1, 2).reshape(batch, frames, size))


class FeedForward(nn.Module):
    """Two linear layers with GELU between, at every frame alone."""

    def __init__(self, config: Wav2Vec2Config) -> None:
        super().__init__()
        self.intermediate_dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.intermediate_dropout = nn.Dropout(config.activation_dropout)
        self.output_dense = nn.Linear(config.intermediate_size, config.hidden_size)
        self.output_dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D), (B, T, F) between."""
        hidden = self.intermediate_dropout(F.gelu(self.intermediate_dense(hidden)))
        return self.output_dropout(self.output_dense(hidden))


class TransformerLayer(nn.Module):
    """Attention and feed-forward with residuals; the norm after each sum (post) or before each part (pre)."""

    def __init__(self, config: Wav2Vec2Config) -> None:
        super().__init__()
        self.pre_norm = config.do_stable_layer_norm
        self.attention = Attention(config)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward = FeedForward(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden: Tensor, attend: Tensor | None) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        if self.pre_norm:
            hidden = hidden + self.dropout(self.attention(self.layer_norm(hidden), attend))
            return hidden + self.feed_forward(self.final_layer_norm(hidden))
        hidden = self.layer_norm(hidden + self.dropout(self.attention(hidden, attend)))
        return self.final_layer_norm(hidden + self.feed_forward(hidden))


class Transformer(nn.Module):
    """Positions, then the layers. Called ``encoder`` in the checkpoints."""

    def __init__(self, config: Wav2Vec2Config) -> None:
        super().__init__()
        self.pre_norm = config.do_stable_layer_norm
        self.layerdrop = config.layerdrop
        self.pos_conv_embed = PositionalConvolution(config)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.layers = nn.ModuleList(TransformerLayer(config) for _ in range(config.num_hidden_layers))
        self.activation_checkpointing = False

    def forward(self, hidden: Tensor, padding: Tensor | None) -> list[Tensor]:
        """hidden (B, T, D), padding (B, T) -> the input of the first layer and the output of each, (B, T, D).

        The last is the result. In pre-norm the final norm stands after the last layer and is in it.
        """
        if padding is not None:
            hidden = hidden.masked_fill(padding[..., None], 0.0)
        hidden = hidden + self.pos_conv_embed(hidden)
        if not self.pre_norm:
            hidden = self.layer_norm(hidden)
        hidden = self.dropout(hidden)
        attend = None if padding is None else ~padding[:, None, None, :]  # (B, 1, 1, T)

        outputs = [hidden]
        for layer in self.layers:
            # LayerDrop (Fan et al., 2020). A skipped layer still takes part in the graph, so that
            # DistributedDataParallel need not search for unused parameters; the draw is on the CPU.
            if self.training and self.layerdrop > 0 and float(torch.rand(())) < self.layerdrop:
                hidden = hidden + untouched(layer).to(hidden.device)
            else:
                hidden = maybe_checkpoint(self, layer, hidden, attend)
            outputs.append(hidden)
        if self.pre_norm:
            outputs[-1] = self.layer_norm(outputs[-1])
        return outputs


class Wav2Vec2(nn.Module):
    """The encoder: waveforms to one hidden vector per 20 ms.

        encoder = Wav2Vec2(Wav2Vec2Config.named("base"))
        hidden, num_frames = encoder(waveforms, num_samples)

    Weights are random; `ser.load_encoder` reads a folder.
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
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=self.config.initializer_range)
                nn.init.zeros_(module.bias)
            elif isinstance(module, ConvLayer):
                nn.init.kaiming_normal_(module.conv.weight)
                if module.conv.bias is not None:
                    fan_in = module.conv.in_channels * module.conv.kernel_size[0]
                    nn.init.uniform_(module.conv.bias, -(fan_in**-0.5), fan_in**-0.5)
        projection = self.feature_projection.projection
        nn.init.uniform_(projection.weight, -(projection.in_features**-0.5), projection.in_features**-0.5)
        nn.init.uniform_(projection.bias, -(projection.in_features**-0.5), projection.in_features**-0.5)
        conv = self.encoder.pos_conv_embed.conv
        std = 2 / math.sqrt(conv.kernel_size[0] * conv.in_channels)
        conv.weight = torch.randn_like(conv.weight) * std  # through the parametrization: sets g and v
        nn.init.zeros_(conv.bias)
        if self.config.has_mask_embedding:
            nn.init.uniform_(self.masked_spec_embed)

    def activation_checkpointing(self, enabled: bool) -> None:
        """Recompute each layer's activations in the backward pass: less memory, about a third more time."""
        self.feature_extractor.activation_checkpointing = enabled
        self.encoder.activation_checkpointing = enabled

    def layers(
        self,
        waveforms: Tensor,
        num_samples: Tensor | Iterable[int] | None = None,
        *,
        mask_time: Tensor | None = None,
        mask_feature: Tensor | None = None,
    ) -> tuple[list[Tensor], Tensor]:
        """As `forward`, but the transformer's input and each layer's output: num_hidden_layers + 1 tensors."""
        num_samples = self._check(waveforms, num_samples)
        padding = padding_mask(num_samples, waveforms.shape[1], waveforms.device)
        if padding is not None:  # whatever stands there, NaN included, has no effect
            waveforms = waveforms.masked_fill(padding, 0.0)
        features, num_frames = self.feature_extractor(waveforms, num_samples)  # (B, T, C)
        hidden = self.feature_projection(features)  # (B, T, D)
        hidden = self._mask(hidden, mask_time, mask_feature)
        return self.encoder(hidden, padding_mask(num_frames, hidden.shape[1], hidden.device)), num_frames

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
            waveforms: (B, S) float, 16 kHz, as the preprocessor leaves them (usually zero mean and unit
                variance per utterance). Values past ``num_samples`` have no effect.
            num_samples: (B,) valid samples of each, at least `Wav2Vec2Config.min_samples` (400) and at most
                S; best a CPU tensor or a list. None: all S.
            mask_time: (B, T) bool, True where the frame is replaced by the mask embedding (SpecAugment).
            mask_feature: (B, D) bool, True where the channel is zeroed in all frames.

        Returns:
            hidden (B, T, D), one vector per 320 samples, of which num_frames (B,) int64 on the CPU are valid;
            the frames after them hold no information.

        Raises:
            AudioError: an utterance too short for one frame, or lengths that do not fit the batch.
        """
        outputs, num_frames = self.layers(waveforms, num_samples, mask_time=mask_time, mask_feature=mask_feature)
        return outputs[-1], num_frames

    def _check(self, waveforms: Tensor, num_samples: Tensor | Iterable[int] | None) -> Tensor:
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
        for row, count in enumerate(num_samples.tolist()):
            if not self.config.min_samples <= count <= size:
                raise AudioError(
                    f"utterance {row} of the batch has {count} samples; at least {self.config.min_samples} make "
                    f"the first frame, and the batch is {size} long"
                )
        return num_samples

    def _mask(self, hidden: Tensor, mask_time: Tensor | None, mask_feature: Tensor | None) -> Tensor:
        """SpecAugment (Park et al., 2019) on the projected features, hidden (B, T, D)."""
        if mask_time is not None:
            if not self.config.has_mask_embedding:
                raise ConfigError("mask_time needs a mask embedding: mask_time_prob or mask_feature_prob above 0")
            hidden = torch.where(mask_time[..., None], self.masked_spec_embed.to(hidden.dtype), hidden)
        elif self.training and self.config.has_mask_embedding and self.masked_spec_embed.requires_grad:
            hidden = hidden + self.masked_spec_embed[:0].sum()  # as `untouched`: the graph stays the same
        if mask_feature is not None:
            hidden = hidden.masked_fill(mask_feature[:, None, :], 0.0)
        return hidden


def maybe_checkpoint(owner: FeatureEncoder | Transformer, layer: nn.Module, *inputs: Tensor | None):
    """``layer(*inputs)``, recomputed in the backward pass where the owner says so and a gradient is needed."""
    if owner.activation_checkpointing and owner.training and torch.is_grad_enabled():
        return checkpoint(layer, *inputs, use_reentrant=False)
    return layer(*inputs)

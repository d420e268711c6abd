"""Configure the encoder, and define the presets; names and defaults are those of config.json.

One dataclass describes several published architectures; `ARCHITECTURES` says in what they differ:

    wav2vec2        Baevski et al., wav2vec 2.0, NeurIPS 2020
    hubert          Hsu et al., HuBERT, TASLP 2021
    wavlm           Chen et al., WavLM, JSTSP 2022: gated relative position bias in the attention
    data2vec-audio  Baevski et al., data2vec, ICML 2022: a stack of small positional convolutions
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from ser.errors import ConfigError, brief_repr


@dataclass(frozen=True)
class Architecture:
    """Describe what is special in one model_type: a row of `ARCHITECTURES`."""

    classes: str  # the beginning of the names of its classes in `transformers`
    prefix: str  # the prefix of the encoder's keys in checkpoints of classes with heads
    attention: str = "plain"  # its layer in `ATTENTIONS` of ser.models.wav2vec2
    positions: str = "convolution"  # its layer in `POSITIONS` of ser.models.wav2vec2
    # Fields of the configuration that only it uses. In other architectures such a field must have its default.
    fields: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)  # defaults of its config.json that differ from ours
    fixed: Mapping[str, Any] = field(default_factory=dict)  # values that a config.json cannot change


# model_type -> what is special in it. Rows are added before a configuration is made (docs/extending.md).
ARCHITECTURES: dict[str, Architecture] = {
    "wav2vec2": Architecture("Wav2Vec2", "wav2vec2."),
    "hubert": Architecture("Hubert", "hubert.", fields=("feat_proj_layer_norm", "conv_pos_batch_norm")),
    "wavlm": Architecture("WavLM", "wavlm.", attention="gated", fields=("num_buckets", "max_bucket_distance")),
    "data2vec-audio": Architecture(
        "Data2VecAudio",
        "data2vec_audio.",
        positions="stack",
        fields=("conv_pos_kernel_size",),
        defaults={"num_conv_pos_embeddings": 5},
        fixed={"feat_extract_norm": "layer", "do_stable_layer_norm": False},
    ),
}

# Keys that can change the computation in a way that is not implemented here -> the values that change nothing.
# Other values are refused, with the name of the key.
NEUTRAL_VALUES: dict[str, tuple] = {
    "add_adapter": (False, None),
    "adapter_attn_dim": (None,),
    "hidden_act": ("gelu",),
    "feat_extract_activation": ("gelu",),
    "is_decoder": (False, None),
    "add_cross_attention": (False, None),
}


SIZES = (
    "hidden_size num_hidden_layers num_attention_heads intermediate_size num_conv_pos_embeddings "
    "num_conv_pos_embedding_groups num_buckets max_bucket_distance conv_pos_kernel_size mask_time_length "
    "mask_feature_length conv_dim conv_kernel conv_stride"
)
SHARES = (
    "feat_proj_dropout hidden_dropout attention_dropout activation_dropout final_dropout layerdrop "
    "mask_time_prob mask_feature_prob"
)
# (fields, minimum and maximum of each of their numbers, message of the error), in the order of checks
FIELD_RANGES: tuple[tuple[str, float, float, str], ...] = (
    (SIZES, 1, 65_536, "{name} is {value}; sizes from 1 to 65,536 can be built"),
    ("num_hidden_layers", 1, 512, "{name} is {value}; at most 512 can be built"),
    (SHARES, 0, 1, "{name} is {value}; expected a share from 0 to 1"),
    # math.ulp(0.0) is the least number above 0
    ("layer_norm_eps initializer_range", math.ulp(0.0), math.inf, "{names} must be above 0"),
    ("mask_time_min_masks mask_feature_min_masks", 0, math.inf, "{names} must be 0 or more"),
)


def conv_length(length: Tensor, kernel: int, stride: int) -> Tensor:
    """Count the positions, one every ``stride``, at which a window of ``kernel`` fits into ``length``."""
    return (torch.div(length - kernel, stride, rounding_mode="floor") + 1).clamp(min=0)


def owners_of(name: str) -> list[str]:
    """Return the architectures that alone use a field of the configuration; none if all use it."""
    return [model_type for model_type, row in ARCHITECTURES.items() if name in row.fields]


@dataclass(frozen=True)
class Wav2Vec2Config:
    """Hold the configuration of the encoder; names and defaults are those of config.json."""

    model_type: str = "wav2vec2"
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
    # fields of one architecture, see ARCHITECTURES
    feat_proj_layer_norm: bool = True  # HuBERT: a norm before the feature projection
    conv_pos_batch_norm: bool = False  # HuBERT: a batch norm in the place of the weight norm
    num_buckets: int = 320  # WavLM: classes of relative positions, half of them for each direction
    max_bucket_distance: int = 800  # WavLM: from this distance on, in frames, all positions are one class
    conv_pos_kernel_size: int = 19  # data2vec: kernel of positional layers; num_conv_pos_embeddings counts them
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
        """Refuse values that cannot be built, before anything is allocated."""
        self._check_types()
        self._check_architecture()
        for names, least, most, message in FIELD_RANGES:
            for name in names.split():
                value, told = getattr(self, name), names.replace(" ", " and ")
                numbers = value if isinstance(value, tuple) else (value,)
                if not numbers or len(numbers) > 64 or not all(least <= number <= most for number in numbers):
                    raise ConfigError(message.format(name=name, names=told, value=brief_repr(value)))
        self._check_together()

    def _check_types(self) -> None:
        """Refuse values of another type than the default's; convert lists to tuples."""
        for declared in fields(self):
            name, default, value = declared.name, declared.default, getattr(self, declared.name)
            kind = type(default).__name__
            if isinstance(default, tuple):
                kind = "a list of whole numbers"
                fits = isinstance(value, list | tuple) and all(type(v) is int for v in value)
            elif isinstance(default, float):
                fits = type(value) in (int, float) and math.isfinite(value)
            else:
                fits = type(value) is type(default)
            if not fits:
                raise ConfigError(f"{name} is {brief_repr(value)}; expected {kind}, such as {default!r}")
            if isinstance(default, tuple):
                object.__setattr__(self, name, tuple(value))

    def _check_architecture(self) -> None:
        """Refuse an unknown model_type, and values of fields that this architecture lacks or fixes."""
        if self.model_type not in ARCHITECTURES:
            raise ConfigError(
                f"model_type is {brief_repr(self.model_type)}; expected one of {', '.join(ARCHITECTURES)}"
            )
        for declared in fields(self):
            owners, value = owners_of(declared.name), getattr(self, declared.name)
            if owners and self.model_type not in owners and value != declared.default:
                raise ConfigError(
                    f"{declared.name} is {brief_repr(value)} in a configuration of {self.model_type}; "
                    f"only {' or '.join(owners)} has a choice"
                )
        fixed = self.architecture.fixed
        if any(getattr(self, name) != value for name, value in fixed.items()):
            told = (f"{name} {str(v).lower() if isinstance(v, bool) else repr(v)}" for name, v in fixed.items())
            raise ConfigError(f"{self.model_type} has {' and '.join(told)}")

    def _check_together(self) -> None:
        """Refuse values that are valid alone but do not fit together."""
        norm = self.feat_extract_norm
        if norm not in ("group", "layer"):
            raise ConfigError(f"feat_extract_norm is {brief_repr(norm)}; expected 'group' or 'layer'")
        if self.architecture.positions == "stack" and self.num_conv_pos_embeddings > 64:
            raise ConfigError(
                f"num_conv_pos_embeddings is {self.num_conv_pos_embeddings}; in {self.model_type} it counts "
                "layers, of which at most 64 can be built"
            )
        if self.architecture.attention == "gated" and not 4 <= self.num_buckets < 4 * self.max_bucket_distance:
            raise ConfigError(
                f"num_buckets is {self.num_buckets} and max_bucket_distance {self.max_bucket_distance}; expected "
                "at least 4 buckets, and a distance above a quarter of their number"
            )
        if not len(self.conv_dim) == len(self.conv_kernel) == len(self.conv_stride):
            raise ConfigError(
                f"conv_dim, conv_kernel and conv_stride need equal lengths, one entry per convolution; found "
                f"{len(self.conv_dim)}, {len(self.conv_kernel)} and {len(self.conv_stride)}"
            )
        for name in ("num_attention_heads", "num_conv_pos_embedding_groups"):
            if self.hidden_size % (divisor := getattr(self, name)):
                raise ConfigError(f"hidden_size {self.hidden_size} is not a multiple of {name} {divisor}")

    @classmethod
    def from_dict(cls, values: dict) -> Wav2Vec2Config:
        """Read the encoder's part of a config.json; other keys (tokenizer, pre-training heads) are ignored.

        Raises ConfigError for a key that changes the computation in a way that is not implemented, and for
        values of a wrong type or size.
        """
        model_type = values.get("model_type", "wav2vec2")
        if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
            raise ConfigError(f"model_type is {brief_repr(model_type)}; supported: {', '.join(ARCHITECTURES)}")
        for key, neutral in NEUTRAL_VALUES.items():
            if key in values and values[key] not in neutral:
                raise ConfigError(
                    f"the configuration sets {key} = {brief_repr(values[key])}, which changes the computation and "
                    f"is not supported in {model_type}; supported: {' or '.join(repr(v) for v in neutral)}"
                )
        row, names = ARCHITECTURES[model_type], {declared.name for declared in fields(cls)}
        values = {key: value for key, value in values.items() if key in names}
        return cls(**{**row.defaults, **values, **row.fixed})  # the reference also ignores values of fixed fields

    @classmethod
    def named(cls, name: str) -> Wav2Vec2Config:
        """Return the preset called ``name``, such as "base"."""
        if name not in PRESETS:
            close = difflib.get_close_matches(name, PRESETS, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"no preset is called {name!r}; there are {', '.join(PRESETS)}{hint}")
        return PRESETS[name]

    def to_dict(self) -> dict:
        """Return the fields that this architecture uses, as config.json holds them."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
            if self.model_type in (owners_of(name) or [self.model_type])
        }

    @property
    def architecture(self) -> Architecture:
        """Return the row of `ARCHITECTURES` for this model_type."""
        return ARCHITECTURES[self.model_type]

    def num_frames(self, num_samples: Tensor) -> Tensor:
        """Count the frames of ``num_samples`` (any shape, int64): 0 below `min_samples`, then one per hop."""
        for kernel, stride in zip(self.conv_kernel, self.conv_stride, strict=True):
            num_samples = conv_length(num_samples, kernel, stride)
        return num_samples

    @property
    def min_samples(self) -> int:
        """Return the samples that one frame needs: 400 (25 ms) for every public checkpoint."""
        samples = 1
        for kernel, stride in zip(reversed(self.conv_kernel), reversed(self.conv_stride), strict=True):
            samples = (samples - 1) * stride + kernel
        return samples

    @property
    def has_mask_embedding(self) -> bool:
        """Tell whether checkpoints of this configuration hold ``masked_spec_embed``."""
        return self.mask_time_prob > 0 or self.mask_feature_prob > 0


# wav2vec2-base, as the paper fine-tunes it.
_BASE = Wav2Vec2Config(
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
)
# wav2vec2-large-960h, the paper's second model: large, but with group norm and post-norm like base.
_LARGE = replace(_BASE, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
# wav2vec2-large-lv60, large-robust and XLS-R 300M: layer norm and pre-norm.
_LARGE_LV60 = replace(_LARGE, conv_bias=True, feat_extract_norm="layer", do_stable_layer_norm=True)
# A model for CPUs, tests and small corpora, to be trained from scratch: under two million parameters. Convolutions
# get wider as their frame rate falls, so that all cost about the same. It has pre-norm, which trains from scratch
# even at a high rate.
_SMALL = replace(
    _BASE,
    conv_dim=(32, 48, 64, 96, 128, 160, 192),
    hidden_size=192,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=512,
    do_stable_layer_norm=True,
    num_conv_pos_embeddings=32,
    feat_proj_dropout=0.0,
    attention_dropout=0.0,
    activation_dropout=0.0,
    layerdrop=0.0,
    mask_time_length=5,
    mask_time_min_masks=1,
)
PRESETS = {"small": _SMALL, "base": _BASE, "large": _LARGE, "large-lv60": _LARGE_LV60}

"""Define a model of one encoder and several heads, which are trained together.

In Cai et al., *Speech Emotion Recognition with Multi-task Learning*, INTERSPEECH 2021, two heads share a wav2vec
2.0 encoder: an emotion classifier reads the mean of the hidden frames, and a CTC head reads every frame. Others
added a speaker classifier. The regression to arousal, dominance and valence is that of Wagner et al., TPAMI 2023.
The configuration says which of these heads a model has.

    waveforms -> encoder -> one layer or a mean of all -> projector -> pooling -> emotion, speaker, dimensions
                        `-> last layer -> ctc

Shapes: B batch, S samples, T frames, D hidden size, K classes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ser.errors import ConfigError, brief_repr
from ser.models.config import Wav2Vec2Config
from ser.models.heads import HEAD_FORMS, HEADS, POOLINGS, Pooling, initialise, mix_layers, new_linear
from ser.models.kernels import Dropout
from ser.models.wav2vec2 import Wav2Vec2

# head -> the field of `HeadsConfig` with the number of its outputs; for other heads it is in ``others``
SIZES = {"emotion": "num_emotions", "ctc": "vocab_size", "speaker": "num_speakers", "dimensions": "num_dimensions"}


@dataclass(frozen=True)
class HeadsConfig:
    """Describe the heads on the encoder and what they read; a size of 0 means that there is no such part."""

    num_emotions: int = 0
    vocab_size: int = 0  # CTC symbols, including the blank
    num_speakers: int = 0
    num_dimensions: int = 0  # how many of arousal, dominance, valence
    # What pooled heads read: "last", "weighted" (a learnt mean of all layers), or a layer's number as text. "0" is
    # the transformer's input, "1" the output of the first layer.
    layers: str = "last"
    # Whether the final norm of a pre-norm encoder is applied to the last of the weighted layers. It is here, in
    # s3prl, where such models were trained, and in earlier releases of transformers; it is not in transformers 5.
    weighted_final_norm: bool = True
    projection: int = 0  # size of a linear layer on every frame before pooling, as in ForSequenceClassification
    pooling: str = "mean"
    # Forms of `HEAD_FORMS`. Published models have all four combinations: see docs/inference.md.
    emotion_head: str = "linear"
    dimension_head: str = "dense"
    others: Mapping[str, int] = field(default_factory=dict, hash=False)  # sizes of heads that were added to HEADS

    def __post_init__(self) -> None:
        """Refuse sizes and names that cannot be built."""
        self.check_sizes()
        forms, layers = [*HEAD_FORMS], self.layers  # lists, for a value may be unhashable
        number = isinstance(layers, str) and layers.isdecimal() and len(layers) < 4
        for name, right, expected in (
            ("pooling", self.pooling in [*POOLINGS], f"one of {', '.join(POOLINGS)}"),
            ("emotion_head", self.emotion_head in forms, " or ".join(forms)),
            ("dimension_head", self.dimension_head in forms, " or ".join(forms)),
            ("weighted_final_norm", type(self.weighted_final_norm) is bool, "true or false"),
            ("layers", number or layers in ("last", "weighted"), "last, weighted, or the number of a layer"),
        ):
            if not right:
                raise ConfigError(f"{name} is {brief_repr(getattr(self, name))}; expected {expected}")

    def check_sizes(self) -> None:
        """Refuse sizes that are not a number of outputs, and heads that are not in `HEADS`."""
        if missing := [name for name in self.others if name not in HEADS]:
            raise ConfigError(
                f"there is no head called {missing[0]!r}; add its row to ser.models.heads.HEADS first"
            )
        sizes = {f.name: getattr(self, f.name) for f in fields(self) if f.type == "int"}
        for name, value in {**sizes, **self.others}.items():
            if type(value) is not int or not 0 <= value <= 1_000_000:
                raise ConfigError(f"{name} is {brief_repr(value)}; expected a whole number from 0 to 1,000,000")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, except default values of fields that earlier versions lacked."""
        default = HeadsConfig()
        later = ("emotion_head", "dimension_head", "others")
        return {k: v for k, v in asdict(self).items() if k not in later or v != getattr(default, k)}

    @property
    def sizes(self) -> dict[str, int]:
        """Map each head of `HEADS`, in order, to the number of its outputs; 0 if the model lacks it."""
        usual = {head: getattr(self, field) for head, field in SIZES.items()}
        return {name: usual.get(name, self.others.get(name, 0)) for name in HEADS}

    def form(self, head: str) -> str:
        """Return the form of a head, one of `HEAD_FORMS`."""
        return {"emotion": self.emotion_head, "dimensions": self.dimension_head}.get(head, HEADS[head].form)


class Outputs(NamedTuple):
    """Hold the unnormalised scores of the heads that the model has."""

    # head -> (B, K), or (B, T, V) for a head that reads frames; dimensions have the scale of the labels
    scores: dict[str, Tensor]
    num_frames: Tensor  # (B,) int64 on the CPU: valid frames

    def __getattr__(self, head: str) -> Tensor | None:
        """Return the scores of a head in `HEADS`, such as ``outputs.emotion``; None if the model lacks it."""
        if head not in HEADS:
            raise AttributeError(f"there is no head called {head!r}")
        return self.scores.get(head)


class MultiTaskModel(nn.Module):
    """Compute the scores of every head from waveforms: an encoder and the heads of `HEADS` that it has."""

    cls_head: nn.Module | None
    lm_head: nn.Linear | None
    speaker_head: nn.Linear | None
    dimension_head: nn.Module | None

    def __init__(self, config: Wav2Vec2Config, heads: HeadsConfig) -> None:
        super().__init__()
        self.config, self.heads_config = config, heads
        self.wav2vec2 = Wav2Vec2(config)
        self.dropout = Dropout(config.final_dropout)
        deepest = config.num_hidden_layers
        # The layer whose output pooled heads read; None: a weighted mean of all.
        named = {"weighted": None, "last": deepest}
        self.layer = named[heads.layers] if heads.layers in named else int(heads.layers)
        if self.layer is not None and self.layer > deepest:
            raise ConfigError(f"layers is {heads.layers!r}, but the encoder has {deepest} layers")
        if self.layer is None:
            self.layer_weights = nn.Parameter(torch.zeros(deepest + 1))
        width = heads.projection or config.hidden_size
        spread = config.initializer_range
        self.projector = new_linear(config.hidden_size, width, spread) if heads.projection else None
        self.pooling = Pooling(heads.pooling, width, spread)
        pooled = self.pooling.output_size
        for name, outputs in heads.sizes.items():
            inputs = pooled if HEADS[name].reads == "pooled" else config.hidden_size
            make = partial(HEAD_FORMS[heads.form(name)], dropout=config.final_dropout, initializer_range=spread)
            setattr(self, HEADS[name].key, make(inputs, outputs) if outputs else None)

    def head(self, name: str) -> nn.Module | None:
        """Return the head called "emotion", "ctc" or another name in `HEADS`, or None."""
        return getattr(self, HEADS[name].key, None)

    def names_on_encoder(self) -> list[str]:
        """Return the names of the tensors outside the encoder: of heads, pooling and so on."""
        return [name for name in self.state_dict() if not name.startswith("wav2vec2.")]

    @property
    def heads(self) -> list[str]:
        """Return the names of the heads that the model has."""
        return [name for name in HEADS if self.head(name) is not None]

    def reads(self, what: str) -> bool:
        """Tell whether some head reads "pooled" (a vector per utterance) or "frames" (those of the last layer)."""
        return any(HEADS[name].reads == what for name in self.heads)

    def initialise(self, part: str) -> None:
        """Draw the weights of a head, "projector", "pooling" or "layer_weights"; it may be on the meta device."""
        if part == "layer_weights":
            self.layer_weights = nn.Parameter(torch.zeros(self.config.num_hidden_layers + 1))
        else:
            initialise(getattr(self, part).to_empty(device="cpu"), self.config.initializer_range)

    def untrained_by(self, tasks: Collection[str]) -> Iterator[nn.Parameter]:
        """Yield the parameters that have no gradient when only ``tasks`` (names of heads) have a loss."""
        parts: list[nn.Module | None] = [self.head(name) for name in HEADS if name not in tasks]
        if not any(HEADS[task].reads == "pooled" for task in tasks):
            parts += [self.projector, self.pooling]
            if self.layer is None:
                yield self.layer_weights
        if not tasks:
            parts.append(self.wav2vec2)
        elif all(HEADS[task].reads == "pooled" for task in tasks):  # the layers after the last one that is read
            transformer, deepest = self.wav2vec2.encoder, self.config.num_hidden_layers
            used = deepest if self.layer is None else self.layer
            parts.append(transformer.layers[used:])
            normed = self.heads_config.weighted_final_norm if self.layer is None else used == deepest
            if transformer.pre_norm and not normed:
                parts.append(transformer.layer_norm)
        for part in parts:
            if part is not None:
                yield from part.parameters()

    def freeze(self, part: str) -> None:
        """Stop training "feature-encoder" (the convolutions), "encoder" (all of wav2vec 2.0) or "none".

        A frozen part needs no gradient and runs in eval mode: without dropout, LayerDrop or masks. Call it
        before DistributedDataParallel wraps the model.
        """
        parts = {"none": None, "feature-encoder": self.wav2vec2.feature_extractor, "encoder": self.wav2vec2}
        if part not in parts:
            raise ConfigError(f"freeze is {part!r}; expected one of {', '.join(parts)}")
        frozen = parts[part]
        if frozen is not None:
            frozen.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> MultiTaskModel:
        """Set the mode as `nn.Module.train` does, but leave frozen parts in eval mode."""
        super().train(mode)
        for part in (self.wav2vec2, self.wav2vec2.feature_extractor):
            if not any(p.requires_grad for p in part.parameters()):
                part.eval()
        return self

    def forward(
        self,
        waveforms: Tensor | None = None,
        num_samples: Tensor | None = None,
        *,
        features: Tensor | None = None,
        pooled: Tensor | None = None,
        mask_time: Tensor | None = None,
        mask_feature: Tensor | None = None,
    ) -> Outputs:
        """Compute the scores of every head from waveforms (B, S) and num_samples (B,), as in `Wav2Vec2.forward`.

        Cached values may be given instead of waveforms: ``features`` (B, T, C) as in `Wav2Vec2.layers`, or
        ``pooled`` (B, N, D) from `layer_means`.
        """
        if pooled is not None:
            assert num_samples is not None
            weights = self.layer_weights.softmax(-1) if self.layer is None else pooled.new_ones(1)
            vector = (weights[:, None] * pooled).sum(1)  # (B, D)
            vector = vector if self.projector is None else self.projector(vector)
            return Outputs(self.score("pooled", vector), self.config.num_frames(num_samples))
        outputs, raw, num_frames = self.encode(
            waveforms, num_samples, features=features, mask_time=mask_time, mask_feature=mask_feature
        )
        last = self.dropout(outputs[-1])
        scores = self.score("frames", last)
        if self.reads("pooled"):
            scores |= self.score("pooled", self.pool(outputs, raw, last, num_frames))
        return Outputs(scores, num_frames)

    def score(self, reads: str, hidden: Tensor) -> dict[str, Tensor]:
        """Return the scores of the heads that read "pooled", hidden (B, D), or "frames", hidden (B, T, D)."""
        return {name: self.head(name)(hidden) for name in self.heads if HEADS[name].reads == reads}  # type: ignore[misc]

    def encode(
        self, waveforms: Tensor | None, num_samples: Tensor | None, **rest: Tensor | None
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """Return the layers that heads read, the last one again without the final norm, and num_frames."""
        deepest = None if self.reads("frames") else self.layer
        outputs, num_frames = self.wav2vec2.layers(  # (B, T, D) each
            waveforms, num_samples, **rest, num_layers=deepest, final_norm=False
        )
        raw = outputs[-1]
        if len(outputs) > self.config.num_hidden_layers:
            outputs[-1] = self.wav2vec2.encoder.final_norm(raw)
        return outputs, raw, num_frames

    def read_layers(self, outputs: list[Tensor], raw: Tensor) -> list[Tensor]:
        """Return the layers that pooled heads read: one, or all for a weighted mean."""
        if self.layer is not None:
            return [outputs[self.layer]]
        return outputs if self.heads_config.weighted_final_norm else [*outputs[:-1], raw]

    def layer_means(self, waveforms: Tensor, num_samples: Tensor) -> Tensor:
        """Return the mean over time of each layer that pooled heads read, (B, N, D).

        With mean pooling and without dropout before it, these means can replace the frames, because the mean over
        time commutes with the sum over layers and with the projector.
        """
        outputs, raw, num_frames = self.encode(waveforms, num_samples)
        mean = Pooling("mean", self.config.hidden_size)
        return torch.stack([mean(layer, num_frames) for layer in self.read_layers(outputs, raw)], dim=1)

    def pool(self, outputs: list[Tensor], raw: Tensor, last: Tensor, num_frames: Tensor) -> Tensor:
        """Pool the layers to one vector per utterance, (B, D) or (B, 2D).

        ``outputs`` are the layers. ``raw`` is the last layer before the final norm, and ``last`` is the last layer
        after the final norm and dropout.
        """
        if self.layer is None:
            hidden = self.dropout(mix_layers(self.read_layers(outputs, raw), self.layer_weights))
        else:
            # If this is the last layer, the CTC head reads it with the same dropout.
            hidden = last if self.layer == len(outputs) - 1 else self.dropout(outputs[self.layer])
        if self.projector is not None:
            hidden = self.projector(hidden)
        return self.pooling(hidden, num_frames).to(hidden.dtype)

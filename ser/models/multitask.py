"""One encoder and up to three heads, trained together.

Cai et al., *Speech Emotion Recognition with Multi-task Learning*, INTERSPEECH 2021: an emotion classifier on
the mean of the hidden frames and a CTC head on every frame share a wav2vec 2.0 encoder; a speaker classifier
is the extension by others. Which heads there are is configuration, and each may be absent.

Shapes: B batch, S samples, T frames, D hidden size, K classes, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from ser.errors import ConfigError
from ser.models.heads import POOLINGS, new_linear, pool
from ser.models.wav2vec2 import Wav2Vec2, Wav2Vec2Config


@dataclass(frozen=True)
class HeadsConfig:
    """Which heads stand on the encoder; a size of 0 means that there is no such head."""

    num_emotions: int = 0
    vocab_size: int = 0  # CTC symbols, the blank included
    num_speakers: int = 0
    pooling: str = "mean"

    def __post_init__(self) -> None:
        """Refuse sizes and names that cannot be built."""
        for name in ("num_emotions", "vocab_size", "num_speakers"):
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value <= 1_000_000:
                raise ConfigError(f"{name} is {value!r}; expected a whole number from 0 to 1,000,000")
        if self.pooling not in POOLINGS:
            raise ConfigError(f"pooling is {self.pooling!r}; expected one of {', '.join(POOLINGS)}")


class Outputs(NamedTuple):
    """Unnormalised scores; None where the model has no such head."""

    emotion: Tensor | None  # (B, K)
    ctc: Tensor | None  # (B, T, V)
    speaker: Tensor | None  # (B, K)
    num_frames: Tensor  # (B,) int64 on the CPU: valid frames of ctc


# head name -> attribute, which is the checkpoint's key: lm_head as in Wav2Vec2ForCTC, cls_head as in the
# paper's code
HEADS = {"emotion": "cls_head", "ctc": "lm_head", "speaker": "speaker_head"}


class MultiTaskModel(nn.Module):
    """wav2vec 2.0 with emotion, CTC and speaker heads."""

    cls_head: nn.Linear | None
    lm_head: nn.Linear | None
    speaker_head: nn.Linear | None

    def __init__(self, config: Wav2Vec2Config, heads: HeadsConfig) -> None:
        super().__init__()
        self.config, self.heads_config = config, heads
        self.wav2vec2 = Wav2Vec2(config)
        self.dropout = nn.Dropout(config.final_dropout)
        pooled = config.hidden_size * POOLINGS[heads.pooling]
        sizes = {
            "emotion": (pooled, heads.num_emotions),
            "ctc": (config.hidden_size, heads.vocab_size),
            "speaker": (pooled, heads.num_speakers),
        }
        for name, (inputs, outputs) in sizes.items():
            head = new_linear(inputs, outputs, config.initializer_range) if outputs else None
            setattr(self, HEADS[name], head)

    def head(self, name: str) -> nn.Linear | None:
        """The head called "emotion", "ctc" or "speaker", or None."""
        return getattr(self, HEADS[name])

    @property
    def heads(self) -> list[str]:
        """Names of the heads that exist."""
        return [name for name in HEADS if self.head(name) is not None]

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

    @property
    def encoder_frozen(self) -> bool:
        """Whether no part of wav2vec 2.0 is trained."""
        return not any(p.requires_grad for p in self.wav2vec2.parameters())

    def train(self, mode: bool = True) -> MultiTaskModel:
        """As `nn.Module.train`, but frozen parts stay in eval mode."""
        super().train(mode)
        for part in (self.wav2vec2, self.wav2vec2.feature_extractor):
            if not any(p.requires_grad for p in part.parameters()):
                part.eval()
        return self

    def forward(
        self,
        waveforms: Tensor,
        num_samples: Tensor | None = None,
        *,
        mask_time: Tensor | None = None,
        mask_feature: Tensor | None = None,
    ) -> Outputs:
        """waveforms (B, S), num_samples (B,) as in `Wav2Vec2.forward` -> the scores of every head."""
        hidden, num_frames = self.wav2vec2(
            waveforms, num_samples, mask_time=mask_time, mask_feature=mask_feature
        )  # (B, T, D)
        hidden = self.dropout(hidden)
        emotion = speaker = None
        if self.cls_head is not None or self.speaker_head is not None:
            pooled = pool(hidden, num_frames, self.heads_config.pooling).to(hidden.dtype)
            emotion = self.cls_head(pooled) if self.cls_head is not None else None
            speaker = self.speaker_head(pooled) if self.speaker_head is not None else None
        ctc = self.lm_head(hidden) if self.lm_head is not None else None
        return Outputs(emotion, ctc, speaker, num_frames)

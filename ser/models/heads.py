"""Define the parts on top of the encoder: the mean of layers, pooling over valid frames, and the heads.

Shapes: B batch, T frames, D hidden size, K classes or dimensions, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ser.errors import ConfigError
from ser.models.kernels import Dropout

# name -> size of the result, in multiples of the hidden size
POOLINGS = {"mean": 1, "mean+std": 2, "attentive": 2, "sum": 1, "max": 1}
ATTENTION_SIZE = 128  # size of the hidden layer in attentive pooling, as in the paper


def initialise(module: nn.Module, initializer_range: float) -> None:
    """Draw the weights of the linear layers of ``module`` from normal(0, initializer_range); biases are zero."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=initializer_range)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class Pooling(nn.Module):
    """Pool the valid frames of an utterance to one vector.

    "mean" is what the code of Cai et al. does. (Their text says sum, but a sum grows with the length.) "sum" and
    "max" are the other two modes of a widespread notebook (``pooling_mode``), here over valid frames. "mean+std"
    appends the standard deviation over time, as in x-vectors (Snyder et al., 2018). "attentive" is the same, with
    frames weighted by a learnt score (attentive statistics pooling, Okabe et al., Interspeech 2018, eq. 2 to 6).
    """

    def __init__(self, method: str, size: int, initializer_range: float = 0.02) -> None:
        super().__init__()
        if method not in POOLINGS:
            raise ConfigError(f"pooling is {method!r}; expected one of {', '.join(POOLINGS)}")
        self.method = method
        self.output_size = size * POOLINGS[method]
        if method == "attentive":
            self.dense = nn.Linear(size, ATTENTION_SIZE)
            self.score = nn.Linear(ATTENTION_SIZE, 1, bias=False)  # a bias would shift all scores alike
            initialise(self, initializer_range)

    def forward(self, hidden: Tensor, num_frames: Tensor) -> Tensor:
        """Pool hidden (B, T, D) over num_frames (B,) to (B, D) or (B, 2D), in float32 or wider.

        In half precision, a mean over a thousand frames would lose accuracy.
        """
        count = num_frames.to(hidden.device, non_blocking=True)[:, None]  # (B, 1)
        padding = torch.arange(hidden.shape[1], device=hidden.device) >= count  # (B, T)
        hidden = hidden.masked_fill(padding[..., None], 0.0)
        scores = self.score(self.dense(hidden).tanh())[..., 0] if self.method == "attentive" else None  # (B, T)
        hidden = hidden.float() if hidden.dtype in (torch.float16, torch.bfloat16) else hidden
        if self.method == "max":
            return hidden.masked_fill(padding[..., None], -torch.inf).amax(1)
        if self.method == "sum":
            return hidden.sum(1)
        if scores is None:
            mean = hidden.sum(1) / count  # (B, D)
        else:
            weights = scores.to(hidden.dtype).masked_fill(padding, -torch.inf).softmax(-1)[..., None]  # (B, T, 1)
            mean = (weights * hidden).sum(1)
        if self.method == "mean":
            return mean
        squares = (hidden - mean[:, None]).masked_fill(padding[..., None], 0.0).square()
        variance = squares.sum(1) / count if scores is None else (weights * squares).sum(1)
        # The minimum keeps the gradient finite if a channel is constant, as in an utterance of one frame.
        return torch.cat([mean, variance.clamp(min=1e-7).sqrt()], dim=-1)


def new_linear(inputs: int, outputs: int, initializer_range: float) -> nn.Linear:
    """Make a linear layer with weights from normal(0, initializer_range) and zero bias."""
    layer = nn.Linear(inputs, outputs)
    initialise(layer, initializer_range)
    return layer


class DenseHead(nn.Module):
    """Compute scores from a pooled vector: linear, tanh, dropout, linear, without a final activation.

    This head predicts arousal, dominance and valence in the model of Wagner et al. (*Dawn of the Transformer Era
    in Speech Emotion Recognition*, TPAMI 2023), and emotions in ``Wav2Vec2ForSpeechClassification`` of a
    widespread notebook.
    """

    def __init__(self, inputs: int, outputs: int, *, dropout: float, initializer_range: float) -> None:
        super().__init__()
        self.dense = new_linear(inputs, inputs, initializer_range)
        self.dropout = Dropout(dropout)
        self.out_proj = new_linear(inputs, outputs, initializer_range)

    def forward(self, pooled: Tensor) -> Tensor:
        """Compute scores (B, K) of pooled vectors (B, D)."""
        return self.out_proj(self.dropout(self.dense(pooled).tanh()))


def mix_layers(layers: list[Tensor], layer_weights: Tensor) -> Tensor:
    """Return the mean (B, T, D) of N layers (B, T, D), weighted by the softmax of layer_weights (N,).

    SUPERB does the same (Yang et al., Interspeech 2021, section 3).
    """
    weights = layer_weights.softmax(-1)
    mixed = weights[0] * layers[0]
    for weight, layer in zip(weights[1:], layers[1:], strict=True):
        mixed = mixed + weight * layer
    return mixed


def linear_head(inputs: int, outputs: int, *, dropout: float, initializer_range: float) -> nn.Module:
    """Make the simplest head, one linear layer; it has no dropout of its own."""
    return new_linear(inputs, outputs, initializer_range)


# form -> function that makes a head of this form, called with (inputs, outputs, dropout=, initializer_range=)
HEAD_FORMS: dict[str, Callable[..., nn.Module]] = {"linear": linear_head, "dense": DenseHead}


@dataclass(frozen=True)
class Head:
    """Describe a head.

    Attributes:
        key: the attribute of the model, and so the first part of the head's keys in a checkpoint.
        reads: "pooled", one vector per utterance, or "frames", every frame of the last layer.
        form: one of `HEAD_FORMS`.
    """

    key: str
    reads: str = "pooled"
    form: str = "linear"

    def __post_init__(self) -> None:
        """Refuse an unknown value of ``reads`` or ``form`` (ConfigError)."""
        if self.reads not in ("pooled", "frames") or self.form not in HEAD_FORMS:
            raise ConfigError(f"{self}: expected reads pooled or frames, and the form {' or '.join(HEAD_FORMS)}")


# The heads by name. lm_head is the name in Wav2Vec2ForCTC, cls_head that in the paper's code. The labels of a head
# are a row of `ser.data.labels.LABELS`, its loss is a row of `ser.train.losses.LOSSES`.
HEADS = {
    "emotion": Head("cls_head"),
    "ctc": Head("lm_head", reads="frames"),
    "speaker": Head("speaker_head"),
    "dimensions": Head("dimension_head", form="dense"),
}

"""Every setting of a training run, its meaning, unit and default, written once.

The command line of ``examples/train_iemocap.py`` is made from these fields, so help and behaviour cannot differ.
Defaults are the paper's (Cai et al., 2021, section 3.2) where it gives one.
"""

from __future__ import annotations

import argparse
import difflib
import math
import types
import typing
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from ser.audio import SAMPLE_RATE
from ser.errors import ConfigError
from ser.models.heads import HEADS, POOLINGS

# metric -> whether larger is better
METRICS = {
    "unweighted_accuracy": True,
    "accuracy": True,
    "macro_f1": True,
    "ccc": True,
    "wer": False,
    "cer": False,
    "speaker_accuracy": True,
    "loss": False,
}


def option(default: Any, text: str, choices: tuple[str, ...] = ()) -> Any:
    """A field with its help text."""
    return field(default=default, metadata={"help": text, "choices": choices})


def parse_interval(text: str, name: str) -> tuple[int, str]:
    """ "2ep" -> (2, "epochs"), "500" -> (500, "updates")."""
    number, unit = (text[:-2], "epochs") if text.endswith("ep") else (text, "updates")
    if not number.isdecimal() or int(number) < 1:
        raise ConfigError(
            f"{name} is {text!r}; expected a number of updates such as 500, or of epochs such as 1ep"
        )
    return int(number), unit


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a run. Frozen, checked on construction, saved as JSON beside the checkpoints."""

    # what is learnt
    heads: str = option("auto", f"comma-separated tasks out of {', '.join(HEADS)}; auto: emotion, ctc "
                                "where the training data has them, speaker if beta is above 0")  # fmt: skip
    alpha: float = option(0.1, "weight of the CTC loss; 0 adds exactly nothing")
    beta: float = option(0.0, "weight of the speaker loss")
    gamma: float = option(1.0, "weight of the loss of dimensions (arousal, dominance, valence), 1 - CCC over an "
                               "update: it needs large ones, such as an effective batch of 32")  # fmt: skip
    layers: str = option("auto", "what the heads but CTC's read: last, weighted (a learnt mean of all), or the "
                                 "number of a layer; auto: as --init has it, else last")  # fmt: skip
    pooling: str = option("auto", "how frames become one vector for emotion, speaker and dimensions; auto: as "
                                  "--init has it, else mean", ("auto", *POOLINGS))  # fmt: skip
    label_smoothing: float = option(0.0, "of the emotion loss, 0 to 1")
    class_weights: bool = option(False, "weight emotions inversely to their frequency in training")
    ctc_per_character: bool = option(False, "divide each transcript's loss by its length (the paper does not)")
    freeze: str = option("none", "part that is not trained", ("none", "feature-encoder", "encoder"))
    cache: str = option("", "folder in which what a frozen part makes of each recording is kept, so that it is "
                            "computed once; may be shared by runs; empty: none")  # fmt: skip
    cache_dtype: str = option("fp16", "how the cache keeps numbers: fp16 rounds to three digits, fp32 does not "
                                      "round and takes twice the room", ("fp16", "fp32"))  # fmt: skip
    # how long and how fast
    epochs: int = option(100, "passes over the training data")
    rate: float = option(5e-5, "peak learning rate of the encoder")
    head_rate: float = option(0.0, "peak learning rate of the heads; 0: the same as rate")
    warmup: float = option(0.1, "share of updates with a linearly rising rate, 0 to 1; linear decay to 0 follows")
    weight_decay: float = option(0.0, "AdamW's, on weight matrices; never on biases, norms and embeddings")
    adam_beta2: float = option(0.999, "AdamW's second decay rate")
    clip: float = option(1.0, "largest gradient norm of an update; 0: no limit")
    # how the work is cut
    micro_batch: int = option(0, "most utterances in one forward pass of one process (not with batch-seconds); 0: "
                                 "as many as micro-seconds allows, or 1 where accumulate is given")  # fmt: skip
    micro_seconds: float = option(40.0, "where neither micro-batch nor accumulate is given, most padded seconds "
                                        "of audio in one forward pass of one process; 0: no limit")  # fmt: skip
    accumulate: int = option(0, "micro-batches per update and process; 0: follows from the effective batch")
    effective_batch: int = option(
        0, "utterances per update over all processes; 0: follows from accumulate, else 8"
    )
    batch_seconds: float = option(0.0, "padded seconds of audio per update over all processes, instead of the "
                                       "effective batch; 0: off")  # fmt: skip
    batching: str = option("bucket", "utterances of like length together, or as drawn", ("bucket", "random"))
    max_seconds: float = option(
        0.0, "drop longer training utterances, in seconds; 0: keep all. Evaluation drops none"
    )
    activation_checkpointing: bool = option(False, "recompute activations: less memory, about a third more time")
    amp: str = option("off", "automatic mixed precision", ("off", "bf16", "fp16"))
    device: str = option("auto", "auto, cpu, cuda or cuda:N; auto is a GPU per process where there is one")
    workers: int = option(0, "processes per rank that decode audio; 0: the training process decodes")
    on_bad_audio: str = option("fail", "what becomes of recordings that cannot be read: end the run, or leave "
                                       "them out, named in skipped.jsonl", ("fail", "skip"))  # fmt: skip
    max_bad_audio: float = option(0.01, "largest share of the training set, and of the validation set, that skip "
                                        "may leave out, 0 to 1; beyond it the run ends")  # fmt: skip
    seed: int = option(0, "of new weights, order, dropout and masks")
    timeout: float = option(600.0, "seconds that a process waits for another, or for a loader worker, before the "
                                   "run ends with an error")  # fmt: skip
    max_skipped: int = option(10, "updates in a row without a finite loss and gradient that end the run")
    # what is kept and shown
    eval_every: str = option("1ep", "evaluate every N epochs (Nep) or N updates (N)")
    save_every: str = option("1ep", "save a checkpoint every N epochs (Nep) or N updates (N)")
    keep: int = option(2, "checkpoints to keep, the newest; that of the best evaluation stays too")
    log_every: int = option(10, "updates between progress lines")
    metric: str = option("auto", "what the best model is chosen by on validation data; auto: unweighted_accuracy,"
                                 " else wer", ("auto", *METRICS))  # fmt: skip
    early_stop: int = option(0, "end after N evaluations without improvement; 0: never")
    eval_seconds: float = option(0.0, "padded seconds of audio per forward pass in evaluation; 0: as in "
                                      "prediction, 16 on a CPU and 64 on a GPU")  # fmt: skip

    def __post_init__(self) -> None:
        """Refuse values out of range, before anything is read."""
        for f in fields(self):
            value = getattr(self, f.name)
            if f.metadata["choices"] and value not in f.metadata["choices"]:
                close = difflib.get_close_matches(str(value), f.metadata["choices"], n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise ConfigError(f"{f.name} is {value!r}; expected {' or '.join(f.metadata['choices'])}{hint}")
            if isinstance(value, int | float) and not (value >= 0 and value < float("inf")):
                raise ConfigError(f"{f.name} is {value}; expected a number from 0")
        for name in ("label_smoothing", "warmup", "adam_beta2", "max_bad_audio"):
            if getattr(self, name) > 1 or self.adam_beta2 == 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected a share from 0 to 1")
        for name in (
            "epochs",
            "log_every",
            "keep",
            "rate",
            "timeout",
            "max_skipped",
        ):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected more than 0")
        if self.batch_seconds and self.effective_batch:
            raise ConfigError("give batch_seconds or effective_batch, not both: each says how large an update is")
        parse_interval(self.eval_every, "eval_every")
        parse_interval(self.save_every, "save_every")
        unknown = [h for h in self.heads.split(",") if h not in HEADS and self.heads != "auto"]
        if unknown:
            raise ConfigError(f"heads names {', '.join(unknown)}; there are {', '.join(HEADS)} (or auto)")

    def resolved_effective_batch(self, world_size: int) -> int | None:
        """Utterances per update over all ranks; None where padded seconds decide.

        Raises ConfigError where effective batch, ranks, micro-batch and accumulation contradict each other.
        """
        if self.batch_seconds:
            return None
        micro_batch = self.micro_batch or 1
        product = world_size * micro_batch * self.accumulate
        if self.accumulate and not self.effective_batch:
            return product
        effective_batch = self.effective_batch or 8
        if self.accumulate and product != effective_batch:
            raise ConfigError(
                f"effective_batch {effective_batch} is not {world_size} processes x micro_batch "
                f"{micro_batch} x accumulate {self.accumulate} = {product}; leave one of them out"
            )
        if effective_batch % (world_size * micro_batch):
            raise ConfigError(
                f"effective_batch {effective_batch} cannot be divided by {world_size} processes x "
                f"micro_batch {micro_batch}"
            )
        return effective_batch

    def micro_limits(self, world_size: int) -> dict[str, int | None]:
        """What bounds a forward pass, as `ser.data.sampler.cut_update` takes it: utterances, or padded samples."""
        seconds = self.batch_seconds / (world_size * self.accumulate) if self.accumulate else self.micro_seconds
        if self.batch_seconds or not (self.micro_batch or self.accumulate):
            return {"micro_batch": None, "micro_samples": math.ceil(seconds * SAMPLE_RATE) or None}
        return {"micro_batch": self.micro_batch or 1, "micro_samples": None}

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


def paper_settings(*, alpha: float | None = None, large: bool = False, script: bool = False) -> dict[str, Any]:
    """The settings of Cai et al., as their text gives them, or as their training script acts (``script``).

    The text (section 3.2): AdamW, linear warm-up over 10 % and linear decay, rate 5e-5 (1e-5 without CTC), 100
    epochs, batches of 8 as 2 devices x 1 x 4, nothing frozen, alpha 0.1 (README: 0.01 for large-960h). The script:
    no warm-up, 200 epochs, 2 per device x 4, activation checkpointing; its mean of CE and sum of CTC over the two
    make alpha act as twice what is given.

    Args:
        alpha: the paper's, where it is not the default: 0 in the ablation.
        large: whether the encoder is large-960h.
        script: as the script acts.
    """
    chosen = (0.01 if large else 0.1) if alpha is None else alpha
    settings: dict[str, Any] = {
        "alpha": 2 * chosen if script else chosen,
        "rate": 5e-5 if chosen else 1e-5,
        "head_rate": 0.0,
        "adam_beta2": 0.999,
        "weight_decay": 0.0,
        "clip": 1.0,
        "warmup": 0.0 if script else 0.1,
        "epochs": 200 if script else 100,
        "batching": "random",
        "freeze": "none",
        "pooling": "mean",
        "layers": "last",
        "activation_checkpointing": script,
    }
    return settings | ({"micro_batch": 2, "accumulate": 4} if script else {"micro_batch": 1, "effective_batch": 8})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One flag for each field of `TrainConfig`, with its help and default."""
    types_ = typing.get_type_hints(TrainConfig)
    for f in fields(TrainConfig):
        flag = "--" + f.name.replace("_", "-")
        help_ = f"{f.metadata['help']} (default: {f.default})".replace("%", "%%")
        if types_[f.name] is bool:
            parser.add_argument(flag, action="store_true", help=help_)
        else:
            choices = f.metadata["choices"] or None
            parser.add_argument(flag, type=types_[f.name], default=f.default, choices=choices, help=help_)


def from_arguments(namespace: argparse.Namespace | types.SimpleNamespace) -> TrainConfig:
    """The `TrainConfig` that parsed flags ask for."""
    return TrainConfig(**{f.name: getattr(namespace, f.name) for f in fields(TrainConfig)})

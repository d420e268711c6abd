"""Define each setting of a training run once: meaning, unit, default, range, and what resuming may change.

The command line is made from these fields, so its help cannot differ from what the code does. A default is the
paper's value (Cai et al., 2021, section 3.2) where the paper gives one.
"""

import argparse
import difflib
import math
import types
import typing
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from ser.audio import SAMPLE_RATE
from ser.data.augment import augmented
from ser.data.sampler import MicroLimits
from ser.errors import ConfigError
from ser.models.heads import HEADS, POOLINGS
from ser.train.optim import SCHEDULES

METRICS = ("unweighted_accuracy", "accuracy", "macro_f1", "ccc", "wer", "cer", "speaker_accuracy", "loss")
ERROR_METRICS = ("wer", "cer", "loss")  # metrics whose smaller value is better

# Titles of the groups of flags in the help, in their order.
COMMON, LOSSES, OPTIMIZER = "training: common settings", "training: heads and losses", "training: optimizer"
BATCHES, KEPT, FAULTS = "training: batches and memory", "training: evaluation and checkpoints", "training: faults"
GROUPS = (COMMON, LOSSES, OPTIMIZER, BATCHES, KEPT, FAULTS)


# ------------------------------------------------------------------------------------------- what a value may be


def at_least_0(name: str, value: float) -> None:
    """Refuse a value that is not a finite number of at least 0."""
    if not 0 <= value < math.inf:
        raise ConfigError(f"{name} is {value}; expected a number from 0")


def above_0(name: str, value: float) -> None:
    """Refuse a value that is not a finite number above 0."""
    at_least_0(name, value)
    if value == 0:
        raise ConfigError(f"{name} is {value}; expected more than 0")


def share(name: str, value: float) -> None:
    """Refuse a value that is not between 0 and 1."""
    at_least_0(name, value)
    if value > 1:
        raise ConfigError(f"{name} is {value}; expected a share from 0 to 1")


def share_below_1(name: str, value: float) -> None:
    """Refuse a value that is not between 0 and 1, and 1 itself."""
    share(name, value)
    if value == 1:
        raise ConfigError(f"{name} is {value}; expected a share from 0 to 1, and not 1")


def parse_interval(name: str, value: str) -> tuple[int, str]:
    """Read an interval: "2ep" -> (2, "epochs"), "500" -> (500, "updates")."""
    number, unit = (value[:-2], "epochs") if value.endswith("ep") else (value, "updates")
    if not number.isdecimal() or int(number) < 1:
        expected = "a number of updates such as 500, or of epochs such as 1ep"
        raise ConfigError(f"{name} is {value!r}; expected {expected}")
    return int(number), unit


def names_of_heads(name: str, value: str) -> None:
    """Refuse the name of a head that does not exist."""
    unknown = [head for head in value.split(",") if head not in HEADS and value != "auto"]
    if unknown:
        raise ConfigError(f"{name} names {', '.join(unknown)}; there are {', '.join(HEADS)} (or auto)")


def learns_emotions(heads: str) -> bool:
    """Tell whether these heads (`TrainConfig.heads`) are trained on emotions, if the data has them."""
    return heads == "auto" or "emotion" in heads.split(",")


def option(
    group: str,
    default: Any,
    *,
    help: str,
    choices: Collection[str] = (),
    check: Callable[[str, Any], object] | None = None,
    resume: str = "same",
    hidden: bool = False,
) -> Any:
    """Define a setting.

    Args:
        group: the group of its flag in the help.
        default: its default.
        help: its meaning and unit.
        choices: the values it may have; a table is read at each check, so rows may be added to it.
        check: a function that refuses other values (ConfigError); without it, numbers have to be at least 0.
        resume: what a resumed run may do with the setting: keep the "same" value; change it where that is "asked"
            for (`CHANGEABLE`); or change it "freely", since only rounding depends on it.
        hidden: whether the help leaves the flag out.
    """
    if check is None and isinstance(default, int | float) and not isinstance(default, bool):
        check = at_least_0
    about = {"group": group, "help": help, "choices": choices, "check": check, "resume": resume, "hidden": hidden}
    return field(default=default, metadata=about)


@dataclass(frozen=True)
class TrainConfig:
    """Hold the settings of a run, which are checked on construction and saved as JSON beside the checkpoints."""

    # fmt: off
    heads: str = option(COMMON, "auto", check=names_of_heads, help="comma-separated tasks out of "
        f"{', '.join(HEADS)}; auto: emotion, ctc where the training data has them, speaker if beta is above 0")
    alpha: float = option(COMMON, 0.1, resume="asked", help="weight of the CTC loss; 0 adds exactly nothing")
    beta: float = option(COMMON, 0.0, resume="asked", help="weight of the speaker loss")
    epochs: int = option(COMMON, 100, check=above_0, resume="asked", help="passes over the training data")
    rate: float = option(COMMON, 5e-5, check=above_0, resume="asked", help="peak learning rate of the encoder")
    effective_batch: int = option(COMMON, 0,
        help="utterances per update over all processes; 0: 8, where batch-seconds is not given")
    micro_seconds: float = option(COMMON, 40.0, resume="freely",
        help="most padded seconds of audio in one forward pass of one process, which bounds memory; 0: no limit")
    freeze: str = option(COMMON, "none", choices=("none", "feature-encoder", "encoder"),
        help="part that is not trained")
    amp: str = option(COMMON, "off", choices=("off", "bf16", "fp16"), help="automatic mixed precision")
    device: str = option(COMMON, "auto", resume="freely",
        help="auto, cpu, cuda or cuda:N; auto is a GPU per process where there is one")
    workers: int = option(COMMON, 0, resume="freely",
        help="processes per rank that decode audio; 0: the training process decodes")
    seed: int = option(COMMON, 0, help="random seed of new weights, order, dropout and masks")

    gamma: float = option(LOSSES, 1.0, resume="asked", help="weight of the loss of dimensions (arousal, "
        "dominance, valence), 1 - CCC over an update: it needs large ones, such as an effective batch of 32")
    layers: str = option(LOSSES, "auto", help="layer that all heads except CTC read: last, weighted (a learnt "
        "mean of all), or the number of a layer; auto: as in --init, else last")
    pooling: str = option(LOSSES, "auto", choices=("auto", *POOLINGS), help="how frames become one vector for "
        "emotion, speaker and dimensions; auto: as in --init, else mean")
    label_smoothing: float = option(LOSSES, 0.0, check=share, resume="asked", help="of the emotion loss, 0 to 1")
    class_weights: bool = option(LOSSES, False, help="weight emotions inversely to their frequency in training")
    focal: float = option(LOSSES, 0.0, resume="asked", help="gamma of the focal loss of emotions (Lin et al., "
        "2017): an utterance weighs (1 - p of its class) ** gamma; 0: cross entropy")
    logit_adjustment: float = option(LOSSES, 0.0, resume="asked", help="tau of the logit adjustment of emotions "
        "(Menon et al., 2021): training adds tau * log(share of the class) to its score; 0: off, 1: for UA")
    ctc_per_character: bool = option(LOSSES, False,
        help="divide each transcript's loss by its length (the paper does not)")

    head_rate: float = option(OPTIMIZER, 0.0, resume="asked",
        help="peak learning rate of the heads; 0: the same as rate")
    schedule: str = option(OPTIMIZER, "linear", choices=SCHEDULES, resume="asked",
        help="how the rate changes after its warm-up; linear: it falls to 0")
    warmup: float = option(OPTIMIZER, 0.1, check=share, resume="asked",
        help="share of updates with a linearly rising rate, 0 to 1")
    weight_decay: float = option(OPTIMIZER, 0.0, resume="asked",
        help="weight decay of AdamW, on weight matrices only, not on biases, norms and embeddings")
    adam_beta2: float = option(OPTIMIZER, 0.999, check=share_below_1, resume="asked",
        help="AdamW's second decay rate")
    clip: float = option(OPTIMIZER, 1.0, resume="asked", help="largest gradient norm of an update; 0: no limit")

    batch_seconds: float = option(BATCHES, 0.0,
        help="padded seconds of audio per update over all processes, instead of the effective batch; 0: off")
    # Earlier settings of the size of a batch: they still work, and the help does not show them.
    micro_batch: int = option(BATCHES, 0, resume="freely", hidden=True, help="most utterances in one forward pass "
        "of one process, instead of micro-seconds (not with batch-seconds); 0: off")
    accumulate: int = option(BATCHES, 0, resume="freely", hidden=True,
        help="micro-batches per update and process; 0: follows from the effective batch")
    batching: str = option(BATCHES, "bucket", choices=("bucket", "random"),
        help="bucket: utterances of similar length together; random: as drawn")
    balance: float = option(BATCHES, 0.0, check=share, help="balance of corpora and emotions, 0 to 1; 0: each "
        "utterance once in an epoch; 1: all corpora, and all emotions of a corpus, equally often")
    augment: tuple[str, ...] = option(BATCHES, (), check=lambda _, names: augmented(names, seed=0), resume="asked",
        help="names of augmentations that change each training waveform, in their order (not with cache)")
    max_seconds: float = option(BATCHES, 0.0,
        help="drop training recordings over so many seconds; 0: keep all. Evaluation drops none")
    activation_checkpointing: bool = option(BATCHES, False, resume="freely",
        help="recompute activations: less memory, about a third more time")
    cache: str = option(BATCHES, "", resume="asked", help="folder that keeps the output of a frozen part for each "
        "recording, so that it is computed once; runs may share it; empty: none")
    cache_dtype: str = option(BATCHES, "fp16", choices=("fp16", "fp32"), resume="asked", help="type of numbers in "
        "the cache: fp16 rounds to three digits, fp32 does not round and takes twice the space")

    eval_every: str = option(KEPT, "1ep", check=parse_interval, resume="asked",
        help="evaluate every N epochs (Nep) or N updates (N)")
    eval_seconds: float = option(KEPT, 0.0, resume="freely", help="padded seconds of audio per forward pass in "
        "evaluation; 0: as in prediction, 16 on a CPU and 64 on a GPU")
    metric: str = option(KEPT, "auto", choices=("auto", *METRICS),
        help="metric that chooses the best model on validation data; auto: unweighted_accuracy, else wer")
    early_stop: int = option(KEPT, 0, resume="asked", help="end after N evaluations without improvement; 0: never")
    save_every: str = option(KEPT, "1ep", check=parse_interval, resume="freely",
        help="save a checkpoint every N epochs (Nep) or N updates (N)")
    keep: int = option(KEPT, 2, check=above_0, resume="freely",
        help="how many of the newest checkpoints to keep; that of the best evaluation is kept too")
    log_every: int = option(KEPT, 10, check=above_0, resume="freely", help="updates between progress lines")

    on_bad_audio: str = option(FAULTS, "fail", choices=("fail", "skip"), resume="freely", help="what to do with "
        "recordings that cannot be read: end the run, or leave them out and list them in skipped.jsonl")
    max_bad_audio: float = option(FAULTS, 0.01, check=share, resume="freely", help="largest share of the training "
        "set, and of the validation set, that skip may leave out, 0 to 1; beyond it the run ends")
    timeout: float = option(FAULTS, 600.0, check=above_0, resume="freely", help="seconds that a process waits for "
        "another, or for a loader worker, before the run ends with an error")
    max_skipped: int = option(FAULTS, 10, check=above_0, resume="freely",
        help="updates in a row without a finite loss and gradient that end the run")
    # fmt: on

    def __post_init__(self) -> None:
        """Refuse values out of range, before anything is read."""
        for f in fields(self):
            value, choices, check = getattr(self, f.name), f.metadata["choices"], f.metadata["check"]
            if choices and value not in choices:
                close = difflib.get_close_matches(str(value), choices, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise ConfigError(f"{f.name} is {value!r}; expected {' or '.join(choices)}{hint}")
            if check is not None:
                check(f.name, value)
        if self.batch_seconds and self.effective_batch:
            raise ConfigError("give batch_seconds or effective_batch, not both: each says how large an update is")
        if self.augment and self.cache:
            raise ConfigError(
                "cache keeps what is made of each recording once, and augment changes recordings anew in each "
                "epoch: leave one of them out"
            )

    def resolved_effective_batch(self, world_size: int) -> int | None:
        """Return the utterances per update over all ranks; None where padded seconds decide.

        Raises ConfigError where effective batch, ranks, micro-batch and accumulation contradict each other.
        """
        if self.batch_seconds:
            return None
        micro_batch = self.micro_batch or 1
        product = world_size * micro_batch * self.accumulate
        size, parts = self.effective_batch or product or 8, f"{world_size} processes x micro_batch {micro_batch}"
        if self.accumulate and product != size:
            whole = f"{parts} x accumulate {self.accumulate} = {product}"
            raise ConfigError(f"effective_batch {size} is not {whole}; leave one of them out")
        if size % (world_size * micro_batch):
            raise ConfigError(f"effective_batch {size} cannot be divided by {parts}")
        return size

    def micro_limits(self, world_size: int) -> MicroLimits:
        """Return the limits of a forward pass, in utterances or in padded samples, for `cut_update`."""
        seconds = self.batch_seconds / (world_size * self.accumulate) if self.accumulate else self.micro_seconds
        if self.batch_seconds or not (self.micro_batch or self.accumulate):
            return {"micro_batch": None, "micro_samples": math.ceil(seconds * SAMPLE_RATE) or None}
        return {"micro_batch": self.micro_batch or 1, "micro_samples": None}

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON holds them."""
        return asdict(self)


def paper_settings(*, alpha: float | None = None, large: bool = False, script: bool = False) -> dict[str, Any]:
    """Return the settings of Cai et al., those of their text or those of their training script (``script``).

    The text (section 3.2) has AdamW, linear warm-up over 10 % and linear decay, rate 5e-5 (1e-5 without CTC), 100
    epochs, batches of 8 as 2 devices x 1 x 4, nothing frozen, and alpha 0.1 (their README: 0.01 for large-960h).
    The script has no warm-up, 200 epochs, 2 per device x 4, and activation checkpointing. It takes the mean of CE
    but the sum of CTC over the two utterances, so alpha acts as twice its value.

    Args:
        alpha: the weight of CTC; None: the paper's. 0 is the paper's ablation.
        large: whether the encoder is large-960h.
        script: whether to return the settings of the script.
    """
    chosen = (0.01 if large else 0.1) if alpha is None else alpha
    losses = {"alpha": 2 * chosen if script else chosen, "rate": 5e-5 if chosen else 1e-5}
    optimizer = {"head_rate": 0.0, "adam_beta2": 0.999, "weight_decay": 0.0, "clip": 1.0}
    length = {"warmup": 0.0 if script else 0.1, "epochs": 200 if script else 100}
    model = {"freeze": "none", "pooling": "mean", "layers": "last", "activation_checkpointing": script}
    batches = {"micro_batch": 2, "accumulate": 4} if script else {"micro_batch": 1, "effective_batch": 8}
    return {**losses, **optimizer, **length, "batching": "random", **model, **batches}


def resumable(how: str) -> set[str]:
    """Name the settings that a resumed run may change ``how``: "asked" or "freely"; see `option`."""
    return {f.name for f in fields(TrainConfig) if f.metadata["resume"] == how}


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one flag for each field of `TrainConfig`, in groups, with its help and default."""
    types_ = typing.get_type_hints(TrainConfig)
    groups = {title: parser.add_argument_group(title) for title in GROUPS}
    for f in fields(TrainConfig):
        flag, about = "--" + f.name.replace("_", "-"), f.metadata
        default = "none" if f.default == () else f.default
        help_ = f"{about['help']} (default: {default})".replace("%", "%%")
        options: dict[str, Any] = {"help": argparse.SUPPRESS if about["hidden"] else help_}
        if types_[f.name] is bool:
            options["action"] = "store_true"
        elif types_[f.name] == tuple[str, ...]:
            options |= {"nargs": "*", "default": f.default, "metavar": "NAME"}
        else:
            options |= {"type": types_[f.name], "default": f.default, "choices": about["choices"] or None}
        groups[about["group"]].add_argument(flag, **options)


def training_config(namespace: argparse.Namespace | types.SimpleNamespace) -> TrainConfig:
    """Return the `TrainConfig` that parsed flags ask for."""
    values: dict[str, Any] = {f.name: getattr(namespace, f.name) for f in fields(TrainConfig)}
    return TrainConfig(**values | {"augment": tuple(values["augment"])})

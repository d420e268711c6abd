"""Change waveforms in training: the table of augmentations, how they are asked for, and how one is drawn.

An augmentation is asked for by a specification, the name of a row of `AUGMENTATIONS` and perhaps its options:

    gain        gain:db=-3..3        noise:snr=5..20,kind=pink,p=0.5        speed:factors=0.9/1.0/1.1

What is drawn for an utterance is a function of (seed, epoch, place in the plan of the epoch, number of the row in
the list) and of nothing else. So the number of ranks and of workers changes nothing, and neither does an
interruption of the run. The arithmetic is numpy's, which uses one thread, so the number of threads changes no bit.

Shapes: S samples at 16 kHz, float32, full scale 1, before they are normalised.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Annotated, Any, NamedTuple, Protocol, Self

import numpy as np
import torch
from numpy.random.bit_generator import ISeedSequence
from torch import Tensor

from ser.audio import SAMPLE_RATE, resample, resampled_length
from ser.data.manifest import Utterance
from ser.data.sampler import Item
from ser.data.text import did_you_mean
from ser.errors import ConfigError, shorten

SHORTEST = SAMPLE_RATE // 40  # samples, 25 ms: a model's first frame; speed and crop leave no less

# Options ------------------------------------------------------------------------------------------
#
# The options of an augmentation are its parameters after the `*`. An option's annotation says how its text is
# read, what it is without one, and how a value is drawn from it for each utterance:
#
#     def gain(waveform, generator, *, db: Annotated[float, Drawn(-6, 6, "dB")]): ...
#
# The function is given the value that was drawn. An option without such an annotation needs a default, which a
# specification may replace.


class Option(Protocol):
    """Describe an option: how its text is read, and how a value is drawn from it."""

    @property
    def expected(self) -> str:
        """Say what its text may be."""

    def read(self, text: str) -> Self:
        """Return the option that a text asks for; a ValueError says that it asks for none."""

    def draw(self, generator: np.random.Generator) -> Any:
        """Draw a value for an utterance."""

    def words(self, name: str, value: Any) -> str:
        """Say in words what was drawn; "" where there is nothing to say."""


def bounded(text: str, least: float, most: float) -> float:
    """Read a finite number from ``least`` to ``most``; anything else is a ValueError."""
    value = float(text)
    if not (math.isfinite(value) and least <= value <= most):
        raise ValueError(text)
    return value


@dataclass(frozen=True)
class Drawn:
    """Describe a number that is drawn evenly from ``low`` to ``high``; its text is LOW..HIGH, or one number."""

    low: float
    high: float
    unit: str = ""
    least: float = 0.0
    most: float = 1000.0
    whole: bool = False

    @property
    def expected(self) -> str:
        """Say what its text may be."""
        kind = "a whole number" if self.whole else "a number"
        return f"{kind} from {self.least:g} to {self.most:g}, or two as LOW..HIGH"

    def read(self, text: str) -> Self:
        """Read ``5..20``, or ``10``, which is always 10."""
        low, dots, high = text.partition("..")
        ends = [bounded(end, self.least, self.most) for end in ((low, high) if dots else (low, low))]
        if ends[0] > ends[1] or (self.whole and any(end % 1 for end in ends)):
            raise ValueError(text)
        return replace(self, low=ends[0], high=ends[1])

    def draw(self, generator: np.random.Generator) -> float:
        """Draw a number."""
        if self.whole:
            return int(generator.integers(int(self.low), int(self.high), endpoint=True))
        return self.low + (self.high - self.low) * generator.random()

    def words(self, name: str, value: float) -> str:
        """Say which one."""
        return f"{name} {value:{'d' if self.whole else '.2f'}}{self.unit and ' '}{self.unit}"


@dataclass(frozen=True)
class Among:
    """Describe a number that is drawn among a few; its text is one of them, or several as A/B/C."""

    numbers: tuple[float, ...]
    least: float = 0.0
    most: float = 1000.0

    @property
    def expected(self) -> str:
        """Say what its text may be."""
        return f"numbers from {self.least:g} to {self.most:g}, such as {'/'.join(map(str, self.numbers))}"

    def read(self, text: str) -> Self:
        """Read ``0.9/1.0/1.1``."""
        return replace(self, numbers=tuple(bounded(part, self.least, self.most) for part in text.split("/")))

    def draw(self, generator: np.random.Generator) -> float:
        """Draw one of the numbers."""
        return self.numbers[generator.integers(len(self.numbers))]

    def words(self, name: str, value: float) -> str:
        """Say which one."""
        return f"{name.removesuffix('s')} {value:g}"


@dataclass(frozen=True)
class Given:
    """Describe an option of a plain function by its default: text, a number, or True and False."""

    value: Any
    least: float = -math.inf
    most: float = math.inf

    @property
    def expected(self) -> str:
        """Say what its text may be."""
        kind = {bool: "true or false", int: "a whole number", float: "a number"}.get(type(self.value), "a text")
        return kind + (f" from {self.least:g} to {self.most:g}" if self.most < math.inf else "")

    def read(self, text: str) -> Self:
        """Read a value of the default's type."""
        if isinstance(self.value, bool):
            return replace(self, value=bool(("false", "true").index(text.lower())))
        if isinstance(self.value, int | float):
            return replace(self, value=type(self.value)(bounded(text, self.least, self.most)))
        return replace(self, value=text)

    def draw(self, generator: np.random.Generator) -> Any:
        """Return the value."""
        return self.value

    def words(self, name: str, value: Any) -> str:
        """Say what was given."""
        return f"{name} {value}"


# What the functions share -------------------------------------------------------------------------


class Resized(NamedTuple):
    """Say what an augmentation does to the length of one utterance.

    Attributes:
        num_samples: the length that results.
        value: what it needs besides, such as the factor of a speed.
        words: in words, what is done.
    """

    num_samples: int
    value: float
    words: str


@dataclass(frozen=True)
class Resizing:
    """Hold an augmentation that changes the length, which is drawn before the waveform is read.

    Attributes:
        draw: (num_samples, generator, *, options) -> what is done, as `Resized` says it.
        apply: (waveform, what is done) -> a waveform of exactly its ``num_samples``.
        keeps_text: whether the whole transcript is still spoken where the length changes.
    """

    draw: Callable[..., Resized]
    apply: Callable[[Tensor, Resized], Tensor]
    keeps_text: bool = True


# Takes a waveform (S,) and a generator for all that it draws itself; after these, by name, its options. Returns
# another waveform (S,).
Augmentation = Callable[..., Tensor]

# The functions ------------------------------------------------------------------------------------


def gain(
    waveform: Tensor, generator: np.random.Generator, *, db: Annotated[float, Drawn(-6, 6, "dB", -100, 40)]
) -> Tensor:
    """Make an utterance louder or softer; what passes full scale is not clipped."""
    return waveform * 10 ** (db / 20)


def draw_speed(
    num_samples: int, generator: np.random.Generator, *, factors: Annotated[float, Among((0.9, 1.0, 1.1), 0.5, 2)]
) -> Resized:
    """Say how long an utterance is that is played ``factors`` times as fast; a very short one stays as it is."""
    num = resampled_length(num_samples, round(SAMPLE_RATE * factors))
    return Resized(*((num, factors) if num >= SHORTEST else (num_samples, 1.0)), "")


def play_faster(waveform: Tensor, how: Resized) -> Tensor:
    """Play an utterance faster or slower, which raises or lowers its pitch too."""
    return resample(waveform, round(SAMPLE_RATE * how.value))


def draw_crop(
    num_samples: int, generator: np.random.Generator, *, seconds: Annotated[float, Drawn(2, 4, "s", 0.025, 3600)]
) -> Resized:
    """Say which part of an utterance is kept; the whole of one that is not longer than ``seconds``."""
    kept = round(seconds * SAMPLE_RATE)
    if kept >= num_samples:
        return Resized(num_samples, 0, "whole")
    start = int(generator.integers(num_samples - kept, endpoint=True))
    return Resized(kept, start, f"from {start / SAMPLE_RATE:.2f} s")


def cut_out(waveform: Tensor, how: Resized) -> Tensor:
    """Keep a part of an utterance."""
    return waveform[int(how.value) :][: how.num_samples]


# A row is a function of a module, or a `Resizing` of two, which worker processes can be given. A row is added
# before `fit` is called.
AUGMENTATIONS: dict[str, Augmentation | Resizing] = {
    "gain": gain,
    "speed": Resizing(draw_speed, play_faster),
    "crop": Resizing(draw_crop, cut_out, keeps_text=False),
}

# Specifications -----------------------------------------------------------------------------------

SHARE = Given(1.0, 0, 1)  # p, which every row has: the share of utterances that it changes


def options_of(row: Augmentation | Resizing) -> dict[str, Option]:
    """Return the options of a row, as they are where a specification does not name them."""
    function = row.draw if isinstance(row, Resizing) else row
    options: dict[str, Option] = {"p": SHARE}
    for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
        described = [m for m in getattr(parameter.annotation, "__metadata__", ()) if hasattr(m, "draw")]
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            options[name] = described[0] if described else Given(parameter.default)
    return options


class StateWords(ISeedSequence):
    """Hand a bit generator the words of its state."""

    def __init__(self, words: np.ndarray) -> None:
        self.words = words

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> np.ndarray:
        """Return the words."""
        return self.words


def generator_of(*numbers: int) -> np.random.Generator:
    """Return a generator that is a function of some whole numbers: PCG64, seeded with BLAKE2b of them as text.

    This takes 3 us. `np.random.default_rng(numbers)` takes 14, and lengths are drawn for a million utterances.
    """
    seed = blake2b(" ".join(map(str, numbers)).encode(), digest_size=32).digest()
    return np.random.Generator(np.random.PCG64(StateWords(np.frombuffer(seed, dtype="<u8").astype(np.uint64))))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Chosen:
    """Hold a row with the options that a specification chose for it."""

    number: int  # in the list of specifications
    name: str
    row: Augmentation | Resizing
    options: dict[str, Option]

    def draw(self, *place: int) -> tuple[np.random.Generator, dict[str, Any]] | None:
        """Draw the options by (seed, epoch, place); None where the row leaves the utterance alone."""
        generator = generator_of(*place, self.number)
        # The coin is thrown for every p, so that p does not change what else is drawn.
        applies = generator.random() < self.options["p"].draw(generator)
        values = {name: option.draw(generator) for name, option in self.options.items() if name != "p"}
        return (generator, values) if applies else None


def read_specification(specification: str, number: int) -> Chosen:
    """Read a specification such as ``noise:snr=5..20,p=0.5``; see `augmented` for the errors."""
    name, _, rest = specification.partition(":")
    if name not in AUGMENTATIONS:
        known = ", ".join(AUGMENTATIONS) or "none"
        raise ConfigError(
            f"no augmentation is called {shorten(name)!r}{did_you_mean(name, AUGMENTATIONS)}; there are: {known}"
        )
    row = AUGMENTATIONS[name]
    options = options_of(row)
    chosen: dict[str, Option] = {}
    while rest:
        key, _, rest = rest.partition("=")
        where = f"augmentation {specification!r}"
        if key not in options:
            known = ", ".join(options)
            raise ConfigError(
                f"{where}: {name} has no option {key!r}{did_you_mean(key, options)}; its options are: {known}"
            )
        if key in chosen:
            raise ConfigError(f"{where}: {key} stands twice")
        text, _, rest = rest.partition(",")
        try:
            chosen[key] = options[key].read(text)
        except ValueError:
            raise ConfigError(f"{where}: {key} is {text!r}; expected {options[key].expected}") from None
    return Chosen(number, name, row, options | chosen)


# The whole chain ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Augmenter:
    """Apply a list of augmentations in their order; worker processes can be given one."""

    rows: tuple[Chosen, ...]
    seed: int

    @property
    def resizes(self) -> bool:
        """Tell whether any row may change the length of an utterance."""
        return any(isinstance(chosen.row, Resizing) for chosen in self.rows)

    def resized(self, num_samples: int, epoch: int, place: int) -> Iterator[tuple[Resizing, int, int]]:
        """Give each row that changes the length of this utterance, with the lengths before and after it."""
        for chosen in self.rows:
            if isinstance(chosen.row, Resizing) and (drawn := chosen.draw(self.seed, epoch, place)):
                generator, values = drawn
                before, num_samples = num_samples, chosen.row.draw(num_samples, generator, **values).num_samples
                if before != num_samples:
                    yield chosen.row, before, num_samples

    def length(self, num_samples: int, epoch: int, place: int) -> int:
        """Return the samples that are left of an utterance of ``num_samples`` at this place of this epoch."""
        for _, _, after in self.resized(num_samples, epoch, place):
            num_samples = after
        return num_samples

    def keeps_text(self, num_samples: int, epoch: int, place: int) -> bool:
        """Tell whether the whole transcript is still spoken in the utterance at this place of this epoch."""
        return all(row.keeps_text for row, _, _ in self.resized(num_samples, epoch, place))

    def __call__(self, waveform: Tensor, item: Item) -> Tensor:
        """Return the waveform that training hears at an item's place.

        Args:
            waveform: (S,) float32.
            item: says the epoch and the place.

        Returns:
            (S',) float32, S' = ``length(S, item.epoch, item.place)``.

        Raises:
            ConfigError: a row returned another length than it has to.
        """
        for chosen in self.rows:
            drawn = chosen.draw(self.seed, item.epoch, item.place)
            if drawn is None:
                continue
            (generator, values), shape = drawn, waveform.shape
            if isinstance(chosen.row, Resizing):
                how = chosen.row.draw(len(waveform), generator, **values)
                shape = torch.Size([how.num_samples])
                changed = waveform if how.num_samples == len(waveform) else chosen.row.apply(waveform, how)
            else:
                changed = chosen.row(waveform, generator, **values)
            if changed.shape != shape:
                raise ConfigError(
                    f"the augmentation {chosen.name!r} made {tuple(changed.shape)} of a waveform of "
                    f"{tuple(waveform.shape)}; it must keep the length, by which batches are planned, or be a "
                    f"`Resizing` that draws it: {tuple(shape)}"
                )
            waveform = changed
        return waveform


def augmented(specifications: Sequence[str], seed: int, utterances: Sequence[Utterance] = ()) -> Augmenter:
    """Make the chain of augmentations that specifications ask for.

    Args:
        specifications: such as ``gain`` or ``noise:snr=5..20,p=0.5``, in the order in which they are applied.
        seed: of the run.
        utterances: of the training set, whose numbers are those of the items; babble is made of them.

    Returns:
        An `Augmenter` for `SpeechDataset.augment`.

    Raises:
        ConfigError: a name is not in the table, a row has no such option, or an option cannot have such a value.
    """
    rows = tuple(read_specification(text, number) for number, text in enumerate(specifications))
    return Augmenter(rows, seed)

"""Change waveforms in training: the table of augmentations, how they are asked for, and how one is drawn.

An augmentation is asked for by a specification, the name of a row of `AUGMENTATIONS` and perhaps its options:

    gain        gain:db=-3..3        noise:snr=5..20,kind=pink,p=0.5        speed:factors=0.9/1.0/1.1

What is drawn for an utterance is a function of (seed, epoch, place in the plan of the epoch, number of the row in
the list) and of nothing else. So the number of ranks and of workers changes nothing, and neither does an
interruption of the run. The arithmetic is numpy's, on one thread, so the number of threads changes no bit either.

Shapes: S samples at 16 kHz, float32, full scale 1, before they are normalised. What passes full scale stays as it
is, and silence stays silence.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Protocol, Self

import numpy as np
import torch
from numpy.random.bit_generator import ISeedSequence
from torch import Tensor

from ser.audio import SAMPLE_RATE, audio_info, load_audio
from ser.containers import SUFFIXES
from ser.data.manifest import Utterance
from ser.data.sampler import Item
from ser.data.text import did_you_mean
from ser.errors import AudioError, ConfigError, MissingLibraryError, printable, shorten
from ser.files import StrPath, files_below

SHORTEST = SAMPLE_RATE // 40  # samples, 25 ms: a model's first frame; speed and crop leave no less
SILENT = 1e-20  # power, 200 dB below full scale: no ratio to it means anything

# Recordings of noise are kept in memory, so that an epoch does not decode each of them many times.
KEPT_BYTES = 64 * 1024 * 1024  # in each process
KEPT_SAMPLES = 30 * SAMPLE_RATE  # of longer ones the part that is needed is read
LONGEST_RESPONSE = 2 * SAMPLE_RATE  # samples of an impulse response

# Generators ---------------------------------------------------------------------------------------


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
    words = StateWords(np.frombuffer(seed, dtype="<u8").astype(np.uint64))
    return np.random.Generator(np.random.PCG64(words))  # type: ignore[arg-type]


# Options ------------------------------------------------------------------------------------------
#
# The options of an augmentation are its parameters after the `*`. An option's annotation says how its text is
# read, what it is without one, and how a value is drawn from it for each utterance:
#
#     def gain(waveform, generator, *, db: Annotated[float, Drawn(-6, 6)]): ...
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
        """Say in words what was drawn."""


def bounded(text: str, least: float, most: float, kind: type = float) -> float:
    """Read a finite number from ``least`` to ``most``; anything else is a ValueError."""
    value = kind(text)
    if not (math.isfinite(value) and least <= value <= most):
        raise ValueError(text)
    return value


def below(count: int, generator: np.random.Generator) -> int:
    """Draw a whole number from 0 to ``count`` - 1: in an eighth of the time of `Generator.integers`."""
    return int(generator.random() * count)


@dataclass(frozen=True)
class Drawn:
    """Describe a number that is drawn evenly from ``low`` to ``high``; its text is LOW..HIGH, or one number.

    Attributes:
        low, high: the range if the user gives none.
        said: the format of its words, such as "SNR {:.1f} dB".
        least, most: the bounds of what may be asked for.
        kind: float, or int for whole numbers.
    """

    low: float
    high: float
    said: str = ""
    least: float = -math.inf
    most: float = math.inf
    kind: type = float

    @property
    def expected(self) -> str:
        """Say what its text may be."""
        kind = "a whole number" if self.kind is int else "a number"
        return f"{kind} from {self.least:g} to {self.most:g}, or two of them as LOW..HIGH"

    def read(self, text: str) -> Self:
        """Read ``5..20``, or ``10``, which is always 10."""
        low, dots, high = text.partition("..")
        ends = [bounded(end, self.least, self.most, self.kind) for end in ((low, high) if dots else (low, low))]
        if ends[0] > ends[1]:
            raise ValueError(text)
        return replace(self, low=ends[0], high=ends[1])

    def draw(self, generator: np.random.Generator) -> float:
        """Draw a number."""
        if self.kind is int:
            return self.low + below(int(self.high - self.low) + 1, generator)
        return self.low + (self.high - self.low) * generator.random()

    def words(self, name: str, value: float) -> str:
        """Say which one."""
        return self.said.format(value) if self.said else f"{name} {value:g}"


@dataclass(frozen=True)
class Among:
    """Describe a number that is drawn among a few; its text is one of them, or several as A/B/C."""

    numbers: tuple[float, ...]
    least: float = -math.inf
    most: float = math.inf

    @property
    def expected(self) -> str:
        """Say what its text may be."""
        return f"numbers from {self.least:g} to {self.most:g}, such as {'/'.join(map(str, self.numbers))}"

    def read(self, text: str) -> Self:
        """Read ``0.9/1.0/1.1``."""
        return replace(self, numbers=tuple(bounded(part, self.least, self.most) for part in text.split("/")))

    def draw(self, generator: np.random.Generator) -> float:
        """Draw one of the numbers."""
        return self.numbers[below(len(self.numbers), generator)]

    def words(self, name: str, value: float) -> str:
        """Say which one."""
        return f"{name} {value:g}"


@dataclass(frozen=True)
class Word:
    """Describe a word that is drawn among a few; its text is one of the ``known`` words, or several as A/B."""

    chosen: tuple[str, ...]
    known: tuple[str, ...]

    @property
    def expected(self) -> str:
        """Say what its text may be."""
        return f"{' or '.join(self.known)}, or several of them as {'/'.join(self.known)}"

    def read(self, text: str) -> Self:
        """Read ``white/pink``."""
        if not set(text.split("/")) <= set(self.known):
            raise ValueError(text)
        return replace(self, chosen=tuple(text.split("/")))

    def draw(self, generator: np.random.Generator) -> str:
        """Draw one of the words."""
        return self.chosen[below(len(self.chosen), generator)]

    def words(self, name: str, value: str) -> str:
        """Say which one."""
        return value


@dataclass(frozen=True)
class Given:
    """Describe an option that has one value for all utterances; its default gives the type."""

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
            return replace(self, value=bounded(text, self.least, self.most, type(self.value)))
        return replace(self, value=text)

    def draw(self, generator: np.random.Generator) -> Any:
        """Return the value."""
        return self.value

    def words(self, name: str, value: Any) -> str:
        """Say what was given."""
        return f"{name} {value}"


@dataclass(frozen=True)
class Recordings:
    """Describe a folder from which a recording is drawn; it replaces other options, such as kind.

    Its text reaches to the end of the specification, so a path may hold commas and equals signs. A relative path
    counts from the working directory. The recordings are found at once, at any depth, in sorted order.
    """

    instead_of: tuple[str, ...]  # names of options
    files: tuple[str, ...] = ()

    @property
    def expected(self) -> str:
        """Say what its text may be."""
        return "the path of a folder of recordings"

    def read(self, text: str) -> Self:
        """List the recordings of a folder, which has to have one."""
        if not text:
            raise ValueError(text)
        folder, reach = Path(text), "folder= reaches to the end of the specification, so options stand before it"
        if not folder.is_dir():
            near = [path.name for path in folder.parent.iterdir()] if folder.parent.is_dir() else []
            raise ConfigError(f"{folder}: no such folder{did_you_mean(folder.name, near)} ({reach})")
        try:
            files = sorted(files_below(folder, hidden=False, say=lambda _: None))
        except OSError as error:
            raise ConfigError(f"{error.filename}: cannot be listed: {error.strerror}") from None
        sound = tuple(file for file in files if file.lower().endswith(SUFFIXES))
        if not sound:
            there = f"{len(files)} other files, such as {Path(files[0]).name}" if files else "nothing"
            raise ConfigError(f"{folder}: no recordings ({', '.join(SUFFIXES)}) at any depth; it has {there}")
        return replace(self, files=sound)

    def draw(self, generator: np.random.Generator) -> str:
        """Draw one of the recordings."""
        return self.files[below(len(self.files), generator)]

    def words(self, name: str, value: str) -> str:
        """Say which one."""
        return printable(Path(value).name)


# Sounds of files ----------------------------------------------------------------------------------


class KeptSounds:
    """Read recordings, and keep those that were used last, up to a number of bytes."""

    def __init__(self, most: int) -> None:
        self.most, self.size = most, 0
        self.kept: dict[tuple[StrPath, float | None, float | None], np.ndarray] = {}  # used last: last

    def read(self, file: StrPath, start: float | None = None, end: float | None = None) -> np.ndarray:
        """Return a recording, or an excerpt in seconds: (S,) float32, which nobody may change."""
        key = (file, start, end)
        sound = self.kept.pop(key, None)
        if sound is None:
            sound = load_audio(file, start=start, end=end).numpy()
            sound.flags.writeable = False
            self.size += sound.nbytes
        self.kept[key] = sound
        while self.size > self.most:
            self.size -= self.kept.pop(next(iter(self.kept))).nbytes
        return sound


KEPT = KeptSounds(KEPT_BYTES)


@lru_cache(maxsize=1 << 16)
def header_samples(file: str) -> int:
    """Count the samples at 16 kHz of a recording by its header."""
    return audio_info(file).num_samples


def fitted(sound: np.ndarray, num_samples: int, generator: np.random.Generator) -> np.ndarray:
    """Cut ``num_samples`` out of a sound, from a place that is drawn; a shorter one is repeated."""
    if len(sound) >= num_samples:
        return sound[below(len(sound) - num_samples + 1, generator) :][:num_samples]
    start = below(len(sound), generator)
    return np.tile(sound, 1 + -(-num_samples // len(sound)))[start:][:num_samples]


@contextmanager
def needed() -> Iterator[None]:
    """Raise ConfigError if a recording of noise or of a room cannot be read.

    An AudioError would blame the utterance.
    """
    try:
        yield
    except MissingLibraryError:
        raise
    except AudioError as error:
        raise ConfigError(f"a recording that an augmentation needs cannot be used: {error}") from None


def recorded(file: str, num_samples: int, generator: np.random.Generator) -> np.ndarray:
    """Read ``num_samples`` of a recording from a place that is drawn; a shorter one is repeated."""
    with needed():
        there = header_samples(file)
        if there <= max(KEPT_SAMPLES, num_samples):
            return fitted(KEPT.read(file), num_samples, generator)
        start = below(there - num_samples + 1, generator)
        part = load_audio(file, start=start / SAMPLE_RATE, end=(start + num_samples) / SAMPLE_RATE).numpy()
        return fitted(part, num_samples, generator)  # a rate other than 16 kHz may round to a sample more or less


def recorded_response(file: str) -> np.ndarray:
    """Read an impulse response from its strongest sample on, so that a room delays nothing."""
    with needed():
        response = KEPT.read(file)
    start = int(np.abs(response).argmax())
    return response[start:][:LONGEST_RESPONSE].astype(np.float64)


@dataclass(frozen=True)
class Others:
    """Hold the utterances of the training set without the one that is augmented."""

    utterances: Sequence[Utterance]
    index: int

    def __len__(self) -> int:
        return len(self.utterances) - (0 <= self.index < len(self.utterances))

    def draw(self, num_samples: int, generator: np.random.Generator) -> np.ndarray:
        """Draw one of them, repeated or cut to (``num_samples``,); silence where it cannot be read.

        A recording that cannot be read is reported where it is trained on.
        """
        number = below(len(self), generator)
        other = self.utterances[number + (0 <= self.index <= number)]
        try:
            return fitted(KEPT.read(other.file, other.start, other.end), num_samples, generator)
        except MissingLibraryError:
            raise
        except AudioError:
            return np.zeros(num_samples, dtype=np.float32)


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


def power_of(sound: np.ndarray) -> float:
    """Return the mean square of a sound (S,)."""
    return float(np.square(sound, dtype=np.float64).mean())


def white_noise(num_samples: int, generator: np.random.Generator) -> np.ndarray:
    """Draw white noise (S,). Its values are even in -1..1, which takes a tenth of the time of normal ones."""
    return generator.random(num_samples, dtype=np.float32) * np.float32(2) - np.float32(1)


@lru_cache(maxsize=1)
def pink_noise() -> np.ndarray:
    """Make 65 s of pink noise, once in a process: as much power in each octave from 20 Hz to 8 kHz."""
    size = 1 << 20
    spectrum = np.fft.rfft(white_noise(size, generator_of(0)).astype(np.float64))
    hz = np.arange(len(spectrum)) * (SAMPLE_RATE / size)
    made = np.fft.irfft(np.where(hz < 20, 0, spectrum / np.sqrt(np.maximum(hz, 20))), size).astype(np.float32)
    made.flags.writeable = False
    return made


def add_noise(waveform: Tensor, added: np.ndarray, snr: float) -> Tensor:
    """Add noise (S,), ``snr`` dB below the utterance in power over its whole length."""
    before, there = power_of(waveform.numpy()), power_of(added)
    if min(before, there) < SILENT:
        return waveform
    return waveform + torch.from_numpy(added * np.float32(math.sqrt(before / there * 10 ** (-snr / 10))))


def fft_size(least: int) -> int:
    """Return a length, ``least`` or at most an eighth more, that a Fourier transform is fast for."""
    power = max(0, (least - 1).bit_length() - 5)
    return min(m << power for m in (16, 18, 20, 24, 25, 27, 30, 32) if m << power >= least)


# The functions ------------------------------------------------------------------------------------

SNR = Drawn(5, 20, "SNR {:.1f} dB", -50, 100)


def gain(
    waveform: Tensor, generator: np.random.Generator, *, db: Annotated[float, Drawn(-6, 6, "{:+.1f} dB", -100, 40)]
) -> Tensor:
    """Make an utterance louder or softer; what passes full scale is not clipped."""
    return waveform * 10 ** (db / 20)


def noise(
    waveform: Tensor,
    generator: np.random.Generator,
    *,
    snr: Annotated[float, SNR],
    kind: Annotated[str, Word(("white", "pink"), ("white", "pink"))] = "white",
    folder: Annotated[str, Recordings(("kind",))] = "",
) -> Tensor:
    """Add white noise, pink noise, or a recording of a folder."""
    num = len(waveform)
    if folder:
        return add_noise(waveform, recorded(folder, num, generator), snr)
    added = white_noise(num, generator) if kind == "white" else fitted(pink_noise(), num, generator)
    return add_noise(waveform, added, snr)


def babble(
    waveform: Tensor,
    generator: np.random.Generator,
    *,
    others: Others,
    snr: Annotated[float, SNR],
    voices: Annotated[int, Drawn(3, 3, "", 1, 20, int)],
) -> Tensor:
    """Add other utterances of the training set, all equally loud."""
    mixed = np.zeros(len(waveform), dtype=np.float32)
    for _ in range(voices):
        voice = others.draw(len(waveform), generator)
        mixed += voice * np.float32(1 / math.sqrt(max(power_of(voice), SILENT)))
    return add_noise(waveform, mixed, snr)


def room_response(rt60: float, drr: float, generator: np.random.Generator) -> np.ndarray:
    """Make an impulse response: the direct sound, and noise that falls by 60 dB in ``rt60`` seconds.

    Args:
        rt60: the reverberation time, in seconds.
        drr: the energy of the direct sound over that of the noise, in dB.
        generator: draws the noise.
    """
    num = round(rt60 * SAMPLE_RATE)
    decay = np.exp(-3 * math.log(10) / num * np.arange(num))
    response = white_noise(num, generator) * decay
    response[: SAMPLE_RATE // 400] = 0  # the first echo comes after 2.5 ms
    response *= math.sqrt(10 ** (-drr / 10) / np.square(response).sum())
    response[0] = 1
    return response


def reverb(
    waveform: Tensor,
    generator: np.random.Generator,
    *,
    rt60: Annotated[float, Drawn(0.2, 0.8, "RT60 {:.2f} s", 0.05, 2)] = 0.4,
    drr: Annotated[float, Drawn(0, 12, "direct sound {:+.1f} dB", -20, 40)] = 0.0,
    folder: Annotated[str, Recordings(("rt60", "drr"))] = "",
) -> Tensor:
    """Put an utterance into a room: one that is made up, or the impulse response of a file. Its power stays."""
    speech = waveform.numpy().astype(np.float64)
    response = recorded_response(folder) if folder else room_response(rt60, drr, generator)
    size = fft_size(len(speech) + len(response) - 1)
    heard = np.fft.irfft(np.fft.rfft(speech, size) * np.fft.rfft(response, size), size)[: len(speech)]
    before, after = power_of(speech), power_of(heard)
    if min(before, after) < SILENT:
        return waveform
    return torch.from_numpy((heard * math.sqrt(before / after)).astype(np.float32))


@lru_cache(maxsize=1)
def mu_law() -> np.ndarray:
    """Return a table of each int16 after mu-law coding (mu = 255), divided by 32768.

    It is (65536,), in the order 0, 1, ..., -2, -1.
    """
    samples = np.arange(1 << 16).astype(np.uint16).view(np.int16) / 32768
    code = np.rint(127 * np.log1p(255 * np.abs(samples)) / math.log(256)) / 127
    return (np.sign(samples) * np.expm1(code * math.log(256)) / 255).astype(np.float32)


def telephone(waveform: Tensor, generator: np.random.Generator) -> Tensor:
    """Send an utterance through a telephone: 300 to 3,400 Hz, 8,000 samples a second, mu-law of 8 bits.

    The line carries the utterance at its full scale, so that a soft one is coded as finely as a loud one.
    """
    speech = waveform.numpy().astype(np.float64)
    if power_of(speech) < SILENT:
        return waveform
    size = fft_size(len(speech) + SAMPLE_RATE // 10)  # what the filter spreads over the end returns at the front
    hz = np.arange(size // 4 + 1) * (SAMPLE_RATE / size)  # up to 4 kHz
    edge = np.clip(np.minimum(hz - 300, 3400 - hz) / 50, 0, 1)  # the band is left within 50 Hz
    band = np.square(edge) * (3 - 2 * edge)
    line = np.fft.irfft(np.fft.rfft(speech, size)[: len(hz)] * band, size // 2) / 2  # at 8 kHz
    scale = 32767 / max(float(np.abs(line).max()), math.sqrt(SILENT))
    coded = mu_law()[np.rint(line * scale).astype(np.int16).view(np.uint16)] * (32768 / scale)
    heard = np.fft.irfft(np.fft.rfft(coded) * band, size) * 2
    return torch.from_numpy(heard[: len(speech)].astype(np.float32))


def clipping(
    waveform: Tensor,
    generator: np.random.Generator,
    *,
    db: Annotated[float, Drawn(3, 12, "{:.1f} dB below the peak", 0, 60)],
) -> Tensor:
    """Clip the waveform at ``db`` dB below its peak, as an overdriven microphone does."""
    level = float(waveform.abs().max()) * 10 ** (-db / 20)
    return waveform.clamp(-level, level)


def draw_speed(
    num_samples: int, generator: np.random.Generator, *, factors: Annotated[float, Among((0.9, 1.0, 1.1), 0.5, 2)]
) -> Resized:
    """Return the length of an utterance that is played ``factors`` times as fast."""
    rate = round(SAMPLE_RATE * factors)
    return Resized(-(-num_samples * SAMPLE_RATE // rate), rate, f"factor {factors:g}")


def play_faster(waveform: Tensor, how: Resized) -> Tensor:
    """Play an utterance faster or slower, which raises or lowers its pitch too.

    The waveform is taken as one of ``how.value`` Hz and resampled to 16 kHz by its Fourier transform. This is not
    `ser.audio.resample`, whose last bits depend on the number of threads.
    """
    common = math.gcd(int(how.value), SAMPLE_RATE)
    old, new = int(how.value) // common, SAMPLE_RATE // common
    periods = fft_size(-(-(len(waveform) + SAMPLE_RATE // 10) // old))  # silence follows, into which the ends ring
    spectrum = np.fft.rfft(waveform.numpy().astype(np.float64), old * periods)
    spectrum = spectrum[: min(old, new) * periods // 2 + 1]
    edge = len(spectrum) // 20  # the last twentieth of the band fades out
    spectrum[-edge:] *= np.square(np.cos(math.pi / 2 * np.arange(1, edge + 1) / edge))
    played = np.fft.irfft(spectrum, new * periods) * (new / old)
    return torch.from_numpy(played[: how.num_samples].astype(np.float32))


def draw_crop(
    num_samples: int, generator: np.random.Generator, *, seconds: Annotated[float, Drawn(2, 4, "", 0.025, 3600)]
) -> Resized:
    """Draw which part is kept; an utterance of at most ``seconds`` is kept whole."""
    kept = round(seconds * SAMPLE_RATE)
    if kept >= num_samples:
        return Resized(num_samples, 0, "nothing to cut")
    start = below(num_samples - kept + 1, generator)
    return Resized(kept, start, f"{seconds:.2f} s from {start / SAMPLE_RATE:.2f} s on")


def cut_out(waveform: Tensor, how: Resized) -> Tensor:
    """Keep a part of an utterance."""
    return waveform[int(how.value) :][: how.num_samples].clone()


# A row is a function of a module, or a `Resizing` of two, which worker processes can be given. A row is added
# before `fit` is called.
AUGMENTATIONS: dict[str, Augmentation | Resizing] = {
    "gain": gain,
    "noise": noise,
    "babble": babble,
    "reverb": reverb,
    "telephone": telephone,
    "clipping": clipping,
    "speed": Resizing(draw_speed, play_faster),
    "crop": Resizing(draw_crop, cut_out, keeps_text=False),
}

# Specifications -----------------------------------------------------------------------------------

SHARE = Given(1.0, 0, 1)  # p, which every row has: the share of utterances that it changes


def parameters_of(row: Augmentation | Resizing) -> dict[str, inspect.Parameter]:
    """Return the parameters of a row that are given by name."""
    function = row.draw if isinstance(row, Resizing) else row
    parameters = inspect.signature(function, eval_str=True).parameters
    return {name: p for name, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}


def options_of(name: str) -> dict[str, Option]:
    """Return the options of a row with their defaults."""
    options: dict[str, Option] = {"p": SHARE}
    for key, parameter in parameters_of(AUGMENTATIONS[name]).items():
        described = [m for m in getattr(parameter.annotation, "__metadata__", ()) if hasattr(m, "draw")]
        if key != "others" and not described and parameter.default is parameter.empty:
            raise ConfigError(f"augmentation {name!r}: its option {key!r} has neither a default nor a description")
        if key != "others":
            options[key] = described[0] if described else Given(parameter.default)
    return options


@dataclass(frozen=True)
class Chosen:
    """Hold a row with the options that a specification chose for it."""

    number: int  # in the list of specifications
    name: str
    row: Augmentation | Resizing
    p: float
    options: dict[str, Option]
    hears_others: bool = False


def read_options(specification: str, name: str, text: str) -> dict[str, Option]:
    """Read the options of a specification, the text after its colon, and add those that it does not name."""
    where, options = f"augmentation {specification!r}", options_of(name)
    chosen: dict[str, Option] = {}
    while text:
        key, _, text = text.partition("=")
        if key not in options:
            known, hint = ", ".join(options), did_you_mean(key, options)
            raise ConfigError(f"{where}: {name} has no option {key!r}{hint}; its options are: {known}")
        if key in chosen:
            raise ConfigError(f"{where}: {key} is given twice")
        option = options[key]
        value, _, text = (text, "", "") if isinstance(option, Recordings) else text.partition(",")
        try:
            chosen[key] = option.read(value)
        except ValueError:
            raise ConfigError(f"{where}: {key} is {value!r}; expected {option.expected}") from None
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
    folders = {key: option.instead_of for key, option in options.items() if isinstance(option, Recordings)}
    left_out = {other: key for key, others in folders.items() for other in (others if key in chosen else [key])}
    if both := [key for key in chosen if key in left_out]:
        raise ConfigError(f"{where}: {left_out[both[0]]} replaces {both[0]}; give only one of them")
    return {key: option for key, option in (options | chosen).items() if key not in left_out}


def read_specification(specification: str, number: int) -> Chosen:
    """Read a specification such as ``noise:snr=5..20,p=0.5``; see `augmented` for the errors."""
    name, _, text = specification.partition(":")
    if name not in AUGMENTATIONS:
        known = ", ".join(AUGMENTATIONS) or "none"
        raise ConfigError(
            f"no augmentation is called {shorten(name)!r}{did_you_mean(name, AUGMENTATIONS)}; there are: {known}"
        )
    options = read_options(specification, name, text)
    share, row = options.pop("p"), AUGMENTATIONS[name]
    assert isinstance(share, Given)
    return Chosen(number, name, row, share.value, options, "others" in parameters_of(row))


# The whole chain ----------------------------------------------------------------------------------


class Application(NamedTuple):
    """Hold one row that is applied to one utterance, and what was drawn for it."""

    chosen: Chosen
    generator: np.random.Generator
    values: dict[str, Any]
    before: int  # samples
    how: Resized | None  # of a row that may change the length


@dataclass(frozen=True)
class Augmenter:
    """Apply a list of augmentations in their order; worker processes can be given one."""

    rows: tuple[Chosen, ...]
    seed: int
    utterances: Sequence[Utterance] = ()
    shortest: int = SHORTEST  # samples: a row that would leave fewer is not applied

    @property
    def resizes(self) -> bool:
        """Tell whether any row may change the length of an utterance."""
        return any(isinstance(chosen.row, Resizing) for chosen in self.rows)

    def applied(
        self, num_samples: int, epoch: int, place: int, *, resizing_only: bool = False
    ) -> Iterator[Application]:
        """Draw by (seed, epoch, place) which rows are applied to an utterance of ``num_samples``, and how."""
        for chosen in self.rows:
            if resizing_only and not isinstance(chosen.row, Resizing):
                continue
            generator = generator_of(self.seed, epoch, place, chosen.number)
            if generator.random() >= chosen.p:  # drawn for every p, so that p does not change what else is drawn
                continue
            values, how = {name: option.draw(generator) for name, option in chosen.options.items()}, None
            if isinstance(chosen.row, Resizing):
                how = chosen.row.draw(num_samples, generator, **values)
                if how.num_samples < min(self.shortest, num_samples):
                    continue
            yield Application(chosen, generator, values, num_samples, how)
            num_samples = how.num_samples if how else num_samples

    def length(self, num_samples: int, epoch: int, place: int) -> int:
        """Return the samples that are left of an utterance of ``num_samples`` at this place of this epoch."""
        for application in self.applied(num_samples, epoch, place, resizing_only=True):
            num_samples = application.how.num_samples if application.how else num_samples
        return num_samples

    def keeps_text(self, num_samples: int, epoch: int, place: int) -> bool:
        """Tell whether the whole transcript is still spoken in the utterance at this place of this epoch."""
        changes = self.applied(num_samples, epoch, place, resizing_only=True)
        changed = [
            change.chosen.row for change in changes if change.how and change.how.num_samples != change.before
        ]
        return all(isinstance(row, Resizing) and row.keeps_text for row in changed)

    def words(self, num_samples: int, item: Item) -> list[str]:
        """Say what is done to an utterance of ``num_samples`` at an item's place: a text for each row applied."""
        said = []
        for chosen, _, values, _, how in self.applied(num_samples, item.epoch, item.place):
            drawn = (
                [how.words] if how else [chosen.options[name].words(name, value) for name, value in values.items()]
            )
            said.append(f"{chosen.name}: {', '.join(drawn)}" if drawn else chosen.name)
        return said

    def __call__(self, waveform: Tensor, item: Item) -> Tensor:
        """Return the waveform that training hears at an item's place.

        Args:
            waveform: (S,) float32.
            item: says the utterance, the epoch and the place.

        Returns:
            (S',) float32, S' = ``length(S, item.epoch, item.place)``.

        Raises:
            ConfigError: a row returned another length than it has to; a recording of noise or of a room cannot be
                read; babble knows no other utterances.
        """
        for chosen, generator, values, before, how in self.applied(len(waveform), item.epoch, item.place):
            if isinstance(chosen.row, Resizing):
                changed = waveform if how is None or how.num_samples == before else chosen.row.apply(waveform, how)
            else:
                others = {"others": Others(self.utterances, item.index)} if chosen.hears_others else {}
                if others and not len(others["others"]):
                    raise ConfigError(
                        f"the augmentation {chosen.name!r} needs other utterances, and there are none"
                    )
                changed = chosen.row(waveform, generator, **values, **others)
            expected = (how.num_samples if how else before,)
            if changed.shape != expected:
                raise ConfigError(
                    f"the augmentation {chosen.name!r} made {tuple(changed.shape)} of a waveform of ({before},), "
                    f"not {expected}; it must keep the length, by which batches are planned, or be a `Resizing`, "
                    "which draws it before"
                )
            waveform = changed
        return waveform


def augmented(
    specifications: Sequence[str], seed: int, utterances: Sequence[Utterance] = (), *, shortest: int = SHORTEST
) -> Augmenter:
    """Make the chain of augmentations that specifications ask for.

    Args:
        specifications: such as ``gain`` or ``noise:snr=5..20,p=0.5``, in the order in which they are applied.
        seed: of the run.
        utterances: of the training set, whose numbers are those of the items. Babble is made of them; without any
            the chain can be checked and asked for lengths.
        shortest: samples that a model's first frame needs: what would leave an utterance with fewer is not done.

    Returns:
        An `Augmenter` for `SpeechDataset.augment`.

    Raises:
        ConfigError: a name is not in the table, a row has no such option, an option cannot have such a value, a
            folder has no recordings, or there is no second utterance to make babble of.
    """
    rows = tuple(read_specification(text, number) for number, text in enumerate(specifications))
    hearing = [chosen.name for chosen in rows if chosen.hears_others]
    if hearing and len(utterances) == 1:
        raise ConfigError(
            f"the augmentation {hearing[0]!r} is made of other utterances, and there is only this one"
        )
    return Augmenter(rows, seed, utterances if hearing else (), shortest)

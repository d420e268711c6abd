"""Recordings in, 16 kHz mono waveforms out: the only file that opens sound.

A recording passes through four gates, each with one clear :class:`AudioError`:

1. the path is a regular file (a FIFO or a device would hang or never end);
2. its first bytes, behind tags and padding, are a container and a coding on the allow-list, and what
   the container declares is all there, and is all that is there: files that were joined byte by byte
   play as their first part alone. This file reads those bytes itself: libsndfile parses some 25 formats
   as soon as it opens a file, repairs a cut WAV in silence, and its ADPCM, CAF and other parsers have
   known faults;
3. libsndfile's header: rate, channels, length, all before anything of that length is allocated;
4. the samples: as many as declared, finite, in range.

What is sound, but nothing that an emotion can be heard in (silence, channels that cancel each other), is
read, with a warning for who predicts from it: `read_audio`, `read_samples`, `read_windows`.

Shapes: S samples at 16 kHz; "frames" here are sample points of the file, one value per channel.
Everything is float32 on the CPU, and read, averaged over channels and resampled block by block, so
memory beyond the result stays within tens of megabytes whatever the rate, channels and length.
"""

import contextlib
import functools
import importlib.metadata
import itertools
import math
import operator
import os
import stat
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ser.errors import AudioError, ConfigError, MissingLibraryError

SAMPLE_RATE = 16_000  # Hz: what every wav2vec 2.0 checkpoint was trained on
MIN_RATE, MAX_RATE = 4_000, 192_000  # Hz: telephone speech is 8 kHz, studio recordings end at 192 kHz
MAX_CHANNELS = 32
MAX_SECONDS = 3_600.0  # one hour is 230 MB at 16 kHz; a caller with more memory passes `max_seconds`

# Full scale is 1. A float recording may pass it a little (1.5 after a mix, 4 after +12 dB), but
# beyond +40 dB it is integers stored as floats, and a model would see 30,000 times the loudness.
_MAX_AMPLITUDE = 100.0
# A manifest's seconds are rounded; an end this little past the file's end means the file's end.
_END_TOLERANCE = 0.02

# What is no speech, by level. 70 dB below full scale is 10 steps of 16 bit: beneath any microphone's noise, above
# dither and what a muted channel holds. Speech is above it for a third of a second in the shortest word; a click
# or two is not for a tenth.
_QUIET = 10 ** (-70 / 20)  # of full scale
_LEAST_SOUND = 0.1  # seconds above it, all together; of less than 0.4 s, a quarter
_TOO_SHORT = SAMPLE_RATE // 40  # 25 ms are no frame for a model: they are padded, which is warning enough
# Near full scale is within 1 dB: loud speech, with clipped peaks, is there for 0.5 % of its samples, sound that
# was driven 20 dB beyond for half. Where samples pass full scale by far, it was not clipped there.
_NEAR_FULL_SCALE, _OVERSHOOT, _CLIPPED = 10 ** (-1 / 20), 1.2, 0.1
# Power of the mean of C channels, times C, over that of a channel: C for the same sound in each, 1 for independent
# ones, 0 for inverted ones. A tenth is 10 dB less than independent channels leave.
_CANCELLED = 0.1

_WAV_SUBTYPES = ("PCM_U8", "PCM_S8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW")
_ALLOWED = {  # libsndfile's names of containers and codings
    "WAV": _WAV_SUBTYPES,
    "WAVEX": _WAV_SUBTYPES,
    "RF64": _WAV_SUBTYPES,
    "FLAC": ("PCM_S8", "PCM_16", "PCM_24"),
    "OGG": ("VORBIS",),
    "MP3": ("MPEG_LAYER_III",),
}
# By their names: what is read, and what else is sound or has some, to be told and not passed over.
SUFFIXES = (".wav", ".wave", ".bwf", ".rf64", ".flac", ".ogg", ".oga", ".mp3")
# fmt: off
OTHER_SUFFIXES = (
    ".3g2", ".3gp", ".3gpp", ".aac", ".ac3", ".aif", ".aifc", ".aiff", ".alac", ".amr", ".ape", ".asf", ".au",
    ".avi", ".awb", ".caf", ".ds2", ".dsf", ".dss", ".eac3", ".f4v", ".flv", ".gsm", ".m2ts", ".m4a", ".m4b",
    ".m4r", ".m4v", ".mka", ".mkv", ".mov", ".mp1", ".mp2", ".mp4", ".mpc", ".mpeg", ".mpg", ".mpga", ".mts",
    ".nist", ".ogv", ".ogx", ".opus", ".pcm", ".qcp", ".ra", ".rm", ".snd", ".sph", ".spx", ".tak", ".tta",
    ".vob", ".voc", ".vox", ".w64", ".weba", ".webm", ".wma", ".wmv", ".wv",
)
# fmt: on
_ADVICE = (
    "ser reads WAV and RF64 (PCM, float, mu-law, A-law), FLAC, OGG/Vorbis and MP3; "
    "convert it, for example: ffmpeg -i INPUT -c:a pcm_s16le OUTPUT.wav"
)
_WAV_CODINGS = {1: "PCM", 3: "float", 6: "A-law", 7: "mu-law"}
_REFUSED_WAV_CODINGS = {
    0x02: "Microsoft ADPCM",
    0x11: "IMA ADPCM",
    0x31: "GSM 6.10",
    0x40: "G.721 ADPCM",
    0x55: "MP3 inside WAV",
}
_REFUSED_MAGIC = {  # only for a better message; what is not recognised is refused all the same
    b"FORM": "AIFF or another IFF",
    b".snd": "AU",
    b"caff": "CAF",
    b"NIST": "NIST SPHERE",
    b"RIFX": "big-endian WAV (RIFX)",
    b"BW64": "BW64",
    b"riff": "W64",
    b"wvpk": "WavPack",
    b"MAC ": "Monkey's Audio",
    b"#!AM": "AMR",
    b"\x1aE\xdf\xa3": "Matroska or WebM",
}


@dataclass(frozen=True)
class AudioInfo:
    """What a recording's header says about the selected excerpt, or about the whole file."""

    path: Path
    sample_rate: int  # Hz, of the file
    channels: int
    frames: int  # of the excerpt, at `sample_rate`
    seconds: float  # frames / sample_rate
    num_samples: int  # S: exactly what `load_audio` returns, at 16 kHz
    format: str  # libsndfile's name of the container, such as "WAV"
    subtype: str  # and of the coding, such as "PCM_16"
    warning: str | None = None  # what its header leaves open


# Resampling -------------------------------------------------------------------------------------
#
# Band-limited interpolation at the ratio new / old in lowest terms. Its kernel has `new` rows, one
# per phase of the output, of 2 * reach + old taps. For 44,100 -> 16,000 Hz, 160 / 441, that is
# 0.5 MB, but 44,101 -> 16,000 is irreducible: 2.8 GB. Such a ratio is replaced by the nearest with
# a small kernel, which is nearly always within 1e-5. Only the neighbours of a simple ratio
# (16,002 Hz) have none so near: they take a larger kernel to come within 1e-4, and some 200 rates
# that would pass 10 MB even so (the worst is 15,995) stay up to 3.2e-4 off: half a cent in pitch.

_KAISER_BEST = {  # resampy's and librosa's "kaiser_best": stop band -147 dB, flat to 7.5 of 8 kHz
    "lowpass_filter_width": 64,
    "rolloff": 0.9475937167399596,
    "resampling_method": "sinc_interp_kaiser",
    "beta": 14.769656459379492,
}
_SMALL_KERNEL = 500_000  # taps in all: 2 MB, and about 30 MB while torchaudio computes them
_LARGEST_KERNEL = 2_500_000  # 10 MB, and about 110 MB meanwhile: only for rates that nobody records at
_GOOD_RATIO = 10_000  # an error of one part in this many will do
_BLOCK_FRAMES = 1 << 18  # at most so many frames, and so many values over all channels x 4, at a time


def _reach(new: int, old: int) -> int:
    """Input samples which the filter sees on either side: 64 zero crossings of the lower rate."""
    return -(-68 * old // min(new, old))  # 64 / 0.9476 = 67.5


def _kernel_size(new: int, old: int) -> int:
    return new * (2 * _reach(new, old) + old)


@functools.lru_cache(maxsize=1024)
def _ratio(sample_rate: int) -> tuple[int, int]:
    """16,000 / sample_rate as (new, old) in lowest terms, or the nearest ratio with a small kernel."""
    common = math.gcd(SAMPLE_RATE, sample_rate)
    new, old = SAMPLE_RATE // common, sample_rate // common
    if _kernel_size(new, old) <= _SMALL_KERNEL:
        return new, old
    best, best_error = (1, 1), abs(SAMPLE_RATE - sample_rate)  # |old * 16,000 - new * rate|, per `new`
    for new in itertools.count(1):
        old = max(1, (2 * new * sample_rate + SAMPLE_RATE) // (2 * SAMPLE_RATE))
        good = best_error * _GOOD_RATIO <= best[0] * sample_rate
        if _kernel_size(new, old) > (_SMALL_KERNEL if good else _LARGEST_KERNEL):
            break
        error = abs(old * SAMPLE_RATE - new * sample_rate)
        if error * best[0] < best_error * new:
            best, best_error = (new, old), error
    return best


def resampled_length(frames: int, sample_rate: int) -> int:
    """Samples at 16 kHz which `frames` frames at `sample_rate` Hz become: rounded up, so 1 stays 1.

    Whole-number arithmetic: torchaudio's own length passes through a float32 and is off by one for
    some recordings over 17 minutes.
    """
    new, old = _ratio(sample_rate)
    return -(-frames * new // old)


def _power_of_two(n: int) -> int:
    """The least that is not below n."""
    return 1 << (n - 1).bit_length()


@functools.lru_cache(maxsize=4)
def _resampler(new: int, old: int) -> Callable[[Tensor], Tensor]:
    """`torchaudio.functional.resample` with its kernel kept: making it takes ten times as long as using it."""
    # A torchaudio built for another torch fails while loading its library: OSError, or worse.
    try:
        from torchaudio.transforms import Resample
    except Exception as error:
        try:
            found = f"torchaudio {importlib.metadata.version('torchaudio')}"
        except importlib.metadata.PackageNotFoundError:
            found = "no torchaudio"
        raise MissingLibraryError(
            f"resampling to {SAMPLE_RATE} Hz needs torchaudio, which cannot be imported "
            f"({type(error).__name__}: {error}); found {found} beside torch {torch.__version__}: "
            "install the torchaudio build that matches this torch, or give 16 kHz audio"
        ) from error
    # The kernel in float64, then rounded once: computed in float32 it is 4e-5 off.
    return Resample(old, new, **_KAISER_BEST, dtype=torch.float64).float()


def _at_16_khz(blocks: Iterable[Tensor], frames: int, sample_rate: int) -> Tensor:
    """Consecutive mono blocks, `frames` samples together -> (S,). A block may be reused once taken.

    Each output sample is the same sum of products as if the whole were resampled at once. A window
    of whole periods (`old` inputs, `new` outputs) slides over the input; outputs within `margin`
    periods of an inner edge lack neighbours and belong to the window before or after:

        input     |--margin--|------------------------|--margin--|
        outputs   | written  |  written from here     |   next   |
    """
    new, old = _ratio(sample_rate)
    out = torch.empty(resampled_length(frames, sample_rate), dtype=torch.float32)
    written = 0
    if sample_rate == SAMPLE_RATE:  # nothing to compute, and no torchaudio needed
        for block in blocks:
            out[written : written + len(block)] = block
            written += len(block)
        return out
    kernel = _resampler(new, old)
    margin = -(-_reach(new, old) // old)  # periods
    # A power of two of periods, in the last window too: every new length of a convolution leaves up
    # to 2 MB behind in oneDNN's cache and a fragmented heap, without end in a data-loader worker.
    periods = _power_of_two(max(_BLOCK_FRAMES // old, 4 * margin))
    window = torch.zeros(min(periods, _power_of_two(-(-frames // old))) * old)
    filled, done = 0, 0  # inputs in the window; periods at its front that need no writing
    for block in blocks:
        while len(block):
            if filled == len(window):
                part = kernel(window)[done * new : (periods - margin) * new]
                out[written : written + len(part)] = part
                written += len(part)
                filled, done = 2 * margin * old, margin
                window[:filled] = window[-filled:].clone()
            taken = min(len(block), len(window) - filled)
            window[filled : filled + taken] = block[:taken]
            filled += taken
            block = block[taken:]
    window[filled:] = 0  # as the kernel sees past the end anyway
    window = window[: _power_of_two(-(-filled // old)) * old]
    out[written:] = kernel(window)[done * new :][: len(out) - written]
    return out


# Checks shared by files and arrays ----------------------------------------------------------------


def _checked_rate(name: str, sample_rate: int) -> int:
    try:
        rate = operator.index(sample_rate)
    except TypeError:
        rate = 0
    if not MIN_RATE <= rate <= MAX_RATE:
        raise AudioError(
            f"{name}: found a sample rate of {sample_rate!r} Hz, expected a whole number from {MIN_RATE} "
            f"to {MAX_RATE}; if the header is wrong, rewrite it with the rate of the recording"
        )
    return rate


def resample(waveform: Tensor, sample_rate: int) -> Tensor:
    """Change a waveform's rate to 16 kHz with a long Kaiser-windowed sinc filter.

    Args:
        waveform: (S_in,) floating point at `sample_rate`, at least one sample.
        sample_rate: Hz, a whole number from 4,000 to 192,000. A rate whose ratio to 16,000 has
            large terms (44,101 Hz) is taken as the nearest that has not: within 1e-4 of it.

    Returns:
        (S,) float32 on the CPU, S = ``resampled_length(S_in, sample_rate)``. At 16 kHz the waveform
        itself, and torchaudio is not imported.

    Raises:
        AudioError: rate or shape out of range; MissingLibraryError: torchaudio is missing or does not match torch.
    """
    rate = _checked_rate("resample", sample_rate)
    if waveform.ndim != 1 or waveform.shape[0] == 0 or not waveform.is_floating_point():
        raise AudioError(
            f"resample: found {tuple(waveform.shape)} {waveform.dtype}, expected a floating-point "
            "waveform (S,) with at least one sample; as_waveform takes channels and integers"
        )
    if rate == SAMPLE_RATE:
        return waveform.to("cpu", torch.float32)
    blocks = (block.detach().to("cpu", torch.float32) for block in waveform.split(_BLOCK_FRAMES))
    return _at_16_khz(blocks, waveform.shape[0], rate)


def normalise(waveform: Tensor) -> Tensor:
    """Zero mean and unit variance over the utterance, as Hugging Face's Wav2Vec2FeatureExtractor.

    (x - mean) / sqrt(var + 1e-7), var being the population's. In float64, in which the mean of a
    constant is that constant, so silence and any constant give exact zeros.

    Args:
        waveform: (S,) floating point, at least one sample, finite.

    Returns:
        (S,) float32.
    """
    if waveform.ndim != 1 or waveform.shape[0] == 0:
        raise AudioError(f"normalise: found shape {tuple(waveform.shape)}, expected (S,) with S >= 1")
    wide = waveform.double()
    variance, mean = torch.var_mean(wide, correction=0)
    return ((wide - mean) / torch.sqrt(variance + 1e-7)).float()


_PIECE = 1 << 14  # frames that are copied to float64 at a time: more do not stay in a processor's cache


class _Channels:
    """Sums over the frames of a recording which tell how far its channels cancel each other in their mean.

    In float64: the sum of each channel (C,), of the squares of all, and of those of their mean.
    """

    def __init__(self) -> None:
        self.frames, self.sums, self.squares, self.mixed = 0, torch.zeros(()), 0.0, 0.0

    def add(self, block: Tensor, mono: Tensor) -> None:
        """Count a block (frames, C) and its mean over channels (frames,)."""
        self.frames += len(block)
        for columns, mean in zip(block.split(_PIECE), mono.split(_PIECE), strict=True):
            wide, narrow = columns.double(), mean.double()
            self.sums = self.sums + wide.sum(0)
            self.squares += float(torch.dot(wide.reshape(-1), wide.reshape(-1)))
            self.mixed += float(torch.dot(narrow, narrow))

    def __add__(self, other: "_Channels") -> "_Channels":
        both = _Channels()
        both.frames, both.sums = self.frames + other.frames, self.sums + other.sums
        both.squares, both.mixed = self.squares + other.squares, self.mixed + other.mixed
        return both

    def warning(self) -> str | None:
        """One sentence where the mix has lost what the channels hold, else None; see `_CANCELLED`."""
        if not self.frames:
            return None
        mean = self.sums / self.frames  # a constant is no sound
        channels = self.squares / self.frames / len(mean) - float(mean.square().mean())
        mixed = max(self.mixed / self.frames - float(mean.mean()) ** 2, 0.0)
        if channels < _QUIET**2 or mixed * len(mean) > _CANCELLED * channels:
            return None
        lost = 10 * math.log10(channels / mixed) if mixed > 1e-10 * channels else math.inf
        by = f"is {lost:.0f} dB below them" if lost < 100 else "is silent"
        return (
            f"the {len(mean)} channels cancel each other: their mean, which is recognised, {by}; one is inverted "
            "perhaps: pass one channel alone"
        )


def level_warning(waveform: Tensor) -> str | None:
    """Say in one sentence why nobody speaks in this sound; None where somebody may.

    Levels alone are judged, so noise and music pass. Speech, whispered or far from the microphone, has a hundred
    times the sound that is asked for here, and a tenth of the clipping.

    Args:
        waveform: (S,) floating point at 16 kHz, full scale 1, at least one sample.
    """
    if len(waveform) < _TOO_SHORT:
        return None
    least = min(_LEAST_SOUND * SAMPLE_RATE, len(waveform) / 4)
    some = waveform[::8]  # of speech an eighth of its samples are enough, and the rest need not be looked at
    for part in (some, waveform):
        loud = int(torch.count_nonzero((part - part.mean()).abs_() > _QUIET))  # a constant is no sound
        if loud >= least:
            break
    if loud < least:
        return (
            f"silent: {1000 * loud / SAMPLE_RATE:.0f} ms of {len(waveform) / SAMPLE_RATE:.2f} s are above "
            f"{20 * math.log10(_QUIET):.0f} dBFS, which is no speech; what is recognised means nothing"
        )
    near = some.abs() > _NEAR_FULL_SCALE
    share = int(torch.count_nonzero(near)) / len(near)
    if share > _CLIPPED and float(waveform.abs().max()) < _OVERSHOOT:
        return f"clipped: {100 * share:.0f} % of it is within 1 dB of full scale; it was recorded too loudly"
    return None


def joined_warnings(*warnings: str | None) -> str | None:
    """One text of those that say something."""
    return "; ".join(w for w in warnings if w) or None


def _mono(block: Tensor, name: str, first_frame: int, sample_rate: int, channels: _Channels) -> Tensor:
    """(frames, channels) -> (frames,), the mean over channels; refuses NaN, infinity, integer range."""
    low, high = torch.aminmax(block)  # both are NaN if any value is; nothing is allocated
    if not (low >= -_MAX_AMPLITUDE and high <= _MAX_AMPLITUDE):
        wrong = ~torch.isfinite(block)
        if wrong.any():
            frame, channel = wrong.nonzero()[0].tolist()
            advice = "samples must be finite; mend or leave out this recording"
        else:
            frame, channel = (block.abs() > _MAX_AMPLITUDE).nonzero()[0].tolist()
            advice = "full scale is 1; divide integers stored as floats by 32768 (16 bit) or 2147483648 (32 bit)"
        at = first_frame + frame
        raise AudioError(
            f"{name}: found a sample of {block[frame, channel].item():g} at frame {at} "
            f"({at / sample_rate:.3f} s), channel {channel}; {advice}"
        )
    if block.shape[1] == 1:
        return block[:, 0]
    # For two channels the very same as `mean`, in a twentieth of the time.
    mono = (block[:, 0] + block[:, 1]).mul_(0.5) if block.shape[1] == 2 else block.mean(dim=1)
    channels.add(block, mono)
    return mono


def _block_frames(channels: int) -> int:
    return min(_BLOCK_FRAMES, 4 * _BLOCK_FRAMES // channels)


_FULL_SCALE = {
    torch.float16: 1.0,
    torch.bfloat16: 1.0,
    torch.float32: 1.0,
    torch.float64: 1.0,
    torch.int16: 2.0**15,
    torch.int32: 2.0**31,
}


def _as_columns(samples: np.ndarray | Tensor, name: str) -> Tensor:
    """(S, channels), of a dtype in `_FULL_SCALE`."""
    if isinstance(samples, np.ndarray) and samples.dtype.kind in "fi" and samples.dtype.itemsize <= 8:
        # torch takes neither foreign byte order nor negative strides, and warns about read-only arrays.
        samples = torch.from_numpy(np.require(samples, samples.dtype.newbyteorder("="), ["C", "W"]))
    if not isinstance(samples, Tensor) or samples.dtype not in _FULL_SCALE:
        raise AudioError(
            f"{name}: found {type(samples).__name__} of {getattr(samples, 'dtype', 'unknown type')}, expected "
            "a numpy array or torch tensor of floats with full scale 1, or of int16 or int32 PCM"
        )
    if samples.ndim not in (1, 2) or 0 in samples.shape:
        raise AudioError(f"{name}: found shape {tuple(samples.shape)}, expected (S,) or (S, channels), S >= 1")
    columns = samples.detach()[:, None] if samples.ndim == 1 else samples.detach()
    channels = columns.shape[1]
    if channels > MAX_CHANNELS:
        raise AudioError(
            f"{name}: found shape {tuple(samples.shape)}, that is {channels} channels, expected at most "
            f"{MAX_CHANNELS}; if time is the second dimension, pass samples.T"
        )
    return columns


def read_samples(samples: np.ndarray | Tensor, sample_rate: int) -> tuple[Tensor, str | None]:
    """As :func:`as_waveform`, with what is wrong with its sound, as `Prediction.warning` says it."""
    name = "as_waveform"
    rate = _checked_rate(name, sample_rate)
    columns = _as_columns(samples, name)
    frames, count = columns.shape
    scale = _FULL_SCALE[columns.dtype]
    step = _block_frames(count)
    channels = _Channels()
    blocks = (
        _mono(columns[i : i + step].to("cpu", torch.float32) / scale, name, i, rate, channels)
        for i in range(0, frames, step)
    )
    waveform = _at_16_khz(blocks, frames, rate)
    return waveform, channels.warning() or level_warning(waveform)


def as_waveform(samples: np.ndarray | Tensor, sample_rate: int) -> Tensor:
    """Take sound which the caller already has: the checks and the result of :func:`load_audio`.

    Args:
        samples: (S_in,) or (S_in, channels), time first, up to 32 channels; floating point with full
            scale 1, or int16 or int32 PCM, which is scaled to it.
        sample_rate: Hz, a whole number from 4,000 to 192,000.

    Returns:
        (S,) float32 mono at 16 kHz on the CPU, sharing no memory with `samples`.

    Raises:
        AudioError: another type, shape or rate; no samples; NaN, infinity or |sample| > 100.
    """
    return read_samples(samples, sample_rate)[0]


# Containers: what the first bytes say, before libsndfile sees the file ----------------------------


class _Bytes(Protocol):
    """What this part needs of a file: it is one, or a part of one."""

    def seek(self, offset: int, whence: int = 0, /) -> int:
        """As of a file."""

    def read(self, count: int, /) -> bytes:
        """As of a file."""


class _Part:
    """A file from one byte on to another, some of them replaced: what libsndfile then takes for the whole."""

    def __init__(self, file: _Bytes, start: int, end: int, replaced: dict[int, bytes] | None = None):
        self._file, self._start, self._size, self._replaced = file, start, end - start, replaced or {}
        self._at = 0

    def seek(self, offset: int, whence: int = 0, /) -> int:
        """As of a file."""
        self._at = max(0, offset + (0, self._at, self._size)[whence])
        return self._at

    def tell(self) -> int:
        """As of a file."""
        return self._at

    def read(self, count: int, /) -> bytes:
        """As of a file."""
        self._file.seek(self._start + self._at)
        data = self._file.read(max(0, min(count, self._size - self._at)))
        for position, field in self._replaced.items():
            first, last = max(position, self._at), min(position + len(field), self._at + len(data))
            if first < last:
                piece = field[first - position : last - position]
                data = data[: first - self._at] + piece + data[last - self._at :]
        self._at += len(data)
        return data

    def write(self, data: bytes) -> int:
        """Never called where one reads, but soundfile asks for the method."""
        raise OSError("read only")


class _Source(NamedTuple):
    """What was found out about a container, for who opens it."""

    frames: int | None = None  # where libsndfile needs to be told, or to be checked
    part: _Part | None = None  # where libsndfile needs to see something else than the file
    warning: str | None = None


def _unpack(layout: str, file: _Bytes, name: str) -> tuple[Any, ...]:
    data = file.read(struct.calcsize(layout))
    if len(data) < struct.calcsize(layout):
        raise AudioError(f"{name}: ends inside its header: truncated or not a sound file; copy it again")
    return struct.unpack(layout, data)


def _at(file: _Bytes, position: int, count: int) -> bytes:
    file.seek(position)
    return file.read(count)


def _joined(name: str, found: str) -> AudioError:
    return AudioError(
        f"{name}: holds more sound than its header declares ({found}): files that were joined byte by byte, of "
        "which players and programs read the first alone. Join sound, not files (sox ONE TWO BOTH.wav), or, where "
        "this file is all you have: ffmpeg -i INPUT OUTPUT.wav, and compare how long it is"
    )


def _find(file: _Bytes, wanted: bytes, position: int, size: int) -> Iterator[int]:
    """Each place of these bytes, from `position` on; in blocks, so that memory is bounded."""
    block, overlap = 1 << 20, len(wanted) - 1
    while position < size:
        data = _at(file, position, block)
        place = data.find(wanted)
        while place >= 0:
            yield position + place
            place = data.find(wanted, place + 1)
        if len(data) <= overlap:
            return
        position += len(data) - overlap


# Tags: before the sound in any format, behind it in MP3


def _id3_length(head: bytes) -> int:
    """Bytes of the ID3v2 tag that begins with these ten, with its header and perhaps footer; 0 where none does."""
    if len(head) < 10 or head[:3] != b"ID3" or head[3] == 0xFF or max(head[6:10]) > 0x7F:
        return 0
    length = sum(byte << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=True))
    return 10 + length + (10 if head[5] & 0x10 else 0)


def _after_tags(file: _Bytes, position: int, size: int) -> int:
    """Where tags and padding with zero bytes, in any order and number, end."""
    padding = 1 << 20  # a file of nothing but zeros is not looked through to its end
    while position < size:
        head = _at(file, position, 32)
        if length := _id3_length(head):
            position += length
        elif head[:8] == b"APETAGEX" and len(head) == 32:
            position += 32 + struct.unpack_from("<I", head, 12)[0]
        elif head[:3] == b"TAG":  # ID3v1, behind the first of joined files
            position += 227 if head[3:4] == b"+" else 128
        elif head[:1] == b"\0" and padding > 0:
            data = _at(file, position, 1 << 16)
            zeros = len(data) - len(data.lstrip(b"\0"))
            position, padding = position + zeros, padding - zeros
        else:
            break
    return min(position, size)


def _before_tags(file: _Bytes, size: int) -> int:
    """Where tags begin that are found from the end of a file: ID3v1 (and its extension), ID3v2, APE, Lyrics3."""
    end = 0
    while end != size:
        end = size
        if size >= 128 and _at(file, size - 128, 3) == b"TAG":
            size -= 128
            if size >= 227 and _at(file, size - 227, 4) == b"TAG+":
                size -= 227
        tail = _at(file, max(0, size - 32), 32)
        length = 0
        if tail[:8] == b"APETAGEX" and len(tail) == 32:  # a footer; the flag says whether there is a header too
            of_items, _, flags = struct.unpack_from("<III", tail, 12)
            length = of_items + (32 if flags >> 31 else 0)
        elif tail[-10:-7] == b"3DI" and tail[-5] & 0x10:
            length = _id3_length(b"ID3" + tail[-7:])  # a footer is a header with another name
        elif tail[-9:] == b"LYRICS200" and tail[-15:-9].isdigit():
            length = 15 + int(tail[-15:-9])
        size -= length if length < size else 0
    return size


# WAV

# What programs leave for a size that they cannot go back to fill in, because they write into a pipe or are
# stopped: 0, sox's, and the largest numbers, less the size of a header perhaps.
_OPEN_SIZES = (0, 0x7FFFF000, 0x80000000)
_LARGEST_SIZES, _LESS = (0x7FFFFFFF, 0xFFFFFFFF), 256
_MUCH_MORE = 4096  # bytes behind the sound of a WAV which are no chunks: less is a tag of some program


def _is_open(size: int, block_align: int) -> bool:
    whole_frames = 0x7FFFF000 - 0x7FFFF000 % block_align  # as sox writes it
    return size in (*_OPEN_SIZES, whole_frames) or any(0 <= n - size <= _LESS for n in _LARGEST_SIZES)


def _chunks_end(file: _Bytes, position: int, size: int) -> int:
    """Where the chunks that follow one another from here end; a second file's `RIFF` is none of them."""
    for _ in range(1000):  # real files have a handful
        head = _at(file, position, 8)
        kind, length = head[:4], int.from_bytes(head[4:], "little")
        if len(head) < 8 or not all(32 <= byte < 127 for byte in kind) or kind in (b"RIFF", b"RF64"):
            break
        if position + 8 + length > size:
            break
        position = min(position + 8 + length + (length & 1), size)
    return position


def _second_wav(file: _Bytes, position: int, size: int) -> int | None:
    """Where another WAV file begins, if one does."""
    for place in _find(file, b"WAVE", position, size):
        if _at(file, place - 8, 4) in (b"RIFF", b"RF64"):
            return place - 8
    return None


class _WavSound(NamedTuple):
    """Where the sound of a WAV or RF64 file begins, and what is said of it."""

    body: int  # place of its first byte
    declared: int  # bytes
    block_align: int  # bytes of a frame
    ds64: int  # place of the sizes that do not fit into 32 bits; 0 without them, as in all but RF64


def _wav_sound(file: _Bytes, size: int, name: str) -> _WavSound:
    position, ds64, data_size_64, block_align = 12, 0, 0, 0
    for _ in range(1000):  # chunks; real files have a handful
        if position + 8 > size:
            break
        file.seek(position)
        kind, length = _unpack("<4sI", file, name)
        body = position + 8
        if kind == b"ds64":  # RF64: the sizes that do not fit into 32 bits
            ds64, (_, data_size_64) = body, _unpack("<QQ", file, name)
        elif kind == b"fmt " and not block_align:
            coding, _, _, _, block_align, _ = _unpack("<HHIIHH", file, name)
            if coding == 0xFFFE:  # extensible: the coding is the start of a GUID
                *_, coding = _unpack("<HHIH", file, name)
            if coding not in _WAV_CODINGS or not block_align:
                found = _REFUSED_WAV_CODINGS.get(coding, f"coding 0x{coding:04x}, {block_align} bytes per frame")
                raise AudioError(f"{name}: found a WAV file with {found}; {_ADVICE}")
        elif kind == b"data":
            if not block_align:
                raise AudioError(f"{name}: its data chunk comes before its format; {_ADVICE}")
            declared = data_size_64 if data_size_64 and length == 0xFFFFFFFF else length
            return _WavSound(body, declared, block_align, ds64)
        position = body + length + (length & 1)
    raise AudioError(f"{name}: ends before its sound begins (no data chunk): truncated or damaged; copy it again")


def _wav_source(file: _Bytes, size: int, name: str) -> _Source:
    """Frames in a WAV or RF64 file, having checked that all the sound it declares is there, and no more.

    libsndfile shortens its own header's figure to what the file holds, so a cut would go unseen.
    """
    body, declared, block_align, ds64 = _wav_sound(file, size, name)
    held, after = size - body, min(body + declared, size)
    rest = max(_chunks_end(file, place, size) for place in (after, min(after + (declared & 1), size)))
    # A size of the list that is right, because nothing or complete chunks follow, is no placeholder.
    stream = _is_open(declared, block_align) and (declared > held or rest < size)
    if declared > held and not stream:
        raise AudioError(
            f"{name}: truncated: its header declares {declared} bytes of sound, the file holds {held} "
            f"({100 * held / declared:.1f} %); copy it again, or, if only its header is wrong, "
            "rewrite it: ffmpeg -i INPUT OUTPUT.wav"
        )
    second = _second_wav(file, body if stream else after, size) if stream or rest < size else None
    if second is not None:
        raise _joined(name, f"another WAV file begins at byte {second}")
    if not stream:
        more = size - rest
        warning = None
        if more > max(_MUCH_MORE, 0.01 * declared):
            warning = f"{more} bytes behind the sound that its header declares are unknown and were not read"
        return _Source(declared // block_align, None, warning)
    # libsndfile takes 0 as 0.
    sizes = {4: struct.pack("<I", min(size - 8, 0xFFFFFFFF)), body - 4: struct.pack("<I", min(held, 0xFFFFFFFF))}
    if ds64:
        sizes |= {body - 4: b"\xff" * 4, ds64: struct.pack("<QQQ", size - 8, held, held // block_align)}
    part = _Part(file, 0, size, sizes)
    warning = (
        f"its header leaves its length open (0x{declared:x} bytes, as programs write that cannot go back): read "
        "to the end of the file, so nothing would show that it was cut"
    )
    return _Source(held // block_align, part, warning)


# OGG


def _ogg_source(file: _Bytes, size: int, name: str) -> _Source:
    """The first packet is Vorbis, the last page is there, and no other stream: lengths would be wrong.

    Page: "OggS", version, flags (2 = first, 4 = last), granule (8), serial (4), number, CRC, n, n segment sizes.
    """
    several = f"{name}: found several OGG streams in one file, expected one; {_ADVICE}"
    position, end, last = 0, 0, False
    serial = latest = 0
    while position < size:
        head = _at(file, position, 27 + 255)
        if head[:4] != b"OggS":  # damage, or what is no OGG behind it
            position = next(_find(file, b"OggS", position, size), size)
            continue
        if len(head) < 27:
            break
        body = position + 27 + head[26]
        page_end = body + sum(head[27 : 27 + head[26]])
        packet = _at(file, body, 8)
        number = struct.unpack_from("<I", head, 14)[0]
        if position == 0:
            serial = number
            if packet[:7] != b"\x01vorbis":
                found = {b"Opus": "Opus", b"\x7fFLA": "FLAC", b"Spee": "Speex"}.get(packet[:4], "no Vorbis")
                raise AudioError(f"{name}: found an OGG file with {found}; {_ADVICE}")
        elif head[5] & 2 and packet[:7] == b"\x01vorbis":
            raise AudioError(several)
        if page_end > size:
            last = False
            break
        end, last, latest = page_end, bool(head[5] & 4), number
        position = page_end
    if last and latest != serial:
        raise AudioError(several)
    if not last:
        raise AudioError(
            f"{name}: truncated: its last OGG page is cut or is not marked as the last; copy it again, "
            "or keep what is there: ffmpeg -i INPUT OUTPUT.wav"
        )
    return _Source(None, _Part(file, 0, end) if end < size else None)


# FLAC


def _flac_frames(file: _Bytes, start: int) -> int:
    """Where the metadata of the FLAC that begins at `start` ends: pictures and other blocks may hold anything."""
    position = start + 4
    for _ in range(1000):  # real files have a handful
        head = _at(file, position, 4)
        position += 4 + int.from_bytes(head[1:], "big")
        if not head or head[0] & 0x80:  # the last one
            break
    return position


@functools.lru_cache(maxsize=1024)
def _second_flac(name: str, start: int, size: int, changed: int) -> int | None:
    """Where in this file another FLAC begins. Kept, for many excerpts of one file; `changed` is its time."""
    with Path(name).open("rb", buffering=0) as file:
        for place in _find(file, b"fLaC", _flac_frames(file, start), size):
            head = _at(file, place + 4, 4)  # of a block of 34 bytes, the first that a FLAC has
            if head in (b"\0\0\0\x22", b"\x80\0\0\x22"):
                return place
    return None


# MP3

_MP3_KBIT = {  # MPEG 1 and MPEG 2 or 2.5, layer III, by index; 0 is "free" and 15 is invalid
    3: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 0),
    2: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160, 0),
}
_MP3_RATES = (44_100, 48_000, 32_000, 0)
_MP3_JUNK = 4096  # bytes behind the last frame that are neither sound nor a tag; more may have been sound


class _Mp3Frame(NamedTuple):
    """What the header of a layer III frame says."""

    size: int  # bytes
    samples: int
    kind: tuple[int, int, bool]  # version, rate, mono: equal in all frames of one recording


def _mp3_frame(header: bytes) -> _Mp3Frame | None:
    """The layer III frame whose first four bytes these are; None if they are not."""
    if len(header) < 4 or header[0] != 0xFF or header[1] & 0xE6 != 0xE2:
        return None
    version = header[1] >> 3 & 3  # 3: MPEG 1, 2: MPEG 2 (half the rates), 0: MPEG 2.5 (a quarter)
    rate = _MP3_RATES[header[2] >> 2 & 3] >> {3: 0, 2: 1, 0: 2, 1: 16}[version]
    kbit = _MP3_KBIT[3 if version == 3 else 2][header[2] >> 4]
    if not rate or not kbit:
        return None
    samples = 1152 if version == 3 else 576
    size = samples // 8 * kbit * 1000 // rate + (header[2] >> 1 & 1)
    return _Mp3Frame(size, samples, (version, rate, header[3] >> 6 == 3))


def _mp3_lead(rate: int) -> int:
    """Sample frames before an excerpt that have to be decoded for it to be exact.

    A frame's bits may begin up to 511 bytes back (MPEG 1) or 255 (MPEG 2 and 2.5), of sound alone: as many
    frames as hold that at the lowest bit rate, with the longest headers (stereo, with a checksum). Until they are
    there libmpg123 leaves frames out, and keeps their bytes for those that follow. Two granules more, since a
    granule overlaps the one before it, and the filter behind that sees 480 samples back; and one for rounding.
    """
    samples, back, header, kbit = (1152, 511, 38, 32) if rate >= 32_000 else (576, 255, 23, 8)
    held = samples // 8 * kbit * 1000 // rate - header
    return samples * (-(-back // held) + 3)


def _next_mp3_frame(file: _Bytes, position: int, size: int) -> int | None:
    """Where two MPEG frames of one kind follow each other, or one ends the file; None if nowhere from here on."""
    for place in _find(file, b"\xff", position, size):
        frame = _mp3_frame(_at(file, place, 4))
        if frame is not None:
            following = _mp3_frame(_at(file, place + frame.size, 4))
            if place + frame.size == size or (following is not None and following.kind == frame.kind):
                return place
    return None


def _mp3_runs(file: _Bytes, size: int) -> Iterator[tuple[int, int, int]]:
    """Runs of MPEG frames of one kind: where each begins and ends, and its sample frames."""
    position: int | None = 0
    while position is not None and position < size:
        begin, samples, kind = position, 0, None
        while position < size:
            frame = _mp3_frame(_at(file, position, 4))
            if frame is None or frame.kind != (kind or frame.kind):
                break
            kind, samples, position = frame.kind, samples + frame.samples, position + frame.size
        if samples:
            yield begin, position, samples
        else:
            position = _next_mp3_frame(file, position, size)


def _mp3_length(file: _Bytes, size: int, name: str) -> int:
    """Sample frames of an MP3 that declares no length, all of whose frames follow one another."""
    runs = _mp3_runs(file, size)
    _, end, samples = next(runs)
    if end > size:
        raise AudioError(f"{name}: truncated: its last MPEG frame is cut; copy it again")
    rest = _after_tags(file, end, size)
    following = next(runs, None)
    if following is not None and following[0] == rest:
        raise _joined(name, f"behind a tag, or at another rate, another recording begins at byte {rest}")
    if following is not None or size - rest > _MP3_JUNK:
        raise AudioError(f"{name}: damaged MP3: no MPEG frame at byte {end}; copy it again")
    return samples


def _mp3_source(file: _Bytes, size: int, name: str) -> _Source:
    """Sample frames of an MP3 that declares none, by its MPEG frames; it must not hold more than it declares.

    Without a Xing or Info tag libsndfile guesses the length from the first frame's bit rate, and a
    recording of variable bit rate would lose, say, two thirds of its sound in silence.
    """
    first = _at(file, 0, 64)  # the tag stands after at most 4 + 2 + 32 bytes of headers
    frame, tag = _mp3_frame(first), max(first.find(b"Xing"), first.find(b"Info"))
    assert frame is not None, "who calls has seen it"
    end = _before_tags(file, size)
    if not 0 < tag <= 38:
        return _Source(_mp3_length(file, end, name))
    if len(first) < tag + 16:
        raise AudioError(f"{name}: truncated: it ends inside its first MPEG frame; copy it again")
    flags, frames, sound = struct.unpack_from(">III", first, tag + 4)
    if not flags & 1 or not frames:
        return _Source(_mp3_length(file, end, name) - frame.samples)
    # Where both are there, bytes follow frames. A percent is left to encoders that count otherwise: the
    # decoder finds a smaller cut by the frames.
    declared = sound if flags & 2 else 0
    if size < 0.99 * declared:
        raise AudioError(
            f"{name}: truncated: its header declares {declared} bytes of sound, the file holds {size} "
            f"({100 * size / declared:.1f} %); copy it again, or keep what is there: "
            "ffmpeg -i INPUT OUTPUT.wav"
        )
    if _next_mp3_frame(file, declared, end) is not None:
        runs = list(_mp3_runs(file, end))
        held = sum(samples for *_, samples in runs) // frame.samples - 1  # without the frame of the tag itself
        if held > frames + 1:  # some encoders count that one too
            raise _joined(name, f"{frames} MPEG frames of {held} or more")
    return _Source()


# All of them


def _not_sound(head: bytes, name: str) -> AudioError:
    """What stands in place of sound, as far as its first bytes tell."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"version https://git-lfs", b"version https://hawser")):
        return AudioError(
            f"{name}: found a git-lfs pointer, not the sound itself: fetch it in the repository that it is from: "
            "git lfs install; git lfs pull (a ZIP of GitHub holds pointers alone: clone the repository)"
        )
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return AudioError(f"{name}: found a page of the web (HTML or XML), not sound: download it again")
    found = "MP4 or M4A" if head[4:8] == b"ftyp" else _REFUSED_MAGIC.get(head[:4])
    return AudioError(f"{name}: found {found or f'an unknown format (first bytes {head[:12]!r})'}; {_ADVICE}")


def _container(file: Any, size: int, name: str) -> _Source:
    """The allow-list, from the first bytes of an open file behind tags and padding."""
    start = _after_tags(file, 0, size)
    inner = _Part(file, start, size) if start else file
    head = _at(inner, 0, 64)
    if head[:4] in (b"RIFF", b"RF64") and head[8:12] == b"WAVE":
        source = _wav_source(inner, size - start, name)
    elif head[:4] == b"OggS":
        source = _ogg_source(inner, size - start, name)
    elif head[:4] == b"fLaC":
        second = _second_flac(name, start, size, os.fstat(file.fileno()).st_mtime_ns)
        if second is not None:
            raise _joined(name, f"another FLAC begins at byte {second}")
        source = _Source()
    elif _mp3_frame(head) is not None:
        source = _mp3_source(inner, size - start, name)
        tag = _at(file, 0, 10)
        if start and start == _id3_length(tag) and not tag[5] & 0x10:
            return source  # one tag without a footer libsndfile passes over itself, and faster
    else:
        raise _not_sound(_at(file, 0, 64), name)  # with its zeros, which may be part of another format
    return source._replace(part=inner) if start and source.part is None else source


# Files --------------------------------------------------------------------------------------------


def _regular_file(path: Path) -> int:
    """The size in bytes of what must be a regular file. Asked before opening: a FIFO would block."""
    try:
        status = os.stat(path)  # follows links  # noqa: PTH116
    except FileNotFoundError as error:
        if path.is_symlink():
            raise AudioError(f"{path}: a broken link to {os.readlink(path)}; restore its target") from error  # noqa: PTH115
        raise AudioError(f"{path}: no such file (looked in {path.absolute().parent})") from error
    except (OSError, ValueError) as error:  # no permission, a circle of links, a zero byte, too long
        raise AudioError(f"{path}: cannot be reached: {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISREG(status.st_mode):
        kinds = {
            stat.S_IFDIR: "a folder",
            stat.S_IFIFO: "a named pipe",
            stat.S_IFCHR: "a device",
            stat.S_IFBLK: "a device",
            stat.S_IFSOCK: "a socket",
        }
        found = kinds.get(stat.S_IFMT(status.st_mode), "a special file")
        raise AudioError(f"{path}: found {found}, expected a regular sound file")
    if status.st_size == 0:
        raise AudioError(f"{path}: the file is empty (0 bytes), expected sound; copy it again")
    return status.st_size


def _soundfile() -> Any:
    try:
        import soundfile
    except Exception as error:  # OSError where the package is there but libsndfile is not
        raise MissingLibraryError(
            f"reading sound needs the soundfile package and libsndfile, which cannot be imported "
            f"({type(error).__name__}: {error}); install them: pip install soundfile, or apt install libsndfile1"
        ) from error
    return soundfile


def _excerpt(
    name: str, frames: int, sample_rate: int, start: float | None, end: float | None, max_seconds: float | None
) -> tuple[int, int]:
    """Seconds -> (first frame, number of frames), checked against the file's frames and the limit."""
    total = frames / sample_rate
    limit = MAX_SECONDS if max_seconds is None else max_seconds
    begin = 0.0 if start is None else start
    finish = total if end is None else end
    if not limit > 0:
        raise AudioError(f"{name}: max_seconds is {limit!r}, expected a number above 0")
    if not 0 <= begin < finish:  # also refuses NaN
        raise AudioError(f"{name}: found start={start} end={end} s, expected 0 <= start < end <= {total:.3f} s")
    if not finish <= total + _END_TOLERANCE:
        raise AudioError(f"{name}: end={end} s is past the recording's end at {total:.3f} s")
    first, last = round(begin * sample_rate), min(frames, round(finish * sample_rate))
    if first >= last:
        raise AudioError(f"{name}: start={start} end={end} s selects no sample at {sample_rate} Hz")
    if last - first > limit * sample_rate:
        raise AudioError(
            f"{name}: found {(last - first) / sample_rate:.1f} s of sound, expected at most {limit:g} s; "
            "select parts with start and end, or raise max_seconds"
        )
    return first, last - first


@contextlib.contextmanager
def _opened(
    path: str | os.PathLike[str], start: float | None, end: float | None, max_seconds: float | None
) -> Iterator[tuple[AudioInfo, int, Any]]:
    """The excerpt's description, its first frame and the open `soundfile.SoundFile`, all checks made."""
    path = Path(path)
    name = str(path)
    size = _regular_file(path)
    soundfile = _soundfile()
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(path.open("rb", buffering=0))  # so that seek moves the descriptor
            source = _container(file, size, name)
            (source.part or file).seek(0)
            # By descriptor: the file that was checked, and without a name whose extension libsndfile
            # would take for a format.
            sound = stack.enter_context(soundfile.SoundFile(source.part or file.fileno(), closefd=False))
        except OSError as error:
            raise AudioError(f"{name}: cannot be read: {error.strerror or error}") from error
        except RuntimeError as error:  # every error of libsndfile
            text = getattr(error, "error_string", str(error))
            raise AudioError(f"{name}: damaged header: libsndfile says: {text} Copy it again") from error
        # Else soundfile seeks after every read to where it is already, and in MP3 the next block begins wrongly.
        sound.seekable = lambda: False
        if sound.subtype not in _ALLOWED.get(sound.format, ()):
            raise AudioError(f"{name}: found {sound.format} with {sound.subtype}; {_ADVICE}")
        rate = _checked_rate(name, sound.samplerate)
        if sound.channels > MAX_CHANNELS:
            raise AudioError(f"{name}: found {sound.channels} channels, expected at most {MAX_CHANNELS}")
        frames = sound.frames if source.frames is None else source.frames
        if sound.format == "MP3" and sound.frames < frames:
            raise AudioError(
                f"{name}: this MP3 of variable bit rate declares no length (no Xing header), which libsndfile "
                "needs; convert it: ffmpeg -i INPUT OUTPUT.wav"
            )
        if sound.format != "MP3" and sound.frames != frames and frames:
            raise AudioError(
                f"{name}: its header contradicts itself ({frames} frames by its sizes, {sound.frames} by "
                "libsndfile); rewrite it: ffmpeg -i INPUT OUTPUT.wav"
            )
        if frames <= 0:
            raise AudioError(f"{name}: holds no samples, expected at least 1")
        if frames >= 1 << 62:
            raise AudioError(
                f"{name}: its header does not declare a length (written into a pipe), so a cut could not be "
                "seen; rewrite it: ffmpeg -i INPUT OUTPUT.flac"
            )
        first, frames = _excerpt(name, frames, rate, start, end, max_seconds)
        info = AudioInfo(
            path=path,
            sample_rate=rate,
            channels=sound.channels,
            frames=frames,
            seconds=frames / rate,
            num_samples=resampled_length(frames, rate),
            format=sound.format,
            subtype=sound.subtype,
            warning=source.warning,
        )
        yield info, first, sound


def _decoded(sound: Any, into: np.ndarray) -> tuple[int, str]:
    """Decode the next frames into an array (frames, channels): how many came, and why not more."""
    try:
        return len(sound.read(out=into)), ""
    except RuntimeError as error:  # FLAC reports a cut as an error, often without a text
        return 0, f" ({getattr(error, 'error_string', str(error)).strip() or 'decoder error'})"


def _ended(info: AudioInfo, declared: int, at: int, reason: str) -> AudioError:
    return AudioError(
        f"{info.path}: truncated or damaged{reason}: its header declares {declared} frames or "
        f"more, decoding ended near frame {at}; copy it again"
    )


def _go_to(sound: Any, info: AudioInfo, first: int) -> None:
    """Bring the decoder to the excerpt's first frame, in the state in which it comes there from the start.

    WAV and FLAC can be sought in. In OGG libsndfile comes out elsewhere near the end, and crashes where the
    headers leave it without a decoder: it is decoded from the start. In MP3 it seeks without what a frame's bits
    need of the frames before and makes up the rest: those are decoded too.
    """
    if not first:
        return
    start = {"OGG": 0, "MP3": first - _mp3_lead(info.sample_rate)}.get(info.format, first)
    buffer = np.empty((min(first, _block_frames(info.channels)), info.channels), dtype=np.float32)
    got, reason = _decoded(sound, buffer[:1])  # a decoder that gives no frame is none to seek with
    at = got
    if at and start > at:
        try:
            at = sound.seek(start)
        except RuntimeError as error:
            reason = f" ({getattr(error, 'error_string', str(error)).strip() or 'it cannot be sought in'})"
    while got and at < first and not reason:
        got, reason = _decoded(sound, buffer[: first - at])
        at += got
    if at != first or reason:
        raise _ended(info, first + info.frames, at, reason)


def _mono_blocks(sound: Any, info: AudioInfo, first: int, channels: _Channels) -> Iterator[Tensor]:
    """Decode the excerpt block by block, from where the decoder is; the same memory holds every block."""
    step = _block_frames(info.channels)
    buffer = np.empty((min(step, info.frames), info.channels), dtype=np.float32)
    for position in range(0, info.frames, step):
        wanted = min(step, info.frames - position)
        got, reason = _decoded(sound, buffer[:wanted])
        if got < wanted:
            raise _ended(info, first + info.frames, first + position + got, reason)
        block = torch.from_numpy(buffer[:wanted])
        yield _mono(block, str(info.path), first + position, info.sample_rate, channels)


def audio_info(
    path: str | os.PathLike[str],
    *,
    start: float | None = None,
    end: float | None = None,
    max_seconds: float | None = None,
) -> AudioInfo:
    """Describe a recording from its header, with every check that needs no decoding.

    Args:
        path: WAV, WAVEX, RF64, FLAC, OGG/Vorbis or MP3; links are followed.
        start, end: an excerpt in seconds; by default the whole recording. An `end` up to 0.02 s past
            the recording's end means its end: manifests round.
        max_seconds: the longest excerpt to accept, by default 3,600 s.

    Raises:
        AudioError: not a regular file; another format; truncated, where the header tells (WAV, RF64,
            OGG, MP3); outside 4-192 kHz or 32 channels; empty; an excerpt that is not there or too long.
    """
    with _opened(path, start, end, max_seconds) as (info, _, _):
        return info


def read_audio(
    path: str | os.PathLike[str],
    *,
    start: float | None = None,
    end: float | None = None,
    max_seconds: float | None = None,
) -> tuple[Tensor, str | None]:
    """As :func:`load_audio`, with what is wrong with its sound, as `Prediction.warning` says it."""
    with _opened(path, start, end, max_seconds) as (info, first, sound):
        _go_to(sound, info, first)
        channels = _Channels()
        waveform = _at_16_khz(_mono_blocks(sound, info, first, channels), info.frames, info.sample_rate)
        return waveform, joined_warnings(info.warning, channels.warning() or level_warning(waveform))


def load_audio(
    path: str | os.PathLike[str],
    *,
    start: float | None = None,
    end: float | None = None,
    max_seconds: float | None = None,
) -> Tensor:
    """Read a recording, or only an excerpt of it, as 16 kHz mono: the mean over its channels.

    Args:
        path, start, end, max_seconds: as for :func:`audio_info`.

    Returns:
        (S,) float32 on the CPU, full scale 1, S = ``audio_info(...).num_samples``. A 16 kHz mono
        recording comes back unchanged.

    Raises:
        AudioError: as for :func:`audio_info`; fewer frames than declared; NaN, infinity or
            |sample| > 100; a rate other than 16 kHz without a working torchaudio.
    """
    return read_audio(path, start=start, end=end, max_seconds=max_seconds)[0]


def _check_window(window: float, hop: float) -> None:
    if not (0 < hop <= window < math.inf):
        raise ConfigError(f"window is {window!r} s and hop {hop!r} s; expected 0 < hop <= window")


def _hop_frames(hop: float, rate: int) -> int:
    return max(1, round(hop * rate))


def _window_bounds(frames: int, rate: int, window: float, hop: float) -> Iterator[tuple[int, int]]:
    """(first frame, number of frames) of each window; see `load_windows`."""
    size, step = max(1, round(window * rate)), _hop_frames(hop, rate)
    for position in range(0, frames, step):
        last = position + size + min(rate, size) > frames  # what is left after it is too short
        yield position, frames - position if last else size
        if last:
            break


def read_windows(
    path: str | os.PathLike[str],
    *,
    window: float,
    hop: float,
    start: float | None = None,
    end: float | None = None,
) -> Iterator[tuple[float, float, Tensor, str | None]]:
    """As :func:`load_windows`, each with what is wrong with its sound, as `Prediction.warning` says it.

    Decoded once from the beginning to the end, whatever the windows share: what the next one needs is kept.
    """
    _check_window(window, hop)
    with _opened(path, start, end, math.inf) as (info, first, sound):
        _go_to(sound, info, first)
        rate = info.sample_rate
        step = _hop_frames(hop, rate)
        kept: deque[tuple[list[Tensor], _Channels]] = deque()  # pieces, cut where windows begin and end
        decoded = 0
        for position, frames in _window_bounds(info.frames, rate, window, hop):
            stop = position + frames
            while decoded < stop:
                count, channels = min(stop, (decoded // step + 1) * step) - decoded, _Channels()
                blocks = _mono_blocks(sound, replace(info, frames=count), first + decoded, channels)
                kept.append(([block.clone() for block in blocks], channels))
                decoded += count
            blocks = (block for piece, _ in kept for block in piece)
            waveform = _at_16_khz(blocks, frames, rate)
            cancelled = sum((channels for _, channels in kept), _Channels()).warning()
            warning = joined_warnings(info.warning, cancelled or level_warning(waveform))
            yield (first + position) / rate, (first + stop) / rate, waveform, warning
            passed = 0
            while kept and passed < step:  # to where the next window begins
                passed += sum(map(len, kept.popleft()[0]))


def load_windows(
    path: str | os.PathLike[str],
    *,
    window: float,
    hop: float,
    start: float | None = None,
    end: float | None = None,
) -> Iterator[tuple[float, float, Tensor]]:
    """Read a recording of any length, or an excerpt of it, window by window: memory is that of one window.

    Args:
        path, start, end: as for :func:`audio_info`; no length is too long.
        window: seconds of each; a remainder at the end under a second, or under a window where that is shorter,
            makes the last window longer.
        hop: seconds from the start of one to the start of the next; above 0, at most ``window``.

    Yields:
        (start, end, waveform): in seconds from the beginning of the file, and just what :func:`load_audio` returns
        for that excerpt.

    Raises:
        AudioError: as for :func:`load_audio`, where a window is reached; ConfigError: window or hop out of range.
    """
    for begin, finish, waveform, _ in read_windows(path, window=window, hop=hop, start=start, end=end):
        yield begin, finish, waveform


def array_windows(
    samples: np.ndarray | Tensor, sample_rate: int, *, window: float, hop: float
) -> Iterator[tuple[float, float, Tensor, str | None]]:
    """As `read_windows`, of sound which the caller already has: of what :func:`as_waveform` takes."""
    _check_window(window, hop)
    rate = _checked_rate("array_windows", sample_rate)
    if samples.ndim not in (1, 2) or 0 in samples.shape:
        as_waveform(samples, rate)  # says what is wrong with it
    for position, frames in _window_bounds(len(samples), rate, window, hop):
        start, end = position / rate, (position + frames) / rate
        try:
            waveform, warning = read_samples(samples[position : position + frames], rate)
        except (AudioError, RuntimeError) as error:
            raise AudioError(f"window from {start:g} to {end:g} s: {error}") from None
        yield start, end, waveform, warning

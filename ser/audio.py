"""Recordings in, 16 kHz mono waveforms out: the only file that opens sound.

A recording passes through four gates, each with one clear :class:`AudioError`:

1. the path is a regular file (a FIFO or a device would hang or never end);
2. its first bytes are a container and a coding on the allow-list, and what the container declares
   is all there. This file reads those bytes itself: libsndfile parses some 25 formats as soon as it
   opens a file, repairs a cut WAV in silence, and its ADPCM, CAF and other parsers have known faults;
3. libsndfile's header: rate, channels, length, all before anything of that length is allocated;
4. the samples: as many as declared, finite, in range.

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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

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
SUFFIXES = (".wav", ".wave", ".rf64", ".flac", ".ogg", ".oga", ".mp3")
# fmt: off
OTHER_SUFFIXES = (
    ".3g2", ".3gp", ".3gpp", ".aac", ".ac3", ".aif", ".aifc", ".aiff", ".amr", ".ape", ".asf", ".au",
    ".avi", ".awb", ".caf", ".ds2", ".dsf", ".dss", ".eac3", ".flv", ".gsm", ".m2ts", ".m4a", ".m4b",
    ".m4r", ".m4v", ".mka", ".mkv", ".mov", ".mp1", ".mp2", ".mp4", ".mpeg", ".mpg", ".mpga", ".mts",
    ".nist", ".ogv", ".ogx", ".opus", ".pcm", ".qcp", ".ra", ".rm", ".snd", ".sph", ".spx", ".tak", ".tta",
    ".voc", ".w64", ".weba", ".webm", ".wma", ".wmv", ".wv",
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


def _mono(block: Tensor, name: str, first_frame: int, sample_rate: int) -> Tensor:
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
    return block[:, 0] if block.shape[1] == 1 else block.mean(dim=1)


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
    name = "as_waveform"
    rate = _checked_rate(name, sample_rate)
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
    frames, channels = columns.shape
    if channels > MAX_CHANNELS:
        raise AudioError(
            f"{name}: found shape {tuple(samples.shape)}, that is {channels} channels, expected at most "
            f"{MAX_CHANNELS}; if time is the second dimension, pass samples.T"
        )
    scale = _FULL_SCALE[columns.dtype]
    step = _block_frames(channels)
    blocks = (
        _mono(columns[i : i + step].to("cpu", torch.float32) / scale, name, i, rate)
        for i in range(0, frames, step)
    )
    return _at_16_khz(blocks, frames, rate)


# Containers: what the first bytes say, before libsndfile sees the file ----------------------------


def _unpack(layout: str, file: BinaryIO, name: str) -> tuple[Any, ...]:
    data = file.read(struct.calcsize(layout))
    if len(data) < struct.calcsize(layout):
        raise AudioError(f"{name}: ends inside its header: truncated or not a sound file; copy it again")
    return struct.unpack(layout, data)


class _Sized:
    """A WAV file that was written into a pipe, with its sizes filled in: libsndfile takes 0 as 0."""

    def __init__(self, file: BinaryIO, size: int, body: int):
        self._file = file
        self._sizes = {4: struct.pack("<I", min(size - 8, 0xFFFFFFFF))}
        self._sizes[body - 4] = struct.pack("<I", min(size - body, 0xFFFFFFFF))
        self.seek, self.tell = file.seek, file.tell

    def read(self, count: int) -> bytes:
        at = self.tell()
        data = bytearray(self._file.read(count))
        for position, field in self._sizes.items():
            for i, byte in enumerate(field, position - at):
                if 0 <= i < len(data):
                    data[i] = byte
        return bytes(data)

    def write(self, data: bytes) -> int:
        raise OSError("read only")  # soundfile asks for the method, and reading never calls it


def _wav_frames(file: BinaryIO, size: int, name: str) -> tuple[int, _Sized | None]:
    """Frames in a WAV or RF64 file, having checked that all the sound it declares is there.

    libsndfile shortens its own header's figure to what the file holds, so a cut would go unseen.
    With them, where the header leaves the sizes open, the file as libsndfile needs to see it.
    """
    file.seek(0)
    _, riff_size, _ = _unpack("<4sI4s", file, name)
    position, data_size_64, block_align = 12, 0, 0
    for _ in range(1000):  # chunks; real files have a handful
        if position + 8 > size:
            break
        file.seek(position)
        kind, length = _unpack("<4sI", file, name)
        body = position + 8
        if kind == b"ds64":  # RF64: the sizes that do not fit into 32 bits
            _, data_size_64 = _unpack("<QQ", file, name)
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
            held = size - body
            declared = data_size_64 if data_size_64 and length == 0xFFFFFFFF else length
            empty = length == 0 and riff_size + 8 == size  # not a stream: the header is complete
            # A program that writes into a pipe cannot go back to fill in the size: it leaves 0,
            # 0xFFFFFFFF or, as sox does, 0x7FFFF000 less a remainder of a frame.
            stream = declared in (0, 0xFFFFFFFF) or 0 <= 0x7FFFF000 - declared < block_align
            if declared > held and not stream:
                raise AudioError(
                    f"{name}: truncated: its header declares {declared} bytes of sound, the file holds {held} "
                    f"({100 * held / declared:.1f} %); copy it again, or, if only its header is wrong, "
                    "rewrite it: ffmpeg -i INPUT OUTPUT.wav"
                )
            if empty:
                return 0, None
            if stream:
                return held // block_align, _Sized(file, size, body)
            return declared // block_align, None
        position = body + length + (length & 1)
    raise AudioError(f"{name}: ends before its sound begins (no data chunk): truncated or damaged; copy it again")


def _check_ogg(file: BinaryIO, size: int, name: str) -> None:
    """The first packet is Vorbis and the last page is there: the length of a cut file would be wrong.

    Page: "OggS", version, flags (4 = last), granule (8), serial (4), number, CRC, n, n segment sizes.
    """
    file.seek(0)
    *_, serial, _, _, segments = _unpack("<4sBBqIIIB", file, name)
    file.seek(27 + segments)
    packet = file.read(8)
    if packet[:7] != b"\x01vorbis":
        found = {b"Opus": "Opus", b"\x7fFLA": "FLAC", b"Spee": "Speex"}.get(packet[:4], "no Vorbis")
        raise AudioError(f"{name}: found an OGG file with {found}; {_ADVICE}")
    start = max(0, size - (27 + 255 + 255 * 255))  # the largest page
    file.seek(start)
    tail = file.read()
    at = tail.rfind(b"OggS")
    while at >= 0:
        header = tail[at : at + 27]
        if len(header) == 27:
            sizes = tail[at + 27 : at + 27 + header[26]]
            if at + 27 + header[26] + sum(sizes) == len(tail):
                break
        at = tail.rfind(b"OggS", 0, at)
    if at < 0 or not tail[at + 5] & 4:
        raise AudioError(
            f"{name}: truncated: its last OGG page is cut or is not marked as the last; copy it again, "
            "or keep what is there: ffmpeg -i INPUT OUTPUT.wav"
        )
    if struct.unpack_from("<I", tail, at + 14)[0] != serial:
        raise AudioError(f"{name}: found several OGG streams in one file, expected one; {_ADVICE}")


_MP3_KBIT = {  # MPEG 1 and MPEG 2 or 2.5, layer III, by index; 0 is "free" and 15 is invalid
    3: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 0),
    2: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160, 0),
}
_MP3_RATES = (44_100, 48_000, 32_000, 0)


def _mp3_frame(header: bytes) -> tuple[int, int] | None:
    """(bytes, samples) of the layer III frame whose first four bytes these are; None if they are not."""
    if len(header) < 4 or header[0] != 0xFF or header[1] & 0xE6 != 0xE2:
        return None
    version = header[1] >> 3 & 3  # 3: MPEG 1, 2: MPEG 2 (half the rates), 0: MPEG 2.5 (a quarter)
    rate = _MP3_RATES[header[2] >> 2 & 3] >> {3: 0, 2: 1, 0: 2, 1: 16}[version]
    kbit = _MP3_KBIT[3 if version == 3 else 2][header[2] >> 4]
    if not rate or not kbit:
        return None
    samples = 1152 if version == 3 else 576
    return samples // 8 * kbit * 1000 // rate + (header[2] >> 1 & 1), samples


def _mp3_start(file: BinaryIO) -> int | None:
    """Where the first MPEG frame begins, after an ID3v2 tag; None if there is none."""
    file.seek(0)
    head = file.read(10)
    position = 0
    if head[:3] == b"ID3" and len(head) == 10:
        position = 10 + sum((byte & 0x7F) << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=True))
    file.seek(position)
    return position if _mp3_frame(file.read(4)) else None


def _mp3_frames(file: BinaryIO, position: int, size: int, name: str) -> int | None:
    """Sample frames of an MP3 that declares none, by its MPEG frames; None if it declares them.

    Without a Xing or Info tag libsndfile guesses the length from the first frame's bit rate, and a
    recording of variable bit rate would lose, say, two thirds of its sound in silence.
    """
    file.seek(position)
    first = file.read(64)  # the tag stands after at most 4 + 2 + 32 bytes of headers
    tag = max(first.find(b"Xing"), first.find(b"Info"))
    if 0 < tag <= 38:
        if len(first) < tag + 16:
            raise AudioError(f"{name}: truncated: it ends inside its first MPEG frame; copy it again")
        flags, *counts = struct.unpack_from(">III", first, tag + 4)
        if flags & 1:
            # Where both are there, bytes follow frames. A percent is left to encoders that count otherwise: the
            # decoder finds a smaller cut by the frames.
            declared, held = counts[1] if flags & 2 else 0, size - position
            if held < 0.99 * declared:
                raise AudioError(
                    f"{name}: truncated: its header declares {declared} bytes of sound, the file holds {held} "
                    f"({100 * held / declared:.1f} %); copy it again, or keep what is there: "
                    "ffmpeg -i INPUT OUTPUT.wav"
                )
            return None
    frames = 0
    while position < size:
        file.seek(position)
        header = file.read(4)
        frame = _mp3_frame(header)
        if frame is None:
            if header[:1] == b"\0" or header[:3] in (b"TAG", b"APE", b"LYR", b"ID3"):  # tags at the end
                break
            raise AudioError(f"{name}: damaged MP3: no MPEG frame at byte {position}; copy it again")
        position += frame[0]
        if position > size:
            raise AudioError(f"{name}: truncated: its last MPEG frame is cut; copy it again")
        frames += frame[1]
    return frames


def _container(file: BinaryIO, size: int, name: str) -> tuple[int | None, _Sized | None]:
    """The allow-list, from the first bytes. Frames, and the file, where libsndfile needs to be told."""
    magic = file.read(12)
    if magic[:4] in (b"RIFF", b"RF64") and magic[8:] == b"WAVE":
        return _wav_frames(file, size, name)
    if magic[:4] == b"OggS":
        _check_ogg(file, size, name)
        return None, None
    if magic[:4] == b"fLaC":
        return None, None
    start = _mp3_start(file)
    if start is not None:
        return _mp3_frames(file, start, size, name), None
    found = "MP4 or M4A" if magic[4:8] == b"ftyp" else _REFUSED_MAGIC.get(magic[:4])
    raise AudioError(f"{name}: found {found or f'an unknown format (first bytes {magic!r})'}; {_ADVICE}")


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
            frames, stream = _container(file, size, name)
            file.seek(0)
            # By descriptor: the file that was checked, and without a name whose extension libsndfile
            # would take for a format.
            sound = stack.enter_context(soundfile.SoundFile(stream or file.fileno(), closefd=False))
        except OSError as error:
            raise AudioError(f"{name}: cannot be read: {error.strerror or error}") from error
        except RuntimeError as error:  # every error of libsndfile
            text = getattr(error, "error_string", str(error))
            raise AudioError(f"{name}: damaged header: libsndfile says: {text} Copy it again") from error
        if sound.subtype not in _ALLOWED.get(sound.format, ()):
            raise AudioError(f"{name}: found {sound.format} with {sound.subtype}; {_ADVICE}")
        rate = _checked_rate(name, sound.samplerate)
        if sound.channels > MAX_CHANNELS:
            raise AudioError(f"{name}: found {sound.channels} channels, expected at most {MAX_CHANNELS}")
        if frames is None:
            frames = sound.frames
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
        )
        yield info, first, sound


def _mono_blocks(sound: Any, info: AudioInfo, first: int) -> Iterator[Tensor]:
    """Decode the excerpt block by block; the same memory holds every block."""
    step = _block_frames(info.channels)
    buffer = np.empty((min(step, info.frames), info.channels), dtype=np.float32)
    for position in range(0, info.frames, step):
        wanted = min(step, info.frames - position)
        reason = ""
        try:
            if position == 0 and first:
                sound.seek(first)
            got = len(sound.read(out=buffer[:wanted]))
        except RuntimeError as error:  # FLAC reports a cut as an error, often without a text
            got, reason = 0, f" ({getattr(error, 'error_string', str(error)).strip() or 'decoder error'})"
        if got < wanted:
            raise AudioError(
                f"{info.path}: truncated or damaged{reason}: its header declares {first + info.frames} frames or "
                f"more, decoding ended near frame {first + position + got}; copy it again"
            )
        yield _mono(torch.from_numpy(buffer[:wanted]), str(info.path), first + position, info.sample_rate)


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
    with _opened(path, start, end, max_seconds) as (info, first, sound):
        return _at_16_khz(_mono_blocks(sound, info, first), info.frames, info.sample_rate)


def _check_window(window: float, hop: float) -> None:
    if not (0 < hop <= window < math.inf):
        raise ConfigError(f"window is {window!r} s and hop {hop!r} s; expected 0 < hop <= window")


def _window_bounds(frames: int, rate: int, window: float, hop: float) -> Iterator[tuple[int, int]]:
    """(first frame, number of frames) of each window; see `load_windows`."""
    size, step = (max(1, round(seconds * rate)) for seconds in (window, hop))
    for position in range(0, frames, step):
        last = position + size + min(rate, size) > frames  # what is left after it is too short
        yield position, frames - position if last else size
        if last:
            break


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
    _check_window(window, hop)
    with _opened(path, start, end, math.inf) as (info, first, sound):
        rate = info.sample_rate
        for position, frames in _window_bounds(info.frames, rate, window, hop):
            part = replace(info, frames=frames)
            at = first + position
            yield at / rate, (at + frames) / rate, _at_16_khz(_mono_blocks(sound, part, at), frames, rate)


def array_windows(
    samples: np.ndarray | Tensor, sample_rate: int, *, window: float, hop: float
) -> Iterator[tuple[float, float, Tensor]]:
    """As `load_windows`, of sound which the caller already has: of what :func:`as_waveform` takes."""
    _check_window(window, hop)
    rate = _checked_rate("array_windows", sample_rate)
    if samples.ndim not in (1, 2) or 0 in samples.shape:
        as_waveform(samples, rate)  # says what is wrong with it
    for position, frames in _window_bounds(len(samples), rate, window, hop):
        start, end = position / rate, (position + frames) / rate
        try:
            waveform = as_waveform(samples[position : position + frames], rate)
        except (AudioError, RuntimeError) as error:
            raise AudioError(f"window from {start:g} to {end:g} s: {error}") from None
        yield start, end, waveform

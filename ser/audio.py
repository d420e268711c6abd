"""Read recordings as 16 kHz mono waveforms; only this file opens sound.

A recording passes four checks, each with a clear :class:`AudioError`:

1. The path is a regular file. (A FIFO or a device would hang or never end.)
2. `ser.containers` finds a container and a coding that are on the allow-list, and the file holds as much sound as
   the container declares.
3. The header that libsndfile reads has a usable rate, number of channels and length. This is checked before memory
   for this length is allocated.
4. The number of samples is as declared, and all are finite and in range.

For sound without audible speech (silence, channels that cancel each other), `read_audio`, `read_samples` and
`read_windows` return a warning.

Shapes: S samples at 16 kHz; "frames" here are sample points of the file, one value per channel.
Everything is float32 on the CPU. Sound is read, averaged over its channels and resampled block by block, so memory
beyond the result stays within tens of megabytes, whatever the rate, channels and length.
"""

import contextlib
import functools
import importlib.metadata
import itertools
import math
import operator
import os
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ser.containers import ADVICE, SUBTYPES, Container, mp3_lead, read_container
from ser.errors import AudioError, ConfigError, MissingLibraryError
from ser.files import StrPath

SAMPLE_RATE = 16_000  # Hz; every wav2vec 2.0 checkpoint was trained on this rate
MIN_RATE, MAX_RATE = 4_000, 192_000  # Hz: telephone speech is 8 kHz, studio recordings end at 192 kHz
MAX_CHANNELS = 32
MAX_SECONDS = 3_600.0  # one hour is 230 MB at 16 kHz; a caller with more memory passes `max_seconds`

# Full scale is 1. A float recording may exceed it a little (1.5 after a mix, 4 after +12 dB), but beyond +40 dB
# samples are integers stored as floats, and too loud for a model by a factor of up to 30,000.
_MAX_AMPLITUDE = 100.0
# A manifest's seconds are rounded; an end that is this little past the file's end means the file's end.
_END_TOLERANCE = 0.02

# The level of silence. 70 dB below full scale are 10 steps of 16 bit: less than the noise of any microphone, and
# more than dither or a muted channel. The shortest word is louder for a third of a second; one or two clicks are
# louder for less than a tenth.
_QUIET = 10 ** (-70 / 20)  # as a share of full scale
_LEAST_SOUND = 0.1  # seconds that have to be louder in total; of less than 0.4 s, a quarter
_TOO_SHORT = SAMPLE_RATE // 40  # shorter sound (25 ms, less than a frame) is padded, with a warning of its own
# "Near full scale" is within 1 dB. In loud speech with clipped peaks 0.5 % of the samples are near, in sound that
# was 20 dB too loud half of them. If samples exceed full scale by far, the recording was not clipped there.
_NEAR_FULL_SCALE, _OVERSHOOT, _CLIPPED = 10 ** (-1 / 20), 1.2, 0.1
# The power of the mean of C channels, times C, over the power of a channel, is C for equal channels, 1 for
# independent ones and 0 for inverted ones. The limit is 10 dB below independent channels.
_CANCELLED = 0.1


@dataclass(frozen=True)
class AudioInfo:
    """Describe a recording, or an excerpt of it, by its header."""

    path: Path
    sample_rate: int  # sample rate of the file in Hz
    channels: int
    frames: int  # length of the excerpt, at `sample_rate`
    seconds: float  # frames / sample_rate
    num_samples: int  # S: the number of samples that `load_audio` returns, at 16 kHz
    format: str  # libsndfile's name of the container, such as "WAV"
    subtype: str  # libsndfile's name of the coding, such as "PCM_16"
    warning: str | None = None  # what its header leaves open


# Resampling -------------------------------------------------------------------------------------
#
# This is band-limited interpolation with the ratio new / old in lowest terms. Its kernel has `new` rows,
# one per phase of the output, of 2 * reach + old taps. For 44,100 -> 16,000 Hz (160 / 441) it has 0.5 MB,
# but 44,101 -> 16,000 cannot be reduced and would need 2.8 GB. So such a ratio is replaced by the nearest
# one with a small kernel, which is nearly always within 1e-5. Only rates close to a simple ratio (16,002 Hz)
# need a larger kernel to come within 1e-4. Some 200 rates would then need more than 10 MB; for them the
# error stays up to 3.2e-4 (15,995 Hz is the worst), which is half a cent in pitch.

_KAISER_BEST = {  # resampy's and librosa's "kaiser_best": stop band -147 dB, flat to 7.5 of 8 kHz
    "lowpass_filter_width": 64,
    "rolloff": 0.9475937167399596,
    "resampling_method": "sinc_interp_kaiser",
    "beta": 14.769656459379492,
}
_SMALL_KERNEL = 500_000  # taps in total: 2 MB, and about 30 MB while torchaudio computes them
_LARGEST_KERNEL = 2_500_000  # 10 MB, and about 110 MB while it is computed; only for unusual rates
_GOOD_RATIO = 10_000  # a relative error of 1 / 10,000 is small enough
_BLOCK_FRAMES = 1 << 18  # the most frames in a block, which has at most four times as many values


def _reach(new: int, old: int) -> int:
    """Return how many input samples the filter uses on each side: 64 zero crossings of the lower rate."""
    return -(-68 * old // min(new, old))  # 64 / 0.9476 = 67.5


def _kernel_size(new: int, old: int) -> int:
    """Count the taps of the kernel."""
    return new * (2 * _reach(new, old) + old)


@functools.lru_cache(maxsize=1024)
def _ratio(sample_rate: int) -> tuple[int, int]:
    """Return 16,000 / sample_rate as (new, old) in lowest terms, or the nearest ratio with a small kernel."""
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
    """Return the number of samples at 16 kHz for `frames` frames at `sample_rate` Hz, rounded up, so 1 stays 1.

    It is computed with whole numbers. torchaudio computes it in float32, which is wrong by one for some recordings
    over 17 minutes.
    """
    new, old = _ratio(sample_rate)
    return -(-frames * new // old)


def _power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


@functools.lru_cache(maxsize=4)
def _resampler(new: int, old: int) -> Callable[[Tensor], Tensor]:
    """Build a resampler; it is cached, since building its kernel takes ten times as long as using it."""
    # A torchaudio for another version of torch fails when its library is loaded, with OSError or other errors.
    try:
        from torchaudio.transforms import Resample
    except Exception as error:
        try:
            installed = f"torchaudio {importlib.metadata.version('torchaudio')}"
        except importlib.metadata.PackageNotFoundError:
            installed = "no torchaudio"
        raise MissingLibraryError(
            f"resampling to {SAMPLE_RATE} Hz needs torchaudio, which cannot be imported "
            f"({type(error).__name__}: {error}); found {installed} beside torch {torch.__version__}: "
            "install the torchaudio build that matches this torch, or give 16 kHz audio"
        ) from error
    # The kernel is computed in float64 and rounded once: in float32 its error would be 4e-5.
    return Resample(old, new, **_KAISER_BEST, dtype=torch.float64).float()


def _at_16_khz(blocks: Iterable[Tensor], frames: int, sample_rate: int) -> Tensor:
    """Resample consecutive mono blocks, of `frames` samples in total, to (S,). Blocks may share their memory.

    Each output sample is the same sum of products as if the whole were resampled at once. A window
    of whole periods (`old` inputs, `new` outputs) slides over the input; outputs within `margin`
    periods of an inner edge lack neighbours and are written by the window before or after:

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
    # The number of periods is a power of two, also in the last window: every new length of a convolution
    # leaves up to 2 MB in oneDNN's cache and in a fragmented heap, so a data-loader worker would grow without end.
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
    window[filled:] = 0  # the kernel also assumes zeros after the end
    window = window[: _power_of_two(-(-filled // old)) * old]
    out[written:] = kernel(window)[done * new :][: len(out) - written]
    return out


# Checks shared by files and arrays ----------------------------------------------------------------


def _checked_rate(name: str, sample_rate: int) -> int:
    """Return the sample rate; refuse it unless it is a whole number of Hz within limits."""
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
            large terms (44,101 Hz) is replaced by the nearest simple one, within 1e-4.

    Returns:
        (S,) float32 on the CPU, S = ``resampled_length(S_in, sample_rate)``. At 16 kHz it is the
        waveform itself, and torchaudio is not imported.

    Raises:
        AudioError: rate or shape is out of range; MissingLibraryError: torchaudio is missing or does not match
            torch.
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
    """Scale an utterance to zero mean and unit variance, as Hugging Face's Wav2Vec2FeatureExtractor does.

    The result is (x - mean) / sqrt(var + 1e-7), where var is the population variance. It is computed in float64,
    in which the mean of a constant is exact, so silence and any constant give exact zeros.

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


_PIECE = 1 << 14  # frames that are copied to float64 at a time; more do not fit into a processor's cache


class _Channels:
    """Add up sums over a recording that tell how much its channels cancel each other in their mean.

    These are, in float64, the sums of each channel (C,), of the squares of all channels, and of the squares of
    their mean.
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
        """Return a sentence if the channels cancel each other in the mean, else None; see `_CANCELLED`."""
        if not self.frames:
            return None
        mean = self.sums / self.frames  # subtracted below, since a constant is not sound
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
    """Return a sentence if this sound is silent or clipped, so that it cannot be recognised; else None.

    Only levels are checked, so noise and music pass. Whispered or distant speech has a hundred times the sound
    that is required here. Loud speech has a tenth of the clipping that is allowed.

    Args:
        waveform: (S,) floating point at 16 kHz, full scale 1, at least one sample.
    """
    if len(waveform) < _TOO_SHORT:
        return None
    least = min(_LEAST_SOUND * SAMPLE_RATE, len(waveform) / 4)
    some = waveform[::8]  # for speech, an eighth of its samples is enough to decide
    for part in (some, waveform):
        loud = int(torch.count_nonzero((part - part.mean()).abs_() > _QUIET))  # a constant is not sound
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
    """Join the warnings that exist; None if there are none."""
    return "; ".join(w for w in warnings if w) or None


def _mono(block: Tensor, name: str, first_frame: int, sample_rate: int, channels: _Channels) -> Tensor:
    """Average a block (frames, channels) over its channels; refuse NaN, infinity and too large samples."""
    low, high = torch.aminmax(block)  # both are NaN if any value is; nothing is allocated
    if not (low >= -_MAX_AMPLITUDE and high <= _MAX_AMPLITUDE):
        wrong, advice = ~torch.isfinite(block), "samples must be finite; mend or leave out this recording"
        if not wrong.any():
            wrong = block.abs() > _MAX_AMPLITUDE
            advice = "full scale is 1; divide integers stored as floats by 32768 (16 bit) or 2147483648 (32 bit)"
        frame, channel = wrong.nonzero()[0].tolist()
        at = first_frame + frame
        raise AudioError(
            f"{name}: found a sample of {block[frame, channel].item():g} at frame {at} "
            f"({at / sample_rate:.3f} s), channel {channel}; {advice}"
        )
    if block.shape[1] == 1:
        return block[:, 0]
    # For two channels this equals `mean` exactly, in a twentieth of the time.
    mono = (block[:, 0] + block[:, 1]).mul_(0.5) if block.shape[1] == 2 else block.mean(dim=1)
    channels.add(block, mono)
    return mono


def _block_frames(channels: int) -> int:
    """Return the number of frames in a block, which is lower for more than four channels."""
    return min(_BLOCK_FRAMES, 4 * _BLOCK_FRAMES // channels)


_FULL_SCALE = dict.fromkeys((torch.float16, torch.bfloat16, torch.float32, torch.float64), 1.0)
_FULL_SCALE |= {torch.int16: 2.0**15, torch.int32: 2.0**31}


def _as_columns(samples: np.ndarray | Tensor, name: str) -> Tensor:
    """View samples as (S, channels), of a dtype in `_FULL_SCALE`."""
    if isinstance(samples, np.ndarray) and samples.dtype.kind in "fi" and samples.dtype.itemsize <= 8:
        # torch supports neither foreign byte order nor negative strides, and warns about read-only arrays.
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
    """Do the same as :func:`as_waveform`, and also return a warning about the sound, or None."""
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
    """Convert samples in memory to a waveform, with the checks and the result of :func:`load_audio`.

    Args:
        samples: (S_in,) or (S_in, channels), time first, up to 32 channels; floating point with full
            scale 1, or int16 or int32 PCM, which is scaled to it.
        sample_rate: Hz, a whole number from 4,000 to 192,000.

    Returns:
        (S,) float32 mono at 16 kHz on the CPU, sharing no memory with `samples`.

    Raises:
        AudioError: type, shape or rate is not supported; there are no samples; NaN, infinity or |sample| > 100.
    """
    return read_samples(samples, sample_rate)[0]


# Files --------------------------------------------------------------------------------------------


def _regular_file(path: Path) -> int:
    """Check that a path is a regular file, and return its size in bytes; opening a FIFO would block."""
    try:
        status = os.stat(path)  # follows links  # noqa: PTH116
    except FileNotFoundError as error:
        if path.is_symlink():
            raise AudioError(f"{path}: a broken link to {os.readlink(path)}; restore its target") from error  # noqa: PTH115
        raise AudioError(f"{path}: no such file (looked in {path.absolute().parent})") from error
    except (OSError, ValueError) as error:  # no permission, a circle of links, a zero byte, too long
        raise AudioError(f"{path}: cannot be reached: {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISREG(status.st_mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
        kinds |= dict.fromkeys((stat.S_IFCHR, stat.S_IFBLK), "a device")
        kind = kinds.get(stat.S_IFMT(status.st_mode), "a special file")
        raise AudioError(f"{path}: found {kind}, expected a regular sound file")
    if status.st_size == 0:
        raise AudioError(f"{path}: the file is empty (0 bytes), expected sound; copy it again")
    return status.st_size


def _soundfile() -> Any:
    """Import soundfile, or say how to install it."""
    try:
        import soundfile
    except Exception as error:  # OSError if the package exists but libsndfile does not
        raise MissingLibraryError(
            f"reading sound needs the soundfile package and libsndfile, which cannot be imported "
            f"({type(error).__name__}: {error}); install them: pip install soundfile, or apt install libsndfile1"
        ) from error
    return soundfile


def _frame_range(
    name: str, frames: int, sample_rate: int, start: float | None, end: float | None, max_seconds: float | None
) -> tuple[int, int]:
    """Convert seconds to (first frame, number of frames), and check them against the file and the limit."""
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


def _error_string(error: RuntimeError) -> str:
    """Return libsndfile's text of an error, which may be empty."""
    return getattr(error, "error_string", str(error)).strip()


def _checked_frames(name: str, sound: Any, container: Container) -> int:
    """Return a file's number of frames; refuse a header that contradicts the container."""
    if sound.subtype not in SUBTYPES.get(sound.format, ()):
        raise AudioError(f"{name}: found {sound.format} with {sound.subtype}; {ADVICE}")
    _checked_rate(name, sound.samplerate)
    if sound.channels > MAX_CHANNELS:
        raise AudioError(f"{name}: found {sound.channels} channels, expected at most {MAX_CHANNELS}")
    frames = sound.frames if container.frames is None else container.frames
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
    return frames


@contextlib.contextmanager
def _opened(
    path: StrPath, start: float | None, end: float | None, max_seconds: float | None
) -> Iterator[tuple[AudioInfo, int, Any]]:
    """Open a recording with all checks; yield its description, its first frame and the `soundfile.SoundFile`."""
    path = Path(path)
    name = str(path)
    size = _regular_file(path)
    soundfile = _soundfile()
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(path.open("rb", buffering=0))  # so that seek moves the descriptor
            container = read_container(file, size, name)
            (container.part or file).seek(0)
            # It is opened by descriptor: this is the file that was checked, and libsndfile cannot guess a
            # format from the extension of its name.
            sound = stack.enter_context(soundfile.SoundFile(container.part or file.fileno(), closefd=False))
        except OSError as error:
            raise AudioError(f"{name}: cannot be read: {error.strerror or error}") from error
        except RuntimeError as error:  # the type of every error of libsndfile
            said = _error_string(error)
            raise AudioError(f"{name}: damaged header: libsndfile says: {said} Copy it again") from error
        # Otherwise soundfile seeks to its position after every read, and in MP3 the next block begins wrongly.
        sound.seekable = lambda: False
        rate = sound.samplerate
        total = _checked_frames(name, sound, container)
        first, frames = _frame_range(name, total, rate, start, end, max_seconds)
        info = AudioInfo(
            path=path,
            sample_rate=rate,
            channels=sound.channels,
            frames=frames,
            seconds=frames / rate,
            num_samples=resampled_length(frames, rate),
            format=sound.format,
            subtype=sound.subtype,
            warning=container.warning,
        )
        yield info, first, sound


def _decoded(sound: Any, into: np.ndarray) -> tuple[int, str]:
    """Decode the next frames into an array (frames, channels); return their number, and why it is not more."""
    try:
        return len(sound.read(out=into)), ""
    except RuntimeError as error:  # for a truncated FLAC, often without a text
        return 0, f" ({_error_string(error) or 'decoder error'})"


def _ended_early(info: AudioInfo, declared: int, at: int, reason: str) -> AudioError:
    """Return the error for a recording that holds fewer frames than its header declares."""
    return AudioError(
        f"{info.path}: truncated or damaged{reason}: its header declares {declared} frames or "
        f"more, decoding ended near frame {at}; copy it again"
    )


def _go_to(sound: Any, info: AudioInfo, first: int) -> None:
    """Move the decoder to the excerpt's first frame, into the same state as if it had decoded all before.

    In WAV and FLAC this is a seek. OGG is decoded from the start, since libsndfile seeks to a wrong place near the
    end, and crashes if headers leave it without a decoder. An MP3 frame depends on earlier frames, which
    libsndfile ignores after a seek; so some earlier frames are decoded too.
    """
    if not first:
        return
    start = {"OGG": 0, "MP3": first - mp3_lead(info.sample_rate)}.get(info.format, first)
    buffer = np.empty((min(first, _block_frames(info.channels)), info.channels), dtype=np.float32)
    got, reason = _decoded(sound, buffer[:1])  # a decoder that returns no frame must not seek
    at = got
    if at and start > at:
        try:
            at = sound.seek(start)
        except RuntimeError as error:
            reason = f" ({_error_string(error) or 'it cannot be sought in'})"
    while got and at < first and not reason:
        got, reason = _decoded(sound, buffer[: first - at])
        at += got
    if at != first or reason:
        raise _ended_early(info, first + info.frames, at, reason)


def _mono_blocks(sound: Any, info: AudioInfo, first: int, channels: _Channels) -> Iterator[Tensor]:
    """Decode the excerpt block by block, from the decoder's position on; all blocks share the same memory."""
    step = _block_frames(info.channels)
    buffer = np.empty((min(step, info.frames), info.channels), dtype=np.float32)
    for position in range(0, info.frames, step):
        wanted = min(step, info.frames - position)
        got, reason = _decoded(sound, buffer[:wanted])
        if got < wanted:
            raise _ended_early(info, first + info.frames, first + position + got, reason)
        block = torch.from_numpy(buffer[:wanted])
        yield _mono(block, str(info.path), first + position, info.sample_rate, channels)


def audio_info(
    path: StrPath, *, start: float | None = None, end: float | None = None, max_seconds: float | None = None
) -> AudioInfo:
    """Describe a recording by its header, with every check that needs no decoding.

    Args:
        path: WAV, WAVEX, RF64, FLAC, OGG/Vorbis or MP3; links are followed.
        start, end: an excerpt in seconds; by default the whole recording. An `end` up to 0.02 s past
            the recording's end means its end: manifests round.
        max_seconds: the longest excerpt to accept, by default 3,600 s.

    Raises:
        AudioError: the file is not regular, empty, of another format, or truncated according to its header
            (WAV, RF64, OGG, MP3); it is outside 4-192 kHz or has more than 32 channels; or the excerpt does
            not exist or is too long.
    """
    with _opened(path, start, end, max_seconds) as (info, _, _):
        return info


def read_audio(
    path: StrPath, *, start: float | None = None, end: float | None = None, max_seconds: float | None = None
) -> tuple[Tensor, str | None]:
    """Do the same as :func:`load_audio`, and also return a warning about the sound, or None."""
    with _opened(path, start, end, max_seconds) as (info, first, sound):
        _go_to(sound, info, first)
        channels = _Channels()
        waveform = _at_16_khz(_mono_blocks(sound, info, first, channels), info.frames, info.sample_rate)
        return waveform, joined_warnings(info.warning, channels.warning() or level_warning(waveform))


def load_audio(
    path: StrPath, *, start: float | None = None, end: float | None = None, max_seconds: float | None = None
) -> Tensor:
    """Read a recording, or an excerpt of it, as 16 kHz mono, the mean over its channels.

    Args:
        path, start, end, max_seconds: as for :func:`audio_info`.

    Returns:
        (S,) float32 on the CPU, full scale 1, S = ``audio_info(...).num_samples``. A 16 kHz mono
        recording is returned unchanged.

    Raises:
        AudioError: as for :func:`audio_info`; or there are fewer frames than declared, NaN, infinity or
            |sample| > 100, or the rate is not 16 kHz and torchaudio does not work.
    """
    return read_audio(path, start=start, end=end, max_seconds=max_seconds)[0]


def _check_window(window: float, hop: float) -> None:
    """Raise ConfigError for windows without length, and for a hop that would leave gaps."""
    if not (0 < hop <= window < math.inf):
        raise ConfigError(f"window is {window!r} s and hop {hop!r} s; expected 0 < hop <= window")


def _hop_frames(hop: float, rate: int) -> int:
    """Return the number of frames from the start of a window to that of the next."""
    return max(1, round(hop * rate))


def _window_bounds(frames: int, rate: int, window: float, hop: float) -> Iterator[tuple[int, int]]:
    """Yield (first frame, number of frames) of each window; see `load_windows`."""
    size, step = max(1, round(window * rate)), _hop_frames(hop, rate)
    for position in range(0, frames, step):
        last = position + size + min(rate, size) > frames  # the remainder after it would be too short
        yield position, frames - position if last else size
        if last:
            break


def read_windows(
    path: StrPath, *, window: float, hop: float, start: float | None = None, end: float | None = None
) -> Iterator[tuple[float, float, Tensor, str | None]]:
    """Do the same as :func:`load_windows`, and also yield a warning about each window, or None.

    The recording is decoded once from its beginning to its end. Overlaps with the next window are kept.
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
    path: StrPath, *, window: float, hop: float, start: float | None = None, end: float | None = None
) -> Iterator[tuple[float, float, Tensor]]:
    """Read a recording of any length, or an excerpt of it, window by window, with the memory of one window.

    Args:
        path, start, end: as for :func:`audio_info`; any length is possible.
        window: the length of a window in seconds. A remainder shorter than a second (or than a shorter window) is
            joined to the last window.
        hop: seconds from the start of one window to the start of the next; above 0, at most ``window``.

    Yields:
        (start, end, waveform): seconds from the beginning of the file, and what :func:`load_audio` returns for
        that excerpt.

    Raises:
        AudioError: as for :func:`load_audio`, at the window concerned; ConfigError: window or hop out of range.
    """
    for begin, finish, waveform, _ in read_windows(path, window=window, hop=hop, start=start, end=end):
        yield begin, finish, waveform


def array_windows(
    samples: np.ndarray | Tensor, sample_rate: int, *, window: float, hop: float
) -> Iterator[tuple[float, float, Tensor, str | None]]:
    """Do the same as `read_windows` for samples in memory, as :func:`as_waveform` takes them."""
    _check_window(window, hop)
    rate = _checked_rate("array_windows", sample_rate)
    if samples.ndim not in (1, 2) or 0 in samples.shape:
        as_waveform(samples, rate)  # raises the right error
    for position, frames in _window_bounds(len(samples), rate, window, hop):
        start, end = position / rate, (position + frames) / rate
        try:
            waveform, warning = read_samples(samples[position : position + frames], rate)
        except (AudioError, RuntimeError) as error:
            raise AudioError(f"window from {start:g} to {end:g} s: {error}") from None
        yield start, end, waveform, warning

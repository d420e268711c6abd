"""Recordings in, 16 kHz mono out (first working version; being hardened)."""

import functools
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ser.errors import AudioError

SAMPLE_RATE = 16_000
MIN_RATE = 4_000
MAX_RATE = 192_000
MAX_CHANNELS = 32
MAX_SECONDS = 3_600.0


@dataclass(frozen=True)
class AudioInfo:
    """What a recording's header says about the selected excerpt."""

    path: Path
    sample_rate: int
    channels: int
    frames: int
    seconds: float
    num_samples: int
    format: str
    subtype: str


@functools.lru_cache(maxsize=64)
def _ratio(sample_rate: int) -> tuple[int, int]:
    g = math.gcd(SAMPLE_RATE, sample_rate)
    return SAMPLE_RATE // g, sample_rate // g


def resampled_length(frames: int, sample_rate: int) -> int:
    """Samples at 16 kHz that `frames` samples at `sample_rate` become."""
    new, old = _ratio(sample_rate)
    return -(-frames * new // old)


def resample(waveform: Tensor, sample_rate: int) -> Tensor:
    """(S,) at `sample_rate` -> (S',) at 16 kHz."""
    if sample_rate == SAMPLE_RATE:
        return waveform
    import torchaudio.functional

    return torchaudio.functional.resample(
        waveform, sample_rate, SAMPLE_RATE, lowpass_filter_width=64, rolloff=0.9475937167399596,
        resampling_method="sinc_interp_kaiser", beta=14.769656459379492,
    )[: resampled_length(waveform.shape[0], sample_rate)]


def normalise(waveform: Tensor) -> Tensor:
    """Zero mean, unit variance."""
    x = waveform.double()
    var, mean = torch.var_mean(x, correction=0)
    return ((x - mean) / torch.sqrt(var + 1e-7)).float()


def as_waveform(samples, sample_rate: int) -> Tensor:
    """(S,) or (S, channels) -> (S',) float32 at 16 kHz."""
    x = torch.as_tensor(samples).float()
    return resample(x.mean(dim=1) if x.ndim == 2 else x, sample_rate)


def audio_info(path, *, start=None, end=None, max_seconds=None) -> AudioInfo:
    """Header only."""
    import soundfile

    if not os.path.isfile(path):
        raise AudioError(f"{path}: not a file")
    i = soundfile.info(str(path))
    a = round((start or 0) * i.samplerate)
    b = i.frames if end is None else round(end * i.samplerate)
    return AudioInfo(Path(path), i.samplerate, i.channels, b - a, (b - a) / i.samplerate,
                     resampled_length(b - a, i.samplerate), i.format, i.subtype)


def load_audio(path, *, start=None, end=None, max_seconds=None) -> Tensor:
    """(S,) float32 at 16 kHz."""
    import soundfile

    info = audio_info(path, start=start, end=end, max_seconds=max_seconds)
    a = round((start or 0) * info.sample_rate)
    x, _ = soundfile.read(str(path), start=a, frames=info.frames, dtype="float32", always_2d=True)
    return as_waveform(x, info.sample_rate)

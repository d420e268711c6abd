"""Turn the inputs of a recognizer (paths, manifest rows, arrays) into batches of similar length."""

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ser.audio import SAMPLE_RATE, array_windows, audio_info, read_audio, read_samples, read_windows
from ser.data.manifest import Utterance
from ser.data.sampler import evaluation_batches
from ser.errors import AudioError, SerError, shorten
from ser.files import StrPath

WINDOW = 512  # the most recordings that are sorted by length together before results come
PATIENCE = 1.0  # seconds after which a full batch does not wait for more recordings from a slow source
MOST_FIRST = 64  # the most recordings that are read from a generator before the first result
# A path, a manifest row, samples, or a dict of `datasets` (array, sampling_rate, path).
Input = StrPath | Utterance | np.ndarray | Tensor | Mapping[str, Any]


def is_pair(item: Sequence[Any]) -> bool:
    """Tell whether an input is samples with their rate, as librosa, torchaudio and scipy return them."""
    kinds = [isinstance(part, np.ndarray | Tensor) - isinstance(part, Real) for part in item[:3]]
    return sorted(kinds) == [-1, 1]


def no_recording(item: Any) -> str:
    """Describe an input that cannot be used, and say what was expected and what to do."""
    kind = f"of type {type(item).__name__}"
    expected = f"{kind}; expected a path, a manifest row, or samples as a numpy array or torch tensor"
    if isinstance(item, tuple | list) and is_pair(item):
        return (
            "a pair of samples and their rate, as librosa and torchaudio load them; pass predict(samples, rate), "
            'or {"array": samples, "sampling_rate": rate} for each, and samples.T where channels come first'
        )
    if hasattr(item, "get_all_samples"):
        return (
            f"{expected}; a decoder gives them: found = decoder.get_all_samples(), then "
            '{"array": found.data.T, "sampling_rate": found.sample_rate}'
        )
    if isinstance(item, bytes):
        return f"{expected}; os.fsdecode makes text of a path, and a file's bytes are to be written to a file"
    return expected


def each_of(inputs: Input | Iterable[Input]) -> Iterable[Input]:
    """Return the inputs of `predict` as an iterable of recordings; one recording becomes a list of one."""
    if isinstance(inputs, np.ndarray) and inputs.dtype.kind in "OUST":  # an array of paths, not of samples
        if inputs.ndim > 1 and inputs.shape[1:] != (1,):
            raise AudioError(f"inputs are an array of shape {inputs.shape}; expected samples, or (N,) of paths")
        return inputs.reshape(-1).tolist()
    if hasattr(inputs, "iterrows"):
        raise AudioError('inputs are a whole table; pass its column of paths, such as frame["file"]')
    if isinstance(inputs, tuple) and is_pair(inputs):
        raise AudioError(f"inputs are {no_recording(inputs)}")
    alone = str | bytes | os.PathLike | Utterance | np.ndarray | Tensor | Mapping
    if isinstance(inputs, alone) or hasattr(inputs, "get_all_samples") or hasattr(inputs, "read"):
        return [inputs]  # type: ignore[list-item]
    try:
        iter(inputs)
    except TypeError:  # `no_recording` will say what it is
        return [inputs]  # type: ignore[list-item]
    return inputs


def unpacked(item: Any, sampling_rate: int | None, name: str) -> tuple[Any, Any, str | None]:
    """Return an input's sound, its rate and the name of its file; a dict of `datasets` is taken apart."""
    if not isinstance(item, Mapping):
        return item, sampling_rate, None
    array, rate, path = item.get("array"), item.get("sampling_rate"), item.get("path")
    if array is None and item.get("bytes") is not None:
        raise AudioError(
            f"{name} is a dict of a file's bytes; expected samples: let `datasets` decode them "
            '(dataset.cast_column("audio", datasets.Audio())), or write them to a file'
        )
    if array is None and path is None:
        hint = '; of a row of a data set, pass row["audio"]' if "audio" in item else ""
        keys = ", ".join(map(str, item)) or "nothing"
        raise AudioError(f'{name} is a dict of {shorten(keys)}; expected "array" and "sampling_rate"{hint}')
    if array is None:
        return path, sampling_rate, None
    if rate is not None and sampling_rate is not None and np.any(np.asarray(rate) != sampling_rate):
        raise AudioError(f"{name} has a sampling_rate of {rate}, and {sampling_rate} was passed; leave one out")
    return array, sampling_rate if rate is None else rate, None if path is None else str(path)


def check_is_array(samples: Any, rate: Any, name: str) -> None:
    """Raise AudioError for samples that are neither array nor tensor, or have no rate."""
    if not isinstance(samples, np.ndarray | Tensor):
        raise AudioError(f"{name} is {no_recording(samples)}")
    if rate is None:
        raise AudioError(f"{name} is an array: pass sampling_rate, in Hz, with it")


def checked_samples(samples: Any, rate: Any, name: str) -> tuple[Tensor, str | None]:
    """Return samples that were passed as (S,) at 16 kHz, with a warning; an AudioError names the input."""
    check_is_array(samples, rate, name)
    try:
        return read_samples(samples, rate)
    except (AudioError, TypeError, ValueError, RuntimeError) as error:  # such as tensors without values
        raise AudioError(f"{name}: {error}") from None


@dataclass(frozen=True)
class Recording:
    """Describe one input: its index, its file or samples, its length by the header, or why it cannot be read."""

    index: int
    file: str | None = None  # None for samples that were passed in memory
    start: float | None = None  # start and end of an excerpt, in seconds
    end: float | None = None
    samples: np.ndarray | None = None  # (S,) float32 at 16 kHz; not a tensor, which takes a worker a descriptor
    num_samples: int = 0  # S
    warning: str | None = None  # what is wrong with the sound, once it was read
    error: SerError | None = None


def find_recording(index: int, item: Input, sampling_rate: int | None, max_seconds: float) -> Recording:
    """Describe an input without decoding it, from its header or from the samples that were passed."""
    recording = Recording(index)
    name = f"input {index}"
    try:
        sound, rate, file = unpacked(item, sampling_rate, name)
        if isinstance(sound, Utterance):
            recording, sound = replace(recording, start=sound.start, end=sound.end), sound.file
        if isinstance(sound, str | os.PathLike):
            name = os.fsdecode(sound)
            recording = replace(recording, file=name)
            info = audio_info(name, start=recording.start, end=recording.end, max_seconds=float("inf"))
            recording = replace(recording, num_samples=info.num_samples)
            seconds = info.seconds
        else:
            waveform, warning = checked_samples(sound, rate, name)
            samples = waveform.numpy()
            recording = replace(recording, file=file, samples=samples, num_samples=len(samples), warning=warning)
            seconds = len(samples) / SAMPLE_RATE
        if seconds > max_seconds:
            raise AudioError(
                f"{name}: lasts {seconds:.1f} s; at most {max_seconds:g} s are recognised at once. "
                "Cut it into utterances (one emotion is given for the whole), recognise it window by window "
                "(--window, predict_windows), or raise max_seconds"
            )
    except SerError as error:
        return replace(recording, samples=None, error=error)
    return recording


def open_windows(
    source: Input, sampling_rate: int | None, *, window: float, hop: float
) -> tuple[str | None, Iterator[tuple[float, float, Tensor, str | None]]]:
    """Return the name of a recording's file, and its windows as `read_windows` yields them."""
    name = "the recording"
    sound, rate, file = unpacked(source, sampling_rate, name)
    if isinstance(sound, Utterance):
        file, start, end = str(sound.file), sound.start, sound.end
        return file, read_windows(file, window=window, hop=hop, start=start, end=end)
    if isinstance(sound, str | os.PathLike):
        return os.fsdecode(sound), read_windows(os.fsdecode(sound), window=window, hop=hop)
    check_is_array(sound, rate, name)
    return file, array_windows(sound, rate, window=window, hop=hop)


def gather(recordings: Iterator[Recording], seconds: float | None) -> Iterator[list[Recording]]:
    """Divide recordings into runs of at most `WINDOW`, each of which is sorted by length.

    Args:
        recordings: recordings in their order, from a source that may be slow.
        seconds: the first run has this many seconds of sound, so that results come soon. Each further run has
            twice as many, so that there is little padding; with a slow source it ends after ``seconds`` again.
            None: every run except the last has `WINDOW` recordings.
    """
    limit = seconds
    while True:
        run: list[Recording] = []
        sound, began = 0.0, time.monotonic()
        for recording in recordings:
            run.append(recording)
            if seconds is not None and limit is not None:
                sound += max(recording.num_samples / SAMPLE_RATE, seconds / MOST_FIRST)
                slow = time.monotonic() - began > PATIENCE
                if sound >= (seconds if slow else limit):
                    limit *= 2
                    break
            if len(run) == WINDOW:
                break
        if not run:
            return
        yield run


def plan_batches(runs: Iterable[list[Recording]], seconds: float) -> Iterator[list[Recording]]:
    """Form batches of similar length, to reduce padding; recordings with errors get separate batches."""
    for run in runs:
        good = [r for r in run if r.error is None]
        if len(good) < len(run):
            yield [r for r in run if r.error is not None]
        for batch in evaluation_batches([r.num_samples for r in good], batch_samples=int(seconds * SAMPLE_RATE)):
            yield [good[item.index] for item in batch]


class Decoder(Dataset[tuple[Recording, Tensor | SerError]]):
    """Read the sound of recordings, which come from the batch sampler; this may run in a worker."""

    def __getitem__(self, recording: Recording) -> tuple[Recording, Tensor | SerError]:
        if recording.error is not None:
            return recording, recording.error
        if recording.samples is not None:
            return recording, torch.from_numpy(recording.samples)
        assert recording.file is not None
        start, end = recording.start, recording.end
        try:  # the limit was checked when the recording was found
            waveform, warning = read_audio(recording.file, start=start, end=end, max_seconds=float("inf"))
            return replace(recording, warning=warning), waveform
        except SerError as error:
            return recording, error


class Packed(NamedTuple):
    """Hold a decoded batch, with samples in one tensor, since each tensor takes a worker a file descriptor."""

    recordings: list[tuple[int, str | None, str | None]]  # (index, file, warning) of those that could be read
    lengths: list[int]
    samples: Tensor  # (sum of lengths,)
    errors: dict[int, SerError]  # index -> error


def pack_decoded(items: list[tuple[Recording, Tensor | SerError]]) -> Packed:
    """Put the waveforms of a batch one after the other, without padding."""
    good = [(recording, sound) for recording, sound in items if isinstance(sound, Tensor)]
    return Packed(
        [(recording.index, recording.file, recording.warning) for recording, _ in good],
        [len(waveform) for _, waveform in good],
        torch.cat([waveform for _, waveform in good]) if good else torch.empty(0),
        {recording.index: sound for recording, sound in items if isinstance(sound, SerError)},
    )

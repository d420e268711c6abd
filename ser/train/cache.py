"""Cache the output of a frozen part of a model: it is computed once for each utterance and kept on disk.

    CACHE/features-6f12ab34cd56ef78-fp16/    one folder for each kind, weights, preprocessing and type
        SHA256.safetensors                   some utterances, each under the sha256 of its recording's content; the
                                             name is the sha256 of the file

There are two kinds. "features" is the output of the feature encoder, in frames of 20 ms; it does not depend on the
layers above. "pooled", if all of wav2vec 2.0 is frozen, is the mean over time of each layer that the heads read.
(The mean over time commutes with a sum over layers and with a projection.) An epoch then takes almost no time.

Each utterance is computed alone and in float32, so batch composition does not matter. Folder and key name all that
the numbers depend on, so they are never out of date, and runs may share, move or delete a cache. A shard is
written under a temporary name, synced to the disk and renamed. So a cache whose filling was killed keeps its whole
shards, and the next run continues. Before a run reads shards, the ranks verify them together: a shard that has
changed is removed and computed again. Each rank fills a part and reads all, by memory maps that the system shares.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from ser.audio import SAMPLE_RATE
from ser.data.dataset import SpeechDataset
from ser.errors import ConfigError, FileError, Tell
from ser.files import digest, open_tensors, sync, write_tensors, written
from ser.models.multitask import MultiTaskModel
from ser.train.distributed import World
from ser.train.resources import memory_explained

FORMAT = 1  # to be raised if the code computes other numbers from the same weights and audio
DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
Wanted = dict[str, list[int]]  # key of a recording's content -> the utterances that have it
SHARD_BYTES = 64 << 20
NAME, OLD_NAME = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{16}")  # earlier releases kept no sha256
SHORTER = "Try --max-seconds to drop the longest training utterances, or leave --cache out"
STALE_SECONDS = 24 * 3600.0  # age at which the unfinished shard of a killed process is removed


def choose_kind(model: MultiTaskModel, freeze: str) -> tuple[str, str]:
    """Return "features" or "pooled", and why not "pooled". Raises ConfigError if no part is frozen."""
    if freeze == "none":
        advice = "add --freeze feature-encoder, or encoder"
        raise ConfigError(f"cache keeps what a frozen part computes, and freeze is none: {advice}")
    reasons = {
        "the feature encoder alone is frozen": freeze != "encoder",
        "CTC reads every frame": model.lm_head is not None,
        f"pooling is {model.pooling.method}, not mean": model.pooling.method != "mean",
        f"final_dropout is {model.dropout.p:g}, which drops parts of frames before the mean (with 0 in --init's "
        "config.json means would be kept)": model.dropout.p > 0,
    }
    why = [reason for reason, holds in reasons.items() if holds]
    return ("features", why[0]) if why else ("pooled", "")


def progress_bar(world: World, **about: Any) -> tqdm[Any]:
    """Begin a progress bar, which the main rank shows on a terminal and clears at its end."""
    return tqdm(**about, leave=False, disable=not (world.is_main and sys.stderr.isatty()))


def verified(paths: Sequence[Path], world: World) -> tuple[set[Path], set[Path]]:
    """Divide shards into the unchanged ones, whose sha256 is their name, and the others."""
    sound: set[Path] = set()
    for path in progress_bar(world, iterable=paths, unit="shard", desc="verifying the cache"):
        with suppress(OSError):
            if digest(path) == path.stem:
                sound.add(path)
    return sound, set(paths) - sound


@dataclass
class Cache:
    """Hold a folder of the cache, for one kind, weights and preprocessing."""

    folder: Path
    kind: str
    dtype: torch.dtype
    compute: Callable[[Tensor], Tensor]  # (1, S) float32 waveform -> (T, C) features or (N, D) layers' means
    shape: Callable[[int], tuple[int, int]]  # number of samples -> shape of the output of `compute`
    shards: dict[str, Path] = field(default_factory=dict)  # key -> the shard that has it
    sound: set[Path] = field(default_factory=set)  # shards that were written or verified in this run

    @staticmethod
    def of(model: MultiTaskModel, folder: str | Path, *, kind: str, dtype: str, do_normalize: bool) -> Cache:
        """Return the cache of this model's weights, under ``folder``."""
        config, minimum = model.config, model.config.min_samples
        part = model.wav2vec2.feature_extractor if kind == "features" else model.wav2vec2
        about: list[Any] = [FORMAT, kind, SAMPLE_RATE, do_normalize]
        if kind == "pooled":
            about += [config.to_dict(), model.layer, model.heads_config.weighted_final_norm]
        else:
            about += [config.conv_kernel, config.conv_stride, config.feat_extract_norm]
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
        for name, tensor in part.state_dict().items():
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())

        @torch.no_grad()
        def compute(waveform: Tensor) -> Tensor:
            waveform = F.pad(waveform, (0, max(0, minimum - waveform.shape[1])))
            length = torch.tensor([waveform.shape[1]])
            if kind == "pooled":
                return model.layer_means(waveform, length)[0]
            return model.wav2vec2.feature_extractor(waveform, length)[0][0]

        def shape(samples: int) -> tuple[int, int]:
            if kind == "pooled":
                return (config.num_hidden_layers + 1 if model.layer is None else 1), config.hidden_size
            return int(config.num_frames(torch.tensor(max(samples, minimum)))), config.conv_dim[-1]

        name = f"{kind}-{digest.hexdigest()[:16]}-{dtype}"
        return Cache(Path(folder) / name, kind, DTYPES[dtype], compute, shape)

    def find(self, wanted: Collection[str], world: World) -> tuple[int, int]:
        """Find and verify the shards of the ``wanted`` keys, each rank a part. All ranks call this.

        A shard that has changed counts as absent and is removed. Returns the number of changed shards, and that of
        shards of earlier releases, which cannot be verified.
        """
        keys, damaged, old = self.listed()
        wanted = set(wanted)
        needed = [path for path in keys if path not in self.sound and not wanted.isdisjoint(keys[path])]
        agreed = world.gather(needed)[0]  # ranks may see different shards if another run writes meanwhile
        sound, broken = verified([path for path in agreed[world.rank :: world.size] if path in keys], world)
        self.sound |= {path for part in world.gather(sound) for path in part}
        damaged |= broken
        others = {path for part in world.gather(damaged) for path in part}
        more, broken = verified([path for path in needed if path not in self.sound | others], world)
        self.sound |= more
        damaged |= broken
        self.shards = {key: path for path in keys if path in self.sound for key in keys[path]}
        for path in (*damaged, *(old if world.is_main else ())):
            with suppress(OSError):
                path.unlink()
        return len(others | damaged), len(old)

    def listed(self) -> tuple[dict[Path, list[str]], set[Path], set[Path]]:
        """List the keys in each shard, the shards whose header cannot be read, and those of earlier releases."""
        keys: dict[Path, list[str]] = {}
        damaged: set[Path] = set()
        old: set[Path] = set()
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                if NAME.fullmatch(path.stem):
                    with open_tensors(path) as file:
                        keys[path] = file.keys()
                elif OLD_NAME.fullmatch(path.stem):
                    old.add(path)
            except (SafetensorError, OSError):
                damaged.add(path)
        return keys, damaged, old

    def write(self, tensors: dict[str, Tensor]) -> None:
        """Write one more shard, whole or not at all. Raises FileError."""
        name = hashlib.sha256("".join(tensors).encode()).hexdigest()[:16]
        temporary = self.folder / f".{name}.{os.getpid()}.tmp"
        with written(self.folder / name):
            try:
                write_tensors(temporary, tensors)
                sync(temporary)
                path = self.folder / f"{digest(temporary)}.safetensors"
                temporary.replace(path)
                sync(self.folder)
                self.sound.add(path)
            finally:
                temporary.unlink(missing_ok=True)


class Stored:
    """Let a `SpeechDataset` read the cache instead of recordings."""

    def __init__(self, cache: Cache, keys: list[str], lengths: list[int], errors: dict[int, str]) -> None:
        self.kind, self.keys, self.shards, self.errors = cache.kind, keys, cache.shards, errors
        self.shapes = {i: cache.shape(lengths[i]) for i in errors}  # shapes of zeros in place of unread recordings
        self.files: dict[Path, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave out open files, since a worker that is not forked opens its own."""
        return vars(self) | {"files": {}}

    def __call__(self, index: int) -> tuple[Tensor, str]:
        """Return the stored (T, C) or (N, D) and an empty string; or zeros of this shape and an error."""
        if error := self.errors.get(index, ""):
            return torch.zeros(self.shapes[index]), error
        path = self.shards[self.keys[index]]
        if path not in self.files:
            try:
                self.files[path] = open_tensors(path)
            except (SafetensorError, OSError) as lost:
                advice = "the same command fills the cache and goes on"
                raise FileError(f"{path}: is lost ({lost}); {advice}") from lost
        return self.files[path].get_tensor(self.keys[index]), ""


def content_keys(dataset: SpeechDataset, world: World) -> tuple[list[str], dict[int, str]]:
    """Return the sha256 of each utterance's file and excerpt, and the errors of files that cannot be opened.

    Each rank reads a part, and each file only once, even if many utterances are cut from it.
    """
    digests: dict[Path, str] = {}
    keys: dict[int, str] = {}
    errors: dict[int, str] = {}
    for i in range(world.rank, len(dataset), world.size):
        u = dataset.utterances[i]
        try:
            if u.file not in digests:
                with u.file.open("rb") as file:
                    digests[u.file] = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            errors[i] = f"{u.file}: {error.strerror or error}"
        else:
            keys[i] = hashlib.sha256(f"{digests[u.file]} {u.start} {u.end}".encode()).hexdigest()
    keys = {i: key for part in world.gather(keys) for i, key in part.items()}
    errors = {i: why for part in world.gather(errors) for i, why in part.items()}
    return [keys.get(i, "") for i in range(len(dataset))], errors


def remove_stale(folder: Path) -> None:
    """Remove the unfinished shards of processes that were killed long ago."""
    for path in folder.glob(".*.tmp"):
        if time.time() - path.stat().st_mtime > STALE_SECONDS:
            path.unlink(missing_ok=True)


def check_room(cache: Cache, lengths: Sequence[int], world: World) -> int:
    """Return the bytes that recordings of these lengths need; raise FileError on all ranks if one lacks space."""
    size = sum(frames * width for frames, width in (cache.shape(samples) for samples in lengths))
    size *= cache.dtype.itemsize
    free = shutil.disk_usage(cache.folder).free
    if any(world.gather(size > free)):
        raise FileError(
            f"{cache.folder}: the cache needs {size / 1e9:.2f} GB for {len(lengths)} utterances, and "
            f"{free / 1e9:.2f} GB are free; make room, choose another --cache, or leave it out"
        )
    return size


def compute_share(
    cache: Cache, dataset: SpeechDataset, share: list[int], wanted: Wanted, world: World, bar: tqdm[Any]
) -> dict[int, str]:
    """Compute and write one rank's part; return the errors of unreadable recordings. Raises FileError."""
    key_of = {same[0]: key for key, same in wanted.items()}
    broken: dict[int, str] = {}
    waiting: dict[str, Tensor] = {}
    held = 0  # bytes
    for i in share:
        example, who, seconds = dataset[i], dataset.utterances[i].id, dataset.lengths[i] / SAMPLE_RATE
        with memory_explained(SHORTER, doing=f"with {who} ({seconds:.1f} s)"):
            found = None if example.error else cache.compute(example.waveform[None].to(world.device)).cpu()
        if found is None or tuple(found.shape) != cache.shape(dataset.lengths[i]):
            for j in wanted[key_of[i]]:  # all utterances of this recording, each with its own name
                late = f"{dataset.utterances[j].file}: is not as long as its header says"
                broken[j] = dataset[j].error or late
            continue
        kept = waiting[key_of[i]] = found.to(cache.dtype)
        if not bool(kept.isfinite().all()) and bool(found.isfinite().all()):
            fit = f"values up to {found.abs().max():.3g} do not fit into float16"
            raise FileError(f"{who}: {fit}; use --cache-dtype fp32")
        held += kept.nbytes
        if held >= SHARD_BYTES:
            cache.write(waiting)
            waiting, held = {}, 0
        bar.update(round(seconds * world.size))
    if waiting:
        cache.write(waiting)
    return broken


def compute_missing(
    cache: Cache, dataset: SpeechDataset, wanted: Wanted, missing: list[int], world: World, name: str
) -> dict[int, str]:
    """Compute and write what is missing, each rank a part; return the errors of all ranks.

    Raises FileError on all ranks.
    """
    seconds = sum(dataset.lengths[i] for i in missing) / SAMPLE_RATE
    broken, failure = {}, ""
    with progress_bar(world, total=round(seconds), unit="s", desc=f"caching {name}") as bar:
        try:
            broken = compute_share(cache, dataset, missing[world.rank :: world.size], wanted, world, bar)
        except FileError as error:
            failure = str(error)
    for why in filter(None, world.gather(failure)):  # raised on all ranks, so that none waits for another
        raise FileError(why)
    return {i: why for part in world.gather(broken) for i, why in part.items()}


def check_seen(cache: Cache, keys: Sequence[str], errors: Collection[int], world: World) -> None:
    """Raise FileError on all ranks if one of them does not see what others wrote."""
    unseen = world.gather(sum(key not in cache.shards for i, key in enumerate(keys) if i not in errors))
    if any(unseen):
        rank = unseen.index(max(unseen))
        raise FileError(
            f"{cache.folder}: process {rank} of {world.size} does not see {unseen[rank]} of {len(keys)} "
            "utterances that should be there; choose a --cache on a disk that all processes share"
        )


def fill_cache(cache: Cache, dataset: SpeechDataset, world: World, say: Tell, name: str) -> Stored:
    """Fill the cache, each rank a part, and return what the dataset reads. All ranks call this.

    ``say`` prints a line. Recordings that cannot be read are in the result's ``errors``, on all ranks.

    Raises:
        FileError: the disk has too little space (found before anything is computed) or fails, or a process does
            not see what others wrote. It is raised on all ranks.
    """
    started = time.perf_counter()
    with written(cache.folder):
        cache.folder.mkdir(parents=True, exist_ok=True)
    if world.is_main:
        remove_stale(cache.folder)
    keys, errors = content_keys(dataset, world)
    wanted: Wanted = {}
    for i in sorted(set(range(len(dataset))) - errors.keys()):
        wanted.setdefault(keys[i], []).append(i)
    damaged, old = cache.find(wanted, world)
    if damaged:
        say(f"cache of {name}: {damaged} damaged shard{'s' if damaged > 1 else ''} removed, to be computed again")
    if old:
        say(f"cache of {name}: {old} without a sha256, of an earlier release, removed, to be computed again")
    first = (same[0] for key, same in wanted.items() if key not in cache.shards)
    missing = sorted(first, key=lambda i: -dataset.lengths[i])
    missing = world.gather(missing)[0]  # that of one rank, since ranks may have looked at different times
    if missing:
        lengths = [dataset.lengths[i] for i in missing]
        size = check_room(cache, lengths, world)
        errors |= compute_missing(cache, dataset, wanted, missing, world, name)
        cache.sound |= {path for part in world.gather(cache.sound) for path in part}
        cache.find(wanted, world)
        what = f"{len(missing)} utterances ({sum(lengths) / SAMPLE_RATE / 3600:.2f} h)"
        took, where = time.perf_counter() - started, f"{size / 1e6:.1f} MB in {cache.folder}"
        say(f"cache of {name}: {what} computed in {took:.1f} s, {where}")
    else:
        say(f"cache of {name}: all {len(wanted)} recordings found in {cache.folder}")
    check_seen(cache, keys, errors, world)
    return Stored(cache, keys, dataset.lengths, errors)

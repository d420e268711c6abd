"""How much memory a run has taken, and in words what may happen to it and to loader workers."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from ser.audio import SAMPLE_RATE
from ser.data.dataset import Batch
from ser.errors import ResourceError


@contextmanager
def memory_explained(batch: Batch, names: Sequence[str], advice: str) -> Iterator[None]:
    """Out of memory in here is a ResourceError that names the utterances at work and what to change."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        signs = ("out of memory", "allocate memory", "ALLOC_FAILED")
        known = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not known and not any(sign in str(error) for sign in signs):
            raise
        seconds = [n / SAMPLE_RATE for n in batch.num_samples.tolist()]
        held = ", ".join(
            f"{names[i] if names else f'utterance {i}'} ({s:.1f} s)"
            for i, s in zip(batch.indices, seconds, strict=True)
        )
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ResourceError(
            f"out of memory with {len(seconds)} utterance{'s' if len(seconds) > 1 else ''} padded to "
            f"{max(seconds):.1f} s: {held}. {advice}. ({reason})"
        ) from error


@contextmanager
def worker_death_explained() -> Iterator[None]:
    """A loader worker that is killed, or hangs, is a ResourceError.

    torch raises it wherever this process happens to be.
    """
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError) as error:
        # What a dead worker had sent is fetched from it through a socket, which may fail before torch tells of it.
        lost = isinstance(error, ConnectionError | EOFError)
        if not lost and not str(error).startswith(("DataLoader worker", "DataLoader timed out")):
            raise
        reason = (str(error).splitlines() or ["its connection ended"])[0].strip().rstrip(".")
        if reason.startswith("DataLoader timed out"):
            raise ResourceError(
                f"a process that decodes audio gave nothing within --timeout: {reason}. Does the file "
                "system answer? The same command continues"
            ) from error
        raise ResourceError(
            f"a process that decodes audio died: {reason}. If the system killed it for lack of memory, lower "
            "--workers (0: the training process decodes); then give the same command again to continue"
        ) from error


def memory_gib(device: torch.device) -> float:
    """Peak memory: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)

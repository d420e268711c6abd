"""How much memory a run has taken, and in words what to do where it runs short."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from ser.audio import SAMPLE_RATE
from ser.data.dataset import Batch
from ser.errors import ResourceError

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


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


def memory_gib(device: torch.device) -> float | None:
    """Peak memory: of the GPU, or of this process; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)

"""What a run has of the machine: its memory, and in words what may happen to it and to loader workers."""

from __future__ import annotations

import ctypes
import platform
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


@contextmanager
def freed_memory_kept(device: torch.device) -> Iterator[None]:
    """On a CPU: what tensors give back in here is kept for the next ones, and given back at the end.

    glibc returns large blocks to the system at once and has them again as pages that are mapped and zeroed one by
    one: 170,000 page faults for an update of base, which cost it 3 % on a quiet machine and a quarter on a virtual
    one. Other libraries of C, and GPUs, whose memory torch keeps itself, are left as they are.
    """
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    libc.mallopt(trim_threshold, -1)
    libc.mallopt(mmap_max, 0)
    try:
        yield
    finally:
        libc.mallopt(trim_threshold, 128 * 1024)  # glibc's defaults
        libc.mallopt(mmap_max, 65536)
        libc.malloc_trim(0)


def memory_gib(device: torch.device) -> float:
    """Peak memory: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)

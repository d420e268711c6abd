"""What is freed on a CPU and needed again at once stays with the process."""

from __future__ import annotations

import ctypes
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_lock = threading.Lock()
_inside = 0  # contexts that are open, in any thread: the setting is one of the process


def glibc() -> ctypes.CDLL | None:
    """Find the C library of this process, where it is glibc."""
    if platform.libc_ver()[0] != "glibc":
        return None
    try:
        found = ctypes.CDLL(None)
    except (OSError, TypeError):  # Windows
        return None
    return found if hasattr(found, "mallopt") and hasattr(found, "malloc_trim") else None


@contextmanager
def freed_memory_kept(device: torch.device) -> Iterator[None]:
    """On a CPU: what tensors give back in here is kept for the next ones, and given back at the end.

    glibc returns large blocks to the system at once and has them again as pages that are mapped and zeroed one by
    one: 170,000 page faults for an update of base, which cost it 3 % on a quiet machine and a quarter on a virtual
    one. Other libraries of C, and GPUs, whose memory torch keeps itself, are left as they are.
    """
    global _inside
    libc = glibc() if device.type == "cpu" else None
    if libc is None:
        yield
        return
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    with _lock:
        _inside += 1
        libc.mallopt(trim_threshold, -1)
        libc.mallopt(mmap_max, 0)
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                libc.mallopt(trim_threshold, 128 * 1024)  # glibc's defaults
                libc.mallopt(mmap_max, 65536)
                libc.malloc_trim(0)

"""Choose a device, a floating-point type and a number of threads; measure memory, and tune how it is returned."""

from __future__ import annotations  # CDLL is no class on every system

import ctypes
import os
import platform
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ser.errors import ConfigError

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


def choose_device(name: str, local_rank: int) -> torch.device:
    """Return the device called ``name``, one GPU for each local rank; "auto" is a GPU if there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device is {name!r}; expected auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if device.index is not None and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
            raise ConfigError(
                f"device is {name}, one GPU for several processes; give cuda, and each takes its own"
            )
        index = device.index if device.index is not None else local_rank
        if index >= count:
            raise ConfigError(f"device {name} on local rank {local_rank}: this machine has {count} CUDA devices")
        return torch.device("cuda", index)
    return device


def cpu_threads() -> int:
    """Return the number of threads for this process: its share of the cores, or OMP_NUM_THREADS if it is alone.

    torchrun sets OMP_NUM_THREADS to 1 for several processes on any machine, so it is ignored there.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if processes == 1 and os.environ.get("OMP_NUM_THREADS", "").isdecimal():
        return max(1, int(os.environ["OMP_NUM_THREADS"]))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // processes)


PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16}


def has_fast_bf16(device: torch.device, cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Tell whether products of bf16 matrices are faster than products of float32 matrices.

    They are on GPUs from compute capability 8 on, on CPUs with AMX, and on AMD's CPUs with AVX512_BF16. On Intel's
    CPUs without AMX, this instruction has half the rate, and bf16 took twice the time of float32 (docs/lab.md).
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type != "cpu" or not cpuinfo.is_file():
        return False
    pairs = (line.split(":", 1) for line in cpuinfo.read_text().split("\n\n")[0].splitlines() if ":" in line)
    values = {name.strip(): value.split() for name, value in pairs}
    flags = values.get("flags", [])
    return "amx_bf16" in flags or ("avx512_bf16" in flags and "AuthenticAMD" in values.get("vendor_id", []))


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """Return the type called "float32" or "bf16"; "auto" is bf16 if the device has fast instructions for it.

    The result depends only on the device, so it is always the same on one machine.
    """
    if name == "auto":
        return torch.bfloat16 if has_fast_bf16(device) else torch.float32
    if name not in PRECISIONS:
        raise ConfigError(f"precision is {name!r}; expected {', '.join(PRECISIONS)} or auto")
    return PRECISIONS[name]


def memory_gib(device: torch.device) -> float | None:
    """Return the peak memory of the GPU, or else of this process; None if the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


_lock = threading.Lock()
_inside = 0  # open contexts in all threads, since the setting is one of the whole process


def glibc() -> ctypes.CDLL | None:
    """Return the C library of this process if it is glibc."""
    if platform.libc_ver()[0] != "glibc":
        return None
    try:
        library = ctypes.CDLL(None)
    except (OSError, TypeError):  # Windows
        return None
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None


@contextmanager
def freed_memory_kept(device: torch.device) -> Iterator[None]:
    """Reuse the memory of freed CPU tensors in this context, and return it to the system at the end.

    glibc returns large blocks to the system at once. When it needs them again, their pages are mapped and zeroed
    one by one. For an update of base this gives 170,000 page faults, 3 % of the time on a quiet machine and a
    quarter on a virtual one. The setting affects the whole process, so training and the commands use this context,
    but `Recognizer.predict` does not. With other C libraries nothing changes, nor on a GPU, where torch itself
    keeps memory.
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

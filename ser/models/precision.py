"""In which floating-point format a model runs fastest on a device, without training it."""

from __future__ import annotations

from pathlib import Path

import torch

from ser.errors import ConfigError

PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16}


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """The type called "float32" or "bf16"; of "auto", bf16 where the device has fast instructions for it.

    A function of the device alone, so the same machine always gives the same answer.
    """
    if name == "auto":
        return torch.bfloat16 if has_fast_bf16(device) else torch.float32
    if name not in PRECISIONS:
        raise ConfigError(f"precision is {name!r}; expected {', '.join(PRECISIONS)} or auto")
    return PRECISIONS[name]


def has_fast_bf16(device: torch.device, cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether products of bf16 matrices are faster than of float32.

    On GPUs from compute capability 8 on. On CPUs with AMX, and on AMD's with AVX512_BF16; Intel's without AMX run
    that instruction at half the rate, so that bf16 took twice the time of float32 there (docs/performance.md).
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type != "cpu" or not cpuinfo.is_file():
        return False
    found = dict(line.split(":", 1) for line in cpuinfo.read_text().split("\n\n")[0].splitlines() if ":" in line)
    values = {name.strip(): value.split() for name, value in found.items()}
    flags = values.get("flags", [])
    return "amx_bf16" in flags or ("avx512_bf16" in flags and "AuthenticAMD" in values.get("vendor_id", []))

"""Damaged recordings by the thousand: each must give an error of ours that names it, or a valid signal.

    python tests/soak/audio.py --count 20000 --seconds 1800

Small files of every format that is read are cut, spliced, flipped bit by bit and given other sizes, and loaded in
child processes whose memory is limited, so that a crash or a hang is one line of the result and not its end. A
file is a function of the seed and its number. Prints JSON figures, and ends with 1 where something was wrong.
"""

import argparse
import json
import os
import random
import re
import resource
import signal
import struct
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile
import torch

from ser.audio import SAMPLE_RATE, audio_info, load_audio
from ser.errors import SerError

FORMATS = [
    ("WAV", "PCM_16"),
    ("WAVEX", "PCM_24"),
    ("WAV", "FLOAT"),
    ("RF64", "ULAW"),
    ("FLAC", "PCM_16"),
    ("OGG", "VORBIS"),
    ("MP3", "MPEG_LAYER_III"),
]
CHILD_FILES = 500  # per process: a leak shows within them
CHILD_SECONDS = 120  # of the processor; a hang beyond it is a kill
MEMORY = 2**30  # bytes, beyond what the process has with its libraries


def noise(seconds: float, rate: int, channels: int, seed: int = 0) -> np.ndarray:
    """(frames, channels) float32 of coloured noise within full scale, the like of which codecs keep."""
    white = np.random.default_rng(seed).standard_normal((int(seconds * rate) + 7, channels))
    return 0.1 * sum(white[i : len(white) - 7 + i] for i in range(8)).astype(np.float32)


def originals() -> list[bytes]:
    """Sound files of 0.3 s: every format, two rates, one and two channels."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "original")
        for rate, channels in ((SAMPLE_RATE, 1), (8_000, 2)):
            for container, coding in FORMATS:
                soundfile.write(path, noise(0.3, rate, channels), rate, coding, format=container)
                found.append(path.read_bytes())
        data = found[6]  # the MP3 once more, without the frame that declares its length
        second = data.index(data[:2], 4)
        found.append(data[second:])
    return found


def mutated(data: bytes, chance: random.Random) -> bytes:
    """One fault, of a kind that disks, cables and people make."""
    changed = bytearray(data)
    kind = chance.choice(["header", "bits", "cut", "splice", "insert", "sizes"])
    at, other = chance.randrange(len(data)), chance.randrange(len(data))
    if kind == "header":
        for _ in range(chance.randint(1, 4)):
            changed[chance.randrange(min(len(data), 80))] = chance.randrange(256)
    elif kind == "bits":
        for _ in range(chance.randint(1, 30)):
            changed[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif kind == "cut":
        del changed[at:]
    elif kind == "splice":
        changed = changed[:at] + changed[other:]
    elif kind == "insert":
        changed[at:at] = chance.randbytes(chance.randint(1, 50))
    else:
        at %= 200
        changed[at : at + 4] = chance.choice([b"\xff\xff\xff\xff", bytes(4), b"\xff\xff\xff\x7f", b"\0\0\0\x80"])
    # A page of an OGG file with a wrong checksum never reaches the decoder, so half of them get a right one.
    return with_checksums(changed) if changed[:4] == b"OggS" and chance.random() < 0.5 else bytes(changed)


def _crc_table() -> list[int]:
    table = []
    for byte in range(256):
        value = byte << 24
        for _ in range(8):
            value = (value << 1) ^ (0x04C11DB7 if value & 1 << 31 else 0)
        table.append(value & 0xFFFFFFFF)
    return table


CRC_TABLE = _crc_table()


def with_checksums(data: bytearray) -> bytes:
    """An OGG file, each of whose whole pages has the checksum of what it holds."""
    at = 0
    while data[at : at + 4] == b"OggS" and at + 27 <= len(data):
        segments = data[at + 26]
        end = at + 27 + segments + sum(data[at + 27 : at + 27 + segments])
        if end > len(data):
            break
        data[at + 22 : at + 26] = bytes(4)
        crc = 0
        for byte in data[at:end]:
            crc = (crc << 8 & 0xFFFFFFFF) ^ CRC_TABLE[crc >> 24 ^ byte]
        data[at + 22 : at + 26] = struct.pack("<I", crc)
        at = end
    return bytes(data)


def load(path: Path) -> str:
    """Which of the two permitted ends a file comes to; anything else is an exception."""
    try:
        info, waveform = audio_info(path), load_audio(path)
    except SerError as error:
        assert str(path) in str(error), "an error that does not name the file"
        return "refused"
    assert waveform.shape == (info.num_samples,) and waveform.dtype == torch.float32, "a wrong shape or type"
    assert bool(waveform.isfinite().all()), "a sample that is not finite"
    return "accepted"


def held(name: str) -> int:
    """VmHWM (most memory so far) or VmSize (addresses) of this process in bytes; 0 where Linux's /proc is not."""
    status = Path("/proc/self/status")
    return int(re.search(rf"{name}:\s+(\d+)", status.read_text())[1]) * 1024 if status.exists() else 0


def child(numbers: range, seed: int, sources: list[bytes], folder: Path) -> None:
    """Load the files of these numbers; leaves its figures, after each file, in ``folder``."""
    if held("VmSize"):
        resource.setrlimit(resource.RLIMIT_AS, (held("VmSize") + MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (CHILD_SECONDS,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libmpg123 warns from C
    found = {"accepted": 0, "refused": 0, "wrong": [], "slowest_seconds": 0.0, "peak_mib": 0}
    path = folder / "file"
    with (folder / "figures").open("w") as figures:
        for number in numbers:
            path.write_bytes(mutated(sources[number % len(sources)], random.Random(f"{seed} {number}")))
            print(number, file=figures, flush=True)  # the one at work, should this process end here
            began = time.perf_counter()
            try:
                found[load(path)] += 1
            except BaseException as error:
                found["wrong"].append(f"file {number}: {type(error).__name__}: {error}")
            found["slowest_seconds"] = max(found["slowest_seconds"], time.perf_counter() - began)
        found["peak_mib"] = held("VmHWM") >> 20
        print(json.dumps(found), file=figures, flush=True)


def soak(count: int, seconds: float, seed: int) -> dict:
    """The figures of ``count`` files, or of as many as ``seconds`` allow."""
    torch.set_num_threads(1)
    began = time.monotonic()
    sources = originals()
    total = {"files": 0, "accepted": 0, "refused": 0, "wrong": [], "slowest_seconds": 0.0, "peak_mib": 0}
    while total["files"] < count and time.monotonic() - began < seconds:
        numbers = range(total["files"], min(count, total["files"] + CHILD_FILES))
        with tempfile.TemporaryDirectory() as folder:
            process = os.fork()
            if not process:
                code = 1
                try:
                    child(numbers, seed, sources, Path(folder))
                    code = 0
                finally:
                    os._exit(code)
            code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            lines = Path(folder, "figures").read_text().splitlines()
        if code == 0:
            found, last = json.loads(lines[-1]), numbers[-1]
        else:  # what it counted is lost, and the next process begins behind the file that ended it
            last = int(lines[-1]) if lines else numbers[0]
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit {code}"
            found = {"wrong": [f"file {last}: its process ended by {how}"]}
        for name in ("accepted", "refused", "wrong"):
            total[name] += found.get(name, [] if name == "wrong" else 0)
        for name in ("slowest_seconds", "peak_mib"):
            total[name] = max(total[name], found.get(name, 0))
        total["files"] = last + 1
    return total | {
        "slowest_seconds": round(total["slowest_seconds"], 3),
        "seconds": round(time.monotonic() - began),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000, help="files (default: 20000)")
    parser.add_argument("--seconds", type=float, default=3600, help="stop after these many (default: 3600)")
    parser.add_argument("--seed", type=int, default=14, help="of the damage (default: 14)")
    arguments = parser.parse_args()
    figures = soak(arguments.count, arguments.seconds, arguments.seed)
    print(json.dumps(figures))
    return 1 if figures["wrong"] or figures["peak_mib"] >= 1024 else 0


if __name__ == "__main__":
    sys.exit(main())

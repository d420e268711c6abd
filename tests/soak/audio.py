"""Damaged recordings by the thousand: each must give an error of ours that names it, or a valid signal.

    python tests/soak/audio.py --count 20000 --seconds 1800

Small files of every format that is read are cut, spliced, flipped bit by bit and given other sizes, half of them
with the checksums and sizes that then are right, so that the damage reaches the decoders. They are read whole, as
an excerpt and as windows in child processes whose memory is limited, so that a crash or a hang is one line of the
result and not its end. A file is a function of the seed and its number. Prints JSON figures, and ends with 1 where
something was wrong.
"""

import argparse
import functools
import io
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

from ser.audio import SAMPLE_RATE, audio_info, load_audio, load_windows
from ser.containers import mp3_frame
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


def encoded(samples: np.ndarray, rate: int, container: str, coding: str) -> bytes:
    """The bytes of a sound file."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, coding, format=container)
    return file.getvalue()


def originals() -> list[bytes]:
    """Sound files of 0.6 s: every format, two rates, one and two channels, and what stands around the sound."""
    found = []
    tag = b"ID3\x04\0\0\0\0\0\x14" + bytes(20)
    for rate, channels in ((SAMPLE_RATE, 1), (8_000, 2)):
        files = [encoded(noise(0.6, rate, channels), rate, *kind) for kind in FORMATS]
        mp3, flac = files[6], files[4]
        second = mp3.index(mp3[:2], 4)
        bare = mp3[second:]  # without the frame that declares its length
        found += [*files, bare, tag + flac, 2 * tag + bytes(30) + mp3 + b"TAG" + bytes(125), bare + tag + mp3]
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
    # What has a wrong checksum or size may never reach the decoder, so half of them get right ones.
    return repaired(bytes(changed), data) if chance.random() < 0.5 else bytes(changed)


def repaired(changed: bytes, data: bytes) -> bytes:
    """With the checksums and sizes that are right for what ``data`` became; frames are where they were in it."""
    if changed[:4] == b"OggS":
        return with_checksums(bytearray(changed))
    if changed[:4] in (b"RIFF", b"RF64"):
        return with_sizes(bytearray(changed))
    if len(changed) != len(data):
        return changed
    if b"fLaC" in data[:100]:
        return with_flac_checksums(bytearray(changed), flac_frames(data))
    return with_mp3_checksums(bytearray(changed), mp3_frames(data))


def with_sizes(data: bytearray) -> bytes:
    """A WAV file whose two sizes are those of what it holds."""
    place = data.find(b"data")
    if len(data) < 8:
        return bytes(data)
    data[4:8] = struct.pack("<I", len(data) - 8)
    if 0 < place < len(data) - 8:
        data[place + 4 : place + 8] = struct.pack("<I", len(data) - place - 8)
    return bytes(data)


def crc(data: bytes, polynomial: int, bits: int, start: int = 0) -> int:
    """A checksum of this many bits, the highest first."""
    value = start
    for byte in data:
        value ^= byte << (bits - 8)
        for _ in range(8):
            value = value << 1 ^ (polynomial if value >> (bits - 1) else 0)
            value &= (1 << bits) - 1
    return value


@functools.cache
def flac_frames(data: bytes) -> list[tuple[int, int, int]]:
    """Where each frame of a whole FLAC begins, where its header's checksum stands, and where it ends."""
    starts = []
    at = data.find(b"\xff\xf8", data.index(b"fLaC"))
    while at >= 0:
        for header in range(at + 5, at + 16):
            if header < len(data) and crc(data[at:header], 0x07, 8) == data[header]:
                starts.append((at, header))
                break
        at = data.find(b"\xff\xf8", at + 1)
    found = []
    while starts:  # what looks like a frame is one if its last two bytes are the checksum of all before
        at, header = starts.pop(0)
        for end in [*(start for start, _ in starts), len(data)]:
            if crc(data[at : end - 2], 0x8005, 16) == int.from_bytes(data[end - 2 : end], "big"):
                found.append((at, header, end))
                starts = [start for start in starts if start[0] >= end]
                break
    return found


def with_flac_checksums(data: bytearray, frames: list[tuple[int, int, int]]) -> bytes:
    """Each header and each frame with the checksum of what it holds."""
    for at, header, end in frames:
        data[header] = crc(data[at:header], 0x07, 8)
        data[end - 2 : end] = struct.pack(">H", crc(data[at : end - 2], 0x8005, 16))
    return bytes(data)


@functools.cache
def mp3_frames(data: bytes) -> list[int]:
    """Where each frame of an MP3 begins, behind one tag or two."""
    found = []
    at = 0
    while at + 4 <= len(data):
        frame = mp3_frame(data[at : at + 4])
        if frame is not None:
            found.append(at)
        at += frame.size if frame is not None else 1
    return found


def with_mp3_checksums(data: bytearray, frames: list[int]) -> bytes:
    """Each frame says that it has a checksum, which is right; what stood in its place is lost."""
    for at in frames:
        data[at + 1] &= 0xFE
        mono, first = data[at + 3] >> 6 == 3, data[at + 1] & 8
        side = (17 if mono else 32) if first else (9 if mono else 17)
        value = crc(bytes(data[at + 2 : at + 4] + data[at + 6 : at + 6 + side]), 0x8005, 16, 0xFFFF)
        data[at + 4 : at + 6] = struct.pack(">H", value)
    return bytes(data)


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


def valid(waveform: torch.Tensor, samples: int) -> None:
    """Raise AssertionError unless this is a signal."""
    assert waveform.shape == (samples,) and waveform.dtype == torch.float32, "a wrong shape or type"
    assert bool(waveform.isfinite().all()), "a sample that is not finite"


def read_whole(path: Path) -> None:
    """As training and inference do."""
    valid(load_audio(path), audio_info(path).num_samples)


def read_excerpt(path: Path) -> None:
    """As of a manifest with start and end."""
    valid(load_audio(path, start=0.3, end=0.45), audio_info(path, start=0.3, end=0.45).num_samples)


def read_windows(path: Path) -> None:
    """Windows that overlap, of an excerpt."""
    for begin, end, waveform in load_windows(path, window=0.2, hop=0.15, start=0.05):
        valid(waveform, audio_info(path, start=begin, end=end).num_samples)


def load(path: Path) -> str:
    """Which of the two permitted ends a file comes to, read whole; anything else, or in parts, is an exception."""
    ends = []
    for read in (read_whole, read_excerpt, read_windows):
        try:
            read(path)
            ends.append("accepted")
        except SerError as error:
            assert str(path) in str(error), "an error that does not name the file"
            ends.append("refused")
    return ends[0]


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

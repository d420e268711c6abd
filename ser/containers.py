"""Recognise the containers of sound files by their first bytes: WAV, RF64, FLAC, OGG and MP3.

`read_container` reads a file before libsndfile does. It accepts only formats on the allow-list, and only a file
with exactly the sound that its header declares. libsndfile does not check this: it parses some 25 formats when it
opens a file, and it repairs a truncated WAV silently. Its parsers of ADPCM, CAF and others have known bugs. Of
files that were joined byte by byte it would read only the first part.

This module decodes nothing and imports no audio library; every fault is an :class:`AudioError`.
"""

import functools
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ser.errors import AudioError

WAV_SUBTYPES = ("PCM_U8", "PCM_S8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW")
SUBTYPES = {  # the allow-list, by libsndfile's names: container -> codings
    "WAV": WAV_SUBTYPES,
    "WAVEX": WAV_SUBTYPES,
    "RF64": WAV_SUBTYPES,
    "FLAC": ("PCM_S8", "PCM_16", "PCM_24"),
    "OGG": ("VORBIS",),
    "MP3": ("MPEG_LAYER_III",),
}
SUFFIXES = (".wav", ".wave", ".bwf", ".rf64", ".flac", ".ogg", ".oga", ".mp3")
# Files with sound in other formats are not read. They are reported, and not ignored silently.
# fmt: off
OTHER_SUFFIXES = (
    ".3g2", ".3gp", ".3gpp", ".aac", ".ac3", ".aif", ".aifc", ".aiff", ".alac", ".amr", ".ape", ".asf", ".au",
    ".avi", ".awb", ".caf", ".ds2", ".dsf", ".dss", ".eac3", ".f4v", ".flv", ".gsm", ".m2ts", ".m4a", ".m4b",
    ".m4r", ".m4v", ".mka", ".mkv", ".mov", ".mp1", ".mp2", ".mp4", ".mpc", ".mpeg", ".mpg", ".mpga", ".mts",
    ".nist", ".ogv", ".ogx", ".opus", ".pcm", ".qcp", ".ra", ".rm", ".snd", ".sph", ".spx", ".tak", ".tta",
    ".vob", ".voc", ".vox", ".w64", ".weba", ".webm", ".wma", ".wmv", ".wv",
)
# fmt: on
ADVICE = (
    "ser reads WAV and RF64 (PCM, float, mu-law, A-law), FLAC, OGG/Vorbis and MP3; "
    "convert it, for example: ffmpeg -i INPUT -c:a pcm_s16le OUTPUT.wav"
)
WAV_CODINGS = {1: "PCM", 3: "float", 6: "A-law", 7: "mu-law"}
REFUSED_WAV_CODINGS = {
    0x02: "Microsoft ADPCM",
    0x11: "IMA ADPCM",
    0x31: "GSM 6.10",
    0x40: "G.721 ADPCM",
    0x55: "MP3 inside WAV",
}
REFUSED_MAGIC = {  # only for a better message; an unknown format is refused too
    b"FORM": "AIFF or another IFF",
    b".snd": "AU",
    b"caff": "CAF",
    b"NIST": "NIST SPHERE",
    b"RIFX": "big-endian WAV (RIFX)",
    b"BW64": "BW64",
    b"riff": "W64",
    b"wvpk": "WavPack",
    b"MAC ": "Monkey's Audio",
    b"#!AM": "AMR",
    b"\x1aE\xdf\xa3": "Matroska or WebM",
}


class FilePart:
    """Present a part of a file to libsndfile as a whole file; some of its bytes may be replaced."""

    def __init__(self, file: "Bytes", start: int, end: int, replaced: dict[int, bytes] | None = None):
        self._file, self._start, self._size, self._replaced = file, start, end - start, replaced or {}
        self._at = 0

    def seek(self, offset: int, whence: int = 0, /) -> int:
        """Move to a position in the part, as in a file."""
        self._at = max(0, offset + (0, self._at, self._size)[whence])
        return self._at

    def tell(self) -> int:
        """Return the position in the part."""
        return self._at

    def read(self, count: int, /) -> bytes:
        """Read at most ``count`` bytes of the part, some of which may be replaced."""
        self._file.seek(self._start + self._at)
        data = self._file.read(max(0, min(count, self._size - self._at)))
        for position, field in self._replaced.items():
            first, last = max(position, self._at), min(position + len(field), self._at + len(data))
            if first < last:
                piece = field[first - position : last - position]
                data = data[: first - self._at] + piece + data[last - self._at :]
        self._at += len(data)
        return data

    def write(self, data: bytes) -> int:
        """Refuse to write: soundfile asks for this method, though it only reads."""
        raise OSError("read only")


Bytes = BinaryIO | FilePart


class Container(NamedTuple):
    """Hold what `read_container` found out about a file."""

    frames: int | None = None  # the number of frames, if libsndfile does not find it, or it has to be checked
    part: Bytes | None = None  # what libsndfile has to read, if it is not the whole file
    warning: str | None = None


def read_fields(layout: str, file: Bytes, name: str) -> tuple[Any, ...]:
    """Read the fields of a header from the current position, as `struct.unpack` does."""
    data = file.read(struct.calcsize(layout))
    if len(data) < struct.calcsize(layout):
        raise AudioError(f"{name}: ends inside its header: truncated or not a sound file; copy it again")
    return struct.unpack(layout, data)


def bytes_at(file: Bytes, position: int, count: int) -> bytes:
    """Read at most ``count`` bytes from a position in the file."""
    file.seek(position)
    return file.read(count)


def joined_error(name: str, found: str) -> AudioError:
    """Return the error for a file that holds several recordings; ``found`` says how they were found."""
    return AudioError(
        f"{name}: holds more sound than its header declares ({found}): files that were joined byte by byte, of "
        "which players and programs read the first alone. Join sound, not files (sox ONE TWO BOTH.wav), or, where "
        "this file is all you have: ffmpeg -i INPUT OUTPUT.wav, and compare how long it is"
    )


def find_bytes(file: Bytes, wanted: bytes, position: int, size: int) -> Iterator[int]:
    """Yield each position of these bytes, from ``position`` on. The file is read in blocks, to limit memory."""
    block, overlap = 1 << 20, len(wanted) - 1
    while position < size:
        data = bytes_at(file, position, block)
        place = data.find(wanted)
        while place >= 0:
            yield position + place
            place = data.find(wanted, place + 1)
        if len(data) <= overlap:
            return
        position += len(data) - overlap


# Tags: before the sound in any format, after it in MP3 ---------------------------------------------


def id3_length(head: bytes) -> int:
    """Return the length in bytes of the ID3v2 tag that begins with these ten bytes; 0 if none begins.

    The length includes the tag's header and, if it has one, its footer.
    """
    if len(head) < 10 or head[:3] != b"ID3" or head[3] == 0xFF or max(head[6:10]) > 0x7F:
        return 0
    length = sum(byte << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=True))
    return 10 + length + (10 if head[5] & 0x10 else 0)


def after_tags(file: Bytes, position: int, size: int) -> int:
    """Return the position where tags and zero bytes of padding end, in any order and number."""
    padding = 1 << 20  # the most zeros that are skipped, so a file of zeros is not read to its end
    while position < size:
        head = bytes_at(file, position, 32)
        if length := id3_length(head):
            position += length
        elif head[:8] == b"APETAGEX" and len(head) == 32:
            position += 32 + struct.unpack_from("<I", head, 12)[0]
        elif head[:3] == b"TAG":  # ID3v1, after the first of joined files
            position += 227 if head[3:4] == b"+" else 128
        elif head[:1] == b"\0" and padding > 0:
            data = bytes_at(file, position, 1 << 16)
            zeros = len(data) - len(data.lstrip(b"\0"))
            position, padding = position + zeros, padding - zeros
        else:
            break
    return min(position, size)


def before_tags(file: Bytes, size: int) -> int:
    """Return the position where the tags at a file's end begin: ID3v1 (with extension), ID3v2, APE, Lyrics3."""
    end = 0
    while end != size:
        end = size
        if size >= 128 and bytes_at(file, size - 128, 3) == b"TAG":
            size -= 128
            if size >= 227 and bytes_at(file, size - 227, 4) == b"TAG+":
                size -= 227
        tail = bytes_at(file, max(0, size - 32), 32)
        length = 0
        if tail[:8] == b"APETAGEX" and len(tail) == 32:  # a footer; a flag says whether there is also a header
            of_items, _, flags = struct.unpack_from("<III", tail, 12)
            length = of_items + (32 if flags >> 31 else 0)
        elif tail[-10:-7] == b"3DI" and tail[-5] & 0x10:
            length = id3_length(b"ID3" + tail[-7:])  # a footer is a header with another name
        elif tail[-9:] == b"LYRICS200" and tail[-15:-9].isdigit():
            length = 15 + int(tail[-15:-9])
        size -= length if length < size else 0
    return size


# WAV -----------------------------------------------------------------------------------------------

# A program that writes into a pipe, or is stopped, cannot go back to write a size. It leaves one of these instead:
# 0, the number of sox, or the largest number, perhaps minus the size of a header.
OPEN_SIZES = (0, 0x7FFFF000, 0x80000000)
LARGEST_SIZES, LESS = (0x7FFFFFFF, 0xFFFFFFFF), 256
MUCH_MORE = 4096  # up to this many bytes after the sound of a WAV, outside of chunks, are a program's tag


def is_open_size(size: int, block_align: int) -> bool:
    """Tell whether a chunk's size may be a placeholder that a program left."""
    whole_frames = 0x7FFFF000 - 0x7FFFF000 % block_align  # as sox writes it
    return size in (*OPEN_SIZES, whole_frames) or any(0 <= n - size <= LESS for n in LARGEST_SIZES)


def chunks_end(file: Bytes, position: int, size: int) -> int:
    """Return the position where the chunks that begin here end; a second `RIFF` does not count as a chunk."""
    for _ in range(1000):  # real files have a handful
        head = bytes_at(file, position, 8)
        kind, length = head[:4], int.from_bytes(head[4:], "little")
        is_chunk = len(head) == 8 and all(32 <= byte < 127 for byte in kind) and kind not in (b"RIFF", b"RF64")
        if not is_chunk or position + 8 + length > size:
            break
        position = min(position + 8 + length + (length & 1), size)
    return position


def second_wav(file: Bytes, position: int, size: int) -> int | None:
    """Return the position where another WAV file begins, if there is one."""
    for place in find_bytes(file, b"WAVE", position, size):
        if bytes_at(file, place - 8, 4) in (b"RIFF", b"RF64"):
            return place - 8
    return None


def find_wav_sound(file: Bytes, size: int, name: str) -> tuple[int, int, int, int]:
    """Go through the chunks of a WAV or RF64 file to its sound, and check its coding.

    Returns the position of the sound's first byte, the declared bytes, the bytes of a frame, and the position of
    the 64-bit sizes in RF64 (0 in WAV).
    """
    position, ds64, data_size_64, block_align = 12, 0, 0, 0
    for _ in range(1000):  # chunks; real files have a handful
        if position + 8 > size:
            break
        file.seek(position)
        kind, length = read_fields("<4sI", file, name)
        body = position + 8
        if kind == b"ds64":  # RF64: the sizes that do not fit into 32 bits
            ds64, (_, data_size_64) = body, read_fields("<QQ", file, name)
        elif kind == b"fmt " and not block_align:
            coding, _, _, _, block_align, _ = read_fields("<HHIIHH", file, name)
            if coding == 0xFFFE:  # extensible: the coding is the start of a GUID
                *_, coding = read_fields("<HHIH", file, name)
            if coding not in WAV_CODINGS or not block_align:
                found = REFUSED_WAV_CODINGS.get(coding, f"coding 0x{coding:04x}, {block_align} bytes per frame")
                raise AudioError(f"{name}: found a WAV file with {found}; {ADVICE}")
        elif kind == b"data":
            if not block_align:
                raise AudioError(f"{name}: its data chunk comes before its format; {ADVICE}")
            declared = data_size_64 if data_size_64 and length == 0xFFFFFFFF else length
            return body, declared, block_align, ds64
        position = body + length + (length & 1)
    raise AudioError(f"{name}: ends before its sound begins (no data chunk): truncated or damaged; copy it again")


def wav_container(file: Bytes, size: int, name: str) -> Container:
    """Count the frames of a WAV or RF64 file, and check that it holds exactly the sound that it declares.

    libsndfile reduces the declared length to what the file holds, so it would not report a truncated file.
    """
    body, declared, block_align, ds64 = find_wav_sound(file, size, name)
    held, after = size - body, min(body + declared, size)
    rest = max(chunks_end(file, place, size) for place in (after, min(after + (declared & 1), size)))
    # A size in the list is not a placeholder if it is right, that is, if nothing or complete chunks follow.
    stream = is_open_size(declared, block_align) and (declared > held or rest < size)
    if declared > held and not stream:
        raise AudioError(
            f"{name}: truncated: its header declares {declared} bytes of sound, the file holds {held} "
            f"({100 * held / declared:.1f} %); copy it again, or, if only its header is wrong, "
            "rewrite it: ffmpeg -i INPUT OUTPUT.wav"
        )
    second = second_wav(file, body if stream else after, size) if stream or rest < size else None
    if second is not None:
        raise joined_error(name, f"another WAV file begins at byte {second}")
    if not stream:
        more = size - rest
        warning = None
        if more > max(MUCH_MORE, 0.01 * declared):
            warning = f"{more} bytes behind the sound that its header declares are unknown and were not read"
        return Container(declared // block_align, None, warning)
    # libsndfile would read a size of 0 as 0, so the real sizes are put in.
    sizes = {4: struct.pack("<I", min(size - 8, 0xFFFFFFFF)), body - 4: struct.pack("<I", min(held, 0xFFFFFFFF))}
    if ds64:
        sizes |= {body - 4: b"\xff" * 4, ds64: struct.pack("<QQQ", size - 8, held, held // block_align)}
    warning = (
        f"its header leaves its length open (0x{declared:x} bytes, as programs write that cannot go back): read "
        "to the end of the file, so nothing would show that it was cut"
    )
    return Container(held // block_align, FilePart(file, 0, size, sizes), warning)


# OGG -----------------------------------------------------------------------------------------------


def ogg_container(file: Bytes, size: int, name: str) -> Container:
    """Check an OGG file: its first packet is Vorbis, its last page is there, and it holds one stream.

    With several streams, lengths would be wrong. A page is: "OggS", version, flags (2 = first, 4 = last),
    granule (8), serial (4), number, CRC, n, n segment sizes.
    """
    several = f"{name}: found several OGG streams in one file, expected one; {ADVICE}"
    position, end, last = 0, 0, False
    serial = latest = 0
    while position < size:
        head = bytes_at(file, position, 27 + 255)
        if head[:4] != b"OggS":  # damage, or other data after the OGG
            position = next(find_bytes(file, b"OggS", position, size), size)
            continue
        if len(head) < 27:
            break
        body = position + 27 + head[26]
        page_end = body + sum(head[27 : 27 + head[26]])
        packet = bytes_at(file, body, 8)
        number = struct.unpack_from("<I", head, 14)[0]
        if position == 0:
            serial = number
            if packet[:7] != b"\x01vorbis":
                found = {b"Opus": "Opus", b"\x7fFLA": "FLAC", b"Spee": "Speex"}.get(packet[:4], "no Vorbis")
                raise AudioError(f"{name}: found an OGG file with {found}; {ADVICE}")
        elif head[5] & 2 and packet[:7] == b"\x01vorbis":
            raise AudioError(several)
        if page_end > size:
            last = False
            break
        end, last, latest = page_end, bool(head[5] & 4), number
        position = page_end
    if last and latest != serial:
        raise AudioError(several)
    if not last:
        raise AudioError(
            f"{name}: truncated: its last OGG page is cut or is not marked as the last; copy it again, "
            "or keep what is there: ffmpeg -i INPUT OUTPUT.wav"
        )
    return Container(None, FilePart(file, 0, end) if end < size else None)


# FLAC ----------------------------------------------------------------------------------------------


def flac_metadata_end(file: Bytes, start: int) -> int:
    """Return the position where the metadata ends, which may hold any bytes, of the FLAC at ``start``."""
    position = start + 4
    for _ in range(1000):  # real files have a handful
        head = bytes_at(file, position, 4)
        position += 4 + int.from_bytes(head[1:], "big")
        if not head or head[0] & 0x80:  # the last one
            break
    return position


@functools.lru_cache(maxsize=1024)
def second_flac(name: str, start: int, size: int, changed: int) -> int | None:
    """Return the position where another FLAC begins in this file, if there is one.

    The result is cached for many excerpts of one file; ``changed`` is the time of the file's last change.
    """
    with Path(name).open("rb", buffering=0) as file:
        for place in find_bytes(file, b"fLaC", flac_metadata_end(file, start), size):
            head = bytes_at(file, place + 4, 4)  # the header of a FLAC's first block, which has 34 bytes
            if head in (b"\0\0\0\x22", b"\x80\0\0\x22"):
                return place
    return None


# MP3 -----------------------------------------------------------------------------------------------

MP3_KBIT = {  # MPEG 1 and MPEG 2 or 2.5, layer III, by index; 0 is "free" and 15 is invalid
    3: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 0),
    2: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160, 0),
}
MP3_RATES = (44_100, 48_000, 32_000, 0)
MP3_JUNK = 4096  # this many unknown bytes after the last frame are accepted; more may have been sound


class Mp3Frame(NamedTuple):
    """Hold what the header of a layer III frame says."""

    size: int  # bytes
    samples: int
    kind: tuple[int, int, bool]  # version, rate, mono: equal in all frames of one recording


def mp3_frame(header: bytes) -> Mp3Frame | None:
    """Read the header of a layer III frame from its four bytes; None if they are not such a header."""
    if len(header) < 4 or header[0] != 0xFF or header[1] & 0xE6 != 0xE2:
        return None
    version = header[1] >> 3 & 3  # 3: MPEG 1, 2: MPEG 2 (half the rates), 0: MPEG 2.5 (a quarter)
    rate = MP3_RATES[header[2] >> 2 & 3] >> {3: 0, 2: 1, 0: 2, 1: 16}[version]
    kbit = MP3_KBIT[3 if version == 3 else 2][header[2] >> 4]
    if not rate or not kbit:
        return None
    samples = 1152 if version == 3 else 576
    size = samples // 8 * kbit * 1000 // rate + (header[2] >> 1 & 1)
    return Mp3Frame(size, samples, (version, rate, header[3] >> 6 == 3))


def mp3_lead(rate: int) -> int:
    """Return how many sample frames before an excerpt have to be decoded so that the excerpt is exact.

    A frame's bits may begin up to 511 bytes earlier (MPEG 1) or 255 (MPEG 2 and 2.5), not counting headers. So the
    number of frames is that which holds these bytes at the lowest bit rate, with the longest headers (stereo, with
    a checksum). Until then libmpg123 skips frames, but keeps their bytes for the next ones. Two granules are
    added, because a granule overlaps the one before it, and the filter after that uses 480 earlier samples. One
    more is for rounding.
    """
    samples, back, header, kbit = (1152, 511, 38, 32) if rate >= 32_000 else (576, 255, 23, 8)
    held = samples // 8 * kbit * 1000 // rate - header
    return samples * (-(-back // held) + 3)


def next_mp3_frame(file: Bytes, position: int, size: int) -> int | None:
    """Return the next position where two MPEG frames of one kind follow each other, or one ends the file."""
    for place in find_bytes(file, b"\xff", position, size):
        frame = mp3_frame(bytes_at(file, place, 4))
        if frame is not None:
            following = mp3_frame(bytes_at(file, place + frame.size, 4))
            if place + frame.size == size or (following is not None and following.kind == frame.kind):
                return place
    return None


def mp3_runs(file: Bytes, size: int) -> Iterator[tuple[int, int, int]]:
    """Yield (begin, end, number of sample frames) of each run of MPEG frames of one kind."""
    position: int | None = 0
    while position is not None and position < size:
        begin, samples, kind = position, 0, None
        while position < size:
            frame = mp3_frame(bytes_at(file, position, 4))
            if frame is None or frame.kind != (kind or frame.kind):
                break
            kind, samples, position = frame.kind, samples + frame.samples, position + frame.size
        if samples:
            yield begin, position, samples
        else:
            position = next_mp3_frame(file, position, size)


def mp3_length(file: Bytes, size: int, name: str) -> int:
    """Count the sample frames of an MP3 that declares no length; all its frames have to follow one another."""
    runs = mp3_runs(file, size)
    _, end, samples = next(runs)
    if end > size:
        raise AudioError(f"{name}: truncated: its last MPEG frame is cut; copy it again")
    rest = after_tags(file, end, size)
    following = next(runs, None)
    if following is not None and following[0] == rest:
        raise joined_error(name, f"behind a tag, or at another rate, another recording begins at byte {rest}")
    if following is not None or size - rest > MP3_JUNK:
        raise AudioError(f"{name}: damaged MP3: no MPEG frame at byte {end}; copy it again")
    return samples


def mp3_container(file: Bytes, size: int, name: str) -> Container:
    """Count the sample frames of an MP3 without a declared length; else check it for missing or additional sound.

    Without a Xing or Info tag, libsndfile guesses the length from the bit rate of the first frame. A recording of
    variable bit rate could then silently lose two thirds of its sound.
    """
    first = bytes_at(file, 0, 64)  # the tag comes after at most 4 + 2 + 32 bytes of headers
    frame, tag = mp3_frame(first), max(first.find(b"Xing"), first.find(b"Info"))
    assert frame is not None, "the caller has seen it"
    end = before_tags(file, size)
    if not 0 < tag <= 38:
        return Container(mp3_length(file, end, name))
    if len(first) < tag + 16:
        raise AudioError(f"{name}: truncated: it ends inside its first MPEG frame; copy it again")
    flags, frames, sound = struct.unpack_from(">III", first, tag + 4)
    if not flags & 1 or not frames:
        return Container(mp3_length(file, end, name) - frame.samples)
    # If there are both, bytes come after frames. One per cent is allowed for encoders that count differently; the
    # decoder finds a smaller loss by the number of frames.
    declared = sound if flags & 2 else 0
    if size < 0.99 * declared:
        raise AudioError(
            f"{name}: truncated: its header declares {declared} bytes of sound, the file holds {size} "
            f"({100 * size / declared:.1f} %); copy it again, or keep what is there: ffmpeg -i INPUT OUTPUT.wav"
        )
    if next_mp3_frame(file, declared, end) is not None:
        runs = list(mp3_runs(file, end))
        held = sum(samples for *_, samples in runs) // frame.samples - 1  # without the frame of the tag itself
        if held > frames + 1:  # some encoders count that one too
            raise joined_error(name, f"{frames} MPEG frames of {held} or more")
    return Container()


# All of them ---------------------------------------------------------------------------------------


def begins_as_sound(path: Path) -> bool:
    """Tell whether a file begins like sound. A broken link counts too, so that its error is shown."""
    try:
        if not path.is_file():
            return path.is_symlink() and not path.exists()
        with path.open("rb") as file:
            head = file.read(12)
    except OSError:
        return False
    is_layer_3 = len(head) > 1 and head[0] == 0xFF and head[1] & 0xE6 == 0xE2  # of MPEG audio
    return is_layer_3 or head.startswith((b"fLaC", b"OggS", b"ID3")) or head[8:] in (b"WAVE", b"M4A ")


def not_sound_error(head: bytes, name: str) -> AudioError:
    """Return the error for a file that ser cannot read as sound, by its first bytes."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"version https://git-lfs", b"version https://hawser")):
        return AudioError(
            f"{name}: found a git-lfs pointer, not the sound itself: fetch it in the repository that it is from: "
            "git lfs install; git lfs pull (a ZIP of GitHub holds pointers alone: clone the repository)"
        )
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return AudioError(f"{name}: found a page of the web (HTML or XML), not sound: download it again")
    found = "MP4 or M4A" if head[4:8] == b"ftyp" else REFUSED_MAGIC.get(head[:4])
    return AudioError(f"{name}: found {found or f'an unknown format (first bytes {head[:12]!r})'}; {ADVICE}")


def read_container(file: BinaryIO, size: int, name: str) -> Container:
    """Check an open file's container, and say what libsndfile has to read.

    Args:
        file: an unbuffered binary file; its position moves.
        size: its size in bytes.
        name: its name in errors; `second_flac` opens the file by this name.

    Raises:
        AudioError: the format is not on the allow-list; the file is truncated, or holds several recordings.
    """
    start = after_tags(file, 0, size)
    inner = FilePart(file, start, size) if start else file
    head = bytes_at(inner, 0, 64)
    if head[:4] in (b"RIFF", b"RF64") and head[8:12] == b"WAVE":
        container = wav_container(inner, size - start, name)
    elif head[:4] == b"OggS":
        container = ogg_container(inner, size - start, name)
    elif head[:4] == b"fLaC":
        second = second_flac(name, start, size, os.fstat(file.fileno()).st_mtime_ns)
        if second is not None:
            raise joined_error(name, f"another FLAC begins at byte {second}")
        container = Container()
    elif mp3_frame(head) is not None:
        container = mp3_container(inner, size - start, name)
        tag = bytes_at(file, 0, 10)
        if start and start == id3_length(tag) and not tag[5] & 0x10:
            return container  # libsndfile itself skips a single tag without a footer, which is faster
    else:
        raise not_sound_error(bytes_at(file, 0, 64), name)  # with leading zeros, which other formats may have
    return container._replace(part=inner) if start and container.part is None else container

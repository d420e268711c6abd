"""What stands around sound: tags, open sizes, several files in one; and excerpts, which are the whole's."""

import io
import struct
from itertools import pairwise

import numpy as np
import pytest
import soundfile
import torch

from ser import audio, containers
from ser.audio import SAMPLE_RATE, audio_info, load_audio, load_windows, read_audio
from ser.errors import AudioError

ID3 = b"ID3\x03\0\0\0\0\0\x14" + b"TIT2\0\0\0\x0a\0\0a title\0\0\0"
ID3_WITH_FOOTER = b"ID3\x04\0\x10\0\0\0\x14" + bytes(20) + b"3DI\x04\0\x10\0\0\0\x14"
ID3V1 = b"TAG" + b"title".ljust(125, b"\0")
APE_ITEMS = struct.pack("<II", 5, 0) + b"Title\0abcde"


def ape(*, header: bool) -> bytes:
    """An APEv2 tag, which has a footer, and a header perhaps."""
    has = 1 << 31 if header else 0
    parts = [
        b"APETAGEX" + struct.pack("<IIIIQ", 2000, len(APE_ITEMS) + 32, 1, has | flag, 0) for flag in (1 << 29, 0)
    ]
    return (parts[0] if header else b"") + APE_ITEMS + parts[1]


def noise(seconds=0.5, rate=SAMPLE_RATE, channels=1, seed=0):
    white = np.random.default_rng(seed).standard_normal((int(seconds * rate) + 7, channels))
    return 0.1 * sum(white[i : len(white) - 7 + i] for i in range(8)).astype(np.float32)


def encoded(format, seconds=0.5, rate=SAMPLE_RATE, channels=1, seed=0, **options) -> bytes:
    file = io.BytesIO()
    options = {"bitrate_mode": "CONSTANT", "compression_level": 0.5} | options if format == "MP3" else options
    soundfile.write(file, noise(seconds, rate, channels, seed), rate, format=format, **options)
    return file.getvalue()


def bare(mp3: bytes) -> bytes:
    """An MP3 of constant bit rate without the frame that declares its length."""
    return mp3[containers.mp3_frame(mp3[:4]).size :]


def written(path, data: bytes):
    path.write_bytes(data)
    return path


def refused(path, *words) -> str:
    """The one message of everything that reads sound, in whole or in part."""
    calls = (
        lambda: audio_info(path),
        lambda: load_audio(path),
        lambda: load_audio(path, start=0.1, end=0.2),
        lambda: next(load_windows(path, window=0.2, hop=0.1)),
    )
    messages = set()
    for call in calls:
        with pytest.raises(AudioError) as caught:
            call()
        messages.add(str(caught.value))
    assert len(messages) == 1
    for word in (str(path), *words):
        assert word in next(iter(messages))
    return messages.pop()


def same_sound(path, plain) -> None:
    """Whole, excerpt and windows of the one are those of the other."""
    expected = load_audio(plain)
    assert audio_info(path).seconds == audio_info(plain).seconds
    assert (load_audio(path) - expected).abs().max() < 1e-6
    assert (load_audio(path, start=0.2, end=0.4) - expected[3_200:6_400]).abs().max() < 1e-6
    windows = [waveform for *_, waveform in load_windows(path, window=0.25, hop=0.25)]
    assert (torch.cat(windows) - expected).abs().max() < 1e-6


# Tags and padding ---------------------------------------------------------------------------------------

FRONT = {
    "one tag": ID3,
    "a tag with a footer": ID3_WITH_FOOTER,
    "two tags": ID3 + ID3,
    "three kinds": ID3 + ID3_WITH_FOOTER + ape(header=True),
    "a tag and padding": ID3 + bytes(100),
    "padding": bytes(100),
    "padding before a tag": bytes(3) + ID3 + bytes(5) + ID3,
    "a picture of a megabyte": b"ID3\x03\0\0\0\x40\0\0" + bytes(range(1, 256)) * 4112 + bytes(2**20 - 255 * 4112),
    "padding of a sector, many times": bytes(70_000),
}


@pytest.mark.parametrize("format", ["MP3", "bare MP3", "FLAC", "OGG", "WAV"])
@pytest.mark.parametrize("front", FRONT)
def test_sound_behind_tags_and_padding_is_the_same_sound(tmp_path, format, front):
    data = bare(encoded("MP3")) if format == "bare MP3" else encoded(format)
    same_sound(written(tmp_path / "tagged", FRONT[front] + data), written(tmp_path / "plain", data))


BEHIND = {
    "ID3v1": ID3V1,
    "an extended ID3v1": b"TAG+".ljust(227, b"\0") + ID3V1,
    "APEv2": ape(header=True),
    "APE without a header, and ID3v1": ape(header=False) + ID3V1,
    "ID3v2 with a footer": ID3_WITH_FOOTER,
    "Lyrics3": b"LYRICSBEGIN" + b"abc" + b"000014LYRICS200",
    "padding": bytes(2000),
    "junk": bytes(range(1, 255)) * 3,
}


@pytest.mark.parametrize("format", ["MP3", "bare MP3", "FLAC", "OGG", "WAV"])
@pytest.mark.parametrize("behind", BEHIND)
def test_sound_before_a_footer_or_junk_is_the_same_sound(tmp_path, format, behind):
    data = bare(encoded("MP3")) if format == "bare MP3" else encoded(format)
    path = written(tmp_path / "tagged", data + BEHIND[behind])
    same_sound(path, written(tmp_path / "plain", data))
    assert audio_info(path).warning is None


def test_a_file_of_zeros_is_refused_without_being_read_to_its_end(tmp_path):
    path = tmp_path / "zeros.mp3"
    with path.open("wb") as file:
        file.truncate(8 << 30)
    refused(path, "an unknown format")


def test_a_tag_without_sound_behind_it_is_refused(tmp_path):
    refused(written(tmp_path / "a.mp3", ID3), "unknown format")
    refused(written(tmp_path / "b.mp3", ID3[:9]), "unknown format")


def test_a_cut_mp3_with_a_tag_behind_it_is_still_cut(tmp_path):
    data = bare(encoded("MP3", 2.0))
    refused(written(tmp_path / "bare.mp3", data[:-50] + ID3V1), "truncated")
    data = encoded("MP3", 2.0)
    refused(written(tmp_path / "a.mp3", ID3 + ID3 + data[: len(data) // 2]), "truncated")


# WAV whose writer never filled in its sizes -----------------------------------------------------------------

OPEN = [0, 0x7FFFF000, 0x80000000, 0x7FFFFFFF, 0x7FFFFFFF - 36, 0x7FFFFFFF - 256, 0xFFFFFFFF, 0xFFFFFFFF - 256]


def with_sizes(wav: bytes, riff: int | None, data: int | None) -> bytes:
    changed, place = bytearray(wav), wav.index(b"data") + 4
    if riff is not None:
        changed[4:8] = struct.pack("<I", riff)
    if data is not None:
        changed[place : place + 4] = struct.pack("<I", data)
    return bytes(changed)


@pytest.mark.parametrize("format", ["WAV", "WAVEX"])
@pytest.mark.parametrize("riff", [None, *OPEN])
def test_a_wav_of_open_sizes_is_read_to_its_end_and_says_so(tmp_path, format, riff):
    wav = encoded(format, subtype="PCM_16")
    plain = written(tmp_path / "plain.wav", wav)
    for data in OPEN:
        path = written(tmp_path / "a.wav", with_sizes(wav, riff, data))
        same_sound(path, plain)
        _, warning = read_audio(path)
        assert f"leaves its length open (0x{data:x} bytes" in warning and "end of the file" in warning
    path = written(tmp_path / "a.wav", with_sizes(wav, riff, None))  # the sound's own size is known
    same_sound(path, plain)
    assert read_audio(path)[1] is None


def test_chunks_may_stand_before_the_sound_of_an_open_wav(tmp_path):
    wav = encoded("WAV", subtype="PCM_16")
    place = wav.index(b"data")
    extra = struct.pack("<4sI", b"JUNK", 10) + b"INFOabcdef"
    path = written(tmp_path / "a.wav", with_sizes(wav[:place] + extra + wav[place:], 0xFFFFFFFF, 0xFFFFFFFF))
    same_sound(path, written(tmp_path / "plain.wav", wav))


def test_sox_leaves_a_multiple_of_the_frame(tmp_path):
    wav = encoded("WAV", channels=1, subtype="PCM_24")
    path = written(tmp_path / "a.wav", with_sizes(wav, 0x7FFFF000 + 36, 0x7FFFF000 - 0x7FFFF000 % 3))
    same_sound(path, written(tmp_path / "plain.wav", wav))


def test_an_rf64_of_open_sizes_is_read_to_its_end(tmp_path):
    wav = encoded("RF64", subtype="PCM_16")
    place = wav.index(b"ds64") + 8
    path = written(tmp_path / "a.wav", wav[:place] + bytes(24) + wav[place + 24 :])
    same_sound(path, written(tmp_path / "plain.wav", wav))
    assert "leaves its length open" in audio_info(path).warning


@pytest.mark.parametrize("size", [0x7FFFEFFF, 0x7FFFF001, 0x7FFFFEFE, 0x80000001, 0xFFFFFEFE, 40_000, 1 << 30])
def test_any_other_size_that_is_not_there_is_a_cut(tmp_path, size):
    wav = encoded("WAV", subtype="PCM_16")
    refused(written(tmp_path / "a.wav", with_sizes(wav, None, size)), "truncated", f"{size} bytes")


def test_a_wav_that_holds_more_than_it_declares_says_so(tmp_path):
    """A recorder that was stopped before it filled in the last size."""
    wav = encoded("WAV", 2.0, subtype="PCM_16")
    path = written(tmp_path / "a.wav", with_sizes(wav, 1_036, 1_000))
    assert audio_info(path).frames == 500
    assert "63000 bytes behind the sound" in audio_info(path).warning


# Several files in one ------------------------------------------------------------------------------------

JOINED = "holds more sound than its header declares"


@pytest.mark.parametrize(
    "between", [b"", ID3, ID3V1, bytes(500), ID3V1 + ID3], ids=["nothing", "ID3", "ID3v1", "zeros", "both"]
)
@pytest.mark.parametrize("format", ["MP3", "FLAC", "WAV", "OGG"])
def test_files_joined_byte_by_byte_are_refused_as_such(tmp_path, format, between):
    for seconds, rate, channels in ((0.5, 16_000, 1), (0.05, 16_000, 1), (1.0, 22_050, 2)):
        parts = encoded(format), encoded(format, seconds, rate, channels, seed=1), encoded(format, seed=2)
        words = ("several OGG streams",) if format == "OGG" else (JOINED, "sox ONE TWO BOTH.wav", "ffmpeg")
        refused(written(tmp_path / "two", between.join(parts[:2])), *words)
        refused(written(tmp_path / "three", ID3 * (format != "WAV") + between.join(parts)), *words)
        refused(written(tmp_path / "same", parts[0] + between + parts[0]), *words)


def test_mp3s_joined_without_declared_lengths_are_read_whole_or_refused(tmp_path):
    one, two = (bare(encoded("MP3", 1.0, seed=i)) for i in (1, 2))
    both = written(tmp_path / "both.mp3", one + two)
    alone = [audio_info(written(tmp_path / f"{i}.mp3", part)).frames for i, part in enumerate((one, two))]
    assert audio_info(both).frames == sum(alone)
    assert len(load_audio(both)) == sum(alone)
    for between in (ID3, bytes(100), ID3V1):
        refused(written(tmp_path / "tagged.mp3", one + between + two), JOINED)
    for rate, channels in ((22_050, 1), (16_000, 2)):
        other = bare(encoded("MP3", 1.0, rate, channels))
        refused(written(tmp_path / "other.mp3", one + other), JOINED)
    refused(written(tmp_path / "declared.mp3", encoded("MP3", 1.0) + one), JOINED)


def test_a_joined_wav_whose_first_header_is_open_is_refused(tmp_path):
    wav = with_sizes(encoded("WAV", subtype="PCM_16"), 0xFFFFFFFF, 0xFFFFFFFF)
    refused(written(tmp_path / "a.wav", wav + wav), JOINED, f"byte {len(wav)}")


def test_a_wav_of_an_odd_size_may_lack_its_byte_of_padding(tmp_path):
    wav = encoded("WAV", subtype="PCM_U8")[:-1]
    wav = with_sizes(wav, len(wav) - 8, len(wav) - 44)
    refused(written(tmp_path / "a.wav", wav + wav), JOINED)
    chunk = struct.pack("<4sI", b"LIST", 20_000) + bytes(20_000)
    for padding in (b"", b"\0"):
        assert audio_info(written(tmp_path / "b.wav", wav + padding + chunk)).warning is None


def test_the_second_of_joined_flacs_is_found_wherever_it_begins(tmp_path, monkeypatch):
    monkeypatch.setattr(containers, "second_flac", containers.second_flac.__wrapped__)
    one, two = encoded("FLAC", 0.2), encoded("FLAC", 0.1)
    for more in range(1 << 20, (1 << 20) + 12):  # about the end of a block that is searched
        padding = b"\x01" + struct.pack(">I", more - len(one) - 4)[1:] + bytes(more - len(one) - 4)
        first = one[:42].replace(b"fLaC\x80", b"fLaC\0") + padding + one[42:]
        path = tmp_path / f"{more}.flac"
        assert audio_info(written(path, first)).frames == 3_200
        refused(written(path, first + two), f"another FLAC begins at byte {more}")


def test_the_start_of_a_flac_in_the_metadata_of_a_flac_is_no_second_one(tmp_path):
    flac = encoded("FLAC", 0.2)
    block = b"\x02" + struct.pack(">I", 100)[1:] + flac[:100]  # of an application
    path = written(tmp_path / "a.flac", flac[:42].replace(b"fLaC\x80", b"fLaC\0") + block + flac[42:])
    assert load_audio(path).equal(load_audio(written(tmp_path / "plain.flac", flac)))
    refused(written(path, path.read_bytes() + flac), "another FLAC begins at byte")


@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE", "AVERAGE"])
@pytest.mark.parametrize("declared", ["frames", "frames and bytes", "one more", "bytes without the first frame"])
def test_an_mp3_that_declares_its_length_otherwise_is_whole(tmp_path, mode, declared):
    data = bytearray(encoded("MP3", 2.0, 24_000, bitrate_mode=mode, compression_level=0.5))
    plain = written(tmp_path / "plain.mp3", bytes(data))
    place = max(data.find(b"Xing"), data.find(b"Info"))
    flags, frames, sound = struct.unpack_from(">III", data, place + 4)
    assert flags & 3 == 3
    if declared == "frames":  # the place of the bytes is the table's then
        data[place + 4 : place + 8] = struct.pack(">I", 1)
    elif declared == "one more":
        data[place + 8 : place + 12] = struct.pack(">I", frames + 1)
    elif declared == "bytes without the first frame":
        data[place + 12 : place + 16] = struct.pack(">I", sound - containers.mp3_frame(data[:4]).size)
    path = written(tmp_path / "a.mp3", bytes(data) + ID3V1)
    if declared == "one more":
        assert audio_info(path).frames >= audio_info(plain).frames
    else:
        assert abs(audio_info(path).seconds - 2.0) < 0.1
        load_audio(path)


def test_vbri_and_empty_xing_headers_do_not_change_what_is_read(tmp_path):
    mp3 = encoded("MP3", 2.0, 24_000)
    plain = bare(mp3)
    first = bytearray(mp3[: containers.mp3_frame(mp3[:4]).size])
    first[4:] = bytes(len(first) - 4)
    frames = audio_info(written(tmp_path / "plain.mp3", plain)).frames
    vbri = bytes(first[:36]) + b"VBRI" + struct.pack(">HHHII", 1, 0, 75, len(mp3), frames // 576)
    path = written(tmp_path / "vbri.mp3", vbri.ljust(len(first), b"\0") + plain)
    assert audio_info(path).frames == frames + 576 == len(load_audio(path)) * 3 // 2
    empty = bytes(first[:13]) + b"Xing" + bytes(4)  # mono of MPEG 2: behind 4 + 9 bytes
    path = written(tmp_path / "empty.mp3", empty.ljust(len(first), b"\0") + plain)
    assert audio_info(path).frames == frames == len(load_audio(path)) * 3 // 2


def test_a_damaged_frame_in_the_middle_of_an_mp3_is_no_second_file(tmp_path):
    data = bytearray(bare(encoded("MP3", 2.0)))
    size = containers.mp3_frame(data[:4]).size
    data[10 * size : 10 * size + 2] = b"xx"
    refused(written(tmp_path / "a.mp3", bytes(data)), "damaged MP3", f"byte {10 * size}")
    refused(written(tmp_path / "b.mp3", bytes(data[: 10 * size]) + b"x" * 5000), "damaged MP3")


# What is no sound ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_git_lfs_pointer_is_named_as_such(tmp_path, end):
    lines = ("version https://git-lfs.github.com/spec/v1", "oid sha256:" + "c6f9" * 16, "size 72862", "")
    for name in ("a.wav", "a.flac", "a.mp3"):
        message = refused(written(tmp_path / name, end.join(lines).encode()), "git-lfs pointer", "git lfs pull")
        assert "ffmpeg" not in message


def test_a_page_of_the_web_is_named_as_such(tmp_path):
    refused(written(tmp_path / "a.wav", b"\xef\xbb\xbf\n<!DOCTYPE html><html>404"), "page of the web", "download")


# Excerpts ------------------------------------------------------------------------------------------------


def swelling(seconds, rate, channels):
    """A tone with noise that comes and goes: an MP3 of variable bit rate borrows bits from frame to frame."""
    t = np.arange(int(seconds * rate)) / rate
    tone = 0.25 * np.sin(2 * np.pi * (200 + 50 * np.sin(2 * np.pi * 0.3 * t)) * t)
    hiss = 0.05 * np.random.default_rng(5).standard_normal((len(t), channels))
    return (tone[:, None] + hiss * (1 + np.sin(2 * np.pi * 0.7 * t))[:, None]).astype(np.float32)


@pytest.fixture
def at_the_files_rate(monkeypatch):
    """Without resampling, which sees neighbours that an excerpt has not."""
    monkeypatch.setattr(audio, "_at_16_khz", lambda blocks, *_: torch.cat([block.clone() for block in blocks]))


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE"])
@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000])
def test_excerpts_and_windows_of_an_mp3_are_those_of_the_whole(tmp_path, at_the_files_rate, rate, mode, channels):
    path = tmp_path / "a.mp3"
    sound = swelling(12, rate, channels)
    soundfile.write(path, sound, rate, format="MP3", bitrate_mode=mode, compression_level=0.9)
    whole = torch.from_numpy(soundfile.read(path, dtype="float32", always_2d=True)[0]).mean(1)
    assert (load_audio(path) - whole).abs().max() < 1e-5, "which is decoded block by block"
    for start, end in [(0.3, 1.0), (5.0, 5.5), (7.77, 9.0), (11.5, 12.0)]:
        part = whole[round(start * rate) : round(end * rate)]
        assert (load_audio(path, start=start, end=end) - part).abs().max() < 1e-5
    for begin, _, window in load_windows(path, window=2.0, hop=0.7, start=1.0):
        first = round(begin * rate)
        assert (window - whole[first : first + len(window)]).abs().max() < 1e-5


@pytest.mark.parametrize("seconds", [3, 12])
@pytest.mark.parametrize(("format", "rate"), [("OGG", 8_000), ("OGG", 44_100), ("FLAC", 44_100), ("WAV", 22_050)])
def test_excerpts_up_to_the_end_are_those_of_the_whole(tmp_path, at_the_files_rate, format, rate, seconds):
    path = written(tmp_path / "a", encoded(format, seconds, rate))
    whole = load_audio(path)
    for start in [*np.linspace(0.01, seconds - 0.1, 12), *np.linspace(seconds - 1.0, seconds - 0.05, 12)]:
        first = round(start * rate)
        excerpt = load_audio(path, start=start, end=min(start + 0.5, seconds))
        assert (excerpt - whole[first : first + len(excerpt)]).abs().max() < 1e-6


def test_windows_that_overlap_are_decoded_once(tmp_path, monkeypatch):
    path = written(tmp_path / "a.flac", encoded("FLAC", 6.0, 22_050, 2))
    places = []
    decoded = audio._decoded
    monkeypatch.setattr(audio, "_decoded", lambda sound, into: places.append(sound.tell()) or decoded(sound, into))
    windows = list(load_windows(path, window=2.0, hop=0.5, start=1.0))
    assert [begin for begin, *_ in windows] == [1.0, 1.5, 2.0, 2.5, 3.0, 3.5]
    assert all(a < b for a, b in pairwise(places[1:])), "behind the first frame, which tells whether one may seek"
    for begin, end, waveform in windows:
        assert waveform.equal(load_audio(path, start=begin, end=end))


def test_an_excerpt_late_in_a_long_mp3_decodes_seconds_alone(tmp_path, monkeypatch):
    path = written(tmp_path / "a.mp3", encoded("MP3", 120.0))
    count = 0
    decoded = audio._decoded

    def counted(sound, into):
        nonlocal count
        count += len(into)
        return decoded(sound, into)

    monkeypatch.setattr(audio, "_decoded", counted)
    load_audio(path, start=118, end=119)
    assert count < 4 * SAMPLE_RATE
    assert containers.mp3_lead(24_000) == 258 * 576, "of which a frame may hold a single byte of sound"
    assert containers.mp3_lead(48_000) == 12 * 1152


@pytest.mark.parametrize("format", ["WAV", "FLAC", "OGG", "MP3"])
def test_sound_is_known_by_its_first_bytes_whatever_it_is_called(tmp_path, format):
    assert containers.begins_as_sound(written(tmp_path / "notes.txt", encoded(format)))


def test_what_is_no_sound_does_not_begin_as_sound(tmp_path):
    for number, data in enumerate((b"", b"\xff", b"\xff\xfe a text", b"RIFF    AVI ", b"file,emotion\n")):
        assert not containers.begins_as_sound(written(tmp_path / str(number), data))
    assert not containers.begins_as_sound(tmp_path) and not containers.begins_as_sound(tmp_path / "nothing")
    (tmp_path / "broken").symlink_to(tmp_path / "nothing")
    assert containers.begins_as_sound(tmp_path / "broken"), "so that its error is shown"

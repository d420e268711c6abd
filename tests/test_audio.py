"""Sound in: what is read exactly, what is refused and how (FAULTS.md E1, E2, E6-E9, E11, E12, E14)."""

import json
import math
import os
import random
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from ser import audio, containers
from ser.audio import SAMPLE_RATE, as_waveform, audio_info, load_audio, normalise, resample, resampled_length
from ser.errors import AudioError, SerError

ROOT = Path(__file__).resolve().parents[1]
CORPORA = ROOT.parent / "shared" / "corpora"
needs_corpora = pytest.mark.skipif(not CORPORA.is_dir(), reason="the shared recordings are not here")


def noise(seconds=0.5, rate=SAMPLE_RATE, channels=1, seed=0):
    """(frames, channels) float32 of coloured noise within full scale, the like of which codecs keep."""
    white = np.random.default_rng(seed).standard_normal((int(seconds * rate) + 7, channels))
    return 0.1 * sum(white[i : len(white) - 7 + i] for i in range(8)).astype(np.float32)


def write(path, samples, rate=SAMPLE_RATE, subtype=None, format=None):
    soundfile.write(path, samples, rate, subtype=subtype, format=format)
    return path


def wav_header(data_bytes, rate=SAMPLE_RATE, channels=1, bits=16, coding=1, riff_size=None):
    align = channels * bits // 8
    fmt = struct.pack("<HHIIHH", coding, channels, rate, min(rate * align, 0xFFFFFFFF), align, bits)
    riff_size = min(36 + data_bytes, 0xFFFFFFFF) if riff_size is None else riff_size
    return (
        struct.pack("<4sI4s4sI", b"RIFF", riff_size, b"WAVE", b"fmt ", 16)
        + fmt
        + struct.pack("<4sI", b"data", data_bytes)
    )


def refused(path, *words, call=load_audio, **excerpt):
    """The message of the error, which names the file and holds each of the words."""
    with pytest.raises(AudioError) as caught:
        call(path, **excerpt)
    message = str(caught.value)
    for word in (str(path), *words):
        assert word in message
    return message


def bare_mp3(path, seconds=3.0, rate=24_000, mode="CONSTANT"):
    """An MP3 as streaming encoders write it, without the Xing or Info frame that declares its length."""
    with soundfile.SoundFile(
        path, "w", rate, 1, "MPEG_LAYER_III", format="MP3", bitrate_mode=mode, compression_level=0.5
    ) as file:
        file.write(noise(seconds, rate))
    data = path.read_bytes()
    path.write_bytes(data[containers.mp3_frame(data[:4])[0] :])
    return path


def in_a_child(script, *arguments, env=None, timeout=600):
    """Run a script in its own interpreter; its last line of output, parsed as JSON."""
    result = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


# What is read -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "format", "subtype"),
    [
        ("a.wav", "WAV", "PCM_16"),
        ("a.wav", "WAV", "FLOAT"),
        ("a.wav", "WAVEX", "PCM_24"),
        ("a.wav", "RF64", "PCM_16"),
    ]
    + [("a.wav", "WAV", s) for s in ("PCM_U8", "PCM_32", "DOUBLE", "ULAW", "ALAW")]
    + [("a.flac", "FLAC", "PCM_16"), ("a.ogg", "OGG", "VORBIS"), ("a.mp3", "MP3", "MPEG_LAYER_III")],
)
def test_every_allowed_format_loads_at_16_khz_bit_for_bit(tmp_path, name, format, subtype):
    path = write(tmp_path / name, noise(2), subtype=subtype, format=format)
    info = audio_info(path)
    waveform = load_audio(path)
    assert (info.format, info.subtype, info.sample_rate, info.channels) == (format, subtype, 16_000, 1)
    assert info.frames == info.num_samples == 32_000
    assert info.seconds == 2.0
    assert info.path == path
    assert waveform.dtype == torch.float32
    assert waveform.shape == (32_000,)
    expected = torch.from_numpy(soundfile.read(path, dtype="float32")[0])
    tolerance = 1e-6 if format == "MP3" else 0  # its decoder rounds differently from block to block
    assert (waveform - expected).abs().max() <= tolerance


@pytest.mark.parametrize("frames", [1, 2, 399, 400, 401, 719, 720])
@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100, 48_000])
def test_short_recordings_load_and_their_length_is_known_beforehand(tmp_path, frames, rate):
    path = write(tmp_path / "a.wav", noise(1, rate)[:frames], rate)
    waveform = load_audio(path)
    assert waveform.shape == (audio_info(path).num_samples,) == (math.ceil(frames * 16_000 / rate),)
    assert waveform.isfinite().all()


def test_a_path_may_be_a_string_relative_or_a_link_to_a_file(tmp_path, monkeypatch):
    write(tmp_path / "a.wav", noise())
    (tmp_path / "link.wav").symlink_to("a.wav")
    (tmp_path / "link2.wav").symlink_to("link.wav")
    monkeypatch.chdir(tmp_path)
    assert load_audio("a.wav").equal(load_audio(tmp_path / "link2.wav"))


def test_the_extension_does_not_matter(tmp_path):
    assert load_audio(write(tmp_path / "a.raw", noise(), format="FLAC")).shape == (8_000,)
    assert load_audio(write(tmp_path / "noextension", noise(), format="WAV")).shape == (8_000,)


def test_wav_chunks_before_and_after_the_sound_are_passed_over(tmp_path):
    data = write(tmp_path / "plain.wav", noise()).read_bytes()
    extra = struct.pack("<4sI", b"LIST", 5) + b"abcde\0"  # odd, so padded
    (tmp_path / "a.wav").write_bytes(data[:12] + extra + data[12:] + extra)
    assert load_audio(tmp_path / "a.wav").equal(load_audio(tmp_path / "plain.wav"))


def test_an_mp3_may_begin_with_a_tag(tmp_path):
    data = write(tmp_path / "plain.mp3", noise(2)).read_bytes()
    (tmp_path / "a.mp3").write_bytes(b"ID3\x04\0\0\0\0\x01\x00" + bytes(128) + data)
    assert load_audio(tmp_path / "a.mp3").equal(load_audio(tmp_path / "plain.mp3"))


@pytest.mark.parametrize("rate", [16_000, 24_000, 44_100])
def test_an_mp3_without_a_declared_length_is_counted_frame_by_frame(tmp_path, rate):
    path = bare_mp3(tmp_path / "a.mp3", rate=rate)
    with soundfile.SoundFile(path) as file:
        decoded = len(file.read(out=np.empty(10 * rate)))
    assert audio_info(path).frames == decoded
    assert load_audio(path).shape == (resampled_length(decoded, rate),)


@pytest.mark.parametrize("channels", [2, 8, 32])
def test_channels_are_averaged(tmp_path, channels):
    samples = noise(3, 44_100, channels).clip(-1, 1)
    path = write(tmp_path / "a.wav", samples, 44_100, subtype="FLOAT")
    expected = resample(torch.from_numpy(samples.astype(np.float64).mean(axis=1)), 44_100)
    assert (load_audio(path) - expected).abs().max() < 1e-6


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg", "a.mp3"])
def test_an_excerpt_is_that_part_of_the_whole(tmp_path, name):
    path = write(tmp_path / name, noise(20))
    whole = load_audio(path)
    for start, end in [(0.0, 0.5), (1.25, 7.5), (19.0, None), (None, 3.0), (19.9, 20.0), (3.0, 3.0001)]:
        first, last = round(16_000 * (start or 0)), round(16_000 * (end or 20))
        excerpt = load_audio(path, start=start, end=end)
        info = audio_info(path, start=start, end=end)
        assert info.frames == info.num_samples == len(excerpt) == last - first
        assert info.seconds == (last - first) / 16_000
        assert (excerpt - whole[first:last]).abs().max() < 1e-6


def test_an_end_rounded_past_the_recording_means_its_end_and_no_more(tmp_path):
    path = write(tmp_path / "a.wav", noise(1.0))
    assert load_audio(path, start=0.5, end=1.005).shape == (8_000,)
    assert "1.000 s" in refused(path, "end=1.5", "past the recording's end", end=1.5)


@pytest.mark.parametrize(
    "excerpt",
    [
        *({"start": 0.5, "end": 0.5}, {"start": 0.6, "end": 0.5}, {"start": -0.1}, {"start": 1.0}, {"end": 0.0}),
        *({"start": float("nan")}, {"end": float("nan")}, {"end": float("inf")}, {"start": 0.1, "end": 0.10001}),
    ],
)
def test_an_impossible_excerpt_is_refused(tmp_path, excerpt):
    path = write(tmp_path / "a.wav", noise(1.0))
    refused(path, "start", **excerpt) if "start" in excerpt else refused(path, "end", **excerpt)


@needs_corpora
def test_real_recordings_load_and_16_khz_ones_unchanged():
    paths = sorted(CORPORA.glob("*/wav/*.wav"))[::25] + sorted(CORPORA.glob("**/*.flac"))[::25]
    paths += sorted(CORPORA.glob("thorsten*/wav/*.wav"))
    rates = set()
    for path in paths:
        info, waveform = audio_info(path), load_audio(path)
        rates.add(info.sample_rate)
        assert waveform.shape == (info.num_samples,)
        assert waveform.isfinite().all()
        assert 0.001 < waveform.std() < 0.5
        if info.sample_rate == SAMPLE_RATE:
            assert waveform.numpy().tobytes() == soundfile.read(path, dtype="float32")[0].tobytes()
    assert rates == {16_000, 22_050}


# Paths (E1) -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [audio_info, load_audio])
def test_what_is_not_a_regular_file_is_named_at_once(tmp_path, monkeypatch, call):
    start = time.process_time()
    refused(tmp_path / "missing.wav", "no such file", call=call)
    refused(tmp_path, "a folder", call=call)
    os.mkfifo(tmp_path / "pipe.wav")
    refused(tmp_path / "pipe.wav", "a named pipe", call=call)
    (tmp_path / "link.wav").symlink_to("pipe.wav")
    refused(tmp_path / "link.wav", "a named pipe", call=call)
    refused(Path("/dev/zero"), "a device", call=call)
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.wav")
        refused(Path("socket.wav"), "a socket", call=call)
    (tmp_path / "broken.wav").symlink_to("gone.wav")
    refused(tmp_path / "broken.wav", "broken link to gone.wav", call=call)
    (tmp_path / "circle.wav").symlink_to("circle.wav")
    refused(tmp_path / "circle.wav", "cannot be reached", call=call)
    (tmp_path / "empty.wav").touch()
    refused(tmp_path / "empty.wav", "0 bytes", call=call)
    refused(tmp_path / ("x" * 300), "cannot be reached", call=call)
    refused("a\0b", "cannot be reached", call=call)
    refused("relative/missing.wav", str(tmp_path / "relative"), call=call)
    assert time.process_time() - start < 5


def test_a_file_without_permission_is_named(tmp_path):
    write(tmp_path / "a.wav", noise()).chmod(0)
    tmp_path.chmod(0o755)
    script = """
import json, os, sys
from ser.audio import load_audio
os.chdir(sys.argv[1])
if os.geteuid() == 0: os.seteuid(65534)  # root may read anything
try: load_audio("a.wav"); message = "no error"
except Exception as error: message = f"{type(error).__name__} {error}"
print(json.dumps(message))
"""
    assert in_a_child(script, tmp_path) == "AudioError a.wav: cannot be read: Permission denied"


# Cut files (E2) -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0.99, 0.9, 0.5, 0.1])
@pytest.mark.parametrize("format", ["WAV", "WAVEX", "RF64"])
def test_a_truncated_wav_is_named_from_its_header(tmp_path, format, kept):
    whole = write(tmp_path / "whole.wav", noise(2), format=format).read_bytes()
    path = tmp_path / "cut.wav"
    path.write_bytes(whole[: int(kept * len(whole))])
    assert soundfile.info(path).frames < 32_000  # libsndfile says nothing, which is why the check is ours
    refused(path, "truncated", "64000 bytes", call=audio_info)
    refused(path, "truncated", "64000 bytes")


@pytest.mark.parametrize("bytes_kept", [1, 11, 12, 20, 36, 40])
def test_a_wav_cut_inside_its_header_is_named(tmp_path, bytes_kept):
    path = tmp_path / "cut.wav"
    path.write_bytes(write(tmp_path / "whole.wav", noise()).read_bytes()[:bytes_kept])
    refused(path, call=audio_info)


@pytest.mark.parametrize("size", [0, 0xFFFFFFFF, 0x7FFFF000])
def test_a_wav_written_into_a_pipe_is_accepted(tmp_path, size):
    path = tmp_path / "stream.wav"
    path.write_bytes(wav_header(size, riff_size=size) + bytes(range(250)) * 64)
    assert audio_info(path).frames == 8_000
    whole = tmp_path / "whole.wav"
    whole.write_bytes(wav_header(16_000) + bytes(range(250)) * 64)
    assert load_audio(path).equal(load_audio(whole))
    assert load_audio(path, start=0.1, end=0.3).equal(load_audio(whole, start=0.1, end=0.3))


@pytest.mark.parametrize("kept", [0.99, 0.9, 0.5, 0.1])
@pytest.mark.parametrize("name", ["a.flac", "a.ogg", "a.mp3"])
def test_a_truncated_flac_ogg_or_mp3_is_named(tmp_path, name, kept):
    whole = write(tmp_path / name, noise(5)).read_bytes()
    path = tmp_path / f"cut_{name}"
    path.write_bytes(whole[: int(kept * len(whole))])
    refused(path, "truncated")
    if name == "a.ogg":
        refused(path, "truncated", call=audio_info)


@pytest.mark.parametrize(
    ("name", "format", "subtype"),
    [
        ("a.wav", "WAV", "PCM_16"),
        ("a.wav", "RF64", "FLOAT"),
        ("a.flac", "FLAC", "PCM_16"),
        ("a.ogg", "OGG", "VORBIS"),
        ("a.mp3", "MP3", "MPEG_LAYER_III"),
    ],
)
def test_every_cut_over_1_percent_is_found_wherever_it_is(tmp_path, capfd, name, format, subtype):
    whole = write(tmp_path / name, noise(1), subtype=subtype, format=format).read_bytes()
    path = tmp_path / f"cut_{name}"
    chance = random.Random(2)
    places = {
        *range(1, 60),
        *(chance.randrange(60, int(0.99 * len(whole))) for _ in range(60)),
        int(0.99 * len(whole)),
    }
    for kept in places:
        path.write_bytes(whole[:kept])
        refused(path, *(["truncated"] if kept > 0.1 * len(whole) else []))  # else it may end inside its header
        if format != "FLAC":  # which declares frames, not bytes: only decoding tells
            refused(path, call=audio_info)
    assert not capfd.readouterr().err, "libmpg123, which would warn, never sees a cut file"


def test_where_a_container_declares_no_length_an_end_in_the_manifest_finds_the_cut(tmp_path):
    """A WAV that was written into a pipe; an MP3 without a Xing header that was cut between two frames."""
    stream, constant = tmp_path / "stream.wav", bare_mp3(tmp_path / "constant.mp3")
    stream.write_bytes(wav_header(0xFFFFFFFF, riff_size=0xFFFFFFFF) + bytes(32_000))
    data = constant.read_bytes()
    frame = containers.mp3_frame(data[:4])[0]
    constant.write_bytes(data[: 20 * frame])
    for path, seconds in ((stream, 1.0), (constant, 20 * 576 / 24_000)):
        assert audio_info(path).seconds == seconds  # which nothing in the file contradicts
        refused(path, "past the recording's end", end=seconds + 0.05)


def test_an_ogg_cut_between_two_pages_is_named(tmp_path):
    whole = write(tmp_path / "a.ogg", noise(5)).read_bytes()
    path = tmp_path / "cut.ogg"
    path.write_bytes(whole[: whole.rindex(b"OggS")])
    assert 0 < soundfile.info(path).frames < 80_000  # to libsndfile it is a whole, shorter recording
    refused(path, "truncated", call=audio_info)


def test_an_excerpt_before_the_cut_of_a_flac_still_loads(tmp_path):
    whole = write(tmp_path / "a.flac", noise(5)).read_bytes()
    path = tmp_path / "cut.flac"
    path.write_bytes(whole[: len(whole) // 2])
    assert load_audio(path, end=1.0).equal(load_audio(tmp_path / "a.flac", end=1.0))


def test_an_mp3_without_a_declared_length_is_not_shortened_in_silence(tmp_path):
    constant = bare_mp3(tmp_path / "constant.mp3")
    cut = tmp_path / "cut.mp3"
    cut.write_bytes(constant.read_bytes()[:-50])
    refused(cut, "truncated", call=audio_info)
    # libsndfile takes the first frame's bit rate for the whole: here it would return half the sound.
    variable = bare_mp3(tmp_path / "variable.mp3", mode="VARIABLE")
    assert soundfile.info(variable).frames < 0.7 * 3 * 24_000
    refused(variable, "variable bit rate", "convert", call=audio_info)


def test_a_flac_that_declares_no_length_is_refused(tmp_path):
    path = write(tmp_path / "a.flac", noise())
    data = bytearray(path.read_bytes())
    data[21] &= 0xF0  # STREAMINFO's 36-bit total
    data[22:26] = bytes(4)
    path.write_bytes(data)
    refused(path, "does not declare a length", call=audio_info)


def test_two_ogg_streams_in_one_file_are_refused(tmp_path):
    one, two = (write(tmp_path / f"{i}.ogg", noise(seed=i)).read_bytes() for i in (1, 2))
    path = tmp_path / "both.ogg"
    path.write_bytes(one + two)
    refused(path, "several OGG streams", call=audio_info)


@pytest.mark.parametrize("name", ["a.wav", "a.flac"])
def test_a_recording_without_samples_is_refused(tmp_path, name):
    refused(write(tmp_path / name, noise()[:0]), call=audio_info)


def test_an_empty_wav_with_a_chunk_behind_its_sound_is_not_taken_for_a_stream(tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(wav_header(0, riff_size=36 + 108) + struct.pack("<4sI", b"LIST", 100) + bytes(100))
    refused(path, "no samples", call=audio_info)


# Formats (E11) --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "subtype", "found"),
    [
        ("WAV", "IMA_ADPCM", "IMA ADPCM"),
        ("WAV", "MS_ADPCM", "Microsoft ADPCM"),
        ("WAV", "GSM610", "GSM 6.10"),
        ("WAV", "G721_32", "G.721 ADPCM"),
        ("CAF", "PCM_16", "CAF"),
        ("CAF", "ALAC_16", "CAF"),
        ("AIFF", "PCM_16", "AIFF"),
        ("AU", "PCM_16", "AU"),
        ("NIST", "PCM_16", "NIST SPHERE"),
        ("W64", "PCM_16", "W64"),
        ("SVX", "PCM_16", "AIFF or another IFF"),
        ("VOC", "PCM_16", "unknown format"),
        ("MAT5", "PCM_16", "unknown format"),
        ("RAW", "PCM_16", "unknown format"),
        ("OGG", "OPUS", "Opus"),
    ],
)
def test_other_formats_are_refused_with_advice(tmp_path, format, subtype, found):
    path = write(tmp_path / "a.wav", noise(1), subtype=subtype, format=format)
    for call in (audio_info, load_audio):
        refused(path, found, "FLAC, OGG/Vorbis and MP3", "ffmpeg -i", call=call)


def test_a_refused_format_never_reaches_libsndfile(tmp_path, monkeypatch):
    paths = [write(tmp_path / "a.wav", noise(1), subtype="IMA_ADPCM"), write(tmp_path / "a.caf", noise(1))]
    hidden = tmp_path / "hidden.mp3"  # libsndfile looks behind an ID3 tag
    hidden.write_bytes(b"ID3\x04\0\0\0\0\0\x0a" + bytes(10) + write(tmp_path / "a.aiff", noise(1)).read_bytes())
    second = tmp_path / "second.wav"  # PCM with the extensible coding that says ADPCM
    header = struct.pack("<HHIIHHHHIH14s", 0xFFFE, 1, 16_000, 32_000, 2, 16, 22, 16, 4, 0x11, b"")
    second.write_bytes(
        struct.pack("<4sI4s4sI", b"RIFF", 160, b"WAVE", b"fmt ", 40)
        + header
        + struct.pack("<4sI", b"data", 100)
        + bytes(100)
    )

    def opened(*arguments, **options):
        raise AssertionError("libsndfile saw the file")

    monkeypatch.setattr(soundfile, "SoundFile", opened)
    for path in [*paths, hidden, second]:
        refused(path, "ser reads WAV")
    with pytest.raises(AssertionError, match="saw the file"):
        load_audio(write_without_libsndfile(tmp_path / "good.wav"))


def write_without_libsndfile(path):
    path.write_bytes(wav_header(100) + bytes(100))
    return path


def test_text_and_damaged_headers_are_refused(tmp_path):
    path = tmp_path / "a.wav"
    path.write_text("not sound at all, just words")
    refused(path, "unknown format", "not sound at", call=audio_info)
    path.write_bytes(b"fLaC" + bytes(200))
    refused(path, "libsndfile says", call=audio_info)
    with path.open("wb") as file:
        file.write(b"RIFF\xff\xff\xff\xffWAVE")
        file.truncate(1 << 31)  # 268 million chunks of no length
    refused(path, "no data chunk", call=audio_info)
    path.write_bytes(wav_header(100)[:12] + struct.pack("<4sI", b"data", 100) + bytes(100))
    refused(path, "before its format", call=audio_info)
    path.write_bytes(
        wav_header(120, channels=2)[:32] + struct.pack("<HH", 3, 16) + wav_header(120)[36:] + bytes(120)
    )
    refused(path, call=audio_info)  # 2 channels of 16 bit are not 3 bytes a frame


# Rates, channels, limits (E7, E8, E12) ------------------------------------------------------------------


@pytest.mark.parametrize("rate", [1, 3_999, 192_001, 2_147_483_647])
def test_rates_outside_4_to_192_khz_are_refused(tmp_path, rate):
    path = tmp_path / "a.wav"
    path.write_bytes(wav_header(20, rate) + bytes(20))
    refused(path, f"{rate} Hz", "4000", "192000", call=audio_info)
    with pytest.raises(AudioError, match="4000"):
        as_waveform(np.zeros(10), rate)
    with pytest.raises(AudioError, match="4000"):
        resample(torch.zeros(10), rate)


@pytest.mark.parametrize("rate", [4_000, 4_001, 15_999, 16_001, 191_999, 192_000])
def test_the_ends_of_the_range_of_rates_load(tmp_path, rate):
    path = write(tmp_path / "a.wav", noise(0.2, rate), rate)
    assert load_audio(path).shape == (audio_info(path).num_samples,)
    assert abs(audio_info(path).num_samples - 3_200) <= 2


def test_more_than_32_channels_are_refused(tmp_path):
    for channels in (33, 1024):
        path = tmp_path / f"{channels}.wav"
        path.write_bytes(wav_header(20 * channels, channels=channels) + bytes(20 * channels))
        refused(path, f"{channels} channels", "at most 32", call=audio_info)


def test_a_recording_over_the_limit_is_refused_from_its_header(tmp_path):
    hours = tmp_path / "hours.wav"  # sparse: three hours without their bytes
    with hours.open("wb") as file:
        file.write(wav_header(3 * 3600 * 32_000))
        file.truncate(44 + 3 * 3600 * 32_000)
    huge = tmp_path / "huge.wav"
    with huge.open("wb") as file:
        file.write(wav_header(0xFFFFFFF0))
        file.truncate(44 + 0xFFFFFFF0)
    claimed = tmp_path / "claimed.wav"
    claimed.write_bytes(wav_header(0xF0000000) + bytes(1000))
    start = time.process_time()
    for call in (audio_info, load_audio):
        refused(hours, "10800.0 s", "at most 3600 s", "max_seconds", call=call)
        refused(huge, "at most 3600 s", call=call)
        refused(claimed, "truncated", call=call)
    assert time.process_time() - start < 1
    assert audio_info(hours, max_seconds=20_000).seconds == 10_800
    # The limit is on what is loaded: a part of a long recording is welcome.
    assert load_audio(hours, start=10_799).shape == (16_000,)


def test_max_seconds_lowers_the_limit(tmp_path):
    path = write(tmp_path / "a.wav", noise(1.0))
    assert load_audio(path, max_seconds=1.0).shape == (16_000,)
    refused(path, "1.0 s", "at most 0.9 s", max_seconds=0.9)
    assert load_audio(path, start=0.5, max_seconds=0.9).shape == (8_000,)
    for limit in (0, -1, float("nan")):
        refused(path, "max_seconds", max_seconds=limit)


MEMORY = """
import json, re, sys
import torch
torch.set_num_threads(1)
from ser.audio import load_audio, resample

def peak():
    with open("/proc/self/status") as status:
        return int(re.search(r"VmHWM:\\s+(\\d+)", status.read())[1]) / 1024

def growth(work):
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak becomes what is held now
    before = peak()
    result = work()
    return peak() - before - result.nbytes / 2**20

resample(torch.randn(16_001), 44_100)  # load torchaudio, start oneDNN
figures = {path: growth(lambda: load_audio(path)) for path in sys.argv[1:]}
for rate, seconds in [(44_100, 300), (8_000, 200), (44_101, 30)]:
    waveform = torch.randn(rate * seconds)
    figures[f"{rate} Hz"] = growth(lambda: resample(waveform, rate))

def utterances():
    for i in range(40):
        last = resample(torch.randn(3 * 22_050 + 4 * 441 * i), 22_050)
    return last

figures["40 lengths"] = growth(utterances)
print(json.dumps(figures))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measured through Linux's /proc")
def test_memory_stays_within_50_mb_of_the_result(tmp_path):
    """Files of many channels and rates, long signals, and many utterances of different lengths."""
    two = write(tmp_path / "2.wav", np.tile(noise(6, 44_100, 2), (20, 1)), 44_100)  # two minutes
    eight = write(tmp_path / "8.wav", np.tile(noise(6, 48_000, 8), (10, 1)), 48_000)  # 46 MB
    wide = write(tmp_path / "32.flac.wav", np.tile(noise(1, 192_000, 32), (5, 1)), 192_000)  # 61 MB
    figures = in_a_child(MEMORY, two, eight, wide)
    assert len(figures) == 7
    assert {name: round(mb) for name, mb in figures.items() if mb > 50} == {}


# Resampling (E6) --------------------------------------------------------------------------------------


def tone(frequency, rate, seconds=2.0):
    return torch.sin(2 * math.pi * frequency * torch.arange(int(seconds * rate), dtype=torch.float64) / rate)


def decibels(power_ratio):
    return 10 * math.log10(power_ratio + 1e-30)


INNER = slice(2_000, -2_000)  # away from the ends, where a tone begins and stops at once
RATES = [8_000, 11_025, 22_050, 24_000, 32_000, 44_100, 48_000, 96_000, 192_000, 44_101, 22_255, 16_001]


@pytest.mark.parametrize("rate", RATES)
def test_a_1_khz_tone_keeps_90_db_above_noise(rate):
    new, old = audio._ratio(rate)  # at 44,101 Hz the ratio, and so the tone, is 4e-6 off
    resampled = resample(tone(1_000, rate).float(), rate).double()
    ideal = torch.sin(2 * math.pi * 1_000 * torch.arange(len(resampled), dtype=torch.float64) * old / (new * rate))
    error = (resampled - ideal)[INNER]
    assert decibels(ideal[INNER].square().mean() / error.square().mean()) >= 90


@pytest.mark.parametrize("rate", [rate for rate in RATES if rate > 16_000])
def test_7_khz_passes_and_8_2_khz_and_above_does_not_alias(rate):
    passed = resample(tone(7_000, rate).float(), rate).double()[INNER]
    assert abs(decibels(2 * passed.square().mean())) < 0.1
    for frequency in (8_200, 9_000, 10_000, rate / 2 - 500, 0.31 * rate):
        if 8_200 <= frequency < rate / 2:
            alias = resample(tone(frequency, rate).float(), rate).double()[INNER]
            assert decibels(2 * alias.square().mean()) <= -80


@pytest.mark.parametrize("rate", [8_000, 11_025])
def test_upsampling_leaves_no_images(rate):
    for share in (0.125, 0.25, 0.4, 0.45):
        frequency = share * rate
        resampled = resample(tone(frequency, rate).float(), rate).double()[INNER]
        phase = 2 * math.pi * frequency / 16_000 * torch.arange(len(resampled), dtype=torch.float64)
        basis = torch.stack([phase.sin(), phase.cos()], dim=1)
        fitted = basis @ torch.linalg.lstsq(basis, resampled[:, None]).solution[:, 0]
        assert abs(decibels(2 * fitted.square().mean())) < 0.1
        assert decibels(2 * (resampled - fitted).square().mean()) <= -80


@pytest.mark.parametrize(
    ("rate", "frames"), [(44_100, 1_000_003), (8_000, 700_001), (192_000, 600_000), (22_050, 441)]
)
def test_resampling_in_windows_equals_resampling_at_once(rate, frames):
    from torchaudio.functional import resample as whole

    waveform = torch.randn(frames, generator=torch.Generator().manual_seed(0))
    new, old = audio._ratio(rate)
    resampled = resample(waveform, rate)
    assert resampled.shape == (resampled_length(frames, rate),) == (math.ceil(frames * new / old),)
    # In float64, as our kernel is computed: in float32 torchaudio's own kernel is 4e-5 off.
    expected = whole(waveform.double(), old, new, **audio._KAISER_BEST).float()
    torch.testing.assert_close(resampled, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rate", [8_000, 44_100, 44_101])
def test_every_length_around_a_window_is_exact(rate):
    for frames in [
        *range(1, 40),
        *range(audio._BLOCK_FRAMES - 2, audio._BLOCK_FRAMES + 3),
        2 * audio._BLOCK_FRAMES + 1,
    ]:
        resampled = resample(torch.ones(frames), rate)
        assert len(resampled) == resampled_length(frames, rate)
        inner = resampled[300:-300]
        assert len(inner) == 0 or (inner - 1).abs().max() < 1e-4


def test_lengths_of_hours_are_exact_whole_numbers():
    for hours in (1, 24, 10_000):
        for rate in (8_000, 44_100, 48_000, 192_000):
            assert resampled_length(hours * 3600 * rate, rate) == hours * 3600 * 16_000
            assert resampled_length(hours * 3600 * rate + 1, rate) > hours * 3600 * 16_000
    assert resampled_length(0, 44_100) == 0


def test_awkward_rates_get_a_small_kernel_and_a_ratio_within_1e_4():
    for rate in {44_101, 22_255, 11_127, 5_512, 4_001, *range(4_000, 192_001, 997)}:
        new, old = audio._ratio(rate)
        assert math.gcd(new, old) == 1
        assert 4 * audio._kernel_size(new, old) <= 10_000_000
        assert abs(new * rate / (16_000 * old) - 1) <= 1e-4
    for rate in (15_995, 16_004, 31_992):  # the worst: no small ratio lies within 1e-4
        new, old = audio._ratio(rate)
        assert 4 * audio._kernel_size(new, old) <= 10_000_000
        assert abs(new * rate / (16_000 * old) - 1) <= 3.2e-4
    for rate in (8_000, 11_025, 12_000, 22_050, 24_000, 32_000, 44_100, 48_000, 88_200, 96_000, 176_400, 192_000):
        new, old = audio._ratio(rate)
        assert new * rate == 16_000 * old  # rates in use are exact


def test_16_khz_is_returned_as_it_is():
    waveform = torch.randn(1_000)
    assert resample(waveform, 16_000) is waveform


def test_resample_names_a_wrong_shape():
    for waveform in (torch.zeros(2, 100), torch.zeros(0), torch.zeros(10, dtype=torch.int16)):
        with pytest.raises(AudioError, match=r"\(S,\)"):
            resample(waveform, 44_100)


# Values (E9) --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("frame", [0, 5_000, 299_999])
def test_a_sample_that_is_not_finite_is_named_with_its_place(tmp_path, value, frame):
    samples = np.zeros((300_000, 2), np.float32)
    samples[frame, 1] = value
    path = write(tmp_path / "a.wav", samples, subtype="FLOAT")
    refused(path, f"sample of {value:g} at frame {frame} ({frame / 16_000:.3f} s), channel 1", "finite")
    with pytest.raises(AudioError, match=f"frame {frame} "):
        as_waveform(samples, 16_000)
    if frame == 299_999:  # the place is the recording's, not the excerpt's
        refused(path, f"frame {frame} ", start=18.0)
        assert load_audio(path, end=18.0).shape == (288_000,)


def test_integers_stored_as_floats_are_refused_with_advice(tmp_path):
    path = write(tmp_path / "a.wav", 20_000 * noise(), subtype="FLOAT")
    refused(path, "32768", "full scale is 1")
    with pytest.raises(AudioError, match="divide integers stored as floats by 32768"):
        as_waveform(20_000 * noise(), 16_000)
    double = write(tmp_path / "b.wav", np.full(100, 1e300), subtype="DOUBLE")
    refused(double, "inf")


def test_small_overs_are_kept(tmp_path):
    samples = np.array([0.0, 1.5, -3.0, 0.25], np.float32)
    path = write(tmp_path / "a.wav", samples, subtype="FLOAT")
    assert load_audio(path).tolist() == samples.tolist()
    assert as_waveform(samples, 16_000).tolist() == samples.tolist()


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100])
@pytest.mark.parametrize("value", [0.0, 0.3, -1.0, 99.9])
def test_silence_and_constants_are_defined_and_normalise_to_zero(tmp_path, rate, value):
    path = write(tmp_path / "a.wav", np.full(rate, value, np.float32), rate, subtype="FLOAT")
    waveform = load_audio(path)
    assert (waveform[1_000:-1_000] - value).abs().max() <= 1e-4 * abs(value)
    assert normalise(waveform).isfinite().all()
    if rate == 16_000 or value == 0:
        assert normalise(waveform).eq(0).all()
    assert normalise(waveform[:1]).eq(0).all()


def test_normalise_equals_the_reference_feature_extractor():
    transformers = pytest.importorskip("transformers", reason="the oracle is not installed")
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=True)
    for scale, offset in [(1.0, 0.0), (0.01, 0.1), (1e-4, 0.0), (3e-5, 0.0)]:
        waveform = torch.from_numpy(scale * noise(2)[:, 0] + np.float32(offset))
        expected = extractor(waveform.double().numpy(), sampling_rate=16_000, return_tensors="pt").input_values[0]
        torch.testing.assert_close(normalise(waveform), expected.float(), rtol=1e-6, atol=1e-6)
    quiet = 1e-3 * noise(2)[:, 0] + np.float32(0.5)  # much offset: float32 statistics are 1e-5 off here
    exact = (quiet - quiet.mean(dtype=np.float64)) / np.sqrt(quiet.var(dtype=np.float64) + 1e-7)
    torch.testing.assert_close(
        normalise(torch.from_numpy(quiet)), torch.from_numpy(exact).float(), rtol=1e-6, atol=1e-6
    )
    result = normalise(torch.from_numpy(noise(2)[:, 0])).double()
    assert abs(result.mean()) < 1e-6
    assert abs(result.std(correction=0) - 1) < 1e-5


def test_normalise_names_a_wrong_shape():
    for waveform in (torch.zeros(2, 3), torch.zeros(0)):
        with pytest.raises(AudioError, match=r"expected \(S,\)"):
            normalise(waveform)


# Arrays ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [None, 1, 2])
@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_an_array_gives_what_its_file_gives(tmp_path, channels, rate):
    samples = noise(1, rate, channels or 1).clip(-1, 1)
    expected = load_audio(write(tmp_path / "a.wav", samples, rate, subtype="FLOAT"))
    samples = samples[:, 0] if channels is None else samples
    assert as_waveform(samples, rate).equal(expected)
    assert as_waveform(torch.from_numpy(samples), rate).equal(expected)
    assert as_waveform(samples.astype(np.float64), np.int64(rate)).equal(expected)
    assert as_waveform(np.ascontiguousarray(samples[::-1])[::-1], rate).equal(expected)
    assert as_waveform(samples.astype(">f4"), rate).equal(expected)
    assert as_waveform(torch.from_numpy(samples).requires_grad_(), rate).requires_grad is False


def test_integer_pcm_is_scaled_to_full_scale_one(tmp_path):
    small = np.array([0, 1, -1, 32_767, -32_768], np.int16)
    assert as_waveform(small, 16_000).equal(load_audio(write(tmp_path / "a.wav", small)))
    assert as_waveform(torch.from_numpy(small), 16_000)[-1] == -1
    large = small.astype(np.int32) << 16
    assert as_waveform(large, 16_000).equal(as_waveform(small, 16_000))


@pytest.mark.parametrize("rate", [16_000, 8_000])
def test_the_caller_keeps_his_array(rate):
    samples = torch.randn(1_000).clamp(-1, 1)
    before = samples.clone()
    waveform = as_waveform(samples, rate)
    waveform.zero_()
    assert samples.equal(before)
    frozen = before.numpy().copy()
    frozen.flags.writeable = False
    assert as_waveform(frozen, 16_000).equal(before)


@pytest.mark.parametrize(
    ("samples", "rate", "words"),
    [
        ([0.0, 0.1], 16_000, "numpy array or torch tensor"),
        (np.zeros(10, np.uint8), 16_000, "uint8"),
        (np.zeros(10, bool), 16_000, "bool"),
        (np.zeros(10, np.int64), 16_000, "int64"),
        (np.zeros(10, np.complex64), 16_000, "complex64"),
        (
            np.zeros(10, np.longdouble),
            16_000,
            "longdouble" if np.dtype(np.longdouble).name == "longdouble" else "float",
        ),
        (np.array(["a"]), 16_000, "<U1"),
        (torch.zeros(10, dtype=torch.uint8), 16_000, "uint8"),
        (np.zeros(0), 16_000, "S >= 1"),
        (np.zeros((0, 2)), 16_000, "S >= 1"),
        (np.zeros((2, 0)), 16_000, "S >= 1"),
        (np.float32(0), 16_000, "float32"),
        (np.zeros(()), 16_000, r"\(\)"),
        (np.zeros((2, 3, 4)), 16_000, r"\(2, 3, 4\)"),
        (np.zeros((1, 16_000)), 16_000, r"pass samples\.T"),
        (np.zeros(10), 16_000.5, "16000.5"),
        (np.zeros(10), "16000", "whole number"),
        (np.zeros(10), None, "None"),
    ],
)
def test_arrays_of_another_kind_are_refused(samples, rate, words):
    with pytest.raises(AudioError, match=words):
        as_waveform(samples, rate)


# Broken installations -----------------------------------------------------------------------------------

BROKEN = """
import json, sys
import ser, torch
from ser.audio import as_waveform, load_audio, resample
messages = []
def attempt(work):
    try: work(); messages.append("no error")
    except Exception as error: messages.append(f"{type(error).__name__} {error}")
attempt(lambda: resample(torch.zeros(100), 8_000))
attempt(lambda: load_audio(sys.argv[1]))
attempt(lambda: as_waveform(torch.zeros(100), 16_000))
sys.modules["torchaudio"] = sys.modules["soundfile"] = None  # as if it were not installed
attempt(lambda: resample(torch.zeros(100), 8_000))
attempt(lambda: load_audio(sys.argv[1]))
print(json.dumps([*messages, torch.__version__]))
"""


def test_ser_imports_without_torchaudio_and_soundfile_and_says_what_to_install(tmp_path):
    for name in ("torchaudio", "soundfile"):
        (tmp_path / name).mkdir()
        text = f"raise OSError('lib{name}.so: undefined symbol: _ZN2at')"  # as a binary for another torch
        (tmp_path / name / "__init__.py").write_text(text)
    path = write(tmp_path / "a.wav", noise())
    *messages, version = in_a_child(BROKEN, path, env={"PYTHONPATH": str(tmp_path)})
    broken_resample, broken_read, fine, missing_resample, missing_read = messages
    for message in (broken_resample, missing_resample):
        assert message.startswith("MissingLibraryError")
        assert f"torch {version}" in message
        assert "install the torchaudio build that matches this torch" in message
    assert "undefined symbol" in broken_resample
    for message in (broken_read, missing_read):
        assert message.startswith("MissingLibraryError")
        assert "pip install soundfile" in message
    assert "undefined symbol" in broken_read
    assert fine == "no error"  # 16 kHz needs neither


# Mutated files (E14) -------------------------------------------------------------------------------------


def test_mutated_files_give_an_error_or_a_valid_signal():
    """In child processes whose memory and time are limited; the long form is the same script with more files."""
    command = [sys.executable, ROOT / "tests" / "soak" / "audio.py", "--count", "500"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    figures = json.loads(done.stdout)
    assert figures["wrong"] == [] and done.returncode == 0
    assert figures["files"] == figures["accepted"] + figures["refused"] == 500
    assert figures["accepted"] > 50  # the mutations are not all gross
    assert figures["refused"] > 200
    assert figures["peak_mib"] < 1024 and figures["slowest_seconds"] < 10


DAMAGED_HEADERS = """
import json, random, sys
from pathlib import Path
sys.path.insert(0, "tests/soak")
from audio import encoded, noise, with_checksums
from ser.audio import load_audio, load_windows
from ser.errors import SerError
path, chance, ends = Path(sys.argv[1]), random.Random(3), {"refused": 0, "read": 0}
good = encoded(noise(1.0, 16_000, 1), 16_000, "OGG", "VORBIS")
for number in range(60):
    changed = bytearray(good)
    changed[chance.randrange(200, 3400)] ^= 1 << chance.randrange(8)
    path.write_bytes(with_checksums(changed))
    excerpt = lambda: load_audio(path, start=0.1, end=0.3)
    windows = lambda: [*load_windows(path, window=0.2, hop=0.1, start=0.1)]
    for read in (excerpt, windows):
        try:
            read()
            ends["read"] += 1
        except SerError:
            ends["refused"] += 1
print(json.dumps(ends))
"""


def test_parts_of_an_ogg_with_damaged_headers_do_not_end_the_process(tmp_path):
    """One bit changed, and the checksums right: libvorbis crashes where it is asked to seek in such a stream."""
    ends = in_a_child(DAMAGED_HEADERS, tmp_path / "a.ogg")
    assert ends["refused"] + ends["read"] == 120 and ends["refused"] > 40


def test_errors_are_ser_errors_and_cross_process_borders(tmp_path):
    import pickle

    with pytest.raises(SerError) as caught:
        load_audio(tmp_path / "missing.wav")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)

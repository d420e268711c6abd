"""Sound in which nobody speaks carries a warning, by its level and its channels; speech carries none."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from toy import toy_recognizer

from ser.audio import SAMPLE_RATE, as_waveform, level_warning, load_audio, load_windows, read_audio, read_samples
from ser.data.manifest import Utterance

ROOT = Path(__file__).resolve().parents[1]
CORPORA = ROOT.parent / "shared" / "corpora"
needs_corpora = pytest.mark.skipif(not CORPORA.is_dir(), reason="the shared recordings are not here")


def voice(seconds=1.0, rate=SAMPLE_RATE, seed=0):
    """Harmonics under a slow envelope, and a little noise; about -18 dBFS."""
    t = np.arange(int(seconds * rate)) / rate
    tone = sum(np.sin(2 * np.pi * 130 * k * t) / k for k in range(1, 9)) * (0.4 + 0.3 * np.sin(2 * np.pi * 3 * t))
    return (0.2 * tone + 0.005 * np.random.default_rng(seed).standard_normal(len(t))).astype(np.float32)


def warning_of(samples, rate=SAMPLE_RATE):
    return read_samples(samples, rate)[1]


ZEROS = np.zeros(32_000, np.float32)
CLICK = ZEROS.copy()
CLICK[9_000] = 1.0
CHANCE = np.random.default_rng(3)
SILENT = {
    "digital silence": ZEROS,
    "a constant": ZEROS + 0.5,
    "a constant at full scale": ZEROS - 1.0,
    "one click": CLICK,
    "dither of one bit": CHANCE.choice([-1, 0, 1], 32_000).astype(np.float32) / 32_768,
    "dither on a constant": CHANCE.choice([-1, 0, 1], 32_000).astype(np.float32) / 32_768 + 0.1,
    "noise at -80 dBFS": 1e-4 * CHANCE.standard_normal(32_000).astype(np.float32),
    "speech 70 dB down": voice(2.0) * 10 ** (-70 / 20),
    "30 ms": ZEROS[:480],
    "integers": np.zeros(32_000, np.int16),
    "two channels": np.zeros((32_000, 2), np.float32),
}


@pytest.mark.parametrize("name", SILENT)
@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100])
def test_silence_is_named_as_such(name, rate):
    samples = SILENT[name]
    if name == "30 ms":
        samples = ZEROS[: rate * 3 // 100]
    assert warning_of(samples, rate).startswith("silent: ")


@pytest.mark.parametrize("format", ["WAV", "FLAC", "OGG", "MP3"])
@pytest.mark.parametrize("name", ["digital silence", "one click", "dither of one bit"])
def test_coded_silence_is_silence(tmp_path, format, name):
    soundfile.write(tmp_path / "a", SILENT[name], SAMPLE_RATE, format=format)
    assert read_audio(tmp_path / "a")[1].startswith("silent: ")


@pytest.mark.parametrize("gain", [1.0, 0.1, 0.01, 2.0])
def test_a_word_in_a_minute_of_silence_is_no_silence(gain):
    minute = np.zeros(60 * SAMPLE_RATE, np.float32)
    minute[500_000 : 500_000 + 4_800] = gain * voice(0.3)
    assert warning_of(minute.clip(-1, 1)) is None


def test_what_is_shorter_than_a_frame_is_not_judged():
    assert level_warning(torch.zeros(399)) is None and level_warning(torch.zeros(400)) is not None


INVERTED = {"equal": -1.0, "10 % softer": -0.9, "20 % softer": -0.8}


@pytest.mark.parametrize("name", INVERTED)
@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_channels_that_cancel_are_named_as_such(tmp_path, name, rate):
    one = voice(1.0, rate)
    stereo = np.stack([one, INVERTED[name] * one], 1)
    for samples in (stereo, stereo + np.array([0.2, -0.1]), np.concatenate([stereo, stereo], 1)):
        samples = samples.astype(np.float32)
        warning = warning_of(samples, rate)
        assert f"the {samples.shape[1]} channels cancel each other" in warning and "silent:" not in warning
        soundfile.write(tmp_path / "a.wav", samples, rate, "FLOAT")
        assert read_audio(tmp_path / "a.wav")[1] == warning


def test_channels_that_do_not_cancel_are_fine():
    one, two = voice(), voice(seed=1)[::-1]
    late = np.roll(one, 400)
    noise = 0.1 * np.random.default_rng(0).standard_normal((16_000, 32))
    for columns in (
        [one, one],
        [one, two],
        [one, 0 * one],
        [0 * one, one],
        [one, -0.3 * one],
        [one, late],
        [one] * 5,
    ):
        assert warning_of(np.stack(columns, 1).astype(np.float32)) is None
    assert warning_of(noise.astype(np.float32)) is None, "independent channels"


def test_two_channels_are_mixed_to_their_mean_to_the_last_digit():
    stereo = torch.from_numpy(np.stack([voice(), voice(seed=1)[::-1]], 1))
    assert read_samples(stereo, SAMPLE_RATE)[0].equal(stereo.mean(dim=1))


def test_a_part_of_the_channels_that_cancels_is_found_in_that_part(tmp_path):
    one = voice(4.0)
    two = one.copy()
    two[32_000:] *= -1
    soundfile.write(tmp_path / "a.wav", np.stack([one, two], 1), SAMPLE_RATE)
    assert read_audio(tmp_path / "a.wav")[1] is None, "half of it is there"
    assert "cancel" in read_audio(tmp_path / "a.wav", start=2.0)[1]
    recognizer = toy_recognizer()
    found = list(recognizer.predict_windows(tmp_path / "a.wav", window=1.0, hop=0.5))
    assert [bool(p.warning) for p in found] == [False] * 4 + [True] * 2


def test_heavy_clipping_is_named_and_loud_speech_is_not():
    for gain, clipped in ((1.0, False), (3.0, False), (100.0, True)):
        warning = warning_of((gain * voice()).clip(-1, 1))
        assert (warning or "").startswith("clipped: ") == clipped
    assert warning_of(10 * voice()) is None, "beyond full scale nothing was clipped"


@needs_corpora
def test_real_speech_carries_no_warning():
    paths = sorted(p for p in CORPORA.rglob("*") if p.suffix in (".wav", ".flac", ".mp3", ".ogg"))[::9]
    paths += sorted(CORPORA.glob("thorsten*/wav/whisper*"))
    assert len(paths) > 50
    for path in paths:
        if "damaged" in path.name or "missing" in path.name:
            continue
        waveform, warning = read_audio(path)
        assert warning is None, path
        assert level_warning(0.1 * waveform) is None, "20 dB softer"


def test_the_sound_itself_is_what_it_was(tmp_path):
    stereo = np.stack([voice(), -voice()], 1)
    soundfile.write(tmp_path / "a.wav", stereo, SAMPLE_RATE, "FLOAT")
    assert load_audio(tmp_path / "a.wav").equal(read_audio(tmp_path / "a.wav")[0])
    assert as_waveform(stereo, SAMPLE_RATE).equal(load_audio(tmp_path / "a.wav"))
    ((begin, end, waveform),) = load_windows(tmp_path / "a.wav", window=1.0, hop=1.0)
    assert (begin, end) == (0, 1) and waveform.equal(load_audio(tmp_path / "a.wav"))


# In predictions --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Speech, silence, inverted stereo, and a WAV of open length."""
    folder = tmp_path_factory.mktemp("recordings")
    soundfile.write(folder / "a-voice.wav", voice(), SAMPLE_RATE)
    soundfile.write(folder / "b-silent.wav", ZEROS, SAMPLE_RATE)
    soundfile.write(folder / "c-inverted.wav", np.stack([voice(), -voice()], 1), SAMPLE_RATE)
    data = bytearray((folder / "a-voice.wav").read_bytes())
    data[4:8] = data[40:44] = b"\xff" * 4
    (folder / "d-open.wav").write_bytes(data)
    return folder


WORDS = {
    "a-voice.wav": None,
    "b-silent.wav": "silent",
    "c-inverted.wav": "cancel",
    "d-open.wav": "leaves its length",
}


def as_expected(warnings: list[str | None]) -> None:
    for word, warning in zip(WORDS.values(), warnings, strict=True):
        assert (warning or None) is None if word is None else word in warning


@pytest.mark.parametrize("workers", [0, 2])
def test_predictions_of_files_carry_the_warning_from_any_process(recordings, workers):
    found = toy_recognizer().predict([recordings / name for name in WORDS], workers=workers)
    as_expected([p.warning for p in found])


def test_predictions_of_arrays_excerpts_and_windows_carry_it_too(recordings, tmp_path):
    recognizer = toy_recognizer()
    (silent, inverted) = recognizer.predict([ZEROS, np.stack([voice(), -voice()], 1)], SAMPLE_RATE)
    assert "silent" in silent.warning and "cancel" in inverted.warning
    samples = np.concatenate([voice(2.0), np.zeros(32_000, np.float32), voice(2.0)])
    file = tmp_path / "a.wav"
    soundfile.write(file, samples, SAMPLE_RATE)
    windows = list(recognizer.predict_windows(file, window=2.0))
    assert [bool(p.warning) for p in windows] == [False, True, False]
    rows = [Utterance(id=str(i), file=file, start=i, end=i + 2) for i in (0, 2, 4)]
    assert [p.warning for p in recognizer.predict(rows)] == [p.warning for p in windows]


def test_every_format_of_infer_has_the_warning(recordings, tmp_path):
    toy_recognizer().save(tmp_path / "m")

    def infer(format: str) -> subprocess.CompletedProcess:
        command = [sys.executable, ROOT / "examples/infer.py", recordings, "--model", tmp_path / "m"]
        return subprocess.run(
            [*command, "--format", format], capture_output=True, text=True, timeout=120, check=True
        )

    as_expected([row["warning"] for row in json.loads(infer("json").stdout)])
    as_expected([json.loads(line)["warning"] for line in infer("jsonl").stdout.splitlines()])
    as_expected([row["warning"] for row in csv.DictReader(infer("csv").stdout.splitlines())])
    lines = [line for line in infer("table").stderr.splitlines() if line.startswith("warning: ")]
    as_expected([None, *lines])

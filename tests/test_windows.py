"""Recordings of any length, window by window: the same as each excerpt alone, and in bounded memory."""

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

from ser.audio import load_audio, load_windows
from ser.data.manifest import Utterance
from ser.errors import AudioError, ConfigError

INFER = Path(__file__).resolve().parents[1] / "examples" / "infer.py"


def recording(path: Path, seconds: float, *, rate=16_000, channels=1, **options) -> Path:
    samples = np.random.default_rng(0).normal(size=(round(seconds * rate), channels)) * 0.1
    samples *= 1 + np.arange(len(samples))[:, None] / rate  # windows differ in loudness
    soundfile.write(path, np.clip(samples, -0.9, 0.9), rate, **options)
    return path


@pytest.mark.parametrize("norm", ["group", "layer"])
@pytest.mark.parametrize(
    ("name", "rate", "channels"),
    [("a.wav", 16_000, 1), ("b.flac", 44_100, 2), ("c.ogg", 8000, 1), ("d.mp3", 22_050, 1)],
)
def test_each_window_is_predicted_as_that_excerpt_alone(tmp_path, norm, name, rate, channels):
    recognizer = toy_recognizer(feat_extract_norm=norm)
    file = recording(tmp_path / name, 7.25, rate=rate, channels=channels)
    found = list(recognizer.predict_windows(file, window=2.0, hop=1.5))
    bounds = [(0, 2), (1.5, 3.5), (3, 5), (4.5, pytest.approx(7.25, abs=0.06))]
    assert [(p.start, p.end) for p in found] == bounds
    for p in found:
        (alone,) = recognizer.predict(Utterance(id="x", file=file, start=p.start, end=p.end))
        assert p.probabilities == pytest.approx(alone.probabilities, abs=1e-5)
        assert p.dimensions == pytest.approx(alone.dimensions, abs=1e-4)
        assert (p.transcript, p.file) == (alone.transcript, str(file))
        assert p.seconds == pytest.approx(alone.seconds, abs=1e-3) and alone.start is None


@pytest.mark.parametrize(("rate", "channels"), [(16_000, 1), (44_100, 2), (8000, 1)])
def test_the_windows_of_an_array_are_those_of_the_same_sound_in_a_file(tmp_path, rate, channels):
    recognizer = toy_recognizer()
    file = recording(tmp_path / "a.wav", 7.25, rate=rate, channels=channels, subtype="FLOAT")
    samples = soundfile.read(file, dtype="float32")[0]
    of_file = list(recognizer.predict_windows(file, window=2.0, hop=1.5))
    assert len(of_file) == 4
    sound = {"array": samples, "sampling_rate": rate, "path": "a.wav"}
    for given, rate_of_it, name in [(samples, rate, None), (torch.from_numpy(samples), rate, None),
                                    (sound, None, "a.wav"), (str(file), None, str(file))]:  # fmt: skip
        found = list(recognizer.predict_windows(given, rate_of_it, window=2.0, hop=1.5))
        assert [(p.start, p.end, p.file) for p in found] == [(p.start, p.end, name) for p in of_file]
        for p, expected in zip(found, of_file, strict=True):
            assert p.probabilities == pytest.approx(expected.probabilities, abs=1e-6)
            assert (p.transcript, p.seconds) == (expected.transcript, expected.seconds)


@pytest.mark.parametrize(
    ("source", "rate", "message"),
    [
        (np.zeros(48_000, np.float32), None, "the recording is an array: pass sampling_rate"),
        (np.zeros(0, np.float32), 16_000, "S >= 1"),
        (np.zeros(()), 16_000, r"shape \(\)"),
        (np.zeros((2, 48_000), np.float32), 16_000, r"48000 channels.*samples\.T"),
        (np.full(48_000, np.nan, np.float32), 16_000, "window from 0 to 1 s: .*nan"),
        (np.zeros(48_000, np.float32), 1, "sample rate of 1 Hz"),
        (["a.wav"], None, "the recording is of type list; expected a path"),
        (None, 16_000, "the recording is of type NoneType"),
        ((np.zeros(48_000, np.float32), 16_000), None, "the recording is a pair of samples and their rate"),
        ({"audio": {}}, None, "the recording is a dict of audio"),
        ("none.wav", 16_000, r"none\.wav: no such file"),
    ],
)
def test_what_is_no_recording_has_no_windows_and_is_said_to_be_none(source, rate, message):
    with pytest.raises(AudioError, match=message):
        list(toy_recognizer().predict_windows(source, rate, window=1.0))


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.3, [(0, 0.3)]),
        (2.0, [(0, 2)]),
        (2.9, [(0, 2.9)]),  # a remainder under a second belongs to the window before it
        (3.1, [(0, 2), (2, 3.1)]),
        (6.0, [(0, 2), (2, 4), (4, 6)]),
    ],
)
def test_windows_cover_the_recording_without_a_gap(tmp_path, seconds, expected):
    file = recording(tmp_path / "a.wav", seconds)
    found = list(load_windows(file, window=2.0, hop=2.0))
    assert [(a, b) for a, b, _ in found] == [pytest.approx(bounds) for bounds in expected]
    assert torch.equal(torch.cat([waveform for *_, waveform in found]), load_audio(file))


def test_a_window_of_under_a_second_is_never_followed_by_one_of_several(tmp_path):
    file = recording(tmp_path / "a.wav", 1.3)
    found = list(load_windows(file, window=0.25, hop=0.25))
    assert [(a, b) for a, b, _ in found] == [(0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0), (1.0, 1.3)]


def test_the_windows_of_an_excerpt_stay_within_it(tmp_path):
    file = recording(tmp_path / "a.wav", 9.0)
    row = Utterance(id="x", file=file, start=2.5, end=6.5)
    found = list(toy_recognizer().predict_windows(row, window=2.0))
    assert [(p.start, p.end) for p in found] == [(2.5, 4.5), (4.5, 6.5)]


@pytest.mark.parametrize("bad", [{"window": 0.0}, {"window": -1.0}, {"window": float("nan")}, {"window": 121.0},
                                 {"window": 2.0, "hop": 0.0}, {"window": 2.0, "hop": 2.5}])  # fmt: skip
def test_a_window_or_hop_out_of_range_is_refused(tmp_path, bad):
    file = recording(tmp_path / "a.wav", 3.0)
    for source in (file, np.zeros(48_000, np.float32)):
        with pytest.raises(ConfigError, match=r"window is .* s"):
            list(toy_recognizer().predict_windows(source, 16_000, **bad))


def test_a_damaged_recording_gives_what_is_before_the_damage_and_then_its_error(tmp_path):
    file = recording(tmp_path / "a.flac", 9.0)
    data = file.read_bytes()
    file.write_bytes(data[: int(0.7 * len(data))])
    found = []
    with pytest.raises(AudioError, match=r"a\.flac: truncated or damaged"):
        for waveform in load_windows(file, window=1.0, hop=1.0):
            found.append(waveform)
    assert 4 <= len(found) < 9
    recognizer, predicted = toy_recognizer(), []
    assert recognizer.batch_seconds > 9, "so all windows are of one forward pass"
    with pytest.raises(AudioError, match=r"a\.flac: truncated or damaged"):
        for prediction in recognizer.predict_windows(file, window=1.0):
            predicted.append(prediction.end)
    assert predicted == [end for _, end, _ in found]
    (tmp_path / "empty.wav").write_bytes(b"")
    with pytest.raises(AudioError, match="the file is empty"):
        list(toy_recognizer().predict_windows(tmp_path / "empty.wav"))


def test_memory_does_not_grow_with_the_length(tmp_path):
    toy_recognizer().save(tmp_path / "m")
    script = (
        "import resource, sys, torch, ser; torch.set_num_threads(1); r = ser.load(sys.argv[1])\n"
        "for file in sys.argv[2:]:\n"
        "    print(sum(1 for _ in r.predict_windows(file)), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    files = [recording(tmp_path / f"{minutes}.wav", 60 * minutes) for minutes in (3, 3, 18)]
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "m", *files], capture_output=True, text=True)
    (_, _), (few, before), (many, after) = (map(int, line.split()) for line in done.stdout.splitlines())
    assert (few, many) == (9, 54)
    assert after - before < 10 * 1024, "KiB; the longer recording alone is 69 MB"


def infer(folder: Path, *arguments):
    command = [sys.executable, str(INFER), *map(str, arguments), "--model", str(folder / "m")]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_infer_writes_a_line_for_each_window_and_goes_on_after_a_bad_recording(tmp_path):
    toy_recognizer().save(tmp_path / "m")
    files = [recording(tmp_path / "a.wav", 5.0), tmp_path / "none.wav", recording(tmp_path / "b.wav", 1.0)]
    done = infer(tmp_path, *files, "--window", 2, "--format", "jsonl")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    bounds = [(Path(row["file"]).name, row["start"], row["end"], bool(row["error"])) for row in rows]
    a, b = [("a.wav", 0, 2, False), ("a.wav", 2, 4, False), ("a.wav", 4, 5, False)], ("b.wav", 0, 1, False)
    assert bounds == [*a, ("none.wav", None, None, True), b] and done.returncode == 1
    assert [row["id"] for row in rows if not row["error"]] == ["a.wav:0-2", "a.wav:2-4", "a.wav:4-5", "b.wav:0-1"]
    done = infer(tmp_path, files[0], "--window", 2, "--hop", 1, "--format", "csv")
    assert [row["start"] for row in csv.DictReader(done.stdout.splitlines())] == ["0.0", "1.0", "2.0", "3.0"]
    assert "a.wav:2-4" in infer(tmp_path, files[0], "--window", 2).stdout, "in the table too"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--hop", "2"], "--hop is between windows: give --window too"),
        (["--window", "2", "--hop", "0"], "expected 0 < hop <= window"),
        (["--window", "2", "--format", "paper"], "no place for windows"),
        (["--window", "2", "--workers", "2"], "with --window this process does"),
        (["--window", "2", "--max-seconds", "9"], "with --window none is too long"),
    ],
)
def test_infer_refuses_what_makes_no_sense(tmp_path, options, message):
    toy_recognizer().save(tmp_path / "m")
    done = infer(tmp_path, recording(tmp_path / "a.wav", 3.0), *options)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_a_recording_that_is_too_long_at_once_points_to_windows(tmp_path):
    file = recording(tmp_path / "a.wav", 3.0)
    with pytest.raises(AudioError, match=r"window by window \(--window, predict_windows\)"):
        toy_recognizer().predict(file, max_seconds=2.0)


def test_windows_far_into_a_recording_have_names_of_their_own(tmp_path):
    toy_recognizer().save(tmp_path / "m")
    file = tmp_path / "long.wav"
    soundfile.write(file, np.zeros(1001 * 4000), 4000)
    rows = tmp_path / "rows.csv"
    rows.write_text(f"id,file,start,end\nx,{file},1000,1000.5\n")
    done = infer(tmp_path, rows, "--window", 0.125, "--format", "jsonl")
    names = [json.loads(line)["id"] for line in done.stdout.splitlines()]
    assert names == ["x:1000-1000.125", "x:1000.125-1000.25", "x:1000.25-1000.375", "x:1000.375-1000.5"]

"""The synthetic demonstration corpus: that it is what its README says, and that its folder is safe."""

import dataclasses
import importlib.util
import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

from ser.data import demo_corpus as demo
from ser.data.manifest import read_manifest
from ser.errors import ConfigError, SerError, pip_line

CORPUS_ALONE = [sys.executable, "-m", "ser", "demo", "--corpus-only"]
PARTS = ("train", "valid", "known", "test")
SIZE = 24

needs_espeak = pytest.mark.skipif(
    importlib.util.find_spec("espeakng_loader") is None, reason=f"needs espeak-ng: {pip_line('demo')}"
)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "corpus"
    demo.build_corpus(out, seed=0, size=SIZE, progress=False)
    return out


@pytest.fixture(scope="module")
def rows(corpus: Path) -> dict[str, list]:
    return {part: read_manifest(corpus / f"{part}.csv") for part in PARTS}


# --- what it holds ---------------------------------------------------------------------------------------------


@needs_espeak
def test_two_processes_make_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    # espeak-ng seeds itself with the time, in whole seconds.
    time.sleep(max(0.0, 1.1 - (time.time() - (corpus / "corpus.json").stat().st_mtime)))
    command = [*CORPUS_ALONE, "--data", tmp_path / "again", "--size", str(SIZE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"{4 * SIZE} train" in done.stdout
    assert contents(tmp_path / "again") == contents(corpus)


@needs_espeak
def test_what_was_said_before_in_this_process_does_not_matter(corpus: Path, tmp_path: Path) -> None:
    demo.build_corpus(tmp_path / "other", seed=5, size=SIZE, progress=False)
    demo.build_corpus(tmp_path / "again", seed=0, size=SIZE, progress=False)
    assert contents(tmp_path / "again") == contents(corpus)
    assert contents(tmp_path / "other") != contents(corpus)


@needs_espeak
def test_files_are_audible_mono_pcm_at_22050_hz(corpus: Path, rows: dict) -> None:
    for row in itertools.chain(*rows.values()):
        info = soundfile.info(row.file)
        assert (info.samplerate, info.channels, info.subtype) == (22050, 1, "PCM_16")
        samples, _ = soundfile.read(row.file)
        assert 0.5 < info.duration < 4
        assert samples.std() > 0.01
        assert np.mean(np.abs(samples) > 0.99) < 1e-3, "clipped"
        loud = np.flatnonzero(np.abs(samples) > 0.01)
        assert loud[0] <= 22050 // 20 + 1, "silence before the speech"
        assert len(samples) - loud[-1] <= 22050 // 20 + 1, "silence after the speech"
    assert {row.file.name for row in itertools.chain(*rows.values())} == {
        path.name for path in (corpus / "wav").iterdir()
    }


@needs_espeak
def test_no_two_recordings_are_equal(rows: dict) -> None:
    recordings = [row.file.read_bytes() for row in itertools.chain(*rows.values())]
    assert len(set(recordings)) == len(recordings)


@needs_espeak
def test_louder_faster_higher_settings_are_heard(rows: dict) -> None:
    """Emotions differ in the sound, not only in the columns: rate in the duration, volume in the energy."""

    def median(emotion: str, measure) -> float:
        return float(np.median([measure(row) for row in rows["train"] if row.emotion == emotion]))

    def seconds_per_letter(row) -> float:
        return soundfile.info(row.file).duration / len(row.text)

    def energy(row) -> float:
        return float(soundfile.read(row.file)[0].std())

    assert median("sad", seconds_per_letter) > 1.15 * median("neutral", seconds_per_letter)
    assert median("neutral", seconds_per_letter) > 1.15 * median("angry", seconds_per_letter)
    assert median("angry", energy) > 1.2 * median("neutral", energy) > 1.4 * median("sad", energy)


@needs_espeak
@pytest.mark.parametrize(("setting", "low", "high"), [("pitch", 20, 80), ("range", 0, 100)])
def test_pitch_and_range_change_the_sound(setting: str, low: int, high: int) -> None:
    turn = demo.Turn("", "", "bring five black boxes now", "", "en-us+m3", 175, 50, 50, 60)

    def tops(value: int) -> np.ndarray:
        with demo.open_espeak(0) as espeak:
            samples = espeak.say(dataclasses.replace(turn, **{setting: value})).astype(float)
        return pitch_track(samples, 22050)

    quiet, strong = tops(low), tops(high)
    if setting == "pitch":
        assert np.median(strong) > 1.4 * np.median(quiet)
    else:
        spread = [np.subtract(*np.percentile(np.log2(track), [90, 10])) for track in (quiet, strong)]
        assert spread[1] > 1.5 * spread[0]


def pitch_track(samples: np.ndarray, sample_rate: int) -> np.ndarray:
    """Hz of the voiced frames of a man's voice, by autocorrelation."""
    size, hop = int(0.05 * sample_rate), int(0.01 * sample_rate)
    frames = np.lib.stride_tricks.sliding_window_view(samples, size)[::hop] * np.hanning(size)
    spectrum = np.abs(np.fft.rfft(frames, 4 * size)) ** 2
    correlation = np.fft.irfft(spectrum)[:, : size // 2]
    first, last = sample_rate // 220, sample_rate // 55
    peaks = correlation[:, first:last]
    voiced = peaks.max(1) > 0.5 * correlation[:, 0]
    return sample_rate / (first + peaks.argmax(1)[voiced])


@needs_espeak
def test_no_sentence_is_in_two_parts(rows: dict) -> None:
    sentences = {part: {row.text for row in rows[part]} for part in PARTS}
    for one, other in itertools.combinations(PARTS, 2):
        assert not sentences[one] & sentences[other]


@needs_espeak
def test_test_voices_are_in_no_other_part(rows: dict) -> None:
    speakers = {part: {row.speaker for row in rows[part]} for part in PARTS}
    variants = {part: {row.extra["voice"].partition("+")[2] for row in rows[part]} for part in PARTS}
    assert len(speakers["train"]) >= 8
    assert len(speakers["test"]) >= 3
    for part in ("train", "valid", "known"):
        assert not speakers[part] & speakers["test"]
        assert not variants[part] & variants["test"]
        assert speakers[part] <= speakers["train"]


@needs_espeak
def test_training_hears_every_word(rows: dict) -> None:
    heard = Counter(word for row in rows["train"] for word in row.text.split())
    for part in PARTS:
        assert {word for row in rows[part] for word in row.text.split()} <= set(heard)
    assert set(heard) == {word for slot in demo.GRAMMAR for word in slot if word}


@needs_espeak
def test_every_sentence_is_said_in_every_emotion(rows: dict) -> None:
    for part in PARTS:
        said = Counter((row.text, row.emotion) for row in rows[part])
        sentences = {row.text for row in rows[part]}
        assert said == Counter(dict.fromkeys(itertools.product(sentences, demo.STYLES), 1))


@pytest.mark.parametrize("seed", range(3))
def test_the_full_plan_is_balanced(seed: int) -> None:
    corpus = demo.plan(seed, 192)
    for part, voices in (("train", demo.TRAIN_VOICES), ("test", demo.TEST_VOICES)):
        said = Counter((turn.voice, turn.emotion) for turn in corpus[part])
        assert set(said) == set(itertools.product(voices, demo.STYLES))
        assert len(set(said.values())) == 1
    texts = [turn.text for part in PARTS for turn in corpus[part]]
    assert set(Counter(texts).values()) == {len(demo.STYLES)}


@pytest.mark.parametrize("size", [24, 25, 480])
def test_the_plan_keeps_its_promises_at_every_size(size: int) -> None:
    corpus = demo.plan(1, size)
    texts = Counter(turn.text for part in PARTS for turn in corpus[part])
    assert set(texts.values()) == {len(demo.STYLES)}
    words = {word for slot in demo.GRAMMAR for word in slot if word}
    assert {word for turn in corpus["train"] for word in turn.text.split()} == words
    assert all(3 <= len(text.split()) <= 5 for text in texts)


@needs_espeak
def test_it_says_everywhere_that_it_is_synthetic(corpus: Path, rows: dict) -> None:
    assert "SYNTHETIC" in (corpus / "README.md").read_text()
    assert json.loads((corpus / "corpus.json").read_text())["synthetic"] is True
    assert all(row.speaker.startswith("synthetic-") for row in itertools.chain(*rows.values()))


@needs_espeak
def test_corpus_json_and_readme_count_what_is_there(corpus: Path, rows: dict) -> None:
    state = json.loads((corpus / "corpus.json").read_text())
    for part in PARTS:
        assert state["utterances"][part] == len(rows[part])
        seconds = sum(soundfile.info(row.file).duration for row in rows[part])
        assert state["seconds"][part] == pytest.approx(seconds, abs=0.06)
        assert re.search(rf"\| {part}.csv \| {len(rows[part])} \|", (corpus / "README.md").read_text())
    assert re.fullmatch(r"\d+\.\d+.*", state["espeak_ng"])


# --- its folder ------------------------------------------------------------------------------------------------


@needs_espeak
def test_a_whole_corpus_is_kept(corpus: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in corpus.rglob("*")}
    demo.build_corpus(corpus, seed=0, size=SIZE, progress=False)
    assert {path: path.stat().st_mtime_ns for path in corpus.rglob("*")} == before


@needs_espeak
def test_a_killed_build_is_made_anew(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    # Stops at its 20th recording, as a machine that goes down would: no handler runs.
    code = (
        "import os, pathlib, signal, sys; import ser.data.demo_corpus as demo\n"
        "write = demo.write_wav\n"
        "def stop(path, *rest):\n"
        "    if path.name == 'train-0020.wav': os.kill(os.getpid(), signal.SIGKILL)\n"
        "    write(path, *rest)\n"
        "demo.write_wav = stop\n"
        f"demo.build_corpus(pathlib.Path(sys.argv[1]), 0, {SIZE}, progress=False)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, out])
    assert killed.returncode == -signal.SIGKILL
    assert not (out / "corpus.json").exists()
    assert len(list((out / "wav").iterdir())) == 20
    (out / "wav" / "train-0019.wav").write_bytes(b"RIFF")  # half a file
    demo.build_corpus(out, seed=0, size=SIZE, progress=False)
    assert contents(out) == contents(corpus)


@needs_espeak
def test_ctrl_c_stops_the_build(tmp_path: Path) -> None:
    command = [*CORPUS_ALONE, "--data", tmp_path / "out", "--size", "480"]
    # A shell's background job inherits an ignored SIGINT, which Python would keep ignoring.
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "out" / "wav" / "train-0010.wav").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, messages = process.communicate(timeout=120)
    assert process.returncode == 130
    assert messages.splitlines()[-1] == "interrupted" and "Traceback" not in messages
    assert "Exception ignored" not in messages
    assert not (tmp_path / "out" / "corpus.json").exists()


@needs_espeak
def test_a_corpus_with_a_lost_recording_is_made_whole(corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus, tmp_path / "lost")
    (tmp_path / "lost" / "wav" / "test-0003.wav").unlink()
    demo.build_corpus(tmp_path / "lost", seed=0, size=SIZE, progress=False)
    assert contents(tmp_path / "lost") == contents(corpus)


@needs_espeak
@pytest.mark.parametrize("parameter", [{"seed": 1}, {"size": 48}])
def test_a_corpus_of_other_parameters_is_left_alone(corpus: Path, parameter: dict) -> None:
    before = contents(corpus)
    with pytest.raises(SerError, match=f"another {next(iter(parameter))} .*remove that folder"):
        demo.build_corpus(corpus, **({"seed": 0, "size": SIZE} | parameter), progress=False)
    assert contents(corpus) == before


@pytest.mark.parametrize("name", ["thesis.txt", "corpus.json", "wav/train-0000.wav", "corpus.unfinished.json"])
def test_a_foreign_folder_is_refused_and_untouched(tmp_path: Path, name: str) -> None:
    file = tmp_path / "mine" / name
    file.parent.mkdir(parents=True)
    file.write_text('{"notice": "my own", "parameters": {}}')
    with pytest.raises(SerError, match=re.escape(str(tmp_path / "mine"))):
        demo.build_corpus(tmp_path / "mine", size=SIZE, progress=False)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [file]
    assert file.read_text() == '{"notice": "my own", "parameters": {}}'


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SerError, match="is a file"):
        demo.build_corpus(tmp_path / "file", size=SIZE, progress=False)


# --- what can be missing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seed", "size"), [(-1, 24), (2**31, 24), (0, 23), (0, 481)])
def test_numbers_out_of_range_are_refused_before_the_folder_is_made(tmp_path: Path, seed: int, size: int) -> None:
    with pytest.raises(ConfigError, match="expected"):
        demo.build_corpus(tmp_path / "out", seed=seed, size=size)
    assert not (tmp_path / "out").exists()


def test_without_espeak_the_message_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(SerError, match=re.escape(pip_line("demo"))):
        demo.build_corpus(tmp_path / "out", size=SIZE, progress=False)


@needs_espeak
def test_a_long_path_of_the_data_does_not_matter(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import espeakng_loader

    deep = tmp_path.joinpath(*["a-long-folder-name" * 3] * 5)
    deep.mkdir(parents=True)
    (deep / "espeak-ng-data").symlink_to(espeakng_loader.get_data_path())
    monkeypatch.setattr(espeakng_loader, "get_data_path", lambda: str(deep / "espeak-ng-data"))
    demo.build_corpus(tmp_path / "out", seed=0, size=SIZE, progress=False)
    assert contents(tmp_path / "out") == contents(corpus)


@needs_espeak
def test_a_long_temporary_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("a-long-folder-name" * 6)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    with pytest.raises(SerError, match="TMPDIR"):
        demo.build_corpus(tmp_path / "out", size=SIZE, progress=False)


@needs_espeak
@pytest.mark.parametrize(
    ("voice", "message"), [("en-us+nobody", "no voice variant 'nobody'"), ("xx-nowhere+m1", "find the voice")]
)
def test_an_unknown_voice_is_an_error(voice: str, message: str) -> None:
    turn = demo.Turn("", "", "bring", "", voice, 175, 50, 50, 60)
    with demo.open_espeak(0) as espeak, pytest.raises(SerError, match=message):
        espeak.say(turn)


@needs_espeak
def test_silence_is_an_error() -> None:
    turn = demo.Turn("", "", " ", "", "en-us+m1", 175, 50, 50, 60)
    with demo.open_espeak(0) as espeak, pytest.raises(SerError, match="no sound"):
        espeak.say(turn)


@needs_espeak
def test_nothing_is_left_in_the_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "t"))
    demo.build_corpus(tmp_path / "out", size=SIZE, progress=False)
    assert list((tmp_path / "t").iterdir()) == []

"""examples/infer.py as people run it: formats, order, exit status, and what it says when something is wrong."""

import csv
import io
import json
import os
import runpy
import shlex
import signal
import stat
import subprocess
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

import ser
from ser.data.labels import Labels
from ser.data.text import Vocabulary
from ser.models.multitask import HeadsConfig, MultiTaskModel
from ser.recognizer import Prediction, Recognizer
from ser.writers import FORMATS, as_record, comma_separated

SCRIPT = Path(__file__).parents[1] / "examples" / "infer.py"
EMOTIONS = ["angry", "happy", "neutral", "sad"]
GOOD = ["c.wav", "a.wav", "short.wav", "b.flac"]


@dataclass(frozen=True)
class Done:
    stdout: str
    stderr: str


def run(*arguments, check: int = 0, cwd: Path | None = None, columns: int = 120, encoding: str = "utf-8") -> Done:
    """The script in a process of its own, whose exit status must be ``check``.

    Forked, since a new interpreter takes seconds to import torch; some tests below start one all the same.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if not child:
            status = 99
            try:
                signal.alarm(200)
                for fd, file in ((1, out), (2, err)):
                    os.dup2(file.fileno(), fd)
                sys.stdout = open(1, "w", encoding=encoding, closefd=False)  # noqa: SIM115
                sys.stderr = open(2, "w", errors="backslashreplace", closefd=False)  # noqa: SIM115
                os.chdir(cwd or ".")
                os.environ["COLUMNS"] = str(columns)
                sys.argv = [str(SCRIPT), *map(str, arguments)]
                runpy.run_path(str(SCRIPT), run_name="__main__")
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else 1
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
    done = Done(*texts)
    assert status == check, done.stderr
    assert "Traceback" not in done.stderr
    return done


def run_anew(command: str, cwd: Path) -> subprocess.CompletedProcess:
    """A shell command in which SCRIPT is the script, run by a new interpreter."""
    script = f"{shlex.quote(sys.executable)} {shlex.quote(str(SCRIPT))}"
    command = f"set -o pipefail; {command.replace('SCRIPT', script)}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, cwd=cwd, env=environment, timeout=200
    )


@pytest.fixture(scope="module")
def work(tmp_path_factory, styles, randomise) -> Path:
    """A folder with a model and recordings, one of them bad."""
    folder = tmp_path_factory.mktemp("infer")
    sizes = HeadsConfig(num_emotions=4, vocab_size=32, num_speakers=2)
    model = randomise(MultiTaskModel(styles["base-style"], sizes))
    labels = {"emotions": EMOTIONS, "speakers": ["Ann", "Bo"], "vocabulary": Vocabulary.librispeech()}
    Recognizer(model, **labels).save(folder / "model")
    for i, (name, samples) in enumerate(zip(GOOD, [16_000, 9_000, 100, 30_000], strict=True)):
        soundfile.write(folder / name, np.random.default_rng(i).normal(0, 0.1, samples), 16000)
    (folder / "bad.wav").write_bytes(b"RIFF or not")
    return folder


@pytest.fixture(scope="module")
def expected(work) -> dict[str, Prediction]:
    predictions = ser.load(work / "model").predict([work / name for name in GOOD])
    return dict(zip(GOOD, predictions, strict=True))


MIXED = ["c.wav", "a.wav", "bad.wav", "short.wav", "b.flac"]
REASON = "ends inside its header"


def assert_records(records: list[dict], expected: dict[str, Prediction]) -> None:
    assert [Path(r["file"]).name for r in records] == MIXED
    for record in records:
        assert list(record) == list(records[0])
        if record["file"].endswith("bad.wav"):
            assert record["error"].startswith("bad.wav: ") and record["emotion"] is None
            continue
        prediction = expected[record["file"]]
        assert record["error"] is None
        for name in ("emotion", "transcript", "speaker", "warning", "seconds"):
            assert record[name] == getattr(prediction, name)
        assert record["probabilities"] == pytest.approx(prediction.probabilities, abs=1e-4)


@pytest.mark.parametrize("format", ["json", "jsonl"])
def test_json_has_every_recording_in_its_place_the_bad_one_with_its_reason(work, expected, format):
    done = run(*MIXED, "--model", "model", "--format", format, cwd=work, check=1)
    records = json.loads(done.stdout) if format == "json" else [json.loads(x) for x in done.stdout.splitlines()]
    assert_records(records, expected)
    assert "error: bad.wav: " in done.stderr and "1 of 5 recordings could not be read" in done.stderr
    assert "warning: short.wav: 100 samples are shorter than one frame" in done.stderr


def test_csv_has_a_column_for_every_class_and_every_recording_in_its_place(work, expected):
    done = run(*MIXED, "--model", "model", "--format", "csv", cwd=work, check=1)
    rows = list(csv.DictReader(io.StringIO(done.stdout), strict=True))
    records = [
        {
            **{name: row[name] or None for name in row if not name.startswith("p_")},
            "seconds": float(row["seconds"]) if row["seconds"] else None,
            "probabilities": {name: float(row[f"p_{name}"]) for name in EMOTIONS if row[f"p_{name}"]},
        }
        for row in rows
    ]
    assert_records(records, expected)


def test_the_papers_format_numbers_the_classes_as_the_paper_does(work, expected):
    done = run(*MIXED, "--model", "model", "--format", "paper", cwd=work, check=1)
    lines = [line.split(" ") for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == GOOD  # there is no place for the bad one
    papers = ["neutral", "happy", "angry", "sad"]  # e0 to e3
    for name, seconds, number, gap, *shares in lines:
        prediction = expected[name]
        assert float(seconds) == prediction.seconds and gap == ""
        assert papers[int(number)] == prediction.emotion
        assert [float(p) for p in shares] == pytest.approx([prediction.probabilities[c] for c in papers], abs=1e-4)
    assert "error: bad.wav: " in done.stderr


@pytest.mark.parametrize("columns", [60, 100, 200])
def test_the_table_fits_the_terminal(work, expected, columns):
    done = run(*MIXED, "--model", "model", cwd=work, check=1, columns=columns)
    head, *lines = done.stdout.splitlines()
    assert head.split() == ["file", "seconds", "emotion", "transcript", "speaker"]
    assert max(map(len, [head, *lines])) < columns
    for name, line in zip(MIXED, lines, strict=True):
        assert line.startswith(name)
        if name == "bad.wav":
            assert " error: " in line and line.count("bad.wav") == 1, "its name stands before it"
        else:
            prediction = expected[name]
            share = prediction.probabilities[prediction.emotion]
            assert f" {prediction.seconds:.2f}  {prediction.emotion} {share:.2f} " in line
            assert prediction.transcript[:5] in line and line.endswith(prediction.speaker)


def test_all_good_is_exit_status_0_and_nothing_on_stderr(work):
    assert run("a.wav", "b.flac", "--model", "model", cwd=work).stderr == ""
    done = run_anew("SCRIPT a.wav b.flac --model model", work)
    assert (done.returncode, done.stderr) == (0, "") and len(done.stdout.splitlines()) == 3


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
def test_one_file_with_four_workers(work, expected):
    done = run("a.wav", "--model", "model", "--format", "jsonl", "--workers", 4, cwd=work)
    assert json.loads(done.stdout)["transcript"] == expected["a.wav"].transcript


def test_a_folder_is_its_recordings_sorted_at_any_depth_without_hidden_ones(work, tmp_path):
    sound = (work / "a.wav").read_bytes()
    for name in ("z.wav", "b/UPPER.WAV", "b/a/deep.wav", "b.wav", "b/.hidden.wav", ".git/x.wav", "._z.wav"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(sound)
    (tmp_path / "in" / "notes.txt").write_text("not a recording")
    (tmp_path / "in" / "b" / "c.flac").write_bytes((work / "b.flac").read_bytes())
    done = run(tmp_path / "in", "--model", work / "model", "--format", "jsonl")
    files = [json.loads(line)["file"] for line in done.stdout.splitlines()]
    names = ["b.wav", "b/UPPER.WAV", "b/a/deep.wav", "b/c.flac", "z.wav"]
    assert files == [str(tmp_path / "in" / name) for name in names]


def records_of(done: Done, folder: Path) -> dict[str, str]:
    """The files of a folder in their order, each with its error or nothing."""
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {str(Path(row["file"]).relative_to(folder)): row["error"] or "" for row in rows}


def test_what_is_sound_by_its_name_and_not_read_stands_in_its_place_with_what_to_do(work, tmp_path):
    sound = (work / "a.wav").read_bytes()
    soundfile.write(tmp_path / "voice.OGA", np.zeros(8000, np.float32), 16_000, format="OGG", subtype="VORBIS")
    foreign = {
        "a.m4a": (b"\0\0\0\x20ftypM4A ", "MP4 or M4A"),
        "b.OPUS": (b"OggS" + bytes(22) + b"\1\x13OpusHead" + bytes(60), "OGG file with Opus"),
        "c.mp4": (b"\0\0\0\x20ftypisom", "MP4 or M4A"),
        "d.mkv": (b"\x1aE\xdf\xa3" + bytes(20), "Matroska or WebM"),
        "e.aiff": (b"FORM\0\0\0\0AIFF", "AIFF"),
        "f.amr": (b"#!AMR\n" + bytes(20), "AMR"),
        "g.wma": (b"0&\xb2u" + bytes(20), "an unknown format"),
        "h.pcm": (bytes(64), "an unknown format"),
    }
    for name, (content, _) in foreign.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "i.aac").write_bytes(sound)  # it is the content that decides
    (tmp_path / "y.bwf").write_bytes(sound)
    (tmp_path / "z.wave").write_bytes(sound)
    for name in ("notes.txt", "a.m4a.bak", "cover.jpg", "wav", "m4a"):
        (tmp_path / name).write_text("no sound")
    found = records_of(run(tmp_path, "--model", work / "model", "--format", "jsonl", check=1), tmp_path)
    assert list(found) == [*foreign, "i.aac", "voice.OGA", "y.bwf", "z.wave"]
    for name, error in found.items():
        expected = foreign.get(name, (b"", ""))[1]
        assert expected in error and bool(error) == bool(expected)
        assert "convert it, for example: ffmpeg -i INPUT" in error or not expected
    assert "no recordings found" in run(folder_of(tmp_path, "notes.txt"), "--model", "x", check=2).stderr


def folder_of(tmp_path: Path, name: str) -> Path:
    """A folder that holds that file alone."""
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / name).write_text("no sound")
    return tmp_path / "alone"


def test_linked_folders_are_followed_and_each_folder_is_entered_once(work, tmp_path):
    sound = (work / "a.wav").read_bytes()
    for name in (
        "in/b/1.wav",
        "in/.hidden/2.wav",
        "in/.git/3.wav",
        "disk/s/4.wav",
        "disk/s/deep/5.wav",
        "x/6.wav",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(sound)
    folder = tmp_path / "in"
    for link, target in {
        "a": "b",  # to what is listed without it
        "session": "../disk/s",
        "again": "../disk/s",  # comes first, so the files are listed under it
        "b/circle": "..",
        "b/self": "self",
        "shown": ".hidden",
        "up": "../..",
        "gone": "../none",  # a disk that is not mounted
        "file.wav": "../x/6.wav",
    }.items():
        (folder / link).symlink_to(target)
    (tmp_path / "disk/s/back").symlink_to(tmp_path / "in")
    (tmp_path / "disk/s/other").symlink_to(tmp_path / "x")
    done = run(folder, "--model", work / "model", "--format", "jsonl", check=1)
    found = records_of(done, folder)
    good = [name for name, error in found.items() if not error]
    assert good == ["again/4.wav", "again/deep/5.wav", "again/other/6.wav", "b/1.wav", "file.wav", "shown/2.wav"]
    assert {name: error.partition(": ")[2][:13] for name, error in found.items() if error} == {
        "b/self": "cannot be rea",
        "gone": "a broken link",
    }
    assert f"warning: {folder / 'up'}: is a link to {tmp_path.parent}, which holds it" in done.stderr
    assert "circle" not in done.stderr
    (tmp_path / "link").symlink_to("in")
    again = run(tmp_path / "link", "--model", work / "model", "--format", "jsonl", check=1)
    assert list(records_of(again, tmp_path / "link")) == list(found), "and the folder itself may be a link"


def test_files_without_a_suffix_are_recordings_where_they_begin_as_such(work, tmp_path):
    sound = (work / "a.wav").read_bytes()
    (tmp_path / "call").write_bytes(sound)
    (tmp_path / "call.1").write_bytes((work / "b.flac").read_bytes())
    (tmp_path / "tape").write_bytes(b"ID3" + bytes(40))
    (tmp_path / "mpeg").write_bytes(b"\xff\xfb" + bytes(40))
    (tmp_path / "README").write_text("about these recordings")
    (tmp_path / "utf16").write_bytes("text".encode("utf-16"))
    (tmp_path / "picture").write_bytes(b"RIFF\0\0\0\0WEBP")
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "pipe")
    os.mkfifo(tmp_path / "pipe.wav")
    (tmp_path / "gone.wav").symlink_to("nowhere")
    found = records_of(run(tmp_path, "--model", work / "model", "--format", "jsonl", check=1), tmp_path)
    assert list(found) == ["call", "call.1", "gone.wav", "mpeg", "pipe.wav", "tape"]
    assert not found["call"] and not found["call.1"]
    assert "found a named pipe" in found["pipe.wav"] and "a broken link to nowhere" in found["gone.wav"]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json", ".JSON"])
def test_a_manifest_gives_its_rows_with_excerpts_and_missing_files_in_their_place(work, tmp_path, suffix):
    rows = [
        {"path": "b.flac", "start": 0.5, "end": 1.0, "id": "first"},
        {"path": "missing.wav", "start": "", "end": "", "id": "second"},
        {"path": "b.flac", "start": "", "end": "", "id": "third"},
    ]
    manifest = tmp_path / f"rows{suffix}"
    with manifest.open("w") as file:
        if "json" in suffix.lower():
            file.writelines(json.dumps({k: v for k, v in row.items() if v != ""}) + "\n" for row in rows)
        else:
            writer = csv.DictWriter(file, rows[0], delimiter="\t" if suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    options = ("--root", work, "--columns", "file=path")
    done = run(manifest, "--model", work / "model", "--format", "jsonl", *options, check=1)
    first, second, third = (json.loads(line) for line in done.stdout.splitlines())
    assert (first["id"], first["start"], first["end"], first["seconds"]) == ("first", 0.5, 1.0, 0.5)
    assert second["id"] == "second" and "missing.wav" in second["error"]
    assert third["seconds"] == 1.875 and third["error"] is None


def test_the_suffix_of_a_file_that_is_named_does_not_matter_its_content_does(work, tmp_path):
    (tmp_path / "sound.dat").write_bytes((work / "a.wav").read_bytes())
    (tmp_path / "text.wav").write_text("to be or not to be")
    done = run("sound.dat", "text.wav", "--model", work / "model", "--format", "jsonl", cwd=tmp_path, check=1)
    sound, text = (json.loads(line) for line in done.stdout.splitlines())
    assert sound["error"] is None and "text.wav: found an unknown format" in text["error"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.wav", "--model", "nowhere"], "error: nowhere: there is no such folder"),
        (["a.wav", "--model", "empty"], "error: empty: has no config.json"),
        (["empty", "--model", "model"], "error: empty: no recordings found"),
        (["rows.csv", "--model", "model"], "error: rows.csv: "),
        (["missing.csv", "--model", "model"], "error: missing.csv: "),
        (["a.wav", "--model", "model", "--format", "xml"], "invalid choice: 'xml'"),
        (["a.wav", "--model", "model", "--device", "abacus"], "'abacus' cannot be used"),
        (["a.wav", "--model", "model", "--workers", "-1"], "invalid choice: -1"),
        (["a.wav", "--model", "model", "--max-seconds", "0"], "error: max_seconds is 0.0"),
        (["a.wav", "--model", "model", "--columns", "x"], "error: expected OURS=THEIRS"),
        (["a.wav", "--model", "model", "--output", "no/such/file"], "error: no/such/file: "),
        (["a.wav", "--model", "model", "--output", "a.wav/file"], "error: a.wav/file: cannot be written: "),
        (["a.wav", "--model", "model", "--output", "model"], "error: model: cannot be written: is a folder"),
        (["a.wav", "--model", "model", "--output", "b.flac"], "error: b.flac: is a recording by its name"),
        (["good.csv", "--model", "model", "--output", "good.csv"], "error: good.csv: is one of the inputs"),
        (["good.csv", "--model", "model", "--output", "link"], "error: link: is one of the inputs"),
        (["good.csv", "--model", "model", "--output", "sound.dat"], "error: sound.dat: is one of the inputs"),
        (["a.wav", "--model", "model", "--output", "model/config.json"], "config.json: belongs to the model"),
        (["a.wav", "--model", "./model/", "--output", "model/model.safetensors"], "belongs to the model"),
        (
            ["list.txt", "--model", "model"],
            "error: list.txt: is no recording and no manifest; a list",
        ),
        (["list.xlsx", "--model", "model"], "error: list.xlsx: is no recording and no manifest"),
        (["a.wav", "--model", "model", "--output", "empty"], "error: empty: cannot be written: is a folder"),
        (["a.wav"], "the following arguments are required: --model"),
        ([], "the following arguments are required"),
    ],
)
def test_a_wrong_call_is_exit_status_2_and_one_clear_line(work, arguments, message):
    (work / "empty").mkdir(exist_ok=True)
    (work / "rows.csv").write_text("name,emotion\nx,y\n")
    (work / "list.txt").write_text("a.wav\nb.flac\n")
    (work / "list.xlsx").write_bytes(b"PK\3\4")
    (work / "good.csv").write_text("file\na.wav\nsound.dat\n")
    (work / "sound.dat").write_bytes((work / "a.wav").read_bytes())
    if not (work / "link").is_symlink():
        (work / "link").symlink_to("good.csv")
    before = {path: path.read_bytes() for path in work.rglob("*") if path.is_file()}
    done = run(*arguments, cwd=work, check=2)
    assert message in done.stderr
    assert before == {path: path.read_bytes() for path in work.rglob("*") if path.is_file()}


def test_the_papers_format_needs_an_emotion_head(work, tmp_path, styles, randomise):
    vocabulary = Vocabulary.librispeech()
    model = randomise(MultiTaskModel(styles["base-style"], HeadsConfig(vocab_size=32)))
    Recognizer(model, vocabulary=vocabulary).save(tmp_path / "text-only")
    options = ("--model", tmp_path / "text-only")
    assert "no emotion head" in run("a.wav", *options, "--format", "paper", cwd=work, check=2).stderr
    head, line = run("a.wav", *options, cwd=work).stdout.splitlines()
    assert head.split() == ["file", "seconds", "transcript"] and line.startswith("a.wav")


@pytest.fixture(scope="module")
def of_kinds(work, tmp_path_factory, styles, randomise) -> dict[str, Path]:
    """Models that do not answer with one label, by what they answer with."""
    folder = tmp_path_factory.mktemp("kinds")
    several = randomise(MultiTaskModel(styles["base-style"], HeadsConfig(num_emotions=4)))
    Recognizer(several, emotions=EMOTIONS, multi_label=True).save(folder / "multi-label")
    numbers = randomise(MultiTaskModel(styles["base-style"], HeadsConfig(num_dimensions=2)))
    Recognizer(numbers, dimensions=["LABEL_0", "file"]).save(folder / "regression")
    return {kind: folder / kind for kind in ("multi-label", "regression")}


@pytest.mark.parametrize("kind", ["multi-label", "regression"])
def test_every_format_says_what_kind_of_answer_it_holds(work, of_kinds, kind):
    model = of_kinds[kind]
    (expected,) = ser.load(model).predict([work / "a.wav"])
    options = ("a.wav", "--model", model, "--format")
    (from_json,) = json.loads(run(*options, "json", cwd=work).stdout)
    assert from_json == json.loads(run(*options, "jsonl", cwd=work).stdout)
    assert from_json["kind"] == kind == expected.kind
    assert from_json["probabilities"] == expected.probabilities
    assert from_json["dimensions"] == expected.dimensions
    head, line = csv.reader(io.StringIO(run(*options, "csv", cwd=work).stdout))
    assert line[head.index("kind")] == kind
    head, line = run(*options, "table", cwd=work).stdout.splitlines()
    assert line.startswith("a.wav") and kind in line
    if kind == "regression":
        assert head.split() == ["file", "seconds", "kind", "LABEL_0", "file"]
        assert line.split()[-2:] == [f"{value:.2f}" for value in expected.dimensions.values()]
    else:
        likely = [f"{n} {p:.2f}" for n, p in expected.probabilities.items() if p >= 0.5]
        assert len(likely) > 0 and all(name[:4] in line for name in likely[:1])
    said = run(*options, "paper", cwd=work, check=2).stderr
    assert ("no emotion head" if kind == "regression" else f"this model is {kind}") in said


def test_of_one_label_the_kind_is_a_column_of_csv_and_not_of_the_table(work):
    head, line = csv.reader(io.StringIO(run("a.wav", "--model", "model", "--format", "csv", cwd=work).stdout))
    assert line[head.index("kind")] == "single-label"
    assert "kind" not in run("a.wav", "--model", "model", cwd=work).stdout


@pytest.mark.parametrize("format", ["table", "json", "jsonl", "csv", "paper"])
def test_an_output_file_is_what_standard_output_would_have(work, tmp_path, format):
    printed = run(*MIXED, "--model", "model", "--format", format, cwd=work, check=1).stdout
    output = tmp_path / "out"
    done = run(*MIXED, "--model", "model", "--format", format, "--output", output, cwd=work, check=1)
    assert done.stdout == "" and output.read_text() == printed != ""
    assert list(tmp_path.iterdir()) == [output]
    assert output.stat().st_mode & 0o777 == 0o666 & ~current_umask()


@pytest.mark.parametrize("through", ["/dev/stdout", "/proc/self/fd/1", "link"])
def test_standard_output_by_name_is_written_to_where_it_stands(work, tmp_path, through):
    (tmp_path / "link").symlink_to("/dev/fd/1")
    output = tmp_path / "link" if through == "link" else through
    printed = run("a.wav", "--model", "model", "--format", "jsonl", "--output", output, cwd=work).stdout
    assert json.loads(printed)["file"] == "a.wav" and (tmp_path / "link").is_symlink()


def test_a_log_that_is_appended_to_keeps_what_it_has_and_pipes_get_all(work, tmp_path):
    options = "a.wav c.wav --model model --format jsonl --output"
    log = tmp_path / "log"
    log.write_text("before\n")
    done = run_anew(
        f"SCRIPT {options} /dev/stdout >> {log}; SCRIPT {options} >(cat >> {log}; sleep 0.1); sleep 1", work
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = log.read_text().splitlines()
    assert lines[0] == "before" and [json.loads(x)["file"] for x in lines[1:]] == ["a.wav", "c.wav"] * 2


def test_a_named_pipe_and_a_device_stay_what_they_are(work, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    command = f"SCRIPT {'a.wav ' * 30} --model model --format jsonl --output {pipe}"
    done = run_anew(f"head -n 1 {pipe} & {command}; S=$?; wait; exit $S", work)
    assert json.loads(done.stdout)["file"] == "a.wav" and pipe.is_fifo()
    assert (done.returncode, done.stderr) == (0, ""), "a reader that has enough is no error"
    null = Path("/dev/null")
    if not os.getuid():  # who could replace the machine's own
        null = tmp_path / "null"
        os.mknod(null, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    before = null.stat()
    run("a.wav", "--model", "model", "--output", null, cwd=work)
    after = null.stat()
    assert (after.st_mode, after.st_rdev, after.st_ino) == (before.st_mode, before.st_rdev, before.st_ino)


def test_no_room_for_the_output_is_one_line_that_names_it(work):
    done = run("a.wav", "--model", "model", "--format", "csv", "--output", "/dev/full", cwd=work, check=2)
    assert done.stderr.startswith("error: /dev/full: cannot be written: No space left on device")
    assert len(done.stderr.splitlines()) == 1


def test_an_output_is_refused_before_any_work_and_predictions_of_before_are_replaced(work, tmp_path):
    (tmp_path / "model").symlink_to(work / "model")
    done = run("a.wav", "--model", tmp_path / "nowhere", "--output", tmp_path, cwd=work, check=2)
    assert "is a folder" in done.stderr and "nowhere" not in done.stderr
    for output in (tmp_path / "model" / "predictions.json", tmp_path / "new.wav"):
        for _ in range(1 + (output.suffix != ".wav")):
            run("a.wav", "--model", tmp_path / "model", "--format", "json", "--output", output, cwd=work)
        assert json.loads(output.read_text())[0]["file"] == "a.wav"
        output.unlink()


def current_umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def test_a_run_that_fails_keeps_the_old_output_file(work, tmp_path):
    output = tmp_path / "out.json"
    output.write_text("old")
    options = ("--format", "json", "--output", output)
    run("a.wav", "--model", "model", "--max-seconds", "nan", *options, cwd=work, check=2)
    assert output.read_text() == "old" and list(tmp_path.iterdir()) == [output]


def test_a_reader_that_has_enough_is_no_error(work):
    done = run_anew(f"SCRIPT {'a.wav ' * 30} --model model --format jsonl | head -n 1", work)
    assert json.loads(done.stdout)["file"] == "a.wav"
    assert (done.returncode, done.stderr) == (0, "")


def test_names_that_are_not_utf8_or_command_a_terminal_do_no_harm(work, tmp_path):
    sound = (work / "a.wav").read_bytes()
    names = [b"\xff.wav", b"\x1b[31m.wav", "ü\n.wav".encode()]
    for name in names:
        (tmp_path / os.fsdecode(name)).write_bytes(sound)
    options = ("--model", work / "model", "--format")
    table = run(tmp_path, *options, "table", encoding="ascii").stdout
    assert "\x1b" not in table and len(table.splitlines()) == 4
    done = run(tmp_path, *options, "json", encoding="ascii")
    assert sorted(os.fsencode(Path(r["file"]).name) for r in json.loads(done.stdout)) == sorted(names)
    lines = list(csv.DictReader(io.StringIO(run(tmp_path, *options, "csv").stdout, newline="")))
    assert len(lines) == 3 and all(not line["error"] for line in lines)


def test_help_shows_the_commands_and_every_option():
    done = run("--help")
    assert "python examples/infer.py speech.wav recordings/ test.csv --model runs/demo/best" in done.stdout
    for option in ("--model", "--format", "--output", "--device", "--workers", "--max-seconds", "--root"):
        assert option in done.stdout


def test_scores_that_overflow_are_null_in_json_and_empty_in_csv():
    nan, inf = float("nan"), float("inf")
    found = Prediction("a.wav", 1.0, emotion="sad", probabilities={"sad": nan}, dimensions={"arousal": -inf})
    labels = Labels.of(emotions=["sad"], dimensions=["arousal"])
    labels = SimpleNamespace(
        labels=labels, emotions=["sad"], dimensions=["arousal"], vocabulary=None, speakers=[], kind="single-label"
    )

    def shown(form: str) -> str:
        return "".join(FORMATS[form](iter([as_record("a.wav", found)]), labels))

    def refuse(constant: str):
        raise AssertionError(constant)

    record = json.loads(shown("jsonl"), parse_constant=refuse)
    assert record["probabilities"] == {"sad": None} and record["dimensions"] == {"arousal": None}
    assert json.loads(shown("json"), parse_constant=refuse) == [record]
    (row,) = csv.DictReader(io.StringIO(shown("csv")))
    assert (row["p_sad"], row["arousal"]) == ("", "")
    assert "sad nan" in shown("table") and shown("paper").endswith(" 0  nan\n")


def test_a_row_reads_back_whatever_the_transcript_and_the_name_hold():
    text = 'a\r\n"b",\rc\u2028'
    found = Prediction(text, 1.0, emotion=text, probabilities={text: 1.0}, transcript=text)
    labels = Labels.of(emotions=[text])
    labels = SimpleNamespace(labels=labels, emotions=[text], dimensions=[], vocabulary=None, speakers=[])
    shown = "".join(comma_separated(iter([as_record(text, found)]), labels))
    (row,) = csv.DictReader(io.StringIO(shown, newline=""))
    assert row["file"] == row["emotion"] == row["transcript"] == text and row[f"p_{text}"] == "1.0"

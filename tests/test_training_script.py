"""examples/train_iemocap.py as people run it, on real processes (D1, N6, N7)."""

import csv
import json
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
from safetensors.torch import load_file
from toy import toy_recognizer, write_corpus

import ser
from ser.cli import execute
from ser.cli.train import emotions_of_init
from ser.data.manifest import read_manifest
from ser.data.text import Vocabulary
from ser.errors import ConfigError
from ser.folder import labels_of
from ser.train.config import TrainConfig

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "train_iemocap.py"
QUICK = "--epochs 2 --effective-batch 4 --micro-batch 1 --rate 1e-3 --beta 0.1 --log-every 2"

# Loaded by every process before anything else: a connection to another machine is refused and noted.
NO_NETWORK = """
import os, socket
connect = socket.socket.connect
def guarded(self, address):
    host = str(address[0]) if isinstance(address, tuple) else "local"
    if host not in ("local", "127.0.0.1", "::1", "localhost", socket.gethostname()):
        with open(os.environ["NETWORK_LOG"], "a") as log:
            log.write(f"{address}\\n")
        raise ConnectionRefusedError(f"outside connection to {address}")
    return connect(self, address)
socket.socket.connect = guarded
"""


def run(*arguments: str, cwd: Path, environment=None, script: Path = SCRIPT, torchrun: int = 0):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={torchrun}"] if torchrun else []
    command = [sys.executable, *launcher, str(script), *arguments]
    settings = os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {})
    return subprocess.run(command, cwd=cwd, env=settings, capture_output=True, text=True, timeout=240, check=False)


def call(arguments: str, folder: Path, monkeypatch) -> None:
    """The script's `main` in this process and that folder, where no process of its own is needed."""
    monkeypatch.chdir(folder)
    execute("train", arguments.split())


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A corpus, and a tiny model folder to start from."""
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, 9)
    write_corpus(folder, 5, name="valid", seed=1)
    toy_recognizer().save(folder / "init")
    return folder


def test_torchrun_trains_on_two_processes_and_the_model_infers_without_any_outside_connection(corpus, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(NO_NETWORK)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    guard = {"PYTHONPATH": path, "NETWORK_LOG": str(tmp_path / "connections")}
    done = run(
        *f"--train {corpus}/train.csv --valid {corpus}/valid.csv --init {corpus}/init".split(),
        *f"{QUICK} --out {tmp_path}/run --allow-overlap speakers".split(),
        cwd=tmp_path,
        environment=guard,
        torchrun=2,
    )
    assert done.returncode == 0, done.stderr
    assert "2 processes on cpu" in done.stderr
    assert done.stderr.count("valid epoch 1 ") == 1, "one rank speaks"
    assert "\r" not in done.stderr and "%|" not in done.stderr, "no progress bar where there is no terminal"

    entries = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [e["step"] for e in entries if e["kind"] == "train"] == [2, 4, 6]
    train = next(e for e in entries if e["kind"] == "train")
    for name in ("loss_emotion", "loss_ctc", "loss_speaker", "rate", "grad_norm", "utterances_per_second"):
        assert train[name] > 0, name
    assert {"padding", "memory_gib"} <= train.keys()
    settings = json.loads((tmp_path / "run/config.json").read_text())
    assert settings["effective_batch"] == 4 and settings["labels"] == ["angry", "happy", "neutral", "sad"]

    infer = run(
        str(corpus / "valid0.wav"), "--model", str(tmp_path / "run/best"), "--format", "json",
        cwd=tmp_path, environment=guard, script=SCRIPT.with_name("infer.py"),
    )  # fmt: skip
    assert infer.returncode == 0, infer.stderr
    assert json.loads(infer.stdout)[0]["emotion"] in settings["labels"]
    assert not (tmp_path / "connections").exists(), (tmp_path / "connections").read_text()


def test_one_process_continues_a_run_where_it_was_and_matches_the_uninterrupted_one(
    corpus, tmp_path, monkeypatch, capsys
):
    arguments = f"--train {corpus}/train.csv --init {corpus}/init {QUICK} --save-every 1 --keep 9".split()
    assert run(*arguments, "--out", "whole", cwd=tmp_path).returncode == 0
    # As a kill after the second update leaves it.
    (tmp_path / "part/checkpoints").mkdir(parents=True)
    for name in ("config.json", "metrics.jsonl", "checkpoints/step-00000002"):
        (tmp_path / "whole" / name).rename(tmp_path / "part" / name)
    resumed = run(*arguments, "--out", "part", cwd=tmp_path)
    assert resumed.returncode == 0 and "at update 2 of 6" in resumed.stderr, resumed.stderr
    for name in ("model", "optimizer"):
        first, second = (
            load_file(tmp_path / run_ / f"checkpoints/step-00000006/{name}.safetensors")
            for run_ in ("whole", "part")
        )
        assert all((first[key] == second[key]).all() for key in first)

    # Once more, in this process: it ends as a success does, without an update.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train_iemocap.py", *arguments, "--out", "part", "--threads", "1"])
    execute("train", sys.argv[1:])
    assert "is finished, nothing is left to do; it ended at update 6 of 6" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--rate", "0.1", "--resume-from", "step-00000004"])
    with pytest.raises(ser.SerError, match="--allow-changes rate if that is meant"):
        execute("train", sys.argv[1:])
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--allow-changes", "rate"])
    execute("train", sys.argv[1:])
    said = capsys.readouterr().err
    assert "rate: 0.001 then, 0.1 now" in said and "is resumed at update 4 of 6, from step-00000004" in said
    assert "step-00000006 is set aside as aside-step-00000006" in said


def test_the_paper_s_three_columns_and_another_corpus_s_names_train(corpus, tmp_path, monkeypatch):
    with (corpus / "train.csv").open() as file:
        rows = list(csv.DictReader(file))
    codes = {"neutral": "e0", "happy": "e1", "angry": "e2", "sad": "e3"}
    with (tmp_path / "paper.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file", "emotion", "transcript"])
        table.writerows([row["file"], codes[row["emotion"]], row["text"]] for row in rows)
    options = "--epochs 1 --build-vocab --columns text=transcript --verbose"
    call(f"--train paper.csv --root {corpus} --init small --out run {options}", tmp_path, monkeypatch)
    assert ser.load(tmp_path / "run/best").emotions == ["angry", "happy", "neutral", "sad"]
    assert ser.load(tmp_path / "run/best").vocabulary.tokens[-2:] == ("A", "B")


def with_cells(corpus, path: Path, column: str, cells: dict[int, str], name: str | None = None) -> Path:
    """The corpus's training manifest with other cells in some rows of a column, which may get another name."""
    with (corpus / "train.csv").open() as file:
        rows = list(csv.DictReader(file))
    for i, cell in cells.items():
        rows[i][column] = cell
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow([name if name and key == column else key for key in rows[0]])
        table.writerows(row.values() for row in rows)
    return path


def test_two_spellings_of_a_class_are_refused_before_anything_is_trained(corpus, tmp_path, monkeypatch, capsys):
    with_cells(corpus, tmp_path / "t.csv", "emotion", {0: "Angry", 1: "happy\u200b"})
    options = f"--root {corpus} --init {corpus}/init {QUICK} --out run"
    with pytest.raises(ser.SerError) as caught:
        call(f"--train t.csv {options}", tmp_path, monkeypatch)
    assert "'Angry' (train 1) and 'angry' (train 2)" in str(caught.value)
    assert r"'happy\u200b' (train 1) and 'happy' (train 1)" in str(caught.value)
    assert not (tmp_path / "run").exists()
    assert "happy 1" in capsys.readouterr().err, "the classes were shown"
    with pytest.raises(ser.SerError, match=r"'happy' \(valid 1\)") as caught:  # across the sets
        with_cells(corpus, tmp_path / "u.csv", "emotion", {1: "Happy", 5: "Happy"})
        call(f"--train u.csv --valid {corpus}/valid.csv --allow-overlap speakers {options}", tmp_path, monkeypatch)
    call(f"--train t.csv {options} --heads ctc", tmp_path, monkeypatch)  # where no emotion is trained
    assert ser.load(tmp_path / "run/best").emotions == []


def test_a_map_makes_them_one_and_run_and_card_keep_it(corpus, tmp_path, monkeypatch, capsys):
    with_cells(corpus, tmp_path / "t.csv", "emotion", {0: "Angry", 1: "xxx", 2: "NA"})
    (tmp_path / "labels.json").write_text('{"Angry": "angry", "xxx": null}')
    options = f"--train t.csv --root {corpus} --init {corpus}/init {QUICK} --out run"
    call(f"{options} --map labels.json", tmp_path, monkeypatch)
    said = capsys.readouterr().err
    assert "--map, emotion: 'Angry' is 'angry' (1), 'xxx' is no label (1)" in said
    assert "emotion 'NA' (1)" in said and "2 without emotion" in said
    assert ser.load(tmp_path / "run/best").emotions == ["angry", "happy", "neutral", "sad"]
    record = json.loads((tmp_path / "run/best/training.json").read_text())
    assert record["settings"]["train"]["label_map"] == {"Angry": "angry", "xxx": None}
    assert record["trained_on"]["per_emotion"] == {"angry": 3, "happy": 1, "neutral": 1, "sad": 2}
    call(f"{options} --map labels.json", tmp_path, monkeypatch)
    assert "is finished" in capsys.readouterr().err, "the same command finds the run again"


def test_a_column_in_another_case_is_pointed_at_and_one_class_alone_is_said(corpus, tmp_path, monkeypatch, capsys):
    with_cells(corpus, tmp_path / "t.csv", "emotion", {}, name="Emotion")
    options = f"--root {corpus} --init {corpus}/init --epochs 1 --effective-batch 4"
    call(f"--train t.csv {options} --out run", tmp_path, monkeypatch)
    said = capsys.readouterr().err
    assert "'Emotion' is not read; did you mean --columns emotion=Emotion?" in said and "9 without emotion" in said
    call(f"--train t.csv {options} --out one --columns emotion=Emotion --map labels.json".replace(
        "labels.json", '{"happy":"angry","sad":"angry","neutral":"angry"}'), tmp_path, monkeypatch)  # fmt: skip
    said = capsys.readouterr().err
    assert "did you mean" not in said and "warning: train has only one emotion, 'angry'" in said


def test_the_label_set_is_that_of_init_where_it_has_every_training_label(corpus, tmp_path, capsys, monkeypatch):
    write_corpus(tmp_path, 6)
    manifest = tmp_path / "train.csv"
    manifest.write_text("".join(line for line in manifest.open() if ",sad," not in line))
    call(f"--train {manifest} --init {corpus}/init {QUICK} --out run", tmp_path, monkeypatch)
    assert ser.load(tmp_path / "run/best").emotions == ["angry", "happy", "neutral", "sad"]
    assert "newly initialised" not in capsys.readouterr().err, "the head was kept"


@pytest.mark.parametrize(
    ("renamed", "told"),
    [
        ({}, ""),
        ({"sad": "angry"}, "warning: train lacks emotions that --init has, and teaches nothing of them: 'sad'"),
        ({"sad": "Sadd"}, "that --init lacks, so its emotion head is not kept: 'Sadd' (did you mean 'sad'?)"),
    ],
)
def test_what_becomes_of_the_emotions_of_init_is_said(corpus, renamed, told):
    rows = [replace(u, emotion=renamed.get(u.emotion, u.emotion)) for u in read_manifest(corpus / "train.csv")]
    known = labels_of(corpus / "init", "emotion")
    assert known == ["angry", "happy", "neutral", "sad"] and labels_of("small", "emotion") == []
    lines = emotions_of_init(known, rows)
    assert len(lines) == bool(told) and told in "".join(lines)
    assert not emotions_of_init([], rows), "a preset knows none"


def test_texts_follow_the_case_of_the_vocabulary_of_init_and_every_change_is_said(
    corpus, tmp_path, capsys, monkeypatch
):
    recognizer = toy_recognizer(heads=("emotion", "ctc"))
    letters = [token.lower() for token in recognizer.vocabulary.tokens]
    lower = Vocabulary({token: i for i, token in enumerate(letters)})
    recognizer.labels = replace(recognizer.labels, vocabulary=lower)
    recognizer.save(tmp_path / "lower")
    rows = [row for row in csv.DictReader((corpus / "train.csv").open()) if row["text"]]
    for name in ("train", "valid"):
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["file", "emotion", "text"])
            parts = rows[:4] if name == "train" else rows[4:7]
            writer.writerows([f"{corpus}/{r['file']}", r["emotion"], f"{r['text'].title()} 7"] for r in parts)
    call("--train train.csv --valid valid.csv --init lower --out run --epochs 1 --effective-batch 4", tmp_path,
         monkeypatch)  # fmt: skip
    said = capsys.readouterr().err
    assert "the vocabulary has lower-case letters alone: 4 texts are written so" in said
    assert "characters outside the vocabulary, removed: '7' x4" in said
    (entry,) = (e for e in map(json.loads, (tmp_path / "run/metrics.jsonl").open()) if e["kind"] == "valid")
    assert (entry["references_recased"], entry["characters_outside_vocabulary"]) == (3, 3)
    model = ser.load(tmp_path / "run/last")
    assert list(model.vocabulary.tokens) == letters and entry["words"] >= 3


def test_training_texts_with_spaces_need_a_word_delimiter(corpus, tmp_path, monkeypatch):
    (tmp_path / "vocab.json").write_text(json.dumps({"<pad>": 0, "A": 1, "B": 2}))
    with pytest.raises(ConfigError, match=r"delimiter '\|' is not in the vocabulary of 3 symbols, and a training"):
        call(f"--train {corpus}/train.csv --init small --vocab vocab.json --out run", tmp_path, monkeypatch)


def test_dimensions_a_weighted_layer_sum_and_attentive_pooling_train_on_two_processes_and_are_shown(
    corpus, tmp_path
):
    options = "--heads emotion,ctc,dimensions --layers weighted --pooling attentive --columns dominance=valence"
    done = run(
        *f"--train {corpus}/train.csv --valid {corpus}/valid.csv --init {corpus}/init {QUICK} --out run".split(),
        *f"{options} --allow-overlap speakers --metric ccc".split(),
        cwd=tmp_path,
        torchrun=2,
    )
    assert done.returncode == 0, done.stderr
    assert "1 dimensions" in done.stderr and "ccc_arousal" in done.stderr
    weights = load_file(tmp_path / "run/best/model.safetensors")
    assert weights["layer_weights"].any(), "learnt"
    assert any(name.startswith("pooling.") for name in weights)
    file = str(corpus / "valid0.wav")
    shown = run(file, "--model", "run/best", cwd=tmp_path, script=SCRIPT.with_name("infer.py")).stdout
    table, dimensions = shown.split(), ["arousal", "dominance"]
    assert table[:5] == ["file", "seconds", "emotion", *dimensions]
    shown = run(file, "--model", "run/best", "--format", "csv", cwd=tmp_path, script=SCRIPT.with_name("infer.py"))
    (row,) = csv.DictReader(shown.stdout.splitlines())
    assert all(abs(float(row[name])) < 100 for name in dimensions)


def test_help_explains_every_setting_with_its_default(capsys):
    with pytest.raises(SystemExit):
        execute("train", ["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for field in fields(TrainConfig):
        assert (f"--{field.name.replace('_', '-')}" in shown) != field.metadata["hidden"]
        if field.type != "bool" and not field.metadata["hidden"]:
            assert f"(default: {'none' if field.default == () else field.default})" in shown
    assert "torchrun --standalone" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--train missing.csv", "missing.csv"),
        ("--train {corpus}/train.csv --init smal", "did you mean 'small'"),
        ("--train {corpus}/train.csv --init {corpus}", "config.json"),
        (
            "--train {corpus}/train.csv --init {corpus}/init --effective-batch 8 --micro-batch 3",
            "effective_batch 8",
        ),
        ("--train {corpus}/train.csv --init {corpus}/init --heads emotion,asr", "there are emotion, ctc, speaker"),
        ("--train {corpus}/train.csv --init {corpus}/init --device tpu", "expected auto, cpu, cuda"),
        ("--train {corpus}/train.csv --valid {corpus}/valid.csv --init {corpus}/init", "--allow-overlap speakers"),
        ("--train {corpus}/train.csv --columns text=words --init {corpus}/init", "words"),
        ("--train {corpus} --init {corpus}/init", "is a folder, and has no iemocap4.csv as preparing writes it"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_clear_line(corpus, tmp_path, monkeypatch, arguments, message):
    with pytest.raises(ser.SerError) as caught:
        call(f"{arguments.format(corpus=corpus)} --out run", tmp_path, monkeypatch)
    assert message in str(caught.value)
    assert not (tmp_path / "run/config.json").exists(), "nothing was started"


def test_data_without_labels_are_said_to_be_so(corpus, tmp_path, monkeypatch):
    with (corpus / "train.csv").open() as file:
        names = [row["file"] for row in csv.DictReader(file)]
    (tmp_path / "t.csv").write_text("\n".join(["file", *names, ""]))
    with pytest.raises(ConfigError, match="no training utterance has emotion or text; see --columns"):
        call(f"--train t.csv --root {corpus} --init {corpus}/init --out run", tmp_path, monkeypatch)


def test_the_script_ends_with_one_line_and_no_traceback(tmp_path):
    done = run("--train", "missing.csv", "--out", "run", cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")], done.stderr

"""Folds in training, evaluation and cross-validation: what is trained on what, and what is pooled (N5)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from toy import toy_recognizer, write_corpus

from ser.data.manifest import read_manifest
from ser.train.config import TrainConfig, paper_settings
from ser.train.report import Outcomes

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
FOLDS = ["--protocol", "kfold:speaker:3", "--shares", "transcripts"]
QUICK = ["--epochs", "1", "--effective-batch", "4", "--rate", "1e-3"]


def run(script: str, *arguments, cwd: Path):
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240, check=False)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, 13)
    toy_recognizer().save(folder / "init")
    return folder


@pytest.fixture(scope="module")
def crossed(corpus, tmp_path_factory):
    """All three folds, and the same command once more."""
    folder = tmp_path_factory.mktemp("crossed")
    options = ["--data", corpus / "train.csv", *FOLDS, "--init", corpus / "init", "--out", "cv", "--resamples", 20]
    runs = [run("crossval_iemocap.py", *options, *QUICK, cwd=folder) for _ in range(2)]
    for done in runs:
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "cv", runs


def test_every_utterance_is_judged_once_by_a_model_that_was_not_trained_on_it(corpus, crossed):
    folder, _ = crossed
    rows = read_manifest(corpus / "train.csv")
    speakers = {u.id: u.speaker for u in rows}
    seen = []
    for fold in ("s0", "s1", "s2"):
        judged = Outcomes.read(folder / fold / "predictions.csv").text["id"]
        assert {speakers[name] for name in judged} == {fold}
        settings = json.loads((folder / fold / "run/config.json").read_text())
        assert settings["protocol"] == "kfold-speaker-3" and settings["fold"] == fold
        seen += list(judged)
    assert sorted(seen) == sorted(speakers)


def test_pooled_figures_are_right_over_all_folds_divided_by_all_utterances(crossed):
    folder, _ = crossed
    found = json.loads((folder / "report.json").read_text())
    parts = [Outcomes.read(folder / fold / "predictions.csv") for fold in found["folds"]]
    right = sum((part.text["emotion"] == part.text["predicted"]).sum() for part in parts)
    assert found["utterances"] == 13 and found["figures"]["accuracy"]["value"] == pytest.approx(right / 13)
    assert found["over_folds"]["accuracy"]["mean"] == pytest.approx(
        sum((p.text["emotion"] == p.text["predicted"]).mean() for p in parts) / 3
    )
    assert found["weights"] == "best", "chosen on the next speaker, who is not tested"
    assert found["repeat"]["manifest_sha256"] and found["repeat"]["init_sha256"] and found["repeat"]["commit"]
    text = (folder / "report.md").read_text()
    for piece in ("| s0 |", "| pooled | 13 |", "mean ± spread", "What the parts share", "To repeat"):
        assert piece in text
    assert (folder / "confusion.png").is_file()


def test_the_same_command_trains_no_fold_again(crossed):
    _, (first, second) = crossed
    assert "done already" not in first.stdout and second.stdout.count("done already") == 3


def test_a_fold_that_was_begun_with_other_settings_is_refused_and_the_differences_are_listed(corpus, crossed):
    folder, _ = crossed
    options = ["--data", corpus / "train.csv", *FOLDS, "--init", corpus / "init", "--out", folder, *QUICK]
    done = run("crossval_iemocap.py", *options, "--alpha", 0, cwd=folder)
    assert done.returncode != 0 and "begun with other settings" in done.stderr and "--alpha" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_fold_s_report_says_its_protocol_and_what_it_shares_with_training(crossed):
    folder, _ = crossed
    found = json.loads((folder / "s1/report.json").read_text())
    assert found["protocol"] == "kfold-speaker-3" and found["fold"] == "s1" and found["part"] == "test"
    assert found["shared_with_training"]["speakers"] == 0.0 and found["shared_with_training"]["transcripts"] > 0
    assert "seen text: seen" in found["parts"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--protocol kfold:speaker:3", "does not permit this"),
        ("--protocol kfold:speaker:3 --shares transcripts --fold s9", "no fold is called 's9'"),
        ("--protocol kfold:speaker:3 --shares transcripts", "no fold is named"),
        ("--protocol papre10", "did you mean 'paper10'"),
        ("--protocol paper10 --shares speakers", "declares itself"),
        ("--protocol paper10 --fold 01F", "needs the column 'side'"),
        ("--fold s0", "--data needs --protocol"),
    ],
)
def test_a_fold_that_cannot_be_trained_on_is_one_clear_error(corpus, tmp_path, arguments, message):
    fold = [] if "--fold" in arguments or "named" in message else ["--fold", "s0"]
    options = [
        "--data",
        corpus / "train.csv",
        "--init",
        corpus / "init",
        "--out",
        "run",
        *arguments.split(),
        *fold,
    ]
    done = run("train_iemocap.py", *options, cwd=tmp_path)
    assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "run").exists()


def test_the_paper_s_settings_are_those_of_its_text_and_of_its_script():
    text = TrainConfig(**paper_settings())
    assert (text.alpha, text.rate, text.epochs, text.warmup) == (0.1, 5e-5, 100, 0.1)
    assert (text.adam_beta2, text.weight_decay, text.clip) == (0.999, 0.0, 1.0)
    assert (text.batching, text.micro_batch, text.freeze) == ("random", 1, "none")
    assert (text.pooling, text.layers, text.activation_checkpointing) == ("mean", "last", False)
    assert [text.resolved_effective_batch(world) for world in (1, 2)] == [8, 8]
    assert paper_settings(large=True)["alpha"] == 0.01
    assert paper_settings(alpha=0.0)["rate"] == 1e-5 and paper_settings(alpha=0.001)["rate"] == 5e-5
    script = TrainConfig(**paper_settings(script=True))
    assert (script.alpha, script.epochs, script.warmup, script.micro_batch) == (0.2, 200, 0.0, 2)
    assert script.activation_checkpointing and script.batching == "random"
    assert [script.resolved_effective_batch(world) for world in (1, 2)] == [8, 16]


def test_paper_is_a_default_that_what_is_given_beside_it_overrides(corpus, tmp_path):
    options = ["--train", corpus / "train.csv", "--init", corpus / "init", "--out", "run", "--paper"]
    done = run("train_iemocap.py", *options, "--alpha", 0, "--epochs", 1, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    settings = json.loads((tmp_path / "run/config.json").read_text())
    assert (settings["alpha"], settings["rate"], settings["epochs"]) == (0.0, 1e-5, 1)
    assert settings["tags"] == "keep-letters" and settings["batching"] == "random"

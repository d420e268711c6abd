"""Protocols from the command line: prepare, train and evaluate every fold, pool, compare; model cards (N5).

A command is executed in this process where only an answer or an error is wanted.
"""

import copy
import csv
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser
from pathlib import Path

import pytest
from iemocap_tree import needs_iemocap, write_tree
from toy import toy_recognizer, write_corpus

from ser.cli import execute
from ser.cli.crossval import add_arguments, device_shares, parse, read_and_review
from ser.data.manifest import read_manifest
from ser.data.protocols import PROTOCOLS
from ser.data.selection import Selection, selected_data
from ser.errors import ConfigError, ManifestError, SerError
from ser.scores.card import read_record, write_card
from ser.scores.folds import best_on_test, pooled_curve
from ser.scores.report import Outcomes
from ser.train.config import TrainConfig, paper_settings
from ser.train.content import contents
from ser.train.processes import own_run

pytestmark = pytest.mark.slow
FOLDS = ["--protocol", "kfold:speaker:3", "--shares", "transcripts"]
QUICK = ["--epochs", "1", "--effective-batch", "4", "--rate", "1e-3"]
SIDES = [f"0{session}{side}" for session in range(1, 6) for side in "FM"]


def command_line(name: str, *arguments) -> list[str]:
    return [sys.executable, "-m", "ser", name, *map(str, arguments)]


def run(name: str, *arguments, cwd: Path):
    command = command_line(name, *arguments)
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=900, check=False)


def call(name: str, *arguments) -> None:
    """A command in this process."""
    if status := execute(name, [str(a) for a in arguments]):
        raise SystemExit(status)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, 24)
    toy_recognizer(heads=("emotion", "ctc")).save(folder / "init")
    return folder


# ------------------------------------------------------------------------------ the built tree, from end to end


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """One turn of each of the 151 dialogues, with recordings of 0.1 s, prepared: the folder of the manifests."""
    folder = tmp_path_factory.mktemp("iemocap")
    release = write_tree(folder / "release", every=1000, samples=1600)
    done = run("prepare", release, "--out", folder / "data", "--partial", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "data"


def cross_options(prepared, protocol, *options):
    data = ["--data", prepared, "--root", prepared.parent / "release", "--protocol", protocol]
    settings = ["--init", "small", "--epochs", "2", "--rate", "1e-3", "--micro-batch", "8", "--resamples", "20"]
    settings += ["--save-every", "2ep"]
    return [*data, *settings, *options]


@pytest.fixture(scope="module")
def paper10(prepared):
    """All ten folds with the small model."""
    out = prepared.parent / "paper10"
    done = run("crossval", *cross_options(prepared, "paper10", "--out", out), cwd=prepared.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout


@pytest.fixture(scope="module")
def session5(prepared):
    """All five folds, with a speaker head."""
    out = prepared.parent / "session5"
    options = cross_options(prepared, "session5", "--out", out, "--beta", "0.1")
    done = run("crossval", *options, cwd=prepared.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@needs_iemocap
def test_in_paper10_every_utterance_is_judged_once_by_a_model_that_was_not_trained_on_it(prepared, paper10):
    folder, _ = paper10
    utterances = read_manifest(prepared / "iemocap4.csv", root=prepared.parent / "release")
    folds = {fold.name: fold.parts for fold in PROTOCOLS["paper10"].folds(utterances)}
    assert list(folds) == SIDES
    judged = []
    for name, parts in folds.items():
        ids = list(Outcomes.read(folder / name / "predictions.csv").text["id"])
        assert ids == parts["test"] and not set(ids) & set(parts["train"])
        settings = json.loads((folder / name / "run/config.json").read_text())
        assert settings["train"]["fold"] == name and settings["train"]["part"] == "train"
        record = read_record(folder / name / "run/last")
        assert record["trained_on"]["utterances"] == len(parts["train"])
        judged += ids
    assert sorted(judged) == sorted(u.id for u in utterances) and len(judged) > 80


@needs_iemocap
def test_pooled_figures_are_right_over_all_folds_divided_by_all_utterances(paper10):
    folder, shown = paper10
    found = json.loads((folder / "report.json").read_text())
    parts = [Outcomes.read(folder / fold / "predictions.csv") for fold in found["folds"]]
    right = sum((part.text["emotion"] == part.text["predicted"]).sum() for part in parts)
    total = sum(len(part) for part in parts)
    assert found["utterances"] == total and found["figures"]["accuracy"]["value"] == pytest.approx(right / total)
    assert found["over_folds"]["accuracy"]["mean"] == pytest.approx(
        sum((p.text["emotion"] == p.text["predicted"]).mean() for p in parts) / 10
    )
    assert found["weights"] == "last", "the best would be chosen on what is tested"
    manifest = folder.parent / "data/iemocap4.csv"
    assert found["repeat"]["data"]["sha256"] == hashlib.sha256(manifest.read_bytes()).hexdigest()
    assert found["repeat"]["commit"] and found["repeat"]["versions"] and found["repeat"]["command"]
    assert found["repeat"]["training_options"][:2] == ["--epochs", "2"] and found["repeat"]["init"] == "small"
    text = (folder / "report.md").read_text()
    for piece in ("| 01F |", f"| pooled | {total} |", "mean ± spread", "What the parts share", "To repeat"):
        assert piece in text
    assert (folder / "confusion.png").is_file()
    # Both speakers of a test side are in training, and the report says so.
    for line in [line for line in shown.splitlines() if line[:3] in SIDES][:10]:
        assert line.split()[4:6] == ["100.0", "%"], line


@needs_iemocap
def test_the_best_on_test_stands_beside_the_last_weights_and_is_marked(paper10):
    folder, _ = paper10
    found = json.loads((folder / "report.json").read_text())
    runs = [folder / fold / "run" for fold in SIDES]
    right = total = 0
    for path in runs:
        valid = [e for e in map(json.loads, (path / "metrics.jsonl").open()) if e["kind"] == "valid"]
        assert [e["epoch"] for e in valid] == [0, 1]
        right += round(max(e["accuracy"] for e in valid) * valid[0]["emotion_utterances"])
        total += valid[0]["emotion_utterances"]
    assert found["best_on_test"] == best_on_test(runs)
    assert found["best_on_test"]["accuracy"] == pytest.approx(right / total)
    assert found["best_on_test"]["accuracy"] >= found["figures"]["accuracy"]["value"]
    assert "Best on test" in (folder / "report.md").read_text()
    assert [row["epoch"] for row in found["curve"]] == [1, 2]
    assert found["curve"][1]["accuracy"] == pytest.approx(found["figures"]["accuracy"]["value"]), "the test part's"
    log = (folder / "01F/train.log").read_text()
    assert "was chosen on the test part, so its figure is optimistic" in log


@needs_iemocap
def test_the_same_command_trains_no_fold_again_and_other_settings_are_refused_with_the_differences(
    prepared, paper10, capsys, monkeypatch
):
    folder, _ = paper10
    options = cross_options(prepared, "paper10", "--out", folder)
    call("crossval", *options)
    assert capsys.readouterr().out.count("done already") == 10
    with pytest.raises(ConfigError, match=r"begun with other settings(.|\n)*--alpha"):
        call("crossval", *options, "--alpha", 0)
    whole = (folder / "02M/report.json").read_text(), (folder / "03F/predictions.csv").read_text()
    (folder / "02M/report.json").write_text(whole[0][:100])
    (folder / "03F/predictions.csv").write_text(whole[1][: len(whole[1]) // 2])
    call("crossval", *options)
    assert capsys.readouterr().out.count("done already") == 8, "what was cut is judged again, and not trained"
    assert ((folder / "02M/report.json").read_text(), (folder / "03F/predictions.csv").read_text()) == whole
    assert (folder / "02M/train.log").read_text().count("nothing is left to do") == 1
    settings = folder / "04F/settings.json"
    text = settings.read_text()
    settings.write_text(text[:50])
    with pytest.raises(ConfigError, match=r"04F/settings\.json: is damaged"):
        call("crossval", *options)
    settings.write_text(text)


def test_a_fold_that_never_began_to_train_is_begun_with_other_settings_and_one_that_did_with_some(
    corpus, tmp_path, capsys
):
    options = ["--data", corpus / "train.csv", *FOLDS, "--out", tmp_path / "out"]
    options += ["--init", corpus / "init", *QUICK, "--resamples", 5]
    with pytest.raises(ConfigError, match=r"s0: the training failed(.|\n)*unrecognized arguments: --eppochs 2"):
        call("crossval", *options, "--eppochs", 2)
    assert not (tmp_path / "out/s1/train.log").exists(), "nor did any other"
    call("crossval", *options, "--folds", "s0")
    same = ["--effective-batch=4", "--rate", "1e-3", "--epochs", "1", "--micro-batch", 2, "--processes", 2]
    call("crossval", *options[: -len(QUICK) - 2], *same, "--resamples", 5, "--folds", "s0")
    assert "s0: done already" in capsys.readouterr().out, (
        "what may change, for want of memory say, may change here"
    )
    repeat = json.loads((tmp_path / "out/report.json").read_text())["repeat"]
    weights = hashlib.sha256((corpus / "init/model.safetensors").read_bytes()).digest()
    assert repeat["init_sha256"] == hashlib.sha256(b"model.safetensors" + weights).hexdigest()


@needs_iemocap
def test_a_speaker_head_is_not_scored_on_strangers_but_on_turns_held_out_of_training(session5):
    found = json.loads((session5 / "report.json").read_text())
    assert "speaker_accuracy" not in found["figures"] and found["judged"]["speaker"] == 0
    known = found["speaker_accuracy_on_known_turns"]
    assert known["utterances"] == sum(
        json.loads((session5 / fold / "report.json").read_text())["known_turns"]["judged"]["speaker"]
        for fold in found["folds"]
    )
    assert known["utterances"] >= 30 and "scored on" in (session5 / "report.md").read_text()
    record = read_record(session5 / "1/run/best")
    assert record["speakers_known"] == record["trained_on"]["speakers"], "those of the sessions that train"
    assert {e["selection"]["part"] for e in record["evaluations"]} == {"valid", "test", "known"}
    assert "held out to score the speaker head" in (session5 / "1/train.log").read_text()
    assert found["weights"] == "best" and "best_on_test" not in found


# -------------------------------------------------------------------------------------------- several corpora


def two_corpora(folder: Path, **names: dict) -> list:
    """Options of a cross-validation over corpora a and b, whose emotions have these names, and their own maps."""
    items = []
    for name, (new, own) in names.items():
        path = write_corpus(folder / name, 8, speakers=2)
        text = path.read_text()
        for emotion in new:
            text = text.replace(emotion, new[emotion])
        path.write_text(text)
        items.append({"path": str(path), "name": name, "map": own})
    (folder / "list.json").write_text(json.dumps(items))
    toy_recognizer(heads=["emotion"]).save(folder / "init")
    words = ["--data", folder / "list.json", "--protocol", "kfold:corpus:2", "--shares", "transcripts"]
    return [*words, "--init", folder / "init", "--out", folder / "out", *QUICK, "--resamples", 5]


def test_a_fold_with_usual_names_is_not_done_already_without_them(tmp_path, capsys):
    options = two_corpora(tmp_path, a=({"angry": "anger"}, {}), b=({}, {}))
    call("crossval", *options, "--folds", "a")
    said = capsys.readouterr().out
    assert "anger (2) is angry" in said and "all folds: 16 utterances; emotions angry 4, happy 4" in said
    with pytest.raises(ConfigError, match=r"out/a: was begun with other settings(.|\n)*'no_usual_names': True"):
        call("crossval", *options, "--folds", "a", "b", "--no-usual-names")
    settings = json.loads((tmp_path / "out/a/settings.json").read_text())
    run = json.loads((tmp_path / "out/a/run/config.json").read_text())
    rows = Selection.from_dict(run["train"]).read()
    assert settings["content"] == contents(rows), "what is compared has the names that training has"
    call("crossval", *options, "--folds", "a", "b")
    said = capsys.readouterr().out
    assert "a: done already" in said and "corpus: a " in said and "corpus: b " in said


def reviewed(options: list, *more) -> list[str]:
    """The emotions that a cross-validation finds, in order."""
    parser = ArgumentParser()
    add_arguments(parser)
    arguments = parse(parser, [str(word) for word in (*options, *more)])
    return sorted({str(u.emotion) for u in read_and_review(arguments, selected_data(arguments))})


def test_names_that_training_unites_or_a_manifests_own_map_means_are_accepted_by_cross_validation(tmp_path):
    one, other = {"angry": "anger", "sad": "odd"}, {"angry": "Anger", "sad": "Odd"}
    options = two_corpora(tmp_path, a=(one, {}), b=(other, {"Odd": "Odd"}))
    assert reviewed(options) == ["Odd", "angry", "happy", "neutral", "odd"]
    for unchanged in (["--heads", "ctc"], ["--heads=speaker"], ["--evaluate-only", "models"]):
        assert {"anger", "Anger"} < set(reviewed(options, *unchanged)), "no emotion is learnt"
    with pytest.raises(ManifestError, match=r"'anger' .* and 'Anger'"):
        reviewed(options, "--no-usual-names")


# ------------------------------------------------------------------------------------------------ model cards


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """A run on one fold, with a speaker head."""
    out = tmp_path_factory.mktemp("run") / "run"
    options = ["--data", corpus / "train.csv", *FOLDS, "--fold", "s0", "--init", corpus / "init"]
    call("train", *options, "--out", out, *QUICK, "--data-licence", "CC0", "--weights-licence", "MIT")
    return out


def test_every_model_has_a_card_with_data_figures_labels_limits_and_licences(corpus, trained):
    for name in ("best", "last"):
        text, record = (trained / name / "README.md").read_text(), read_record(trained / name)
        for piece in (
            "angry, happy, neutral, sad", "kfold:speaker:3, fold s0", "8 utterances, 0.00 h, 1 speakers",
            "| accuracy (WA) |", "word error rate", "95 %", "Use and limits", "Not for decisions", "- data: CC0",
            "- initial weights: MIT", "ser evaluate --verify", "transcripts 100.0 %",
        ):  # fmt: skip
            assert piece in text, (name, piece)
        assert ("chosen by their figure on this very part" in text) == (name == "best")
        assert text.startswith("---\n") and record["settings"]["train"]["data"] == str(corpus / "train.csv")


def test_a_card_s_figures_come_out_again_and_an_edited_card_does_not_hold(trained, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(trained / "last", folder)
    call("evaluate", "--verify", folder)
    assert "the card holds" in capsys.readouterr().out
    (folder / "README.md").write_text((folder / "README.md").read_text().replace("Not for decisions", "For"))
    with pytest.raises(SystemExit):
        call("evaluate", "--verify", folder)
    assert "the card does not hold" in capsys.readouterr().out
    whole = read_record(folder)

    def edited(change) -> str:
        record = copy.deepcopy(whole)
        change(record)
        write_card(folder, record)
        with pytest.raises(SystemExit):
            call("evaluate", "--verify", folder)
        said = capsys.readouterr()
        return said.out + said.err

    shown = edited(lambda r: r["evaluations"][0]["figures"]["accuracy"].update(value=0.7815))
    assert re.search(r"accuracy +card +0\.7815 .* DIFFERS", shown) and shown.count("DIFFERS") == 1
    shown = edited(lambda r: r["evaluations"][0]["figures"]["accuracy"].update(interval_utterances=[0.99, 1.0]))
    assert shown.count("DIFFERS") == 2, "both ends"
    assert "utterances " in edited(lambda r: r["evaluations"][0].update(utterances=5531))
    assert "trained_on.utterances: the card has 5531, but it is 8" in edited(
        lambda r: r["trained_on"].update(utterances=5531)
    )
    assert "no figures to verify" in edited(lambda r: r.update(evaluations=[]))
    (folder / "training.json").write_text("{}")
    with pytest.raises(SerError, match="no sound record"):
        call("evaluate", "--verify", folder)
    (folder / "training.json").unlink()
    with pytest.raises(SerError, match="only models that training wrote"):
        call("evaluate", "--verify", folder)


def test_a_model_on_another_fold_reports_what_it_was_trained_on(corpus, trained, tmp_path, capsys):
    fold = ["--data", corpus / "train.csv", *FOLDS, "--resamples", 5]
    call("evaluate", "--model", trained / "last", *fold, "--fold", "s2", "--out", tmp_path / "out", "--card")
    shown = capsys.readouterr().out  # s2 is what the model of fold s0 was trained on
    assert "recordings 100.0 %" in shown and "WARNING: trained on recordings that are judged" in shown
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["shared_with_training"]["recordings"] == 1.0 and report["fold"] == "s2"
    tested = [e["selection"]["fold"] for e in read_record(trained / "last")["evaluations"]]
    assert tested == ["s0", "s2"], "the card has the further figures"
    # The form with --manifest is the same; what the weights were chosen on stays chosen on.
    plain = ["--manifest", corpus / "train.csv", *FOLDS, "--resamples", 5]
    call("evaluate", "--model", trained / "best", *plain, "--fold", "s0", "--part", "valid", "--card")
    assert capsys.readouterr().out.startswith("8 utterances, 1 speakers")
    entries = {e["selection"]["part"]: e["chosen_on"] for e in read_record(trained / "best")["evaluations"]}
    assert entries == {"valid": True}
    with pytest.raises(ConfigError, match="--fold and --known-turns need --protocol"):
        call("evaluate", "--model", trained / "last", "--manifest", corpus / "train.csv", "--fold", "s0")
    with pytest.raises(ConfigError, match="--resamples 0"):
        call("evaluate", "--model", trained / "last", "--manifest", corpus / "train.csv", "--resamples", 0)
    call("evaluate", "--model", corpus / "init", *fold, "--fold", "s0")
    assert "taken to be the fold's: the model does not say" in capsys.readouterr().out


def test_turns_that_a_model_was_trained_on_are_not_taken_for_held_out(corpus, tmp_path):
    fold = ["--data", corpus / "train.csv", *FOLDS, "--fold", "s0"]
    options = ["--init", corpus / "init", "--out", tmp_path / "run", *QUICK, "--beta", 1, "--known-turns", 0]
    call("train", *fold, *options)
    with pytest.raises(ConfigError, match="the model was trained on 2 of them"):
        call("evaluate", "--model", tmp_path / "run/last", *fold, "--known-turns", 2, "--resamples", 5)


def test_recordings_that_cannot_be_read_are_left_out_and_counted_where_that_is_asked_for(
    corpus, trained, tmp_path, capsys
):
    shutil.copytree(corpus, tmp_path / "corpus")
    (tmp_path / "corpus/train0.wav").write_bytes(b"RIFF")
    (tmp_path / "corpus/train3.wav").unlink()
    options = ["--model", trained / "last", "--manifest", tmp_path / "corpus/train.csv", "--resamples", 5]
    with pytest.raises(SerError, match=r"train3\.wav"):
        call("evaluate", *options)
    call("evaluate", *options, "--on-bad-audio", "skip", "--max-bad-audio", 0.1)
    shown = capsys.readouterr().out
    assert shown.startswith("22 utterances") and "2 recordings could not be read and are in no figure" in shown
    with pytest.raises(SerError, match=r"--max-bad-audio 0\.01 allows"):
        call("evaluate", *options, "--on-bad-audio", "skip")


def test_given_checkpoints_are_judged_fold_by_fold_with_a_closing_line_each(corpus, trained, tmp_path, capsys):
    for fold in ("s0", "s1"):
        (tmp_path / "given").mkdir(exist_ok=True)
        (tmp_path / "given" / fold).symlink_to(trained / "last")
    options = [
        "--data",
        corpus / "train.csv",
        *FOLDS,
        "--evaluate-only",
        tmp_path / "given",
        "--out",
        tmp_path / "out",
    ]
    with pytest.raises(ConfigError, match="has no folder s2; it needs one per fold"):
        call("crossval", *options)
    with pytest.raises(ConfigError, match="--fold: cross-validation settles that itself"):
        call("crossval", *options, "--fold", "s0")
    with pytest.raises(ConfigError, match="1 or more"):
        call("crossval", *options, "--parallel", 0)
    with pytest.raises(ConfigError, match="trains nothing, so it takes no --alpha 0"):
        call("crossval", *options, "--alpha", 0)
    (tmp_path / "given/s2").symlink_to(trained / "last")
    call("crossval", *options, "--folds", "s0", "s2", "--resamples", 5)
    right = 0
    for fold in ("s0", "s2"):  # s2 is what this model was trained on
        shared = (tmp_path / f"out/{fold}.eval").read_text().splitlines()[-2]
        assert shared.startswith("WARNING") == (fold == "s2") and "recordings" in shared
        last = (tmp_path / f"out/{fold}.eval").read_text().splitlines()[-1]
        correct, accuracy = re.fullmatch(r"correct: (\d+) , acc: ([\d.]+)", last).groups()
        assert float(accuracy) == pytest.approx(int(correct) / 8, abs=1e-4)
        right += int(correct)
        assert "WARNING: trained on recordings that are judged" in (tmp_path / "out/report.md").read_text()
    assert f"pooled: correct: {right} of 16 , acc: {right / 16:.4f}" in capsys.readouterr().out
    assert not (tmp_path / "out/s0/run").exists(), "nothing was trained"


def test_asked_to_stop_it_lets_what_trains_save_and_the_same_command_continues(corpus, tmp_path):
    out = tmp_path / "out"
    options = ["--data", corpus / "train.csv", *FOLDS, "--folds", "s0", "s1", "--out", out, "--resamples", 5]
    options += ["--init", corpus / "init", *QUICK, "--epochs", 40, "--log-every", 1]
    command = command_line("crossval", *options)
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        log = out / "s0/run/metrics.jsonl"
        deadline = time.monotonic() + 60
        while not log.is_file() and time.monotonic() < deadline:
            time.sleep(0.05)
        trains = json.loads((out / "s0/run/owner.json").read_text())["pid"]
        running.send_signal(signal.SIGTERM)
        _, said = running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode == 75, said
    assert "SIGTERM: the training saves and ends" in said and "the same command continues" in said
    with pytest.raises(ProcessLookupError):
        os.kill(trains, 0)
    saved = list((out / "s0/run/checkpoints").iterdir())
    assert saved and not (out / "s0/run/last").exists() and not (out / "s0/report.json").exists()
    assert not (out / "s1/train.log").exists(), "no other fold was begun"
    with pytest.raises(ConfigError, match="begun with other settings"):
        call("crossval", *options, "--alpha", 0)
    command.remove("s1")  # one will do
    subprocess.run(command, check=True, timeout=120, stdout=subprocess.DEVNULL)
    assert "is resumed at update" in (out / "s0/train.log").read_text()
    assert json.loads((out / "report.json").read_text())["folds"].keys() == {"s0"}


def test_killed_it_takes_its_training_along_which_saves(corpus, tmp_path):
    out = tmp_path / "out"
    options = ["--data", corpus / "train.csv", *FOLDS, "--folds", "s0", "--out", out, "--init", corpus / "init"]
    options += [*QUICK, "--epochs", 999, "--log-every", 1]
    command = command_line("crossval", *options)
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        log = out / "s0/run/metrics.jsonl"
        deadline = time.monotonic() + 120
        while not log.is_file() and time.monotonic() < deadline:
            time.sleep(0.05)
        trains = json.loads((out / "s0/run/owner.json").read_text())["pid"]
    finally:
        running.kill()
        running.wait()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{trains}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert time.monotonic() < deadline
    assert (
        list((out / "s0/run/checkpoints").iterdir()) and "stopped by SIGTERM" in (out / "s0/train.log").read_text()
    )
    with own_run(out / "s0/run"):
        pass  # is free for the next


def test_names_of_the_data_that_are_paths_become_harmless_folders_where_a_run_continues(corpus, tmp_path, capsys):
    names = {"s0": "../../escaped", "s1": "-x\n", "s2": str(tmp_path / "absolute")}
    rows = [row | {"speaker": names[row["speaker"]], "file": str(corpus / row["file"])}
            for row in csv.DictReader((corpus / "train.csv").open())]  # fmt: skip
    kept = ("file", "emotion", "speaker")
    text = "".join(json.dumps({name: row[name] for name in kept}) + "\n" for row in rows)
    (tmp_path / "data.jsonl").write_text(text)
    out = tmp_path / "a/b/out"
    options = [
        "--data",
        tmp_path / "data.jsonl",
        "--protocol",
        "kfold:speaker:3",
        "--init",
        corpus / "init",
        *QUICK,
    ]
    options += ["--heads", "emotion", "--resamples", 5, "--out", out]
    done = run("crossval", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    call("crossval", *options)
    assert capsys.readouterr().out.count("done already") == 3
    folders = sorted(path.name.partition("~")[0] for path in out.iterdir() if path.is_dir())
    assert len(folders) == 3 and {"escaped", "x"} < set(folders)
    assert {path.name for path in tmp_path.iterdir()} == {"data.jsonl", "a"} and not list(
        tmp_path.glob("a/escaped*")
    )
    assert len(json.loads((out / "report.json").read_text())["folds"]) == 3
    call("crossval", *options, "--folds", "../../escaped")  # as the manifest spells it
    assert capsys.readouterr().out.count("done already") == 1


def test_of_folds_at_once_one_that_fails_is_told_at_once_and_a_signal_still_reaches_the_other(corpus, tmp_path):
    out = tmp_path / "out"
    (out / "s1").mkdir(parents=True)
    (out / "s1/run").write_text("a file is in the way")
    options = ["--data", corpus / "train.csv", *FOLDS, "--out", out, "--parallel", 2, "--log-every", 1]
    options += ["--init", corpus / "init", *QUICK, "--epochs", 1000]
    command = command_line("crossval", *options)
    errors = tmp_path / "errors"
    with errors.open("w") as file:
        running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file)
    try:
        deadline = time.monotonic() + 60
        while "finished first" not in errors.read_text() or not (out / "s0/run/metrics.jsonl").is_file():
            assert time.monotonic() < deadline and running.poll() is None, errors.read_text()
            time.sleep(0.05)
        assert "s1: the training failed" in errors.read_text()
        running.send_signal(signal.SIGTERM)
        assert running.wait(timeout=60) == 1
    finally:
        running.kill()
    assert list((out / "s0/run/checkpoints").iterdir()) and not (out / "s0/run/last").exists()
    assert not (out / "s2/train.log").exists(), "no other fold was begun"
    said = errors.read_text()
    assert said.splitlines()[-1].startswith("  ") and "error: s1: the training failed" in said


def test_folds_at_once_have_gpus_of_their_own_one_per_process():
    gpus = ["2", "3", "5", "7", "9"]
    assert device_shares(gpus, folds=2, processes=2) == [["2", "3"], ["5", "7"]]
    assert device_shares(gpus, folds=1, processes=2) == [[]], "all"
    assert device_shares([], folds=3, processes=2) == [[], [], []], "on CPUs"
    with pytest.raises(ConfigError, match="3 folds at once need 2 GPUs each, but there are 2, 3, 5, 7, 9"):
        device_shares(gpus, folds=3, processes=2)


# -------------------------------------------------------------------------------------------------- ablations


def test_an_ablation_of_alpha_gives_tables_and_curves_and_lowers_the_rate_at_alpha_0(corpus, tmp_path):
    options = [
        "--data",
        corpus / "train.csv",
        *FOLDS,
        "--folds",
        "s0",
        "--init",
        corpus / "init",
        "--resamples",
        5,
    ]
    options += ["--paper", "--epochs", 1, "--out", "a"]
    done = run("crossval", *options, "--ablation", "alpha=0,0.1",
               cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rates = [
        json.loads((tmp_path / f"a/alpha={alpha}/s0/run/config.json").read_text())["rate"]
        for alpha in ("0", "0.1")
    ]
    assert rates == [1e-5, 5e-5]
    found = json.loads((tmp_path / "a/ablation.json").read_text())
    assert found["folds"] == ["s0"] and list(found["values"]) == ["0", "0.1"]
    for row in found["values"].values():
        assert row["wer"]["value"] is not None and row["wer_over_folds"]["mean"] == row["wer"]["value"]
    assert found["values"]["0.1"]["against 0"]["mcnemar_p"] <= 1
    text = (tmp_path / "a/ablation.md").read_text()
    for piece in ("WER, mean over folds", "0.7815", "1 of kfold:speaker:3", "not comparable", "curves.png"):
        assert piece in text
    with (tmp_path / "a/curves.csv").open() as file:
        assert [(r["value"], r["epoch"]) for r in csv.DictReader(file)] == [("0", "1"), ("0.1", "1")]
    assert (tmp_path / "a/curves.png").read_bytes()[:4] == b"\x89PNG"


def test_an_ablation_of_heads_trains_just_those_on_known_speakers(corpus, tmp_path):
    options = [
        "--data",
        corpus / "train.csv",
        "--protocol",
        "speaker-known:2",
        "--init",
        corpus / "init",
        "--beta",
        1,
    ]
    options += [*QUICK, "--out", "a"]
    done = run("crossval", *options, "--ablation", "heads=emotion,emotion+speaker",
               "--resamples", 5, cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for heads in ("emotion", "emotion+speaker"):
        assert read_record(tmp_path / f"a/heads={heads}/all/run/last")["heads"] == heads.split("+")
    found = json.loads((tmp_path / "a/ablation.json").read_text())["values"]
    assert (
        found["emotion"]["speaker_accuracy"] is None and found["emotion+speaker"]["speaker_accuracy"] is not None
    )
    assert found["emotion"]["wer"] is None
    assert "None were measured" not in (tmp_path / "a/heads=emotion/all/run/last/README.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--ablation rate=1,2", "expected alpha="),
        ("--ablation alpha=0,0", "each value once"),
        ("--ablation alpha=0,1 --alpha 2", "not both"),
        ("--ablation heads=emotion,emotion+speaker", "add --beta"),
    ],
)
def test_an_ablation_that_makes_no_sense_is_refused_before_anything_runs(corpus, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        call("crossval", "--data", corpus / "train.csv", *FOLDS, "--out", tmp_path / "a", *options.split())
    assert not (tmp_path / "a").exists()


def test_curves_pool_by_utterances_and_by_words_and_end_where_the_shortest_run_does(tmp_path):
    for name, rows in {"a": [(0.5, 10, 1.0, 100), (1.0, 10, 0.5, 100)], "b": [(0.0, 30, 0.0, 300)]}.items():
        (tmp_path / name).mkdir()
        entries = [
            {"kind": "valid", "epoch": i, "accuracy": a, "emotion_utterances": n, "wer": w, "words": m}
            for i, (a, n, w, m) in enumerate(rows)
        ]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))
    assert pooled_curve([tmp_path / "a", tmp_path / "b"]) == [{"epoch": 1, "accuracy": 0.125, "wer": 0.25}]
    assert best_on_test([tmp_path / "a", tmp_path / "b"]) == {"accuracy": 0.25, "utterances": 40}
    assert best_on_test([tmp_path]) is None


# ------------------------------------------------------------------------------------------------ mistakes, paper


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--protocol kfold:speaker:3 --fold s0", "does not permit this"),
        ("--protocol kfold:speaker:3 --shares transcripts --fold s9", "no fold is called 's9'"),
        ("--protocol kfold:speaker:3 --shares transcripts", "no fold is named"),
        ("--protocol papre10 --fold s0", "did you mean 'paper10'"),
        ("--protocol paper10 --shares speakers --fold s0", "declares itself"),
        ("--protocol paper10 --fold 01F", "needs the column 'side'"),
        ("--protocol speaker-known:99", "holds out 99 utterances of each speaker, but s0 has only 8"),
        ("--fold s0", "--data needs --protocol"),
    ],
)
def test_a_fold_that_cannot_be_trained_on_is_one_clear_error(corpus, tmp_path, arguments, message):
    out = ["--init", corpus / "init", "--out", tmp_path / "run"]
    with pytest.raises((ConfigError, ManifestError)) as caught:
        call("train", "--data", corpus / "train.csv", *arguments.split(), *out)
    assert message in str(caught.value)
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
    options = ["--train", corpus / "train.csv", "--init", corpus / "init", "--out", tmp_path / "run", "--paper"]
    call("train", *options, "--alpha", 0, "--epochs", 1)
    settings = json.loads((tmp_path / "run/config.json").read_text())
    assert (settings["alpha"], settings["rate"], settings["epochs"]) == (0.0, 1e-5, 1)
    assert settings["tags"] == "keep-letters" and settings["batching"] == "random"

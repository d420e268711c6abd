"""What a model card says is computed again, or is named as claimed (N5)."""

import copy
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from toy import toy_recognizer, write_corpus

import ser
from ser.cli import evaluate, execute, make_parser
from ser.data.manifest import read_manifest
from ser.data.selection import Selection
from ser.errors import ModelFolderError
from ser.scores.card import (
    as_block,
    as_code,
    as_text,
    card_text,
    counts_of,
    differences,
    is_card_of,
    read_record,
    same_data,
    write_card,
)
from ser.scores.report import Outcomes, report
from ser.train.verification import checks_of

QUICK = ["--epochs", "2", "--effective-batch", "4", "--heads", "emotion", "--data-licence", "CC0"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run on twelve utterances, four that validate, some of them too long for training."""
    folder = tmp_path_factory.mktemp("run")
    toy_recognizer(heads=["emotion", "ctc"]).save(folder / "init")
    train = write_corpus(folder / "data", 12)
    valid = write_corpus(folder / "data", 4, seed=1, name="valid")
    options = ["--train", train, "--valid", valid, "--allow-overlap", "speakers", "--init", folder / "init"]
    execute("train", [*map(str, options), *QUICK, "--max-seconds", "0.4", "--out", str(folder / "run")])
    return folder / "run"


def verify(folder: Path, *options) -> bool:
    return execute("evaluate", ["--verify", str(folder), *map(str, options)]) == 0


def test_the_cards_of_a_run_hold_and_what_nobody_can_compute_is_named(run, capsys):
    assert len({read_record(run / name)["weights"] for name in ("best", "last")}) == 2
    assert read_record(run / "best")["trained_on"]["utterances"] < 12, "the long ones were dropped"
    for name in ("best", "last"):
        assert verify(run / name)
        shown = capsys.readouterr().out
        assert "claimed, and not computed here: epoch, step\n" in shown, "the run's config.json tells the settings"


def test_a_copied_model_folder_holds_and_its_licences_are_claimed(run, tmp_path, capsys):
    for name in ("best", "last"):
        shutil.copytree(run / name, tmp_path / name / "model")
        assert verify(tmp_path / name / "model")
        assert "licences" in capsys.readouterr().out.split("claimed")[1]


def test_a_card_of_an_earlier_release_which_names_another_command_holds(run):
    record = read_record(run / "best")
    text = (run / "best/README.md").read_text()
    earlier = text.replace("ser evaluate --verify FOLDER", "python examples/evaluate.py --verify FOLDER")
    assert text != earlier and is_card_of(text, record) and is_card_of(earlier, record)
    assert not is_card_of(earlier.replace("Not for decisions", "For"), record)


def test_without_the_recordings_of_training_what_needs_them_is_claimed(run, tmp_path):
    shutil.copytree(run.parent / "data", tmp_path / "data")
    (tmp_path / "data/train3.wav").unlink()
    record, recognizer = read_record(run / "best"), ser.load(run / "best")

    def moved(selection: Selection) -> Selection:
        return replace(selection, data=str(tmp_path / "data" / Path(selection.data).name))

    checks, claimed = checks_of(record, recognizer, run / "best", moved)
    assert all(c.same for c in checks) and "trained_on (1 recordings cannot be read)" in claimed
    record["settings"].pop("max_seconds")
    record["trained_on"] |= counts_of(read_manifest(run.parent / "data/train.csv"))
    checks, claimed = checks_of(record, recognizer, run / "best", moved)
    assert all(c.same for c in checks) and "trained_on.hours (1 recordings cannot be read)" in claimed
    record["trained_on"]["utterances"] = 13
    checks, _ = checks_of(record, recognizer, run / "best", moved)
    assert [c.name for c in checks if not c.same] == ["trained_on.utterances"]


def leaves(value, path=()):
    """The path of every number, text and empty list of a record."""
    if isinstance(value, dict | list) and value:
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(part, (*path, key))
    else:
        yield path


def changed(record, path):
    """A record with another value at a path."""
    record = copy.deepcopy(record)
    place = record
    for key in path[:-1]:
        place = place[key]
    value = place[path[-1]]
    if isinstance(value, bool):
        place[path[-1]] = not value
    elif isinstance(value, int | float):
        place[path[-1]] = value + 1
    else:
        place[path[-1]] = "forged" if value is None or isinstance(value, str) else ["forged"]
    return record


def test_every_field_of_a_record_is_computed_or_named_as_claimed(run):
    folder = run / "best"
    record, recognizer = read_record(folder), ser.load(folder)
    (entry,) = record["evaluations"]
    selection = Selection.from_dict(entry["selection"])
    parser = make_parser(None)
    evaluate.add_arguments(parser)
    arguments = parser.parse_args(["--verify", str(folder)])
    outcomes = evaluate.outcomes_of(recognizer, selection.utterances(), None, arguments, evaluate.World())
    now = {seed: report(outcomes, resamples=entry["resamples"], seed=seed) for seed in (0, 1)}
    assert isinstance(outcomes, Outcomes)
    held = []
    for path in leaves(record):
        forged = changed(record, path)
        name = ".".join(map(str, path[:2]))
        if path[0] == "evaluations" and path[2] in ("selection", "resamples"):
            continue  # which data, and how often they were drawn: what the figures are computed with
        if path[0] == "settings" and path[-1] in ("shares", "known_turns"):
            continue  # of a protocol, and there is none
        try:
            checks, claimed = checks_of(forged, recognizer, folder, lambda selection: selection)
            told = forged["evaluations"][0]
            figures = differences(told, now[told["seed"] if told["seed"] in now else 0])
        except ser.SerError:
            continue  # the data are not there: told
        if (
            all(c.same for c in checks)
            and all(same for *_, same in figures)
            and not any(c.split(" ")[0] in (name, path[0]) for c in claimed)
        ):
            held.append(path)
    assert not held


@pytest.mark.parametrize("name", ["best", "last"])
def test_weights_that_were_chosen_by_a_figure_cannot_deny_it_nor_others_claim_it(run, tmp_path, capsys, name):
    for folder in (tmp_path / "run" / name, tmp_path / "renamed"):
        shutil.copytree(run / name, folder)
        record = read_record(folder)
        assert record["evaluations"][0]["chosen_on"] == (name == "best")
        record["evaluations"][0]["chosen_on"] = name != "best"
        write_card(folder, record)
        assert not verify(folder)
        assert "evaluation 1, chosen_on: the card has" in capsys.readouterr().err


def test_figures_on_the_validation_part_cannot_be_left_out(run, tmp_path, capsys):
    shutil.copytree(run / "best", tmp_path / "best")
    record = read_record(tmp_path / "best")
    entry = record["evaluations"][0]
    entry["selection"] = record["settings"]["train"]
    write_card(tmp_path / "best", record)
    assert not verify(tmp_path / "best")
    assert "evaluation on the validation part" in capsys.readouterr().err
    record["settings"].pop("valid")
    write_card(tmp_path / "best", record)
    assert not verify(tmp_path / "best")
    assert "settings.valid: the card has None" in capsys.readouterr().err


@pytest.mark.parametrize(
    "forged", [{"protocol_description": "No speaker is in two parts."}, {"valid_is_test": True}]
)
def test_a_card_of_data_without_a_protocol_claims_none(run, tmp_path, capsys, forged):
    shutil.copytree(run / "last", tmp_path / "last")
    record = read_record(tmp_path / "last")
    record["settings"] |= forged
    write_card(tmp_path / "last", record)
    assert not verify(tmp_path / "last")
    assert f"settings.{next(iter(forged))}: the card has" in capsys.readouterr().err


def test_the_same_data_under_another_path_stay_what_the_weights_were_chosen_on(run, tmp_path, capsys):
    shutil.copytree(run / "best", tmp_path / "best")
    shutil.copytree(run.parent / "data", tmp_path / "moved")
    options = ["--manifest", tmp_path / "moved/valid.csv", "--card", "--resamples", 5]
    execute("evaluate", ["--model", str(tmp_path / "best"), *map(str, options)])
    (entry,) = read_record(tmp_path / "best")["evaluations"]
    assert entry["chosen_on"] and entry["resamples"] == 5
    assert same_data(entry["selection"], read_record(run / "best")["settings"]["valid"])
    assert not same_data(entry["selection"], entry["selection"] | {"columns": {"emotion": "other"}})
    assert verify(tmp_path / "best")


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r["evaluations"][0].update(resamples="many"),
        lambda r: r["evaluations"][0].update(resamples=10**12),
        lambda r: r["evaluations"][0].update(seed=-1),
        lambda r: r["settings"].update(max_seconds="x"),
        lambda r: r["settings"].update(train={"data": 5}),
        lambda r: r["settings"].update(train={"path": "x"}),
        lambda r: r.update(evaluations=[7]),
    ],
)
def test_a_record_that_is_none_is_refused_with_its_file(run, tmp_path, change):
    shutil.copytree(run / "last", tmp_path / "last")
    record = json.loads((tmp_path / "last/training.json").read_text())
    change(record)
    (tmp_path / "last/training.json").write_text(json.dumps(record))
    with pytest.raises(ModelFolderError, match=re.escape(str(tmp_path / "last/training.json"))):
        read_record(tmp_path / "last")


# ------------------------------------------------------------------------------------------------ markdown


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("<img src=x onerror=alert(1)>", "&lt;img src=x onerror=alert(1)&gt;"), ("&lt;b", "&amp;lt;b"),
        ("a | b", r"a \| b"), ("x\n\n## L\r- d", "x��## L�- d"), ("\x1b[2J", r"�\[2J"), ("[a](b)", r"\[a\](b)"),
        ("# h", r"\# h"), ("`x` *b* ~c~", r"\`x\` \*b\* \~c\~"),
        ("- a", r"\- a"), ("1. a", r"1\. a"), ("---", r"\---"),
        ("_it_", r"\_it\_"), ("a\\", r"a\\"),
        # as they were: cards that are there hold
        ("my_corpus.csv", "my_corpus.csv"), ("../data/x.csv", "../data/x.csv"),
        ("3.5 (a), 78.15 %", "3.5 (a), 78.15 %"),
        ("test of paper10, fold 01F (data/iemocap)", "test of paper10, fold 01F (data/iemocap)"), ("悲伤", "悲伤"),
    ],
)  # fmt: skip
def test_markdown_shows_a_name_as_its_characters_on_one_line(name, shown):
    assert as_text(name) == shown


def test_a_code_span_and_a_block_end_where_they_should():
    assert as_code("a`b``c") == "``` a`b``c ```" and as_code("runs/x") == "`runs/x`"
    assert as_block("a\n```\nb\x1b").startswith("````\n") and as_block("a\nb") == "```\na\nb\n```"


def test_no_label_makes_a_section_html_or_a_code_of_a_terminal_on_a_card(run):
    record = read_record(run / "best")
    hostile = "x\n\n## Licences\n\n- data: CC0 <img src=x>\x1b[2J `| b"
    record["emotions"][0] = hostile
    record["trained_on"]["per_emotion"][hostile] = 3
    record["settings"] |= {"init": hostile, "licences": {"data": hostile, "weights": hostile}}
    record["settings"] |= {"protocol_description": hostile, "shared_with_training": {hostile: {hostile: 1.0}}}
    record["settings"]["train"]["data"] = record["evaluations"][0]["selection"]["data"] = hostile
    record["evaluations"][0]["figures"][f"recall {hostile}"] = record["evaluations"][0]["figures"]["accuracy"]
    shown = card_text(record)
    assert all(line.isprintable() for line in shown.split("\n"))
    assert shown.count("\n## Licences") == 1 and "<img" not in shown.replace(as_code(hostile), "")
    assert all(line.count("|") - line.count(r"\|") == 5 for line in shown.split("\n") if line.startswith("| "))

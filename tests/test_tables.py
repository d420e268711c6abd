"""A head that somebody adds from outside the package by rows in tables, and how labels become tensors."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from test_train import assert_identical, log, quick
from toy import toy_config, toy_rows

import ser
from ser.data.labels import (
    LABELS,
    NO_LABEL,
    Labels,
    LabelSpec,
    collate_labels,
    encoder,
    known,
    labelled_heads,
    names_in,
    unknown,
)
from ser.data.manifest import Utterance, parse_columns, read_manifest, write_manifest
from ser.data.text import Vocabulary
from ser.errors import ConfigError, ModelFolderError
from ser.folder import head_config
from ser.models.heads import HEADS, Head
from ser.models.multitask import HeadsConfig, MultiTaskModel
from ser.recognizer import Recognizer, load
from ser.train.evaluation import evaluate
from ser.train.loop import fit
from ser.train.losses import LOSSES, Loss, class_loss
from ser.train.optim import set_rate

# ------------------------------------------------------------------------------------------------- heads of others


def age_loss(scores, labels, *, weights, **_):
    """Sum |predicted - age| over the utterances whose age is known, and count them."""
    there = labels.isfinite() * weights[:, None]
    return ((scores - labels.nan_to_num()).abs() * there).sum(), there.sum()


@pytest.fixture
def age(monkeypatch):
    """The rows of a head that estimates a speaker's age."""
    monkeypatch.setitem(HEADS, "age", Head("age_head"))
    monkeypatch.setitem(LABELS, "age", LabelSpec("numbers", ("age",)))
    monkeypatch.setitem(LOSSES, "age", Loss(age_loss))


@pytest.fixture
def gender(monkeypatch):
    """The rows of a second head of classes, whose layers are two."""
    monkeypatch.setitem(HEADS, "gender", Head("gender_head", form="dense"))
    monkeypatch.setitem(LABELS, "gender", LabelSpec("class", ("gender",)))
    monkeypatch.setitem(LOSSES, "gender", Loss(class_loss, weight=0.5))


def toy_model(labels: Labels, **changes) -> Recognizer:
    """An untrained recognizer of the toy's size for any labels."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MultiTaskModel(toy_config(**changes), head_config(labels, {}))
    return Recognizer(model.eval(), labels)


def aged_rows(folder: Path, count: int = 12, **options) -> list[Utterance]:
    """The rows of a toy corpus, two thirds of them with an age."""
    rows = toy_rows(folder, count, **options)
    return [row.relabelled(age=2.0 + i % 4 if i % 3 else None) for i, row in enumerate(rows)]


def test_a_head_from_outside_is_trained_evaluated_saved_loaded_and_predicted_with(age, tmp_path):
    train, valid = aged_rows(tmp_path, 24), aged_rows(tmp_path, 8, seed=1, name="valid")
    labels = Labels.of(emotions=names_in("emotion", [row.labels for row in train]), names={"age": ["age"]})
    recognizer = toy_model(labels, layerdrop=0.0, mask_time_prob=0.0, mask_feature_prob=0.0)
    result = fit(recognizer, train, valid, quick(epochs=6, rate=2e-2, save_every="6ep"), tmp_path / "run")
    losses = [entry["loss_age"] for entry in log(tmp_path / "run", "train")]
    assert losses[-1] < 0.6 * losses[0], "it learns"
    again = load(tmp_path / "run/best")
    assert again.labels.names == {"emotion": labels.emotions, "age": ["age"]}
    figures = evaluate(again, valid).metrics()
    ages = again.predict([row.file for row in valid])
    errors = [
        abs(p.others["age"]["age"] - row.labels["age"])
        for p, row in zip(ages, valid, strict=True)
        if row.labels.get("age")
    ]
    assert figures["loss_age"] == pytest.approx(sum(errors) / len(errors), rel=1e-4)
    assert -1 <= figures["ccc_age"] <= 1 and result.evaluation.metrics()["loss_age"] > 0
    assert "ccc" not in figures, "which is of arousal, dominance and valence"
    assert ages[0].to_dict()["others"] == {"age": ages[0].others["age"]} and ages[0].emotion in labels.emotions
    again.save(tmp_path / "copy")
    for path in (tmp_path / "copy").iterdir():
        assert path.read_bytes() == (tmp_path / "run/best" / path.name).read_bytes(), path.name


def test_a_head_from_outside_can_stand_alone(age, tmp_path):
    rows = aged_rows(tmp_path)
    recognizer = toy_model(Labels.of(names={"age": ["age"]}))
    fit(recognizer, rows, [], quick(epochs=1, log_every=1), tmp_path / "run")
    assert log(tmp_path / "run", "train")[0]["grad_norm"] > 0
    assert [*load(tmp_path / "run/last").predict(rows[0].file)[0].others] == ["age"]
    with pytest.raises(ConfigError, match="nothing of age is learnt: no training utterance has a label"):
        fit(recognizer, [row.relabelled(age=None) for row in rows], [], quick(epochs=1), tmp_path / "other")


def test_a_run_with_a_head_from_outside_resumes_exactly(age, tmp_path):
    rows = aged_rows(tmp_path)
    labels = Labels.of(emotions=names_in("emotion", [row.labels for row in rows]), names={"age": ["age"]})
    fit(toy_model(labels), rows, [], quick(epochs=2), tmp_path / "whole")
    whole = sorted((tmp_path / "whole/checkpoints").iterdir())
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    for path in sorted((tmp_path / "stopped/checkpoints").iterdir())[2:]:
        shutil.rmtree(path)
    for name in ("last", "best"):
        shutil.rmtree(tmp_path / "stopped" / name, ignore_errors=True)
    result = fit(toy_model(labels), rows, [], quick(epochs=2), tmp_path / "stopped")
    assert result.resumed
    assert_identical(whole[-1], tmp_path / "stopped/checkpoints" / whole[-1].name)


def test_a_folder_with_a_head_whose_rows_are_missing_is_refused_in_one_sentence(tmp_path, monkeypatch):
    with monkeypatch.context() as rows:
        rows.setitem(HEADS, "age", Head("age_head"))
        rows.setitem(LABELS, "age", LabelSpec("numbers", ("age",)))
        toy_model(Labels.of(emotions=["a", "b"], names={"age": ["age"]})).save(tmp_path / "m")
    with pytest.raises(ModelFolderError) as refusal:
        ser.load(tmp_path / "m")
    assert str(refusal.value) == (
        f"{tmp_path / 'm/config.json'}: ser.names has the head 'age', which is not known here; add its rows to "
        "HEADS and LABELS before the folder is loaded"
    )
    with pytest.raises(ConfigError, match=r"no head called 'age'; add its row to ser\.models\.heads\.HEADS first"):
        HeadsConfig(others={"age": 1})


def test_two_heads_of_classes_from_outside_and_inside_stand_beside_each_other(gender, tmp_path):
    rows = [row.relabelled(gender="fm"[i % 3 == 0]) for i, row in enumerate(toy_rows(tmp_path, 16))]
    emotions = names_in("emotion", [row.labels for row in rows])
    recognizer = toy_model(Labels.of(emotions=emotions, names={"gender": ["f", "m"]}))
    result = fit(recognizer, rows, rows, quick(epochs=1, log_every=1), tmp_path / "run")
    figures = result.evaluation.metrics()
    assert figures["gender_utterances"] == figures["emotion_utterances"] == 16
    again = load(tmp_path / "run/last")
    answers = again.predict([row.file for row in rows])
    right = [p.others["gender"] == row.labels["gender"] for p, row in zip(answers, rows, strict=True)]
    assert figures["gender_accuracy"] == sum(right) / 16 and {p.emotion for p in answers} <= set(emotions)
    assert figures["loss"] == pytest.approx(figures["loss_emotion"] + 0.5 * figures["loss_gender"])
    assert again.model.gender_head.dense.weight.shape == (16, 16), "its form is dense"
    with torch.no_grad():
        again.model.gender_head.out_proj.bias += torch.tensor([0.0, 1e3])
    assert {p.others["gender"] for p in again.predict([row.file for row in rows])} == {"m"}, "the second name"


@pytest.mark.parametrize("name", ["written.csv", "written.jsonl"])
def test_columns_of_heads_from_outside_travel_through_a_manifest(age, gender, tmp_path, name):
    rows = [row.relabelled(gender="fm"[i % 2] if i else None) for i, row in enumerate(aged_rows(tmp_path))]
    write_manifest(tmp_path / name, rows)
    again = read_manifest(tmp_path / name)
    assert [row.labels for row in again] == [row.labels for row in rows]
    assert labelled_heads([again[0].labels]) == labelled_heads([rows[0].labels])
    assert {"age", "gender"} <= {*labelled_heads([row.labels for row in again])}
    assert parse_columns(["age=years"]) == {"age": "years"}


# --------------------------------------------------------------------------------------------------------- labels


def test_labels_are_plain_data_with_those_of_other_heads_only_where_there_are_any(monkeypatch):
    monkeypatch.setitem(LABELS, "age", LabelSpec("numbers", ("age",)))
    vocabulary = Vocabulary.librispeech()
    labels = Labels.of(emotions=["a", "b"], dimensions=["valence"], vocabulary=vocabulary)
    assert labels.to_dict() == {
        "emotions": ["a", "b"],
        "speakers": [],
        "dimensions": ["valence"],
        "symbols": vocabulary.tokens,
        "orthography": "librispeech",
        "tags": "remove",
        "do_normalize": True,
    }
    assert labels.sizes == {"emotion": 2, "dimensions": 1, "ctc": 32}
    assert Labels.of(names={"age": ["age"]}, tags="keep-letters", do_normalize=False).to_dict() == {
        "emotions": [],
        "speakers": [],
        "dimensions": [],
        "names": {"age": ["age"]},
        "symbols": [],
        "orthography": "librispeech",
        "tags": "keep-letters",
        "do_normalize": False,
    }


def test_labels_know_what_a_head_means_and_refuse_a_name_twice():
    vocabulary = Vocabulary.librispeech()
    labels = Labels.of(emotions=("a", "b"), vocabulary=vocabulary)
    assert labels.of_head("emotion") == ["a", "b"] and labels.of_head("speaker") == []
    assert labels.of_head("ctc") is vocabulary
    assert Labels.of(speakers=[]) == Labels(), "a head without names is none"
    with pytest.raises(ConfigError, match=r"speakers .* name a class twice"):
        Labels.of(speakers=["Ann", "Bo", "Ann"])


ROWS = [
    {"emotion": "sad", "text": "A B", "arousal": 2.0},
    {"emotion": "cross", "valence": 1.5},
    {"speaker": "Bo"},
    {},
]


def test_names_and_heads_are_found_in_rows():
    assert names_in("emotion", ROWS) == ["cross", "sad"], "sorted"
    assert names_in("dimensions", iter(ROWS)) == ["arousal", "valence"], "in the order of the columns"
    assert names_in("speaker", ROWS[:2]) == []
    assert labelled_heads(ROWS) == ["emotion", "ctc", "speaker", "dimensions"]
    assert labelled_heads(ROWS[1:2]) == ["emotion", "dimensions"] and labelled_heads(ROWS[3:]) == []


def test_a_class_becomes_its_number_and_an_unknown_one_no_label():
    number = encoder("emotion", ["sad", "happy"])
    assert [number(row) for row in ROWS] == [0, NO_LABEL, NO_LABEL, NO_LABEL]


def test_numbers_are_read_from_the_columns_that_an_output_is_called_after():
    numbers = encoder("dimensions", ["Valence", "arousal", "tension"])
    first, second, _, last = map(numbers, ROWS)
    assert first[1] == 2.0 and second[0] == 1.5
    assert all(map(math.isnan, [first[0], first[2], second[1], *last])), "no column is called tension"


def test_labels_are_collated_to_tensors_of_their_kind():
    classes = collate_labels("emotion", [1, NO_LABEL])
    assert classes.dtype == torch.int64 and classes.tolist() == [1, NO_LABEL]
    numbers = collate_labels("dimensions", [[1.0, math.nan], [math.nan, math.nan]])
    assert numbers.dtype == torch.float64 and numbers.shape == (2, 2) and numbers[0, 1].isnan()
    texts = collate_labels("ctc", [[3, 4, 5], [], [6]])
    assert texts.tolist() == [[3, 4, 5], [NO_LABEL] * 3, [6, NO_LABEL, NO_LABEL]]
    assert collate_labels("ctc", [[], []]).tolist() == [[NO_LABEL], [NO_LABEL]], "never without a column"
    assert known("emotion", classes).tolist() == [True, False]
    assert known("dimensions", numbers).tolist() == [True, False]
    assert known("ctc", texts).tolist() == [True, False, True]


@pytest.mark.parametrize("head", [*LABELS])
def test_what_stands_for_no_label_is_unknown(head):
    assert known(head, collate_labels(head, [unknown(head, 3)])).tolist() == [False]


def test_a_row_takes_labels_by_the_names_of_their_columns_and_no_others():
    row = Utterance("u", Path("a.wav"), emotion="sad", text=None, labels={"emotion": "happy", "arousal": 1.0})
    assert row.labels == {"emotion": "sad", "arousal": 1.0} and row.text is None
    changed = row.relabelled(emotion=None, speaker="Ann")
    assert changed.labels == {"arousal": 1.0, "speaker": "Ann"} and row.labels["emotion"] == "sad"
    assert (changed.id, changed.file) == (row.id, row.file)
    with pytest.raises(TypeError, match=r"Utterance has no 'emotoin'.*emotion"):
        Utterance("u", Path("a.wav"), emotoin="sad")
    with pytest.raises(TypeError, match="Utterance has no 'age'"):
        row.relabelled(age=3.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LabelSpec("classes", ("gender",)), r"expected the kind \"class\""),
        (lambda: LabelSpec("class", "gender"), "a tuple of columns"),
        (lambda: Head("gender_head", reads="frame"), "expected reads pooled or frames"),
        (lambda: Head("gender_head", form="mlp"), "the form linear or dense"),
        (lambda: Labels(names={"emotion": "happy"}), "expected a list of names"),
        (lambda: Labels(names={"gender": ["f", "m"]}), "names of emotion, ctc"),
        (lambda: set_rate(torch.optim.SGD([torch.zeros(1)], lr=1), math.nan), "the schedule gave nan"),
    ],
)
def test_a_row_that_cannot_be_is_refused_where_it_is_made(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_column_of_numbers_is_found_whatever_its_case(monkeypatch):
    monkeypatch.setitem(LABELS, "age", LabelSpec("numbers", ("Age", "weight")))
    label_of = encoder("age", ["age", "Weight", "height"])
    assert label_of({"Age": 4.0, "weight": 2.0})[:2] == [4.0, 2.0] and math.isnan(label_of({})[2])


def test_a_head_without_a_row_of_labels_stops_no_training_that_does_not_ask_for_it(monkeypatch, tmp_path):
    toy_model(Labels.of(emotions=["a", "b"])).save(tmp_path / "m")
    monkeypatch.setitem(HEADS, "age", Head("age_head"))
    recognizer, _ = Recognizer.create(tmp_path / "m", emotions=["a", "b"])
    assert recognizer.emotions == ["a", "b"]

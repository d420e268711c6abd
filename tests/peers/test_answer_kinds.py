"""A head of others answers with one label, several, or numbers, as config.json says, and gives the same (N1)."""

import json
import logging

import pytest
import torch
import transformers
from foreign_models import speech_classification
from toy import toy_rows

import ser
from ser.errors import ConfigError, ModelFolderError
from ser.recognizer import Recognizer
from ser.train.config import TrainConfig
from ser.train.evaluation import evaluate
from ser.train.loop import fit

EMOTIONS = ["anger", "calm", "fear"]


@pytest.fixture
def waveform():
    return torch.randn(1, 7000, generator=torch.Generator().manual_seed(3))


def settings_for(names):
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def classifier(folder, config, randomise, names=None, **settings):
    """A random ForSequenceClassification, saved."""
    peer = getattr(transformers, config.architecture.classes + "ForSequenceClassification")
    labels = {} if names is None else settings_for(names)
    model = peer(peer.config_class(**config.to_dict(), classifier_proj_size=11, **labels, **settings))
    return saved(randomise(model).eval(), folder)


def notebook(folder, config, randomise, names, mode="mean", **settings):
    """A random ForSpeechClassification of the notebook, saved."""
    peer = speech_classification(config.model_type)
    settings |= {"pooling_mode": mode, **settings_for(names)}
    return saved(randomise(peer(peer.config_class(**config.to_dict(), **settings))).eval(), folder)


def saved(model, folder):
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"do_normalize": false, "sampling_rate": 16000}')
    return model


def scores(model, waveform):
    with torch.no_grad():
        found = model(waveform)
    return (found if isinstance(found, torch.Tensor) else found.logits)[0]


def predicted(folder, waveform):
    (prediction,) = ser.load(folder).predict(waveform[0], 16000)
    return prediction


def assert_close(found, expected):
    found = torch.tensor(list(found.values()))
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def edit_config(folder, **changes):
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value != "gone"}))


# ------------------------------------------------------------------------------------------- several labels


def test_a_multi_label_head_gives_each_label_a_probability_of_its_own(config, randomise, tmp_path, waveform):
    model = classifier(tmp_path, config, randomise, EMOTIONS, problem_type="multi_label_classification")
    prediction, expected = predicted(tmp_path, waveform), scores(model, waveform).sigmoid()
    assert prediction.kind == "multi-label" and list(prediction.probabilities) == EMOTIONS
    assert_close(prediction.probabilities, expected)
    assert prediction.emotion == EMOTIONS[int(expected.argmax())]
    assert abs(sum(prediction.probabilities.values()) - 1) > 0.01


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression", None])
def test_such_a_model_that_went_through_us_is_the_same_in_both_libraries(
    config, randomise, tmp_path, waveform, problem
):
    model = classifier(tmp_path / "theirs", config, randomise, EMOTIONS, problem_type=problem)
    before = predicted(tmp_path / "theirs", waveform)
    ser.load(tmp_path / "theirs").save(tmp_path / "ours")
    assert predicted(tmp_path / "ours", waveform) == before
    back, info = type(model).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    assert back.config.problem_type == problem and back.config.id2label == dict(enumerate(EMOTIONS))
    torch.testing.assert_close(scores(back.eval(), waveform), scores(model, waveform), rtol=1e-5, atol=1e-5)


def test_a_multi_label_model_is_neither_trained_nor_evaluated_as_one_of_one_label(styles, randomise, tmp_path):
    classifier(
        tmp_path / "m", styles["base-style"], randomise, EMOTIONS, problem_type="multi_label_classification"
    )
    recognizer, rows = ser.load(tmp_path / "m"), toy_rows(tmp_path / "data", 4)
    with pytest.raises(ConfigError, match=r"each emotion by itself.*for an evaluation"):
        evaluate(recognizer, rows)
    with pytest.raises(ConfigError, match=r"each emotion by itself.*to be trained"):
        fit(recognizer, rows, [], TrainConfig(), tmp_path / "run")


def test_training_from_a_multi_label_model_makes_its_head_anew_and_says_so(styles, randomise, tmp_path):
    model = classifier(
        tmp_path, styles["base-style"], randomise, EMOTIONS, problem_type="multi_label_classification"
    )
    recognizer, report = Recognizer.create(tmp_path, emotions=EMOTIONS)
    assert recognizer.kind == "single-label" and report.new == ["cls_head.weight", "cls_head.bias"]
    assert "several labels at once" in str(report)
    assert torch.equal(recognizer.model.projector.weight, model.projector.weight)


# ---------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("names", [["LABEL_0"], ["stress", "fatigue"], ["happy", "sad", "calm"]])
def test_a_regression_gives_numbers_by_their_names(config, randomise, tmp_path, waveform, names):
    model = classifier(tmp_path, config, randomise, names, problem_type="regression")
    prediction = predicted(tmp_path, waveform)
    assert prediction.kind == "regression" and list(prediction.dimensions) == names
    assert_close(prediction.dimensions, scores(model, waveform))
    assert prediction.emotion is prediction.probabilities is None


@pytest.mark.parametrize("head", [classifier, notebook])
@pytest.mark.parametrize("problem", ["regression", None, "multi_label_classification"])
@pytest.mark.parametrize(
    "names", [["arousal", "dominance", "valence"], ["Valence", "AROUSAL"], ["valence"], ["dominance", "valence"]]
)
def test_arousal_dominance_and_valence_are_dimensions_whichever_head_has_them(
    styles, randomise, tmp_path, waveform, caplog, head, problem, names
):
    model = head(tmp_path, styles["large-style"], randomise, names, problem_type=problem)
    prediction = predicted(tmp_path, waveform)
    assert prediction.kind == "regression" and list(prediction.dimensions) == names
    assert_close(prediction.dimensions, scores(model, waveform))
    assert ("taken as dimensions" in caplog.text) == (problem == "multi_label_classification")
    ser.load(tmp_path).save(tmp_path / "ours")
    assert predicted(tmp_path / "ours", waveform) == prediction


def test_dimensions_of_the_standard_head_are_evaluated_and_trained_on(styles, randomise, tmp_path):
    names = ["Valence", "arousal"]
    model = classifier(tmp_path / "m", styles["base-style"], randomise, names, use_weighted_layer_sum=True)
    metrics = evaluate(ser.load(tmp_path / "m"), toy_rows(tmp_path / "data", 8)).metrics()
    assert -1 <= metrics["ccc_valence"] <= 1 and -1 <= metrics["ccc_arousal"] <= 1
    recognizer, report = Recognizer.create(tmp_path / "m", dimensions=names)
    assert torch.equal(recognizer.model.dimension_head.weight, model.classifier.weight) and not report.new
    recognizer, report = Recognizer.create(tmp_path / "m", dimensions=["arousal"], emotions=["a", "b"])
    assert {"cls_head.weight", "dimension_head.weight"} <= set(report.new)


def test_one_class_without_a_problem_type_is_a_regression_and_that_is_said(
    styles, randomise, tmp_path, waveform, caplog
):
    model = classifier(tmp_path, styles["base-style"], randomise, num_labels=1)
    prediction = predicted(tmp_path, waveform)
    assert prediction.kind == "regression"
    assert_close(prediction.dimensions, scores(model, waveform))
    assert "'LABEL_0' is the only class and problem_type is missing: taken as a regression" in caplog.text


@pytest.mark.parametrize("problem", ["ranking", ["regression"], {"a": 1}, 3, "x" * 10_000])
def test_an_unknown_problem_type_is_refused(styles, randomise, tmp_path, problem):
    classifier(tmp_path, styles["base-style"], randomise, EMOTIONS)
    edit_config(tmp_path, problem_type=problem)
    with pytest.raises(ModelFolderError, match=r"config\.json: problem_type is .*multi_label_classification"):
        ser.load(tmp_path)


# ------------------------------------------------------------------------------------------ without names


@pytest.mark.parametrize("problem", [None, "multi_label_classification", "regression"])
def test_two_classes_without_names_have_those_that_transformers_gives_them(
    styles, randomise, tmp_path, waveform, caplog, problem
):
    model = classifier(tmp_path, styles["base-style"], randomise, num_labels=2, problem_type=problem)
    assert "id2label" not in json.loads((tmp_path / "config.json").read_text()), "as the library leaves it out"
    prediction = predicted(tmp_path, waveform)
    named = prediction.dimensions if problem == "regression" else prediction.probabilities
    assert list(named) == ["LABEL_0", "LABEL_1"]
    function = {None: torch.softmax, "regression": lambda x, _: x}.get(problem, lambda x, _: x.sigmoid())
    assert_close(named, function(scores(model, waveform), -1))
    assert "no id2label: the classes are called LABEL_0, LABEL_1" in caplog.text


def test_what_is_said_nowhere_is_a_warning_of_the_logger_ser_with_the_folder(
    styles, randomise, tmp_path, waveform, caplog
):
    classifier(tmp_path, styles["base-style"], randomise, EMOTIONS)
    ser.load(tmp_path)
    assert not caplog.records, "nothing is missing"
    (tmp_path / "preprocessor_config.json").unlink()
    ser.load(tmp_path)
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("ser", logging.WARNING)
    assert record.getMessage().startswith(f"{tmp_path}: there is neither processor_config.json nor")
    _, report = Recognizer.create(tmp_path, emotions=EMOTIONS)
    assert "do_normalize true is assumed" in str(report)


@pytest.mark.parametrize("what", ["id2label", "ser.speakers", "ser.dimensions"])
def test_a_name_with_half_a_surrogate_pair_is_refused(styles, randomise, tmp_path, what):
    classifier(tmp_path, styles["base-style"], randomise, EMOTIONS)
    if what == "id2label":
        edit_config(tmp_path, id2label={"0": "a", "1": "\ud800", "2": "c"})
    else:
        edit_config(tmp_path, ser={what.removeprefix("ser."): ["a", "b\udfff"]})
    with pytest.raises(ModelFolderError, match=rf"config\.json: {what} has the name .*half a surrogate pair"):
        ser.load(tmp_path)


# ------------------------------------------------------------------------------------- the notebook's head


@pytest.mark.parametrize("mode", ["mean", "sum", "max"])
def test_the_notebook_s_model_gives_the_same_emotions(config, randomise, tmp_path, waveform, mode):
    model = notebook(tmp_path, config, randomise, EMOTIONS, mode)
    prediction = predicted(tmp_path, waveform)
    assert prediction.kind == "single-label" and list(prediction.probabilities) == EMOTIONS
    assert_close(prediction.probabilities, scores(model, waveform).softmax(-1))
    ser.load(tmp_path).save(tmp_path / "ours")
    assert predicted(tmp_path / "ours", waveform) == prediction
    with torch.no_grad():  # a sum of frames is large, and float32 rounds it
        found, expected = (m(waveform.double()) for m in (ser.load(tmp_path).model.double(), model.double()))
    assert (found.emotion - expected).norm() <= 1e-10 * expected.norm()


@pytest.mark.parametrize("mode", ["mean", "sum", "max"])
def test_in_the_notebook_s_model_company_does_not_matter(styles, randomise, tmp_path, mode):
    notebook(tmp_path, styles["base-style"], randomise, EMOTIONS, mode)
    model = ser.load(tmp_path).model
    batch = torch.randn(3, 7000, generator=torch.Generator().manual_seed(5))
    lengths = torch.tensor([7000, 3000, 400])
    batch[1, 3000:] = float("nan")
    batch[2, 400:] = 1e6
    with torch.no_grad():
        together = model(batch, lengths).emotion
        for row, length in enumerate(lengths):
            alone = model(batch[row : row + 1, :length]).emotion[0]
            assert (together[row] - alone).norm() <= 1e-5 * alone.norm()


@pytest.mark.parametrize(
    ("problem", "kind"), [("multi_label_classification", "multi-label"), ("regression", "regression")]
)
def test_the_notebook_s_head_answers_with_what_its_problem_type_says(
    styles, randomise, tmp_path, waveform, problem, kind
):
    model = notebook(tmp_path, styles["base-style"], randomise, EMOTIONS, "sum", problem_type=problem)
    prediction, expected = predicted(tmp_path, waveform), scores(model, waveform)
    assert prediction.kind == kind
    if kind == "regression":
        assert_close(prediction.dimensions, expected)
    else:
        assert_close(prediction.probabilities, expected.sigmoid())


def test_training_from_the_notebook_s_model_keeps_its_head_where_the_labels_are_the_same(
    styles, randomise, tmp_path
):
    model = notebook(tmp_path, styles["base-style"], randomise, EMOTIONS, "max")
    recognizer, report = Recognizer.create(tmp_path, emotions=EMOTIONS)
    assert torch.equal(recognizer.model.cls_head.dense.weight, model.classifier.dense.weight)
    assert recognizer.model.heads_config.pooling == "max" and not report.new and not report.unused
    recognizer, report = Recognizer.create(tmp_path, emotions=EMOTIONS, pooling="mean")
    assert "cls_head.out_proj.weight" in report.new and not any(p.is_meta for p in recognizer.model.parameters())


def test_a_pooling_mode_of_another_kind_is_refused_and_one_that_its_class_ignores_is_said(
    styles, randomise, tmp_path, waveform, caplog
):
    notebook(tmp_path / "n", styles["base-style"], randomise, EMOTIONS)
    edit_config(tmp_path / "n", pooling_mode="attention")
    with pytest.raises(ModelFolderError, match="pooling_mode is 'attention'; supported: mean, sum, max"):
        ser.load(tmp_path / "n")
    model = classifier(tmp_path / "c", styles["base-style"], randomise, EMOTIONS)
    edit_config(tmp_path / "c", pooling_mode="max")
    assert_close(predicted(tmp_path / "c", waveform).probabilities, scores(model, waveform).softmax(-1))
    assert "pooling_mode is max, which no class with this head follows" in caplog.text

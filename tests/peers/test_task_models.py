"""Task models of others load with their heads and labels, and answer as the class that saved them (N1)."""

import json
from dataclasses import replace

import pytest
import torch
import transformers
from foreign_models import EmotionModel, Wav2Vec2ForCTCnCLS

import ser
from ser.data.text import Vocabulary
from ser.errors import ModelFolderError
from ser.models.heads import mix_layers
from ser.models.multitask import HeadsConfig, MultiTaskModel
from ser.recognizer import Recognizer

NAMES = {0: "ang", 1: "hap", 2: "neu", 3: "sad"}  # as the superb models have them


def preprocessor(folder):
    (folder / "preprocessor_config.json").write_text('{"do_normalize": false, "sampling_rate": 16000}')


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def waveform():
    return torch.randn(1, 7000, generator=torch.Generator().manual_seed(3))


def classifier(config, randomise, **settings):
    """A random ForSequenceClassification of the configuration's architecture."""
    peer = getattr(transformers, config.architecture.classes + "ForSequenceClassification")
    labels = {"id2label": NAMES, "label2id": {name: i for i, name in NAMES.items()}}
    return randomise(
        peer(peer.config_class(**config.to_dict(), classifier_proj_size=11, **labels, **settings))
    ).eval()


def assert_probabilities(prediction, logits):
    assert list(prediction.probabilities) == list(NAMES.values())
    expected = logits[0].softmax(-1)
    found = torch.tensor(list(prediction.probabilities.values()))
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    assert prediction.emotion == NAMES[int(expected.argmax())]


@pytest.mark.parametrize("weighted", [False, True])
def test_a_sequence_classifier_gives_the_same_probabilities_under_the_same_names(
    config, randomise, tmp_path, waveform, weighted
):
    model = classifier(config, randomise, use_weighted_layer_sum=weighted)
    model.save_pretrained(tmp_path)
    preprocessor(tmp_path)
    (prediction,) = ser.load(tmp_path).predict(waveform[0], 16000)
    with torch.no_grad():
        assert_probabilities(prediction, model(waveform).logits)
    assert prediction.transcript is prediction.speaker is prediction.dimensions is None


def test_a_classifier_saved_before_release_5_sums_its_layers_as_it_was_trained(
    styles, randomise, tmp_path, waveform
):
    """Then the last of a pre-norm encoder's hidden states had the final norm, as in s3prl; since 5 it has not."""
    model = classifier(styles["large-style"], randomise, use_weighted_layer_sum=True)
    model.save_pretrained(tmp_path)
    preprocessor(tmp_path)
    with torch.no_grad():
        outputs = model.wav2vec2(waveform, output_hidden_states=True)
        hidden = mix_layers([*outputs.hidden_states[:-1], outputs.last_hidden_state], model.layer_weights)
        expected = model.classifier(model.projector(hidden).mean(1))
        assert not torch.allclose(expected, model(waveform).logits, rtol=1e-3), "the release matters"
    for version in ("4.5.1", None):
        edit_config(tmp_path, transformers_version=version)
        assert_probabilities(ser.load(tmp_path).predict(waveform[0], 16000)[0], expected)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_classifier_that_went_through_us_loads_in_its_class_with_the_same_answer(
    config, randomise, tmp_path, waveform, weighted
):
    model = classifier(config, randomise, use_weighted_layer_sum=weighted)
    model.save_pretrained(tmp_path / "theirs")
    preprocessor(tmp_path / "theirs")
    ser.load(tmp_path / "theirs").save(tmp_path / "ours")
    back, info = type(model).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    assert back.config.id2label == NAMES and back.config.architectures == [type(model).__name__]
    with torch.no_grad():
        expected = model(waveform).logits
        torch.testing.assert_close(back.eval()(waveform).logits, expected, rtol=1e-5, atol=1e-5)
    assert_probabilities(ser.load(tmp_path / "ours").predict(waveform[0], 16000)[0], expected)


def test_a_model_that_judges_frames_is_no_classifier_of_utterances(styles, randomise, tmp_path):
    config = transformers.Wav2Vec2Config(**styles["base-style"].to_dict(), id2label=NAMES)
    transformers.Wav2Vec2ForAudioFrameClassification(config).save_pretrained(tmp_path)
    with pytest.raises(ModelFolderError, match=r"without projector\.weight"):
        ser.load(tmp_path)


def test_a_classifier_that_reads_another_layer_claims_no_class_that_would_read_the_last(superb, tmp_path):
    folder, _ = superb
    recognizer, _ = Recognizer.create(folder, emotions=list(NAMES.values()), layers="2")
    recognizer.save(tmp_path / "ours")
    found = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert found["architectures"] == ["WavLMModel"]
    assert ser.load(tmp_path / "ours").model.heads_config.layers == "2"


def test_a_ctc_model_of_each_architecture_gives_the_same_scores_and_text(config, randomise, tmp_path, waveform):
    peer = getattr(transformers, config.architecture.classes + "ForCTC")
    vocabulary = Vocabulary.librispeech()
    model = randomise(peer(peer.config_class(**config.to_dict(), vocab_size=len(vocabulary)))).eval()
    model.save_pretrained(tmp_path)
    preprocessor(tmp_path)
    vocabulary.write(tmp_path / "vocab.json")
    recognizer = ser.load(tmp_path)
    with torch.no_grad():
        expected, found = model(waveform).logits, recognizer.model(waveform).ctc
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    (prediction,) = recognizer.predict(waveform[0], 16000)
    assert prediction.transcript == vocabulary.decode(expected.argmax(-1)[0])


# -------------------------------------------------------------------------------------------- dimensions


def dimensional(config, randomise, folder, names=("arousal", "dominance", "valence")):
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    settings = config.to_dict() | labels | {"problem_type": "regression", "finetuning_task": "wav2vec2_reg"}
    model = randomise(EmotionModel(transformers.Wav2Vec2Config(**settings))).eval()
    model.save_pretrained(folder)
    preprocessor(folder)
    (folder / "vocab.json").write_text("{}")  # left over, and without a head
    return model


def test_the_dimensional_model_gives_the_same_arousal_dominance_and_valence(styles, randomise, tmp_path, waveform):
    config = replace(styles["large-style"], num_hidden_layers=2)
    model = dimensional(config, randomise, tmp_path)
    (prediction,) = ser.load(tmp_path).predict(waveform[0], 16000)
    with torch.no_grad():
        expected = model(waveform)[0]
    assert list(prediction.dimensions) == ["arousal", "dominance", "valence"]
    found = torch.tensor(list(prediction.dimensions.values()))
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    assert prediction.emotion is prediction.transcript is None
    ser.load(tmp_path).save(tmp_path / "ours")
    assert ser.load(tmp_path / "ours").predict(waveform[0], 16000)[0].dimensions == prediction.dimensions


# ------------------------------------------------------------------------------------------- the paper's


def test_the_paper_s_model_with_a_speaker_head_gives_the_same_scores_once_it_has_names(
    styles, randomise, tmp_path, waveform
):
    config = transformers.Wav2Vec2Config(**styles["base-style"].to_dict(), vocab_size=32)
    model = randomise(Wav2Vec2ForCTCnCLS(config)).eval()
    model.save_pretrained(tmp_path)
    preprocessor(tmp_path)
    with pytest.raises(ModelFolderError, match=r"no names for its classes.*`ser convert`"):
        ser.load(tmp_path)
    edit_config(
        tmp_path,
        id2label={"0": "neutral", "1": "happy", "2": "angry", "3": "sad"},
        ser={"format": 1, "speakers": [f"s{i}" for i in range(10)]},
    )
    Vocabulary.librispeech().write(tmp_path / "vocab.json")
    recognizer = ser.load(tmp_path)
    with torch.no_grad():
        outputs, expected = recognizer.model(waveform), model(waveform)
    for found, wanted in zip((outputs.ctc, outputs.emotion, outputs.speaker), expected, strict=True):
        assert (found - wanted).norm() <= 1e-5 * wanted.norm()
    assert recognizer.emotions == ["neutral", "happy", "angry", "sad"] and len(recognizer.speakers) == 10


# --------------------------------------------------------------------------------------- training from them


@pytest.fixture
def superb(styles, randomise, tmp_path):
    """A folder as the superb emotion models are, and its model."""
    model = classifier(styles["wavlm-base-style"], randomise, use_weighted_layer_sum=True)
    model.save_pretrained(tmp_path)
    preprocessor(tmp_path)
    return tmp_path, model


def test_training_from_a_classifier_keeps_its_head_and_what_it_reads_where_the_labels_are_the_same(superb):
    folder, model = superb
    recognizer, report = Recognizer.create(folder, emotions=list(NAMES.values()), speakers=["A", "B"])
    ours = recognizer.model
    assert torch.equal(ours.cls_head.weight, model.classifier.weight)
    assert torch.equal(ours.projector.weight, model.projector.weight)
    assert torch.equal(ours.layer_weights, model.layer_weights)
    assert sorted(report.new) == ["speaker_head.bias", "speaker_head.weight"] and not report.unused
    assert not recognizer.do_normalize


@pytest.mark.parametrize(
    "changes", [{"emotions": ["x", "y"]}, {"layers": "last"}, {"layers": "2"}, {"pooling": "attentive"}]
)
def test_training_from_a_classifier_makes_a_head_anew_that_reads_or_names_something_else(superb, changes):
    folder, model = superb
    arguments = {"emotions": list(NAMES.values())} | changes
    recognizer, report = Recognizer.create(folder, **arguments)
    again, _ = Recognizer.create(folder, **arguments)
    assert {"cls_head.weight", "cls_head.bias"} <= set(report.new)
    assert torch.equal(recognizer.model.cls_head.weight, again.model.cls_head.weight)
    if "emotions" in changes:
        assert torch.equal(recognizer.model.projector.weight, model.projector.weight)
    else:
        assert "projector.weight" in report.new and "projector.weight" in report.unused
    assert not any(p.is_meta for p in recognizer.model.parameters())


def test_a_ctc_head_is_kept_when_the_vocabularies_are_equal_else_made_new_and_reported(
    styles, randomise, tmp_path
):
    vocabulary = Vocabulary.librispeech()
    heads = HeadsConfig(vocab_size=len(vocabulary))
    source = Recognizer(randomise(MultiTaskModel(styles["base-style"], heads)), vocabulary=vocabulary)
    source.save(tmp_path / "asr")
    same, report = Recognizer.create(tmp_path / "asr", emotions=["a", "b"], vocabulary=vocabulary)
    assert torch.equal(same.model.lm_head.weight, source.model.lm_head.weight)
    assert sorted(report.new) == ["cls_head.bias", "cls_head.weight"]
    other = Vocabulary.build(["ABC"])
    fresh, report = Recognizer.create(tmp_path / "asr", emotions=["a", "b"], vocabulary=other)
    assert {"lm_head.weight", "lm_head.bias"} <= set(report.new) & set(report.unused)
    assert "newly initialised: " in str(report) and "lm_head.weight" in str(report)
    assert fresh.model.lm_head.weight.shape[0] == len(other)

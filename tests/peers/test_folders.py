"""Folders go both ways between `ser` and transformers: no missing keys, the same output, the same text."""

import json
from collections.abc import Callable

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    Wav2Vec2ForCTC,
    Wav2Vec2Model,
    Wav2Vec2Processor,
)
from transformers import PretrainedConfig as PeerConfig

import ser
from ser.audio import normalise
from ser.data.text import Vocabulary
from ser.models.config import Wav2Vec2Config
from ser.models.multitask import HeadsConfig, MultiTaskModel
from ser.models.pretrained import WEIGHT_NORM, canonical_name, load_encoder
from ser.recognizer import Recognizer

VOCABULARIES = {
    "librispeech": Vocabulary.librispeech(),
    "built": Vocabulary.build(["GUTEN TAG ÄÖÜ"]),
    "bracketed": Vocabulary({"|": 0, **{c: i + 1 for i, c in enumerate("abcdefgh")}, "[UNK]": 9, "[PAD]": 10}),
}


@pytest.fixture
def waveform() -> Tensor:
    return torch.randn(1, 9000, generator=torch.Generator().manual_seed(2))


def peer_config(config: Wav2Vec2Config, **options) -> PeerConfig:
    pretraining = {"num_codevectors_per_group": 4, "codevector_dim": 8, "proj_codevector_dim": 8}
    model = getattr(transformers, config.architecture.classes + "Model")
    return model.config_class(**config.to_dict(), **pretraining, **options)


@torch.no_grad()
def peer_output(model: nn.Module, waveform: Tensor) -> Tensor:
    return getattr(model, model.base_model_prefix, model).eval()(waveform).last_hidden_state


def distance(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


# -------------------------------------------------------------------------------------------- theirs to ours


@pytest.mark.parametrize("suffix", ["Model", "ForPreTraining", "ForCTC", "ForSequenceClassification"])
def test_what_they_save_loads_with_the_same_output(config, randomise, tmp_path, waveform, suffix):
    peer = getattr(transformers, config.architecture.classes + suffix, None)
    if peer is None:
        pytest.skip(f"{config.model_type} has no class {suffix}")
    model = randomise(peer(peer_config(config, vocab_size=32)))
    model.save_pretrained(tmp_path)
    encoder, report = load_encoder(tmp_path, report=True)
    with torch.no_grad():
        assert distance(encoder(waveform)[0], peer_output(model, waveform)) < 1e-5
    assert sorted(report.matched) == sorted(encoder.state_dict()) and report.new == []
    prefix = config.architecture.prefix
    others = [canonical_name(k) for k in load_file(tmp_path / "model.safetensors") if not k.startswith(prefix)]
    assert sorted(report.unused) == ([] if suffix == "Model" else sorted(others))
    assert "architectures" in report.ignored_settings and "hidden_size" not in report.ignored_settings


@pytest.mark.parametrize("peer", [Wav2Vec2Model, Wav2Vec2ForCTC], ids=lambda peer: peer.__name__)
def test_their_shards_load(styles, randomise, tmp_path, waveform, peer):
    model = randomise(peer(peer_config(styles["large-style"])))
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    assert not (tmp_path / "model.safetensors").exists()
    with torch.no_grad():
        assert distance(load_encoder(tmp_path)(waveform)[0], peer_output(model, waveform)) < 1e-5


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("prefix", ["", "wav2vec2."])
def test_both_spellings_of_weight_norm_load_with_and_without_prefix(
    styles, randomise, tmp_path, waveform, older, prefix
):
    model = randomise(Wav2Vec2Model(peer_config(styles["base-style"])))
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    assert set(WEIGHT_NORM.values()) <= set(tensors)  # as their release of today writes it
    names = {new: old for old, new in WEIGHT_NORM.items()} if older else {}
    save_file({prefix + names.get(name, name): value for name, value in tensors.items()}, path)
    with torch.no_grad():
        assert distance(load_encoder(tmp_path)(waveform)[0], peer_output(model, waveform)) < 1e-5


def test_their_half_precision_folders_load_as_float32(styles, randomise, tmp_path, waveform):
    model = randomise(Wav2Vec2Model(peer_config(styles["large-style"]))).half()
    model.save_pretrained(tmp_path)
    encoder = load_encoder(tmp_path)
    assert all(p.dtype == torch.float32 for p in encoder.parameters())
    with torch.no_grad():
        assert distance(encoder(waveform)[0], peer_output(model.float(), waveform)) < 1e-5


def test_their_ctc_folder_recognises_text_and_nothing_else(styles, randomise, tmp_path, waveform):
    vocabulary = VOCABULARIES["librispeech"]
    model = randomise(Wav2Vec2ForCTC(peer_config(styles["large-style"], vocab_size=len(vocabulary)))).eval()
    model.save_pretrained(tmp_path)
    vocabulary.write(tmp_path / "vocab.json")
    (prediction,) = ser.load(tmp_path).predict(waveform[0], 16000)
    with torch.no_grad():
        x = (waveform - waveform.mean()) / (waveform.var(correction=0) + 1e-7).sqrt()
        ids = model(x).logits.argmax(-1)[0]
    assert prediction.transcript == vocabulary.decode(ids) != ""
    assert prediction.emotion is prediction.probabilities is prediction.speaker is None


# -------------------------------------------------------------------------------------------- ours to theirs


def recognizer_of(config: Wav2Vec2Config, randomise: Callable, vocabulary: Vocabulary | None) -> Recognizer:
    sizes = HeadsConfig(num_emotions=3, vocab_size=len(vocabulary) if vocabulary else 0, num_speakers=2)
    model = randomise(MultiTaskModel(config, sizes)).eval()
    return Recognizer(model, emotions=["sad", "happy", "cross"], speakers=["Ann", "Bo"], vocabulary=vocabulary)


def assert_complete(info: dict, unused: set[str]) -> None:
    """Every tensor of theirs is in the folder, and only our other heads are left."""
    assert not info["missing_keys"] and not info["mismatched_keys"], info
    assert {name.split(".")[0] for name in info["unexpected_keys"]} == unused


def test_our_folder_is_their_encoder(config, randomise, tmp_path, waveform):
    ours = recognizer_of(config, randomise, VOCABULARIES["librispeech"])
    ours.save(tmp_path / "ours")
    peer = getattr(transformers, config.architecture.classes + "Model")
    theirs, info = peer.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert_complete(info, {"cls_head", "lm_head", "speaker_head"})
    assert type(AutoConfig.from_pretrained(tmp_path / "ours")) is peer.config_class
    with torch.no_grad():
        assert distance(ours.model.wav2vec2(waveform)[0], peer_output(theirs, waveform)) < 1e-5


@pytest.mark.parametrize("name", VOCABULARIES)
def test_our_folder_is_their_ctc_model_and_processor_and_decodes_the_same_text(
    styles, randomise, tmp_path, waveform, name
):
    vocabulary = VOCABULARIES[name]
    ours = recognizer_of(styles["large-style"], randomise, vocabulary)
    ours.save(tmp_path / "ours")
    theirs, info = Wav2Vec2ForCTC.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert_complete(info, {"cls_head", "speaker_head"})
    assert theirs.config.pad_token_id == vocabulary.blank
    assert theirs.config.id2label == {0: "sad", 1: "happy", 2: "cross"}
    processor = Wav2Vec2Processor.from_pretrained(tmp_path / "ours")
    assert len(processor.tokenizer) == len(vocabulary)  # no token was added
    inputs = processor(waveform[0].numpy(), sampling_rate=16000, return_tensors="pt")
    assert ("attention_mask" in inputs) == (ours.model.config.feat_extract_norm == "layer")
    with torch.no_grad():
        logits = theirs.eval()(inputs.input_values).logits
        ctc = ours.model(normalise(waveform[0])[None]).ctc
    assert ctc is not None and distance(ctc, logits) < 1e-5
    (prediction,) = ours.predict(waveform[0], 16000)
    text = processor.batch_decode(logits.argmax(-1), skip_special_tokens=True)[0]
    assert prediction.transcript == " ".join(text.split()) != ""


def test_our_folder_without_a_vocabulary_is_their_encoder_too(styles, randomise, tmp_path):
    recognizer_of(styles["base-style"], randomise, None).save(tmp_path / "ours")
    theirs, info = Wav2Vec2Model.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert_complete(info, {"cls_head", "speaker_head"})
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["architectures"] == ["Wav2Vec2Model"]
    assert theirs.config.hidden_size == styles["base-style"].hidden_size


def test_a_folder_goes_round_through_both_unchanged(styles, randomise, tmp_path, waveform):
    ours = recognizer_of(styles["small-style"], randomise, VOCABULARIES["librispeech"])
    ours.save(tmp_path / "ours")
    Wav2Vec2ForCTC.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    VOCABULARIES["librispeech"].write(tmp_path / "theirs" / "vocab.json")
    (before,), (after,) = (r.predict(waveform[0], 16000) for r in (ours, ser.load(tmp_path / "theirs")))
    assert after.transcript == before.transcript != ""
    assert after.emotion is None  # their model has no place for our other heads

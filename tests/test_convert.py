"""Checkpoints of other libraries: what is read, what is refused, and what the folder and certificate then hold.

`transformers` counts as not installed here; tests/peers/test_convert_parity.py compares with it.
"""

import argparse
import builtins
import hashlib
import json
import os
import pickle
import re
import subprocess
import sys
import time
import types
import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import convert as page
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import ser
from ser.convert import convert as converting
from ser.convert import pickles
from ser.convert.foreign import conv_layers, derived_values
from ser.data.text import Vocabulary
from ser.errors import ConfigError, ModelFolderError
from ser.models.config import PRESETS
from ser.models.multitask import HeadsConfig, MultiTaskModel
from ser.models.pretrained import materialise
from ser.models.wav2vec2 import Wav2Vec2
from ser.recognizer import Recognizer

ROOT = Path(__file__).resolve().parents[1]


def convert(source, target, **options) -> dict:
    """As examples/convert.py does: compared with the reference where it is installed."""
    return converting.convert(source, target, reference=page.reference_layers, **options)


@pytest.fixture(autouse=True)
def without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)


@pytest.fixture
def encoder(styles, randomise) -> Wav2Vec2:
    return randomise(Wav2Vec2(styles["base-style"])).eval()


@pytest.fixture
def recognizer(styles, randomise) -> Recognizer:
    model = randomise(
        MultiTaskModel(styles["base-style"], HeadsConfig(num_emotions=3, vocab_size=32, num_speakers=2))
    )
    return Recognizer(
        model.eval(), emotions=["a", "b", "c"], speakers=["x", "y"], vocabulary=Vocabulary.librispeech()
    )


def pickled_folder(folder: Path, recognizer: Recognizer) -> dict[str, Tensor]:
    """A folder as an older transformers would have saved it; returns its tensors."""
    recognizer.save(folder)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(OrderedDict(state), folder / "pytorch_model.bin")
    return state


def paper_folder(folder: Path, recognizer: Recognizer, **config) -> Path:
    """As the paper's code saved it: no names of emotions, no vocab.json; followers' name of the speaker head."""
    state = pickled_folder(folder, recognizer)
    older = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    for new, old in older.items():
        state = {key.replace(new, old).replace("speaker_head", "spk_head"): value for key, value in state.items()}
    torch.save(OrderedDict(state), folder / "pytorch_model.bin")
    for name in ("vocab.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink()
    values = json.loads((folder / "config.json").read_text())
    for key in ("ser", "id2label", "label2id"):
        del values[key]
    (folder / "config.json").write_text(json.dumps(values | config))
    return folder


def fairseq_state(encoder: Wav2Vec2, before: str = "") -> dict[str, Tensor]:
    """The encoder's tensors as fairseq calls them."""
    layer_norm = encoder.config.feat_extract_norm == "layer"
    pairs = [
        (".conv.", ".0."),
        (".layer_norm.", ".2.1." if layer_norm else ".2."),
    ]
    state = {}
    for name, tensor in encoder.state_dict().items():
        if name.startswith("feature_extractor."):
            for ours, theirs in pairs:
                name = name.replace(ours, theirs)
        else:
            for ours, theirs in {
                "masked_spec_embed": "mask_emb",
                "feature_projection.layer_norm": "layer_norm",
                "feature_projection.projection": "post_extract_proj",
                "pos_conv_embed.conv.parametrizations.weight.original0": "pos_conv.0.weight_g",
                "pos_conv_embed.conv.parametrizations.weight.original1": "pos_conv.0.weight_v",
                "pos_conv_embed.conv.bias": "pos_conv.0.bias",
                "feed_forward.intermediate_dense": "fc1",
                "feed_forward.output_dense": "fc2",
                ".attention.": ".self_attn.",
            }.items():
                name = name.replace(ours, theirs)
            if name.startswith("encoder.layers."):
                name = name.replace(".layer_norm.", ".self_attn_layer_norm.")
        state[before + name] = tensor
    return state


def fairseq_settings(config, **more) -> dict:
    layers = list(zip(config.conv_dim, config.conv_kernel, config.conv_stride, strict=True))
    text = f"[{layers[0]}] + " + " + ".join(f"[{layer}]" for layer in layers[1:2]) + " + " + str(layers[2:])
    return {
        "_name": "wav2vec2",
        "extractor_mode": "layer_norm" if config.feat_extract_norm == "layer" else "default",
        "conv_feature_layers": text,
        "conv_bias": config.conv_bias,
        "encoder_embed_dim": config.hidden_size,
        "encoder_layers": config.num_hidden_layers,
        "encoder_attention_heads": config.num_attention_heads,
        "encoder_ffn_embed_dim": config.intermediate_size,
        "layer_norm_first": config.do_stable_layer_norm,
        "conv_pos": config.num_conv_pos_embeddings,
        "conv_pos_groups": config.num_conv_pos_embedding_groups,
        "activation_fn": "gelu",
        "final_dim": 8,
        "dropout": 0.05,
        **more,
    }


@pytest.fixture
def fairseq_dictionary(monkeypatch):
    """The class fairseq.data.dictionary.Dictionary, importable only in the test that pickles one."""
    names = ("fairseq", "fairseq.data", "fairseq.data.dictionary")
    modules = {name: types.ModuleType(name) for name in names}
    cls = type("Dictionary", (), {"__module__": names[-1]})
    modules[names[-1]].Dictionary = cls
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)

    def make(symbols):
        found = cls()
        found.symbols, found.indices = list(symbols), {s: i for i, s in enumerate(symbols)}
        found.count = [1] * len(found.symbols)
        return found

    yield make
    monkeypatch.undo()


def torchaudio_model(config, **options):
    try:
        from torchaudio.models import wav2vec2_model, wavlm_model
    except (ImportError, OSError) as error:
        pytest.skip(f"torchaudio does not import: {error}")
    sizes = {
        "extractor_mode": f"{config.feat_extract_norm}_norm",
        "extractor_conv_layer_config": list(
            zip(config.conv_dim, config.conv_kernel, config.conv_stride, strict=True)
        ),
        "extractor_conv_bias": config.conv_bias,
        "encoder_embed_dim": config.hidden_size,
        "encoder_projection_dropout": 0.0,
        "encoder_pos_conv_kernel": config.num_conv_pos_embeddings,
        "encoder_pos_conv_groups": config.num_conv_pos_embedding_groups,
        "encoder_num_layers": config.num_hidden_layers,
        "encoder_num_heads": config.num_attention_heads,
        "encoder_attention_dropout": 0.0,
        "encoder_ff_interm_features": config.intermediate_size,
        "encoder_ff_interm_dropout": 0.0,
        "encoder_dropout": 0.0,
        "encoder_layer_norm_first": config.do_stable_layer_norm,
        "encoder_layer_drop": 0.0,
        "aux_num_out": None,
    }
    if config.model_type == "wavlm":
        sizes |= {"encoder_num_buckets": config.num_buckets, "encoder_max_distance": config.max_bucket_distance}
        return wavlm_model(**sizes | options).eval()
    return wav2vec2_model(**sizes | options).eval()


def waveform() -> Tensor:
    return torch.randn(1, 6000, generator=torch.Generator().manual_seed(5))


def assert_same_encoder(folder: Path, encoder: Wav2Vec2) -> None:
    found = ser.load_encoder(folder)
    assert found.state_dict().keys() == encoder.state_dict().keys()
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    with torch.no_grad():
        assert torch.equal(found(waveform())[0], encoder(waveform())[0])


def left_in(folder: Path, *known: str) -> list[str]:
    """What stands in a folder besides, hidden or not."""
    return sorted({path.name for path in folder.iterdir()} - set(known))


# ------------------------------------------------------------------------------------------------ hugging face


def test_a_pickled_folder_becomes_one_that_recognises_the_same(recognizer, tmp_path):
    state = pickled_folder(tmp_path / "old", recognizer)
    convert(tmp_path / "old", tmp_path / "new")
    written = load_file(tmp_path / "new" / "model.safetensors")
    assert written.keys() == state.keys() and all(torch.equal(written[key], state[key]) for key in state)
    (before,), (after,) = (r.predict(waveform()[0], 16000) for r in (recognizer, ser.load(tmp_path / "new")))
    assert after == before
    assert left_in(tmp_path) == ["new", "old"]


def test_a_whole_folder_keeps_its_types_keys_and_companions_but_no_code(encoder, tmp_path):
    Recognizer(MultiTaskModel(encoder.config, HeadsConfig())).save(tmp_path / "old")
    (tmp_path / "old" / "model.safetensors").unlink()
    state = {name: tensor.half() for name, tensor in encoder.state_dict().items()}
    torch.save(state, tmp_path / "old" / "pytorch_model.bin")
    values = json.loads((tmp_path / "old" / "config.json").read_text())
    code = {"auto_map": {"AutoModel": "evil.Model"}, "trust_remote_code": True}
    (tmp_path / "old" / "config.json").write_text(json.dumps(values | code | {"problem_type": "x"}))
    (tmp_path / "old" / "tokenizer_config.json").write_text('{"chat_template": "{{ 1 }}", "pad_token": "<pad>"}')
    (tmp_path / "old" / "evil.py").write_text("raise SystemExit")
    convert(tmp_path / "old", tmp_path / "new")
    written = load_file(tmp_path / "new" / "model.safetensors")
    assert {k: (t.dtype, t.sum()) for k, t in written.items()} == {k: (t.dtype, t.sum()) for k, t in state.items()}
    assert json.loads((tmp_path / "new" / "config.json").read_text()) == values | {"problem_type": "x"}
    assert json.loads((tmp_path / "new" / "tokenizer_config.json").read_text()) == {"pad_token": "<pad>"}
    assert left_in(tmp_path / "new") == [
        "certificate.json",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "tokenizer_config.json",
    ]
    assert (tmp_path / "new" / "preprocessor_config.json").read_bytes() == (
        tmp_path / "old" / "preprocessor_config.json"
    ).read_bytes()


def test_shards_are_read_and_their_names_cannot_leave_the_folder(recognizer, tmp_path):
    state = pickled_folder(tmp_path / "old", recognizer)
    keys = sorted(state)
    shards = {"a.bin": keys[::2], "b.bin": keys[1::2]}
    for name, part in shards.items():
        torch.save({key: state[key] for key in part}, tmp_path / "old" / name)
    (tmp_path / "old" / "pytorch_model.bin").unlink()
    index = tmp_path / "old" / "pytorch_model.bin.index.json"
    weight_map = {key: name for name, part in shards.items() for key in part}
    index.write_text(json.dumps({"weight_map": weight_map}))
    certificate = convert(tmp_path / "old", tmp_path / "new")
    assert certificate["tensors"]["read"] == len(state)
    assert sorted(certificate["source"]["sha256"]) == ["a.bin", "b.bin"]
    assert_same_encoder(tmp_path / "new", recognizer.model.wav2vec2)

    (tmp_path / "a.bin").write_bytes((tmp_path / "old" / "a.bin").read_bytes())
    index.write_text(json.dumps({"weight_map": weight_map | {keys[0]: "../a.bin"}}))
    with pytest.raises(ModelFolderError, match="not a plain file name"):
        convert(tmp_path / "old", tmp_path / "other")
    index.write_text(json.dumps({"weight_map": {keys[0]: 3}}))
    with pytest.raises(ModelFolderError, match="no weight_map"):
        convert(tmp_path / "old", tmp_path / "other")


def test_tensors_that_do_not_fit_the_configuration_are_listed_with_the_source_s_path(recognizer, tmp_path):
    state = pickled_folder(tmp_path / "old", recognizer)
    name = "wav2vec2.encoder.layers.1.feed_forward.output_dense.bias"
    torch.save(state | {name: torch.zeros(5)}, tmp_path / "old" / "pytorch_model.bin")
    with pytest.raises(ModelFolderError, match=r"old: 1 of \d+ tensors.*\n.*found \(5,\), expected \(24,\)"):
        convert(tmp_path / "old", tmp_path / "new")
    torch.save(state | {name: torch.full((24,), torch.nan)}, tmp_path / "old" / "pytorch_model.bin")
    with pytest.raises(ModelFolderError, match="NaN"):
        convert(tmp_path / "old", tmp_path / "new")
    torch.save(state | {"encoder.layers.9.fc": torch.zeros(5)}, tmp_path / "old" / "pytorch_model.bin")
    with pytest.raises(ModelFolderError, match=r"does not ask for.*encoder\.layers\.9\.fc"):
        convert(tmp_path / "old", tmp_path / "new")
    twice = {name.removeprefix("wav2vec2."): torch.zeros(24)}
    torch.save(state | twice, tmp_path / "old" / "pytorch_model.bin")
    with pytest.raises(ModelFolderError, match="twice"):
        convert(tmp_path / "old", tmp_path / "new")
    assert left_in(tmp_path) == ["old"]


# ------------------------------------------------------------------------------------------------ the paper's


def paper_recognizer(styles, randomise, *, emotions=4, speakers=0, symbols=32) -> Recognizer:
    sizes = HeadsConfig(num_emotions=emotions, vocab_size=symbols, num_speakers=speakers)
    vocabulary = Vocabulary({"<pad>": 0, **{chr(96 + i): i for i in range(1, symbols)}})
    return Recognizer(
        randomise(MultiTaskModel(styles["base-style"], sizes)).eval(),
        emotions=[f"e{i}" for i in range(emotions)],
        speakers=[f"old{i}" for i in range(speakers)],
        vocabulary=vocabulary,
    )


def test_a_folder_of_the_paper_s_code_gets_its_labels_and_symbols(styles, randomise, tmp_path):
    trained = paper_recognizer(styles, randomise, speakers=3)
    source = paper_folder(tmp_path / "old", trained)
    certificate = convert(source, tmp_path / "new")
    found = ser.load(tmp_path / "new")
    assert found.emotions == ["neutral", "happy", "angry", "sad"]
    assert found.speakers == ["s0", "s1", "s2"]
    assert found.vocabulary == Vocabulary.librispeech()
    for name, tensor in trained.model.state_dict().items():
        assert torch.equal(found.model.state_dict()[name], tensor), name
    with torch.no_grad():
        ours, theirs = found.model(waveform()).scores, trained.model(waveform()).scores
    assert ours.keys() == theirs.keys() == {"emotion", "ctc", "speaker"}
    for head, scores in ours.items():
        assert torch.equal(scores, theirs[head]), head
    count = len(trained.model.state_dict())
    assert certificate["tensors"] == {"read": count, "written": count, "unused": [], "new": []}
    assert certificate["assumed"] == {
        "emotions": found.emotions,
        "speakers": found.speakers,
        "vocabulary": "".join(Vocabulary.librispeech().tokens),
    }


def test_labels_symbols_and_speakers_can_be_given_and_must_fit_the_heads(styles, randomise, tmp_path):
    trained = paper_recognizer(styles, randomise, emotions=3, speakers=2, symbols=5)
    source = paper_folder(tmp_path / "old", trained)
    with pytest.raises(ModelFolderError, match=r"cls_head\.weight has 3 rows for 4 names; pass --labels"):
        convert(source, tmp_path / "new")
    with pytest.raises(ModelFolderError, match=r"lm_head\.weight has 5 rows for 32 names; pass --vocab"):
        convert(source, tmp_path / "new", labels=["e2", "e0", "e3"])
    names = {"labels": ["e2", "e0", "e3"], "vocabulary": trained.vocabulary}
    with pytest.raises(ModelFolderError, match=r"speaker_head\.weight has 2 rows for 1 names; pass --speakers"):
        convert(source, tmp_path / "new", speakers=["Ann"], **names)
    assert left_in(tmp_path) == ["old"]
    convert(source, tmp_path / "new", speakers=["Ann", "Bo"], **names)
    found = ser.load(tmp_path / "new")
    assert (found.emotions, found.speakers) == (["angry", "neutral", "sad"], ["Ann", "Bo"])
    assert found.vocabulary == trained.vocabulary


def test_names_for_heads_that_have_them_or_are_not_there_are_refused(styles, randomise, recognizer, tmp_path):
    pickled_folder(tmp_path / "whole", recognizer)
    with pytest.raises(ModelFolderError, match="keep the names"):
        convert(tmp_path / "whole", tmp_path / "new", speakers=["x", "y"])
    with pytest.raises(
        ModelFolderError, match="--labels names the classes of a head that has no names; there is none"
    ):
        convert(tmp_path / "whole", tmp_path / "new", labels=["x", "y", "z"])
    source = paper_folder(tmp_path / "old", paper_recognizer(styles, randomise))
    with pytest.raises(ModelFolderError, match="has no speaker_head; --speakers names classes that do not exist"):
        convert(source, tmp_path / "new", speakers=["Ann"])


def classifier_folder(folder: Path, styles, randomise, **config) -> Recognizer:
    """A ForSequenceClassification as transformers saves it, with LABEL_0 and so on; returns what it is."""
    heads = HeadsConfig(num_emotions=2, projection=11)
    model = randomise(MultiTaskModel(styles["base-style"], heads))
    Recognizer(model, emotions=["LABEL_0", "LABEL_1"]).save(folder)
    values = json.loads((folder / "config.json").read_text())
    del values["ser"], values["id2label"], values["label2id"]
    (folder / "config.json").write_text(json.dumps(values | config))
    return ser.load(folder)


@pytest.mark.parametrize("theirs", [{}, {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}])
def test_classes_that_nobody_named_get_names(styles, randomise, tmp_path, theirs):
    before = classifier_folder(tmp_path / "a", styles, randomise, **theirs)
    assert before.emotions == ["LABEL_0", "LABEL_1"]
    convert(tmp_path / "a", tmp_path / "b", labels=["calm", "stressed"])
    after = ser.load(tmp_path / "b")
    assert after.emotions == ["calm", "stressed"]
    assert torch.equal(after.model.cls_head.weight, before.model.cls_head.weight)
    for labels, reason in ((["a"], "1 names for 2 classes"), (["a", "\ud800"], "half a surrogate pair")):
        with pytest.raises(ModelFolderError, match=reason):
            convert(tmp_path / "a", tmp_path / "c", labels=labels)
    with pytest.raises(ModelFolderError, match="this one's are calm, stressed"):
        convert(tmp_path / "b", tmp_path / "c", labels=["x", "y"])


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "model.", "base_model.model.", "module._orig_mod."])
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_wrappers_put_into_keys_is_gone_when_converted(styles, randomise, tmp_path, wrapper, kind):
    before = classifier_folder(tmp_path / "a", styles, randomise)
    state = load_file(tmp_path / "a" / "model.safetensors")
    pickle_ = tmp_path / "a" / ("pytorch_model.bin" if kind == "folder" else "epoch9.pt")
    torch.save({wrapper + key: tensor for key, tensor in state.items()}, pickle_)
    (tmp_path / "a" / "model.safetensors").unlink()
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    source = tmp_path / "a" if kind == "folder" else pickle_
    convert(source, tmp_path / "b", config=config)
    assert load_file(tmp_path / "b" / "model.safetensors").keys() == state.keys()
    assert torch.equal(ser.load(tmp_path / "b").model.cls_head.weight, before.model.cls_head.weight)
    torch.save(torch.load(pickle_) | {f"{wrapper}projector.lora_A.default.weight": torch.zeros(2)}, pickle_)
    with pytest.raises(ModelFolderError, match=r"adapters of PEFT.*merge_and_unload"):
        convert(source, tmp_path / "c", config=config)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.uint8])
@pytest.mark.parametrize("kind", ["bin", "file", "paper"])
def test_weights_that_are_no_floating_point_numbers_are_refused(
    styles, randomise, recognizer, tmp_path, dtype, kind
):
    if kind == "paper":
        folder = paper_folder(tmp_path / "a", paper_recognizer(styles, randomise))
    else:
        pickled_folder(tmp_path / "a", recognizer)
        folder = tmp_path / "a"
    path = folder / "pytorch_model.bin"
    torch.save({key: tensor.to(dtype) for key, tensor in torch.load(path).items()}, path)
    config = json.loads((folder / "config.json").read_text()) if kind == "file" else None
    with pytest.raises(ModelFolderError, match=f"holds {dtype}; expected floating point"):
        convert(path if kind == "file" else folder, tmp_path / "new", config=config)
    assert left_in(tmp_path) == ["a"]


def test_the_settings_of_release_5_go_along_without_what_names_code(recognizer, tmp_path):
    pickled_folder(tmp_path / "a", recognizer)
    (tmp_path / "a" / "preprocessor_config.json").unlink()
    extractor = {"do_normalize": False, "auto_map": {"AutoFeatureExtractor": "evil.Evil"}}
    processor = {"feature_extractor": extractor, "auto_map": {"AutoProcessor": "evil.Evil"}}
    (tmp_path / "a" / "processor_config.json").write_text(json.dumps(processor))
    convert(tmp_path / "a", tmp_path / "b")
    assert ser.load(tmp_path / "b").do_normalize is False
    assert "evil" not in (tmp_path / "b" / "processor_config.json").read_text()


def test_what_is_assumed_of_sound_is_said_and_certified(recognizer, tmp_path):
    pickled_folder(tmp_path / "a", recognizer)
    (tmp_path / "a" / "preprocessor_config.json").unlink()
    lines: list[str] = []
    certificate = convert(tmp_path / "a", tmp_path / "b", say=lines.append)
    (note,) = certificate["assumed"]["notes"]
    assert "do_normalize true is assumed" in note and note in lines


def test_a_pointer_of_git_lfs_is_named_as_such(recognizer, tmp_path):
    pickled_folder(tmp_path / "a", recognizer)
    (tmp_path / "a" / "pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1\nsize 1\n")
    for source in (tmp_path / "a", tmp_path / "a" / "pytorch_model.bin"):
        with pytest.raises(ModelFolderError, match=r"pytorch_model\.bin: is a pointer of git-lfs.*git lfs pull"):
            convert(source, tmp_path / "b")


# ------------------------------------------------------------------------------------------------ fairseq


@pytest.mark.parametrize("style", ["base-style", "large-style"])
@pytest.mark.parametrize("kept", ["args", "cfg"])
def test_a_pretrained_fairseq_file_becomes_the_same_encoder(styles, randomise, tmp_path, style, kept):
    encoder = randomise(Wav2Vec2(styles[style])).eval()
    state = fairseq_state(encoder) | {"quantizer.vars": torch.zeros(1, 4, 2), "final_proj.bias": torch.zeros(8)}
    settings = fairseq_settings(encoder.config)
    said = {
        "args": {"args": argparse.Namespace(**settings, normalize=True)},
        "cfg": {"cfg": {"model": settings, "task": {"normalize": True}}, "args": None},
    }[kept]
    torch.save({"model": state, **said, "optimizer_history": [{"lr": 1e-4}]}, tmp_path / "a.pt")
    certificate = convert(tmp_path / "a.pt", tmp_path / "new")
    assert_same_encoder(tmp_path / "new", encoder)
    assert certificate["source"]["kind"] == "fairseq"
    assert certificate["tensors"]["unused"] == ["quantizer.vars", "final_proj.bias"]
    assert ser.load_encoder(tmp_path / "new").config.hidden_dropout == 0.05
    assert json.loads((tmp_path / "new" / "preprocessor_config.json").read_text())["do_normalize"] is True


@pytest.mark.parametrize("kept", ["args", "cfg", "cfg in cfg"])
def test_a_fine_tuned_fairseq_file_brings_its_ctc_head_and_symbols(
    encoder, fairseq_dictionary, tmp_path, kept, monkeypatch
):
    symbols = ["<s>", "<pad>", "</s>", "<unk>", "|", "E", "T"]
    head = {
        "w2v_encoder.proj.weight": torch.randn(7, 24),
        "w2v_encoder.proj.bias": torch.randn(7),
    }
    state = fairseq_state(encoder, "w2v_encoder.w2v_model.") | head
    settings = fairseq_settings(encoder.config)
    said = {
        "args": {
            "args": argparse.Namespace(w2v_args=argparse.Namespace(**settings), final_dropout=0.0, dropout=0.0)
        },
        "cfg": {"cfg": {"model": {"_name": "wav2vec_ctc", "w2v_args": settings, "dropout": 0.0}}},
        "cfg in cfg": {"cfg": {"model": {"w2v_args": {"model": settings, "task": {}}, "dropout": 0.0}}},
    }[kept]
    task = {"task_state": {"target_dictionary": fairseq_dictionary(symbols)}}
    torch.save({"model": state, **said, **task}, tmp_path / "a.pt")
    monkeypatch.undo()  # fairseq is not installed where it is read
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "fairseq" not in sys.modules
    convert(tmp_path / "a.pt", tmp_path / "new")
    assert_same_encoder(tmp_path / "new", encoder)
    found = ser.load(tmp_path / "new")
    # fairseq's blank is <s>, row 0; the rows stay, and we call it <pad>.
    assert found.vocabulary is not None
    assert found.vocabulary.tokens == ("<pad>", "<s>", "</s>", "<unk>", "|", "E", "T")
    assert found.vocabulary.blank == 0
    assert torch.equal(found.model.lm_head.weight, head["w2v_encoder.proj.weight"])
    assert torch.equal(found.model.lm_head.bias, head["w2v_encoder.proj.bias"])
    assert found.model.config.hidden_dropout == 0.0  # fine-tuning's own


def test_without_a_dictionary_32_symbols_are_librispeech_s_and_others_must_be_given(encoder, tmp_path):
    said = {"args": argparse.Namespace(w2v_args=argparse.Namespace(**fairseq_settings(encoder.config)))}
    for rows in (32, 31):
        head = {"w2v_encoder.proj.weight": torch.randn(rows, 24), "w2v_encoder.proj.bias": torch.randn(rows)}
        state = fairseq_state(encoder, "w2v_encoder.w2v_model.") | head
        torch.save({"model": state, **said}, tmp_path / f"{rows}.pt")
    convert(tmp_path / "32.pt", tmp_path / "new")
    assert ser.load(tmp_path / "new").vocabulary == Vocabulary.librispeech()
    with pytest.raises(ModelFolderError, match="31 rows for 32 names; pass --vocab"):
        convert(tmp_path / "31.pt", tmp_path / "other")


def test_hubert_is_recognised_by_its_name_or_its_labels(encoder, tmp_path):
    for name, more in (("hubert", {}), ("wav2vec2", {"label_embs_concat": torch.zeros(4, 8)})):
        settings = fairseq_settings(encoder.config, _name=name)
        torch.save({"model": fairseq_state(encoder) | more, "cfg": {"model": settings}}, tmp_path / "a.pt")
        certificate = convert(tmp_path / "a.pt", tmp_path / "new", overwrite=True)
        assert certificate["model"]["type"] == "hubert"
        assert ser.load_encoder(tmp_path / "new").config.model_type == "hubert"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation_fn": "relu"}, "activation_fn is 'relu'"),
        ({"layer_type": "conformer"}, "layer_type is 'conformer'"),
        ({"extractor_mode": "odd"}, "feat_extract_norm is 'odd'"),
        ({"encoder_attention_heads": 5}, "not a multiple"),
        ({"encoder_layers": 2}, "does not ask for"),
        ({"encoder_layers": 10**9}, "num_hidden_layers"),
        ({"encoder_embed_dim": 28, "encoder_attention_heads": 4}, "tensors do not fit"),
        ({"conv_feature_layers": "__import__('os').system('touch x')"}, "conv_feature_layers is"),
    ],
)
def test_settings_of_fairseq_that_do_not_fit_are_refused(encoder, tmp_path, change, message):
    settings = fairseq_settings(encoder.config) | change
    torch.save({"model": fairseq_state(encoder), "cfg": {"model": settings}}, tmp_path / "a.pt")
    with pytest.raises(ser.SerError, match=message):
        convert(tmp_path / "a.pt", tmp_path / "new")
    assert left_in(tmp_path) == ["a.pt"]


def test_a_fairseq_model_with_other_tensors_is_refused_by_their_names(encoder, tmp_path):
    state = fairseq_state(encoder) | {"encoder.layers.0.self_attn.grep_a": torch.zeros(1)}
    torch.save({"model": state, "cfg": {"model": fairseq_settings(encoder.config)}}, tmp_path / "a.pt")
    with pytest.raises(ModelFolderError, match=r"1 tensors that fairseq's.*grep_a"):
        convert(tmp_path / "a.pt", tmp_path / "new")


def test_conv_feature_layers_is_read_and_never_run(tmp_path):
    assert conv_layers("[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512,2,2)] + [(512,2,2)]") == [
        (512, 10, 5),
        *[(512, 3, 2)] * 4,
        *[(512, 2, 2)] * 2,
    ]
    assert conv_layers(" 2 * [(1, 2, 3), (4, 5, 6)]") == [(1, 2, 3), (4, 5, 6)] * 2
    for text in (
        f"open({str(tmp_path / 'x')!r}, 'w')",
        "[(1, 2, 3)] * 10**9",
        "[(1, 2, 3)] * 1000000000",
        "([(1, 2, 3)] * 64) * 64",
        "[(1, 2)]",
        "[(1, 2, True)]",
        "[(1, 2, 3.0)]",
        "[1, 2, 3]",
        "9 * 9",
        "[" * 1500,
        "[(1, 2, 3)]" + " + [(1, 2, 3)]" * 1000,
        "",
        "[(1,2,3)",
    ):
        with pytest.raises(ConfigError, match="conv_feature_layers"):
            conv_layers(text)
    assert not (tmp_path / "x").exists()


# ------------------------------------------------------------------------------------------------ torchaudio


@pytest.mark.parametrize("style", ["base-style", "large-style", "wavlm-base-style", "wavlm-large-style"])
def test_a_torchaudio_state_dict_gives_the_same_layers(styles, randomise, tmp_path, style):
    config = styles[style]
    theirs = randomise(torchaudio_model(config))
    torch.save(theirs.state_dict(), tmp_path / "a.pth")
    said = {"num_attention_heads": config.num_attention_heads}
    if config.model_type == "wavlm":
        said = {"max_bucket_distance": config.max_bucket_distance}
    certificate = convert(tmp_path / "a.pth", tmp_path / "new", config=said)
    assert certificate["comparison"]["reference"].startswith("torchaudio ")
    assert len(certificate["comparison"]["layers"]) == config.num_hidden_layers
    assert certificate["comparison"]["largest"] < 1e-5
    assert certificate["tensors"]["new"] == ["masked_spec_embed"]
    assert certificate["assumed"] == {
        "conv_stride": [5, 2, 2, 2, 2, 2, 2],
        "do_stable_layer_norm": config.do_stable_layer_norm,
        "do_normalize": config.feat_extract_norm == "layer",
    }
    with torch.no_grad():
        ours, expected = ser.load_encoder(tmp_path / "new")(waveform())[0], theirs(waveform())[0]
    assert (ours - expected).norm() < 1e-5 * expected.norm()


def test_a_torchaudio_ctc_head_becomes_ours(styles, randomise, tmp_path):
    config = styles["base-style"]
    theirs = randomise(torchaudio_model(config, aux_num_out=32))
    torch.save(theirs.state_dict(), tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "new", config={"num_attention_heads": 4})
    found = ser.load(tmp_path / "new")
    assert found.vocabulary == Vocabulary.librispeech() and found.do_normalize is False
    with torch.no_grad():
        ours, expected = found.model(waveform()).ctc, theirs(waveform())[0]
    assert (ours - expected).norm() < 1e-5 * expected.norm()


def test_what_shapes_do_not_tell_is_asked_for(styles, randomise, tmp_path):
    torch.save(torchaudio_model(styles["base-style"]).state_dict(), tmp_path / "a.pth")
    with pytest.raises(ModelFolderError, match="num_attention_heads; pass --config"):
        convert(tmp_path / "a.pth", tmp_path / "new")
    short = replace(
        styles["base-style"], conv_dim=(6, 10), conv_kernel=(10, 3), conv_stride=(5, 2), num_hidden_layers=1
    )
    torch.save(torchaudio_model(short).state_dict(), tmp_path / "b.pth")
    with pytest.raises(ModelFolderError, match="conv_stride; pass --config"):
        convert(tmp_path / "b.pth", tmp_path / "new", config={"num_attention_heads": 4})


@pytest.mark.parametrize("preset", ["base", "large", "large-lv60"])
def test_published_sizes_need_no_configuration(preset):
    config = PRESETS[preset]
    told, assumed = derived_values(materialise(lambda: Wav2Vec2(config)).state_dict())
    for name, value in (told | assumed).items():
        assert config.to_dict()[name] == value, name
    assert sorted(assumed) == ["conv_stride", "do_stable_layer_norm", "num_attention_heads"]


def test_a_wrong_configuration_is_found_by_the_comparison_and_nothing_is_left(styles, randomise, tmp_path):
    theirs = randomise(torchaudio_model(styles["base-style"]))
    torch.save(theirs.state_dict(), tmp_path / "a.pth")
    layers = page.layers_of_torchaudio

    def right(source, config, waveform):  # the reference knows the number of heads
        return layers(source, replace(config, num_attention_heads=4), waveform)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "layers_of_torchaudio", right)
        with pytest.raises(ModelFolderError, match=r"differs from torchaudio.*--config"):
            convert(tmp_path / "a.pth", tmp_path / "new", config={"num_attention_heads": 2})
    assert left_in(tmp_path) == ["a.pth"]


# ------------------------------------------------------------------------------------------------ speechbrain


@pytest.mark.parametrize("prefix", ["model.", "model.wav2vec2.", "module.model."])
def test_a_speechbrain_checkpoint_is_read_with_the_configuration_beside_it(encoder, tmp_path, prefix):
    state = {prefix + name: tensor for name, tensor in encoder.state_dict().items()}
    torch.save(state | {"label_lin.bias": torch.zeros(2)}, tmp_path / "wav2vec2.ckpt")
    with pytest.raises(ModelFolderError, match=r"holds no configuration; pass its config.json with --config"):
        convert(tmp_path / "wav2vec2.ckpt", tmp_path / "new")
    certificate = convert(tmp_path / "wav2vec2.ckpt", tmp_path / "new", config=encoder.config.to_dict())
    assert certificate["source"]["kind"] == "speechbrain"
    assert certificate["tensors"]["unused"] == ["label_lin.bias"]
    assert certificate["tensors"]["read"] == certificate["tensors"]["written"] + 1
    assert_same_encoder(tmp_path / "new", encoder)


# ------------------------------------------------------------------------------------------------ payloads


class Payload:
    """Calls a function with one argument when it is unpickled."""

    def __init__(self, function, argument):
        self.call = function, (argument,)

    def __reduce__(self):
        return self.call


def payloads(mark: Path) -> dict[str, Payload]:
    return {
        "posix.system": Payload(os.system, f"touch {mark}"),
        "builtins.eval": Payload(builtins.eval, f"open({str(mark)!r}, 'w')"),
        "builtins.exec": Payload(builtins.exec, f"open({str(mark)!r}, 'w')"),
        "subprocess.check_output": Payload(subprocess.check_output, ["touch", str(mark)]),
        "torch.serialization.load": Payload(torch.load, str(mark)),
    }


@pytest.mark.parametrize("written", ["zip", "legacy", "plain 2", "plain 4"])
@pytest.mark.parametrize("name", ["a.bin", "a.pt", "folder"])
@pytest.mark.parametrize("payload", list(payloads(Path())))
def test_a_payload_is_refused_by_name_and_never_runs(recognizer, tmp_path, payload, name, written):
    (tmp_path / "in").mkdir()
    mark = tmp_path / "in" / "mark"
    content = {"model": {"a": torch.zeros(2)}, "args": payloads(mark)[payload]}
    path = tmp_path / "in" / name
    source = path
    if name == "folder":
        pickled_folder(source, recognizer)
        path = source / "pytorch_model.bin"
    if written.startswith("plain"):
        path.write_bytes(pickle.dumps({"args": content["args"]}, protocol=int(written[-1])))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=written == "zip")
    with pytest.raises(ModelFolderError) as caught:
        convert(source, tmp_path / "new")
    # (Protocol 2 has the names of Python 2, in which subprocess was commands.)
    function = payload.rpartition(".")[2]
    assert re.match(
        rf"{re.escape(str(path))}: names [\w.]+\.{function}; such files can run code", str(caught.value)
    )
    assert not mark.exists()
    assert left_in(tmp_path) == ["in"]


def test_the_payloads_would_run_where_pickles_are_trusted(tmp_path):
    mark = tmp_path / "mark"
    pickle.loads(pickle.dumps(payloads(mark)["posix.system"]))
    assert mark.exists()


def test_globals_that_a_process_allowed_elsewhere_stay_refused_and_none_is_allowed_for_good(tmp_path):
    before = set(torch.serialization.get_safe_globals())
    torch.save({"a": argparse.Namespace()}, tmp_path / "c.pt")
    with pytest.raises(ModelFolderError, match="a is a Namespace"):
        convert(tmp_path / "c.pt", tmp_path / "new")
    torch.save({"a": torch.zeros(1), "b": Payload(str.upper, "x")}, tmp_path / "a.pt")
    torch.save({"a": Payload(types.SimpleNamespace, {})}, tmp_path / "b.pt")
    with (
        torch.serialization.safe_globals([types.SimpleNamespace]),
        pytest.raises(ModelFolderError, match="Simple"),
    ):
        convert(tmp_path / "b.pt", tmp_path / "new")
    assert set(torch.serialization.get_safe_globals()) == before
    with pytest.raises(ModelFolderError, match="getattr"):
        convert(tmp_path / "a.pt", tmp_path / "new")


def test_configurations_of_omegaconf_are_refused_with_what_to_do(tmp_path, monkeypatch):
    module = types.ModuleType("omegaconf.dictconfig")
    module.DictConfig = type("DictConfig", (), {"__module__": module.__name__})
    monkeypatch.setitem(sys.modules, "omegaconf", types.ModuleType("omegaconf"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    torch.save({"model": {}, "cfg": module.DictConfig()}, tmp_path / "a.pt")
    with pytest.raises(ModelFolderError, match=r"omegaconf\.dictconfig\.DictConfig.*OmegaConf\.to_container"):
        convert(tmp_path / "a.pt", tmp_path / "new")


def test_the_stand_ins_of_fairseq_s_classes_cannot_do_anything(fairseq_dictionary, tmp_path):
    torch.save({"a": argparse.Namespace(x=1), "b": fairseq_dictionary(["e"])}, tmp_path / "a.pt")
    read = pickles.read_pickle(tmp_path / "a.pt")
    assert type(read["a"]) is pickles.Namespace and vars(read["a"]) == {"x": 1}
    assert type(read["b"]) is pickles.Dictionary and read["b"].symbols == ["e"]
    for cls in (pickles.Namespace, pickles.Dictionary):
        assert set(vars(cls)) <= {"__module__", "__doc__", "__dict__", "__weakref__"} and cls.__bases__ == (
            object,
        )


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04", b"\x80\x02", b"hello", b"\x80\x02}q\x00.", os.urandom(200)]
)
def test_files_that_torch_never_wrote_are_refused(tmp_path, content):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(ModelFolderError, match=r"a\.pt"):
        convert(tmp_path / "a.pt", tmp_path / "new")


def test_damaged_files_are_refused_wherever_they_were_cut(encoder, tmp_path):
    for zipped in (True, False):
        torch.save(fairseq_state(encoder), tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
        content = (tmp_path / "a.pt").read_bytes()
        for share in (0.01, 0.1, 0.5, 0.9, 0.999):
            (tmp_path / "b.pt").write_bytes(content[: int(len(content) * share)])
            with pytest.raises(ModelFolderError, match=r"b\.pt"):
                convert(tmp_path / "b.pt", tmp_path / "new")


def test_compressed_archives_and_large_pickles_are_refused(tmp_path, monkeypatch):
    torch.save({"a": torch.zeros(100)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as source, zipfile.ZipFile(tmp_path / "b.pt", "w", 8) as swollen:
        for entry in source.infolist():
            swollen.writestr(entry.filename, source.read(entry))
    with pytest.raises(ModelFolderError, match="has compressed entries"):
        convert(tmp_path / "b.pt", tmp_path / "new")
    monkeypatch.setattr(pickles, "MAX_PICKLE_BYTES", 100)
    with pytest.raises(ModelFolderError, match="at most 100 are read"):
        convert(tmp_path / "a.pt", tmp_path / "new")
    torch.save({"a": torch.zeros(100)}, tmp_path / "c.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ModelFolderError, match="more than 100 bytes of instructions"):
        convert(tmp_path / "c.pt", tmp_path / "new")
    monkeypatch.setattr(pickles, "MAX_FILE_BYTES", 300)
    with pytest.raises(ModelFolderError, match=r"bytes; at most 300 are read"):
        convert(tmp_path / "a.pt", tmp_path / "new")


def test_a_file_of_two_archives_cannot_show_one_and_run_the_other(encoder, tmp_path):
    """Python counts a zip's offsets from where its directory is, torch from the start of the file."""
    for name in ("shown", "run"):
        (tmp_path / name).mkdir()
    torch.save({"a": types.SimpleNamespace()}, tmp_path / "run" / "a.pt")
    size = (tmp_path / "run" / "a.pt").stat().st_size

    def records(folder):
        with zipfile.ZipFile(tmp_path / folder / "a.pt") as archive:
            return [(entry.filename, entry.file_size) for entry in archive.infolist()]

    for length in range(200):
        torch.save({"a": "x" * length}, tmp_path / "shown" / "a.pt")
        if records("shown") == records("run"):
            break
    assert (tmp_path / "shown" / "a.pt").stat().st_size == size
    both = (tmp_path / "run" / "a.pt").read_bytes() + (tmp_path / "shown" / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(both)
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        assert b"Simple" not in archive.read("a/data.pkl")
    assert b"Simple" in torch._C.PyTorchFileReader(str(tmp_path / "a.pt")).get_record("data.pkl")
    with torch.serialization.safe_globals([types.SimpleNamespace]):
        assert type(torch.load(tmp_path / "a.pt", weights_only=True)["a"]) is types.SimpleNamespace
        with pytest.raises(ModelFolderError, match="two archives in one"):
            convert(tmp_path / "a.pt", tmp_path / "new")


def test_a_legacy_pickle_with_an_archive_behind_it_is_read_as_the_pickle_that_it_is(encoder, tmp_path):
    torch.save({"a": Payload(os.system, "false")}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    torch.save(fairseq_state(encoder), tmp_path / "b.pt")
    (tmp_path / "c.pt").write_bytes((tmp_path / "a.pt").read_bytes() + (tmp_path / "b.pt").read_bytes())
    assert zipfile.is_zipfile(tmp_path / "c.pt")
    with pytest.raises(ModelFolderError, match=r"names posix\.system"):
        convert(tmp_path / "c.pt", tmp_path / "new")


class Rebuilt:
    """A tensor that claims any size over a storage."""

    def __init__(self, storage, size, stride):
        self.arguments = storage, 0, size, stride, False, OrderedDict()

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, self.arguments


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("stride", [0, 1])
def test_a_tensor_larger_than_its_file_is_refused_before_memory_is_taken(encoder, tmp_path, stride, zipped):
    """One number shown 10^10 times, or a storage to grow to that: 40 GB, where 8 GB of addresses are left."""
    state = fairseq_state(encoder)
    storage = torch.storage.TypedStorage(
        wrap_storage=torch.zeros(1).untyped_storage(), dtype=torch.float32, _internal=True
    )
    huge = Rebuilt(storage, (10**10,), (stride,))
    torch.save({**state, "mask_emb": huge}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    code = (
        "import re, resource, sys, torch\n"
        "from pathlib import Path\n"
        "from ser.convert.convert import read_source\n"
        "from ser.errors import ModelFolderError\n"
        "used = int(Path('/proc/self/statm').read_text().split()[0]) * 4096\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 8 * 2**30,) * 2)\n"
        "try:\n    read_source(Path(sys.argv[1]), {})\n"
        "except ModelFolderError as error:\n    print('refused:', error)\n"
        # Not ru_maxrss, which begins with that of the process which started this one.
        "print(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1][:-3])\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "a.pt")], capture_output=True, text=True
    )
    refused, megabytes = done.stdout.splitlines()
    assert refused.startswith("refused:") and "a.pt" in refused, done.stderr
    assert int(megabytes) < 1500


def test_what_is_no_plain_tensor_is_refused_by_its_key(encoder, tmp_path):
    for wrong in (3, "x", [torch.zeros(1)], argparse.Namespace()):
        torch.save(fairseq_state(encoder) | {"mask_emb": wrong}, tmp_path / "a.pt")
        with pytest.raises(ModelFolderError, match="mask_emb is a"):
            convert(tmp_path / "a.pt", tmp_path / "new")
    torch.save([1, 2], tmp_path / "a.pt")
    with pytest.raises(ModelFolderError, match="no state dict"):
        convert(tmp_path / "a.pt", tmp_path / "new")
    torch.save({"conv.weight": torch.zeros(3)}, tmp_path / "a.pt")
    with pytest.raises(ModelFolderError, match=r"is no state dict of wav2vec 2\.0.*conv\.weight"):
        convert(tmp_path / "a.pt", tmp_path / "new")


def test_tied_tensors_and_strange_strides_keep_their_numbers(encoder, tmp_path):
    state = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    first, second = (f"encoder.layers.{i}.attention.q_proj.weight" for i in (0, 1))
    state[second] = state[first]  # one storage
    third = "encoder.layers.2.attention.q_proj.weight"
    state[third] = state[third].t().contiguous().t()
    torch.save(state, tmp_path / "a.ckpt")
    convert(tmp_path / "a.ckpt", tmp_path / "new", config=encoder.config.to_dict())
    found = ser.load_encoder(tmp_path / "new").state_dict()
    assert all(torch.equal(found[name], state[name]) for name in (first, second, third))


# ------------------------------------------------------------------------------------------------ the target


def test_a_target_is_never_destroyed(recognizer, tmp_path):
    source = tmp_path / "old"
    pickled_folder(source, recognizer)
    for target in (source, source / "in", tmp_path):
        with pytest.raises(ModelFolderError, match="choose a folder beside it"):
            convert(source, target, overwrite=True)
    (tmp_path / "notes").mkdir()
    convert(source, tmp_path / "notes")  # empty
    with pytest.raises(ModelFolderError, match="exists; choose another folder, or --overwrite"):
        convert(source, tmp_path / "notes")
    before = (tmp_path / "notes" / "model.safetensors").stat().st_mtime_ns
    (tmp_path / "notes" / "more").touch()
    convert(source, tmp_path / "notes", overwrite=True)
    assert (tmp_path / "notes" / "model.safetensors").stat().st_mtime_ns > before
    assert not (tmp_path / "notes" / "more").exists()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").touch()
    with pytest.raises(ModelFolderError, match="is not a model folder; it is not replaced"):
        convert(source, tmp_path / "home", overwrite=True)
    with pytest.raises(ModelFolderError, match="no such"):
        convert(tmp_path / "nowhere", tmp_path / "other")
    assert left_in(tmp_path) == ["home", "notes", "old"] and left_in(tmp_path / "home") == ["thesis.txt"]


@pytest.mark.parametrize("name", ["encoder.layers.2.final_layer_norm.bias", "lm_head.bias"])
def test_a_folder_in_which_one_bit_differs_from_the_source_is_not_put_into_place(
    encoder, tmp_path, monkeypatch, name
):
    torch.save(encoder.state_dict() | {"lm_head.bias": torch.zeros(5)}, tmp_path / "a.ckpt")
    write = converting.write_tensors

    def careless(path, tensors):
        changed = tensors[name].clone()
        changed.view(torch.int32)[3] ^= -(2**31)  # the sign: of a zero, no comparison of numbers sees it
        write(path, tensors | {name: changed})

    monkeypatch.setattr(converting, "write_tensors", careless)
    with pytest.raises(ModelFolderError, match=rf"other numbers in {name}"):
        convert(tmp_path / "a.ckpt", tmp_path / "new", config=encoder.config.to_dict())
    assert left_in(tmp_path) == ["a.ckpt"]


# A list that holds itself twice, 60 times over, takes 10 kB in a pickle.
def laugh() -> list:
    value = ["ha"]
    for _ in range(60):
        value = [value, value]
    return value


def in_itself() -> dict:
    value: dict = {}
    value["in"] = value
    return value


@pytest.mark.parametrize(
    "key",
    ["activation_fn", "pos_conv_depth", "extractor_mode", "encoder_embed_dim", "conv_bias", "dropout", "arch",
     "conv_feature_layers", "w2v_args", "normalize"],
)  # fmt: skip
@pytest.mark.parametrize(
    "value",
    [laugh(), in_itself(), 10**100_000, torch.zeros(7), {("a", 1): 2}, "x" * 1_000_000],
    ids=["laugh", "in itself", "huge", "tensor", "tuple", "long"],
)
def test_settings_of_any_content_are_taken_or_refused_at_once(encoder, tmp_path, key, value):
    settings = argparse.Namespace(**(fairseq_settings(encoder.config) | {key: value}))
    torch.save({"model": fairseq_state(encoder), "args": settings}, tmp_path / "a.pt")
    began = time.perf_counter()
    try:
        convert(tmp_path / "a.pt", tmp_path / "new")
    except ModelFolderError as error:
        assert len(str(error)) < 2000
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize("legacy", [False, True])
def test_tuples_in_tuples_are_refused_before_one_is_hashed(encoder, tmp_path, legacy):
    """As the key of a dict, one that holds itself twice, 60 times over, is hashed for ever: here 16 times."""
    value: tuple = ("ha",)
    for _ in range(16):
        value = (value, value)
    saved = {"model": encoder.state_dict(), "args": {value: 1}}
    torch.save(saved, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ModelFolderError, match=r"a\.pt: .*tuples in tuples, of more than 1,000 items"):
        convert(tmp_path / "a.pt", tmp_path / "new")


@pytest.mark.parametrize("settings", [{1: 2}, {(1, 2): 3, "model": {None: 1}}, [1], "x", 7])
def test_settings_whose_names_are_no_strings_are_not_taken(encoder, tmp_path, settings):
    for name in ("args", "cfg"):
        torch.save({"model": fairseq_state(encoder), name: settings}, tmp_path / "a.pt")
        convert(tmp_path / "a.pt", tmp_path / "new", config={"num_attention_heads": 4}, overwrite=True)


@pytest.mark.parametrize(
    "symbols", [[["a"]], [{}, "<pad>"], "abc", {"a": 1}, [laugh()], ["<s>", "<pad>", ["</s>"]], 3]
)
def test_symbols_that_are_no_strings_are_refused(fairseq_dictionary, encoder, tmp_path, symbols):
    state = fairseq_state(encoder) | {"proj.weight": torch.zeros(3, 24), "proj.bias": torch.zeros(3)}
    dictionary = fairseq_dictionary([])
    dictionary.symbols = symbols
    saved = {"model": state, "args": argparse.Namespace(**fairseq_settings(encoder.config))}
    torch.save(saved | {"task_state": {"target_dictionary": dictionary}}, tmp_path / "a.pt")
    with pytest.raises(ModelFolderError, match=r"its dictionary is .*pass --vocab"):
        convert(tmp_path / "a.pt", tmp_path / "new")


def test_the_certificate_says_what_was_read_written_and_compared(encoder, tmp_path):
    torch.save(encoder.state_dict(), tmp_path / "a.ckpt")
    lines: list[str] = []
    returned = convert(tmp_path / "a.ckpt", tmp_path / "new", config=encoder.config.to_dict(), say=lines.append)
    count = len(encoder.state_dict())
    digests = {
        path: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (tmp_path / "a.ckpt", tmp_path / "new" / "model.safetensors")
    }
    assert returned == json.loads((tmp_path / "new" / "certificate.json").read_text())
    assert returned == {
        "source": {"name": "a.ckpt", "kind": "hugging-face", "sha256": {"a.ckpt": digests[tmp_path / "a.ckpt"]}},
        "model": {"type": "wav2vec2", "sha256": digests[tmp_path / "new" / "model.safetensors"]},
        "tensors": {"read": count, "written": count, "unused": [], "new": []},
        "assumed": {},
        "comparison": {"reference": "none installed", "samples": 16_000, "layers": [], "largest": None},
        "versions": {"ser": ser.__version__, "torch": str(torch.__version__)},
    }
    assert len(lines) == 4 and f"{count} tensors" in lines[0]


def test_without_a_reference_nothing_is_compared_and_the_certificate_says_none(encoder, tmp_path):
    torch.save(encoder.state_dict(), tmp_path / "a.ckpt")
    lines: list[str] = []
    settings = {"config": encoder.config.to_dict(), "say": lines.append}
    returned = converting.convert(tmp_path / "a.ckpt", tmp_path / "new", **settings)
    assert returned["comparison"] == {"reference": "none", "samples": 16_000, "layers": [], "largest": None}
    assert "layers compared with: none" in lines


# ------------------------------------------------------------------------------------------------ the script


def run_script(*arguments: str | Path, cwd: Path, script: Sequence[str | Path] = ("-m", "ser", "convert")):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", *map(str, [*script, *arguments])]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)


def test_the_script_converts_and_reports_errors_in_one_line(styles, randomise, tmp_path):
    paper_folder(tmp_path / "old", paper_recognizer(styles, randomise, emotions=2, speakers=2, symbols=5))
    (tmp_path / "vocab.json").write_text('{"<pad>": 0, "a": 1, "b": 2, "|": 3, "c": 4}')
    arguments = ("old", "new", "--labels", "joy, fear", "--speakers", "x,y", "--vocab", "vocab.json")
    done = run_script(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = ser.load(tmp_path / "new")
    assert (found.emotions, found.speakers) == (["joy", "fear"], ["x", "y"])
    assert "certificate.json" in done.stdout and len(done.stdout.splitlines()) == 4
    done = run_script(*arguments, cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "error: new: exists; choose another folder, or --overwrite\n"


def test_the_page_in_examples_also_compares_layers_and_the_command_does_not(styles, randomise, tmp_path):
    config = styles["base-style"]
    torch.save(randomise(torchaudio_model(config)).state_dict(), tmp_path / "a.pth")
    (tmp_path / "heads.json").write_text(json.dumps({"num_attention_heads": config.num_attention_heads}))
    found = {}
    for name, script in (("command", ("-m", "ser", "convert")), ("page", (ROOT / "examples" / "convert.py",))):
        done = run_script("a.pth", name, "--config", tmp_path / "heads.json", cwd=tmp_path, script=script)
        assert done.returncode == 0, done.stderr
        found[name] = json.loads((tmp_path / name / "certificate.json").read_text())["comparison"]
    assert found["command"]["reference"] == "none" and found["command"]["layers"] == []
    assert found["page"]["reference"].startswith("torchaudio ") and found["page"]["largest"] < 1e-5


def test_importing_ser_does_not_import_the_converter():
    code = "import sys, ser; print([m for m in ('ser.convert', 'ser.convert.pickles') if m in sys.modules])"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout == "[]\n"


def test_no_other_module_reads_a_pickle():
    for path in (ROOT / "ser").rglob("*.py"):
        if path.name != "pickles.py":
            text = path.read_text()
            assert "torch.load(" not in text and "import pickle" not in text, path

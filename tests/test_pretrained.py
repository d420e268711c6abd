"""Model folders are foreign input: what does not fit is listed, what is hostile is refused, and nothing runs."""

import json
import os
import pickle
import random
import re
import resource
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import ser
from ser.errors import ModelFolderError, SerError
from ser.files import write_json, write_tensors
from ser.models.config import Wav2Vec2Config
from ser.models.pretrained import (
    MAX_JSON_BYTES,
    WEIGHT_NORM,
    check_folder,
    load_encoder,
    materialise,
    read_json,
    resolve_inside,
)
from ser.models.wav2vec2 import Wav2Vec2

TINY = Wav2Vec2Config(
    conv_dim=(8, 8),
    conv_kernel=(10, 8),
    conv_stride=(40, 8),
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    num_conv_pos_embeddings=4,
    num_conv_pos_embedding_groups=2,
)
MASK = "masked_spec_embed"


def random_encoder(config: Wav2Vec2Config = TINY) -> Wav2Vec2:
    torch.manual_seed(0)
    return Wav2Vec2(config).eval()


def write_folder(folder: Path, config: Wav2Vec2Config = TINY) -> Wav2Vec2:
    """A sound model folder, and the encoder that it holds."""
    encoder = random_encoder(config)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", {"model_type": "wav2vec2", **config.to_dict()})
    write_tensors(folder / "model.safetensors", encoder.state_dict())
    return encoder


def rewrite(folder: Path, change) -> None:
    """Pass the folder's tensors through ``change``."""
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path)


def reconfigure(folder: Path, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_folder(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def waveform() -> torch.Tensor:
    return torch.randn(1, 4000, generator=torch.Generator().manual_seed(1))


def assert_same(encoder: Wav2Vec2, source: Wav2Vec2, waveform: torch.Tensor, tolerance: float = 0.0) -> None:
    with torch.no_grad():
        ours, theirs = encoder(waveform)[0], source(waveform)[0]
    assert (ours - theirs).norm() <= tolerance * theirs.norm()


# ------------------------------------------------------------------------------------------- what fits


def test_a_folder_gives_back_its_encoder_bit_for_bit_and_reports_every_tensor(folder, waveform):
    encoder, report = load_encoder(folder, report=True)
    assert_same(encoder, random_encoder(), waveform)
    assert not encoder.training and all(p.dtype == torch.float32 for p in encoder.parameters())
    assert sorted(report.matched) == sorted(encoder.state_dict())
    assert report.new == report.unused == []
    assert report.ignored_settings == []
    assert str(report) == f"{folder}: {len(report.matched)} tensors loaded"


def test_prefix_and_both_spellings_of_weight_norm_load(folder, waveform):
    older = {new: old for old, new in WEIGHT_NORM.items()}
    rewrite(folder, lambda tensors: {f"wav2vec2.{older.get(k, k)}": v for k, v in tensors.items()})
    keys = load_file(folder / "model.safetensors")
    assert "wav2vec2.encoder.pos_conv_embed.conv.weight_g" in keys
    assert_same(load_encoder(folder), random_encoder(), waveform)


WRAPPERS = ["module.", "_orig_mod.", "_fsdp_wrapped_module._checkpoint_wrapped_module."]  # anywhere in a key
OUTER = ["model.", "base_model.model.", "module._orig_mod.", "_orig_mod.module.", "model.module."]


@pytest.mark.parametrize("wrapper", [*WRAPPERS, *OUTER])
@pytest.mark.parametrize("prefix", ["", "wav2vec2."])
def test_keys_that_wrappers_saved_load_without_what_stands_before_them(folder, waveform, wrapper, prefix):
    source = load_encoder(folder)
    rewrite(folder, lambda tensors: {f"{wrapper}{prefix}{key}": tensor for key, tensor in tensors.items()})
    assert_same(load_encoder(folder), source, waveform)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_keys_of_parts_that_were_wrapped_by_themselves_load(folder, waveform, wrapper):
    source, part = load_encoder(folder), "feature_extractor."
    rewrite(folder, lambda tensors: {key.replace(part, part + wrapper): t for key, t in tensors.items()})
    assert_same(load_encoder(folder), source, waveform)


def test_two_wrappings_of_one_tensor_are_refused(folder):
    rewrite(
        folder,
        lambda t: t | {f"module.{k}": v.clone() for k, v in t.items() if k.startswith("encoder.layer_norm")},
    )
    with pytest.raises(ModelFolderError, match=r"mean the same stand there twice: .*module\.encoder\.layer_norm"):
        load_encoder(folder)


@pytest.mark.parametrize(
    "key",
    ["base_model.model.encoder.layers.0.attention.q_proj.lora_A.default.weight",
     "base_model.model.encoder.layers.0.attention.q_proj.base_layer.weight",
     "base_model.model.classifier.modules_to_save.default.weight"],
)  # fmt: skip
def test_adapters_beside_the_weights_are_refused_by_name_with_what_to_do(folder, key):
    rewrite(folder, lambda tensors: tensors | {key: torch.zeros(2, 2)})
    with pytest.raises(ModelFolderError, match=rf"adapters of PEFT: {key}.*merge_and_unload"):
        load_encoder(folder)


def test_a_folder_with_an_adapter_alone_is_said_to_be_one(folder):
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    for _ in range(2):
        with pytest.raises(ModelFolderError, match=r"adapter of PEFT.*merge_and_unload"):
            load_encoder(folder)
        (folder / "config.json").unlink(missing_ok=True)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + 64 * "0" + "\nsize 12345\n"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_pointer_of_git_lfs_is_named_as_such(folder, name):
    (folder / name).write_text(POINTER)
    with pytest.raises(ModelFolderError, match=rf"{name}: is a pointer of git-lfs.*git lfs pull"):
        load_encoder(folder)


@pytest.mark.parametrize("name", ["a" * 5000, "a/" * 2500, "a/" + "b" * 5000, "a\0b", "owner/na\0me", ""])
def test_a_name_that_no_folder_can_have_is_no_such_folder(name):
    with pytest.raises(ModelFolderError) as caught:
        load_encoder(name)
    assert len(str(caught.value)) < 1000


def test_half_precision_files_become_float32(folder, waveform):
    rewrite(folder, lambda tensors: {k: v.half() for k, v in tensors.items()})
    source = random_encoder()
    source.load_state_dict({k: v.half().float() for k, v in source.state_dict().items()})
    assert_same(load_encoder(folder), source, waveform)


def test_shards_load_as_one_file(folder, waveform):
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    (folder / "model.safetensors").unlink()
    shards = {f"model-{i + 1:05d}-of-00003.safetensors": names[i::3] for i in range(3)}
    for file, keys in shards.items():
        save_file({k: tensors[k] for k in keys}, folder / file)
    weight_map = {k: file for file, keys in shards.items() for k in keys}
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    assert_same(load_encoder(folder), random_encoder(), waveform)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ModelFolderError, match=r"missing: model-00002-of-00003\.safetensors"):
        load_encoder(folder)


def test_a_missing_mask_embedding_is_new_and_reported(folder, waveform):
    rewrite(folder, lambda tensors: {k: v for k, v in tensors.items() if k != MASK})
    encoder, report = load_encoder(folder, report=True)
    assert report.new == [MASK] and MASK not in report.matched
    assert "1 newly initialised: masked_spec_embed" in str(report)
    assert torch.isfinite(encoder.masked_spec_embed).all()
    assert_same(encoder, random_encoder(), waveform)


def test_tensors_of_other_tasks_are_left_and_reported(folder, waveform):
    others = ["quantizer.codevectors", "project_q.weight", "lm_head.weight", "cls_head.bias", "projector.weight"]
    rewrite(folder, lambda tensors: {**tensors, **{name: torch.zeros(3) for name in others}})
    encoder, report = load_encoder(folder, report=True)
    assert sorted(report.unused) == sorted(others)
    assert "5 not used: " in str(report)
    assert_same(encoder, random_encoder(), waveform)


def test_a_mask_embedding_that_the_configuration_has_no_use_for_is_left(folder):
    reconfigure(folder, mask_time_prob=0.0, mask_feature_prob=0.0)
    encoder, report = load_encoder(folder, report=True)
    assert not hasattr(encoder, MASK) and report.unused == [MASK]


# ------------------------------------------------------------------------------------- what does not fit


def test_missing_and_misshapen_tensors_stand_in_one_full_list(folder):
    def damage(tensors):
        del tensors["encoder.layers.0.attention.k_proj.weight"], tensors["encoder.layers.1.layer_norm.bias"]
        tensors["feature_projection.projection.weight"] = torch.zeros(5, 8)
        return tensors

    rewrite(folder, damage)
    with pytest.raises(ModelFolderError) as caught:
        load_encoder(folder)
    head, *lines = str(caught.value).splitlines()
    assert str(folder) in head and "3 of " in head
    assert sorted(line.strip() for line in lines) == [
        "encoder.layers.0.attention.k_proj.weight: missing, expected (16, 16)",
        "encoder.layers.1.layer_norm.bias: missing, expected (16,)",
        "feature_projection.projection.weight: found (5, 8), expected (16, 8)",
    ]


def test_encoder_tensors_that_the_configuration_does_not_ask_for_are_refused(folder):
    reconfigure(folder, num_hidden_layers=1)
    with pytest.raises(ModelFolderError, match=r"16 tensors that config.json does not ask for.*layers\.1\."):
        load_encoder(folder)


def test_a_tensor_that_stands_there_twice_is_refused(folder):
    rewrite(folder, lambda tensors: {**tensors, f"wav2vec2.{MASK}": torch.zeros(16)})
    with pytest.raises(ModelFolderError, match=f"twice: .*{MASK}"):
        load_encoder(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(folder, value):
    def damage(tensors):
        tensors["encoder.layers.1.final_layer_norm.weight"][3] = value
        return tensors

    rewrite(folder, damage)
    with pytest.raises(ModelFolderError, match=r"NaN or infinity: encoder\.layers\.1\.final_layer_norm\.weight"):
        load_encoder(folder)


def test_finite_weights_whose_sum_is_not_are_loaded(folder):
    def enlarge(tensors):
        tensors["encoder.layers.1.final_layer_norm.weight"].fill_(3e38)
        return tensors

    rewrite(folder, enlarge)
    assert float(load_encoder(folder).encoder.layers[1].final_layer_norm.weight[0]) == pytest.approx(3e38)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64])
def test_weights_that_are_not_floating_point_are_refused(folder, dtype):
    rewrite(folder, lambda tensors: {**tensors, MASK: torch.zeros(16, dtype=dtype)})
    with pytest.raises(ModelFolderError, match=f"{MASK} holds {re.escape(str(dtype))}; expected floating point"):
        load_encoder(folder)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("nothing", "no such folder"), ("file", "is a file"), ("empty", "no config.json.*nothing")],
)
def test_what_is_not_a_model_folder_is_said_to_be_none(tmp_path, name, expected):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelFolderError, match=expected):
        load_encoder(tmp_path / name)


# ---------------------------------------------------------------------------------------- what is hostile


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def pickled(target: Path) -> bytes:
    data = pickle.dumps(Payload(target))
    pickle.loads(data)  # it does work
    assert target.exists()
    target.unlink()
    return data


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "last.ckpt"])
def test_a_pickle_is_not_read_and_the_message_says_why(folder, tmp_path, name):
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickled(tmp_path / "ran"))
    with pytest.raises(ModelFolderError, match=rf"{re.escape(name)} is a pickle, which can run code"):
        load_encoder(folder)
    with pytest.raises(ModelFolderError, match="pickle"):
        ser.load(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("zipped", [False, True])
def test_a_pickle_named_safetensors_is_not_executed(folder, tmp_path, zipped):
    data = pickled(tmp_path / "ran")
    if zipped:
        torch.save(Payload(tmp_path / "ran"), folder / "model.safetensors")
    else:
        (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(ModelFolderError, match="a zip or a pickle under another name"):
        load_encoder(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "shard",
    [
        "../outside.safetensors",
        "/etc/passwd",
        "sub/x.safetensors",
        "..",
        ".",
        "",
        "a\0b",
        "x" * 300,
        "\ud800",
        "~",
    ],
)
def test_an_index_cannot_name_files_outside_its_folder(folder, tmp_path, shard):
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = {"weight_map": dict.fromkeys(random_encoder().state_dict(), shard)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelFolderError, match=re.escape(str(folder))):
        load_encoder(folder)


@pytest.mark.parametrize("index", [[], {}, {"weight_map": []}, {"weight_map": {"a": 1}}, {"weight_map": {}}])
def test_an_index_without_a_map_of_names_is_refused(folder, index):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelFolderError, match=re.escape(str(folder))):
        load_encoder(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_links_out_of_the_folder_are_refused(folder, tmp_path, name):
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    with pytest.raises(ModelFolderError, match=rf"{re.escape(name)}: links to .*outside the model folder"):
        load_encoder(folder)


def test_links_within_the_folder_are_followed(folder, waveform):
    (folder / "model.safetensors").rename(folder / "weights")
    (folder / "model.safetensors").symlink_to("weights")
    assert_same(load_encoder(folder), random_encoder(), waveform)


def test_the_hubs_cache_layout_is_read_and_nothing_else_beside_it(folder, tmp_path, waveform):
    repository = tmp_path / "models--facebook--tiny"
    snapshot = repository / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for i, name in enumerate(("config.json", "model.safetensors")):
        (folder / name).rename(repository / "blobs" / f"blob{i}")
        (snapshot / name).symlink_to(Path("../../blobs") / f"blob{i}")
    assert_same(load_encoder(snapshot), random_encoder(), waveform)

    (repository / "blobs" / "blob1").rename(repository / "elsewhere")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to("../../elsewhere")
    with pytest.raises(ModelFolderError, match="outside the model folder"):
        load_encoder(snapshot)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("kind", ["broken link", "loop", "FIFO", "folder"])
def test_what_is_no_regular_file_is_refused_without_a_hang(folder, name, kind):
    path = folder / name
    path.unlink()
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("nowhere" if kind == "broken link" else name)
    child = os.fork()
    if not child:  # to open a FIFO waits for ever, in which Python hears no signal: this process would die of it
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(60)
        try:
            load_encoder(folder)
        except ModelFolderError as error:
            os._exit(0 if name in str(error) else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def peak_bytes() -> int:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def mutants(data: bytes, count: int):
    """Damaged safetensors files: cut, and with bytes, numbers and words of the header changed."""
    chance = random.Random(0)
    size = struct.unpack("<Q", data[:8])[0]
    words = [
        b"F32",
        b"F16",
        b"I64",
        b"F8_E4M3",
        b"U32",
        b"BOOL",
        b"-1",
        b"1e9",
        b"null",
        b"[",
        b"{",
        b'"',
        b"\xff",
    ]
    words += [b"18446744073709551615", b"99999999999999999999", b"[]", b"[0]", b"NaN", b"\0", b"dtype", b"C64"]
    for number in range(count):
        kind = number % 5
        if kind == 0:
            yield data[: chance.randrange(len(data))]
        elif kind == 1:
            yield (
                struct.pack("<Q", chance.choice([0, 1, size - 1, size + 1, 2**31, 2**63, chance.getrandbits(64)]))
                + data[8:]
            )
        elif kind == 2:
            at = 8 + chance.randrange(size)
            yield data[:at] + bytes([chance.randrange(256)]) + data[at + 1 :]
        elif kind == 3:  # another word, and a length that is right again
            found = chance.choice(list(re.finditer(rb"F32|\d+|\"[a-z_.]+\"", data[8 : 8 + size])))
            header = data[8 : 8 + found.start()] + chance.choice(words) + data[8 + found.end() : 8 + size]
            yield struct.pack("<Q", len(header)) + header + data[8 + size :]
        else:
            header = json.loads(data[8 : 8 + size])
            entry = header[chance.choice([k for k in header if k != "__metadata__"])]
            entry[chance.choice(["dtype", "shape", "data_offsets"])] = chance.choice(
                [
                    "F64",
                    "I32",
                    "F4",
                    "F8_E8M0",
                    [2**40, 2**40],
                    [-1],
                    [],
                    [0, 2**62],
                    None,
                    3,
                    {},
                    [[]],
                    "x" * 10_000,
                ]
            )
            text = json.dumps(header).encode()
            yield struct.pack("<Q", len(text)) + text + data[8 + size :]


def test_damaged_safetensors_files_are_errors_with_their_path(folder):
    path = folder / "model.safetensors"
    sound = path.read_bytes()
    refused = 0
    before = peak_bytes()
    for data in mutants(sound, 2000):
        path.write_bytes(data)
        began = time.process_time()
        try:
            load_encoder(folder)  # a flipped letter in the metadata does no harm
        except SerError as error:
            assert str(folder) in str(error)
            refused += 1
        assert time.process_time() - began < 1
    assert refused > 1800
    assert peak_bytes() - before < 50e6


def test_a_header_with_a_hundred_thousand_tensors_is_refused_unparsed(folder):
    entries = {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(100_000)}
    header = json.dumps(entries).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    began, before = time.process_time(), peak_bytes()
    with pytest.raises(ModelFolderError, match=rf"header has {len(header):,} bytes; at most"):
        load_encoder(folder)
    assert time.process_time() - began < 1 and peak_bytes() - before < 50e6


def test_a_sparse_file_with_every_tensor_of_a_huge_configuration_is_refused_before_it_is_read(folder):
    """13 GB that take no room on the disk would take it in memory."""
    reconfigure(folder, hidden_size=16_384, intermediate_size=65_536, num_hidden_layers=1)
    values = json.loads((folder / "config.json").read_text())
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in Wav2Vec2(Wav2Vec2Config.from_dict(values)).state_dict().items()}
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * shape.numel()
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    began, before = time.process_time(), peak_bytes()
    with pytest.raises(ModelFolderError, match=r"parameters; at most 2,500,000,000 are loaded"):
        load_encoder(folder)
    assert time.process_time() - began < 1 and peak_bytes() - before < 50e6


HOSTILE = {
    "hidden_size": [10**9, -1, 0, True, "16", None, 16.0, float("nan"), [16], {}, 10**400],
    "num_hidden_layers": [10**9, 513],
    "num_attention_heads": [0, 10**9, 3],
    "conv_dim": [[10**9, 8], [], 8, "88", [8], [8] * 100, [8, None], {"0": 8}, [[8, 8]], [8] * 10**5],
    "conv_stride": [[0, 8], [40, -8], [1, 1], [60_000, 60_000]],
    "layer_norm_eps": [float("nan"), float("inf"), 0, -1, 10**400, "1e-5", None],
    "hidden_dropout": [2, -0.1, float("nan"), "x" * 10**6],
    "feat_extract_norm": ["batch", None, 1, []],
    "do_stable_layer_norm": ["yes", 1, None],
    "num_conv_pos_embeddings": [10**9, 0],
    "num_conv_pos_embedding_groups": [10**9, 0, 5],
    "mask_time_length": [0, 10**9],
    "model_type": ["wav2vec2-bert", [], {}, 1],
    "hidden_act": ["relu", ["gelu"]],
    "add_adapter": [True],
    "feat_proj_layer_norm": [False],
    "num_buckets": [10**9],
    "conv_pos_kernel_size": [10**9],
}


@pytest.mark.parametrize(
    ("key", "value"),
    [pytest.param(k, v, id=f"{k}={str(v)[:20]}") for k, values in HOSTILE.items() for v in values],
)
def test_a_hostile_setting_is_refused_by_name_before_anything_is_built(folder, monkeypatch, key, value):
    reconfigure(folder, **{key: value})
    monkeypatch.setattr(Wav2Vec2, "__init__", lambda *_: pytest.fail("a model was built"))
    began, before = time.process_time(), peak_bytes()
    with pytest.raises(ModelFolderError) as caught:
        load_encoder(folder)
    assert time.process_time() - began < 1 and peak_bytes() - before < 50e6
    message = str(caught.value)
    assert str(folder / "config.json") in message and len(message) < 1000
    assert key in message or value == 10**400


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"3",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"hidden_size": ' + b"9" * 5000 + b"}",
    ],
    ids=lambda content: repr(content[:8]),
)
def test_a_config_that_is_no_json_object_is_refused(folder, content):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ModelFolderError, match=re.escape(str(folder / "config.json"))):
        load_encoder(folder)


def test_a_huge_config_is_refused_by_its_size_unread(folder):
    with (folder / "config.json").open("wb") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(ModelFolderError, match=rf"1,099,511,627,776 bytes; at most {MAX_JSON_BYTES:,}"):
        read_json(folder, "config.json")


def test_a_configuration_far_too_large_for_its_weights_allocates_nothing(folder):
    # Every size is allowed by itself; together the model would have 10^12 parameters.
    reconfigure(folder, hidden_size=65_536, intermediate_size=65_536, num_hidden_layers=64)
    with pytest.raises(ModelFolderError, match=r"missing, expected \(65536, 65536"):
        load_encoder(folder)


@pytest.mark.parametrize("name", ["a/b", "/etc/passwd", "..", "", ".", "a\0b", "\ud800", "x" * 300])
def test_only_plain_names_are_resolved(folder, name):
    with pytest.raises(ModelFolderError):
        resolve_inside(folder, name)


# --------------------------------------------------------------------------------------------- what it costs


def test_building_for_a_folder_draws_no_weights_and_takes_no_memory():
    before = torch.random.get_rng_state()
    model = materialise(lambda: Wav2Vec2(Wav2Vec2Config.named("base")))
    assert {p.device.type for p in model.state_dict().values()} == {"meta"}
    assert torch.equal(torch.random.get_rng_state(), before)
    expected = {k: v.shape for k, v in random_encoder().state_dict().items()}
    tiny = materialise(lambda: Wav2Vec2(TINY))
    assert {k: v.shape for k, v in tiny.state_dict().items()} == expected


def write_zeros(path: Path, shapes: dict[str, torch.Size]) -> None:
    """A safetensors file of float32 zeros, which is sparse: it takes no room and no time."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * shape.numel()
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + end)


MEASURE = """
import re, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
import ser

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

ser.load_encoder(sys.argv[1])  # what the first call imports is not counted
Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
before, modules, began = peak(), len(sys.modules), time.process_time()
encoder = ser.load_encoder(sys.argv[2])
print(peak() - before, time.process_time() - began, len(sys.modules) - modules, "torch._dynamo" in sys.modules)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_loading_costs_about_one_read(folder, tmp_path):
    config = Wav2Vec2Config.named("base")
    big = tmp_path / "base"
    big.mkdir()
    write_json(big / "config.json", {"model_type": "wav2vec2", **config.to_dict()})
    shapes = {k: v.shape for k, v in materialise(lambda: Wav2Vec2(config)).state_dict().items()}
    write_zeros(big / "model.safetensors", shapes)
    size = (big / "model.safetensors").stat().st_size
    assert size > 370e6
    began = time.process_time()
    (big / "model.safetensors").read_bytes()
    read = time.process_time() - began
    done = subprocess.run([sys.executable, "-c", MEASURE, folder, big], capture_output=True, text=True, check=True)
    growth, seconds, _, tracer = done.stdout.split()
    assert int(growth) < 1.3 * size
    assert float(seconds) < 5 * read + 1  # drawing random weights alone takes some 20 reads
    assert tracer == "False"  # nor is torch's tracer imported, which takes longer than the read


def test_a_loaded_model_does_not_depend_on_its_file(folder, waveform):
    # safetensors maps the file: of a model that was still mapped, the process would die of SIGBUS here.
    script = (
        "import os, sys, torch, ser; encoder = ser.load_encoder(sys.argv[1]);"
        "os.truncate(sys.argv[1] + '/model.safetensors', 0);"
        "print(torch.isfinite(encoder(torch.randn(1, 4000))[0]).all().item())"
    )
    done = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "True"), done.stderr


def test_check_folder_takes_strings(folder):
    assert check_folder(str(folder)) == folder

"""A model with its labels: saved and loaded, created from another, and what it says about recordings."""

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file
from toy import toy_rows
from tqdm import tqdm

import ser
from ser.data.manifest import Utterance
from ser.data.text import Vocabulary
from ser.device import freed_memory_kept, has_fast_bf16
from ser.errors import AudioError, ConfigError, FileError, ModelFolderError, SerError
from ser.inputs import MOST_FIRST, WINDOW, Recording, gather, plan_batches
from ser.models.heads import HEADS
from ser.models.multitask import HeadsConfig, MultiTaskModel
from ser.recognizer import BATCH_SECONDS, MAX_SECONDS, Prediction, Recognizer
from ser.train.config import TrainConfig
from ser.train.evaluation import evaluate
from ser.train.loop import fit

EMOTIONS, SPEAKERS = ["sad", "happy", "cross"], ["Ann", "Bo"]
LIBRISPEECH = Vocabulary.librispeech()
FILES = {
    "config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "vocab.json",
}


@pytest.fixture
def make(styles, randomise):
    """A recognizer with random weights and the heads that are asked for."""

    def build(*, emotions=EMOTIONS, speakers=SPEAKERS, vocabulary=LIBRISPEECH, style="base-style", **options):
        sizes = HeadsConfig(
            num_emotions=len(emotions),
            vocab_size=len(vocabulary) if vocabulary else 0,
            num_speakers=len(speakers),
            pooling=options.pop("pooling", "mean"),
        )
        model = randomise(MultiTaskModel(styles[style], sizes)).eval()
        return Recognizer(model, emotions=emotions, speakers=speakers, vocabulary=vocabulary, **options)

    return build


@pytest.fixture
def recognizer(make) -> Recognizer:
    return make()


def noise(samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, samples).astype(np.float32)


@pytest.fixture
def recordings(tmp_path: Path) -> list[Path]:
    """Seven files of very different lengths, in no order of length."""
    paths = []
    for i, samples in enumerate([9000, 401, 30_000, 12_000, 700, 16_000, 2_000]):
        paths.append(tmp_path / f"{i}.wav")
        soundfile.write(paths[-1], noise(samples, i), 16000, subtype="FLOAT")
    return paths


def assert_alike(a: Prediction, b: Prediction, tolerance: float = 1e-4) -> None:
    assert (a.emotion, a.transcript, a.speaker, a.warning) == (b.emotion, b.transcript, b.speaker, b.warning)
    assert a.probabilities == pytest.approx(b.probabilities, abs=tolerance)
    assert a.speaker_probability == pytest.approx(b.speaker_probability, abs=tolerance)
    assert a.seconds == pytest.approx(b.seconds, abs=1e-3)


# ------------------------------------------------------------------------------------------- saving, loading


@pytest.mark.parametrize("pooling", ["mean", "mean+std"])
@pytest.mark.parametrize("do_normalize", [True, False])
def test_a_saved_recognizer_predicts_exactly_the_same(make, tmp_path, pooling, do_normalize):
    before = make(pooling=pooling, do_normalize=do_normalize, style="large-style")
    before.save(tmp_path / "model")
    after = ser.load(tmp_path / "model")
    assert before.predict([noise(9000), noise(700)], 16000) == after.predict([noise(9000), noise(700)], 16000)
    assert (after.do_normalize, after.model.heads_config.pooling) == (do_normalize, pooling)
    assert not after.model.training


def test_bf16_predicts_what_float32_does_to_two_digits_and_float32_is_what_one_gets_unasked(make, tmp_path):
    make().save(tmp_path / "m")
    samples = np.random.default_rng(0).normal(size=16_000)
    (exact,) = ser.load(tmp_path / "m").predict(samples, 16_000)
    half = ser.load(tmp_path / "m", precision="bf16")
    (rough,) = half.predict(samples, 16_000)
    assert ser.load(tmp_path / "m").precision == torch.float32 and half.precision == torch.bfloat16
    assert rough.probabilities != exact.probabilities
    assert rough.probabilities == pytest.approx(exact.probabilities, abs=0.02)
    assert sum(rough.probabilities.values()) == pytest.approx(1)
    with pytest.raises(ConfigError, match=r"precision is 'int8'.*float32, bf16 or auto"):
        ser.load(tmp_path / "m", precision="int8")


def test_weights_rounded_at_loading_predict_as_those_that_autocast_rounds(make, tmp_path):
    make().save(tmp_path / "m")
    samples = [noise(16_000), noise(9_000)]
    once, each_time = ser.load(tmp_path / "m", precision="bf16"), ser.load(tmp_path / "m")
    each_time.precision = torch.bfloat16
    assert once.predict(samples, 16_000) == each_time.predict(samples, 16_000)
    assert {p.dtype for p in once.model.wav2vec2.encoder.layers.parameters()} == {torch.float32, torch.bfloat16}


class CountedLibc:
    """Stands for glibc, and counts the calls that change how it treats freed memory."""

    def __init__(self) -> None:
        self.calls = 0

    def mallopt(self, *_: int) -> None:
        self.calls += 1

    def malloc_trim(self, _: int) -> None:
        self.calls += 1


def test_predictions_leave_the_memory_of_their_host_process_alone(recognizer, tmp_path, monkeypatch):
    libc = CountedLibc()
    monkeypatch.setattr("ser.device.glibc", lambda: libc)
    soundfile.write(tmp_path / "long.wav", noise(64_000), 16_000)
    recognizer.predict([noise(9000), noise(9000)], 16_000)
    for stream in (
        recognizer.stream([noise(9000), noise(9000)], 16_000),
        recognizer.predict_windows(tmp_path / "long.wav", window=1),
    ):
        next(stream)  # between two results other work of the process goes on
        assert libc.calls == 0
        assert list(stream) and libc.calls == 0


def test_who_serves_predictions_may_keep_freed_memory_for_a_while(recognizer, monkeypatch):
    libc = CountedLibc()
    monkeypatch.setattr("ser.device.glibc", lambda: libc)
    with freed_memory_kept(recognizer.device):
        recognizer.predict(noise(9000), 16_000)
        inside = libc.calls
        with freed_memory_kept(recognizer.device):
            recognizer.predict(noise(9000), 16_000)
        assert libc.calls == 2 * inside, "which an inner context sets again, and does not undo"
    assert inside == 2 and libc.calls == 4 + 3


@pytest.mark.parametrize(
    "command", ["predict {0}/0.wav --model {0}/m", "evaluate --manifest {0}/rows.csv --model {0}/m"]
)
def test_commands_keep_freed_memory(recognizer, recordings, tmp_path, command):
    """In a process of its own, with the command's `main` as anybody runs it."""
    recognizer.save(tmp_path / "m")
    rows = [f"{path.name},{EMOTIONS[i % 3]}" for i, path in enumerate(recordings)]
    (tmp_path / "rows.csv").write_text("\n".join(["file,emotion", *rows]) + "\n")
    program = f"""
import sys, ser.cli, ser.device
found = ser.device.glibc
ser.device.glibc = lambda: print("kept", file=sys.stderr) or found()
sys.exit(ser.cli.main([*{command.format(tmp_path).split()!r}, "--device", "cpu"]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines().count("kept") == 1


def test_a_model_loaded_in_bf16_is_evaluated_in_it_and_neither_saved_nor_trained(make, tmp_path):
    make().save(tmp_path / "m")
    rows = toy_rows(tmp_path / "corpus", 6)
    half = ser.load(tmp_path / "m", precision="bf16")
    scored = [prediction.probabilities for _, _, prediction in evaluate(half, rows, keep_rows=True).rows]
    assert scored == [p.probabilities for p in half.predict(rows)]
    assert scored != [p.probabilities for p in ser.load(tmp_path / "m").predict(rows)]
    with pytest.raises(ConfigError, match=r"loaded in bf16.*Load it in float32 to save it"):
        half.save(tmp_path / "copy")
    with pytest.raises(ConfigError, match=r"loaded in bf16.*Load it in float32 to train it"):
        fit(half, rows, [], TrainConfig(epochs=1), tmp_path / "run")
    assert not (tmp_path / "copy").exists() and not list((tmp_path / "run").glob("*"))


@pytest.mark.parametrize(
    ("vendor", "flags", "fast"),
    [
        ("GenuineIntel", "avx2 avx512f", False),
        ("GenuineIntel", "avx512f avx512_bf16", False),  # at half the rate of float32
        ("GenuineIntel", "avx512_bf16 amx_bf16 amx_tile", True),
        ("AuthenticAMD", "avx2", False),
        ("AuthenticAMD", "avx512f avx512_bf16", True),
    ],
)
def test_bf16_is_chosen_for_processors_on_which_it_is_faster(tmp_path, vendor, flags, fast):
    cpuinfo = tmp_path / "cpuinfo"
    core = f"processor\t: 0\nvendor_id\t: {vendor}\nflags\t\t: fpu {flags}\n"
    cpuinfo.write_text(f"{core}\n{core.replace('avx', 'x')}")
    assert has_fast_bf16(torch.device("cpu"), cpuinfo) == fast
    assert not has_fast_bf16(torch.device("cpu"), tmp_path / "none")


def test_a_saved_recognizer_keeps_its_labels_and_how_its_text_was_cleaned(make, tmp_path):
    vocabulary = Vocabulary.build(["Abc d"], word_delimiter="/")
    before = make(vocabulary=vocabulary, orthography="buckwalter", tags="keep-letters", emotions=["é", "a b"])
    before.save(tmp_path / "model")
    after = ser.load(str(tmp_path / "model"))
    for name in ("emotions", "speakers", "vocabulary", "orthography", "tags"):
        assert getattr(after, name) == getattr(before, name)
    assert {p.name for p in (tmp_path / "model").iterdir()} == FILES
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["id2label"] == {"0": "é", "1": "a b"} and config["label2id"] == {"é": 0, "a b": 1}


@pytest.mark.parametrize("head", ["emotion", "ctc", "speaker"])
def test_a_model_with_one_head_says_nothing_of_the_others(make, tmp_path, head):
    only = {"emotions": (), "speakers": (), "vocabulary": None}
    only |= {
        "emotion": {"emotions": EMOTIONS},
        "ctc": {"vocabulary": LIBRISPEECH},
        "speaker": {"speakers": SPEAKERS},
    }[head]
    make(**only).save(tmp_path / "model")
    (prediction,) = ser.load(tmp_path / "model").predict(noise(9000), 16000)
    found = {
        "emotion": prediction.emotion in EMOTIONS and prediction.probabilities is not None,
        "ctc": prediction.transcript is not None,
        "speaker": prediction.speaker in SPEAKERS and prediction.speaker_probability is not None,
    }
    assert found == {name: name == head for name in found}
    unsaid = {"emotion", "probabilities", "transcript", "speaker", "speaker_probability"}
    assert sum(getattr(prediction, name) is None for name in unsaid) == (4 if head == "ctc" else 3)


@pytest.mark.parametrize(("umask", "file_mode", "folder_mode"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
def test_files_have_the_ordinary_modes(recognizer, tmp_path, umask, file_mode, folder_mode):
    before = os.umask(umask)
    try:
        recognizer.save(tmp_path / "model")
    finally:
        os.umask(before)
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "model").iterdir()} == {file_mode}
    assert (tmp_path / "model").stat().st_mode & 0o777 == folder_mode


@pytest.mark.parametrize("at", ["write_json", "write_tensors"])
def test_a_save_that_fails_in_the_middle_leaves_the_old_model_and_no_rest(recognizer, tmp_path, monkeypatch, at):
    recognizer.save(tmp_path / "model")
    before = recognizer.predict(noise(3000), 16000)
    with torch.no_grad():
        recognizer.model.cls_head.bias.add_(1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"ser.folder.{at}", full)
    with pytest.raises(FileError, match=r"model: cannot be written: No space left .* bytes needed, .* free"):
        recognizer.save(tmp_path / "model")
    assert ser.load(tmp_path / "model").predict(noise(3000), 16000) == before
    assert list(tmp_path.iterdir()) == [tmp_path / "model"]


@pytest.mark.parametrize("content", ["text", "foreign config", "broken config", "file"])
def test_a_folder_that_is_no_model_folder_is_not_replaced(recognizer, tmp_path, content):
    target = tmp_path / "thesis"
    if content == "file":
        target.write_text("precious")
    else:
        target.mkdir()
        name = "config.json" if content.endswith("config") else "chapter1"
        (target / name).write_text('{"port": 80}' if content == "foreign config" else "precious")
    with pytest.raises(ModelFolderError, match="thesis: exists and is not a model folder; it is not replaced"):
        recognizer.save(target)
    assert target.is_file() or len(list(target.iterdir())) == 1
    assert list(tmp_path.iterdir()) == [target]


def test_an_empty_folder_and_an_older_model_are_replaced_whole(recognizer, make, tmp_path):
    (tmp_path / "model").mkdir()
    recognizer.save(tmp_path / "model")
    make(vocabulary=None).save(tmp_path / "model")
    assert ser.load(tmp_path / "model").vocabulary is None
    assert not (tmp_path / "model" / "vocab.json").exists()


def damaged(folder: Path, name: str, **values) -> None:
    path = folder / name
    content = json.loads(path.read_text())
    for key, value in values.items():
        target = content
        *parents, last = key.split("__")
        for parent in parents:
            target = target[parent]
        target[last] = value
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("file", "key", "value", "expected"),
    [
        ("config.json", "id2label", {"0": "a", "2": "b", "3": "c"}, "id2label"),
        ("config.json", "id2label", {"0": "a", "1": "a", "2": "c"}, "name a class twice"),
        ("config.json", "id2label", [1, 2, 3], "id2label"),
        ("config.json", "id2label", {"0": 1, "1": [], "2": None}, "id2label"),
        ("config.json", "id2label", {"x" * 10_000: "a"}, "id2label"),
        ("config.json", "id2label", {"0": "a"}, r"cls_head\.weight: found \(3, 24\), expected \(1, 24\)"),
        ("config.json", "id2label", {}, "cls_head but no names"),
        ("config.json", "ser", [], "ser is"),
        ("config.json", "ser__format", 2, "update ser"),
        ("config.json", "ser__format", [[]] * 10_000, "update ser"),
        ("config.json", "ser__speakers", "Ann", "ser.speakers needs a list"),
        ("config.json", "ser__speakers", [1, 2], "ser.speakers needs a list"),
        ("config.json", "ser__speakers", ["Ann", "Ann"], "name a class twice"),
        ("config.json", "ser__pooling", "median", r"ser.pooling is 'median'; expected one of mean"),
        ("config.json", "ser__pooling", [], "ser.pooling"),
        ("config.json", "ser__layers", "4", "layers is '4', but the encoder has 3 layers"),
        ("config.json", "ser__layers", "9" * 10_000, "ser.layers"),
        ("config.json", "ser__layers", ["last"], "ser.layers"),
        ("config.json", "ser__weighted_final_norm", "no", "ser.weighted_final_norm"),
        ("config.json", "ser__dimensions", [1], "ser.dimensions needs a list"),
        ("config.json", "use_weighted_layer_sum", "yes", "use_weighted_layer_sum is 'yes'"),
        ("config.json", "pooling_mode", ["max"] * 10_000, "pooling_mode"),
        ("config.json", "ser__orthography", {}, "ser.orthography"),
        ("config.json", "ser__orthography", "klingon", "ser.orthography"),
        ("config.json", "ser__tags", {"a": 1}, "ser.tags"),
        ("preprocessor_config.json", "sampling_rate", 8000, "sampling_rate is 8000; supported: 16000"),
        ("preprocessor_config.json", "sampling_rate", [1] * 10_000, "sampling_rate"),
        ("preprocessor_config.json", "do_normalize", "no", "do_normalize"),
        ("vocab.json", "A", 0, "the same id"),
        ("vocab.json", "A", 10**9, "ids 0..31"),
    ],
)
def test_hostile_labels_are_refused_with_their_file(recognizer, tmp_path, file, key, value, expected):
    recognizer.save(tmp_path / "model")
    damaged(tmp_path / "model", file, **{key: value})
    with pytest.raises(SerError, match=expected) as caught:
        ser.load(tmp_path / "model")
    assert str(tmp_path / "model") in str(caught.value) and len(str(caught.value)) < 1000


def test_a_ctc_head_without_a_vocabulary_is_an_error_that_says_what_to_put_there(recognizer, tmp_path):
    recognizer.save(tmp_path / "model")
    (tmp_path / "model" / "vocab.json").unlink()
    with pytest.raises(SerError, match=r"has lm_head but no names.*vocab\.json.*put the files of its tokenizer"):
        ser.load(tmp_path / "model")


@pytest.mark.parametrize("name", ["vocab.json", "preprocessor_config.json", "tokenizer_config.json"])
def test_a_pointer_of_git_lfs_is_named_as_such(recognizer, tmp_path, name):
    recognizer.save(tmp_path / "model")
    (tmp_path / "model" / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(SerError, match=rf"{name}: is a pointer of git-lfs.*git lfs pull"):
        ser.load(tmp_path / "model")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("id2label", {str(i): 10**4000 for i in range(3)}),
        ("ser", 10**4000),
        ("problem_type", 10**4000),
        ("pooling_mode", 10**4000),
        ("use_weighted_layer_sum", 10**4000),
        ("hidden_size", 10**4000),
        ("layerdrop", 10**4000),
        ("conv_dim", [10**4000]),
        ("model_type", 10**4000),
        ("hidden_act", ["x" * 1_000_000]),
    ],
)
def test_huge_values_of_a_foreign_configuration_are_refused_in_a_short_line(recognizer, tmp_path, key, value):
    recognizer.save(tmp_path / "model")
    damaged(tmp_path / "model", "config.json", **{key: value})
    with pytest.raises(SerError, match=r"config\.json") as caught:
        ser.load(tmp_path / "model")
    assert len(str(caught.value)) < 1000


def test_a_whole_number_of_too_many_digits_is_no_json(recognizer, tmp_path):
    recognizer.save(tmp_path / "model")
    for name in ("config.json", "preprocessor_config.json", "tokenizer_config.json", "vocab.json"):
        path = tmp_path / "model" / name
        before = path.read_text()
        path.write_text(before.replace("{", '{"x": ' + "9" * 5000 + ",", 1))
        with pytest.raises(SerError, match=rf"{name}: (is not JSON|not a vocabulary)"):
            ser.load(tmp_path / "model")
        path.write_text(before)


@pytest.mark.parametrize("form", ["linear", "dense"])
@pytest.mark.parametrize("pooling", ["mean", "sum", "max"])
def test_the_forms_of_heads_and_poolings_are_saved_and_loaded(styles, randomise, tmp_path, form, pooling):
    heads = HeadsConfig(3, 0, 0, 2, pooling=pooling, emotion_head=form, dimension_head=form)
    model = randomise(MultiTaskModel(styles["base-style"], heads))
    before = Recognizer(model.eval(), emotions=EMOTIONS, dimensions=["arousal", "tension"])
    before.save(tmp_path / "model")
    after = ser.load(tmp_path / "model")
    assert after.model.heads_config == heads and same_state(before, after)
    assert (after.emotions, after.dimensions, after.kind) == (EMOTIONS, ["arousal", "tension"], "single-label")


def test_a_folder_of_the_usual_heads_is_written_as_before(recognizer, tmp_path):
    recognizer.save(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert "problem_type" not in config
    assert list(config["ser"]) == ["format", "layers", "weighted_final_norm", "pooling", "speakers", "dimensions",
                                   "orthography", "tags"]  # fmt: skip
    sizes = {"num_emotions", "vocab_size", "num_speakers", "num_dimensions", "projection"}
    assert set(HeadsConfig(3).to_dict()) == {*sizes, "layers", "weighted_final_norm", "pooling"}


def test_how_a_foreign_tokenizer_writes_is_kept_when_its_model_is_saved(styles, randomise, tmp_path):
    tokens = ["A", "_", "?", "[BOS]", "B", "+"]
    vocabulary = Vocabulary(
        {token: i for i, token in enumerate(tokens)}, word_delimiter="+", blank="_", unknown="?",
        specials=["[BOS]"], lower_case=True, separator="-",
    )  # fmt: skip
    heads = HeadsConfig(vocab_size=6)
    Recognizer(randomise(MultiTaskModel(styles["base-style"], heads)), vocabulary=vocabulary).save(
        tmp_path / "model"
    )
    found = ser.load(tmp_path / "model").vocabulary
    for v in (vocabulary, found):
        assert v.decode([1, 0, 0, 1, 0, 5, 3, 4, 2]) == "aa-b"
        assert v.encode("ab? _a") == [0, 4, 5, 0] and v.blank == 1
    assert found == vocabulary


@pytest.mark.parametrize("name", ["vocab.json", "preprocessor_config.json"])
def test_a_broken_link_is_an_error_and_not_an_absent_file(recognizer, tmp_path, name):
    recognizer.save(tmp_path / "model")
    (tmp_path / "model" / name).unlink()
    (tmp_path / "model" / name).symlink_to("nowhere")
    with pytest.raises(ModelFolderError, match=f"{name}: cannot be read"):
        ser.load(tmp_path / "model")


def test_an_encoder_without_heads_recognises_nothing_and_says_what_it_is_good_for(recognizer, tmp_path):
    recognizer.save(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if k.startswith("wav2vec2.")}, path)
    with pytest.raises(ModelFolderError, match=r"without heads.*ser\.load_encoder"):
        ser.load(tmp_path / "model")
    ser.load_encoder(tmp_path / "model")


def test_labels_and_heads_must_agree_and_name_each_class_once(make):
    model = make().model
    with pytest.raises(ConfigError, match=r"\(2, 32, 2, 0\), the heads have \(3, 32, 2, 0\)"):
        Recognizer(model, emotions=["a", "b"], speakers=SPEAKERS, vocabulary=LIBRISPEECH)
    with pytest.raises(ConfigError, match=r"emotions .* name a class twice"):
        Recognizer(model, emotions=["a", "b", "a"], speakers=SPEAKERS, vocabulary=LIBRISPEECH)


# -------------------------------------------------------------------------------------------------- creating


def state(recognizer: Recognizer) -> dict[str, torch.Tensor]:
    return recognizer.model.state_dict()


def same_state(a: Recognizer, b: Recognizer) -> bool:
    return state(a).keys() == state(b).keys() and all(torch.equal(v, state(b)[k]) for k, v in state(a).items())


def test_random_weights_depend_on_the_seed_alone():
    options = {"emotions": EMOTIONS, "vocabulary": LIBRISPEECH}
    first, report = Recognizer.create("small", seed=3, **options)
    before = torch.random.get_rng_state()
    second, _ = Recognizer.create("small", seed=3, **options)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(7)
    third, _ = Recognizer.create("small", seed=3, **options)
    assert same_state(first, second) and same_state(first, third)
    assert not same_state(first, Recognizer.create("small", seed=4, **options)[0])
    assert report.new == ["cls_head.weight", "cls_head.bias", "lm_head.weight", "lm_head.bias"]


def test_new_weights_beside_a_folders_depend_on_the_seed_alone(recognizer, tmp_path):
    recognizer.save(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if not k.endswith("masked_spec_embed")}, path)
    before = torch.random.get_rng_state()
    first, report = Recognizer.create(tmp_path / "model", emotions=["x", "y"], seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(7)
    assert same_state(first, Recognizer.create(tmp_path / "model", emotions=["x", "y"], seed=3)[0])
    assert not same_state(first, Recognizer.create(tmp_path / "model", emotions=["x", "y"], seed=4)[0])
    assert report.new == ["masked_spec_embed", "cls_head.weight", "cls_head.bias"]


@pytest.mark.parametrize(
    ("change", "new"),
    [
        ({}, []),
        ({"emotions": ["happy", "sad", "cross"]}, ["cls_head"]),  # the same names in another order
        ({"emotions": [*EMOTIONS, "calm"]}, ["cls_head"]),
        ({"emotions": ()}, []),
        ({"speakers": ["Ann", "Cy"]}, ["speaker_head"]),
        ({"vocabulary": Vocabulary.build(["AB"])}, ["lm_head"]),
        (
            {"vocabulary": Vocabulary(dict(zip(LIBRISPEECH.tokens, range(32), strict=True)), word_delimiter="'")},
            ["lm_head"],
        ),
        ({"pooling": "mean+std"}, ["cls_head", "speaker_head"]),
    ],
)
def test_a_head_is_kept_exactly_when_its_labels_are_the_same(recognizer, tmp_path, change, new):
    recognizer.save(tmp_path / "model")
    labels = {"emotions": EMOTIONS, "speakers": SPEAKERS, "vocabulary": LIBRISPEECH, **change}
    created, report = Recognizer.create(tmp_path / "model", **labels)
    assert report.new == [f"{head}.{part}" for head in new for part in ("weight", "bias")]
    kept = [name for name, value in state(created).items() if name.partition(".")[0] not in new]
    assert all(torch.equal(state(created)[name], state(recognizer)[name]) for name in kept)
    assert all(not torch.equal(state(created)[n], state(recognizer).get(n, torch.empty(0))) for n in report.new)
    heads = {"cls_head", "lm_head", "speaker_head"}
    present = {name.partition(".")[0] for name in state(created)} & heads
    assert {name.partition(".")[0] for name in report.unused} == (heads - present) | set(new)
    assert sorted(n.removeprefix("wav2vec2.") for n in kept) == sorted(report.matched)


def test_preprocessing_is_inherited_from_a_folder(make, tmp_path):
    make(do_normalize=False).save(tmp_path / "model")
    assert Recognizer.create(tmp_path / "model", emotions=["x"])[0].do_normalize is False
    assert Recognizer.create("small", emotions=["x"])[0].do_normalize is True


@pytest.mark.parametrize(
    ("letters", "orthography"), [("AB'", "librispeech"), ("ab'", "librispeech"), ("aBc", "none"), ("你好", "none")]
)
def test_texts_keep_their_case_for_a_foreign_model_of_both_cases(make, tmp_path, letters, orthography):
    vocabulary = Vocabulary({token: i for i, token in enumerate(("<pad>", "|", *letters))})
    make(vocabulary=vocabulary, emotions=(), speakers=()).save(tmp_path / "model")
    path = tmp_path / "model/config.json"
    config = json.loads(path.read_text())
    assert ser.load(tmp_path / "model").orthography == "librispeech", "ours says so"
    del config["ser"]
    path.write_text(json.dumps(config))
    assert ser.load(tmp_path / "model").orthography == orthography


def test_an_init_that_is_neither_a_preset_nor_a_folder_names_both(tmp_path):
    with pytest.raises(ConfigError, match=r"bsae: there is no such model folder.*did you mean 'base'"):
        Recognizer.create("bsae")
    with pytest.raises(ModelFolderError, match=r"no/such/folder: there is no such folder"):
        Recognizer.create("no/such/folder")


# ------------------------------------------------------------------------------------------------ predicting


def test_results_come_in_the_order_of_the_inputs_whatever_their_lengths(recognizer, recordings):
    predictions = recognizer.predict(recordings)
    assert [p.file for p in predictions] == [str(path) for path in recordings]
    assert [p.seconds for p in predictions] == [soundfile.info(path).duration for path in recordings]
    back = recognizer.predict(recordings[::-1])
    for a, b in zip(predictions, reversed(back), strict=True):
        assert_alike(a, b)


@pytest.mark.parametrize("style", ["base-style", "large-style"])
def test_company_does_not_matter(make, recordings, style):
    recognizer = make(style=style)
    together = recognizer.predict(recordings)
    assert len({str(p.probabilities) for p in together}) == len(together)
    for path, prediction in zip(recordings, together, strict=True):
        assert_alike(recognizer.predict(path)[0], prediction)


def test_probabilities_are_named_in_the_models_order_and_sum_to_one(recognizer, recordings):
    for prediction in recognizer.predict(recordings):
        assert list(prediction.probabilities) == EMOTIONS
        assert sum(prediction.probabilities.values()) == pytest.approx(1, abs=1e-6)
        assert prediction.probabilities[prediction.emotion] == max(prediction.probabilities.values())
        assert prediction.speaker in SPEAKERS and 0.5 <= prediction.speaker_probability <= 1


def test_a_path_a_string_an_array_and_a_tensor_are_the_same_recording(recognizer, recordings):
    path, samples = recordings[0], soundfile.read(recordings[0], dtype="float32")[0]
    (expected,) = recognizer.predict(path)
    assert recognizer.predict(str(path)) == [expected]
    for item in (samples, torch.from_numpy(samples), samples.astype(np.float64), samples[:, None]):
        assert recognizer.predict(item, 16000) == [replace(expected, file=None)]
        assert recognizer.predict([item], 16000) == [replace(expected, file=None)]
    from_file, from_memory = recognizer.predict([path, samples], 16000)
    assert from_memory == replace(from_file, file=None)


class Column:
    """As a column of pandas or polars: it can be iterated, has a length, and is no sequence."""

    def __init__(self, values):
        self.values = values

    def __iter__(self):
        return iter(self.values)

    def __len__(self):
        return len(self.values)


class Indexed:
    """As a data set of torch: it ends with an IndexError."""

    def __init__(self, values):
        self.values = values

    def __getitem__(self, index):
        return self.values[index]


@pytest.mark.parametrize(
    "shape",
    [
        lambda names: np.array(names),
        lambda names: np.array(names, object),
        lambda names: np.array([Path(n) for n in names]),
        lambda names: np.array(names)[:, None],
        lambda names: np.array(names, np.dtypes.StringDType()) if hasattr(np.dtypes, "StringDType") else names,
        lambda names: Column(np.array(names)),
        lambda names: Indexed(names),
        lambda names: tuple(names),
        lambda names: dict.fromkeys(names).keys(),
        lambda names: (Path(name) for name in names),
    ],
)
def test_paths_come_in_arrays_columns_and_whatever_else_can_be_iterated(recognizer, recordings, shape):
    names = [str(path) for path in recordings]
    assert [p.file for p in recognizer.predict(shape(names))] == names
    assert [p.file for p in recognizer.stream(shape(names))] == names


def test_one_input_alone_is_a_list_of_one_for_predict_and_stream(recognizer, recordings):
    path, samples = recordings[0], soundfile.read(recordings[0], dtype="float32")[0]
    (expected,) = recognizer.predict([path])
    for alone in (path, str(path), np.str_(path), np.array(str(path)), Utterance("x", path), {"path": str(path)}):
        assert recognizer.predict(alone) == [expected] == list(recognizer.stream(alone))
    assert list(recognizer.stream(samples, 16000)) == [replace(expected, file=None)]


def test_a_dict_of_a_data_set_carries_its_own_rate_and_the_name_of_its_file(recognizer, tmp_path):
    samples = noise(8000)
    soundfile.write(tmp_path / "a.wav", samples, 8000, subtype="FLOAT")
    (expected,) = recognizer.predict(tmp_path / "a.wav")
    sound = {"path": "a.wav", "array": samples, "sampling_rate": 8000}
    for given in (
        sound,
        [sound],
        np.array([sound]),
        (each for each in [sound]),
        {**sound, "array": samples[:, None]},
    ):
        (found,) = recognizer.predict(given)
        assert found.file == "a.wav"
        assert_alike(found, expected)
    (unnamed,) = recognizer.predict({**sound, "path": None}, 8000)
    assert unnamed.file is None
    assert_alike(unnamed, expected)
    tensors = {"array": torch.from_numpy(samples), "sampling_rate": torch.tensor(8000)}  # with_format("torch")
    assert_alike(recognizer.predict(tensors, 8000)[0], expected)
    named = {"path": str(tmp_path / "a.wav"), "bytes": None}  # not decoded: the file is read
    first, second = recognizer.predict([named, sound])
    assert_alike(first, second)
    results = list(recognizer.stream([sound, {**sound, "sampling_rate": 9}, sound, None, tmp_path / "a.wav"]))
    assert [isinstance(r, AudioError) for r in results] == [False, True, False, True, False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_tensors_of_other_precisions_and_with_gradients_are_taken(recognizer, dtype):
    samples = torch.from_numpy(noise(9000)).to(dtype)
    (expected,) = recognizer.predict(samples.float(), 16000)
    assert_alike(recognizer.predict(samples, 16000)[0], expected)
    assert_alike(recognizer.predict(samples.requires_grad_(), 16000)[0], expected)
    assert_alike(recognizer.predict(torch.stack([samples, samples], 1), 16000)[0], expected)


def test_integer_pcm_and_stereo_are_taken(recognizer):
    pcm = (noise(9000) * 32768).astype(np.int16)
    (expected,) = recognizer.predict(pcm / np.float32(32768), 16000)
    assert_alike(recognizer.predict(pcm, 16000)[0], expected)
    assert_alike(recognizer.predict(np.stack([pcm, pcm], 1), 16000)[0], expected)


@pytest.mark.parametrize("rate", [8000, 44100])
def test_other_rates_are_resampled_the_same_from_a_file_and_from_memory(recognizer, tmp_path, rate):
    samples = noise(rate)
    soundfile.write(tmp_path / "a.wav", samples, rate, subtype="FLOAT")
    (from_file,), (from_memory,) = recognizer.predict(tmp_path / "a.wav"), recognizer.predict(samples, rate)
    assert_alike(from_file, from_memory)
    assert from_file.seconds == from_memory.seconds == 1.0


def test_an_excerpt_of_a_manifest_row_is_what_is_recognised(recognizer, recordings):
    samples, _ = soundfile.read(recordings[2], dtype="float32")
    rows = [Utterance("a", recordings[2], start=0.25, end=1.0), Utterance("b", recordings[2])]
    excerpt, whole = recognizer.predict(rows)
    assert excerpt.seconds == 0.75 and excerpt.file == str(recordings[2])
    assert_alike(excerpt, recognizer.predict(samples[4000:16000], 16000)[0])
    assert_alike(whole, recognizer.predict(recordings[2])[0])
    assert_alike(recognizer.predict(rows[0])[0], excerpt)


def test_silence_and_a_constant_are_recognised_with_a_warning(recognizer):
    for prediction in recognizer.predict([np.zeros(8000, np.float32), np.full(8000, 0.5, np.float32)], 16000):
        assert sum(prediction.probabilities.values()) == pytest.approx(1)
        assert prediction.warning.startswith("silent: 0 ms of 0.50 s")


@pytest.mark.parametrize(("samples", "warned"), [(1, True), (399, True), (400, False)])
def test_a_recording_shorter_than_a_frame_is_padded_with_a_warning(recognizer, tmp_path, samples, warned):
    soundfile.write(tmp_path / "short.wav", noise(samples), 16000)
    (prediction,) = recognizer.predict(tmp_path / "short.wav")
    expected = f"{samples} samples are shorter than one frame; padded with silence to 400"
    assert prediction.warning == (expected if warned else None)
    assert prediction.emotion in EMOTIONS and prediction.seconds == samples / 16000
    beside = recognizer.predict([noise(9000), tmp_path / "short.wav"], 16000)[1]
    assert_alike(beside, prediction)


def test_a_recording_over_the_limit_is_refused_with_advice_before_it_is_decoded(recognizer, tmp_path, monkeypatch):
    soundfile.write(tmp_path / "long.wav", noise(16000 * 3), 16000)
    assert len(recognizer.predict(tmp_path / "long.wav", max_seconds=3)) == 1
    monkeypatch.setattr("ser.inputs.read_audio", lambda *_, **__: pytest.fail("was decoded"))
    with pytest.raises(AudioError, match=r"long\.wav: lasts 3\.0 s; at most 2\.9 s .*Cut it.*raise max_seconds"):
        recognizer.predict(tmp_path / "long.wav", max_seconds=2.9)
    with pytest.raises(AudioError, match=r"input 0: lasts 3\.0 s"):
        recognizer.predict(noise(8000 * 3), 8000, max_seconds=2.9)
    rows = [Utterance("a", tmp_path / "long.wav", start=1.0, end=3.0)]
    with pytest.raises(AudioError, match=r"lasts 2\.0 s"):
        recognizer.predict(rows, max_seconds=1.9)
    assert MAX_SECONDS == 120


def test_the_limit_is_checked_at_every_rate_without_rounding_errors(recognizer, tmp_path):
    soundfile.write(tmp_path / "a.wav", noise(11025), 11025)
    assert len(recognizer.predict(tmp_path / "a.wav", max_seconds=1)) == 1


def test_a_limit_can_be_raised_beyond_what_loading_takes_by_itself(recognizer, tmp_path, monkeypatch):
    monkeypatch.setattr("ser.audio.MAX_SECONDS", 0.5)
    soundfile.write(tmp_path / "a.wav", noise(16000), 16000)
    assert recognizer.predict(tmp_path / "a.wav", max_seconds=1)[0].seconds == 1.0


def test_loudness_does_not_matter_to_a_model_that_normalises_and_does_to_another(make):
    quiet, loud = noise(9000), noise(9000) * 3 + 0.1
    for do_normalize in (True, False):
        recognizer = make(do_normalize=do_normalize, style="large-style")
        (a,), (b,) = recognizer.predict(quiet, 16000), recognizer.predict(loud, 16000)
        assert (a.probabilities == pytest.approx(b.probabilities, abs=1e-4)) == do_normalize


@pytest.mark.parametrize("limit", [0, -1, float("nan")])
def test_a_limit_that_is_none_is_refused(recognizer, limit):
    with pytest.raises(ConfigError, match="max_seconds is"):
        recognizer.predict(noise(500), 16000, max_seconds=limit)


class Decodes:
    """As `datasets` 4 gives sound: read when it is asked for."""

    def get_all_samples(self):
        raise AssertionError

    def __getitem__(self, name):
        raise AssertionError


class Table:
    """As pandas has it: its items are the names of its columns."""

    def iterrows(self):
        raise AssertionError

    def __iter__(self):
        return iter(["file", "emotion"])


@pytest.mark.parametrize(
    ("inputs", "rate", "expected"),
    [
        (noise(500), None, "input 0 is an array: pass sampling_rate"),
        (noise(500), 16000.5, "input 0: .*sample rate of 16000.5"),
        (noise(500), 1, "input 0: .*sample rate of 1 Hz"),
        ([0.1, 0.2, 0.3], 16000, "input 0 is of type float; expected .* numpy array or torch tensor"),
        ([[0.1, 0.2]], 16000, "input 0 is of type list"),
        ([None], 16000, "input 0 is of type NoneType"),
        ((noise(500), 16000), None, r"inputs are a pair of samples and their rate.*predict\(samples, rate\)"),
        ([(torch.zeros(500), 16000)], None, r"input 0 is a pair of samples and their rate.*samples\.T"),
        ([(16000, noise(500))], 16000, "input 0 is a pair of samples and their rate"),
        (b"a.wav", None, r"input 0 is of type bytes; .*os\.fsdecode"),
        (np.array([b"a.wav"]), None, "input 0 is of type bytes"),
        (np.array([["a.wav", "b.wav"]]), None, r"array of shape \(1, 2\); expected samples, or \(N,\) of paths"),
        (np.array([0.5, 0.5], object), 16000, "input 0 is of type float"),
        (None, None, "input 0 is of type NoneType"),
        (16000, None, "input 0 is of type int; expected a path"),
        (Table(), None, r'inputs are a whole table; pass its column of paths, such as frame\["file"\]'),
        (Decodes(), None, r"input 0 is of type Decodes; .*found = decoder\.get_all_samples\(\).*found\.data\.T"),
        ([Decodes()], 16000, "input 0 is of type Decodes; .*found = decoder"),
        (io.BytesIO(b""), None, "input 0 is of type BytesIO"),
        ([io.BytesIO(b"")], None, "input 0 is of type BytesIO"),
        ([np.zeros(500, bool)], 16000, "input 0: .*bool"),
        ([torch.empty(500, device="meta")], 16000, "input 0: "),
        ([torch.zeros(500).to_sparse()], 16000, "input 0: "),
        (["a", noise(500)], None, "a: no such file"),
        ({}, None, r'input 0 is a dict of nothing; expected "array" and "sampling_rate"'),
        ({"file": ["a.wav"]}, None, r'input 0 is a dict of file; expected "array"'),
        (
            [{"audio": {}, "label": 1}],
            None,
            r'dict of audio, label; .*of a row of a data set, pass row\["audio"\]',
        ),
        ([{"bytes": b"RIFF", "path": "a.wav"}], None, r"input 0 is a dict of a file's bytes; .*cast_column"),
        ([{"array": noise(500)}], None, "input 0 is an array: pass sampling_rate"),
        ([{"array": [0.1, 0.2], "sampling_rate": 16000}], None, "input 0 is of type list"),
        ([{"array": noise(500), "sampling_rate": "16k"}], None, "input 0: .*sample rate of '16k'"),
        (
            [{"array": noise(500), "sampling_rate": 8000}],
            16000,
            "rate of 8000, and 16000 was passed; leave one out",
        ),
        ([{"path": 5}], None, "input 0 is of type int"),
        (np.zeros((2, 9000), np.float32), 16000, r"input 0: .*9000 channels.*samples\.T"),
        (np.zeros(0, np.float32), 16000, "input 0: .*S >= 1"),
        (np.full(500, np.nan, np.float32), 16000, "input 0: .*nan at frame 0"),
        ([noise(500), np.zeros(500, complex)], 16000, "input 1: .*complex128"),
        ("no\0thing.wav", None, "thing.wav"),
        ("nothing.wav", None, "nothing.wav"),
        ("/dev/zero", None, "/dev/zero"),
        (".", None, "^.: "),
    ],
)
def test_what_is_not_a_recording_is_said_to_be_none(recognizer, inputs, rate, expected):
    with pytest.raises(AudioError, match=expected):
        recognizer.predict(inputs, rate)


def test_nothing_gives_nothing(recognizer):
    assert recognizer.predict([]) == []
    assert list(recognizer.stream(iter(()))) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_recording_stops_predict_and_stands_in_its_place_in_stream(recognizer, recordings, workers):
    recordings[2].write_bytes(b"RIFF not a recording")  # known from its header
    flac = recordings[3].with_suffix(".flac")
    soundfile.write(flac, noise(12_000), 16000)
    data = bytearray(flac.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 64] = bytes(64)  # known from decoding alone
    flac.write_bytes(data)
    inputs = [*recordings[:3], flac, *recordings[4:]]
    results = list(recognizer.stream(inputs, workers=workers))
    assert [isinstance(r, AudioError) for r in results] == [i in (2, 3) for i in range(7)]
    assert str(recordings[2]) in str(results[2]) and str(flac) in str(results[3])
    good = [r for r in results if isinstance(r, Prediction)]
    assert [r.file for r in good] == [str(p) for i, p in enumerate(recordings) if i not in (2, 3)]
    with pytest.raises(AudioError, match=r"2\.wav"):
        recognizer.predict(inputs, workers=workers)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
@pytest.mark.parametrize("workers", [1, 4])
def test_workers_change_nothing(recognizer, recordings, workers):
    assert recognizer.predict(recordings, workers=workers) == recognizer.predict(recordings)
    assert recognizer.predict(recordings[0], workers=workers) == recognizer.predict(recordings[0])
    arrays = [noise(900), torch.from_numpy(noise(2000))]
    assert recognizer.predict(arrays, 16000, workers=workers) == recognizer.predict(arrays, 16000)


def test_thousands_of_short_recordings_need_few_descriptors(recognizer, tmp_path):
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    soundfile.write(tmp_path / "a.wav", noise(450), 16000)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    try:
        assert len(recognizer.predict([tmp_path / "a.wav"] * 500, workers=1)) == 500
        assert len(recognizer.predict([torch.zeros(450)] * 500, 16000, workers=1)) == 500
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_is_lazy_and_holds_a_bounded_part_of_its_inputs(recognizer, tmp_path, workers):
    soundfile.write(tmp_path / "a.wav", noise(450), 16000)
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield tmp_path / "a.wav" if taken % 3 else tmp_path / "missing.wav"

    results = recognizer.stream(endless(), workers=workers)
    for number in range(1, 2 * WINDOW):
        assert isinstance(next(results), SerError) == (number % 3 == 0)
        assert taken <= number + 3 * WINDOW
    results.close()


def test_an_endless_stream_of_bad_recordings_yields_its_errors(recognizer):
    results = recognizer.stream(f"missing{i}.wav" for i in iter(int, 1))
    assert all(isinstance(next(results), AudioError) for _ in range(WINDOW + 1))
    results.close()


@pytest.mark.parametrize("bar", [False, True])
@pytest.mark.parametrize("seconds", [0.1, 1.0, 3.0])
def test_a_generator_is_asked_for_a_batchs_worth_before_its_first_result(recognizer, seconds, bar):
    sounds = [noise(round(seconds * 16_000), seed) for seed in range(3)]
    taken = 0

    def live():
        nonlocal taken
        for number in range(200):
            taken += 1
            yield sounds[number % 3]

    source = tqdm(live(), total=200, disable=True) if bar else live()  # which has a length, and waits all the same
    results = recognizer.stream(source, 16_000)
    first = next(results)
    assert taken == min(MOST_FIRST, -(-16 // seconds))
    found = [first, *results]
    assert taken == len(found) == 200
    for number, prediction in enumerate(found):
        assert_alike(prediction, found[number % 3])
    assert_alike(first, recognizer.predict(sounds[0], 16_000)[0])


def test_runs_of_a_generator_grow_those_of_a_slow_one_do_not_and_a_lists_are_whole(monkeypatch):
    def sizes(count: int, seconds: float | None, **fields) -> list[int]:
        recordings = (Recording(i, **fields) for i in range(count))
        return [len(run) for run in gather(recordings, seconds)]

    assert sizes(1500, None, num_samples=16_000) == [512, 512, 476]
    assert sizes(1500, 16.0, num_samples=16_000) == [16, 32, 64, 128, 256, 512, 492]
    assert sizes(300, 16.0, error=AudioError("cannot be read")) == [64, 128, 108]
    assert sizes(5, 16.0, num_samples=16_000 * 100) == [1, 1, 1, 2]
    assert sizes(0, 16.0) == sizes(0, None) == []
    monkeypatch.setattr("ser.inputs.PATIENCE", -1.0)
    assert sizes(70, 16.0, num_samples=16_000) == [16, 16, 16, 16, 6]
    assert sizes(1500, None, num_samples=16_000) == [512, 512, 476]


@pytest.mark.parametrize("batch", BATCH_SECONDS.values())
def test_a_generator_costs_at_most_a_percent_more_than_a_list(batch):
    """Of padded work, for the lengths of IEMOCAP's turns in random order."""
    file = Path(__file__).resolve().parents[1] / "benchmarks" / "seconds.txt"
    lengths = [round(float(line) * 16_000) for line in file.read_text().split()]
    np.random.default_rng(0).shuffle(lengths)

    def padded(seconds: float | None) -> int:
        recordings = (Recording(i, num_samples=length) for i, length in enumerate(lengths))
        batches = list(plan_batches(gather(recordings, seconds), batch))
        assert sorted(r.index for each in batches for r in each) == list(range(len(lengths)))
        return sum(len(each) * max(r.num_samples for r in each) for each in batches)

    assert padded(batch) <= 1.01 * padded(None)


def test_batches_are_of_like_length_and_bounded(recognizer, monkeypatch):
    sizes = []
    real = Recognizer.predict_waveforms

    def spy(self, waveforms):
        sizes.append([len(x) for x in waveforms])
        return real(self, waveforms)

    monkeypatch.setattr(Recognizer, "predict_waveforms", spy)
    monkeypatch.setitem(BATCH_SECONDS, "cpu", 1.0)
    recognizer.predict([noise(n) for n in [400, 16000, 500, 15000, 8000, 8000, 600, 20000]], 16000)
    assert sizes == [[20000], [16000], [15000], [8000, 8000], [600, 500, 400]]
    monkeypatch.undo()
    assert recognizer.batch_seconds == 16


def test_predicting_leaves_the_model_in_the_mode_it_was_in(recognizer, recordings):
    recognizer.model.train()
    first, second = recognizer.predict(recordings[:1] * 2)
    assert first == second  # no dropout, no masks
    assert recognizer.model.training
    with pytest.raises(IndexError):
        recognizer.predict_waveforms([])
    assert recognizer.model.training


def test_a_prediction_is_plain_data(recognizer):
    (prediction,) = recognizer.predict(noise(2000), 16000)
    assert Prediction(**json.loads(json.dumps(prediction.to_dict()))) == prediction


# ---------------------------------------------------------------------------------------- what callers may pass


def test_a_name_that_stands_twice_in_a_head_that_is_made_anew_does_no_harm(make, tmp_path):
    make().save(tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    config["ser"]["speakers"] = ["a", "a"]
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    recognizer, report = Recognizer.create(tmp_path / "m", emotions=EMOTIONS, speakers=["s1"])
    assert recognizer.speakers == ["s1"] and any(n.startswith(HEADS["speaker"].key) for n in report.new)
    assert not any(name.startswith(HEADS["emotion"].key) for name in report.new)


def test_names_may_come_from_any_iterable():
    recognizer, _ = Recognizer.create("small", emotions=(name for name in EMOTIONS), speakers=dict.fromkeys("ab"))
    assert recognizer.emotions == EMOTIONS and recognizer.speakers == ["a", "b"]


def test_labels_and_their_fields_together_are_refused(make):
    recognizer = make()
    for call in (
        lambda: Recognizer(recognizer.model, recognizer.labels, do_normalize=False),
        lambda: Recognizer.create("small", recognizer.labels, emotions=EMOTIONS),
    ):
        with pytest.raises(TypeError, match="labels are given, and so are"):
            call()


def test_a_misspelt_option_of_an_evaluation_is_refused(tmp_path, make):
    rows = toy_rows(tmp_path, 2)
    with pytest.raises(TypeError, match="batch_second"):
        evaluate(make(), rows, batch_second=1)


def test_a_dataset_takes_numbers_and_pairs_of_number_and_weight(tmp_path, make):
    dataset = make().dataset(toy_rows(tmp_path, 2))
    plain, pair = dataset[1], dataset[(1, 0.5)]
    assert (pair.index, pair.weight) == (1, 0.5) and torch.equal(plain.waveform, pair.waveform)


def test_names_that_are_no_identifiers_are_no_attributes_of_the_package():
    assert not any(hasattr(ser, name) for name in ("errors.SerError", "a.b", "..", ""))
    assert hasattr(ser, "errors")

"""The cache of what frozen parts compute: the same results, less work, nothing stale and nothing half."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import soundfile
import torch
from compare import assert_close
from safetensors.torch import load_file
from test_bad_audio import cut_behind_its_header
from test_train import state
from test_update import run_ranks
from toy import toy_recognizer, toy_rows

from ser.data import dataset as dataset_module
from ser.data.dataset import collate
from ser.data.labels import NO_LABEL
from ser.data.manifest import read_manifest
from ser.errors import AudioError, ConfigError, FileError
from ser.train import cache as cache_module
from ser.train.cache import Cache, choose_kind, fill_cache
from ser.train.checkpoint import checkpoints
from ser.train.config import TrainConfig
from ser.train.distributed import World
from ser.train.loop import fit

EXACT = {"final_dropout": 0.0, "reads": (("layers", "weighted"), ("pooling", "mean"))}  # pooled layers are exact


def settings(**changes) -> TrainConfig:
    common = {"epochs": 2, "effective_batch": 4, "micro_batch": 2, "rate": 3e-3, "log_every": 1, "beta": 0.1}
    return TrainConfig(**common | {"save_every": "1", "keep": 100} | changes)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def log(run: Path, kind: str) -> list[dict]:
    return [e for e in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if e["kind"] == kind]


def opened(folder: Path, model, kind="features", dtype="fp32") -> Cache:
    return Cache.of(model, folder, kind=kind, dtype=dtype, do_normalize=True)


@pytest.fixture
def rows(tmp_path):
    return toy_rows(tmp_path, 10), toy_rows(tmp_path, 6, seed=1, name="valid")


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-5), ("fp16", 5e-3)])
@pytest.mark.parametrize(
    ("freeze", "heads", "kind"),
    [("feature-encoder", ("emotion", "ctc"), "features"), ("encoder", ("emotion", "speaker"), "pooled")],
)
def test_a_run_is_the_same_with_and_without_a_cache(tmp_path, rows, freeze, heads, kind, dtype, tolerance):
    """To rounding with fp32: an utterance is convolved alone there. Masks, dropout and LayerDrop are on."""
    for name, cache in {"plain": "", "cached": str(tmp_path / "cache")}.items():
        config = settings(freeze=freeze, cache=cache, cache_dtype=dtype)
        fit(toy_recognizer(heads=heads, **EXACT), *rows, config, tmp_path / name)
    assert [p.name.split("-")[0] for p in (tmp_path / "cache").iterdir()] == [kind]
    plain, cached = (weights(tmp_path / name / "last") for name in ("plain", "cached"))
    before = toy_recognizer(heads=heads, **EXACT).model.state_dict()
    trained = [name for name in before if not torch.equal(plain[name], before[name])]
    moved, apart = (
        torch.cat([(plain[name] - other[name]).flatten() for name in trained]).norm() for other in (before, cached)
    )
    assert moved > 0 and apart <= 10 * tolerance * moved, f"{float(apart / moved):.2e} of what was learnt"
    for kind_ in ("train", "valid"):
        for a, b in zip(log(tmp_path / "plain", kind_), log(tmp_path / "cached", kind_), strict=True):
            assert b["loss_emotion"] == pytest.approx(a["loss_emotion"], rel=10 * tolerance, abs=tolerance)


def test_with_a_cache_each_recording_is_decoded_once_in_a_run_and_never_in_the_next(tmp_path, rows, monkeypatch):
    decoded = []
    load = dataset_module.load_audio
    monkeypatch.setattr(
        dataset_module, "load_audio", lambda file, **rest: decoded.append(file) or load(file, **rest)
    )
    config = settings(freeze="feature-encoder", cache=str(tmp_path / "cache"))
    fit(toy_recognizer(), *rows, config, tmp_path / "one")
    assert sorted(decoded) == sorted(u.file for part in rows for u in part)
    decoded.clear()
    fit(toy_recognizer(), *rows, config, tmp_path / "two")
    assert not decoded
    one, two = (weights(tmp_path / name / "last") for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("layers", ["last", "weighted", "1"])
@pytest.mark.parametrize("projection", [0, 7])
def test_pooled_layers_give_every_head_what_frames_give(rows, layers, projection):
    reads = (("layers", layers), ("pooling", "mean"), ("projection", projection))
    recognizer = toy_recognizer(heads=("emotion", "speaker"), reads=reads, final_dropout=0.0)
    model = recognizer.model.eval()
    if layers == "weighted":
        torch.nn.init.normal_(model.layer_weights)
    dataset = recognizer.dataset(rows[0])
    batch = collate([dataset[i] for i in range(4)])
    with torch.no_grad():
        expected = model(batch.waveforms, batch.num_samples)
        means = model.layer_means(batch.waveforms, batch.num_samples)
        found = model(pooled=means, num_samples=batch.num_samples)
    assert_close(found.emotion, expected.emotion)
    assert_close(found.speaker, expected.speaker)


def test_what_is_kept_follows_from_what_is_frozen_and_from_what_reads_it():
    assert choose_kind(toy_recognizer(heads=("emotion",), **EXACT).model, "encoder") == ("pooled", "")
    for recognizer, freeze, why in (
        (toy_recognizer(heads=("emotion",), **EXACT), "feature-encoder", "feature encoder alone"),
        (toy_recognizer(heads=("emotion", "ctc"), **EXACT), "encoder", "CTC"),
        (toy_recognizer(heads=("emotion",)), "encoder", "attentive"),
        (toy_recognizer(heads=("emotion",), **EXACT | {"final_dropout": 0.1}), "encoder", "final_dropout is 0.1"),
    ):
        kind, reason = choose_kind(recognizer.model, freeze)
        assert kind == "features" and why in reason
    with pytest.raises(ConfigError, match=r"freeze is none: add --freeze feature-encoder"):
        choose_kind(toy_recognizer().model, "none")


def test_nothing_is_computed_twice_and_nothing_stale_is_used(tmp_path, rows, monkeypatch):
    recognizer = toy_recognizer()
    said = []
    computed = []

    def filled(recognizer, utterances, dtype="fp32"):
        store = opened(tmp_path / "cache", recognizer.model, dtype=dtype)
        compute = store.compute
        store.compute = lambda waveform: computed.append(1) or compute(waveform)
        computed.clear()
        return fill_cache(store, recognizer.dataset(utterances), World(), said.append, "train")

    train = rows[0]
    filled(recognizer, train)
    assert len(computed) == 10 and "10 utterances" in said[-1]
    filled(recognizer, train)
    assert not computed and "all 10 recordings found" in said[-1]
    filled(recognizer, train, dtype="fp16")
    assert len(computed) == 10, "another type has a place of its own"
    shutil.copy(train[0].file, tmp_path / "copy.wav")
    filled(recognizer, [replace(train[0], file=tmp_path / "copy.wav")])
    assert not computed, "the content counts, not the name"
    samples, rate = soundfile.read(train[3].file)
    soundfile.write(train[3].file, samples[::-1], rate)
    filled(recognizer, train)
    assert len(computed) == 1, "one recording was changed"
    filled(recognizer, [replace(train[0], start=0.0, end=0.2), replace(train[0], start=0.1, end=0.3)])
    assert len(computed) == 2, "excerpts are utterances of their own"
    with torch.no_grad():
        recognizer.model.wav2vec2.feature_extractor.conv_layers[1].conv.weight[0, 0, 0] += 1e-3
    filled(recognizer, train)
    assert len(computed) == 10, "other weights, other features"


def test_each_utterance_is_kept_as_it_is_alone(tmp_path, rows):
    recognizer = toy_recognizer()
    dataset = recognizer.dataset(rows[0])
    stored = fill_cache(opened(tmp_path / "c", recognizer.model), dataset, World(), print, "train")
    for i in range(len(dataset)):
        waveform = dataset[i].waveform[None]
        with torch.no_grad():
            expected, _ = recognizer.model.wav2vec2.feature_extractor(waveform, torch.tensor([waveform.shape[1]]))
        assert torch.equal(stored(i)[0], expected[0])


def test_a_dataset_that_has_read_its_cache_can_be_sent_to_a_worker(tmp_path, rows):
    dataset = toy_recognizer().dataset(rows[0])
    dataset.stored = fill_cache(opened(tmp_path / "c", toy_recognizer().model), dataset, World(), print, "train")
    first = dataset[0].stored
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[0].stored, first)


def test_a_run_with_a_cache_resumes_exactly_also_where_the_cache_is_gone(tmp_path, rows):
    config = settings(freeze="feature-encoder", cache=str(tmp_path / "cache"))
    fit(toy_recognizer(), *rows, config, tmp_path / "whole")
    first = checkpoints(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for path in checkpoints(tmp_path / "cut")[2:]:
        shutil.rmtree(path)
    for name in ("last", "best"):
        shutil.rmtree(tmp_path / "cut" / name)
    shutil.rmtree(tmp_path / "cache")
    assert fit(toy_recognizer(), *rows, config, tmp_path / "cut").resumed
    for a, b in zip(first, checkpoints(tmp_path / "cut"), strict=True):
        one, two = state(a), state(b)
        assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_a_resumed_run_keeps_what_its_checkpoint_gives_whatever_weights_it_was_started_with(tmp_path, rows):
    config = settings(freeze="feature-encoder", cache=str(tmp_path / "cache"))
    fit(toy_recognizer(), *rows, config, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for path in checkpoints(tmp_path / "cut")[2:]:
        shutil.rmtree(path)
    assert fit(toy_recognizer(seed=99), *rows, config, tmp_path / "cut").resumed
    one, two = (state(checkpoints(tmp_path / name)[-1]) for name in ("whole", "cut"))
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_cache_of_nothing_frozen_is_refused_before_the_run_has_a_folder(tmp_path, rows):
    with pytest.raises(ConfigError, match="freeze is none"):
        fit(toy_recognizer(), *rows, settings(cache=str(tmp_path / "cache")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def trained_on_ranks(world, folder):
    """How many utterances this rank computed, how many it can read, and the weights after a run."""
    rows = read_manifest(Path(folder) / "train.csv")
    dataset, store = toy_recognizer().dataset(rows), opened(Path(folder) / "c", toy_recognizer().model)
    compute, computed = store.compute, []
    store.compute = lambda waveform: computed.append(1) or compute(waveform)
    stored = fill_cache(store, dataset, world, lambda line: None, "train")
    config = settings(freeze="feature-encoder", cache=f"{folder}/c", cache_dtype="fp32", micro_batch=1)
    drawn = (
        "layerdrop",
        *(f"{name}_dropout" for name in ("feat_proj", "hidden", "attention", "activation", "final")),
    )
    recognizer = toy_recognizer(**dict.fromkeys(drawn, 0.0))
    fit(recognizer, rows, [], config, f"{folder}/run{world.size}", world=world)
    readable = sum(bool(stored(i)[0].any()) for i in range(len(rows)))
    return len(computed), readable, recognizer.model.state_dict()


def test_ranks_share_the_work_and_what_comes_of_it_and_the_split_does_not_matter(tmp_path):
    toy_rows(tmp_path, 10)
    (computed, readable, found), other = run_ranks(trained_on_ranks, 2, tmp_path, str(tmp_path))
    assert (computed, other[0]) == (5, 5) and (readable, other[1]) == (10, 10)
    again, readable, alone = trained_on_ranks(World(), str(tmp_path))
    assert again == 0 and readable == 10
    before = toy_recognizer().model.state_dict()
    moved = sum(float((alone[name] - before[name]).norm()) ** 2 for name in alone)
    apart = sum(float((alone[name] - found[name]).norm()) ** 2 for name in alone)
    assert moved > 0 and apart <= 1e-4 * moved, apart / moved


def damaged_on_ranks(world, folder):
    """Of ten shards three are damaged: what a rank is told, how many it read, and whether all is there again."""
    cache_module.SHARD_BYTES = 1  # as of what is there
    rows = read_manifest(Path(folder) / "train.csv")
    recognizer = toy_recognizer()
    read = []
    real = cache_module.digest
    cache_module.digest = lambda path: read.append(path) or real(path)
    said = []
    store = opened(Path(folder) / "damaged", recognizer.model)
    stored = fill_cache(store, recognizer.dataset(rows), world, said.append, "train")
    return said[0], len(read), all(bool(stored(i)[0].any()) for i in range(10))


def told_on_ranks(world, folder):
    """What a rank is told: each has a cache of its own; the main rank alone has all; one's values are large."""
    recognizer = toy_recognizer()
    dataset = recognizer.dataset(read_manifest(Path(folder) / "train.csv"))

    def told(name, world):
        try:
            fill_cache(
                opened(Path(folder) / name, recognizer.model, dtype="fp16"), dataset, world, lambda _: None, "x"
            )
        except FileError as error:
            return str(error)
        return ""

    own = f"own{world.rank}"
    apart = told(own, world)
    if world.is_main:
        told(own, World())
    else:
        shutil.rmtree(Path(folder) / own)
    world.barrier()
    alone = told(own, world)
    if not world.is_main:
        with torch.no_grad():
            recognizer.model.wav2vec2.feature_extractor.conv_layers[-1].conv.weight *= 1e7
    return apart, alone, told("shared", world), damaged_on_ranks(world, folder)


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    rows = toy_rows(folder, 10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_module, "SHARD_BYTES", 1)
        filled(folder / "damaged", rows)
    for path in sorted(folder.glob("damaged/*/*.safetensors"))[:3]:
        flip(path, 0.9)
    return list(zip(*run_ranks(told_on_ranks, 2, folder, str(folder)), strict=True))


def test_ranks_that_do_not_share_a_disk_are_told_and_none_trains_on_zeros(told):
    assert all("does not see 5 of 10 utterances" in line for line in told[0])
    assert all("process 1 of 2 does not see 10 of 10 utterances" in line for line in told[1])


def test_what_fails_on_one_rank_while_filling_is_told_on_all(told):
    assert all("do not fit into float16" in line for line in told[2])


def test_copies_of_a_recording_that_cannot_be_read_are_each_told_by_name(tmp_path, rows):
    train = rows[0]
    cut_behind_its_header(train[4].file)
    shutil.copy(train[4].file, tmp_path / "copy.wav")
    train = [*train, replace(train[4], id="copy", file=tmp_path / "copy.wav")]
    recognizer = toy_recognizer()
    stored = fill_cache(
        opened(tmp_path / "c", recognizer.model), recognizer.dataset(train), World(), print, "train"
    )
    assert stored.errors.keys() == {4, 10}
    assert "train4.wav" in stored(4)[1] and "copy.wav" in stored(10)[1]


def test_a_fill_that_was_killed_is_continued_and_half_a_shard_is_never_read(tmp_path):
    """SIGKILL while it fills, with a shard for each utterance."""
    rows = toy_rows(tmp_path, 40)
    script = (
        "import sys, torch; sys.path[:0] = sys.argv[1:2]; torch.set_num_threads(1)\n"
        "from pathlib import Path; from toy import toy_recognizer; from ser.data.manifest import read_manifest\n"
        "from ser.train import cache; from ser.train.distributed import World\n"
        "cache.SHARD_BYTES = 1; folder = Path(sys.argv[2]); r = toy_recognizer()\n"
        "store = cache.Cache.of(r.model, folder / 'c', kind='features', dtype='fp32', do_normalize=True)\n"
        "rows = read_manifest(folder / 'train.csv')\n"
        "cache.fill_cache(store, r.dataset(rows), World(), print, 'train')\n"
    )
    child = subprocess.Popen([sys.executable, "-c", script, str(Path(__file__).parent), str(tmp_path)])
    try:
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("c/*/*.safetensors"))) < 3 and time.monotonic() < deadline:
            time.sleep(0.001)
        os.kill(child.pid, signal.SIGKILL)
    finally:
        child.wait()
    recognizer = toy_recognizer()
    store = opened(tmp_path / "c", recognizer.model)
    done = len(list(store.folder.glob("*.safetensors")))
    assert 3 <= done < 40
    (store.folder / ".half.1.tmp").write_bytes(b"half")
    (store.folder / "damaged.safetensors").write_bytes(b"\xff" * 100)
    os.utime(store.folder / ".half.1.tmp", (0, 0))
    said = []
    stored = fill_cache(store, recognizer.dataset(rows), World(), said.append, "train")
    assert f"{40 - done} utterances" in said[0]
    assert all(stored(i)[0].abs().sum() > 0 for i in range(40))
    assert not list(store.folder.glob(".half*")), "what was killed a day ago is removed"


def test_a_disk_without_room_is_told_before_anything_is_computed(tmp_path, rows, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    recognizer = toy_recognizer()
    store = opened(tmp_path / "c", recognizer.model)
    store.compute = None
    with pytest.raises(FileError, match=r"needs 0\.00 GB for 10 utterances, and 0\.00 GB are free; make room"):
        fill_cache(store, recognizer.dataset(rows[0]), World(), print, "train")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="cannot be written"):
        fill_cache(
            opened(tmp_path / "file", recognizer.model), recognizer.dataset(rows[0]), World(), print, "train"
        )


def test_values_too_large_for_float16_name_the_way_out(tmp_path, rows):
    recognizer = toy_recognizer()
    with torch.no_grad():
        recognizer.model.wav2vec2.feature_extractor.conv_layers[-1].conv.weight *= 1e7
    with pytest.raises(FileError, match="do not fit into float16; use --cache-dtype fp32"):
        fill_cache(
            opened(tmp_path / "c", recognizer.model, dtype="fp16"),
            recognizer.dataset(rows[0]),
            World(),
            print,
            "x",
        )


def test_recordings_that_cannot_be_read_are_treated_as_without_a_cache(tmp_path, rows):
    train, valid = rows
    cut_behind_its_header(train[4].file)
    dataset = toy_recognizer().dataset(train)
    dataset.stored = fill_cache(opened(tmp_path / "c", toy_recognizer().model), dataset, World(), print, "train")
    example = dataset[4]
    assert (example.weight, example.labels["emotion"], example.labels["ctc"]) == (0.0, NO_LABEL, [])
    assert "train4.wav" in example.error and not example.stored.any()
    config = settings(freeze="feature-encoder", cache=str(tmp_path / "cache"), max_bad_audio=0.2)
    with pytest.raises(AudioError, match=r"train4\.wav"):
        fit(toy_recognizer(), train, valid, config, tmp_path / "fails")
    config = replace(config, on_bad_audio="skip")
    fit(toy_recognizer(), train, valid, config, tmp_path / "cached")
    fit(toy_recognizer(), train, valid, replace(config, cache=""), tmp_path / "plain")
    assert (tmp_path / "cached/skipped.jsonl").read_text() == (tmp_path / "plain/skipped.jsonl").read_text()
    counted = [[e["padding"] for e in log(tmp_path / name, "train")] for name in ("cached", "plain")]
    assert counted[0] == counted[1]
    for a, b in zip(log(tmp_path / "plain", "train"), log(tmp_path / "cached", "train"), strict=True):
        assert b["loss_emotion"] == pytest.approx(a["loss_emotion"], rel=0.02)


# ------------------------------------------------------------------------------------ what is kept is as written


@pytest.fixture
def small_shards(monkeypatch):
    """A shard for each utterance."""
    monkeypatch.setattr(cache_module, "SHARD_BYTES", 1)


def filled(folder: Path, rows, said=None):
    """What a run finds: the store and the lines it says."""
    said = [] if said is None else said
    recognizer = toy_recognizer()
    stored = fill_cache(opened(folder, recognizer.model), recognizer.dataset(rows), World(), said.append, "train")
    return stored, said


def values(stored, count=10) -> list[torch.Tensor]:
    return [stored(i)[0].clone() for i in range(count)]


def flip(path: Path, place: float) -> None:
    """One bit of a file, at a share of its length."""
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 4
    path.write_bytes(content)


def swap(one: Path, other: Path) -> None:
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "count"),
    [
        (lambda shards: flip(shards[0], 1.0), 1),
        (lambda shards: flip(shards[1], 0.0), 1),
        (lambda shards: [flip(path, 0.6) for path in shards[2:5]], 3),
        (lambda shards: flip(shards[3], 0.01), 1),
        (lambda shards: os.truncate(shards[4], shards[4].stat().st_size - 1), 1),
        (lambda shards: os.truncate(shards[4], 0), 1),
        (lambda shards: swap(shards[5], shards[6]), 2),
        (lambda shards: shards[7].write_bytes(shards[7].read_bytes() + b"x"), 1),
        (lambda shards: shards[8].unlink(), 0),
    ],
)
def test_a_shard_that_is_not_as_it_was_written_is_computed_again_and_said(
    tmp_path, rows, small_shards, damage, count
):
    before = values(filled(tmp_path / "c", rows[0])[0])
    shards = sorted(tmp_path.glob("c/*/*.safetensors"))
    assert len(shards) == 10
    damage(shards)
    stored, said = filled(tmp_path / "c", rows[0])
    assert all(torch.equal(a, b) for a, b in zip(before, values(stored), strict=True))
    told = [line for line in said if "damaged" in line]
    line = f"cache of train: {count} damaged shard{'s' if count > 1 else ''} removed, to be computed again"
    assert told == [line] * bool(count)
    assert any(f"{count or 1} utterances" in line for line in said)
    assert sorted(tmp_path.glob("c/*/*.safetensors")) == shards, "the same bytes under the same names"
    assert filled(tmp_path / "c", rows[0])[1] == [f"cache of train: all 10 recordings found in {shards[0].parent}"]


def test_shards_of_earlier_releases_which_cannot_be_verified_are_computed_again_and_go(tmp_path, rows):
    filled(tmp_path / "c", rows[0])
    (shard,) = tmp_path.glob("c/*/*.safetensors")
    old, foreign = shard.with_name("0a1b2c3d4e5f6071.safetensors"), shard.with_name("mine.safetensors")
    shutil.copy(shard, foreign)
    shard.rename(old)
    _, said = filled(tmp_path / "c", rows[0])
    assert said[0] == "cache of train: 1 without a sha256, of an earlier release, removed, to be computed again"
    assert "10 utterances" in said[1] and shard.exists() and not old.exists()
    assert foreign.exists(), "what is nobody's is left alone, and not read"
    assert len(filled(tmp_path / "c", rows[0])[1]) == 1


def test_only_shards_that_a_run_needs_are_read(tmp_path, rows, small_shards, monkeypatch):
    filled(tmp_path / "c", [*rows[0], *rows[1]])
    read = []
    real = cache_module.digest
    monkeypatch.setattr(cache_module, "digest", lambda path: read.append(path) or real(path))
    filled(tmp_path / "c", rows[1])
    assert len(read) == len(set(read)) == len(rows[1]) == 6


def test_ranks_each_verify_a_share_and_all_know_what_is_damaged(told):
    for said, read, whole in told[3]:
        assert said == "cache of train: 3 damaged shards removed, to be computed again" and whole
        assert read <= 5 + 2, "its share, and what it wrote"

"""Recordings that cannot be read, memory that runs short, loader workers that die (E3, A9; N3, N4, N7)."""

import csv
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file
from test_update import ALL, assert_same_gradients, examples, gradients, run_ranks, tiny_config
from toy import toy_recognizer, toy_rows, write_corpus

import ser.errors
from ser.data.dataset import SpeechDataset
from ser.data.labels import Labels
from ser.data.manifest import Utterance, read_manifest
from ser.data.text import Vocabulary
from ser.data.workers import worker_death_explained
from ser.errors import AudioError, FileError, ResourceError, RunFolderError, SerError
from ser.train import setup
from ser.train.bad_audio import BadAudio
from ser.train.checkpoint import checkpoints
from ser.train.config import TrainConfig
from ser.train.distributed import World
from ser.train.evaluation import evaluate
from ser.train.loop import fit
from ser.train.processes import one_voice

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "train_iemocap.py"
LARGE_STYLE = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}


def quick(**changes) -> TrainConfig:
    settings = {"epochs": 2, "effective_batch": 4, "micro_batch": 2, "rate": 3e-3, "beta": 0.1, "log_every": 1}
    return TrainConfig(**settings | {"keep": 100, "save_every": "1", "max_bad_audio": 0.2} | changes)


def cut_behind_its_header(file: Path) -> None:
    """The recording as a FLAC of which the last 40 % are gone: its header is whole, and only decoding tells."""
    samples, rate = soundfile.read(file)
    soundfile.write(file, samples, rate, format="FLAC")
    data = file.read_bytes()
    file.write_bytes(data[: int(0.6 * len(data))])


def corpus(folder: Path, *, train=(4,), valid=(1,)):
    """Twelve rows to train on and five to validate on; those numbered are corrupt."""
    rows, others = toy_rows(folder, 12), toy_rows(folder, 5, seed=1, name="valid")
    for row in (*(rows[i] for i in train), *(others[i] for i in valid)):
        cut_behind_its_header(row.file)
    return rows, others


def entries(run: Path, kind: str) -> list[dict]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [entry for entry in found if entry["kind"] == kind]


def listed(run: Path) -> list[tuple[str, str]]:
    rows = [json.loads(line) for line in (run / "skipped.jsonl").read_text().splitlines()]
    return [(row["set"], row["id"]) for row in rows]


def assert_same_weights(a: Path, b: Path) -> None:
    for name in ("model", "optimizer"):
        first, second = (load_file(folder / f"{name}.safetensors") for folder in (a, b))
        assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


# ---------------------------------------------------------------------------------------- one process


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_recording_ends_the_run_with_its_path_and_cause(tmp_path, workers):
    train, valid = corpus(tmp_path)
    with pytest.raises(AudioError) as caught:
        fit(toy_recognizer(), train, [], quick(workers=workers), tmp_path / "run")
    message = str(caught.value)
    assert str(train[4].file) in message and "truncated or damaged" in message
    assert "--on-bad-audio skip" in message and "Traceback" not in message
    with pytest.raises(AudioError, match=r"valid1\.wav: truncated or damaged"):
        fit(toy_recognizer(), train[:4], valid, quick(workers=workers), tmp_path / "other")


def test_a_full_disk_under_the_list_of_what_is_skipped_is_told_with_the_free_space(tmp_path):
    (tmp_path / "skipped.jsonl").symlink_to("/dev/full")
    bad = BadAudio(World(), policy="skip", limit=0.5, run=tmp_path)
    bad.begun = True
    with pytest.raises(FileError, match=r"skipped\.jsonl: cannot be written: No space left .* free"):
        bad.agree("train", toy_recognizer().dataset(toy_rows(tmp_path, 4)), {1: "damaged"})


def test_a_set_of_which_nothing_can_be_read_ends_the_run_whatever_the_limit(tmp_path):
    dataset, bad = toy_recognizer().dataset(toy_rows(tmp_path, 2)), BadAudio(World(), policy="skip", limit=1.0)
    assert bad.agree("train", dataset, {0: "damaged"}) == {0: "damaged"}
    with pytest.raises(AudioError, match="2 of 2 recordings of train cannot be used"):
        bad.agree("train", dataset, {1: "damaged"})


@pytest.fixture(scope="module")
def skipping(tmp_path_factory):
    """A run that skipped a training and a validation recording, and what it said."""
    folder = tmp_path_factory.mktemp("skipping")
    train, valid = corpus(folder)
    stream, sys.stderr = sys.stderr, (folder / "said").open("w")
    try:
        result = fit(toy_recognizer(), train, valid, quick(on_bad_audio="skip"), folder / "run")
    finally:
        sys.stderr.close()
        sys.stderr = stream
    return folder, train, valid, result


def test_what_is_skipped_is_named_once_with_its_cause_listed_and_counted_in_the_progress_line(skipping):
    folder, train, valid, result = skipping
    assert result.progress.step == 6, "every update of the plan was made"
    assert listed(folder / "run") == [("train", "train4.wav"), ("valid", "valid1.wav")]
    said = (folder / "said").read_text()
    for file in (train[4].file, valid[1].file):
        assert said.count(f"{file}: truncated or damaged") == 1
    shown = [entry.get("bad_audio") for entry in entries(folder / "run", "train")]
    assert shown[-1] == 1 and set(shown) <= {None, 1} and "bad_audio 1" in said


def test_a_skipped_validation_recording_is_not_counted(skipping):
    folder, _, valid, result = skipping
    (entry, *_) = entries(folder / "run", "valid")
    assert entry["utterances"] == 4 and entry["bad_audio"] == 1
    rest = [row for row in valid if row.id != "valid1.wav"]
    expected = evaluate(ser.load(folder / "run/last"), rest).metrics()
    found = result.evaluation.metrics()
    assert {name: found[name] for name in ("utterances", "emotion_utterances", "words")} == {
        name: expected[name] for name in ("utterances", "emotion_utterances", "words")
    }
    assert found["accuracy"] == expected["accuracy"] and found["wer"] == expected["wer"]
    assert found["loss_emotion"] == pytest.approx(expected["loss_emotion"], rel=1e-5)
    with pytest.raises(AudioError, match=r"valid1\.wav: truncated or damaged"):
        evaluate(ser.load(folder / "run/last"), valid)


def test_loader_workers_skip_the_same(skipping, tmp_path):
    folder, train, valid, _ = skipping
    fit(toy_recognizer(), train, valid, quick(on_bad_audio="skip", workers=2), tmp_path / "run")
    assert listed(tmp_path / "run") == listed(folder / "run")
    assert_same_weights(checkpoints(tmp_path / "run")[-1], checkpoints(folder / "run")[-1])


def test_a_run_that_a_corrupt_recording_ended_continues_with_skip_as_if_it_had_skipped(skipping, tmp_path):
    _, train, _, _ = skipping
    fit(toy_recognizer(), train, [], quick(on_bad_audio="skip"), tmp_path / "whole")
    with pytest.raises(AudioError):
        fit(toy_recognizer(), train, [], quick(), tmp_path / "run")
    assert len(checkpoints(tmp_path / "run")) < 6
    fit(toy_recognizer(seed=9), train, [], quick(on_bad_audio="skip"), tmp_path / "run")
    assert_same_weights(checkpoints(tmp_path / "run")[-1], checkpoints(tmp_path / "whole")[-1])


def test_a_header_damaged_while_the_run_stood_still_does_not_change_its_order(tmp_path, capsys):
    train, _ = corpus(tmp_path)
    fit(toy_recognizer(), train, [], quick(on_bad_audio="skip"), tmp_path / "whole")
    run = tmp_path / "run"
    shutil.copytree(tmp_path / "whole", run)
    for folder in checkpoints(run)[2:]:
        shutil.rmtree(folder)
    train[4].file.write_bytes(b"not audio at all")
    capsys.readouterr()
    result = fit(toy_recognizer(seed=9), train, [], quick(on_bad_audio="skip"), run)
    assert result.resumed and "unknown format" in capsys.readouterr().err
    assert listed(run) == [("train", "train4.wav")], "still once"
    assert_same_weights(checkpoints(run)[-1], checkpoints(tmp_path / "whole")[-1])


@pytest.mark.parametrize(
    "left", ["{", "[]", '{"valid": []}', '{"train": 3}', "stale", "a text", "zero", "no file"]
)
def test_lengths_that_are_not_those_of_this_data_are_not_used(tmp_path, left):
    """A header is damaged; what stands in the folder for its length is cut, of other data, or no length."""
    train, _ = corpus(tmp_path, train=())
    dataset = toy_recognizer().dataset(train)
    true = list(dataset.lengths)
    train[4].file.write_bytes(b"not audio at all")
    made_up = {"stale": true[:-1], "a text": [*true[:-1], "9"], "zero": [*true[:-1], 0]}
    if left != "no file":
        text = json.dumps({"train": made_up[left]}) if left in made_up else left
        (tmp_path / "lengths.json").write_text(text)
    bad = BadAudio(World(), policy="skip", limit=0.5, run=tmp_path)
    fresh = toy_recognizer().dataset(train)
    bad.read_lengths("train", fresh, least=400)
    assert fresh.lengths == [*true[:4], 400, *true[5:]]
    (tmp_path / "lengths.json").write_text(json.dumps({"train": true}))
    for anew in (False, True):
        fresh = toy_recognizer().dataset(train)
        bad.read_lengths("train", fresh, least=400, anew=anew)
        assert fresh.lengths[4] == (400 if anew else true[4]), "a run that is overwritten leaves nothing"


def test_a_mended_recording_is_taken_off_the_list_on_resuming(tmp_path):
    train, _ = corpus(tmp_path)
    settings = quick(on_bad_audio="skip", epochs=1)
    fit(toy_recognizer(), train, [], settings, tmp_path / "run")
    assert listed(tmp_path / "run") == [("train", "train4.wav")]
    fit(toy_recognizer(), train, [], settings, tmp_path / "run")
    assert listed(tmp_path / "run") == [("train", "train4.wav")], "tried again, and still bad"
    soundfile.write(
        train[4].file, np.random.default_rng(0).normal(size=soundfile.info(train[4].file).frames), 16_000
    )
    fit(toy_recognizer(), train, [], settings, tmp_path / "run")
    assert listed(tmp_path / "run") == []


def test_a_mended_header_gives_a_length_and_so_other_data_which_is_refused_and_said(tmp_path):
    train, _ = corpus(tmp_path, train=())
    whole = train[3].file.read_bytes()
    train[3].file.write_bytes(b"not audio")
    fit(toy_recognizer(), train, [], quick(on_bad_audio="skip", epochs=1), tmp_path / "run")
    train[3].file.write_bytes(whole)
    with pytest.raises(RunFolderError, match=r"data\.train: (.|\n)*a recording mended since may be longer"):
        fit(toy_recognizer(), train, [], quick(on_bad_audio="skip", epochs=1), tmp_path / "run")
    train[3].file.write_bytes(b"not audio")
    assert fit(toy_recognizer(), train, [], quick(on_bad_audio="skip", epochs=1), tmp_path / "run").resumed


def test_headers_that_cannot_be_read_are_skipped_before_training_up_to_the_limit(tmp_path, capsys):
    train, _ = corpus(tmp_path, train=())
    train[3].file.write_bytes(b"not audio")
    train[7].file.unlink()
    result = fit(toy_recognizer(), train, [], quick(on_bad_audio="skip"), tmp_path / "run")
    said = capsys.readouterr().err
    assert result.progress.step == 6
    assert "unknown format" in said and "no such file" in said and "do not fit" not in said
    with pytest.raises(AudioError) as caught:
        fit(toy_recognizer(), train, [], quick(on_bad_audio="skip", max_bad_audio=0.1), tmp_path / "less")
    assert "2 of 12 recordings of train" in str(caught.value) and "--max-bad-audio 0.1" in str(caught.value)
    assert str(train[3].file) in str(caught.value) and str(train[7].file) in str(caught.value)
    assert not (tmp_path / "less").exists()


def test_beyond_the_limit_a_run_stops_and_lists_what_it_skipped(tmp_path):
    train, _ = corpus(tmp_path, train=(0, 5, 9))
    with pytest.raises(AudioError) as caught:
        fit(toy_recognizer(), train, [], quick(on_bad_audio="skip"), tmp_path / "run")
    assert "3 of 12 recordings of train" in str(caught.value) and "allows 20 %" in str(caught.value)
    assert all(str(train[i].file) in str(caught.value) for i in (0, 5, 9))
    assert sorted(id for _, id in listed(tmp_path / "run")) == ["train0.wav", "train5.wav", "train9.wav"]


def unread(folder: Path, index: int):
    """What the loader makes of a corrupt recording, at the place of utterance ``index`` of `examples`."""
    file = folder / "corrupt.wav"
    if not file.exists():
        soundfile.write(file, np.random.default_rng(0).normal(size=len(examples()[index].waveform)) / 9, 16_000)
        cut_behind_its_header(file)
    row = Utterance("corrupt", file, emotion="a", speaker="s", text="AB", arousal=1.0)
    labels = Labels.of(
        emotions=list("abcd"),
        speakers=list("stu"),
        dimensions=["arousal", "b", "c"],
        vocabulary=Vocabulary.build(["AB"]),
    )
    found = SpeechDataset([row], labels)[0]
    assert found.error and len(found.waveform) == len(examples()[index].waveform)
    return replace(found, index=index, waveform=found.waveform.double())


REST = [i for i in ALL if i != 3]


@pytest.mark.parametrize(("style", "micro_batch"), [({}, 1), ({}, 8), (LARGE_STYLE, 3)], ids=["1", "8", "3-large"])
def test_the_gradient_is_that_of_the_update_without_the_skipped_utterance(tmp_path, style, micro_batch):
    config, pool = tiny_config(**style), examples()
    expected, losses = gradients(World(), REST, 8, config=config)
    pool[3] = unread(tmp_path, 3)
    found, same = gradients(World(), ALL, micro_batch, config=config, pool=pool)
    assert_same_gradients(found, expected)
    torch.testing.assert_close(same, losses, rtol=1e-10, atol=0)


@pytest.mark.parametrize("kind", SerError.__subclasses__() + AudioError.__subclasses__())
def test_every_error_of_ours_crosses_processes_with_its_text(kind):
    error = pickle.loads(pickle.dumps(kind("a.wav: truncated")))
    assert type(error) is kind and str(error) == "a.wav: truncated"


# ---------------------------------------------------------------------------------------- two processes


def message_of(work) -> str:
    try:
        work()
    except SerError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def on_each_rank(world, folder: str):
    """Everything that needs two processes, in one start of them."""
    folder = Path(folder)
    pool = examples()
    pool[3] = unread(folder / f"rank{world.rank}", 3)
    found = {"gradients": {m: gradients(world, ALL, m, pool=pool)[0] for m in (1,)}}
    train, valid = (read_manifest(folder / f"{name}.csv") for name in ("train", "valid"))

    def run(name, rows=train, others=(), **changes):
        recognizer = toy_recognizer()
        fit(recognizer, rows, others, quick(**changes), folder / name, world=world)
        return [p.detach().clone() for p in recognizer.model.parameters()]

    found["skipped"] = run("skip", others=valid, on_bad_audio="skip")
    found["fail"] = message_of(lambda: run("fail", workers=1))
    found["limit"] = message_of(lambda: run("limit", on_bad_audio="skip", max_bad_audio=0.05))
    found["valid"] = message_of(lambda: run("valid", rows=train[:4], others=valid))
    found["disk"] = message_of(lambda: full_disk(world, folder, train))
    found["memory"] = out_of_memory(folder) if world.rank == 0 else ""
    return found


def full_disk(world: World, folder: Path, rows) -> None:
    """The second rank meets a damaged recording, and the first cannot note that."""
    bad = BadAudio(world, policy="skip", limit=0.5, run=folder / "full")
    if world.is_main:
        (folder / "full").mkdir()
        (folder / "full/skipped.jsonl").symlink_to("/dev/full")
    bad.begun = True
    bad.agree("train", toy_recognizer().dataset(rows), {4: "damaged"} if world.rank else {})


def out_of_memory(folder: Path) -> str:
    """What a run says whose longest utterance takes more memory than the system lets the process have."""
    soundfile.write(folder / "long.wav", np.random.default_rng(0).normal(size=120 * 16_000) / 9, 16_000)
    rows = [replace(row, file=folder / "long.wav", id="long") for row in read_manifest(folder / "train.csv")[:1]]
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (held + 300 * 2**20, before[1]))
    try:
        return message_of(lambda: fit(toy_recognizer(), rows, [], quick(), folder / "memory"))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    for rank in (0, 1):
        (folder / f"rank{rank}").mkdir()
    corpus(folder)
    return folder, run_ranks(on_each_rank, 2, folder, str(folder))


def test_the_gradient_is_that_without_the_skipped_utterance_on_two_ranks_too(two_ranks):
    expected, _ = gradients(World(), REST, 8)
    for found in two_ranks[1]:
        for gradient in found["gradients"].values():
            assert_same_gradients(gradient, expected)


def test_two_ranks_skip_alike_and_one_speaks(two_ranks):
    folder, (first, second) = two_ranks
    assert all(torch.equal(a, b) for a, b in zip(first["skipped"], second["skipped"], strict=True))
    assert listed(folder / "skip") == [("train", "train4.wav"), ("valid", "valid1.wav")]
    assert entries(folder / "skip", "train")[-1]["bad_audio"] == 1
    assert entries(folder / "skip", "valid")[-1]["utterances"] == 4


@pytest.mark.parametrize(
    ("case", "file"), [("fail", "train4.wav"), ("limit", "train4.wav"), ("valid", "valid1.wav")]
)
def test_two_ranks_end_with_the_same_message_though_one_of_them_read_the_file(two_ranks, case, file):
    first, second = (found[case] for found in two_ranks[1])
    assert first == second and first.startswith("AudioError: 1 of")
    assert file in first and "truncated or damaged" in first


def test_two_ranks_end_with_the_same_message_where_the_list_cannot_be_written(two_ranks):
    first, second = (found["disk"] for found in two_ranks[1])
    assert first == second and first.startswith("FileError: ") and "skipped.jsonl: cannot be written" in first


def test_out_of_memory_names_the_utterance_its_seconds_and_what_to_change(two_ranks):
    message = two_ranks[1][0]["memory"]
    assert message.startswith(f"{ResourceError.__name__}: out of memory")
    for words in ("long (120.0 s)", "--micro-seconds 1", "--max-seconds", "--activation-checkpointing", "--amp"):
        assert words in message


CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried")
CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1 GiB free.")
CUBLAS = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
NUMPY = MemoryError("Unable to allocate 4.00 GiB for an array with shape (1073741824,)")
FORK = OSError(12, "Cannot allocate memory")


@pytest.mark.parametrize(
    ("place", "error", "told"),
    [
        (
            "torch.optim.AdamW.step",
            CPU,
            r"in the optimizer's step: beside the weights and gradients it keeps 0\.00 GB",
        ),
        ("torch.optim.AdamW.step", CUDA, r"in the optimizer's step: .*CUDA out of memory\. Tried to allocate 2"),
        ("torch.nn.utils.clip_grad_norm_", CUDA, "in the optimizer's step"),
        ("torch.Tensor.backward", CUBLAS, r"with 2 utterances padded to .*train.*Try --micro-seconds 1"),
        ("ser.train.checkpoint.optimizer_tensors", MemoryError(), r"outside of an update\. .*\(MemoryError\)"),
        ("torch.nn.Module.to", CUDA, "when the model was put onto cpu"),
        ("ser.train.distributed.World.wrap", CUDA, "when room for gradients was made"),
        ("ser.train.setup.make_optimizer", CPU, "outside of an update"),
        ("ser.train.setup.LengthBucketBatchSampler", NUMPY, "outside of an update.*Unable to allocate 4"),
        ("ser.train.loop.fetch_updates", FORK, "outside of an update.*Cannot allocate memory"),
        ("ser.train.checkpoint.save_checkpoint", NUMPY, "when a model or checkpoint was written"),
        ("ser.train.evaluation.word_errors", NUMPY, r"in evaluation\. Try a lower --eval-seconds"),
    ],
)
def test_memory_that_runs_out_anywhere_is_told_with_what_was_done_and_what_helps(
    tmp_path, monkeypatch, place, error, told
):
    rows = toy_rows(tmp_path, 4)

    def short(*_, **__):
        raise error

    monkeypatch.setattr(place, short)
    with pytest.raises(ResourceError, match=f"^out of memory {told}") as caught:
        fit(toy_recognizer(), rows, rows, quick(epochs=1), tmp_path / "run")
    message = str(caught.value)
    assert "\n" not in message
    assert "--eval-seconds" in message or "a run that has a checkpoint continues" in message
    assert "--micro-seconds" in message if "padded" in message else "Try --micro-seconds" not in message


def test_memory_that_runs_out_while_a_checkpoint_is_copied_leaves_the_one_before(tmp_path, monkeypatch):
    rows = toy_rows(tmp_path, 4)
    fit(toy_recognizer(), rows, [], quick(epochs=1), tmp_path / "run")
    real, load = torch.Tensor.to, setup.load_checkpoint

    def short(self, *arguments, copy=False, **options):
        if copy:
            raise CPU
        return real(self, *arguments, copy=copy, **options)

    def then_short(*arguments):
        found = load(*arguments)
        monkeypatch.setattr(torch.Tensor, "to", short)
        return found

    monkeypatch.setattr(setup, "load_checkpoint", then_short)
    longer = {"epochs": 3, "keep": 9}
    with pytest.raises(
        ResourceError, match=r"when 0\.\d\d GB were copied on the CPU, to be saved\. A smaller micro"
    ):
        fit(toy_recognizer(), rows, [], quick(**longer), tmp_path / "run", allow_changes=["epochs"])
    monkeypatch.undo()
    assert fit(toy_recognizer(), rows, [], quick(**longer), tmp_path / "run", allow_changes=["epochs"]).resumed


@pytest.mark.parametrize(
    "error", [RuntimeError("shape mismatch"), OSError(5, "Input/output error"), ValueError("x")]
)
def test_other_errors_are_not_taken_for_memory(tmp_path, monkeypatch, error):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr("torch.optim.AdamW.step", fails)
    with pytest.raises(type(error)) as caught:
        fit(toy_recognizer(), toy_rows(tmp_path, 4), [], quick(epochs=1), tmp_path / "run")
    assert caught.value is error


def test_memory_that_runs_out_while_a_checkpoint_is_loaded_is_no_bad_checkpoint(tmp_path, monkeypatch):
    rows = toy_rows(tmp_path, 4)
    fit(toy_recognizer(), rows, [], quick(epochs=1), tmp_path / "run")

    def short(*_):
        raise CPU

    monkeypatch.setattr("ser.train.checkpoint.read_tensors", short)
    with pytest.raises(ResourceError, match="out of memory when a checkpoint was loaded"):
        fit(toy_recognizer(), rows, [], quick(epochs=1), tmp_path / "run")


# ---------------------------------------------------------------------------------------- workers


def test_a_loader_worker_that_hangs_in_an_evaluation_is_given_up_after_the_timeout(tmp_path, monkeypatch):
    train, valid = corpus(tmp_path, train=(), valid=())
    read, names = SpeechDataset.__getitem__, {row.id for row in valid}

    def hangs(self, asked):
        if self.utterances[0].id in names:
            time.sleep(20)
        return read(self, asked)

    monkeypatch.setattr(SpeechDataset, "__getitem__", hangs)
    with pytest.raises(ResourceError, match=r"gave nothing within --timeout.* after 2\.0 seconds"):
        fit(toy_recognizer(), train[:4], valid, quick(workers=1, timeout=2.0, epochs=1), tmp_path / "run")


def ends_while_it_tells(folder: Path) -> None:
    """One loader worker is killed, and the other while that is being told."""
    rows = read_manifest(folder / "train.csv")
    loader = torch.utils.data.DataLoader(toy_recognizer().dataset(rows), batch_size=None, num_workers=2)
    batches = iter(loader)
    next(batches)
    first, second = (worker.pid for worker in batches._workers)

    class Told:
        def write(self, text: str) -> None:
            os.kill(second, signal.SIGKILL)
            time.sleep(0.3)
            with (folder / "told").open("a") as file:
                file.write(text)

        def flush(self) -> None:
            pass

    sys.stderr = Told()
    with one_voice(), worker_death_explained():
        os.kill(first, signal.SIGKILL)
        time.sleep(60)


def test_workers_that_die_while_the_death_of_the_first_is_told_do_not_interrupt_that(tmp_path):
    write_corpus(tmp_path, 12)
    child = os.fork()
    if not child:
        status = 99
        try:
            ends_while_it_tells(tmp_path)
        except SystemExit as end:
            status = end.code
        except BaseException:
            (tmp_path / "failed").write_text(traceback.format_exc())
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == 1, (tmp_path / "failed").read_text()
    told = (tmp_path / "told").read_text()
    assert told.startswith("error: a process that decodes audio died") and told.endswith("to continue\n")


# ---------------------------------------------------------------------------------------- torchrun


def children(pid: int) -> list[int]:
    """Of a process, by Linux's /proc."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                    found.append(int(folder.name))
            except OSError:
                continue  # it has ended
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes through Linux's /proc")
def test_a_killed_loader_worker_ends_all_ranks_with_a_clear_error(tmp_path):
    """And --on-bad-audio skip reads past a file that is not there."""
    write_corpus(tmp_path, 8)
    with (tmp_path / "train.csv").open() as file:
        rows = list(csv.DictReader(file))
    with (tmp_path / "long.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file", "emotion", "start"])
        table.writerow(["gone.wav", "sad", ""])
        table.writerows([rows[i % 8]["file"], rows[i % 8]["emotion"], f"{i * 1e-5:.5f}"] for i in range(3000))
    toy_recognizer(heads=["emotion"]).save(tmp_path / "init")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(SCRIPT)]
    options = "--train long.csv --init init --out run --workers 1 --epochs 100 --log-every 1 --on-bad-audio skip"
    command += [*options.split(), "--max-bad-audio", "0.001", "--effective-batch", "8"]
    with (tmp_path / "said").open("w") as said:
        agent = subprocess.Popen(
            command, cwd=tmp_path, stderr=said, stdout=said, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        try:
            log = tmp_path / "run/metrics.jsonl"
            end = time.monotonic() + 120
            while not (log.exists() and log.read_text()) and agent.poll() is None and time.monotonic() < end:
                time.sleep(0.2)
            workers = [worker for rank in children(agent.pid) for worker in children(rank)]
            assert workers, (tmp_path / "said").read_text()
            os.kill(workers[-1], signal.SIGKILL)
            killed = time.monotonic()
            assert agent.wait(timeout=60) != 0
            seconds = time.monotonic() - killed
        finally:
            agent.kill() if agent.poll() is None else None
    text = (tmp_path / "said").read_text()
    assert seconds < 15
    assert "gone.wav: no such file" in text
    assert "error: a process that decodes audio died" in text and "--workers" in text
    first = text.index("error: a process that decodes audio died")
    assert "Traceback" not in text[:first] and "Connection" not in text[:first]

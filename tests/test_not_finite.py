"""Updates whose loss or gradient is not finite, on one rank or as a float16 overflow (FAULTS D5, D6)."""

import json
from pathlib import Path

import pytest
import torch
from test_train import log, quick
from test_update import run_ranks
from toy import toy_recognizer, toy_rows, write_corpus

from ser.data.dataset import SpeechDataset
from ser.data.manifest import read_manifest
from ser.errors import RunFolderError
from ser.train import loop
from ser.train.checkpoint import checkpoints
from ser.train.loop import fit
from ser.train.update import UpdateResult

UPDATE = loop.run_update
SCALER = torch.amp.GradScaler
BAD = 5  # an utterance


def poison(value: float, bad: set[int]):
    """`SpeechDataset.__getitem__` that puts one sample that is not finite into some utterances."""
    read = SpeechDataset.__getitem__

    def item(self, asked):
        example = read(self, asked)
        if example.index in bad:
            example.waveform[100] = value
        return example

    return read, item


def two_runs(world, folder):
    """On this rank: the weights with an utterance that holds a NaN, and with its updates left out by hand."""
    rows = read_manifest(Path(folder) / "train.csv")
    found, touched = [], []

    def without(learner, batches, progress, **options):
        held = [i for batch in batches for i in batch.indices]
        mine = BAD in held
        (anywhere,) = world.sum(torch.tensor([float(mine)])).tolist()
        touched.append(mine)
        return UpdateResult({}, 0.0) if anywhere else UPDATE(learner, batches, progress, **options)

    for number, value in enumerate([float("nan"), None]):
        recognizer = toy_recognizer()
        read, item = poison(value or 0.0, {BAD} if value is not None else set())
        SpeechDataset.__getitem__ = item
        loop.run_update = UPDATE if value is not None else without
        settings = quick(micro_batch=1, log_every=1, save_every="99")
        result = fit(recognizer, rows, [], settings, Path(folder) / f"run{number}", world=world)
        SpeechDataset.__getitem__ = read
        weights = {name: p.detach().clone() for name, p in recognizer.model.named_parameters()}
        found.append((weights, result.progress.skipped, result.progress.step))
    return found, touched


def test_a_sample_that_is_not_finite_on_one_rank_leaves_its_update_out_on_all_and_nothing_else(tmp_path, capfd):
    write_corpus(tmp_path, 8)
    ranks = run_ranks(two_runs, 2, tmp_path, str(tmp_path))
    said = capfd.readouterr().err
    (_, first_has_it), (_, second_has_it) = ranks
    assert [a + b for a, b in zip(first_has_it, second_has_it, strict=True)].count(1) == 3, "on one rank, thrice"
    for found, _ in ranks:
        (nan, *counts), (expected, *_) = found
        assert counts == [3, 6], "once an epoch, and each keeps its place"
        for name, value in expected.items():
            assert torch.equal(nan[name], value), name
            assert torch.equal(value, ranks[0][0][1][0][name]), f"ranks differ in {name}"
    lines = [line for line in said.splitlines() if "left out: loss or gradient not finite" in line]
    assert len(lines) == 3, said
    for line in lines:
        names = line.partition("it held ")[2].split(", ")
        assert f"train{BAD}.wav" in " ".join(names) and len(names) == 4, "those of both ranks"


def test_the_run_ends_after_as_many_in_a_row_as_was_set_and_begins_the_count_anew_in_between(
    tmp_path, monkeypatch
):
    rows = toy_rows(tmp_path, 8)
    _, item = poison(float("nan"), set(range(8)))
    monkeypatch.setattr(SpeechDataset, "__getitem__", item)
    with pytest.raises(RunFolderError, match="3 updates in a row had gradients that are not finite"):
        fit(toy_recognizer(), rows, [], quick(max_skipped=3, log_every=1), tmp_path / "run")
    assert [e["step"] for e in log(tmp_path / "run", "train")] == [1, 2]
    monkeypatch.undo()
    _, item = poison(float("nan"), {BAD})
    monkeypatch.setattr(SpeechDataset, "__getitem__", item)
    result = fit(toy_recognizer(), rows, [], quick(max_skipped=3, epochs=5), tmp_path / "other")
    assert result.progress.skipped == 5 and result.progress.finished


def scale_after(run: Path) -> float:
    return json.loads((checkpoints(run)[-1] / "state.json").read_text())["scaler"]["scale"]


def test_float16_overflows_halve_the_scale_change_no_weight_and_are_no_fault(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        torch.amp, "GradScaler", lambda device, enabled: SCALER(device, enabled=enabled, init_scale=2.0**40)
    )
    recognizer = toy_recognizer()
    before = {name: p.detach().clone() for name, p in recognizer.model.named_parameters()}
    settings = quick(amp="fp16", epochs=1, max_skipped=1)  # two updates: both overflow, and 3 x 1 may
    result = fit(recognizer, toy_rows(tmp_path, 8), [], settings, tmp_path / "run")
    assert result.progress.step == 2 and result.progress.skipped == 0
    assert scale_after(tmp_path / "run") == 2.0**38
    assert all(torch.equal(before[name], p) for name, p in recognizer.model.named_parameters())
    assert "left out" not in capsys.readouterr().err


def test_a_loss_that_is_not_finite_is_a_fault_in_float16_too_and_leaves_the_scale_alone(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(
        torch.amp, "GradScaler", lambda device, enabled: SCALER(device, enabled=enabled, init_scale=8.0)
    )
    _, item = poison(float("nan"), {BAD})
    monkeypatch.setattr(SpeechDataset, "__getitem__", item)
    result = fit(toy_recognizer(), toy_rows(tmp_path, 8), [], quick(amp="fp16", epochs=2), tmp_path / "run")
    assert result.progress.skipped == 2 and scale_after(tmp_path / "run") == 8.0
    assert capsys.readouterr().err.count(f"train{BAD}.wav") == 2

"""Runs: learning, resuming, run folders, evaluation (N4, N5, N7; FAULTS C1, C3, D7)."""

import argparse
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_update import run_ranks, run_update
from toy import toy_recognizer, toy_rows, write_corpus

import ser
from ser.data.augment import AUGMENTATIONS
from ser.data.manifest import read_manifest
from ser.data.sampler import LengthBucketBatchSampler
from ser.data.text import Vocabulary
from ser.errors import ConfigError, RunFolderError, SerError
from ser.train.checkpoint import checkpoints, seal_checkpoint
from ser.train.config import GROUPS, TrainConfig, add_training_arguments, training_config
from ser.train.distributed import World
from ser.train.evaluation import evaluate
from ser.train.loop import fetch_updates, fit
from ser.train.losses import Objective
from ser.train.optim import SCHEDULES

QUICK = TrainConfig(
    epochs=3, effective_batch=4, micro_batch=2, rate=3e-3, beta=0.1, log_every=2, keep=100, save_every="1"
)


def quick(**changes) -> TrainConfig:
    return TrainConfig(**(QUICK.to_dict() | changes))


def log(run: Path, kind: str) -> list[dict]:
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [entry for entry in entries if entry["kind"] == kind]


def state(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors") | load_file(folder / "optimizer.safetensors")


def assert_identical(a: Path, b: Path) -> None:
    first, second = state(a), state(b)
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different, different


def test_training_learns_the_toy_corpus_and_keeps_the_best_model(tmp_path):
    train, valid = toy_rows(tmp_path, 24), toy_rows(tmp_path, 12, seed=1, name="valid")
    recognizer = toy_recognizer(layerdrop=0.0, mask_time_prob=0.0, mask_feature_prob=0.0)
    result = fit(recognizer, train, valid, quick(epochs=30, rate=1e-2, save_every="30ep"), tmp_path / "run")
    found = evaluate(ser.load(tmp_path / "run/best"), valid).metrics()
    assert found["unweighted_accuracy"] >= 0.75
    assert found["unweighted_accuracy"] == pytest.approx(result.progress.best)
    losses = [entry["loss_emotion"] for entry in log(tmp_path / "run", "train")]
    assert losses[-1] < 0.5 * losses[0]


def test_dimensions_alone_are_learnt_and_choose_the_best_model(tmp_path):
    train, valid = toy_rows(tmp_path, 64), toy_rows(tmp_path, 12, seed=1, name="valid")
    recognizer = toy_recognizer(heads=["dimensions"], layerdrop=0.0, mask_time_prob=0.0, mask_feature_prob=0.0)
    settings = quick(epochs=25, effective_batch=8, rate=1e-2, save_every="25ep")
    result = fit(recognizer, train, valid, settings, tmp_path / "run")
    found = evaluate(ser.load(tmp_path / "run/best"), valid).metrics()
    assert result.metric == "ccc" and found["ccc"] == pytest.approx(result.progress.best)
    assert found["ccc_arousal"] > 0.4 and found["ccc_valence"] > 0.3
    assert found["ccc"] == pytest.approx((found["ccc_arousal"] + found["ccc_valence"]) / 2)
    (prediction,) = ser.load(tmp_path / "run/best").predict(valid[0].file)
    assert list(prediction.dimensions) == ["arousal", "valence"] and prediction.emotion is None


def test_a_dimension_that_does_not_vary_in_validation_is_left_out_of_the_mean_and_of_the_loss(tmp_path):
    train, valid = toy_rows(tmp_path, 12), toy_rows(tmp_path, 8, seed=1, name="valid")
    valid = [replace(row, valence=3.0) for row in valid]
    recognizer = toy_recognizer(heads=["dimensions"])
    result = fit(recognizer, train, valid, quick(epochs=1), tmp_path / "run")
    found = result.evaluation.metrics()
    assert math.isnan(found["ccc_valence"]) and found["ccc"] == found["ccc_arousal"] == result.progress.best
    assert found["loss_dimensions"] == pytest.approx((1 - found["ccc_arousal"]) / 2)
    assert (tmp_path / "run/best/model.safetensors").is_file()
    constant = [replace(row, arousal=1.0) for row in valid]
    with pytest.raises(ConfigError, match="no label for any head"):
        fit(recognizer, train, constant, quick(epochs=1), tmp_path / "other")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A run with dropout, LayerDrop, masks and accumulation, a checkpoint after every update."""
    folder = tmp_path_factory.mktemp("whole")
    train, valid = toy_rows(folder, 10), toy_rows(folder, 6, seed=1, name="valid")
    fit(toy_recognizer(), train, valid, QUICK, folder / "run")
    return folder, train, valid


# Updates overflow, so the scaler's state differs from a new one's; and the run stops early, in the middle of an
# epoch, some evaluations after the best.
SCALED = {"amp": "fp16", "eval_every": "1", "early_stop": 3, "epochs": 5, "metric": "loss", "rate": 0.1}


@pytest.fixture(scope="module")
def scaled(tmp_path_factory, uninterrupted):
    """The same with a loss scale, evaluation after every update and an early end."""
    folder = tmp_path_factory.mktemp("scaled")
    _, train, valid = uninterrupted
    result = fit(toy_recognizer(), train, valid, quick(**SCALED), folder / "run")
    return folder, train, valid, result.progress


def copy_run(folder: Path, step: int, run: Path) -> None:
    """The run as it was on disk after ``step`` updates, but for a log that is longer."""
    (run / "checkpoints").mkdir(parents=True)
    shutil.copy(folder / "run/config.json", run)
    shutil.copy(folder / "run/metrics.jsonl", run)
    name = f"step-{step:08d}"
    shutil.copytree(folder / "run/checkpoints" / name, run / "checkpoints" / name)


def assert_same_log(a: Path, b: Path) -> None:
    """Every line once: no update, evaluation or epoch is missing or there twice."""
    for kind in ("train", "valid"):
        lines = [[(entry["step"], entry["epoch"]) for entry in log(run, kind)] for run in (a, b)]
        assert lines[0] == lines[1], kind


def resume_from(folder: Path, step: int, train, valid, run: Path, **changes):
    """Continue a copy of the run as it was on disk after ``step`` updates."""
    copy_run(folder, step, run)
    return fit(toy_recognizer(seed=99), train, valid, quick(**changes), run)


@pytest.mark.parametrize("step", range(1, 10))
def test_a_run_resumed_after_any_update_ends_bit_identically(uninterrupted, tmp_path, step):
    folder, train, valid = uninterrupted
    assert len(checkpoints(folder / "run")) == 9, "3 epochs of 2 full updates and a small one"
    result = resume_from(folder, step, train, valid, tmp_path / "run")
    assert result.resumed and result.progress.step == 9
    assert_identical(checkpoints(tmp_path / "run")[-1], checkpoints(folder / "run")[-1])
    assert_same_log(tmp_path / "run", folder / "run")


def test_a_run_with_a_loss_scale_and_an_early_end_resumed_after_any_update_ends_the_same(scaled, tmp_path):
    folder, train, valid, progress = scaled
    assert progress.finished and 1 < progress.best_step < progress.step < 15
    assert progress.scaler["scale"] < 2.0**16, "nothing overflowed, so a new scaler would do as well"
    for step in range(1, progress.step + 1):
        run = tmp_path / f"run{step}"
        result = resume_from(folder, step, train, valid, run, **SCALED)
        assert result.progress == progress, step
        assert_identical(checkpoints(run)[-1], checkpoints(folder / "run")[-1])
        if step < progress.best_step:
            best = "best/model.safetensors"
            assert (run / best).read_bytes() == (folder / "run" / best).read_bytes()
        assert_same_log(run, folder / "run")


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_loader_workers_do_not_change_the_run(uninterrupted, tmp_path, workers):
    folder, train, valid = uninterrupted
    fit(toy_recognizer(), train, valid, quick(workers=workers), tmp_path / "run")
    assert_identical(checkpoints(tmp_path / "run")[-1], checkpoints(folder / "run")[-1])


def test_a_finished_run_says_so_and_does_nothing_more(uninterrupted, tmp_path, capsys):
    folder, train, valid = uninterrupted
    before = state(checkpoints(folder / "run")[-1])
    result = resume_from(folder, 9, train, valid, tmp_path / "run")
    assert result.progress.finished and result.progress.step == 9
    assert "is finished, nothing is left to do; it ended at update 9 of 9" in capsys.readouterr().err
    after = state(checkpoints(tmp_path / "run")[-1])
    assert all(torch.equal(before[name], after[name]) for name in before)
    last = (tmp_path / "run/last/model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "run/last")  # as if killed just before it was written
    fit(toy_recognizer(), train, valid, QUICK, tmp_path / "run")
    assert (tmp_path / "run/last/model.safetensors").read_bytes() == last


def test_a_run_with_other_settings_is_refused_and_the_differences_are_listed(uninterrupted):
    folder, train, valid = uninterrupted
    with pytest.raises(RunFolderError) as caught:
        fit(toy_recognizer(), train, valid, quick(rate=1e-2, seed=7, effective_batch=2), folder / "run")
    assert "effective_batch: 4 then, 2 now" in str(caught.value)
    assert "rate: 0.003 then, 0.01 now" in str(caught.value) and "seed: 0 then, 7 now" in str(caught.value)


def test_a_run_of_another_model_or_with_other_labels_is_refused_and_the_differences_are_listed(uninterrupted):
    folder, train, valid = uninterrupted
    with pytest.raises(RunFolderError, match=r"model\.encoder\.intermediate_size: 32 then, 24 now"):
        fit(toy_recognizer(intermediate_size=24), train, valid, QUICK, folder / "run")
    other = toy_recognizer()
    other.labels = replace(other.labels, names={**other.labels.names, "emotion": other.emotions[::-1]})
    with pytest.raises(RunFolderError, match=r"model\.emotions: \['angry', "):
        fit(other, train, valid, QUICK, folder / "run")


def test_a_foreign_folder_is_refused_and_untouched_even_with_overwrite(tmp_path):
    train = toy_rows(tmp_path / "data", 4)
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter1.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(RunFolderError):
            fit(toy_recognizer(), train, [], QUICK, foreign, overwrite=overwrite)
    assert (foreign / "chapter1.txt").read_text() == "years of work"


def test_overwrite_starts_a_run_anew(tmp_path):
    train = toy_rows(tmp_path, 4)
    fit(toy_recognizer(), train, [], quick(epochs=1), tmp_path / "run")
    result = fit(toy_recognizer(), train, [], quick(epochs=2), tmp_path / "run", overwrite=True)
    assert not result.resumed and result.progress.step == 2


def test_a_damaged_checkpoint_is_named_and_the_run_continues_from_the_one_before(uninterrupted, tmp_path, capsys):
    folder, train, valid = uninterrupted
    run = tmp_path / "run"
    shutil.copytree(folder / "run", run)
    newest = checkpoints(run)[-1]
    weights = newest / "optimizer.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    result = fit(toy_recognizer(seed=99), train, valid, QUICK, run)
    said = capsys.readouterr().err
    assert f"skipped a damaged checkpoint: {weights}: has 100 bytes" in said
    assert result.progress.step == 9 and "is resumed at update 8 of 9, from step-00000008" in said
    assert_identical(checkpoints(run)[-1], checkpoints(folder / "run")[-1])
    assert_same_log(run, folder / "run")


def test_a_run_goes_back_to_the_checkpoint_that_is_named_and_ends_the_same(uninterrupted, tmp_path, capsys):
    folder, train, valid = uninterrupted
    shutil.copytree(folder / "run", tmp_path / "run")
    result = fit(toy_recognizer(seed=9), train, valid, QUICK, tmp_path / "run", resume_from="step-00000004")
    assert result.progress.step == 9 and "at update 4 of 9, from step-00000004" in capsys.readouterr().err
    assert_identical(checkpoints(tmp_path / "run")[-1], checkpoints(folder / "run")[-1])
    assert len(checkpoints(tmp_path / "run")) == 9
    assert_same_log(tmp_path / "run", folder / "run")


def test_a_finished_run_trains_more_epochs_when_that_is_asked_for(uninterrupted, tmp_path, capsys):
    folder, train, valid = uninterrupted
    with pytest.raises(RunFolderError, match=r"--allow-changes epochs if that is meant[^$]*epochs: 3 then, 4 now"):
        resume_from(folder, 9, train, valid, tmp_path / "refused", epochs=4)
    copy_run(folder, 9, tmp_path / "run")
    result = fit(toy_recognizer(seed=9), train, valid, quick(epochs=4), tmp_path / "run", allow_changes=["epochs"])
    assert result.progress.step == 12 and result.progress.finished
    said = capsys.readouterr().err
    assert "changed on purpose: epochs: 3 then, 4 now" in said and "is resumed at update 9 of 12" in said
    assert [entry["step"] for entry in log(tmp_path / "run", "valid")] == [3, 6, 9, 12]
    result = fit(toy_recognizer(seed=9), train, valid, quick(epochs=4), tmp_path / "run")
    assert result.progress.step == 12, "what was changed is now the run's"


def test_the_newest_checkpoints_and_that_of_the_best_evaluation_are_kept(uninterrupted, tmp_path):
    _, train, valid = uninterrupted
    fit(toy_recognizer(), train[:8], [], quick(epochs=3, keep=2), tmp_path / "run")
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["step-00000005", "step-00000006"]
    config = quick(epochs=3, keep=1, rate=1e-9, metric="unweighted_accuracy")  # the first is never bettered
    result = fit(toy_recognizer(), train[:8], valid, config, tmp_path / "still")
    assert result.progress.best_step == 2
    assert [p.name for p in checkpoints(tmp_path / "still")] == ["step-00000002", "step-00000006"]


def test_saving_stands_in_the_progress_line(uninterrupted):
    folder, *_ = uninterrupted
    entries = log(folder / "run", "train")
    for name in ("save_written_seconds", "save_stopped_seconds"):  # what is still being written counts later
        assert sum(entry.get(name, 0.0) for entry in entries) > 0, name


def test_a_checkpoint_is_a_model_folder_and_no_leftovers_stand_beside_it(tmp_path):
    rows = toy_rows(tmp_path, 4)
    fit(toy_recognizer(), rows, rows, quick(epochs=1), tmp_path / "run")
    for folder in (*checkpoints(tmp_path / "run"), tmp_path / "run/best", tmp_path / "run/last"):
        assert ser.load(folder).predict(rows[0].file)[0].emotion in ser.load(folder).emotions
    assert not list((tmp_path / "run").rglob(".*"))


@pytest.mark.parametrize("freeze", ["feature-encoder", "encoder"])
def test_a_frozen_part_does_not_change(tmp_path, freeze):
    recognizer = toy_recognizer()
    part = recognizer.model.wav2vec2 if freeze == "encoder" else recognizer.model.wav2vec2.feature_extractor
    before = {name: p.clone() for name, p in part.state_dict().items()}
    heads = recognizer.model.cls_head.weight.clone()
    fit(recognizer, toy_rows(tmp_path, 4), [], quick(epochs=2, freeze=freeze, weight_decay=0.1), tmp_path / "run")
    assert all(torch.equal(before[name], p) for name, p in part.state_dict().items())
    assert not torch.equal(heads, recognizer.model.cls_head.weight)


def test_early_stopping_ends_a_run_that_does_not_improve(tmp_path):
    rows = toy_rows(tmp_path, 8)
    config = quick(epochs=50, rate=1e-9, early_stop=3, save_every="50ep", metric="unweighted_accuracy")
    result = fit(toy_recognizer(), rows, rows, config, tmp_path / "run")
    assert result.progress.finished and len(log(tmp_path / "run", "valid")) == 4
    resumed = fit(toy_recognizer(), rows, rows, config, tmp_path / "run")
    assert resumed.progress.step == result.progress.step


def test_long_training_turns_are_dropped_counted_and_named_and_evaluation_drops_none(tmp_path, capsys):
    rows = toy_rows(tmp_path, 12)
    fit(toy_recognizer(), rows, rows, quick(epochs=1, max_seconds=0.35), tmp_path / "run")
    said = capsys.readouterr().err
    dropped = [row.id for row in rows if ser.load_audio(row.file).numel() > 0.35 * 16_000]
    assert 0 < len(dropped) < 12
    assert f"dropped {len(dropped)} training utterances over 0.35 s" in said and dropped[0] in said
    assert log(tmp_path / "run", "valid")[0]["utterances"] == 12


def test_training_utterances_without_a_frame_are_refused_by_name(tmp_path):
    import numpy as np
    import soundfile

    rows = toy_rows(tmp_path, 4)
    soundfile.write(rows[2].file, np.zeros(100), 16_000)
    with pytest.raises(ConfigError, match=r"train2\.wav: 100 samples"):
        fit(toy_recognizer(), rows, [], QUICK, tmp_path / "run")


def test_transcripts_that_do_not_fit_and_unknown_characters_are_named_before_training(tmp_path, capsys):
    manifest = write_corpus(tmp_path, 4)
    lines = manifest.read_text().splitlines()
    lines[1] = "train0.wav,angry,AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA?,s0,,"
    manifest.write_text("\n".join(lines))
    fit(toy_recognizer(), read_manifest(manifest), [], quick(epochs=1), tmp_path / "run")
    said = capsys.readouterr().err
    assert "1 transcripts do not fit their audio" in said and "train0.wav: 67 frames needed" in said
    assert "'?' x1" in said
    assert "1 of 4 utterances have no transcript" in said


def test_a_vocabulary_that_writes_none_of_the_text_is_refused(tmp_path):
    manifest = write_corpus(tmp_path, 4)
    manifest.write_text(manifest.read_text().replace("AB", "привет").replace("BA", "мир").replace("A B", "да"))
    with pytest.raises(ConfigError, match="--build-vocab"):
        fit(toy_recognizer(), read_manifest(manifest), [], quick(epochs=1), tmp_path / "run")


def test_what_evaluation_counts_is_what_a_loop_over_predictions_counts(tmp_path):
    rows = toy_rows(tmp_path, 13, speakers=4)  # the fourth speaker is unknown to the model
    recognizer = toy_recognizer()
    found = evaluate(recognizer, rows, batch_seconds=1.0, keep_rows=True)
    predictions = recognizer.predict([row.file for row in rows])
    right = sum(p.emotion == row.emotion for p, row in zip(predictions, rows, strict=True))
    assert found.metrics()["accuracy"] == right / 13
    assert found.metrics()["speaker_utterances"] == sum(row.speaker != "s3" for row in rows)
    assert [p.transcript for _, _, p in found.rows] == [p.transcript for p in predictions]


def metrics_on_ranks(world, manifest):
    return evaluate(toy_recognizer(), read_manifest(manifest), world=world, batch_seconds=0.6).metrics()


@pytest.mark.parametrize("ranks", [2, 3])
def test_evaluation_is_the_same_on_any_number_of_ranks(tmp_path, ranks, request):
    if ranks == 2:
        folder, returned = request.getfixturevalue("on_two_ranks")
        manifest, results = folder / "train.csv", [metrics for *_, metrics in returned]
    else:
        manifest = write_corpus(tmp_path, 11)
        results = run_ranks(metrics_on_ranks, ranks, tmp_path, manifest)
    expected = metrics_on_ranks(None, manifest)
    for found in results:
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            if name.startswith(("loss", "ccc")):  # sums of numbers that are not whole
                assert found[name] == pytest.approx(value, rel=1e-6), name
            else:
                assert found[name] == value, name


def fit_on_ranks(world, folder, count, run=None):
    rows = read_manifest(Path(folder) / "train.csv")[:count]
    recognizer = toy_recognizer(
        hidden_dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, final_dropout=0.0, layerdrop=0.0
    )
    run = run or Path(folder) / f"run{count}"
    fit(recognizer, rows, rows, quick(epochs=2, save_every="2ep"), run, world=world)
    return {name: p.detach().clone() for name, p in recognizer.model.named_parameters()}


def several_fits(world, folder):
    return {count: fit_on_ranks(world, folder, count) for count in (1, 3, 4, 7)}


def fit_with_an_untrained_head(world, folder):
    rows = read_manifest(Path(folder) / "train.csv")[:8]
    recognizer = toy_recognizer()
    before = recognizer.model.lm_head.weight.clone()
    fit(recognizer, rows, [], quick(epochs=2, alpha=0.0), Path(folder) / "head", world=world)
    return torch.equal(before, recognizer.model.lm_head.weight), recognizer.model.cls_head.weight.detach()


STEADY = quick(micro_batch=1, log_every=1)


def resume_on_ranks(world, folder):
    """A run on two ranks, resumed in the middle; and one that began on one rank."""
    rows = read_manifest(Path(folder) / "train.csv")
    two = Path(folder) / "two"
    fit(toy_recognizer(), rows, rows, QUICK, two / "run", world=world)
    if world.is_main:
        copy_run(two, 4, Path(folder) / "again")
    world.barrier()
    fit(toy_recognizer(seed=9), rows, rows, QUICK, Path(folder) / "again", world=world)
    steady = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "layerdrop": 0.0}
    steady["final_dropout"] = 0.0
    alone = World(size=1)
    if world.is_main:
        fit(toy_recognizer(**steady), rows, rows, STEADY, Path(folder) / "one/run", world=alone)
        copy_run(Path(folder) / "one", 4, Path(folder) / "wider")
    world.barrier()
    fit(toy_recognizer(seed=9, **steady), rows, rows, STEADY, Path(folder) / "wider", world=world)


def every_number(world, folder):
    """An epoch of updates and an evaluation of 1, 2, ... 40 utterances: (updates, evaluated) of each."""
    rows = read_manifest(write_corpus(Path(folder) / f"forty{world.rank}", 40))
    recognizer = toy_recognizer(heads=("emotion", "ctc", "speaker"))
    model = recognizer.model.train()
    wrapped, optimizer = world.wrap(model), torch.optim.SGD(model.parameters(), lr=0.0)
    objective = Objective({"emotion": 1.0, "ctc": 0.1, "speaker": 0.1})
    found = []
    for count in range(1, 41):
        dataset = recognizer.dataset(rows[:count])
        sampler = LengthBucketBatchSampler(
            dataset.lengths, seed=0, effective_batch=8, micro_batch=4, rank=world.rank, world_size=world.size
        )
        sampler.set_position(epoch=0, update=0)
        updates = 0
        for batches in fetch_updates(dataset, sampler, QUICK, world):
            scaler = torch.amp.GradScaler("cpu", enabled=False)
            result = run_update(wrapped, model, optimizer, batches, objective, world, scaler=scaler, step=updates)
            assert math.isfinite(result.grad_norm)
            updates += 1
        found.append((updates, evaluate(recognizer, dataset, world=world, batch_seconds=2.0).utterances))
    return found


def everything_on_two_ranks(world, folder):
    """All that needs two processes, in one start of them."""
    resume_on_ranks(world, folder)
    metrics = metrics_on_ranks(world, Path(folder) / "train.csv")
    return (
        several_fits(world, folder),
        fit_with_an_untrained_head(world, folder),
        every_number(world, folder),
        metrics,
    )


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory):
    """The folder, and what each rank returned."""
    folder = tmp_path_factory.mktemp("ranks")
    write_corpus(folder, 10)
    return folder, run_ranks(everything_on_two_ranks, 2, folder, str(folder))


def test_two_ranks_train_as_one_does_whatever_the_number_of_utterances(on_two_ranks, tmp_path):
    folder, ((first, *_), (second, *_)) = on_two_ranks
    for count, weights in first.items():
        assert all(torch.equal(weights[name], second[count][name]) for name in weights), f"{count}: ranks differ"
        alone = fit_on_ranks(None, folder, count, run=tmp_path / f"run{count}")
        for name, value in alone.items():
            assert (value - weights[name]).norm() <= 2e-3 * value.norm() + 1e-4, (count, name)


def test_two_ranks_train_and_evaluate_any_number_of_utterances_from_1_to_40(on_two_ranks):
    _, (first, second) = on_two_ranks
    assert first[2] == second[2] == [(math.ceil(count / 8), count) for count in range(1, 41)]


def test_two_ranks_train_with_a_head_at_weight_0(on_two_ranks):
    _, ((_, first, *_), (_, second, *_)) = on_two_ranks
    assert first[0] and second[0]
    assert torch.equal(first[1], second[1])


def test_two_ranks_that_resume_in_the_middle_end_bit_identically(on_two_ranks):
    whole, again = on_two_ranks[0] / "two/run", on_two_ranks[0] / "again"
    assert len(checkpoints(again)) == 6
    assert_identical(checkpoints(again)[-1], checkpoints(whole)[-1])
    assert_same_log(again, whole)


def test_a_run_that_is_resumed_on_more_ranks_goes_on_with_the_same_utterances(on_two_ranks):
    """Each update's loss is that of its utterances, and no two updates' are alike."""
    whole, wider = (log(on_two_ranks[0] / name, "train") for name in ("one/run", "wider"))
    assert [entry["step"] for entry in wider] == list(range(1, 10))
    losses = [entry["loss_ctc"] for entry in whole]
    assert [entry["loss_ctc"] for entry in wider] == pytest.approx(losses, rel=1e-4)
    assert min(abs(a - b) for i, a in enumerate(losses) for b in losses[:i]) > 1e-3 * max(losses)
    one, two = (state(checkpoints(on_two_ranks[0] / name)[-1]) for name in ("one/run", "wider"))
    for name, value in one.items():
        assert (value - two[name]).norm() <= 2e-3 * value.norm() + 1e-4, name


@pytest.mark.parametrize(
    ("changes", "world", "expected"),
    [
        ({"effective_batch": 8, "micro_batch": 2}, 2, 8),
        ({"effective_batch": 0, "micro_batch": 2, "accumulate": 3}, 2, 12),
        ({"effective_batch": 0}, 1, 8),
        ({"effective_batch": 0, "batch_seconds": 60.0}, 2, None),
    ],
)
def test_the_effective_batch_follows_from_what_is_given(changes, world, expected):
    assert quick(**({"micro_batch": 1} | changes)).resolved_effective_batch(world) == expected


@pytest.mark.parametrize(
    ("changes", "limits"),
    [
        ({}, (None, 640_000)),
        ({"micro_seconds": 0.0}, (None, None)),
        ({"micro_batch": 4}, (4, None)),
        ({"accumulate": 4}, (1, None)),
        ({"batch_seconds": 120.0}, (None, 640_000)),
        ({"batch_seconds": 120.0, "accumulate": 3}, (None, 320_000)),  # of two ranks
    ],
)
def test_a_forward_pass_is_bounded_by_seconds_unless_utterances_are_counted(changes, limits):
    found = TrainConfig(**changes).micro_limits(2)
    assert (found["micro_batch"], found["micro_samples"]) == limits


@pytest.mark.parametrize(
    ("changes", "world"),
    [
        ({"effective_batch": 8, "micro_batch": 3}, 1),
        ({"effective_batch": 8, "micro_batch": 1}, 3),
        ({"effective_batch": 8, "micro_batch": 2, "accumulate": 3}, 2),
    ],
)
def test_an_indivisible_effective_batch_is_an_error(changes, world):
    with pytest.raises(ConfigError, match="effective_batch 8"):
        quick(**changes).resolved_effective_batch(world)


@pytest.mark.parametrize(
    "changes",
    [
        {"epochs": 0},
        {"rate": -1.0},
        {"rate": math.nan},
        {"warmup": 1.5},
        {"freeze": "encodr"},
        {"heads": "emotion,asr"},
        {"eval_every": "sometimes"},
        {"batch_seconds": 10.0, "effective_batch": 8},
        {"adam_beta2": 1.0},
        {"max_bad_audio": 1.01},
        {"keep": 0},
        {"schedule": "linaer"},
        {"augment": ("noize",)},
    ],
)
def test_settings_out_of_range_are_refused_by_name(changes):
    with pytest.raises(ConfigError, match=next(iter(changes))):
        quick(**changes)


def flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    add_training_arguments(parser)
    return parser


def test_the_help_has_the_common_settings_first_and_leaves_the_old_geometry_out():
    shown = flags().format_help()
    places = [shown.index(group) for group in GROUPS]
    assert places == sorted(places) and places[0] < shown.index("  --epochs") < places[1]
    assert "--micro-seconds" in shown and "--effective-batch" in shown
    assert "--micro-batch" not in shown and "--accumulate" not in shown
    parsed = training_config(flags().parse_args(["--micro-batch", "2", "--accumulate", "3"]))
    assert parsed.resolved_effective_batch(2) == 12 and parsed.micro_limits(2)["micro_batch"] == 2


def test_flags_and_settings_have_the_same_defaults():
    assert training_config(flags().parse_args([])) == TrainConfig()


def test_the_flag_of_augmentations_takes_several_names(monkeypatch):
    for name in ("noise", "echo"):
        monkeypatch.setitem(AUGMENTATIONS, name, louder)
    assert training_config(flags().parse_args(["--augment", "noise", "echo"])).augment == ("noise", "echo")


def constant(step: int, total: int, warmup: float) -> float:
    return 0.5


def test_a_schedule_is_a_row_of_a_table(tmp_path, monkeypatch):
    monkeypatch.setitem(SCHEDULES, "constant", constant)
    fit(toy_recognizer(), toy_rows(tmp_path, 8), [], quick(schedule="constant", epochs=2), tmp_path / "run")
    assert {entry["rate"] for entry in log(tmp_path / "run", "train")} == {0.5 * QUICK.rate}


def louder(waveform, generator):
    return waveform + 0.5 * float(generator.random()) * waveform.roll(80)


def test_a_run_with_augmentations_learns_other_waveforms_and_is_resumed_exactly(tmp_path, monkeypatch):
    monkeypatch.setitem(AUGMENTATIONS, "louder", louder)
    rows = toy_rows(tmp_path, 8)
    for name, changes in {"plain": {}, "changed": {"augment": ("louder",)}}.items():
        fit(toy_recognizer(), rows, rows, quick(epochs=2, **changes), tmp_path / name / "run")
    plain, changed = (state(checkpoints(tmp_path / name / "run")[-1]) for name in ("plain", "changed"))
    assert not torch.equal(plain["cls_head.weight"], changed["cls_head.weight"])
    resume_from(tmp_path / "changed", 1, rows, rows, tmp_path / "again", epochs=2, augment=("louder",))
    assert_identical(checkpoints(tmp_path / "again")[-1], checkpoints(tmp_path / "changed/run")[-1])
    with pytest.raises(ConfigError, match=r"no augmentation is called 'lauder'.*did you mean 'louder'"):
        quick(augment=("lauder",))


def test_augmentations_and_a_cache_are_refused_together(monkeypatch):
    monkeypatch.setitem(AUGMENTATIONS, "louder", louder)
    with pytest.raises(ConfigError, match="cache keeps what is made of each recording once"):
        quick(augment=("louder",), cache="folder")


def test_a_run_of_a_release_without_some_settings_is_resumed_with_their_defaults(
    uninterrupted, tmp_path, monkeypatch
):
    monkeypatch.setitem(AUGMENTATIONS, "louder", louder)
    folder, train, valid = uninterrupted
    copy_run(folder, 4, tmp_path / "run")
    (checkpoint,) = checkpoints(tmp_path / "run")
    settings = json.loads((checkpoint / "settings.json").read_text())
    for name in ("schedule", "augment", "micro_seconds"):
        del settings[name]
    (checkpoint / "settings.json").write_text(json.dumps(settings))
    run = json.loads((checkpoint / "manifest.json").read_text())["run"]
    (checkpoint / "manifest.json").unlink()
    seal_checkpoint(checkpoint, run)
    with pytest.raises(RunFolderError, match=r"augment: \[\] then, \['louder'\] now"):
        fit(toy_recognizer(), train, valid, quick(augment=("louder",)), tmp_path / "run")
    assert fit(toy_recognizer(seed=9), train, valid, QUICK, tmp_path / "run").resumed
    assert_identical(checkpoints(tmp_path / "run")[-1], checkpoints(folder / "run")[-1])


def test_a_metric_that_cannot_be_measured_is_refused(tmp_path):
    rows = toy_rows(tmp_path, 4)
    with pytest.raises(ConfigError, match="possible: wer, cer, loss"):
        fit(toy_recognizer(heads=("ctc",)), rows, rows, quick(metric="accuracy"), tmp_path / "run")


def test_a_head_at_weight_0_is_not_trained(tmp_path):
    recognizer = toy_recognizer()
    before = recognizer.model.lm_head.weight.clone()
    fit(recognizer, toy_rows(tmp_path, 4), [], quick(epochs=1, alpha=0.0, weight_decay=0.5), tmp_path / "run")
    assert torch.equal(before, recognizer.model.lm_head.weight)


def test_batches_by_padded_seconds_train_every_utterance(tmp_path):
    rows = toy_rows(tmp_path, 10)
    config = quick(effective_batch=0, batch_seconds=1.2, epochs=2, save_every="2ep", log_every=1)
    result = fit(toy_recognizer(), rows, [], config, tmp_path / "run")
    assert result.progress.finished and result.progress.epoch == 2
    assert 8 <= result.progress.step <= 14


def test_validation_without_any_usable_label_is_refused(tmp_path):
    rows = toy_rows(tmp_path, 4)
    nothing = {"emotion": None, "text": "[LAUGHTER]", "speaker": "nobody", "arousal": None, "valence": None}
    unlabelled = [replace(row, **nothing) for row in rows]
    with pytest.raises(ConfigError, match="no label for any head"):
        fit(toy_recognizer(), rows, unlabelled, quick(epochs=1), tmp_path / "run")


def test_all_recordings_that_cannot_be_used_are_listed_before_training(tmp_path):
    rows, valid = toy_rows(tmp_path, 6), toy_rows(tmp_path, 4, name="valid")
    for row in (*rows[1:3], valid[2]):
        row.file.write_bytes(b"not audio")
    with pytest.raises(SerError, match="2 of 6") as caught:
        fit(toy_recognizer(), rows, [], QUICK, tmp_path / "run")
    assert "train1.wav" in str(caught.value) and "train2.wav" in str(caught.value)
    with pytest.raises(SerError, match=r"valid2\.wav"):
        fit(toy_recognizer(), [rows[0]], valid, QUICK, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_over_other_data_is_refused(tmp_path):
    rows = toy_rows(tmp_path, 6)
    fit(toy_recognizer(), rows, [], quick(epochs=1), tmp_path / "run")
    with pytest.raises(RunFolderError, match=r"data\.train: "):
        fit(toy_recognizer(), [replace(rows[0], emotion="sad"), *rows[1:]], [], quick(epochs=1), tmp_path / "run")


def test_a_run_that_stopped_before_its_first_checkpoint_starts_again(uninterrupted, tmp_path):
    folder, train, valid = uninterrupted
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    shutil.copy(folder / "run/config.json", run)
    (run / "metrics.jsonl").write_text('{"kind": "train", "step": 2}\n{"kind": "tra')  # and cut short
    result = fit(toy_recognizer(), train, valid, QUICK, run)
    assert not result.resumed
    assert_identical(checkpoints(run)[-1], checkpoints(folder / "run")[-1])
    assert len(log(run, "train")) == len(log(folder / "run", "train"))


def test_evaluation_of_a_model_whose_blank_is_not_0_works(tmp_path):
    recognizer = toy_recognizer()
    tokens = recognizer.vocabulary.tokens
    shuffled = Vocabulary({token: len(tokens) - 1 - i for i, token in enumerate(tokens)})
    recognizer.labels = replace(recognizer.labels, vocabulary=shuffled)
    found = evaluate(recognizer, toy_rows(tmp_path, 4)).metrics()
    assert math.isfinite(found["loss_ctc"]) and found["words"] > 0


def test_characters_that_the_vocabulary_cannot_write_are_counted_in_evaluation(tmp_path):
    rows = [replace(row, text="AB ?!") for row in toy_rows(tmp_path, 4)]
    assert evaluate(toy_recognizer(), rows).metrics()["characters_outside_vocabulary"] == 8

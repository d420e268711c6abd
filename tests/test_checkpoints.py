"""Checkpoints under real faults: kills, full disks, damage, rotation (N4, N7; FAULTS A2, B1, B4, B5, B7, B8)."""

import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from soak.checkpoints import live
from toy import toy_recognizer, toy_rows

from ser import files
from ser.data.text import Vocabulary
from ser.errors import ConfigError, FileError, ModelFolderError, RunFolderError
from ser.train import checkpoint as checkpoint_module
from ser.train import runs
from ser.train.checkpoint import (
    Progress,
    Run,
    Saver,
    checkpoints,
    newest_verified,
    optimizer_tensors,
    save_checkpoint,
    set_aside_after,
    verify_checkpoint,
)
from ser.train.config import TrainConfig
from ser.train.loop import fit
from ser.train.processes import launch
from ser.train.runs import describe, open_run, opened_before

SETTINGS = {"epochs": 3, "rate": 0.1}


@pytest.fixture(scope="module")
def recognizer():
    return toy_recognizer(heads=("emotion",), num_hidden_layers=1)


def save(run: Run, recognizer, step: int, *, keep: int = 100, best_step: int = 0) -> Path:
    weights = recognizer.model.state_dict()
    optimizer = {f"exp_avg/{name}": torch.full_like(value, step) for name, value in weights.items()}
    progress = Progress(step=step, best_step=best_step)
    return save_checkpoint(run, recognizer, weights, optimizer, progress, keep=keep)


@pytest.fixture(scope="module")
def saved(recognizer, tmp_path_factory):
    """A run's folder with two checkpoints."""
    run = open_run(tmp_path_factory.mktemp("saved") / "run", SETTINGS).run
    for step in (1, 2):
        save(run, recognizer, step)
    return run


def copy_of(saved: Run, folder: Path) -> Run:
    shutil.copytree(saved.folder, folder)
    return Run(folder, saved.id, saved.settings)


def hidden(run: Run) -> list[str]:
    return [p.name for p in run.folder.rglob(".*")]


# ----------------------------------------------------------------------------------- kills inside a save


def forked(work, *arguments) -> int:
    """Run ``work`` in a child process; returns its exit status, negative for a signal."""
    child = os.fork()
    if not child:
        status = 1
        try:
            work(*arguments)
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def watched(work, folder: Path, note) -> None:
    """Call ``note(operation, path)`` before each operation of ``work`` that changes ``folder`` or waits for it."""
    folder = folder.resolve()

    def hook(event, details):
        if event == "open" and isinstance(details[0], str) and details[2] & (os.O_WRONLY | os.O_RDWR):
            name, path = "open", details[0]
        elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod"):
            name, path = event.removeprefix("os."), details[0]
        else:
            return
        if isinstance(path, str) and not path.startswith("/"):  # rmtree works relative to a folder's handle
            note(name, path)
        elif Path(path).is_relative_to(folder):
            note(name, str(Path(path).relative_to(folder)))

    fsync, save_file = os.fsync, files.save_file

    def noted_fsync(handle):
        path = Path(f"/proc/self/fd/{handle}").readlink()
        note("fsync", str(path.relative_to(folder)))
        fsync(handle)

    def noted_save_file(tensors, path, **options):
        note("write", str(Path(path).resolve().relative_to(folder)))
        save_file(tensors, path, **options)
        size = path.stat().st_size
        os.truncate(path, size // 2)  # the next one finds half a file
        note("half", str(Path(path).resolve().relative_to(folder)))
        save_file(tensors, path, **options)

    os.fsync, files.save_file = noted_fsync, noted_save_file
    sys.addaudithook(hook)
    work()


@pytest.fixture(scope="module")
def operations(saved, recognizer, tmp_path_factory) -> list[list[str]]:
    """All that one save with rotation does to the disk, in its order; hidden names without their process."""
    folder = tmp_path_factory.mktemp("watched")
    run = copy_of(saved, folder / "run")
    seen: list[list[str]] = []

    def note(name, path):
        seen.append([name, re.sub(r"\.\d+-[0-9a-f]{8}\.", ".", path)])

    def work():
        watched(lambda: save(run, recognizer, 3, keep=1), run.folder, note)
        (folder / "seen.json").write_text(json.dumps(seen))

    assert forked(work) == 0
    return json.loads((folder / "seen.json").read_text())


def test_every_file_is_on_the_disk_before_the_manifest_and_the_manifest_before_the_rename(operations):
    new = "checkpoints/.step-00000003.new"
    opened = [path for name, path in operations if name == "open" and path.startswith(new)]
    written = {path for path in opened if not path.endswith(".tmp")}
    written |= {
        path.rpartition(".step-00000003.new/.")[2].removesuffix(".tmp") for path in opened if ".tmp" in path
    }
    names = {Path(path).name for path in written}
    assert {"model.safetensors", "optimizer.safetensors", "state.json", "settings.json", "manifest.json"} <= names

    def at(name: str, path: str) -> int:
        return max(i for i, operation in enumerate(operations) if operation == [name, path])

    manifest = next(i for i, (name, path) in enumerate(operations) if name == "open" and "manifest" in path)
    for name in names - {"manifest.json"}:
        assert at("fsync", f"{new}/{name}") < manifest, f"{name} is not on the disk when the manifest is written"
    sealed = max(i for i, (name, path) in enumerate(operations) if name == "fsync" and "manifest" in path)
    assert manifest < sealed < at("fsync", new) < at("rename", new) < at("fsync", "checkpoints")
    removed = [i for i, (_, path) in enumerate(operations) if "step-00000001" in path or "step-00000002" in path]
    assert min(removed) > at("fsync", "checkpoints"), "what is old goes only when the new one is on the disk"


def test_a_kill_at_any_operation_of_a_save_loses_nothing_and_the_next_save_cleans_up(
    saved, recognizer, operations, tmp_path
):
    found = set()
    for number in range(len(operations)):
        run = copy_of(saved, tmp_path / f"run{number}")
        count = 0

        def kill_here(name, path, number=number):
            nonlocal count
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

        status = forked(watched, lambda run=run: save(run, recognizer, 3, keep=1), run.folder, kill_here)
        assert status == -signal.SIGKILL, (number, operations[number])
        newest, skipped = newest_verified(run.folder)
        assert newest in (run.path(2), run.path(3)) and not skipped, (number, operations[number], skipped)
        found.add(newest.name)
        save(run, recognizer, 4, keep=1)
        assert checkpoints(run.folder) == [run.path(4)] and not hidden(run), (number, operations[number])
        shutil.rmtree(run.folder)
    assert len(found) == 2 and len(operations) > 50


# ------------------------------------------------------------------------------------------------ damage


def test_a_file_cut_anywhere_is_named_and_the_checkpoint_before_is_used(saved, tmp_path):
    run = copy_of(saved, tmp_path / "run")
    draw = random.Random(0)
    for path in sorted(run.path(2).iterdir()):
        whole = path.read_bytes()
        cuts = {0, 1, len(whole) - 1} | {draw.randrange(len(whole)) for _ in range(8)}
        for cut in sorted(cuts)[:8]:
            path.write_bytes(whole[:cut])
            newest, (reason,) = newest_verified(run.folder)
            assert newest == run.path(1) and reason.startswith(f"{path}: "), (path.name, cut, reason)
        path.unlink()
        assert newest_verified(run.folder)[1][0].startswith(f"{path}: is missing")
        path.write_bytes(whole)
    assert newest_verified(run.folder) == (run.path(2), [])


def test_a_flipped_bit_anywhere_is_found_named_and_the_checkpoint_before_is_used(saved, tmp_path):
    run = copy_of(saved, tmp_path / "run")
    draw = random.Random(1)
    paths = sorted(run.path(2).iterdir())
    for number in range(200):
        path = paths[number % len(paths)]
        whole = path.read_bytes()
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        newest, (reason,) = newest_verified(run.folder)
        assert newest == run.path(1) and reason.startswith(f"{path}: "), (path.name, reason)
        path.write_bytes(whole)


def test_a_flipped_bit_in_any_byte_of_a_manifest_is_found(saved, tmp_path):
    run = copy_of(saved, tmp_path / "run")
    path = run.path(2) / "manifest.json"
    whole = path.read_bytes()
    for byte in range(len(whole)):
        damaged = bytearray(whole)
        damaged[byte] ^= 1 << byte % 8
        path.write_bytes(damaged)
        with pytest.raises(RunFolderError):
            checkpoint_module.own_manifest(run.path(2))


def test_a_named_checkpoint_that_is_damaged_is_an_error_with_its_reason(saved, tmp_path):
    run = copy_of(saved, tmp_path / "run")
    path = run.path(2) / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    for name in ("step-00000002", run.path(2)):
        with pytest.raises(RunFolderError, match=r"step-00000002/optimizer\.safetensors: has 100 bytes; "):
            open_run(run.folder, SETTINGS, resume_from=name)
    for name in ("step-00000007", "2", run.folder):
        with pytest.raises(RunFolderError, match=r"is no checkpoint of .* has step-00000001, step-00000002"):
            open_run(run.folder, SETTINGS, resume_from=name)
    assert [p.name for p in checkpoints(run.folder)] == ["step-00000001", "step-00000002"]


def test_going_back_sets_later_checkpoints_aside_and_skipped_ones_too(saved, recognizer, tmp_path):
    run = copy_of(saved, tmp_path / "run")
    save(run, recognizer, 3)
    opened = open_run(run.folder, SETTINGS, resume_from="step-00000002")
    assert opened.checkpoint == run.path(2)
    (run.path(2) / "state.json").write_text("{}")
    opened = open_run(run.folder, SETTINGS)
    assert opened.checkpoint == run.path(1) and opened.run.id == run.id
    skipped, aside = opened.notes
    assert skipped.startswith("skipped a damaged checkpoint: ") and "state.json: has 2 bytes" in skipped
    assert aside.endswith("step-00000002 is set aside as aside-step-00000002")
    names = {p.name for p in (run.folder / "checkpoints").iterdir()}
    assert names == {"step-00000001", "aside-step-00000002", "aside-step-00000003"}
    verify_checkpoint(run.folder / "checkpoints/aside-step-00000003")


def test_a_run_of_which_no_checkpoint_is_sound_is_refused_with_every_reason(saved, tmp_path):
    run = copy_of(saved, tmp_path / "run")
    for step in (1, 2):
        (run.path(step) / "model.safetensors").unlink()
    with pytest.raises(RunFolderError, match="none of its 2 checkpoints is sound") as caught:
        open_run(run.folder, SETTINGS)
    assert str(caught.value).count("model.safetensors: is missing") == 2
    assert len(checkpoints(run.folder)) == 2


def test_resuming_reads_no_file_that_the_manifest_leads_out_to(saved, tmp_path):
    run = copy_of(saved, tmp_path / "run")
    (run.folder / "secret").write_text("x")
    entry = {"bytes": 1, "sha256": checkpoint_module.digest(run.folder / "secret")}
    text = checkpoint_module.sealed({"run": run.id, "files": {"../../secret": entry}})
    (run.path(2) / "manifest.json").write_text(text)
    assert newest_verified(run.folder)[0] == run.path(1)


# ---------------------------------------------------------------------------------------------- rotation


def test_rotation_keeps_the_newest_the_best_and_others_in_500_random_lives_of_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # nothing here loses power
    for seed in range(500):
        live(tmp_path / "run", seed)
        shutil.rmtree(tmp_path / "run")


def test_rotation_never_removes_what_was_just_written(saved, recognizer, tmp_path):
    run = copy_of(saved, tmp_path / "run")
    save(run, recognizer, 7)
    written = save(run, recognizer, 3, keep=1)
    assert checkpoints(run.folder) == [written, run.path(7)]


def test_rotation_leaves_another_runs_checkpoints_and_damaged_manifests_alone(saved, recognizer, tmp_path):
    run = copy_of(saved, tmp_path / "run")
    other = Run(run.folder, settings={"epochs": 9})
    save(other, recognizer, 3)
    (run.path(1) / "manifest.json").write_text("{}")
    save(run, recognizer, 4, keep=1)
    assert [p.name[-1] for p in checkpoints(run.folder)] == ["1", "3", "4"]


# -------------------------------------------------------------------------------------------- other runs


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({"hidden_size": 32}, ["model.encoder.hidden_size: 16 then, 32 now"]),
        ({"speakers": 4}, ["model.heads.num_speakers: 3 then, 4 now", "model.speakers: "]),
        (
            {"hidden_dropout": 0.3, "layerdrop": 0.0},
            ["model.encoder.hidden_dropout: ", "model.encoder.layerdrop: "],
        ),
    ],
)
def test_a_checkpoint_of_another_configuration_is_refused_with_the_differing_keys(tmp_path, changes, keys):
    before = toy_recognizer()
    run = open_run(tmp_path / "run", SETTINGS | {"model": describe(before)}).run
    save(run, before, 1)
    with pytest.raises(RunFolderError) as caught:
        open_run(run.folder, SETTINGS | {"model": describe(toy_recognizer(**changes))})
    assert all(key in str(caught.value) for key in keys), caught.value
    assert str(caught.value).count(" then, ") == len(keys)
    open_run(run.folder, SETTINGS | {"model": describe(before), "world_size": 4, "micro_batch": 2})


@pytest.mark.parametrize("part", ["emotions", "vocabulary"])
def test_a_checkpoint_with_other_labels_or_symbols_of_equal_number_is_refused(tmp_path, part):
    model = toy_recognizer()
    run = open_run(tmp_path / "run", SETTINGS | {"model": describe(model)}).run
    save(run, model, 1)
    if part == "emotions":
        changes = {"names": {**model.labels.names, "emotion": model.emotions[::-1]}}
    else:
        tokens = model.vocabulary.tokens
        changes = {"vocabulary": Vocabulary({token: len(tokens) - 1 - i for i, token in enumerate(tokens)})}
    model.labels = replace(model.labels, **changes)
    with pytest.raises(RunFolderError, match=r"model\.(emotions|symbols): \["):
        open_run(run.folder, SETTINGS | {"model": describe(model)})


def test_changes_are_allowed_when_asked_for_by_name_and_said(saved, tmp_path):
    run = copy_of(saved, tmp_path / "run")
    now = {"epochs": 5, "rate": 0.2}
    for allowed in ([], ["epochs"]):
        with pytest.raises(RunFolderError, match=r"--allow-changes .*rate if that is meant") as caught:
            open_run(run.folder, now, allow_changes=allowed)
        assert ("epochs: 3 then, 5 now" in str(caught.value)) == (not allowed)
    opened = open_run(run.folder, now, allow_changes=["epochs", "rate"])
    assert opened.changed and opened.checkpoint == run.path(2)
    assert opened.notes == (
        "changed on purpose: epochs: 3 then, 5 now",
        "changed on purpose: rate: 0.1 then, 0.2 now",
    )
    assert json.loads((run.folder / "config.json").read_text()) == now
    with pytest.raises(ConfigError, match=r"'epoch' \(did you mean 'epochs'\?\)"):
        open_run(run.folder, now, allow_changes=["epoch"])
    with pytest.raises(ConfigError, match="'seed'"):
        open_run(run.folder, now | {"seed": 1}, allow_changes=["seed"])


def test_overwrite_and_resume_from_exclude_each_other_before_anything_is_removed(saved, tmp_path):
    run = copy_of(saved, tmp_path / "run")
    with pytest.raises(ConfigError, match="not both"):
        open_run(run.folder, SETTINGS, overwrite=True, resume_from="step-00000001")
    assert len(checkpoints(run.folder)) == 2


@pytest.mark.parametrize("left", ["nothing", "half a config.json", "half a checkpoint", "half a best model"])
def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(saved, tmp_path, left):
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    if left == "half a config.json":
        (folder / ".config.json.123.tmp").write_text('{"ep')
    elif left != "nothing":
        files.write_json(folder / "config.json", SETTINGS)
        half = folder / ("checkpoints/.step-00000001.new" if left == "half a checkpoint" else ".best.new")
        half.mkdir()
        (half / "state.json").write_text("{")
    opened = open_run(folder, SETTINGS)
    assert opened.checkpoint is None and not hidden(opened.run)


# ---------------------------------------------------------------------------------------- full disks

CONFIG = TrainConfig(epochs=3, effective_batch=4, micro_batch=2, rate=1e-3, log_every=1, keep=1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of three updates."""
    folder = tmp_path_factory.mktemp("trained")
    rows = toy_rows(folder, 4)
    fit(toy_recognizer(), rows, [], CONFIG, folder / "run")
    return folder / "run", rows


def train_on_a_full_disk(run: Path, rows, limit: int | None) -> None:
    """As a process of its own does; what ended it goes beside the run's folder."""
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        fit(toy_recognizer(), rows, [], CONFIG, run)
    except FileError as error:
        run.parent.parent.joinpath("error").write_text(str(error))


@pytest.mark.parametrize("how", ["a file size limit", "a full file system"])
def test_a_full_disk_ends_training_with_one_error_and_loses_nothing(trained, tmp_path, how):
    whole, rows = trained
    disk = tmp_path / "disk"
    disk.mkdir()
    run, limit = disk / "run", None
    size = sum(p.stat().st_size for p in (whole / "checkpoints/step-00000003").iterdir())
    if how == "a file size limit":
        limit = 80_000  # the weights fit, the optimizer does not
        save_one_epoch(run, rows)
    else:
        room = 2 * size - 60_000
        mount = ["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", str(disk)]
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("file systems cannot be mounted here")
    try:
        if how == "a full file system":
            save_one_epoch(run, rows)
        assert forked(train_on_a_full_disk, run, rows, limit) == 0
        message = (tmp_path / "error").read_text()
        cause = "File too large" if limit else "No space left on device"
        assert message.startswith(f"{run}/checkpoints/step-0000000") and cause in message, message
        assert " bytes needed, " in message and " free)" in message
        needed = int(message.partition("(")[2].partition(" bytes")[0].replace(",", ""))
        assert 0.5 * size < needed <= size
        newest, skipped = newest_verified(run)
        assert newest is not None and not skipped
        assert not list(run.rglob(".*")), "nothing half-written is left"
        if how == "a full file system":
            subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        result = fit(toy_recognizer(), rows, [], CONFIG, run)
        assert result.resumed and result.progress.finished
        for name in ("model", "optimizer"):
            file = f"checkpoints/step-00000003/{name}.safetensors"
            assert (run / file).read_bytes() == (whole / file).read_bytes()
    finally:
        if how == "a full file system":
            subprocess.run(["umount", str(disk)], check=True)


def test_a_save_that_failed_ends_training_before_the_next_one(trained, tmp_path):
    whole, rows = trained
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "checkpoints/step-00000020").write_text("a file is in the way")
    settings = replace(CONFIG, epochs=60, save_every="20")
    with pytest.raises(FileError, match="step-00000020: cannot be written: Not a directory"):
        fit(toy_recognizer(), rows, [], settings, run, allow_changes=["epochs"])
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert 20 <= steps[-1] < 40


def save_one_epoch(run: Path, rows) -> None:
    """The folder of a run that was killed after its first epoch."""

    class Stopped(Exception):
        pass

    first = Saver.checkpoint

    def then_stop(self, *arguments, **options):
        first(self, *arguments, **options)
        raise Stopped

    Saver.checkpoint = then_stop
    try:
        with pytest.raises(Stopped):
            fit(toy_recognizer(), rows, [], CONFIG, run)
    finally:
        Saver.checkpoint = first
    assert [p.name for p in checkpoints(run)] == ["step-00000001"]


# ------------------------------------------------------------------------------------- in the background


@pytest.fixture
def slow_disk(monkeypatch):
    """Writing tensors waits until ``release`` is set."""
    release = threading.Event()
    write = checkpoint_module.write_tensors

    def slow(path, tensors):
        assert release.wait(30)
        write(path, tensors)

    monkeypatch.setattr(checkpoint_module, "write_tensors", slow)
    return release


def a_run(tmp_path):
    model = toy_recognizer()
    optimizer = torch.optim.AdamW(model.model.parameters(), lr=0.1)
    for parameter in model.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return open_run(tmp_path / "run", SETTINGS).run, model, optimizer


def test_what_is_saved_in_the_background_is_of_the_moment_of_the_call(tmp_path, slow_disk):
    run, model, optimizer = a_run(tmp_path)
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    state = {name: value.clone() for name, value in optimizer_tensors(model.model, optimizer).items()}
    progress = Progress(step=1, scaler={"scale": 2.0})
    with Saver() as saver:
        saver.checkpoint(run, model, optimizer, progress, keep=2)
        optimizer.step()
        progress.step, progress.scaler["scale"] = 2, 4.0
        slow_disk.set()
    again = toy_recognizer(seed=3)
    fresh = torch.optim.AdamW(again.model.parameters(), lr=0.1)
    found = checkpoint_module.load_checkpoint(run.path(1), again, fresh)
    assert found == Progress(step=1, scaler={"scale": 2.0})
    assert all(torch.equal(before[name], value) for name, value in again.model.state_dict().items())
    loaded = optimizer_tensors(again.model, fresh)
    assert loaded.keys() == state.keys() and all(torch.equal(state[name], value) for name, value in loaded.items())


def test_training_goes_on_while_a_save_is_written_and_the_next_save_waits_for_it(tmp_path, slow_disk):
    run, model, optimizer = a_run(tmp_path)
    with Saver() as saver:
        saver.checkpoint(run, model, optimizer, Progress(step=1), keep=2)
        assert not checkpoints(run.folder), "the call came back before anything was there"
        threading.Timer(0.2, slow_disk.set).start()
        saver.checkpoint(run, model, optimizer, Progress(step=2), keep=2)
        assert run.path(1).is_dir(), "the second save began before the first was whole"
        saver.wait()
        assert newest_verified(run.folder) == (run.path(2), [])
        seconds = saver.seconds()
    assert seconds["save_stopped_seconds"] > 0.15 and seconds["save_written_seconds"] > 0.15
    assert saver.seconds() == {}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_pending_save_is_finished_on_the_way_out_of_an_error(tmp_path, slow_disk, error):
    run, model, optimizer = a_run(tmp_path)
    threading.Timer(0.1, slow_disk.set).start()
    with pytest.raises(error), Saver() as saver:
        saver.checkpoint(run, model, optimizer, Progress(step=1), keep=2)
        raise error
    assert newest_verified(run.folder) == (run.path(1), [])


def test_an_error_of_the_thread_ends_training_and_what_follows_it_is_not_written(tmp_path, monkeypatch):
    run, model, optimizer = a_run(tmp_path)
    (run.folder / "best").write_text("a file is in the way")
    with pytest.raises(ModelFolderError, match="best: exists and is not a model folder"), Saver() as saver:
        saver.model(run.folder / "best", model, step=1)
        saver.checkpoint(run, model, optimizer, Progress(step=1, best_step=1), keep=2)
    assert not checkpoints(run.folder), "a checkpoint that speaks of a best model that is not there"
    (run.folder / "best").unlink()

    monkeypatch.setattr("ser.folder.write_tensors", lambda *_: files.sync(tmp_path / "nowhere"))
    with Saver() as saver:
        saver.model(run.folder / "best", model, step=1)
        with pytest.raises(FileError):
            for _ in range(1000):
                saver.check()  # as after every update: without waiting
                threading.Event().wait(0.01)
    with pytest.raises(ValueError, match="original") as caught, Saver() as saver:
        saver.model(run.folder / "best", model, step=1)
        raise ValueError("original")
    assert "best: cannot be written" in caught.value.__notes__[0]


# ------------------------------------------------------------------------- what was gone back behind; rotation


def test_going_back_again_keeps_what_was_set_aside_before(saved, recognizer, tmp_path):
    run = copy_of(saved, tmp_path / "run")
    first = (run.path(2) / "manifest.json").read_bytes()
    for number in range(3):
        (told,) = set_aside_after(run.folder, 1)
        assert told.endswith(f"is set aside as aside-step-00000002{['', '-2', '-3'][number]}")
        save(run, recognizer, 2, best_step=number)  # other bytes each time
    asides = sorted((run.folder / "checkpoints").glob("aside-*"))
    assert [p.name.removeprefix("aside-step-00000002") for p in asides] == ["", "-2", "-3"]
    assert (asides[0] / "manifest.json").read_bytes() == first
    assert len({(p / "state.json").read_text() for p in asides}) == 2 and all(verify_checkpoint(p) for p in asides)
    assert checkpoints(run.folder) == [run.path(1), run.path(2)], "and none of them is one of the run's"
    save(run, recognizer, 9, keep=1)
    assert sorted((run.folder / "checkpoints").glob("aside-*")) == asides, "nor does rotation remove them"
    (run.folder / "checkpoints/aside-step-00000009").symlink_to("nowhere")  # as a person may leave
    assert set_aside_after(run.folder, 8)[0].endswith("aside-step-00000009-2")


def test_an_old_checkpoint_that_cannot_be_removed_is_said_once_and_training_goes_on(
    saved, recognizer, tmp_path, monkeypatch, capsys
):
    run = copy_of(saved, tmp_path / "run")
    real = checkpoint_module.remove_folder

    def stuck(folder):
        if folder == run.path(1):
            raise PermissionError(13, "Permission denied")
        real(folder)

    monkeypatch.setattr(checkpoint_module, "remove_folder", stuck)
    for step in (3, 4):
        save(run, recognizer, step, keep=1)
    assert checkpoints(run.folder) == [run.path(1), run.path(4)]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{run.path(1)}: an old checkpoint that cannot be removed: Permission denied")


# --------------------------------------------------------------- last/ is there when a run is finished, only then


@pytest.fixture
def finished(trained, tmp_path):
    """The run of three updates, and its rows."""
    whole, rows = trained
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run", rows


def fit_until_opened(run: Path, rows, monkeypatch, config=CONFIG, **options) -> None:
    """What a run does that is killed at the first moment of its training."""

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("ser.train.setup.load_checkpoint", killed)
        fit(toy_recognizer(), rows, [], config, run, **options)


@pytest.mark.parametrize(
    "options",
    [{"config": replace(CONFIG, epochs=5), "allow_changes": ["epochs"]}, {"resume_from": "step-00000002"}],
)
def test_last_is_set_aside_as_soon_as_a_finished_run_goes_on_and_is_there_again_at_its_end(
    finished, monkeypatch, options
):
    run, rows = finished
    fit(toy_recognizer(), rows, [], replace(CONFIG, keep=9), run, overwrite=True)
    before = (run / "last/model.safetensors").read_bytes()
    fit_until_opened(run, rows, monkeypatch, **options)
    assert not (run / "last").exists()
    assert (run / "aside-last/model.safetensors").read_bytes() == before, "nothing is lost"
    config = options.pop("config", CONFIG)
    fit(toy_recognizer(), rows, [], config, run, **options)
    assert (run / "last/model.safetensors").is_file() and not (run / "aside-last-2").exists()


def test_last_stays_where_changed_settings_leave_a_run_finished_and_where_nothing_changed(finished):
    run, rows = finished
    before = (run / "last/training.json").stat().st_ino
    fit(toy_recognizer(), rows, [], CONFIG, run)
    fit(toy_recognizer(), rows, [], replace(CONFIG, alpha=0.5, epochs=2), run, allow_changes=["alpha", "epochs"])
    assert (run / "last/training.json").stat().st_ino == before and not (run / "aside-last").exists()


def test_a_last_that_an_earlier_release_left_in_a_run_that_goes_on_is_set_aside(finished, monkeypatch):
    run, rows = finished
    longer = replace(CONFIG, epochs=5, keep=9)
    fit(toy_recognizer(), rows, [], longer, run, allow_changes=["epochs"])
    shutil.rmtree(checkpoints(run)[-1])
    fit_until_opened(run, rows, monkeypatch, config=longer)
    assert not (run / "last").exists()


@pytest.mark.parametrize("moment", range(4))
def test_an_overwrite_that_is_killed_leaves_no_last_and_can_be_given_again(finished, monkeypatch, moment):
    run, rows = finished
    count = 0

    def killed(name):
        real = getattr(checkpoint_module, name)

        def removing(path):
            nonlocal count
            count += 1
            if count > moment:
                raise KeyboardInterrupt
            real(path)

        return removing

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        removing = killed("remove_folder")
        for module in (runs, checkpoint_module):
            patch.setattr(module, "remove_folder", removing)
        fit(toy_recognizer(), rows, [], CONFIG, run, overwrite=True)
    assert (run / "last").exists() == (moment == 0), "it is the first to go"
    fit(toy_recognizer(seed=5), rows, [], CONFIG, run, overwrite=True)
    assert not list(run.rglob(".*"))
    assert (run / "last").is_dir() and len(checkpoints(run)) == 1


# ------------------------------------------------------------------------------- once in each launch of torchrun


def test_what_is_to_be_done_once_in_a_launch_is_known_by_the_folder_and_not_by_the_number_of_restarts(
    tmp_path, monkeypatch
):
    def launched(name, attempt):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", name)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
        return opened_before(tmp_path / "run")

    assert not launched("a", 3), "there is no run yet: whatever restarted it had not come to open it"
    launched("a", 0)
    run = open_run(tmp_path / "run", SETTINGS | {"launch": launch()}).run
    assert not launched("a", 0), "the same command, given again"
    assert launched("a", 1) and launched("a", 2)
    assert not launched("b", 1), "another launch, restarted before it opened the run"
    (run.folder / "config.json").write_text("{")
    assert not launched("a", 1)
    (run.folder / "config.json").write_text('{"launch": ""}')
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT")
    assert launch() == "" and not opened_before(run.folder), "without torchrun"


def test_launches_of_one_name_are_told_apart_by_their_process_and_its_beginning(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    name, host, parent, began = launch().split()
    assert (name, host, int(parent)) == ("none", socket.gethostname(), os.getppid()) and int(began) > 0
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert launch() != f"none {host} {parent} {began}"
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    assert launch() == "none", "all nodes have this in common, and no more"

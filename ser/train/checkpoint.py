"""Run folders: what is saved while training, and how it is found again.

    runs/NAME/
      owner.json               who trains in the folder, or did last; see `ser.train.processes.own_run`
      config.json              the resolved settings and data of the run
      metrics.jsonl            a line per log interval and evaluation
      checkpoints/step-00000120/   a model folder, plus optimizer.safetensors, state.json (where the run stood),
                               settings.json (of which run) and manifest.json (the others' sizes and sha256)
      best/                    a model folder: the best by the chosen metric on validation data
      last/                    a model folder: the end of training

Each folder appears whole or not at all, and a checkpoint is used only where every byte of it is as it was written.
Tensors are in safetensors and the rest in JSON, so resuming reads no pickle.

Read from the top: progress and optimizer as files, one checkpoint, all checkpoints of a run, the run's folder, and
the thread that writes while training goes on.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ser.data.text import did_you_mean
from ser.errors import ConfigError, RunFolderError
from ser.files import (
    clear_remains,
    digest,
    read_tensors,
    remove_folder,
    replace_file,
    sync,
    write_folder_atomically,
    write_json,
    write_tensors,
)
from ser.recognizer import Recognizer
from ser.train.content import changed_settings
from ser.train.processes import OWNER, attempt, launch
from ser.train.resources import SMALLER_MODEL, is_out_of_memory, memory_explained

STATE = "state.json"
SETTINGS = "settings.json"
MANIFEST = "manifest.json"

# Settings that do not change what is computed, beyond rounding.
MAY_CHANGE = {
    "activation_checkpointing",
    "device",
    "workers",
    "on_bad_audio",
    "max_bad_audio",
    "keep",
    "log_every",
    "save_every",
    "micro_batch",
    "micro_seconds",
    "accumulate",
    "eval_seconds",
    "timeout",
    "max_skipped",
    "world_size",
    "versions",
    "licences",
    "shared_with_training",  # follow from the data
    "protocol_description",
    "launch",
}

# Settings that change what is computed, but not what a checkpoint means: `open_run` lets them pass when asked.
CHANGEABLE = {
    "init",  # the weights are the checkpoint's
    "files",  # names of recordings, where all else is the same
    "cache",
    "cache_dtype",
    "epochs",
    "rate",
    "head_rate",
    "warmup",
    "weight_decay",
    "adam_beta2",
    "clip",
    "alpha",
    "beta",
    "gamma",
    "label_smoothing",
    "eval_every",
    "early_stop",
}


@dataclass
class Progress:
    """Where a run stands. With weights and optimizer this is all its state: the rest are pure functions."""

    step: int = 0  # optimizer updates done
    epoch: int = 0  # of the next update
    update: int = 0  # of the next update, within its epoch
    skipped: int = 0  # updates left out because their gradient was not finite
    best: float | None = None  # of the chosen metric
    best_step: int = 0
    evaluations_since_best: int = 0
    evaluation_due: bool = False  # a signal came before it: it is the first thing to do
    scaler: dict[str, Any] | None = None
    finished: bool = False


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Optimizer state under parameter names: "exp_avg/wav2vec2.encoder...."."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{key}/{names[parameter]}": torch.as_tensor(value)
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`."""
    parameters = dict(model.named_parameters())
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        parameter = parameters[name]
        # AdamW counts its steps in a tensor that stays on the CPU unless it is fused.
        device = parameter.device if kind != "step" or optimizer.defaults.get("fused") else "cpu"
        optimizer.state[parameter][kind] = value.to(device, copy=True)  # a copy: the file is mapped


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, which training does not change any more."""
    size = sum(tensor.nbytes for tensor in tensors.values()) / 1e9
    with memory_explained(SMALLER_MODEL, doing=f"when {size:.2f} GB were copied on the CPU, to be saved"):
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


# ----------------------------------------------------------------------------------------- one checkpoint


@dataclass(frozen=True)
class Run:
    """What all checkpoints of a run have in common."""

    folder: Path
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    settings: dict[str, Any] = field(default_factory=dict)
    stuck: set[Path] = field(default_factory=set, compare=False)  # old checkpoints that cannot be removed

    def path(self, step: int) -> Path:
        """Zero-padded, so that names sort as numbers do."""
        return self.folder / "checkpoints" / f"step-{step:08d}"


def sealed(content: Mapping[str, Any]) -> str:
    """The text of a manifest. There is one for each content, so that no bit of it can change unseen."""
    own = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({**content, "sha256": own}, indent=1, sort_keys=True) + "\n"


def write_manifest(folder: Path, run: str) -> None:
    """Seal a checkpoint: the size and sha256 of every file, and the sha256 of that list itself."""
    files = {p.name: {"bytes": p.stat().st_size, "sha256": digest(p)} for p in sorted(folder.iterdir())}
    with replace_file(folder / MANIFEST) as file:
        file.write(sealed({"run": run, "files": files}))


def own_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, after a look at the manifest alone. Raises RunFolderError."""
    path = folder / MANIFEST
    try:
        if not path.is_file():
            raise RunFolderError(f"{path}: is missing, so this is no whole checkpoint")
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
        content.pop("sha256")
        if sealed(content) != text:
            raise RunFolderError(f"{path}: was changed after it was written: its own sha256 differs")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        cause = error.strerror if isinstance(error, OSError) else "it is not as it was written"
        raise RunFolderError(f"{path}: cannot be read: {cause}") from None
    return content


# ------------------------------------------------------------------------------------ those of a run


def step_of(folder: Path) -> int:
    """The step in a checkpoint's name."""
    return int(folder.name.removeprefix("step-"))


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints in a run's folder, oldest first; `verify` tells whether one is sound."""
    found = [p for p in (run / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", p.name) and p.is_dir()]
    return sorted(found, key=step_of)


def rotate(run: Run, *, newest: Path, best: Path, keep: int) -> None:
    """Remove all checkpoints of this run but the ``keep`` newest, the one just written and the best evaluation's.

    What is not known to be this run's (another's, or one whose manifest is damaged) is left alone. One that cannot
    be removed is said once: no run ends for it.
    """

    def ours(folder: Path) -> bool:
        try:
            return own_manifest(folder)["run"] == run.id
        except (RunFolderError, KeyError):
            return False

    own = [folder for folder in checkpoints(run.folder) if ours(folder)]
    for folder in own:
        if folder in (*own[-keep:], newest, best):
            continue
        try:
            remove_folder(folder)
        except OSError as error:
            if folder not in run.stuck:
                what = f"{folder}: an old checkpoint that cannot be removed: {error.strerror or error}"
                tqdm.write(f"{what}; training goes on, and it stays", file=sys.stderr)
            run.stuck.add(folder)


def save_checkpoint(
    run: Run,
    recognizer: Recognizer,
    weights: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    progress: Progress,
    *,
    keep: int,
) -> Path:
    """Write a checkpoint, whole or not at all, then remove what `rotate` says.

    Args:
        run: which run's.
        recognizer: all of the model but its weights.
        weights, optimizer: the state dict of the model, and `optimizer_tensors`.
        progress: where the run stands.
        keep: how many to keep.

    Raises:
        FileError: the disk does not take it. The checkpoints before are as they were.
    """

    def write(folder: Path) -> None:
        recognizer.write_files(folder, weights)
        write_tensors(folder / "optimizer.safetensors", optimizer)
        write_json(folder / STATE, asdict(progress))
        write_json(folder / SETTINGS, run.settings)

    target = run.path(progress.step)
    clear_remains(target.parent, "step-*")
    size = sum(tensor.nbytes for part in (weights, optimizer) for tensor in part.values())
    write_folder_atomically(target, write, seal=lambda folder: write_manifest(folder, run.id), size=size)
    rotate(run, newest=target, best=run.path(progress.best_step), keep=keep)
    return target


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint of which every byte is as it was written, else RunFolderError with the file."""
    manifest = own_manifest(folder)
    for name, expected in manifest["files"].items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise RunFolderError(f"{path}: is missing")
        try:
            size = path.stat().st_size
            if size != expected["bytes"]:
                raise RunFolderError(f"{path}: has {size:,} bytes; {expected['bytes']:,} were written")
            if digest(path) != expected["sha256"]:
                raise RunFolderError(f"{path}: was changed after it was written: its sha256 differs")
        except OSError as error:
            raise RunFolderError(f"{path}: cannot be read: {error.strerror}") from None
    return manifest


def read_progress(folder: Path) -> Progress:
    """Where a verified checkpoint stands. Raises RunFolderError."""
    try:
        return Progress(**json.loads((folder / STATE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise RunFolderError(f"{folder / STATE}: cannot be resumed from: {error}") from None


def load_checkpoint(folder: Path, recognizer: Recognizer, optimizer: torch.optim.Optimizer) -> Progress:
    """Put a verified checkpoint's weights and optimizer state into place; returns where it stood."""
    try:
        weights = read_tensors(folder / "model.safetensors")
        tensors = read_tensors(folder / "optimizer.safetensors")
        with torch.no_grad():
            keys = recognizer.keys()
            for name, value in recognizer.model.state_dict().items():
                value.copy_(weights[keys[name]])
        restore_optimizer(recognizer.model, optimizer, tensors)
        return read_progress(folder)
    except RunFolderError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise RunFolderError(f"{folder}: cannot be resumed from: {error.__class__.__name__}: {error}") from error


def newest_verified(run: Path) -> tuple[Path | None, list[str]]:
    """The newest sound checkpoint, and why each newer one is none."""
    reasons: list[str] = []
    for folder in reversed(checkpoints(run)):
        try:
            verify(folder)
            return folder, reasons
        except RunFolderError as error:
            reasons.append(str(error))
    return None, reasons


def set_aside(folder: Path) -> Path:
    """Rename a folder to aside-NAME, or aside-NAME-2 and so on where that is taken: nothing is lost."""
    aside, number = folder.with_name(f"aside-{folder.name}"), 1
    while aside.exists() or aside.is_symlink():
        number += 1
        aside = folder.with_name(f"aside-{folder.name}-{number}")
    folder.rename(aside)
    sync(folder.parent)
    return aside


def set_aside_after(run: Path, step: int) -> list[str]:
    """Rename the checkpoints after a step, so that those to come have no rivals; returns a line for each."""
    return [
        f"{folder} is set aside as {set_aside(folder).name}"
        for folder in checkpoints(run)
        if step_of(folder) > step
    ]


# ------------------------------------------------------------------------------------ the run's folder


@dataclass(frozen=True)
class Opened:
    """A run's folder that training may go on in."""

    run: Run
    checkpoint: Path | None = None  # verified; None: a new run
    notes: tuple[str, ...] = ()  # what a person should know
    changed: bool = False  # settings were changed on purpose


def remove_run(folder: Path) -> None:
    """Remove all of a run but who owns it. Killed at any moment, it can be called again, and last/ is gone first.

    Raises RunFolderError for what is no run.
    """
    if not (folder / "config.json").is_file() or not (folder / "checkpoints").is_dir():
        raise RunFolderError(f"{folder}: is not a training run, so --overwrite does not remove it")

    def remove(path: Path) -> None:
        remove_folder(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    kept = {OWNER, "config.json", "checkpoints"}  # it is locked; it is replaced; by these two it is known as a run
    for path in sorted(folder.iterdir(), key=lambda path: path.name != "last"):
        if path.name not in kept:
            remove(path)
    for path in (folder / "checkpoints").iterdir():
        remove(path)


def stops_early(progress: Progress, patience: int) -> bool:
    """Tell whether there were ``patience`` evaluations without improvement; 0: never."""
    return bool(patience) and progress.evaluations_since_best >= patience


def is_over(progress: Progress, settings: Mapping[str, Any]) -> bool:
    """Tell whether training has come to its end by these settings: of all epochs, or early."""
    return progress.epoch >= settings["epochs"] or stops_early(progress, settings.get("early_stop", 0))


def named(run: Path, checkpoint: str | Path) -> Path:
    """The verified checkpoint of a run that a person named."""
    found = checkpoints(run)
    for folder in found:
        if folder.name == str(checkpoint) or folder.resolve() == Path(checkpoint).resolve():
            verify(folder)
            return folder
    raise RunFolderError(f"{checkpoint}: is no checkpoint of {run}, which has {', '.join(p.name for p in found)}")


def reopened(folder: Path, settings: dict[str, Any], resume_from: str | Path | None, allowed: set[str]) -> Opened:
    """`open_run` of a folder that has checkpoints."""
    checkpoint, reasons = newest_verified(folder) if resume_from is None else (named(folder, resume_from), [])
    if checkpoint is None:
        listed = "\n  ".join(reasons)
        raise RunFolderError(
            f"{folder}: none of its {len(reasons)} checkpoints is sound; restore one from a copy, or --overwrite "
            f"to start anew:\n  {listed}"
        )
    notes = [f"skipped a damaged checkpoint: {reason}" for reason in reasons]
    before = json.loads((checkpoint / SETTINGS).read_text(encoding="utf-8"))
    differences = changed_settings(before, settings, may_change=MAY_CHANGE)
    refused = {key: text for key, text in differences.items() if key not in allowed}
    if refused:
        askable = sorted(refused.keys() & CHANGEABLE)
        hint = f"--allow-changes {' '.join(askable)} if that is meant, " if askable else ""
        told = list(refused.values())
        if any(key.startswith("data.") for key in refused):
            told += ["(where lengths differ: a recording mended since may be longer)"]
        listed = "\n  ".join(told)
        raise RunFolderError(
            f"{checkpoint}: is of a run with other settings; resume it with the same, {hint}choose another "
            f"folder, or --overwrite:\n  {listed}"
        )
    notes += [f"changed on purpose: {text}" for text in differences.values()]
    if "init" in differences:  # the checkpoint has the weights, and they were begun from these
        settings |= {name: before[name] for name in ("init", "init_content") if name in before}
    progress = read_progress(checkpoint)
    if differences:
        progress.finished = is_over(progress, settings)
    if not progress.finished and (folder / "last").is_dir():  # before anything else: a kill may come at any moment
        notes.append(f"{folder / 'last'} is set aside as {set_aside(folder / 'last').name}: the run goes on")
    notes += set_aside_after(folder, step_of(checkpoint))
    write_json(folder / "config.json", settings)
    run = Run(folder, own_manifest(checkpoint)["run"], settings)
    return Opened(run, checkpoint, tuple(notes), changed=bool(differences))


def interrupted_early(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether the folder holds this very run, stopped before its first checkpoint: it simply starts again."""
    there = {p.name for p in folder.iterdir()} - {OWNER}
    if there == {"checkpoints"}:  # stopped before config.json
        return not any((folder / "checkpoints").iterdir())
    return (
        there <= {"config.json", "metrics.jsonl", "lengths.json", "skipped.jsonl", "checkpoints", "best"}
        and (folder / "config.json").is_file()
        and not changed_settings(
            json.loads((folder / "config.json").read_text(encoding="utf-8")), settings, may_change=MAY_CHANGE
        )
    )


def open_run(
    folder: Path,
    settings: dict[str, Any],
    *,
    overwrite: bool = False,
    resume_from: str | Path | None = None,
    allow_changes: Sequence[str] = (),
) -> Opened:
    """Make a run's folder, or find the checkpoint to continue from: the newest sound one, or ``resume_from``.

    Later checkpoints, be they damaged or what ``resume_from`` goes back behind, are renamed to aside-step-N, and
    last/ of a run that was finished and goes on to aside-last: there is a last/ of finished runs alone.

    Args:
        folder: the run's.
        settings: of the run, as JSON can hold them.
        overwrite: remove the run that is there.
        resume_from: the name or path of one of the folder's checkpoints.
        allow_changes: names of settings in `CHANGEABLE` that may differ from the checkpoint's.

    Raises:
        RunFolderError: the folder holds something else, no sound checkpoint, or a run with other settings; the
            differences are listed. ConfigError: ``allow_changes`` names something else.
    """
    allowed = {name.replace("-", "_") for name in allow_changes}
    for name in sorted(allowed - CHANGEABLE):
        raise ConfigError(
            f"allow-changes names {name!r}{did_you_mean(name, CHANGEABLE)}; a run goes on with another "
            f"{', '.join(sorted(CHANGEABLE))}"
        )
    if overwrite and resume_from is not None:
        raise ConfigError("give --overwrite or --resume-from, not both")
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"{folder}: is a file; a run needs a folder")
    settings = json.loads(json.dumps(settings))  # as it will be read again: lists for tuples
    occupied = folder.is_dir() and any(path.name != OWNER for path in folder.iterdir())
    if occupied and overwrite:
        remove_run(folder)
        occupied = False
    if (folder / "checkpoints").is_dir():
        files = ("config.json", "metrics.jsonl", "lengths.json", "skipped.jsonl")
        for name in (*files, "best", "last", "checkpoints/step-*"):
            clear_remains((folder / name).parent, Path(name).name)
    found = checkpoints(folder)
    if not found and resume_from is not None:
        raise RunFolderError(f"{folder}: has no checkpoint, so none to resume from")
    if not found and (not occupied or interrupted_early(folder, settings)):
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", settings)
        sync(folder)
        return Opened(Run(folder, settings=settings))
    if not found:
        raise RunFolderError(
            f"{folder}: is not empty and has no checkpoint to resume from; choose another folder, or --overwrite "
            "to start a run anew"
        )

    return reopened(folder, settings, resume_from, allowed)


def describe(recognizer: Recognizer) -> dict[str, Any]:
    """What weights need to mean the same: configuration, heads, labels, vocabulary, preprocessing."""
    return {
        "encoder": recognizer.model.config.to_dict(),
        "heads": recognizer.model.heads_config.to_dict(),
        **recognizer.labels.to_dict(),
    }


def opened_before(folder: Path) -> bool:
    """Tell whether an earlier attempt of this launch of torchrun has opened the run in a folder.

    Then what was to be done there once (``overwrite``, ``resume_from``) was done. That processes were started
    again does not tell it: they may have ended before.
    """
    if attempt() == "0":
        return False
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return bool(launch()) and settings.get("launch") == launch()
    except (OSError, ValueError, AttributeError):
        return False


# ------------------------------------------------------------------------------------ while training goes on


class Saver:
    """Writes models and checkpoints in a thread of its own, one after the other, while training goes on.

        with Saver() as saver:      # waits at the end, whatever way it is left
            saver.checkpoint(run, recognizer, optimizer, progress, keep=2)

    Tensors are copied to the CPU before a call returns, so what is written is of one moment. All that is saved
    after one update shares a copy of the weights; a later update's save waits for it. What went wrong in the
    thread is raised by the next call.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="saver")
        self._pending: list[Future[None]] = []
        self._weights: tuple[int, dict[str, Tensor]] | None = None  # of a step
        self._failed = False
        self.stopped = self.written = 0.0  # seconds that training stood still, and that the thread took

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        try:
            self.wait()
        except Exception as second:
            if error is None:
                raise
            error.add_note(f"and then: {second}")
        finally:
            self._thread.shutdown()

    def model(
        self, folder: Path, recognizer: Recognizer, *, step: int, also: Callable[[Path], None] | None = None
    ) -> None:
        """`Recognizer.save` of the weights as they are now, after ``step`` updates."""
        weights = self._copy(recognizer, step)
        self._start(lambda: recognizer.save(folder, weights, also=also))

    def checkpoint(
        self,
        run: Run,
        recognizer: Recognizer,
        optimizer: torch.optim.Optimizer,
        progress: Progress,
        *,
        keep: int,
    ) -> None:
        """`save_checkpoint` of everything as it is now."""
        weights = self._copy(recognizer, progress.step)
        started = time.perf_counter()
        state = copied(optimizer_tensors(recognizer.model, optimizer))
        now = Progress(**asdict(progress))
        self.stopped += time.perf_counter() - started
        self._start(lambda: save_checkpoint(run, recognizer, weights, state, now, keep=keep))

    def check(self) -> None:
        """Raise what went wrong in the thread, without waiting."""
        if any(pending.done() and pending.exception() is not None for pending in self._pending):
            self.wait()

    def wait(self) -> None:
        """Until everything is on the disk."""
        pending, self._pending, self._weights = self._pending, [], None
        for write in pending:
            started = time.perf_counter()
            write.result()
            self.stopped += time.perf_counter() - started

    def seconds(self) -> dict[str, float]:
        """What saving took since the last call; nothing where it took none."""
        found = {"save_stopped_seconds": self.stopped, "save_written_seconds": self.written}
        self.stopped = self.written = 0.0
        return found if any(found.values()) else {}

    def _copy(self, recognizer: Recognizer, step: int) -> dict[str, Tensor]:
        if self._weights is None or self._weights[0] != step:
            self.wait()
            started = time.perf_counter()
            self._weights = step, copied(recognizer.model.state_dict())
            self.stopped += time.perf_counter() - started
        return self._weights[1]

    def _start(self, write: Callable[[], Any]) -> None:
        def timed() -> None:
            if self._failed:  # a checkpoint must not speak of a best model that could not be written
                return
            started = time.perf_counter()
            try:
                with memory_explained(SMALLER_MODEL, doing="when a model or checkpoint was written"):
                    write()
            except BaseException:
                self._failed = True
                raise
            self.written += time.perf_counter() - started

        self._pending.append(self._thread.submit(timed))

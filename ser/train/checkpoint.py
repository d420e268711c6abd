"""Save a run in its folder while training, and find it again.

    runs/NAME/
      owner.json               which process trains in the folder, or did last; see `ser.train.processes.own_run`
      config.json              the resolved settings and data of the run
      metrics.jsonl            a line per log interval and evaluation
      checkpoints/step-00000120/   a model folder, plus optimizer.safetensors, state.json (where the run stood),
                               settings.json (those of the run) and manifest.json (sizes and sha256 of the others)
      best/                    a model folder: the best model by the chosen metric on validation data
      last/                    a model folder: the model at the end of training

Each folder appears whole or not at all, and a checkpoint is used only if no byte of it has changed. Tensors are in
safetensors and the rest in JSON, so resuming reads no pickle.

This file has, from the top: progress and optimizer as files, one checkpoint, all checkpoints of a run, and the
thread that writes during training. `ser.train.runs` opens the folder.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ser.errors import RunFolderError
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
from ser.train.resources import SMALLER_MODEL, is_out_of_memory, memory_explained

STATE = "state.json"
SETTINGS = "settings.json"
MANIFEST = "manifest.json"


@dataclass
class Progress:
    """Describe where a run stands. Together with weights and optimizer this is the whole state of a run."""

    step: int = 0  # optimizer updates done
    epoch: int = 0  # epoch of the next update
    update: int = 0  # number of the next update within its epoch
    skipped: int = 0  # updates left out because their gradient was not finite
    best: float | None = None  # best value of the chosen metric
    best_step: int = 0
    evaluations_since_best: int = 0
    evaluation_due: bool = False  # a signal came before the evaluation, so a resumed run begins with it
    scaler: dict[str, Any] | None = None
    finished: bool = False

    def advance(self, updates: int) -> bool:
        """Count one update of an epoch of ``updates``; tell whether it was the last one."""
        self.step += 1
        self.update = (self.update + 1) % updates
        self.epoch += self.update == 0
        return self.update == 0

    def stops_early(self, patience: int) -> bool:
        """Tell whether there were ``patience`` evaluations without improvement; 0: never."""
        return bool(patience) and self.evaluations_since_best >= patience

    def is_over(self, settings: Mapping[str, Any]) -> bool:
        """Tell whether training has ended by these settings, after all epochs or early."""
        return self.epoch >= settings["epochs"] or self.stops_early(settings.get("early_stop", 0))


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Name each tensor of the optimizer's state by its parameter: "exp_avg/wav2vec2.encoder...."."""
    states = {name: optimizer.state.get(parameter, {}) for name, parameter in model.named_parameters()}
    return {
        f"{key}/{name}": torch.as_tensor(value) for name, state in states.items() for key, value in state.items()
    }


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put the tensors of `optimizer_tensors` back into the optimizer."""
    parameters = dict(model.named_parameters())
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        parameter = parameters[name]
        # AdamW counts its steps in a tensor that stays on the CPU unless it is fused.
        device = parameter.device if kind != "step" or optimizer.defaults.get("fused") else "cpu"
        optimizer.state[parameter][kind] = value.to(device, copy=True)  # copied, since the file is memory-mapped


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors to the CPU, so that training cannot change them while they are written."""
    size = sum(tensor.nbytes for tensor in tensors.values()) / 1e9
    with memory_explained(SMALLER_MODEL, doing=f"when {size:.2f} GB were copied on the CPU, to be saved"):
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


# ----------------------------------------------------------------------------------------- one checkpoint


@dataclass(frozen=True)
class Run:
    """Hold what all checkpoints of a run have in common."""

    folder: Path
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    settings: dict[str, Any] = field(default_factory=dict)
    stuck: set[Path] = field(default_factory=set, compare=False)  # old checkpoints that cannot be removed

    def path(self, step: int) -> Path:
        """Return the folder of a checkpoint; its number is zero-padded, so that names sort as numbers do."""
        return self.folder / "checkpoints" / f"step-{step:08d}"


def sealed(content: Mapping[str, Any]) -> str:
    """Return the text of a manifest. Each content has exactly one text, so any change of a bit is found."""
    own = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({**content, "sha256": own}, indent=1, sort_keys=True) + "\n"


def seal_checkpoint(folder: Path, run: str) -> None:
    """Write the manifest of a checkpoint: the size and sha256 of every file, and the sha256 of the list itself."""
    files = {p.name: {"bytes": p.stat().st_size, "sha256": digest(p)} for p in sorted(folder.iterdir())}
    with replace_file(folder / MANIFEST) as file:
        file.write(sealed({"run": run, "files": files}))


def own_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a checkpoint, and verify only the manifest itself. Raises RunFolderError."""
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
    """Return the step in a checkpoint's name."""
    return int(folder.name.removeprefix("step-"))


def checkpoints(run: Path) -> list[Path]:
    """List the checkpoints in a run's folder, oldest first; `verify_checkpoint` tells whether one is sound."""
    found = [p for p in (run / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", p.name) and p.is_dir()]
    return sorted(found, key=step_of)


def rotate(run: Run, *, newest: Path, best: Path, keep: int) -> None:
    """Remove checkpoints of this run except the ``keep`` newest, the one just written and the best one.

    A checkpoint of another run, or with a damaged manifest, is left alone. If a checkpoint cannot be removed, this
    is printed once, and the run goes on.
    """
    own = []
    for folder in checkpoints(run.folder):
        with suppress(RunFolderError, KeyError):
            if own_manifest(folder)["run"] == run.id:
                own.append(folder)
    for folder in [folder for folder in own if folder not in (*own[-keep:], newest, best)]:
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
    """Write a checkpoint, whole or not at all, then remove old ones with `rotate`.

    Args:
        run: the run.
        recognizer: the model; its weights are given separately.
        weights, optimizer: the state dict of the model, and `optimizer_tensors`.
        progress: where the run stands.
        keep: how many checkpoints to keep.

    Raises:
        FileError: the disk cannot hold it. Earlier checkpoints are unchanged.
    """

    def write(folder: Path) -> None:
        recognizer.write_files(folder, weights)
        write_tensors(folder / "optimizer.safetensors", optimizer)
        write_json(folder / STATE, asdict(progress))
        write_json(folder / SETTINGS, run.settings)

    target = run.path(progress.step)
    clear_remains(target.parent, "step-*")
    size = sum(tensor.nbytes for part in (weights, optimizer) for tensor in part.values())
    write_folder_atomically(target, write, seal=lambda folder: seal_checkpoint(folder, run.id), size=size)
    rotate(run, newest=target, best=run.path(progress.best_step), keep=keep)
    return target


def verify_checkpoint(folder: Path) -> dict[str, Any]:
    """Verify that no byte of a checkpoint has changed, and return its manifest.

    Raises RunFolderError, which names the file that differs.
    """
    manifest = own_manifest(folder)
    for name, expected in manifest["files"].items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise RunFolderError(f"{path}: is missing")
        try:
            if (size := path.stat().st_size) != expected["bytes"]:
                raise RunFolderError(f"{path}: has {size:,} bytes; {expected['bytes']:,} were written")
            if digest(path) != expected["sha256"]:
                raise RunFolderError(f"{path}: was changed after it was written: its sha256 differs")
        except OSError as error:
            raise RunFolderError(f"{path}: cannot be read: {error.strerror}") from None
    return manifest


def read_progress(folder: Path) -> Progress:
    """Read where a verified checkpoint stands. Raises RunFolderError."""
    try:
        return Progress(**json.loads((folder / STATE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise RunFolderError(f"{folder / STATE}: cannot be resumed from: {error}") from None


def load_checkpoint(folder: Path, recognizer: Recognizer, optimizer: torch.optim.Optimizer) -> Progress:
    """Put a verified checkpoint's weights and optimizer state into place, and return where it stood."""
    try:
        weights, keys = read_tensors(folder / "model.safetensors"), recognizer.keys()
        tensors = read_tensors(folder / "optimizer.safetensors")
        with torch.no_grad():
            for name, value in recognizer.model.state_dict().items():
                value.copy_(weights[keys[name]])
        restore_optimizer(recognizer.model, optimizer, tensors)
        return read_progress(folder)
    except Exception as error:
        if isinstance(error, RunFolderError) or is_out_of_memory(error):
            raise
        raise RunFolderError(f"{folder}: cannot be resumed from: {error.__class__.__name__}: {error}") from error


def newest_verified(run: Path) -> tuple[Path | None, list[str]]:
    """Find the newest sound checkpoint, and the reason why each newer one is not sound."""
    reasons: list[str] = []
    for folder in reversed(checkpoints(run)):
        try:
            verify_checkpoint(folder)
            return folder, reasons
        except RunFolderError as error:
            reasons.append(str(error))
    return None, reasons


def set_aside(folder: Path) -> Path:
    """Rename a folder to aside-NAME, or to aside-NAME-2 and so on if that exists; nothing is removed."""
    aside, number = folder.with_name(f"aside-{folder.name}"), 1
    while aside.exists() or aside.is_symlink():
        number += 1
        aside = folder.with_name(f"aside-{folder.name}-{number}")
    folder.rename(aside)
    sync(folder.parent)
    return aside


def set_aside_after(run: Path, step: int) -> list[str]:
    """Rename the checkpoints after a step, which new ones could collide with; return a line for each."""
    later = [folder for folder in checkpoints(run) if step_of(folder) > step]
    return [f"{folder} is set aside as {set_aside(folder).name}" for folder in later]


# ------------------------------------------------------------------------------------ while training goes on


class Saver:
    """Write models and checkpoints in a separate thread, one after the other, while training goes on.

        with Saver() as saver:      # waits at the end, also after an exception
            saver.checkpoint(run, recognizer, optimizer, progress, keep=2)

    Tensors are copied to the CPU before a call returns, so all that is written belongs to the same update. Saves
    after one update share one copy of the weights; a save after a later update waits for them. An error in the
    thread is raised by the next call.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="saver")
        self._pending: list[Future[None]] = []
        self._weights: tuple[int, dict[str, Tensor]] | None = None  # a step, and the weights after it
        self._failed = False
        self.stopped = self.written = 0.0  # seconds that training waited, and that the thread took

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
        """Save the weights as they are now, after ``step`` updates, as `Recognizer.save` does."""
        weights = self._copy(recognizer, step)
        self._start(lambda: recognizer.save(folder, weights, also=also))

    def checkpoint(
        self, run: Run, recognizer: Recognizer, optimizer: torch.optim.Optimizer, progress: Progress, *, keep: int
    ) -> None:
        """Save everything as it is now, as `save_checkpoint` does."""
        weights = self._copy(recognizer, progress.step)
        started = time.perf_counter()
        state = copied(optimizer_tensors(recognizer.model, optimizer))
        now = Progress(**asdict(progress))
        self.stopped += time.perf_counter() - started
        self._start(lambda: save_checkpoint(run, recognizer, weights, state, now, keep=keep))

    def check(self) -> None:
        """Raise the error of the thread, if there is one, without waiting."""
        if any(pending.done() and pending.exception() is not None for pending in self._pending):
            self.wait()

    def wait(self) -> None:
        """Wait until everything is on the disk."""
        pending, self._pending, self._weights = self._pending, [], None
        for write in pending:
            started = time.perf_counter()
            write.result()
            self.stopped += time.perf_counter() - started

    def seconds(self) -> dict[str, float]:
        """Return the seconds that saving took since the last call; an empty dict if nothing was saved."""
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
            if self._failed:  # a checkpoint must not name a best model that could not be written
                return
            started, self._failed = time.perf_counter(), True  # reset once it is written
            with memory_explained(SMALLER_MODEL, doing="when a model or checkpoint was written"):
                write()
            self._failed = False
            self.written += time.perf_counter() - started

        self._pending.append(self._thread.submit(timed))

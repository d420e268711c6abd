"""Run folders: what is saved while training, and how it is found again.

    runs/NAME/
      owner.json               who trains in the folder, or did last; see `ser.train.processes.own_run`
      config.json              the resolved settings and data of the run
      metrics.jsonl            a line per log interval and evaluation
      checkpoints/step-00000120/   a model folder, plus optimizer.safetensors and state.json
      best/                    a model folder: the best by the chosen metric on validation data
      last/                    a model folder: the end of training

Each folder appears whole or not at all. Tensors are in safetensors and the rest in JSON, so resuming reads no
pickle.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from ser.errors import RunFolderError
from ser.models.pretrained import recover_folder, write_folder_atomically, write_json, write_tensors
from ser.recognizer import Recognizer
from ser.train.processes import OWNER

STATE = "state.json"


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


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Optimizer state under parameter names: "exp_avg/wav2vec2.encoder...."."""
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{key}/{names[parameter]}": torch.as_tensor(value)
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def restore_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]
) -> None:
    """The inverse of `optimizer_tensors`."""
    parameters = dict(model.named_parameters())
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        parameter = parameters[name]
        # AdamW counts its steps in a tensor that stays on the CPU unless it is fused.
        device = parameter.device if kind != "step" or optimizer.defaults.get("fused") else "cpu"
        optimizer.state[parameter][kind] = value.to(device, copy=True)  # a copy: the file is mapped


def checkpoint_path(run: Path, step: int) -> Path:
    """Zero-padded, so that names sort as numbers do."""
    return run / "checkpoints" / f"step-{step:08d}"


def checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    folder = run / "checkpoints"
    found = [p for p in folder.glob("step-*") if (p / STATE).is_file()] if folder.is_dir() else []
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))


def save_checkpoint(
    run: Path, recognizer: Recognizer, optimizer: torch.optim.Optimizer, progress: Progress, *, keep: int
) -> Path:
    """Write a checkpoint, then remove all but the ``keep`` newest."""
    target = checkpoint_path(run, progress.step)

    def write(folder: Path) -> None:
        recognizer.write_files(folder)
        write_tensors(folder / "optimizer.safetensors", optimizer_tensors(recognizer.model, optimizer))
        write_json(folder / STATE, asdict(progress))

    write_folder_atomically(target, write)
    for old in checkpoints(run)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def load_checkpoint(folder: Path, recognizer: Recognizer, optimizer: torch.optim.Optimizer) -> Progress:
    """Put a checkpoint's weights and optimizer state into place; returns where it stood."""
    try:
        weights = load_file(folder / "model.safetensors")
        tensors = load_file(folder / "optimizer.safetensors")
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        with torch.no_grad():
            keys = recognizer.keys()
            for name, value in recognizer.model.state_dict().items():
                value.copy_(weights[keys[name]])
        restore_optimizer(recognizer.model, optimizer, tensors)
        return Progress(**state)
    except Exception as error:
        raise RunFolderError(f"{folder}: cannot be resumed from: {error.__class__.__name__}: {error}") from error


def open_run(run: Path, settings: dict[str, Any], *, overwrite: bool) -> Path | None:
    """Make a run's folder, or find the checkpoint to continue from.

    Returns the newest checkpoint, or None for a new run. Raises RunFolderError for a folder that holds something
    else, or a run with other settings; the differences are listed.
    """
    if run.exists() and not run.is_dir():
        raise RunFolderError(f"{run}: is a file; a run needs a folder")
    settings = json.loads(json.dumps(settings))  # as it will be read again: lists for tuples
    occupied = run.is_dir() and any(path.name != OWNER for path in run.iterdir())
    if occupied and overwrite:
        if not (run / "config.json").is_file() or not (run / "checkpoints").is_dir():
            raise RunFolderError(f"{run}: is not a training run, so --overwrite does not remove it")
        for path in run.iterdir():
            if path.name != OWNER:  # which is locked
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        occupied = False
    for name in ("best", "last"):
        recover_folder(run / name)
    found = checkpoints(run)
    if occupied and not found and interrupted_early(run, settings):
        return None
    if occupied and not found:
        raise RunFolderError(
            f"{run}: is not empty and has no checkpoint to resume from; choose another folder, or --overwrite "
            "to start a run anew"
        )
    if found:
        differences = changed_settings(run, settings)
        if differences:
            listed = "\n  ".join(differences)
            raise RunFolderError(
                f"{run}: holds a run with other settings; resume it with the same, choose another folder, or "
                f"--overwrite:\n  {listed}"
            )
        return found[-1]
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    write_json(run / "config.json", settings)
    return None


def changed_settings(run: Path, settings: dict[str, Any]) -> list[str]:
    """What differs from the settings that the run began with, beyond what may."""
    before = json.loads((run / "config.json").read_text(encoding="utf-8"))
    return [
        f"{key}: {before.get(key)!r} then, {settings.get(key)!r} now"
        for key in sorted(set(before) | set(settings))
        if before.get(key) != settings.get(key) and key not in MAY_CHANGE
    ]


def interrupted_early(run: Path, settings: dict[str, Any]) -> bool:
    """Whether the folder holds this very run, stopped before its first checkpoint: it simply starts again."""
    own = {OWNER, "config.json", "metrics.jsonl", "checkpoints", "best", ".best.new", ".best.old"}
    return (
        {p.name for p in run.iterdir()} <= own
        and (run / "config.json").is_file()
        and not changed_settings(run, settings)
    )


# Settings that do not change what is computed, beyond rounding.
MAY_CHANGE = {
    "activation_checkpointing",
    "device",
    "workers",
    "keep",
    "log_every",
    "save_every",
    "micro_batch",
    "accumulate",
    "eval_seconds",
    "timeout",
    "max_skipped",
    "world_size",
    "versions",
}

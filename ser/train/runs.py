"""Decide whether training may begin or continue in a run's folder, and from which checkpoint.

`ser.train.checkpoint` describes the folder. A run continues with the settings that it began with;
`ser.train.config` says of each setting whether it may differ.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ser.data.augment import augmented
from ser.data.text import did_you_mean
from ser.errors import ConfigError, RunFolderError
from ser.files import clear_remains, remove_folder, sync, write_json
from ser.recognizer import Recognizer
from ser.train.checkpoint import (
    SETTINGS,
    Run,
    checkpoints,
    newest_verified,
    own_manifest,
    read_progress,
    set_aside,
    set_aside_after,
    step_of,
    verify_checkpoint,
)
from ser.train.config import TrainConfig, resumable
from ser.train.content import changed_settings
from ser.train.processes import OWNER, attempt, launch

# What a run records beside its `TrainConfig` and may change: it says where the run ran, or follows from the data.
FACTS = {"world_size", "versions", "licences", "shared_with_training", "protocol_description", "launch"}
# What may change freely: only rounding depends on it.
MAY_CHANGE = resumable("freely") | FACTS
# What `open_run` lets change when asked: results depend on it, but a checkpoint can still be loaded. Two are no
# settings: the initial weights, since the checkpoint has its own, and names of files, if all else is the same.
CHANGEABLE = resumable("asked") | {"init", "files"}

FILES = ("config.json", "metrics.jsonl", "lengths.json", "skipped.jsonl")  # of a run, beside its folders


@dataclass(frozen=True)
class Request:
    """Describe the folder that a run asks for, and what may be done there; see `open_run`."""

    folder: Path
    settings: Mapping[str, Any] = field(default_factory=dict)  # to record beside the `TrainConfig`
    overwrite: bool = False
    resume_from: str | Path | None = None
    allow_changes: Sequence[str] = ()


@dataclass(frozen=True)
class Opened:
    """Hold a run's folder in which training may begin or continue."""

    run: Run
    checkpoint: Path | None = None  # verified; None: a new run
    notes: tuple[str, ...] = ()  # what a person should know
    changed: bool = False  # settings were changed on purpose


def remove_run(folder: Path) -> None:
    """Remove all of a run except the `OWNER` file; last/ goes first. After a kill it can be called again.

    Raises RunFolderError if the folder is not a run.
    """
    if not (folder / "config.json").is_file() or not (folder / "checkpoints").is_dir():
        raise RunFolderError(f"{folder}: is not a training run, so --overwrite does not remove it")

    kept = {OWNER, "config.json", "checkpoints"}  # OWNER is locked; the other two mark the folder as a run
    inside = [path for path in folder.iterdir() if path.name not in kept]
    inside.sort(key=lambda path: path.name != "last")
    for path in [*inside, *(folder / "checkpoints").iterdir()]:
        remove_folder(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def remove_unfinished(folder: Path) -> None:
    """Remove the unfinished files of a killed process from a run."""
    if (folder / "checkpoints").is_dir():
        for name in (*FILES, "best", "last", "checkpoints/step-*"):
            clear_remains((folder / name).parent, Path(name).name)


def find_checkpoint(run: Path, checkpoint: str | Path) -> Path:
    """Find the checkpoint of a run that the user named, and verify it."""
    there = checkpoints(run)
    for folder in there:
        if folder.name == str(checkpoint) or folder.resolve() == Path(checkpoint).resolve():
            verify_checkpoint(folder)
            return folder
    raise RunFolderError(f"{checkpoint}: is no checkpoint of {run}, which has {', '.join(p.name for p in there)}")


def differing_settings(recorded: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Compare the settings in a file with ``settings``: return name -> what differs, of those that matter.

    A setting that the file does not have, because an earlier release wrote it, counts as the default.
    """
    unknown_then = {name: value for name, value in TrainConfig().to_dict().items() if name in settings}
    before = json.loads(json.dumps(unknown_then)) | json.loads(recorded.read_text(encoding="utf-8"))
    return changed_settings(before, settings, may_change=MAY_CHANGE)


def refuse_changes(checkpoint: Path, differences: Mapping[str, str], allowed: set[str]) -> None:
    """Raise RunFolderError with all differences that are not allowed, if there are any."""
    refused = {key: text for key, text in differences.items() if key not in allowed}
    if not refused:
        return
    askable = sorted(refused.keys() & CHANGEABLE)
    hint = f"--allow-changes {' '.join(askable)} if that is meant, " if askable else ""
    headline = f"{checkpoint}: is of a run with other settings; resume it with the same, {hint}choose another "
    told = [f"{headline}folder, or --overwrite:", *refused.values()]
    if any(key.startswith("data.") for key in refused):
        told += ["(where lengths differ: a recording mended since may be longer)"]
    raise RunFolderError("\n  ".join(told))


def check_other_lengths(checkpoint: Path, settings: Mapping[str, Any]) -> list[str]:
    """Refuse another ``augment`` if the number of updates follows from it; return a note if it plans anew."""
    before = json.loads((checkpoint / SETTINGS).read_text(encoding="utf-8"))
    chains = [augmented(one.get("augment", []), seed=0) for one in (before, settings)]
    if not any(chain.resizes for chain in chains):
        return []
    if settings["batch_seconds"]:
        raise RunFolderError(
            f"{checkpoint}: with batch_seconds the number of updates follows from the lengths of utterances, "
            "which speed and crop change; so this run goes on only with the same augment"
        )
    half = "the rest of this epoch is planned anew, so it has some utterances again and others not"
    return [half] if read_progress(checkpoint).update else []


def reopened(folder: Path, settings: dict[str, Any], resume_from: str | Path | None, allowed: set[str]) -> Opened:
    """Do what `open_run` does in a folder that has checkpoints."""
    named = find_checkpoint(folder, resume_from) if resume_from is not None else None
    checkpoint, reasons = (named, []) if named else newest_verified(folder)
    if checkpoint is None:
        advice = "restore one from a copy, or --overwrite to start anew"
        headline = f"{folder}: none of its {len(reasons)} checkpoints is sound; {advice}:"
        raise RunFolderError("\n  ".join([headline, *reasons]))
    notes = [f"skipped a damaged checkpoint: {reason}" for reason in reasons]
    differences = differing_settings(checkpoint / SETTINGS, settings)
    refuse_changes(checkpoint, differences, allowed)
    notes += [f"changed on purpose: {text}" for text in differences.values()]
    notes += check_other_lengths(checkpoint, settings) if "augment" in differences else []
    if "init" in differences:  # keep the true origin of the checkpoint's weights in the record
        before = json.loads((checkpoint / SETTINGS).read_text(encoding="utf-8"))
        settings |= {name: before[name] for name in ("init", "init_content") if name in before}
    progress = read_progress(checkpoint)
    if differences:
        progress.finished = progress.is_over(settings)
    if not progress.finished and (folder / "last").is_dir():  # first, since a kill may come at any moment
        notes.append(f"{folder / 'last'} is set aside as {set_aside(folder / 'last').name}: the run goes on")
    notes += set_aside_after(folder, step_of(checkpoint))
    write_json(folder / "config.json", settings)
    run = Run(folder, own_manifest(checkpoint)["run"], settings)
    return Opened(run, checkpoint, tuple(notes), changed=bool(differences))


def interrupted_early(folder: Path, settings: dict[str, Any]) -> bool:
    """Tell whether the folder holds this same run, stopped before its first checkpoint: it may start again."""
    there = {p.name for p in folder.iterdir()} - {OWNER}
    if there == {"checkpoints"}:  # stopped before config.json was written
        return not any((folder / "checkpoints").iterdir())
    return (
        there <= {*FILES, "checkpoints", "best"}
        and (folder / "config.json").is_file()
        and not differing_settings(folder / "config.json", settings)
    )


def allowed_changes(names: Sequence[str]) -> set[str]:
    """Read the names of settings that may differ. Raises ConfigError for a setting that never may."""
    allowed = {name.replace("-", "_") for name in names}
    for name in sorted(allowed - CHANGEABLE):
        near, possible = did_you_mean(name, CHANGEABLE), ", ".join(sorted(CHANGEABLE))
        raise ConfigError(f"allow-changes names {name!r}{near}; a run goes on with another {possible}")
    return allowed


def open_run(
    folder: Path,
    settings: Mapping[str, Any],
    *,
    overwrite: bool = False,
    resume_from: str | Path | None = None,
    allow_changes: Sequence[str] = (),
) -> Opened:
    """Make a run's folder, or find the checkpoint to continue from: the newest sound one, or ``resume_from``.

    Later checkpoints, which are damaged or newer than ``resume_from``, are renamed to aside-step-N. When a
    finished run continues, its last/ is renamed to aside-last, since only finished runs have a last/.

    Args:
        folder: the run's folder.
        settings: the run's settings, of types that JSON has.
        overwrite: remove the run that is in the folder.
        resume_from: the name or path of one of the folder's checkpoints.
        allow_changes: names of settings in `CHANGEABLE` that may differ from the checkpoint's.

    Raises:
        RunFolderError: the folder holds something else, no sound checkpoint, or a run with other settings; the
            differences are listed. ConfigError: ``allow_changes`` names something else.
    """
    allowed = allowed_changes(allow_changes)
    if overwrite and resume_from is not None:
        raise ConfigError("give --overwrite or --resume-from, not both")
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"{folder}: is a file; a run needs a folder")
    recorded: dict[str, Any] = json.loads(json.dumps(settings))  # as JSON is read back: with lists for tuples
    occupied = folder.is_dir() and any(path.name != OWNER for path in folder.iterdir())
    if occupied and overwrite:
        remove_run(folder)
    remove_unfinished(folder)
    if checkpoints(folder):
        return reopened(folder, recorded, resume_from, allowed)
    if resume_from is not None:
        raise RunFolderError(f"{folder}: has no checkpoint, so none to resume from")
    if occupied and not overwrite and not interrupted_early(folder, recorded):
        advice = "choose another folder, or --overwrite to start a run anew"
        raise RunFolderError(f"{folder}: is not empty and has no checkpoint to resume from; {advice}")
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", recorded)
    sync(folder)
    return Opened(Run(folder, settings=recorded))


def describe(recognizer: Recognizer) -> dict[str, Any]:
    """Return what gives weights their meaning: configuration, heads, labels, vocabulary, preprocessing."""
    return {
        "encoder": recognizer.model.config.to_dict(),
        "heads": recognizer.model.heads_config.to_dict(),
        **recognizer.labels.to_dict(),
    }


def opened_before(folder: Path) -> bool:
    """Tell whether an earlier attempt of this launch of torchrun has opened the run in a folder.

    If so, ``overwrite`` and ``resume_from``, which act once, are done. A restart of processes does not prove this,
    since they may have ended before they opened the run.
    """
    if attempt() == "0":
        return False
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return bool(launch()) and settings.get("launch") == launch()
    except (OSError, ValueError, AttributeError):
        return False

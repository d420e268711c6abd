"""Report how a run goes: lines on standard error, a progress bar, and metrics.jsonl."""

import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ser.audio import SAMPLE_RATE
from ser.data.dataset import Batch
from ser.errors import printable
from ser.files import replace_file, written
from ser.train.checkpoint import Progress
from ser.train.distributed import World
from ser.train.evaluation import Evaluation
from ser.train.update import UpdateResult


def say(world: World, text: str) -> None:
    """Print a line on standard error, on the main rank only, without breaking a progress bar.

    Control characters are replaced, since the line may hold names of files.
    """
    if world.is_main:
        tqdm.write(printable(text, lines=True), file=sys.stderr)
        sys.stderr.flush()


def show_rows(world: World, evaluation: Evaluation, most: int = 5) -> None:
    """Print references beside hypotheses, as the paper's script does with --verbose."""
    for utterance, reference, prediction in evaluation.rows[:most]:
        say(world, printable(f"  {utterance.id}: {utterance.emotion} -> {prediction.emotion}"))
        if prediction.transcript is not None:
            say(world, printable(f"    reference:  {reference}"))
            say(world, printable(f"    hypothesis: {prediction.transcript}"))


def short(value: Any) -> str:
    """Write a number as a progress line shows it."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def step_of_line(line: str) -> float:
    """Return the step of a line of metrics.jsonl; infinity for a line that a kill cut short."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


@dataclass
class Meter:
    """Add up what was computed since the last progress line."""

    started: float = field(default_factory=time.perf_counter)
    losses: dict[str, Any] = field(default_factory=dict)
    updates: int = 0
    utterances: int = 0
    seconds: float = 0.0

    def add(self, result: UpdateResult, batches: Sequence[Batch]) -> None:
        """Count one update, without copying anything from the device."""
        for name, value in result.losses.items():
            self.losses[name] = self.losses.get(name, 0.0) + value
        self.updates += 1
        self.utterances += int(sum(float(b.weights.sum()) for b in batches))
        self.seconds += sum(float((b.num_samples * b.weights).sum()) for b in batches) / SAMPLE_RATE

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time spent in this context out of the rates."""
        began = time.perf_counter()
        yield
        self.started += time.perf_counter() - began

    def totals(self, world: World) -> dict[str, Any]:
        """Return means and rates over all ranks."""
        names = sorted(self.losses)
        values = [float(self.losses[name]) for name in names] + [self.utterances, self.seconds]
        summed = world.sum(torch.tensor(values, dtype=torch.float64)).tolist()
        elapsed = time.perf_counter() - self.started
        means = {f"loss_{name}": value / self.updates for name, value in zip(names, summed, strict=False)}
        return means | {
            "utterances_per_second": summed[-2] / elapsed,
            "audio_seconds_per_second": summed[-1] / elapsed,
        }


class Log:
    """Write metrics.jsonl and the progress line on the main rank; count and measure time on all ranks.

    Args:
        path: metrics.jsonl. Lines that an interrupted run wrote after its checkpoint are dropped.
        world: the ranks.
        progress: where the run stands.
        total: the updates of the run, for its bar.
        verbose: show reference beside hypothesis after each evaluation.
    """

    def __init__(self, path: Path, world: World, progress: Progress, *, total: int, verbose: bool) -> None:
        self.path, self.world, self.verbose = path, world, verbose
        self.evaluation: Evaluation | None = None  # the last one in this process
        self.left_out = 0  # updates that were left out, in a row
        if world.is_main and path.exists():
            lines = path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if step_of_line(line) <= progress.step]
            if progress.evaluation_due:
                kept = [s for s in kept if step_of_line(s) < progress.step or json.loads(s)["kind"] != "valid"]
            if kept != lines:
                with written(path), replace_file(path) as file:
                    file.write("".join(line + "\n" for line in kept))
        silent = not (world.is_main and sys.stderr.isatty())
        self.bar = tqdm(total=total, initial=progress.step, unit="update", disable=silent)
        self.meter = Meter()

    def count(self, result: UpdateResult, batches: Sequence[Batch]) -> None:
        """Count one update."""
        self.meter.add(result, batches)
        self.bar.update()

    def write(self, kind: str, entry: dict[str, Any], progress: Progress, *, epoch: int) -> None:
        """Write one line to the file and one to the screen."""
        if not self.world.is_main:
            return
        record = {"kind": kind, "step": progress.step, "epoch": epoch, "time": round(time.time(), 3)} | entry
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        with written(self.path) as path, path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite) + "\n")
        shown = "  ".join(f"{key} {short(value)}" for key, value in entry.items() if value is not None)
        say(self.world, f"{kind} epoch {epoch + 1} update {progress.step}  {shown}")

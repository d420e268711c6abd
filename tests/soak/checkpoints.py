"""The long forms of the tests of checkpoints: real kills inside saves, and random lives of a run's folder.

    python tests/soak/checkpoints.py --kills 200 --sequences 500 --seconds 600

Prints a line of JSON per part, with its figures; the exit status is 1 where anything was lost.
"""

import argparse
import errno
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from toy import toy_recognizer

from ser.errors import FileError
from ser.train.checkpoint import Progress, Run, checkpoints, newest_verified, save_checkpoint, step_of
from ser.train.runs import open_run

# ------------------------------------------------------------------------------- lives of a run's folder


class Stub:
    """A recognizer of one small file, whose disk may be full."""

    full = False

    def write_files(self, folder: Path, tensors: Any) -> None:
        (folder / "config.json").write_text("{}")
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")


@dataclass
class Life:
    """A run's folder through random events, and what must be there after each."""

    folder: Path
    keep: int
    model: Stub = field(default_factory=Stub)
    run: Run = field(init=False)
    progress: Progress = field(default_factory=Progress)
    last: int = 0  # the newest step that was saved and is sound; 0: none
    events: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.run = open_run(self.folder, {"epochs": 1}).run
        # Of somebody else: another run's checkpoint, and what is none.
        other = Run(self.folder, settings={"epochs": 2})
        save_checkpoint(other, self.model, {}, {}, Progress(step=0), keep=1)  # type: ignore[arg-type]
        (self.folder / "checkpoints" / "step-notes").mkdir()

    def save(self, draw: random.Random) -> None:
        self.progress.step += draw.randint(1, 3)
        if draw.random() < 0.4:
            self.progress.best_step = self.progress.step
        save_checkpoint(self.run, self.model, {}, {}, self.progress, keep=self.keep)  # type: ignore[arg-type]
        self.last = self.progress.step

    def fail(self, draw: random.Random) -> None:
        self.model.full = True
        try:
            self.save(draw)
        except FileError:
            pass
        else:
            raise AssertionError("a full disk went unnoticed")
        self.model.full = False
        self.resume(draw)  # a full disk ends a run

    def kill(self, draw: random.Random) -> None:
        """As a kill leaves it: part of a new folder, or part of one that was to be removed."""
        step = self.progress.step + draw.randint(0, 3)
        half = self.run.path(step).with_name(f".step-{step:08d}.{draw.choice(['new', 'gone'])}")
        half.mkdir(exist_ok=True)
        (half / "state.json").write_text('{"st')
        self.resume(draw)

    def damage(self, draw: random.Random) -> None:
        """The newest is damaged, where there is another."""
        sound = [p for p in checkpoints(self.folder) if 0 < step_of(p) < self.last]
        if not sound:
            return
        file = self.run.path(self.last) / draw.choice(["config.json", "state.json", "manifest.json"])
        file.write_bytes(file.read_bytes()[:-2])
        if self.progress.best_step == self.last:
            self.progress.best_step = 0
        self.last = step_of(sound[-1])
        self.resume(draw)

    def resume(self, draw: random.Random) -> None:
        opened = self.open(None)
        assert opened == (self.run.path(self.last) if self.last else self.run.path(0)), (opened, self.last)

    def go_back(self, draw: random.Random) -> None:
        own = [p for p in checkpoints(self.folder) if step_of(p)]
        if own:
            chosen = draw.choice(own)
            self.last = step_of(chosen)
            assert self.open(chosen.name) == chosen

    def open(self, named: str | None) -> Path:
        if not self.last:  # nothing of its own yet: only the other's is there, which is refused
            self.progress = Progress()
            return self.run.path(0)
        opened = open_run(self.folder, {"epochs": 1}, resume_from=named)
        assert opened.run.id == self.run.id and opened.checkpoint is not None
        self.progress = Progress(**json.loads((opened.checkpoint / "state.json").read_text()))
        if not self.run.path(self.progress.best_step).is_dir():  # removed when there was a better one
            self.progress.best_step = 0
        return opened.checkpoint

    def check(self) -> None:
        """What holds after each event."""
        there = {p.name for p in (self.folder / "checkpoints").iterdir() if not p.name.startswith("aside-")}
        own = sorted(p for p in checkpoints(self.folder) if step_of(p))
        if self.last:
            newest, skipped = newest_verified(self.folder)
            assert newest == self.run.path(self.last) and not skipped, (newest, skipped)
            best = self.run.path(self.progress.best_step)
            if self.progress.best_step:
                assert best in own, f"the best is gone: {best}"
            assert len(own) <= self.keep + 1, own
        assert {"step-00000000", "step-notes"} <= there, "another's was touched"
        if self.events[-1] == "save":
            assert not [name for name in there if name.startswith(".")], there


def live(folder: Path, seed: int) -> int:
    """One random life; returns the number of its events. AssertionError names the seed and the events."""
    draw = random.Random(seed)
    life = Life(folder, keep=draw.randint(1, 3))
    for _ in range(draw.randint(2, 9)):
        event = draw.choice(["save", "save", "save", "fail", "kill", "damage", "resume", "go_back"])
        life.events.append(event)
        try:
            getattr(life, event)(draw)
            life.check()
        except Exception as error:
            raise AssertionError(f"seed {seed}, {life.events}: {error!r}") from error
    return len(life.events)


# ------------------------------------------------------------------------------------ kills inside saves


def kill_randomly(folder: Path, kills: int, *, seed: int = 0, seconds: float = 1e9) -> dict[str, Any]:
    """Kill a process that does nothing but save, again and again; what it said was saved must be there."""
    draw = random.Random(seed)
    recognizer = toy_recognizer(hidden_size=64, intermediate_size=256, num_hidden_layers=4)
    weights = recognizer.model.state_dict()
    optimizer = {f"{kind}/{name}": torch.rand(w.shape) for name, w in weights.items() for kind in ("m", "v")}
    run = Run(folder)
    started = time.perf_counter()
    save_checkpoint(run, recognizer, weights, optimizer, Progress(step=1), keep=2)
    once = time.perf_counter() - started
    found = {"kills": 0, "inside_a_save": 0, "lost": 0, "remains_after_the_next_save": 0}
    step = 1
    while found["kills"] < kills and time.perf_counter() - started < seconds:
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            try:
                for number in range(step + 1, step + 1000):
                    save_checkpoint(run, recognizer, weights, optimizer, Progress(step=number), keep=2)
                    os.write(writer, number.to_bytes(8, "little"))
            finally:
                os._exit(1)
        os.close(writer)
        time.sleep(draw.uniform(0, 4 * once))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with os.fdopen(reader, "rb") as pipe:
            said = pipe.read()
        acknowledged = int.from_bytes(said[-8:], "little") if said else step
        newest, _ = newest_verified(folder)
        found["kills"] += 1
        found["inside_a_save"] += any(p.name.startswith(".") for p in (folder / "checkpoints").iterdir())
        found["lost"] += newest is None or step_of(newest) < acknowledged
        step = max(acknowledged, 0 if newest is None else step_of(newest)) + 1
        save_checkpoint(run, recognizer, weights, optimizer, Progress(step=step), keep=2)
        found["remains_after_the_next_save"] += any(
            p.name.startswith(".") for p in (folder / "checkpoints").iterdir()
        )
    return found | {"seconds": round(time.perf_counter() - started, 1), "seconds_per_save": round(once, 3)}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--kills", type=int, default=200, help="inside a save (default: 200)")
    parser.add_argument("--sequences", type=int, default=500, help="of events in a run's folder (default: 500)")
    parser.add_argument("--seconds", type=float, default=600.0, help="time limit of each part (default: 600)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random (default: 0)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        killed = kill_randomly(
            Path(temporary) / "run", arguments.kills, seed=arguments.seed, seconds=arguments.seconds
        )
        print(json.dumps({"part": "kills inside a save", **killed}), flush=True)
        started, events, sequences, failures = time.perf_counter(), 0, 0, []
        while sequences < arguments.sequences and time.perf_counter() - started < arguments.seconds:
            folder = Path(temporary) / "life"
            try:
                events += live(folder, arguments.seed + sequences)
            except AssertionError as error:
                failures.append(str(error))
            shutil.rmtree(folder, ignore_errors=True)
            sequences += 1
        lived = {"sequences": sequences, "events": events, "failed": len(failures), "failures": failures[:3]}
        lived["seconds"] = round(time.perf_counter() - started, 1)
        print(json.dumps({"part": "rotation", **lived}), flush=True)
    whole = killed["kills"] == arguments.kills and sequences == arguments.sequences
    return int(bool(killed["lost"] or killed["remains_after_the_next_save"] or failures or not whole))


if __name__ == "__main__":
    sys.exit(main())

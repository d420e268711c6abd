"""Handle recordings that cannot be read, in the same way on all ranks.

The loader returns such a recording as an utterance of weight 0 without labels, at its place in the plan
(`ser.data.dataset`). So the plan stays a function of lengths, seed, epoch and effective batch. The gradient is
that of the update without the utterance, since counts are summed over ranks before the first backward pass. Once
per update the ranks exchange which recordings failed. Then all continue, or all stop with one message.

The plan needs a length even if the header cannot be read. It takes the length that the recording had when the run
began (``lengths.json``), or else that of one frame. So a file that is damaged between two starts of a run does not
change the order. A recording that was skipped is tried again in the next epoch.

    runs/NAME/lengths.json    samples at 16 kHz of every recording, when the run began
    runs/NAME/skipped.jsonl   a line per recording that was left out: its set, id, file and reason
"""

import json
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ser.data.dataset import Batch, SpeechDataset
from ser.errors import AudioError, FileError, indented, printable
from ser.files import replace_file, written
from ser.train.distributed import World


def to_line(row: dict[str, Any]) -> str:
    """Return a row as a line of a JSON lines file."""
    return json.dumps(row, ensure_ascii=False) + "\n"


def append(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Append rows to a JSON lines file."""
    with written(path), path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(map(to_line, rows))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a JSON lines file, except lines that a kill cut short; none if there is no file."""
    rows = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict):
                    rows.append(row)
    return rows


class BadAudio:
    """Hold the recordings of each set ("train", "valid") that could not be read, the same on all ranks.

    Args:
        world: the ranks that have to agree.
        policy: "fail" (the first one ends the run) or "skip".
        limit: the largest share of a set, 0 to 1, that may be skipped.
        run: the run's folder; None: nothing is written.
    """

    def __init__(self, world: World, *, policy: str = "fail", limit: float = 0.0, run: Path | None = None) -> None:
        self.world, self.policy, self.limit, self.run = world, policy, limit, run
        self.skipped: dict[str, dict[str, str]] = {"train": {}, "valid": {}}  # set -> id -> why
        self.rows: list[dict[str, Any]] = []  # what this start of the run writes to skipped.jsonl
        self.begun = False

    def agree(self, name: str, dataset: SpeechDataset, errors: dict[int, str]) -> dict[int, str]:
        """Tell every rank which recordings any rank could not read (position -> reason). All ranks call this.

        Raises AudioError on all ranks where the policy ends the run.
        """
        if not int(self.world.sum(torch.tensor([len(errors)]))):
            return {}
        found = {i: why for part in self.world.gather(errors) for i, why in part.items()}
        advice = " or leave them out with --on-bad-audio skip" if self.run is not None else ""
        if self.policy == "fail":
            raise AudioError(
                f"{len(found)} of {len(dataset)} recordings cannot be used; mend or remove them{advice}:"
                f"{indented(found.values())}"
            )
        skipped = self.skipped[name]
        new = [i for i in sorted(found) if dataset.utterances[i].id not in skipped]
        for i in new:
            utterance = dataset.utterances[i]
            skipped[utterance.id] = found[i]
            self.rows.append({"set": name, "id": utterance.id, "file": str(utterance.file), "why": found[i]})
            if self.world.is_main:
                count = f"{name}, {len(skipped)} of {len(dataset)}"
                tqdm.write(f"skipped ({count}): {printable(found[i])}", file=sys.stderr)
        if new and self.begun:
            self.write(lambda run: append(run / "skipped.jsonl", self.rows[-len(new) :]))
        if len(skipped) > self.limit * len(dataset) or len(skipped) == len(dataset):
            raise AudioError(
                f"{len(skipped)} of {len(dataset)} recordings of {name} cannot be used; "
                f"--max-bad-audio {self.limit:g} allows {100 * self.limit:g} %:{indented(skipped.values())}"
            )
        return found

    def read_lengths(self, name: str, dataset: SpeechDataset, *, least: int, anew: bool = False) -> None:
        """Set the dataset's lengths from the headers of the files; each rank reads a share of them.

        ``least`` is the length, in samples, that a recording gets if its header cannot be read now and could not
        when the run began. ``anew`` says that lengths of an earlier run in this folder are not used.
        """
        found, errors = dataset.read_headers(range(self.world.rank, len(dataset), self.world.size))
        lengths = {i: n for part in self.world.gather(found) for i, n in part.items()}
        if len(lengths) < len(dataset):
            before = self.world.gather([] if anew else self.recorded_lengths(name, len(dataset)))[0]
            lengths = {i: before[i] for i in range(len(dataset)) if before} | lengths
        dataset.lengths = [lengths.get(i, least) for i in range(len(dataset))]
        self.agree(name, dataset, errors)

    def recorded_lengths(self, name: str, count: int) -> list[int]:
        """Read the lengths that the run began with; none if they are not of ``count`` recordings."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            if self.run is not None:
                lengths = json.loads((self.run / "lengths.json").read_text(encoding="utf-8"))[name]
                if len(lengths) == count and all(type(n) is int and n > 0 for n in lengths):
                    return lengths
        return []

    def begin(self, lengths: dict[str, list[int]], datasets: dict[str, SpeechDataset]) -> None:
        """Record the lengths of a new run, and try again the recordings that its last start skipped.

        The folder is locked by now. A recording that can be read again is removed from skipped.jsonl.
        """
        assert self.run is not None
        path = self.run / "skipped.jsonl"
        rows = read_rows(path) if self.world.is_main else []
        before = {(row.get("set"), row.get("id")) for row in self.world.gather(rows)[0]}
        for name, dataset in datasets.items():
            known = self.skipped[name]
            again = [i for i, u in enumerate(dataset.utterances) if (name, u.id) in before and u.id not in known]
            tried = ((i, dataset[i].error) for i in again[self.world.rank :: self.world.size])
            self.agree(name, dataset, {i: why for i, why in tried if why})
        self.begun = True

        def note(run: Path) -> None:
            if not (run / "lengths.json").exists():
                with written(run / "lengths.json") as new, replace_file(new) as file:
                    file.write(json.dumps(lengths))
            if self.rows or path.exists():
                with written(path), replace_file(path) as file:
                    file.writelines(map(to_line, self.rows))

        self.write(note)

    def write(self, work: Callable[[Path], None]) -> None:
        """Let the main rank write into the run's folder; its FileError is raised on every rank."""
        failure: FileError | None = None
        if self.world.is_main and self.run is not None:
            try:
                work(self.run)
            except FileError as error:
                failure = error
        if (told := self.world.gather(failure)[0]) is not None:
            raise told


def errors_of(batches: Iterable[Batch]) -> dict[int, str]:
    """Collect the errors of batches: position in the dataset -> why the recording could not be read."""
    return {i: why for batch in batches for i, why in batch.errors.items()}

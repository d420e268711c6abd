"""One process of a training run that tests kill: examples/train_iemocap.py, with what it did written down.

    RECORD  folder for a line per update: attempt, step, rank, the utterances, their weights and what was heard
    FAULT   RANK:STEP:KIND, once, before that update: "error" (a SerError), "bug", "hang", or a signal's name

Run by path, or through `main`, a function that needs no new interpreter.
"""

import hashlib
import json
import os
import runpy
import signal
import sys
import time
from pathlib import Path

import ser.train.loop as loop
from ser.errors import AudioError

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "train_iemocap.py"
UPDATE = loop.run_update


def heard(batch):
    """The number, place and weight of each utterance of a batch, and the digest of its waveform."""
    waveforms = [x[:n].numpy().tobytes() for x, n in zip(batch.waveforms, batch.num_samples, strict=True)]
    digests = [hashlib.sha256(bits).hexdigest()[:16] for bits in waveforms]
    return [list(item) for item in zip(batch.indices, batch.places, batch.weights.tolist(), digests, strict=True)]


def recorded(learner, batches, progress, **options):
    """`run_update`, with its fault before and its record after."""
    world, step = learner.world, progress.step
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    fault = os.environ.get("FAULT", "::").split(":")
    if attempt == 0 and fault[:2] == [str(world.rank), str(step)]:
        inflict(fault[2])
    time.sleep(float(os.environ.get("PACE", "0")))
    result = UPDATE(learner, batches, progress, **options)
    items = [item for batch in batches for item in heard(batch)]
    line = {"attempt": attempt, "step": step, "rank": world.rank, "items": items, "pid": os.getpid()}
    with Path(os.environ["RECORD"], f"rank{world.rank}.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    return result


def inflict(kind: str) -> None:
    if kind == "error":
        raise AudioError("broken.wav: cannot be decoded")
    if kind == "bug":
        raise ZeroDivisionError("a defect on one rank")
    if kind == "hang":
        time.sleep(1000)
    os.kill(os.getpid(), getattr(signal, kind))


def main(*arguments: str) -> None:
    loop.run_update = recorded
    sys.argv = [str(SCRIPT), *arguments]
    runpy.run_path(str(SCRIPT), run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])

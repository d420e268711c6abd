"""kill -9 of a random worker under `torchrun --max-restarts`, many times over one run on two processes.

    python tests/soak/processes.py --kills 100 --seconds 3600

The run must end with the weights, the optimizer and the utterances of one that nothing happened to, after as many
restarts as kills. Prints a line of JSON with the figures; the exit status is 1 where anything differs.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_processes import Run, kill_at_random, same_utterances
from toy import toy_recognizer, write_corpus

from ser.train.checkpoint import checkpoints


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors") | load_file(folder / "optimizer.safetensors")


def soak(folder: Path, kills: int, seconds: float, seed: int) -> dict[str, object]:
    """Figures of one run with kills, and whether it equals the one without."""
    write_corpus(folder, 16)
    toy_recognizer().save(folder / "init")
    epochs = 6 + kills * 3 // 2  # of four updates; a kill comes within four and 0.2 s
    settings = ["--epochs", str(epochs), "--log-every", "50", "--keep", "2"]
    started = time.monotonic()
    with Run(folder, folder / "whole", *settings, "--save-every", f"{epochs}ep") as whole:
        if whole.process.wait(seconds + 600):
            raise RuntimeError(whole.said())
    generator, made, slowest = random.Random(seed), 0, 0.0
    with Run(
        folder, folder / "run", *settings, "--save-every", "2", torchrun=True, restarts=kills, PACE="0.1"
    ) as run:
        while made < kills and time.monotonic() - started < seconds:
            kill_at_random(run, generator, attempt=made)
            killed, made = time.monotonic(), made + 1
            run.await_update(0, attempt=made)
            slowest = max(slowest, time.monotonic() - killed)
        status = run.end()
        restarts = len({line["attempt"] for line in run.lines(0)}) - 1
        last = [checkpoints(path)[-1] for path in (whole.out, run.out)]
        first, second = map(tensors, last) if status == 0 else ({}, {"no": torch.zeros(0)})
        return {
            "part": "kill -9 of a random worker under torchrun --max-restarts",
            "kills": made,
            "asked": kills,
            "restarts": restarts,
            "weights and optimizer": "bit-identical"
            if first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)
            else "DIFFERENT",
            "utterances": "the same" if same_utterances(run, whole) else "DIFFERENT",
            "updates": 4 * epochs,
            "longest from kill to next update (s)": round(slowest, 1),
            "seconds": round(time.monotonic() - started),
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="(default: 100)")
    parser.add_argument(
        "--seconds", type=float, default=3600, help="kill no more after these many (default: 3600)"
    )
    parser.add_argument("--seed", type=int, default=1, help="of moments and ranks (default: 1)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = soak(Path(folder), arguments.kills, arguments.seconds, arguments.seed)
    print(json.dumps(found))
    return int("DIFFERENT" in found.values() or found["restarts"] != found["kills"])


if __name__ == "__main__":
    sys.exit(main())

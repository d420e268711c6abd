"""Two training processes beside one: gloo, a thread each, the same effective batch.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --turns 48 --repeats 3
    python benchmarks/scaling.py --turns 48 --repeats 3 --device cuda    # needs two GPUs

Both are started by torchrun and train by `ser.train.loop.fit`, so both compute the same updates. The third epoch
is timed: in the second the memory that is kept still grows, and pages that a virtual machine has not had from its
host before cost seconds. On two GPUs gradients go through nccl: expect the exchange of 360 MB per update to be
hidden behind the backward pass where NVLink joins them, and not where PCIe does.
"""

from __future__ import annotations

from typing import Any

import common
from common import Bar, Row
from training import train

WORK = {"feature-encoder": "frozen", "none": "nothing frozen"}


def make_rows(shape: str, parts: list[str]) -> list[Row]:
    """One and two processes, for each part that is frozen."""
    rows = []
    for freeze in parts:
        work = WORK[freeze]
        for count in (1, 2):
            name = f"{work}, {count} process{'es' if count > 1 else ''}"
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
            values: dict[str, Any] = {"shape": shape, "freeze": freeze}
            rows.append(Row(name, "ours", work, "train", values | {"launcher": launcher, "threads": 1}))
    return rows


def main() -> None:
    """Measure, print, write."""
    common.serve({"prepare": common.prepare, "ceiling": common.ceiling, "train": train})
    arguments = common.parse(__doc__ or "")
    arguments.dtypes, arguments.threads = ["float32"], 1
    rows = make_rows(
        arguments.shape, ["none", "feature-encoder"] if common.all_rows(arguments) else ["feature-encoder"]
    )
    bars = [
        Bar(f"two processes beside one, {work}", 1.8, [f"{work}, 2 processes"], [f"{work}, 1 process"])
        for work in WORK.values()
    ]
    common.run("scaling", arguments, rows, bars)


if __name__ == "__main__":
    main()

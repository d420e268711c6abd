"""One training epoch beside `transformers`: time, memory, and the share of what the machine can do.

    python benchmarks/training.py                            # 8 turns, once: minutes
    python benchmarks/training.py --turns 48 --repeats 3     # what docs/performance.md shows
    python benchmarks/training.py --turns 48 --repeats 3 --device cuda

Ours is `ser.train.loop.fit`, files included, of which the third epoch is timed by its own log (the first one
warms up, and fills a cache where there is one; in the second the memory that is kept still grows). Theirs is in
`rival.py`: in the paper's settings, and at its best, which is the fastest of several rows. Effective batch 8,
AdamW, clipping, dropout 0.1 everywhere, SpecAugment, no LayerDrop.

On a GPU an epoch of 48 turns takes seconds, and little of it is arithmetic: expect the ratios between ours and
theirs at its best to be smaller than on a CPU, bf16 to be the fastest on both sides, and the cache to give more,
since the first convolutions are bound by memory. Memory is then that of the GPU (`max_memory_allocated`).
"""

from __future__ import annotations

import json
import math
import shutil
import time
from dataclasses import fields
from pathlib import Path
from statistics import median
from typing import Any

import common
from common import ALPHA, EFFECTIVE_BATCH, EMOTIONS, SAMPLE_RATE, Bar, Row

CACHE: dict[str, Any] = {"cache": "features"}  # a folder beside the run
# How much goes through the model at once: on a CPU what `TrainConfig` chooses, on a GPU all of an update.
PASS: dict[str, dict[str, Any]] = {"cpu": {}, "cuda": {"micro_seconds": 0.0}}


def train(
    *,
    folder: str,
    shape: str,
    threads: int,
    device: str,
    repeat: int,
    dtype: str = "float32",
    freeze: str = "none",
    epochs: int = 3,
    **settings: Any,
) -> dict[str, Any] | None:
    """Some epochs of `fit`; the figures of the last. Under torchrun the first rank alone gives them."""
    import torch

    from ser.data.manifest import read_manifest
    from ser.data.text import Vocabulary
    from ser.recognizer import Recognizer
    from ser.train.config import TrainConfig
    from ser.train.distributed import joined_world
    from ser.train.loop import fit

    torch.set_num_threads(threads)
    run = Path(folder) / "run"
    if "cache" in settings:
        settings["cache"] = str(Path(folder) / settings["cache"])
    config = TrainConfig(
        alpha=ALPHA,
        freeze=freeze,
        epochs=epochs,
        effective_batch=EFFECTIVE_BATCH,
        amp={"float32": "off", "bfloat16": "bf16"}[dtype],
        device=device,
        seed=repeat,
        log_every=1,
        save_every="1000000",
        **(PASS[device.partition(":")[0]] | settings),
    )
    with joined_world(device) as world:
        turns = read_manifest(Path(folder) / str(SAMPLE_RATE) / "train.csv")
        model, vocabulary = Path(folder) / shape, Vocabulary.librispeech()
        recognizer, _ = Recognizer.create(model, emotions=EMOTIONS, vocabulary=vocabulary)
        lengths = recognizer.dataset(turns).lengths
        started = time.time()
        fit(recognizer, turns, [], config, run, world=world, overwrite=True)
    if not world.is_main:
        return None
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(run)
    if "cache" in settings:
        shutil.rmtree(settings["cache"])  # so that each repeat fills one
    # A line is written after every update; nothing but training happens between the last ones of two epochs.
    ends = [[e for e in entries if e["epoch"] == epoch][-1] for epoch in range(epochs)]
    first, before, last = ends[0], ends[-2], ends[-1]
    cached = "cache" in settings
    flop = common.training_flop(common.shape_config(shape), lengths, frozen=freeze != "none", cached=cached)
    padded = sum(lengths) / SAMPLE_RATE / (1 - last["padding"])
    found = common.figures(
        last["time"] - before["time"], lengths, device=device, dtype=dtype, flop=flop, padded_seconds=padded
    )
    return found | {
        "peak_gib": last["memory_gib"],  # before anything is saved, which the rival does not
        "first_seconds": first["time"] - started,  # to the end of the first epoch: a cache is filled meanwhile
    }


def decode(*, folder: str, threads: int, device: str, repeat: int, rate: int) -> dict[str, Any]:
    """Reading, resampling and normalising all turns, as an epoch does; the median of three passes after one."""
    import torch

    from ser.audio import load_audio, normalise

    torch.set_num_threads(threads)
    files = sorted((Path(folder) / str(rate)).glob("*.wav"))
    took, audio = [], 0.0
    for _ in range(4):
        started = time.perf_counter()
        audio = sum(len(normalise(load_audio(file))) for file in files) / SAMPLE_RATE
        took.append(time.perf_counter() - started)
    return {"seconds": median(took[1:]), "per_audio_second": median(took[1:]) / audio}


def theirs(**values: Any) -> dict[str, Any]:
    """An epoch of the rival."""
    import rival

    return rival.train(**values)


def check(**values: Any) -> dict[str, Any]:
    """How far the two sides are apart."""
    import rival

    return rival.check(**values)


RATES = (SAMPLE_RATE, 44_100)
PAPER = {"batch": 2, "order": "random", "dtype": "float32", "paper": True}


def make_rows(shape: str, dtypes: list[str], device: str, *, whole: bool) -> list[Row]:
    """Every row; without ``whole`` of the rival's best the likely one alone."""
    # Dropout takes torch's fused attention off its fast path on a CPU, where it is faster written out.
    likely = (4, "eager" if device == "cpu" else "sdpa")
    best = [(4, "sdpa"), (4, "eager"), (8, "sdpa")] if whole else [likely]
    rows = [
        Row("transformers, paper's settings", "paper", "nothing frozen", "theirs", {"freeze": False, **PAPER}),
        Row("transformers, paper's settings, frozen", "paper", "frozen", "theirs", {"freeze": True, **PAPER}),
    ]
    for frozen in (True, False):
        work = "frozen" if frozen else "nothing frozen"
        for dtype in dtypes:
            for batch, attention in best:
                name = f"transformers, {dtype}, sorted by {batch}, {attention}, {work}"
                values = {"freeze": frozen, "batch": batch, "order": "sorted", "attention": attention}
                rows.append(Row(name, "best", work, "theirs", {"dtype": dtype, **values}))
        for dtype in dtypes:
            values = {"dtype": dtype, "freeze": "feature-encoder" if frozen else "none"}
            rows.append(Row(f"ser, {dtype}, {work}", "ours", work, "train", values))
            if frozen:
                rows.append(Row(f"ser, {dtype}, cached", "ours", work, "train", values | CACHE, no_cache()))
    for row in rows:
        row.values["shape"] = shape
    for freeze in ("feature-encoder", "none"):
        work = "small, frozen" if freeze != "none" else "small, nothing frozen"
        small = {"shape": "small", "freeze": freeze}
        rows.append(Row(f"ser, {work}", "ours", work, "train", small))
        if freeze != "none":
            rows.append(Row(f"ser, {work}, cached", "ours", work, "train", small | CACHE, no_cache()))
    rows += [Row(f"decoding at {rate} Hz", "ours", "decoding", "decode", {"rate": rate}) for rate in RATES]
    return rows


def no_cache() -> str:
    """Why rows with a cache of features cannot be measured; empty where they can."""
    from ser.train.config import TrainConfig

    there = {f.name for f in fields(TrainConfig)}
    return "" if CACHE.keys() <= there else "this version has no cache of features"


def make_bars(rows: list[Row]) -> list[Bar]:
    """What issue and page ask for."""

    def names(side: str, work: str) -> list[str]:
        return [row.name for row in rows if row.side == side and row.work == work]

    paper, best = names("paper", "nothing frozen"), names("best", "frozen")
    ours, unfrozen = names("ours", "frozen"), names("ours", "nothing frozen")
    return [
        Bar("epoch, frozen, beside the paper's settings", 6, ours, paper),
        Bar("the same, its feature encoder frozen too", None, ours, names("paper", "frozen")),
        Bar("epoch, frozen, beside the best", 2, ours, best),
        Bar("epoch, nothing frozen, beside the best", 1.4, unfrozen, names("best", "nothing frozen")),
        Bar("peak memory, frozen, beside the best", 2, ours, best, "peak_gib"),
    ]


def further(rows: list[Row]) -> dict[str, Any]:
    """When a cache has paid for itself, and the share of decoding."""
    by_name = {row.name: row for row in rows if row.median() is not None}
    found: dict[str, Any] = {}
    for name, row in by_name.items():
        plain = by_name.get(name.removesuffix(", cached") if "small" in name else
                            name.replace("cached", "frozen"))  # fmt: skip
        if not name.endswith("cached") or plain is None:
            continue
        # What comes before the first epoch, and its own warming up, are those of the row without a cache.
        before = (plain.median("first_seconds") or 0) - (plain.median() or 0)
        filling = (row.median("first_seconds") or 0) - (row.median() or 0) - before
        saved = (plain.median() or 0) - (row.median() or 0)
        epoch = max(1, math.ceil(filling / saved)) if saved > 0 else 0
        when = f"has paid for itself in epoch {epoch}" if epoch else "never pays for itself"
        found[name] = f"filling takes {filling:.2f} s, an epoch {saved:.2f} s less; it {when}"
    for rate in RATES:
        reading = by_name.get(f"decoding at {rate} Hz")
        for row in by_name.values():
            if reading is not None and row.side == "ours" and row.function == "train":
                share = (reading.median() or 0) / (row.median() or 1)
                found[f"decoding at {rate} Hz, share of an epoch of {row.name}"] = f"{share:.2%}"
    return found


def main() -> None:
    """Measure, print, write."""
    common.serve({"prepare": common.prepare, "ceiling": common.ceiling, "check": check, "train": train,
                  "theirs": theirs, "decode": decode})  # fmt: skip
    arguments = common.parse(__doc__ or "")
    rows = make_rows(arguments.shape, arguments.dtypes, arguments.device, whole=common.all_rows(arguments))
    common.run("training", arguments, rows, make_bars(rows), rates=RATES, check="check", extra=further)


if __name__ == "__main__":
    main()

"""Recognition beside `transformers`: recordings per second, and one long recording in windows.

    python benchmarks/inference.py                            # 8 turns, once; a recording of 1 and 2 minutes
    python benchmarks/inference.py --turns 48 --repeats 3     # and of 5, 15 and 60 minutes
    python benchmarks/inference.py --turns 48 --repeats 3 --device cuda

Ours is `Recognizer.predict` on arrays, inside of `freed_memory_kept`, as the commands call it; theirs is in
`rival.py`. Both go from samples to probabilities and transcripts. On a GPU 48 turns are a handful of batches:
expect the start of kernels and the copies to weigh as much as the arithmetic, and bf16 to be the fastest on both
sides.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import common
import numpy as np
from common import SAMPLE_RATE, Bar, Row


def predict(*, folder: str, shape: str, threads: int, device: str, repeat: int, dtype: str) -> dict[str, Any]:
    """All turns by one call of `Recognizer.predict`, in random order, after a warm-up with the shortest."""
    import torch

    from ser.audio import load_audio
    from ser.device import freed_memory_kept
    from ser.recognizer import Recognizer

    torch.set_num_threads(threads)
    precision = {"float32": "float32", "bfloat16": "bf16"}[dtype]
    recognizer = Recognizer.load(Path(folder) / shape, device=device, precision=precision)
    turns = [load_audio(file).numpy() for file in sorted((Path(folder) / str(SAMPLE_RATE)).glob("*.wav"))]
    np.random.default_rng(repeat).shuffle(turns)
    lengths = [len(turn) for turn in turns]
    recognizer.predict(min(turns, key=len), SAMPLE_RATE)
    with freed_memory_kept(recognizer.device), common.timed(device) as seconds:
        recognizer.predict(turns, SAMPLE_RATE)
    flop = sum(sum(common.forward_flop(recognizer.model.config, n)) for n in lengths)
    real = sum(lengths) / SAMPLE_RATE
    found = common.figures(seconds[0], lengths, device=device, dtype=dtype, flop=flop, padded_seconds=real)
    return found | {"padding": None, "per_second": len(turns) / seconds[0]}


def windows(
    *, folder: str, shape: str, threads: int, device: str, repeat: int, minutes: float, **options: Any
) -> dict[str, Any]:
    """One recording of noise to its windows, in the device's own precision; the peak is of the whole process."""
    import soundfile
    import torch

    from ser.device import freed_memory_kept
    from ser.recognizer import Recognizer

    torch.set_num_threads(threads)
    file, generator = Path(folder) / f"{minutes:g} minutes.wav", np.random.default_rng(repeat)
    with soundfile.SoundFile(file, "w", SAMPLE_RATE, 1) as recording:
        for _ in range(round(minutes * 60)):
            recording.write(0.1 * generator.standard_normal(SAMPLE_RATE))
    recognizer: Any = Recognizer.load(Path(folder) / shape, device=device, precision="auto")
    with freed_memory_kept(recognizer.device), common.timed(device) as seconds:
        count = sum(1 for _ in recognizer.predict_windows(file, **options))
    file.unlink()
    audio = minutes * 60
    return {
        "seconds": seconds[0],
        "per_audio_second": seconds[0] / audio,
        "peak_gib": common.peak_gib(device),
        "windows": count,
    }


def theirs(**values: Any) -> dict[str, Any]:
    """The same turns recognised by the rival."""
    import rival

    return rival.infer(**values)


def check(**values: Any) -> dict[str, Any]:
    """How far the two sides are apart."""
    import rival

    return rival.check(**values)


def make_rows(shape: str, dtypes: list[str], *, whole: bool) -> list[Row]:
    """Every row; without ``whole`` of the rival's best the likely one alone, and short recordings."""
    best = [(4, "sdpa"), (4, "eager"), (8, "sdpa")] if whole else [(4, "sdpa")]
    minutes = [5, 15, 60] if whole else [1, 2]
    rows = [Row(f"ser, {dtype}", "ours", "turns", "predict", {"dtype": dtype}) for dtype in dtypes]
    plain = {"batch": 8, "order": "random", "dtype": "float32"}
    rows.append(Row("transformers, float32, by 8 in random order", "paper", "turns", "theirs", plain))
    for dtype in dtypes:
        for batch, attention in best:
            name = f"transformers, {dtype}, sorted by {batch}, {attention}"
            values = {"batch": batch, "order": "sorted", "dtype": dtype, "attention": attention}
            rows.append(Row(name, "best", "turns", "theirs", values))
    rows += [
        Row(f"ser, {m:g} minutes", "ours", "windows", "windows", {"minutes": m}, no_windows()) for m in minutes
    ]
    for row in rows:
        row.values["shape"] = shape
    return rows


def no_windows() -> str:
    """Why a long recording cannot be measured; empty where it can."""
    from ser.recognizer import Recognizer

    return "" if hasattr(Recognizer, "predict_windows") else "this version has no windows"


def further(rows: list[Row]) -> dict[str, Any]:
    """How time and memory grow with the length of a recording: 1 is linear, 0 is not at all."""
    there = [row for row in rows if row.work == "windows" and row.median() is not None]
    if len(there) < 2:
        return {}

    def power(key: str) -> str:
        minutes, values = np.log([[row.values["minutes"], row.median(key) or np.nan] for row in there]).T
        return f"{np.polyfit(minutes, values, 1)[0]:.2f}"

    return {
        "time grows with the length to the power of": power("seconds"),
        "peak memory grows with the length to the power of": power("peak_gib"),
    }


def main() -> None:
    """Measure, print, write."""
    common.serve({"prepare": common.prepare, "ceiling": common.ceiling, "check": check, "predict": predict,
                  "theirs": theirs, "windows": windows})  # fmt: skip
    arguments = common.parse(__doc__ or "")
    rows = make_rows(arguments.shape, arguments.dtypes, whole=common.all_rows(arguments))
    ours, paper, best = (
        [r.name for r in rows if (r.side, r.work) == (side, "turns")] for side in ("ours", "paper", "best")
    )
    bars = [
        Bar("recordings per second, beside float32 in random order", 4, ours, paper),
        Bar("recordings per second, beside the best", 1.25, ours, best),
    ]
    common.run("inference", arguments, rows, bars, check="check", extra=further)


if __name__ == "__main__":
    main()

"""What the benchmarks share: turns of real lengths, one model for both sides, measuring in processes, tables.

A benchmark is a list of rows. Each row is measured by a process of its own, so that its peak memory is its own,
and the rows take turns over the repeats, so that whatever disturbs the machine disturbs all of them. The figure of
a row is its median. Two things are prepared once and used by every row of both sides: a model folder with random
weights, and recordings of noise with the lengths of IEMOCAP's turns (`seconds.txt`: sorted, nothing else of it).

The share of the ceiling is the arithmetic that the turns need without padding (`training_flop`), divided by the
time and by the rate at which this machine multiplies large matrices in the row's dtype, taken in the same rounds.

    python benchmarks/common.py runs/benchmarks/*.json --write docs/performance.md
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SEED = 59  # one whose 8 and whose 48 turns have the mean and the spread of the corpus to 3 %
SAMPLE_RATE = 16_000
EMOTIONS = ["ang", "hap", "neu", "sad"]
ALPHA = 0.1  # weight of the CTC loss
EFFECTIVE_BATCH = 8
CHARACTERS_PER_SECOND = 12  # of a transcript, as people speak
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"


# ------------------------------------------------------------------------------------------------ the turns


def draw_seconds(count: int, seed: int = SEED) -> list[float]:
    """``count`` lengths in seconds, ascending: one drawn from each of so many equal parts of the sorted corpus.

    So a few turns have nearly the corpus's mean and spread, where a plain draw of 8 may hold one of 30 s or none.
    """
    lengths = np.loadtxt(HERE / "seconds.txt")
    bounds = np.arange(count + 1) * len(lengths) // count
    generator = np.random.default_rng([seed, count])
    return lengths[generator.integers(bounds[:-1], bounds[1:])].tolist()


def prepare(folder: str, *, seconds: Sequence[float], shape: str, rates: Sequence[int] = (SAMPLE_RATE,)) -> None:
    """Write the model folders ``SHAPE`` and ``small``, and per rate a folder of recordings with a manifest."""
    import csv

    import soundfile
    import torch

    from ser.data.text import Vocabulary
    from ser.models.multitask import HeadsConfig, MultiTaskModel
    from ser.recognizer import Recognizer

    vocabulary = Vocabulary.librispeech()
    for name in {shape, "small"}:
        torch.manual_seed(SEED)
        model = MultiTaskModel(shape_config(name), HeadsConfig(len(EMOTIONS), len(vocabulary)))
        Recognizer(model, emotions=EMOTIONS, vocabulary=vocabulary).save(Path(folder) / name)
    for rate in rates:
        generator = np.random.default_rng(SEED)
        turns = Path(folder) / str(rate)
        turns.mkdir()
        with (turns / "train.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["file", "emotion", "text"])
            for number, length in enumerate(seconds):
                letters = generator.choice(list("ABCDEFGHIJ "), int(CHARACTERS_PER_SECOND * length))
                noise = 0.1 * generator.standard_normal(int(rate * length))
                soundfile.write(turns / f"{number}.wav", noise, rate)
                table.writerow([f"{number}.wav", EMOTIONS[number % len(EMOTIONS)], "".join(letters)])


def shape_config(shape: str) -> Any:
    """The encoder's configuration: base without LayerDrop (it leaves work out), small as it is, tiny for tests."""
    from dataclasses import replace

    from ser.models.config import Wav2Vec2Config

    tiny: dict[str, Any] = {
        "conv_dim": (16,) * 7,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4,
    }
    if shape == "small":
        return Wav2Vec2Config.named(shape)
    base = replace(Wav2Vec2Config.named("base"), layerdrop=0.0)
    return replace(base, **tiny) if shape == "tiny" else base


# ----------------------------------------------------------------------------------------- arithmetic and memory


def forward_flop(config: Any, num_samples: int, vocab_size: int = 32) -> tuple[float, float, float]:
    """What one turn's forward pass computes: the first convolution, the others, all that follows.

    In floating-point operations: those of matrix products and convolutions, a multiplication and an addition
    each. The rest is below 1 %.
    """
    frames, channels, convolutions = num_samples, 1, []
    for width, kernel, stride in zip(config.conv_dim, config.conv_kernel, config.conv_stride, strict=True):
        frames = (frames - kernel) // stride + 1
        convolutions.append(2.0 * frames * width * channels * kernel)
        channels = width
    d, f = config.hidden_size, config.intermediate_size
    kernel, groups = config.num_conv_pos_embeddings, config.num_conv_pos_embedding_groups
    positions = 2.0 * frames * d * (d // groups) * kernel
    layer = 8.0 * frames * d * d + 4.0 * frames * frames * d + 4.0 * frames * d * f
    ends = 2.0 * frames * d * (channels + vocab_size)
    return convolutions[0], sum(convolutions[1:]), positions + config.num_hidden_layers * layer + ends


def training_flop(config: Any, lengths: Sequence[int], *, frozen: bool, cached: bool = False) -> float:
    """Of one epoch, unpadded: the backward pass of what is trained costs twice its forward pass.

    But for the first convolution, whose input needs no gradient.
    """
    weights = (0, 0, 3) if cached else (1, 1, 3) if frozen else (2, 3, 3)
    return float(sum(np.dot(weights, forward_flop(config, num_samples)) for num_samples in lengths))


def ceiling(*, dtype: str, threads: int, device: str) -> dict[str, float]:
    """Operations per second of large matrix products: the best of a second's worth."""
    import torch

    torch.set_num_threads(threads)
    size = 8192 if device.startswith("cuda") else 2048
    a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
    best, started = float("inf"), time.perf_counter()
    while time.perf_counter() < started + 1.5:
        with timed(device) as seconds:
            a @ b
        best = min(best, seconds[0])
    return {"flop_per_second": 2.0 * size**3 / best, "seconds": best}


@contextmanager
def timed(device: str) -> Iterator[list[float]]:
    """The list holds the seconds that the block took, once it has ended, and a GPU what it was given in it."""
    import torch

    def wait() -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    found: list[float] = []
    wait()
    started = time.perf_counter()
    yield found
    wait()
    found.append(time.perf_counter() - started)


def peak_gib(device: str) -> float:
    """The most memory so far: of this process (VmHWM, which knows nothing of its parent), or of the GPU."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**30
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20


def figures(
    seconds: float, lengths: Sequence[int], *, device: str, dtype: str, flop: float, padded_seconds: float
) -> dict[str, Any]:
    """What a row of computing tells, made of the time it took and the samples of its turns."""
    real = sum(lengths) / SAMPLE_RATE
    return {
        "seconds": seconds,
        "per_audio_second": seconds / real,
        "padded_seconds": padded_seconds,
        "padding": 1 - real / padded_seconds,
        "peak_gib": peak_gib(device),
        "flop": flop,
        "dtype": dtype,
    }


# ------------------------------------------------------------------------------------------------- measuring


@dataclass
class Row:
    """One line of a table: what a function of the script measures with these values, in a process of its own."""

    name: str
    side: str  # ours; paper: transformers in the paper's settings; best: at its best, one of several
    work: str  # rows of the same work are compared
    function: str
    values: dict[str, Any] = field(default_factory=dict)
    skipped: str = ""  # why there is no figure
    found: list[dict[str, Any]] = field(default_factory=list)  # by repeat

    def median(self, key: str = "seconds") -> float | None:
        """Over the repeats; None where there is no figure."""
        values = [found[key] for found in self.found if isinstance(found.get(key), int | float)]
        return statistics.median(values) if values else None


@dataclass
class Bar:
    """What a table is judged by: the fastest rival over the fastest of ours, both by their medians."""

    measure: str
    at_least: float | None  # None: shown, and not judged
    ours: list[str]  # names of rows; the fastest that was measured counts
    rivals: list[str]
    key: str = "seconds"  # what is divided; the rows are chosen by seconds

    def judge(self, rows: Sequence[Row]) -> dict[str, Any]:
        """The ratio and of which rows it is."""

        def fastest(names: list[str]) -> Row | None:
            there = [row for row in rows if row.name in names and row.median() is not None]
            return min(there, key=lambda row: row.median() or 0.0, default=None)

        ours, rival = fastest(self.ours), fastest(self.rivals)
        ratio = None
        if ours is not None and rival is not None:
            above, below = rival.median(self.key), ours.median(self.key)
            ratio = above / below if above and below else None
        return {
            "measure": self.measure,
            "at_least": self.at_least,
            "ratio": ratio,
            "ours": ours and ours.name,
            "rival": rival and rival.name,
        }


def parse(doc: str, *, turns: int = 8, repeats: int = 1) -> argparse.Namespace:
    """The options of every benchmark."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=turns, help="of the corpus (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=repeats, help="of every row (default: %(default)s)")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument(
        "--threads", type=int, default=cores, help="of a process (default: all cores, %(default)s)"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument(
        "--shape", choices=["base", "tiny"], default="base", help="of the model; tiny is for tests"
    )
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], metavar="DTYPE",
                        help="that each side may compute in: float32, bfloat16 (default: both, or for one repeat "
                             "the faster on this machine)")  # fmt: skip
    parser.add_argument("--only", metavar="REGEX", default="",
                        help="of all rows, measure those where it is found in 'WORK: NAME'")  # fmt: skip
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "benchmarks", help="folder for the JSON file")
    arguments = parser.parse_args()
    if arguments.dtypes is None:
        arguments.dtypes = ["float32", "bfloat16"] if arguments.repeats > 1 else [fast_dtype(arguments.device)]
    return arguments


def all_rows(arguments: argparse.Namespace) -> bool:
    """Whether there are all rows to measure (or to choose from), not those alone that are likely to be best."""
    return arguments.repeats > 1 or bool(arguments.only)


def fast_dtype(device: str) -> str:
    """That of `--precision auto`."""
    import torch

    from ser.device import choose_precision

    return str(choose_precision("auto", torch.device(device))).removeprefix("torch.")


def serve(functions: dict[str, Callable[..., Any]]) -> None:
    """In a process that measures: call the function that it is started for, print what it returns, and end."""
    if sys.argv[1:2] != ["--measure"]:
        return
    Path("/proc/self/oom_score_adj").write_text("1000")  # where memory runs out, this process ends and no other
    result = functions[sys.argv[2]](**json.loads(sys.argv[3]))
    if result is not None:
        print(json.dumps(result), flush=True)
    sys.exit()


def call(function: str, values: dict[str, Any], *, threads: int, launcher: Sequence[str] = ()) -> dict[str, Any]:
    """What ``function`` of the running script returns in a new process. RuntimeError where that fails."""
    command = [sys.executable, *launcher, sys.argv[0], "--measure", function, json.dumps(values)]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise RuntimeError(f"status {done.returncode}: {said[-1] if said else 'nothing said'}")
    return json.loads(lines[-1]) if lines else {}


def run(
    name: str,
    arguments: argparse.Namespace,
    rows: list[Row],
    bars: list[Bar],
    *,
    seconds: Sequence[float] | None = None,
    rates: Sequence[int] = (SAMPLE_RATE,),
    check: str = "",
    extra: Callable[[list[Row]], dict[str, Any]] = lambda rows: {},
) -> dict[str, Any]:
    """Prepare, check that both sides compute the same, measure the rows in turn, print the table, write the JSON.

    ``seconds`` are the lengths of the recordings, where they are not drawn, and ``rates`` those they are written
    at. ``check`` is the function that compares the sides and raises where they differ. ``extra`` makes further
    figures of the measured rows.
    """
    seconds = draw_seconds(arguments.turns) if seconds is None else seconds
    shared = {"threads": arguments.threads, "device": arguments.device}
    rows += [Row(f"ceiling {d}", "ceiling", "ceiling", "ceiling", {"dtype": d}) for d in arguments.dtypes]
    rows = [r for r in rows if r.side == "ceiling" or re.search(arguments.only, f"{r.work}: {r.name}")]
    result: dict[str, Any] = {"benchmark": name, "machine": machine(arguments), "repeats": arguments.repeats}
    result["turns"] = {"count": len(seconds), "seed": SEED, "seconds": round(sum(seconds), 3), "lengths": seconds}
    with tempfile.TemporaryDirectory(prefix="ser-benchmark-") as folder:
        values = {"folder": folder, "seconds": seconds, "shape": arguments.shape, "rates": list(rates)}
        call("prepare", values, threads=arguments.threads)
        if check:
            result["agreement"] = call(
                check, {"folder": folder, "shape": arguments.shape, **shared}, threads=arguments.threads
            )
            print(f"both sides agree: {result['agreement']}", file=sys.stderr, flush=True)
        for repeat in range(arguments.repeats):
            for row in rows:
                if row.skipped:
                    continue
                values = shared | row.values
                if row.side != "ceiling":
                    values |= {"folder": folder, "repeat": repeat}
                launcher = values.pop("launcher", ())
                try:
                    row.found.append(call(row.function, values, threads=values["threads"], launcher=launcher))
                except RuntimeError as error:
                    row.skipped = str(error)
                shown = row.skipped or f"{row.found[-1]['seconds']:.3g} s"
                print(f"{repeat + 1}/{arguments.repeats} {row.name}: {shown}", file=sys.stderr, flush=True)
    result["rows"] = [as_record(row, rows) for row in rows]
    result["bars"] = [bar.judge(rows) for bar in bars]
    result["extra"] = extra(rows)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(to_markdown(result))
    if judged := bars_to_markdown(result["bars"]):
        print(f"\n{judged}")
    print(f"\nwritten: {path}", file=sys.stderr)
    return result


def as_record(row: Row, rows: Sequence[Row]) -> dict[str, Any]:
    """A row as JSON has it: medians, the share of the ceiling, and every repeat."""
    keys = dict.fromkeys(key for found in row.found for key in found)
    medians = {key: value for key in keys if (value := row.median(key)) is not None}
    dtype = row.found[0].get("dtype", "float32") if row.found else None
    top = next((r.median("flop_per_second") for r in rows if r.name == f"ceiling {dtype}"), None)
    if top and "flop" in medians and row.side != "ceiling":
        medians["share_of_ceiling"] = medians["flop"] / medians["seconds"] / top
    return asdict(row) | {"medians": medians}


def machine(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a figure depends on besides the code, and the commit of the code."""
    cpu = next((s for s in Path("/proc/cpuinfo").read_text().splitlines() if s.startswith("model name")), "")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    commit = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    found = {
        "cpu": cpu.partition(":")[2].strip() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory, 1),
        "threads": arguments.threads,
        "device": arguments.device,
        "python": platform.python_version(),
        "commit": subprocess.run(commit, capture_output=True, text=True, check=False).stdout.strip() or "unknown",
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
    }
    found |= {name: version(name) for name in ("torch", "transformers")}
    if arguments.device.startswith("cuda") and shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        found["gpu"] = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    return found


# ---------------------------------------------------------------------------------------------------- tables

COLUMNS = {  # key of the medians -> heading, format
    "seconds": ("seconds", "{:.3g}"),
    "per_audio_second": ("per second of audio", "{:.2g}"),
    "per_second": ("per second", "{:.2f}"),
    "padding": ("padding", "{:.0%}"),
    "peak_gib": ("peak GiB", "{:.2f}"),
    "share_of_ceiling": ("of the ceiling", "{:.0%}"),
    "flop_per_second": ("GFLOP/s", "{:.0f}"),
}


def to_markdown(result: dict[str, Any]) -> str:
    """The tables of one benchmark, with the command, the machine and the commit."""
    m, turns = result["machine"], result["turns"]
    where = m.get("gpu") or f"{m['cpu']}, {m['cores']} cores, {m['memory_gib']:g} GiB"
    lines = [
        f"### {result['benchmark']}",
        "",
        f"`{m['command']}` at {m['commit']}, {m['date']}, {where}; {m['threads']} threads, {m['device']}; "
        f"torch {m['torch']}, transformers {m['transformers']}, Python {m['python']}. {turns['count']} turns, "
        f"{turns['seconds']:.1f} s of audio; medians of {result['repeats']}.",
        "",
    ]
    if result.get("agreement"):
        shown = {key: f"{key} {value:.1e}" for key, value in result["agreement"].items()}
        apart = ", ".join(text for key, text in shown.items() if "bf16" not in key)
        rounded = "; ".join(text for key, text in shown.items() if "bf16" in key)
        lines += [f"Largest relative difference between the two sides on one unpadded turn: {apart}."]
        lines += [f"Of each side to itself in float32: {rounded}."] if rounded else []
        lines += [""]
    columns = [key for key in COLUMNS if any(row["medians"].get(key) is not None for row in result["rows"])]
    lines += [
        "| work | row | " + " | ".join(COLUMNS[key][0] for key in columns) + " |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for row in result["rows"]:
        values = row["medians"] | {"flop_per_second": (row["medians"].get("flop_per_second") or 0) / 1e9 or None}
        cells = [COLUMNS[k][1].format(values[k]) if values.get(k) is not None else "" for k in columns]
        if row["skipped"]:
            cells[0] = f"none: {row['skipped']}"
        lines.append(f"| {row['work']} | {row['name']} | " + " | ".join(cells) + " |")
    if result["extra"]:
        lines += ["", *(f"* {key}: {value}" for key, value in result["extra"].items())]
    return "\n".join(lines)


def bars_to_markdown(bars: Sequence[dict[str, Any]]) -> str:
    """The table of what is judged; bars whose rows were not measured are left out, and empty without any."""
    lines = []
    for bar in bars:
        if bar["ratio"] is not None:
            least = "" if bar["at_least"] is None else f"{bar['at_least']:g}"
            lines.append(f"| {bar['measure']} | {bar['ours']} | {bar['rival']} | {bar['ratio']:.2f} | {least} |")
    head = ["| measure | ours | rival | ratio | at least |", "|---|---|---|---|---|"]
    return "\n".join(head + lines) if lines else ""


def write_report(results: Sequence[Path], page: Path) -> None:
    """Put all bars and then the tables between the two markers of a page; what stands around them is kept."""
    text = page.read_text(encoding="utf-8") if page.exists() else f"{BEGIN}\n{END}\n"
    before, _, rest = text.partition(BEGIN)
    found = [json.loads(path.read_text(encoding="utf-8")) for path in results]
    bars = bars_to_markdown([bar for result in found for bar in result["bars"]])
    tables = "\n\n".join(filter(None, [bars, *map(to_markdown, found)]))
    page.write_text(f"{before}{BEGIN}\n{tables}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="what the benchmarks wrote")
    parser.add_argument("--write", type=Path, required=True, help="the page with the markers")
    chosen = parser.parse_args()
    write_report(chosen.results, chosen.write)

"""Run every soak in this folder and write their figures as a table into docs/reliability.md.

    python tests/soak/run.py                    # all, each at most an hour a part
    python tests/soak/run.py --seconds 60 --only processes --write table.md

A soak is a script with ``--seconds``, its time limit, that prints lines of JSON and ends with status 0 where all
held. The table stands between two markers; what the page says around it is kept.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "reliability.md"
BEGIN, END = "<!-- soak: begin -->", "<!-- soak: end -->"


def run(script: Path, seconds: float | None) -> tuple[list[dict], str]:
    """The figures of one soak, and "held" or what it said last."""
    command = [sys.executable, str(script), *(["--seconds", str(seconds)] if seconds else [])]
    environment = {"PYTHONPATH": f"{HERE.parents[1]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    environment |= {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    figures = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode:
        sys.stderr.write(done.stderr[-4000:])
    return figures, "held" if done.returncode == 0 else f"FAILED (status {done.returncode})"


def to_table(results: dict[str, tuple[list[dict], str]], command: str) -> str:
    """Markdown, with the command, the machine and the commit."""
    revision = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    commit = subprocess.run(revision, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    model = next((s for s in Path("/proc/cpuinfo").read_text().splitlines() if s.startswith("model name")), "")
    machine = f"{model.partition(':')[2].strip() or platform.machine()}, {len(os.sched_getaffinity(0))} cores"
    lines = [
        f"`{command}` at {commit}, {time.strftime('%Y-%m-%d')}, torch {torch.__version__}, {machine}:",
        "",
        "| soak | figures | result |",
        "|---|---|---|",
    ]
    for name, (figures, result) in results.items():
        for found in figures or [{}]:
            part = found.pop("part", name)
            shown = ", ".join(f"{key} {value}" for key, value in found.items()) or "none"
            lines.append(f"| {part} | {shown} | {result} |".replace("{", "").replace("}", ""))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    scripts = sorted(path for path in HERE.glob("*.py") if path != Path(__file__))
    names = [path.stem for path in scripts]
    parser.add_argument("--seconds", type=float, help="of each part (default: what each soak has)")
    parser.add_argument("--only", nargs="*", default=names, choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--write", type=Path, default=PAGE, help="page with the markers (default: %(default)s)")
    arguments = parser.parse_args()
    results = {}
    for path in scripts:
        if path.stem in arguments.only:
            print(f"{path.stem} ...", file=sys.stderr, flush=True)
            results[path.stem] = run(path, arguments.seconds)
            print(f"{path.stem}: {results[path.stem][1]}", file=sys.stderr, flush=True)
    command = " ".join(["python tests/soak/run.py", *sys.argv[1:]]) if sys.argv[1:] else "make soak"
    text = arguments.write.read_text(encoding="utf-8") if arguments.write.exists() else f"{BEGIN}\n{END}\n"
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    table = to_table(results, command)
    arguments.write.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")
    print(table)
    return int(any(result != "held" for _, result in results.values()))


if __name__ == "__main__":
    sys.exit(main())

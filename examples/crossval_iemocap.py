"""Train and judge every fold of a protocol, and pool what comes out into one report.

The paper's ten folds with the paper's settings, from the folder that prepare_iemocap.py wrote:

    python examples/crossval_iemocap.py --data data/iemocap --root IEMOCAP_full_release --protocol paper10 \\
        --out runs/cv --processes 2 --init wav2vec2-base --paper

EmoDB, leaving one speaker out:

    python examples/crossval_iemocap.py --data data/emodb/emodb.csv --root EMODB/wav --protocol kfold:speaker:10 \\
        --shares transcripts --out runs/emodb --init small --epochs 6

Options that are not listed below go to train_iemocap.py as they are. The same command continues where it stopped:
a fold that was judged is not trained again.

Pooled figures count every utterance of all folds once (right over all folds / all utterances). In --out: FOLD/run
(the training run), FOLD/predictions.csv and report.json; report.json, report.md and pictures of all folds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any

import torch

import ser
from ser.data.manifest import parse_columns, read_manifest
from ser.data.protocols import Protocol, check_fold, find_manifest, find_protocol, to_table
from ser.errors import ConfigError
from ser.files import write_json
from ser.train.pictures import draw
from ser.train.report import Outcomes, report, table

HERE = Path(__file__).parent


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    description, _, usage = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description,
        epilog=usage,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="manifest to divide, or a folder with iemocap4.csv"
    )
    parser.add_argument("--root", type=Path, help="folder that the manifest's files are relative to")
    parser.add_argument("--columns", nargs="*", default=[], metavar="OURS=THEIRS", help="such as text=transcript")
    parser.add_argument("--protocol", required=True, help="as in train_iemocap.py")
    parser.add_argument("--shares", nargs="*", default=[], help="what parts of column and kfold may share")
    parser.add_argument("--protocol-seed", type=int, default=0, help="of protocols that draw (default: 0)")
    parser.add_argument("--folds", nargs="*", help="only these, such as 01F 01M (default: all)")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything")
    parser.add_argument("--init", default="base", help="as in train_iemocap.py (default: base)")
    parser.add_argument("--weights", choices=["auto", "last", "best"], default="auto",
                        help="that are judged; auto: the best on validation, but the last where there is no "
                        "validation or it is the test part")  # fmt: skip
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda (default: auto)")
    parser.add_argument("--processes", type=int, default=1, help="of one training, under torchrun (default: 1)")
    parser.add_argument("--parallel", type=int, default=1, help="folds at once, each with a GPU of its own where "
                        "there are any (default: 1)")  # fmt: skip
    parser.add_argument("--resamples", type=int, default=1000, help="of the bootstrap (default: 1000)")
    return parser.parse_known_args()


def judged_weights(protocol: Protocol, parts: dict[str, list[str]], asked: str) -> str:
    """ "last" where the best would be chosen on what is tested."""
    if asked != "auto":
        return asked
    chosen_on_test = "recordings" in protocol.declares.get(("valid", "test"), ())
    return "last" if chosen_on_test or "valid" not in parts else "best"


def check_same(folder: Path, settings: dict[str, Any]) -> None:
    """Refuse to go on with a fold that was begun with other settings."""
    path = folder / "settings.json"
    before = json.loads(path.read_text()) if path.is_file() else None
    if before is not None and before != settings:
        differing = [f"{k}: {before.get(k)!r} then, {v!r} now" for k, v in settings.items() if before.get(k) != v]
        listed = "\n  ".join(differing)
        raise ConfigError(f"{folder}: was begun with other settings; choose another --out:\n  {listed}")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, settings)


def run_fold(
    arguments: argparse.Namespace, rest: list[str], fold: str, weights: str, devices: Queue[list[str]]
) -> None:
    """Train and judge one fold, unless that is done."""
    folder = arguments.out / fold
    if (folder / "report.json").is_file():
        print(f"{fold}: done already", flush=True)
        return
    environment = dict(os.environ)
    own = devices.get()  # GPUs of its own, if there are any
    if own:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(own)
    try:
        train_and_judge(arguments, rest, fold, weights, environment)
    finally:
        devices.put(own)


def train_and_judge(
    arguments: argparse.Namespace, rest: list[str], fold: str, weights: str, environment: dict[str, str]
) -> None:
    """Both as commands of their own, with logs in the fold's folder."""
    folder = arguments.out / fold
    same = ["--data", str(arguments.data), "--protocol", arguments.protocol, "--fold", fold]
    same += ["--protocol-seed", str(arguments.protocol_seed)]
    same += ["--root", str(arguments.root)] if arguments.root else []
    for name in ("columns", "shares"):
        if values := getattr(arguments, name):
            same += [f"--{name}", *values]
    launcher = [sys.executable]
    if arguments.processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={arguments.processes}"]
        environment.setdefault("OMP_NUM_THREADS", "1")
    run = folder / "run"
    train = [*launcher, str(HERE / "train_iemocap.py"), *same, "--init", arguments.init, "--out", str(run)]
    train += ["--device", arguments.device, *rest]
    judge = [sys.executable, str(HERE / "evaluate.py"), *same, "--model", str(run / weights), "--out", str(folder)]
    judge += ["--resamples", str(arguments.resamples), "--device", arguments.device]
    started = time.perf_counter()
    for step, command in (("train", train), ("judge", judge)):
        with (folder / f"{step}.log").open("a") as log:
            if subprocess.run(command, env=environment, stdout=log, stderr=log, check=False).returncode:
                tail = "\n  ".join((folder / f"{step}.log").read_text().splitlines()[-15:])
                raise ConfigError(f"fold {fold}: {step} failed; {folder / step}.log ends with\n  {tail}")
    figures = json.loads((folder / "report.json").read_text())["figures"]
    shown = "  ".join(f"{k} {figures[n]['value']:.4f}" for k, n in SHORT.items() if n in figures)
    print(f"{fold}: {shown}  {time.perf_counter() - started:.0f} s", flush=True)


SHORT = {"WA": "accuracy", "UA": "unweighted_accuracy", "WER": "wer", "speaker": "speaker_accuracy"}


def sha256(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def provenance(arguments: argparse.Namespace, rest: list[str]) -> dict[str, Any]:
    """What is needed to repeat the run."""
    commit = subprocess.run(
        ["git", "-C", str(HERE), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "command": ["python", "examples/crossval_iemocap.py", *sys.argv[1:]],
        "training_options": rest,
        "versions": {"ser": ser.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "commit": commit or None,
        "manifest_sha256": sha256(find_manifest(arguments.data)),
        "init": arguments.init,
        "init_sha256": sha256(Path(arguments.init) / "model.safetensors"),
    }


def pooled_report(
    arguments: argparse.Namespace, rest: list[str], protocol: Protocol, weights: str, folds: list[str], audits: str
) -> dict[str, Any]:
    """All folds as one."""
    outcomes = Outcomes.joined([Outcomes.read(arguments.out / fold / "predictions.csv") for fold in folds])
    found = report(outcomes, resamples=arguments.resamples)
    by_fold = {}
    for fold in folds:
        judged = json.loads((arguments.out / fold / "report.json").read_text())
        by_fold[fold] = {"utterances": judged["utterances"]} | {
            k: v["value"] for k, v in judged["figures"].items()
        }
    over = {}
    for name in found["figures"]:
        values = [entry[name] for entry in by_fold.values() if entry.get(name) is not None]
        if values:
            spread = statistics.stdev(values) if len(values) > 1 else None
            over[name] = {"mean": statistics.mean(values), "spread": spread, "folds": len(values)}
    found |= {"protocol": protocol.name, "description": protocol.description, "weights": weights, "audit": audits}
    return found | {"folds": by_fold, "over_folds": over, "repeat": provenance(arguments, rest)}


def to_markdown(found: dict[str, Any]) -> str:
    """The report for people."""
    names = {short: name for short, name in SHORT.items() if name in found["figures"]}

    def show(value: float | None) -> str:
        return "-" if value is None else f"{value:.4f}"

    lines = [f"# {found['protocol']}: {found['utterances']} utterances, {len(found['folds'])} folds", ""]
    lines += [found["description"], "", f"The {found['weights']} weights of each fold are judged.", ""]
    lines += ["| fold | utterances | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for fold, entry in found["folds"].items():
        cells = " | ".join(show(entry.get(name)) for name in names.values())
        lines.append(f"| {fold} | {entry['utterances']} | {cells} |")
    over = found["over_folds"]
    cells = " | ".join(f"{show(over[n]['mean'])} ± {show(over[n]['spread'])}" for n in names.values())
    lines.append(f"| mean ± spread | | {cells} |")
    pooled = " | ".join(f"**{show(found['figures'][n]['value'])}**" for n in names.values())
    lines.append(f"| pooled | {found['utterances']} | {pooled} |")
    lines += [
        "",
        "```",
        table(found),
        "```",
        "",
        "What the parts share:",
        "",
        "```",
        found["audit"].rstrip(),
        "```",
    ]
    return "\n".join([*lines, "", "To repeat:", "", "```", json.dumps(found["repeat"], indent=1), "```", ""])


def main() -> None:
    arguments, rest = parse_arguments()
    columns = parse_columns(arguments.columns)
    utterances = read_manifest(find_manifest(arguments.data), root=arguments.root, columns=columns)
    protocol = find_protocol(arguments.protocol, shares=arguments.shares)
    folds = {fold.name: fold for fold in protocol.folds(utterances, seed=arguments.protocol_seed)}
    names = list(dict.fromkeys(arguments.folds or folds))
    if unknown := sorted(set(names) - set(folds)):
        raise ConfigError(f"no fold is called {', '.join(unknown)}; {protocol.name} has {', '.join(folds)}")
    audits = to_table([check_fold(folds[name], utterances, protocol) for name in names])
    weights = judged_weights(protocol, folds[names[0]].parts, arguments.weights)
    print(f"{protocol.name}: {protocol.description}\n{audits}\nthe {weights} weights of each fold are judged")
    settings = provenance(arguments, rest)
    for name in ("command", "commit", "versions"):  # may differ
        del settings[name]
    settings |= {"protocol": protocol.name, "seed": arguments.protocol_seed, "shares": arguments.shares}
    settings |= {"columns": columns, "weights": weights}
    for name in names:
        check_same(arguments.out / name, settings)
    devices: Queue[list[str]] = Queue()
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count())))).split(",")
    for slot in range(arguments.parallel):
        share = gpus[slot * arguments.processes : (slot + 1) * arguments.processes]
        if torch.cuda.device_count() and arguments.parallel > 1 and len(share) < arguments.processes:
            raise ConfigError(f"{arguments.parallel} folds at once need {arguments.processes} GPUs each: {gpus}")
        devices.put(share if arguments.parallel > 1 and torch.cuda.device_count() else [])
    with ThreadPoolExecutor(arguments.parallel) as pool:
        for job in [pool.submit(run_fold, arguments, rest, name, weights, devices) for name in names]:
            job.result()
    found = pooled_report(arguments, rest, protocol, weights, names, audits)
    write_json(arguments.out / "report.json", found)
    (arguments.out / "report.md").write_text(to_markdown(found), encoding="utf-8")
    draw(found, arguments.out)
    print(f"\n{table(found)}\n\n{arguments.out / 'report.md'}")


if __name__ == "__main__":
    try:
        main()
    except ser.SerError as error:
        sys.exit(f"error: {error}")

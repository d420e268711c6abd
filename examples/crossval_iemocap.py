"""Train and judge every fold of a protocol, and pool what comes out into one report.

The paper's ten folds with the paper's settings, from the folder that prepare_iemocap.py wrote:

    python examples/crossval_iemocap.py --data data/iemocap --root IEMOCAP_full_release --protocol paper10 \\
        --out runs/cv --processes 2 --init wav2vec2-base --paper

EmoDB, leaving one speaker out:

    python examples/crossval_iemocap.py --data data/emodb/emodb.csv --root EMODB/wav --protocol kfold:speaker:10 \\
        --shares transcripts --out runs/emodb --init small --epochs 6

The paper's ablation (its Table 4 and Figure 2), and which heads help, on speakers that are all known:

    python examples/crossval_iemocap.py ... --protocol paper10 --paper --ablation alpha=0,0.001,0.01,0.1
    python examples/crossval_iemocap.py ... --protocol speaker-known --beta 0.1 \\
        --ablation heads=emotion,emotion+ctc,emotion+speaker,emotion+ctc+speaker

Checkpoints that are there already, one folder per fold (DIR/01F .. DIR/05M), without training:

    python examples/crossval_iemocap.py ... --protocol paper10 --evaluate-only DIR --out runs/reproduced

Options that are not listed below go to train_iemocap.py as they are. The same command continues where it stopped:
a fold that was judged is not trained again. Asked to stop (SIGTERM, SIGUSR1, SIGHUP, Ctrl-C), it passes that on to
what trains, which saves, and ends with status 75.

Pooled figures count every utterance of all folds once (right over all folds / all utterances). In --out: FOLD/run
(the training run), FOLD/predictions.csv and report.json; report.json, report.md, curves.csv and pictures of all
folds. An ablation has all of this in a folder per value, and ablation.json, ablation.md, curves.csv and curves.png
beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from queue import Queue
from typing import Any, TextIO

import torch

import ser
from ser.data.protocols import Protocol, check_fold, find_fold, to_table, usual_known_turns
from ser.data.selection import Selection, add_data_arguments, selected_data
from ser.data.spellings import check_spellings, label_lines
from ser.errors import ConfigError, FileError, printable
from ser.files import digest, write_json
from ser.folder import is_preset
from ser.models.pretrained import find_folder
from ser.scores.folds import (
    SHORT,
    ablation_markdown,
    ablation_summary,
    pooled_report,
    show,
    to_markdown,
    write_curves,
)
from ser.scores.pictures import draw, draw_curves, needs_matplotlib
from ser.scores.report import Outcomes, shared_line, table, trained_on_some
from ser.train.checkpoint import MAY_CHANGE
from ser.train.content import NAMES, contents, weights_sha256
from ser.train.processes import PREEMPTED, following, stop_on_signals

HERE = Path(__file__).parent
# What each fold is given; it must not come a second time.
SETTLED = {"--fold", "--train", "--valid", "--overwrite", "--resume-from", "--allow-overlap", "--model", "--card"}
PAPER_TABLE_3 = 0.7815  # WA of Cai et al. (2021), ten folds by recording side
PAPER_UTTERANCES = 5531
POLL = 0.25  # seconds after which a signal is passed on


def tell(text: str, to: TextIO | None = None) -> None:
    """Show a text at once; names of folders and folds are foreign."""
    print(printable(text, lines=True), file=to, flush=True)


def parse_arguments(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    description, _, usage = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description,
        epilog=usage,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_data_arguments(parser)
    parser.add_argument("--folds", nargs="*", help="only these, such as 01F 01M (default: all)")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything")
    parser.add_argument("--init", default="base", help="as in train_iemocap.py (default: base)")
    parser.add_argument("--ablation", metavar="NAME=VALUES", help="alpha=0,0.01,0.1 or heads=emotion,emotion+ctc: "
                        "the whole of this for each value, and a comparison")  # fmt: skip
    parser.add_argument("--evaluate-only", type=Path, metavar="DIR", help="judge the model DIR/FOLD on each fold; "
                        "trains nothing")  # fmt: skip
    parser.add_argument("--weights", choices=["auto", "last", "best"], default="auto",
                        help="that are judged; auto: the best on validation, but the last where there is no "
                        "validation or it is the test part")  # fmt: skip
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda (default: auto)")
    parser.add_argument("--processes", type=int, default=1, help="of one training, under torchrun (default: 1)")
    parser.add_argument("--parallel", type=int, default=1, help="folds at once, each with a GPU of its own where "
                        "there are any (default: 1)")  # fmt: skip
    parser.add_argument("--on-bad-audio", choices=["fail", "skip"], default="fail", help="in training and judging "
                        "(default: fail)")  # fmt: skip
    parser.add_argument("--max-bad-audio", type=float, default=0.01, help="share that skip may leave out of each "
                        "(default: 0.01)")  # fmt: skip
    parser.add_argument("--resamples", type=int, default=1000, help="of the bootstrap (default: 1000)")
    return parser.parse_known_args(argv)


# ---------------------------------------------------------------------------------------------- one fold


def judged_weights(protocol: Protocol, parts: dict[str, list[str]], asked: str) -> str:
    """ "last" where the best would be chosen on what is tested."""
    if asked != "auto":
        return asked
    chosen_on_test = "recordings" in protocol.declares.get(("valid", "test"), ())
    return "last" if chosen_on_test or "valid" not in parts else "best"


def lasting(options: list[str]) -> list[str]:
    """Training options in one order, without those that may change while a run goes on."""
    groups: list[list[str]] = []
    for word in options:
        if word.startswith("--") or not groups:
            groups.append([])
        groups[-1] += word.split("=", 1)
    names = [group[0].lstrip("-").replace("-", "_") for group in groups]
    kept = [group for name, group in zip(names, groups, strict=True) if name not in MAY_CHANGE]
    return [word for group in sorted(kept) for word in group]


def without_paths(settings: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that decide a fold's result; where content is recorded, its path is left out.

    Earlier releases told the content of the manifest as a file, and none of --vocab.
    """
    kept = {name: v for name, v in settings.items() if name in other or name not in ("content", "vocab_sha256")}
    names = NAMES if "content" in kept else ("sha256", "columns", *NAMES)
    kept["data"] = {name: settings["data"].get(name) for name in names}
    for path, told in (("init", "init_sha256"), ("models", "model_sha256")):
        if kept.get(told):
            kept.pop(path, None)
    hidden = {"--cache"} | ({"--vocab"} if "vocab_sha256" in kept else set())
    words = kept["training_options"]
    kept["training_options"] = [w for before, w in zip(["", *words], words, strict=False) if before not in hidden]
    return kept


def check_same(folder: Path, settings: dict[str, Any], as_written: Callable[[], dict[str, Any]]) -> None:
    """Refuse to go on with a fold that was trained or judged with other settings.

    ``as_written`` gives the `contents` with all labels taken as they are written: so earlier releases read them.
    """
    path = folder / "settings.json"
    begun = path.is_file() and ((folder / "run/config.json").exists() or (folder / "report.json").exists())
    try:
        before = json.loads(path.read_text()) if begun else settings
    except ValueError:
        raise ConfigError(f"{path}: is damaged; remove {folder}, or choose another --out") from None
    old, new = without_paths(before, settings), without_paths(settings, before)
    if old != new:
        differing = [f"{k}: {old.get(k)!r} then, {v!r} now" for k, v in new.items() if old.get(k) != v]
        listed = "\n  ".join(differing)
        raise ConfigError(f"{folder}: was begun with other settings; choose another --out:\n  {listed}")
    if "content" not in before and settings["content"] != as_written():
        raise ConfigError(
            f"{folder}: was begun by an earlier release, which took every label as it is written; give "
            "--literal-labels, without --map, or choose another --out"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, settings)


def device_shares(gpus: list[str], *, folds: int, processes: int) -> list[list[str]]:
    """The GPUs that each of several folds at once sees, one per process; none where it sees all that there are."""
    if not gpus or folds == 1:
        return [[] for _ in range(folds)]
    if len(gpus) < folds * processes:
        raise ConfigError(f"{folds} folds at once need {processes} GPUs each, but there are {', '.join(gpus)}")
    return [gpus[first : first + processes] for first in range(0, folds * processes, processes)]


def is_judged(folder: Path) -> bool:
    """Whether a fold's report and all its predictions are there."""
    try:
        report = json.loads((folder / "report.json").read_text())
        return len(Outcomes.read(folder / "predictions.csv")) == report["utterances"]
    except (OSError, ValueError, KeyError, TypeError, ConfigError):
        return False


class Stopped(Exception):
    """This process was asked to stop, and its commands have ended."""


class Commands:
    """The commands that run, which are asked to stop when this process is."""

    def __init__(self) -> None:
        self.running: set[subprocess.Popen[bytes]] = set()
        self.closed = False  # no further fold begins
        self.stopped = ""

    def run(self, command: list[str], environment: dict[str, str], log: TextIO) -> int:
        """The exit status."""
        process = subprocess.Popen(following(command), env=environment, stdout=log, stderr=log)
        self.running.add(process)
        if self.stopped:  # meanwhile
            process.terminate()
        try:
            return process.wait()
        finally:
            self.running.discard(process)

    def stop(self, signal: str) -> None:
        """Training saves and ends, and what judges is done again."""
        self.stopped = signal
        tell(f"{signal}: what trains saves and ends", to=sys.stderr)
        for process in list(self.running):
            process.terminate()


def train_and_judge(
    arguments: argparse.Namespace,
    rest: list[str],
    selection: Selection,
    weights: str,
    folder: Path,
    environment: dict[str, str],
    commands: Commands,
) -> None:
    """Both as commands of their own, with logs in the fold's folder."""
    fold = str(selection.fold)
    same = [*selection.to_options(), "--fold", fold]
    same += ["--on-bad-audio", arguments.on_bad_audio, "--max-bad-audio", str(arguments.max_bad_audio)]
    if arguments.known_turns is not None:  # else as training finds best, and the model then says
        same += ["--known-turns", str(arguments.known_turns)]
    launcher = [sys.executable]
    if arguments.processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={arguments.processes}"]
        environment.setdefault("OMP_NUM_THREADS", "1")
    run = folder / "run"
    train = [*launcher, str(HERE / "train_iemocap.py"), *same, "--init", arguments.init, "--out", str(run)]
    train += ["--device", arguments.device, *rest]
    model = arguments.evaluate_only / fold if arguments.evaluate_only else run / weights
    judge = [sys.executable, str(HERE / "evaluate.py"), *same, "--model", str(model), "--out", str(folder)]
    judge += ["--resamples", str(arguments.resamples), "--device", arguments.device, "--no-pictures"]
    judge += [] if arguments.evaluate_only else ["--card"]
    started = time.perf_counter()
    for step, command in (("train", train), ("judge", judge)):
        if step == "train" and arguments.evaluate_only:
            continue
        with (folder / f"{step}.log").open("a") as log:
            if commands.run(command, environment, log):
                if commands.stopped:
                    raise Stopped
                tail = "\n  ".join((folder / f"{step}.log").read_text().splitlines()[-15:])
                raise ConfigError(f"fold {fold}: {step} failed; {folder / step}.log ends with\n  {tail}")
    judged = json.loads((folder / "report.json").read_text())
    figures = judged["figures"]
    shown = "  ".join(f"{k} {figures[n]['value']:.4f}" for k, n in SHORT.items() if n in figures)
    tell(f"{fold}: {shown}  {time.perf_counter() - started:.0f} s")
    if arguments.evaluate_only or trained_on_some(judged):
        tell(f"    {shared_line(judged)}")


def run_fold(
    arguments: argparse.Namespace,
    rest: list[str],
    selection: Selection,
    weights: str,
    folder: Path,
    devices: Queue[list[str]],
    commands: Commands,
) -> None:
    """Train and judge one fold in its folder, unless that is done."""
    fold = str(selection.fold)
    if commands.closed:
        return
    if is_judged(folder):
        tell(f"{fold}: done already")
        return
    environment = dict(os.environ)
    own = devices.get()  # GPUs of its own, if there are any
    if own:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(own)
    try:
        train_and_judge(arguments, rest, selection, weights, folder, environment, commands)
    except BaseException:
        commands.closed = True  # at once: this thread takes the next fold before anybody hears of this one
        raise
    finally:
        devices.put(own)


# ---------------------------------------------------------------------------------------------- all folds


def provenance(arguments: argparse.Namespace, rest: list[str], selection: Selection) -> dict[str, Any]:
    """What is needed to repeat the run."""
    commit = ""
    with suppress(OSError):  # no git
        asked = ["git", "-C", str(HERE), "rev-parse", "HEAD"]
        commit = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "command": ["python", "examples/crossval_iemocap.py", *sys.argv[1:]],
        "training_options": rest,
        "versions": {"ser": ser.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "commit": commit or None,
        "data": selection.to_dict(),
        "init": arguments.init,
        "init_sha256": None if is_preset(arguments.init) else weights_sha256(find_folder(arguments.init)),
        "models": str(arguments.evaluate_only) if arguments.evaluate_only else None,
        "processes": arguments.processes,
        "known_turns": arguments.known_turns,
    }


def write_eval_files(out: Path, folds: list[str]) -> None:
    """FOLD.eval, as the paper's reproduce script leaves them, and the pooled line."""
    right = total = 0
    for fold in folds:
        outcomes = Outcomes.read(out / fold / "predictions.csv")
        labelled = outcomes.text["emotion"] != ""
        correct = int((outcomes.text["emotion"] == outcomes.text["predicted"])[labelled].sum())
        judged = json.loads((out / fold / "report.json").read_text())
        accuracy = correct / max(int(labelled.sum()), 1)
        lines = [table(judged), shared_line(judged), f"correct: {correct} , acc: {accuracy:.4f}"]
        (out / f"{fold}.eval").write_text("\n".join(lines) + "\n", encoding="utf-8")
        right, total = right + correct, total + int(labelled.sum())
    tell(f"pooled: correct: {right} of {total} , acc: {right / max(total, 1):.4f}")


def cross_validate(
    arguments: argparse.Namespace, rest: list[str], selection: Selection, out: Path
) -> dict[str, Any]:
    """Every fold, and the report of all, in ``out``."""
    protocol = selection.find_protocol()
    utterances = selection.read(check_files=arguments.on_bad_audio == "fail", tell=tell)
    tell("\n".join(label_lines({"all folds": utterances})))
    settled = not arguments.evaluate_only and not any("heads" in o for o in (*rest, arguments.ablation or ""))
    used = ["emotion", "speaker"] if settled else ["speaker"]  # else each training knows whether emotions are used
    check_spellings({"all folds": utterances}, label_map=selection.label_map, columns=used)
    folds = {fold.name: fold for fold in protocol.folds(utterances, seed=selection.seed)}
    chosen = (find_fold(protocol, utterances, name, seed=selection.seed).name for name in arguments.folds or folds)
    names = list(dict.fromkeys(chosen))
    audits = to_table([check_fold(folds[name], utterances, protocol) for name in names])
    weights = judged_weights(protocol, folds[names[0]].parts, arguments.weights)
    if arguments.evaluate_only:
        weights = "given"
        if missing := [name for name in names if not (arguments.evaluate_only / name).is_dir()]:
            raise ConfigError(
                f"{arguments.evaluate_only}: has no folder {', '.join(missing)}; it needs one per fold"
            )
    tell(f"{protocol.name}: {protocol.description}\n{audits}\nthe {weights} weights of each fold are judged")
    settings = provenance(arguments, rest, selection)
    for name in ("command", "commit", "versions", "processes"):  # may differ
        del settings[name]
    settings["training_options"] = options = lasting(rest)
    settings["content"] = contents(utterances)
    if "--vocab" in options[:-1]:
        settings["vocab_sha256"] = digest(Path(options[options.index("--vocab") + 1]))

    def as_written() -> dict[str, Any]:
        return contents(replace(selection, label_map={}, literal_labels=True).read(check_files=False))

    for name in names:
        model = {"model_sha256": weights_sha256(arguments.evaluate_only / name)} if arguments.evaluate_only else {}
        check_same(out / name, settings | {"weights": weights} | model, as_written)
    devices: Queue[list[str]] = Queue()
    count = torch.cuda.device_count()
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",") if count else []
    for share in device_shares(gpus, folds=arguments.parallel, processes=arguments.processes):
        devices.put(share)
    commands = Commands()
    with stop_on_signals() as asked, ThreadPoolExecutor(arguments.parallel) as pool:
        waiting: set[Future[None]] = {
            pool.submit(
                run_fold, arguments, rest, replace(selection, fold=name), weights, out / name, devices, commands
            )
            for name in names
        }
        failure: BaseException | None = None
        while waiting:
            done, waiting = wait(waiting, timeout=POLL, return_when=FIRST_COMPLETED)
            failed = [error for job in done if (error := job.exception()) is not None]
            if asked and not commands.stopped:
                commands.stop(asked.signal)
            if failed and failure is None:
                failure = failed[0]
                if commands.running and not commands.stopped:
                    tell(f"{failure}\n(the folds that run are finished first)", to=sys.stderr)
    if failure is not None:
        raise failure
    if commands.stopped:  # after the last command of the last fold
        raise Stopped
    found = pooled_report(out, names, protocol, resamples=arguments.resamples)
    found |= {"weights": weights, "audit": audits, "repeat": provenance(arguments, rest, selection)}
    write_json(out / "report.json", found)
    (out / "report.md").write_text(to_markdown(found), encoding="utf-8")
    write_curves(out / "curves.csv", {"": found["curve"]})
    draw(found, out)
    tell(f"\n{table(found)}\n\n{out / 'report.md'}")
    if arguments.evaluate_only:
        write_eval_files(out, names)
    return found


# ---------------------------------------------------------------------------------------------- ablations


def variants(arguments: argparse.Namespace, rest: list[str]) -> dict[str, list[str]]:
    """Value -> what it adds to the training options."""
    name, _, values = arguments.ablation.partition("=")
    listed = [value for value in values.split(",") if value]
    if name not in ("alpha", "heads") or not listed or len(set(listed)) < len(listed):
        raise ConfigError(
            f"--ablation {arguments.ablation}: expected alpha=0,0.001,0.01,0.1 or heads=emotion,emotion+ctc, each "
            "value once"
        )
    if name in [option.lstrip("-").partition("=")[0] for option in rest]:
        raise ConfigError(f"give --ablation {name}=... or --{name}, not both")
    if name == "heads" and any("speaker" in value for value in listed) and not any("--beta" in o for o in rest):
        raise ConfigError("a speaker head needs a weight: add --beta, such as --beta 0.1")
    return {value: [f"--{name}", value.replace("+", ",")] for value in listed}


def beside_table_3(summary: dict[str, Any]) -> list[str]:
    """The paper's own row of its Table 3 beside ours, and whether they may be compared."""
    count = len(summary["folds"])
    same = summary["protocol"] == "paper10" and count == 10 and summary["utterances"] == PAPER_UTTERANCES
    same = same and summary["weights"] == "last"
    lines = ["", "Beside Table 3 of Cai et al. (2021):", "", "| | folds | utterances | WA |", "|---|---|---|---|"]
    lines += [f"| Cai et al., alpha 0.1 | 10, by recording side | {PAPER_UTTERANCES} | {PAPER_TABLE_3:.4f} |"]
    for value, row in summary["values"].items():
        cells = [f"alpha {value}", f"{count} of {summary['protocol']}", str(summary["utterances"])]
        lines += [f"| {' | '.join(cells)} | {show((row['accuracy'] or {}).get('value'))} |"]
    note = "The same folds and utterances: on IEMOCAP's own recordings the two may be compared."
    return [
        *lines,
        "",
        note if same else "**Other folds, utterances or weights than the paper's: not comparable.**",
    ]


def run_ablation(arguments: argparse.Namespace, rest: list[str], selection: Selection) -> None:
    """The protocol for each value, and a table of all."""
    name = arguments.ablation.partition("=")[0]
    if name == "heads" and "speaker" in arguments.ablation and arguments.known_turns is None:
        # Where a speaker head needs turns held out, all variants train without them: only heads are to differ.
        utterances = selection.read()
        folds = selection.find_protocol().folds(utterances, seed=selection.seed)
        strangers = all(
            check_fold(fold, utterances, selection.find_protocol()).fractions("test").get("speakers") == 0.0
            for fold in folds
        )
        turns = min(usual_known_turns(fold, utterances) for fold in folds) if strangers else 0
        arguments.known_turns, selection = turns, replace(selection, known_turns=turns)
    found, predictions = {}, {}
    for value, options in variants(arguments, rest).items():
        tell(f"\n{name} {value}")
        out = arguments.out / f"{name}={value}"
        found[value] = cross_validate(arguments, [*rest, *options], selection, out)
        judged = [Outcomes.read(out / fold / "predictions.csv") for fold in found[value]["folds"]]
        predictions[value] = Outcomes.joined(judged)
    summary = ablation_summary(name, found, predictions, resamples=arguments.resamples)
    curves = {value: one["curve"] for value, one in found.items()}
    write_json(arguments.out / "ablation.json", summary)
    text = ablation_markdown(summary, beside_table_3(summary) if name == "alpha" else ())
    (arguments.out / "ablation.md").write_text(text, encoding="utf-8")
    write_curves(arguments.out / "curves.csv", curves)
    if summary["drawn"]:
        draw_curves({f"{name} {value}": curve for value, curve in curves.items()}, arguments.out / "curves.png")
    tell(f"\n{text}\n{arguments.out / 'ablation.md'}")


def main(argv: list[str] | None = None) -> None:
    arguments, rest = parse_arguments(argv)
    if not arguments.data or not arguments.protocol:
        raise ConfigError("give --data, a manifest, and --protocol, which says how it is divided")
    if min(arguments.processes, arguments.parallel, arguments.resamples) < 1:
        raise ConfigError("--processes, --parallel and --resamples are 1 or more")
    if own := sorted({option.partition("=")[0] for option in rest} & SETTLED):
        raise ConfigError(f"{', '.join(own)}: cross-validation settles that itself (--folds chooses some folds)")
    needs_matplotlib()
    selection = selected_data(arguments)
    if arguments.evaluate_only and (rest or arguments.ablation):
        raise ConfigError(f"--evaluate-only trains nothing, so it takes no {' '.join(rest) or '--ablation'}")
    try:
        if arguments.ablation:
            run_ablation(arguments, rest, selection)
        else:
            cross_validate(arguments, rest, selection, arguments.out)
    except OSError as error:
        raise FileError(f"{error.filename or arguments.out}: {error.strerror or error}") from error


if __name__ == "__main__":
    try:
        main()
    except Stopped:
        tell("stopped; the same command continues", to=sys.stderr)
        sys.exit(PREEMPTED)
    except KeyboardInterrupt:
        tell("interrupted", to=sys.stderr)
        sys.exit(130)
    except ser.SerError as error:
        sys.exit(printable(f"error: {error}", lines=True))

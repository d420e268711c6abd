"""Train and evaluate every fold of a protocol, and pool the results in one report.

The paper's ten folds with the paper's settings, from the folder that `ser prepare` wrote:

    ser crossval --data data/iemocap --root IEMOCAP_full_release --protocol paper10 \\
        --out runs/cv --processes 2 --init wav2vec2-base --paper

EmoDB, leaving one speaker out:

    ser crossval --data data/emodb/emodb.csv --root EMODB/wav --protocol kfold:speaker:10 \\
        --shares transcripts --out runs/emodb --init small --epochs 6

The paper's ablation (its Table 4 and Figure 2), and which heads help, on speakers that are all known:

    ser crossval ... --protocol paper10 --paper --ablation alpha=0,0.001,0.01,0.1
    ser crossval ... --protocol speaker-known --beta 0.1 \\
        --ablation heads=emotion,emotion+ctc,emotion+speaker,emotion+ctc+speaker

Checkpoints that are there already, one folder per fold (DIR/01F .. DIR/05M), without training:

    ser crossval ... --protocol paper10 --evaluate-only DIR --out runs/reproduced

Options that are not listed above are passed to `ser train`. The same command continues where it stopped:
a fold that was evaluated is not trained again. Asked to stop (SIGTERM, SIGUSR1, SIGHUP, Ctrl-C), it passes that on
to the training, which saves, and ends with status 75.

Pooled figures count every utterance of all folds once (right over all folds / all utterances). In --out: FOLD/run
(the training run), FOLD/predictions.csv and report.json; report.json, report.md, curves.csv and pictures of all
folds. An ablation has all of this in a folder per value, and ablation.json, ablation.md, curves.csv and curves.png
beside them.
"""

import json
import os
import platform
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Queue
from typing import Any, TextIO

import torch

import ser
from ser.cli import errors_told as usual_errors_told
from ser.data.manifest import Utterance
from ser.data.protocols import Protocol, check_fold, find_fold, to_table, usual_known_turns
from ser.data.selection import Selection, add_data_arguments, named_for_training, selected_data
from ser.errors import ConfigError, FileError, indented, printable
from ser.files import digest, write_json
from ser.folder import is_preset, labels_of
from ser.models.pretrained import find_folder
from ser.scores import folds as pooling
from ser.scores.pictures import draw, draw_curves, needs_matplotlib
from ser.scores.report import CORPUS, PARTS, Outcomes, Report, four_digits, shared_line, table
from ser.train.config import learns_emotions
from ser.train.content import NAMES, contents, weights_sha256
from ser.train.processes import PREEMPTED, following, stop_on_signals
from ser.train.runs import MAY_CHANGE

# Flags that are set for each fold, so they must not be given.
SETTLED = {"--fold", "--train", "--valid", "--overwrite", "--resume-from", "--allow-overlap", "--model", "--card"}
PAPER_TABLE_3 = 0.7815  # WA of Cai et al. (2021), ten folds by recording side
PAPER_UTTERANCES = 5531
POLL = 0.25  # seconds after which a signal is passed on


def print_now(text: str, to: TextIO | None = None) -> None:
    """Print a text at once, without control characters, since names of folders and folds are foreign."""
    print(printable(text, lines=True), file=to, flush=True)


class Stopped(Exception):
    """This process was asked to stop, and its commands have ended."""


@contextmanager
def errors_told() -> Iterator[None]:
    """End like other commands, or with status 75 if the process was asked to stop."""
    with usual_errors_told():
        try:
            yield
        except Stopped:
            print_now("stopped; the same command continues", to=sys.stderr)
            sys.exit(PREEMPTED)


# -------------------------------------------------------------------------------------------------- arguments


def add_arguments(parser: ArgumentParser) -> None:
    """Add the flags of the command, the common ones first."""
    parser.allow_abbrev = False
    add = parser.add_argument_group("cross-validation").add_argument
    add("--out", type=Path, required=True, help="folder for everything")
    add("--init", default="base", help="as of ser train (default: base)")
    add("--folds", nargs="*", help="only these, such as 01F 01M (default: all)")
    add("--ablation", metavar="NAME=VALUES", help="alpha=0,0.01,0.1 or heads=emotion,emotion+ctc: the whole of "
        "this for each value, and a comparison")  # fmt: skip
    add(
        "--evaluate-only",
        type=Path,
        metavar="DIR",
        help="evaluate the model DIR/FOLD on each fold; trains nothing",
    )
    add("--weights", choices=["auto", "last", "best"], default="auto", help="that are evaluated; auto: the best "
        "on validation, but the last where there is no validation or it is the test part")  # fmt: skip
    add_data_arguments(parser)
    add = parser.add_argument_group("figures").add_argument
    add("--parts", nargs="*", default=[], metavar="COLUMN", help="of the manifest: figures are reported for each "
        "of its values too")  # fmt: skip
    add("--resamples", type=int, default=1000, help="of the bootstrap (default: 1000)")
    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", help="auto, cpu, cuda (default: auto)")
    add("--processes", type=int, default=1, help="of one training, under torchrun (default: 1)")
    add("--parallel", type=int, default=1, help="folds at once, each with a GPU of its own where there are any "
        "(default: 1)")  # fmt: skip
    policies = ["fail", "skip"]
    add("--on-bad-audio", choices=policies, default="fail", help="in training and evaluation (default: fail)")
    add("--max-bad-audio", type=float, default=0.01, help="share that skip may leave out of each (default: 0.01)")


def parse(parser: ArgumentParser, argv: list[str]) -> Namespace:
    """Read the arguments; those that are not known go to training."""
    arguments, options = parser.parse_known_args(argv)
    arguments.training_options, arguments.command = options, ["ser", "crossval", *argv]
    return arguments


def refuse_contradictions(arguments: Namespace) -> None:
    """Raise ConfigError for arguments that are missing, contradict each other or are out of range."""
    options = arguments.training_options
    if not arguments.data or not arguments.protocol:
        raise ConfigError("give --data, a manifest, and --protocol, which says how it is divided")
    if min(arguments.processes, arguments.parallel, arguments.resamples) < 1:
        raise ConfigError("--processes, --parallel and --resamples are 1 or more")
    if own := sorted({option.partition("=")[0] for option in options} & SETTLED):
        raise ConfigError(f"{', '.join(own)}: cross-validation settles that itself (--folds chooses some folds)")
    if arguments.evaluate_only and (options or arguments.ablation):
        raise ConfigError(f"--evaluate-only trains nothing, so it takes no {' '.join(options) or '--ablation'}")


# ---------------------------------------------------------------------------------------------- one fold


def evaluated_weights(protocol: Protocol, parts: dict[str, list[str]], asked: str) -> str:
    """Return "best" or "last": "last" if the best weights would be chosen on the test part."""
    if asked != "auto":
        return asked
    chosen_on_test = "recordings" in protocol.declares.get(("valid", "test"), ())
    return "last" if chosen_on_test or "valid" not in parts else "best"


def lasting(options: list[str]) -> list[str]:
    """Return training options in a fixed order, without those that may change in a resumed run."""
    groups: list[list[str]] = []
    for word in options:
        if word.startswith("--") or not groups:
            groups.append([])
        groups[-1] += word.split("=", 1)
    names = [group[0].lstrip("-").replace("-", "_") for group in groups]
    kept = [group for name, group in zip(names, groups, strict=True) if name not in MAY_CHANGE]
    return [word for group in sorted(kept) for word in group]


def fold_settings(settings: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that a fold's result depends on; if the content is recorded, its path is left out.

    Earlier releases recorded the content of the manifest as a file, and none of --vocab.
    """
    kept = {name: v for name, v in settings.items() if name in other or name not in ("content", "vocab_sha256")}
    names = ("no_usual_names", *NAMES) if "content" in kept else ("sha256", "columns", *NAMES)
    kept["data"] = {name: settings["data"].get(name) for name in names}
    for path, told in (("init", "init_sha256"), ("models", "model_sha256")):
        if kept.get(told):
            kept.pop(path, None)
    hidden = {"--cache"} | ({"--vocab"} if "vocab_sha256" in kept else set())
    words = kept["training_options"]
    kept["training_options"] = [w for before, w in zip(["", *words], words, strict=False) if before not in hidden]
    return kept


def check_same(folder: Path, settings: dict[str, Any], as_written: Callable[[], dict[str, Any]]) -> None:
    """Refuse to continue a fold that was trained or evaluated with other settings.

    ``as_written`` returns the `contents` with all labels as they are written, as earlier releases read them.
    """
    path = folder / "settings.json"
    begun = path.is_file() and ((folder / "run/config.json").exists() or (folder / "report.json").exists())
    try:
        before = json.loads(path.read_text()) if begun else settings
    except ValueError:
        raise ConfigError(f"{path}: is damaged; remove {folder}, or choose another --out") from None
    old, new = fold_settings(before, settings), fold_settings(settings, before)
    if old != new:
        differing = [f"{k}: {old.get(k)!r} then, {v!r} now" for k, v in new.items() if old.get(k) != v]
        raise ConfigError(f"{folder}: was begun with other settings; choose another --out:{indented(differing)}")
    if "content" not in before and settings["content"] != as_written():
        raise ConfigError(
            f"{folder}: was begun by an earlier release, which took every label as it is written; give "
            "--literal-labels, without --map, or choose another --out"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, settings)


def device_shares(gpus: list[str], *, folds: int, processes: int) -> list[list[str]]:
    """Return the GPUs for each of the folds that run at once, one per process; an empty list means all GPUs."""
    if not gpus or folds == 1:
        return [[] for _ in range(folds)]
    if len(gpus) < folds * processes:
        raise ConfigError(f"{folds} folds at once need {processes} GPUs each, but there are {', '.join(gpus)}")
    return [gpus[first : first + processes] for first in range(0, folds * processes, processes)]


def all_parts(named: list[str]) -> tuple[str, ...]:
    """Return the columns by which figures are reported in parts, including those of --parts."""
    return tuple(dict.fromkeys((*PARTS, *named)))


def is_evaluated(folder: Path, parts: list[str]) -> bool:
    """Tell whether a fold's report and all its predictions exist."""
    try:
        result = Report.read(folder / "report.json")
        return len(Outcomes.read(folder / "predictions.csv", all_parts(parts))) == result.utterances
    except ConfigError:
        return False


class Commands:
    """Run commands, and ask them to stop when this process is asked to stop."""

    def __init__(self) -> None:
        self.running: set[subprocess.Popen[bytes]] = set()
        self.closed = False  # no further fold begins
        self.stopped = ""

    def run(self, command: list[str], environment: dict[str, str], log: TextIO) -> int:
        """Run a command to its end, and return its exit status."""
        process = subprocess.Popen(following(command), env=environment, stdout=log, stderr=log)
        self.running.add(process)
        if self.stopped:  # since the check before
            process.terminate()
        try:
            return process.wait()
        finally:
            self.running.discard(process)

    def stop(self, signal: str) -> None:
        """Ask all commands to stop: training saves and ends, and an evaluation will be done again."""
        self.stopped = signal
        print_now(f"{signal}: the training saves and ends", to=sys.stderr)
        for process in list(self.running):
            process.terminate()


@dataclass(frozen=True)
class CrossValidation:
    """Describe what is done on each fold.

    Attributes:
        arguments: those of the command, or of one value of an ablation.
        selection: the data and how it is divided.
        weights: which weights of a run are evaluated.
    """

    arguments: Namespace
    selection: Selection
    weights: str

    def launcher(self) -> list[str]:
        """Return how a training begins: this Python, under torchrun where it has several processes."""
        count = self.arguments.processes
        several = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        return [sys.executable, *(several if count > 1 else [])]

    def commands(self, fold: str) -> dict[str, list[str]]:
        """Return step -> the command that does it on a fold; logs have the names of the steps."""
        arguments, folder = self.arguments, self.arguments.out / fold
        same = [*self.selection.to_options(), "--fold", fold, "--on-bad-audio", arguments.on_bad_audio]
        same += ["--max-bad-audio", str(arguments.max_bad_audio), "--device", arguments.device]
        if arguments.known_turns is not None:  # else training chooses the number, and the model records it
            same += ["--known-turns", str(arguments.known_turns)]
        train = [
            *self.launcher(),
            "-m",
            "ser",
            "train",
            *same,
            "--init",
            arguments.init,
            "--out",
            str(folder / "run"),
        ]
        model = arguments.evaluate_only / fold if arguments.evaluate_only else folder / "run" / self.weights
        evaluate = [sys.executable, "-m", "ser", "evaluate", *same, "--model", str(model), "--out", str(folder)]
        evaluate += ["--resamples", str(arguments.resamples), "--no-pictures", "--parts", *arguments.parts]
        if arguments.evaluate_only:
            return {"judge": evaluate}
        return {"train": [*train, *arguments.training_options], "judge": [*evaluate, "--card"]}


def train_and_evaluate(job: CrossValidation, fold: str, environment: dict[str, str], commands: Commands) -> None:
    """Train and evaluate on a fold by separate commands, with logs in the fold's folder."""
    folder = job.arguments.out / fold
    if job.arguments.processes > 1:
        environment.setdefault("OMP_NUM_THREADS", "1")
    started = time.perf_counter()
    for step, command in job.commands(fold).items():
        path = folder / f"{step}.log"
        with path.open("a") as log:
            if commands.run(command, environment, log):
                if commands.stopped:
                    raise Stopped
                tail = "\n  ".join(path.read_text().splitlines()[-15:])
                what = {"train": "training", "judge": "evaluation"}[step]
                raise ConfigError(f"{fold}: the {what} failed; {path} ends with\n  {tail}")
    result = Report.read(folder / "report.json")
    names = {short: name for short, name in pooling.SHORT.items() if name in result.figures}
    shown = "  ".join(f"{short} {four_digits(result.value(name))}" for short, name in names.items())
    print_now(f"{fold}: {shown}  {time.perf_counter() - started:.0f} s")
    if job.arguments.evaluate_only or result.trained_on_some:
        print_now(f"    {shared_line(result)}")


def run_fold(job: CrossValidation, fold: str, devices: Queue[list[str]], commands: Commands) -> None:
    """Train and evaluate one fold in its folder, unless this has been done."""
    if commands.closed:
        return
    if is_evaluated(job.arguments.out / fold, job.arguments.parts):
        print_now(f"{fold}: done already")
        return
    environment = dict(os.environ)
    own = devices.get()  # GPUs of its own, if there are any
    if own:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(own)
    try:
        train_and_evaluate(job, fold, environment, commands)
    except BaseException:
        commands.closed = True  # at once, since this thread takes the next fold before the error is handled
        raise
    finally:
        devices.put(own)


# ---------------------------------------------------------------------------------------------- all folds


def commit_of_checkout() -> str | None:
    """Return the commit that is checked out, if the package is used from a checkout."""
    root = Path(ser.__file__).parents[1]
    if not (root / ".git").exists():  # an installed package may be inside another repository
        return None
    with suppress(OSError):  # no git
        asked = ["git", "-C", str(root), "rev-parse", "HEAD"]
        return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip() or None
    return None


def provenance(arguments: Namespace, selection: Selection) -> dict[str, Any]:
    """Return what is needed to repeat the run."""
    return {
        "command": arguments.command,
        "training_options": arguments.training_options,
        "versions": {"ser": ser.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "commit": commit_of_checkout(),
        "data": selection.to_dict(),
        "init": arguments.init,
        "init_sha256": None if is_preset(arguments.init) else weights_sha256(find_folder(arguments.init)),
        "models": str(arguments.evaluate_only) if arguments.evaluate_only else None,
        "processes": arguments.processes,
        "known_turns": arguments.known_turns,
    }


def write_eval_files(out: Path, folds: list[str]) -> None:
    """Write FOLD.eval files in the format of the paper's reproduce script, and print the pooled line."""
    right = total = 0
    for fold in folds:
        outcomes = Outcomes.read(out / fold / "predictions.csv")
        labelled = outcomes.text["emotion"] != ""
        correct = int((outcomes.text["emotion"] == outcomes.text["predicted"])[labelled].sum())
        result = Report.read(out / fold / "report.json")
        accuracy = correct / max(int(labelled.sum()), 1)
        lines = [table(result), shared_line(result), f"correct: {correct} , acc: {accuracy:.4f}"]
        (out / f"{fold}.eval").write_text("\n".join(lines) + "\n", encoding="utf-8")
        right, total = right + correct, total + int(labelled.sum())
    print_now(f"pooled: correct: {right} of {total} , acc: {right / max(total, 1):.4f}")


def heads_trained(arguments: Namespace) -> str:
    """Return --heads of the training options; "" where nothing is trained."""
    given = ArgumentParser(add_help=False, allow_abbrev=False)
    given.add_argument("--heads", nargs="?", default="auto", const="auto")
    return "" if arguments.evaluate_only else given.parse_known_args(arguments.training_options)[0].heads


def read_and_review(arguments: Namespace, selection: Selection) -> list[Utterance]:
    """Read the manifests, name emotions as training will, and show the classes; refuse two spellings of one."""
    utterances = selection.read(check_files=arguments.on_bad_audio == "fail", tell=print_now)
    chosen, sets = {"all folds": selection}, {"all folds": utterances}
    learnt = learns_emotions(heads_trained(arguments))
    if learnt:
        chosen, sets = named_for_training(chosen, sets, print_now, known=labels_of(arguments.init, "emotion"))
    chosen["all folds"].review(sets, print_now, emotions=None if learnt else [])
    return sets["all folds"]


def check_settings(job: CrossValidation, names: list[str], utterances: list[Utterance]) -> None:
    """Refuse to continue folds that were begun with other settings; record the settings of new folds."""
    given = job.arguments.evaluate_only
    settings = provenance(job.arguments, job.selection)
    for name in ("command", "commit", "versions", "processes"):  # these may differ
        del settings[name]
    settings["training_options"] = options = lasting(job.arguments.training_options)
    settings["content"] = contents(utterances)
    if "--vocab" in options[:-1]:
        settings["vocab_sha256"] = digest(Path(options[options.index("--vocab") + 1]))

    def as_written() -> dict[str, Any]:
        return contents(replace(job.selection, label_map={}, literal_labels=True).read(check_files=False))

    for name in names:
        model = {"model_sha256": weights_sha256(given / name)} if given else {}
        check_same(job.arguments.out / name, settings | {"weights": job.weights} | model, as_written)


def free_devices(arguments: Namespace) -> Queue[list[str]]:
    """Return a queue of sets of GPUs, which folds take and give back."""
    count = torch.cuda.device_count()
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",") if count else []
    devices: Queue[list[str]] = Queue()
    for share in device_shares(gpus, folds=arguments.parallel, processes=arguments.processes):
        devices.put(share)
    return devices


def run_folds(job: CrossValidation, names: list[str]) -> None:
    """Train and evaluate the folds, several at once if asked for; after a failure, no new fold begins."""
    devices, commands = free_devices(job.arguments), Commands()
    with stop_on_signals() as asked, ThreadPoolExecutor(job.arguments.parallel) as pool:
        waiting: set[Future[None]] = {pool.submit(run_fold, job, name, devices, commands) for name in names}
        failure: BaseException | None = None
        while waiting:
            done, waiting = wait(waiting, timeout=POLL, return_when=FIRST_COMPLETED)
            failed = [error for future in done if (error := future.exception()) is not None]
            if asked and not commands.stopped:
                commands.stop(asked.signal)
            if failed and failure is None:
                failure = failed[0]
                if commands.running and not commands.stopped:
                    print_now(f"{failure}\n(trainings that have begun are finished first)", to=sys.stderr)
    if failure is not None:
        raise failure
    if commands.stopped:  # the signal came after the last command of the last fold
        raise Stopped


def cross_validate(arguments: Namespace, selection: Selection) -> pooling.PooledReport:
    """Train and evaluate every fold, and write the pooled report."""
    protocol, out = selection.find_protocol(), arguments.out
    utterances = read_and_review(arguments, selection)
    folds = {fold.name: fold for fold in protocol.folds(utterances, seed=selection.seed)}
    chosen = (find_fold(protocol, utterances, name, seed=selection.seed).name for name in arguments.folds or folds)
    names = list(dict.fromkeys(chosen))
    audits = to_table([check_fold(folds[name], utterances, protocol) for name in names])
    weights = evaluated_weights(protocol, folds[names[0]].parts, arguments.weights)
    if given := arguments.evaluate_only:
        weights = "given"
        if missing := [name for name in names if not (given / name).is_dir()]:
            raise ConfigError(f"{given}: has no folder {', '.join(missing)}; it needs one per fold")
    print_now(f"{protocol.name}: {protocol.description}\n{audits}\nthe {weights} weights of each fold are judged")
    job = CrossValidation(arguments, selection, weights)
    check_settings(job, names, utterances)
    run_folds(job, names)
    parts = all_parts([*arguments.parts, *([CORPUS] if selection.sources else [])])
    result = pooling.pooled_report(out, names, protocol, resamples=arguments.resamples, parts=parts)
    result.weights, result.audit, result.repeat = weights, audits, provenance(arguments, selection)
    write_json(out / "report.json", result.to_dict())
    (out / "report.md").write_text(pooling.pooled_markdown(result), encoding="utf-8")
    pooling.write_curves(out / "curves.csv", {"": result.curve})
    draw(result.pooled, out)
    print_now(f"\n{table(result.pooled)}\n\n{out / 'report.md'}")
    if given:
        write_eval_files(out, names)
    return result


# ---------------------------------------------------------------------------------------------- ablations


def variants(arguments: Namespace) -> dict[str, list[str]]:
    """Return value of the ablation -> the training options for it."""
    rest = arguments.training_options
    name, _, values = arguments.ablation.partition("=")
    chosen = [value for value in values.split(",") if value]
    if name not in ("alpha", "heads") or not chosen or len(set(chosen)) < len(chosen):
        raise ConfigError(
            f"--ablation {arguments.ablation}: expected alpha=0,0.001,0.01,0.1 or heads=emotion,emotion+ctc, each "
            "value once"
        )
    if name in [option.lstrip("-").partition("=")[0] for option in rest]:
        raise ConfigError(f"give --ablation {name}=... or --{name}, not both")
    if name == "heads" and any("speaker" in value for value in chosen) and not any("--beta" in o for o in rest):
        raise ConfigError("a speaker head needs a weight: add --beta, such as --beta 0.1")
    return {value: [f"--{name}", value.replace("+", ",")] for value in chosen}


def beside_table_3(summary: dict[str, Any]) -> list[str]:
    """Return the paper's own row of its Table 3 beside ours, and whether they may be compared."""
    count = len(summary["folds"])
    same = summary["protocol"] == "paper10" and count == 10 and summary["utterances"] == PAPER_UTTERANCES
    same = same and summary["weights"] == "last"
    lines = ["", "Beside Table 3 of Cai et al. (2021):", "", "| | folds | utterances | WA |", "|---|---|---|---|"]
    lines += [f"| Cai et al., alpha 0.1 | 10, by recording side | {PAPER_UTTERANCES} | {PAPER_TABLE_3:.4f} |"]
    for value, row in summary["values"].items():
        cells = [f"alpha {value}", f"{count} of {summary['protocol']}", str(summary["utterances"])]
        lines += [f"| {' | '.join(cells)} | {four_digits((row['accuracy'] or {}).get('value'))} |"]
    note = "The same folds and utterances: on IEMOCAP's own recordings the two may be compared."
    if not same:
        note = "**Other folds, utterances or weights than the paper's: not comparable.**"
    return [*lines, "", note]


def turns_for_all_folds(selection: Selection) -> int:
    """Return how many turns of each training speaker every fold can hold out; 0 if test speakers are known."""
    utterances, protocol = selection.read(), selection.find_protocol()
    folds = list(protocol.folds(utterances, seed=selection.seed))
    audits = [check_fold(fold, utterances, protocol) for fold in folds]
    if any(audit.fractions("test").get("speakers") != 0.0 for audit in audits):
        return 0
    return min(usual_known_turns(fold, utterances) for fold in folds)


def run_ablation(arguments: Namespace, selection: Selection) -> None:
    """Cross-validate with each value, and write a table of all."""
    name = arguments.ablation.partition("=")[0]
    if name == "heads" and "speaker" in arguments.ablation and arguments.known_turns is None:
        # If a speaker head needs held-out turns, all variants train without these, so that only the heads differ.
        turns = turns_for_all_folds(selection)
        arguments.known_turns, selection = turns, replace(selection, known_turns=turns)
    results, predictions = {}, {}
    for value, options in variants(arguments).items():
        print_now(f"\n{name} {value}")
        changed = Namespace(**vars(arguments))
        changed.out = arguments.out / f"{name}={value}"
        changed.training_options = [*arguments.training_options, *options]
        results[value] = cross_validate(changed, selection)
        files = [changed.out / fold / "predictions.csv" for fold in results[value].folds]
        predictions[value] = Outcomes.joined([Outcomes.read(file) for file in files])
    summary = pooling.ablation_summary(name, results, predictions, resamples=arguments.resamples)
    curves = {value: result.curve for value, result in results.items()}
    write_json(arguments.out / "ablation.json", summary)
    text = pooling.ablation_markdown(summary, beside_table_3(summary) if name == "alpha" else ())
    (arguments.out / "ablation.md").write_text(text, encoding="utf-8")
    pooling.write_curves(arguments.out / "curves.csv", curves)
    if summary["drawn"]:
        draw_curves({f"{name} {value}": curve for value, curve in curves.items()}, arguments.out / "curves.png")
    print_now(f"\n{text}\n{arguments.out / 'ablation.md'}")


def run(arguments: Namespace) -> int:
    """Cross-validate, once or for each value of an ablation."""
    refuse_contradictions(arguments)
    needs_matplotlib()
    selection = selected_data(arguments)
    try:
        if arguments.ablation:
            run_ablation(arguments, selection)
        else:
            cross_validate(arguments, selection)
    except OSError as error:
        raise FileError(f"{error.filename or arguments.out}: {error.strerror or error}") from error
    return 0

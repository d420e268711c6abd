"""Measure how a model performs on corpora that it was not trained on: train on each, test on each, leave each out.

This trains a linear head on the vectors of a frozen model, which takes minutes:

    ser crosscorpus --model runs/demo/best --corpora emodb.csv ravdess.csv resd.csv --out runs/cross

This uses random weights and four classes; a JSON file lists the corpora (path, root, columns, map, name):

    ser crosscorpus --model small --corpora corpora.json --classes angry happy neutral sad --out runs/cross

This trains whole models instead; options that are not listed above are passed to `ser train`:

    ser crosscorpus --train --model small --corpora emodb.csv ravdess.csv --out runs/cross-train \\
        --epochs 9 --rate 1e-3 --effective-batch 16

A figure is the unweighted accuracy (UA) over the classes that training and test have in common, with a 95 %
interval by bootstrap over speakers. Within one corpus the speakers are divided into folds, so that no speaker is
in both training and test. If the column part or split of a corpus has the value test, only these utterances are
tested, in all cells.

The command writes to --out: crosscorpus.json, crosscorpus.csv (a line for each cell), crosscorpus.png, and
vectors/, or trainings/ with a folder for each training. The same command continues where it stopped, and does not
do again what is there. If it is asked to stop (SIGTERM, SIGUSR1, SIGHUP, Ctrl-C) during a training, it passes the
signal on and ends with status 75.
"""

import hashlib
import json
import re
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import ser
from ser.cli.crossval import SETTLED, CrossValidation, check_same, errors_told, lasting, print_now, run_folds
from ser.data.labels import Labels
from ser.data.manifest import Utterance, write_manifest
from ser.data.protocols import folder_names
from ser.data.selection import Selection, add_reading_arguments, selected_data, with_usual_names
from ser.data.text import did_you_mean
from ser.data.workers import WORKER_SECONDS
from ser.device import choose_device, cpu_threads, freed_memory_kept
from ser.errors import AudioError, ConfigError, FileError, indented, printable, summary
from ser.files import write_json
from ser.folder import is_preset
from ser.models.pretrained import find_folder
from ser.recognizer import Recognizer
from ser.scores import across, probe
from ser.scores.across import Cell, Heard, Piece, Result
from ser.scores.pictures import draw_corpora, needs_matplotlib
from ser.scores.report import Outcomes, Report
from ser.train.content import contents, weights_sha256

__all__ = ["add_arguments", "errors_told", "parse", "run"]

OF_TRAININGS = SETTLED | {"--init", "--data", "--protocol", "--out"}  # settled here, and no option of a training
LINEAR, WHOLE = "linear (ridge)", "whole trainings"  # what crosscorpus.json calls the heads
UNREAD = "could not be read when the vectors were computed"


# -------------------------------------------------------------------------------------------------- arguments


def add_arguments(parser: ArgumentParser) -> None:
    """Add the flags of the command, the common ones first."""
    parser.allow_abbrev = False
    add = parser.add_argument_group("model and corpora").add_argument
    add("--model", required=True, help="model folder, its OWNER/NAME on the Hugging Face hub, or small, base, ... "
        "(random weights); with --train: the initial weights")  # fmt: skip
    add("--corpora", nargs="+", type=Path, required=True, metavar="MANIFEST", help="two or more, each a corpus "
        "that is called like its file or folder; or one JSON file that lists them")  # fmt: skip
    add("--out", type=Path, help="folder for the results (default: only show the table)")
    add("--classes", nargs="+", metavar="EMOTION", help="use only these emotions (default: all that the two "
        "corpora of a cell share)")  # fmt: skip
    add("--folds", type=int, default=5, help="number of folds of speakers for the test within a corpus; 0: test "
        "on other corpora only (default: %(default)s)")  # fmt: skip
    add_reading_arguments(parser.add_argument_group("manifests").add_argument)
    add = parser.add_argument_group("linear head").add_argument
    add("--layers", default="mean", help="layers that make the vector: mean (over all layers), all "
        "(concatenated), weighted (the mean that the model has learnt), or numbers such as 0,4 "
        "(default: %(default)s)")  # fmt: skip
    add("--workers", type=int, help="processes that decode audio (default: 0)")
    add("--timeout", type=float, metavar="SECONDS",
        help=f"seconds to wait for a worker process (default: {WORKER_SECONDS:g})")  # fmt: skip
    add = parser.add_argument_group("whole trainings").add_argument
    add("--train", action="store_true", help="train the whole model for each training set; needs --out")
    add("--processes", type=int, default=1, help="processes of each training, under torchrun (default: 1)")
    add("--parallel", type=int, default=1, help="trainings at once, each with a GPU of its own where there are "
        "any (default: %(default)s)")  # fmt: skip
    add = parser.add_argument_group("figures and machine").add_argument
    add("--resamples", type=int, default=1000, help="resamples of the bootstrap (default: %(default)s)")
    add("--no-pictures", action="store_true", help="do not draw (drawing needs matplotlib)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    add("--on-bad-audio", choices=["fail", "skip"], default="fail", help="recordings that cannot be read end the "
        "run, or are left out and counted (default: %(default)s)")  # fmt: skip
    add("--max-bad-audio", type=float, default=0.01, help="largest share of a corpus that skip may leave out "
        "(default: %(default)s)")  # fmt: skip


def parse(parser: ArgumentParser, argv: list[str]) -> Namespace:
    """Read the arguments; those that are not known go to training."""
    arguments, options = parser.parse_known_args(argv)
    arguments.training_options, arguments.command = options, ["ser", "crosscorpus", *argv]
    return arguments


def check_arguments(arguments: Namespace) -> None:
    """Raise ConfigError for arguments that are missing, contradict each other or are out of range."""
    check_training_options(arguments)
    check_ranges(arguments)
    if arguments.train and (arguments.out is None or arguments.layers != "mean"):
        lacks = "needs --out" if arguments.out is None else "takes no --layers"
        raise ConfigError(f"--train {lacks}: whole models are trained, a folder for each")
    if arguments.out is not None and arguments.out.is_file():
        raise ConfigError(f"--out {arguments.out}: is a file; expected a folder")
    check_out(arguments)


def check_ranges(arguments: Namespace) -> None:
    """Raise ConfigError for numbers that are out of range."""
    if min(arguments.processes, arguments.parallel, arguments.resamples) < 1:
        raise ConfigError("--processes, --parallel and --resamples must be 1 or more")
    for name in () if arguments.train else ("processes", "parallel"):
        if getattr(arguments, name) > 1:
            raise ConfigError(f"--{name} {getattr(arguments, name)}: is of whole trainings, so it needs --train")
    if (arguments.workers or 0) < 0:
        raise ConfigError(f"--workers {arguments.workers}: expected 0 or more")
    if arguments.timeout is not None and not 0 < arguments.timeout < float("inf"):
        raise ConfigError(f"--timeout {arguments.timeout}: expected seconds, more than 0")
    if not 0 <= arguments.max_bad_audio <= 1:
        raise ConfigError(f"--max-bad-audio {arguments.max_bad_audio}: expected a share from 0 to 1")
    if arguments.folds < 0 or arguments.folds == 1:
        raise ConfigError(f"--folds {arguments.folds}: expected 2 or more, or 0 for none")


def check_training_options(arguments: Namespace) -> None:
    """Raise ConfigError for options of `ser train` that cannot be passed on."""
    options = [part for option in arguments.training_options for part in option.split("=", 1)]
    if options and not arguments.train:
        raise ConfigError(f"{options[0]}: is not an option of this command; options of ser train need --train")
    if own := sorted({*options} & OF_TRAININGS):
        raise ConfigError(f"{', '.join(own)}: this command sets it itself (--model gives the initial weights)")
    for name, value in pairwise(options):
        if name == "--heads" and not {"auto", "emotion"}.intersection(value.split(",")):
            raise ConfigError(f"--heads {value}: the table needs emotion among the heads")


def check_out(arguments: Namespace) -> None:
    """Raise ConfigError if --out has results of the other kind, which would be replaced."""
    before, now = None, WHOLE if arguments.train else LINEAR
    if arguments.out is not None:
        with suppress(OSError, ValueError, AttributeError):  # damaged results may be replaced
            before = json.loads((arguments.out / "crosscorpus.json").read_text()).get("head")
    if before not in (None, now):
        raise ConfigError(f"--out {arguments.out}: has results of {before}; choose another --out")


# ----------------------------------------------------------------------------------------------------- corpora


def compared_classes(arguments: Namespace, utterances: list[Utterance]) -> set[str]:
    """Return the emotions to compare, all or those of --classes. Raises ConfigError for one that is not there."""
    heard = {u.emotion for u in utterances if u.emotion is not None}
    if unknown := [name for name in arguments.classes or () if name not in heard]:
        near, there = did_you_mean(unknown[0], sorted(heard)), summary(sorted(heard))
        raise ConfigError(f"--classes {unknown[0]}: no utterance has this emotion{near}; there are {there}")
    classes = heard.intersection(arguments.classes or heard)
    if arguments.classes and len(classes) < 2:
        raise ConfigError("--classes names one emotion; give two or more")
    return classes


def read_corpora(arguments: Namespace) -> tuple[list[Utterance], Selection]:
    """Read all corpora, show their classes, and return the utterances that have one, and what names the data."""
    chosen = selected_data(arguments, arguments.corpora, corpora=True)
    utterances = chosen.read(check_files=arguments.on_bad_audio == "fail", tell=print_now)
    named, sets = with_usual_names({"corpora": chosen}, {"corpora": utterances}, print_now)
    named["corpora"].review(sets, print_now, emotions=None)
    utterances, lines = across.with_own_parts(sets["corpora"])
    for line in lines:
        print_now(line)
    corpora = list(dict.fromkeys(u.corpus for u in utterances))
    if len(corpora) < 2:
        raise ConfigError(
            f"there is one corpus, {corpora[0]!r}; give two or more, each with a manifest of its own"
        )
    classes = compared_classes(arguments, utterances)
    labelled = [u for u in utterances if u.emotion in classes]
    left = {u.corpus for u in labelled}
    if lacking := [name for name in corpora if name not in left]:
        of = " of --classes" if arguments.classes else ""
        raise ConfigError(f"no utterance of the corpus {lacking[0]!r} has an emotion{of}; see --columns and --map")
    return labelled, named["corpora"]


# ------------------------------------------------------------------------------------------------- linear head


def find_model(arguments: Namespace) -> Recognizer:
    """Load --model, or make one with the random weights of a preset."""
    device = choose_device(arguments.device, 0)
    if not is_preset(arguments.model):
        return ser.load(arguments.model, device=device)
    recognizer, _ = Recognizer.create(arguments.model, Labels.of(emotions=["", " "]))
    recognizer.model.eval().to(device)
    return recognizer


def check_read(name: str, errors: dict[int, Any], total: int, arguments: Namespace) -> None:
    """Raise AudioError where more recordings cannot be read than may be left out; say how many are."""
    limit = arguments.max_bad_audio if arguments.on_bad_audio == "skip" else 0.0
    if errors and len(errors) > limit * total:
        lines = indented(str(error) for error in errors.values())
        raise AudioError(f"{len(errors)} of {total} recordings of {name} cannot be used:{lines}")
    if errors:
        print_now(f"{name}: {len(errors)} of {total} recordings cannot be read and are left out")


def unread_of(utterances: list[Utterance], known: Tensor) -> dict[int, str]:
    """Return the number of each utterance without a vector, and a line on it."""
    return {i: f"{utterances[i].file}: {UNREAD}" for i in (~known).nonzero().flatten().tolist()}


def vectors_of_corpora(
    recognizer: Recognizer, utterances: list[Utterance], arguments: Namespace
) -> tuple[Tensor, Tensor]:
    """Compute the vectors of all corpora, or take those that --out has: (N, D), and which are known, (N,)."""
    rows: dict[str, list[int]] = {}
    for i, u in enumerate(utterances):
        rows.setdefault(u.corpus, []).append(i)
    folders, model = folder_names(rows), f"{probe.weights_digest(recognizer)} {arguments.layers}"
    parts: dict[str, tuple[Tensor, Tensor]] = {}
    options: dict[str, Any] = {"layers": arguments.layers, "workers": arguments.workers or 0}
    options["timeout"] = arguments.timeout or WORKER_SECONDS
    silent = not sys.stderr.isatty()
    with tqdm(total=len(utterances), unit="utterance", leave=False, disable=silent) as bar:
        for name, numbers in rows.items():
            bar.set_description(f"vectors of {folders[name]}")
            own = [utterances[i] for i in numbers]
            digest = hashlib.sha256(f"{model} {probe.recordings_digest(own)}".encode()).hexdigest()[:16]
            path = arguments.out and arguments.out / "vectors" / f"{folders[name]}-{digest}.safetensors"
            kept = probe.read_kept(path, len(own)) if path else None
            if kept is None:
                vectors, errors = probe.vectors_of(recognizer, own, progress=bar.update, **options)
                check_read(name, errors, len(own), arguments)
                kept = vectors, torch.tensor([i not in errors for i in range(len(own))])
                if path:
                    probe.keep(path, *kept)
                tqdm.write(printable(f"{name}: {len(own)} vectors of {vectors.shape[1]} numbers"), file=sys.stderr)
            else:
                check_read(name, unread_of(own, kept[1]), len(own), arguments)
                bar.update(len(own))
            parts[name] = kept
    order = torch.tensor([i for numbers in rows.values() for i in numbers]).argsort()
    vectors, known = (torch.cat(part)[order] for part in zip(*parts.values(), strict=True))
    return vectors, known


class LinearHeads:
    """Train the linear heads of the cells, one for each training set and its classes."""

    def __init__(self, utterances: list[Utterance], vectors: Tensor, known: Tensor) -> None:
        self.utterances, self.vectors, self.known = utterances, vectors, known
        self.heads: dict[tuple[tuple[int, ...], tuple[str, ...]], probe.LinearHead] = {}

    def head(self, piece: Piece, classes: tuple[str, ...]) -> probe.LinearHead:
        """Return the head of a training set, of which some can be read, and classes."""
        key = piece.train, classes
        if key not in self.heads:
            rows = [i for i in piece.train if self.known[i]]
            labels = torch.tensor([classes.index(str(self.utterances[i].emotion)) for i in rows])
            speakers = [self.utterances[i].speaker for i in rows]
            self.heads[key] = probe.learn(self.vectors[rows], labels, len(classes), speakers)
        return self.heads[key]

    def predicted(self, cell: Cell) -> tuple[dict[int, str], list[float]]:
        """Return number of each tested utterance -> class, and the penalties of the heads."""
        answers: dict[int, str] = {}
        penalties = []
        for piece in cell.pieces:
            rows = [i for i in piece.test if self.known[i]]
            if not rows or not any(self.known[i] for i in piece.train):
                continue
            head = self.head(piece, cell.classes)
            answers |= zip(
                rows, (cell.classes[k] for k in head.classify(self.vectors[rows]).tolist()), strict=True
            )
            penalties.append(head.penalty)
        return answers, penalties


def linear_results(
    arguments: Namespace, utterances: list[Utterance], cells: list[Cell], heard: Heard
) -> Iterator[Result]:
    """Yield the result of a linear head for each cell."""
    torch.set_num_threads(cpu_threads())
    recognizer = find_model(arguments)
    with freed_memory_kept(recognizer.device):
        vectors, known = vectors_of_corpora(recognizer, utterances, arguments)
    heads = LinearHeads(utterances, vectors, known)
    for cell in tqdm(cells, desc="linear heads", unit="cell", leave=False, disable=not sys.stderr.isatty()):
        predicted, penalties = heads.predicted(cell)
        options = {"resamples": arguments.resamples, "penalties": penalties}
        yield across.score(utterances, cell, predicted, heard, **options)


# --------------------------------------------------------------------------------------------- whole trainings


@dataclass
class Training:
    """Hold one whole training: the numbers of the utterances that it learns from, and of those it is tested on."""

    train: tuple[int, ...]
    test: set[int]


@dataclass(frozen=True)
class Trainings(CrossValidation):
    """Describe what is done for each training, whose manifests stand in its folder."""

    def commands(self, fold: str) -> dict[str, list[str]]:
        """Return step -> the command that does it for a training."""
        arguments, folder = self.arguments, self.arguments.out / fold
        same = ["--literal-labels", "--on-bad-audio", arguments.on_bad_audio]
        same += ["--max-bad-audio", str(arguments.max_bad_audio), "--device", arguments.device]
        for name in ("workers", "timeout"):
            value = getattr(arguments, name)
            same += [] if value is None else [f"--{name}", str(value)]
        valid = folder / "valid.csv"
        train = [*self.launcher(), "-m", "ser", "train", *same, "--train", str(folder / "train.csv")]
        train += ["--valid", str(valid), "--allow-overlap", "speakers"] if valid.exists() else []
        train += ["--init", arguments.model, "--out", str(folder / "run"), "--heads", "emotion"]
        weights = folder / "run" / ("best" if valid.exists() else "last")
        judge = [sys.executable, "-m", "ser", "evaluate", *same, "--manifest", str(folder / "test.csv")]
        judge += ["--model", str(weights), "--out", str(folder), "--no-pictures", "--resamples", "1"]
        return {"train": [*train, *arguments.training_options], "judge": judge}


def joined(names: Sequence[str]) -> str:
    """Join names so that no others give the same text: a plus, space or percent sign in a name becomes %2B."""
    return "+".join(re.sub("[%+ ]", lambda sign: f"%{ord(sign[0]):02X}", name) for name in names)


def training_name(utterances: list[Utterance], cell: Cell, number: int) -> str:
    """Name the training of a piece of a cell; the classes are named where they are not all of the training set."""
    name = joined(cell.train)
    if len(cell.pieces) > 1:
        name += f" fold {number} of {len(cell.pieces)}"
    every = {u.emotion for u in utterances if u.corpus in cell.train}
    return name if every == {*cell.classes} else f"{name} {joined(cell.classes)}"


def all_trainings(utterances: list[Utterance], cells: list[Cell]) -> tuple[dict[str, Training], list[list[str]]]:
    """Return the training of each folder, and the folders of each cell; several cells may use one training."""
    called = [[training_name(utterances, c, k) for k in range(1, len(c.pieces) + 1)] for c in cells]
    folders = folder_names(dict.fromkeys(name for names in called for name in names))
    trainings: dict[str, Training] = {}
    for cell, names in zip(cells, called, strict=True):
        for name, piece in zip(names, cell.pieces, strict=True):
            training = trainings.setdefault(folders[name], Training(piece.train, set()))
            assert training.train == piece.train
            training.test.update(piece.test)
    return trainings, [[folders[name] for name in names] for names in called]


def write_training(folder: Path, training: Training, utterances: list[Utterance], arguments: Namespace) -> None:
    """Write the manifests of a training; refuse a folder that was begun with other settings or data.

    If other utterances are to be tested than before, the evaluation is done again, and the training is not.
    """
    rows = [utterances[i] for i in training.train]
    valid = [u for u in rows if across.part_of(u) == "valid"]
    train = [u for u in rows if across.part_of(u) != "valid"]
    if not train:
        raise ConfigError(f"{folder.name}: all {len(valid)} utterances of this training are for validation")
    init = None if is_preset(arguments.model) else weights_sha256(find_folder(arguments.model))
    settings: dict[str, Any] = {
        "data": {},
        "content": contents(train),
        "valid": contents(valid),
        "init": arguments.model,
    }
    settings |= {"init_sha256": init, "training_options": lasting(arguments.training_options)}
    check_same(folder, settings, dict)
    for part, members in {"train": train, "valid": valid}.items():
        if members:
            write_manifest(folder / f"{part}.csv", members, literal_labels=True)
    test = [utterances[i] for i in sorted(training.test)]
    tested, new = folder / "test.csv", folder / "test-new.csv"
    write_manifest(new, test, literal_labels=True)
    same = tested.is_file() and tested.read_bytes() == new.read_bytes()
    if not same or is_of_others(folder, {u.id for u in test}):
        (folder / "report.json").unlink(missing_ok=True)  # first, in case that this process is killed
    new.replace(tested)


def is_of_others(folder: Path, tested: set[str]) -> bool:
    """Tell whether a finished evaluation is of other utterances; those that it could not read are not in it."""
    try:
        unread = Report.read(folder / "report.json").unread or 0
        ids = {*Outcomes.read(folder / "predictions.csv").text["id"]}
    except ConfigError:
        return False
    return not ids <= tested or len(tested - ids) != unread


def trained_results(
    arguments: Namespace, utterances: list[Utterance], cells: list[Cell], heard: Heard
) -> Iterator[Result]:
    """Yield the result of a whole training for each cell, after all trainings."""
    trainings, places = all_trainings(utterances, cells)
    print_now(f"{len(trainings)} trainings: {', '.join(trainings)}")
    below = Namespace(**vars(arguments) | {"out": arguments.out / "trainings", "parts": [], "evaluate_only": None})
    for name, training in trainings.items():
        write_training(below.out / name, training, utterances, below)
    run_folds(Trainings(below, Selection(""), ""), list(trainings))
    numbers = {u.id: i for i, u in enumerate(utterances)}
    answers: dict[str, dict[int, str]] = {}
    for name in trainings:
        text = Outcomes.read(below.out / name / "predictions.csv").text
        answers[name] = {numbers[id]: emotion for id, emotion in zip(text["id"], text["predicted"], strict=True)}
    for cell, names in zip(cells, places, strict=True):
        pairs = zip(names, cell.pieces, strict=True)
        predicted = {i: answers[name][i] for name, piece in pairs for i in piece.test if i in answers[name]}
        yield across.score(utterances, cell, predicted, heard, resamples=arguments.resamples)


# ---------------------------------------------------------------------------------------------------- the whole


def title(arguments: Namespace) -> str:
    """Say what the figures are."""
    if arguments.train:
        what = f"whole trainings from {arguments.model}"
    else:
        what = f"a linear head on {arguments.model} (layers: {arguments.layers})"
    return f"unweighted accuracy (UA) of {what}; the line below a figure has its 95 % interval over speakers"


def write_results(arguments: Namespace, results: list[Result], data: Selection, heard: Heard) -> None:
    """Write the matrix as JSON, CSV and picture."""
    head = {"training_options": arguments.training_options} if arguments.train else {"layers": arguments.layers}
    about: dict[str, Any] = {
        "model": str(arguments.model),
        "head": WHOLE if arguments.train else LINEAR,
    }
    about |= {**head, "command": arguments.command, "version": ser.__version__, "data": data.to_dict()}
    about |= {
        "resamples": arguments.resamples,
        "folds": arguments.folds,
        "model_heard_unknown": heard.unknown or None,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out / "crosscorpus.json", across.to_dict(results, about))
    across.write_csv(arguments.out / "crosscorpus.csv", results)
    if not arguments.no_pictures:
        numbered = draw_corpora(results, arguments.out / "crosscorpus.png")
        if numbered:
            names = ", ".join(f"{number} is {name}" for number, name in numbered.items())
            print_now(f"crosscorpus.png: no font has these names, so numbers stand for them: {names}")
    print_now(f"written to {arguments.out}")


def run(arguments: Namespace) -> int:
    """Fill the matrix, show and write it."""
    check_arguments(arguments)
    if arguments.out is not None and not arguments.no_pictures:
        needs_matplotlib()
    try:
        utterances, data = read_corpora(arguments)
        cells = across.plan_cells(utterances, folds=arguments.folds)
        if not any(cell.pieces for cell in cells):
            raise ConfigError("no two corpora have two classes in common; --map renames labels")
        heard = across.heard_by(arguments.model if is_preset(arguments.model) else find_folder(arguments.model))
        compute = trained_results if arguments.train else linear_results
        results = list(compute(arguments, utterances, cells, heard))
        lines = [
            title(arguments),
            *across.table_lines(results, heard.unknown),
            "",
            *across.notes(results, heard.unknown),
        ]
        print_now("\n".join(["", *lines]))
        if arguments.out is not None:
            write_results(arguments, results, data, heard)
    except OSError as error:
        raise FileError(f"{error.filename or arguments.out}: {error.strerror or error}") from error
    return 0

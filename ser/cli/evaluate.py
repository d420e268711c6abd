"""Evaluate a model on labelled recordings: every figure with its interval, by parts, as table, JSON and pictures.

    ser evaluate --model runs/demo/best --manifest data/demo/test.csv --out runs/demo/test

A fold of a protocol, on the part that its model was not trained on:

    ser evaluate --model runs/01F/last --data data/iemocap --root IEMOCAP_full_release \\
        --protocol paper10 --fold 01F --out runs/01F/test

On two processes (each recording is recognised exactly once):

    torchrun --standalone --nproc-per-node=2 -m ser evaluate --model FOLDER --manifest test.csv

Compute the figures on a model card again (--data, --root where the corpus has moved), and compare two models by
their predictions of the same recordings:

    ser evaluate --verify runs/01F/last
    ser evaluate --compare runs/a/predictions.csv runs/b/predictions.csv

Written to --out: report.json, predictions.csv (one row per recording), confusion.png, reliability.png, length.png.
Intervals are 95 % percentile bootstrap ones, over utterances and over speakers: the second say how few
people were heard. A model that training wrote says what it was trained on: what it shares with the recordings that
it is evaluated on is reported.
"""

import json
import sys
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import ser
from ser.cli import LAUNCHER
from ser.data.labels import DIMENSIONS
from ser.data.manifest import Utterance, map_for
from ser.data.protocols import KNOWN, overlap
from ser.data.selection import (
    Selection,
    add_data_arguments,
    selected_data,
    selected_sets,
    with_usual_names,
)
from ser.data.spellings import parse_map
from ser.data.text import Rewriting, clean
from ser.data.workers import WORKER_SECONDS
from ser.device import cpu_threads, freed_memory_kept
from ser.errors import ConfigError, FileError, SerError, Tell, brief_repr, printable, summary
from ser.files import write_json
from ser.models.pretrained import find_folder
from ser.recognizer import Recognizer
from ser.scores import card
from ser.scores import report as scores
from ser.scores.pictures import draw
from ser.scores.report import Outcomes, Report
from ser.train.bad_audio import BadAudio
from ser.train.distributed import World, joined_world
from ser.train.evaluation import evaluated_rows
from ser.train.log import say
from ser.train.processes import one_voice
from ser.train.verification import checks_of

errors_told = one_voice


# -------------------------------------------------------------------------------------------------- arguments


def add_arguments(parser: ArgumentParser) -> None:
    """Add the flags of the command, the common ones first."""
    add = parser.add_argument_group("model and data").add_argument
    add("--model", help="model folder, or its OWNER/NAME on the Hugging Face hub")
    add("--manifest", type=Path, nargs="+", help="labelled recordings; several manifests, or one JSON file that "
        "lists them, are several corpora")  # fmt: skip
    add("--out", type=Path, help="folder to write; shows the table alone without it")
    add("--card", action="store_true", help="put the figures on the model's card")
    add("--train", type=Path, nargs="+", metavar="MANIFEST", help="the training manifests, where the model does "
        "not name them: what is shared, and parts by seen and unseen transcript")  # fmt: skip
    add_data_arguments(parser)
    add = parser.add_argument_group("folds").add_argument
    add("--fold", help="name of the protocol's fold, such as 01F")
    add("--part", default="test", choices=["test", "valid", "train", KNOWN],
        help="of the fold (default: %(default)s)")  # fmt: skip
    add = parser.add_argument_group("figures").add_argument
    add("--parts", nargs="*", default=[], metavar="COLUMN", help="of the manifest, such as room: figures are "
        "reported for each of its values, besides those of the column kind")  # fmt: skip
    add("--resamples", type=int, default=1000, help="of the bootstrap (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the bootstrap (default: %(default)s)")
    add("--no-pictures", action="store_true", help="do not draw (drawing needs matplotlib)")
    add = parser.add_argument_group("instead of evaluating").add_argument
    add("--verify", type=Path, metavar="FOLDER", help="compute the figures on a model's card again")
    add("--tolerance", type=float, default=1e-6, help="of --verify: on other hardware a few recordings may be "
        "judged otherwise (default: %(default)s)")  # fmt: skip
    add("--compare", type=Path, nargs=2, metavar="PREDICTIONS", help="two predictions files: does the second "
        "differ from the first by more than chance?")  # fmt: skip
    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    add("--workers", type=int, default=0, help="processes that decode audio (default: %(default)s)")
    add("--timeout", type=float, default=WORKER_SECONDS, metavar="SECONDS",
        help="to wait for another process before giving up (default: %(default)g)")  # fmt: skip
    add("--on-bad-audio", choices=["fail", "skip"], default="fail", help="recordings that cannot be read end the "
        "run, or are left out and counted (default: %(default)s)")  # fmt: skip
    add("--max-bad-audio", type=float, default=0.01, help="largest share that skip may leave out "
        "(default: %(default)s)")  # fmt: skip


def refuse_renaming(arguments: Namespace) -> None:
    """Refuse flags about labels with --compare, which reads two files, or --verify, which uses the card.

    --compare takes --map, since the two files may have different names for the same classes.
    """
    flags = ("literal_labels", "columns", "no_usual_names") + (() if arguments.compare else ("map",))
    given = [f"--{name.replace('_', '-')}" for name in flags if getattr(arguments, name)]
    if given and (arguments.compare or arguments.verify):
        how = "labels stand in the files" if arguments.compare else "labels are read as the card says"
        mode = "--compare" if arguments.compare else "--verify"
        raise ConfigError(f"{mode} takes no {', '.join(given)}: {how}")


def check_flags(arguments: Namespace) -> None:
    """Raise ConfigError for arguments that contradict each other or are out of range."""
    resamples, seed = arguments.resamples, arguments.seed
    if resamples < 1 or seed < 0:
        raise ConfigError(f"--resamples {resamples} --seed {seed}: expected 1 or more, and 0 or more")
    refuse_renaming(arguments)
    if arguments.compare:
        return
    if not arguments.verify and (not arguments.model or bool(arguments.manifest) == bool(arguments.data)):
        raise ConfigError(
            "give --model and --manifest (or --data with --protocol and --fold), or --verify, or --compare"
        )
    if arguments.out is not None and arguments.out.is_file():
        raise ConfigError(f"--out {arguments.out}: is a file; expected a folder")
    if not 0 < arguments.timeout < float("inf"):
        raise ConfigError(f"--timeout {arguments.timeout}: expected seconds, more than 0")


def check_parts(named: list[str], utterances: list[Utterance]) -> None:
    """Raise ConfigError if --parts names something that is not a column of texts."""
    known = {name for u in utterances for name in u.extra} | {*scores.text_columns(scores.PARTS)}
    known = {name for name in known - scores.number_columns().keys() if not name.startswith("p_")}
    if unknown := [name for name in named if name not in known]:
        raise ConfigError(f"--parts {unknown[0]}: is no column of texts here; there are {summary(sorted(known))}")


# ------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class EvaluatedData:
    """Hold the data that a model is evaluated on, and what is known of its training.

    Attributes:
        selection: the selection that names the utterances.
        utterances: the utterances to evaluate.
        training: the utterances that the model was trained on; None: not known.
        about: how a report names the data.
        training_is_assumed: True if the model does not name its training data, and the fold's is assumed.
    """

    selection: Selection
    utterances: list[Utterance]
    training: list[Utterance] | None
    about: dict[str, Any]
    training_is_assumed: bool | None = None

    def shared_with_training(self) -> dict[str, float | None] | None:
        """Return kind -> the share of the utterances that is also in training; None: not known."""
        if self.training is None:
            return None
        shared = overlap(self.training, self.utterances)
        return {kind: None if s is None else s.fraction for kind, s in shared.items()}


def training_utterances(
    named: Selection | None, evaluated: Selection, everything: list[Utterance], *, told: bool = False
) -> list[Utterance] | None:
    """Return the utterances that a model was trained on; None if they are not known.

    ``everything`` is the manifest of the ``evaluated`` utterances. ``told`` says that the user named the training
    data; then an error is raised if they cannot be read.
    """
    if named is None:
        return None
    if told:
        return named.read(check_files=False)
    if named.sha256 == evaluated.sha256:  # the same manifest, perhaps at another place
        return named.of(named.find_fold(everything)[0], everything) if named.protocol else everything
    try:
        return named.utterances(check_files=False)
    except SerError:
        return None


def same_fold(first: Selection, second: Selection) -> bool:
    """Tell whether two selections are parts of the same fold of the same manifest."""
    names = ("sha256", "protocol", "fold", "seed")
    return all(getattr(first, name) == getattr(second, name) for name in names)


def read_manifest_data(arguments: Namespace, named: Selection | None, tell: Tell) -> EvaluatedData:
    """Read --manifest; ``named`` is the selection that the model was trained on.

    If training or evaluation has several corpora, ids and speakers are corpus/name in both.
    """
    if arguments.fold or arguments.known_turns:
        raise ConfigError("--fold and --known-turns need --protocol, which says how the manifest is divided")
    chosen = selected_data(arguments, arguments.manifest, corpora=bool(named and named.sources))
    if named is not None and chosen.sources:
        named = named.as_corpora()
    utterances = chosen.read(check_files=arguments.on_bad_audio == "fail", tell=tell)
    training = training_utterances(named, chosen, utterances, told=bool(arguments.train))
    return EvaluatedData(chosen, utterances, training, {"manifest": chosen.data})


def read_fold_data(arguments: Namespace, named: Selection | None, tell: Tell) -> EvaluatedData:
    """Read --data and select the part of the fold; ``named`` is the selection that the model was trained on."""
    arguments.data = arguments.data or arguments.manifest
    several = bool(named and named.sources)
    chosen = replace(selected_data(arguments, corpora=several), part=arguments.part)
    if named is not None and chosen.sources:
        named = named.as_corpora()
    if named is not None and same_fold(named, chosen) and arguments.known_turns is None:
        chosen = replace(chosen, known_turns=named.known_turns)
    everything = chosen.read(check_files=arguments.on_bad_audio == "fail", tell=tell)
    protocol, (fold, _) = chosen.find_protocol(), chosen.find_fold(everything)
    about = {"data": chosen.data, "protocol": protocol.name, "description": protocol.description}
    about |= {"fold": fold.name, "part": arguments.part}
    utterances = chosen.of(fold, everything)
    assumed = named is None
    named = named or replace(chosen, part="train")  # the assumption: it was trained on this fold
    training = training_utterances(named, chosen, everything, told=bool(arguments.train))
    return EvaluatedData(chosen, utterances, training, about, assumed or None)


def read_data(arguments: Namespace, record: dict | None, emotions: list[str], tell: Tell) -> EvaluatedData:
    """Read the data for evaluating the model of a record (see `ser.scores.card`), and show their labels."""
    named = None if record is None else card.trained_on(record)
    manifest = arguments.manifest and not arguments.protocol
    if arguments.train:
        sets = {"data": arguments.manifest} if manifest else {}
        named = selected_sets(arguments, sets | {"train": arguments.train})["train"]
    data = (read_manifest_data if manifest else read_fold_data)(arguments, named, tell)
    if emotions:
        chosen, sets_read = {"data": data.selection}, {"data": data.utterances}
        chosen, sets_read = with_usual_names(chosen, sets_read, tell, classes=emotions)
        data = replace(data, selection=chosen["data"], utterances=sets_read["data"])
    if data.selection.sources and data.training:
        here, there = ({u.corpus for u in rows} for rows in (data.utterances, data.training))
        if new := sorted(here - there):
            has = f"training has {summary(sorted(there))}"
            tell(f"corpora that training does not name, whose speakers count as others: {summary(new)}; {has}")
    check_parts(arguments.parts, data.utterances)
    speakers = {u.speaker for u in data.training or () if u.speaker is not None}
    sets = {data.selection.part or "data": data.utterances}
    data.selection.review(sets, tell, emotions=emotions, speakers=speakers)
    return data


# ------------------------------------------------------------------------------------------------- evaluating


def with_corpora(arguments: Namespace, selection: Selection) -> Namespace:
    """Return the arguments so that figures are reported by corpus too, where several meet."""
    parts = [*arguments.parts, scores.CORPUS] if selection.sources else arguments.parts
    return Namespace(**vars(arguments) | {"parts": parts})


def outcomes_of(
    recognizer: Recognizer,
    utterances: list[Utterance],
    training: list[Utterance] | None,
    arguments: Namespace,
    world: World,
    out: Path | None = None,
    rewriting: Rewriting | None = None,
) -> Outcomes | None:
    """Recognise each utterance; None on ranks that only did their share of it.

    Args:
        recognizer: the model.
        utterances: what is evaluated.
        training: what the model was trained on; None: not known.
        arguments: of the command.
        world: the ranks that share the work.
        out: folder for predictions.csv; None: none is written.
        rewriting: gets what was changed in the references.
    """
    seen = None
    if training is not None:
        how: dict[str, Any] = {"orthography": recognizer.orthography, "tags": recognizer.tags}
        seen = frozenset(clean(u.text or "", **how) for u in training) - {""}
    rows = evaluated_rows(
        recognizer, utterances, seen_texts=seen, rewriting=rewriting, world=world,
        progress=world.is_main and sys.stderr.isatty(), workers=arguments.workers, timeout=arguments.timeout,
        bad_audio=BadAudio(world, policy=arguments.on_bad_audio, limit=arguments.max_bad_audio),
    )  # fmt: skip
    if not world.is_main:
        for _ in rows:
            pass
        return None
    parts = tuple(dict.fromkeys((*scores.PARTS, *arguments.parts)))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        return scores.write_rows(out / "predictions.csv", rows, recognizer.emotions, parts)
    return Outcomes.joined([Outcomes.of(recognizer.emotions, chunk, parts) for chunk in rows])


def known_turn_outcomes(
    recognizer: Recognizer, data: EvaluatedData, arguments: Namespace, world: World
) -> tuple[Selection, Outcomes] | None:
    """Recognise the turns that were held out of the speakers in training.

    A speaker head is not scored on strangers, but on these. None where there are none, and on ranks that only did
    their share.
    """
    if not recognizer.speakers or not data.selection.known_turns or arguments.part == KNOWN:
        return None
    known = replace(data.selection, part=KNOWN)
    turns = known.utterances(check_files=arguments.on_bad_audio == "fail")
    shared = overlap(data.training or [], turns)["recordings"]
    if shared is not None and shared.utterances:
        raise ConfigError(
            f"--known-turns {known.known_turns}: the model was trained on {shared.utterances} of them, "
            "as it held out others, or none"
        )
    outcomes = outcomes_of(recognizer, turns, data.training, arguments, world)
    return None if outcomes is None else (known, outcomes)


def unscored_labels(utterances: list[Utterance], recognizer: Recognizer) -> list[str]:
    """Return a line for each kind of label that is in no figure: the model lacks its head, or the class."""
    lines = []
    if recognizer.vocabulary is None and (texts := sum(bool(u.text) for u in utterances)):
        lines.append(f"the model writes no transcripts: the texts of {texts} utterances are in no figure")
    known = {name.lower() for name in recognizer.dimensions}
    for name in DIMENSIONS:
        if name not in known and (labels := sum(u.labels.get(name) is not None for u in utterances)):
            lines.append(f"the model gives no {name}: the labels of {labels} utterances are in no figure")
    speakers = Counter(u.speaker for u in utterances if u.speaker)
    if recognizer.speakers and speakers and speakers.keys().isdisjoint(recognizer.speakers):
        here, there = (summary(map(repr, names), 5) for names in (speakers, recognizer.speakers))
        lines.append(f"no speaker is one whom the model knows: here are {here}; it knows {there}")
    return lines


def figure_notes(result: Report, recognizer: Recognizer) -> list[str]:
    """Return notes that are needed to understand the figures."""
    lines = []
    if not result.figures:
        lines.append("no figure: no utterance has a label or text for a head of this model")
    if result.unread:
        lines.append(f"{result.unread} recordings could not be read and are in no figure")
    known, total = result.judged["speaker"], result.utterances
    if recognizer.speakers and known < total and (known or not result.speakers):  # else `unscored_labels` says it
        lines.append(f"speakers are judged on {known} of {total} utterances: the others' speakers are not known")
    if turns := result.known_turns:
        figure = turns.figures["speaker_accuracy"]
        low, high = figure.interval_utterances
        on = f"{turns.utterances} turns that were held out of the {turns.speakers} speakers in training"
        lines.append(f"speaker accuracy on {on}: {figure.value:.4f} ({low:.4f} to {high:.4f})")
    return [*lines, scores.shared_line(result)]


def evaluate_model(arguments: Namespace, world: World) -> bool:
    """Evaluate --model: print the table, and write the files for --out and --card."""
    tell = partial(say, world)
    recognizer = ser.load(arguments.model, device=world.device)
    record = card.read_record(find_folder(arguments.model))
    if arguments.card and record is None:
        raise ConfigError(f"--card: {arguments.model} has no {card.RECORD}, as training writes it")
    data = read_data(arguments, record, recognizer.emotions, tell)
    arguments = with_corpora(arguments, data.selection)
    rewriting = Rewriting()
    outcomes = outcomes_of(recognizer, data.utterances, data.training, arguments, world, arguments.out, rewriting)
    known = known_turn_outcomes(recognizer, data, arguments, world)
    if outcomes is None:
        return True
    score = partial(scores.report, resamples=arguments.resamples, seed=arguments.seed)
    result = replace(
        score(outcomes),
        about={"model": str(arguments.model), "selection": data.selection.to_dict(), **data.about},
        training_is_assumed=data.training_is_assumed,
        shared_with_training=data.shared_with_training(),
        unread=len(data.utterances) - len(outcomes),
        rewriting=rewriting,
    )
    entries = [(data.selection, result)]
    if known is not None and not result.judged["speaker"]:
        turns = score(known[1])
        if turns.judged["speaker"]:  # 0 if the model knows other speakers
            figures = {"speaker_accuracy": turns.figures["speaker_accuracy"]}
            result.known_turns = scores.KnownTurns(turns.utterances, turns.speakers, turns.judged, figures)
            entries.append((known[0], turns))
    print(scores.table(result))
    for note in (*unscored_labels(data.utterances, recognizer), *figure_notes(result, recognizer)):
        print(printable(note))
    if arguments.card:
        assert record is not None
        for selection, one in entries:
            record = card.with_evaluation(record, card.evaluation_entry(one, selection.to_dict()))
        card.write_card(find_folder(arguments.model), record)
    if arguments.out:
        write_json(arguments.out / "report.json", result.to_dict())
        if not arguments.no_pictures:
            draw(result, arguments.out, say=tell)
        tell(f"written to {arguments.out}")
    return True


# -------------------------------------------------------------------------------------------------- verifying


def moved(selection: Selection, arguments: Namespace) -> Selection:
    """Return the same selection, at the place that --data and --root give."""
    roots = arguments.root or [None]
    if len(roots) > 1:
        raise ConfigError("--verify takes one --root; a JSON list as --data names the root of each manifest")
    return selection.moved(arguments.data, roots[0])


def same_figures(entry: Mapping[str, Any], result: Report, tolerance: float) -> bool:
    """Print the figures of a card beside those computed now, and tell whether they are the same."""
    rows = card.differences(entry, result, tolerance=tolerance)
    for name, then, now, same in rows:
        if same and ", over " in name:  # the ends of intervals
            continue
        values = "  ".join("      -" if v is None else f"{v:7.4f}" for v in (then, now))
        print(f"  {printable(name):28} card {values} now  {'same' if same else 'DIFFERS'}")
    return all(same for *_, same in rows)


def verify_entry(
    entry: Mapping[str, Any], record: Mapping[str, Any], recognizer: Recognizer, arguments: Namespace, world: World
) -> bool:
    """Compute the figures of one evaluation on a card again, and tell whether they are the same."""
    if entry["selection"] is None:
        raise ConfigError(
            f"{arguments.verify}: the card does not name the data of its figures, so they cannot be computed"
        )
    selection = moved(Selection.from_dict(entry["selection"]), arguments)
    usual = {"on_bad_audio": "fail", "max_bad_audio": 0.0}
    bad_audio = {name: record["settings"].get(name, value) for name, value in usual.items()}
    as_trained = with_corpora(Namespace(**vars(arguments) | bad_audio), selection)
    outcomes = outcomes_of(recognizer, selection.utterances(check_files=False), None, as_trained, world)
    if outcomes is None:
        return True
    print(printable(f"{selection}: {len(outcomes)} utterances"))
    result = scores.report(outcomes, resamples=entry["resamples"], seed=entry["seed"])
    return same_figures(entry, result, arguments.tolerance)


def show_claims(claimed: list[str]) -> None:
    """Print the claims of a card that cannot be computed, with all settings in one line."""
    prefix = "settings."
    names = [name for name in claimed if not name.startswith(prefix)]
    settings = ", ".join(name.removeprefix(prefix) for name in claimed if name.startswith(prefix))
    names += [f"settings ({settings})"] if settings else []
    print(printable(f"claimed, and not computed here: {', '.join(names) or 'nothing'}"))


def verify_card(arguments: Namespace, world: World) -> bool:
    """Tell whether the card agrees with its record, and all that can be computed is the same again."""
    folder = arguments.verify
    record = card.read_record(folder)
    if record is None:
        raise ConfigError(f"{folder}: has no {card.RECORD}; only models that training wrote can be verified")
    recognizer = ser.load(folder, device=world.device)
    shown = (folder / card.CARD).read_text(encoding="utf-8") if (folder / card.CARD).is_file() else ""
    good = card.is_card_of(shown, record)
    if not good:
        say(world, f"{folder / card.CARD}: is not what {card.RECORD} says: one of them was edited")
    if not record["evaluations"]:
        say(world, f"{folder}: the card has no figures to verify")
        good = False
    checks, claimed = checks_of(record, recognizer, folder, partial(moved, arguments=arguments))
    for name, told, now, same in checks:
        good = good and same
        if not same:
            say(world, f"{name}: the card has {brief_repr(told, 100)}, but it is {brief_repr(now, 100)}")
    for entry in record["evaluations"]:
        good = verify_entry(entry, record, recognizer, arguments, world) and good
    if world.is_main:
        show_claims(claimed)
        print("the card holds" if good else "the card does not hold")
    return good


def run(arguments: Namespace) -> int:
    """Evaluate, verify or compare; the exit status is 1 for a card that is wrong."""
    check_flags(arguments)
    if arguments.compare:
        names = {} if arguments.map is None else map_for(parse_map(arguments.map), "emotion")
        first, second = (Outcomes.read(path).relabelled(names) for path in arguments.compare)
        compared = scores.compare_predictions(first, second, resamples=arguments.resamples, seed=arguments.seed)
        print(json.dumps(compared, indent=2))
        return 0
    torch.set_num_threads(cpu_threads())
    joined = joined_world(arguments.device, timeout=arguments.timeout, launcher=LAUNCHER)
    with joined as world, freed_memory_kept(world.device):
        try:
            good = verify_card(arguments, world) if arguments.verify else evaluate_model(arguments, world)
        except OSError as error:
            raise FileError(f"{error.filename or arguments.out}: {error.strerror or error}") from error
    return 0 if good else 1

"""Judge a model on labelled recordings: every figure with its interval, by parts, as a table, JSON and pictures.

    python examples/evaluate.py --model runs/demo/best --manifest data/demo/test.csv --out runs/demo/test

A fold of a protocol, on the part that its model was not trained on:

    python examples/evaluate.py --model runs/01F/last --data data/iemocap --root IEMOCAP_full_release \\
        --protocol paper10 --fold 01F --out runs/01F/test

On two processes (each recording is recognised exactly once):

    torchrun --standalone --nproc-per-node=2 examples/evaluate.py --model FOLDER --manifest test.csv

Compute the figures on a model card again (--data, --root where the corpus has moved), and compare two models by
their predictions of the same recordings:

    python examples/evaluate.py --verify runs/01F/last
    python examples/evaluate.py --compare runs/a/predictions.csv runs/b/predictions.csv

Written to --out: report.json, predictions.csv (one row per recording), confusion.png, reliability.png, length.png.
Intervals are 95 % percentile bootstrap ones, over utterances and over speakers: the second say how few
people were heard. A model that training wrote says what it was trained on: what it shares with what is judged is
reported.
"""

from __future__ import annotations

import os

LAUNCHER = os.getppid()  # now: the imports take seconds, in which it may end

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import ser
from ser.data.labels import DIMENSIONS
from ser.data.manifest import Utterance
from ser.data.protocols import KNOWN, overlap
from ser.data.selection import Selection, add_data_arguments, selected_data
from ser.data.spellings import check_spellings, label_lines
from ser.data.text import Rewriting, clean
from ser.data.workers import WORKER_SECONDS
from ser.device import cpu_threads, freed_memory_kept
from ser.errors import ConfigError, FileError, SerError, brief_repr, printable, summary
from ser.files import write_json
from ser.models.pretrained import find_folder
from ser.recognizer import Recognizer
from ser.scores import card
from ser.scores.pictures import draw
from ser.scores.report import Outcomes, compare, report, shared_line, table, write_rows
from ser.train.bad_audio import BadAudio
from ser.train.distributed import World, joined_world
from ser.train.evaluation import evaluated_rows
from ser.train.loop import say
from ser.train.processes import one_voice
from ser.train.verification import checks_of


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    description, _, usage = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=usage, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="model folder, or its OWNER/NAME on the Hugging Face hub")
    parser.add_argument("--manifest", type=Path, help="labelled recordings")
    parser.add_argument("--fold", help="name of the protocol's fold, such as 01F")
    parser.add_argument("--part", default="test", choices=["test", "valid", "train", KNOWN],
                        help="of the fold (default: %(default)s)")  # fmt: skip
    add_data_arguments(parser)
    parser.add_argument("--train", type=Path, help="the training manifest, where the model does not name it: what "
                        "is shared, and parts by seen and unseen transcript")  # fmt: skip
    parser.add_argument("--out", type=Path, help="folder to write; shows the table alone without it")
    parser.add_argument("--card", action="store_true", help="put the figures on the model's card")
    parser.add_argument("--no-pictures", action="store_true", help="do not draw (drawing needs matplotlib)")
    parser.add_argument("--resamples", type=int, default=1000, help="of the bootstrap (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument(
        "--workers", type=int, default=0, help="processes that decode audio (default: %(default)s)"
    )
    parser.add_argument("--timeout", type=float, default=WORKER_SECONDS, metavar="SECONDS",
                        help="to wait for another process before giving up (default: %(default)g)")  # fmt: skip
    parser.add_argument("--on-bad-audio", choices=["fail", "skip"], default="fail",
                        help="recordings that cannot be read end the run, or are left out and counted (default: "
                        "%(default)s)")  # fmt: skip
    parser.add_argument("--max-bad-audio", type=float, default=0.01, help="largest share that skip may leave out "
                        "(default: %(default)s)")  # fmt: skip
    parser.add_argument(
        "--verify", type=Path, metavar="FOLDER", help="compute the figures on a model's card again"
    )
    parser.add_argument("--tolerance", type=float, default=1e-6, help="of --verify: on other hardware a few "
                        "recordings may be judged otherwise (default: %(default)s)")  # fmt: skip
    parser.add_argument("--compare", type=Path, nargs=2, metavar="PREDICTIONS", help="two predictions files: does "
                        "the second differ from the first by more than chance?")  # fmt: skip
    return parser.parse_args(argv)


def training_utterances(
    named: Selection | None, judged: Selection, everything: list[Utterance], *, told: bool = False
) -> list | None:
    """What a model was trained on; None where nobody knows.

    ``everything`` is the manifest that is judged; ``told``: by the user, who wants to hear if it cannot be read.
    """
    if named is None:
        return None
    if told:
        return named.read(check_files=False)
    if named.sha256 == judged.sha256:  # the same manifest, wherever it lies now
        return named.of(named.find_fold(everything)[0], everything) if named.protocol else everything
    try:
        return named.utterances(check_files=False)
    except SerError:
        return None


def same_fold(first: Selection, second: Selection) -> bool:
    """Whether they are parts of the same fold of the same manifest."""
    names = ("sha256", "protocol", "fold", "seed")
    return all(getattr(first, name) == getattr(second, name) for name in names)


def read_data(
    arguments: argparse.Namespace, record: dict | None, tell: Callable[[str], None]
) -> tuple[Selection, list, list | None, dict]:
    """What is judged, by name and as utterances; what the model was trained on; what a report says of both."""
    named = None if record is None else card.trained_on(record)
    if arguments.train:
        named = selected_data(arguments, arguments.train)
    if arguments.manifest and not arguments.protocol:
        if arguments.fold or arguments.known_turns:
            raise ConfigError("--fold and --known-turns need --protocol, which says how the manifest is divided")
        chosen = selected_data(arguments, arguments.manifest)
        everything = judged = chosen.read(check_files=arguments.on_bad_audio == "fail", tell=tell)
        about: dict[str, Any] = {"manifest": chosen.data}
    else:
        arguments.data = arguments.data or arguments.manifest
        chosen = replace(selected_data(arguments), part=arguments.part)
        if named is not None and same_fold(named, chosen) and arguments.known_turns is None:
            chosen = replace(chosen, known_turns=named.known_turns)
        everything = chosen.read(check_files=arguments.on_bad_audio == "fail", tell=tell)
        protocol, (fold, _) = chosen.find_protocol(), chosen.find_fold(everything)
        judged = chosen.of(fold, everything)
        about = {"data": chosen.data, "protocol": protocol.name, "description": protocol.description}
        about |= {"fold": fold.name, "part": arguments.part}
        if named is None:  # as the protocol means it
            named = replace(chosen, part="train")
            about["training_is_assumed"] = True
    training = training_utterances(named, chosen, everything, told=bool(arguments.train))
    if training is not None:
        shared = overlap(training, judged)
        about["shared_with_training"] = {k: None if s is None else s.fraction for k, s in shared.items()}
    return chosen, judged, training, about


def outcomes_of(
    recognizer: Recognizer,
    utterances: list[Utterance],
    training: list | None,
    arguments: argparse.Namespace,
    world: World,
    out: Path | None = None,
    rewriting: Rewriting | None = None,
) -> Outcomes | None:
    """What became of each; None on ranks that only did their share of it. ``rewriting``: see `evaluated_rows`."""
    seen = None
    if training is not None:
        how: dict[str, Any] = {"orthography": recognizer.orthography, "tags": recognizer.tags}
        seen = frozenset(clean(u.text or "", **how) for u in training) - {""}
    rows = evaluated_rows(
        recognizer, utterances, world=world, seen_texts=seen, workers=arguments.workers,
        progress=world.is_main and sys.stderr.isatty(),
        bad_audio=BadAudio(world, policy=arguments.on_bad_audio, limit=arguments.max_bad_audio),
        timeout=arguments.timeout, rewriting=rewriting,
    )  # fmt: skip
    if not world.is_main:
        for _ in rows:
            pass
        return None
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        return write_rows(out / "predictions.csv", rows, recognizer.emotions)
    return Outcomes.joined([Outcomes.of(recognizer.emotions, chunk) for chunk in rows])


def not_judged(utterances: list[Utterance], recognizer: Recognizer) -> list[str]:
    """Say which labels are in no figure, a line a kind: the model has no head for them or does not know them."""
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


def show_notes(found: dict[str, Any], recognizer: Recognizer) -> None:
    """What has to be known about the figures."""
    if not found["figures"]:
        print("no figure: no utterance has a label or text for a head of this model")
    if found["unread"]:
        print(f"{found['unread']} recordings could not be read and are in no figure")
    known, total = found["judged"]["speaker"], found["utterances"]
    if recognizer.speakers and known < total and (known or not found["speakers"]):  # else `not_judged` says it
        print(f"speakers are judged on {known} of {total} utterances: the others' speakers are not known")
    if "known_turns" in found:
        on = found["known_turns"]
        figure = on["figures"]["speaker_accuracy"]
        low, high = figure["interval_utterances"]
        turns = f"{on['utterances']} turns that were held out of the {on['speakers']} speakers in training"
        print(f"speaker accuracy on {turns}: {figure['value']:.4f} ({low:.4f} to {high:.4f})")
    print(printable(shared_line(found)))


def evaluate_model(arguments: argparse.Namespace, world: World) -> bool:
    """--model: the table, and what --out and --card ask for."""
    recognizer = ser.load(arguments.model, device=world.device)
    record = card.read_record(find_folder(arguments.model))
    if arguments.card and record is None:
        raise ConfigError(f"--card: {arguments.model} has no {card.RECORD}, as training writes it")
    chosen, judged, training, about = read_data(arguments, record, lambda line: say(world, line))
    sets = {chosen.part or "data": judged}
    for line in label_lines(sets, emotions=recognizer.emotions):
        say(world, line)
    speakers = {u.speaker for u in training or () if u.speaker is not None}
    check_spellings(
        sets,
        emotions=recognizer.emotions,
        speakers=speakers,
        label_map=chosen.label_map,
        columns=["emotion", "speaker"] if recognizer.emotions else ["speaker"],
    )
    rewriting = Rewriting()
    outcomes = outcomes_of(recognizer, judged, training, arguments, world, arguments.out, rewriting)
    entries = []
    if outcomes is not None:
        found = report(outcomes, resamples=arguments.resamples, seed=arguments.seed)
        found |= {"model": str(arguments.model), "selection": chosen.to_dict(), **about}
        found |= {"unread": len(judged) - len(outcomes), **rewriting.to_dict()}
        entries.append((chosen, found))
    # A speaker head is not scored on strangers, but on turns that were held out of the speakers in training.
    known = replace(chosen, part=KNOWN) if chosen.known_turns and arguments.part != KNOWN else None
    if recognizer.speakers and known is not None:
        everything = chosen.read(check_files=arguments.on_bad_audio == "fail")
        turns = known.of(known.find_fold(everything)[0], everything)
        shared = overlap(training or [], turns)["recordings"]
        if shared is not None and shared.utterances:
            raise ConfigError(
                f"--known-turns {chosen.known_turns}: the model was trained on {shared.utterances} of them, "
                "as it held out others, or none"
            )
        of_known = outcomes_of(recognizer, turns, training, arguments, world)
        if of_known is not None and not found["judged"]["speaker"]:
            on_known = report(of_known, resamples=arguments.resamples, seed=arguments.seed)
            found["known_turns"] = {name: on_known[name] for name in ("utterances", "speakers", "judged")}
            if on_known["judged"]["speaker"]:
                found["known_turns"]["figures"] = {"speaker_accuracy": on_known["figures"]["speaker_accuracy"]}
                entries.append((known, on_known))
            else:  # a model of other speakers
                del found["known_turns"]
    if not world.is_main:
        return True
    print(table(found))
    for note in not_judged(judged, recognizer):
        print(printable(note))
    show_notes(found, recognizer)
    if arguments.card:
        assert record is not None
        for selection, entry in entries:
            record = card.with_evaluation(record, card.evaluation_entry(entry, selection.to_dict()))
        card.write_card(find_folder(arguments.model), record)
    if arguments.out:
        write_json(arguments.out / "report.json", found)
        if not arguments.no_pictures:
            draw(found, arguments.out, say=partial(say, world))
        say(world, f"written to {arguments.out}")
    return True


def moved(selection: Selection, arguments: argparse.Namespace) -> Selection:
    """The same utterances, where --data and --root say that they are now."""
    places = {"data": str(arguments.data) if arguments.data else None, "root": arguments.root}
    return replace(selection, **{name: value for name, value in places.items() if value})


def verify(arguments: argparse.Namespace, world: World) -> bool:
    """--verify: whether card and record agree, and all that can be computed comes out again."""
    folder = arguments.verify
    record = card.read_record(folder)
    if record is None:
        raise ConfigError(f"{folder}: has no {card.RECORD}; only models that training wrote can be verified")
    recognizer = ser.load(folder, device=world.device)
    shown = (folder / card.CARD).read_text(encoding="utf-8") if (folder / card.CARD).is_file() else ""
    good = shown == card.to_markdown(record)
    if not good:
        say(world, f"{folder / card.CARD}: is not what {card.RECORD} says: one of them was edited")
    if not record["evaluations"]:
        say(world, f"{folder}: the card has no figures to verify")
        good = False
    checks, claimed = checks_of(record, recognizer, folder, partial(moved, arguments=arguments))
    for name, told, now, same in checks:
        if not same:
            say(world, f"{name}: the card has {brief_repr(told, 100)}, but it is {brief_repr(now, 100)}")
    good = good and all(same for *_, same in checks)
    for entry in record["evaluations"]:
        if entry["selection"] is None:
            raise ConfigError(
                f"{folder}: the card does not name the data of its figures, so they cannot be computed"
            )
        selection = moved(Selection.from_dict(entry["selection"]), arguments)
        arguments.on_bad_audio = record["settings"].get("on_bad_audio", "fail")
        arguments.max_bad_audio = record["settings"].get("max_bad_audio", 0.0)
        outcomes = outcomes_of(recognizer, selection.utterances(check_files=False), None, arguments, world)
        if outcomes is None:
            continue
        print(printable(f"{selection}: {len(outcomes)} utterances"))
        found = report(outcomes, resamples=entry["resamples"], seed=entry["seed"])
        rows = card.differences(entry, found, tolerance=arguments.tolerance)
        for name, then, now, same in rows:
            if same and ", over " in name:  # the ends of intervals
                continue
            values = "  ".join("      -" if v is None else f"{v:7.4f}" for v in (then, now))
            print(f"  {printable(name):28} card {values} now  {'same' if same else 'DIFFERS'}")
        good = good and all(same for *_, same in rows)
    if world.is_main:
        prefix = "settings."
        rest = [name for name in claimed if not name.startswith(prefix)]
        settings = ", ".join(name.removeprefix(prefix) for name in claimed if name.startswith(prefix))
        rest += [f"settings ({settings})"] if settings else []
        print(printable(f"claimed, and not computed here: {', '.join(rest) or 'nothing'}"))
        print("the card holds" if good else "the card does not hold")
    return good


def refuse_renaming(arguments: argparse.Namespace) -> None:
    """--compare reads labels from two files, and --verify as the card says: nothing gives them other names."""
    flags = ("map", "literal_labels", "columns")
    given = [f"--{name.replace('_', '-')}" for name in flags if getattr(arguments, name)]
    if given and (arguments.compare or arguments.verify):
        how = "labels stand in the files" if arguments.compare else "labels are read as the card says"
        mode = "--compare" if arguments.compare else "--verify"
        raise ConfigError(f"{mode} takes no {', '.join(given)}: {how}")


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    if arguments.resamples < 1 or arguments.seed < 0:
        raise ConfigError(
            f"--resamples {arguments.resamples} --seed {arguments.seed}: expected 1 or more, and 0 or more"
        )
    refuse_renaming(arguments)
    if arguments.compare:
        first, second = (Outcomes.read(path) for path in arguments.compare)
        print(json.dumps(compare(first, second, resamples=arguments.resamples, seed=arguments.seed), indent=2))
        return
    if not arguments.verify and (not arguments.model or bool(arguments.manifest) == bool(arguments.data)):
        raise ConfigError(
            "give --model and --manifest (or --data with --protocol and --fold), or --verify, or --compare"
        )
    if arguments.out is not None and arguments.out.is_file():
        raise ConfigError(f"--out {arguments.out}: is a file; expected a folder")
    if not 0 < arguments.timeout < float("inf"):
        raise ConfigError(f"--timeout {arguments.timeout}: expected seconds, more than 0")
    torch.set_num_threads(cpu_threads())
    joined = joined_world(arguments.device, timeout=arguments.timeout, launcher=LAUNCHER)
    with joined as world, freed_memory_kept(world.device):
        try:
            good = verify(arguments, world) if arguments.verify else evaluate_model(arguments, world)
        except OSError as error:
            raise FileError(f"{error.filename or arguments.out}: {error.strerror or error}") from error
    if not good:
        sys.exit(1)


if __name__ == "__main__":
    with one_voice():
        main()

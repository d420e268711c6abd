"""Judge a model on labelled recordings: every figure with its interval, by parts, as a table, JSON and pictures.

    python examples/evaluate.py --model runs/demo/best --manifest data/demo/test.csv --out runs/demo/test

A fold of a protocol, on the part that its model was not trained on:

    python examples/evaluate.py --model runs/01F/last --data data/iemocap --root IEMOCAP_full_release \\
        --protocol paper10 --fold 01F --out runs/01F/test

On two processes (each recording is recognised exactly once):

    torchrun --standalone --nproc-per-node=2 examples/evaluate.py --model FOLDER --manifest test.csv

Compare two models by their predictions of the same recordings:

    python examples/evaluate.py --compare runs/a/predictions.csv runs/b/predictions.csv

Written to --out: report.json, predictions.csv (one row per recording), confusion.png, reliability.png, length.png.
Intervals are 95 % percentile bootstrap ones, over utterances and over speakers: the second say how few
people were heard.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

import ser
from ser.data.manifest import parse_columns, read_manifest
from ser.data.protocols import Audit, check_fold, find_fold, find_manifest, find_protocol
from ser.data.text import clean
from ser.errors import ConfigError
from ser.files import write_json
from ser.train.distributed import cpu_threads, joined_world
from ser.train.loop import say
from ser.train.pictures import draw
from ser.train.report import Outcomes, compare, judge, report, table, write_rows


def parse_arguments() -> argparse.Namespace:
    description, _, usage = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=usage, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="model folder, or its OWNER/NAME on the Hugging Face hub")
    parser.add_argument("--manifest", type=Path, help="labelled recordings")
    parser.add_argument(
        "--data", type=Path, help="manifest that --protocol divides, or a folder with iemocap4.csv"
    )
    parser.add_argument("--protocol", help="as in train_iemocap.py")
    parser.add_argument("--fold", help="name of the fold, such as 01F")
    parser.add_argument("--part", default="test", choices=["test", "valid", "train"],
                        help="of the fold (default: %(default)s)")  # fmt: skip
    parser.add_argument("--shares", nargs="*", default=[], help="what parts of column and kfold may share")
    parser.add_argument("--protocol-seed", type=int, default=0, help="of protocols that draw (default: 0)")
    parser.add_argument("--train", type=Path, help="the training manifest: parts by seen and unseen transcript")
    parser.add_argument("--root", type=Path, help="folder that the manifests' files are relative to")
    parser.add_argument("--columns", nargs="*", default=[], metavar="OURS=THEIRS", help="such as text=transcript")
    parser.add_argument("--out", type=Path, help="folder to write; shows the table alone without it")
    parser.add_argument("--no-pictures", action="store_true", help="do not draw (drawing needs matplotlib)")
    parser.add_argument("--resamples", type=int, default=1000, help="of the bootstrap (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument(
        "--workers", type=int, default=0, help="processes that decode audio (default: %(default)s)"
    )
    parser.add_argument("--compare", type=Path, nargs=2, metavar="PREDICTIONS", help="two predictions files: does "
                        "the second differ from the first by more than chance?")  # fmt: skip
    return parser.parse_args()


def read_parts(arguments: argparse.Namespace) -> tuple[list, list | None, dict]:
    """What is judged, what the model was trained on (None: not known), and what a report says about them."""
    columns = parse_columns(arguments.columns)

    def read(path: Path, **options) -> list:
        return read_manifest(path, root=arguments.root, columns=columns, **options)

    if arguments.manifest:
        training = read(arguments.train, check_files=False) if arguments.train else None
        return read(arguments.manifest), training, {"manifest": str(arguments.manifest)}
    if not arguments.protocol:
        raise ConfigError("--data needs --protocol, which says how it is divided")
    everything = read(find_manifest(arguments.data))
    protocol = find_protocol(arguments.protocol, shares=arguments.shares)
    fold = find_fold(protocol, everything, arguments.fold, seed=arguments.protocol_seed)
    audit = check_fold(fold, everything, protocol)
    parts = fold.select(everything)
    if arguments.part not in parts:
        raise ConfigError(f"fold {fold.name} of {protocol.name} has no part {arguments.part}")
    chosen: dict[str, Any] = {"data": str(arguments.data), "protocol": protocol.name}
    chosen |= {
        "description": protocol.description,
        "fold": fold.name,
        "part": arguments.part,
        "shared_with_training": shares_of(audit, arguments.part),
    }
    return parts[arguments.part], parts["train"], chosen


def shares_of(audit: Audit, part: str) -> dict[str, float | None]:
    """The share of the part's utterances whose speaker, transcript, ... training has too; None: not known."""
    found = audit.shared.get(("train", part), {})
    return {kind: None if shared is None else shared.fraction for kind, shared in found.items()}


def main() -> None:
    arguments = parse_arguments()
    if arguments.compare:
        first, second = (Outcomes.read(path) for path in arguments.compare)
        print(json.dumps(compare(first, second, resamples=arguments.resamples, seed=arguments.seed), indent=2))
        return
    if not arguments.model or bool(arguments.manifest) == bool(arguments.data):
        raise ConfigError("give --model and --manifest (or --data with --protocol and --fold), or --compare")
    torch.set_num_threads(cpu_threads())
    with joined_world(arguments.device) as world:
        utterances, training, chosen = read_parts(arguments)
        recognizer = ser.load(arguments.model, device=world.device)
        seen = None
        if training is not None:
            how = {"orthography": recognizer.orthography, "tags": recognizer.tags}
            seen = frozenset(clean(u.text or "", **how) for u in training) - {""}
        rows = judge(
            recognizer, utterances, world=world, seen_texts=seen, workers=arguments.workers,
            progress=world.is_main and sys.stderr.isatty(),
        )  # fmt: skip
        if not world.is_main:
            for _ in rows:  # its share of the work
                pass
            return
        if arguments.out:
            arguments.out.mkdir(parents=True, exist_ok=True)
            outcomes = write_rows(arguments.out / "predictions.csv", rows, recognizer.emotions)
        else:
            outcomes = Outcomes.joined([Outcomes.of(recognizer.emotions, chunk) for chunk in rows])
        found = report(outcomes, resamples=arguments.resamples, seed=arguments.seed)
        found |= {"model": str(arguments.model), **chosen}
        print(table(found))
        if not found["figures"]:
            print(
                "no figure: no utterance has a label or text for a head of this model (dimensions: training's log)"
            )
        known = found["judged"]["speaker"]
        if recognizer.speakers and known < len(outcomes):
            print(
                f"speakers are judged on {known} of {len(outcomes)} utterances: the others' speakers are not known"
            )
        if arguments.out:
            write_json(arguments.out / "report.json", found)
            if not arguments.no_pictures:
                draw(found, arguments.out)
            say(world, f"written to {arguments.out}")


if __name__ == "__main__":
    try:
        main()
    except (ser.SerError, OSError) as error:
        sys.exit(f"error: {error}")

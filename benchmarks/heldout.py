"""Hold out a part of four corpora, once and for all, to evaluate recipes on it.

    python benchmarks/heldout.py PREPARED            # checks that heldout.json is what is drawn from the corpora
    python benchmarks/heldout.py PREPARED --write    # draws it, with seed 0

PREPARED has NAME/NAME.csv as `ser prepare` writes it, for resd, ravdess, ased and nemo. Whole groups are held out:
speakers, and dialogues in RESD, which names no speakers (its parts may therefore share actors). A fifth of the
groups is the test part, a tenth the validation part; of nEMO's nine speakers two and one. heldout.json lists both,
and has the number of utterances and the sha256 of their sorted ids, so that another release is noticed. What has
been evaluated on these parts stands in docs/results.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ser
from ser.data.manifest import Utterance, read_manifest

LISTS = Path(__file__).with_name("heldout.json")
GROUPS = {"resd": "dialogue", "ravdess": "speaker", "ased": "speaker", "nemo": "speaker"}
PARTS = {"test": 5, "valid": 10}  # one group of so many


def group_of(utterance: Utterance, column: str) -> str:
    """Return the speaker of an utterance, or its dialogue."""
    name = utterance.speaker if column == "speaker" else utterance.extra.get(column)
    if name is None:
        raise ser.SerError(f"{utterance.id}: has no {column}")
    return name


def parts_of(name: str, utterances: Sequence[Utterance], held: dict[str, Any]) -> dict[str, list[Utterance]]:
    """Divide a corpus into train, valid and test by what ``held``, its entry of the lists, holds out."""
    part_of = {group: part for part in PARTS for group in held[part]["groups"]}
    parts: dict[str, list[Utterance]] = {part: [] for part in ("train", *PARTS)}
    for utterance in utterances:
        parts[part_of.get(group_of(utterance, GROUPS[name]), "train")].append(utterance)
    return parts


def draw(name: str, utterances: Sequence[Utterance]) -> dict[str, Any]:
    """Draw what is held out of a corpus."""
    groups = sorted({group_of(utterance, GROUPS[name]) for utterance in utterances})
    random.Random(0).shuffle(groups)
    held: dict[str, Any] = {"by": GROUPS[name]}
    total = len(groups)
    for part, share in PARTS.items():
        count = round(total / share)
        held[part], groups = {"groups": sorted(groups[:count])}, groups[count:]
    for part, rows in parts_of(name, utterances, held).items():
        ids = "\n".join(sorted(utterance.id for utterance in rows))
        summary = {"utterances": len(rows), "sha256": hashlib.sha256(ids.encode()).hexdigest()}
        held[part] = held.get(part, {}) | summary
    return held


def main() -> None:
    """Draw the parts, and write them or compare them with what is written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prepared", type=Path, help="folder with NAME/NAME.csv")
    parser.add_argument("--write", action="store_true", help="write heldout.json")
    arguments = parser.parse_args()
    drawn = {}
    for name in GROUPS:
        rows = read_manifest(arguments.prepared / name / f"{name}.csv", check_files=False)
        drawn[name] = draw(name, rows)
        print(name, {part: held["utterances"] for part, held in drawn[name].items() if part != "by"})
    if arguments.write:
        LISTS.write_text(json.dumps(drawn, indent=2) + "\n")
    elif json.loads(LISTS.read_text()) != drawn:
        sys.exit(f"error: {LISTS.name} is not what is drawn from these manifests")


if __name__ == "__main__":
    try:
        main()
    except ser.SerError as error:
        sys.exit(f"error: {error}")

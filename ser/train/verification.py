"""Compute a model card again: from the model, from its data, and from the run's folder.

Some facts, such as licences, cannot be computed. They are listed as claimed.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ser.audio import SAMPLE_RATE
from ser.data.manifest import Utterance
from ser.data.protocols import overlap
from ser.data.selection import Selection
from ser.errors import brief_repr
from ser.recognizer import Recognizer
from ser.scores.card import counts_of, expected_choice, facts_of, hours_of, same_data, trained_on
from ser.train.runs import CHANGEABLE, describe

Moved = Callable[[Selection], Selection]  # returns the same data at their present place

NO_DATA = hashlib.sha256().hexdigest()  # the fingerprint of no utterances, as a run without validation has it
OF_A_RECORD = {"heads", "emotions", "dimensions", "speakers_known", "parameters", "trained_on", "settings"}
OF_A_RECORD |= {"evaluations"}
# Settings that may differ between models of one run, since a run may continue elsewhere or with changed settings.
OF_A_START = CHANGEABLE | {"init", "cache", "versions", "world_size", "device", "workers"}


class Check(NamedTuple):
    """Hold a fact as the card tells it, the same fact as computed now, and whether both are the same."""

    name: str
    told: Any
    now: Any
    same: bool


def alike(told: Any, now: Any, *, common: bool = False) -> bool:
    """Tell whether two values are equal, floats to 1e-9; with ``common``, compare only keys that both have."""
    if isinstance(told, dict) and isinstance(now, dict):
        both = told.keys() & now.keys()
        same = common or told.keys() == now.keys()
        return same and all(alike(told[name], now[name], common=common) for name in both)
    if isinstance(told, list) and isinstance(now, list):
        return len(told) == len(now) and all(map(alike, told, now))
    if isinstance(told, bool) or isinstance(now, bool) or not isinstance(told, int | float):
        return told is now or (type(told) is type(now) and told == now)
    return isinstance(now, int | float) and math.isclose(told, now, rel_tol=1e-12, abs_tol=1e-9)


def check(name: str, told: Any, now: Any, *, common: bool = False) -> Check:
    """Compare two values with `alike`, as JSON stores them."""
    now = json.loads(json.dumps(now))
    return Check(name, told, now, alike(told, now, common=common))


def of_model(record: Mapping[str, Any], recognizer: Recognizer) -> list[Check]:
    """Check what follows from the model itself: heads, labels, size."""
    symbols = recognizer.vocabulary.tokens if recognizer.vocabulary is not None else []
    set_up = {"labels": recognizer.emotions, "speakers": recognizer.speakers, "dimensions": recognizer.dimensions}
    set_up |= {"symbols": symbols, "orthography": recognizer.orthography, "tags": recognizer.tags}
    settings = record["settings"]
    checks = [check(name, record.get(name), value) for name, value in facts_of(recognizer).items()]
    checks += [check(f"settings.{n}", settings[n], value) for n, value in set_up.items() if n in settings]
    if "model" in settings:  # another release may record more of it
        checks.append(check("settings.model", settings["model"], describe(recognizer), common=True))
    return checks


def of_sharing(
    record: Mapping[str, Any], trained: Selection, training: list[Utterance], moved: Moved
) -> list[Check]:
    """Check what other parts share with the training part, and whether validation and test are the same."""
    settings = record["settings"]
    # For data without a protocol and without validation, a card has none of these facts.
    facts = dict[str, Any].fromkeys(("protocol_description", "shared_with_training", "valid_is_test"))
    if trained.protocol:
        chosen = moved(trained)
        protocol, (fold, audit) = chosen.find_protocol(), chosen.find_fold(chosen.read(check_files=False))
        facts["protocol_description"] = protocol.description
        facts["shared_with_training"] = {part: audit.fractions(part) for part in fold.parts if part != "train"}
        facts["valid_is_test"] = audit.fractions("test", of="valid").get("recordings") == 1.0
    elif settings.get("valid"):
        valid = moved(Selection.from_dict(settings["valid"])).utterances(check_files=False)
        shared = {kind: share and share.fraction for kind, share in overlap(training, valid).items()}
        facts["shared_with_training"] = {"valid": shared}
    return [check(f"settings.{name}", settings.get(name), value) for name, value in facts.items()]


def of_training(record: Mapping[str, Any], recognizer: Recognizer, moved: Moved) -> tuple[list[Check], list[str]]:
    """Check what follows from the training data; name what cannot be checked as recordings cannot be read now."""
    trained = trained_on(record)
    if trained is None:
        return [], ["trained_on (training was not told the name of its data)"]
    training = moved(trained).utterances(check_files=False)
    lengths, unread = recognizer.dataset(training).read_headers(range(len(training)))
    most = float(record["settings"].get("max_seconds") or math.inf) * SAMPLE_RATE
    kept = [i for i in range(len(training)) if lengths.get(i, 0) <= most]
    facts: dict[str, Any] = counts_of([training[i] for i in kept])
    claimed = []
    if unread:
        facts = facts if most == math.inf else {}  # else it is unknown which of these were too long for training
        claimed = [f"{'trained_on.hours' if facts else 'trained_on'} ({len(unread)} recordings cannot be read)"]
    else:
        facts["hours"] = hours_of(lengths[i] for i in kept)
    checks = [check(f"trained_on.{name}", record["trained_on"].get(name), value) for name, value in facts.items()]
    return checks + of_sharing(record, trained, training, moved), claimed


def of_choice(record: Mapping[str, Any], folder: Path) -> list[Check]:
    """Check what each evaluation says about choosing the weights, and that validation data was evaluated."""
    place = folder.resolve().name
    weights = record.get("weights", place)
    checks = [check("weights", weights, place)] if place in ("best", "last") else []
    if weights not in ("best", "last"):
        return checks
    settings = record["settings"]
    for number, entry in enumerate(record["evaluations"], 1):
        expected = expected_choice(record, entry["selection"], best=weights == "best")
        checks.append(check(f"evaluation {number}, chosen_on", entry["chosen_on"], expected))
    valid = settings.get("valid")
    had = settings.get("data", {}).get("valid", NO_DATA if valid is None else "") != NO_DATA
    if trained_on(record) and had != bool(valid):
        checks.append(Check("settings.valid", valid, "data" if had else None, False))
    if valid and not any(same_data(entry["selection"], valid) for entry in record["evaluations"]):
        checks.append(Check("evaluation on the validation part", "none", "one", False))
    return checks


def settings_beside(folder: Path) -> dict[str, Any]:
    """Return the settings of the run whose folder holds a model folder; empty if there is none."""
    path = folder.resolve().parent / "config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError):
        return {}
    # Other files of this name may be, for example, a model's config.json.
    return settings if isinstance(settings, dict) and "effective_batch" in settings else {}


def of_run(record: Mapping[str, Any], folder: Path) -> tuple[list[Check], list[str]]:
    """Check the settings that are also in the run's folder, and name the others."""
    settings, beside = record["settings"], settings_beside(folder)
    checks, claimed = [], []
    for name in sorted(settings):
        if name not in beside:
            claimed.append(f"settings.{name}")
            continue
        one = check(f"settings.{name}", settings[name], beside[name])
        if name in ("train", "valid"):
            one = one._replace(same=same_data(one.told, one.now))
        if not one.same and name in OF_A_START:
            claimed.append(f"settings.{name} (of the run now: {brief_repr(one.now, 40)})")
        else:
            checks.append(one)
    if beside.get("valid") and not settings.get("valid"):
        checks.append(Check("settings.valid", None, beside["valid"], False))
    return checks, claimed


def checks_of(
    record: Mapping[str, Any], recognizer: Recognizer, folder: Path, moved: Moved
) -> tuple[list[Check], list[str]]:
    """Check everything that a card says except its figures, and name the claims that cannot be computed.

    Args:
        record: the record of the model folder (see `ser.scores.card`).
        recognizer: the model.
        folder: the model folder.
        moved: says where the data are now.
    """
    in_run, settings = of_run(record, folder)
    of_data, claimed = of_training(record, recognizer, moved)
    checks = [*of_model(record, recognizer), *of_data, *of_choice(record, folder), *in_run]
    known = {c.name for c in checks}
    claimed += [name for name in sorted(record.keys() - OF_A_RECORD) if name not in known]
    if not any("chosen_on" in name for name in known) and record["evaluations"]:
        claimed.append("chosen_on")
    told = {"settings.train", "settings.valid", "settings.licences", *known}
    claimed += [] if "settings.licences" in known else ["licences"]
    return checks, claimed + [name for name in settings if name not in told]

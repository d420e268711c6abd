"""Write model cards: what a model was trained on, its figures, and its limits.

Training writes two files into every model folder: the record, training.json, and the card, README.md, which shows
it to people. The card is a function of the record, so it can be checked, and `ser evaluate --verify FOLDER`
computes its figures again.
"""

import html
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ser.audio import SAMPLE_RATE
from ser.data.manifest import Utterance
from ser.data.protocols import KNOWN
from ser.data.selection import Selection
from ser.errors import ConfigError, ModelFolderError, printable
from ser.files import replace_file, write_json
from ser.recognizer import Recognizer
from ser.scores.report import CORPUS, Report, four_digits, interval_text, shares, title_of

RECORD, CARD = "training.json", "README.md"
EVALUATE, EARLIER_EVALUATE = "ser evaluate", "python examples/evaluate.py"  # commands that a card names
MOST_RESAMPLES = 1_000_000  # more would take hours
OF_ONE_CLASS = ("precision ", "recall ")  # figures that a card does not have of each corpus
KEPT = ("utterances", "speakers", "judged", "figures", "resamples", "seed")  # fields of a report in the record


def counts_of(utterances: Sequence[Utterance]) -> dict[str, Any]:
    """Count utterances, speakers, and utterances per emotion."""
    speakers = {u.speaker for u in utterances if u.speaker}
    per_emotion = Counter(u.emotion for u in utterances if u.emotion)
    return {
        "utterances": len(utterances),
        "speakers": len(speakers),
        "per_emotion": dict(sorted(per_emotion.items())),
    }


def hours_of(lengths: Iterable[int]) -> float:
    """Return the total hours of recordings, given their numbers of samples."""
    return round(sum(lengths) / SAMPLE_RATE / 3600, 4)


def facts_of(recognizer: Recognizer) -> dict[str, Any]:
    """Return the facts that follow from the model itself: heads, labels, size."""
    return {
        "heads": list(recognizer.model.heads),
        "emotions": recognizer.emotions,
        "dimensions": recognizer.dimensions,
        "speakers_known": len(recognizer.speakers),
        "parameters": sum(p.numel() for p in recognizer.model.parameters()),
    }


def training_record(
    recognizer: Recognizer, utterances: Sequence[Utterance], lengths: Sequence[int], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the record of a model without evaluations.

    Args:
        recognizer: the model.
        utterances: the training set.
        lengths: the length of each utterance in samples.
        settings: the settings of the run, as in its config.json.
    """
    return facts_of(recognizer) | {
        "trained_on": counts_of(utterances) | {"hours": hours_of(lengths)},
        "settings": dict(settings),
        "evaluations": [],
    }


def sources_anywhere(selection: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the manifests of several corpora, wherever they lie; none where a manifest is read alone."""
    return [dict(source) | {"path": "", "root": None} for source in selection.get("sources", [])]


def same_data(first: Mapping[str, Any] | None, second: Mapping[str, Any] | None) -> bool:
    """Tell whether two selections (`Selection.to_dict`) name the same utterances, wherever the files are."""
    if not first or not second or not first.get("sha256"):
        return first == second

    def content(selection: Mapping[str, Any]) -> dict[str, Any]:
        names = Selection.from_dict(selection).to_dict()
        held_out = names["known_turns"] if names["part"] == KNOWN else 0
        sources = sources_anywhere(selection)
        same = {"data": "", "root": None, "shares": [], "known_turns": held_out, "sources": sources}
        return {**names, **same, "usual_names": {}, "no_usual_names": False}

    return content(first) == content(second)


def trained_on(record: Mapping[str, Any]) -> Selection | None:
    """Return the selection that the model was trained on; None if training was not told its name."""
    selection = record["settings"].get("train")
    return Selection.from_dict(selection) if selection else None


def expected_choice(record: Mapping[str, Any], selection: Mapping[str, Any] | None, *, best: bool) -> bool:
    """Tell whether weights were chosen by their figure on ``selection``.

    The weights in best/ were chosen on the validation part, which may also be the test part.
    """
    settings = record["settings"]
    valid = settings.get("valid")
    if not best or not valid:
        return False
    chosen_on = [valid, *([dict(valid) | {"part": "test"}] if settings.get("valid_is_test") else [])]
    # Some of the corpora that chose the weights chose them too.
    some = sources_anywhere(selection or {}) if not (selection or {}).get("protocol") else []
    within = bool(some) and all(one in sources_anywhere(valid) for one in some)
    return within or any(same_data(selection, one) for one in chosen_on)


def evaluation_entry(
    result: Report, selection: Mapping[str, Any] | None, *, chosen_on: bool = False
) -> dict[str, Any]:
    """Return the part of a report that a record keeps.

    Args:
        result: the report.
        selection: what was evaluated, as `Selection.to_dict`; None: not known, so it cannot be verified.
        chosen_on: whether these weights were chosen by this same figure.
    """
    content = result.to_dict()
    prefix, corpora = f"{CORPUS}: ", {}
    for name, part in content["parts"].items():
        if name.startswith(prefix):
            figures = {n: value for n, value in part["figures"].items() if not n.startswith(OF_ONE_CLASS)}
            corpora[name.removeprefix(prefix)] = part | {"figures": figures}
    entry = {name: content[name] for name in KEPT} | ({"corpora": corpora} if corpora else {})
    return entry | {"selection": selection, "chosen_on": chosen_on}


def with_evaluation(record: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record with a new evaluation, which replaces an older one on the same data.

    "Chosen on" stays true for data on which weights were once chosen, and is also true for a test part that
    validates.
    """
    same = [e for e in record["evaluations"] if same_data(e["selection"], entry["selection"])]
    others = [e for e in record["evaluations"] if not same_data(e["selection"], entry["selection"])]
    part = (entry["selection"] or {}).get("part")
    watched = part == "test" and record["settings"].get("valid_is_test") and any(e["chosen_on"] for e in others)
    best = record.get("weights") == "best"
    some = bool((entry["selection"] or {}).get("sources")) and expected_choice(
        record, entry["selection"], best=best
    )
    chosen_on = entry["chosen_on"] or watched or some or any(e["chosen_on"] for e in same)
    return dict(record) | {"evaluations": [*others, dict(entry) | {"chosen_on": bool(chosen_on)}]}


# ------------------------------------------------------------------------------------------------ markdown


def as_text(foreign: object) -> str:
    """Escape a text so that Markdown shows it unchanged and on one line, and not as a heading, HTML or table."""
    text = html.escape(printable(str(foreign)), quote=False)
    text = re.sub(r"[\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", text)  # my_corpus is no emphasis
    return re.sub(r"^(\s*\d*)([-+=#.)])(?=[-=#\s]|$)", r"\1\\\2", text)  # no heading, list or rule


def as_code(foreign: object) -> str:
    """Make a code span that shows exactly these characters."""
    text = printable(str(foreign))
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text else f"`{text}`"


def as_block(text: str) -> str:
    """Make a code block of any text."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}\n{printable(text, lines=True)}\n{fence}"


def task_list(record: Mapping[str, Any]) -> str:
    """Say what the model recognises."""
    tasks = {
        "emotion": "emotion: " + ", ".join(map(as_text, record["emotions"])),
        "dimensions": "dimensions: " + ", ".join(map(as_text, record["dimensions"])),
        "ctc": "transcript (CTC, greedy)",
        "speaker": f"speaker, out of the {record['speakers_known']} in training",
    }
    return "\n".join(f"- {tasks.get(name) or as_text(name)}" for name in record["heads"])


def training_paragraphs(record: Mapping[str, Any]) -> str:
    """Say what the model was trained on, and what other parts share with it."""
    settings, data = record["settings"], record["trained_on"]
    named = trained_on(record)
    counts = ", ".join(f"{as_text(name)} {count}" for name, count in data["per_emotion"].items())
    paragraphs = [
        as_text(named) if named else "Data that training was not told the name of.",
        f"{data['utterances']} utterances, {data['hours']:.2f} h, {data['speakers']} speakers; {counts or '-'}.",
    ]
    if description := settings.get("protocol_description"):
        paragraphs.append(f"Protocol: {as_text(description)}")
    if shared := settings.get("shared_with_training"):
        paragraphs.append("Of the utterances of each part, training has the same:")
        paragraphs.append(
            "\n".join(f"- {as_text(part)}: {as_text(shares(kinds))}" for part, kinds in shared.items())
        )
    return "\n\n".join(paragraphs)


def corpus_paragraphs(entry: Mapping[str, Any]) -> list[str]:
    """Show the figures of each corpus, where an evaluation has several."""
    if not entry.get("corpora"):
        return []
    rows = ["| corpus | utterances | accuracy (WA) | unweighted accuracy (UA) | macro F1 | word error rate |"]
    rows.append("|---|---|---|---|---|---|")
    for name, part in entry["corpora"].items():
        figures = (part["figures"].get(key) for key in ("accuracy", "unweighted_accuracy", "macro_f1", "wer"))
        rows.append(f"| {' | '.join([as_text(name), str(part['utterances']), *map(four_digits, figures)])} |")
    return ["\n".join(rows)]


def evaluation_paragraphs(entry: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    """Show the figures of one evaluation, and what has to be known about them."""
    selection, utterances, judged = entry["selection"], entry["utterances"], entry["judged"]
    what = as_text(Selection.from_dict(selection)) if selection else "the validation utterances"
    paragraphs = [f"On {what}: {utterances} utterances, {entry['speakers']} speakers."]
    if entry["chosen_on"]:
        paragraphs.append("**These weights were chosen by their figure on this very part, so it is optimistic.**")
    if record["settings"].get("valid_is_test") and selection and selection.get("part") == "valid":
        paragraphs.append("In this protocol that part is also the test part.")
    rows = ["| | value | 95 % over utterances | over speakers |", "|---|---|---|---|"]
    for name, figure in entry["figures"].items():
        spans = (interval_text(figure[f"interval_{over}"]) for over in ("utterances", "speakers"))
        rows.append(f"| {' | '.join([as_text(title_of(name)), four_digits(figure['value']), *spans])} |")
    paragraphs.append("\n".join(rows))
    paragraphs += corpus_paragraphs(entry)
    if 0 < judged["emotion"] < utterances:
        paragraphs.append(f"Emotions are judged on the {judged['emotion']} whose label the model knows.")
    if record["speakers_known"] and judged["speaker"] < utterances:
        speakers = f"the {judged['speaker']} utterances by speakers that training knew"
        paragraphs.append(f"Speakers are judged on {speakers}.")
    return "\n\n".join(paragraphs) + "\n"


def card_text(record: Mapping[str, Any]) -> str:
    """Write the card. Labels, names of data and licences are escaped."""
    settings = record["settings"]
    licences = settings.get("licences", {})
    figures = f"None were measured: there was no validation part. `{EVALUATE} --card` adds them."
    if record["evaluations"]:
        figures = "\n".join(evaluation_paragraphs(entry, record) for entry in record["evaluations"])
    # Model hubs read the part between the first two rules.
    return f"""\
---
library_name: "ser"
pipeline_tag: "audio-classification"
tags: ["speech-emotion-recognition"]
---

# Speech emotion recognition model

It recognises, in recordings of one speaker's turn:

{task_list(record)}

{record["parameters"] / 1e6:.1f} M parameters, begun from {as_code(settings.get("init", "?"))}.

## Trained on

{training_paragraphs(record)}

## Figures

{figures}
## Use and limits

For research on speech like that it was trained on: the same language, kind of recording and way of showing \
emotion. Figures on other voices, rooms and languages are not known; on acted speech they say little about \
spontaneous speech. Labels are what listeners perceived, not what a speaker felt. Not for decisions about people, \
in work, education, policing, health or insurance.

## Licences

- data: {as_text(licences.get("data") or "") or "not stated; ask where the corpus came from"}
- initial weights: {as_text(licences.get("weights") or "") or "not stated; see where they came from"}

## To repeat

Update {record.get("step", 0)}, epoch {record.get("epoch", 0)}. Settings are in training.json. To compute these \
figures again:

```sh
{EVALUATE} --verify FOLDER
```
"""


def is_card_of(text: str, record: Mapping[str, Any]) -> bool:
    """Tell whether a card agrees with its record. Cards of earlier releases may name the earlier command."""
    return text.replace(EARLIER_EVALUATE, EVALUATE) == card_text(record).replace(EARLIER_EVALUATE, EVALUATE)


def write_card(folder: Path, record: Mapping[str, Any]) -> None:
    """Write both files, each whole or not at all."""
    write_json(folder / RECORD, record)
    with replace_file(folder / CARD) as file:
        file.write(card_text(record))


def check_numbers(record: Mapping[str, Any]) -> None:
    """Raise ValueError for numbers with which figures cannot be computed."""
    numbers = {f"settings.{name}": record["settings"].get(name) or 0 for name in ("max_seconds", "max_bad_audio")}
    for entry in record["evaluations"]:
        numbers |= {name: entry[name] for name in ("resamples", "seed")}
        if type(entry["resamples"]) is not int or not 0 < entry["resamples"] <= MOST_RESAMPLES:
            raise ValueError(f"resamples is {entry['resamples']!r}, expected 1 to {MOST_RESAMPLES}")
    for name, value in numbers.items():
        if type(value) not in (int, float) or not 0 <= value < 2**63:
            raise ValueError(f"{name} is {value!r}, expected a number from 0")
    for selection in (record["settings"].get("train"), record["settings"].get("valid")):
        if selection and not isinstance(Selection.from_dict(selection).data, str):
            raise ValueError(f"{selection!r} does not name utterances")


def read_record(folder: str | Path) -> dict[str, Any] | None:
    """Read the record of a model folder; None if there is none, as in folders of other programs.

    Raises ModelFolderError for a record that is damaged.
    """
    path = Path(folder) / RECORD
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        card_text(record)
        check_numbers(record)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, ConfigError) as error:
        raise ModelFolderError(f"{path}: is no sound record of a training: {error!r}") from None
    return record


def flat_numbers(entry: Mapping[str, Any]) -> dict[str, float | None]:
    """Return every number of an evaluation, each with its own name."""
    numbers: dict[str, float | None] = {name: entry[name] for name in ("utterances", "speakers")}
    numbers |= {f"{name} judged": count for name, count in entry["judged"].items()}
    for corpus, part in entry.get("corpora", {}).items():
        numbers[f"{corpus}: utterances"] = part["utterances"]
        numbers |= {f"{corpus}: {name}": value for name, value in part["figures"].items()}
    for name, figure in entry["figures"].items():
        numbers[name] = figure["value"]
        for over in ("utterances", "speakers"):
            for end, value in zip(("from", "to"), figure[f"interval_{over}"] or (), strict=False):
                numbers[f"{name}, over {over} {end}"] = value
    return numbers


def differences(
    entry: Mapping[str, Any], result: Report, *, tolerance: float = 1e-6
) -> list[tuple[str, float | None, float | None, bool]]:
    """Compare an evaluation with a new report on the same data: return (name, on the card, now, equal)."""
    then, now = flat_numbers(entry), flat_numbers(evaluation_entry(result, None))
    rows = []
    for name in dict.fromkeys([*then, *now]):
        a, b = then.get(name), now.get(name)
        same = a == b or (a is not None and b is not None and math.isclose(a, b, abs_tol=tolerance))
        rows.append((name, a, b, same))
    return rows

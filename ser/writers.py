"""Write predictions as text: a table for people, JSON, JSON lines, CSV, and the paper's format.

A format is one function. It takes the records, one after another, and the recognizer that made them, and yields
the text to write. A format of your own is a row of `FORMATS`:

    from ser.writers import FORMATS

    def names_only(records, recognizer):
        for record in records:
            yield f"{record['file']}\t{record['emotion']}\n"

    FORMATS["names"] = names_only
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ser.data.labels import LABELS, PLURALS
from ser.data.manifest import PAPER_EMOTIONS, Utterance
from ser.errors import ConfigError, SerError, printable
from ser.files import csv_line, finite
from ser.recognizer import Prediction, Recognizer

Record = dict[str, Any]  # one recording or window as plain data: see `as_record`
Writer = Callable[[Iterator[Record], Recognizer], Iterator[str]]


def decimal(seconds: float) -> str:
    """Write seconds to the millisecond, without zeros at the end: 2, 7200.25."""
    return f"{seconds:.3f}".rstrip("0").rstrip(".")


def as_record(source: str | Utterance, result: Prediction | SerError) -> Record:
    """Return a prediction or an error as plain data.

    Every record has the same keys: those of `Prediction.to_dict`, and file, id, start, end, error. Unknown values
    are None.
    """
    record: Record = {"file": source, "id": None, "start": None, "end": None}
    if isinstance(source, Utterance):
        record = {"file": str(source.file), "id": source.id, "start": source.start, "end": source.end}
    if isinstance(result, Prediction) and result.start is not None and result.end is not None:  # a window
        name = record["id"] or os.path.basename(record["file"])  # noqa: PTH119
        part = f"{name}:{decimal(result.start)}-{decimal(result.end)}"
        record |= {"id": part, "start": result.start, "end": result.end}
    if isinstance(result, SerError):
        nothing = Prediction(file=None, seconds=0.0).to_dict()
        return {**dict.fromkeys(nothing), **record, "error": str(result)}
    return finite({**result.to_dict(), **record, "error": None})  # scores may overflow: no NaN in JSON


# ----------------------------------------------------------------------------------------------- for programs


def json_list(records: Iterator[Record], recognizer: Recognizer) -> Iterator[str]:
    """Write one JSON array of all records."""
    before = "[\n"
    for record in records:
        yield before + json.dumps(record, ensure_ascii=False)
        before = ",\n"
    yield "\n]\n"


def json_lines(records: Iterator[Record], recognizer: Recognizer) -> Iterator[str]:
    """Write a JSON object per line."""
    for record in records:
        yield json.dumps(record, ensure_ascii=False) + "\n"


def comma_separated(records: Iterator[Record], recognizer: Recognizer) -> Iterator[str]:
    """Write a CSV with a column for each emotion's probability, each dimension, and each output of added heads."""
    first = ["file", "id", "start", "end", "seconds", "kind", "emotion"]
    last = ["transcript", "speaker", "speaker_probability", "warning", "error"]
    probabilities = [f"p_{name}" for name in recognizer.emotions]
    added = {head: names for head, names in recognizer.labels.names.items() if head not in PLURALS}
    numbers = {head: LABELS[head].kind == "numbers" for head in added}
    answers = [(head, name) for head in added for name in (added[head] if numbers[head] else [head])]
    yield csv_line([*first, *probabilities, *recognizer.dimensions, *last, *(name for _, name in answers)])
    for record in records:
        middle = [(record["probabilities"] or {}).get(name) for name in recognizer.emotions]
        middle += [(record["dimensions"] or {}).get(name) for name in recognizer.dimensions]
        said = record.get("others") or {}
        others = [(said.get(h) or {}).get(name) if numbers[h] else said.get(h) for h, name in answers]
        yield csv_line([record[c] for c in first] + middle + [record[c] for c in last] + others)


def paper_lines(records: Iterator[Record], recognizer: Recognizer) -> Iterator[str]:
    """Write the format of the paper's run_emotion.py --do_predict: ``NAME SECONDS CLASS  P0 P1 P2 P3``.

    The format has no place for errors.
    """
    names = list(PAPER_EMOTIONS.values())
    if set(names) != set(recognizer.emotions):
        names = recognizer.emotions
    if not names:
        raise ConfigError("the model has no emotion head, and the paper's format is about nothing else")
    if recognizer.kind != "single-label":
        raise ConfigError(
            f"the paper's format is of one emotion out of several, and this model is {recognizer.kind}: use csv "
            "or jsonl"
        )
    for record in records:
        if record["error"] is None:
            numbers = " ".join(str(record["probabilities"][name]) for name in names).replace("None", "nan")
            name = printable(os.path.basename(record["file"]))  # noqa: PTH119
            yield f"{name} {record['seconds']} {names.index(record['emotion'])}  {numbers}\n"


# ------------------------------------------------------------------------------------------------- for people


@dataclass(frozen=True)
class Column:
    """Describe a column of the table: the key of its cells, its title and its width in characters."""

    key: str
    title: str
    width: int
    right: bool = False  # align right, for numbers
    keep_end: bool = False  # show the end of a text that is too long

    def fitted(self, text: str) -> str:
        """Return ``text`` in exactly `width` characters, with an ellipsis if it is cut."""
        text = printable(text)
        if len(text) > self.width:
            hidden = len(text) - self.width + 1
            text = "…" + text[hidden:] if self.keep_end else text[:-hidden] + "…"
        return text.rjust(self.width) if self.right else text.ljust(self.width)


def table_columns(recognizer: Recognizer, total: int) -> list[Column]:
    """Return the columns of the heads that the model has, as wide as ``total`` characters allow."""
    seconds = Column("seconds", "seconds", 7, right=True)
    answers = []
    if recognizer.kind not in (None, "single-label"):  # the usual kind is not shown
        answers.append(Column("kind", "kind", len(recognizer.kind)))
    if recognizer.emotions:
        longest = max(len("emotion"), *(len(name) + 5 for name in recognizer.emotions))
        answers.append(Column("emotion", "emotion", 32 if recognizer.kind == "multi-label" else min(longest, 20)))
    for name in recognizer.dimensions:  # a foreign model may call one "file"
        answers.append(Column(f"={name}", name, max(len(name), 6), right=True))
    speakers = []
    if recognizer.speakers:
        longest = max(len("speaker"), *map(len, recognizer.speakers))
        speakers.append(Column("speaker", "speaker", min(longest, 20)))
    writes = bool(recognizer.vocabulary)
    fixed = [seconds, *answers, *speakers]
    rest = max(20, total - 1 - sum(column.width + 2 for column in fixed) - 2 * writes)
    file = min(40, max(12, rest // 3)) if writes else rest
    texts = [Column("transcript", "transcript", rest - file)] if writes else []
    return [Column("file", "file", file, keep_end=True), seconds, *answers, *texts, *speakers]


def two_digits(score: float | None) -> str:
    """Write a score with two digits; nan if it overflowed."""
    return "nan" if score is None else f"{score:.2f}"


def likeliest(record: Record) -> str:
    """Write the likeliest emotion with its probability; for a multi-label model, all from one half on."""
    probabilities = record["probabilities"] or {}
    names = [record["emotion"]]
    if record["kind"] == "multi-label":
        likely = [name for name, probability in probabilities.items() if (probability or 0) >= 0.5]
        names = sorted(likely, key=lambda name: -probabilities[name]) or names
    return ", ".join(f"{name} {two_digits(probabilities.get(name, 0.0))}" for name in names)


def cells_of(record: Record) -> dict[str, str]:
    """Return the texts of a table's row by the keys of their columns."""
    return {
        "file": record["id"] or record["file"],
        "seconds": f"{record['seconds']:.2f}",
        "kind": record["kind"] or "",
        "emotion": likeliest(record),
        "transcript": record["transcript"] or "",
        "speaker": record["speaker"] or "",
        **{f"={name}": two_digits(value) for name, value in (record["dimensions"] or {}).items()},
    }


def terminal_table(records: Iterator[Record], recognizer: Recognizer) -> Iterator[str]:
    """Write a table that fits the terminal; texts that are too long are cut."""
    total = shutil.get_terminal_size((120, 24)).columns
    file, *_ = columns = table_columns(recognizer, total)
    message = Column("error", "error", total - file.width - 3)

    def line(*texts: str) -> str:
        return "  ".join(texts).rstrip() + "\n"

    yield line(*(column.fitted(column.title) for column in columns))
    for record in records:
        if record["error"] is None:
            cells = cells_of(record)
            yield line(*(column.fitted(cells[column.key]) for column in columns))
        else:
            cause = record["error"].removeprefix(f"{record['file']}: ")  # the first column has the name
            yield line(file.fitted(record["id"] or record["file"]), message.fitted("error: " + cause))


FORMATS: dict[str, Writer] = {
    "table": terminal_table,
    "json": json_list,
    "jsonl": json_lines,
    "csv": comma_separated,
    "paper": paper_lines,
}

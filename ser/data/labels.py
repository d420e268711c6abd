"""Convert labels from a row of a manifest to a batch: the names of a head's outputs, and the type of its labels.

A row's labels are one mapping from column to value (`Utterance.labels`). A batch's labels are one mapping from
head to tensor (`Batch.labels`). The table `LABELS` says how to convert them, so a new head needs a new row:

    LABELS["age"] = LabelSpec("numbers", ("age",))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ser.data.text import Vocabulary
from ser.errors import ConfigError, brief_repr

NO_LABEL = -100  # torch's cross entropy ignores this value
DIMENSIONS = ("arousal", "dominance", "valence")


@dataclass(frozen=True)
class LabelSpec:
    """Describe a head's labels.

    Attributes:
        kind: "class" (one of the head's names: int64, `NO_LABEL` where unknown), "numbers" (one number for each of
            the head's names: float64, NaN where unknown) or "text" (the vocabulary's symbols: int64, `NO_LABEL`
            past the end).
        columns: the columns of a manifest: one for a class or a text, one or more for numbers. Each number takes
            its labels from the column of the same name, ignoring case.

    Raises:
        ConfigError: the kind is another one, or the columns are not a tuple.
    """

    kind: str
    columns: tuple[str, ...]

    def __post_init__(self) -> None:
        """Refuse an invalid kind or columns."""
        if self.kind not in ("class", "numbers", "text") or not isinstance(self.columns, tuple):
            raise ConfigError(f'{self}: expected the kind "class", "numbers" or "text", and a tuple of columns')


# head -> its labels
LABELS = {
    "emotion": LabelSpec("class", ("emotion",)),
    "ctc": LabelSpec("text", ("text",)),
    "speaker": LabelSpec("class", ("speaker",)),
    "dimensions": LabelSpec("numbers", DIMENSIONS),
}


def label_columns(*kinds: str) -> tuple[str, ...]:
    """Return the columns of a manifest that hold labels of these kinds, or of every kind."""
    columns: list[str] = []  # a plain loop for speed, since this is called for every row of a manifest
    for label in LABELS.values():
        if not kinds or label.kind in kinds:
            columns += label.columns
    return tuple(columns)


def label_kinds() -> dict[str, str]:
    """Return the kind of label that each column of a manifest holds."""
    return {column: label.kind for label in LABELS.values() for column in label.columns}


def labelled_heads(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the heads for which at least one row (`Utterance.labels`) has a label."""
    present = set().union(*rows)
    return [head for head, label in LABELS.items() if not present.isdisjoint(label.columns)]


# The usual heads -> the plural word for their names.
PLURALS = {"emotion": "emotions", "speaker": "speakers", "dimensions": "dimensions"}


def names_in(head: str, rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the names that rows (`Utterance.labels`) have for a head: classes, sorted, or columns of numbers."""
    label, rows = LABELS[head], list(rows)
    if label.kind == "numbers":
        return [column for column in label.columns if any(column in row for row in rows)]
    return sorted({row[label.columns[0]] for row in rows if label.columns[0] in row})


@dataclass(frozen=True)
class Labels:
    """Hold what the numbers of a model mean: the names of its outputs, and how text and sound are prepared.

    Attributes:
        names: head -> the names of its outputs in their order. A head of classes or numbers exists where it has
            names; the CTC head exists where there is a vocabulary.
        vocabulary: the CTC symbols, or None without a CTC head.
        multi_label: whether several emotions can be right at once.
        orthography, tags: how texts were cleaned in training (see `ser.data.text`).
        do_normalize: whether waveforms are scaled to zero mean and unit variance.

    Raises:
        ConfigError: two outputs of a head have the same name.
    """

    names: Mapping[str, Sequence[str]] = field(default_factory=dict)
    vocabulary: Vocabulary | None = None
    multi_label: bool = False
    orthography: str = "librispeech"
    tags: str = "remove"
    do_normalize: bool = True

    def __post_init__(self) -> None:
        """Store each head's names as a list, and refuse a name that occurs twice."""
        for head, names in self.names.items():
            if head not in LABELS or isinstance(names, str):
                raise ConfigError(f"{head}: {brief_repr(names)}; expected a list of names of {', '.join(LABELS)}")
        kept = {head: listed for head, names in self.names.items() if (listed := list(names))}
        object.__setattr__(self, "names", kept)
        for head, names in kept.items():
            if len(set(names)) < len(names):
                raise ConfigError(f"{PLURALS.get(head, head)} {brief_repr(names)} name a class twice")

    @classmethod
    def of(
        cls,
        *,
        emotions: Sequence[str] = (),
        speakers: Sequence[str] = (),
        dimensions: Sequence[str] = (),
        **rest: Any,
    ) -> Labels:
        """Make labels from the names of the usual heads; ``rest`` are fields, and ``names`` are of other heads."""
        names = {"emotion": emotions, "speaker": speakers, "dimensions": dimensions, **rest.pop("names", {})}
        return cls(names, **rest)

    @property
    def emotions(self) -> list[str]:
        """Return the names of the emotion head's classes."""
        return list(self.names.get("emotion", ()))

    @property
    def speakers(self) -> list[str]:
        """Return the names of the speaker head's classes."""
        return list(self.names.get("speaker", ()))

    @property
    def dimensions(self) -> list[str]:
        """Return the names of the dimension head's numbers."""
        return list(self.names.get("dimensions", ()))

    @property
    def sizes(self) -> dict[str, int]:
        """Map each head that the model has to the number of its outputs."""
        sizes = {head: len(names) for head, names in self.names.items()}
        return sizes if self.vocabulary is None else sizes | {"ctc": len(self.vocabulary)}

    def of_head(self, head: str) -> Any:
        """Return the meaning of a head's outputs: its names, or the vocabulary for a head of text."""
        return self.vocabulary if LABELS[head].kind == "text" else list(self.names.get(head, ()))

    def to_dict(self) -> dict[str, Any]:
        """Return a dictionary for JSON, which is recorded with a run."""
        others = {head: names for head, names in self.names.items() if head not in PLURALS}
        return {
            "emotions": self.emotions,
            "speakers": self.speakers,
            "dimensions": self.dimensions,
            **({"names": others} if others else {}),
            "symbols": self.vocabulary.tokens if self.vocabulary is not None else [],
            "orthography": self.orthography,
            "tags": self.tags,
            "do_normalize": self.do_normalize,
        }


def encoder(head: str, names: Sequence[str]) -> Callable[[Mapping[str, Any]], Any]:
    """Return a function that makes the label of a head of classes or numbers from `Utterance.labels`.

    The label is a class's number (`NO_LABEL` where the row has none of ``names``), or one number for each name
    (NaN where the row has none).
    """
    label = LABELS[head]
    if label.kind == "class":
        numbers = {name: i for i, name in enumerate(names)}
        return lambda row: numbers.get(row.get(label.columns[0], ""), NO_LABEL)
    column_of = {column.lower(): column for column in label.columns}
    columns = [column_of.get(name.lower(), "") for name in names]
    return lambda row: [row.get(column, math.nan) for column in columns]


def unknown(head: str, size: int) -> Any:
    """Return the label "unknown" of a head with ``size`` names."""
    return {"class": NO_LABEL, "text": [], "numbers": [math.nan] * size}[LABELS[head].kind]


def collate_labels(head: str, values: Sequence[Any]) -> Tensor:
    """Make one tensor of a head's labels: (B,) of classes, (B, K) of numbers, (B, max(L, 1)) of texts."""
    kind = LABELS[head].kind
    if kind == "class":
        return torch.tensor(values, dtype=torch.int64)
    if kind == "numbers":
        return torch.tensor(values, dtype=torch.float64)
    padded = torch.full((len(values), max(1, *map(len, values))), NO_LABEL)
    for row, symbols in enumerate(values):
        padded[row, : len(symbols)] = torch.tensor(symbols, dtype=torch.int64)
    return padded


def known(head: str, labels: Tensor) -> Tensor:
    """Tell which utterances have a label of a head, (B,) bool; for numbers, one is enough."""
    kind = LABELS[head].kind
    if kind == "numbers":
        return labels.isfinite().any(1)
    return labels != NO_LABEL if kind == "class" else labels[:, 0] != NO_LABEL


def labels_vary(n: Tensor, y: Tensor, yy: Tensor) -> Tensor:
    """Tell whether at least two labels differ, from their number n and the sums of y and of y^2."""
    # For equal labels the variance is 0 except for rounding, so it is compared with a share of the mean square.
    return (n >= 2) & (yy / n - (y / n).square() > 1e-12 * yy / n)

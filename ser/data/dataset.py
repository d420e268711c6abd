"""Turn utterances into padded batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ser.audio import audio_info, load_audio, normalise
from ser.data.augment import Augmenter
from ser.data.labels import LABELS, Labels, collate_labels, encoder, unknown
from ser.data.manifest import Utterance
from ser.data.sampler import Item
from ser.data.text import ORTHOGRAPHIES, Rewriting, Vocabulary, clean
from ser.errors import AudioError, MissingLibraryError, indented


@dataclass
class Batch:
    """Hold a padded batch: B utterances, S samples of the longest, L symbols of the longest transcript."""

    waveforms: Tensor  # (B, S) float32, zero past num_samples
    num_samples: Tensor  # (B,) int64
    labels: dict[str, Tensor]  # head -> labels of its kind; see `ser.data.labels.LabelSpec`
    weights: Tensor  # (B,) float32, 0 for an utterance that only keeps a rank busy, or could not be read
    indices: list[int] = field(default_factory=list)  # positions in the dataset
    places: list[int] = field(default_factory=list)  # in the epoch: see `ser.data.sampler.Item`
    errors: dict[int, str] = field(default_factory=dict)  # position -> why its recording could not be read
    # From a cache: (B, T, C) features or (B, N, D) pooled layers, and the kind; waveforms are then (B, 0).
    stored: Tensor | None = None
    kind: str = ""

    def pin_memory(self) -> Batch:
        """Copy the tensors for a GPU into page-locked memory; the DataLoader calls this."""
        stored = None if self.stored is None else self.stored.pin_memory()
        return replace(self, waveforms=self.waveforms.pin_memory(), stored=stored)

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Return the arguments of a model's forward pass: waveforms or cached values, and num_samples."""
        first = {"waveforms": self.waveforms} if self.stored is None else {self.kind: self.stored}
        return first | {"num_samples": self.num_samples}

    def to(self, device: torch.device) -> Batch:
        """Put waveforms and labels onto the device. Lengths and transcripts stay on the CPU, which uses them."""
        return replace(
            self,
            waveforms=self.waveforms.to(device, non_blocking=True),
            stored=None if self.stored is None else self.stored.to(device, non_blocking=True).float(),
            labels={
                head: labels if LABELS[head].kind == "text" else labels.to(device, non_blocking=True)
                for head, labels in self.labels.items()
            },
        )


@dataclass(frozen=True)
class Example:
    """Hold one utterance, ready for `collate`."""

    index: int
    weight: float
    waveform: Tensor  # (S,)
    labels: dict[str, Any]  # head -> a class's number, a list of numbers, or a list of symbols
    error: str = ""  # why the recording could not be read; then the other fields are placeholders of weight 0
    num_samples: int = 0  # S; 0: those of the waveform
    stored: Tensor | None = None  # in place of a waveform: see `Batch`
    kind: str = ""
    place: int = 0  # in the epoch


class StoredInputs(Protocol):
    """Read the cached output of a part of the model in place of recordings."""

    kind: str  # the argument of the model that takes it: "features" or "pooled"

    def __call__(self, index: int) -> tuple[Tensor, str]:
        """Return what is cached for an utterance; or zeros of its shape, and why nothing is cached."""


class SpeechDataset(Dataset[Example]):
    """Hold utterances with their labels as numbers, and read their audio on demand.

    ``labels`` are those of the model. A class that is not among them counts as unknown, and without a vocabulary
    there are no transcripts. The index of an example is a number, or an `Item` as the samplers yield it.

    A recording that cannot be read raises no error here, because a loader worker would hide it in a traceback of
    its own. It gives an Example with `error`: silence of the planned length, at weight 0, without labels.
    `ser.train.bad_audio` decides what to do about it, in the same way on all ranks.

    Attributes:
        utterances: the rows.
        labels: head -> the label of each utterance, as `Example` has it.
        texts: the cleaned transcripts as the vocabulary writes them; empty without one.
        references: the references of word error rates: the transcripts as far as the vocabulary can write them.
    """

    def __init__(self, utterances: Sequence[Utterance], labels: Labels | None = None) -> None:
        self.utterances, self.model_labels = list(utterances), labels or Labels()
        # If there is a cache, it is read in place of the recordings (`ser.train.cache`).
        self.stored: StoredInputs | None = None
        # In training, this changes a waveform before it is normalised.
        self.augment: Augmenter | None = None
        self.labels: dict[str, list[Any]] = {}
        for head, names in self.model_labels.names.items():
            label_of = encoder(head, names)
            self.labels[head] = [label_of(u.labels) for u in self.utterances]
        self.write_texts()

    def write_texts(self) -> None:
        """Clean the transcripts, and write them with the vocabulary as far as it can."""
        labels = self.model_labels
        # The texts to be learnt and compared are cleaned, and written with the vocabulary. An empty one counts as
        # no text. Besides, it is recorded whether the case was changed, and which characters were replaced.
        cleaned = partial(clean, orthography=labels.orthography, tags=labels.tags)
        self.texts = [cleaned(u.text or "") for u in self.utterances]
        self.recased, self.replaced = [False] * len(self.texts), [""] * len(self.texts)
        self.references = [""] * len(self.texts)
        if labels.vocabulary is None:
            return
        orthography, joined = ORTHOGRAPHIES[labels.orthography], not labels.vocabulary.has_delimiter
        if not orthography.script:
            self.spell_texts(labels.vocabulary)
        texts = ["".join(text.split()) if joined else text for text in self.texts]
        self.labels["ctc"] = [labels.vocabulary.encode(text) for text in texts]
        # References of WER are transcripts as far as the vocabulary can write them, as in the paper.
        self.references = [orthography.present(labels.vocabulary.spelt(symbols)) for symbols in self.labels["ctc"]]

    def spell_texts(self, vocabulary: Vocabulary) -> None:
        """Write the texts in the vocabulary's case and characters, and note what was changed in each."""
        labels = self.model_labels
        if ORTHOGRAPHIES[labels.orthography].follows(vocabulary):
            cleaned = partial(clean, orthography=labels.orthography, tags=labels.tags, vocabulary=vocabulary)
            followed = [cleaned(u.text or "") for u in self.utterances]
            self.recased = [a != b for a, b in zip(self.texts, followed, strict=True)]
            self.texts = followed
        spelt = [vocabulary.spell(text) for text in self.texts]
        self.texts, self.replaced = [text for text, _ in spelt], [characters for _, characters in spelt]

    def __len__(self) -> int:
        return len(self.utterances)

    def rewriting(self, without: Container[int] = ()) -> Rewriting:
        """Count what was changed in the texts so that the vocabulary can write them; leave out ``without``."""
        vocabulary = self.model_labels.vocabulary
        if vocabulary is None:
            return Rewriting()
        kept = [i for i, text in enumerate(self.texts) if text and i not in without]
        spaces = 0 if vocabulary.has_delimiter else sum(len(self.texts[i].split()) - 1 for i in kept)
        return Rewriting(
            case=vocabulary.case,
            recased=sum(self.recased[i] for i in kept),
            replaced=Counter(c for i in kept for c in self.replaced[i]),
            removed=vocabulary.unknown_characters(self.texts[i] for i in kept) + Counter({" ": spaces}),
            emptied=sum(not self.references[i] for i in kept),
        )

    def __getitem__(self, item: int | Item) -> Example:
        if not isinstance(item, Item):  # a number, or the (number, weight) of a sampler of one's own
            item = Item(*item, place=item[0]) if isinstance(item, tuple) else Item(item, place=item)
        index, stored, kind = item.index, None, ""
        utterance = self.utterances[index]
        if self.stored is not None:
            (stored, error), kind = self.stored(index), self.stored.kind
            waveform = torch.empty(0)
        else:
            try:
                waveform, error = load_audio(utterance.file, start=utterance.start, end=utterance.end), ""
                waveform = waveform if self.augment is None else self.augment(waveform, item)
                waveform = normalise(waveform) if self.model_labels.do_normalize else waveform
            except MissingLibraryError:
                raise  # nothing is wrong with the recording
            except AudioError as bad:
                waveform, error = torch.zeros(self.length_at(item)), str(bad)
        length = self.lengths[index] if kind else 0
        weight, labels = (0.0, self.no_labels()) if error else (item.weight, self.labels_at(item))
        return Example(index, weight, waveform, labels, error, length, stored, kind, item.place)

    def length_at(self, item: Item) -> int:
        """Return the samples of an utterance at a place, where an augmentation may have changed them."""
        length = self.lengths[item.index]
        return length if self.augment is None else self.augment.length(length, item.epoch, item.place)

    def labels_at(self, item: Item) -> dict[str, Any]:
        """Return an utterance's label for each head; no text where an augmentation has cut it."""
        labels = {head: labels[item.index] for head, labels in self.labels.items()}
        texts = [head for head in labels if LABELS[head].kind == "text"]
        if self.augment is not None and texts and self.augment.resizes:
            kept = self.augment.keeps_text(self.lengths[item.index], item.epoch, item.place)
            labels |= {} if kept else {head: [] for head in texts}
        return labels

    def no_labels(self) -> dict[str, Any]:
        """Return the labels of a recording that cannot be read: unknown, for each head."""
        return {head: unknown(head, len(self.model_labels.names.get(head, ()))) for head in self.labels}

    def read_headers(self, indices: Iterable[int]) -> tuple[dict[int, int], dict[int, str]]:
        """Read only the file headers; return samples at 16 kHz of utterances, and why others cannot be used."""
        lengths, bad = {}, {}
        for i in indices:
            u = self.utterances[i]
            try:
                lengths[i] = audio_info(u.file, start=u.start, end=u.end).num_samples
            except MissingLibraryError:
                raise
            except AudioError as error:
                bad[i] = str(error)
        return lengths, bad

    @cached_property
    def lengths(self) -> list[int]:
        """Read the number of samples at 16 kHz of each utterance from file headers; a caller may set it instead.

        Raises:
            AudioError: headers show that recordings cannot be used. The error lists all of them.
        """
        lengths, bad = self.read_headers(range(len(self)))
        if bad:
            raise AudioError(f"{len(bad)} of {len(self)} recordings cannot be used:{indented(bad.values())}")
        return list(lengths.values())


def pad(rows: Sequence[Tensor]) -> Tensor:
    """Pad tensors (S_i, ...) with zeros on the right, and stack them to (B, max S_i, ...)."""
    out = rows[0].new_zeros(len(rows), max(len(row) for row in rows), *rows[0].shape[1:])
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


def collate(examples: Sequence[Example]) -> Batch:
    """Pad examples on the right to one batch."""
    return Batch(
        waveforms=pad([e.waveform for e in examples]),
        num_samples=torch.tensor([e.num_samples or len(e.waveform) for e in examples]),
        stored=pad([e.stored for e in examples if e.stored is not None]) if examples[0].kind else None,
        kind=examples[0].kind,
        labels={head: collate_labels(head, [e.labels[head] for e in examples]) for head in examples[0].labels},
        weights=torch.tensor([e.weight for e in examples]),
        indices=[e.index for e in examples],
        places=[e.place for e in examples],
        errors={e.index: e.error for e in examples if e.error},
    )

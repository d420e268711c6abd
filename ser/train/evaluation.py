"""Evaluate a model on utterances, each counted exactly once on any number of ranks."""

import math
from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypedDict, Unpack

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from ser.audio import SAMPLE_RATE
from ser.data.dataset import Batch, SpeechDataset, collate
from ser.data.labels import LABELS, NO_LABEL
from ser.data.manifest import Utterance
from ser.data.sampler import evaluation_batches
from ser.data.text import Rewriting, clean
from ser.data.workers import WORKER_SECONDS, decoded, worker_death_explained
from ser.models.heads import HEADS
from ser.models.multitask import Outputs
from ser.recognizer import Prediction, Recognizer
from ser.scores.counts import (
    ClassificationCounts,
    ErrorRateCounts,
    ccc_moments,
    character_errors,
    concordance,
    word_errors,
)
from ser.scores.report import CHUNK, MAX_COUNTS, as_row
from ser.train.bad_audio import BadAudio
from ser.train.distributed import World
from ser.train.losses import LOSSES, Objective
from ser.train.processes import StopRequest, outlive_signals
from ser.train.resources import memory_explained


@dataclass
class Evaluation:
    """Hold counts over a set of utterances, each counted exactly once on any number of ranks."""

    utterances: int = 0
    unread: int = 0  # utterances that were left out, as their recordings cannot be read
    rewriting: Rewriting = field(default_factory=Rewriting)  # changes to the references, to fit the vocabulary
    classes: dict[str, ClassificationCounts] = field(default_factory=dict)  # classification head -> its counts
    # Regression head -> name of a number -> concordance; NaN where concordance is undefined.
    ccc: dict[str, dict[str, float]] = field(default_factory=dict)
    words: ErrorRateCounts | None = None
    characters: ErrorRateCounts | None = None
    loss: float = math.nan
    losses: dict[str, float] = field(default_factory=dict)
    rows: list[tuple[Utterance, str, Prediction]] = field(default_factory=list)  # with the reference text
    interrupted: bool = False  # a rank was asked to stop before the end: there are no figures

    def metrics(self) -> dict[str, Any]:
        """Return the figures by name, of the heads that the model has and the data has labels for."""
        figures: dict[str, Any] = {"utterances": self.utterances, "loss": self.loss}
        figures |= {"bad_audio": self.unread} if self.unread else {}
        figures |= {f"loss_{name}": value for name, value in self.losses.items()}
        figures |= self.class_metrics("emotion") | self.concordance_metrics() | self.text_metrics()
        for head in (head for head in self.classes if head != "emotion"):
            figures |= self.class_metrics(head)
        return figures

    def class_metrics(self, head: str) -> dict[str, Any]:
        """Return the accuracy of a classification head; for emotions, which are seldom balanced, more figures."""
        counts = self.classes.get(head)
        if counts is None or not counts.count:
            return {}
        if head != "emotion":
            # For speakers, only utterances of speakers in the training data are counted.
            return {f"{head}_accuracy": counts.figures["accuracy"], f"{head}_utterances": counts.count}
        return {"emotion_utterances": counts.count, **counts.figures}

    def corpus_metrics(self, emotions: Sequence[str]) -> dict[str, float]:
        """Return the unweighted accuracy of each corpus, if the rows are of several."""
        place, totals = {name: i for i, name in enumerate(emotions)}, dict[str, Any]()
        for utterance, _, prediction in self.rows:
            reference, predicted = place.get(utterance.emotion or ""), place.get(prediction.emotion or "")
            if reference is not None and predicted is not None:
                counts = totals.setdefault(utterance.corpus, np.zeros((3, len(place)), np.int64))
                counts[0, reference] += reference == predicted
                counts[1, reference] += 1
                counts[2, predicted] += 1
        figures = {corpus: ClassificationCounts(counts).figures for corpus, counts in totals.items()}
        several = figures if len(figures) > 1 else {}
        return {f"unweighted_accuracy {name}": one["unweighted_accuracy"] for name, one in several.items()}

    def concordance_metrics(self) -> dict[str, float]:
        """Return the concordance of each number, and "ccc", the mean over dimensions that have one."""
        figures = {}
        for head, values in self.ccc.items():
            if head == "dimensions":
                defined = [value for value in values.values() if math.isfinite(value)]
                figures["ccc"] = sum(defined) / len(defined) if defined else math.nan
            figures |= {f"ccc_{name.lower()}": value for name, value in values.items()}
        return figures

    def text_metrics(self) -> dict[str, Any]:
        """Return the error rates of transcripts, and the counts of changes to the references."""
        changes = {
            "references_recased": self.rewriting.recased,
            "characters_replaced": self.rewriting.replaced.total(),
            "characters_outside_vocabulary": self.rewriting.removed.total(),
            "references_left_empty": self.rewriting.emptied,
        }
        figures: dict[str, Any] = {name: count for name, count in changes.items() if count}
        if self.words is not None and self.characters is not None and self.words.length:
            figures |= {"wer": self.words.rate, "cer": self.characters.rate, "words": self.words.length}
        return figures


def collate_at_least(examples: list[Any], min_samples: int) -> Batch:
    """Collate like `collate`, but pad utterances to at least one frame, since evaluation drops none."""
    batch = collate(examples)
    missing = min_samples - batch.waveforms.shape[1]
    if missing > 0:
        batch.waveforms = nn.functional.pad(batch.waveforms, (0, missing))
    batch.num_samples = batch.num_samples.clamp(min=min_samples)
    return batch


class Tally:
    """Count the results of one rank in an evaluation; `summed` adds the counts of all ranks."""

    def __init__(
        self, recognizer: Recognizer, dataset: SpeechDataset, objective: Objective, *, keep_rows: bool
    ) -> None:
        self.recognizer, self.dataset, self.objective = recognizer, dataset, objective
        self.keep_rows, self.rows = keep_rows, dict[int, Prediction]()
        names = recognizer.labels.names
        kinds = {head: LABELS[head].kind for head in names}
        self.numbers = {h: {n: i for i, n in enumerate(names[h])} for h in names if kinds[h] == "class"}
        # For each class: correct, in the references, recognised. See `ClassificationCounts`.
        self.classes = {head: np.zeros((3, len(ids)), dtype=np.int64) for head, ids in self.numbers.items()}
        self.edits = np.zeros(4, dtype=np.int64)  # word edits, words, character edits, characters
        self.losses = torch.zeros(2, len(HEADS), dtype=torch.float64)  # sums and counts
        of_numbers = [head for head in HEADS if kinds.get(head) == "numbers"]
        self.moments = {head: torch.zeros(6, len(names[head]), dtype=torch.float64) for head in of_numbers}

    def add(self, outputs: Outputs, batch: Batch) -> None:
        """Count a batch. Recordings that could not be read have no labels and no prediction."""
        self.add_scores(outputs, batch)
        for index, prediction in zip(batch.indices, self.recognizer.decode(outputs), strict=True):
            if index not in batch.errors:
                self.add_prediction(index, prediction)

    def add_scores(self, outputs: Outputs, batch: Batch) -> None:
        """Count a batch's losses, and the moments of concordance."""
        for head, (total, count) in self.objective.sums(outputs, batch).items():
            place = list(HEADS).index(head)
            self.losses[0, place] += total.double().cpu()
            self.losses[1, place] += count.double().cpu()
        for head, moments in self.moments.items():
            moments += ccc_moments(outputs.scores[head], batch.labels[head], batch.weights).cpu()

    def add_prediction(self, index: int, prediction: Prediction) -> None:
        """Compare the prediction for an utterance with its labels."""
        if self.keep_rows:
            self.rows[index] = prediction
        answers = {**prediction.others, "emotion": prediction.emotion, "speaker": prediction.speaker}
        for head, totals in self.classes.items():
            reference = self.dataset.labels[head][index]
            if reference != NO_LABEL:
                predicted = self.numbers[head][answers[head]]
                totals[0, reference] += reference == predicted
                totals[1, reference] += 1
                totals[2, predicted] += 1
        reference = self.dataset.references[index]
        if prediction.transcript is not None and reference:
            words = word_errors(reference, prediction.transcript)
            characters = character_errors(reference, prediction.transcript)
            self.edits += (words.edits, words.length, characters.edits, characters.length)

    def summed(self, world: World, *, stop: bool) -> bool:
        """Add the counts of all ranks, unless a rank was asked to stop; return whether one was."""
        flat = np.concatenate([*(totals.ravel() for totals in self.classes.values()), [stop], self.edits])
        flat = world.sum(torch.from_numpy(flat)).numpy()
        if flat[-5]:
            return True
        self.edits, first = flat[-4:], 0
        for head, totals in self.classes.items():
            self.classes[head] = flat[first : first + totals.size].reshape(totals.shape)
            first += totals.size
        world.sum(self.losses)
        for moments in self.moments.values():
            world.sum(moments)
        return False

    def evaluation(self, unread: Collection[int]) -> Evaluation:
        """Return the figures that follow from the counts."""
        result = Evaluation(utterances=len(self.dataset) - len(unread), unread=len(unread))
        result.classes = {head: ClassificationCounts(totals) for head, totals in self.classes.items()}
        if self.recognizer.vocabulary is not None:
            result.rewriting = self.dataset.rewriting(without=unread)
            result.words, result.characters = (
                ErrorRateCounts(*pair) for pair in self.edits.reshape(2, 2).tolist()
            )
        sums = zip(HEADS, *self.losses, strict=True)
        result.losses = {head: float(total / count) for head, total, count in sums if count}
        for head, moments in [(head, moments) for head, moments in self.moments.items() if moments[0].any()]:
            ccc = concordance(moments)
            result.ccc[head] = dict(zip(self.recognizer.labels.names[head], ccc.tolist(), strict=True))
            if self.objective.weights.get(head) and LOSSES[head].sums is None:
                result.losses[head] = float((1 - ccc).nan_to_num().mean())  # as in an update
        if result.losses:
            result.loss = sum(self.objective.weights.get(head, 0.0) * loss for head, loss in result.losses.items())
        return result

    def rows_of_all(self, world: World, unread: Collection[int]) -> list[tuple[Utterance, str, Prediction]]:
        """Return (utterance, reference text, prediction) of all ranks, in the order of the data."""
        merged = {i: prediction for part in world.gather(self.rows) for i, prediction in part.items()}
        seconds = [length / SAMPLE_RATE for length in self.dataset.lengths]
        return [
            (u, self.dataset.references[i], replace(merged[i], file=str(u.file), seconds=seconds[i]))
            for i, u in enumerate(self.dataset.utterances)
            if i not in unread
        ]


class Decoding(TypedDict, total=False):
    """Describe how recordings are decoded for an evaluation; see `evaluate`."""

    batch_seconds: float | None
    workers: int
    timeout: float


def open_batches(
    dataset: SpeechDataset,
    recognizer: Recognizer,
    bad_audio: BadAudio,
    *,
    batch_seconds: float | None = None,
    workers: int = 0,
    timeout: float = WORKER_SECONDS,
) -> tuple[Generator[Batch, None, None], int]:
    """Return this rank's batches of similar lengths, decoded ahead, and their number."""
    world, least = bad_audio.world, recognizer.model.config.min_samples
    if "lengths" not in vars(dataset):  # all ranks must know the same lengths
        bad_audio.read_lengths("valid", dataset, least=least)
    samples = int((batch_seconds or recognizer.batch_seconds) * SAMPLE_RATE)
    batches = evaluation_batches(dataset.lengths, batch_samples=samples, rank=world.rank, world_size=world.size)
    loader = decoded(
        dataset,
        batches,
        partial(collate_at_least, min_samples=least),
        workers=min(workers, len(batches)),
        timeout=timeout,
        pin_memory=world.device.type == "cuda",
        worker_init_fn=outlive_signals,
    )
    return loader, len(batches)


def equal_weights(recognizer: Recognizer) -> Objective:
    """Return the objective in which each task has weight 1."""
    vocabulary = recognizer.vocabulary
    return Objective(dict.fromkeys(HEADS, 1.0), blank=vocabulary.blank if vocabulary is not None else 0)


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Switch off dropout and masks in this context, and restore the model's mode afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield model
    finally:
        model.train(was_training)


@torch.no_grad()
@memory_explained("Try a lower --eval-seconds", doing="in evaluation")
@worker_death_explained()
def evaluate(
    recognizer: Recognizer,
    utterances: Sequence[Utterance] | SpeechDataset,
    *,
    world: World | None = None,
    objective: Objective | None = None,
    keep_rows: bool = False,
    progress: bool = False,
    bad_audio: BadAudio | None = None,
    stop: StopRequest | None = None,
    **decoding: Unpack[Decoding],
) -> Evaluation:
    """Evaluate a model on utterances. Every rank calls this and gets the same result.

    Args:
        recognizer: the model with its labels.
        utterances: rows of a manifest, or `Recognizer.dataset` of them. The figures of a task leave out utterances
            without its label, and speakers that the model does not know; they say how many utterances they count.
        world: the ranks that share the work; None: this process alone.
        objective: for the losses; None: each task at weight 1.
        keep_rows: also return the prediction for every utterance, on every rank, in the order of the utterances.
        progress: show a progress bar.
        bad_audio: what to do with recordings that cannot be read; None: raise an AudioError on all ranks.
        stop: a request that may come on any rank; then the result is ``interrupted`` on all ranks.
        decoding: ``batch_seconds``, padded seconds per forward pass; None: as in prediction,
            `Recognizer.batch_seconds`. ``workers``, processes per rank that decode audio. ``timeout``, seconds to
            wait for a worker.
    """
    recognizer.require_single_label("for an evaluation")
    world = world or World(device=recognizer.device)
    bad_audio = bad_audio or BadAudio(world)
    objective = replace(objective or equal_weights(recognizer), adjustment=None)  # it is for training alone
    dataset = utterances if isinstance(utterances, SpeechDataset) else recognizer.dataset(utterances)
    loader, count = open_batches(dataset, recognizer, bad_audio, **decoding)
    tally = Tally(recognizer, dataset, objective, keep_rows=keep_rows)
    errors: dict[int, str] = {}
    names = [u.id for u in dataset.utterances]
    shown = {"desc": "evaluating", "unit": "batch", "total": count, "leave": False}
    with in_eval_mode(recognizer.model) as model, closing(loader):
        for batch in tqdm(loader, **shown, disable=not progress):
            errors |= batch.errors
            if stop or (errors and bad_audio.policy == "fail"):
                break  # and go on to `agree`, which all ranks call
            with memory_explained("Try a lower --eval-seconds", batch, names):
                batch = batch.to(world.device)
                with recognizer.autocast():
                    outputs = model(**batch.inputs)
            tally.add(outputs, batch)
    unread = bad_audio.agree("valid", dataset, errors)
    if tally.summed(world, stop=bool(stop)):
        return Evaluation(interrupted=True)
    result = tally.evaluation(unread)
    if keep_rows:
        result.rows = tally.rows_of_all(world, unread)
    return result


def evaluated_rows(
    recognizer: Recognizer,
    utterances: Sequence[Utterance],
    *,
    seen_texts: frozenset[str] | None = None,
    rewriting: Rewriting | None = None,
    **options: Any,
) -> Iterator[list[dict[str, Any]]]:
    """Yield rows of the predictions file, in the order of the utterances; chunks keep the memory bounded.

    Every rank calls this and gets every row; each utterance is recognised exactly once.

    Args:
        recognizer: the model.
        utterances: rows of a manifest.
        seen_texts: transcripts of the training data, cleaned as the model cleans texts; None: not known.
        rewriting: the changes to the references are added to it, chunk by chunk.
        options: those of `evaluate`; a recording that is skipped has no row.
    """
    size = max(1, min(CHUNK, MAX_COUNTS // (4 * max(len(recognizer.emotions), 1))))
    for first in range(0, len(utterances), size):
        chunk = utterances[first : first + size]
        result = evaluate(recognizer, chunk, keep_rows=True, **options)
        if rewriting is not None:
            rewriting += result.rewriting
        rows = [as_row(recognizer, *row) for row in result.rows]
        if seen_texts is not None:
            for row, (utterance, *_) in zip(rows, result.rows, strict=True):
                text = clean(utterance.text or "", orthography=recognizer.orthography, tags=recognizer.tags)
                row["seen_text"] = "" if not text else "seen" if text in seen_texts else "unseen"
        yield rows

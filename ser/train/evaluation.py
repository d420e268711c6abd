"""Evaluate a model on utterances, each counted exactly once on any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

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
    """Counts over a set of utterances, each counted exactly once on any number of ranks."""

    utterances: int = 0
    unread: int = 0  # utterances that were left out, as their recordings cannot be read
    rewriting: Rewriting = field(default_factory=Rewriting)  # of the references, as the vocabulary writes them
    classes: dict[str, ClassificationCounts] = field(default_factory=dict)  # head of classes -> its counts
    ccc: dict[str, dict[str, float]] = field(
        default_factory=dict
    )  # head of numbers -> name -> CCC; NaN: undefined
    words: ErrorRateCounts | None = None
    characters: ErrorRateCounts | None = None
    loss: float = math.nan
    losses: dict[str, float] = field(default_factory=dict)
    rows: list[tuple[Utterance, str, Prediction]] = field(default_factory=list)  # with the reference text
    interrupted: bool = False  # a rank was asked to stop before the end: there are no figures

    def metrics(self) -> dict[str, Any]:
        """Return the figures by name; only what the model has heads for and the data labels for."""
        figures: dict[str, Any] = {"utterances": self.utterances, "loss": self.loss}
        figures |= {"bad_audio": self.unread} if self.unread else {}
        figures |= {f"loss_{name}": value for name, value in self.losses.items()}
        emotion = self.classes.get("emotion")
        if emotion is not None and emotion.count:
            figures["emotion_utterances"] = emotion.count
            figures |= emotion.figures
        for head, values in self.ccc.items():
            if head == "dimensions":
                defined = [value for value in values.values() if math.isfinite(value)]
                figures["ccc"] = sum(defined) / len(defined) if defined else math.nan
            figures |= {f"ccc_{name.lower()}": value for name, value in values.items()}
        changes = {
            "references_recased": self.rewriting.recased,
            "characters_replaced": self.rewriting.replaced.total(),
            "characters_outside_vocabulary": self.rewriting.removed.total(),
            "references_left_empty": self.rewriting.emptied,
        }
        figures |= {name: count for name, count in changes.items() if count}
        if self.words is not None and self.characters is not None and self.words.length:
            figures |= {"wer": self.words.rate, "cer": self.characters.rate, "words": self.words.length}
        for head, counts in self.classes.items():
            if counts.count and head != "emotion":
                figures[f"{head}_accuracy"] = counts.figures["accuracy"]
                figures[f"{head}_utterances"] = counts.count  # of speakers, those that training knew
        return figures


def collate_at_least(examples: list[Any], min_samples: int) -> Batch:
    """Return `collate`, with utterances shorter than one frame padded to it: evaluation drops none."""
    batch = collate(examples)
    missing = min_samples - batch.waveforms.shape[1]
    if missing > 0:
        batch.waveforms = nn.functional.pad(batch.waveforms, (0, missing))
    batch.num_samples = batch.num_samples.clamp(min=min_samples)
    return batch


class Tally:
    """Count what one rank sees of an evaluation; `summed` adds the counts of all ranks."""

    def __init__(self, recognizer: Recognizer, dataset: SpeechDataset) -> None:
        self.dataset = dataset
        names = recognizer.labels.names
        self.numbers = {
            head: {name: i for i, name in enumerate(names[head])} for head in names if LABELS[head].kind == "class"
        }
        # Right, of the reference, recognised as it: of each class, see `ClassificationCounts`.
        self.classes = {head: np.zeros((3, len(ids)), dtype=np.int64) for head, ids in self.numbers.items()}
        self.edits = np.zeros(4, dtype=np.int64)  # word edits, words, character edits, characters
        self.losses = torch.zeros(2, len(HEADS), dtype=torch.float64)  # sums and counts
        self.moments = {
            head: torch.zeros(6, len(names[head]), dtype=torch.float64)
            for head in HEADS
            if head in names and LABELS[head].kind == "numbers"
        }

    def add_scores(self, objective: Objective, outputs: Outputs, batch: Batch) -> None:
        """Count a batch's losses, and what concordance needs."""
        for head, (total, count) in objective.sums(outputs, batch).items():
            place = list(HEADS).index(head)
            self.losses[0, place] += total.double().cpu()
            self.losses[1, place] += count.double().cpu()
        for head, moments in self.moments.items():
            moments += ccc_moments(outputs.scores[head], batch.labels[head], batch.weights).cpu()

    def add_prediction(self, index: int, prediction: Prediction) -> None:
        """Compare what was recognised in an utterance with its labels."""
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
        """Add the counts of all ranks; return whether one was asked to stop, and then nothing is added."""
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

    def evaluation(self, recognizer: Recognizer, objective: Objective, unread: Collection[int]) -> Evaluation:
        """Return the figures that follow from the counts."""
        result = Evaluation(utterances=len(self.dataset) - len(unread), unread=len(unread))
        result.classes = {head: ClassificationCounts(totals) for head, totals in self.classes.items()}
        if recognizer.vocabulary is not None:
            result.rewriting = self.dataset.rewriting(without=unread)
            result.words = ErrorRateCounts(int(self.edits[0]), int(self.edits[1]))
            result.characters = ErrorRateCounts(int(self.edits[2]), int(self.edits[3]))
        for place, head in enumerate(HEADS):
            if self.losses[1, place]:
                result.losses[head] = float(self.losses[0, place] / self.losses[1, place])
        for head, moments in self.moments.items():
            if not moments[0].any():
                continue
            ccc = concordance(moments)
            result.ccc[head] = dict(zip(recognizer.labels.names[head], ccc.tolist(), strict=True))
            if objective.weights.get(head) and LOSSES[head].sums is None:
                result.losses[head] = float((1 - ccc).nan_to_num().mean())  # as in an update
        if result.losses:
            result.loss = sum(objective.weights.get(head, 0.0) * value for head, value in result.losses.items())
        return result


@torch.no_grad()
@memory_explained("Try a lower --eval-seconds", doing="in evaluation")
@worker_death_explained()
def evaluate(
    recognizer: Recognizer,
    utterances: Sequence[Utterance] | SpeechDataset,
    *,
    world: World | None = None,
    objective: Objective | None = None,
    batch_seconds: float | None = None,
    workers: int = 0,
    keep_rows: bool = False,
    progress: bool = False,
    bad_audio: BadAudio | None = None,
    stop: StopRequest | None = None,
    timeout: float = WORKER_SECONDS,
) -> Evaluation:
    """Score a model on utterances. Every rank calls this and gets the same result.

    Args:
        recognizer: the model with its labels.
        utterances: rows of a manifest, or `Recognizer.dataset` of them; labels that are absent, or speakers that
            the model does not know, are left out of that task's figures, which say how many they count.
        world: the ranks that share the work; None: this process alone.
        objective: for the losses; None: each task at weight 1.
        batch_seconds: padded seconds per forward pass; None: as in prediction, `Recognizer.batch_seconds`.
        workers: processes per rank that decode audio.
        keep_rows: also return the prediction for every utterance, on every rank, in their order.
        progress: show a progress bar.
        bad_audio: what becomes of recordings that cannot be read; None: the first is an AudioError, on all ranks.
        stop: may become true on any rank meanwhile; then the result, on all ranks, is ``interrupted``.
        timeout: seconds to wait for a worker.
    """
    recognizer.require_single_label("for an evaluation")
    world = world or World(device=recognizer.device)
    bad_audio = bad_audio or BadAudio(world)
    model, vocabulary = recognizer.model, recognizer.vocabulary
    objective = objective or Objective(dict.fromkeys(HEADS, 1.0), blank=vocabulary.blank if vocabulary else 0)
    dataset = utterances if isinstance(utterances, SpeechDataset) else recognizer.dataset(utterances)
    if "lengths" not in vars(dataset):
        bad_audio.read_lengths("valid", dataset, least=model.config.min_samples)
    batches = evaluation_batches(
        dataset.lengths,
        batch_samples=int((batch_seconds or recognizer.batch_seconds) * SAMPLE_RATE),
        rank=world.rank,
        world_size=world.size,
    )
    loader = decoded(
        dataset,
        batches,
        partial(collate_at_least, min_samples=model.config.min_samples),
        workers=min(workers, len(batches)),
        timeout=timeout,
        pin_memory=world.device.type == "cuda",
        worker_init_fn=outlive_signals,
    )
    tally = Tally(recognizer, dataset)
    rows: dict[int, Prediction] = {}
    errors: dict[int, str] = {}
    names = [u.id for u in dataset.utterances]
    was_training = model.training
    model.eval()
    shown = {"desc": "evaluating", "unit": "batch", "total": len(batches), "leave": False}
    for batch in tqdm(loader, **shown, disable=not progress):
        errors |= batch.errors
        if stop or (errors and bad_audio.policy == "fail"):
            break  # to where the ranks meet
        with memory_explained("Try a lower --eval-seconds", batch, names):
            batch = batch.to(world.device)
            with recognizer.autocast():
                outputs = model(**batch.inputs)
        tally.add_scores(objective, outputs, batch)
        for index, prediction in zip(batch.indices, recognizer.decode(outputs), strict=True):
            if index not in errors:
                tally.add_prediction(index, prediction)
                if keep_rows:
                    seconds = dataset.lengths[index] / SAMPLE_RATE
                    rows[index] = replace(prediction, file=str(dataset.utterances[index].file), seconds=seconds)
    loader.close()
    model.train(was_training)
    unread = bad_audio.agree("valid", dataset, errors)
    if tally.summed(world, stop=bool(stop)):
        return Evaluation(interrupted=True)
    result = tally.evaluation(recognizer, objective, unread)
    if keep_rows:
        merged = {i: p for part in world.gather(rows) for i, p in part.items()}
        read = [(i, u) for i, u in enumerate(dataset.utterances) if i not in unread]
        result.rows = [(u, dataset.references[i], merged[i]) for i, u in read]
    return result


def evaluated_rows(
    recognizer: Recognizer,
    utterances: Sequence[Utterance],
    *,
    seen_texts: frozenset[str] | None = None,
    rewriting: Rewriting | None = None,
    **options: Any,
) -> Iterator[list[dict[str, Any]]]:
    """Yield rows of the predictions file, in the order of the utterances, a chunk at a time: memory is bounded.

    Every rank calls this and gets every row; each utterance is recognised exactly once.

    Args:
        recognizer: the model.
        utterances: rows of a manifest.
        seen_texts: transcripts that training had, cleaned as the model cleans; None: not known.
        rewriting: is given what was changed in the references, chunk by chunk.
        options: those of `evaluate`; a recording that is skipped has no row.
    """
    size = max(1, min(CHUNK, MAX_COUNTS // (4 * max(len(recognizer.emotions), 1))))
    for first in range(0, len(utterances), size):
        chunk = utterances[first : first + size]
        result = evaluate(recognizer, chunk, keep_rows=True, **options)
        if rewriting is not None:
            rewriting += result.rewriting
        rows = []
        for utterance, reference, prediction in result.rows:
            row = as_row(recognizer, utterance, reference, prediction)
            if seen_texts is not None:
                text = clean(utterance.text or "", orthography=recognizer.orthography, tags=recognizer.tags)
                row["seen_text"] = "" if not text else "seen" if text in seen_texts else "unseen"
            rows.append(row)
        yield rows

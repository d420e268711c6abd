"""A model judged on utterances, each counted exactly once on any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from ser.audio import SAMPLE_RATE
from ser.data.dataset import NO_LABEL, Batch, SpeechDataset, collate
from ser.data.manifest import Utterance
from ser.data.sampler import evaluation_batches
from ser.data.text import Rewriting, clean
from ser.data.workers import WORKER_SECONDS, decoded, worker_death_explained
from ser.models.multitask import HEADS
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
from ser.train.processes import StopRequest, outlive_signals
from ser.train.resources import memory_explained
from ser.train.update import Objective


@dataclass
class Evaluation:
    """Counts over a set of utterances, each counted exactly once on any number of ranks."""

    utterances: int = 0
    unread: int = 0  # utterances that were left out, as their recordings cannot be read
    rewriting: Rewriting = field(default_factory=Rewriting)  # of the references, as the vocabulary writes them
    emotion: ClassificationCounts | None = None
    speaker: ClassificationCounts | None = None
    ccc: dict[str, float] = field(default_factory=dict)  # by dimension; NaN where it is undefined
    words: ErrorRateCounts | None = None
    characters: ErrorRateCounts | None = None
    loss: float = math.nan
    losses: dict[str, float] = field(default_factory=dict)
    rows: list[tuple[Utterance, str, Prediction]] = field(default_factory=list)  # with the reference text
    interrupted: bool = False  # a rank was asked to stop before the end: there are no figures

    def metrics(self) -> dict[str, Any]:
        """By name; only what the model has heads for and the data labels for."""
        found: dict[str, Any] = {"utterances": self.utterances, "loss": self.loss}
        found |= {"bad_audio": self.unread} if self.unread else {}
        found |= {f"loss_{name}": value for name, value in self.losses.items()}
        if self.emotion is not None and self.emotion.count:
            found["emotion_utterances"] = self.emotion.count
            found |= self.emotion.figures
        if self.ccc:
            defined = [value for value in self.ccc.values() if math.isfinite(value)]
            found["ccc"] = sum(defined) / len(defined) if defined else math.nan
            found |= {f"ccc_{name.lower()}": value for name, value in self.ccc.items()}
        changes = {
            "references_recased": self.rewriting.recased,
            "characters_replaced": self.rewriting.replaced.total(),
            "characters_outside_vocabulary": self.rewriting.removed.total(),
            "references_left_empty": self.rewriting.emptied,
        }
        found |= {name: count for name, count in changes.items() if count}
        if self.words is not None and self.characters is not None and self.words.length:
            found |= {"wer": self.words.rate, "cer": self.characters.rate, "words": self.words.length}
        if self.speaker is not None and self.speaker.count:
            found["speaker_accuracy"] = self.speaker.figures["accuracy"]
            found["speaker_utterances"] = self.speaker.count  # those of speakers that training knew
        return found


def add_outcome(totals: NDArray[np.int64], reference: int, predicted: int) -> None:
    """Add an utterance to (3, K) totals as `ClassificationCounts` has them; not one without a label."""
    if reference != NO_LABEL:
        totals[0, reference] += reference == predicted
        totals[1, reference] += 1
        totals[2, predicted] += 1


def collate_at_least(examples: list[Any], min_samples: int) -> Batch:
    """`collate`, with utterances shorter than one frame padded to it: evaluation drops none."""
    batch = collate(examples)
    missing = min_samples - batch.waveforms.shape[1]
    if missing > 0:
        batch.waveforms = nn.functional.pad(batch.waveforms, (0, missing))
    batch.num_samples = batch.num_samples.clamp(min=min_samples)
    return batch


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
    model = recognizer.model
    vocabulary = recognizer.vocabulary
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
    result = Evaluation()
    # Right, of the reference, recognised as it: of each class, see `ClassificationCounts`.
    emotion = np.zeros((3, len(recognizer.emotions)), dtype=np.int64)
    speaker = np.zeros((3, len(recognizer.speakers)), dtype=np.int64)
    numbers = [{name: i for i, name in enumerate(names)} for names in (recognizer.emotions, recognizer.speakers)]
    edits = np.zeros(4, dtype=np.int64)  # word edits, words, character edits, characters
    sums = torch.zeros(2 * len(HEADS), dtype=torch.float64)
    moments = torch.zeros(6, len(recognizer.dimensions), dtype=torch.float64)
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
        for name, (total, count) in objective.sums(outputs, batch).items():
            place = list(HEADS).index(name)
            sums[place] += total.double().cpu()
            sums[len(HEADS) + place] += count.double().cpu()
        if outputs.dimensions is not None:
            moments += ccc_moments(outputs.dimensions, batch.dimensions, batch.weights).cpu()
        for index, prediction in zip(batch.indices, recognizer.decode(outputs), strict=True):
            if index in errors:
                continue
            if prediction.emotion is not None:
                add_outcome(emotion, dataset.emotions[index], numbers[0][prediction.emotion])
            if prediction.speaker is not None:
                add_outcome(speaker, dataset.speakers[index], numbers[1][prediction.speaker])
            reference = dataset.references[index]
            if prediction.transcript is not None and reference:
                words = word_errors(reference, prediction.transcript)
                characters = character_errors(reference, prediction.transcript)
                edits += (words.edits, words.length, characters.edits, characters.length)
            if keep_rows:
                seconds = dataset.lengths[index] / SAMPLE_RATE
                rows[index] = replace(prediction, file=str(dataset.utterances[index].file), seconds=seconds)
    loader.close()
    model.train(was_training)
    unread = bad_audio.agree("valid", dataset, errors)

    flat = np.concatenate([emotion.ravel(), speaker.ravel(), [bool(stop)], edits])
    flat = world.sum(torch.from_numpy(flat)).numpy()
    if flat[-5]:
        return Evaluation(interrupted=True)
    emotion = flat[: emotion.size].reshape(emotion.shape)
    speaker = flat[emotion.size : -5].reshape(speaker.shape)
    edits = flat[-4:]
    world.sum(sums)
    world.sum(moments)
    result.utterances, result.unread = len(dataset) - len(unread), len(unread)
    if vocabulary is not None:
        result.rewriting = dataset.rewriting(without=unread)
    if recognizer.emotions:
        result.emotion = ClassificationCounts(emotion)
    if recognizer.speakers:
        result.speaker = ClassificationCounts(speaker)
    if vocabulary is not None:
        result.words = ErrorRateCounts(int(edits[0]), int(edits[1]))
        result.characters = ErrorRateCounts(int(edits[2]), int(edits[3]))
    for place, name in enumerate(HEADS):
        if sums[len(HEADS) + place]:
            result.losses[name] = float(sums[place] / sums[len(HEADS) + place])
    if moments[0].any():
        result.ccc = dict(zip(recognizer.dimensions, concordance(moments).tolist(), strict=True))
        if objective.weights.get("dimensions"):
            result.losses["dimensions"] = float((1 - concordance(moments)).nan_to_num().mean())  # as in an update
    if result.losses:
        result.loss = sum(objective.weights.get(name, 0.0) * value for name, value in result.losses.items())
    if keep_rows:
        merged = {i: p for part in world.gather(rows) for i, p in part.items()}
        found = [(i, u) for i, u in enumerate(dataset.utterances) if i not in unread]
        result.rows = [(u, dataset.references[i], merged[i]) for i, u in found]
    return result


def judge(
    recognizer: Recognizer,
    utterances: Sequence[Utterance],
    *,
    world: World | None = None,
    seen_texts: frozenset[str] | None = None,
    workers: int = 0,
    progress: bool = False,
    bad_audio: BadAudio | None = None,
    timeout: float = WORKER_SECONDS,
    rewriting: Rewriting | None = None,
) -> Iterator[list[dict[str, Any]]]:
    """Rows of the predictions file, in the order of the utterances, a chunk at a time: memory is bounded.

    Every rank calls this and gets every row; each utterance is recognised exactly once.

    Args:
        recognizer: the model.
        utterances: rows of a manifest.
        world: the ranks that share the work.
        seen_texts: transcripts that training had, cleaned as the model cleans; None: not known.
        workers: processes per rank that decode audio.
        progress: show a bar per chunk.
        bad_audio: as for `evaluate`; a recording that is skipped has no row.
        timeout: seconds to wait for a worker.
        rewriting: gets what was changed in the references, chunk by chunk.
    """
    size = max(1, min(CHUNK, MAX_COUNTS // (4 * max(len(recognizer.emotions), 1))))
    for first in range(0, len(utterances), size):
        chunk = utterances[first : first + size]
        found = evaluate(
            recognizer, chunk, world=world, workers=workers, keep_rows=True, progress=progress,
            bad_audio=bad_audio, timeout=timeout,
        )  # fmt: skip
        if rewriting is not None:
            rewriting += found.rewriting
        rows = []
        for utterance, reference, prediction in found.rows:
            row = as_row(recognizer, utterance, reference, prediction)
            if seen_texts is not None:
                text = clean(utterance.text or "", orthography=recognizer.orthography, tags=recognizer.tags)
                row["seen_text"] = "" if not text else "seen" if text in seen_texts else "unseen"
            rows.append(row)
        yield rows

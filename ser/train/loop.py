"""The training loop, read from the bottom up: `fit` calls `run_update` and `evaluate`.

What one update computes is fixed by the plan of the epoch (`ser.data.sampler`) and does not depend on how many
processes share it or how it is cut into micro-batches: every loss is a sum that is divided by the count of the
whole update on all ranks, known before the first backward pass. Dropout is drawn from a seed that is a
function of (seed, step, micro-batch, rank), SpecAugment masks from (seed, epoch, utterance). So there is no
random state to save, and a resumed run continues exactly.
"""

from __future__ import annotations

import hashlib
import json
import math
import resource
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from ser.audio import SAMPLE_RATE
from ser.data.dataset import NO_LABEL, Batch, SpeechDataset, collate
from ser.data.manifest import Utterance
from ser.data.sampler import LengthBucketBatchSampler, evaluation_batches
from ser.data.text import clean, minimum_frames
from ser.errors import ConfigError, ResourceError, RunFolderError, SerError
from ser.files import cannot_write, replace_file
from ser.models.masking import spec_augment
from ser.models.multitask import HEADS, MultiTaskModel, Outputs
from ser.recognizer import Prediction, Recognizer
from ser.train.bad_audio import BadAudio, errors_of
from ser.train.card import RECORD, evaluation_entry, training_record, with_evaluation, write_card
from ser.train.checkpoint import Opened, Progress, Saver, describe, load_checkpoint, open_run
from ser.train.config import METRICS, TrainConfig, parse_interval
from ser.train.distributed import World, choose_device
from ser.train.losses import (
    at_least_float32,
    ccc_loss,
    ccc_moments,
    classification_loss,
    concordance,
    ctc_feasible,
    ctc_loss,
)
from ser.train.metrics import ClassificationCounts, ErrorRateCounts, character_errors, word_errors
from ser.train.optim import make_optimizer, rate_factor, set_rate
from ser.train.processes import StopRequest, outlive_signals, own_run, stop_on_signals
from ser.train.report import CHUNK, Outcomes, as_row, report

SMALLER_UPDATES = (
    "Try --micro-batch 1 (the effective batch stays), --max-seconds to drop the longest training utterances, "
    "--activation-checkpointing, --amp bf16; a run that has a checkpoint continues from it"
)

# ------------------------------------------------------------------- what the machine may do to a run


@contextmanager
def memory_explained(batch: Batch, names: Sequence[str], advice: str) -> Iterator[None]:
    """Out of memory in here is a ResourceError that names the utterances at work and what to change."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        signs = ("out of memory", "allocate memory", "ALLOC_FAILED")
        known = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not known and not any(sign in str(error) for sign in signs):
            raise
        seconds = [n / SAMPLE_RATE for n in batch.num_samples.tolist()]
        held = ", ".join(
            f"{names[i] if names else f'utterance {i}'} ({s:.1f} s)"
            for i, s in zip(batch.indices, seconds, strict=True)
        )
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ResourceError(
            f"out of memory with {len(seconds)} utterance{'s' if len(seconds) > 1 else ''} padded to "
            f"{max(seconds):.1f} s: {held}. {advice}. ({reason})"
        ) from error


@contextmanager
def worker_death_explained() -> Iterator[None]:
    """A loader worker that is killed is a ResourceError. torch raises it wherever this process happens to be."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith(("DataLoader worker", "DataLoader timed out")):
            raise
        reason = str(error).splitlines()[0].strip().rstrip(".")
        raise ResourceError(
            f"a process that decodes audio died: {reason}. If the system killed it for lack of memory, lower "
            "--workers (0: the training process decodes); then give the same command again to continue"
        ) from error


# ---------------------------------------------------------------------------------------- one update


@dataclass(frozen=True)
class Objective:
    """What is minimised: the sum of each task's loss divided by its count, by these weights.

    The loss of dimensions is no such sum; see `run_update`.
    """

    weights: dict[str, float]  # by head; 0: not trained
    label_smoothing: float = 0.0
    class_weights: Tensor | None = None  # (K,) of the emotion loss
    ctc_per_character: bool = False
    blank: int = 0

    def sums(self, outputs: Outputs, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """(sum, count) of each task but dimensions that has a weight above 0, in one micro-batch."""
        found = {}
        if outputs.emotion is not None and self.weights.get("emotion"):
            found["emotion"] = classification_loss(
                outputs.emotion,
                batch.emotions,
                class_weights=None
                if self.class_weights is None
                else self.class_weights.to(outputs.emotion.device),
                label_smoothing=self.label_smoothing,
                utterance_weights=batch.weights,
            )
        if outputs.ctc is not None and self.weights.get("ctc"):
            found["ctc"] = ctc_loss(
                outputs.ctc,
                outputs.num_frames,
                batch.targets,
                batch.target_lengths,
                blank=self.blank,
                per_character=self.ctc_per_character,
                utterance_weights=batch.weights,
            )
        if outputs.speaker is not None and self.weights.get("speaker"):
            found["speaker"] = classification_loss(
                outputs.speaker, batch.speakers, utterance_weights=batch.weights
            )
        return found

    def counts(self, model: MultiTaskModel, batches: Sequence[Batch]) -> Tensor:
        """What `sums` will return as counts, added up over micro-batches, from labels alone: (4,) float64.

        Of dimensions: the labels.
        """
        total = torch.zeros(len(HEADS), dtype=torch.float64)
        for batch in batches:
            check_classes(model, batch)
            known = (batch.emotions != NO_LABEL).double().cpu()
            if self.class_weights is not None:
                known = known * self.class_weights.double()[batch.emotions.clamp(min=0).cpu()]
            frames = model.config.num_frames(batch.num_samples)
            fits = ctc_feasible(batch.targets, batch.target_lengths, frames).double()
            speaks = (batch.speakers != NO_LABEL).double().cpu()
            rated = batch.dimensions.isfinite().double().sum(1).cpu()
            total += (torch.stack([known, fits, speaks, rated]) * batch.weights.double()).sum(1)
        return total


def check_classes(model: MultiTaskModel, batch: Batch) -> None:
    """Refuse a label that is no class (ConfigError): a kernel would end the process, far from here."""
    heads = model.heads_config
    for kind, labels, classes in (
        ("emotion", batch.emotions, heads.num_emotions),
        ("speaker", batch.speakers, heads.num_speakers),
    ):
        wrong = (labels != NO_LABEL) & ((labels < 0) | (labels >= classes))
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0, 0])
            index = batch.indices[row] if batch.indices else row
            raise ConfigError(
                f"utterance {index} has {kind} {int(labels[row])}; the model's {classes} are 0 to {classes - 1}, "
                f"{NO_LABEL} is unknown"
            )


@dataclass
class UpdateResult:
    """What one update did; the loss sums stay on the device until they are shown."""

    losses: dict[str, Tensor]  # sum over this rank's utterances, divided by the count of the whole update
    grad_norm: float
    skipped: bool = False  # the gradient was not finite on some rank, so no rank made the step
    overflow: bool = False  # and all losses were finite: float16 overflowed, and the scale was halved
    stop: bool = False  # some rank was asked to stop


def run_update(
    wrapped: nn.Module,
    model: MultiTaskModel,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    objective: Objective,
    world: World,
    *,
    scaler: torch.amp.GradScaler,
    amp: str = "off",
    clip: float = 0.0,
    seed: int = 0,
    epoch: int = 0,
    step: int = 0,
    names: Sequence[str] = (),
    stop: bool = False,
) -> UpdateResult:
    """Forward and backward over this rank's micro-batches of one update, then one optimizer step.

    ``wrapped`` is ``model`` under DistributedDataParallel, or ``model``. The batches are on the CPU or the device.
    Where dimensions are trained, a first pass without gradient finds what their loss needs to know of the whole
    update. Out of memory is a ResourceError; ``names`` are those of the dataset's utterances, for its message.
    ``stop``: this rank was asked to; it travels with the counts, so all ranks learn of it in one update.
    """
    optimizer.zero_grad(set_to_none=True)
    asked = torch.tensor([float(stop)], dtype=torch.float64)
    *counts, asked_to_stop = world.sum(torch.cat([objective.counts(model, batches), asked])).tolist()
    count_of = dict(zip(HEADS, counts, strict=True))
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp)

    def forward(network: nn.Module, number: int, batch: Batch) -> Outputs:
        masks = draw_masks(model, batch, seed=seed, epoch=epoch)
        # Dropout and LayerDrop: a function of where we are, not of what was drawn before.
        torch.manual_seed(mix(seed, step, number, world.rank))
        with torch.autocast(world.device.type, dtype=dtype) if dtype else nullcontext():
            return network(batch.waveforms, batch.num_samples, **masks)

    losses: dict[str, Tensor] = {}
    moments = torch.zeros(6, model.heads_config.num_dimensions, dtype=torch.float64, device=world.device)
    if objective.weights.get("dimensions") and count_of["dimensions"]:
        with torch.no_grad():
            for number, batch in enumerate(batches):
                with memory_explained(batch, names, SMALLER_UPDATES):
                    batch = batch.to(world.device)
                    predictions = forward(model, number, batch).dimensions
                assert predictions is not None
                moments += ccc_moments(predictions, batch.dimensions, batch.weights)
        moments = world.sum(moments.cpu())
        ccc = concordance(moments)
        if bool(ccc.isnan().all()):  # too few labels, or equal ones: they give no gradient
            count_of["dimensions"] = 0.0
        # Of the whole update: each rank's share of it, for what is shown is summed over ranks.
        losses["dimensions"] = (1 - ccc).nan_to_num().mean() / world.size
        moments = moments.to(world.device)
    for number, batch in enumerate(batches):
        last = number == len(batches) - 1
        with world.no_sync(wrapped, last=last), memory_explained(batch, names, SMALLER_UPDATES):
            batch = batch.to(world.device)
            outputs = forward(wrapped, number, batch)
            loss = torch.zeros((), device=world.device)
            for name, (total, _) in objective.sums(outputs, batch).items():
                share = total / max(count_of[name], 1e-12)
                losses[name] = losses[name] + share.detach() if name in losses else share.detach()
                loss = loss + objective.weights[name] * share
            if outputs.dimensions is not None and objective.weights.get("dimensions"):
                rated = ccc_loss(at_least_float32(outputs.dimensions), batch.dimensions, moments, batch.weights)
                loss = loss + objective.weights["dimensions"] * rated
            # DistributedDataParallel averages over ranks; the counts are already those of all ranks.
            scaler.scale(loss * world.size).backward()
    for parameter in model.untrained_by([n for n, weight in objective.weights.items() if weight and count_of[n]]):
        parameter.grad = None  # a zero gradient is not no gradient to AdamW
    trained = [p for p in model.parameters() if p.grad is not None]
    if not trained:  # no label of any task in the whole update
        return UpdateResult(losses, 0.0, stop=asked_to_stop > 0)
    scaler.unscale_(optimizer)
    # The norm is the same on every rank, so all skip the same updates. Reading it is the one wait per update.
    norm = float(torch.nn.utils.clip_grad_norm_(trained, clip or math.inf))
    skipped, overflow = not math.isfinite(norm), False
    if skipped:  # rare and known to all ranks, so a further exchange costs nothing
        broken = not all(bool(loss.isfinite()) for loss in losses.values())
        overflow = scaler.is_enabled() and not world.sum(torch.tensor(float(broken)))
    if skipped and not overflow:
        scaler.update(scaler.get_scale())  # as it was: the scale is not to blame
    else:  # after an overflow the scaler leaves the step out by itself, and halves its scale
        scaler.step(optimizer)
        scaler.update()
    return UpdateResult(losses, norm, skipped, overflow, stop=asked_to_stop > 0)


def draw_masks(model: MultiTaskModel, batch: Batch, *, seed: int, epoch: int) -> dict[str, Tensor | None]:
    """SpecAugment masks of a batch on its device; none for a frozen encoder."""
    if not model.wav2vec2.training:
        return {"mask_time": None, "mask_feature": None}
    frames = model.config.num_frames(batch.num_samples)
    time, feature = spec_augment(model.config, frames, batch.indices, seed=seed, epoch=epoch)
    device = batch.waveforms.device
    return {
        "mask_time": None if time is None else time.to(device, non_blocking=True),
        "mask_feature": None if feature is None else feature.to(device, non_blocking=True),
    }


def mix(*numbers: int) -> int:
    """A well-spread seed from several small numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


# ---------------------------------------------------------------------------------------- evaluation


@dataclass
class Evaluation:
    """Counts over a set of utterances, each counted exactly once on any number of ranks."""

    utterances: int = 0
    unread: int = 0  # utterances that were left out, as their recordings cannot be read
    unwritten: int = 0  # characters of the references that the vocabulary lacks, left out of WER and CER
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
            found["accuracy"] = self.emotion.accuracy
            found["unweighted_accuracy"] = self.emotion.unweighted_accuracy
            found["macro_f1"] = self.emotion.macro_f1
        if self.ccc:
            defined = [value for value in self.ccc.values() if math.isfinite(value)]
            found["ccc"] = sum(defined) / len(defined) if defined else math.nan
            found |= {f"ccc_{name.lower()}": value for name, value in self.ccc.items()}
        if self.words is not None and self.characters is not None and self.words.length:
            if self.unwritten:
                found["characters_outside_vocabulary"] = self.unwritten
            found |= {"wer": self.words.rate, "cer": self.characters.rate, "words": self.words.length}
        if self.speaker is not None and self.speaker.count:
            found["speaker_accuracy"] = self.speaker.accuracy
            found["speaker_utterances"] = self.speaker.count  # those of speakers that training knew
        return found


@torch.no_grad()
@worker_death_explained()
def evaluate(
    recognizer: Recognizer,
    utterances: Sequence[Utterance] | SpeechDataset,
    *,
    world: World | None = None,
    objective: Objective | None = None,
    batch_seconds: float = 64.0,
    workers: int = 0,
    keep_rows: bool = False,
    progress: bool = False,
    bad_audio: BadAudio | None = None,
    stop: StopRequest | None = None,
    timeout: float = 600.0,
) -> Evaluation:
    """Score a model on utterances. Every rank calls this and gets the same result.

    Args:
        recognizer: the model with its labels.
        utterances: rows of a manifest, or `make_dataset` of them; labels that are absent, or speakers that the
            model does not know, are left out of that task's figures, which say how many they count.
        world: the ranks that share the work; None: this process alone.
        objective: for the losses; None: each task at weight 1.
        batch_seconds: padded seconds per forward pass.
        workers: processes per rank that decode audio.
        keep_rows: also return the prediction for every utterance, on every rank, in their order.
        progress: show a progress bar.
        bad_audio: what becomes of recordings that cannot be read; None: the first is an AudioError, on all ranks.
        stop: may become true on any rank meanwhile; then the result, on all ranks, is ``interrupted``.
        timeout: seconds to wait for a worker.
    """
    world = world or World(device=recognizer.device)
    bad_audio = bad_audio or BadAudio(world)
    model = recognizer.model
    vocabulary = recognizer.vocabulary
    objective = objective or Objective(dict.fromkeys(HEADS, 1.0), blank=vocabulary.blank if vocabulary else 0)
    dataset = utterances if isinstance(utterances, SpeechDataset) else make_dataset(recognizer, utterances)
    if "lengths" not in vars(dataset):
        bad_audio.read_lengths("valid", dataset, least=model.config.min_samples)
    batches = evaluation_batches(
        dataset.lengths,
        batch_samples=int(batch_seconds * SAMPLE_RATE),
        rank=world.rank,
        world_size=world.size,
    )
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=partial(collate_at_least, min_samples=model.config.min_samples),
        num_workers=min(workers, len(batches)),
        pin_memory=world.device.type == "cuda",
        worker_init_fn=outlive_signals,
        timeout=timeout if min(workers, len(batches)) else 0,
    )
    result = Evaluation()
    emotion = np.zeros((len(recognizer.emotions),) * 2, dtype=np.int64)
    speaker = np.zeros((len(recognizer.speakers),) * 2, dtype=np.int64)
    edits = np.zeros(4, dtype=np.int64)  # word edits, words, character edits, characters
    sums = torch.zeros(2 * len(HEADS), dtype=torch.float64)
    moments = torch.zeros(6, len(recognizer.dimensions), dtype=torch.float64)
    rows: dict[int, Prediction] = {}
    errors: dict[int, str] = {}
    names = [u.id for u in dataset.utterances]
    was_training = model.training
    model.eval()
    for batch in tqdm(loader, desc="evaluating", unit="batch", leave=False, disable=not progress):
        errors |= batch.errors
        if stop or (errors and bad_audio.policy == "fail"):
            break  # to where the ranks meet
        with memory_explained(batch, names, "Try a lower --eval-seconds"):
            batch = batch.to(world.device)
            outputs = model(batch.waveforms, batch.num_samples)
        for name, (total, count) in objective.sums(outputs, batch).items():
            place = list(HEADS).index(name)
            sums[place] += total.double().cpu()
            sums[len(HEADS) + place] += count.double().cpu()
        if outputs.dimensions is not None:
            moments += ccc_moments(outputs.dimensions, batch.dimensions, batch.weights).cpu()
        for index, prediction in zip(batch.indices, recognizer.decode(outputs), strict=True):
            if index in errors:
                continue
            if prediction.emotion is not None and dataset.emotions[index] != NO_LABEL:
                emotion[dataset.emotions[index], recognizer.emotions.index(prediction.emotion)] += 1
            if prediction.speaker is not None and dataset.speakers[index] != NO_LABEL:
                speaker[dataset.speakers[index], recognizer.speakers.index(prediction.speaker)] += 1
            reference = dataset.references[index]
            if prediction.transcript is not None and reference:
                words = word_errors(reference, prediction.transcript)
                characters = character_errors(reference, prediction.transcript)
                edits += (words.edits, words.length, characters.edits, characters.length)
            if keep_rows:
                seconds = dataset.lengths[index] / SAMPLE_RATE
                rows[index] = replace(prediction, file=str(dataset.utterances[index].file), seconds=seconds)
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
        texts = [text for i, text in enumerate(dataset.texts) if i not in unread]
        result.unwritten = vocabulary.unknown_characters(texts).total()
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
    """
    for first in range(0, len(utterances), CHUNK):
        chunk = utterances[first : first + CHUNK]
        found = evaluate(
            recognizer, chunk, world=world, workers=workers, keep_rows=True, progress=progress, bad_audio=bad_audio
        )
        rows = []
        for utterance, reference, prediction in found.rows:
            row = as_row(recognizer, utterance, reference, prediction)
            if seen_texts is not None:
                text = clean(utterance.text or "", orthography=recognizer.orthography, tags=recognizer.tags)
                row["seen_text"] = "" if not text else "seen" if text in seen_texts else "unseen"
            rows.append(row)
        yield rows


# ---------------------------------------------------------------------------------------- the run


def make_dataset(recognizer: Recognizer, utterances: Sequence[Utterance]) -> SpeechDataset:
    """Utterances with the labels, vocabulary and preprocessing of a recognizer."""
    return SpeechDataset(
        utterances,
        emotions=recognizer.emotions,
        speakers=recognizer.speakers,
        dimensions=recognizer.dimensions,
        vocabulary=recognizer.vocabulary,
        orthography=recognizer.orthography,
        tags=recognizer.tags,
        do_normalize=recognizer.do_normalize,
    )


def collate_at_least(examples: list[Any], min_samples: int) -> Batch:
    """`collate`, with utterances shorter than one frame padded to it: evaluation drops none."""
    batch = collate(examples)
    missing = min_samples - batch.waveforms.shape[1]
    if missing > 0:
        batch.waveforms = nn.functional.pad(batch.waveforms, (0, missing))
    batch.num_samples = batch.num_samples.clamp(min=min_samples)
    return batch


@dataclass
class Meter:
    """Sums since the last progress line."""

    started: float
    losses: dict[str, Any] = field(default_factory=dict)
    updates: int = 0
    utterances: int = 0
    seconds: float = 0.0

    def add(self, result: UpdateResult, batches: Sequence[Batch]) -> None:
        """Count one update; nothing is copied from the device."""
        for name, value in result.losses.items():
            self.losses[name] = self.losses.get(name, 0.0) + value
        self.updates += 1
        self.utterances += int(sum(float(b.weights.sum()) for b in batches))
        self.seconds += sum(float((b.num_samples * b.weights).sum()) for b in batches) / SAMPLE_RATE

    def totals(self, world: World) -> dict[str, float]:
        """Means and rates over all ranks."""
        names = sorted(self.losses)
        values = [float(self.losses[name]) for name in names] + [self.utterances, self.seconds]
        summed = world.sum(torch.tensor(values, dtype=torch.float64)).tolist()
        elapsed = time.perf_counter() - self.started
        found = {f"loss_{name}": value / self.updates for name, value in zip(names, summed, strict=False)}
        return found | {
            "utterances_per_second": summed[-2] / elapsed,
            "audio_seconds_per_second": summed[-1] / elapsed,
        }


def memory_gib(device: torch.device) -> float:
    """Peak memory: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def say(world: World, text: str) -> None:
    """A line on standard error, from one rank alone, without breaking a progress bar."""
    if world.is_main:
        tqdm.write(text, file=sys.stderr)
        sys.stderr.flush()


def check_training_data(
    recognizer: Recognizer, dataset: SpeechDataset, lengths: Sequence[int], unread: Collection[str] = ()
) -> list[str]:
    """Refuse utterances without a frame; say what else is odd, such as transcripts that cannot fit."""
    minimum = recognizer.model.config.min_samples
    short = [(u, n) for u, n in zip(dataset.utterances, lengths, strict=True) if n < minimum]
    if short:
        listed = "\n  ".join(f"{u.id}: {n} samples" for u, n in short[:50])
        raise ConfigError(
            f"{len(short)} training utterances are shorter than one frame ({minimum} samples at 16 kHz); remove "
            f"them:\n  {listed}"
        )
    notes = []
    if recognizer.vocabulary is not None:
        empty = sum(not text for text in dataset.texts)
        if empty:
            notes.append(f"{empty} of {len(dataset)} utterances have no transcript; trained on their other labels")
        if any(dataset.texts) and not any(dataset.targets):
            text = next(text for text in dataset.texts if text)
            raise ConfigError(
                f"no training transcript has a character of the vocabulary; the first is {text[:40]!r}, the "
                f"symbols are {' '.join(recognizer.vocabulary.tokens[:40])}. Try --build-vocab, or --orthography"
            )
        dropped = recognizer.vocabulary.unknown_characters(dataset.texts)
        if dropped:
            listed = ", ".join(f"{c!r} x{n}" for c, n in dropped.most_common(20))
            notes.append(f"characters outside the vocabulary, removed: {listed}")
        frames = recognizer.model.config.num_frames(torch.tensor(lengths))
        misfits = []
        for utterance, target, there in zip(dataset.utterances, dataset.targets, frames.tolist(), strict=True):
            if (needed := minimum_frames(target)) > there and utterance.id not in unread:
                misfits.append(f"{utterance.id}: {needed} frames needed, {there} there")
        if misfits:
            shown = "\n  ".join(misfits[:20] + ([f"and {len(misfits) - 20} more"] if len(misfits) > 20 else []))
            notes.append(
                f"{len(misfits)} transcripts do not fit their audio; left out of the CTC loss:\n  {shown}"
            )
    return notes


def due(interval: tuple[int, str], *, step: int, epoch: int, epoch_ended: bool) -> bool:
    """Whether something every N updates or epochs is due after ``step`` updates; ``epoch`` counts ended ones."""
    number, unit = interval
    return step % number == 0 if unit == "updates" else epoch_ended and epoch % number == 0


@dataclass
class FitResult:
    """How a run ended."""

    progress: Progress
    metric: str
    evaluation: Evaluation | None  # the last one in this process
    resumed: bool
    stopped: bool = False  # asked to stop, by a signal to any rank, it saved its state before the end


@worker_death_explained()
def fit(
    recognizer: Recognizer,
    train: Sequence[Utterance],
    valid: Sequence[Utterance],
    config: TrainConfig,
    run: str | Path,
    *,
    world: World | None = None,
    settings: dict[str, Any] | None = None,
    overwrite: bool = False,
    resume_from: str | Path | None = None,
    allow_changes: Sequence[str] = (),
    verbose: bool = False,
) -> FitResult:
    """Train a recognizer; every rank calls this with the same arguments.

    Args:
        recognizer: the model to train, in place; see `Recognizer.create`.
        train, valid: rows of manifests. Without ``valid`` nothing is evaluated and the last model is the best.
        config: the settings.
        run: folder for checkpoints, metrics.jsonl, best/ and last/. Resumed if it holds a checkpoint: from the
            newest that is sound.
        world: the processes; None: this one alone.
        settings: further entries for the run's config.json (such as where the data came from); a resumed run
            must have the same.
        overwrite: start anew in a folder that holds a run.
        resume_from: the name or path of the checkpoint to go back to; later ones are set aside.
        allow_changes: settings that may differ from the resumed run's; see `CHANGEABLE`.
        verbose: print reference beside hypothesis for a few utterances of each evaluation.

    Asked to stop, by SIGTERM, SIGUSR1 or Ctrl-C to any rank, all finish the same update and save; the result is
    ``stopped``, and the same call continues.

    Raises:
        ConfigError, RunFolderError, FileError, AudioError, ResourceError: with what to do.
    """
    world = world or World(device=choose_device(config.device, 0))
    open_ = partial(open_run, overwrite=overwrite, resume_from=resume_from, allow_changes=allow_changes)
    with ExitStack() as held:
        return _fit(
            recognizer, train, valid, config, Path(run), world, settings or {}, open_, held,
            anew=overwrite, verbose=verbose,
        )  # fmt: skip


def _fit(
    recognizer: Recognizer,
    train: Sequence[Utterance],
    valid: Sequence[Utterance],
    config: TrainConfig,
    run: Path,
    world: World,
    settings: dict[str, Any],
    open_: Callable[[Path, dict[str, Any]], Opened],
    held: ExitStack,
    *,
    anew: bool,
    verbose: bool,
) -> FitResult:
    """`fit`, which gives back what is ``held`` at its end: the folder, the saver, the signals."""
    model = recognizer.model
    effective_batch = config.resolved_effective_batch(world.size)
    trained = trained_heads(recognizer, config)

    dataset, validation = make_dataset(recognizer, train), make_dataset(recognizer, valid)
    bad_audio = BadAudio(world, policy=config.on_bad_audio, limit=config.max_bad_audio, run=run)
    for name, part in {"train": dataset, "valid": validation}.items():
        bad_audio.read_lengths(name, part, least=model.config.min_samples, anew=anew)
    lengths = dataset.lengths
    recorded_lengths = {"train": lengths, "valid": validation.lengths}
    if config.max_seconds:
        kept = [i for i, n in enumerate(lengths) if n <= config.max_seconds * SAMPLE_RATE]
        dropped = [dataset.utterances[i].id for i in sorted(set(range(len(lengths))) - set(kept))]
        if dropped:
            listed = ", ".join(dropped[:20]) + (" ..." if len(dropped) > 20 else "")
            say(world, f"dropped {len(dropped)} training utterances over {config.max_seconds:g} s: {listed}")
        dataset, lengths = make_dataset(recognizer, [train[i] for i in kept]), [lengths[i] for i in kept]
        dataset.lengths = lengths
    for note in check_training_data(recognizer, dataset, lengths, bad_audio.skipped["train"]):
        say(world, note)

    metric = choose_metric(config, recognizer, validation)
    recorded = config.to_dict() | {"effective_batch": effective_batch or 0, "metric": metric} | settings
    recorded["model"] = describe(recognizer)
    recorded["data"] = {"train": fingerprint(dataset), "valid": fingerprint(validation)}
    if world.is_main:
        opened: Opened | None = None
        failure: SerError | None = None
        try:
            held.enter_context(own_run(run))
            opened = open_(run, recorded)
        except SerError as error:
            failure = error
        except (OSError, ValueError) as error:
            failure = RunFolderError(f"{run}: cannot be used: {error.__class__.__name__}: {error}")
    opened, failure = world.gather((opened, failure) if world.is_main else None)[0]
    if opened is None:
        assert failure is not None
        raise failure
    saver = held.enter_context(Saver())  # whatever way training ends, what is being written is finished
    bad_audio.begin(recorded_lengths, {"train": dataset, "valid": validation})
    for note in opened.notes:
        say(world, note)

    model.to(world.device)
    model.wav2vec2.activation_checkpointing(config.activation_checkpointing)
    model.freeze(config.freeze)
    for parameter in model.untrained_by([name for name, weight in trained.items() if weight]):
        parameter.requires_grad_(False)  # has no gradient, so it is no part of what is trained
    if model.config.has_mask_embedding and not model.config.apply_spec_augment:
        model.wav2vec2.masked_spec_embed.requires_grad_(False)
    model.train()
    wrapped = world.wrap(model)
    optimizer = make_optimizer(
        model,
        rate=config.rate,
        head_rate=config.head_rate,
        weight_decay=config.weight_decay,
        beta2=config.adam_beta2,
    )
    scaler = torch.amp.GradScaler(world.device.type, enabled=config.amp == "fp16")
    objective = Objective(
        weights=trained,
        label_smoothing=config.label_smoothing,
        class_weights=inverse_frequencies(dataset.emotions, len(recognizer.emotions))
        if config.class_weights and recognizer.emotions
        else None,
        ctc_per_character=config.ctc_per_character,
        blank=recognizer.vocabulary.blank if recognizer.vocabulary is not None else 0,
    )
    batch_samples = int(config.batch_seconds * SAMPLE_RATE) or None
    share = world.size * (config.accumulate or 1)
    sampler = LengthBucketBatchSampler(
        lengths,
        seed=config.seed,
        effective_batch=effective_batch,
        batch_samples=batch_samples,
        micro_batch=config.micro_batch if batch_samples is None else None,
        micro_samples=None if batch_samples is None else math.ceil(batch_samples / share),
        batching=config.batching,
        rank=world.rank,
        world_size=world.size,
    )
    # By utterances every epoch has equally many updates; by padded seconds the jitter decides.
    per_epoch = [len(sampler.plan(epoch=e)) for e in range(config.epochs if batch_samples else 1)]
    per_epoch = per_epoch if batch_samples else per_epoch * config.epochs
    total = sum(per_epoch)
    progress = Progress()
    if opened.checkpoint is not None:
        progress = load_checkpoint(opened.checkpoint, recognizer, optimizer)
        if progress.scaler:
            scaler.load_state_dict(progress.scaler)
        if opened.changed:  # of epochs, perhaps, or of when to stop early
            progress.finished = progress.epoch >= config.epochs or stops_early(config, progress)
        what = "is finished, nothing is left to do; it ended" if progress.finished else "is resumed"
        say(world, f"{run} {what} at update {progress.step} of {total}, from {opened.checkpoint.name}")
    finished_before = progress.finished
    log = Log(run / "metrics.jsonl", world, progress)
    about = training_record(recognizer, dataset.utterances, lengths, recorded)
    audio_hours = sum(lengths) / SAMPLE_RATE / 3600
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say(
        world,
        f"{len(dataset)} utterances ({audio_hours:.2f} h), {parameters / 1e6:.1f} M trained parameters, "
        f"{' + '.join(f'{w:g} {n}' for n, w in trained.items() if w)}, {total} updates in {config.epochs} epochs, "
        f"{world.size} process{'es' if world.size > 1 else ''} on {world.device.type}, "
        f"padding {100 * sampler.padding:.1f} %",
    )

    evaluation: Evaluation | None = None
    eval_every = parse_interval(config.eval_every, "eval_every")
    save_every = parse_interval(config.save_every, "save_every")
    skipped_in_a_row = 0
    names = [u.id for u in dataset.utterances]
    bar = tqdm(
        total=total, initial=progress.step, unit="update", disable=not (world.is_main and sys.stderr.isatty())
    )
    meter = Meter(time.perf_counter())
    stop = held.enter_context(stop_on_signals())

    def save_model(name: str, judged: Evaluation | None) -> None:
        """best/ or last/, with its card."""
        if world.is_main:
            record = about | {"step": progress.step, "epoch": progress.epoch}
            if judged is not None:
                records = [as_row(recognizer, *row) for row in judged.rows]
                found = report(Outcomes.of(recognizer.emotions, records))
                entry = evaluation_entry(found, recorded.get("valid"), chosen_on=name == "best")
                record = with_evaluation(record, entry)
            saver.model(run / name, recognizer, step=progress.step, also=lambda folder: write_card(folder, record))

    def judge() -> bool:
        """Evaluate and keep the best model; False if a signal came before the end: it is still due then."""
        nonlocal evaluation
        paused = time.perf_counter()
        found = evaluate(
            recognizer,
            validation,
            world=world,
            objective=objective,
            batch_seconds=config.eval_seconds,
            workers=config.workers,
            keep_rows=True,
            bad_audio=bad_audio,
            stop=stop,
            timeout=config.timeout,
        )
        if found.interrupted:
            return False
        evaluation = found
        note_evaluation(evaluation, metric, progress)
        epoch = progress.epoch - (progress.update == 0)  # that of the update before
        log.write("valid", evaluation.metrics() | {"best": progress.best}, progress, epoch=epoch)
        if verbose:
            show_rows(world, evaluation)
        if progress.evaluations_since_best == 0:
            save_model("best", evaluation)
        if stops_early(config, progress):
            say(world, f"stopping early: {metric} has not improved in {config.early_stop} evaluations")
            progress.finished = True
        progress.evaluation_due = False
        meter.started += time.perf_counter() - paused
        return True

    def save() -> None:
        progress.scaler = scaler.state_dict() if scaler.is_enabled() else None
        if world.is_main:
            saver.checkpoint(opened.run, recognizer, optimizer, progress, keep=config.keep)

    was_due = progress.evaluation_due
    stopped = was_due and not judge()
    if not stopped and (was_due or (progress.step == total and not progress.finished)):
        progress.finished = progress.finished or progress.step == total
        save()
    while progress.epoch < config.epochs and not progress.finished and not stopped:
        sampler.set_position(epoch=progress.epoch, update=progress.update)
        plan = sampler.plan(epoch=progress.epoch)
        for batches in fetch_updates(dataset, sampler, config, world):
            bad_audio.agree("train", dataset, errors_of(batches))
            set_rate(optimizer, rate_factor(progress.step, total=total, warmup=config.warmup))
            result = run_update(
                wrapped,
                model,
                optimizer,
                batches,
                objective,
                world,
                scaler=scaler,
                amp=config.amp,
                clip=config.clip,
                seed=config.seed,
                epoch=progress.epoch,
                step=progress.step,
                names=names,
                stop=bool(stop),
            )
            epoch, place = progress.epoch, progress.update
            progress.step += 1
            progress.update += 1
            meter.add(result, batches)
            saver.check()
            bar.update()
            ended = progress.update == per_epoch[epoch]
            if ended:
                progress.epoch, progress.update = epoch + 1, 0
            skipped_in_a_row = skipped_in_a_row + 1 if result.skipped else 0
            if result.skipped and not result.overflow:  # float16 overflows while its scale settles: expected
                progress.skipped += 1
                utterances = ", ".join(dataset.utterances[i].id for i in plan[place])
                say(world, f"update {progress.step} left out: loss or gradient not finite; it held {utterances}")
            if skipped_in_a_row >= config.max_skipped * (3 if result.overflow else 1):
                raise RunFolderError(
                    f"{run}: {skipped_in_a_row} updates in a row had gradients that are not finite; lower --rate, "
                    "or look at the utterances of these updates"
                )
            last = progress.step == total
            if progress.step % config.log_every == 0 or last:
                entry = meter.totals(world)
                entry["rate"] = max(g["lr"] for g in optimizer.param_groups)
                entry |= {"grad_norm": result.grad_norm, "padding": sampler.padding}
                entry["memory_gib"] = memory_gib(world.device)
                entry |= saver.seconds()
                entry |= {"bad_audio": n} if (n := len(bad_audio.skipped["train"])) else {}
                log.write("train", entry, progress, epoch=epoch)
                meter = Meter(time.perf_counter())
            stopped = result.stop
            progress.evaluation_due = bool(valid) and (
                due(eval_every, step=progress.step, epoch=progress.epoch, epoch_ended=ended) or last
            )
            if progress.evaluation_due and not stopped:
                stopped = not judge()
            progress.finished = progress.finished or (last and not progress.evaluation_due)
            saving = due(save_every, step=progress.step, epoch=progress.epoch, epoch_ended=ended)
            if saving or progress.finished or stopped:
                save()
            if progress.finished or stopped:
                break
    bar.close()
    saver.wait()
    if stopped and not progress.finished:
        by = stop.signal or "a signal to another process"
        again = "the same command continues (without --overwrite and --resume-from)"
        say(world, f"stopped by {by} after update {progress.step} of {total}; {again}")
        return FitResult(progress, metric, evaluation, resumed=opened.checkpoint is not None, stopped=True)
    model.eval()
    # A run that had ended before has them, unless it was stopped just there.
    if not finished_before or world.gather(not (run / "last" / RECORD).is_file())[0]:
        if valid and evaluation is None:
            evaluation = evaluate(
                recognizer, validation, world=world, batch_seconds=config.eval_seconds, keep_rows=True,
                bad_audio=bad_audio,
            )  # fmt: skip
        save_model("last", evaluation)
        if not valid:
            save_model("best", None)
    saver.wait()
    world.barrier()
    return FitResult(progress, metric, evaluation, resumed=opened.checkpoint is not None)


def fetch_updates(
    dataset: SpeechDataset, sampler: LengthBucketBatchSampler, config: TrainConfig, world: World
) -> Iterator[list[Batch]]:
    """This rank's micro-batches, update by update, decoded ahead by the workers."""
    loader = iter(
        DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=collate,
            num_workers=config.workers,
            pin_memory=world.device.type == "cuda",
            worker_init_fn=outlive_signals,
            timeout=config.timeout if config.workers else 0,
        )
    )
    for update in sampler.updates:
        yield [next(loader) for _ in update]


def trained_heads(recognizer: Recognizer, config: TrainConfig) -> dict[str, float]:
    """Weight of each head's loss, for the heads that the model has; 0 means not trained."""
    weights = {"emotion": 1.0, "ctc": config.alpha, "speaker": config.beta, "dimensions": config.gamma}
    heads = recognizer.model.heads
    if len(heads) == 1:  # nothing to weigh it against
        weights[heads[0]] = 1.0
    found = {name: weights[name] for name in heads}
    if not any(found.values()):
        raise ConfigError(
            f"nothing would be trained: the heads are {', '.join(heads) or 'none'}, alpha is {config.alpha:g}, "
            f"beta is {config.beta:g} and gamma is {config.gamma:g}"
        )
    return found


def choose_metric(config: TrainConfig, recognizer: Recognizer, validation: SpeechDataset) -> str:
    """The metric that decides which model is best: one that the validation data has labels for."""
    possible = []
    if any(label != NO_LABEL for label in validation.emotions):
        possible += ["unweighted_accuracy", "accuracy", "macro_f1"]
    for labels in zip(*validation.dimensions, strict=True):
        if "ccc" not in possible and len({value for value in labels if math.isfinite(value)}) > 1:
            possible += ["ccc"]  # which is not defined for equal labels
    if any(validation.references):
        possible += ["wer", "cer"]
    if any(label != NO_LABEL for label in validation.speakers):
        possible += ["speaker_accuracy"]
    if not len(validation):
        return "none" if config.metric == "auto" else config.metric
    if not possible:
        raise ConfigError(
            f"the validation data has no label for any head ({', '.join(recognizer.model.heads)}), so no best "
            "model could be chosen; see --columns, or leave --valid out"
        )
    possible.append("loss")
    if config.metric == "auto":
        return possible[0]
    if config.metric not in possible:
        raise ConfigError(
            f"metric {config.metric} cannot be measured with these heads and validation labels; possible: "
            f"{', '.join(possible)}"
        )
    return config.metric


def fingerprint(dataset: SpeechDataset) -> str:
    """sha256 of what an epoch depends on: order, names, excerpts, labels, texts and lengths."""
    digest = hashlib.sha256()
    for u, length in zip(dataset.utterances, dataset.lengths, strict=True):
        row = (u.id, u.start, u.end, u.emotion, u.text, u.speaker, u.arousal, u.dominance, u.valence, length)
        digest.update(repr(row).encode())
    return digest.hexdigest()


def note_evaluation(evaluation: Evaluation, metric: str, progress: Progress) -> None:
    """Keep count of the best value of the metric."""
    value = float(evaluation.metrics().get(metric, math.nan))
    better = progress.best is None or (value > progress.best if METRICS[metric] else value < progress.best)
    if better and math.isfinite(value):
        progress.best, progress.best_step, progress.evaluations_since_best = value, progress.step, 0
    else:
        progress.evaluations_since_best += 1


def stops_early(config: TrainConfig, progress: Progress) -> bool:
    """Whether there were enough evaluations without improvement."""
    return bool(config.early_stop) and progress.evaluations_since_best >= config.early_stop


def inverse_frequencies(labels: Sequence[int], classes: int) -> Tensor:
    """(K,) class weights proportional to 1 / frequency, 1 on average over the labelled utterances."""
    counts = torch.bincount(
        torch.tensor([y for y in labels if y != NO_LABEL], dtype=torch.int64), minlength=classes
    ).double()
    return (counts.sum() / (classes * counts.clamp(min=1))).float()


def show_rows(world: World, evaluation: Evaluation, most: int = 5) -> None:
    """Reference beside hypothesis, as the paper's script prints with --verbose."""
    for utterance, reference, prediction in evaluation.rows[:most]:
        say(world, f"  {utterance.id}: {utterance.emotion} -> {prediction.emotion}")
        if prediction.transcript is not None:
            say(world, f"    reference:  {reference}\n    hypothesis: {prediction.transcript}")


class Log:
    """metrics.jsonl and the progress line, written by one rank."""

    def __init__(self, path: Path, world: World, progress: Progress) -> None:
        self.path, self.world = path, world
        if world.is_main and path.exists():  # drop what an interrupted run wrote after its checkpoint
            lines = path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if step_of(line) <= progress.step]
            if progress.evaluation_due:
                kept = [s for s in kept if step_of(s) < progress.step or json.loads(s)["kind"] != "valid"]
            if kept == lines:
                return
            try:
                with replace_file(path) as file:
                    file.write("".join(line + "\n" for line in kept))
            except OSError as error:
                raise cannot_write(path, error) from error

    def write(self, kind: str, entry: dict[str, Any], progress: Progress, *, epoch: int) -> None:
        """One line to the file and one to the screen."""
        if not self.world.is_main:
            return
        record = {"kind": kind, "step": progress.step, "epoch": epoch, "time": round(time.time(), 3)} | entry
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(finite) + "\n")
        except OSError as error:
            raise cannot_write(self.path, error) from error
        shown = "  ".join(f"{key} {short(value)}" for key, value in entry.items() if value is not None)
        say(self.world, f"{kind} epoch {epoch + 1} update {progress.step}  {shown}")


def short(value: Any) -> str:
    """A number as a progress line shows it."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def step_of(line: str) -> float:
    """The step of a log line; infinity for one that a kill cut short."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf

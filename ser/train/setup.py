"""Prepare a run before its first update: the data, the run's folder, the model and its optimizer.

The functions stand in the order in which `prepare` calls them, on every rank. Whatever can be refused is refused
before the run's folder is touched.
"""

import math
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from ser.audio import SAMPLE_RATE
from ser.data.audit import check_learnable, check_training_data
from ser.data.augment import augmented
from ser.data.dataset import SpeechDataset
from ser.data.labels import NO_LABEL, PLURALS, collate_labels, known
from ser.data.manifest import Utterance
from ser.data.sampler import Item, LengthBucketBatchSampler, Places, draw_balanced
from ser.data.text import minimum_frames
from ser.errors import ConfigError, RunFolderError, SerError, printable, summary
from ser.models.config import Wav2Vec2Config
from ser.recognizer import Recognizer
from ser.train.bad_audio import BadAudio
from ser.train.cache import Cache, choose_kind, fill_cache
from ser.train.checkpoint import Progress, Saver, load_checkpoint
from ser.train.config import TrainConfig
from ser.train.content import contents, fingerprint, rows_sha256
from ser.train.distributed import World
from ser.train.log import say
from ser.train.losses import LOSSES, Objective
from ser.train.optim import make_optimizer
from ser.train.processes import lost_here, own_run
from ser.train.resources import SMALLER_MODEL, memory_explained
from ser.train.runs import Opened, Request, describe, open_run
from ser.train.update import Learner

Rows = Mapping[str, Sequence[Utterance]]  # "train" and "valid" -> the rows of a manifest
Sets = Mapping[str, SpeechDataset]  # the same, as they are read

# ---------------------------------------------------------------------------------------------- what is trained


def head_weights(recognizer: Recognizer, config: TrainConfig) -> dict[str, float]:
    """Return the weight of each head's loss, for the heads that the model has; 0 means not trained."""
    heads = recognizer.model.heads
    if lacks := [head for head in heads if head not in LOSSES]:
        raise ConfigError(f"the head {lacks[0]} has no loss; add its row to ser.train.losses.LOSSES")
    settings = {head: LOSSES[head].weight for head in heads}
    weights = {head: getattr(config, w) if isinstance(w, str) else w for head, w in settings.items()}
    if len(heads) == 1:  # there is no other loss to weigh it against
        weights[heads[0]] = 1.0
    if not heads:
        raise ConfigError("nothing would be trained: no training utterance has emotion or text; see --columns")
    if not any(weights.values()):
        reason = f"the weights of all heads ({', '.join(heads)}) are 0; see --alpha, --beta, --gamma"
        raise ConfigError(f"nothing would be trained: {reason}")
    asked = [name for name in ("focal", "logit_adjustment") if getattr(config, name)]
    if asked and "emotion" not in heads:
        raise ConfigError(f"{asked[0]} changes the loss of emotions, but the heads are {', '.join(heads)}")
    return weights


def choose_metric(config: TrainConfig, recognizer: Recognizer, validation: SpeechDataset) -> str:
    """Choose the metric that decides which model is best: one that the validation data has labels for."""
    possible = []
    if any(label != NO_LABEL for label in validation.labels.get("emotion", ())):
        possible += ["unweighted_accuracy", "accuracy", "macro_f1"]
    for labels in zip(*validation.labels.get("dimensions", ()), strict=True):
        if "ccc" not in possible and len({value for value in labels if math.isfinite(value)}) > 1:
            possible += ["ccc"]  # CCC is not defined where all labels are equal
    if any(validation.references):
        possible += ["wer", "cer"]
    if any(label != NO_LABEL for label in validation.labels.get("speaker", ())):
        possible += ["speaker_accuracy"]
    if not len(validation):
        return "none" if config.metric == "auto" else config.metric
    added = {head: labels for head, labels in validation.labels.items() if head not in (*PLURALS, "ctc")}
    if not possible and not any(known(head, collate_labels(head, added[head])).any() for head in added):
        raise ConfigError(
            f"the validation data has no label for any head ({', '.join(recognizer.model.heads)}; of a dimension "
            "two different ones are needed), so no best model could be chosen; see --columns, or leave --valid out"
        )
    possible.append("loss")
    if config.metric == "auto":
        return possible[0]
    if config.metric not in possible:
        why = f"cannot be measured with these heads and validation labels; possible: {', '.join(possible)}"
        raise ConfigError(f"metric {config.metric} {why}")
    return config.metric


# ---------------------------------------------------------------------------------------------- data made ready


@dataclass(frozen=True)
class Data:
    """Hold the prepared sets of a run: all ranks know the same lengths and the same unreadable recordings."""

    train: SpeechDataset
    valid: SpeechDataset
    sampler: LengthBucketBatchSampler  # of the training set
    lengths: dict[str, list[int]]  # set -> samples of each recording, also of those that were dropped as too long

    @property
    def sets(self) -> dict[str, SpeechDataset]:
        """Return the sets by the names that errors and files give them."""
        return {"train": self.train, "valid": self.valid}


def without_long(
    dataset: SpeechDataset, recognizer: Recognizer, config: TrainConfig, world: World
) -> SpeechDataset:
    """Drop the training utterances over ``max_seconds``, and name them."""
    if not config.max_seconds:
        return dataset
    most = config.max_seconds * SAMPLE_RATE
    kept = [i for i, n in enumerate(dataset.lengths) if n <= most]
    dropped = [u.id for u, n in zip(dataset.utterances, dataset.lengths, strict=True) if n > most]
    if dropped:
        listed = printable(", ".join(dropped[:20])) + (" ..." if len(dropped) > 20 else "")
        say(world, f"dropped {len(dropped)} training utterances over {config.max_seconds:g} s: {listed}")
    shorter = recognizer.dataset([dataset.utterances[i] for i in kept])
    shorter.lengths = [dataset.lengths[i] for i in kept]
    return shorter


def groups_of(dataset: SpeechDataset) -> list[tuple[str, str]]:
    """Return the corpus and the emotion of each utterance, between which balance draws; "" where unknown."""
    return [(u.corpus, u.emotion or "") for u in dataset.utterances]


def places_of(dataset: SpeechDataset, config: TrainConfig) -> Callable[[int], Places] | None:
    """Return the function that draws the places of an epoch; None where each utterance has one, as it is."""
    resizes = dataset.augment is not None and dataset.augment.resizes
    if not config.balance and not resizes:
        return None
    groups = groups_of(dataset) if config.balance else []

    @lru_cache(maxsize=1)  # the checks before training ask for the first epoch again and again
    def places(epoch: int) -> Places:
        indices: Sequence[int] = range(len(dataset))
        if config.balance:
            indices = draw_balanced(groups, temperature=config.balance, seed=config.seed, epoch=epoch)
        items = [Item(index, 1.0, epoch, place) for place, index in enumerate(indices)] if resizes else []
        lengths = map(dataset.length_at, items) if resizes else (dataset.lengths[i] for i in indices)
        return Places(indices, list(lengths))

    return places


def heard_texts(dataset: SpeechDataset, places: Places, shape: Wav2Vec2Config, epoch: int) -> tuple[int, int, int]:
    """Count the transcripts of an epoch, those that crops take away, and those with more symbols than frames."""
    items = [Item(i, 1.0, epoch, place) for place, i in enumerate(places.indices) if dataset.labels["ctc"][i]]
    heard = [dataset.labels_at(item)["ctc"] for item in items]
    frames = shape.num_frames(torch.tensor([places.lengths[item.place] for item in items], dtype=torch.int64))
    short = sum(minimum_frames(text) > there for text, there in zip(heard, frames.tolist(), strict=True))
    return len(items), sum(not text for text in heard), short


def check_heard_texts(
    dataset: SpeechDataset, sampler: LengthBucketBatchSampler, shape: Wav2Vec2Config, *, epochs: int, alone: bool
) -> list[str]:
    """Say how many transcripts of the first epoch augmentations spoil; refuse to spoil all if CTC is ``alone``."""
    if dataset.augment is None or not dataset.augment.resizes:
        return []
    count, cut, short = heard_texts(dataset, sampler.places(0), shape, 0)
    spoilt = cut + short == count
    later = (heard_texts(dataset, sampler.places(epoch), shape, epoch) for epoch in range(1, epochs))
    if alone and spoilt and all(a + b == n for n, a, b in later):
        raise ConfigError(
            f"no update would have a gradient: crop and speed leave none of the {count} transcripts; see --augment"
        )
    of = f"of the {count} transcripts in the first epoch"
    notes = [f"{cut} {of} belong to cropped utterances, so CTC does not learn from them"] if cut else []
    return notes + (
        [f"{short} {of} have more symbols than frames, as their utterances are heard"] if short else []
    )


def balance_notes(dataset: SpeechDataset, places: Places, unread: Container[str]) -> list[str]:
    """Say what balance draws from, what it never draws, and how many places cannot be heard."""
    groups, drawn = groups_of(dataset), {*places.indices}
    corpora, heard = Counter(corpus for corpus, _ in groups), {groups[i] for i in drawn}
    notes = []
    if len(corpora) > 1:
        listed = ", ".join(f"{corpus or 'none'} ({count})" for corpus, count in corpora.items())
        notes.append(f"balance: of the corpora {printable(listed)}")
    if never := sorted({*groups} - heard):
        listed = printable(summary((" of ".join(filter(None, (name, corpus))) for corpus, name in never), 20))
        notes.append(f"balance: so rare that they have no place in any epoch: {listed}")
    names = [dataset.utterances[i].id for i in places.indices] if unread else []
    if lost := sum(name in unread for name in names):
        said = f"{lost} of the {len(names)} places of the first epoch have recordings that cannot be read"
        notes.append(said)
    return notes


def make_ready(
    recognizer: Recognizer, sets: Sets, config: TrainConfig, weights: dict[str, float], bad_audio: BadAudio
) -> Data:
    """Drop utterances that are too long, and refuse data that cannot be trained on; lengths are known by now."""
    world, shape, unread = bad_audio.world, recognizer.model.config, bad_audio.skipped["train"]
    lengths = {name: part.lengths for name, part in sets.items()}
    dataset = without_long(sets["train"], recognizer, config, world)
    if config.augment:
        dataset.augment = augmented(config.augment, config.seed, dataset.utterances, shortest=shape.min_samples)
    for note in check_training_data(dataset, shape.num_frames, min_samples=shape.min_samples, unread=unread):
        say(world, note)
    sampler = LengthBucketBatchSampler(
        dataset.lengths,
        seed=config.seed,
        effective_batch=config.resolved_effective_batch(world.size),
        batch_samples=int(config.batch_seconds * SAMPLE_RATE) or None,
        **config.micro_limits(world.size),
        batching=config.batching,
        rank=world.rank,
        world_size=world.size,
        places=places_of(dataset, config),
    )
    frames = shape.num_frames
    concordant = [head for head, loss in LOSSES.items() if loss.sums is None]
    for note in check_learnable(
        dataset, sampler.plan, weights, frames, concordant=concordant, epochs=config.epochs, unread=unread
    ):
        say(world, note)
    if config.balance:
        for note in balance_notes(dataset, sampler.places(0), unread):
            say(world, note)
    if weights.get("ctc"):
        alone = not any(weight for head, weight in weights.items() if head != "ctc")
        for note in check_heard_texts(dataset, sampler, shape, epochs=config.epochs, alone=alone):
            say(world, note)
    return Data(dataset, sets["valid"], sampler, lengths)


def class_counts(labels: Sequence[int], classes: int) -> Tensor:
    """Count the labels of each class, (K,) float64."""
    labelled = torch.tensor([label for label in labels if label != NO_LABEL], dtype=torch.int64)
    return labelled.bincount(minlength=classes).double()


def inverse_frequencies(counts: Tensor) -> Tensor:
    """Return class weights (K,) proportional to 1 / frequency, 1 on average over the labelled utterances."""
    return (counts.sum() / (len(counts) * counts.clamp(min=1))).float()


def logit_adjustment(counts: Tensor, tau: float) -> Tensor:
    """Return tau * log of the share of each class, (K,); a class without utterances counts as having one."""
    counts = counts.clamp(min=1)
    return (tau * (counts / counts.sum()).log()).float()


def make_objective(
    recognizer: Recognizer, config: TrainConfig, weights: dict[str, float], data: Data
) -> Objective:
    """Make the objective, which training minimises.

    Class weights and logit adjustment follow the frequencies in an epoch, which are the same in every epoch.
    """
    drawn, tau = data.sampler.places(0).indices, config.logit_adjustment
    emotions = data.train.labels.get("emotion", [])
    counts = class_counts([emotions[i] for i in drawn], len(recognizer.emotions)) if emotions else None
    return Objective(
        weights=weights,
        label_smoothing=config.label_smoothing,
        class_weights=inverse_frequencies(counts) if config.class_weights and counts is not None else None,
        focal=config.focal,
        adjustment=logit_adjustment(counts, tau) if tau and counts is not None else None,
        ctc_per_character=config.ctc_per_character,
        blank=recognizer.vocabulary.blank if recognizer.vocabulary is not None else 0,
    )


# ---------------------------------------------------------------------------------------------- the run's folder


def settings_to_record(
    recognizer: Recognizer, config: TrainConfig, data: Data, request: Request, metric: str, world: World
) -> dict[str, Any]:
    """Return what config.json records: resolved settings, the model, and the data by their content."""
    effective_batch = config.resolved_effective_batch(world.size) or 0
    settings = config.to_dict() | {"effective_batch": effective_batch, "metric": metric} | dict(request.settings)
    settings["model"] = describe(recognizer)
    settings["data"] = {name: fingerprint(part) for name, part in data.sets.items()}
    settings["content"] = {name: contents(part.utterances, part.lengths) for name, part in data.sets.items()}
    if config.balance:  # which draws between corpora
        settings["content"]["train"]["corpora"] = rows_sha256((u.corpus,) for u in data.train.utterances)
    return settings


def open_folder(request: Request, settings: dict[str, Any], world: World, held: ExitStack) -> Opened:
    """Let the main rank lock and open the run's folder; its error is raised on every rank."""
    result: Opened | SerError | None = None
    if world.is_main:
        try:
            held.enter_context(own_run(request.folder))
            result = open_run(**vars(request) | {"settings": settings})  # a request has its parameters' names
        except SerError as error:
            result = error
        except (OSError, ValueError) as error:
            result = RunFolderError(f"{request.folder}: cannot be used: {error.__class__.__name__}: {error}")
    result = world.gather(result)[0]
    if isinstance(result, SerError):
        raise result
    assert result is not None
    return result


# ---------------------------------------------------------------------------------------------- the model


def put_into_training(
    recognizer: Recognizer, config: TrainConfig, weights: Mapping[str, float], world: World
) -> None:
    """Put the model onto the device, and switch off the gradients of what is not trained."""
    model = recognizer.model
    with memory_explained(SMALLER_MODEL, doing=f"when the model was put onto {world.device.type}"):
        model.to(world.device)
    model.wav2vec2.activation_checkpointing(config.activation_checkpointing)
    model.freeze(config.freeze)
    for parameter in model.untrained_by([name for name, weight in weights.items() if weight]):
        parameter.requires_grad_(False)  # no loss reaches it, so it would get no gradient
    if model.config.has_mask_embedding and not model.config.apply_spec_augment:
        model.wav2vec2.masked_spec_embed.requires_grad_(False)
    model.train()


def make_learner(
    recognizer: Recognizer, config: TrainConfig, objective: Objective, data: Data, world: World
) -> Learner:
    """Wrap the model for all ranks, and make its optimizer."""
    model, decay = recognizer.model, config.weight_decay
    with memory_explained(SMALLER_MODEL, doing="when room for gradients was made"):
        wrapped: nn.Module = world.wrap(model)
    optimizer = make_optimizer(
        model, rate=config.rate, head_rate=config.head_rate, weight_decay=decay, beta2=config.adam_beta2
    )
    scaler = torch.amp.GradScaler(world.device.type, enabled=config.amp == "fp16")
    amp, clip, seed, ids = config.amp, config.clip, config.seed, [u.id for u in data.train.utterances]
    return Learner(model, wrapped, optimizer, scaler, objective, world, amp=amp, clip=clip, seed=seed, names=ids)


# ---------------------------------------------------------------------------------------------- all of it


@dataclass(frozen=True)
class Job:
    """Hold whatever stays the same while a run trains; `Progress` holds what changes."""

    config: TrainConfig
    recognizer: Recognizer
    data: Data
    learner: Learner
    updates: list[int]  # number of updates in each epoch
    metric: str  # the metric that decides which model is best
    opened: Opened
    saver: Saver
    bad_audio: BadAudio

    @property
    def world(self) -> World:
        """Return the ranks."""
        return self.learner.world

    @property
    def total(self) -> int:
        """Return the number of updates of the whole run."""
        return sum(self.updates)

    def summary(self) -> str:
        """Describe the size of the data, of the model and of the run in one line."""
        model, data, world = self.learner.model, self.data, self.world
        hours = sum(data.train.lengths) / SAMPLE_RATE / 3600
        parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return (
            f"{len(data.train)} utterances ({hours:.2f} h), {parameters / 1e6:.1f} M trained parameters, "
            f"{' + '.join(f'{w:g} {n}' for n, w in self.learner.objective.weights.items() if w)}, "
            f"{self.total} updates in {self.config.epochs} epochs, "
            f"{world.size} process{'es' if world.size > 1 else ''} on {world.device.type}, "
            f"padding {100 * data.sampler.padding:.1f} %"
        )


def updates_of_epochs(config: TrainConfig, sampler: LengthBucketBatchSampler) -> list[int]:
    """Count the updates of each epoch; with ``batch_seconds`` the number depends on the jitter of lengths."""
    if config.batch_seconds:
        return [len(sampler.plan(epoch=epoch)) for epoch in range(config.epochs)]
    return [len(sampler.plan(epoch=0))] * config.epochs


def prepare(
    recognizer: Recognizer, rows: Rows, config: TrainConfig, request: Request, world: World, held: ExitStack
) -> Job:
    """Make everything ready for the first update. All ranks call this.

    ``held`` takes what has to be closed however training ends: the folder's lock, and the thread that saves.
    """
    recognizer.require_float32("to train it")
    recognizer.require_single_label("to be trained")
    config.resolved_effective_batch(world.size)
    weights = head_weights(recognizer, config)
    if config.cache:
        choose_kind(recognizer.model, config.freeze)  # refuses settings that allow no cache
    bad_audio = BadAudio(world, policy=config.on_bad_audio, limit=config.max_bad_audio, run=request.folder)
    sets = {name: recognizer.dataset(utterances) for name, utterances in rows.items()}
    for name, part in sets.items():  # all ranks read headers, and agree on which cannot be read
        least = recognizer.model.config.min_samples
        bad_audio.read_lengths(name, part, least=least, anew=request.overwrite)
    data = make_ready(recognizer, sets, config, weights, bad_audio)
    metric = choose_metric(config, recognizer, data.valid)
    settings = settings_to_record(recognizer, config, data, request, metric, world)
    opened = open_folder(request, settings, world, held)
    for lost in lost_here():
        say(world, lost)
    saver = held.enter_context(Saver())  # however training ends, files that are being written are completed
    bad_audio.begin(data.lengths, data.sets)
    for note in opened.notes:
        say(world, note)
    put_into_training(recognizer, config, weights, world)
    objective = make_objective(recognizer, config, weights, data)
    learner = make_learner(recognizer, config, objective, data, world)
    updates = updates_of_epochs(config, data.sampler)
    return Job(config, recognizer, data, learner, updates, metric, opened, saver, bad_audio)


def restore(job: Job) -> Progress:
    """Load weights, optimizer and progress from the run's checkpoint, if there is one."""
    opened, scaler = job.opened, job.learner.scaler
    if opened.checkpoint is None:
        return Progress()
    with memory_explained(SMALLER_MODEL, doing="when a checkpoint was loaded"):
        progress = load_checkpoint(opened.checkpoint, job.recognizer, job.learner.optimizer)
    if progress.scaler:
        scaler.load_state_dict(progress.scaler)
    if opened.changed:  # perhaps the number of epochs, or when to stop early
        progress.finished = progress.is_over(opened.run.settings)
    what = "is finished, nothing is left to do; it ended" if progress.finished else "is resumed"
    at = f"at update {progress.step} of {job.total}, from {opened.checkpoint.name}"
    say(job.world, f"{opened.run.folder} {what} {at}")
    return progress


def fill_caches(job: Job) -> None:
    """Compute the frozen part's output for each recording that no cache has; from then on, read the cache."""
    config, world, recognizer = job.config, job.world, job.recognizer
    kind, why = choose_kind(recognizer.model, config.freeze)
    note = f": the layers' means are not kept, as {why}" if config.freeze == "encoder" and why else ""
    say(world, f"cache of {'the feature encoder' if kind == 'features' else 'pooled layers'}{note}")
    store = Cache.of(
        recognizer.model, config.cache, kind=kind, dtype=config.cache_dtype, do_normalize=recognizer.do_normalize
    )
    for name, part in job.data.sets.items():
        if len(part):
            stored = fill_cache(store, part, world, partial(say, world), name)
            job.bad_audio.agree(name, part, stored.errors if world.is_main else {})
            part.stored = stored

"""The training loop: `fit` calls `run_update` (`ser.train.update`) and `evaluate` (`ser.train.evaluation`).

What one update computes is fixed by the plan of the epoch (`ser.data.sampler`) and does not depend on how many
processes share it or how it is cut into micro-batches: every loss is a sum that is divided by the count of the
whole update on all ranks, known before the first backward pass. Dropout is drawn from a seed that is a
function of (seed, step, micro-batch, rank), SpecAugment masks from (seed, epoch, utterance). So there is no
random state to save, and a resumed run continues exactly.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ser.audio import SAMPLE_RATE
from ser.data.dataset import Batch, SpeechDataset, collate
from ser.data.labels import NO_LABEL
from ser.data.manifest import Utterance
from ser.data.sampler import LengthBucketBatchSampler
from ser.data.text import minimum_frames
from ser.data.workers import decoded, worker_death_explained
from ser.device import choose_device, freed_memory_kept, memory_gib
from ser.errors import ConfigError, RunFolderError, SerError, printable
from ser.files import replace_file, written
from ser.recognizer import Recognizer
from ser.scores.card import RECORD, evaluation_entry, training_record, with_evaluation, write_card
from ser.scores.report import Outcomes, as_row, report
from ser.train.bad_audio import BadAudio, errors_of
from ser.train.cache import Cache, choose_kind, fill
from ser.train.checkpoint import (
    Opened,
    Progress,
    Saver,
    describe,
    is_over,
    load_checkpoint,
    open_run,
    stops_early,
)
from ser.train.config import METRICS, TrainConfig, parse_interval
from ser.train.content import contents, fingerprint
from ser.train.distributed import World
from ser.train.evaluation import Evaluation, evaluate
from ser.train.learnable import check_learnable
from ser.train.losses import LOSSES, Objective
from ser.train.optim import make_optimizer, rate_factor, set_rate
from ser.train.processes import lost_here, outlive_signals, own_run, stop_on_signals
from ser.train.resources import SMALLER_MODEL, memory_explained
from ser.train.update import UpdateResult, run_update


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

    def totals(self, world: World) -> dict[str, Any]:
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


def say(world: World, text: str) -> None:
    """A line on standard error, from one rank alone, without breaking a progress bar.

    What stands in it may be foreign: it commands no terminal.
    """
    if world.is_main:
        tqdm.write(printable(text, lines=True), file=sys.stderr)
        sys.stderr.flush()


def short(value: Any) -> str:
    """A number as a progress line shows it."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def check_training_data(
    recognizer: Recognizer, dataset: SpeechDataset, lengths: Sequence[int], unread: Collection[str] = ()
) -> list[str]:
    """Refuse utterances without a frame; say what else is odd, such as transcripts that cannot fit."""
    minimum = recognizer.model.config.min_samples
    short = [(u, n) for u, n in zip(dataset.utterances, lengths, strict=True) if n < minimum]
    if short:
        listed = "\n  ".join(printable(f"{u.id}: {n} samples") for u, n in short[:50])
        raise ConfigError(
            f"{len(short)} training utterances are shorter than one frame ({minimum} samples at 16 kHz); remove "
            f"them:\n  {listed}"
        )
    notes = []
    if recognizer.vocabulary is not None:
        empty = sum(not text for text in dataset.texts)
        if empty:
            notes.append(f"{empty} of {len(dataset)} utterances have no transcript; trained on their other labels")
        if any(dataset.texts) and not any(dataset.labels["ctc"]):
            text = next(text for text in dataset.texts if text)
            raise ConfigError(
                f"no training transcript has a character of the vocabulary; the first is {text[:40]!r}, the "
                f"symbols are {' '.join(recognizer.vocabulary.tokens[:40])}. Try --build-vocab, or --orthography"
            )
        if not recognizer.vocabulary.has_delimiter and (words := next((t for t in dataset.texts if " " in t), "")):
            raise ConfigError(
                f"the word delimiter {recognizer.vocabulary.word_delimiter!r} is not in the vocabulary of "
                f"{len(recognizer.vocabulary)} symbols, and a training transcript has spaces: {words[:80]!r}; add "
                "it, or take the spaces out"
            )
        notes += dataset.rewriting().notes()
        frames = recognizer.model.config.num_frames(torch.tensor(lengths))
        misfits = []
        for utterance, target, there in zip(
            dataset.utterances, dataset.labels["ctc"], frames.tolist(), strict=True
        ):
            if (needed := minimum_frames(target)) > there and utterance.id not in unread:
                misfits.append(printable(f"{utterance.id}: {needed} frames needed, {there} there"))
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


def fetch_updates(
    dataset: SpeechDataset, sampler: LengthBucketBatchSampler, config: TrainConfig, world: World
) -> Iterator[list[Batch]]:
    """This rank's micro-batches, update by update, decoded ahead by the workers."""
    loader = decoded(
        dataset,
        sampler,
        collate,
        workers=config.workers,
        timeout=config.timeout,
        pin_memory=world.device.type == "cuda",
        worker_init_fn=outlive_signals,
    )
    for update in sampler.updates:
        yield [next(loader) for _ in update]
    next(loader, None)  # its workers end, within the same limit


def trained_heads(recognizer: Recognizer, config: TrainConfig) -> dict[str, float]:
    """Weight of each head's loss, for the heads that the model has; 0 means not trained."""
    heads = recognizer.model.heads
    named = {head: LOSSES[head].weight for head in heads}
    weights = {head: getattr(config, w) if isinstance(w, str) else w for head, w in named.items()}
    if len(heads) == 1:  # nothing to weigh it against
        weights[heads[0]] = 1.0
    if not heads:
        raise ConfigError("nothing would be trained: no training utterance has emotion or text; see --columns")
    if not any(weights.values()):
        raise ConfigError(
            f"nothing would be trained: the weights of all heads ({', '.join(heads)}) are 0; see --alpha, --beta, "
            "--gamma"
        )
    return weights


def choose_metric(config: TrainConfig, recognizer: Recognizer, validation: SpeechDataset) -> str:
    """The metric that decides which model is best: one that the validation data has labels for."""
    possible = []
    if any(label != NO_LABEL for label in validation.labels.get("emotion", ())):
        possible += ["unweighted_accuracy", "accuracy", "macro_f1"]
    for labels in zip(*validation.labels.get("dimensions", ()), strict=True):
        if "ccc" not in possible and len({value for value in labels if math.isfinite(value)}) > 1:
            possible += ["ccc"]  # which is not defined for equal labels
    if any(validation.references):
        possible += ["wer", "cer"]
    if any(label != NO_LABEL for label in validation.labels.get("speaker", ())):
        possible += ["speaker_accuracy"]
    if not len(validation):
        return "none" if config.metric == "auto" else config.metric
    if not possible:
        raise ConfigError(
            f"the validation data has no label for any head ({', '.join(recognizer.model.heads)}; of a dimension "
            "two different ones are needed), so no best model could be chosen; see --columns, or leave --valid out"
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


def note_evaluation(evaluation: Evaluation, metric: str, progress: Progress) -> None:
    """Keep count of the best value of the metric."""
    value = float(evaluation.metrics().get(metric, math.nan))
    better = progress.best is None or (value > progress.best if METRICS[metric] else value < progress.best)
    if better and math.isfinite(value):
        progress.best, progress.best_step, progress.evaluations_since_best = value, progress.step, 0
    else:
        progress.evaluations_since_best += 1


def inverse_frequencies(labels: Sequence[int], classes: int) -> Tensor:
    """(K,) class weights proportional to 1 / frequency, 1 on average over the labelled utterances."""
    counts = torch.bincount(
        torch.tensor([y for y in labels if y != NO_LABEL], dtype=torch.int64), minlength=classes
    ).double()
    return (counts.sum() / (classes * counts.clamp(min=1))).float()


def show_rows(world: World, evaluation: Evaluation, most: int = 5) -> None:
    """Reference beside hypothesis, as the paper's script prints with --verbose."""
    for utterance, reference, prediction in evaluation.rows[:most]:
        say(world, printable(f"  {utterance.id}: {utterance.emotion} -> {prediction.emotion}"))
        if prediction.transcript is not None:
            say(world, printable(f"    reference:  {reference}"))
            say(world, printable(f"    hypothesis: {prediction.transcript}"))


def step_of(line: str) -> float:
    """The step of a log line; infinity for one that a kill cut short."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


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
            with written(path), replace_file(path) as file:
                file.write("".join(line + "\n" for line in kept))

    def write(self, kind: str, entry: dict[str, Any], progress: Progress, *, epoch: int) -> None:
        """One line to the file and one to the screen."""
        if not self.world.is_main:
            return
        record = {"kind": kind, "step": progress.step, "epoch": epoch, "time": round(time.time(), 3)} | entry
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        with written(self.path) as path, path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite) + "\n")
        shown = "  ".join(f"{key} {short(value)}" for key, value in entry.items() if value is not None)
        say(self.world, f"{kind} epoch {epoch + 1} update {progress.step}  {shown}")


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
    recognizer.require_float32("to train it")
    recognizer.require_single_label("to be trained")
    model = recognizer.model
    effective_batch = config.resolved_effective_batch(world.size)
    trained = trained_heads(recognizer, config)
    kind, why = choose_kind(model, config.freeze) if config.cache else ("", "")

    dataset, validation = recognizer.dataset(train), recognizer.dataset(valid)
    bad_audio = BadAudio(world, policy=config.on_bad_audio, limit=config.max_bad_audio, run=run)
    for name, part in {"train": dataset, "valid": validation}.items():
        bad_audio.read_lengths(name, part, least=model.config.min_samples, anew=anew)
    lengths = dataset.lengths
    recorded_lengths = {"train": lengths, "valid": validation.lengths}
    if config.max_seconds:
        kept = [i for i, n in enumerate(lengths) if n <= config.max_seconds * SAMPLE_RATE]
        dropped = [dataset.utterances[i].id for i in sorted(set(range(len(lengths))) - set(kept))]
        if dropped:
            listed = printable(", ".join(dropped[:20])) + (" ..." if len(dropped) > 20 else "")
            say(world, f"dropped {len(dropped)} training utterances over {config.max_seconds:g} s: {listed}")
        dataset, lengths = recognizer.dataset([train[i] for i in kept]), [lengths[i] for i in kept]
        dataset.lengths = lengths
    unread = bad_audio.skipped["train"]
    for note in check_training_data(recognizer, dataset, lengths, unread):
        say(world, note)
    batch_samples = int(config.batch_seconds * SAMPLE_RATE) or None
    sampler = LengthBucketBatchSampler(
        lengths,
        seed=config.seed,
        effective_batch=effective_batch,
        batch_samples=batch_samples,
        **config.micro_limits(world.size),
        batching=config.batching,
        rank=world.rank,
        world_size=world.size,
    )
    for note in check_learnable(recognizer, dataset, sampler.plan, trained, epochs=config.epochs, unread=unread):
        say(world, note)

    metric = choose_metric(config, recognizer, validation)
    recorded = config.to_dict() | {"effective_batch": effective_batch or 0, "metric": metric} | settings
    recorded["model"] = describe(recognizer)
    sets = {"train": dataset, "valid": validation}
    recorded["data"] = {name: fingerprint(part) for name, part in sets.items()}
    recorded["content"] = {name: contents(part.utterances, part.lengths) for name, part in sets.items()}
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
    recorded = opened.run.settings
    for lost in lost_here():
        say(world, lost)
    saver = held.enter_context(Saver())  # whatever way training ends, what is being written is finished
    bad_audio.begin(recorded_lengths, {"train": dataset, "valid": validation})
    for note in opened.notes:
        say(world, note)

    with memory_explained(SMALLER_MODEL, doing=f"when the model was put onto {world.device.type}"):
        model.to(world.device)
    model.wav2vec2.activation_checkpointing(config.activation_checkpointing)
    model.freeze(config.freeze)
    for parameter in model.untrained_by([name for name, weight in trained.items() if weight]):
        parameter.requires_grad_(False)  # has no gradient, so it is no part of what is trained
    if model.config.has_mask_embedding and not model.config.apply_spec_augment:
        model.wav2vec2.masked_spec_embed.requires_grad_(False)
    model.train()
    with memory_explained(SMALLER_MODEL, doing="when room for gradients was made"):
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
        class_weights=inverse_frequencies(dataset.labels["emotion"], len(recognizer.emotions))
        if config.class_weights and recognizer.emotions
        else None,
        ctc_per_character=config.ctc_per_character,
        blank=recognizer.vocabulary.blank if recognizer.vocabulary is not None else 0,
    )
    # By utterances every epoch has equally many updates; by padded seconds the jitter decides.
    per_epoch = [len(sampler.plan(epoch=e)) for e in range(config.epochs if batch_samples else 1)]
    per_epoch = per_epoch if batch_samples else per_epoch * config.epochs
    total = sum(per_epoch)
    progress = Progress()
    if opened.checkpoint is not None:
        with memory_explained(SMALLER_MODEL, doing="when a checkpoint was loaded"):
            progress = load_checkpoint(opened.checkpoint, recognizer, optimizer)
        if progress.scaler:
            scaler.load_state_dict(progress.scaler)
        if opened.changed:  # of epochs, perhaps, or of when to stop early
            progress.finished = is_over(progress, recorded)
        what = "is finished, nothing is left to do; it ended" if progress.finished else "is resumed"
        say(world, f"{run} {what} at update {progress.step} of {total}, from {opened.checkpoint.name}")
    finished_before = progress.finished
    if config.cache and not progress.finished:  # of the checkpoint's weights, which are there by now
        note = f": the layers' means are not kept, as {why}" if config.freeze == "encoder" and why else ""
        say(world, f"cache of {'the feature encoder' if kind == 'features' else 'pooled layers'}{note}")
        store = Cache.of(
            model, config.cache, kind=kind, dtype=config.cache_dtype, do_normalize=recognizer.do_normalize
        )
        for name, part in {"train": dataset, "valid": validation}.items():
            if len(part):
                stored = fill(store, part, world, partial(say, world), name)
                bad_audio.agree(name, part, stored.errors if world.is_main else {})
                part.stored = stored
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
            record = about | {"step": progress.step, "epoch": progress.epoch, "weights": name}
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
            batch_seconds=config.eval_seconds or None,
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
        if stops_early(progress, config.early_stop):
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
                utterances = printable(", ".join(dataset.utterances[i].id for i in plan[place]))
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
                recognizer, validation, world=world, batch_seconds=config.eval_seconds or None, keep_rows=True,
                bad_audio=bad_audio,
            )  # fmt: skip
        save_model("last", evaluation)
        if not valid:
            save_model("best", None)
    saver.wait()
    world.barrier()
    return FitResult(progress, metric, evaluation, resumed=opened.checkpoint is not None)


@memory_explained(SMALLER_MODEL, doing="outside of an update")
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

    Asked to stop, by SIGTERM, SIGUSR1, SIGHUP or Ctrl-C to any rank, all finish the same update and save; the
    result is ``stopped``, and the same call continues.

    Raises:
        ConfigError, RunFolderError, FileError, AudioError, ResourceError: with what to do.
    """
    world = world or World(device=choose_device(config.device, 0))
    open_ = partial(open_run, overwrite=overwrite, resume_from=resume_from, allow_changes=allow_changes)
    with freed_memory_kept(world.device), ExitStack() as held:
        return _fit(
            recognizer, train, valid, config, Path(run), world, settings or {}, open_, held,
            anew=overwrite, verbose=verbose,
        )  # fmt: skip

"""Train: `fit` prepares a run (`ser.train.setup`), trains it to its end, and saves the model.

The plan of the epoch (`ser.data.sampler`) fixes which utterances one update has. Its gradient depends neither on
the number of processes nor on the cut into micro-batches: every loss is a sum, divided by the count of the whole
update on all ranks. This count is known before the first backward pass. The seed of dropout is a function of
(seed, step, micro-batch, rank), that of SpecAugment masks one of (seed, epoch, utterance). So there is no random
state to save, and a resumed run continues exactly.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ser.data.dataset import Batch, SpeechDataset, collate
from ser.data.manifest import Utterance
from ser.data.sampler import LengthBucketBatchSampler
from ser.data.workers import decoded, worker_death_explained
from ser.device import choose_device, freed_memory_kept, memory_gib
from ser.errors import RunFolderError, printable
from ser.recognizer import Recognizer
from ser.scores.card import RECORD, evaluation_entry, training_record, with_evaluation, write_card
from ser.scores.report import CORPUS, PARTS, Outcomes, as_row, report
from ser.train.bad_audio import errors_of
from ser.train.checkpoint import Progress
from ser.train.config import ERROR_METRICS, TrainConfig, parse_interval
from ser.train.distributed import World
from ser.train.evaluation import Evaluation, evaluate
from ser.train.log import Log, Meter, say, show_rows
from ser.train.optim import SCHEDULES, set_rate
from ser.train.processes import StopRequest, outlive_signals, stop_on_signals
from ser.train.resources import SMALLER_MODEL, memory_explained
from ser.train.runs import Request
from ser.train.setup import Job, fill_caches, prepare, restore
from ser.train.update import UpdateResult, run_update


@dataclass
class FitResult:
    """Describe how a run ended."""

    progress: Progress
    metric: str
    evaluation: Evaluation | None  # the last one in this process
    resumed: bool
    stopped: bool = False  # a signal to any rank stopped the run before its end; its state is saved


def is_due(every: str, progress: Progress, *, epoch_ended: bool, last: bool) -> bool:
    """Tell whether a task done every N updates ("N") or epochs ("Nep") is due now; after the last update it is."""
    number, unit = parse_interval("an interval", every)
    done, ended = (progress.step, True) if unit == "updates" else (progress.epoch, epoch_ended)
    return last or (ended and done % number == 0)


def fetch_updates(
    dataset: SpeechDataset, sampler: LengthBucketBatchSampler, config: TrainConfig, world: World
) -> Iterator[list[Batch]]:
    """Yield this rank's micro-batches, update by update; workers decode them ahead."""
    how: dict[str, Any] = {"pin_memory": world.device.type == "cuda", "worker_init_fn": outlive_signals}
    loader = decoded(dataset, sampler, collate, workers=config.workers, timeout=config.timeout, **how)
    for update in sampler.updates:
        yield [next(loader) for _ in update]
    next(loader, None)  # lets the workers end, within the same timeout


# ---------------------------------------------------------------------------------------------- what is saved


def corpora_meet(job: Job) -> bool:
    """Tell whether the validation data are of several corpora, so that figures are given of each."""
    return bool((job.opened.run.settings.get("valid") or {}).get("sources"))


def save_model(job: Job, progress: Progress, name: str, evaluation: Evaluation | None) -> None:
    """Begin to save the model in best/ or last/, with its model card."""
    if not job.world.is_main:
        return
    recognizer, train, run = job.recognizer, job.data.train, job.opened.run
    record = training_record(recognizer, train.utterances, train.lengths, run.settings)
    record |= {"step": progress.step, "epoch": progress.epoch, "weights": name}
    if evaluation is not None:
        rows, valid = [as_row(recognizer, *row) for row in evaluation.rows], run.settings.get("valid")
        parts = (*PARTS, CORPUS) if corpora_meet(job) else PARTS
        figures = report(Outcomes.of(recognizer.emotions, rows, parts))
        entry = evaluation_entry(figures, valid, chosen_on=name == "best")
        record = with_evaluation(record, entry)
    write = partial(write_card, record=record)
    job.saver.model(run.folder / name, recognizer, step=progress.step, also=write)


def save_progress(job: Job, progress: Progress) -> None:
    """Begin to save where the run stands."""
    scaler, optimizer = job.learner.scaler, job.learner.optimizer
    progress.scaler = scaler.state_dict() if scaler.is_enabled() else None
    if job.world.is_main:
        job.saver.checkpoint(job.opened.run, job.recognizer, optimizer, progress, keep=job.config.keep)


# ---------------------------------------------------------------------------------------------- what is told


def note_evaluation(evaluation: Evaluation, metric: str, progress: Progress) -> None:
    """Update the best value of the metric, and count the evaluations since."""
    value = float(evaluation.metrics().get(metric, math.nan))
    sign = -1 if metric in ERROR_METRICS else 1
    better = progress.best is None or sign * value > sign * progress.best
    if better and math.isfinite(value):
        progress.best, progress.best_step, progress.evaluations_since_best = value, progress.step, 0
    else:
        progress.evaluations_since_best += 1


def count_left_out(job: Job, log: Log, progress: Progress, result: UpdateResult, place: tuple[int, int]) -> None:
    """Count an update that was left out, and name its utterances; end the run after too many in a row.

    ``place`` is the epoch of the update and its number in this epoch.
    """
    if not result.skipped:
        log.left_out = 0
        return
    log.left_out += 1
    if not result.overflow:  # an overflow of float16 is expected while the scale of the loss settles
        progress.skipped += 1
        update = job.data.sampler.plan(epoch=place[0])[place[1]]
        utterances = printable(", ".join(job.data.train.utterances[i].id for i in update))
        say(job.world, f"update {progress.step} left out: loss or gradient not finite; it held {utterances}")
    if log.left_out >= job.config.max_skipped * (3 if result.overflow else 1):
        raise RunFolderError(
            f"{job.opened.run.folder}: {log.left_out} updates in a row had gradients that are not finite; lower "
            "--rate, or look at the utterances of these updates"
        )


def log_updates(job: Job, log: Log, progress: Progress, result: UpdateResult, epoch: int) -> None:
    """Log the updates since the last line, if a line is due. All ranks call this."""
    if progress.step % job.config.log_every and progress.step != job.total:
        return
    rate = max(group["lr"] for group in job.learner.optimizer.param_groups)
    entry = log.meter.totals(job.world) | {"rate": rate, "grad_norm": result.grad_norm}
    entry |= {"padding": job.data.sampler.padding, "memory_gib": memory_gib(job.world.device)}
    entry |= job.saver.seconds()
    entry |= {"bad_audio": n} if (n := len(job.bad_audio.skipped["train"])) else {}
    log.write("train", entry, progress, epoch=epoch)
    log.meter = Meter()


# ---------------------------------------------------------------------------------------------- the loop


def evaluate_valid(job: Job, **how: Any) -> Evaluation:
    """Evaluate on the validation set; ``how`` goes to `evaluate`."""
    data, seconds = job.data.valid, job.config.eval_seconds or None
    shared: dict[str, Any] = {"world": job.world, "batch_seconds": seconds, "bad_audio": job.bad_audio}
    return evaluate(job.recognizer, data, keep_rows=True, **shared, **how)


def evaluate_and_keep_best(job: Job, progress: Progress, log: Log, stop: StopRequest) -> bool:
    """Evaluate, and save the model if it is the best so far.

    Return False if a signal cut the evaluation short; the resumed run then repeats it.
    """
    config = job.config
    with log.meter.paused():
        objective, workers, timeout = job.learner.objective, config.workers, config.timeout
        evaluation = evaluate_valid(job, objective=objective, workers=workers, stop=stop, timeout=timeout)
        if evaluation.interrupted:
            return False
        log.evaluation = evaluation
        note_evaluation(evaluation, job.metric, progress)
        epoch = progress.epoch - (
            progress.update == 0
        )  # after the last update of an epoch, progress has the next one
        metrics = evaluation.metrics() | {"best": progress.best}
        metrics |= evaluation.corpus_metrics(job.recognizer.emotions) if corpora_meet(job) else {}
        log.write("valid", metrics, progress, epoch=epoch)
        if log.verbose:
            show_rows(job.world, evaluation)
        if progress.evaluations_since_best == 0:
            save_model(job, progress, "best", evaluation)
        if progress.stops_early(config.early_stop):
            patience = f"{config.early_stop} evaluations"
            say(job.world, f"stopping early: {job.metric} has not improved in {patience}")
            progress.finished = True
        progress.evaluation_due = False
    return True


def catch_up(job: Job, progress: Progress, log: Log, stop: StopRequest) -> bool:
    """Do the evaluation and the checkpoint that were due when a signal stopped the run.

    Return False if a new signal interrupts the evaluation.
    """
    was_due = progress.evaluation_due
    if was_due and not evaluate_and_keep_best(job, progress, log, stop):
        return False
    if was_due or (progress.step == job.total and not progress.finished):
        progress.finished = progress.finished or progress.step == job.total
        save_progress(job, progress)
    return True


def train_to_end(job: Job, progress: Progress, log: Log, stop: StopRequest) -> bool:
    """Train to the end of the run; return False if a signal stopped it, which happens after a whole update."""
    config, data, learner = job.config, job.data, job.learner
    stopped = not catch_up(job, progress, log, stop)
    while progress.epoch < config.epochs and not progress.finished and not stopped:
        data.sampler.set_position(epoch=progress.epoch, update=progress.update)
        for batches in fetch_updates(data.train, data.sampler, config, job.world):
            job.bad_audio.agree("train", data.train, errors_of(batches))
            set_rate(learner.optimizer, SCHEDULES[config.schedule](progress.step, job.total, config.warmup))
            result = run_update(learner, batches, progress, stop=bool(stop))

            epoch, place = progress.epoch, progress.update
            epoch_ended = progress.advance(job.updates[epoch])
            last = progress.step == job.total
            job.saver.check()
            log.count(result, batches)
            count_left_out(job, log, progress, result, (epoch, place))
            log_updates(job, log, progress, result, epoch)

            stopped = result.stop
            due = is_due(config.eval_every, progress, epoch_ended=epoch_ended, last=last)
            progress.evaluation_due = due and len(data.valid) > 0
            if progress.evaluation_due and not stopped:
                stopped = not evaluate_and_keep_best(job, progress, log, stop)
            progress.finished = progress.finished or (last and not progress.evaluation_due)
            ending = progress.finished or stopped
            if ending or is_due(config.save_every, progress, epoch_ended=epoch_ended, last=last):
                save_progress(job, progress)
            if ending:
                break
    log.bar.close()
    job.saver.wait()
    return not stopped


def save_last(job: Job, progress: Progress, log: Log) -> None:
    """Save last/, and best/ where nothing was evaluated."""
    if len(job.data.valid) and log.evaluation is None:
        log.evaluation = evaluate_valid(job)
    save_model(job, progress, "last", log.evaluation)
    if not len(job.data.valid):
        save_model(job, progress, "best", None)


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
        run: folder for checkpoints, metrics.jsonl, best/ and last/. If it holds checkpoints, the run continues
            from the newest sound one.
        world: the processes; None: this one alone.
        settings: further entries for the run's config.json (such as where the data came from); they must be the
            same in a resumed run.
        overwrite: remove the run that the folder holds, and start a new one.
        resume_from: the name or path of the checkpoint to go back to; later ones are set aside.
        allow_changes: settings that may differ from the resumed run's; see `ser.train.runs.CHANGEABLE`.
        verbose: print reference beside hypothesis for a few utterances of each evaluation.

    After SIGTERM, SIGUSR1, SIGHUP or Ctrl-C to any rank, all ranks finish the same update and save. The result is
    then ``stopped``, and the same call continues the run.

    Raises:
        ConfigError, RunFolderError, FileError, AudioError, ResourceError: the message says what to do.
    """
    world = world or World(device=choose_device(config.device, 0))
    request = Request(Path(run), settings or {}, overwrite, resume_from, allow_changes)
    with freed_memory_kept(world.device), ExitStack() as held:
        job = prepare(recognizer, {"train": train, "valid": valid}, config, request, world, held)
        progress = restore(job)
        resumed, finished_before = job.opened.checkpoint is not None, progress.finished
        if config.cache and not finished_before:  # it depends on weights, so the checkpoint has to be loaded first
            fill_caches(job)
        say(world, job.summary())
        log = Log(request.folder / "metrics.jsonl", world, progress, total=job.total, verbose=verbose)
        stop = held.enter_context(stop_on_signals())
        if not train_to_end(job, progress, log, stop) and not progress.finished:
            by = stop.signal or "a signal to another process"
            again = "the same command continues (without --overwrite and --resume-from)"
            say(world, f"stopped by {by} after update {progress.step} of {job.total}; {again}")
            return FitResult(progress, job.metric, log.evaluation, resumed, stopped=True)
        recognizer.model.eval()
        # A finished run has last/ and best/, unless it was killed between its last checkpoint and writing last/.
        if not finished_before or world.gather(not (request.folder / "last" / RECORD).is_file())[0]:
            save_last(job, progress, log)
        job.saver.wait()
        world.barrier()
        return FitResult(progress, job.metric, log.evaluation, resumed)

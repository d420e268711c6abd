"""Let worker processes decode batches ahead: every wait for them has a limit, and none of them is left running.

torch's own limit (DataLoader's ``timeout``) covers only its queue. After a batch is announced, it is fetched from
its worker through a socket, without a limit. And when a process ends, it waits for its workers, for ever if one is
stopped or stuck. So here a thread counts the seconds of every wait, and kills workers that take too long.
"""

import atexit
import multiprocessing
import os
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from ser.errors import ConfigError, ResourceError, SerError

WORKER_SECONDS = 600.0  # the default limit of a wait for a worker
CONTINUE = "give the same command again to continue"
AGAIN = "give the same command again"  # for commands that cannot continue


def worker_died(error: BaseException, then: str) -> ResourceError:
    """Return the error for a worker that has ended; ``then`` says what to do afterwards."""
    reason = (str(error).splitlines() or ["its connection ended"])[0].strip().rstrip(".")
    return ResourceError(
        f"a process that decodes audio died: {reason}. If the system killed it for lack of memory, lower "
        f"--workers (0: this process decodes); then {then}"
    )


@contextmanager
def worker_death_explained(then: str = CONTINUE) -> Iterator[None]:
    """Raise ResourceError if a worker dies in this context, which holds all that uses `decoded`.

    torch raises its error wherever this process is at that moment, perhaps outside of `decoded`.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise worker_died(error, then) from error


def kill(workers: Iterable[BaseProcess]) -> None:
    """Send SIGKILL, which also ends a stopped process. Workers that have ended are left alone."""
    for worker in workers:
        worker.kill()


class Patience(threading.Thread):
    """Kill workers that return nothing for some seconds while this process waits for them.

    This thread counts ticks and reads no clock, so the time in which this process is stopped (Ctrl-Z) does not
    count.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__(name="patience", daemon=True)
        self.seconds = seconds
        self.workers: Sequence[BaseProcess] = ()
        self.waits = 0  # how many waits have begun
        self.waiting = False
        self.over = threading.Event()
        self.given_up = False
        self.fault: Exception | None = None  # an error of planning, so not of a worker

    def begin(self) -> None:
        """Note that a wait for the workers begins."""
        self.waits += 1
        self.waiting = True

    def end(self) -> None:
        """Note that the wait is over."""
        self.waiting = False

    def wait_for(self, loader: Iterator[Any]) -> Any:
        """Return the loader's next batch, or None after the last; raise EOFError if the wait was too long."""
        self.begin()
        batch = next(loader, None)
        self.end()
        if self.given_up:
            raise EOFError("it did not end in time")
        return batch

    def planned(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yield the batches that a loader asks for during a wait, without counting that time as waiting.

        Planning may take long, for example with a live source.
        """
        self.end()
        try:
            for batch in batches:
                self.begin()
                yield batch
                self.end()
        except Exception as error:
            self.fault = error
            raise
        self.begin()

    def run(self) -> None:
        """Check ten times within the limit, and at least once a second."""
        tick, waited, number = min(1.0, self.seconds / 10), 0.0, 0
        while not self.over.wait(tick):
            waited = waited + tick if self.waiting and number == self.waits else 0.0
            number = self.waits
            if waited >= self.seconds:
                self.given_up = True
                kill(self.workers)
                return


@contextmanager
def all_or_none(patience: Patience, then: str) -> Iterator[None]:
    """Kill all workers that start in this block if one of them cannot start; else Python's exit would hang."""
    there = set(multiprocessing.active_children())
    try:
        yield
    except Exception as error:
        kill(set(multiprocessing.active_children()) - there)
        if not isinstance(error, OSError) or error is patience.fault:
            raise
        raise ResourceError(
            f"the processes that decode audio cannot be started: {error.strerror or error}. Lower --workers (0: "
            f"this process decodes); then {then}"
        ) from error


@contextmanager
def all_ended(loader: Any, patience: Patience) -> Iterator[None]:
    """End all workers of a DataLoader's iterator when this block ends, or when Python exits before."""
    owner = os.getpid()

    def end_all() -> None:
        if os.getpid() == owner:  # and not in a forked copy of this process
            kill(patience.workers)

    # An error may keep the generator alive until Python exits, where multiprocessing waits for its processes.
    atexit.register(end_all)
    try:
        yield
    finally:
        patience.over.set()
        with suppress(RuntimeError):  # torch's error for a death that is already known from the lost connection
            loader._shutdown_workers()
        end_all()
        atexit.unregister(end_all)


@contextmanager
def lost_worker_explained(patience: Patience, then: str) -> Iterator[None]:
    """Raise ResourceError if ``patience`` killed a worker, or a worker died while this process waited for it.

    An error of the data set in a worker is raised as it was there.

    The batch of a dead worker is fetched through a socket, which may fail before torch notices the death.
    """
    try:
        yield
    except SerError as error:
        if error is patience.fault or not str(error).startswith("Caught "):
            raise
        # Torch puts the traceback of the worker before the message of an error of the data set.
        kind = type(error)
        raise kind(str(error).rpartition(f"{kind.__module__}.{kind.__qualname__}: ")[2].strip()) from error
    except Exception as error:
        if patience.given_up:
            raise ResourceError(
                f"a process that decodes audio gave nothing within --timeout: stopped or stuck, it was killed "
                f"after {patience.seconds} seconds. If the file system answers, {then}"
            ) from error
        lost = isinstance(error, ConnectionError | EOFError) and error is not patience.fault
        if lost or str(error).startswith("DataLoader worker"):
            raise worker_died(error, then) from error
        raise


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute on one thread in this block, as worker processes do.

    With other numbers of threads it adds up in another order, so the last bits of a resampled or normalised
    waveform would depend on the machine.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def decoded(
    dataset: Dataset[Any],
    batches: Iterable[Any],
    collate: Callable[[Any], Any],
    *,
    workers: int,
    timeout: float = WORKER_SECONDS,
    then: str = CONTINUE,
    **options: Any,
) -> Generator[Any, None, None]:
    """Yield the batches of a dataset in their order, decoded ahead by worker processes.

    The batches are the same, bit for bit, for any number of workers and threads.

    Args:
        dataset: returns the items of a batch.
        batches: the indices of each batch; they are read ahead.
        collate: makes a batch of its items.
        workers: the number of processes; with 0 this process decodes.
        timeout: the limit of a wait for a worker, in seconds.
        then: what the errors advise to do.
        options: further options of DataLoader.

    Raises:
        ResourceError: a worker cannot be started, returned nothing within ``timeout``, or died while this process
            waited for it. For a death at another time see `worker_death_explained`.
        ConfigError: ``timeout`` is not above 0.
    """
    if not timeout > 0:
        raise ConfigError(f"timeout is {timeout!r}; expected seconds, more than 0")
    patience = Patience(timeout)
    planned: Any = patience.planned(batches)
    given: Any = DataLoader(dataset, batch_sampler=planned, collate_fn=collate, num_workers=workers, **options)
    if not workers:
        items = iter(given)
        while True:
            with one_thread():
                batch = next(items, None)
            if batch is None:
                return
            yield batch
    with all_or_none(patience, then):
        loader: Any = iter(given)
    patience.workers = loader._workers
    with all_ended(loader, patience), lost_worker_explained(patience, then):
        patience.start()
        while (batch := patience.wait_for(loader)) is not None:
            yield batch

"""Let other processes decode batches ahead: every wait for them has a limit, and none of them is left behind.

torch's own limit (DataLoader's ``timeout``) covers its queue alone. A batch that was announced is fetched from its
worker through a socket, without a limit. At its end a process waits for its workers without a limit, for ever if
one is stopped or stuck. So here a thread counts the seconds of every wait, and kills the workers.
"""

import atexit
import multiprocessing
import os
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from typing import Any

from torch.utils.data import DataLoader, Dataset

from ser.errors import ConfigError, ResourceError

WORKER_SECONDS = 600.0  # the longest that a process waits for a worker, where nothing else is said
CONTINUE = "give the same command again to continue"
AGAIN = "give the same command again"  # where nothing is kept of what was done


def worker_died(error: BaseException, then: str) -> ResourceError:
    """Word the error for a worker that has ended, as torch or a lost connection tells; ``then``: what to do."""
    reason = (str(error).splitlines() or ["its connection ended"])[0].strip().rstrip(".")
    return ResourceError(
        f"a process that decodes audio died: {reason}. If the system killed it for lack of memory, lower "
        f"--workers (0: this process decodes); then {then}"
    )


@contextmanager
def worker_death_explained(then: str = CONTINUE) -> Iterator[None]:
    """Raise ResourceError for a worker's death around all that uses `decoded`.

    torch raises its own error wherever this process happens to be, which need not be in `decoded`.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise worker_died(error, then) from error


def kill(workers: Iterable[BaseProcess]) -> None:
    """Send SIGKILL, which ends a stopped process too. Workers that have ended are left alone."""
    for worker in workers:
        worker.kill()


class Patience(threading.Thread):
    """A thread that kills workers which give nothing for some seconds while this process waits for them.

    It counts its own ticks and reads no clock: while this process itself is stopped (Ctrl-Z) nobody waits.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__(name="patience", daemon=True)
        self.seconds = seconds
        self.workers: Sequence[BaseProcess] = ()
        self.waits = 0  # how many have begun
        self.waiting = False
        self.over = threading.Event()
        self.given_up = False
        self.fault: Exception | None = None  # of planning: no worker's

    def begin(self) -> None:
        """Note that a wait for the workers begins."""
        self.waits += 1
        self.waiting = True

    def end(self) -> None:
        """Note that the wait is over."""
        self.waiting = False

    def wait_for(self, loader: Iterator[Any]) -> Any:
        """Return the loader's next batch, or None behind the last; raise EOFError where the wait was too long."""
        self.begin()
        batch = next(loader, None)
        self.end()
        if self.given_up:
            raise EOFError("it did not end in time")
        return batch

    def planned(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Give the batches that a loader asks for in the middle of a wait, and do not count that time as waiting.

        Planning may take long, with a live source for example.
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
        """Look ten times within the limit, and once a second at least."""
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
    """Kill all workers that start in this block if one of them cannot start: Python's end would wait for them."""
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
    """End all workers of a DataLoader's iterator with this block, or with Python if that ends first."""
    owner = os.getpid()

    def end_all() -> None:
        if os.getpid() == owner:  # not in a copy that somebody forked
            kill(patience.workers)

    # An error may keep a generator until Python ends, and there multiprocessing waits for its processes.
    atexit.register(end_all)
    try:
        yield
    finally:
        patience.over.set()
        with suppress(RuntimeError):  # torch tells of the death that a lost connection has told of already
            loader._shutdown_workers()
        end_all()
        atexit.unregister(end_all)


@contextmanager
def lost_worker_explained(patience: Patience, then: str) -> Iterator[None]:
    """Raise ResourceError where a worker was killed by ``patience``, or died while this process waited for it.

    What a dead worker had sent is fetched from it through a socket, and that may fail before torch tells of its
    death.
    """
    try:
        yield
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
    """Give the batches of a dataset in their order, decoded ahead by worker processes.

    Args:
        dataset: gives an item of a batch.
        batches: what each batch holds, asked for ahead.
        collate: makes a batch of its items.
        workers: the number of processes; with 0 this process decodes.
        timeout: seconds to wait for one of them.
        then: what the errors advise to do.
        options: further ones of DataLoader.

    Raises:
        ResourceError: a worker cannot be started, gave nothing within ``timeout``, or died while it was waited
            for. For its death at another time see `worker_death_explained`.
        ConfigError: ``timeout`` is not above 0.
    """
    if not timeout > 0:
        raise ConfigError(f"timeout is {timeout!r}; expected seconds, more than 0")
    patience = Patience(timeout)
    planned: Any = patience.planned(batches)
    given: Any = DataLoader(dataset, batch_sampler=planned, collate_fn=collate, num_workers=workers, **options)
    if not workers:
        yield from given
        return
    with all_or_none(patience, then):
        loader: Any = iter(given)
    patience.workers = loader._workers
    with all_ended(loader, patience), lost_worker_explained(patience, then):
        patience.start()
        while (batch := patience.wait_for(loader)) is not None:
            yield batch

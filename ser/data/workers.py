"""Batches that other processes decode ahead: every wait for them has a limit, and none of them is left behind.

torch's own limit (DataLoader's ``timeout``) covers its queue alone. A batch that was announced is fetched from its
worker through a socket without one; and at its end a process waits without one for its workers, for ever if one is
stopped or stuck. So here a thread counts the seconds of every wait, and kills.
"""

from __future__ import annotations

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
    """The error to raise where torch, or a lost connection, says that a worker has ended; ``then``: what to do."""
    reason = (str(error).splitlines() or ["its connection ended"])[0].strip().rstrip(".")
    return ResourceError(
        f"a process that decodes audio died: {reason}. If the system killed it for lack of memory, lower "
        f"--workers (0: this process decodes); then {then}"
    )


@contextmanager
def worker_death_explained(then: str = CONTINUE) -> Iterator[None]:
    """Around all that uses `decoded`: torch tells of a worker's death wherever this process happens to be."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise worker_died(error, then) from error


def kill(workers: Iterable[BaseProcess]) -> None:
    """SIGKILL, which ends a stopped process too. Those that have ended are left alone."""
    for worker in workers:
        worker.kill()


class Patience(threading.Thread):
    """Kills workers when they give nothing for some seconds while they are waited for.

    It counts ticks and not the clock: while this process itself is stopped (Ctrl-Z) nobody waits.
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
        """From now on the workers are waited for."""
        self.waits += 1
        self.waiting = True

    def end(self) -> None:
        """From now on they are not."""
        self.waiting = False

    def planned(self, batches: Iterable[Any]) -> Iterator[Any]:
        """What a loader asks for amid a wait. The time that planning takes (a live source's, say) is no wait."""
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
    """Around the start of workers: where one fails, the others are killed, for Python's end waits for them."""
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
    """The batches of a dataset in their order, decoded ahead by worker processes.

    Args:
        dataset: gives an item of a batch.
        batches: what each holds, asked ahead.
        collate: makes a batch of its items.
        workers: how many; 0: this process decodes.
        timeout: seconds to wait for one of them.
        then: what the errors say is to be done.
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
    patience.workers, owner = loader._workers, os.getpid()

    def end_all() -> None:
        if os.getpid() == owner:  # not in a copy that somebody forked
            kill(patience.workers)

    # An error may keep this generator until Python ends, and there multiprocessing waits for its processes.
    atexit.register(end_all)
    try:
        patience.start()
        while True:
            patience.begin()
            batch = next(loader, None)
            patience.end()
            if patience.given_up:
                raise EOFError("it did not end in time")
            if batch is None:
                return
            yield batch
    except Exception as error:
        # What a dead worker had sent is fetched from it through a socket, which may fail before torch tells of it.
        if patience.given_up:
            raise ResourceError(
                f"a process that decodes audio gave nothing within --timeout: stopped or stuck, it was killed "
                f"after {timeout} seconds. If the file system answers, {then}"
            ) from error
        lost = isinstance(error, ConnectionError | EOFError) and error is not patience.fault
        if lost or str(error).startswith("DataLoader worker"):
            raise worker_died(error, then) from error
        raise
    finally:
        patience.over.set()
        with suppress(RuntimeError):  # torch tells of the death that a lost connection has told of already
            loader._shutdown_workers()
        end_all()
        atexit.unregister(end_all)

"""Describe the processes that torchrun started: which rank this one is, and sums over ranks.

A single process is a world of size 1, in which the same calls do nothing.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ser.device import choose_device
from ser.train.processes import attempt, end_with_launcher

# Ranks wait this much longer than loaders do, so a rank whose worker hangs reports its error before the others.
PEER_GRACE = 5.0  # seconds


@dataclass(frozen=True)
class World:
    """Describe this process among its peers."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """Tell whether this is the rank that writes files and prints."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Add a CPU tensor over all ranks, in place. It goes through gloo, so no GPU waits for it."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """Give every rank the values of all ranks, in rank order. Values are small, picklable and our own."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.sum(torch.zeros(1))

    def wrap(self, model: nn.Module) -> nn.Module:
        """Wrap the model in DistributedDataParallel. Freeze parts before: the graph must not change later."""
        return model if self.size == 1 else DistributedDataParallel(model, gradient_as_bucket_view=True)

    def no_sync(self, wrapped: nn.Module, *, last: bool) -> AbstractContextManager[Any]:
        """Keep gradients local for all but the last micro-batch of an update.

        Both forward and backward have to run in this context, since DistributedDataParallel checks it in both.
        """
        return wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) and not last else nullcontext()


@contextmanager
def joined_world(device: str = "auto", *, timeout: float = 600.0, launcher: int | None = None) -> Iterator[World]:
    """Join the processes that torchrun started, and leave them at the end. Without torchrun the size is 1.

    ``timeout`` is the longest that one process waits for another, in seconds; then it raises a RuntimeError.
    ``launcher`` is the id of the parent when this process began (see `end_with_launcher`).
    """
    end_with_launcher(launcher)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    chosen = choose_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if size == 1:
        yield World(device=chosen)
        return
    # Control values (counts, metrics) travel on the CPU through gloo, gradients of GPUs through nccl.
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    limit = timedelta(seconds=timeout + PEER_GRACE)
    store, rank, size = next(dist.rendezvous("env://", timeout=limit))
    if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
        # torchrun keeps its store over restarts, with the addresses of processes that have ended. With several
        # nodes, each node counts restarts differently; docs/reliability.md says what to do there.
        store = dist.PrefixStore(f"attempt-{attempt()}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
    if rank:  # else every rank would print the warnings of loading a folder
        logging.getLogger("ser").setLevel(logging.ERROR)
    yield World(rank=rank, size=size, device=chosen)
    # Not after an error: taking the group down may wait for ranks that wait for this one.
    dist.destroy_process_group()

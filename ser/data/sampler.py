"""The plan of an epoch, and its cut for a rank.

The plan is a list of updates (optimizer steps), each a list of utterances: a function of (lengths, seed, epoch,
effective batch) and of nothing else. World size and micro-batch only cut each update into equally many
micro-batches per rank:

    plan       [ update 0: a b c d e f g h ] [ update 1: i j k l m n o p ] ... [ last, small: y z ]
    2 ranks,   rank 0: (a b) (g h)           (i j) (o p)                       (y)
    2 a batch  rank 1: (c d) (e f)           (k l) (m n)                       (z)

So another number of ranks computes the same updates in the same order; every utterance has one weighted place
per epoch; and a run can continue at any update without saved state. A rank that the last update leaves without
work runs one of its utterances at weight 0, so that all ranks take equally many steps. As ranks wait for each
other once per update, its micro-batches are dealt so that all compute nearly as many padded samples.

Updates hold utterances of like length, which keeps padding near nothing: IEMOCAP's turns, whose lengths vary
sixtyfold, cost 2.2 times their real work in random batches of 8. Order is random all the same: lengths are
jittered before they are sorted, so neighbours change every epoch, and the updates are shuffled.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from functools import cached_property, partial

import numpy as np
from torch.utils.data import Sampler

from ser.errors import ConfigError

# Relative spread by which lengths are jittered before sorting. At 5 % the neighbours of an utterance in
# IEMOCAP are drawn from some hundred others, for about two points of padding.
JITTER = 0.05

Item = tuple[int, float]  # utterance, weight in the losses (1, or 0 for one that only keeps a rank busy)


def plan_epoch(
    lengths: Sequence[int],
    *,
    seed: int,
    epoch: int,
    effective_batch: int | None = None,
    batch_samples: int | None = None,
    batching: str = "bucket",
) -> list[list[int]]:
    """The updates of an epoch, each a list of utterance numbers with the longest first.

    Args:
        lengths: samples of each utterance, from file headers.
        seed: of the run.
        epoch: from 0.
        effective_batch: utterances per update; or
        batch_samples: padded samples per update (utterances times the longest), at least one utterance.
        batching: "bucket" (utterances of like length) or "random" (as drawn; then also not sorted).
    """
    if (effective_batch is None) == (batch_samples is None):
        raise ConfigError("give either effective_batch (utterances) or batch_samples (padded samples)")
    size = batch_samples if effective_batch is None else effective_batch
    if size is None or size < 1:
        raise ConfigError(f"an update needs a size of at least 1; found {size}")
    if batching not in ("bucket", "random"):
        raise ConfigError(f"batching is {batching!r}; expected 'bucket' or 'random'")
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths))
    samples = np.asarray(lengths, dtype=np.int64)
    rest: list[int] = []
    if batching == "bucket":
        if effective_batch is not None and (left := len(order) % effective_batch):
            # The small last update takes utterances of any length, not always the shortest or longest.
            rest, order = sorted(order[:left].tolist(), key=lambda i: -lengths[i]), order[left:]
        jittered = samples[order] * (1 + JITTER * generator.uniform(-1, 1, len(order)))
        order = order[np.argsort(-jittered, kind="stable")]

    updates: list[list[int]] = []
    longest = 0
    for index in order.tolist():
        longest = max(longest, lengths[index])
        full = not updates or (
            len(updates[-1]) == effective_batch
            if batch_samples is None
            else (len(updates[-1]) + 1) * longest > batch_samples
        )
        if full:
            updates.append([])
            longest = lengths[index]
        updates[-1].append(index)
    if batching == "bucket":
        updates = [sorted(updates[i], key=lambda j: -lengths[j]) for i in generator.permutation(len(updates))]
    return updates + ([rest] if rest else [])


def padded_samples(group: Sequence[int], lengths: Sequence[int]) -> int:
    """What utterances cost to compute in one batch: their number times the longest."""
    return len(group) * max(lengths[i] for i in group)


def split_evenly(values: Sequence[int], parts: int) -> Iterator[Sequence[int]]:
    """``parts`` consecutive groups whose sizes differ by at most one, the larger ones last (they are shorter)."""
    return (values[len(values) * k // parts : len(values) * (k + 1) // parts] for k in range(parts))


def first_of_each_cost(hand: Sequence[int], costs: Sequence[int]) -> dict[int, int]:
    """Map each cost to the first number of the hand that has it."""
    return {costs[k]: k for k in reversed(hand)}


def best_swap(high: Sequence[int], low: Sequence[int], costs: Sequence[int], gap: int) -> tuple[int, int, int]:
    """Find which a of ``high`` and b of ``low`` to swap: (gap that is left, a, b), the first of equally good ones.

    Both hands ascend, and ``gap`` is how much dearer the high one is. For each a the best b is the one whose cost
    is nearest to cost(a) - gap / 2, so no pairs are tried.
    """
    first = first_of_each_cost(low, costs)
    levels = sorted(first)
    swaps = []
    for cost, a in first_of_each_cost(high, costs).items():
        place = bisect_left(levels, cost - gap / 2)
        swaps += [(abs(gap - 2 * (cost - c)), a, first[c]) for c in levels[max(place - 1, 0) : place + 1]]
    return min(swaps)


def deal_evenly(costs: Sequence[int], ranks: int) -> list[list[int]]:
    """Deal numbers 0, 1, ... in order to ``ranks`` of equally many, whose sums of ``costs`` are near each other.

    Dealt by turns, the first rank would have the longer one at every step. So the dearest rank and the cheapest
    swap what brings them nearest, for as long as that helps. With updates of 8 turns of IEMOCAP on two ranks the
    dearer one then has 0.1 % more than half in place of 0.6 %; with 48 of its turns 0.3 % in place of 5 %.
    """
    hands = [list(range(rank, len(costs), ranks)) for rank in range(ranks)]
    totals = [sum(costs[k] for k in hand) for hand in hands]
    while True:
        low, high = totals.index(min(totals)), totals.index(max(totals))
        gap = totals[high] - totals[low]
        if not gap:  # one rank, for one
            break
        left, a, b = best_swap(hands[high], hands[low], costs, gap)
        if left >= gap:
            break
        hands[high].remove(a)
        hands[low].remove(b)
        insort(hands[high], b)
        insort(hands[low], a)
        totals[high] += costs[b] - costs[a]
        totals[low] += costs[a] - costs[b]
    return sorted(hands, key=min)


def cut_update(
    update: Sequence[int],
    lengths: Sequence[int],
    *,
    world_size: int,
    micro_batch: int | None = None,
    micro_samples: int | None = None,
) -> list[list[list[Item]]]:
    """Cut an update into micro-batches: ``[step][rank]`` -> items, as few steps as the limits allow.

    Args:
        update: utterance numbers, in the order of `plan_epoch`.
        lengths: samples of each utterance.
        world_size: number of ranks; all get equally many micro-batches, and nearly as many samples.
        micro_batch: most utterances in one; or None.
        micro_samples: most padded samples in one (a single utterance may exceed it); or None.
    """

    def fits(group: Sequence[int]) -> bool:
        if len(group) <= 1:
            return True
        small = micro_batch is None or len(group) <= micro_batch
        return small and (micro_samples is None or padded_samples(group, lengths) <= micro_samples)

    # Utterances are dealt, and then each rank's are cut: the finest way to share. A CPU's layers see no padding.
    missing = -len(update) % world_size  # what is dealt where there is no utterance
    hands = deal_evenly([lengths[i] for i in update] + [0] * missing, world_size)
    ranks = [[update[k] for k in hand if k < len(update)] for hand in hands]
    steps = 1
    while not all(fits(group) for rank in ranks for group in split_evenly(rank, steps)):
        steps += 1
    # The shortest utterance stands last: the cheapest one to keep a rank busy with.
    items: list[list[list[Item]]] = [
        [[(i, 1.0) for i in group] or [(update[-1], 0.0)] for group in split_evenly(rank, steps)] for rank in ranks
    ]
    return [list(step) for step in zip(*items, strict=True)]


class LengthBucketBatchSampler(Sampler[list[Item]]):
    """This rank's micro-batches of an epoch, for the ``batch_sampler`` of a DataLoader.

        sampler = LengthBucketBatchSampler(lengths, effective_batch=8, micro_batch=1, seed=0,
                                           rank=world.rank, world_size=world.size)
        sampler.set_position(epoch=3, update=120)      # continue in the middle of an epoch
        for batch in DataLoader(dataset, batch_sampler=sampler, collate_fn=collate): ...

    ``updates[k]`` are the micro-batches of update k of the epoch on this rank; every rank has equally many.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        seed: int,
        effective_batch: int | None = None,
        batch_samples: int | None = None,
        micro_batch: int | None = None,
        micro_samples: int | None = None,
        batching: str = "bucket",
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if not len(lengths):
            raise ConfigError("there are no utterances to sample from")
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank is {rank}; expected 0 to {world_size - 1}")
        self.lengths = list(lengths)
        self.rank, self.world_size = rank, world_size
        self.plan = partial(
            plan_epoch,
            self.lengths,
            seed=seed,
            effective_batch=effective_batch,
            batch_samples=batch_samples,
            batching=batching,
        )
        self.cut = partial(
            cut_update,
            lengths=self.lengths,
            world_size=world_size,
            micro_batch=micro_batch,
            micro_samples=micro_samples,
        )
        self.set_position(epoch=0)

    def set_position(self, *, epoch: int, update: int = 0) -> None:
        """Go to an epoch, and past its first ``update`` updates. A pure jump: nothing is drawn or read."""
        plan = self.plan(epoch=epoch)
        if not 0 <= update <= len(plan):
            raise ConfigError(f"epoch {epoch} has {len(plan)} updates; cannot start at {update}")
        self.steps = [self.cut(u) for u in plan[update:]]
        self.__dict__.pop("padding", None)  # of another epoch

    @property
    def updates(self) -> list[list[list[Item]]]:
        """``[update][micro-batch]`` -> items of this rank, from the position on."""
        return [[ranks[self.rank] for ranks in steps] for steps in self.steps]

    def __len__(self) -> int:
        """Micro-batches that iterating yields, the same on every rank."""
        return sum(map(len, self.steps))

    def __iter__(self) -> Iterator[list[Item]]:
        for update in self.updates:
            yield from update

    @cached_property
    def padding(self) -> float:
        """Share of the computed samples that are padding, over all ranks, 0..1."""
        real = padded = 0
        for steps in self.steps:
            for batch in (batch for ranks in steps for batch in ranks):
                real += sum(int(weight) * self.lengths[i] for i, weight in batch)
                padded += padded_samples([i for i, _ in batch], self.lengths)
        return 1 - real / padded if padded else 0.0


def evaluation_batches(
    lengths: Sequence[int], *, batch_samples: int, rank: int = 0, world_size: int = 1
) -> list[list[Item]]:
    """This rank's batches for evaluation: every utterance exactly once over all ranks, none repeated.

    Longest first, so that memory runs out at once or never. Ranks may get different numbers of batches:
    evaluation adds up counts at its end and needs no step in common.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches: list[list[Item]] = []
    for index in order:
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0][0]] > batch_samples:
            batches.append([])
        batches[-1].append((index, 1.0))
    return batches[rank::world_size]

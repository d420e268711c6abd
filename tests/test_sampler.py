"""The plan of an epoch and its cut (FAULTS C4, D1)."""

import itertools
import resource
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ser.data.sampler import (
    Item,
    LengthBucketBatchSampler,
    cut_update,
    deal_evenly,
    evaluation_batches,
    padded_samples,
    plan_epoch,
)
from ser.errors import ConfigError

lengths_strategy = st.lists(st.integers(400, 500_000), min_size=1, max_size=70)
worlds = st.integers(1, 8)
micro_batches = st.integers(1, 5)
batches = st.integers(1, 24)
batchings = st.sampled_from(["bucket", "random"])
quick = settings(max_examples=150, deadline=None, derandomize=True)


def samplers(lengths, world_size, **options):
    return [
        LengthBucketBatchSampler(lengths, rank=rank, world_size=world_size, **options)
        for rank in range(world_size)
    ]


@quick
@given(lengths_strategy, worlds, micro_batches, batches, batchings, st.integers(0, 5))
def test_every_utterance_has_weight_one_exactly_once_per_epoch(lengths, world, micro, batch, batching, epoch):
    ranks = samplers(lengths, world, seed=3, effective_batch=batch, micro_batch=micro, batching=batching)
    weight = [0.0] * len(lengths)
    for sampler in ranks:
        sampler.set_position(epoch=epoch)
        for index, w, *_ in itertools.chain.from_iterable(sampler):
            weight[index] += w
    assert weight == [1.0] * len(lengths)


@quick
@given(lengths_strategy, worlds, micro_batches, batches, batchings)
def test_all_ranks_get_equally_many_micro_batches_in_every_update(lengths, world, micro, batch, batching):
    ranks = samplers(lengths, world, seed=0, effective_batch=batch, micro_batch=micro, batching=batching)
    counts = [[len(update) for update in sampler.updates] for sampler in ranks]
    assert all(c == counts[0] for c in counts)
    assert all(n >= 1 for n in counts[0])
    assert all(len(items) >= 1 for sampler in ranks for items in sampler), "an empty micro-batch would hang"


@quick
@given(lengths_strategy, worlds, micro_batches, batches, batchings)
def test_no_micro_batch_is_larger_than_asked(lengths, world, micro, batch, batching):
    ranks = samplers(lengths, world, seed=0, effective_batch=batch, micro_batch=micro, batching=batching)
    assert max(len(items) for sampler in ranks for items in sampler) <= micro


@quick
@given(lengths_strategy, worlds, micro_batches, batches, batchings, st.integers(0, 3))
def test_the_order_of_updates_does_not_depend_on_the_number_of_ranks(
    lengths, world, micro, batch, batching, epoch
):
    def updates(size, micro_batch):
        ranks = samplers(lengths, size, seed=1, effective_batch=batch, micro_batch=micro_batch, batching=batching)
        for sampler in ranks:
            sampler.set_position(epoch=epoch)
        return [
            sorted(i for sampler in ranks for group in sampler.updates[k] for i, w, *_ in group if w)
            for k in range(len(ranks[0].updates))
        ]

    assert updates(world, micro) == updates(1, batch)


@quick
@given(lengths_strategy, worlds, st.integers(400, 3_000_000), st.integers(0, 3))
def test_updates_by_padded_samples_keep_within_the_budget(lengths, world, budget, epoch):
    plan = plan_epoch(lengths, seed=0, epoch=epoch, batch_samples=budget)
    assert sorted(itertools.chain.from_iterable(plan)) == list(range(len(lengths)))
    for update in plan:
        assert len(update) == 1 or len(update) * max(lengths[i] for i in update) <= budget
        steps = cut_update(update, lengths, world_size=world, micro_samples=-(-budget // world))
        assert all(len(ranks) == world for ranks in steps)
        assert sorted(i for ranks in steps for group in ranks for i, w, *_ in group if w) == sorted(update)


@quick
@given(lengths_strategy, worlds, micro_batches, batches)
def test_len_is_the_number_of_micro_batches_that_iterating_yields(lengths, world, micro, batch):
    for sampler in samplers(lengths, world, seed=0, effective_batch=batch, micro_batch=micro):
        assert len(sampler) == len(list(sampler))
        sampler.set_position(epoch=2, update=len(sampler.updates) // 2)
        assert len(sampler) == len(list(sampler))


@quick
@given(lengths_strategy, worlds, batches, st.integers(0, 4))
def test_skipping_to_a_position_gives_the_rest_of_the_epoch(lengths, world, batch, epoch):
    for whole, rest in zip(
        *(samplers(lengths, world, seed=0, effective_batch=batch) for _ in range(2)), strict=True
    ):
        whole.set_position(epoch=epoch)
        for start in range(len(whole.updates) + 1):
            rest.set_position(epoch=epoch, update=start)
            assert rest.updates == whole.updates[start:]


@quick
@given(lengths_strategy, worlds, st.integers(1, 4_000_000))
def test_evaluation_sees_every_utterance_exactly_once(lengths, world, budget):
    seen = [
        index
        for rank in range(world)
        for batch in evaluation_batches(lengths, batch_samples=budget, rank=rank, world_size=world)
        for index, *_ in batch
    ]
    assert sorted(seen) == list(range(len(lengths)))


def spread_lengths(n=2000):
    """Lengths like IEMOCAP's: most of a few seconds, a long tail."""
    return [int(16_000 * (0.6 + 33.5 * (((i * 7919) % n) / n) ** 3)) for i in range(n)]


def test_batches_of_like_length_hardly_pad_and_random_ones_do():
    bucket, random = (
        LengthBucketBatchSampler(spread_lengths(), seed=0, effective_batch=8, micro_batch=8, batching=b)
        for b in ("bucket", "random")
    )
    assert bucket.padding < 0.05
    assert random.padding > 0.4


def test_the_order_differs_between_epochs_and_seeds_and_repeats_for_the_same():
    lengths = spread_lengths(200)
    first = plan_epoch(lengths, seed=0, epoch=0, effective_batch=8)
    assert first == plan_epoch(lengths, seed=0, epoch=0, effective_batch=8)
    assert first != plan_epoch(lengths, seed=0, epoch=1, effective_batch=8)
    assert first != plan_epoch(lengths, seed=1, epoch=0, effective_batch=8)
    assert plan_epoch(lengths, seed=0, epoch=1, effective_batch=8) != plan_epoch(
        lengths, seed=1, epoch=0, effective_batch=8
    ), "a neighbouring seed is not the same run one epoch on"
    assert {frozenset(u) for u in first} != {
        frozenset(u) for u in plan_epoch(lengths, seed=0, epoch=1, effective_batch=8)
    }


def test_updates_are_not_in_order_of_length():
    lengths = spread_lengths(400)
    longest = [lengths[update[0]] for update in plan_epoch(lengths, seed=0, epoch=0, effective_batch=8)]
    assert longest != sorted(longest) and longest != sorted(longest, reverse=True)


def test_ranks_work_on_like_lengths_at_each_step():
    lengths = spread_lengths(1000)
    ranks = samplers(lengths, 2, seed=0, effective_batch=8, micro_batch=1)
    ratios = [
        max(lengths[a[0][0]], lengths[b[0][0]]) / min(lengths[a[0][0]], lengths[b[0][0]])
        for a, b in zip(*ranks, strict=True)
    ]
    assert sorted(ratios)[len(ratios) // 2] < 1.1


@pytest.mark.parametrize("ranks, most", [(2, 1.01), (4, 1.03)])
def test_ranks_compute_nearly_as_many_padded_samples_in_an_update(ranks, most):
    lengths = spread_lengths(160)  # few, so neighbours in an update differ
    sampler = LengthBucketBatchSampler(lengths, seed=0, effective_batch=16, micro_batch=2, world_size=ranks)
    dearest = mean = 0
    for steps in sampler.steps:
        hands = [[[i for i, *_ in step[rank]] for step in steps] for rank in range(ranks)]
        sums = [sum(padded_samples(batch, lengths) for batch in hand) for hand in hands]
        dearest += max(sums)
        mean += sum(sums) / ranks
    assert dearest < most * mean


def test_one_forward_pass_of_each_rank_has_nearly_half_of_an_update():
    """Not the longer half of it."""
    lengths = spread_lengths(160)
    sampler = LengthBucketBatchSampler(lengths, seed=0, effective_batch=8, micro_samples=10**9, world_size=2)
    dearest = 0
    for steps in sampler.steps:
        assert [[len(batch) for batch in step] for step in steps] == [[4, 4]]
        dearest += max(sum(lengths[i] for i, *_ in batch) for batch in steps[0])
    assert dearest < 1.005 * sum(lengths) / 2


@quick
@given(st.lists(st.integers(1, 1000), min_size=5, max_size=40), st.integers(1, 5))
def test_no_swap_brings_the_dearest_rank_and_the_cheapest_nearer(costs, ranks):
    each = len(costs) // ranks
    hands = deal_evenly(costs[: each * ranks], ranks)
    assert sorted(itertools.chain.from_iterable(hands)) == list(range(each * ranks))
    assert {len(hand) for hand in hands} == {each}
    assert all(hand == sorted(hand) for hand in hands), "in the order of the plan, the longest first"
    sums = [sum(costs[k] for k in hand) for hand in hands]
    low, high = (hands[sums.index(find(sums))] for find in (min, max))
    gap = max(sums) - min(sums)
    assert all(abs(gap - 2 * (costs[a] - costs[b])) >= gap for a in high for b in low)


@quick
@given(st.lists(st.integers(1, 12) | st.integers(1, 500_000), min_size=1, max_size=40), st.integers(1, 6))
def test_the_swap_is_the_best_of_all_pairs_and_of_equally_good_ones_the_first(costs, ranks):
    """Dealing tries no pairs, but does as trying all of them did: a run of several ranks is cut as it was."""
    costs = costs[: len(costs) // ranks * ranks] or [1] * ranks
    hands = [list(range(rank, len(costs), ranks)) for rank in range(ranks)]
    while True:
        totals = [sum(costs[k] for k in hand) for hand in hands]
        low, high = hands[totals.index(min(totals))], hands[totals.index(max(totals))]
        gap = max(totals) - min(totals)
        left, a, b = min((abs(gap - 2 * (costs[a] - costs[b])), a, b) for a in high for b in low)
        if left >= gap:
            break
        high[high.index(a)], low[low.index(b)] = b, a
    assert deal_evenly(costs, ranks) == sorted(map(sorted, hands), key=min)


@quick
@given(lengths_strategy, worlds, st.integers(1, 2_000_000))
def test_an_update_is_cut_into_as_few_steps_as_padded_samples_allow(lengths, world_size, limit):
    lengths = sorted(lengths, reverse=True)
    steps = cut_update(range(len(lengths)), lengths, world_size=world_size, micro_samples=limit)
    missing = [0] * (-len(lengths) % world_size)
    hands = [[k for k in hand if k < len(lengths)] for hand in deal_evenly(lengths + missing, world_size)]

    def allowed(count: int) -> bool:
        cuts = [[len(hand) * k // count for k in range(count + 1)] for hand in hands]
        groups = [hand[a:b] for hand, cut in zip(hands, cuts, strict=True) for a, b in itertools.pairwise(cut)]
        return all(len(group) < 2 or padded_samples(group, lengths) <= limit for group in groups)

    assert allowed(len(steps)) and not any(allowed(count) for count in range(1, len(steps)))


@pytest.mark.parametrize("limits", [{"micro_samples": 640_000}, {"micro_batch": 1}, {"micro_samples": 1}])
@pytest.mark.parametrize("world_size", [1, 8])
def test_an_update_of_twenty_thousand_utterances_is_cut_in_seconds_and_little_memory(world_size, limits):
    """In the square of them it took minutes and gigabytes."""
    lengths = sorted((16_000 + 7919 * i % 144_000 for i in range(20_000)), reverse=True)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    steps = cut_update(range(20_000), lengths, world_size=world_size, **limits)
    assert time.process_time() - began < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10
    assert sum(weight for step in steps for rank in step for _, weight, *_ in rank) == 20_000
    sums = [sum(lengths[i] * w for step in steps for i, w, *_ in step[rank]) for rank in range(world_size)]
    assert max(sums) < 1.00001 * sum(sums) / world_size


def test_a_count_that_divides_evenly_adds_no_batch():
    ranks = samplers([16_000] * 32, 2, seed=0, effective_batch=8, micro_batch=2)
    assert [len(sampler) for sampler in ranks] == [8, 8]
    assert all(w == 1 for sampler in ranks for items in sampler for _, w, *_ in items)


def test_a_rank_without_work_runs_one_utterance_of_the_update_at_weight_0():
    steps = cut_update([5], [0, 0, 0, 0, 0, 700], world_size=3, micro_batch=2)
    assert sorted(group for ranks in steps for group in ranks) == [[Item(5, w, 0, 5)] for w in (0.0, 0.0, 1.0)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"effective_batch": 8, "batch_samples": 8},
        {"effective_batch": 0},
        {"effective_batch": 8, "batching": "sorted"},
    ],
)
def test_contradictory_settings_are_refused(options):
    with pytest.raises(ConfigError):
        LengthBucketBatchSampler([16_000] * 4, seed=0, **options)


def test_an_empty_corpus_is_refused():
    with pytest.raises(ConfigError, match="no utterances"):
        LengthBucketBatchSampler([], seed=0, effective_batch=8)

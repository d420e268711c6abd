"""Balance: an epoch of places, in which corpora and classes are as frequent as is asked."""

import shutil
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_train import QUICK
from toy import toy_recognizer, toy_rows

from ser.data.augment import augmented
from ser.data.dataset import SpeechDataset, collate
from ser.data.sampler import Item, LengthBucketBatchSampler, Places, balanced_shares, draw_balanced
from ser.errors import ConfigError, SerError
from ser.train import setup
from ser.train.checkpoint import checkpoints
from ser.train.config import TrainConfig
from ser.train.distributed import World
from ser.train.loop import fit
from ser.train.update import draw_masks

groups_strategy = st.lists(
    st.tuples(st.sampled_from(["a", "b", "c"]), st.sampled_from(["", "happy", "sad", "angry"])), min_size=1
)
temperatures = st.floats(0, 1)
quick = settings(max_examples=100, deadline=None, derandomize=True)

SKEWED = [("large", "happy")] * 90 + [("large", "sad")] * 10 + [("small", "happy")] * 4 + [("small", "angry")] * 16


def drawn(groups, temperature, *, seed=0, epoch=0):
    return draw_balanced(groups, temperature=temperature, seed=seed, epoch=epoch)


def group_counts(groups, temperature, **options):
    return Counter(groups[i] for i in drawn(groups, temperature, **options))


@quick
@given(groups_strategy, st.integers(0, 4))
def test_temperature_0_draws_every_utterance_once(groups, epoch):
    assert drawn(groups, 0.0, epoch=epoch) == list(range(len(groups)))


def test_temperature_1_makes_corpora_and_the_classes_of_each_equally_frequent():
    assert group_counts(SKEWED, 1.0) == dict.fromkeys(set(SKEWED), 30)


def test_temperatures_between_lie_between():
    half = group_counts(SKEWED, 0.5)
    shares = {"large": 100**0.5, "small": 20**0.5}
    large = 120 * shares["large"] / sum(shares.values())
    assert half["large", "happy"] + half["large", "sad"] == pytest.approx(large, abs=1)
    assert half["large", "happy"] / half["large", "sad"] == pytest.approx((90 / 10) ** 0.5, rel=0.1)


def test_utterances_without_a_class_keep_their_share_of_their_corpus():
    groups = [("a", "")] * 50 + [("a", "happy")] * 40 + [("a", "sad")] * 10
    assert group_counts(groups, 1.0) == {("a", ""): 50, ("a", "happy"): 25, ("a", "sad"): 25}
    assert group_counts([("a", "")] * 9 + [("b", "sad")] * 3, 1.0) == {("a", ""): 6, ("b", "sad"): 6}


@quick
@given(groups_strategy, temperatures, st.integers(0, 4))
def test_there_are_as_many_places_as_utterances_and_a_group_s_are_dealt_evenly(groups, temperature, epoch):
    indices = drawn(groups, temperature, epoch=epoch)
    assert len(indices) == len(groups) and indices == sorted(indices)
    copies, shares = Counter(indices), balanced_shares(groups, temperature)
    assert sum(shares.values()) == pytest.approx(1)
    for group in set(groups):
        own = [copies[i] for i, other in enumerate(groups) if other == group]
        assert max(own) - min(own) <= 1
        assert abs(sum(own) - shares[group] * len(groups)) < 1


def test_draws_are_a_function_of_seed_and_epoch_and_differ_between_them():
    first = drawn(SKEWED, 1.0)
    assert first == drawn(SKEWED, 1.0)
    assert first != drawn(SKEWED, 1.0, epoch=1) and first != drawn(SKEWED, 1.0, seed=1)
    heard = set().union(*(drawn(SKEWED, 1.0, epoch=epoch) for epoch in range(20)))
    assert heard == set(range(len(SKEWED))), "in some epoch each one has its turn"


def places_of(groups, lengths):
    def places(epoch):
        indices = drawn(groups, 1.0, epoch=epoch)
        return Places(indices, [lengths[i] for i in indices])

    return places


@quick
@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 24), st.integers(0, 3))
def test_every_place_counts_once_for_any_ranks_and_cut(world, micro, batch, epoch):
    lengths = [1000 + 37 * (i % 50) for i in range(len(SKEWED))]
    places = places_of(SKEWED, lengths)
    options = {"seed": 3, "effective_batch": batch, "micro_batch": micro, "world_size": world}
    weights, found = Counter(), {}
    for rank in range(world):
        sampler = LengthBucketBatchSampler(lengths, rank=rank, places=places, **options)
        sampler.set_position(epoch=epoch)
        for item in (item for batch in sampler for item in batch):
            weights[item.place] += item.weight
            found[item.place] = item.index
    assert weights == dict.fromkeys(range(len(lengths)), 1.0)
    assert [found[place] for place in sorted(found)] == places(epoch).indices
    assert sorted(i for update in sampler.plan(epoch=epoch) for i in update) == places(epoch).indices


# ------------------------------------------------------------------------------------------------- in training


@pytest.fixture
def rows(tmp_path):
    """Twenty rows of two corpora: of "small" four, all angry or happy."""
    rows = toy_rows(tmp_path / "corpus", 20)
    return [replace(row, extra={"corpus": "small" if i % 10 < 2 else "large"}) for i, row in enumerate(rows)]


def run(recognizer, rows, config, folder):
    return fit(recognizer, rows, [], config, folder, world=World())


def test_masks_of_one_utterance_at_two_places_differ(rows):
    dataset = SpeechDataset(rows)
    batch = collate([dataset[Item(3, 1.0, 0, place)] for place in (4, 5, 4)])
    model = toy_recognizer(mask_time_prob=0.6).model.train()
    masks = draw_masks(model, batch, seed=0, epoch=0)["mask_time"]
    assert torch.equal(masks[0], masks[2]) and not torch.equal(masks[0], masks[1])


@pytest.mark.parametrize(
    "augment",
    [(), ("speed:factors=0.8/1.0/1.25", "crop:seconds=0.2..0.3,p=0.5", "gain")],
    ids=["plain", "augmented"],
)
def test_a_balanced_run_that_is_stopped_continues_bit_identically_with_other_workers(rows, tmp_path, augment):
    config = replace(QUICK, epochs=2, balance=1.0, augment=augment, save_every="1", keep=99)
    run(toy_recognizer(), rows, config, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    every = checkpoints(tmp_path / "again")
    for path in every[len(every) // 2 :]:
        shutil.rmtree(path)
    for name in ("last", "best"):
        shutil.rmtree(tmp_path / "again" / name)
    assert run(toy_recognizer(seed=1), rows, replace(config, workers=1), tmp_path / "again").resumed
    one, two = (load_file(tmp_path / name / "last/model.safetensors") for name in ("whole", "again"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_balance_changes_what_is_trained_and_cannot_be_changed_in_a_run(rows, tmp_path):
    config = replace(QUICK, epochs=1)
    for name, balance in (("plain", 0.0), ("even", 1.0)):
        run(toy_recognizer(), rows, replace(config, balance=balance), tmp_path / name)
    one, two = (load_file(tmp_path / name / "last/model.safetensors") for name in ("plain", "even"))
    assert any(not torch.equal(one[name], two[name]) for name in one)
    with pytest.raises(SerError, match="balance"):
        run(toy_recognizer(), rows, replace(config, balance=0.5, epochs=2), tmp_path / "even")


@pytest.mark.parametrize("balance", [-0.1, 1.1, float("nan")])
def test_a_balance_that_is_no_share_is_refused(balance):
    with pytest.raises(ConfigError, match="balance"):
        TrainConfig(balance=balance)


def test_class_weights_and_logit_adjustment_come_from_what_an_epoch_draws(rows):
    recognizer = toy_recognizer()
    skewed = [row for row in rows if row.emotion in ("happy", "sad")][1:] + [rows[1]] * 3  # 8 happy, 4 sad
    dataset = SpeechDataset(skewed, recognizer.labels)
    happy, sad = (recognizer.emotions.index(name) for name in ("happy", "sad"))
    counts = Counter(dataset.labels["emotion"])
    for balance in (0.0, 1.0):
        config = TrainConfig(class_weights=True, logit_adjustment=2.0, balance=balance)
        places = setup.places_of(dataset, config)
        sampler = LengthBucketBatchSampler(dataset.lengths, seed=0, effective_batch=4, places=places)
        data = setup.Data(dataset, SpeechDataset([]), sampler, {})
        objective = setup.make_objective(recognizer, config, {"emotion": 1.0}, data)
        of = {happy: len(skewed) / 2, sad: len(skewed) / 2} if config.balance else counts
        weights = torch.tensor([len(skewed) / (4 * max(of.get(k, 0), 1)) for k in range(4)])
        assert torch.allclose(objective.class_weights, weights)
        share = [max(of.get(k, 0), 1) / (len(skewed) + 2) for k in range(4)]
        assert torch.allclose(objective.adjustment, 2 * torch.tensor(share).log())


def test_a_million_utterances_of_five_corpora_are_drawn_and_planned_in_seconds():
    count = 1_000_000
    groups = [(f"corpus{i % 5 if i % 7 else 0}", "abcd"[(i * i) % 4]) for i in range(count)]
    lengths = [16_000 + (i * 7919) % 160_000 for i in range(count)]
    began = time.process_time()
    sampler = LengthBucketBatchSampler(lengths, seed=0, effective_batch=32, places=places_of(groups, lengths))
    assert time.process_time() - began < 40
    assert sum(map(len, sampler.plan(epoch=0))) == count


def test_the_plan_knows_changed_lengths_and_a_cropped_utterance_has_no_text(rows):
    recognizer = toy_recognizer()
    dataset = recognizer.dataset(rows)
    config = TrainConfig(augment=("speed:factors=0.8/1.25", "crop:seconds=0.25"), balance=1.0)
    dataset.augment = augmented(config.augment, 0, rows)
    places = setup.places_of(dataset, config)
    sampler = LengthBucketBatchSampler(dataset.lengths, seed=0, effective_batch=4, places=places)
    sampler.set_position(epoch=2)
    cropped = 0
    for item in (item for batch in sampler for item in batch):
        example = dataset[item]
        assert len(example.waveform) == places(2).lengths[item.place] == sampler.lengths[item.place]
        whole = dataset.labels["ctc"][item.index]
        assert example.labels["ctc"] == ([] if len(example.waveform) == 4000 else whole)
        assert example.labels["emotion"] == dataset.labels["emotion"][item.index]
        cropped += len(example.waveform) == 4000
    assert 0 < cropped < len(rows)


def test_transcripts_that_crops_take_away_are_counted_before_training(rows, tmp_path, capsys):
    spoken = sum(bool(row.text) for row in rows)
    for augment, count in ((("crop:seconds=0.1",), spoken), (("speed",), 0)):
        config = replace(QUICK, epochs=1, augment=augment)
        run(toy_recognizer(), rows, config, tmp_path / augment[0][:4])
        said = f"{count} of the {spoken} transcripts in the first epoch belong to cropped utterances"
        assert (said in capsys.readouterr().err) == bool(count)


def test_places_of_recordings_that_cannot_be_read_are_counted_before_training(rows, tmp_path, capsys):
    rows[1].file.write_bytes(b"no sound")
    config = replace(QUICK, epochs=1, balance=1.0, on_bad_audio="skip", max_bad_audio=0.1)
    run(toy_recognizer(), rows, config, tmp_path / "run")
    lost = draw_balanced([(row.corpus, row.emotion) for row in rows], temperature=1.0, seed=0, epoch=0).count(1)
    said = f"{lost} of the 20 places of the first epoch have recordings that cannot be read"
    assert lost > 1 and said in capsys.readouterr().err


@pytest.mark.parametrize("change", [{"focal": 2.0}, {"logit_adjustment": 1.0}])
def test_what_changes_the_loss_of_emotions_is_refused_without_this_head(rows, tmp_path, change):
    with pytest.raises(ConfigError, match=f"{next(iter(change))} changes the loss of emotions"):
        run(toy_recognizer(heads=["ctc", "speaker"]), rows, replace(QUICK, **change), tmp_path / "run")


def test_a_class_that_balance_never_draws_and_the_corpora_that_it_draws_from_are_told(rows, tmp_path, capsys):
    unlabelled = [replace(row, labels={k: v for k, v in row.labels.items() if k != "emotion"}) for row in rows]
    small = [replace(rows[0], id="rare", start=0.0, end=0.1)]
    small += [replace(u, id=f"{u.id}-{k}", start=0.0, end=0.1 + 0.01 * k) for u in unlabelled for k in (1, 2, 3)]
    mixed = [replace(row, extra={"corpus": "small"}) for row in small]
    mixed += [replace(row, extra={"corpus": f"large{i % 5}"}) for i, row in enumerate(rows)]
    run(toy_recognizer(), mixed, replace(QUICK, epochs=1, balance=1.0), tmp_path / "run")
    said = capsys.readouterr().err
    assert "balance: of the corpora small (61), large0 (4), large1 (4)" in said
    assert f"no place in any epoch: {rows[0].emotion} of small" in said


def test_other_corpora_cannot_be_resumed_where_balance_draws_from_them(rows, tmp_path):
    config = replace(QUICK, epochs=1)
    other = [replace(row, extra={"corpus": "third"}) if row.corpus == "small" else row for row in rows]
    for balance, raises in (
        (1.0, pytest.raises(SerError, match=r"data\.train: other corpora")),
        (0.0, nullcontext()),
    ):
        changed = replace(config, balance=balance)
        run(toy_recognizer(), rows, changed, tmp_path / f"{balance}")
        with raises:
            run(toy_recognizer(), other, changed, tmp_path / f"{balance}")


def test_a_run_in_which_no_transcript_survives_is_refused_and_those_that_do_not_fit_are_counted(
    rows, tmp_path, capsys
):
    alone = replace(QUICK, epochs=2, heads="ctc", augment=("crop:seconds=0.1",))
    with pytest.raises(ConfigError, match="crop and speed leave none of the 15 transcripts"):
        run(toy_recognizer(heads=["ctc"]), rows, alone, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    fast = ("speed:factors=2", "speed:factors=2", "speed:factors=2")
    run(toy_recognizer(), rows, replace(QUICK, epochs=1, augment=fast), tmp_path / "fast")
    assert "have more symbols than frames, as their utterances are heard" in capsys.readouterr().err


@pytest.mark.parametrize("augment", [(), ("speed:factors=0.5",)])
def test_speed_is_changed_in_a_run_only_where_the_number_of_updates_does_not_follow_from_lengths(
    rows, tmp_path, capsys, augment
):
    config = replace(
        QUICK, epochs=2, effective_batch=0, batch_seconds=2.0, augment=augment, save_every="1", keep=99
    )
    run(toy_recognizer(), rows, config, tmp_path / "seconds")
    faster = ("speed:factors=2",)
    with pytest.raises(SerError, match="goes on only with the same augment"):
        fit(toy_recognizer(), rows, [], replace(config, augment=faster), tmp_path / "seconds", world=World(),
            allow_changes=["augment"])  # fmt: skip
    assert (tmp_path / "seconds/last").is_dir(), "nothing was set aside"
    config = replace(QUICK, epochs=2, augment=augment, save_every="1", keep=99)
    run(toy_recognizer(), rows, config, tmp_path / "count")
    fit(toy_recognizer(), rows, [], replace(config, augment=faster), tmp_path / "count", world=World(),
        allow_changes=["augment"], resume_from="step-00000002")  # fmt: skip
    assert "the rest of this epoch is planned anew" in capsys.readouterr().err


def test_validation_is_without_logit_adjustment(rows, tmp_path):
    losses = []
    for tau in (0.0, 2.0):
        config = replace(QUICK, epochs=1, rate=1e-12, logit_adjustment=tau)
        recognizer = toy_recognizer(heads=["emotion"])
        few = [row for row in rows if row.emotion != "sad"] + rows[3:4]
        losses.append(fit(recognizer, few, rows, config, tmp_path / f"{tau}", world=World()).evaluation.losses)
    assert losses[0] == pytest.approx(losses[1])

"""The seam for augmentations: what is drawn depends on (seed, epoch, place) alone."""

import pytest
import torch
from toy import write_corpus

from ser.data.augment import AUGMENTATIONS, Augmenter, augmented
from ser.data.dataset import SpeechDataset, collate
from ser.data.labels import Labels
from ser.data.manifest import read_manifest
from ser.data.sampler import Item, LengthBucketBatchSampler, evaluation_batches
from ser.data.workers import decoded
from ser.errors import ConfigError


def gain(waveform, generator):
    return waveform * generator.uniform(0.1, 0.9)


def noise(waveform, generator):
    return waveform + torch.from_numpy(generator.normal(0, 1, len(waveform))).float()


def halve(waveform, generator):
    return waveform[::2]


ROWS = {"gain": gain, "noise": noise, "halve": halve}


@pytest.fixture(autouse=True)
def rows_of_a_user(monkeypatch):
    for name, function in ROWS.items():
        monkeypatch.setitem(AUGMENTATIONS, name, function)


@pytest.fixture(scope="module")
def utterances(tmp_path_factory):
    return read_manifest(write_corpus(tmp_path_factory.mktemp("corpus"), 12))


def heard(utterances, names, *, seed=0, epoch=0, world_size=1, workers=0, update=0):
    """Utterance -> the waveform that training hears in an epoch, over all ranks."""
    waveforms = {}
    for rank in range(world_size):
        dataset = SpeechDataset(utterances, Labels(do_normalize=False))
        dataset.augment = augmented(names, seed) if names else None
        sampler = LengthBucketBatchSampler(
            dataset.lengths, seed=0, effective_batch=4, micro_batch=2, rank=rank, world_size=world_size
        )
        sampler.set_position(epoch=epoch, update=update)
        for batch in decoded(dataset, sampler, collate, workers=workers):
            for index, waveform, count in zip(batch.indices, batch.waveforms, batch.num_samples, strict=True):
                waveforms[index] = waveform[:count]
    return waveforms


def equal(some, others):
    return some.keys() == others.keys() and all(torch.equal(some[i], others[i]) for i in some)


@pytest.mark.parametrize("options", [{"workers": 2}, {"world_size": 2}, {"world_size": 3, "workers": 1}])
def test_draws_are_the_same_for_any_number_of_workers_and_ranks(utterances, options):
    names = ["gain", "noise"]
    assert equal(heard(utterances, names, epoch=1), heard(utterances, names, epoch=1, **options))


def test_a_run_that_is_continued_hears_what_an_uninterrupted_one_hears(utterances):
    whole, rest = (heard(utterances, ["noise"], epoch=2, update=update) for update in (0, 1))
    assert 0 < len(rest) < len(whole) and equal(rest, {i: whole[i] for i in rest})


def test_draws_differ_between_utterances_epochs_and_seeds_and_with_what_stands_before(utterances):
    plain, first = heard(utterances, []), heard(utterances, ["gain"])
    factors = [first[i].abs().max() / plain[i].abs().max() for i in plain]
    assert len({round(factor.item(), 5) for factor in factors}) == len(plain)
    others = [heard(utterances, ["gain"], epoch=1), heard(utterances, ["gain"], seed=1)]
    others += [heard(utterances, ["noise"]), heard(utterances, ["noise", "gain"]), plain]
    assert not any(torch.equal(first[i], other[i]) for other in others for i in first)


def test_without_balance_and_in_evaluation_the_place_is_the_number_of_the_utterance(utterances):
    lengths = SpeechDataset(utterances).lengths
    sampler = LengthBucketBatchSampler(lengths, seed=0, effective_batch=5, micro_batch=2, world_size=2)
    sampler.set_position(epoch=3)
    items = [item for steps in sampler.steps for ranks in steps for batch in ranks for item in batch]
    assert {(item.index, item.place, item.epoch) for item in items} == {(i, i, 3) for i in range(len(lengths))}
    batches = evaluation_batches(lengths, batch_samples=max(lengths))
    assert {item for batch in batches for item in batch} == {Item(i, 1.0, 0, i) for i in range(len(lengths))}


def test_augmentations_stand_before_normalisation(utterances):
    plain, scaled = (SpeechDataset(utterances) for _ in range(2))
    scaled.augment = augmented(["gain"], 0)
    assert torch.allclose(plain[0].waveform, scaled[0].waveform, atol=1e-3)
    assert not torch.equal(plain[0].waveform, scaled[0].waveform)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_augmentation_that_changes_the_length_is_refused(utterances, workers):
    with pytest.raises(ConfigError, match=r"the augmentation 'halve' made .* it must keep the length"):
        heard(utterances, ["gain", "halve"], workers=workers)


def test_an_unknown_name_is_refused_with_the_nearest_one():
    with pytest.raises(ConfigError, match=r"called 'gian' \(did you mean 'gain'\?\); there are: gain, .*, halve"):
        augmented(["gian"], 0)


def test_a_chain_can_be_given_to_a_worker_process():
    import pickle

    chain = pickle.loads(pickle.dumps(augmented(["gain"], 7)))
    assert isinstance(chain, Augmenter)
    x = torch.ones(5)
    assert torch.equal(chain(x, Item(0, place=3)), augmented(["gain"], 7)(x, Item(0, place=3)))

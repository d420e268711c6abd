"""Augmentations: each does what its name says, and what is drawn depends on (seed, epoch, place) alone."""

import os
import pickle
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Annotated

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import write_corpus

from ser.audio import load_audio, resample
from ser.cli import call, execute
from ser.data.augment import (
    AUGMENTATIONS,
    KEPT,
    Augmenter,
    Drawn,
    KeptSounds,
    Recordings,
    Resized,
    Resizing,
    augmented,
    generator_of,
    header_samples,
    mu_law,
)
from ser.data.dataset import SpeechDataset, collate
from ser.data.labels import Labels
from ser.data.manifest import Utterance, read_manifest
from ser.data.sampler import Item, LengthBucketBatchSampler, evaluation_batches
from ser.data.workers import decoded
from ser.errors import AudioError, ConfigError


def softer(waveform, generator):
    return waveform * generator.uniform(0.1, 0.9)


def hiss(waveform, generator):
    return waveform + torch.from_numpy(generator.normal(0, 1, len(waveform))).float()


def halve(waveform, generator):
    return waveform[::2]


ROWS = {"softer": softer, "hiss": hiss, "halve": halve}


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
        dataset.augment = augmented(names, seed, utterances) if names else None
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
    names = ["softer", "hiss"]
    assert equal(heard(utterances, names, epoch=1), heard(utterances, names, epoch=1, **options))


def test_a_run_that_is_continued_hears_what_an_uninterrupted_one_hears(utterances):
    whole, rest = (heard(utterances, ["hiss"], epoch=2, update=update) for update in (0, 1))
    assert 0 < len(rest) < len(whole) and equal(rest, {i: whole[i] for i in rest})


def test_draws_differ_between_utterances_epochs_and_seeds_and_with_what_stands_before(utterances):
    plain, first = heard(utterances, []), heard(utterances, ["softer"])
    factors = [first[i].abs().max() / plain[i].abs().max() for i in plain]
    assert len({round(factor.item(), 5) for factor in factors}) == len(plain)
    others = [heard(utterances, ["softer"], epoch=1), heard(utterances, ["softer"], seed=1)]
    others += [heard(utterances, ["hiss"]), heard(utterances, ["hiss", "softer"]), plain]
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
    scaled.augment = augmented(["softer"], 0)
    assert torch.allclose(plain[0].waveform, scaled[0].waveform, atol=1e-3)
    assert not torch.equal(plain[0].waveform, scaled[0].waveform)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_augmentation_that_changes_the_length_is_refused(utterances, workers):
    with pytest.raises(ConfigError, match=r"the augmentation 'halve' made .* it must keep the length"):
        heard(utterances, ["softer", "halve"], workers=workers)


def test_an_unknown_name_is_refused_with_the_nearest_one():
    with pytest.raises(
        ConfigError, match=r"called 'sofetr' \(did you mean 'softer'\?\); there are: gain, .*, halve"
    ):
        augmented(["sofetr"], 0)


def test_a_chain_can_be_given_to_a_worker_process():
    chain = pickle.loads(pickle.dumps(augmented(["softer"], 7)))
    assert isinstance(chain, Augmenter)
    x = torch.ones(5)
    assert torch.equal(chain(x, Item(0, place=3)), augmented(["softer"], 7)(x, Item(0, place=3)))


# ------------------------------------------------------------------------------------------ what each row does


def speech(seconds=1.5, seed=0, level=0.1):
    """Noise that swells and fades: its power differs from place to place, as that of speech does."""
    count = int(16_000 * seconds)
    swell = 0.1 + np.square(np.sin(np.arange(count) / 2000))
    sound = level * swell * np.random.default_rng(seed).standard_normal(count)
    return torch.from_numpy(sound.astype(np.float32))


def tone(hz, seconds=1.0):
    return 0.3 * torch.sin(2 * torch.pi * hz * torch.arange(int(16_000 * seconds)) / 16_000)


def db(ratio):
    return 10 * np.log10(ratio)


def power(x):
    return float(np.square(np.asarray(x, dtype=np.float64)).mean())


def one(specification, waveform, *, seed=0, epoch=0, place=0, utterances=(), index=0):
    return augmented([specification], seed, utterances)(waveform, Item(index, 1.0, epoch, place))


def band_power(x, low, high):
    spectrum, hz = np.fft.rfft(np.asarray(x, dtype=np.float64)), np.fft.rfftfreq(len(x), 1 / 16_000)
    return float(np.square(np.abs(spectrum[(hz >= low) & (hz < high)])).sum())


@pytest.fixture(scope="module")
def noises(tmp_path_factory):
    """A folder of recordings at other rates, one shorter than any utterance, some in a folder below."""
    folder = tmp_path_factory.mktemp("noises, p=0.5")
    (folder / "below").mkdir()
    for name, rate, count in (("a.wav", 16_000, 40_000), ("below/b.flac", 44_100, 9_000), ("c.WAV", 8_000, 300)):
        soundfile.write(folder / name, 0.2 * np.random.default_rng(count).standard_normal(count), rate)
    (folder / "licence.txt").write_text("mine")
    return folder


def test_gain_is_the_gain_that_was_asked_for_and_clips_nothing():
    x = speech(level=2)
    assert db(power(one("gain:db=7.5", x)) / power(x)) == pytest.approx(7.5, abs=1e-4)
    assert one("gain:db=7.5", x).abs().max() > 3
    drawn = [db(power(one("gain:db=-3..2", x, place=k)) / power(x)) for k in range(200)]
    assert -3 <= min(drawn) < -2.8 and 1.8 < max(drawn) <= 2


@pytest.mark.parametrize("snr", [-5, 7.5, 30])
@pytest.mark.parametrize("kind", ["noise:kind=white", "noise:kind=pink", "noise:{folder}", "babble"])
def test_noise_stands_as_far_below_the_utterance_as_the_snr_says(kind, snr, noises, utterances):
    x = speech()
    name, _, rest = kind.format(folder=f"folder={noises}").partition(":")
    for place in range(4):
        specification = f"{name}:snr={snr}" + (f",{rest}" if rest else "")
        added = one(specification, x, place=place, utterances=utterances) - x
        assert db(power(x) / power(added)) == pytest.approx(snr, abs=0.1)


@pytest.mark.parametrize(("kind", "slope"), [("white", 3), ("pink", 0)])
def test_white_noise_is_flat_and_pink_noise_has_equal_power_in_each_octave(kind, slope):
    x = torch.ones(160_000)
    added = one(f"noise:kind={kind},snr=0", x) - x
    octaves = db([band_power(added, 125 * 2**k, 250 * 2**k) for k in range(6)])
    assert np.diff(octaves) == pytest.approx(5 * [slope], abs=0.5)
    assert band_power(added, 0, 19) < 0.01 * band_power(added, 0, 8000)


def test_a_recording_of_noise_is_heard_from_a_place_that_is_drawn_and_a_short_one_is_repeated(tmp_path):
    x = torch.full((1000,), 0.1)
    ramp = np.arange(1, 30_001) / 40_000
    soundfile.write(tmp_path / "ramp.wav", ramp, 16_000, subtype="FLOAT")
    starts = set()
    for place in range(5):
        added = (one(f"noise:snr=0,folder={tmp_path}", x, place=place) - x).double()
        steps = torch.diff(added)  # one step of the ramp, as loud as it is made
        assert steps.std() < 1e-3 * steps.mean() + 1e-7
        starts.add(round(float(added[0] / steps.mean())))
    assert len(starts) == 5 and min(starts) >= 0 and max(starts) <= 29_000
    soundfile.write(tmp_path / "ramp.wav", [0.5, -0.5, 0.25], 16_000, subtype="FLOAT")
    KEPT.kept.clear()
    header_samples.cache_clear()
    added = one(f"noise:snr=0,folder={tmp_path}", x) - x
    assert torch.allclose(added[:900], added[3:903], atol=1e-6) and not torch.allclose(added[:900], added[1:901])


def test_babble_is_other_utterances_and_never_the_one_itself(tmp_path):
    rows = [Utterance(str(k), tmp_path / f"{k}.wav") for k in range(4)]
    for k, row in enumerate(rows):
        soundfile.write(row.file, tone(500 * (k + 1), 0.5), 16_000)
    x, heard = torch.full((8000,), 0.1), set()
    for index in range(4):
        for place in range(30):
            added = one("babble:voices=1,snr=0", x, index=index, place=place, utterances=rows) - x
            peak = np.abs(np.fft.rfft(added.numpy())).argmax() * 2
            heard.add((index, round(peak / 500) - 1))
    assert heard == {(index, other) for index in range(4) for other in range(4) if other != index}


def test_babble_of_many_voices_has_them_all_equally_loud(tmp_path):
    rows = [Utterance(str(k), tmp_path / f"{k}.wav") for k in range(3)]
    for k, row in enumerate(rows):
        soundfile.write(row.file, (0.01 + 0.3 * k) * tone(500 * (k + 1), 0.5), 16_000, subtype="FLOAT")
    x = torch.full((8000,), 0.1)
    added = [one("babble:voices=2,snr=0", x, index=2, place=k, utterances=rows) - x for k in range(20)]
    first = [band_power(y, 450, 550) / band_power(y, 0, 8000) for y in added]
    assert {round(share, 1) for share in first} <= {0.0, 0.5, 1.0} and 0.5 in {round(share, 1) for share in first}


def test_an_utterance_that_cannot_be_read_is_silence_in_babble(tmp_path):
    rows = [Utterance(str(k), tmp_path / f"{k}.wav") for k in range(2)]
    assert torch.equal(one("babble", speech(), utterances=rows), speech())


def schroeder(response):
    """The reverberation time, from where the energy that is left has fallen by 5 and by 25 dB."""
    left = db(np.cumsum(np.square(response.astype(np.float64))[::-1])[::-1] / np.square(response).sum() + 1e-12)
    return 3 * (np.argmax(left < -25) - np.argmax(left < -5)) / 16_000


@pytest.mark.parametrize("rt60", [0.2, 0.5, 0.8])
def test_a_room_dies_away_in_the_time_that_was_asked_for_and_the_direct_sound_stands_out_of_it(rt60):
    click = torch.zeros(32_000)
    click[500] = 1
    for place in range(3):
        heard = one(f"reverb:rt60={rt60},drr=3", click, place=place).numpy()
        assert np.abs(heard).argmax() == 500 and np.abs(heard[:500]).max() < 1e-6 * heard[500]
        assert schroeder(heard[501:]) == pytest.approx(rt60, rel=0.2)
        assert db(heard[500] ** 2 / np.square(heard[501:]).sum()) == pytest.approx(3, abs=0.1)
        assert power(heard) == pytest.approx(power(click), rel=1e-5)


def test_a_given_room_is_convolved_from_its_direct_sound_on(tmp_path):
    response = np.zeros(1000)
    response[[300, 400, 900]] = 1, -0.5, 0.25
    soundfile.write(tmp_path / "room.wav", response, 16_000, subtype="FLOAT")
    x = speech(0.3)
    expected = np.convolve(x.numpy().astype(np.float64), response[300:])[: len(x)]
    heard = one(f"reverb:folder={tmp_path}", x).numpy()
    assert heard == pytest.approx(expected * np.sqrt(power(x) / power(expected)), abs=1e-6)


def test_a_telephone_passes_300_to_3400_hz_at_eight_bits():
    x = one("noise:kind=white,snr=-50", speech(4))
    heard = one("telephone", x)
    for low, high in ((0, 300), (3400, 4000), (4000, 8000)):
        # what is coded makes noise 38 dB below, which is kept out too
        assert band_power(heard, low, high) < 1e-5 * band_power(heard, 300, 3400) * (high - low) / 3100
    assert db(band_power(heard, 400, 3300) / band_power(x, 400, 3300)) == pytest.approx(0, abs=0.1)
    quantised = one("telephone", tone(1000)) - tone(1000)
    assert 30 < db(power(tone(1000)) / power(quantised[800:-800])) < 45  # of eight bits of mu-law
    assert len(np.unique(mu_law())) == 255 and mu_law()[0] == 0
    soft = one("telephone", 0.001 * speech())
    assert torch.allclose(soft, 0.001 * one("telephone", speech()), atol=2e-6)


def test_clipping_cuts_at_its_level_and_changes_nothing_below():
    x = speech()
    level = float(x.abs().max()) * 10 ** (-6 / 20)
    heard = one("clipping:db=6", x)
    assert heard.max() == -heard.min() == pytest.approx(level)
    below = x.abs() < level
    assert torch.equal(heard[below], x[below]) and (heard[~below].abs() == heard.max()).all() and not below.all()


@pytest.mark.parametrize("factor", [0.5, 0.9, 0.95, 1.1, 1.337, 2])
def test_speed_changes_pitch_and_length_and_nothing_else(factor):
    heard = one(f"speed:factors={factor}", tone(1000, 2))
    assert len(heard) == -(-32_000 * 16_000 // round(16_000 * factor))
    middle = heard[len(heard) // 4 :][:8000].numpy() * np.hanning(8000)
    assert np.abs(np.fft.rfft(middle)).argmax() * 2 == pytest.approx(1000 * factor, abs=2)
    assert power(heard[800:-800]) == pytest.approx(power(tone(1000)), rel=0.01)
    if factor == 1.337:  # which the resampling of recordings takes for a number near it
        return
    # beside that resampling, where neither has an edge or the end of the band
    x = one("telephone", speech())
    expected = resample(x, round(16_000 * factor))
    played = one(f"speed:factors={factor}", x)
    assert len(played) == len(expected)
    assert (played - expected)[400:-400].abs().max() < 2e-3 * expected.abs().max()


def test_speed_lets_the_end_of_the_band_fade_out():
    heard = one("speed:factors=1.1", one("noise:kind=white,snr=-50", speech(4)))
    powers = [band_power(heard, low, low + 50) for low in (7000, 7500, 7700, 7950)]
    assert 0.8 < powers[1] / powers[0] < 1.25 and 0.2 < powers[2] / powers[0] < 0.95
    assert powers[3] < 0.01 * powers[0]


def test_speed_draws_among_its_factors():
    chain = augmented(["speed"], 0)
    lengths = Counter(chain.length(16_000, 0, place) for place in range(300))
    assert lengths.keys() == {17_778, 16_000, 14_546} and min(lengths.values()) > 70
    assert torch.equal(chain(tone(1), Item(0, place=7)), tone(1)) is (chain.length(16_000, 0, 7) == 16_000)


def test_a_crop_is_a_part_and_a_shorter_utterance_stays_whole():
    x = torch.arange(48_000.0)
    chain = augmented(["crop:seconds=1..2"], 0)
    starts = set()
    for place in range(50):
        heard = chain(x, Item(0, 1.0, 0, place))
        assert 16_000 <= len(heard) <= 32_000 and torch.equal(heard, x[int(heard[0]) :][: len(heard)])
        assert not chain.keeps_text(48_000, 0, place)
        starts.add(int(heard[0]))
        assert chain.length(15_999, 0, place) == 15_999 and chain.keeps_text(15_999, 0, place)
    assert len(starts) > 45 and min(starts) < 4000 and max(starts) > 20_000


def test_only_a_crop_loses_the_text():
    assert all(augmented(["speed", "gain"], 0).keeps_text(48_000, 0, place) for place in range(50))
    both = augmented(["speed", "crop:seconds=1,p=0.5"], 0)
    kept = [both.keeps_text(48_000, 0, place) for place in range(100)]
    assert kept == [both.length(48_000, 0, place) > 16_000 for place in range(100)] and 30 < sum(kept) < 70


# ------------------------------------------------------------------------------------------- how they are drawn

ALL = ["gain", "noise", "babble", "reverb", "telephone:p=0.5", "clipping:p=0.5", "speed"]


def test_everything_is_the_same_for_any_number_of_workers_and_ranks_and_after_an_interruption(utterances):
    def all_on(**options):
        return heard(utterances, ALL, epoch=1, **options)

    whole = all_on()
    for options in ({"workers": 1}, {"workers": 4}, {"world_size": 2}, {"world_size": 2, "workers": 1}):
        assert equal(whole, all_on(**options)), options
    rest = all_on(update=1)
    assert 0 < len(rest) < len(whole) and equal(rest, {i: whole[i] for i in rest})


PROGRAM = """
import hashlib, pickle, sys, torch
from ser.data.sampler import Item
torch.set_num_threads(int(sys.argv[2]))
with open(sys.argv[1], "rb") as file:
    chain, waveforms, items = pickle.load(file)
for item in items[:: int(sys.argv[3])]:
    bits = chain(waveforms[item.index], item).numpy().tobytes()
    print(item.epoch, item.place, hashlib.sha256(bits).hexdigest())
"""


def test_the_same_bits_come_in_another_process_another_order_and_with_more_threads(tmp_path, utterances):
    waveforms = [speech(seconds, level=1) for seconds in (0.03, 0.5, 4.1, 12)]
    items = [Item(place % 4, 1.0, epoch, place) for epoch in range(2) for place in range(8)]
    said = []
    soundfile.write(tmp_path / "noise.wav", speech(3), 16_000)  # at other rates torchaudio may depend on threads
    chain = augmented([*ALL, f"noise:folder={tmp_path}", "reverb:rt60=1"], 5, utterances)
    (tmp_path / "chain").write_bytes(pickle.dumps((chain, waveforms, items)))
    for threads, step in ((1, 1), (2, 1), (3, -1)):
        command = [sys.executable, "-c", PROGRAM, tmp_path / "chain", str(threads), str(step)]
        env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        said.append(sorted(done.stdout.splitlines()))
    assert said[0] == said[1] == said[2] and len(set(said[0])) == 16


def test_p_is_the_share_of_utterances_and_does_not_change_what_else_is_drawn():
    x = torch.ones(400)
    always = [one("gain", x, place=place) for place in range(400)]
    half = [one("gain:p=0.25", x, place=place) for place in range(400)]
    applied = [not torch.equal(y, x) for y in half]
    assert 70 < sum(applied) < 130
    assert all(torch.equal(a, b) for a, b, is_on in zip(always, half, applied, strict=True) if is_on)
    assert torch.equal(one("gain:p=0", x), x)


def test_what_is_drawn_depends_on_seed_epoch_and_place_each():
    places = [(seed, epoch, place) for seed in (0, 1, 12) for epoch in (0, 1, 12) for place in (0, 1, 12, 2**40)]
    x = torch.ones(400)
    factors = [float(one("gain", x, seed=seed, epoch=epoch, place=place)[0]) for seed, epoch, place in places]
    assert len(set(factors)) == len(places)


def test_rows_of_a_list_draw_apart_and_a_row_may_stand_twice():
    x = torch.ones(400)
    once, twice = augmented(["gain"], 0), augmented(["gain", "gain"], 0)
    factors = [float(chain(x, Item(0, place=3))[0]) for chain in (once, twice)]
    assert factors[1] / factors[0] != pytest.approx(factors[0])
    other = augmented(["reverb", "gain"], 0)
    assert other.words(400, Item(0, place=3))[1] == twice.words(400, Item(0, place=3))[1]


def test_lengths_are_known_without_generators_where_no_row_resizes(monkeypatch):
    assert augmented(["speed"], 0).resizes and augmented(["gain", "crop:p=0"], 0).resizes
    chain = augmented(["gain", "noise"], 0)
    assert not chain.resizes
    monkeypatch.setattr("ser.data.augment.generator_of", None)
    assert chain.length(1234, 5, 6) == 1234 and chain.keeps_text(1234, 5, 6)


def test_the_numbers_that_are_drawn_stay_the_same_from_release_to_release():
    assert generator_of(1, 2, 3, 4).random(2).tolist() == [0.488375698361463, 0.7210581380782364]
    assert generator_of(0, 2**80, -1).bit_generator.state != generator_of(0, 2**80, 1).bit_generator.state


ROWS_OF_OURS = ["gain:db=-100..40", "noise:snr=-50..100", "noise:kind=pink,p=0.5", "babble", "telephone"]
ROWS_OF_OURS += ["reverb:rt60=0.05..2,drr=-20..40", "clipping:db=0..60", "speed:factors=0.5/0.9/1.1/2"]
ROWS_OF_OURS += ["crop:seconds=0.025..0.5"]
SOUNDS = st.sampled_from(["silence", "one", "tiny", "loud", "speech", "hum", "click"])


@settings(deadline=None, max_examples=150, derandomize=True)
@given(
    st.lists(st.sampled_from(ROWS_OF_OURS), max_size=5),
    SOUNDS,
    st.sampled_from([1, 7, 399, 400, 401, 3000, 16_001]),
    st.integers(0, 50),
)
def test_lengths_are_as_planned_and_nothing_is_ever_not_finite(utterances, specifications, sound, count, place):
    ramp = torch.arange(count)
    kinds = {"silence": 0.0 * ramp, "one": torch.ones(count), "tiny": torch.full((count,), 1e-42)}
    kinds |= {"loud": 100.0 * (-1) ** ramp, "speech": speech(1.1)[:count], "hum": torch.sin(ramp / 50)}
    kinds |= {"click": (ramp == count // 2).float()}
    x, before = kinds[sound], kinds[sound].clone()
    chain = augmented(specifications, 0, utterances)
    y = chain(x, Item(0, 1.0, 2, place))
    assert len(y) == chain.length(count, 2, place) and y.dtype == torch.float32 and y.isfinite().all()
    assert len(y) >= min(count, 400) and torch.equal(x, before)
    if sound == "silence":
        assert not y.any()
    if not specifications:
        assert torch.equal(y, x)


# ---------------------------------------------------------------------------------------------- specifications


@pytest.mark.parametrize(
    ("specification", "message"),
    [
        ("nois", r"called 'nois' \(did you mean 'noise'\?\); there are: gain, noise, babble"),
        (
            "noise:srn=5",
            r"'noise:srn=5': noise has no option 'srn' \(did you mean 'snr'\?\); its options are: p, snr",
        ),
        ("noise:snr", r"snr is ''; expected a number from -50 to 100, or two of them as LOW..HIGH"),
        ("noise:snr=20..5", "snr is '20..5'; expected"),
        ("noise:snr=101", "snr is '101'; expected"),
        ("noise:snr=nan", "snr is 'nan'; expected"),
        ("noise:snr=5,snr=6", "snr is given twice"),
        ("noise:kind=blue", "kind is 'blue'; expected white or pink"),
        ("noise:p=1.5", "p is '1.5'; expected a number from 0 to 1"),
        ("babble:voices=1.5", "voices is '1.5'; expected a whole number from 1 to 20"),
        ("speed:factors=0.9/3", "factors is '0.9/3'; expected numbers from 0.5 to 2"),
        ("crop:seconds=0", "seconds is '0'; expected"),
        ("gain,noise", "no augmentation is called 'gain,noise'"),
        ("noise:folder={tmp_path}/niose", r"niose: no such folder \(did you mean 'noise'\?\)"),
        ("noise:folder={tmp_path}/noise,p=0.5", "no such folder .*folder= reaches to the end"),
        ("noise:folder={tmp_path}/noise", r"no recordings \(.wav, .*it has 1 other files, such as a.txt"),
        ("noise:folder=", "folder is ''; expected the path of a folder"),
        ("noise:kind=pink,folder={tmp_path}", "folder replaces kind"),
        ("reverb:drr=3,folder={tmp_path}", "folder replaces drr"),
    ],
)
def test_a_specification_that_cannot_be_is_refused_with_what_there_is(specification, message, tmp_path):
    (tmp_path / "noise").mkdir()
    (tmp_path / "noise" / "a.txt").write_text("")
    if message.startswith("folder replaces"):
        soundfile.write(tmp_path / "a.wav", np.zeros(10), 16_000)
    with pytest.raises(ConfigError, match=message):
        augmented([specification.format(tmp_path=tmp_path)], 0)


def test_the_path_of_a_folder_may_hold_commas_and_equals_signs(noises):
    assert "," in noises.name and "=" in noises.name
    chain = augmented([f"noise:snr=3,folder={noises}"], 0)
    (folder,) = (option for option in chain.rows[0].options.values() if isinstance(option, Recordings))
    assert folder.files == tuple(str(noises / name) for name in ("a.wav", "below/b.flac", "c.WAV")), "in order"
    said = {chain.words(1000, Item(0, place=k))[0] for k in range(30)}
    assert said == {f"noise: SNR 3.0 dB, {name}" for name in ("a.wav", "b.flac", "c.WAV")}


def echo(
    waveform, generator, *, delay=100, loss=0.5, both: bool = True, name="x", level: Annotated[float, Drawn(1, 2)]
):
    return waveform * level if (delay, loss, both, name) == (7, 0.25, False, "a") else waveform


def test_a_row_of_a_user_has_options_too(monkeypatch):
    monkeypatch.setitem(AUGMENTATIONS, "echo", echo)
    heard = one("echo:delay=7,loss=0.25,both=False,name=a,level=3", torch.ones(5))
    assert torch.equal(heard, torch.full((5,), 3.0))
    assert torch.equal(one("echo", torch.ones(5)), torch.ones(5))
    for bad in ("delay=1.5", "loss=x", "both=yes"):
        with pytest.raises(ConfigError, match="expected"):
            augmented([f"echo:{bad}"], 0)
    monkeypatch.setitem(AUGMENTATIONS, "echo", lambda waveform, generator, *, delay: waveform)
    with pytest.raises(ConfigError, match="'delay' has neither a default nor a description"):
        augmented(["echo"], 0)


def halved(num_samples, generator):
    return Resized(num_samples // 2, 0, "half")


@pytest.mark.parametrize("step", [2, 3])
def test_a_row_of_a_user_may_change_the_length_that_it_draws_and_no_other(monkeypatch, step):
    row = Resizing(halved, lambda waveform, how: waveform[::step], keeps_text=False)
    monkeypatch.setitem(AUGMENTATIONS, "half", row)
    if step == 2:
        assert len(one("half", torch.ones(1000))) == augmented(["half"], 0).length(1000, 0, 0) == 500
    else:
        with pytest.raises(ConfigError, match=r"'half' made \(334,\) of a waveform of \(1000,\), not \(500,\)"):
            one("half", torch.ones(1000))


@pytest.mark.parametrize(("shortest", "left"), [(500, 500), (501, 1000)])
def test_what_would_leave_less_than_a_model_s_first_frame_is_not_done(monkeypatch, shortest, left):
    monkeypatch.setitem(AUGMENTATIONS, "half", Resizing(halved, lambda waveform, how: waveform[::2], False))
    chain = augmented(["half", "gain:db=6"], 0, shortest=shortest)
    assert len(chain(torch.ones(1000), Item(0))) == chain.length(1000, 0, 0) == left
    assert chain.keeps_text(1000, 0, 0) == (left == 1000)


# -------------------------------------------------------------------------------------------------- recordings


@pytest.mark.parametrize("row", ["noise", "reverb"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_recording_of_noise_that_cannot_be_read_ends_the_run_and_is_named(tmp_path, utterances, row, workers):
    (tmp_path / "broken.wav").write_bytes(b"RIFF, but no more")
    with pytest.raises(ConfigError, match=r"^a recording .*an augmentation needs cannot be used: .*broken\.wav"):
        heard(utterances, [f"{row}:folder={tmp_path}"], workers=workers)


def test_recordings_of_noise_are_decoded_once_as_long_as_they_fit(noises, monkeypatch):
    read = []
    monkeypatch.setattr(
        "ser.data.augment.load_audio", lambda file, **part: read.append(file) or load_audio(file, **part)
    )
    kept = KeptSounds(300_000)
    for _ in range(3):
        for name in ("a.wav", "below/b.flac"):
            kept.read(noises / name)
    assert len(read) == 2 and kept.size == sum(sound.nbytes for sound in kept.kept.values()) > 160_000
    kept.most = 165_000
    for name in ("c.WAV", "c.WAV", "below/b.flac", "a.wav", "below/b.flac"):
        kept.read(noises / name)
    assert [file.name for file in read[2:]] == ["c.WAV", "a.wav", "b.flac"]
    assert kept.size <= kept.most and kept.size == sum(sound.nbytes for sound in kept.kept.values())


def test_of_a_long_recording_of_noise_only_the_part_that_is_heard_is_read(tmp_path, monkeypatch):
    soundfile.write(tmp_path / "long.wav", np.sin(np.arange(88_200) / 50), 44_100)
    parts = []
    monkeypatch.setattr(
        "ser.data.augment.load_audio", lambda file, **part: parts.append(part) or load_audio(file, **part)
    )
    monkeypatch.setattr("ser.data.augment.KEPT_SAMPLES", 16_000)
    x = speech(0.5)
    added = [one(f"noise:snr=0,folder={tmp_path}", x, place=place) - x for place in range(20)]
    assert all(part["end"] - part["start"] == pytest.approx(0.5) and part["end"] <= 2 for part in parts)
    assert len({part["start"] for part in parts}) == 20
    assert all(db(power(x) / power(y)) == pytest.approx(0, abs=0.1) for y in added)


def test_babble_needs_other_utterances(utterances):
    assert augmented(["babble"], 0).length(100, 0, 0) == 100
    with pytest.raises(ConfigError, match="'babble' is made of other utterances, and there is only this one"):
        augmented(["babble"], 0, utterances[:1])
    with pytest.raises(ConfigError, match="'babble' needs other utterances, and there are none"):
        one("babble", speech())
    assert augmented(["gain"], 0, utterances).utterances == ()


# ------------------------------------------------------------------------------------------------- the command


def command(*words):
    return call("augment", [str(word) for word in words])


def test_the_command_writes_what_training_would_hear_and_says_what_was_drawn(tmp_path, utterances, capsys):
    files = [row.file for row in utterances[:2]]
    specifications = ["gain", "noise:kind=pink", "babble:voices=1", "reverb", "telephone", "clipping", "speed"]
    specifications += ["crop:seconds=0.1"]
    assert (
        command(*files, "--augment", *specifications, "--play-to", tmp_path / "heard", "--epochs", 2, "--seed", 3)
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    chain = augmented(specifications, 3, utterances[:2])
    expected = [f"{file.stem}-{epoch}-{place}.wav" for place, file in enumerate(files) for epoch in range(2)]
    assert [Path(line.split()[0]).name for line in lines] == expected
    for name, line in zip(expected, lines, strict=True):
        epoch, place = map(int, name.removesuffix(".wav").split("-")[1:])
        x = load_audio(files[place])
        y = chain(x, Item(place, 1.0, epoch, place))
        samples, rate = soundfile.read(tmp_path / "heard" / name)
        assert rate == 16_000 and samples == pytest.approx(y.numpy(), abs=1 / 32768)
        assert soundfile.info(tmp_path / "heard" / name).subtype == "PCM_16"
        assert (
            f"  {len(y) / 16_000:.2f} s  " + "; ".join(chain.words(len(x), Item(place, 1.0, epoch, place))) in line
        )
    wanted = (
        r"gain: [+-]\d.\d dB; noise: SNR \d+.\d dB, pink; babble: SNR \d+.\d dB, voices 1; reverb: RT60 0.\d\d s, "
    )
    wanted += (
        r"direct sound \+\d+.\d dB; telephone; clipping: \d+.\d dB below the peak; speed: factor (0.9|1|1.1); "
    )
    assert all(re.search(wanted + r"crop: 0.10 s from 0.\d\d s on$", line) for line in lines)


def test_the_command_makes_softer_what_would_not_fit(tmp_path, utterances, capsys):
    assert command(utterances[0].file, "--augment", "gain:db=40", "--play-to", tmp_path) == 0
    assert re.search(
        r"gain: \+40.0 dB; written \d+\.\d dB softer, as it passes full scale$", capsys.readouterr().out.strip()
    )
    (file,) = tmp_path.iterdir()
    samples, _ = soundfile.read(file)
    assert np.abs(samples).max() == pytest.approx(1, abs=1e-3) and power(samples) < 0.9
    assert command(utterances[0].file, "--augment", "gain:p=0", "--play-to", tmp_path / "same") == 0
    assert capsys.readouterr().out.strip().endswith("as it is")
    (file,) = (tmp_path / "same").iterdir()
    assert np.array_equal(soundfile.read(file)[0], soundfile.read(utterances[0].file)[0])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{file}", "--augment", "gain"], "/train0-0-0.wav would be replaced; give another folder"),
        (["{file}x", "--augment", "gain"], "no such file"),
        (["{file}", "{file}x", "--augment", "gain"], "no such file"),
        (["{file}", "--augment", "gian"], "no augmentation is called 'gian'"),
        (["{file}", "--augment", "babble", "--seed", "1"], "'babble' is made of other utterances"),
        (["{file}", "--augment", "gain", "--epochs", "0"], "expected at least 1 epoch"),
        (["{file}", "--augment", "gain", "--seed", "-1"], "expected at least 1 epoch and a seed of at least 0"),
    ],
)
def test_the_command_refuses_in_one_line_and_replaces_nothing(tmp_path, utterances, words, message):
    if "replaced" in message or "seed" in message:
        (tmp_path / "train0-0-0.wav").write_text("mine")
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}
    words = [word.format(file=utterances[0].file) for word in words]
    with pytest.raises(SystemExit) as end:
        command(*words, "--play-to", tmp_path)
    assert message in end.value.code and "\n" not in end.value.code
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before


def test_the_command_writes_nothing_where_a_later_recording_cannot_be_decoded(tmp_path, utterances):
    good, bad = utterances[0].file, tmp_path / "bad.flac"
    soundfile.write(bad, speech(1), 16_000)
    bad.write_bytes(bad.read_bytes()[:2000])
    with pytest.raises(AudioError, match=r"bad\.flac"):
        execute("augment", [str(good), str(bad), "--augment", "gain", "--play-to", str(tmp_path / "heard")])
    assert not list(tmp_path.glob("heard/*"))

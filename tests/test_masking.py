"""SpecAugment: masks are a function of (seed, epoch, utterance), of the share asked for, and never whole."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from ser.errors import ConfigError
from ser.models.masking import draw_spans, spec_augment
from ser.models.wav2vec2 import Wav2Vec2

quick = settings(max_examples=60, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])


def masked(config, **changes):
    settings = {"mask_time_prob": 0.3, "mask_time_length": 5, "mask_feature_prob": 0.3, "mask_feature_length": 4}
    return replace(config, **(settings | changes))


def runs(mask):
    """Lengths of the runs of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], np.asarray(mask, dtype=int), [0]])))
    return (edges[1::2] - edges[::2]).tolist()


# ---------------------------------------------------------------------------------------- a function of what


@quick
@given(
    frames=st.lists(st.integers(1, 120), min_size=2, max_size=5),
    seed=st.integers(0, 2**31),
    epoch=st.integers(0, 1000),
    data=st.data(),
)
def test_masks_of_an_utterance_do_not_depend_on_the_batch(styles, frames, seed, epoch, data):
    config = masked(styles["base-style"])
    numbers = data.draw(st.lists(st.integers(0, 10**6), min_size=len(frames), max_size=len(frames), unique=True))
    order = data.draw(st.permutations(range(len(frames))))
    time, feature = spec_augment(
        config, torch.tensor([frames[i] for i in order]), [numbers[i] for i in order], seed=seed, epoch=epoch
    )
    assert time.shape == (len(frames), max(frames)) and time.dtype == torch.bool
    assert feature.shape == (len(frames), config.hidden_size) and feature.dtype == torch.bool
    torch.manual_seed(123)  # what else was drawn does not matter either
    np.random.seed(321)
    for row, i in enumerate(order):
        alone = spec_augment(config, torch.tensor([frames[i]]), [numbers[i]], seed=seed, epoch=epoch)
        assert torch.equal(time[row, : frames[i]], alone[0][0])
        assert torch.equal(feature[row], alone[1][0])
        assert not time[row, frames[i] :].any()


def test_drawing_masks_leaves_the_random_state_alone(styles):
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    spec_augment(masked(styles["base-style"]), torch.tensor([50]), [0], seed=1, epoch=2)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()


def test_masks_change_with_the_seed_the_epoch_and_the_utterance(styles):
    config, frames = masked(styles["base-style"], hidden_size=480), torch.tensor([400])
    draws = {
        tuple(spec_augment(config, frames, [utterance], seed=seed, epoch=epoch)[part][0].tolist())
        for part in (0, 1)
        for seed in (0, 1)
        for epoch in (0, 1)
        for utterance in (0, 1)
    }
    assert len(draws) == 16


# ---------------------------------------------------------------------------------------- how much


@pytest.mark.parametrize(
    ("prob", "span", "min_masks", "length"),
    [
        (0.05, 10, 2, 300),
        (0.05, 10, 0, 333),
        (0.3, 10, 0, 100),
        (0.5, 5, 1, 150),
        (0.65, 10, 2, 400),
        (0.08, 3, 0, 64),
    ],
)
def test_the_masked_share_is_that_of_the_reference(prob, span, min_masks, length):
    modeling = pytest.importorskip("transformers.models.wav2vec2.modeling_wav2vec2")
    draws = 1500
    np.random.seed(0)
    reference = np.array(
        [modeling._compute_mask_indices((1, length), prob, span, min_masks=min_masks)[0] for _ in range(draws)]
    )
    ours = np.array(
        [
            draw_spans(length, prob=prob, span=span, min_masks=min_masks, generator=np.random.default_rng(i))
            for i in range(draws)
        ]
    )
    shares = ours.mean(1), reference.mean(1)
    error = np.hypot(*(share.std() for share in shares)) / draws**0.5
    assert abs(shares[0].mean() - shares[1].mean()) < 3 * error + 0.015 * prob  # 3 standard errors and rounding
    assert shares[0].std() == pytest.approx(shares[1].std(), rel=0.15, abs=0.01)
    assert shares[0].mean() <= prob + min_masks * span / length
    # and where: every place about as often, save the edges, which fewer spans reach
    middle = slice(span, length - span)
    assert abs(ours.mean(0)[middle] - reference.mean(0)[middle].mean()).max() < 0.06


def test_spans_have_the_length_asked_for_where_there_is_room():
    for seed in range(200):
        mask = draw_spans(200, prob=0.1, span=10, min_masks=1, generator=np.random.default_rng(seed))
        assert all(length >= 10 for length in runs(mask))
        assert 10 <= mask.sum() <= 20


def test_starts_are_distinct_so_that_many_spans_of_one_mask_their_exact_share():
    for seed in range(50):
        mask = draw_spans(100, prob=0.5, span=1, min_masks=0, generator=np.random.default_rng(seed))
        assert mask.sum() == 50


def test_a_minimum_of_masks_is_kept_where_the_share_rounds_to_none():
    for seed in range(100):
        mask = draw_spans(200, prob=1e-9, span=10, min_masks=2, generator=np.random.default_rng(seed))
        assert 11 <= mask.sum() <= 20  # two distinct starts
    assert not draw_spans(200, prob=1e-9, span=10, min_masks=0, generator=np.random.default_rng(0)).any()


def test_the_count_rounds_up_or_down_at_random():
    """0.05 x 100 / 10 = half a span: about every second utterance has one."""
    found = [
        draw_spans(100, prob=0.05, span=10, min_masks=0, generator=np.random.default_rng(i)).sum()
        for i in range(4000)
    ]
    assert set(found) == {0, 10}
    assert np.mean(found) == pytest.approx(5, rel=0.05)


def test_the_whole_axis_can_be_reached():
    reached = np.zeros(20, dtype=bool)
    for seed in range(200):
        reached |= draw_spans(20, prob=0.3, span=3, min_masks=1, generator=np.random.default_rng(seed))
    assert reached.all()


# ---------------------------------------------------------------------------------------- short and off


@quick
@given(
    prob=st.floats(0, 1),
    span=st.integers(1, 70),
    min_masks=st.integers(0, 10),
    seed=st.integers(0, 10**6),
)
def test_a_short_utterance_is_never_an_error_and_never_masked_whole(prob, span, min_masks, seed):
    for length in range(1, 31):
        mask = draw_spans(
            length, prob=prob, span=span, min_masks=min_masks, generator=np.random.default_rng([seed, length])
        )
        assert mask.shape == (length,)
        assert not mask.all()
        if prob <= 0.5:
            assert mask.sum() <= max(1, round(length / 2))
        if length > 1 and prob > 0 and min_masks:
            assert mask.any()


def test_a_probability_of_zero_masks_nothing(styles):
    none = {"mask_time_prob": 0.0, "mask_feature_prob": 0.0, "mask_time_min_masks": 2, "mask_feature_min_masks": 2}
    frames, batch = torch.tensor([100, 50]), [0, 1]
    assert spec_augment(masked(styles["base-style"], **none), frames, batch, seed=0, epoch=0) == (None, None)
    config = masked(styles["base-style"], mask_time_prob=0.0, mask_time_min_masks=2)
    time, feature = spec_augment(config, frames, batch, seed=0, epoch=0)
    assert time is None and feature.any()
    time, feature = spec_augment(
        masked(styles["base-style"], mask_feature_prob=0.0), frames, batch, seed=0, epoch=0
    )
    assert time.any() and feature is None
    assert not draw_spans(100, prob=0.0, span=5, min_masks=3, generator=np.random.default_rng(0)).any()


def test_spec_augment_switched_off_masks_nothing(styles):
    config = masked(styles["base-style"], apply_spec_augment=False)
    assert spec_augment(config, torch.tensor([100]), [0], seed=0, epoch=0) == (None, None)


# ---------------------------------------------------------------------------------------- applied


def test_masked_frames_hold_the_mask_embedding_and_masked_channels_zero(config, randomise):
    model = randomise(Wav2Vec2(masked(config))).eval()
    hidden = torch.randn(2, 7, config.hidden_size, generator=torch.Generator().manual_seed(0))
    time = torch.zeros(2, 7, dtype=torch.bool)
    time[0, 1:3] = True
    feature = torch.zeros(2, config.hidden_size, dtype=torch.bool)
    feature[1, 4] = True
    feature[0, 2] = True
    found = model._mask(hidden, time, feature)
    wanted = hidden.clone()
    wanted[0, 1:3] = model.masked_spec_embed.detach()
    wanted[1, :, 4] = 0
    wanted[0, :, 2] = 0  # after the mask embedding, as in the reference
    assert torch.equal(found, wanted)


def test_masks_are_applied_only_where_they_are_given(config, randomise):
    """The model draws nothing by itself: masks come from outside, in training too."""
    off = dict.fromkeys(("hidden_dropout", "attention_dropout", "activation_dropout", "layerdrop"), 0.0)
    model = randomise(Wav2Vec2(masked(config, **off)))
    x = torch.randn(1, 4000, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model.train()(x)[0], model.eval()(x)[0])


def test_a_batch_without_time_masks_keeps_the_mask_embedding_in_the_graph(config, randomise):
    model = randomise(Wav2Vec2(masked(config))).train()
    x = torch.randn(1, 4000, generator=torch.Generator().manual_seed(0))
    model(x)[0].sum().backward()
    assert model.masked_spec_embed.grad is not None and not model.masked_spec_embed.grad.any()
    time = torch.zeros(1, int(config.num_frames(torch.tensor(4000))), dtype=torch.bool)
    time[0, 0] = True
    model.zero_grad()
    model(x, mask_time=time)[0].square().sum().backward()
    assert model.masked_spec_embed.grad.any()


def test_masking_time_without_a_mask_embedding_is_an_error_that_says_so(config):
    model = Wav2Vec2(masked(config, mask_time_prob=0.0, mask_feature_prob=0.0))
    assert "masked_spec_embed" not in model.state_dict()
    with pytest.raises(ConfigError, match="mask_time needs a mask embedding"):
        model(torch.zeros(1, 400), mask_time=torch.ones(1, 1, dtype=torch.bool))

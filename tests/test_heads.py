"""Pooling over valid frames, and new heads."""

import math

import pytest
import torch

from ser.errors import ConfigError
from ser.models.heads import POOLINGS, new_linear, pool
from ser.models.multitask import HEADS, HeadsConfig, MultiTaskModel

NAN = float("nan")
LENGTHS = [7, 1, 4]


def hidden_of(dtype=torch.float64):
    """(3, 7, 5) with NaN past each length."""
    hidden = 3 + torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    for row, length in enumerate(LENGTHS):
        hidden[row, length:] = NAN
    return hidden


def test_mean_and_standard_deviation_equal_the_written_out_sums():
    hidden, num_frames = hidden_of(), torch.tensor(LENGTHS)
    mean, both = pool(hidden, num_frames, "mean"), pool(hidden, num_frames, "mean+std")
    assert mean.shape == (3, 5) and both.shape == (3, 10)
    assert torch.equal(both[:, :5], mean)
    for row, length in enumerate(LENGTHS):
        for channel in range(5):
            values = [float(hidden[row, t, channel]) for t in range(length)]
            average = sum(values) / length
            deviation = math.sqrt(sum((v - average) ** 2 for v in values) / length)  # divided by n, not n - 1
            assert float(mean[row, channel]) == pytest.approx(average, rel=1e-12)
            assert float(both[row, 5 + channel]) == pytest.approx(max(deviation, 1e-7**0.5), rel=1e-9)


@pytest.mark.parametrize("method", POOLINGS)
def test_an_utterance_of_one_frame_or_of_constant_channels_has_a_finite_gradient(method):
    for hidden in (torch.randn(1, 1, 5), torch.full((1, 4, 5), 2.0)):
        hidden.requires_grad_()
        pooled = pool(hidden, torch.tensor([hidden.shape[1]]), method)
        pooled.sum().backward()
        assert pooled.isfinite().all()
        assert hidden.grad.isfinite().all()
        assert torch.allclose(hidden.grad, torch.full_like(hidden, 1 / hidden.shape[1]))  # the mean's alone


@pytest.mark.parametrize("method", POOLINGS)
def test_padding_gets_no_gradient(method):
    hidden = hidden_of().requires_grad_()
    pool(hidden, torch.tensor(LENGTHS), method).square().sum().backward()
    for row, length in enumerate(LENGTHS):
        assert hidden.grad[row, :length].any()
        assert not hidden.grad[row, length:].any()
    assert torch.autograd.gradcheck(
        lambda x: pool(x, torch.tensor([4, 2]), method), torch.randn(2, 4, 3).double().requires_grad_()
    )


@pytest.mark.parametrize("method", POOLINGS)
def test_pooling_of_half_precision_is_computed_in_float32(method):
    """A sum of 4,000 frames in bfloat16 would stop growing at 256 times the frame."""
    hidden = torch.ones(1, 4000, 3, dtype=torch.bfloat16)
    pooled = pool(hidden, torch.tensor([4000]), method)
    assert pooled.dtype == torch.float32
    assert torch.equal(pooled[:, :3], torch.ones(1, 3))


def test_an_unknown_pooling_is_an_error_that_lists_the_known():
    with pytest.raises(ConfigError, match=r"'max'; expected one of mean, mean\+std"):
        pool(torch.zeros(1, 1, 1), torch.tensor([1]), "max")
    with pytest.raises(ConfigError, match=r"'max'; expected one of mean, mean\+std"):
        HeadsConfig(num_emotions=2, pooling="max")


def test_a_new_head_has_small_normal_weights_and_no_bias():
    torch.manual_seed(0)
    head = new_linear(400, 50, 0.02)
    assert head.weight.shape == (50, 400)
    assert float(head.weight.detach().std()) == pytest.approx(0.02, rel=0.03)
    assert abs(float(head.weight.detach().mean())) < 1e-3
    assert not head.bias.any()


@pytest.mark.parametrize("pooling", POOLINGS)
def test_each_head_reads_what_it_should(config, randomise, pooling):
    model = randomise(MultiTaskModel(config, HeadsConfig(4, 9, 3, pooling))).eval()
    x = torch.randn(2, 3000, generator=torch.Generator().manual_seed(0))
    outputs = model(x, torch.tensor([3000, 2000]))
    hidden, num_frames = model.wav2vec2(x, torch.tensor([3000, 2000]))
    pooled = pool(hidden, num_frames, pooling)
    assert torch.equal(outputs.emotion, model.cls_head(pooled))
    assert torch.equal(outputs.speaker, model.speaker_head(pooled))
    assert torch.equal(outputs.ctc, model.lm_head(hidden))
    assert torch.equal(outputs.num_frames, num_frames)
    assert outputs.emotion.shape == (2, 4) and outputs.ctc.shape[2] == 9 and outputs.speaker.shape == (2, 3)


@pytest.mark.parametrize("present", [[], ["emotion"], ["ctc"], ["speaker"], ["emotion", "speaker"], list(HEADS)])
def test_a_model_has_the_heads_that_are_asked_for_and_no_weights_of_others(styles, present):
    sizes = {"emotion": "num_emotions", "ctc": "vocab_size", "speaker": "num_speakers"}
    config = styles["base-style"]
    model = MultiTaskModel(config, HeadsConfig(**{sizes[name]: 5 for name in present})).eval()
    outputs = model(torch.zeros(1, 800))
    assert model.heads == present
    for name in HEADS:
        assert (getattr(outputs, name) is not None) == (name in present)
        assert (f"{HEADS[name]}.weight" in model.state_dict()) == (name in present)


@pytest.mark.parametrize("value", [-1, 10**9, 2.0, True, "4", None])
@pytest.mark.parametrize("name", ["num_emotions", "vocab_size", "num_speakers"])
def test_a_head_of_an_impossible_size_is_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=name):
        HeadsConfig(**{name: value})

"""Pooling over valid frames, and new heads."""

import math
from dataclasses import replace

import pytest
import torch

from ser.errors import ConfigError
from ser.models.heads import HEADS, POOLINGS, DenseHead, Pooling, mix_layers, new_linear
from ser.models.multitask import HeadsConfig, MultiTaskModel

NAN = float("nan")
LENGTHS = [7, 1, 4]


def hidden_of(dtype=torch.float64):
    """(3, 7, 5) with NaN past each length."""
    hidden = 3 + torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    for row, length in enumerate(LENGTHS):
        hidden[row, length:] = NAN
    return hidden


def pool(hidden, num_frames, method):
    """With weights of its own where the method has any."""
    torch.manual_seed(1)
    return Pooling(method, hidden.shape[-1], 0.5).to(hidden.dtype)(hidden, num_frames)


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


def test_attentive_statistics_equal_the_equations_of_the_paper():
    """Okabe et al., 2018, eq. 2 to 6, written out frame by frame."""
    hidden = hidden_of()
    torch.manual_seed(2)
    pooling = Pooling("attentive", 5, 0.5).double().requires_grad_(False)
    pooled = pooling(hidden, torch.tensor(LENGTHS))
    assert pooled.shape == (3, 10) and pooling.output_size == 10
    for row, length in enumerate(LENGTHS):
        frames = hidden[row, :length]
        scores = [
            float(pooling.score.weight[0] @ torch.tanh(pooling.dense.weight @ h + pooling.dense.bias))
            for h in frames
        ]
        weights = [math.exp(e) / sum(map(math.exp, scores)) for e in scores]
        mean = sum(w * h for w, h in zip(weights, frames, strict=True))
        square = sum(w * h * h for w, h in zip(weights, frames, strict=True)) - mean * mean
        expected = torch.cat([mean, square.clamp(min=1e-7).sqrt()])
        torch.testing.assert_close(pooled[row], expected, rtol=1e-9, atol=1e-9)
        assert length == 1 or max(weights) > 1.1 / length  # not a plain mean


def test_layers_are_mixed_by_the_softmax_of_their_weights():
    layers = [torch.randn(2, 3, 4) for _ in range(3)]
    weights = torch.tensor([0.0, 1.0, -2.0])
    expected = sum(w * layer for w, layer in zip(weights.softmax(0), layers, strict=True))
    torch.testing.assert_close(mix_layers(layers, weights), expected)


@pytest.mark.parametrize("method", ["mean", "mean+std"])
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
    expected = torch.full((1, 3), 4000.0 if method == "sum" else 1.0)
    torch.testing.assert_close(pooled[:, :3], expected, rtol=1e-6, atol=0.0)


def test_an_unknown_pooling_is_an_error_that_lists_the_known():
    with pytest.raises(ConfigError, match=r"'median'; expected one of mean, mean\+std"):
        Pooling("median", 1)
    with pytest.raises(ConfigError, match=r"'median'; expected one of mean, mean\+std"):
        HeadsConfig(num_emotions=2, pooling="median")


def test_a_new_head_has_small_normal_weights_and_no_bias():
    torch.manual_seed(0)
    head = new_linear(400, 50, 0.02)
    assert head.weight.shape == (50, 400)
    assert float(head.weight.detach().std()) == pytest.approx(0.02, rel=0.03)
    assert abs(float(head.weight.detach().mean())) < 1e-3
    assert not head.bias.any()


@pytest.mark.parametrize("pooling", POOLINGS)
def test_each_head_reads_what_it_should(config, randomise, pooling):
    model = randomise(MultiTaskModel(config, HeadsConfig(4, 9, 3, 2, pooling=pooling))).eval()
    x, lengths = torch.randn(2, 3000, generator=torch.Generator().manual_seed(0)), torch.tensor([3000, 2000])
    outputs = model(x, lengths)
    hidden, num_frames = model.wav2vec2(x, lengths)
    pooled = model.pooling(hidden, num_frames)
    assert torch.equal(outputs.emotion, model.cls_head(pooled))
    assert torch.equal(outputs.speaker, model.speaker_head(pooled))
    head = model.dimension_head
    assert torch.equal(outputs.dimensions, head.out_proj(head.dense(pooled).tanh()))
    assert torch.equal(outputs.ctc, model.lm_head(hidden))
    assert torch.equal(outputs.num_frames, num_frames)
    assert outputs.emotion.shape == (2, 4) and outputs.ctc.shape[2] == 9 and outputs.speaker.shape == (2, 3)
    assert outputs.dimensions.shape == (2, 2)


@pytest.mark.parametrize("ctc", [False, True])
@pytest.mark.parametrize("layers", ["0", "1", "3", "last", "weighted"])
def test_the_layers_that_are_asked_for_are_read_and_ctc_reads_the_last(config, randomise, layers, ctc):
    model = randomise(MultiTaskModel(config, HeadsConfig(4, 9 if ctc else 0, layers=layers, projection=7))).eval()
    x, lengths = torch.randn(2, 3000, generator=torch.Generator().manual_seed(0)), torch.tensor([3000, 2000])
    every, num_frames = model.wav2vec2.layers(x, lengths)
    if layers == "weighted":
        hidden = mix_layers(every, model.layer_weights)
    else:
        hidden = every[-1 if layers == "last" else int(layers)]
    outputs = model(x, lengths)
    assert torch.equal(outputs.emotion, model.cls_head(model.pooling(model.projector(hidden), num_frames)))
    if ctc:
        assert torch.equal(outputs.ctc, model.lm_head(every[-1]))


@pytest.mark.parametrize("normed", [False, True])
def test_the_last_of_weighted_layers_has_the_final_norm_or_not(styles, randomise, normed):
    sizes = HeadsConfig(4, 9, layers="weighted", weighted_final_norm=normed)
    model = randomise(MultiTaskModel(styles["large-style"], sizes)).eval()
    x = torch.randn(1, 3000, generator=torch.Generator().manual_seed(0))
    raw, num_frames = model.wav2vec2.layers(x, final_norm=False)
    last = model.wav2vec2.encoder.layer_norm(raw[-1])
    assert not torch.equal(raw[-1], last)
    hidden = mix_layers([*raw[:-1], last if normed else raw[-1]], model.layer_weights)
    outputs = model(x)
    assert torch.equal(outputs.emotion, model.cls_head(model.pooling(hidden, num_frames)))
    assert torch.equal(outputs.ctc, model.lm_head(last))


def test_a_layer_that_the_encoder_lacks_is_refused(styles):
    with pytest.raises(ConfigError, match="'4', but the encoder has 3 layers"):
        MultiTaskModel(styles["base-style"], HeadsConfig(4, layers="4"))
    for value in ("first", "-1", "1.0", "", 1, None, ["last"]):
        with pytest.raises(ConfigError, match="layers is"):
            HeadsConfig(4, layers=value)


@pytest.mark.parametrize("layers", ["0", "1", "last", "weighted"])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(
    "tasks",
    [[], ["ctc"], ["emotion"], ["dimensions"], ["ctc", "speaker"], ["emotion", "ctc", "speaker", "dimensions"]],
)
def test_exactly_the_parameters_that_tasks_reach_are_trained_by_them(config, randomise, layers, normed, tasks):
    """DistributedDataParallel waits for every parameter's gradient; AdamW moves what has one, a zero too."""
    sizes = HeadsConfig(4, 9, 3, 2, layers=layers, weighted_final_norm=normed, projection=7, pooling="attentive")
    if "ctc" not in tasks:
        sizes = replace(sizes, vocab_size=0)
    model = randomise(MultiTaskModel(replace(config, apply_spec_augment=False), sizes)).eval()
    outputs = model(torch.randn(2, 3000, generator=torch.Generator().manual_seed(0)))
    scores = [getattr(outputs, name) for name in tasks]
    if scores:
        sum(s.square().sum() for s in scores).backward()
    untrained = {id(p) for p in model.untrained_by(tasks)}
    for name, parameter in model.named_parameters():
        if name != "wav2vec2.masked_spec_embed":
            assert (parameter.grad is None) == (id(parameter) in untrained), name


def test_the_regression_head_is_dropout_linear_tanh_dropout_linear():
    torch.manual_seed(0)
    head = DenseHead(6, 3, dropout=0.5, initializer_range=0.3)
    x = torch.randn(400, 6)
    expected = head.eval()(x)
    assert torch.allclose(expected, torch.tanh(x @ head.dense.weight.T) @ head.out_proj.weight.T, atol=1e-6)
    assert not torch.equal(head.train()(x), expected)


@pytest.mark.parametrize(
    "present", [[], ["emotion"], ["ctc"], ["speaker"], ["dimensions"], ["emotion", "speaker"], list(HEADS)]
)
def test_a_model_has_the_heads_that_are_asked_for_and_no_weights_of_others(styles, present):
    sizes = {
        "emotion": "num_emotions",
        "ctc": "vocab_size",
        "speaker": "num_speakers",
        "dimensions": "num_dimensions",
    }
    config = styles["base-style"]
    model = MultiTaskModel(config, HeadsConfig(**{sizes[name]: 5 for name in present})).eval()
    outputs = model(torch.zeros(1, 800))
    assert model.heads == present
    for name in HEADS:
        assert (getattr(outputs, name) is not None) == (name in present)
        assert any(key.startswith(f"{HEADS[name].key}.") for key in model.state_dict()) == (name in present)


@pytest.mark.parametrize("value", [-1, 10**9, 2.0, True, "4", None])
@pytest.mark.parametrize("name", ["num_emotions", "vocab_size", "num_speakers", "num_dimensions", "projection"])
def test_a_head_of_an_impossible_size_is_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=name):
        HeadsConfig(**{name: value})

"""Dropout with masks cut from 64-bit words, and attention that uses it."""

import math
from dataclasses import replace

import pytest
import torch
from compare import assert_close, sound
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ser.models.config import Wav2Vec2Config
from ser.models.kernels import PERIOD, Dropout, attention, dropout, gelu_dropout_linear
from ser.models.wav2vec2 import TransformerLayer, Wav2Vec2


class Results(TorchDispatchMode):
    """Notes what every operation returns, so that a test can ask which of it is still in memory."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.seen.append((StorageWeakRef(leaf.untyped_storage()), tuple(leaf.shape), leaf.dtype))
        return result

    def alive(self):
        """(shape, type) of each storage that something holds, also where Python cannot see it."""
        return list({ref.cdata: (shape, dtype) for ref, shape, dtype in self.seen if not ref.expired()}.values())


def assert_same_gradients(found, expected, inputs, tolerance):
    """Of the sums of their squares."""
    grads = [torch.autograd.grad(y.square().sum(), inputs) for y in (found, expected)]
    for grad, wanted in zip(*grads, strict=True):
        assert_close(grad, wanted, tolerance)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_elements_are_dropped_as_often_as_asked_and_the_rest_scaled_for_it(p):
    torch.manual_seed(0)
    x = torch.ones(1000, 1000)
    y = dropout(x, p)
    assert y.unique().tolist() == pytest.approx([0, 1 / (1 - p)], rel=1e-6)
    assert abs(float((y == 0).double().mean()) - p) < 5 * math.sqrt(p * (1 - p) / x.numel())
    for lane in range(8):  # of the word
        dropped = float((y.flatten()[lane::8] == 0).double().mean())
        assert abs(dropped - p) < 5 * math.sqrt(p * (1 - p) / (x.numel() / 8))


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_neighbours_are_dropped_independently(p):
    torch.manual_seed(0)
    dropped = (dropout(torch.ones(1 << 20), p) == 0).double() - p
    for distance in (1, 2, 3, 4, 8, 768, PERIOD):
        correlation = float((dropped[:-distance] * dropped[distance:]).mean()) / (p * (1 - p))
        assert abs(correlation) < 5 / math.sqrt(len(dropped))


def test_an_element_s_probability_is_exact_over_draws_whatever_its_place():
    """Its threshold is one of two neighbours; drawn once for all, some elements would be dropped more often."""
    torch.manual_seed(0)
    p, draws = 0.1, 100_000  # so many tell 12 and 13 of 128 from it
    often = sum((dropout(torch.ones(64), p) == 0).double() for _ in range(draws)) / draws
    assert float((often - p).abs().max()) < 5 * math.sqrt(p * (1 - p) / draws)
    assert abs(float(often.mean()) - p) < 5 * math.sqrt(p * (1 - p) / draws / 64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_type_keeps_its_values_under_the_same_mask(dtype):
    x = sound(33, 65).to(dtype)
    torch.manual_seed(0)
    y = dropout(x, 0.25)
    torch.manual_seed(0)
    kept = dropout(torch.ones(33, 65), 0.25) > 0
    assert y.dtype == dtype and torch.equal(y, torch.where(kept, x * (4 / 3), 0))


def test_the_gradient_goes_where_the_values_went():
    torch.manual_seed(0)
    x = sound(7, 13).double().requires_grad_()
    y = dropout(x, 0.3)
    assert_close(torch.autograd.grad(y.sum(), x)[0], y.detach() / x.detach(), 1e-12)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, PERIOD - 1, PERIOD, PERIOD + 1])
def test_any_number_of_elements_is_possible(size):
    assert dropout(torch.ones(size), 0.5).shape == (size,)


def test_masks_are_a_function_of_the_seed():
    x = torch.ones(1000)
    torch.manual_seed(5)
    first, second = dropout(x, 0.5), dropout(x, 0.5)
    torch.manual_seed(5)
    assert torch.equal(dropout(x, 0.5), first) and not torch.equal(first, second)


def test_nothing_is_dropped_in_evaluation_and_all_at_probability_one():
    x = torch.ones(10)
    assert Dropout(0.5).eval()(x) is x and dropout(x, 0.0) is x
    assert not dropout(x, 1.0).any()
    q = sound(1, 1, 4, 4)
    assert not attention(q, q, q, None, 1.0).any()


@pytest.fixture(params=[False, True], ids=["short", "long"])
def long(request, monkeypatch):
    """Whether attention computes its weights again in the backward pass."""
    if request.param:
        monkeypatch.setattr("ser.models.kernels.LONG", 1)
    return request.param


@pytest.mark.parametrize("kind", ["none", "padding", "bias"])
def test_attention_with_dropout_is_dropout_on_the_weights(kind, long):
    """Against the formula, with the very masks that the seed gives."""
    q, k, v = (sound(2, 3, 11, 8, seed=i).double().requires_grad_() for i in range(3))
    mask = None
    if kind == "padding":
        mask = torch.arange(11) < torch.tensor([11, 6])[:, None, None, None]
    elif kind == "bias":
        mask = sound(2, 3, 11, 11, seed=9).double()
        mask[1, :, :, 8:] = -math.inf
        mask.requires_grad_()
    inputs = (q, k, v, mask) if kind == "bias" else (q, k, v)
    torch.manual_seed(0)
    found = attention(q, k, v, mask, 0.4)
    torch.manual_seed(0)
    kept = dropout(torch.ones(2, 3, 11, 11).double(), 0.4)
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(8)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if kind == "padding" else scores + mask
    expected = torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1) * kept, v)
    assert_close(found, expected, 1e-12)
    assert_same_gradients(found, expected, inputs, 1e-10)
    assert_close(attention(q, k, v, mask, 0.0), F.scaled_dot_product_attention(q, k, v, attn_mask=mask), 1e-12)


def test_the_backward_pass_of_attention_leaves_the_generator_where_it_was(long):
    q = sound(1, 2, 5, 4).requires_grad_()
    torch.manual_seed(0)
    y = attention(q, q, q, None, 0.4)
    torch.rand(3)
    state = torch.get_rng_state()
    y.sum().backward()
    assert torch.equal(torch.get_rng_state(), state)


def test_of_long_utterances_a_layer_keeps_no_pairs_of_frames(long):
    frames, config = 37, replace(Wav2Vec2Config.named("small"), attention_dropout=0.1)
    layer = TransformerLayer(config, index=1).train()
    kept: list[torch.Tensor] = []
    x = sound(1, frames, config.hidden_size).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        layer(x, None)
    assert long != bool([t for t in kept if t.shape.count(frames) > 1])


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_what_the_feed_forward_layer_computes_again_is_what_it_computed(p):
    x = sound(2, 5, 12).double().requires_grad_()
    linear = torch.nn.Linear(12, 4).double()
    inputs = (x, *linear.parameters())
    torch.manual_seed(0)
    found = gelu_dropout_linear(x, p, linear)
    torch.manual_seed(0)
    kept = dropout(torch.ones(2, 5, 12).double(), p)
    expected = F.linear(F.gelu(x) * kept, *linear.parameters())
    assert_close(found, expected, 1e-12)
    assert_same_gradients(found, expected, inputs, 1e-12)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_the_wide_input_of_the_feed_forward_layer_s_product_is_not_kept(p):
    """So its weight's gradient is that of what stands in the layer's middle by then: here zeros."""
    x, linear = sound(5, 12).requires_grad_(), torch.nn.Linear(12, 4)
    y = gelu_dropout_linear(x, p, linear)
    x.data.zero_()
    (grad,) = torch.autograd.grad(y.sum(), linear.weight)
    assert not grad.any()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activation_checkpointing_frees_the_widest_activation_of_every_layer(checkpointing):
    small = Wav2Vec2Config.named("small")
    config = replace(small, num_hidden_layers=3, layerdrop=0.0, activation_dropout=0.1, intermediate_size=500)
    model = Wav2Vec2(config).train()
    model.activation_checkpointing(checkpointing)
    with Results() as results:
        hidden, num_frames = model(sound(1, 16_000), torch.tensor([16_000]))
    wide = [kind for shape, kind in results.alive() if shape[-2:] == (int(num_frames), 500)]
    assert sorted(wide, key=str) == ([] if checkpointing else 3 * [torch.float32] + 3 * [torch.int8])
    hidden.square().sum().backward()


@pytest.mark.parametrize("autocast", [False, True])
def test_the_feed_forward_gradient_holds_for_any_linear_module_and_type(autocast):
    """Of a module that computes its product in another way too, such as one with a low-rank update."""

    class Transposed(torch.nn.Linear):
        def forward(self, x):
            return (self.weight @ x.mT).mT + self.bias

    x = sound(5, 12).requires_grad_()
    for kind in (torch.nn.Linear, Transposed):
        linear = kind(12, 4)
        inputs = (x, *linear.parameters())
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            wide = x.to(torch.bfloat16) if autocast else x
            torch.manual_seed(0)
            found = gelu_dropout_linear(wide, 0.3, linear)
            torch.manual_seed(0)
            kept = dropout(torch.ones(5, 12, dtype=wide.dtype), 0.3)
            expected = linear(F.gelu(wide) * kept)
        assert found.dtype == expected.dtype
        assert_close(found.float(), expected.float(), 1e-2 if autocast else 1e-6)
        assert_same_gradients(found.float(), expected.float(), inputs, 3e-2 if autocast else 1e-5)


def test_a_frozen_product_gets_no_gradient_and_passes_one_on():
    x, linear = sound(5, 12).requires_grad_(), torch.nn.Linear(12, 4)
    linear.requires_grad_(False)
    gelu_dropout_linear(x, 0.3, linear).sum().backward()
    assert linear.weight.grad is None and linear.bias.grad is None and x.grad.any()

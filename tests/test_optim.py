"""Learning rate and parameter groups."""

import pytest
import torch
from toy import toy_recognizer

from ser.train.optim import linear, make_optimizer, parameter_groups, set_rate


def test_the_rate_rises_linearly_to_its_peak_and_falls_linearly_to_nothing():
    factors = [linear(step, total=100, warmup=0.1) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == 1.0 and factors[10] == 1.0
    assert factors[55] == pytest.approx(0.5) and factors[99] == pytest.approx(1 / 90)
    assert all(f > 0 for f in factors), "no update is wasted at rate 0"


def test_without_warmup_the_rate_starts_at_its_peak():
    assert linear(0, total=10, warmup=0.0) == 1.0


@pytest.mark.parametrize(("total", "warmup"), [(1, 0.1), (1, 1.0), (3, 1.0), (7, 0.5)])
def test_short_runs_have_a_rate_between_0_and_1(total, warmup):
    assert all(0 < linear(step, total=total, warmup=warmup) <= 1 for step in range(total))


def test_every_trained_parameter_is_in_one_group_and_only_matrices_decay():
    model = toy_recognizer().model
    model.freeze("feature-encoder")
    groups = parameter_groups(model, rate=1e-3, head_rate=1e-2, weight_decay=0.1)
    names = {p: n for n, p in model.named_parameters()}
    members = [names[p] for group in groups for p in group["params"]]
    assert sorted(members) == sorted(n for n, p in model.named_parameters() if p.requires_grad)
    for group in groups:
        for name in (names[p] for p in group["params"]):
            matrix = (name.endswith("weight") and "norm" not in name) or name.endswith("original1")
            matrix = matrix and "score" not in name  # attentive pooling's is a vector
            assert (group["weight_decay"] == 0.1) == matrix, name
            assert group["peak"] == (1e-3 if name.startswith("wav2vec2.") else 1e-2), name


def test_heads_take_the_encoder_s_rate_unless_they_have_their_own():
    optimizer = make_optimizer(toy_recognizer().model, rate=1e-3, head_rate=0.0, weight_decay=0.0, beta2=0.98)
    set_rate(optimizer, 0.5)
    assert {group["lr"] for group in optimizer.param_groups} == {5e-4}
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults["betas"] == (0.9, 0.98) and optimizer.defaults["eps"] == 1e-8

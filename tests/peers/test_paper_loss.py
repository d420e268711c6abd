"""The paper's objective: our update gives the loss and the gradient that the code of Cai et al. (2021) gives.

Their code, one utterance per device, gradients accumulated over 8 micro-batches:

    hidden = dropout(wav2vec2(waveform)); logits = lm_head(hidden); scores = cls_head(mean(hidden, over time))
    loss = (cross_entropy(scores, emotion) + alpha * ctc(logits, text, reduction="sum")) / 8; backward

Here it is written with parts of `transformers`, dropout off, and compared with `ser.train.update.run_update`.
"""

from dataclasses import replace

import pytest
import torch
from test_update import run_update
from torch import nn
from torch.nn import functional as F

from ser.data.dataset import Example, collate
from ser.models.multitask import HeadsConfig, MultiTaskModel
from ser.train.distributed import World
from ser.train.losses import Objective

transformers = pytest.importorskip("transformers", reason="transformers is the reference: see the extra test")

SAMPLES = [9000, 5000, 7300, 4000, 9000, 6100, 5000, 8200]
TARGETS = [[1, 2, 3], [4, 4, 5], [6], [7, 8, 1, 1], [2, 3, 2], [5, 5], [8, 1, 2, 3], [3]]
EMOTIONS = [0, 1, 2, 3, 0, 0, 2, 1]
EMOTION_CLASSES, SYMBOLS = 4, 9
OFF = ("feat_proj_dropout", "hidden_dropout", "attention_dropout", "activation_dropout", "final_dropout")


def without_randomness(config):
    return replace(config, **dict.fromkeys((*OFF, "layerdrop"), 0.0), apply_spec_augment=False)


def examples(samples=SAMPLES):
    generator = torch.Generator().manual_seed(5)
    return [
        Example(
            i,
            1.0,
            torch.randn(n, generator=generator, dtype=torch.float64),
            {"emotion": EMOTIONS[i], "ctc": TARGETS[i]},
            place=i,
        )
        for i, n in enumerate(samples)
    ]


def our_update(model, batches, alpha):
    """The losses and gradients of one update that moves nothing."""
    result = run_update(
        model,
        model,
        torch.optim.SGD(model.parameters(), lr=0.0),
        batches,
        Objective({"emotion": 1.0, "ctc": alpha}),
        World(),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
    )
    assert not result.skipped
    loss = result.losses["emotion"] + alpha * result.losses.get("ctc", 0.0)
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def paper_update(model, groups, alpha):
    """The same with the reference's parts: one micro-batch per group of equally long utterances."""
    config = transformers.Wav2Vec2Config(**model.config.to_dict(), vocab_size=SYMBOLS, pad_token_id=0)
    reference = transformers.Wav2Vec2ForCTC(config).double().train()
    reference.cls_head = nn.Linear(config.hidden_size, EMOTION_CLASSES).double()
    reference.load_state_dict(model.state_dict(), strict=True)
    whole = 0.0
    for group in groups:
        waveforms = torch.stack([example.waveform for example in group])
        hidden = reference.dropout(reference.wav2vec2(waveforms).last_hidden_state)
        log_probs = reference.lm_head(hidden).log_softmax(-1).transpose(0, 1)
        ctc = F.ctc_loss(
            log_probs,
            torch.tensor([symbol for example in group for symbol in example.labels["ctc"]]),
            torch.full((len(group),), len(log_probs)),
            torch.tensor([len(example.labels["ctc"]) for example in group]),
            reduction="sum",
        )
        emotion = F.cross_entropy(
            reference.cls_head(hidden.mean(1)), torch.tensor([e.labels["emotion"] for e in group])
        )
        loss = (emotion + alpha * ctc) / len(groups)
        loss.backward()
        whole = whole + loss.detach()
    return whole, {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}


def assert_same(ours, paper):
    (loss, found), (wanted_loss, wanted) = ours, paper
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-10, atol=0.0)
    whole = torch.stack([g.norm() for g in wanted.values()]).norm()
    assert set(wanted) <= set(found)
    for name, gradient in wanted.items():
        error = (found[name] - gradient).norm()
        assert error <= 1e-9 * gradient.norm() + 1e-12 * whole, f"{name}: {error:.2e} of {gradient.norm():.2e}"


@pytest.fixture
def model(wav2vec2_config, randomise):
    heads = HeadsConfig(num_emotions=EMOTION_CLASSES, vocab_size=SYMBOLS, pooling="mean")
    return randomise(MultiTaskModel(without_randomness(wav2vec2_config), heads)).double().train()


@pytest.mark.parametrize("alpha", [0.1, 0.01])
def test_one_utterance_per_micro_batch_is_the_paper_s_update(model, alpha):
    alone = examples()
    ours = our_update(model, [collate([e]) for e in alone], alpha)
    assert_same(ours, paper_update(model, [[e] for e in alone], alpha))


def test_one_padded_batch_of_eight_is_the_paper_s_update_of_eight_single_utterances(model):
    together = examples()
    assert_same(our_update(model, [collate(together)], 0.1), paper_update(model, [[e] for e in together], 0.1))


def test_two_utterances_per_micro_batch_act_in_the_paper_s_code_as_twice_the_alpha(model):
    """A mean of CE plus a sum of CTC, over two: the paper's training script does this."""
    pairs = examples([6000, 6000, 5000, 5000, 7000, 7000, 4000, 4000])
    groups = [pairs[i : i + 2] for i in range(0, 8, 2)]
    assert_same(our_update(model, [collate(group) for group in groups], 0.2), paper_update(model, groups, 0.1))


def test_alpha_zero_is_the_emotion_loss_alone_and_leaves_the_ctc_head_without_gradient(model):
    alone = examples()
    ours = our_update(model, [collate([e]) for e in alone], 0.0)
    paper = paper_update(model, [[e] for e in alone], 0.0)
    assert all(not paper[1].pop(name).any() for name in ("lm_head.weight", "lm_head.bias"))
    assert not {"lm_head.weight", "lm_head.bias"} & set(ours[1])
    assert_same(ours, paper)

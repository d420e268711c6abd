"""Losses return (sum, count), count what they say, and give exactly nothing where nothing counts."""

import itertools
import math

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from ser.data.labels import NO_LABEL
from ser.errors import TextError
from ser.scores.counts import ccc_moments, concordance
from ser.train.losses import ccc_loss, classification_loss, ctc_feasible, ctc_loss

quick = settings(max_examples=50, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])


def scores(*shape, dtype=torch.float64, seed=0):
    values = 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(dtype).requires_grad_()


def gradient(loss, of):
    return torch.autograd.grad(loss, of)[0]


# ---------------------------------------------------------------------------------------- classification

LABELS = torch.tensor([2, NO_LABEL, 0, 3, NO_LABEL, 2])
CLASS_WEIGHTS = torch.tensor([0.5, 1.0, 2.0, 1.5])


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weights", [None, CLASS_WEIGHTS, CLASS_WEIGHTS.double()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sum_over_count_is_torch_s_mean_and_so_is_its_gradient(weights, smoothing, dtype):
    logits = scores(6, 4, dtype=dtype)
    total, count = classification_loss(logits, LABELS, class_weights=weights, label_smoothing=smoothing)
    mean = F.cross_entropy(
        logits,
        LABELS,
        weight=None if weights is None else weights.to(dtype),
        label_smoothing=smoothing,
        ignore_index=NO_LABEL,
    )
    torch.testing.assert_close(total / count, mean)
    torch.testing.assert_close(gradient(total / count, logits), gradient(mean, logits))
    assert count == (4 if weights is None else 2.0 + 0.5 + 1.5 + 2.0)
    assert total.dtype == dtype and not count.requires_grad


def test_cross_entropy_is_the_negative_logarithm_of_the_label_s_probability():
    logits = torch.log(torch.tensor([[0.1, 0.7, 0.2], [0.25, 0.25, 0.5]], dtype=torch.float64))
    total, count = classification_loss(logits, torch.tensor([1, 2]))
    assert float(total) == pytest.approx(
        -float(torch.log(torch.tensor(0.7 * 0.5, dtype=torch.float64))), rel=1e-12
    )
    assert count == 2


def test_sums_and_counts_add_up_over_any_split():
    logits = scores(6, 4)
    options = {"class_weights": CLASS_WEIGHTS, "label_smoothing": 0.1, "focal": 1.5, "adjustment": CLASS_WEIGHTS}
    whole = classification_loss(logits, LABELS, **options)
    for size in (1, 2, 4):
        parts = [
            classification_loss(a, b, **options)
            for a, b in zip(logits.split(size), LABELS.split(size), strict=True)
        ]
        torch.testing.assert_close(sum(p[0] for p in parts), whole[0])
        torch.testing.assert_close(sum(p[1] for p in parts), whole[1])


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_the_focal_loss_is_lin_et_al_s(gamma):
    logits = scores(6, 4)
    total, count = classification_loss(logits, LABELS, focal=gamma)
    p = logits.softmax(-1)[LABELS != NO_LABEL, LABELS[LABELS != NO_LABEL]]
    torch.testing.assert_close(total, (-((1 - p) ** gamma) * p.log()).sum())
    assert count == 4
    assert torch.equal(classification_loss(logits, LABELS, focal=0.0)[0], classification_loss(logits, LABELS)[0])


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_the_focal_loss_of_a_certain_and_right_answer_has_a_finite_gradient(gamma):
    logits = torch.tensor([[100.0, 0.0, 0.0], [0.0, 0.0, 100.0]], requires_grad=True)
    total, _ = classification_loss(logits, torch.tensor([0, 0]), focal=gamma)
    assert gradient(total, logits).isfinite().all() and total.isfinite()


def test_logit_adjustment_is_menon_et_al_s_and_weighs_pairs_of_classes():
    """Eq. 10: log(1 + sum over y' of (pi_y' / pi_y) ** tau * exp(f_y' - f_y))."""
    logits, prior, tau = scores(6, 4), torch.tensor([0.6, 0.2, 0.15, 0.05]).double(), 1.5
    total, count = classification_loss(logits, LABELS, adjustment=tau * prior.log())
    wanted = 0.0
    for f, y in zip(logits, LABELS.tolist(), strict=True):
        if y != NO_LABEL:
            pairs = [(prior[k] / prior[y]) ** tau * (f[k] - f[y]).exp() for k in range(4) if k != y]
            wanted = wanted + (1 + sum(pairs)).log()
    torch.testing.assert_close(total, wanted)
    assert count == 4


def test_unlabelled_utterances_get_no_gradient():
    logits = scores(6, 4)
    found = gradient(classification_loss(logits, LABELS, label_smoothing=0.1)[0], logits)
    assert (found != 0).any(1).tolist() == (LABELS != NO_LABEL).tolist()


@pytest.mark.parametrize("weights", [None, CLASS_WEIGHTS])
def test_without_any_label_loss_count_and_gradient_are_exactly_zero(weights):
    logits = scores(3, 4, dtype=torch.float32)
    total, count = classification_loss(
        logits, torch.full((3,), NO_LABEL), class_weights=weights, label_smoothing=0.1
    )
    assert total == 0 and count == 0
    found = gradient(total, logits)
    assert found.shape == logits.shape and not found.any()


def test_utterances_of_weight_zero_contribute_nothing():
    logits, busy = scores(6, 4), torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 1.0])
    options = {"class_weights": CLASS_WEIGHTS, "label_smoothing": 0.1, "focal": 1.5, "adjustment": CLASS_WEIGHTS}
    total, count = classification_loss(logits, LABELS, utterance_weights=busy, **options)
    kept = busy > 0
    wanted = classification_loss(logits[kept], LABELS[kept], **options)
    torch.testing.assert_close(total, wanted[0])
    torch.testing.assert_close(count, wanted[1])
    assert not gradient(total, logits)[~kept].any()


@pytest.mark.parametrize("label", [4, -1])
def test_an_emotion_label_outside_the_classes_is_an_error(label):
    with pytest.raises((IndexError, RuntimeError)):
        classification_loss(scores(1, 4), torch.tensor([label]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_scores_are_summed_in_float32(dtype):
    logits = scores(6, 4, dtype=dtype)
    total, _ = classification_loss(logits, LABELS, class_weights=CLASS_WEIGHTS)
    wanted, _ = classification_loss(logits.detach().float(), LABELS, class_weights=CLASS_WEIGHTS)
    assert total.dtype == torch.float32 and total == wanted
    assert gradient(total, logits).dtype == dtype


# ---------------------------------------------------------------------------------------- CTC

FRAMES = torch.tensor([12, 9, 5, 12])
TARGETS = torch.tensor([[1, 2, 2, 3, 1], [4, 5, 0, 0, 0], [0, 0, 0, 0, 0], [3, 3, 3, 7, 7]])
LENGTHS = torch.tensor([5, 2, 0, 4])


def torch_s(logits, rows, frames=FRAMES, targets=TARGETS, lengths=LENGTHS):
    """Each row's loss by torch, one row at a time, unpadded."""
    return [
        F.ctc_loss(
            logits[i, : frames[i]].log_softmax(-1)[:, None],
            targets[i : i + 1, : lengths[i]],
            frames[i : i + 1],
            lengths[i : i + 1],
            reduction="sum",
        )
        for i in rows
    ]


def test_ctc_is_torch_s_sum_over_the_utterances_with_text_and_so_is_its_gradient():
    logits = scores(4, 12, 9)
    total, count = ctc_loss(logits, FRAMES, TARGETS, LENGTHS)
    wanted = sum(torch_s(logits, [0, 1, 3]))
    torch.testing.assert_close(total, wanted)
    torch.testing.assert_close(gradient(total, logits), gradient(wanted, logits))
    assert count == 3 and not count.requires_grad


def test_ctc_is_the_sum_over_all_alignments():
    """The definition (Graves et al., 2006), over all 3^5 paths."""
    logits = scores(1, 5, 3)
    probabilities = logits.softmax(-1)[0]
    total = 0.0
    for path in itertools.product(range(3), repeat=5):
        merged = [symbol for symbol, _ in itertools.groupby(path) if symbol]
        if merged == [1, 1, 2]:
            total = total + torch.stack([probabilities[t, symbol] for t, symbol in enumerate(path)]).prod()
    loss, _ = ctc_loss(logits, torch.tensor([5]), torch.tensor([[1, 1, 2]]), torch.tensor([3]))
    torch.testing.assert_close(loss, -total.log())


def test_ctc_equals_the_reference_s_loss():
    transformers = pytest.importorskip("transformers")
    config = transformers.Wav2Vec2Config(
        conv_dim=[4] * 7,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        vocab_size=9,
        pad_token_id=0,
        ctc_loss_reduction="sum",
    )
    reference = transformers.Wav2Vec2ForCTC(config).eval()
    x = torch.randn(3, 8000, generator=torch.Generator().manual_seed(0))
    targets, lengths = torch.tensor([[1, 1, 2, 8], [5, 4, 0, 0], [7, 7, 7, 0]]), torch.tensor([4, 2, 3])
    labels = targets.masked_fill(torch.arange(4) >= lengths[:, None], -100)
    expected = reference(x, labels=labels)
    total, count = ctc_loss(expected.logits, torch.tensor([24, 24, 24]), targets, lengths)
    torch.testing.assert_close(total, expected.loss)
    assert count == 3


def test_frames_and_symbols_past_the_lengths_have_no_effect():
    logits = scores(4, 12, 9)
    wanted = ctc_loss(logits, FRAMES, TARGETS, LENGTHS)[0]
    changed = logits.detach().clone()
    for row, frames in enumerate(FRAMES):
        changed[row, frames:] = 50.0 * torch.arange(9)
    beyond = torch.arange(5) >= LENGTHS[:, None]
    changed.requires_grad_()
    for junk in (8, 0, -100, 10**6):
        found = ctc_loss(changed, FRAMES, TARGETS.masked_fill(beyond, junk), LENGTHS)[0]
        assert torch.equal(found, wanted)
    slopes = gradient(found, changed)
    assert all(not slopes[row, frames:].any() for row, frames in enumerate(FRAMES))


@quick
@given(target=st.lists(st.integers(1, 3), min_size=0, max_size=6), frames=st.integers(1, 9))
def test_a_transcript_is_feasible_exactly_where_torch_s_loss_is_finite(target, frames):
    targets = torch.tensor([target + [1] * (6 - len(target))])
    length, num_frames = torch.tensor([len(target)]), torch.tensor([frames])
    feasible = bool(ctc_feasible(targets, length, num_frames))
    loss = F.ctc_loss(torch.zeros(frames, 1, 4).log_softmax(-1), targets, num_frames, length, reduction="sum")
    assert feasible == (bool(loss.isfinite()) and len(target) > 0)


@pytest.mark.parametrize(
    ("target", "frames"), [([1, 2, 3, 4, 5], 4), ([1, 1], 2), ([2, 2, 2], 4), ([1, 2, 2, 3, 3], 6)]
)
def test_a_transcript_that_does_not_fit_is_left_out_with_a_gradient_of_exactly_zero(target, frames):
    """F1: torch's loss is infinite there and its gradient NaN."""
    targets = torch.zeros(2, 5, dtype=torch.int64)
    targets[0, : len(target)] = torch.tensor(target)
    targets[1, :2] = torch.tensor([3, 4])
    lengths, num_frames = torch.tensor([len(target), 2]), torch.tensor([frames, 8])
    logits = scores(2, 8, 6, dtype=torch.float32)
    total, count = ctc_loss(logits, num_frames, targets, lengths)
    assert count == 1
    torch.testing.assert_close(total, torch_s(logits, [1], num_frames, targets, lengths)[0])
    slopes = gradient(total, logits)
    assert slopes.isfinite().all() and not slopes[0].any() and slopes[1].any()
    num_frames[0] += 1  # one frame more, and it fits
    assert ctc_loss(logits, num_frames, targets, lengths)[1] == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [0, 1, 3])
def test_a_batch_in_which_no_utterance_has_text_gives_exactly_zero(columns, dtype):
    logits = scores(2, 8, 6, dtype=dtype)
    targets = torch.zeros(2, columns, dtype=torch.int64)
    total, count = ctc_loss(logits, torch.tensor([8, 3]), targets, torch.zeros(2, dtype=torch.int64))
    assert total == 0 and count == 0
    slopes = gradient(total, logits)
    assert slopes.shape == logits.shape and not slopes.any()


def test_certain_scores_do_not_turn_nothing_into_nan():
    """Probabilities of 1 and 0, up to rounding: 0 times an infinite loss would be NaN."""
    logits = torch.zeros(2, 8, 6)
    logits[..., 3] = 1e4
    logits.requires_grad_()
    total, count = ctc_loss(logits, torch.tensor([8, 8]), torch.tensor([[1] * 8, [0] * 8]), torch.tensor([8, 0]))
    assert total == 0 and count == 0 and not gradient(total, logits).any()


def test_utterances_of_weight_zero_contribute_nothing_to_ctc():
    logits = scores(4, 12, 9)
    total, count = ctc_loss(logits, FRAMES, TARGETS, LENGTHS, utterance_weights=torch.tensor([1.0, 0.0, 1.0, 1.0]))
    torch.testing.assert_close(total, sum(torch_s(logits, [0, 3])))
    assert count == 2
    slopes = gradient(total, logits)
    assert not slopes[1].any() and slopes[0].any()


@pytest.mark.parametrize("symbol", [0, 9, 10**6, -1, -100])
@pytest.mark.parametrize("weights", [None, torch.tensor([1.0, 0.0, 1.0, 1.0])])
def test_a_blank_or_a_symbol_outside_the_vocabulary_is_refused_before_the_kernel(monkeypatch, symbol, weights):
    """F2: on the CPU torch's kernel would read, and write, memory that is not its own."""
    called = []
    monkeypatch.setattr(F, "ctc_loss", lambda *args, **options: called.append(args))
    targets = TARGETS.clone()
    targets[1, 1] = symbol
    with pytest.raises(
        TextError, match=rf"symbol {symbol} at position 1 of transcript 1 .*0\.\.8 without the blank 0"
    ):
        ctc_loss(scores(4, 12, 9), FRAMES, targets, LENGTHS, utterance_weights=weights)
    assert not called


def test_another_blank_moves_the_forbidden_symbol():
    logits = scores(1, 8, 5)
    with pytest.raises(TextError, match="symbol 4 at position 0"):
        ctc_loss(logits, torch.tensor([8]), torch.tensor([[4]]), torch.tensor([1]), blank=4)
    found, count = ctc_loss(logits, torch.tensor([8]), torch.tensor([[0, 1]]), torch.tensor([2]), blank=4)
    moved, _ = ctc_loss(logits.roll(1, -1), torch.tensor([8]), torch.tensor([[1, 2]]), torch.tensor([2]))
    torch.testing.assert_close(found, moved)
    assert count == 1


def test_the_per_character_option_divides_each_loss_by_its_length():
    logits = scores(4, 12, 9)
    total, count = ctc_loss(logits, FRAMES, TARGETS, LENGTHS, per_character=True)
    wanted = sum(loss / LENGTHS[i] for i, loss in zip([0, 1, 3], torch_s(logits, [0, 1, 3]), strict=True))
    torch.testing.assert_close(total, wanted)
    assert count == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_scores_and_autocast_compute_ctc_in_float32(dtype):
    logits = scores(4, 12, 9, dtype=dtype)
    wanted = ctc_loss(logits.detach().float(), FRAMES, TARGETS, LENGTHS)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, count = ctc_loss(logits, FRAMES, TARGETS, LENGTHS)
    assert total.dtype == torch.float32 and total == wanted and count == 3
    assert gradient(total, logits).dtype == dtype


def test_ctc_sums_and_counts_add_up_over_any_split():
    logits = scores(4, 12, 9)
    whole = ctc_loss(logits, FRAMES, TARGETS, LENGTHS)
    for size in (1, 2, 3):
        parts = [
            ctc_loss(*part)
            for part in zip(*(x.split(size) for x in (logits, FRAMES, TARGETS, LENGTHS)), strict=True)
        ]
        torch.testing.assert_close(sum(p[0] for p in parts), whole[0])
        assert sum(p[1] for p in parts) == whole[1]


# ---------------------------------------------------------------------------------------- dimensions


def rated(rows, seed=0):
    """Predictions and labels (rows, 2), a fifth of them unknown, float64."""
    generator = torch.Generator().manual_seed(seed)
    labels = 3 + torch.randn(rows, 2, generator=generator, dtype=torch.float64)
    labels[torch.rand(rows, 2, generator=generator) < 0.2] = math.nan
    return torch.randn(rows, 2, generator=generator, dtype=torch.float64), labels


def test_concordance_is_lin_s_formula_over_the_labelled_utterances():
    predictions, labels = rated(40)
    found = concordance(ccc_moments(predictions, labels))
    for d in range(2):
        known = labels[:, d].isfinite()
        p, y = predictions[known, d].numpy(), labels[known, d].numpy()
        covariance = ((p - p.mean()) * (y - y.mean())).mean()
        expected = 2 * covariance / (p.var() + y.var() + (p.mean() - y.mean()) ** 2)
        assert float(found[d]) == pytest.approx(expected, rel=1e-12)


def test_concordance_is_1_for_perfect_and_minus_1_for_mirrored_predictions():
    y = torch.tensor([[1.0], [2.0], [5.0]], dtype=torch.float64)
    assert concordance(ccc_moments(y, y)).tolist() == pytest.approx([1.0])
    assert concordance(ccc_moments(2 * y.mean() - y, y)).tolist() == pytest.approx([-1.0])
    assert concordance(ccc_moments(torch.full_like(y, 2.0), y)).tolist() == [0.0]


@pytest.mark.parametrize(
    "labels", [[[math.nan]] * 3, [[2.0], [math.nan], [math.nan]], [[0.1], [0.1], [0.1]], [[0.0]] * 3]
)
def test_fewer_than_two_labels_or_no_variance_give_no_concordance_and_no_gradient(labels):
    predictions = torch.tensor([[1.0], [2.0], [4.0]], requires_grad=True)
    labels = torch.tensor(labels, dtype=torch.float64)
    moments = ccc_moments(predictions, labels)
    assert concordance(moments).isnan().all()
    ccc_loss(predictions, labels, moments).backward()
    assert torch.equal(predictions.grad, torch.zeros(3, 1))


def test_moments_of_parts_add_up_and_an_utterance_of_weight_0_does_not_count():
    predictions, labels = rated(12)
    whole = ccc_moments(predictions, labels)
    parts = ccc_moments(predictions[:5], labels[:5]) + ccc_moments(predictions[5:], labels[5:])
    torch.testing.assert_close(parts, whole, rtol=1e-14, atol=0)
    weights = torch.tensor([1.0] * 5 + [0.0] * 7)
    torch.testing.assert_close(
        ccc_moments(predictions, labels, weights), ccc_moments(predictions[:5], labels[:5]), rtol=1e-14, atol=0
    )
    predictions.requires_grad_()
    ccc_loss(predictions, labels, whole, weights).backward()
    assert predictions.grad[:5].any() and not predictions.grad[5:].any()


def test_the_gradient_of_the_loss_is_that_of_1_minus_the_mean_concordance():
    predictions, labels = rated(20)
    predictions.requires_grad_()
    ccc_loss(predictions, labels, ccc_moments(predictions, labels)).backward()
    step = 1e-6
    for row, d in [(0, 0), (7, 1), (19, 0), (3, 1)]:
        values = []
        for sign in (1, -1):
            moved = predictions.detach().clone()
            moved[row, d] += sign * step
            values.append(float((1 - concordance(ccc_moments(moved, labels))).mean()))
        numeric = (values[0] - values[1]) / (2 * step)
        assert float(predictions.grad[row, d]) == pytest.approx(numeric, rel=1e-6, abs=1e-9)
    assert torch.equal(predictions.grad != 0, labels.isfinite())

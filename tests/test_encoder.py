"""The encoder by itself: company does not matter (N2), lengths, errors, LayerDrop, freezing, configurations."""

import json
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import pairwise
from unittest import mock

import pytest
import torch
from compare import NAN, assert_close, sound
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from ser.errors import AudioError, ConfigError
from ser.models import kernels
from ser.models.config import ARCHITECTURES, PRESETS, Architecture, Wav2Vec2Config
from ser.models.heads import Pooling
from ser.models.kernels import pack_frames, unpack_frames
from ser.models.multitask import HeadsConfig, MultiTaskModel
from ser.models.wav2vec2 import ATTENTIONS, POSITIONS, Attention, ConvLayer, Wav2Vec2, padding_mask
from ser.train.losses import classification_loss, ctc_loss

HEADS = HeadsConfig(num_emotions=4, vocab_size=9, num_speakers=3, pooling="mean+std")
# Without shrinking: a failure here is a failure of every example, and shrinking it takes minutes.
quick = settings(max_examples=10, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])


def batch_of(rows, *, padding=0.0, extra=0):
    """(B, S) with ``padding`` past each length, the lengths."""
    lengths = torch.tensor([len(row) for row in rows])
    batch = torch.full((len(rows), int(lengths.max()) + extra), padding, dtype=rows[0].dtype)
    for i, row in enumerate(rows):
        batch[i, : len(row)] = row
    return batch, lengths


def computed_by(path: str) -> AbstractContextManager:
    """Our kernels, as on a CPU, or torch's operations, as on a GPU."""
    return nullcontext() if path == "kernels" else mock.patch.object(kernels, "in_use", lambda x: False)


both_paths = pytest.mark.parametrize("path", ["kernels", "torch"])

# ---------------------------------------------------------------------------------------- company


@both_paths
@quick
@given(data=st.data())
def test_an_utterance_gives_the_same_output_alone_and_in_any_batch(config, randomise, path, data):
    """Every layer, the pooled vector and every head's scores; NaN stands in the padding."""
    lengths = data.draw(
        st.lists(st.integers(400, 5000) | st.sampled_from([400, 719, 720]), min_size=1, max_size=4)
    )
    extra = data.draw(st.sampled_from([0, 1, 319, 320, 1000]))
    model = randomise(MultiTaskModel(config, HEADS)).eval()
    rows = [sound(n, seed=i) * 10.0 ** (i - 1) + i for i, n in enumerate(lengths)]  # of unlike loudness and offset
    batch, num_samples = batch_of(rows, padding=NAN, extra=extra)
    with torch.no_grad(), computed_by(path):
        together, num_frames = model.wav2vec2.layers(batch, num_samples)
        scores = model(batch, num_samples)
        assert num_frames.tolist() == scores.num_frames.tolist() == config.num_frames(num_samples).tolist()
        pool = Pooling("mean+std", config.hidden_size)
        pooled = pool(together[-1], num_frames)
        for i, row in enumerate(rows):
            alone, frames = model.wav2vec2.layers(row[None])
            assert frames == num_frames[i] == alone[-1].shape[1]
            for found, wanted in zip(together, alone, strict=True):
                assert_close(found[i, : num_frames[i]], wanted[0])
            vector, single = pool(alone[-1], frames)[0], model(row[None])
            assert_close(pooled[i], vector)
            for found, wanted, head in (
                (scores.emotion[i], single.emotion[0], model.cls_head),
                (scores.speaker[i], single.speaker[0], model.speaker_head),
            ):  # relative to the sums' terms, which may cancel: rounding does not shrink with a score
                assert (found - wanted).norm() <= 1e-5 * (head.weight.norm() * vector.norm() + head.bias.norm())
            assert_close(scores.ctc[i, : num_frames[i]], single.ctc[0])


def utterance_loss(model, batch, num_samples, row, **masks):
    """Every head's loss on one utterance of the batch."""
    outputs = model(batch, num_samples, **masks)
    weights = torch.zeros(len(batch))
    weights[row] = 1.0
    emotion, _ = classification_loss(outputs.emotion, torch.tensor([1] * len(batch)), utterance_weights=weights)
    speaker, _ = classification_loss(outputs.speaker, torch.tensor([2] * len(batch)), utterance_weights=weights)
    targets, lengths = torch.tensor([[3, 3, 1]] * len(batch)), torch.tensor([3] * len(batch))
    ctc, _ = ctc_loss(outputs.ctc, outputs.num_frames, targets, lengths, utterance_weights=weights)
    return emotion + 0.5 * ctc + 0.3 * speaker


def gradient(model, *args, **masks):
    model.zero_grad()
    utterance_loss(model, *args, **masks).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@both_paths
@settings(quick, max_examples=6)
@given(
    length=st.integers(2000, 4000),
    others=st.lists(st.integers(400, 6000), min_size=1, max_size=3),
    extra=st.sampled_from([0, 7, 700]),
)
def test_the_gradient_of_an_utterance_depends_neither_on_company_nor_on_padding(
    config, randomise, path, length, others, extra
):
    with computed_by(path):
        assert_the_gradient_is_that_of_the_utterance_alone(config, randomise, length, others, extra)


def assert_the_gradient_is_that_of_the_utterance_alone(config, randomise, length, others, extra):
    model = randomise(MultiTaskModel(config, HEADS)).double().eval()
    rows = [sound(n, seed=i).double() for i, n in enumerate([length, *others])]
    alone = gradient(model, rows[0][None], None, 0)
    whole = torch.stack([g.norm() for g in alone.values()]).norm()
    zeros = gradient(model, *batch_of(rows, extra=extra), 0)
    for padding in (NAN, 1e30):
        found = gradient(model, *batch_of(rows, padding=padding, extra=extra), 0)
        assert all(torch.equal(found[name], zeros[name]) for name in zeros)
    for name, wanted in alone.items():
        error = (zeros[name] - wanted).norm()
        assert error <= 1e-9 * wanted.norm() + 1e-12 * whole, f"{name}: {error:.2e} of {wanted.norm():.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_kernels_give_the_outputs_and_gradients_of_torch_s_operations(config, randomise, checkpointing, dtype):
    """Dropout apart, whose masks are drawn in another way; where nothing is padded, too."""
    quiet = {name: 0.0 for name in config.to_dict() if name.endswith(("dropout", "drop"))}
    model = randomise(MultiTaskModel(replace(config, **quiet), HEADS)).to(dtype).train()
    model.wav2vec2.activation_checkpointing(checkpointing)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    rows = [sound(n, seed=n).to(dtype) for n in (6000, 400, 2500)]
    for batch, num_samples in (batch_of(rows, padding=NAN), batch_of(rows[:1])):
        outputs, gradients = [], []
        for path in ("kernels", "torch"):
            with computed_by(path):
                outputs.append(model(batch, num_samples))
                gradients.append(gradient(model, batch, num_samples, 0))
        assert_close(outputs[1].emotion, outputs[0].emotion, tolerance)
        for row, frames in enumerate(outputs[0].num_frames.tolist()):
            assert_close(outputs[1].ctc[row, :frames], outputs[0].ctc[row, :frames], tolerance)
        whole = torch.stack([g.norm() for g in gradients[0].values()]).norm()
        assert gradients[0].keys() == gradients[1].keys()
        for name, wanted in gradients[0].items():
            assert (gradients[1][name] - wanted).norm() <= tolerance * (wanted.norm() + whole), name


def test_a_frozen_feature_encoder_gives_the_same_features_by_kernels_and_by_torch(config, randomise):
    model = randomise(Wav2Vec2(config)).eval()
    batch, num_samples = batch_of([sound(n) + 3 for n in (40_000, 400, 9000)])
    with torch.no_grad():
        features, num_frames = model.feature_extractor(batch, num_samples)
        with computed_by("torch"):
            found, frames = model.feature_extractor(batch, num_samples)
    assert torch.equal(num_frames, frames)
    for row, count in enumerate(frames.tolist()):
        assert_close(found[row, :count], features[row, :count])


def test_training_with_dropout_on_torch_s_operations_is_what_checkpointing_repeats(config, randomise):
    model = randomise(Wav2Vec2(config)).train()
    batch, num_samples = batch_of([sound(6000), sound(3000)])
    found = []
    for enabled in (False, True):
        model.activation_checkpointing(enabled)
        model.zero_grad()
        torch.manual_seed(0)
        with computed_by("torch"):
            hidden, _ = model(batch, num_samples)
            hidden.square().sum().backward()
        found.append([hidden, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert not torch.equal(found[0][0], model.eval()(batch, num_samples)[0]), "dropout was on"


def test_spec_augment_masks_change_nothing_for_the_neighbours(config, randomise):
    model = randomise(Wav2Vec2(replace(config, mask_time_prob=0.5))).eval()
    batch, num_samples = batch_of([sound(3000), sound(5000, seed=2)], padding=NAN)
    mask_time = torch.zeros(2, int(config.num_frames(torch.tensor(5000))), dtype=torch.bool)
    mask_time[0, 2:4] = True
    mask_feature = torch.zeros(2, config.hidden_size, dtype=torch.bool)
    mask_feature[0, :5] = True
    with torch.no_grad():
        masked, frames = model(batch, num_samples, mask_time=mask_time, mask_feature=mask_feature)
        plain, _ = model(batch, num_samples)
        alone, _ = model(batch[:1, :3000], mask_time=mask_time[:1, : frames[0]], mask_feature=mask_feature[:1])
    assert_close(masked[1], plain[1])
    assert_close(masked[0, : frames[0]], alone[0])
    assert (masked[0, : frames[0]] - plain[0, : frames[0]]).norm() > 0.01 * plain[0].norm()


def test_a_bfloat16_model_takes_padded_batches_too(config, randomise):
    model = randomise(MultiTaskModel(config, HEADS)).bfloat16().eval()
    batch, num_samples = batch_of([sound(3000).bfloat16(), sound(5000, seed=2).bfloat16()], padding=NAN)
    with torch.no_grad():
        together, alone = model(batch, num_samples), model(batch[:1, :3000])
    assert_close(together.emotion[0].float(), alone.emotion[0].float(), 0.1)
    assert_close(together.ctc[0, : alone.num_frames[0]].float(), alone.ctc[0].float(), 0.1)


@both_paths
def test_company_matters_little_under_autocast(config, randomise, path):
    model = randomise(MultiTaskModel(config, HEADS)).eval()
    batch, num_samples = batch_of([sound(3000), sound(5000, seed=2)], padding=NAN)
    with torch.no_grad():
        exact = model(batch[:1, :3000])
        with torch.autocast("cpu", dtype=torch.bfloat16), computed_by(path):
            together, alone = model(batch, num_samples), model(batch[:1, :3000])
    for found in (together, alone):
        assert_close(found.emotion[0].float(), exact.emotion[0], 0.1)


# ---------------------------------------------------------------------------------------- lengths and bad input


def test_layers_on_a_cpu_see_no_padding(config, randomise):
    model = randomise(Wav2Vec2(config)).eval()
    seen = []
    for layer in model.encoder.layers:
        layer.feed_forward.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[:-1]))
    batch, num_samples = batch_of([sound(n) for n in (3000, 1000, 2000)])
    _, num_frames = model(batch, num_samples)
    assert seen == [(1, int(num_frames.sum()))] * config.num_hidden_layers


def test_utterances_one_after_another_attend_as_in_a_padded_batch(config, randomise):
    """The one is what a CPU computes, the other a GPU."""
    model = randomise(Wav2Vec2(config)).eval()
    attention, lengths = model.encoder.layers[0].attention, [7, 12, 1]
    padded = sound(3, 12, config.hidden_size)
    attend = ~padding_mask(torch.tensor(lengths), 12, padded.device)[:, None, None]
    bias = attention.position_bias(12)
    expected = pack_frames(attention(padded, attend, bias), lengths)
    found = attention(pack_frames(padded, lengths), None, bias, lengths)
    assert found.shape == (1, 20, config.hidden_size)
    assert_close(found, expected)
    unpacked = unpack_frames(pack_frames(padded, lengths), lengths, 12)
    for row, length, again in zip(padded, lengths, unpacked, strict=True):
        assert torch.equal(again[:length], row[:length]) and not again[length:].any()


def test_frames_of_each_length():
    samples = torch.tensor([0, 1, 399, 400, 401, 719, 720])
    assert Wav2Vec2Config().num_frames(samples).tolist() == [0, 0, 0, 1, 1, 1, 2]
    assert Wav2Vec2Config().min_samples == 400


@pytest.mark.parametrize("samples", [400, 401, 719, 720, 1039, 1040, 5000, 16000])
def test_the_encoder_gives_as_many_frames_as_the_configuration_says(config, samples):
    with torch.no_grad():
        hidden, num_frames = Wav2Vec2(config).eval()(sound(samples)[None])
    assert hidden.shape == (1, (samples - 400) // 320 + 1, config.hidden_size)
    assert num_frames.tolist() == config.num_frames(torch.tensor([samples])).tolist() == [hidden.shape[1]]


@given(
    samples=st.integers(0, 200),
    kernels=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    strides=st.lists(st.integers(1, 5), min_size=3, max_size=3),
)
@quick
def test_frame_counts_are_those_of_torch_s_convolutions(samples, kernels, strides):
    strides = strides[: len(kernels)]
    config = Wav2Vec2Config(conv_dim=(1,) * len(kernels), conv_kernel=tuple(kernels), conv_stride=tuple(strides))
    x = torch.zeros(1, 1, samples)
    for kernel, stride in zip(kernels, strides, strict=True):
        x = F.conv1d(x, torch.zeros(1, 1, kernel), stride=stride) if x.shape[-1] >= kernel else x[..., :0]
    assert config.num_frames(torch.tensor(samples)) == x.shape[-1]
    assert (samples >= config.min_samples) == (x.shape[-1] > 0)


@pytest.mark.parametrize("samples", [0, 1, 399])
def test_input_too_short_for_a_frame_is_an_error_that_says_so(config, samples):
    model = Wav2Vec2(config).eval()
    with pytest.raises(AudioError, match=rf"utterance 0 of the batch has {samples} samples; at least 400"):
        model(torch.zeros(1, samples))
    with pytest.raises(AudioError, match=rf"utterance 1 of the batch has {samples} samples; at least 400"):
        model(torch.zeros(2, 800), [800, samples])


@pytest.mark.parametrize(
    ("waveforms", "num_samples", "message"),
    [
        (torch.zeros(800), None, r"shape \(800,\)"),
        (torch.zeros(1, 1, 800), None, r"shape \(1, 1, 800\)"),
        (torch.zeros(1, 800, dtype=torch.int16), None, "torch.int16"),
        (torch.zeros(1, 800, dtype=torch.float64), None, r"torch.float64 and the model is torch.float32"),
        (torch.zeros(2, 800), [800], r"num_samples has shape \(1,\); expected \(2,\)"),
        (torch.zeros(2, 800), torch.tensor([[800, 800]]), r"num_samples has shape \(1, 2\)"),
        (torch.zeros(2, 800), [800, 801], "utterance 1 of the batch has 801 samples.* 800 long"),
        (torch.zeros(2, 800), [-5, 800], "utterance 0 of the batch has -5 samples"),
        (torch.zeros(2, 800), torch.tensor([0.5, 1.0]), "utterance 0 of the batch has 0 samples"),
    ],
)
def test_input_of_a_wrong_shape_type_or_length_is_an_error_that_says_so(config, waveforms, num_samples, message):
    with pytest.raises(AudioError, match=message):
        Wav2Vec2(config).eval()(waveforms, num_samples)


def test_lengths_may_be_a_list_a_generator_a_tensor_or_absent(config, randomise):
    model = randomise(Wav2Vec2(config)).eval()
    x = torch.stack([sound(800), sound(800, seed=2)])
    with torch.no_grad():
        results = [
            model(x, given)[0] for given in ([800, 800], (n for n in (800, 800)), torch.tensor([800] * 2), None)
        ]
    assert all(torch.equal(results[0], result) for result in results)


# ---------------------------------------------------------------------------------------- layers


def test_the_output_of_all_layers_has_one_more_entry_than_there_are_layers(config):
    model = Wav2Vec2(replace(config, num_hidden_layers=5)).eval()
    outputs, _ = model.layers(sound(800)[None])
    assert len(outputs) == 6
    assert all(x.shape == (1, 2, config.hidden_size) for x in outputs)
    assert torch.equal(outputs[-1], model(sound(800)[None])[0])


def test_layerdrop_of_one_gives_the_embedding_and_zero_gradients_for_every_skipped_parameter(config, randomise):
    model = randomise(Wav2Vec2(replace(config, layerdrop=1.0, hidden_dropout=0.0, feat_proj_dropout=0.0))).train()
    outputs, _ = model.layers(sound(3000)[None])
    embedding = model.encoder.layer_norm(outputs[0]) if config.do_stable_layer_norm else outputs[0]
    assert torch.equal(outputs[-1], embedding)
    (outputs[-1] * torch.randn_like(outputs[-1])).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        skipped = name.startswith("encoder.layers.") or name == "masked_spec_embed"
        # The mean that the group norm subtracts holds the bias of the convolution before it.
        skipped |= name == "feature_extractor.conv_layers.0.conv.bias" and config.feat_extract_norm == "group"
        assert parameter.grad.any() != skipped, name


def test_a_skipped_layer_hides_even_weights_that_are_not_finite(config, randomise):
    model = randomise(Wav2Vec2(replace(config, layerdrop=1.0))).train()
    with torch.no_grad():
        model.encoder.layers[0].attention.k_proj.weight.fill_(NAN)
    hidden, _ = model(sound(800)[None])
    hidden.sum().backward()
    assert hidden.isfinite().all()
    assert not model.encoder.layers[0].attention.k_proj.weight.grad.any()


def test_layerdrop_skips_about_its_share_of_layers_and_only_in_training(config, randomise):
    quiet = dict.fromkeys(("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout"), 0.0)
    model = randomise(Wav2Vec2(replace(config, layerdrop=0.3, num_hidden_layers=4, **quiet)))
    torch.manual_seed(0)
    model.train()
    kept = 0
    for _ in range(100):
        with torch.no_grad():
            outputs, _ = model.layers(sound(400)[None])
        kept += sum(not torch.equal(a, b) for a, b in pairwise(outputs[:-1]))
    assert 0.6 <= kept / 300 <= 0.8
    model.eval()
    with torch.no_grad():
        outputs, _ = model.layers(sound(400)[None])
        again = Wav2Vec2(replace(model.config, layerdrop=0.0)).eval()
        again.load_state_dict(model.state_dict())
        assert torch.equal(outputs[-1], again(sound(400)[None])[0])


def test_dropout_acts_in_training_at_every_place_that_has_a_rate(config, randomise):
    """Each rate alone changes the output in training and not in evaluation."""
    names = ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout", "final_dropout")
    off = dict.fromkeys((*names, "layerdrop"), 0.0)
    x = sound(3000)[None]
    for name in names:
        model = randomise(MultiTaskModel(replace(config, **(off | {name: 0.5})), HEADS))
        torch.manual_seed(0)
        with torch.no_grad():
            first, second = model.train()(x).emotion, model(x).emotion
            assert not torch.allclose(first, second), name
            assert torch.equal(model.eval()(x).emotion, model(x).emotion), name


def test_activation_checkpointing_changes_neither_outputs_nor_gradients_with_dropout_on(config, randomise):
    model = randomise(Wav2Vec2(replace(config, layerdrop=0.3, feat_proj_dropout=0.1))).train()
    batch, num_samples = batch_of([sound(3000), sound(5000, seed=2)])
    found = {}
    for enabled in (False, True):
        model.activation_checkpointing(enabled)
        model.zero_grad()
        torch.manual_seed(3)
        saved = 0

        def keep(tensor):
            nonlocal saved
            saved += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            hidden, _ = model(batch, num_samples)
        hidden.square().sum().backward()
        found[enabled] = hidden, {n: p.grad.clone() for n, p in model.named_parameters()}, saved
    assert torch.equal(found[False][0], found[True][0])
    assert all(torch.equal(g, found[True][1][name]) for name, g in found[False][1].items())
    assert found[True][2] < 0.5 * found[False][2]  # and it does keep less


# ---------------------------------------------------------------------------------------- freezing


def test_a_frozen_encoder_runs_in_eval_mode_and_gets_no_gradient(config, randomise):
    model = randomise(MultiTaskModel(replace(config, layerdrop=0.5, final_dropout=0.0), HEADS)).train()
    model.freeze("encoder")
    model.train()
    assert model.training and not any(p.requires_grad for p in model.wav2vec2.parameters())
    assert not any(module.training for module in model.wav2vec2.modules())
    x = sound(3000)[None]
    assert torch.equal(model(x).emotion, model(x).emotion)
    utterance_loss(model, x, None, 0).backward()
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None} == {
        "cls_head",
        "lm_head",
        "speaker_head",
    }


def test_a_frozen_feature_encoder_leaves_the_rest_training(config, randomise):
    model = randomise(MultiTaskModel(replace(config, layerdrop=0.0), HEADS)).train()
    model.freeze("feature-encoder")
    assert not any(module.training for module in model.wav2vec2.feature_extractor.modules())
    assert model.wav2vec2.training and model.wav2vec2.encoder.training
    utterance_loss(model, sound(3000)[None], None, 0).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith("wav2vec2.feature_extractor."), name
    assert not any(m.training for m in model.eval().modules())
    assert not model.train().wav2vec2.feature_extractor.training


def test_freezing_nothing_trains_everything_and_an_unknown_part_is_named(config):
    model = MultiTaskModel(config, HEADS)
    model.freeze("none")
    assert all(p.requires_grad for p in model.parameters()) and model.wav2vec2.training
    with pytest.raises(ConfigError, match=r"'decoder'; expected one of none, feature-encoder, encoder"):
        model.freeze("decoder")


# ---------------------------------------------------------------------------------------- a new architecture


class DistanceAttention(Attention):
    """A penalty on distance, with a slope for each head (ALiBi)."""

    def position_bias(self, frames):
        place = torch.arange(frames)
        slopes = 0.5 ** torch.arange(1, self.num_heads + 1)
        return -(slopes[:, None, None] * (place[:, None] - place).abs())[None]


class NoPositions(torch.nn.Module):
    def __init__(self, config):
        super().__init__()

    def forward(self, hidden, padding):
        return torch.zeros_like(hidden)


@both_paths
def test_a_row_and_its_layers_make_another_encoder(monkeypatch, styles, randomise, path):
    row = Architecture(
        "Wav2Vec2",
        "wav2vec2.",
        attention="distance",
        positions="none",
        fields=("conv_pos_kernel_size", "conv_pos_batch_norm"),
        defaults={"num_attention_heads": 6},
        fixed={"do_stable_layer_norm": True},
    )
    with pytest.raises(ConfigError, match="model_type is 'wav2vec2-distance'; expected one of wav2vec2, hubert"):
        replace(styles["small-style"], model_type="wav2vec2-distance")
    monkeypatch.setitem(ATTENTIONS, "distance", DistanceAttention)
    monkeypatch.setitem(POSITIONS, "none", NoPositions)
    monkeypatch.setitem(ARCHITECTURES, "wav2vec2-distance", row)
    config = replace(styles["small-style"], model_type="wav2vec2-distance", conv_pos_kernel_size=3)
    assert Wav2Vec2Config.from_dict(config.to_dict()) == config and config.to_dict()["conv_pos_kernel_size"] == 3
    read = Wav2Vec2Config.from_dict({"model_type": "wav2vec2-distance", "do_stable_layer_norm": False})
    assert (read.num_attention_heads, read.do_stable_layer_norm) == (6, True)
    with pytest.raises(ConfigError, match=r"^wav2vec2-distance has do_stable_layer_norm true$"):
        replace(config, do_stable_layer_norm=False)
    with pytest.raises(ConfigError, match="only hubert or wav2vec2-distance has a choice"):
        replace(styles["small-style"], conv_pos_batch_norm=True)
    model = randomise(Wav2Vec2(config)).eval()
    batch, num_samples = batch_of([sound(3000), sound(9000, seed=2)], padding=NAN)
    with torch.no_grad(), computed_by(path):
        together, frames = model(batch, num_samples)
        assert_close(together[0, : frames[0]], model(batch[:1, :3000])[0][0])
        monkeypatch.setattr(DistanceAttention, "position_bias", Attention.position_bias)
        assert (model(batch, num_samples)[0][1] - together[1]).norm() > 0.01 * together[1].norm()


# ---------------------------------------------------------------------------------------- configurations


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("add_adapter", True),
        ("adapter_attn_dim", 16),
        ("hidden_act", "relu"),
        ("hidden_act", "gelu_new"),
        ("feat_extract_activation", "relu"),
        ("feat_proj_layer_norm", False),
        ("conv_pos_batch_norm", True),
        ("is_decoder", True),
        ("model_type", "wav2vec2-bert"),
        ("model_type", ["wavlm"]),
        ("num_buckets", 32),
        ("conv_pos_kernel_size", 9),
        ("feat_extract_norm", "batch"),
        ("hidden_size", "768"),
        ("hidden_size", 768.0),
        ("hidden_size", None),
        ("hidden_size", True),
        ("conv_bias", 1),
        ("conv_dim", 512),
        ("conv_dim", [512.0] * 7),
        ("conv_dim", []),
        ("conv_dim", [512] * 6),
        ("layer_norm_eps", "1e-5"),
        ("layer_norm_eps", 0.0),
        ("layer_norm_eps", float("nan")),
        ("hidden_dropout", 1.5),
        ("layerdrop", -0.1),
        ("mask_time_prob", 2),
        ("mask_time_min_masks", -1),
        ("num_attention_heads", 7),
        ("num_conv_pos_embedding_groups", 5),
        ("conv_stride", [0] * 7),
        ("hidden_size", 10**9),
        ("num_hidden_layers", 10**9),
        ("num_attention_heads", 10**9),
        ("intermediate_size", 10**9),
        ("num_conv_pos_embeddings", 10**9),
        ("num_conv_pos_embedding_groups", 10**9),
        ("conv_dim", [10**9] * 7),
        ("conv_kernel", [10**9] * 7),
        ("conv_dim", [8] * 1000),
        ("mask_time_length", 10**9),
        ("mask_feature_length", 0),
    ],
)
def test_a_configuration_that_cannot_be_built_is_refused_by_name_at_once(key, value):
    start = time.perf_counter()
    with pytest.raises(ConfigError, match=key):
        Wav2Vec2Config.from_dict({key: value})
    assert time.perf_counter() - start < 1


def test_a_configuration_survives_the_way_through_json_keys_and_foreign_keys_are_left(config):
    values = config.to_dict() | {
        "vocab_size": 32,
        "add_adapter": False,
        "hidden_act": "gelu",
        "architectures": ["x"],
    }
    assert isinstance(values["conv_dim"], list)
    assert Wav2Vec2Config.from_dict(values) == config


@pytest.mark.parametrize(("name", "nearest"), [("bse", "base"), ("Large", "large"), ("smal", "small")])
def test_a_misspelt_preset_suggests_the_nearest(name, nearest):
    with pytest.raises(ConfigError, match=rf"no preset is called '{name}'.*did you mean '{nearest}'"):
        Wav2Vec2Config.named(name)


@pytest.mark.parametrize(
    ("name", "parameters", "within"),
    [("small", 2e6, 0.2), ("base", 94.37e6, 1e-4), ("large", 315.43e6, 1e-4), ("large-lv60", 315.44e6, 1e-4)],
)
def test_presets_have_the_stated_sizes(name, parameters, within):
    with torch.device("meta"):
        model = Wav2Vec2(Wav2Vec2Config.named(name))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=within)
    assert set(PRESETS) == {"small", "base", "large", "large-lv60"}


@pytest.mark.parametrize("name", ["base", "large", "large-lv60"])
def test_presets_are_the_public_configurations(name, hf_configs):
    folder = {
        "base": "facebook-wav2vec2-base-960h",
        "large": "wav2vec2-large-960h-style-4.3.0",
        "large-lv60": "facebook-wav2vec2-large-960h-lv60-self",
    }[name]
    if not (hf_configs / folder / "config.json").is_file():
        pytest.skip(f"{folder} is not in {hf_configs}")
    public = json.loads((hf_configs / folder / "config.json").read_text())
    ours = Wav2Vec2Config.named(name).to_dict()
    given = {key: public[key] for key in ours if key in public}
    assert given == {key: ours[key] for key in given}
    assert len(given) >= 12


@torch.no_grad()
def test_new_weights_are_drawn_as_the_reference_draws_them():
    torch.manual_seed(0)
    model = Wav2Vec2(replace(PRESETS["small"], conv_bias=True))
    for layer in model.feature_extractor.conv_layers:
        assert isinstance(layer, ConvLayer)
        fan_in = layer.conv.in_channels * layer.conv.kernel_size[0]
        assert layer.conv.weight.std() == pytest.approx((2 / fan_in) ** 0.5, rel=0.15)
        assert 0 < layer.conv.bias.abs().max() <= fan_in**-0.5
    bound = model.feature_projection.projection.in_features**-0.5
    assert model.feature_projection.projection.weight.std() == pytest.approx(bound / 3**0.5, rel=0.05)
    conv = model.encoder.pos_conv_embed.conv
    assert conv.weight.std() == pytest.approx(2 / (conv.kernel_size[0] * conv.in_channels) ** 0.5, rel=0.05)
    for layer in model.encoder.layers:
        for linear in (layer.attention.q_proj, layer.attention.out_proj, layer.feed_forward.output_dense):
            assert linear.weight.std() == pytest.approx(0.02, rel=0.05)
            assert not linear.bias.any()
    assert bool(((model.masked_spec_embed >= 0) & (model.masked_spec_embed <= 1)).all())

"""N1: with the same weights and one unpadded utterance, `ser` computes what the reference implementations do.

References: `transformers` and `torchaudio`, built at random from a configuration; nothing is downloaded.
"""

import importlib
import json
from dataclasses import replace

import pytest
import torch
from compare import assert_close, sound
from parity import encoder_row
from public import ENCODERS
from torch.nn import functional as F

from ser.models.config import Wav2Vec2Config, conv_length
from ser.models.multitask import HeadsConfig, MultiTaskModel
from ser.models.pretrained import written_names
from ser.models.wav2vec2 import ConvLayer, Wav2Vec2
from ser.train.losses import ctc_loss

transformers = pytest.importorskip("transformers", reason="transformers is the reference: see the extra test")
modeling = pytest.importorskip("transformers.models.wav2vec2.modeling_wav2vec2")

LENGTHS = [400, 401, 719, 720, 3000, 8003]  # 400 make the first frame, 720 the second
SIZES = {  # a public configuration at a size that a laptop computes at once
    "conv_dim": [8] * 7,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
}


def reference_class(config, suffix="Model"):
    """Such as WavLMForCTC for a configuration of WavLM."""
    return getattr(transformers, config.architecture.classes + suffix)


def reference_with_the_weights_of(ours, values=None, *, suffix="Model", **settings):
    """The reference for our configuration, or for these values of a config.json, with our weights."""
    config = ours.config
    values = values or config.to_dict() | {"num_feat_extract_layers": len(config.conv_dim)}
    cls = reference_class(config, suffix)
    with torch.device("meta"):
        reference = cls(cls.config_class(**(values | settings)))
    state = ours.state_dict()
    keys = written_names(state, config, classifier="cls_head" if getattr(ours, "projector", None) else None)
    reference.load_state_dict({keys[name]: value for name, value in state.items()}, strict=True, assign=True)
    return reference.eval()


def twins(config, randomise, dtype=torch.float32):
    """(ours, reference) in eval mode."""
    ours = randomise(Wav2Vec2(config)).to(dtype).eval()
    return ours, reference_with_the_weights_of(ours)


def gradients(module, rename=str):
    return {rename(name): p.grad for name, p in module.named_parameters() if p.grad is not None}


def our_gradients(model):
    """Of a `MultiTaskModel`, by the reference's names."""
    keys = written_names(model.state_dict(), model.config, classifier="cls_head" if model.projector else None)
    return gradients(model, keys.__getitem__)


def assert_same_gradients(found, expected, *, relative, of_whole):
    """Per parameter: within ``relative`` of its norm and ``of_whole`` of the whole gradient's."""
    assert {name for name, g in found.items() if g.any()} <= set(expected)
    whole = torch.stack([g.norm() for g in expected.values()]).norm()
    assert whole > 0
    for name, gradient in expected.items():
        error = (found[name] - gradient).norm()
        assert error <= relative * gradient.norm() + of_whole * whole, (
            f"{name}: {error:.2e} of {gradient.norm():.2e}"
        )


GRADIENT_TOLERANCES = {
    torch.float64: {"relative": 1e-9, "of_whole": 1e-12},  # N1 allows 1e-6 of the whole; we hold far more
    torch.float32: {"relative": 0.0, "of_whole": 1e-4},
}


# ---------------------------------------------------------------------------------------- transformers, by parts


def test_parameter_names_and_shapes_are_those_of_the_reference(config):
    with torch.device("meta"):
        ours = Wav2Vec2(config)
        cls = reference_class(config)
        reference = cls(cls.config_class(**config.to_dict()))
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in reference.state_dict().items()
    }


@pytest.mark.parametrize("samples", LENGTHS)
def test_feature_encoder_equals_the_reference(config, randomise, samples):
    ours, reference = twins(config, randomise)
    x = sound(2, samples)
    features, num_frames = ours.feature_extractor(x, torch.full((2,), samples))
    assert_close(features.transpose(1, 2), reference.feature_extractor(x))
    assert num_frames.tolist() == [features.shape[1]] * 2
    assert num_frames.tolist() == [int(reference._get_feat_extract_output_lengths(samples))] * 2


def test_each_convolution_equals_the_reference(config, randomise):
    ours, reference = twins(config, randomise)
    for i, (layer, expected) in enumerate(
        zip(ours.feature_extractor.conv_layers, reference.feature_extractor.conv_layers, strict=True)
    ):
        assert isinstance(layer, ConvLayer)
        x = sound(2, layer.conv.in_channels, 50, seed=i)
        across = x.transpose(1, 2)  # channels last
        frames = conv_length(torch.tensor([50, 50]), layer.conv.kernel_size[0], layer.conv.stride[0])
        assert_close(layer(across, frames).transpose(1, 2), expected(x))


def test_feature_projection_equals_the_reference(config, randomise):
    ours, reference = twins(config, randomise)
    x = sound(2, 11, config.conv_dim[-1])
    expected = reference.feature_projection(x)
    assert_close(ours.feature_projection(x), expected[0] if isinstance(expected, tuple) else expected)


@pytest.mark.parametrize("frames", [1, 2, 3, 8, 31])
def test_positional_convolution_equals_the_reference(config, randomise, frames):
    ours, reference = twins(config, randomise)
    x = sound(2, frames, config.hidden_size)
    assert_close(ours.encoder.pos_conv_embed(x, None), reference.encoder.pos_conv_embed(x))


@pytest.mark.parametrize("frames", [1, 2, 17])
def test_attention_feed_forward_and_layer_equal_the_reference(config, randomise, frames):
    ours, reference = twins(config, randomise)
    x = sound(2, frames, config.hidden_size)
    bias, shared = None, {}  # WavLM: the first layer's, for all
    if config.model_type == "wavlm":
        bias = ours.encoder.layers[0].attention.position_bias(frames)
        theirs = reference.encoder.layers[0].attention.compute_bias(frames, frames)  # (H, T, T)
        assert torch.equal(bias[0], theirs)
        shared = {"position_bias": theirs.repeat(2, 1, 1)}
    for layer, expected in zip(ours.encoder.layers, reference.encoder.layers, strict=True):
        assert_close(layer.attention(x, None, bias), expected.attention(x, **shared)[0])
        assert_close(layer.feed_forward(x), expected.feed_forward(x))
        found = expected(x, **shared)
        assert_close(layer(x, None, bias), found[0] if isinstance(found, tuple) else found)


def test_wavlm_s_classes_of_distance_are_the_reference_s_at_every_distance(styles):
    for buckets, distance in ((320, 800), (20, 12), (32, 50), (4, 2), (5, 9), (7, 1000)):
        config = replace(styles["wavlm-base-style"], num_buckets=buckets, max_bucket_distance=distance)
        offsets = torch.arange(-2500, 2501)
        theirs = reference_class(config)(transformers.WavLMConfig(**config.to_dict())).encoder.layers[0].attention
        ours = Wav2Vec2(config).encoder.layers[0].attention.buckets(offsets)
        assert torch.equal(ours, theirs._relative_positions_bucket(offsets))
        assert ours.min() >= 0 and ours.max() < buckets


def test_attention_equals_the_written_out_formula(wav2vec2_config, randomise):
    """The reference too may call torch's fused kernel, so here is the sum itself."""
    config = wav2vec2_config
    attention = randomise(Wav2Vec2(config)).double().eval().encoder.layers[0].attention
    x = sound(5, config.hidden_size, dtype=torch.float64)
    size = config.hidden_size // config.num_attention_heads
    heads = []
    for head in range(config.num_attention_heads):
        rows = slice(head * size, (head + 1) * size)
        q, k, v = (
            x @ p.weight[rows].T + p.bias[rows] for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        heads.append(torch.softmax(q @ k.T / size**0.5, dim=-1) @ v)
    assert_close(attention(x[None], None)[0], attention.out_proj(torch.cat(heads, dim=-1)), 1e-12)


@pytest.mark.parametrize("frames", [1, 2, 17])
def test_transformer_equals_the_reference(config, randomise, frames):
    ours, reference = twins(config, randomise)
    x = sound(2, frames, config.hidden_size)
    assert_close(ours.encoder.final_norm(ours.encoder(x, None)[-1]), reference.encoder(x).last_hidden_state)


# ---------------------------------------------------------------------------------------- transformers, whole


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("samples", LENGTHS)
def test_every_layer_equals_the_reference(config, randomise, samples, attention):
    ours, reference = twins(config, randomise)
    reference.set_attn_implementation(attention)
    x = sound(1, samples)
    with torch.no_grad():
        outputs, _ = ours.layers(x)
        expected = reference(x, output_hidden_states=True)
    assert len(outputs) == len(expected.hidden_states) == config.num_hidden_layers + 1
    for found, wanted in zip(outputs[:-1], expected.hidden_states[:-1], strict=True):
        assert_close(found, wanted)
    # Pre-norm: the reference's last hidden state has the final norm, its hidden_states[-1] has not.
    assert_close(outputs[-1], expected.last_hidden_state)
    assert_close(ours(x)[0], expected.last_hidden_state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("samples", [720, 4000])
def test_gradients_equal_the_reference(config, randomise, samples, dtype):
    ours, reference = twins(config, randomise, dtype)
    x = sound(1, samples, dtype=dtype)
    hidden, expected = ours(x)[0], reference(x).last_hidden_state
    direction = sound(*hidden.shape, dtype=dtype, seed=2)
    for output in (hidden, expected):
        (output * direction).sum().backward()
    assert_same_gradients(gradients(ours), gradients(reference), **GRADIENT_TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ctc_logits_loss_and_gradients_equal_the_reference(config, randomise, dtype):
    model = randomise(MultiTaskModel(config, HeadsConfig(vocab_size=11))).to(dtype).eval()
    reference = reference_with_the_weights_of(
        model, suffix="ForCTC", vocab_size=11, pad_token_id=0, ctc_loss_reduction="sum"
    )
    x, labels = sound(1, 5000, dtype=dtype), torch.tensor([[4, 4, 7, 10, 1]])

    outputs, expected = model(x), reference(x, labels=labels)
    total, count = ctc_loss(outputs.ctc, outputs.num_frames, labels, torch.tensor([5]))
    assert_close(outputs.ctc, expected.logits)
    assert_close(total.float(), expected.loss)
    assert count == 1
    loss = expected.loss
    if dtype == torch.float64:  # the reference's own loss rounds its logits to float32
        log_probs = expected.logits.log_softmax(-1).transpose(0, 1)
        loss = F.ctc_loss(log_probs, labels, outputs.num_frames, torch.tensor([5]), reduction="sum")
        assert_close(total, loss, 1e-12)
    total.backward()
    loss.backward()
    assert_same_gradients(our_gradients(model), gradients(reference), **GRADIENT_TOLERANCES[dtype])


def test_outputs_under_spec_augment_masks_equal_the_reference(config, randomise, monkeypatch):
    """In training mode, with our masks in the place of the reference's own draw."""
    quiet = dict.fromkeys(
        ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout", "layerdrop"), 0.0
    )
    config = replace(config, mask_time_prob=0.3, mask_feature_prob=0.3, **quiet)
    ours, reference = twins(config, randomise)
    x = sound(2, 6000)
    generator = torch.Generator().manual_seed(3)
    mask_time = torch.rand(2, int(config.num_frames(torch.tensor(6000))), generator=generator) < 0.4
    mask_feature = torch.rand(2, config.hidden_size, generator=generator) < 0.4
    monkeypatch.setattr(
        importlib.import_module(type(reference).__module__),
        "_compute_mask_indices",
        lambda shape, **_: (mask_feature if shape[1] == config.hidden_size else mask_time).numpy(),
    )
    ours.train()
    reference.train()
    for module in reference.modules():
        if isinstance(module, torch.nn.BatchNorm1d):  # ours always has the running statistics
            module.eval()
    hidden = ours(x, mask_time=mask_time, mask_feature=mask_feature)[0]
    expected = reference(x).last_hidden_state
    assert_close(hidden, expected)
    assert not torch.allclose(hidden, ours(x)[0])

    ours.eval()
    reference.eval()
    assert_close(
        ours(x, mask_time=mask_time)[0], reference(x, mask_time_indices=mask_time.clone()).last_hidden_state
    )


# ------------------------------------------------------------------------------------ configurations of the public


def public_config(folder, name) -> dict:
    file = folder / name / "config.json"
    if not file.is_file():
        pytest.skip(f"{file} is not here")
    return json.loads(file.read_text())


PUBLIC = [
    "facebook-wav2vec2-base-960h",
    "facebook-wav2vec2-large-960h-lv60-self",
    "leonardvorbeck-wav2vec2-large-robust-LS960",
    "wav2vec2-large-960h-style-4.3.0",
]


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_configuration_scaled_down_equals_the_reference(hf_configs, randomise, name):
    values = public_config(hf_configs, name) | SIZES
    ours = randomise(Wav2Vec2(Wav2Vec2Config.from_dict(values))).eval()
    reference = reference_with_the_weights_of(ours, values)
    x = sound(1, 5000)
    with torch.no_grad():
        assert_close(ours(x)[0], reference(x).last_hidden_state)


@pytest.mark.parametrize("name", ENCODERS)
def test_each_claimed_encoder_scaled_down_equals_the_reference_forward_backward_and_in_a_batch(name):
    figures = encoder_row(ENCODERS[name] | SIZES, samples=5000)
    assert figures["forward"] <= 1e-5 and figures["gradient"] <= 1e-9 and figures["in a batch"] <= 1e-5, figures


@pytest.mark.parametrize("name", ENCODERS)
def test_each_claimed_encoder_at_full_size_has_the_parameters_of_the_reference(name):
    config = Wav2Vec2Config.from_dict(ENCODERS[name])
    cls = reference_class(config)
    with torch.device("meta"):
        ours, reference = Wav2Vec2(config).state_dict(), cls(cls.config_class(**ENCODERS[name])).state_dict()
    keys = written_names(ours, config, classifier=None)
    assert {keys[k]: v.shape for k, v in ours.items()} == {k: v.shape for k, v in reference.items()}


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_configuration_at_full_size_has_the_parameters_of_the_reference(hf_configs, name):
    values = public_config(hf_configs, name)
    with torch.device("meta"):
        ours = Wav2Vec2(Wav2Vec2Config.from_dict(values))
        reference = modeling.Wav2Vec2Model(transformers.Wav2Vec2Config(**values))
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in reference.state_dict().items()
    }


@pytest.mark.parametrize(
    ("name", "layers"), [("facebook-wav2vec2-base-960h", 2), ("facebook-wav2vec2-large-960h-lv60-self", 1)]
)
def test_at_true_width_layers_and_gradients_equal_the_reference(hf_configs, randomise, name, layers):
    values = public_config(hf_configs, name) | {"num_hidden_layers": layers}
    ours = randomise(Wav2Vec2(Wav2Vec2Config.from_dict(values))).eval()
    reference = reference_with_the_weights_of(ours, values)
    x = sound(1, 4880)
    outputs, _ = ours.layers(x)
    expected = reference(x, output_hidden_states=True)
    for found, wanted in zip(outputs[:-1], expected.hidden_states[:-1], strict=True):
        assert_close(found, wanted)
    assert_close(outputs[-1], expected.last_hidden_state)
    direction = sound(*outputs[-1].shape, seed=2)
    for output in (outputs[-1], expected.last_hidden_state):
        (output * direction).sum().backward()
    assert_same_gradients(gradients(ours), gradients(reference), **GRADIENT_TOLERANCES[torch.float32])


# ---------------------------------------------------------------------------------------- torchaudio


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("norm", ["group", "layer"])
def test_torchaudio_gives_the_same_layers_and_gradients(styles, randomise, norm, pre_norm, dtype):
    try:
        from torchaudio.models import wav2vec2_model
    except (ImportError, OSError) as error:
        pytest.skip(f"torchaudio does not import: {error}")
    config = replace(
        styles["base-style"], feat_extract_norm=norm, do_stable_layer_norm=pre_norm, mask_time_prob=0.0
    )
    config = replace(config, conv_bias=norm == "layer")
    ours = randomise(Wav2Vec2(config)).to(dtype).eval()
    other = wav2vec2_model(
        extractor_mode=f"{norm}_norm",
        extractor_conv_layer_config=list(
            zip(config.conv_dim, config.conv_kernel, config.conv_stride, strict=True)
        ),
        extractor_conv_bias=config.conv_bias,
        encoder_embed_dim=config.hidden_size,
        encoder_projection_dropout=0.0,
        encoder_pos_conv_kernel=config.num_conv_pos_embeddings,
        encoder_pos_conv_groups=config.num_conv_pos_embedding_groups,
        encoder_num_layers=config.num_hidden_layers,
        encoder_num_heads=config.num_attention_heads,
        encoder_attention_dropout=0.0,
        encoder_ff_interm_features=config.intermediate_size,
        encoder_ff_interm_dropout=0.0,
        encoder_dropout=0.0,
        encoder_layer_norm_first=pre_norm,
        encoder_layer_drop=0.0,
        aux_num_out=None,
    )
    other = other.to(dtype).eval()

    def theirs(name: str) -> str:
        prefix = {"encoder": "encoder.transformer", "feature_projection": "encoder.feature_projection"}
        first, rest = name.split(".", 1)
        return f"{prefix.get(first, first)}.{rest}"

    other.load_state_dict({theirs(k): v for k, v in ours.state_dict().items()}, strict=True)

    x = sound(1, 4000, dtype=dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    outputs, _ = ours.layers(x)
    hidden, _ = other(x)
    intermediate, _ = other.extract_features(x)
    for found, wanted in zip(outputs[1:-1], intermediate[:-1], strict=True):
        assert_close(found, wanted, tolerance)
    assert_close(outputs[-1], hidden, tolerance)

    direction = sound(*hidden.shape, dtype=dtype, seed=2)
    for output in (outputs[-1], hidden):
        (output * direction).sum().backward()
    assert_same_gradients(gradients(ours, theirs), gradients(other), **GRADIENT_TOLERANCES[dtype])

"""Shared by all tests: one thread, tiny models of every architecture that is claimed, weights without defaults."""

import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from ser.models.config import Wav2Vec2Config

# Every size differs from every other, so that swapped axes and swapped layers do not fit. The convolutions'
# kernels and strides are the real ones: 400 samples make the first frame.
BASE_STYLE = Wav2Vec2Config(
    conv_dim=(6, 10, 10, 10, 10, 14, 20),
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=28,
    num_conv_pos_embeddings=8,
    num_conv_pos_embedding_groups=4,
)
LARGE_STYLE = replace(BASE_STYLE, feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True)
WAVLM = {"model_type": "wavlm", "num_buckets": 20, "max_bucket_distance": 12}  # reached within a second
STYLES = {
    "base-style": BASE_STYLE,  # group norm, post-norm, no bias: wav2vec2-base, large-960h
    "large-style": LARGE_STYLE,
    "small-style": replace(BASE_STYLE, do_stable_layer_norm=True),  # group norm and pre-norm: our preset
    "group-with-bias": replace(BASE_STYLE, conv_bias=True, num_conv_pos_embeddings=7),  # and an odd kernel
    # (HuBERT base computes what wav2vec2 base does, HuBERT large what large-lv60 does)
    "hubert-batch-norm": replace(
        BASE_STYLE, model_type="hubert", feat_proj_layer_norm=False, conv_pos_batch_norm=True
    ),
    "wavlm-base-style": replace(BASE_STYLE, **WAVLM),
    "wavlm-large-style": replace(LARGE_STYLE, **WAVLM),
    "data2vec-style": replace(
        BASE_STYLE,
        model_type="data2vec-audio",
        feat_extract_norm="layer",
        num_conv_pos_embeddings=3,
        conv_pos_kernel_size=5,
    ),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes minutes comes first, so that the rest runs beside it."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny models are faster so, and sums are in one order."""
    torch.set_num_threads(1)


@pytest.fixture
def time_limit() -> Iterator[None]:
    """What waits for ever, as reading a pipe does, fails after 20 seconds."""

    def stop(*_: object) -> None:
        pytest.fail("it waits for ever")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="session")
def styles() -> dict[str, Wav2Vec2Config]:
    """Tiny configurations by name."""
    return STYLES


@pytest.fixture(scope="session", params=list(STYLES))
def config(request: pytest.FixtureRequest) -> Wav2Vec2Config:
    """Each of the styles in turn."""
    return STYLES[request.param]


@pytest.fixture(scope="session", params=[name for name in STYLES if STYLES[name].model_type == "wav2vec2"])
def wav2vec2_config(request: pytest.FixtureRequest) -> Wav2Vec2Config:
    """Each of the styles of wav2vec 2.0 itself."""
    return STYLES[request.param]


@pytest.fixture(scope="session")
def randomise() -> Callable[..., nn.Module]:
    """A function that gives every parameter a value of its own: a norm's 1 and a bias's 0 would hide swaps."""

    @torch.no_grad()
    def fill(module: nn.Module, seed: int = 0) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in sorted(module.named_parameters()):
            values = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:  # the scale of activations is kept, and attention is far from uniform
                values = values * 1.5 * parameter[0].numel() ** -0.5
            elif name.endswith("weight"):  # a norm's
                values = 1 + 0.3 * values
            else:
                values = 0.3 * values
            parameter.copy_(values)
        for name, buffer in sorted(module.named_buffers()):  # a batch norm's
            if name.endswith("running_mean"):
                buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
            elif name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
        return module

    return fill


@pytest.fixture(scope="session")
def hf_configs() -> Path:
    """The folder of public checkpoints' configurations."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "hf-configs"
    if not folder.is_dir():
        pytest.skip(f"no configurations of public checkpoints at {folder}")
    return folder

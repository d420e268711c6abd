"""Convolutions as matrix products, and the group norm that is folded into the first of them."""

from dataclasses import replace

import pytest
import torch
from compare import NAN, assert_close, sound
from torch.nn import functional as F

from ser.models import kernels
from ser.models.config import PRESETS
from ser.models.kernels import Kernel, StridedConv, conv1d, strided_conv, windows_of
from ser.models.wav2vec2 import Wav2Vec2

GEOMETRIES = [(10, 5), (3, 2), (2, 2), (3, 1), (7, 3), (2, 3), (1, 1)]  # kernel, stride


def conv_of(inputs, outputs, size, stride, *, bias=True):
    torch.manual_seed(0)
    return torch.nn.Conv1d(inputs, outputs, size, stride=stride, bias=bias).double()


@pytest.mark.parametrize("frames", [10, 11, 12, 13, 37])
@pytest.mark.parametrize(("size", "stride"), GEOMETRIES)
def test_a_strided_convolution_and_its_gradients_are_torch_s(size, stride, frames):
    conv = conv_of(4, 6, size, stride)
    x = sound(2, frames, 4).double().requires_grad_()
    expected = conv(x.transpose(1, 2)).transpose(1, 2)
    found = strided_conv(x, Kernel.of(conv))
    assert found.shape == expected.shape
    assert_close(found, expected, 1e-12)
    weights = sound(*expected.shape, seed=3).double()
    wanted = torch.autograd.grad((expected * weights).sum(), [x, conv.weight, conv.bias])
    grads = torch.autograd.grad((found * weights).sum(), [x, conv.weight, conv.bias])
    for grad, reference in zip(grads, wanted, strict=True):
        assert_close(grad, reference, 1e-12)


def test_a_convolution_reads_a_tensor_that_is_part_of_another():
    conv = conv_of(4, 6, 3, 2)
    whole = sound(3, 20, 4).double()
    for part in (whole[1:], whole[:, 5:], whole.flip(0)):
        expected = conv(part.transpose(1, 2)).transpose(1, 2)
        assert_close(strided_conv(part, Kernel.of(conv)), expected, 1e-12)


def test_only_the_gradients_that_are_asked_for_are_computed():
    conv = conv_of(4, 6, 3, 2, bias=False)
    x = sound(2, 20, 4).double()
    strided_conv(x, Kernel.of(conv)).sum().backward()
    assert x.grad is None and conv.weight.grad is not None
    conv.weight.grad = None
    conv.weight.requires_grad_(False)
    strided_conv(x.requires_grad_(), Kernel.of(conv)).sum().backward()
    assert x.grad is not None and conv.weight.grad is None


def test_no_window_of_frames_is_copied():
    x = sound(2, 21, 4)
    for _, view in StridedConv.parts(x, 10, 3, 2):
        assert view.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_the_folded_group_norm_is_torch_s_on_the_valid_part(randomise, offset, bias):
    """On its own and in company, padding may hold anything; also of one frame, and far from zero."""
    conv, norm = conv_of(1, 5, 10, 5, bias=bias), randomise(torch.nn.GroupNorm(5, 5)).double()
    frames = torch.tensor([12, 7, 1])
    samples = (frames - 1) * 5 + 10
    x = offset + sound(3, int(samples.max()), 1).double()
    expected = []
    for row, length in enumerate(samples.tolist()):
        alone = x[row : row + 1, :length]
        y = conv(alone.transpose(1, 2))
        if frames[row] > 1:
            y = F.batch_norm(y, None, None, norm.weight, norm.bias, True, 0, norm.eps)  # torch refuses one frame
        else:
            y = norm.bias[None, :, None]
        expected.append(y.transpose(1, 2)[0])
        found = strided_conv(alone, Kernel.normalised(conv, norm, alone, frames[row, None]))
        assert_close(found[0], expected[-1], 1e-9)
    padded = x.masked_fill(torch.arange(x.shape[1])[:, None] >= samples[:, None, None], NAN)
    kept = padded.clone()
    found = strided_conv(padded, Kernel.normalised(conv, norm, padded, frames))
    for row, length in enumerate(frames.tolist()):
        assert_close(found[row, :length], expected[row], 1e-9)
    assert torch.equal(padded.nan_to_num(7), kept.nan_to_num(7)), "the input is left as it was"


def test_the_folded_group_norm_has_torch_s_gradients(randomise):
    conv, norm = conv_of(1, 5, 10, 5, bias=False), randomise(torch.nn.GroupNorm(5, 5)).double()
    x = sound(2, 205, 1).double()
    expected = norm(conv(x.transpose(1, 2))).transpose(1, 2)
    found = strided_conv(x, Kernel.normalised(conv, norm, x, torch.tensor([40, 40])))
    weights = sound(*expected.shape, seed=3).double()
    parameters = [conv.weight, norm.weight, norm.bias]
    wanted = torch.autograd.grad((expected * weights).sum(), parameters)
    for grad, reference in zip(torch.autograd.grad((found * weights).sum(), parameters), wanted, strict=True):
        assert_close(grad, reference, 1e-10)


def test_windows_are_a_view_of_the_samples():
    x = sound(2, 30, 1)
    assert windows_of(x, 10, 5).untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


@pytest.mark.parametrize("norm", ["group", "layer"])
@pytest.mark.parametrize("piece", [1, 32 * 64 * 3, 1 << 30])
def test_features_in_pieces_are_those_of_the_whole(monkeypatch, randomise, norm, piece):
    """With a gradient the layers see whole utterances, without one a piece after the other."""
    config = PRESETS["small"]
    model = randomise(Wav2Vec2(replace(config, feat_extract_norm=norm, conv_bias=norm == "layer")))
    lengths = torch.tensor([16_000, 5000, 400, 16_319])
    x = sound(4, 16_319)
    whole, frames = model.feature_extractor(x, lengths)
    assert whole.requires_grad
    monkeypatch.setattr(kernels, "PIECE", piece)
    with torch.no_grad():
        pieces, again = model.feature_extractor(x, lengths)
    assert torch.equal(frames, again)
    for row, count in enumerate(frames.tolist()):
        assert_close(pieces[row, :count], whole[row, :count], 1e-5)
    model.feature_extractor.requires_grad_(False)
    assert torch.equal(model.feature_extractor(x, lengths)[0], pieces), "a frozen encoder needs no gradient either"


@pytest.mark.parametrize(("size", "groups"), [(16, 4), (5, 2), (128, 1)])
@pytest.mark.parametrize("frames", [1, 7, 40])
def test_a_grouped_convolution_and_its_gradients_are_torch_s(size, groups, frames):
    torch.manual_seed(0)
    conv = torch.nn.Conv1d(8, 12, size, padding=size // 2, groups=groups).double()
    x = sound(2, frames, 8).double().requires_grad_()
    expected = conv(x.transpose(1, 2)).transpose(1, 2)
    found = conv1d(x, conv)
    assert found.shape == expected.shape
    assert_close(found, expected, 1e-12)
    weights = sound(*expected.shape, seed=3).double()
    wanted = torch.autograd.grad((expected * weights).sum(), [x, conv.weight, conv.bias])
    grads = torch.autograd.grad((found * weights).sum(), [x, conv.weight, conv.bias])
    for grad, reference in zip(grads, wanted, strict=True):
        assert_close(grad, reference, 1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize(("batch", "frames"), [(1, 224), (2, 99)])
@pytest.mark.parametrize(("channels", "size"), [(768, 128), (1024, 128), (768, 19)])
def test_a_grouped_convolution_of_real_size_is_torch_s(channels, size, batch, frames, dtype, tolerance):
    """oneDNN chooses its kernels by size and type, and not all of them are right."""
    torch.manual_seed(0)
    conv = torch.nn.Conv1d(channels, channels, size, padding=size // 2, groups=16)
    x = sound(batch, frames, channels).requires_grad_()
    expected = conv(x.transpose(1, 2)).transpose(1, 2)
    weights = sound(*expected.shape, seed=3)
    wanted = torch.autograd.grad(expected, [x, conv.weight], weights)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        found = conv1d(x, conv)
    grads = torch.autograd.grad(found, [x, conv.weight], weights.to(found.dtype))
    for mine, reference in zip([found, *grads], [expected, *wanted], strict=True):
        assert_close(mine.float(), reference, tolerance)


def test_a_grouped_convolution_runs_in_the_precision_of_autocast():
    conv = torch.nn.Conv1d(8, 8, 4, padding=2, groups=2)
    x = sound(2, 20, 8).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = conv1d(x, conv)
    found.float().sum().backward()
    assert found.dtype == torch.bfloat16
    assert x.grad.dtype == conv.weight.grad.dtype == torch.float32

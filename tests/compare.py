"""Numbers for tests, and how near they have to be."""

import torch

NAN = float("nan")


def sound(*shape, dtype=torch.float32, seed=1):
    """Noise, a function of shape and seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_close(found, wanted, tolerance=1e-5):
    """By the norm of the difference, relative to the norm of what is wanted."""
    assert found.shape == wanted.shape
    assert found.dtype == wanted.dtype
    error = (found - wanted).norm()
    assert error <= tolerance * wanted.norm(), f"relative error {error / wanted.norm():.2e}"

"""Change a waveform in training: the table of augmentations, and how their random numbers are drawn.

The random numbers of an utterance are a function of (seed, epoch, place in the plan of the epoch) and of nothing
else. So they depend neither on the number of ranks and workers nor on an interruption of the run.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from torch import Tensor

from ser.data.sampler import Item
from ser.data.text import did_you_mean
from ser.errors import ConfigError

# An augmentation takes a waveform (S,) float32 at 16 kHz, before it is normalised, and a generator for all random
# numbers. It returns a new waveform (S,).
Augmentation = Callable[[Tensor, np.random.Generator], Tensor]

# A row is a function of a module, so that it can be sent to worker processes. Add it before `fit` is called.
AUGMENTATIONS: dict[str, Augmentation] = {}


def _augment(rows: Sequence[tuple[str, Augmentation]], seed: int, waveform: Tensor, item: Item) -> Tensor:
    """Apply the augmentations in turn, each with a generator of its own."""
    shape = waveform.shape
    for number, (name, augmentation) in enumerate(rows):
        generator = np.random.default_rng((seed, item.epoch, item.place, number))
        waveform = augmentation(waveform, generator)
        if waveform.shape != shape:
            raise ConfigError(
                f"the augmentation {name!r} made {tuple(waveform.shape)} of a waveform of {tuple(shape)}; it must "
                "keep the length, by which batches are planned"
            )
    return waveform


def augmented(names: Sequence[str], seed: int) -> Callable[[Tensor, Item], Tensor]:
    """Chain augmentations, in this order, to a function for `SpeechDataset.augment`.

    Args:
        names: rows of `AUGMENTATIONS`.
        seed: the seed of the run.

    Returns:
        A function (waveform, item) -> waveform. It raises ConfigError if an augmentation changes the length.

    Raises:
        ConfigError: a name is not in the table.
    """
    for name in names:
        if name not in AUGMENTATIONS:
            known = ", ".join(AUGMENTATIONS) or "none"
            raise ConfigError(
                f"no augmentation is called {name!r}{did_you_mean(name, AUGMENTATIONS)}; there are: {known}"
            )
    return partial(_augment, [(name, AUGMENTATIONS[name]) for name in names], seed)

"""Draw the masks of SpecAugment in time and feature (Park et al., 2019; wav2vec 2.0, appendix A).

The masks of an utterance are a function of (seed, epoch, place in the epoch), and not of its batch, the rank or
earlier draws. So training does not depend on how the work is split, and a resumed run needs no saved random state.
Without balance, the place is the number of the utterance.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ser.models.config import Wav2Vec2Config


def draw_spans(
    length: int, *, prob: float, span: int, min_masks: int, generator: np.random.Generator
) -> np.ndarray:
    """Draw a mask, (length,) bool with spans of True.

    ``prob`` is the share of the axis that the spans would cover without overlap. So ``prob * length / span`` spans
    are drawn, rounded up or down at random so that the mean is exact, and at least ``min_masks``. Their starts are
    distinct (as in the reference's `_compute_mask_indices`, for one row).

    A short utterance is never masked completely: spans shrink to half the axis, and their number is limited to
    what covers this half without overlap.
    """
    mask = np.zeros(length, dtype=bool)
    if prob <= 0 or length < 2:
        return mask
    span = min(span, length // 2)
    count = max(int(prob * length / span + generator.random()), min_masks)
    most = max(1, min(round(max(prob, 0.5) * length), length - 1) // span)  # a prob above 0.5 may cover more
    count = min(count, most, length - span + 1)
    for start in generator.choice(length - span + 1, size=count, replace=False):
        mask[start : start + span] = True
    return mask


def spec_augment(
    config: Wav2Vec2Config, num_frames: Tensor, places: Sequence[int], *, seed: int, epoch: int
) -> tuple[Tensor | None, Tensor | None]:
    """Draw the masks of a batch, mask_time (B, T) and mask_feature (B, D), on the CPU; None if not configured.

    ``num_frames`` (B,) are the valid frames, with T the largest; ``places`` (B,) are the places of the utterances
    in the epoch (see `ser.data.sampler.Item`).
    """
    if not config.apply_spec_augment:
        return None, None
    frames = num_frames.tolist()
    time = np.zeros((len(frames), max(frames)), dtype=bool)
    feature = np.zeros((len(frames), config.hidden_size), dtype=bool)
    for row, (length, place) in enumerate(zip(frames, places, strict=True)):
        generator = np.random.default_rng([seed, epoch, int(place)])
        time[row, :length] = draw_spans(
            length,
            prob=config.mask_time_prob,
            span=config.mask_time_length,
            min_masks=config.mask_time_min_masks,
            generator=generator,
        )
        feature[row] = draw_spans(
            config.hidden_size,
            prob=config.mask_feature_prob,
            span=config.mask_feature_length,
            min_masks=config.mask_feature_min_masks,
            generator=generator,
        )
    return (
        torch.from_numpy(time) if config.mask_time_prob > 0 else None,
        torch.from_numpy(feature) if config.mask_feature_prob > 0 else None,
    )

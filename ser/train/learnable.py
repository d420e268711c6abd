"""Whether updates can learn anything: told before hours are spent, for a loss of 0 looks like success.

Most heads learn from any label. The loss of dimensions is one minus the concordance over an update, which has a
gradient only where the update has two different labels of a dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from ser.data.dataset import SpeechDataset
from ser.data.labels import NO_LABEL
from ser.data.text import minimum_frames
from ser.errors import ConfigError
from ser.recognizer import Recognizer
from ser.scores.counts import labels_vary

WORTH_TELLING = 0.1  # the share of updates that teach nothing; the last one of an epoch may be small
LARGER = "a larger --effective-batch (such as 32) helps where more utterances have labels"
FLAGS = {"emotion": "", "ctc": " (--alpha)", "speaker": " (--beta)", "dimensions": " (--gamma)"}


def usable_labels(
    recognizer: Recognizer, dataset: SpeechDataset, heads: Sequence[str], read: Tensor
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Find what the heads and dimensions can learn from, and which of them can learn nothing, with the reason.

    The first is (N,) for each: of a head whether an utterance has a label, of a dimension the label, NaN for none.
    """
    found: dict[str, tuple[Tensor, str]] = {}
    none = "no training utterance has a label"
    if "emotion" in heads:
        found["emotion"] = torch.tensor(dataset.labels["emotion"]) != NO_LABEL, none
    if "ctc" in heads:
        frames = recognizer.model.config.num_frames(torch.tensor(dataset.lengths))
        needed = torch.tensor([minimum_frames(target) for target in dataset.labels["ctc"]])
        why = "no transcript fits its audio" if bool(needed.any()) else "no training utterance has a transcript"
        found["ctc"] = (needed > 0) & (needed <= frames), why
    if "speaker" in heads:
        several = len(recognizer.speakers) > 1
        known = (torch.tensor(dataset.labels["speaker"]) != NO_LABEL) & several
        found["speaker"] = known, none if several else "all of training is by one speaker"
    labels = {name: values & read for name, (values, _) in found.items()}
    never = {name: found[name][1] for name, values in labels.items() if not values.any()}
    if "dimensions" in heads:
        rated = torch.tensor(dataset.labels["dimensions"], dtype=torch.float64).reshape(len(dataset), -1)
        for name, values in zip(recognizer.dimensions, rated.unbind(1), strict=True):
            values = labels[name] = values.masked_fill(~read, torch.nan)
            known = values[values.isfinite()]
            if len(known) < 2 or bool((known == known[0]).all()):
                what = (
                    f"all {len(known)} labels are {float(known[0]):g}"
                    if len(known) > 1
                    else f"{len(known)} labels"
                )
                never[name] = f"{what}, and concordance needs different ones"
    return {name: values for name, values in labels.items() if name not in never}, never


def teaches(labels: Tensor, updates: Sequence[Sequence[int]]) -> Tensor:
    """Tell which updates (updates,) have a gradient of a head or dimension with these `usable_labels` (N,)."""
    members = torch.tensor([i for update in updates for i in update])
    sizes = torch.tensor([len(update) for update in updates])
    places = torch.arange(len(updates)).repeat_interleave(sizes)
    labels = labels[members]
    if labels.dtype == torch.bool:
        return torch.bincount(places[labels], minlength=len(updates)) > 0
    places, y = places[labels.isfinite()], labels[labels.isfinite()]
    n, total, squares = (torch.bincount(places, w, len(updates)) for w in (torch.ones_like(y), y, y * y))
    return labels_vary(n, total, squares)


def check_learnable(
    recognizer: Recognizer,
    dataset: SpeechDataset,
    plan: Callable[..., Sequence[Sequence[int]]],
    weights: Mapping[str, float],
    *,
    epochs: int,
    unread: Collection[str] = (),
) -> list[str]:
    """Refuse a run of which no update teaches any head; returns what a person should know of any other.

    Args:
        recognizer: what is trained.
        dataset: what it is trained on.
        plan: the updates of each epoch, as `ser.data.sampler.plan_epoch` gives them.
        weights: of each head's loss; 0: not trained.
        epochs: that the run has.
        unread: ids of utterances whose recording cannot be read.
    """
    notes = [f"the weight of {h} is 0{FLAGS[h]}: this head is not trained" for h, w in weights.items() if not w]
    read = torch.tensor([u.id not in unread for u in dataset.utterances])
    labels, never = usable_labels(recognizer, dataset, [head for head, w in weights.items() if w], read)
    first = plan(epoch=0)
    teaching = {name: teaches(values, first) for name, values in labels.items()}
    for name in [name for name, updates in teaching.items() if not updates.any()]:
        # The first epoch may be unlucky, unless an update is a single utterance.
        others = range(1, epochs) if max(map(len, first)) > 1 else ()
        if not any(teaches(labels[name], plan(epoch=epoch)).any() for epoch in others):
            never[name] = f"no update has two different labels of it, and so concordance no gradient; {LARGER}"
    told = [f"nothing of {name} is learnt: {why}" for name, why in never.items()]
    if not labels.keys() - never.keys():
        raise ConfigError("no update would have a gradient:\n  " + "\n  ".join(told))
    for name, updates in teaching.items():
        idle = int((~updates).sum())
        if name in recognizer.dimensions and name not in never and idle > WORTH_TELLING * len(first):
            notes.append(
                f"{idle} of the {len(first)} updates of an epoch have no two different labels of {name}, so they "
                f"teach nothing of it; {LARGER}"
            )
    idle = int((~torch.stack(list(teaching.values())).any(0)).sum())
    if idle > WORTH_TELLING * len(first) and not teaching.keys() <= set(recognizer.dimensions):
        notes.append(f"{idle} of the {len(first)} updates of an epoch have no label that any head learns from")
    return notes + told

"""Check before training whether the data can be trained on, and whether updates have a gradient.

A loss of 0 looks like success, so a head without a gradient is reported. Most heads learn from any label. The
concordance loss (that of dimensions) has a gradient only if an update has two different labels of a number.
"""

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from ser.data.dataset import SpeechDataset
from ser.data.labels import LABELS, known, labels_vary
from ser.data.text import Vocabulary, minimum_frames
from ser.errors import ConfigError, indented

WORTH_TELLING = 0.1  # a larger share of updates without a gradient is reported; a small last update is normal
LARGER = "a larger --effective-batch (such as 32) helps where more utterances have labels"
FLAGS = {"ctc": " (--alpha)", "speaker": " (--beta)", "dimensions": " (--gamma)"}

# Number of samples (N,) -> number of frames (N,), as `Wav2Vec2Config.num_frames`.
NumFrames = Callable[[Tensor], Tensor]

# --------------------------------------------------------------------------------------- recordings and text


def check_vocabulary(vocabulary: Vocabulary, dataset: SpeechDataset) -> None:
    """Raise ConfigError for a vocabulary that cannot write the transcripts."""
    if any(dataset.texts) and not any(dataset.labels["ctc"]):
        text = next(text for text in dataset.texts if text)
        raise ConfigError(
            f"no training transcript has a character of the vocabulary; the first is {text[:40]!r}, the "
            f"symbols are {' '.join(vocabulary.tokens[:40])}. Try --build-vocab, or --orthography"
        )
    if not vocabulary.has_delimiter and (words := next((t for t in dataset.texts if " " in t), "")):
        raise ConfigError(
            f"the word delimiter {vocabulary.word_delimiter!r} is not in the vocabulary of {len(vocabulary)} "
            f"symbols, and a training transcript has spaces: {words[:80]!r}; add it, or take the spaces out"
        )


def misfits(dataset: SpeechDataset, num_frames: NumFrames, unread: Collection[str]) -> list[str]:
    """Return a note that names the utterances whose transcript needs more frames than their audio has, or none."""
    frames = num_frames(torch.tensor(dataset.lengths)).tolist()
    lines = []
    for utterance, target, there in zip(dataset.utterances, dataset.labels["ctc"], frames, strict=True):
        if (needed := minimum_frames(target)) > there and utterance.id not in unread:
            lines.append(f"{utterance.id}: {needed} frames needed, {there} there")
    if not lines:
        return []
    return [f"{len(lines)} transcripts do not fit their audio; left out of the CTC loss:{indented(lines, 20)}"]


def check_training_data(
    dataset: SpeechDataset, num_frames: NumFrames, *, min_samples: int, unread: Collection[str] = ()
) -> list[str]:
    """Refuse utterances shorter than a frame; return notes, for example on transcripts that do not fit.

    Args:
        dataset: the training set.
        num_frames: that of the model's configuration.
        min_samples: that of the model's configuration, the samples of one frame.
        unread: ids of utterances whose recording cannot be read.

    Raises:
        ConfigError: utterances are shorter than a frame, or the vocabulary cannot write the transcripts.
    """
    short = [(u, n) for u, n in zip(dataset.utterances, dataset.lengths, strict=True) if n < min_samples]
    if short:
        lines = indented(f"{u.id}: {n} samples" for u, n in short[:50])
        raise ConfigError(
            f"{len(short)} training utterances are shorter than one frame ({min_samples} samples at 16 kHz); "
            f"remove them:{lines}"
        )
    vocabulary = dataset.model_labels.vocabulary
    if vocabulary is None:
        return []
    notes = []
    if empty := sum(not text for text in dataset.texts):
        notes.append(f"{empty} of {len(dataset)} utterances have no transcript; trained on their other labels")
    check_vocabulary(vocabulary, dataset)
    return notes + dataset.rewriting().notes() + misfits(dataset, num_frames, unread)


# ----------------------------------------------------------------------------------------- what can be learnt


def usable_of_head(dataset: SpeechDataset, head: str, num_frames: NumFrames) -> tuple[Tensor, str]:
    """Return the utterances (N,) from which a head can learn, and the reason if there are none."""
    none = "no training utterance has a label"
    if LABELS[head].kind == "text":
        frames = num_frames(torch.tensor(dataset.lengths))
        needed = torch.tensor([minimum_frames(target) for target in dataset.labels[head]])
        none = "no transcript fits its audio" if bool(needed.any()) else "no training utterance has a transcript"
        return (needed > 0) & (needed <= frames), none
    labelled = known(head, torch.tensor(dataset.labels[head]))
    if head == "speaker" and len(dataset.model_labels.speakers) < 2:
        return labelled & False, "all of training is by one speaker"
    return labelled, none


def why_constant(values: Tensor) -> str:
    """Say why concordance learns nothing from labels (N,), NaN where unknown; "" if it does learn."""
    labels = values[values.isfinite()]
    if len(labels) > 1 and not bool((labels == labels[0]).all()):
        return ""
    what = f"all {len(labels)} labels are {float(labels[0]):g}" if len(labels) > 1 else f"{len(labels)} labels"
    return f"{what}, and concordance needs different ones"


def usable_labels(
    dataset: SpeechDataset,
    heads: Collection[str],
    concordant: Collection[str],
    read: Tensor,
    num_frames: NumFrames,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the usable labels of each head, and the heads that cannot learn, each with the reason.

    ``concordant`` are the heads that learn by concordance, each of their numbers separately. The usable labels are
    (N,) bool for any other head, and (N,) labels, NaN for none, for each number of a concordant head. ``read``
    (N,) says which recordings can be read.
    """
    labels, never = {}, {}
    for head in [head for head in heads if head not in concordant]:
        usable, why = usable_of_head(dataset, head, num_frames)
        labels[head] = usable & read
        if not labels[head].any():
            never[head] = why
    for head in [head for head in heads if head in concordant]:
        names = dataset.model_labels.names[head]
        numbers = torch.tensor(dataset.labels[head], dtype=torch.float64).reshape(len(dataset), -1)
        for name, values in zip(names, numbers.unbind(1), strict=True):
            labels[name] = values.masked_fill(~read, torch.nan)
            if why := why_constant(labels[name]):
                never[name] = why
    return {name: values for name, values in labels.items() if name not in never}, never


def teaches(labels: Tensor, updates: Sequence[Sequence[int]]) -> Tensor:
    """Tell which updates (updates,) have a gradient for a head or number with these `usable_labels` (N,)."""
    members = torch.tensor([i for update in updates for i in update])
    sizes = torch.tensor([len(update) for update in updates])
    places = torch.arange(len(updates)).repeat_interleave(sizes)
    labels = labels[members]
    if labels.dtype == torch.bool:
        return torch.bincount(places[labels], minlength=len(updates)) > 0
    places, y = places[labels.isfinite()], labels[labels.isfinite()]
    n, total, squares = (torch.bincount(places, w, len(updates)) for w in (torch.ones_like(y), y, y * y))
    return labels_vary(n, total, squares)


def idle_updates(teaching: Mapping[str, Tensor], never: Collection[str], numbers: Collection[str]) -> list[str]:
    """Report if many updates of an epoch have no gradient for a number, or none at all.

    ``teaching`` has (updates,) for each head and number; ``numbers`` are those that learn by concordance.
    """
    updates = len(next(iter(teaching.values())))
    notes = []
    for name, taught in teaching.items():
        idle = int((~taught).sum())
        if name in numbers and name not in never and idle > WORTH_TELLING * updates:
            lacking = f"{idle} of the {updates} updates of an epoch have no two different labels of {name}"
            notes.append(f"{lacking}, so they teach nothing of it; {LARGER}")
    idle = int((~torch.stack([*teaching.values()]).any(0)).sum())
    if idle > WORTH_TELLING * updates and not teaching.keys() <= set(numbers):
        notes.append(f"{idle} of the {updates} updates of an epoch have no label that any head learns from")
    return notes


def check_learnable(
    dataset: SpeechDataset,
    plan: Callable[..., Sequence[Sequence[int]]],
    weights: Mapping[str, float],
    num_frames: NumFrames,
    *,
    concordant: Collection[str],
    epochs: int,
    unread: Collection[str] = (),
) -> list[str]:
    """Refuse a run in which no update has a gradient; return notes on heads and updates without one.

    Args:
        dataset: the training set.
        plan: returns the updates of an epoch, as `ser.data.sampler.plan_epoch`.
        weights: the weight of each head's loss; 0: not trained.
        num_frames: that of the model's configuration.
        concordant: the heads whose loss is one minus concordance.
        epochs: the number of epochs of the run.
        unread: ids of utterances whose recording cannot be read.

    Raises:
        ConfigError: no update would have a gradient.
    """
    off = [head for head, weight in weights.items() if not weight]
    notes = [f"the weight of {head} is 0{FLAGS.get(head, '')}: this head is not trained" for head in off]
    heads = [head for head, weight in weights.items() if weight]
    read = torch.tensor([u.id not in unread for u in dataset.utterances])
    labels, never = usable_labels(dataset, heads, concordant, read, num_frames)
    first = plan(epoch=0)
    teaching = {name: teaches(values, first) for name, values in labels.items()}
    for name in [name for name, updates in teaching.items() if not updates.any()]:
        # Other epochs may be better than the first, unless each update is a single utterance.
        others = range(1, epochs) if max(map(len, first)) > 1 else ()
        if not any(teaches(labels[name], plan(epoch=epoch)).any() for epoch in others):
            never[name] = f"no update has two different labels of it, and so concordance no gradient; {LARGER}"
    told = [f"nothing of {name} is learnt: {why}" for name, why in never.items()]
    if not labels.keys() - never.keys():
        raise ConfigError("no update would have a gradient:\n  " + "\n  ".join(told))
    numbers = [name for head in concordant for name in dataset.model_labels.names.get(head, ())]
    return notes + idle_updates(teaching, never, numbers) + told

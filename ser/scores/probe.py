"""Test what a frozen model represents: compute a vector for each utterance, and train a linear head on them.

    recognizer = ser.load("runs/demo/best")
    vectors, errors = vectors_of(recognizer, utterances)      # (N, D), and why some could not be read
    head = learn(vectors[train], labels[train], 4, speakers)  # of 4 classes
    head.classify(vectors[test])                              # (n,) numbers of classes

The vector of an utterance is the mean and the standard deviation over its valid frames, by default averaged over
the layers. It does not depend on batch composition. The head is ridge regression on a column for each class, +1
for the class and -1 for others, with every class weighted alike. It has a closed form: it is the same each time.
Its penalty is the one of `PENALTIES` that recognises held-out speakers of the training data best.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional as F

from ser.data.manifest import Utterance
from ser.data.workers import AGAIN, WORKER_SECONDS, decoded, worker_death_explained
from ser.errors import ConfigError, SerError
from ser.files import new_beside, read_tensors, write_tensors
from ser.inputs import Decoder, find_recording, gather, pack_decoded, plan_batches
from ser.models.heads import Pooling, mix_layers
from ser.recognizer import MAX_SECONDS, Recognizer

PENALTIES = (0.01, 0.1, 1.0, 10.0, 100.0)  # each times the number of training utterances
USUAL_PENALTY = 1.0  # where speakers cannot be held out
INNER_FOLDS = 3  # of the training speakers, to choose the penalty by
LEAST_SPREAD = 1e-8  # a number that varies less over the training utterances is left as it is


# ---------------------------------------------------------------------------------------------------- vectors


def chosen_layers(recognizer: Recognizer, layers: str) -> Callable[[list[Tensor], Tensor], list[Tensor]]:
    """Return a function that selects layers: (outputs of all layers, the last output before its norm) -> selected.

    Args:
        recognizer: the model.
        layers: "mean" or "all"; "weighted", the mean of layers that the model itself has learnt; or numbers such
            as "0,4": 0 is the transformer's input, 1 the output of its first layer.

    Raises:
        ConfigError: the model has no such layer, or has learnt no mean of layers.
    """
    model = recognizer.model
    deepest = model.config.num_hidden_layers
    if layers in ("mean", "all"):
        return lambda outputs, raw: outputs
    if layers == "weighted":
        if model.layer is not None:
            reads = f"they read layer {model.layer} of 0 to {deepest}"
            raise ConfigError(f"--layers weighted: the heads of this model have learnt no mean of layers; {reads}")
        return lambda outputs, raw: [mix_layers(model.read_layers(outputs, raw), model.layer_weights)]
    numbers = [int(part) if part.strip().isdecimal() else -1 for part in layers.split(",")]
    if not all(0 <= number <= deepest for number in numbers):
        expected = f"mean, all, weighted, or numbers from 0 to {deepest}, such as 0,{deepest}"
        raise ConfigError(f"--layers {layers}: expected {expected}")
    return lambda outputs, raw: [outputs[number] for number in numbers]


def batch_vectors(recognizer: Recognizer, waveforms: Sequence[Tensor], layers: str = "mean") -> Tensor:
    """Compute the vectors of one batch of (S,) waveforms at 16 kHz: (B, D) float32 on the CPU.

    The vector has the mean over the valid frames, then the standard deviation, of each layer in turn. With "mean"
    it is the mean of these vectors over all layers, so D is twice the hidden size.
    """
    take, encoder = chosen_layers(recognizer, layers), recognizer.model.wav2vec2
    pool = Pooling("mean+std", recognizer.model.config.hidden_size)
    padded, num_samples, _ = recognizer.prepare(waveforms)
    with torch.inference_mode(), recognizer.autocast():
        outputs, num_frames = encoder.layers(padded, num_samples, final_norm=False)
        raw = outputs[-1]
        outputs[-1] = encoder.encoder.final_norm(raw)
        pooled = torch.stack(
            [pool(layer, num_frames).float() for layer in take(outputs, raw)], dim=1
        )  # (B, N, 2H)
    return (pooled.mean(1) if layers == "mean" else pooled.flatten(1)).cpu()


def vectors_of(
    recognizer: Recognizer,
    utterances: Sequence[Utterance],
    *,
    layers: str = "mean",
    workers: int = 0,
    timeout: float = WORKER_SECONDS,
    progress: Callable[[int], Any] = lambda count: None,
) -> tuple[Tensor, dict[int, SerError]]:
    """Compute the vector of each utterance, in batches of similar length.

    Args:
        recognizer: the model, in eval mode.
        utterances: the recordings; one that lasts over 120 s is not read.
        layers: as of `chosen_layers`.
        workers, timeout: as of `Recognizer.predict`.
        progress: is called with the number of utterances that were computed.

    Returns:
        (N, D) float32, and number of an utterance -> why it could not be read. Its vector is zero.
    """
    size = batch_vectors(recognizer, [torch.zeros(recognizer.model.config.min_samples)], layers).shape[1]
    vectors, errors = torch.zeros(len(utterances), size), dict[int, SerError]()
    recordings = (find_recording(i, u, None, MAX_SECONDS) for i, u in enumerate(utterances))
    batches = plan_batches(gather(recordings, None), recognizer.batch_seconds)
    loader = decoded(Decoder(), batches, pack_decoded, workers=workers, timeout=timeout, then=AGAIN)
    with worker_death_explained(AGAIN), closing(loader):
        for batch in loader:
            errors |= batch.errors
            if batch.recordings:
                waveforms = batch.samples.split(batch.lengths)
                rows = [index for index, *_ in batch.recordings]
                vectors[rows] = batch_vectors(recognizer, waveforms, layers)
            progress(len(batch.recordings) + len(batch.errors))
    return vectors, errors


def weights_digest(recognizer: Recognizer) -> str:
    """Return a digest of all that a vector depends on in a model: weights, configuration, preprocessing, type."""
    model = recognizer.model
    about = (str(model.config), str(model.heads_config), recognizer.do_normalize, str(recognizer.precision))
    total = hashlib.sha256(repr(about).encode())
    for name, tensor in model.state_dict().items():
        total.update(name.encode())
        total.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return total.hexdigest()


def recordings_digest(utterances: Sequence[Utterance]) -> str:
    """Return a digest of excerpts: the path, size and time of each file, and where each begins and ends."""
    total = hashlib.sha256()
    for u in utterances:
        with suppress(OSError):
            state = u.file.stat()
            total.update(repr((state.st_size, state.st_mtime_ns)).encode())
        total.update(repr((os.fsencode(u.file), u.start, u.end)).encode())
    return total.hexdigest()


def read_kept(path: Path, size: int) -> tuple[Tensor, Tensor] | None:
    """Read vectors and which of them are known.

    Returns None if the file is missing, damaged, or has another number of utterances.
    """
    try:
        tensors = read_tensors(path)
        vectors, known = tensors["vectors"], tensors["known"]
    except (OSError, SafetensorError, KeyError):
        return None
    return (vectors, known) if len(vectors) == len(known) == size else None


def keep(path: Path, vectors: Tensor, known: Tensor) -> None:
    """Write vectors for `read_kept`; a file is complete or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_beside(path, "tmp", lambda new: new.touch()) as temporary:
        write_tensors(temporary, {"vectors": vectors, "known": known})
        temporary.replace(path)


# ------------------------------------------------------------------------------------------------ linear head


@dataclass(frozen=True)
class LinearHead:
    """Hold a linear head on vectors (n, D) of K classes, in float64.

    Attributes:
        mean, scale: (D,) of the training vectors, by which vectors are standardised.
        weights: (D, K).
        bias: (K,).
        penalty: with which it was learnt.
        held_out: penalty -> UA on speakers that were held out to choose the penalty; empty where none could be.
    """

    mean: Tensor
    scale: Tensor
    weights: Tensor
    bias: Tensor
    penalty: float
    held_out: dict[float, float]

    def classify(self, vectors: Tensor) -> Tensor:
        """Return the number of the likeliest class, (n, D) -> (n,)."""
        return ((vectors.double() - self.mean) / self.scale @ self.weights + self.bias).argmax(1)


def ridge(
    x: Tensor, labels: Tensor, num_classes: int, penalties: Sequence[float]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Solve ridge regression for each penalty, with an intercept and every class weighted alike.

    The targets are +1 for the class and -1 for others. An utterance weighs n / (K * utterances of its class). The
    weighted sum of squared errors is minimised, plus n * penalty * the sum of squared weights. It is what
    ``RidgeClassifier(alpha=n * penalty, class_weight="balanced")`` of scikit-learn minimises.

    Args:
        x: (n, D) float64.
        labels: (n,) from 0; a class that does not occur is never recognised.
        num_classes: K.
        penalties: above 0.

    Yields:
        weights (D, K) and bias (K,).
    """
    n = len(labels)
    share = n / (num_classes * torch.bincount(labels, minlength=num_classes).double())[labels]  # (n,)
    y = 2.0 * F.one_hot(labels, num_classes).double() - 1.0
    middle_x, middle_y = ((share[:, None] * z).sum(0) / share.sum() for z in (x, y))
    root = share.sqrt()[:, None]
    a, b = root * (x - middle_x), root * (y - middle_y)
    wide = x.shape[1] > n  # then the system of n unknowns is the smaller one
    gram, right = (a @ a.T, b) if wide else (a.T @ a, a.T @ b)
    for penalty in penalties:
        system = gram.clone()
        system.diagonal().add_(n * penalty)
        solved = torch.cholesky_solve(right, torch.linalg.cholesky(system))
        weights = a.T @ solved if wide else solved
        yield weights, middle_y - middle_x @ weights


def unweighted_accuracy(labels: Tensor, predicted: Tensor) -> float:
    """Return the mean recall of the classes that occur."""
    right = (labels == predicted).double()
    return float(torch.stack([right[labels == k].mean() for k in labels.unique()]).mean())


def deal(groups: Sequence[str], count: int) -> NDArray[np.int64]:
    """Divide groups, such as speakers, into folds of similar size; return the fold of each item, from 0.

    The largest group comes first, and each goes to the fold that is smallest by then. So it depends on names and
    sizes alone. There are fewer folds than ``count`` where there are fewer groups.
    """
    sizes = Counter(groups)
    filled, part = [0] * min(count, len(sizes)), dict[str, int]()
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        part[name] = filled.index(min(filled))
        filled[part[name]] += sizes[name]
    return np.array([part[name] for name in groups], np.int64)


def held_out_figures(
    x: Tensor, labels: Tensor, num_classes: int, speakers: Sequence[str | None]
) -> dict[float, float]:
    """Return penalty -> UA on held-out speakers, each of whom is held out once; empty with fewer than two.

    Utterances whose speaker is not known are always learnt from, and never recognised.
    """
    known = [i for i, name in enumerate(speakers) if name is not None]
    parts = np.full(len(speakers), -1)
    parts[known] = deal([str(speakers[i]) for i in known], INNER_FOLDS)
    if parts.max(initial=-1) < 1:
        return {}
    predicted = torch.zeros(len(PENALTIES), len(labels), dtype=torch.long)
    for part in range(parts.max() + 1):
        out = torch.from_numpy(parts == part)
        for row, (weights, bias) in zip(
            predicted, ridge(x[~out], labels[~out], num_classes, PENALTIES), strict=True
        ):
            row[out] = (x[out] @ weights + bias).argmax(1)
    return {p: unweighted_accuracy(labels[known], row[known]) for p, row in zip(PENALTIES, predicted, strict=True)}


def learn(vectors: Tensor, labels: Tensor, num_classes: int, speakers: Sequence[str | None]) -> LinearHead:
    """Learn a linear head, with the penalty that recognises held-out speakers best.

    Of penalties that are equally good the largest is taken. Where speakers cannot be held out, it is
    `USUAL_PENALTY`.

    Args:
        vectors: (n, D).
        labels: (n,) from 0.
        num_classes: K.
        speakers: (n,) names; None: not known.
    """
    x = vectors.double()
    mean, scale = x.mean(0), x.std(0, correction=0)
    scale = torch.where(scale < LEAST_SPREAD, 1.0, scale)
    x = (x - mean) / scale
    held_out = held_out_figures(x, labels, num_classes, speakers)
    penalty = max(held_out, key=lambda p: (held_out[p], p)) if held_out else USUAL_PENALTY
    ((weights, bias),) = ridge(x, labels, num_classes, [penalty])
    return LinearHead(mean, scale, weights, bias, penalty, held_out)

"""The other side: the paper's model and training step written with `transformers`, and what both sides compute.

The model is that of the code of Cai et al. (2021): Wav2Vec2ForCTC with a linear layer on the mean of the frames.
It gets every favour: no attention mask, as its preprocessor gives none for group-norm models, so that attention
takes its fastest path; waveforms that lie in memory, normalised before the clock starts (ours are read from files
within it); and the fused AdamW where it is at its best.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from common import (
    ALPHA,
    EFFECTIVE_BATCH,
    EMOTIONS,
    SAMPLE_RATE,
    figures,
    forward_flop,
    shape_config,
    timed,
    training_flop,
)
from torch import Tensor, nn
from torch.nn import functional as F

from ser.data.dataset import Batch, SpeechDataset, collate
from ser.data.manifest import read_manifest
from ser.recognizer import Recognizer
from ser.train.losses import Objective

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


class PaperModel(transformers.Wav2Vec2ForCTC):
    """Wav2Vec2ForCTC with the paper's emotion classifier."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.cls_head = nn.Linear(config.hidden_size, len(EMOTIONS))
        self.post_init()

    def scores(self, waveforms: Tensor, **options: Any) -> tuple[Tensor, Tensor, Any]:
        """(B, S) -> emotion scores (B, K), symbol scores (B, T, V), and what the encoder gave."""
        found = self.wav2vec2(waveforms, **options)
        hidden = self.dropout(found.last_hidden_state)
        return self.cls_head(hidden.mean(1)), self.lm_head(hidden), found

    def loss(self, batch: Batch, emotion: Tensor, symbols: Tensor) -> Tensor:
        """Mean of the emotion loss plus alpha times the sum of the CTC loss, as the paper's code has it."""
        log_probs = symbols.log_softmax(-1, dtype=torch.float32).transpose(0, 1)
        symbols_of = batch.labels["ctc"]
        ctc = F.ctc_loss(
            log_probs,
            symbols_of.clamp(min=0).to(log_probs.device),
            torch.full((len(batch.indices),), len(log_probs)),
            (symbols_of >= 0).sum(1),
            reduction="sum",
        )
        return F.cross_entropy(emotion.float(), batch.labels["emotion"]) + ALPHA * ctc


def load(folder: Path, *, device: str, attention: str = "sdpa") -> PaperModel:
    """The model with the weights of a folder that `ser` wrote; every one of them is found there."""
    loaded: Any = PaperModel.from_pretrained(folder, attn_implementation=attention, output_loading_info=True)
    model, report = loaded
    wrong = {key: names for key, names in report.items() if names}
    if wrong:
        raise RuntimeError(f"the folder and the model do not fit: {wrong}")
    return model.to(device)


def dataset(folder: Path, recognizer: Recognizer) -> SpeechDataset:
    """The turns, with the labels as numbers, ready to be collated."""
    return recognizer.dataset(read_manifest(folder / str(SAMPLE_RATE) / "train.csv"))


def grouped(lengths: Sequence[int], size: int, *, order: str, seed: int) -> list[list[int]]:
    """Batches of ``size`` turns: in random order, or of like length with the longest first."""
    turns = list(range(len(lengths)))
    random.Random(seed).shuffle(turns)
    if order == "sorted":
        turns.sort(key=lambda i: -lengths[i])
    return [turns[i : i + size] for i in range(0, len(turns), size)]


def padded_seconds(lengths: Sequence[int], batches: Sequence[Sequence[int]]) -> float:
    """Of what is computed: each batch is as wide as its longest turn."""
    return sum(len(batch) * max(lengths[i] for i in batch) for batch in batches) / SAMPLE_RATE


def autocast(device: str, dtype: str) -> Any:
    """Mixed precision, or nothing in float32."""
    return torch.autocast(device.partition(":")[0], torch.bfloat16) if dtype == "bfloat16" else nullcontext()


def train(
    *,
    folder: str,
    shape: str,
    threads: int,
    device: str,
    repeat: int,
    dtype: str,
    batch: int,
    order: str,
    freeze: bool,
    paper: bool = False,
    attention: str = "sdpa",
) -> dict[str, Any]:
    """One epoch after a warm-up with the last batch, with an optimizer step after every eight turns.

    ``paper``: with activation checkpointing, as the paper's script, and AdamW as it was then.
    """
    torch.set_num_threads(threads)
    model = load(Path(folder) / shape, device=device, attention=attention).train()
    if freeze:
        model.freeze_feature_encoder()
    if paper:
        model.gradient_checkpointing_enable()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-5, weight_decay=0.0, fused=None if paper else True)
    turns = dataset(Path(folder), Recognizer.load(Path(folder) / shape))
    examples = [turns[i] for i in range(len(turns))]
    batches = grouped(turns.lengths, batch, order=order, seed=repeat)
    accumulate = EFFECTIVE_BATCH // batch

    def update(group: Sequence[Sequence[int]]) -> None:
        optimizer.zero_grad(set_to_none=True)
        for indices in group:
            there = collate([examples[i] for i in indices]).to(torch.device(device))
            with autocast(device, dtype):
                emotion, symbols, _ = model.scores(there.waveforms)
            (model.loss(there, emotion, symbols) / len(group)).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()

    update(batches[-1:])
    with timed(device) as seconds:
        for start in range(0, len(batches), accumulate):
            update(batches[start : start + accumulate])
    flop = training_flop(shape_config(shape), turns.lengths, frozen=freeze)
    padded = padded_seconds(turns.lengths, batches)
    return figures(seconds[0], turns.lengths, device=device, dtype=dtype, flop=flop, padded_seconds=padded)


@torch.inference_mode()
def infer(
    *,
    folder: str,
    shape: str,
    threads: int,
    device: str,
    repeat: int,
    dtype: str,
    batch: int,
    order: str,
    attention: str = "sdpa",
) -> dict[str, Any]:
    """All turns to probabilities and transcripts, after a warm-up with the last batch."""
    torch.set_num_threads(threads)
    model = load(Path(folder) / shape, device=device, attention=attention).eval()
    recognizer = Recognizer.load(Path(folder) / shape)
    turns = dataset(Path(folder), recognizer)
    waveforms = [turns[i].waveform for i in range(len(turns))]
    batches = grouped(turns.lengths, batch, order=order, seed=repeat)

    def recognise(indices: Sequence[int]) -> Iterator[tuple[list[float], str]]:
        there = nn.utils.rnn.pad_sequence([waveforms[i] for i in indices], batch_first=True)
        with autocast(device, dtype):
            emotion, symbols, _ = model.scores(there.to(device))
        for shares, best in zip(emotion.float().softmax(-1).tolist(), symbols.argmax(-1).tolist(), strict=True):
            assert recognizer.vocabulary is not None
            yield shares, recognizer.vocabulary.decode(best)

    list(recognise(batches[-1]))
    with timed(device) as seconds:
        for indices in batches:
            list(recognise(indices))
    flop = sum(sum(forward_flop(model.config, n)) for n in turns.lengths)
    padded = padded_seconds(turns.lengths, batches)
    found = figures(seconds[0], turns.lengths, device=device, dtype=dtype, flop=flop, padded_seconds=padded)
    return found | {"per_second": len(turns) / seconds[0]}


def check(*, folder: str, shape: str, threads: int, device: str) -> dict[str, float]:
    """Largest relative differences between the two sides on the turn of median length, dropout and masks off.

    In bf16 of each side to itself in float32. RuntimeError where a layer, the scores or the loss differ by more
    than 1e-5, the gradient by more than 1e-4, or ours in bf16 by more than twice what theirs does.
    """
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    recognizer = Recognizer.load(Path(folder) / shape)
    turns = dataset(Path(folder), recognizer)
    median = sorted(range(len(turns)), key=turns.lengths.__getitem__)[len(turns) // 2]
    batch = collate([turns[median]]).to(torch.device(device))
    ours, theirs = recognizer.model.to(device).eval(), load(Path(folder) / shape, device=device).eval()
    names = [name for name, _ in ours.named_parameters()]

    def our_side() -> dict[str, Tensor]:
        outputs = ours(batch.waveforms, batch.num_samples)
        layers, _ = ours.wav2vec2.layers(batch.waveforms, batch.num_samples)
        sums = Objective({"emotion": 1.0, "ctc": ALPHA}).sums(outputs, batch)
        loss = sums["emotion"][0] / sums["emotion"][1] + ALPHA * sums["ctc"][0] / sums["ctc"][1]
        return found(ours, layers, outputs.emotion, outputs.ctc, loss)

    def their_side() -> dict[str, Tensor]:
        emotion, symbols, further = theirs.scores(batch.waveforms, output_hidden_states=True)
        return found(theirs, further.hidden_states, emotion, symbols, theirs.loss(batch, emotion, symbols))

    def found(model: nn.Module, layers: Any, emotion: Any, symbols: Any, loss: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        scores = torch.cat([emotion.flatten(), symbols.flatten()])
        gradient = torch.cat([gradients[name].flatten() for name in names if name in gradients])
        values = {"layers": torch.stack([*layers]), "scores": scores, "loss": loss, "gradient": gradient}
        return {key: value.detach().float() for key, value in values.items()}

    exact, reference = our_side(), their_side()
    differ = {key: apart(exact[key], reference[key]) for key in exact}
    if max(value for key, value in differ.items() if key != "gradient") > 1e-5 or differ["gradient"] > 1e-4:
        raise RuntimeError(f"the two sides do not compute the same: {differ}")
    with autocast(device, "bfloat16"):
        rounded, theirs_rounded = our_side(), their_side()
    for key in ("layers", "scores", "gradient"):
        mine = differ[f"{key} in bf16, ours"] = apart(rounded[key], exact[key])
        rival = differ[f"{key} in bf16, theirs"] = apart(theirs_rounded[key], reference[key])
        if not mine <= 2 * rival:  # not a number is no less
            raise RuntimeError(f"ours loses more in bf16 than theirs does: {differ}")
    return differ


def apart(a: Tensor, b: Tensor) -> float:
    """The distance of two tensors, relative to the second."""
    return float((a - b).detach().norm() / b.detach().norm())

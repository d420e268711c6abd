"""Measure how far `ser` is from the reference implementation, for each architecture, head and source format.

    make parity        (python tests/peers/parity.py --write docs/parity.md)

Encoders have random weights at their public width and two transformer layers. They get one second of noise. Each
figure is the norm of a difference, relative to the norm of what is expected:

* forward: the largest difference over all layers' outputs, in float32;
* gradient: that of a random projection of the output, over all parameters together, in float64;
* in a batch: the output of an utterance alone beside that of the same in a padded batch of three, in float32. This
  needs no reference.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from foreign_models import EmotionModel, Wav2Vec2ForCTCnCLS, speech_classification
from public import ENCODERS
from torch import Tensor, nn

import ser
from ser.data.text import Vocabulary
from ser.models.config import ARCHITECTURES, Wav2Vec2Config
from ser.models.pretrained import written_names
from ser.models.wav2vec2 import Wav2Vec2

LIMITS = {"forward": 1e-5, "gradient": 1e-9, "in a batch": 1e-5}
EMOTIONS = {0: "ang", 1: "hap", 2: "neu", 3: "sad"}


def difference(found: Tensor, expected: Tensor) -> float:
    """Relative, by the norm."""
    assert found.shape == expected.shape
    return float((found - expected).norm() / expected.norm())


@torch.no_grad()
def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """A value of its own for every parameter and batch statistic: a norm's 1 and a bias's 0 would hide swaps."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in sorted(module.named_parameters()) + sorted(module.named_buffers()):
        if not tensor.is_floating_point():
            continue
        values = torch.randn(tensor.shape, generator=generator)
        if name.endswith("running_var"):
            values = 0.5 + values.abs()
        elif tensor.ndim > 1:
            values = values * 1.5 * tensor[0].numel() ** -0.5
        else:
            values = 0.3 * values + (1.0 if name.endswith("weight") else 0.0)
        tensor.copy_(values)
    return module.eval()


def reference_class(model_type: str, suffix: str = "Model") -> Any:
    """Such as WavLMForCTC."""
    return getattr(transformers, ARCHITECTURES[model_type].classes + suffix)


def encoder_row(values: dict[str, Any], *, samples: int = 16_000) -> dict[str, float]:
    """Our encoder beside the reference with the same weights."""
    cls = reference_class(values["model_type"])
    reference = randomise(cls(cls.config_class(**values)))
    ours = Wav2Vec2(Wav2Vec2Config.from_dict(values)).eval()
    keys = written_names(ours.state_dict(), ours.config, classifier=None)
    theirs = reference.state_dict()
    ours.load_state_dict({name: theirs[key] for name, key in keys.items()}, strict=True)
    assert len(keys) == len(theirs), "the reference has other tensors"
    waveform = torch.randn(1, samples, generator=torch.Generator().manual_seed(1))

    with torch.no_grad():
        outputs, _ = ours.layers(waveform)
        expected = reference(waveform, output_hidden_states=True)
        forward = [difference(a, b) for a, b in zip(outputs[:-1], expected.hidden_states[:-1], strict=True)]
        forward.append(difference(outputs[-1], expected.last_hidden_state))

        lengths = [samples, samples // 2 + 7, 400]
        batch = torch.randn(3, samples, generator=torch.Generator().manual_seed(2))
        together, frames = ours(batch, torch.tensor(lengths))
        in_a_batch = max(
            difference(together[i, : frames[i]], ours(batch[i : i + 1, :n])[0][0]) for i, n in enumerate(lengths)
        )

    ours, reference = ours.double(), reference.double()
    direction = torch.randn(outputs[-1].shape, generator=torch.Generator().manual_seed(3)).double()
    (ours(waveform.double())[0] * direction).sum().backward()
    (reference(waveform.double()).last_hidden_state * direction).sum().backward()
    wanted = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    found = {keys[name]: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    gradient = difference(
        torch.cat([found[name].flatten() for name in wanted]), torch.cat([g.flatten() for g in wanted.values()])
    )
    return {"forward": max(forward), "gradient": gradient, "in a batch": in_a_batch}


def head_row(values: dict[str, Any], suffix: str, **settings: Any) -> dict[str, float]:
    """A folder that the reference class saved, loaded by `ser.load`, one utterance."""
    cls = reference_class(values["model_type"], suffix)
    labels = {"id2label": EMOTIONS, "label2id": {name: i for i, name in EMOTIONS.items()}}
    model = randomise(cls(cls.config_class(**(values | labels | settings))))
    waveform = torch.randn(1, 16_000, generator=torch.Generator().manual_seed(1))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        if suffix == "ForCTC":
            Vocabulary.librispeech().write(Path(folder) / "vocab.json")
        ours = ser.load(folder).model
    with torch.no_grad():
        found, expected = ours(waveform), model(waveform).logits
    scores = found.ctc if suffix == "ForCTC" else found.emotion
    assert scores is not None
    return {"forward": difference(scores, expected)}


def dimensional_row(values: dict[str, Any]) -> dict[str, float]:
    """The dimensional model of Wagner et al., as its own code saves it."""
    names = {0: "arousal", 1: "dominance", 2: "valence"}
    labels = {"id2label": names, "label2id": {name: i for i, name in names.items()}}
    model = randomise(EmotionModel(transformers.Wav2Vec2Config(**values, **labels)))
    waveform = torch.randn(1, 16_000, generator=torch.Generator().manual_seed(1))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(folder)
        found = ser.load(folder).model(waveform).dimensions
        assert found is not None
        return {"forward": difference(found, model(waveform))}


def notebook_row(values: dict[str, Any], mode: str) -> dict[str, float]:
    """ForSpeechClassification of the widespread notebook, as its own code saves it."""
    labels = {"id2label": EMOTIONS, "label2id": {name: i for i, name in EMOTIONS.items()}}
    cls = speech_classification(values["model_type"])
    model = randomise(cls(cls.config_class(**values, **labels, pooling_mode=mode)))
    waveform = torch.randn(1, 16_000, generator=torch.Generator().manual_seed(1))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(folder)
        found = ser.load(folder).model(waveform).emotion
        assert found is not None
        return {"forward": difference(found, model(waveform))}


def paper_row(values: dict[str, Any]) -> dict[str, float]:
    """The model of Cai et al. with the speaker head that followers add, once it has names for its classes."""
    model = randomise(Wav2Vec2ForCTCnCLS(transformers.Wav2Vec2Config(**values, vocab_size=32)))
    waveform = torch.randn(1, 16_000, generator=torch.Generator().manual_seed(1))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(folder)
        config = Path(folder) / "config.json"
        speakers = {"format": 1, "speakers": [f"s{i}" for i in range(10)]}
        config.write_text(json.dumps(json.loads(config.read_text()) | {"id2label": EMOTIONS, "ser": speakers}))
        Vocabulary.librispeech().write(Path(folder) / "vocab.json")
        found, (ctc, emotion, speaker) = ser.load(folder).model(waveform), model(waveform)
        pairs = ((found.ctc, ctc), (found.emotion, emotion), (found.speaker, speaker))
        return {"forward": max(difference(a, b) for a, b in pairs if a is not None)}


def format_row(kind: str) -> dict[str, float]:
    """What examples/convert.py measures on a checkpoint of this kind: the largest difference of a layer."""
    tests = Path(__file__).parents[1]
    sys.path[:0] = [str(tests), str(tests.parent / "examples")]
    from convert import reference_layers
    from test_convert import fairseq_settings, fairseq_state, torchaudio_model

    from ser.convert.convert import convert

    values = {"model_type": "wav2vec2", "hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1024}
    config = Wav2Vec2Config.from_dict(values | {"num_hidden_layers": 3, "mask_time_prob": 0.05})
    settings: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        if kind == "pytorch_model.bin":
            model = randomise(reference_class("wav2vec2")(transformers.Wav2Vec2Config(**config.to_dict())))
            model.save_pretrained(source)
            (source / "model.safetensors").unlink()
            torch.save(model.state_dict(), source / "pytorch_model.bin")
        elif kind == "fairseq":
            encoder = randomise(Wav2Vec2(config))
            assert isinstance(encoder, Wav2Vec2)
            torch.save(
                {"args": None, "cfg": {"model": fairseq_settings(config)}, "model": fairseq_state(encoder)}, source
            )
        elif kind == "torchaudio":
            torch.save(randomise(torchaudio_model(config)).state_dict(), source)
            settings = {"num_attention_heads": 6}
        else:
            state = randomise(Wav2Vec2(config)).state_dict()
            torch.save({f"model.{name}": tensor for name, tensor in state.items()}, source)
            settings = config.to_dict()
        certificate = convert(source, Path(folder) / "target", config=settings, reference=reference_layers)
        return {"forward": certificate["comparison"]["largest"]}


def rows() -> list[tuple[str, str, Callable[[], dict[str, float]]]]:
    """(group, name, function that measures it)."""
    found = [
        ("Encoders", name, partial(encoder_row, values | {"num_hidden_layers": 2}))
        for name, values in ENCODERS.items()
    ]
    width = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1024, "num_hidden_layers": 3}
    pre_norm = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
    for kind, row in ARCHITECTURES.items():
        for style in ("", ", pre-norm") if kind != "data2vec-audio" else ("",):
            values = {"model_type": kind} | width | (pre_norm if style else {})
            ctc = partial(head_row, values, "ForCTC", vocab_size=32)
            found.append(("Heads", f"{row.classes}ForCTC{style}", ctc))
            for weighted in (False, True):
                name = f"{row.classes}ForSequenceClassification{style}{', weighted layer sum' if weighted else ''}"
                classify = partial(head_row, values, "ForSequenceClassification", use_weighted_layer_sum=weighted)
                found.append(("Heads", name, classify))
    base = {"model_type": "wav2vec2"} | width
    found.append(("Heads", "audEERING's dimensional model", partial(dimensional_row, base | pre_norm)))
    for kind in ARCHITECTURES:
        name = f"{ARCHITECTURES[kind].classes}ForSpeechClassification (a notebook's), mean"
        found.append(("Heads", name, partial(notebook_row, {"model_type": kind} | width, "mean")))
    for mode in ("sum", "max"):
        name = f"Wav2Vec2ForSpeechClassification (a notebook's), {mode}"
        found.append(("Heads", name, partial(notebook_row, base, mode)))
    found.append(("Heads", "the paper's model, with a speaker head", partial(paper_row, base)))
    for kind in ("pytorch_model.bin", "fairseq", "torchaudio", "speechbrain"):
        found.append(("Source formats", kind, partial(format_row, kind)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="also write the table to this Markdown file")
    parser.add_argument("--only", default="", help="measure the rows whose name holds this text")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    lines, failed, group = [], [], ""
    for part, name, measure in rows():
        if arguments.only not in name:
            continue
        if part != group:
            group = part
            lines += ["", f"## {part}", "", "| what | forward | gradient | in a batch |", "|---|---|---|---|"]
        started = time.perf_counter()
        figures = measure()
        cells = " | ".join(f"{figures[key]:.1e}" if key in figures else "" for key in LIMITS)
        lines.append(f"| {name} | {cells} |")
        print(f"{lines[-1]}  ({time.perf_counter() - started:.1f} s)", flush=True)
        if any(value > LIMITS[key] for key, value in figures.items()):
            failed.append(name)
    if arguments.write:
        introduction = (__doc__ or "").split("\n\n", 2)[2].strip()
        versions = f"transformers {transformers.__version__}, torch {torch.__version__}, {platform.machine()}"
        head = f"# Parity\n\nThe command `make parity` wrote this page with {versions}."
        text = f"{head}\n\n{introduction}\n" + "\n".join(lines) + "\n"
        arguments.write.write_text(text)
        print(f"written: {arguments.write}")
    if failed:
        sys.exit(f"error: over the tolerance: {', '.join(failed)}")


if __name__ == "__main__":
    main()

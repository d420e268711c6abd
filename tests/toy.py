"""A corpus small enough to train on in a test: tones as emotions, and a tiny model."""

import csv
from pathlib import Path

import numpy as np
import soundfile

from ser.data.manifest import Utterance, read_manifest
from ser.data.text import Vocabulary
from ser.models.config import Wav2Vec2Config
from ser.models.multitask import HeadsConfig, MultiTaskModel
from ser.recognizer import Recognizer

EMOTIONS = {"angry": 1200.0, "happy": 600.0, "neutral": 300.0, "sad": 150.0}  # Hz
WORDS = ["AB", "BA", "A B", ""]


def toy_config(**changes) -> Wav2Vec2Config:
    """Frames of 16 ms, 16 channels: a step takes milliseconds."""
    settings = {
        "conv_dim": (8, 8, 16),
        "conv_kernel": (10, 8, 8),
        "conv_stride": (4, 8, 8),
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "num_conv_pos_embeddings": 8,
        "num_conv_pos_embedding_groups": 4,
        "do_stable_layer_norm": True,
        "hidden_dropout": 0.1,
        "attention_dropout": 0.1,
        "activation_dropout": 0.1,
        "layerdrop": 0.2,
        "mask_time_prob": 0.2,
        "mask_time_length": 3,
        "mask_feature_prob": 0.1,
        "mask_feature_length": 4,
    }
    return Wav2Vec2Config(**(settings | changes))


def write_corpus(folder: Path, count: int = 24, *, speakers: int = 3, seed: int = 0, name: str = "train") -> Path:
    """``count`` tones of 0.2 to 0.5 s with a manifest; returns the manifest."""
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    manifest = folder / f"{name}.csv"
    with manifest.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file", "emotion", "text", "speaker", "arousal", "valence"])
        for i in range(count):
            emotion = list(EMOTIONS)[i % 4]
            seconds = 0.2 + 0.3 * generator.random()
            t = np.arange(int(16_000 * seconds)) / 16_000
            x = 0.3 * np.sin(2 * np.pi * EMOTIONS[emotion] * t) + 0.02 * generator.standard_normal(len(t))
            soundfile.write(folder / f"{name}{i}.wav", x, 16_000)
            dimensions = [1 + i % 4 + 0.1 * (i % 3), "" if i % 3 == 2 else 5 - i % 4]
            table.writerow([f"{name}{i}.wav", emotion, WORDS[i % len(WORDS)], f"s{i % speakers}", *dimensions])
    return manifest


def toy_rows(folder: Path, count: int = 24, **options) -> list[Utterance]:
    """The rows of a fresh `write_corpus`."""
    return read_manifest(write_corpus(folder, count, **options))


def toy_recognizer(
    *,
    speakers: int = 3,
    seed: int = 0,
    heads=("emotion", "ctc", "speaker", "dimensions"),
    reads=(("layers", "weighted"), ("pooling", "attentive")),
    **changes,
) -> Recognizer:
    """An untrained recognizer for the toy corpus, with every part that can be trained."""
    import torch

    vocabulary = Vocabulary.build(WORDS) if "ctc" in heads else None
    emotions = sorted(EMOTIONS) if "emotion" in heads else []
    names = [f"s{i}" for i in range(speakers)] if "speaker" in heads else []
    dimensions = ["arousal", "valence"] if "dimensions" in heads else []
    symbols = len(vocabulary) if vocabulary else 0
    sizes = HeadsConfig(len(emotions), symbols, len(names), len(dimensions), **dict(reads))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MultiTaskModel(toy_config(**changes), sizes)
    labels = {"emotions": emotions, "speakers": names, "dimensions": dimensions, "vocabulary": vocabulary}
    return Recognizer(model.eval(), **labels)

"""Cold start beside `transformers`: a new process, one recording of 3 seconds, to the printed answer.

    python benchmarks/startup.py                  # 5 processes each
    python benchmarks/startup.py --repeats 15
    python benchmarks/startup.py --device cuda    # what CUDA takes to start is then most of both

Ours is `ser predict`; theirs is the shortest program that does the same, with transformers'
Wav2Vec2ForSequenceClassification. Both read the same folder, and have to print the same emotion. Importing torch
alone is what neither can avoid.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import common
import numpy as np
from common import EMOTIONS, SAMPLE_RATE, Bar, Row

SECONDS = 3.0
RIVAL = """
import sys
import soundfile
import torch
from transformers import AutoFeatureExtractor, Wav2Vec2ForSequenceClassification
folder, file, device = sys.argv[1:]
extractor = AutoFeatureExtractor.from_pretrained(folder)
model = Wav2Vec2ForSequenceClassification.from_pretrained(folder).eval().to(device)
samples, rate = soundfile.read(file, dtype="float32")
inputs = extractor(samples, sampling_rate=rate, return_tensors="pt")
with torch.inference_mode():
    logits = model(inputs.input_values.to(device)).logits
print(model.config.id2label[int(logits.argmax())])
"""


def prepare(folder: str, *, seconds: list[float], shape: str, rates: list[int]) -> None:
    """A folder that both read, with an emotion head alone, and the recording."""
    import soundfile
    import torch

    from ser.models.multitask import HeadsConfig, MultiTaskModel
    from ser.recognizer import Recognizer

    torch.manual_seed(common.SEED)
    model = MultiTaskModel(common.shape_config(shape), HeadsConfig(len(EMOTIONS), projection=256))
    Recognizer(model, emotions=EMOTIONS).save(Path(folder) / shape)
    noise = np.random.default_rng(common.SEED).standard_normal(int(seconds[0] * SAMPLE_RATE))
    soundfile.write(Path(folder) / "turn.wav", 0.1 * noise, SAMPLE_RATE)


def start(*, folder: str, threads: int, device: str, repeat: int, shape: str, what: str) -> dict[str, Any]:
    """One process from its start to its end; in the first repeat it runs once before, to fill the disk's cache."""
    model, file = str(Path(folder) / shape), str(Path(folder) / "turn.wav")
    command = {
        "ser": ["-m", "ser", "predict", file, "--model", model, "--format", "jsonl", "--device", device],
        "transformers": ["-c", RIVAL, model, file, device],
        "import torch": ["-c", "import torch"],
    }[what]
    for _ in range(2 if repeat == 0 else 1):
        started = time.perf_counter()
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
        seconds = time.perf_counter() - started
        if done.returncode:
            raise RuntimeError(done.stderr)
    said = [name for name in EMOTIONS if f'"emotion": "{name}"' in done.stdout or name == done.stdout.strip()]
    return {"seconds": seconds, "emotion": said[0] if said else None}


def same(rows: list[Row]) -> dict[str, Any]:
    """Both have to recognise the same."""
    said = {found["emotion"] for row in rows for found in row.found if row.name in ("ser", "transformers")}
    if len(said) != 1:
        raise RuntimeError(f"the two sides do not say the same: {said}")
    return {"emotion that both print": said.pop()}


def main() -> None:
    """Measure, print, write."""
    common.serve({"prepare": prepare, "start": start})
    arguments = common.parse(__doc__ or "", turns=1, repeats=3)
    arguments.dtypes = []
    names = ("ser", "transformers", "import torch")
    rows = [Row(f, "", "start", "start", {"what": f, "shape": arguments.shape}) for f in names]
    bars = [Bar("cold start to the printed answer", 2.3, ["ser"], ["transformers"])]
    common.run("startup", arguments, rows, bars, seconds=[SECONDS], extra=same)


if __name__ == "__main__":
    main()

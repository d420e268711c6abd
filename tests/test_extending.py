"""docs/extending.md: every example is a whole script of at most 40 lines, and runs from outside the package."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from toy import toy_recognizer

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
# heading -> script
EXAMPLES = {
    heading.lower(): script
    for heading, script in re.findall(r"^## ([^\n]+)\n(?:(?!^## ).)*?^```python\n(.*?)^```", PAGE, re.M | re.S)
}


@pytest.fixture
def folder(tmp_path):
    """The folder that the page describes, with a model and a corpus whose names tell all."""
    rows = ["file,emotion,speaker,age"]
    for name in ("wav", "named"):
        (tmp_path / name).mkdir()
    for i in range(12):
        sound = 0.1 * np.random.default_rng(i).standard_normal(12_000 + 800 * i)
        soundfile.write(tmp_path / "wav" / f"{i}.wav", sound, 16_000)
        soundfile.write(tmp_path / "named" / f"s{i % 3}-{'hs'[i % 2]}-{i:02}.wav", sound, 16_000)
        rows.append(f"wav/{i}.wav,{('happy', 'sad')[i % 2]},s{i % 3},{20 + i if i % 4 else ''}")
    (tmp_path / "train.csv").write_text("\n".join(rows) + "\n")
    toy_recognizer(heads=["emotion"]).save(tmp_path / "model")
    return tmp_path


def run(folder: Path, script: str) -> str:
    """What a script prints; it must end well."""
    (folder / "script.py").write_text(script)
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "script.py"]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def last_update(run: Path) -> dict:
    """The log of a run's last update."""
    entries = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [entry for entry in entries if entry["kind"] == "train"][-1]


def test_each_example_is_short_and_has_a_test():
    tests = {name for name in globals() if name.startswith("test_")}
    assert len(EXAMPLES) == 6 == PAGE.count("```python")
    for heading, script in EXAMPLES.items():
        assert f"| [{heading}](#{heading.replace(' ', '-')}) |" in PAGE, "the table at the top has it"
        assert len(script.splitlines()) <= 40, heading
        assert f"test_{heading.replace(' ', '_')}" in tests


def test_a_head_with_its_loss(folder):
    said = run(folder, EXAMPLES["a head with its loss"])
    assert re.search(r"mean error \d+ years after 3 updates", said), said
    assert re.search(r"\{'age': \{'age': -?\d", said), said


def test_an_encoder_variant(folder):
    without = """
from ser.models.wav2vec2 import Attention
before = variant.predict("wav/0.wav")[0].probabilities
DistanceAttention.position_bias = Attention.position_bias
print("without the bias the same:", variant.predict("wav/0.wav")[0].probabilities == before)
"""
    said = run(folder, EXAMPLES["an encoder variant"] + without)
    assert re.search(r"^DistanceAttention (happy|sad)\nwithout the bias the same: False$", said, re.M), said


def test_a_corpus(folder):
    said = run(folder, EXAMPLES["a corpus"])
    assert "mine.csv: 12 utterances" in said and "not as many" not in said, said
    assert "ours alone" in (folder / "prepared" / "report.json").read_text()


def test_an_augmentation(folder):
    script = EXAMPLES["an augmentation"]
    run(folder, script)
    assert json.loads((folder / "augmented/config.json").read_text())["augment"] == ["noise"]
    nothing = script.replace('AUGMENTATIONS["noise"] = noise', 'AUGMENTATIONS["noise"] = lambda x, generator: x')
    run(folder, nothing.replace("augmented", "plain"))
    augmented, plain = (last_update(folder / name) for name in ("augmented", "plain"))
    assert augmented["step"] == plain["step"] == 3 and augmented["loss_emotion"] != plain["loss_emotion"]


def test_an_output_format(folder):
    assert re.search(r"^0\.000\t0\.750\t\w+$", run(folder, EXAMPLES["an output format"]), re.M)


def test_a_learning_rate_schedule(folder):
    run(folder, EXAMPLES["a learning rate schedule"])
    settings = json.loads((folder / "scheduled/config.json").read_text())
    assert settings["schedule"] == "cosine"
    # Of three updates the first one rises; the last one is half-way down.
    assert last_update(folder / "scheduled")["rate"] == pytest.approx(0.5 * settings["rate"])

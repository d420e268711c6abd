"""docs/extending.md: every example is a whole script of at most 40 lines, and runs from outside the package."""

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


def run(folder: Path, heading: str) -> str:
    """What the script of this heading prints; it must end well."""
    (folder / "script.py").write_text(EXAMPLES[heading])
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "script.py"]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_each_example_is_short_and_has_a_test():
    tests = {name for name in globals() if name.startswith("test_")}
    assert len(EXAMPLES) == 6
    for heading, script in EXAMPLES.items():
        assert len(script.splitlines()) <= 40, heading
        assert f"test_{heading.replace(' ', '_')}" in tests


def test_a_head_with_its_loss(folder):
    said = run(folder, "a head with its loss")
    assert re.search(r"mean error \d+ years after 3 updates", said), said
    assert re.search(r"\{'age': \{'age': -?\d", said), said


def test_an_encoder_variant(folder):
    assert "DistanceAttention" in run(folder, "an encoder variant")


def test_a_corpus(folder):
    said = run(folder, "a corpus")
    assert "mine.csv: 12 utterances" in said, said
    assert "ours alone" in (folder / "prepared" / "report.json").read_text()


def test_an_augmentation(folder):
    assert "update 3" in run(folder, "an augmentation")
    assert '"augment": [\n' in (folder / "augmented" / "config.json").read_text()


def test_an_output_format(folder):
    assert re.search(r"^0\.000\t0\.750\t\w+$", run(folder, "an output format"), re.M)


def test_a_learning_rate_schedule(folder):
    run(folder, "a learning rate schedule")
    assert '"schedule": "cosine"' in (folder / "scheduled" / "config.json").read_text()

"""A model folder that an earlier commit wrote loads, gives the same answers, and is written again as it was.

``folders/<commit>/model`` is what `toy_recognizer` with random heads saved at that commit, and ``answers.json`` is
what it recognised there in `glide`.
"""

import json
import math
from pathlib import Path

import pytest
import torch

import ser

FOLDERS = sorted((Path(__file__).parent / "folders").iterdir())


def glide() -> torch.Tensor:
    """Half a second of a tone that rises from 200 to 600 Hz and fades, the same on every machine."""
    t = torch.arange(8000, dtype=torch.float64) / 16_000
    return (0.3 * torch.sin(2 * math.pi * (200 + 400 * t) * t) * (1 - t)).float()


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_folder_of_an_earlier_commit_gives_the_same_answers(folder):
    expected = json.loads((folder / "answers.json").read_text())
    (prediction,) = ser.load(folder / "model").predict([glide()], 16_000)
    found = prediction.to_dict()
    for name in ("emotion", "transcript", "speaker", "seconds", "warning"):
        assert found[name] == expected[name]
    for name in ("probabilities", "dimensions", "speaker_probability"):
        assert found[name] == pytest.approx(expected[name], rel=1e-6, abs=1e-6)
    assert list(found["probabilities"]) == list(expected["probabilities"])
    assert list(found["dimensions"]) == list(expected["dimensions"])


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_folder_of_an_earlier_commit_is_written_again_byte_for_byte(folder, tmp_path):
    ser.load(folder / "model").save(tmp_path / "again")
    names = sorted(path.name for path in (folder / "model").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (folder / "model" / name).read_bytes(), name

"""The small model learns from real recordings what carries over to unseen speakers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EMODB = ROOT.parent / "shared" / "corpora" / "emodb-4class"


@pytest.mark.skipif(not EMODB.is_dir(), reason="EmoDB is not at ../shared/corpora")
@pytest.mark.slow
def test_the_small_model_recognises_emotion_in_unseen_speakers_of_emodb(tmp_path):
    """Two seeds, all heads, two speakers left out; chance is 0.25. docs/results.md has what comes of three."""
    command = [sys.executable, str(ROOT / "benchmarks/emodb.py"), str(EMODB), "--out", str(tmp_path)]
    command += ["--seeds", "0", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["seeds"]) == 2 and results["utterances"] == 73
    assert results["mean_unweighted_accuracy"] >= 0.50, results

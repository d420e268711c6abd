"""Fifty updates of a tiny run give the losses that were recorded: a change that should not alter results does not.

A change that should (a new default, another order of random draws, another torch) records them again, and the
commit says why:

    python tests/test_loss_curves.py
"""

import json
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from test_train import log, quick
from toy import toy_recognizer, toy_rows

from ser.train.loop import fit

CURVES = Path(__file__).parent / "curves" / "tiny.json"
SHOWN = ["loss_emotion", "loss_ctc", "loss_speaker", "loss_dimensions", "grad_norm", "rate"]


def here() -> dict[str, str]:
    """What the last bits of a sum depend on: oneDNN and MKL choose their kernels by the model of the CPU."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().split("\n\n")[0].splitlines() if cpuinfo.exists() else []
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    cpu = " ".join(fields.get(name, "unknown") for name in ("vendor_id", "cpu family", "model"))
    return {"torch": torch.__version__, "cpu_capability": torch.backends.cpu.get_cpu_capability(), "cpu": cpu}


def train(folder: Path) -> dict[str, list[float]]:
    """Five epochs of ten updates of two micro-batches, with dropout, LayerDrop, masks and every head."""
    settings = quick(epochs=5, rate=5e-3, log_every=1, save_every="99ep")
    fit(toy_recognizer(), toy_rows(folder, 40), [], settings, folder / "run")
    entries = log(folder / "run", "train")
    return {name: [entry[name] for entry in entries] for name in SHOWN}


def test_fifty_updates_give_the_recorded_losses(tmp_path):
    recorded = json.loads(CURVES.read_text())
    found = train(tmp_path)
    assert found.keys() == recorded["curves"].keys()
    exact = recorded["recorded_with"] == here()
    for name, values in recorded["curves"].items():
        assert len(values) == len(found[name]) == 50
        assert found[name] == (values if exact else pytest.approx(values, rel=1e-4, abs=1e-4)), (
            f"{name}: see {__file__}"
        )
    assert sum(found["loss_emotion"][-5:]) < sum(found["loss_emotion"][:5]), "and it learns"


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        CURVES.parent.mkdir(exist_ok=True)
        found = {"recorded_with": here(), "curves": train(Path(folder))}
        CURVES.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{CURVES}: {found['recorded_with']}", file=sys.stderr)

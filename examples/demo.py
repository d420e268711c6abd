"""The main job from end to end, without any download: build a corpus, train, evaluate, recognise.

    make demo            (or: python examples/demo.py, where ser[demo] is installed)

It speaks a small corpus with espeak-ng (synthetic: emotions are rules on rate, pitch and range), trains the small
model from scratch on two CPU processes with torchrun, evaluates it on voices and sentences that were not trained
on, recognises a few recordings, and prints a table. Exits with 1 if the figures are worse than they should be.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import ser
from ser.data.manifest import read_manifest
from ser.train.evaluation import evaluate
from ser.train.processes import run_command

sys.path.insert(0, str(Path(__file__).parent))
import make_demo_corpus

EXAMPLES = Path(__file__).parent
NEEDED_UA, NEEDED_WER = 0.60, 0.35
# From scratch the rate is far above fine-tuning's 5e-5, and an epoch is some hundred short updates.
SETTINGS = (
    "--init small --heads emotion,ctc,speaker --alpha 0.1 --beta 0.5 --rate 1e-3 "
    "--micro-batch 4 --effective-batch 8 --epochs 9 --eval-every 3ep --save-every 3ep --log-every 24"
)


def run(*command: str) -> None:
    """Run a command as a user would, showing it first."""
    print("\n$ " + " ".join(command), flush=True)
    shown = {"torchrun": [sys.executable, "-m", "torch.distributed.run"], "python": [sys.executable]}
    status = run_command([*shown[command[0]], *command[1:]], os.environ | {"OMP_NUM_THREADS": "1"})
    if status:
        sys.exit(f"error: the command above ended with status {status}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/demo"), help="where the corpus is built")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="the run's folder, made anew")
    parser.add_argument("--processes", type=int, default=2, help="training processes")
    arguments = parser.parse_args()
    data, out = arguments.data, arguments.out

    print(f"1. A synthetic corpus in {data} (espeak-ng; figures on it say nothing about people)", flush=True)
    started = time.perf_counter()
    make_demo_corpus.build(data)
    built = time.perf_counter()

    print("\n2. Train emotion, transcript and speaker together, from random weights", flush=True)
    run(
        "torchrun", "--standalone", f"--nproc-per-node={arguments.processes}", str(EXAMPLES / "train_iemocap.py"),
        "--train", str(data / "train.csv"), "--valid", str(data / "valid.csv"), "--allow-overlap", "speakers",
        "--out", str(out), "--overwrite", *SETTINGS.split(),
    )  # fmt: skip
    trained = time.perf_counter()

    print("\n3. Evaluate on unseen voices saying unseen sentences", flush=True)
    recognizer = ser.load(out / "best")
    unseen = evaluate(recognizer, read_manifest(data / "test.csv"), progress=sys.stderr.isatty()).metrics()
    known = evaluate(recognizer, read_manifest(data / "known.csv"), progress=sys.stderr.isatty()).metrics()

    print("\n4. Recognise a few of those recordings", flush=True)
    some = [str(utterance.file) for utterance in read_manifest(data / "test.csv")[:40:8]]
    run("python", str(EXAMPLES / "infer.py"), *some, "--model", str(out / "best"))

    passed = unseen["unweighted_accuracy"] >= NEEDED_UA and unseen["wer"] <= NEEDED_WER
    seconds = {"corpus": built - started, "training": trained - built, "all": time.perf_counter() - started}
    results = {"unseen": unseen, "known": known, "seconds": seconds, "passed": passed, "synthetic": True}
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    chance = f"chance {1 / len(recognizer.emotions):.2f}"
    rows = [
        ("emotion, unweighted accuracy (UA)", unseen["unweighted_accuracy"], chance, f"at least {NEEDED_UA:.2f}"),
        ("emotion, accuracy (WA)", unseen["accuracy"], chance, ""),
        ("word error rate", unseen["wer"], "", f"at most {NEEDED_WER:.2f}"),
        ("speaker, held-out turns of trained voices", known["speaker_accuracy"],
         f"chance {1 / len(recognizer.speakers):.2f}", ""),
    ]  # fmt: skip
    print(f"\nSynthetic corpus: {unseen['utterances']} unseen sentences by unseen voices, {known['utterances']} "
          "held-out turns of trained voices")  # fmt: skip
    for name, value, chance, needed in rows:
        print(f"  {name:<44}{value:6.2f}   {chance:<12}{needed}")
    print(f"  {'seconds (corpus / training / all)':<44}" + " / ".join(f"{s:.0f}" for s in seconds.values()))
    print(f"  model {out / 'best'}   log {out / 'metrics.jsonl'}   figures {out / 'results.json'}   corpus {data}")
    if not passed:
        sys.exit(f"error: worse than it should be: UA at least {NEEDED_UA}, WER at most {NEEDED_WER}")


if __name__ == "__main__":
    try:
        main()
    except ser.SerError as error:
        sys.exit(f"error: {error}")

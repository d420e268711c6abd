"""Train the small model from scratch on EmoDB's four emotions, leaving speakers out: real speech, three heads.

    python benchmarks/emodb.py EMODB4 --out runs/emodb --seeds 0 1 2

What helps where classes are uneven is shown on the same corpus, with a quarter of the training utterances of two
classes:

    python benchmarks/emodb.py EMODB4 --out runs/uneven --keep happiness=0.25 sadness=0.25 --flags "--balance 1"

Each seed trains on all speakers but those held out (two processes under torchrun) and is evaluated on them once,
with the weights that training ended with: nothing is chosen on the speakers that are tested. EmoDB's ten sentences
are the same for all speakers, so its word error rate measures remembered sentences.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from pathlib import Path

import ser
from ser.data.manifest import Utterance, read_manifest, write_manifest
from ser.scores.report import Figures, Outcomes, as_row
from ser.train.evaluation import evaluate
from ser.train.processes import run_command

# From scratch: a rate far above fine-tuning's, and many small updates. The loss of a transcript of sixty letters
# is a hundred times that of an emotion, and gradients are clipped: at a higher alpha the text takes them all.
SETTINGS = (
    "--init small --build-vocab --heads emotion,ctc,speaker --alpha 0.002 --beta 0.1 --rate 1e-3 "
    "--effective-batch 4 --log-every 60"
)


def kept(rows: list[Utterance], shares: list[str]) -> list[Utterance]:
    """Keep a share of the utterances of some emotions, EMOTION=SHARE each; which ones is drawn with seed 0."""
    order, left = random.Random(0).sample(rows, len(rows)), []
    for share in shares:
        emotion, _, number = share.partition("=")
        own = [u.id for u in order if u.emotion == emotion]
        left += own[round(float(number) * len(own)) :]
    return [u for u in rows if u.id not in set(left)]


def main() -> None:
    """Train and evaluate one run per seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, help="folder with metadata.csv and wav/")
    parser.add_argument("--out", type=Path, default=Path("runs/emodb"), help="folder for manifests and runs")
    parser.add_argument("--held-out", nargs="+", default=["15", "16"], help="speakers to test on (default: 15 16)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="one run each (default: 0 1 2)")
    parser.add_argument(
        "--keep", nargs="*", default=[], metavar="EMOTION=SHARE", help="of its training utterances"
    )
    parser.add_argument("--flags", default="--class-weights", help="further flags of training (default: "
                        "--class-weights)")  # fmt: skip
    parser.add_argument("--epochs", type=int, default=5, help="of each run (default: 5)")
    arguments = parser.parse_args()

    rows = read_manifest(arguments.corpus / "metadata.csv", columns={"text": "transcript"}, tell=print)
    held_out = [u for u in rows if u.speaker in arguments.held_out]
    rest = kept([u for u in rows if u.speaker not in arguments.held_out], arguments.keep)
    if not held_out or not rest:
        speakers = ", ".join(sorted({str(u.speaker) for u in rows}))
        raise ser.SerError(
            f"--held-out {' '.join(arguments.held_out)} leaves a part empty; speakers are {speakers}"
        )
    arguments.out.mkdir(parents=True, exist_ok=True)
    manifest = arguments.out / "train.csv"
    write_manifest(manifest, rest)

    results = []
    for seed in arguments.seeds:
        started = time.perf_counter()
        run = arguments.out / f"seed{seed}"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        command += ["-m", "ser", "train", "--train", str(manifest), "--out", str(run), "--overwrite"]
        command += ["--seed", str(seed), *SETTINGS.split(), *arguments.flags.split()]
        command += ["--epochs", str(arguments.epochs), "--save-every", f"{arguments.epochs}ep"]
        if run_command(command, os.environ | {"OMP_NUM_THREADS": "1"}):
            sys.exit(f"error: training with seed {seed} failed")
        recognizer = ser.load(run / "last")
        evaluation = evaluate(recognizer, held_out, keep_rows=True)
        outcomes = Outcomes.of(recognizer.emotions, [as_row(recognizer, *row) for row in evaluation.rows])
        metrics = evaluation.metrics() | {"ece": float(Figures(outcomes)()["ece"])}
        metrics |= {"seed": seed, "seconds": time.perf_counter() - started}
        results.append(metrics)
        print(f"seed {seed}: UA {metrics['unweighted_accuracy']:.3f}  WA {metrics['accuracy']:.3f}  "
              f"F1 {metrics['macro_f1']:.3f}  ECE {metrics['ece']:.3f}  "
              f"WER {metrics['wer']:.3f}  {metrics['seconds']:.0f} s", flush=True)  # fmt: skip
    names = ("unweighted_accuracy", "macro_f1", "ece")
    mean, f1, ece = (sum(m[name] for m in results) / len(results) for name in names)
    summary = {"held_out": arguments.held_out, "utterances": len(held_out), "epochs": arguments.epochs}
    summary |= {"mean_unweighted_accuracy": mean, "seeds": results}
    (arguments.out / "results.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(f"mean UA {mean:.3f}, macro F1 {f1:.3f}, ECE {ece:.3f} over {len(results)} seeds "
          f"on {len(held_out)} turns of unseen speakers "
          f"{', '.join(arguments.held_out)} (chance 0.25)")  # fmt: skip


if __name__ == "__main__":
    try:
        main()
    except ser.SerError as error:
        sys.exit(f"error: {error}")

"""Train, evaluate and use a small model on a synthetic corpus, from end to end and without any download.

    ser demo                                             (needs the extra `demo`)
    ser demo --corpus-only --data data/demo --size 480   (the corpus alone)

The command speaks a small corpus with espeak-ng (synthetic: emotions are rules on rate, pitch and range) and
trains the small model from scratch on two CPU processes with torchrun. Then it evaluates the model on voices and
sentences that training did not have, recognises a few recordings, and prints a table. The exit status is 1 if the
figures are worse than they should be.
"""

import json
import os
import sys
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path

import ser
from ser.data.demo_corpus import build_corpus
from ser.data.manifest import read_manifest
from ser.errors import printable
from ser.train.evaluation import evaluate
from ser.train.processes import run_command

NEEDED_UA, NEEDED_WER = 0.60, 0.35
# Training from scratch needs a rate far above the 5e-5 of fine-tuning; an epoch has about a hundred short updates.
SETTINGS = (
    "--init small --heads emotion,ctc,speaker --alpha 0.1 --beta 0.5 --rate 1e-3 "
    "--effective-batch 8 --epochs 9 --eval-every 3ep --save-every 3ep --log-every 24"
)


def add_arguments(parser: ArgumentParser) -> None:
    """Add the flags of the command."""
    add = parser.add_argument
    add("--data", type=Path, default=Path("data/demo"), help="folder in which the corpus is built "
        "(default: %(default)s)")  # fmt: skip
    add("--out", type=Path, default=Path("runs/demo"), help="the run's folder, made anew (default: %(default)s)")
    add("--processes", type=int, default=2, help="training processes (default: %(default)s)")
    add = parser.add_argument_group("the corpus").add_argument
    add("--corpus-only", action="store_true", help="make the corpus and end")
    add("--seed", type=int, default=0, help="another seed, another corpus (default: %(default)s)")
    add("--size", type=int, default=192, help="training sentences; each in 4 emotions (24 to 480; "
        "default: %(default)s)")  # fmt: skip


def run_shown(*words: str) -> None:
    """Print a command and run it as a user would; if it fails, end with its exit status."""
    print("\n$ " + " ".join(words), flush=True)
    starts = {"torchrun": [sys.executable, "-m", "torch.distributed.run"], "ser": [sys.executable, "-m", "ser"]}
    command = [*starts.get(words[0], words[:1]), *words[1:]]
    if status := run_command(command, os.environ | {"OMP_NUM_THREADS": "1"}):
        sys.exit(f"error: the command above ended with status {status}")


def show_figures(unseen: dict, known: dict, *, emotions: int, speakers: int) -> None:
    """Print the table of figures."""
    chance = f"chance {1 / emotions:.2f}"
    rows = [
        ("emotion, unweighted accuracy (UA)", unseen["unweighted_accuracy"], chance, f"at least {NEEDED_UA:.2f}"),
        ("emotion, accuracy (WA)", unseen["accuracy"], chance, ""),
        ("word error rate", unseen["wer"], "", f"at most {NEEDED_WER:.2f}"),
        ("speaker, held-out turns of trained voices", known["speaker_accuracy"], f"chance {1 / speakers:.2f}", ""),
    ]
    print(f"\nSynthetic corpus: {unseen['utterances']} unseen sentences by unseen voices, {known['utterances']} "
          "held-out turns of trained voices")  # fmt: skip
    for name, value, chance, needed in rows:
        print(f"  {name:<44}{value:6.2f}   {chance:<12}{needed}")


def run(arguments: Namespace) -> int:
    """Build the corpus, train, evaluate and recognise."""
    data, out = arguments.data, arguments.out
    print(f"1. A synthetic corpus in {data} (espeak-ng; figures on it say nothing about people)", flush=True)
    started = time.perf_counter()
    corpus = build_corpus(data, arguments.seed, arguments.size)
    built = time.perf_counter()
    if arguments.corpus_only:
        counts = ", ".join(f"{len(turns)} {part}" for part, turns in corpus.items())
        print(printable(f"{data}: {counts} utterances of synthetic speech"))
        return 0

    print("\n2. Train emotion, transcript and speaker together, from random weights", flush=True)
    run_shown(
        "torchrun", "--standalone", f"--nproc-per-node={arguments.processes}", "-m", "ser", "train",
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
    run_shown("ser", "predict", *some, "--model", str(out / "best"))

    passed = unseen["unweighted_accuracy"] >= NEEDED_UA and unseen["wer"] <= NEEDED_WER
    seconds = {"corpus": built - started, "training": trained - built, "all": time.perf_counter() - started}
    results = {"unseen": unseen, "known": known, "seconds": seconds, "passed": passed, "synthetic": True}
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    show_figures(unseen, known, emotions=len(recognizer.emotions), speakers=len(recognizer.speakers))
    print(f"  {'seconds (corpus / training / all)':<44}" + " / ".join(f"{s:.0f}" for s in seconds.values()))
    print(f"  model {out / 'best'}   log {out / 'metrics.jsonl'}   figures {out / 'results.json'}   corpus {data}")
    if not passed:
        sys.exit(f"error: worse than it should be: UA at least {NEEDED_UA}, WER at most {NEEDED_WER}")
    return 0

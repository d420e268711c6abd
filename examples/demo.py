"""The main job from end to end, without any download: build a corpus, train, evaluate, recognise.

    python examples/demo.py --data data/demo --out runs/demo

This is `ser demo`. Its steps are commands that can be given alone:

    ser demo --corpus-only --data data/demo
    torchrun --standalone --nproc-per-node=2 -m ser train \\
        --train data/demo/train.csv --valid data/demo/valid.csv --allow-overlap speakers --init small \\
        --beta 0.5 --rate 1e-3 --epochs 9 --out runs/demo
    ser evaluate --model runs/demo/best --manifest data/demo/test.csv
    ser predict data/demo/wav --model runs/demo/best

The corpus is synthetic: figures on it say nothing about people.
"""

import sys

from ser.cli import call

if __name__ == "__main__":
    sys.exit(call("demo", sys.argv[1:], text=__doc__))

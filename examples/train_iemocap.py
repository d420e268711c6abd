"""Train an emotion recogniser, with transcript and speaker heads, on any corpus that a manifest describes.

Fine-tune a wav2vec 2.0 folder as Cai et al. (INTERSPEECH 2021) do, on two GPUs:

    torchrun --standalone --nproc-per-node=2 examples/train_iemocap.py \\
        --train train.csv --valid valid.csv --root IEMOCAP_full_release \\
        --init wav2vec2-base --alpha 0.1 --epochs 100 --out runs/01F

Train a small model from scratch on two CPU processes:

    torchrun --standalone --nproc-per-node=2 examples/train_iemocap.py \\
        --train data/demo/train.csv --valid data/demo/valid.csv --init small --beta 0.1 \\
        --rate 1e-3 --effective-batch 16 --epochs 20 --allow-overlap speakers --out runs/demo

One fold of the paper's protocol with the paper's settings, from the folder that `ser prepare` wrote:

    torchrun --standalone --nproc-per-node=2 examples/train_iemocap.py \\
        --data data/iemocap --root IEMOCAP_full_release --protocol paper10 --fold 01F \\
        --paper --init wav2vec2-base --out runs/01F

With one process: python examples/train_iemocap.py ... . This is `ser train`. A run that was interrupted continues
when the same command is given again. SIGTERM, SIGUSR1, SIGHUP and Ctrl-C let it finish its update, save, and end
with status 75.
"""

import sys

from ser.cli import call

if __name__ == "__main__":
    sys.exit(call("train", sys.argv[1:], text=__doc__))

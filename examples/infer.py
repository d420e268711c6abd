"""Recognise emotion, transcript and speaker in recordings.

Files, whole folders and manifests, in one table:

    python examples/infer.py speech.wav recordings/ test.csv --model runs/demo/best

A lecture of any length, in windows of ten seconds that begin every five seconds:

    python examples/infer.py lecture.flac --model runs/demo/best --window 10 --hop 5 --format csv

The predictions file of Cai et al. (INTERSPEECH 2021), for their fold of IEMOCAP:

    python examples/infer.py iemocap_01F.test.csv --root IEMOCAP_full_release --model runs/01F/best --format paper

This is `ser predict`, whose help says more. From Python, the same is a few lines:

    import ser

    recognizer = ser.load("runs/demo/best")
    for prediction in recognizer.stream(["a.wav", "b.wav"]):
        print(prediction.file, prediction.emotion)

The exit status is 0 if all recordings were recognised, 1 if some could not be read, and 2 if the command could not
go on. With 2, --output was not written.
"""

import sys

from ser.cli import call


def main() -> int:
    """Recognise as `ser predict` does, with this page's help."""
    return call("predict", sys.argv[1:], text=__doc__)


if __name__ == "__main__":
    sys.exit(main())

"""Turn a checkpoint of another library into a model folder, and prove that it computes the same.

A folder of transformers with pytorch_model.bin, or its name on the Hugging Face hub:

    ser convert downloads/wav2vec2-base models/wav2vec2-base
    ser convert superb/wav2vec2-base-superb-er models/superb

Its classes keep their names; where nobody gave them any (LABEL_0, LABEL_1), --labels does.

fairseq, torchaudio:

    ser convert wav2vec_small.pt models/wav2vec2-base
    ser convert wav2vec2_fairseq_base_ls960.pth models/wav2vec2-base

speechbrain keeps the encoder in wav2vec2.ckpt, without its configuration: that of the model it was made from. (The
classifier of its emotion recipe reads a mean over an output that was normalised over frames and channels at once,
which this package does not compute, so it is left.)

    ser convert wav2vec2.ckpt models/speechbrain --config wav2vec2-base/config.json

A folder of the code of Cai et al. (2021), with the heads lm_head and cls_head, perhaps spk_head, and no names for
their classes (e0..e3 are neutral, happy, angry, sad, as in the paper's manifests):

    ser convert output/checkpoint-1000 models/paper --vocab vocab.json --labels e0,e1,e2,e3

Nothing in the source is executed: of a pickle only tensors and plain settings are read, and a file that names
anything else is refused. The folder is written once its tensors are the source's bit for bit, and certificate.json
in it says so. examples/convert.py is the same command, and also compares each layer's output with that of the
library that the source comes from.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from ser.convert.convert import convert
from ser.data.text import Vocabulary
from ser.errors import printable
from ser.models.pretrained import read_json


def names(text: str) -> list[str]:
    """Split "a, b" into its names."""
    return [name.strip() for name in text.split(",")]


def add_arguments(parser: ArgumentParser) -> None:
    """Add the flags of the command."""
    add = parser.add_argument
    add(
        "source",
        help="folder of transformers, its OWNER/NAME on the hub, or file of fairseq, torchaudio, speechbrain",
    )
    add("target", type=Path, help="model folder to write")
    add("--config", type=Path, help="config.json, or a part of it, for what the source lacks; it "
        "stands above what the source says")  # fmt: skip
    add("--vocab", type=Path, help="vocab.json of the CTC head (default: that of the source, else "
        "the 32 symbols of LibriSpeech)")  # fmt: skip
    add("--labels", type=names, metavar="A,B,...", help="of the emotion head, in the order of its "
        "rows (default: e0,e1,e2,e3)")  # fmt: skip
    add("--speakers", type=names, metavar="A,B,...", help="of the speaker head (default: s0,s1,...)")
    add("--overwrite", action="store_true", help="replace a model folder at the target")
    parser.set_defaults(reference=None)  # examples/convert.py has one


def run(arguments: Namespace) -> int:
    """Write the model folder and its certificate."""
    config = arguments.config
    convert(
        arguments.source,
        arguments.target,
        config=read_json(config.parent, config.name) if config else None,
        vocabulary=Vocabulary.read(arguments.vocab) if arguments.vocab else None,
        labels=arguments.labels,
        speakers=arguments.speakers,
        overwrite=arguments.overwrite,
        reference=arguments.reference,
        say=lambda text: print(printable(text, lines=True)),
    )
    return 0

"""Write recordings as training would hear them, one file for each epoch, and print what was drawn.

    ser augment recording.wav --augment gain noise:snr=0..10 reverb speed --play-to heard --epochs 4
    ser augment a.wav b.wav c.wav --augment babble:snr=5 telephone:p=0.5 --play-to heard

--augment is that of `ser train`: names of augmentations with their options, in the order in which they are
applied; docs/training.md has them. The files are DIR/FILE-EPOCH-PLACE.wav, 16 kHz, mono, 16 bit. Epochs and places
count from 0. The place of a recording is its number in the command, as that of an utterance is its number in the
plan of an epoch. Babble is made of the other recordings of the command. The same command writes the same sound.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

import torch
from torch import Tensor

from ser.audio import SAMPLE_RATE, load_audio
from ser.data.augment import AUGMENTATIONS, augmented
from ser.data.demo_corpus import write_wav
from ser.data.manifest import Utterance
from ser.data.sampler import Item
from ser.errors import ConfigError, printable, summary
from ser.files import written


def add_arguments(parser: ArgumentParser) -> None:
    """Add the flags of the command."""
    add = parser.add_argument
    add("files", nargs="+", type=Path, metavar="FILE", help="recordings")
    add("--augment", nargs="+", required=True, metavar="NAME[:OPTION=VALUE,...]",
        help=f"augmentations, applied in this order; there are {', '.join(AUGMENTATIONS)}")  # fmt: skip
    add("--play-to", type=Path, required=True, metavar="DIR", help="folder for the augmented recordings; "
        "existing files are not replaced")  # fmt: skip
    add("--epochs", type=int, default=1, metavar="N", help="number of epochs (default: %(default)s)")
    add("--seed", type=int, default=0, help="random seed (default: %(default)s)")


def plan_files(arguments: Namespace) -> dict[Path, Item]:
    """Return what is to be written, and of which item; refuse what is there already."""
    if arguments.epochs < 1 or arguments.seed < 0:
        raise ConfigError(
            f"--epochs is {arguments.epochs} and --seed is {arguments.seed}; "
            "expected at least 1 epoch and a seed of at least 0"
        )
    items = [Item(k, 1.0, epoch, k) for k in range(len(arguments.files)) for epoch in range(arguments.epochs)]
    stems = [file.stem for file in arguments.files]
    files = {arguments.play_to / f"{stems[item.index]}-{item.epoch}-{item.place}.wav": item for item in items}
    if there := [str(path) for path in files if path.exists() or path.is_symlink()]:
        raise ConfigError(f"--play-to: {summary(there, 3)} would be replaced; give another folder")
    return files


def write_sound(path: Path, waveform: Tensor) -> str:
    """Write a waveform as 16 bit; say by how much it had to be made softer to fit, or return ""."""
    over = float(waveform.abs().max()) * 32768 / 32767
    fitting = waveform / over if over > 1 else waveform
    with written(path):
        write_wav(path, (fitting * 32768).round().clamp(-32768, 32767).numpy(), SAMPLE_RATE)
    loss = 20 * torch.tensor(over).log10().item()
    return f"written {loss:.1f} dB softer, as it passes full scale" if over > 1 else ""


def run(arguments: Namespace) -> int:
    """Augment, write and tell."""
    files = plan_files(arguments)
    for file in arguments.files:
        load_audio(file)  # so that nothing is written where one cannot be read
    rows = [Utterance(str(number), file) for number, file in enumerate(arguments.files)]
    chain = augmented(arguments.augment, arguments.seed, rows)
    with written(arguments.play_to):
        arguments.play_to.mkdir(parents=True, exist_ok=True)
    for path, item in files.items():
        waveform = load_audio(arguments.files[item.index])
        said = chain.words(len(waveform), item) or ["as it is"]
        heard = chain(waveform, item)
        if softer := write_sound(path, heard):
            said.append(softer)
        print(printable(f"{path}  {len(heard) / SAMPLE_RATE:.2f} s  {'; '.join(said)}"))
    return 0

"""Train an emotion recogniser, with transcript and speaker heads, on any corpus that a manifest describes.

Fine-tune a wav2vec 2.0 folder as Cai et al. (INTERSPEECH 2021) do, on two GPUs:

    torchrun --standalone --nproc-per-node=2 examples/train_iemocap.py \\
        --train train.csv --valid valid.csv --root IEMOCAP_full_release \\
        --init wav2vec2-base --alpha 0.1 --epochs 100 --out runs/01F

Train a small model from scratch on two CPU processes:

    torchrun --standalone --nproc-per-node=2 examples/train_iemocap.py \\
        --train data/demo/train.csv --valid data/demo/valid.csv --init small --beta 0.1 \\
        --rate 1e-3 --micro-batch 8 --effective-batch 16 --epochs 20 \\
        --allow-overlap speakers --out runs/demo

One fold of the paper's protocol with the paper's settings, from the folder that prepare_iemocap.py wrote:

    torchrun --standalone --nproc-per-node=2 examples/train_iemocap.py \\
        --data data/iemocap --root IEMOCAP_full_release --protocol paper10 --fold 01F \\
        --paper --init wav2vec2-base --out runs/01F

One process: python examples/train_iemocap.py ... . A run that was interrupted continues when the same command is
given again. SIGTERM, SIGUSR1 and Ctrl-C let it finish its update, save, and end with status 75.

A manifest is a CSV with a header (or JSONL): file, and any of emotion, text, speaker, id, start, end, arousal,
dominance, valence. The files are relative to --root, else to the manifest's folder.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

import ser
from ser.data.manifest import DIMENSIONS, check_labels, check_overlap, parse_columns, read_manifest
from ser.data.protocols import PROTOCOLS, check_fold, find_fold, find_manifest, find_protocol, to_table
from ser.data.text import ORTHOGRAPHIES, Vocabulary, clean
from ser.errors import ConfigError
from ser.models.config import PRESETS, Wav2Vec2Config
from ser.models.pretrained import find_folder, read_encoder_config
from ser.recognizer import Recognizer, inherited_labels, is_preset
from ser.train.config import TrainConfig, add_arguments, from_arguments, paper_settings
from ser.train.distributed import World, cpu_threads, joined_world
from ser.train.loop import fit, say
from ser.train.processes import PREEMPTED, one_voice


def parse_arguments() -> argparse.Namespace:
    description, _, usage = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description,
        epilog=usage,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--train", type=Path, help="manifest to learn from")
    parser.add_argument("--valid", type=Path, help="manifest to choose the best model by")
    parser.add_argument(
        "--data", type=Path, help="manifest that --protocol divides, or a folder with iemocap4.csv"
    )
    parser.add_argument("--protocol", help=f"{', '.join(PROTOCOLS)}, column, or kfold:COLUMN:COUNT")
    parser.add_argument("--fold", help="name of the fold, such as 01F")
    parser.add_argument(
        "--shares", nargs="*", default=[], help="what the parts of column and kfold share knowingly"
    )
    parser.add_argument("--protocol-seed", type=int, default=0, help="of protocols that draw (default: 0)")
    paper = parser.add_mutually_exclusive_group()
    paper.add_argument(
        "--paper", action="store_true", help="the settings of Cai et al. (2021) as their text has them"
    )
    paper.add_argument("--paper-script", action="store_true", help="as their training script acts")
    parser.add_argument("--root", type=Path, help="folder that the manifests' files are relative to")
    parser.add_argument("--columns", nargs="*", default=[], metavar="OURS=THEIRS", help="such as text=transcript")
    parser.add_argument(
        "--init",
        default="base",
        help=f"model folder, its OWNER/NAME on the Hugging Face hub, or {', '.join(PRESETS)} (random weights) "
        "(default: base)",
    )
    parser.add_argument("--revision", help="branch, tag or commit of --init on the hub")
    parser.add_argument("--out", type=Path, required=True, help="the run's folder; resumed if it has a checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="start anew where --out holds a run")
    symbols = parser.add_mutually_exclusive_group()
    symbols.add_argument("--vocab", type=Path, help="vocab.json (default: that of --init, else librispeech's)")
    symbols.add_argument("--build-vocab", action="store_true", help="make the vocabulary of the training text")
    parser.add_argument("--orthography", choices=sorted(ORTHOGRAPHIES), default="librispeech",
                        help="of the text (default: librispeech)")  # fmt: skip
    parser.add_argument("--tags", choices=["remove", "keep-letters"], default="remove",
                        help="[..], {..}, <..> in text: letters stay in the paper (default: remove)")  # fmt: skip
    parser.add_argument("--allow-overlap", choices=["none", "speakers", "utterances"], default="none",
                        help="what --valid may share; a speaker head needs speakers (default: none)")  # fmt: skip
    parser.add_argument("--threads", type=int, help="CPU threads per process (default: cores / processes; of one "
                        "process OMP_NUM_THREADS)")  # fmt: skip
    parser.add_argument("--verbose", action="store_true", help="show changed transcripts, and reference beside "
                        "hypothesis in evaluation")  # fmt: skip
    add_arguments(parser)
    arguments = parser.parse_args()
    init = (
        arguments.init if is_preset(arguments.init) else find_folder(arguments.init, revision=arguments.revision)
    )
    if arguments.paper or arguments.paper_script:  # they are defaults: what is given beside them counts
        given = argparse.ArgumentParser(argument_default=argparse.SUPPRESS, add_help=False, allow_abbrev=False)
        given.add_argument("--alpha", type=float)
        alpha = getattr(given.parse_known_args()[0], "alpha", None)
        settings = paper_settings(alpha=alpha, large=is_large_960h(init), script=arguments.paper_script)
        parser.set_defaults(tags="keep-letters", **settings)
        arguments = parser.parse_args()
        arguments.alpha = settings["alpha"]
    arguments.init = init
    if bool(arguments.train) == bool(arguments.data):
        raise ConfigError("give either --train (and --valid), or --data with --protocol and --fold")
    return arguments


def is_large_960h(init: str | Path) -> bool:
    """The paper's second model is large and yet group-norm and post-norm."""
    config = Wav2Vec2Config.named(init) if isinstance(init, str) else read_encoder_config(init)[0]
    return config.hidden_size == 1024 and config.feat_extract_norm == "group"


def read_parts(arguments: argparse.Namespace, columns: dict[str, str], world: World) -> tuple[list, list, dict]:
    """Training and validation utterances, and what a result has to say about them."""
    if arguments.train:
        train = read_manifest(arguments.train, root=arguments.root, columns=columns)
        valid = read_manifest(arguments.valid, root=arguments.root, columns=columns) if arguments.valid else []
        check_overlap(train, valid, allow=arguments.allow_overlap)
        return train, valid, {"train": str(arguments.train), "valid": str(arguments.valid)}
    if not arguments.protocol:
        raise ConfigError("--data needs --protocol, which says how it is divided")
    utterances = read_manifest(find_manifest(arguments.data), root=arguments.root, columns=columns)
    protocol = find_protocol(arguments.protocol, shares=arguments.shares)
    fold = find_fold(protocol, utterances, arguments.fold, seed=arguments.protocol_seed)
    audit = check_fold(fold, utterances, protocol)
    say(world, f"{protocol.name}: {protocol.description}\n{to_table([audit])}")
    parts = fold.select(utterances)
    chosen = {"data": str(arguments.data), "protocol": protocol.name, "fold": fold.name}
    return parts["train"], parts.get("valid", []), chosen | {"protocol_seed": arguments.protocol_seed}


def chosen_heads(config: TrainConfig, train: list) -> list[str]:
    """The tasks to train; an error where the data lacks one that was asked for."""
    has = {
        "emotion": any(u.emotion is not None for u in train),
        "ctc": any(u.text is not None for u in train),
        "speaker": any(u.speaker is not None for u in train),
        "dimensions": bool(dimensions_of(train)),
    }
    if config.heads == "auto":
        wanted = ["emotion", "ctc", *(["speaker"] if config.beta > 0 else [])]
        return [name for name in wanted if has[name]]
    heads = config.heads.split(",")
    for name in heads:
        if not has[name]:
            raise ConfigError(f"--heads names {name}, but no training utterance has a label for it; see --columns")
    return heads


def dimensions_of(train: list) -> list[str]:
    """Those of arousal, dominance and valence that a training utterance has a number for."""
    return [name for name in DIMENSIONS if any(getattr(u, name) is not None for u in train)]


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads or cpu_threads())
    config = from_arguments(arguments)
    with joined_world(config.device, timeout=config.timeout) as world:
        if "WORLD_SIZE" not in os.environ and torch.cuda.device_count() > 1:
            count = torch.cuda.device_count()
            say(
                world,
                f"{count} GPUs; to use all: torchrun --standalone --nproc-per-node={count} {shlex.join(sys.argv)}",
            )
        columns = parse_columns(arguments.columns)
        train, valid, chosen = read_parts(arguments, columns, world)
        heads = chosen_heads(config, train)
        texts = [clean(u.text or "", orthography=arguments.orthography, tags=arguments.tags) for u in train]
        if arguments.verbose:
            for utterance, text in zip(train, texts, strict=True):
                if text != (utterance.text or ""):
                    say(world, f"{utterance.id}: {utterance.text!r} is trained as {text!r}")

        def label_set(head: str, kind: str, labels: Iterable[str]) -> list[str]:
            return inherited_labels(arguments.init, kind, labels) if head in heads else []

        recognizer, report = Recognizer.create(
            arguments.init,
            emotions=label_set("emotion", "emotions", (u.emotion for u in train if u.emotion)),
            speakers=label_set("speaker", "speakers", (u.speaker for u in train if u.speaker)),
            dimensions=label_set("dimensions", "dimensions", dimensions_of(train)),
            vocabulary=chosen_vocabulary(arguments, texts) if "ctc" in heads else None,
            orthography=arguments.orthography,
            tags=arguments.tags,
            pooling=None if config.pooling == "auto" else config.pooling,
            layers=None if config.layers == "auto" else config.layers,
            seed=config.seed,
        )
        say(world, str(report))
        if recognizer.emotions:
            check_labels(valid, emotions=recognizer.emotions)
        settings = {
            "init": str(arguments.init),
            **chosen,
            "root": str(arguments.root),
            "columns": columns,
            "labels": recognizer.emotions,
            "speakers": recognizer.speakers,
            "dimensions": recognizer.dimensions,
            "symbols": recognizer.vocabulary.tokens if recognizer.vocabulary is not None else [],
            "orthography": arguments.orthography,
            "tags": arguments.tags,
            "versions": {"ser": ser.__version__, "torch": torch.__version__},
            "world_size": world.size,
        }
        result = fit(
            recognizer,
            train,
            valid,
            config,
            arguments.out,
            world=world,
            settings=settings,
            # Not again when torchrun restarts the processes after a fault: then the run continues.
            overwrite=arguments.overwrite and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0",
            verbose=arguments.verbose,
        )
        best = "" if result.progress.best is None else f", {result.metric} {result.progress.best:.4f}"
        if not result.stopped:
            step = result.progress.best_step or result.progress.step
            say(world, f"done: {arguments.out / 'best'} (update {step}{best})")
    if result.stopped:
        sys.exit(PREEMPTED)


def chosen_vocabulary(arguments: argparse.Namespace, texts: list[str]) -> Vocabulary:
    """--vocab, --build-vocab, that of --init, or librispeech's 32 symbols."""
    delimiter = ORTHOGRAPHIES[arguments.orthography].word_delimiter
    if arguments.vocab:
        return Vocabulary.read(arguments.vocab, word_delimiter=delimiter)
    if arguments.build_vocab:
        return Vocabulary.build(texts, word_delimiter=delimiter)
    inherited = Path(arguments.init) / "vocab.json"
    if inherited.is_file():
        return Vocabulary.read(inherited, word_delimiter=delimiter)
    return Vocabulary.librispeech()


if __name__ == "__main__":
    with one_voice():
        main()

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
given again. SIGTERM, SIGUSR1, SIGHUP and Ctrl-C let it finish its update, save, and end with status 75.

A manifest is a CSV with a header (or JSONL): file, and any of emotion, text, speaker, id, start, end, arousal,
dominance, valence. The files are relative to --root, else to the manifest's folder.
"""

from __future__ import annotations

import os

LAUNCHER = os.getppid()  # now: the imports take seconds, in which it may end

import argparse
import json
import re
import shlex
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import ser
from ser.data.labels import LABELS, labelled_heads, names_in
from ser.data.manifest import Utterance, check_labels, check_overlap
from ser.data.protocols import overlap, to_table, usual_known_turns
from ser.data.selection import Selection, from_arguments
from ser.data.selection import add_arguments as add_data_arguments
from ser.data.spellings import check_spellings, label_lines
from ser.data.text import ORTHOGRAPHIES, Vocabulary, clean, did_you_mean
from ser.device import cpu_threads
from ser.errors import ConfigError, ModelFolderError, brief_repr, summary
from ser.folder import inherited_labels, inherited_vocabulary, is_preset, labels_of
from ser.models.config import PRESETS, Wav2Vec2Config
from ser.models.pretrained import find_folder, read_encoder_config
from ser.recognizer import Recognizer
from ser.train.checkpoint import CHANGEABLE, SETTINGS, newest_verified, opened_before
from ser.train.config import TrainConfig, add_arguments, paper_settings
from ser.train.config import from_arguments as training_settings
from ser.train.content import weights_sha256
from ser.train.distributed import World, joined_world
from ser.train.loop import FitResult, fit, say
from ser.train.processes import PREEMPTED, launch, one_voice
from ser.train.resources import SMALLER_MODEL, memory_explained


def found_init(arguments: argparse.Namespace) -> str | Path:
    """Find --init, a preset or a folder. Where it is gone, the run's newest checkpoint stands in for it."""
    try:
        if is_preset(arguments.init):
            return arguments.init
        return find_folder(arguments.init, revision=arguments.revision)
    except (ConfigError, ModelFolderError):
        gone = not arguments.overwrite and not Path(arguments.init).exists()
        newest = newest_verified(arguments.out)[0] if gone else None
        if newest is None:
            raise
        return newest


def is_large_960h(init: str | Path) -> bool:
    """The paper's second model is large and yet group-norm and post-norm."""
    config = Wav2Vec2Config.named(init) if isinstance(init, str) else read_encoder_config(init)[0]
    return config.hidden_size == 1024 and config.feat_extract_norm == "group"


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    description, _, usage = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description,
        epilog=usage,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--train", type=Path, help="manifest to learn from")
    parser.add_argument("--valid", type=Path, help="manifest to choose the best model by")
    parser.add_argument("--fold", help="name of the protocol's fold, such as 01F")
    add_data_arguments(parser)
    paper = parser.add_mutually_exclusive_group()
    paper.add_argument(
        "--paper", action="store_true", help="the settings of Cai et al. (2021) as their text has them"
    )
    paper.add_argument("--paper-script", action="store_true", help="as their training script acts")
    parser.add_argument(
        "--init",
        default="base",
        help=f"model folder, its OWNER/NAME on the Hugging Face hub, or {', '.join(PRESETS)} (random weights) "
        "(default: base)",
    )
    parser.add_argument("--revision", help="branch, tag or commit of --init on the hub")
    parser.add_argument("--out", type=Path, required=True, help="the run's folder; resumed if it has a checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="start anew where --out holds a run")
    parser.add_argument("--resume-from", metavar="CHECKPOINT", help="go back to this one of --out, such as "
                        "step-00000120; later ones are set aside (default: the newest that is sound)")  # fmt: skip
    parser.add_argument("--allow-changes", nargs="+", default=[], metavar="NAME", help="settings that may differ "
                        f"from the resumed run's: {', '.join(sorted(CHANGEABLE))}")  # fmt: skip
    symbols = parser.add_mutually_exclusive_group()
    symbols.add_argument("--vocab", type=Path, help="vocab.json (default: that of --init, else librispeech's)")
    symbols.add_argument("--build-vocab", action="store_true", help="make the vocabulary of the training text")
    parser.add_argument("--orthography", choices=sorted(ORTHOGRAPHIES), default="librispeech",
                        help="of the text (default: librispeech)")  # fmt: skip
    parser.add_argument("--tags", choices=["remove", "keep-letters"], default="remove",
                        help="[..], {..}, <..> in text: letters stay in the paper (default: remove)")  # fmt: skip
    parser.add_argument("--allow-overlap", choices=["none", "speakers", "utterances"], default="none",
                        help="what --valid may share; a speaker head needs speakers (default: none)")  # fmt: skip
    parser.add_argument(
        "--data-licence", help="of the corpus, for the model card (default: as preparing it wrote)"
    )
    parser.add_argument(
        "--weights-licence", help="of --init, for the model card (default: as its own card has it)"
    )
    parser.add_argument("--threads", type=int, help="CPU threads per process (default: cores / processes; of one "
                        "process OMP_NUM_THREADS)")  # fmt: skip
    parser.add_argument("--verbose", action="store_true", help="show changed transcripts, and reference beside "
                        "hypothesis in evaluation")  # fmt: skip
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    init = found_init(arguments)
    if arguments.paper or arguments.paper_script:  # they are defaults: what is given beside them counts
        given = argparse.ArgumentParser(argument_default=argparse.SUPPRESS, add_help=False, allow_abbrev=False)
        given.add_argument("--alpha", type=float)
        alpha = getattr(given.parse_known_args(argv)[0], "alpha", None)
        settings = paper_settings(alpha=alpha, large=is_large_960h(init), script=arguments.paper_script)
        parser.set_defaults(tags="keep-letters", **settings)
        arguments = parser.parse_args(argv)
        arguments.alpha = settings["alpha"]
    arguments.init = init
    if arguments.train and (arguments.protocol or arguments.fold or arguments.known_turns):
        raise ConfigError("--protocol, --fold and --known-turns divide --data; --train is not divided")
    if bool(arguments.train) == bool(arguments.data):
        raise ConfigError("give either --train (and --valid), or --data with --protocol and --fold")
    return arguments


def is_checkpoint(init: str | Path, run: Path) -> bool:
    """Tell whether ``init`` stands in for one that is gone."""
    return not is_preset(init) and Path(init).parent == run / "checkpoints"


def origin(arguments: argparse.Namespace) -> dict[str, Any]:
    """Describe --init: its path, a digest of its weights, and its licence, as far as anybody said."""
    init, licence = arguments.init, arguments.weights_licence
    if is_preset(init):
        return {"init": init, "init_content": init, "licence": licence or "none, they were random"}
    if is_checkpoint(init, arguments.out):  # --init is gone, and the run knows what it was
        before = json.loads((init / SETTINGS).read_text(encoding="utf-8"))
        known = {name: before[name] for name in ("init", "init_content") if name in before}
        return known | {"licence": licence or before.get("licences", {}).get("weights")}
    if licence is None and (card := Path(init) / "README.md").is_file():
        named = re.search(r"^license: *(\S+)", card.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
        licence = named and named[1]
    return {"init": str(init), "init_content": weights_sha256(init), "licence": licence}


def review(sets: dict[str, list[Utterance]], selection: Selection, config: TrainConfig, world: World) -> None:
    """Show the classes of each set before anything is trained; refuse two spellings of one."""
    used = config.heads == "auto" or "emotion" in config.heads.split(",")
    sets = {"train": sets["train"]} | sets  # the first one is what the others are compared with
    for line in label_lines(sets, emotions=None if used else ()):
        say(world, line)
    check_spellings(sets, label_map=selection.label_map, columns=["emotion", "speaker"] if used else ["speaker"])


def emotions_of_init(known: list[str], train: list[Utterance]) -> list[str]:
    """What becomes of the emotions that --init recognises, where training has others."""
    heard = {u.emotion for u in train if u.emotion is not None}
    new, unheard = sorted(heard.difference(known)), [name for name in known if name not in heard]
    if new and known:
        near = "".join(did_you_mean(name, known) for name in new[:1])
        shown = summary(map(brief_repr, new), 20)
        return [f"train has emotions that --init lacks, so its emotion head is not kept: {shown}{near}"]
    if unheard:
        shown = summary(map(brief_repr, unheard), 20)
        return [f"warning: train lacks emotions that --init has, and teaches nothing of them: {shown}"]
    return []


def read_parts(arguments: argparse.Namespace, config: TrainConfig, world: World) -> tuple[list, list, dict]:
    """Training and validation utterances, and what settings and model card have to say about them."""
    check_files = config.on_bad_audio == "fail"  # else a file that is not there is skipped like any other

    def tell(line: str) -> None:
        say(world, line)

    if arguments.train:
        chosen = [from_arguments(arguments, path) for path in (arguments.train, arguments.valid) if path]
        parts = [selection.read(check_files=check_files, tell=tell) for selection in chosen]
        train, valid = parts[0], parts[1] if arguments.valid else []
        review(dict(zip(("train", "valid"), parts, strict=False)), chosen[0], config, world)
        check_overlap(train, valid, allow=arguments.allow_overlap)
        names: dict[str, Any] = dict(zip(("train", "valid"), (s.to_dict() for s in chosen), strict=False))
        if valid:
            shared = {kind: s and s.fraction for kind, s in overlap(train, valid).items()}
            names["shared_with_training"] = {"valid": shared}
        return train, valid, names
    selection = from_arguments(arguments)
    protocol = selection.find_protocol()
    utterances = selection.read(check_files=check_files, tell=tell)
    fold, audit = selection.find_fold(utterances)
    strangers = all(audit.fractions(part).get("speakers", 0.0) == 0.0 for part in ("valid", "test"))
    trains_speakers = "speaker" in config.heads or (config.heads == "auto" and config.beta > 0)
    known_turns = usual_known_turns(fold, utterances)
    if trains_speakers and strangers and arguments.known_turns is None and known_turns:
        selection = replace(selection, known_turns=known_turns)
        fold, audit = selection.find_fold(utterances)
        held_out = f"{known_turns} turns of each training speaker are held out to score the speaker head on"
        say(world, f"the protocol tests on strangers: {held_out} (--known-turns)")
    say(world, f"{protocol.name}: {protocol.description}\n{to_table([audit])}")
    parts_of_fold = fold.select(utterances)
    review(parts_of_fold, selection, config, world)
    about: dict[str, Any] = {
        part: replace(selection, part=part).to_dict() for part in ("train", "valid") if part in fold.parts
    }
    about |= {
        "protocol_description": protocol.description,
        "shared_with_training": {part: audit.fractions(part) for part in fold.parts if part != "train"},
        "valid_is_test": audit.fractions("test", of="valid").get("recordings") == 1.0,
    }
    return parts_of_fold["train"], parts_of_fold.get("valid", []), about


def data_licence(arguments: argparse.Namespace) -> str | None:
    """Return the licence of the corpus, as far as anybody said."""
    prepared = Path(arguments.data or arguments.train)
    report = (prepared if prepared.is_dir() else prepared.parent) / "report.json"
    if arguments.data_licence is None and report.is_file():  # what prepare_iemocap.py wrote beside its manifests
        with suppress(OSError, ValueError, AttributeError):
            return json.loads(report.read_text(encoding="utf-8")).get("licence")
    return arguments.data_licence


def chosen_heads(config: TrainConfig, train: list) -> list[str]:
    """The tasks to train; an error where the data lacks one that was asked for."""
    has = labelled_heads(u.labels for u in train)
    if config.heads == "auto":
        wanted = ["emotion", "ctc", *(["speaker"] if config.beta > 0 else [])]
        return [name for name in wanted if name in has]
    heads = config.heads.split(",")
    for name in heads:
        if name not in has:
            raise ConfigError(f"--heads names {name}, but no training utterance has a label for it; see --columns")
    return heads


def closing_line(result: FitResult, out: Path, *, chosen_on_test: bool) -> str:
    """Which weights to use, and how good they were on validation data."""
    step, best = result.progress.step, result.progress.best
    if best is None:
        return f"done: {out / 'best'} (update {step})"
    chosen = f"update {result.progress.best_step}, {result.metric} {best:.4f}"
    if not chosen_on_test:
        return f"done: {out / 'best'} ({chosen})"
    last = (
        "" if result.evaluation is None else f", {result.metric} {result.evaluation.metrics()[result.metric]:.4f}"
    )
    return (
        f"done: {out / 'last'} (update {step}{last}); {out / 'best'} was chosen on the test part, so its figure "
        f"is optimistic and no result ({chosen})"
    )


def chosen_vocabulary(arguments: argparse.Namespace, texts: list[str]) -> Vocabulary:
    """--vocab, --build-vocab, that of --init, or librispeech's 32 symbols."""
    delimiter = ORTHOGRAPHIES[arguments.orthography].word_delimiter
    if arguments.vocab:
        return Vocabulary.read(arguments.vocab, word_delimiter=delimiter)
    if arguments.build_vocab:
        return Vocabulary.build(texts, word_delimiter=delimiter)
    return inherited_vocabulary(arguments.init, arguments.orthography) or Vocabulary.librispeech()


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    torch.set_num_threads(arguments.threads or cpu_threads())
    config = training_settings(arguments)
    with joined_world(config.device, timeout=config.timeout, launcher=LAUNCHER) as world:
        if "WORLD_SIZE" not in os.environ and torch.cuda.device_count() > 1:
            count = torch.cuda.device_count()
            say(
                world,
                f"{count} GPUs; to use all: torchrun --standalone --nproc-per-node={count} {shlex.join(sys.argv)}",
            )
        if is_checkpoint(arguments.init, arguments.out):
            say(world, f"--init is gone: labels, vocabulary and configuration are those of {arguments.init}")
        train, valid, about = read_parts(arguments, config, world)
        heads = chosen_heads(config, train)
        for line in emotions_of_init(labels_of(arguments.init, "emotion"), train) if "emotion" in heads else ():
            say(world, line)
        texts = [clean(u.text or "", orthography=arguments.orthography, tags=arguments.tags) for u in train]
        if arguments.verbose:
            for utterance, text in zip(train, texts, strict=True):
                if text != (utterance.text or ""):
                    say(world, f"{utterance.id}: {utterance.text!r} is trained as {text!r}")

        usual = [head for head in heads if LABELS[head].kind != "text"]
        names = {
            head: inherited_labels(arguments.init, head, names_in(head, (u.labels for u in train)))
            for head in usual
        }
        with memory_explained(SMALLER_MODEL, doing="when the model was loaded"):
            recognizer, report = Recognizer.create(
                arguments.init,
                names=names,
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
        begun = origin(arguments) if world.is_main else {}  # which reads all weights; the main rank records it
        settings = {
            **about,
            "licences": {"data": data_licence(arguments), "weights": begun.pop("licence", None)},
            **begun,
            "labels": recognizer.emotions,
            "speakers": recognizer.speakers,
            "dimensions": recognizer.dimensions,
            "symbols": recognizer.vocabulary.tokens if recognizer.vocabulary is not None else [],
            "orthography": arguments.orthography,
            "tags": arguments.tags,
            "versions": {"ser": ser.__version__, "torch": torch.__version__},
            "world_size": world.size,
            "launch": launch(),
        }
        again = opened_before(arguments.out)
        result = fit(
            recognizer,
            train,
            valid,
            config,
            arguments.out,
            world=world,
            settings=settings,
            # Not again when torchrun restarts the processes after a fault: then the run continues.
            overwrite=arguments.overwrite and not again,
            resume_from=None if again else arguments.resume_from,
            allow_changes=arguments.allow_changes,
            verbose=arguments.verbose,
        )
        if not result.stopped:
            say(world, closing_line(result, arguments.out, chosen_on_test=about.get("valid_is_test", False)))
    if result.stopped:
        sys.exit(PREEMPTED)


if __name__ == "__main__":
    with one_voice():
        main()

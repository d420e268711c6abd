"""Train an emotion recogniser, with transcript and speaker heads, on any corpus that a manifest describes.

Fine-tune a wav2vec 2.0 folder as Cai et al. (INTERSPEECH 2021) do, on two GPUs:

    torchrun --standalone --nproc-per-node=2 -m ser train \\
        --train train.csv --valid valid.csv --root IEMOCAP_full_release \\
        --init wav2vec2-base --alpha 0.1 --epochs 100 --out runs/01F

Train a small model from scratch on two CPU processes:

    torchrun --standalone --nproc-per-node=2 -m ser train \\
        --train data/demo/train.csv --valid data/demo/valid.csv --init small --beta 0.1 \\
        --rate 1e-3 --effective-batch 16 --epochs 20 --allow-overlap speakers --out runs/demo

One fold of the paper's protocol with the paper's settings, from the folder that `ser prepare` wrote:

    torchrun --standalone --nproc-per-node=2 -m ser train \\
        --data data/iemocap --root IEMOCAP_full_release --protocol paper10 --fold 01F \\
        --paper --init wav2vec2-base --out runs/01F

Several corpora at once, each with its own folder of recordings (or one JSON file that lists manifests, with the
path, root, columns, map and name of each; see docs/training.md):

    ser train --train emodb/train.csv tess/train.csv --valid emodb/valid.csv tess/valid.csv \\
        --root EMODB TESS --init small --out runs/two

With one process: ser train ... . A run that was interrupted continues when the same command is given again.
SIGTERM, SIGUSR1, SIGHUP and Ctrl-C let it finish its update, save, and end with status 75.

A manifest is a CSV with a header (or JSONL): file, and any of emotion, text, speaker, id, start, end, arousal,
dominance, valence. The files are relative to --root, else to the manifest's folder.
"""

import json
import os
import re
import shlex
import sys
from argparse import ArgumentParser, Namespace
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import ser
from ser.cli import LAUNCHER
from ser.data.labels import LABELS, labelled_heads, names_in
from ser.data.manifest import Utterance, check_labels, check_overlap
from ser.data.protocols import Audit, Fold, overlap, to_table, usual_known_turns
from ser.data.selection import (
    Selection,
    Sets,
    add_data_arguments,
    named_for_training,
    selected_data,
    selected_sets,
)
from ser.data.several import unfamiliar_corpora
from ser.data.text import ORTHOGRAPHIES, Vocabulary, clean, did_you_mean
from ser.device import cpu_threads
from ser.errors import ConfigError, ModelFolderError, brief_repr, summary
from ser.folder import inherited_labels, inherited_vocabulary, is_preset, labels_of
from ser.models.config import PRESETS, Wav2Vec2Config
from ser.models.pretrained import LoadReport, find_folder, read_encoder_config
from ser.recognizer import Recognizer
from ser.train.checkpoint import SETTINGS, newest_verified
from ser.train.config import (
    TrainConfig,
    add_training_arguments,
    learns_emotions,
    paper_settings,
    training_config,
)
from ser.train.content import weights_sha256
from ser.train.distributed import World, joined_world
from ser.train.log import say
from ser.train.loop import FitResult, fit
from ser.train.processes import PREEMPTED, launch, one_voice
from ser.train.resources import SMALLER_MODEL, memory_explained
from ser.train.runs import CHANGEABLE, opened_before

errors_told = one_voice
Parts = tuple[list[Utterance], list[Utterance], dict[str, Any]]  # train, valid, and their entries in the record


# -------------------------------------------------------------------------------------------------- arguments


def add_arguments(parser: ArgumentParser) -> None:
    """Add the flags of the command, the common ones first."""
    parser.allow_abbrev = False
    parser.usage = (
        "%(prog)s (--train MANIFEST ... | --data MANIFEST --protocol NAME) --init MODEL --out FOLDER ..."
    )
    group = parser.add_argument_group("data and model")
    add = group.add_argument
    add("--train", type=Path, nargs="+", metavar="MANIFEST", help="manifest to learn from; several, or one JSON "
        "file that lists them, are several corpora")  # fmt: skip
    add("--valid", type=Path, nargs="+", metavar="MANIFEST", help="manifests to choose the best model by")
    add("--init", default="base",
        help=f"model folder, its OWNER/NAME on the Hugging Face hub, or {', '.join(PRESETS)} (random weights) "
        "(default: base)")  # fmt: skip
    add("--out", type=Path, required=True, help="the run's folder; resumed if it has a checkpoint")
    add = group.add_mutually_exclusive_group().add_argument
    add("--paper", action="store_true", help="use the settings in the text of Cai et al. (2021)")
    add("--paper-script", action="store_true", help="use the settings of their training script")
    add_training_arguments(parser)
    add_data_arguments(parser)
    add = parser.add_argument_group("folds").add_argument
    add("--fold", help="name of the protocol's fold, such as 01F")
    add("--allow-overlap", choices=["none", "speakers", "utterances"], default="none",
        help="what --valid may share; a speaker head needs speakers (default: none)")  # fmt: skip
    group = parser.add_argument_group("text")
    add = group.add_mutually_exclusive_group().add_argument
    add("--vocab", type=Path, help="vocab.json (default: that of --init, else librispeech's)")
    add("--build-vocab", action="store_true", help="make the vocabulary from the training text")
    add = group.add_argument
    add("--orthography", choices=sorted(ORTHOGRAPHIES), default="librispeech",
        help="spelling of the text (default: librispeech)")  # fmt: skip
    add("--tags", choices=["remove", "keep-letters"], default="remove",
        help="[..], {..}, <..> in text: letters stay in the paper (default: remove)")  # fmt: skip
    add = parser.add_argument_group("continuing a run").add_argument
    add("--overwrite", action="store_true", help="remove a run in --out and start again")
    add("--resume-from", metavar="CHECKPOINT", help="go back to this checkpoint of --out, such as "
        "step-00000120; later ones are set aside (default: the newest sound one)")  # fmt: skip
    add("--allow-changes", nargs="+", default=[], metavar="NAME", help="settings that may differ "
        f"from the resumed run's: {', '.join(sorted(CHANGEABLE))}")  # fmt: skip
    add = parser.add_argument_group("other").add_argument
    add("--revision", help="branch, tag or commit of --init on the hub")
    add("--data-licence", help="licence of the corpus, for the model card (default: that from ser prepare)")
    add("--weights-licence", help="licence of --init, for the model card (default: that in its own card)")
    add("--threads", type=int, help="CPU threads per process (default: cores / processes; for one process "
        "OMP_NUM_THREADS)")  # fmt: skip
    add("--verbose", action="store_true", help="show changed transcripts, and reference beside hypothesis in "
        "evaluation")  # fmt: skip


def found_init(arguments: Namespace) -> str | Path:
    """Find --init, a preset or a folder; if it does not exist any more, use the run's newest checkpoint."""
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
    """Tell whether --init is the paper's second model, which is large with group norm and post-norm."""
    config = Wav2Vec2Config.named(init) if isinstance(init, str) else read_encoder_config(init)[0]
    return config.hidden_size == 1024 and config.feat_extract_norm == "group"


def parse(parser: ArgumentParser, argv: list[str]) -> Namespace:
    """Read the arguments. --paper and --paper-script change only defaults, so other flags override them."""
    arguments = parser.parse_args(argv)
    init = found_init(arguments)
    if arguments.paper or arguments.paper_script:
        given = ArgumentParser(add_help=False, allow_abbrev=False)
        given.add_argument("--alpha", type=float)
        alpha = given.parse_known_args(argv)[0].alpha
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


# ------------------------------------------------------------------------------------------------------- data


def is_checkpoint(init: str | Path, folder: Path) -> bool:
    """Tell whether ``init`` is a checkpoint of the run, which replaces a missing --init."""
    return not is_preset(init) and Path(init).parent == folder / "checkpoints"


def origin(arguments: Namespace) -> dict[str, Any]:
    """Describe --init: its path, a digest of its weights, and its licence if that is known."""
    init, licence = arguments.init, arguments.weights_licence
    if is_preset(init):
        return {"init": init, "init_content": init, "licence": licence or "none, they were random"}
    if is_checkpoint(init, arguments.out):  # --init does not exist any more, but the run has recorded it
        before = json.loads((init / SETTINGS).read_text(encoding="utf-8"))
        known = {name: before[name] for name in ("init", "init_content") if name in before}
        return known | {"licence": licence or before.get("licences", {}).get("weights")}
    if licence is None and (card := Path(init) / "README.md").is_file():
        named = re.search(r"^license: *(\S+)", card.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
        licence = named and named[1]
    return {"init": str(init), "init_content": weights_sha256(init), "licence": licence}


def read(selection: Selection, config: TrainConfig, world: World) -> list[Utterance]:
    """Read a manifest. If bad audio is skipped, a missing file is skipped too."""
    return selection.read(check_files=config.on_bad_audio == "fail", tell=partial(say, world))


def review(sets: Sets, selection: Selection, config: TrainConfig, world: World) -> None:
    """Print the classes of each set before training; refuse two spellings of one class."""
    used = learns_emotions(config.heads)
    selection.review({"train": sets["train"]} | sets, partial(say, world), emotions=None if used else [])


def emotions_of_init(known: list[str], train: list[Utterance]) -> list[str]:
    """Return notes on the emotion head of --init if training has other emotions."""
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


def name_as_usual(
    chosen: dict[str, Selection], sets: Sets, arguments: Namespace, config: TrainConfig, world: World
) -> tuple[dict[str, Selection], Sets]:
    """Rename emotions to their usual names if there are several corpora; the classes of --init keep theirs."""
    if not learns_emotions(config.heads):
        return chosen, sets
    known = labels_of(arguments.init, "emotion")
    return named_for_training(chosen, sets, partial(say, world), known=known)


def read_manifests(arguments: Namespace, config: TrainConfig, world: World) -> Parts:
    """Read --train and --valid."""
    files = {"train": arguments.train} | ({"valid": arguments.valid} if arguments.valid else {})
    chosen = selected_sets(arguments, files)
    parts = {part: read(selection, config, world) for part, selection in chosen.items()}
    chosen, parts = name_as_usual(chosen, parts, arguments, config, world)
    review(parts, chosen["train"], config, world)
    train, valid = parts["train"], parts.get("valid", [])
    for line in unfamiliar_corpora("valid", valid, train) if chosen["train"].sources else ():
        say(world, line)
    check_overlap(train, valid, allow=arguments.allow_overlap)
    about: dict[str, Any] = {part: selection.to_dict() for part, selection in chosen.items()}
    if valid:
        shared = {kind: s and s.fraction for kind, s in overlap(train, valid).items()}
        about["shared_with_training"] = {"valid": shared}
    return train, valid, about


def turns_to_hold_out(fold: Fold, audit: Audit, utterances: list[Utterance], config: TrainConfig) -> int:
    """Return the number of known turns: 0 unless a speaker head is trained and test speakers are unknown."""
    strangers = all(audit.fractions(part).get("speakers", 0.0) == 0.0 for part in ("valid", "test"))
    trained = "speaker" in config.heads or (config.heads == "auto" and config.beta > 0)
    return usual_known_turns(fold, utterances) if strangers and trained else 0


def read_fold(arguments: Namespace, config: TrainConfig, world: World) -> Parts:
    """Read --data and divide it."""
    selection = selected_data(arguments)
    protocol = selection.find_protocol()
    utterances = read(selection, config, world)
    named, sets = name_as_usual({"data": selection}, {"data": utterances}, arguments, config, world)
    selection, utterances = named["data"], sets["data"]
    fold, audit = selection.find_fold(utterances)
    if arguments.known_turns is None and (turns := turns_to_hold_out(fold, audit, utterances, config)):
        selection = replace(selection, known_turns=turns)
        fold, audit = selection.find_fold(utterances)
        held_out = f"{turns} turns of each training speaker are held out to score the speaker head on"
        say(world, f"the protocol tests on strangers: {held_out} (--known-turns)")
    say(world, f"{protocol.name}: {protocol.description}\n{to_table([audit])}")
    parts = fold.select(utterances)
    review(parts, selection, config, world)
    about: dict[str, Any] = {
        part: replace(selection, part=part).to_dict() for part in ("train", "valid") if part in fold.parts
    }
    about |= {
        "protocol_description": protocol.description,
        "shared_with_training": {part: audit.fractions(part) for part in fold.parts if part != "train"},
        "valid_is_test": audit.fractions("test", of="valid").get("recordings") == 1.0,
    }
    return parts["train"], parts.get("valid", []), about


def prepared_licence(prepared: Path) -> str | None:
    """Return the licence that `ser prepare` wrote beside its manifests, if it did."""
    report = (prepared if prepared.is_dir() else prepared.parent) / "report.json"
    if report.is_file():
        with suppress(OSError, ValueError, AttributeError):
            return json.loads(report.read_text(encoding="utf-8")).get("licence")
    return None


def data_licence(arguments: Namespace, trained: Selection) -> str | None:
    """Return the licence of the corpus, or of each of several, if it is known."""
    if arguments.data_licence is not None:
        return arguments.data_licence
    if not trained.sources:
        return prepared_licence(Path(trained.data))
    licences = {source.name: prepared_licence(Path(source.path)) for source in trained.sources}
    if not any(licences.values()):
        return None
    return "; ".join(f"{name}: {licence or 'not stated'}" for name, licence in licences.items())


def chosen_heads(config: TrainConfig, train: list) -> list[str]:
    """Return the heads to train; ConfigError if the data lacks the labels of a head that was asked for."""
    has = labelled_heads(u.labels for u in train)
    if config.heads == "auto":
        wanted = ["emotion", "ctc", *(["speaker"] if config.beta > 0 else [])]
        return [name for name in wanted if name in has]
    heads = config.heads.split(",")
    if lacks := [name for name in heads if name not in has]:
        why = "no training utterance has a label for it; see --columns"
        why = why if lacks[0] in LABELS else "it has no row in ser.data.labels.LABELS"
        raise ConfigError(f"--heads names {lacks[0]}, but {why}")
    return heads


def closing_line(result: FitResult, out: Path, *, chosen_on_test: bool) -> str:
    """Return a line that says which weights to use, and their figure on validation data."""
    step, best = result.progress.step, result.progress.best
    if best is None:
        return f"done: {out / 'best'} (update {step})"
    chosen = f"update {result.progress.best_step}, {result.metric} {best:.4f}"
    if not chosen_on_test:
        return f"done: {out / 'best'} ({chosen})"
    metrics = {} if result.evaluation is None else result.evaluation.metrics()
    last = f", {result.metric} {metrics[result.metric]:.4f}" if metrics else ""
    return (
        f"done: {out / 'last'} (update {step}{last}); {out / 'best'} was chosen on the test part, so its figure "
        f"is optimistic and no result ({chosen})"
    )


def vocabulary_to_learn(arguments: Namespace, texts: list[str]) -> Vocabulary:
    """Return the symbols of --vocab, of --build-vocab or of --init, else librispeech's 32."""
    delimiter = ORTHOGRAPHIES[arguments.orthography].word_delimiter
    if arguments.vocab:
        return Vocabulary.read(arguments.vocab, word_delimiter=delimiter)
    if arguments.build_vocab:
        return Vocabulary.build(texts, word_delimiter=delimiter)
    return inherited_vocabulary(arguments.init, arguments.orthography) or Vocabulary.librispeech()


# ------------------------------------------------------------------------------------------------------- work


def texts_of(train: list[Utterance], arguments: Namespace, world: World) -> list[str]:
    """Return the training texts as the CTC head learns them; --verbose prints the changes."""
    texts = [clean(u.text or "", orthography=arguments.orthography, tags=arguments.tags) for u in train]
    if arguments.verbose:
        for utterance, text in zip(train, texts, strict=True):
            if text != (utterance.text or ""):
                say(world, f"{utterance.id}: {utterance.text!r} is trained as {text!r}")
    return texts


def make_recognizer(
    arguments: Namespace, config: TrainConfig, train: list[Utterance], texts: list[str], heads: list[str]
) -> tuple[Recognizer, LoadReport]:
    """Make the model from --init, with the labels of the training data."""
    learnt = {head: names_in(head, (u.labels for u in train)) for head in heads if LABELS[head].kind != "text"}
    names = {head: inherited_labels(arguments.init, head, own) for head, own in learnt.items()}
    with memory_explained(SMALLER_MODEL, doing="when the model was loaded"):
        return Recognizer.create(
            arguments.init,
            names=names,
            vocabulary=vocabulary_to_learn(arguments, texts) if "ctc" in heads else None,
            orthography=arguments.orthography,
            tags=arguments.tags,
            pooling=None if config.pooling == "auto" else config.pooling,
            layers=None if config.layers == "auto" else config.layers,
            seed=config.seed,
        )


def settings_of_run(arguments: Namespace, recognizer: Recognizer, world: World, about: dict) -> dict[str, Any]:
    """Return what the run's folder and the model card record beside the `TrainConfig`."""
    begun = origin(arguments) if world.is_main else {}  # only the main rank reads all weights, and records them
    return {
        **about,
        "licences": {
            "data": data_licence(arguments, Selection.from_dict(about["train"])),
            "weights": begun.pop("licence", None),
        },
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


def say_how_it_starts(arguments: Namespace, world: World) -> None:
    """Print that further GPUs are idle, and that a checkpoint replaces a missing --init."""
    count = torch.cuda.device_count()
    if "WORLD_SIZE" not in os.environ and count > 1:
        is_script = sys.argv[0].endswith(".py") and Path(sys.argv[0]).name != "__main__.py"
        words = sys.argv if is_script else ["-m", "ser", *sys.argv[1:]]
        torchrun = f"torchrun --standalone --nproc-per-node={count} {shlex.join(words)}"
        say(world, f"{count} GPUs; to use all: {torchrun}")
    if is_checkpoint(arguments.init, arguments.out):
        say(world, f"--init is gone: labels, vocabulary and configuration are those of {arguments.init}")


def train_in(world: World, arguments: Namespace, config: TrainConfig) -> FitResult:
    """Read the data, make the model and train it."""
    say_how_it_starts(arguments, world)
    train, valid, about = (read_manifests if arguments.train else read_fold)(arguments, config, world)
    heads = chosen_heads(config, train)
    for line in emotions_of_init(labels_of(arguments.init, "emotion"), train) if "emotion" in heads else ():
        say(world, line)
    texts = texts_of(train, arguments, world)
    recognizer, report = make_recognizer(arguments, config, train, texts, heads)
    say(world, str(report))
    if recognizer.emotions:
        check_labels(valid, emotions=recognizer.emotions)
    again = opened_before(arguments.out)
    result = fit(
        recognizer,
        train,
        valid,
        config,
        arguments.out,
        world=world,
        settings=settings_of_run(arguments, recognizer, world, about),
        # These act only once: when torchrun restarts the processes after a fault, the run continues.
        overwrite=arguments.overwrite and not again,
        resume_from=None if again else arguments.resume_from,
        allow_changes=arguments.allow_changes,
        verbose=arguments.verbose,
    )
    if not result.stopped:
        say(world, closing_line(result, arguments.out, chosen_on_test=about.get("valid_is_test", False)))
    return result


def run(arguments: Namespace) -> int:
    """Train, in as many processes as torchrun started; the exit status is 75 if the run was asked to stop."""
    torch.set_num_threads(arguments.threads or cpu_threads())
    config = training_config(arguments)
    with joined_world(config.device, timeout=config.timeout, launcher=LAUNCHER) as world:
        result = train_in(world, arguments, config)
    return PREEMPTED if result.stopped else 0

"""Convert checkpoints of other libraries to model folders that `ser` and `transformers` load, and verify them.

There are four kinds, which are recognised by their content:

    hugging-face  a folder with config.json and model.safetensors or pytorch_model.bin; or only a state dict, with
                  a separate configuration
    speechbrain   such a state dict with a prefix: its wrapper keeps the encoder as ``model``
    fairseq       ``model`` and ``args`` or ``cfg`` in a file: wav2vec 2.0 and HuBERT, pre-trained or fine-tuned
    torchaudio    the state dict of `torchaudio.models.Wav2Vec2Model`, which is also its HuBERT and WavLM

This file has, in this order, reading a source, writing, verification, and all together. The names that other
libraries use are in `ser.convert.foreign`; only `ser.convert.pickles` opens pickles.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor

from ser import folder as folders
from ser.convert import foreign
from ser.convert.pickles import Dictionary, copied_tensors, read_pickle
from ser.data.manifest import PAPER_EMOTIONS
from ser.data.text import Vocabulary
from ser.errors import ConfigError, ModelFolderError, Tell, shorten, summary
from ser.files import digest, read_tensors, write_folder_atomically, write_json, write_tensors
from ser.models import pretrained
from ser.models.config import ARCHITECTURES, Wav2Vec2Config
from ser.models.multitask import HeadsConfig, MultiTaskModel
from ser.models.wav2vec2 import Wav2Vec2
from ser.recognizer import Recognizer

# The computation of another library with a source's tensors: (source, our configuration, waveform (1, S)) -> its
# name and version, and the outputs of its last layers, (1, T, D) each. ImportError if it is not installed.
Reference = Callable[["Source", Wav2Vec2Config, Tensor], tuple[str, list[Tensor]]]

TOLERANCE = 1e-5  # for each layer: norm of the difference, relative to the reference's norm
SAMPLES = 16_000  # length of the waveform for the comparison: one second
MAX_SAMPLES = 160_000  # a model whose first frame needs more samples is refused


# ---------------------------------------------------------------------------------------------- a source


@dataclass
class Source:
    """Hold a checkpoint of any kind, as it was read."""

    path: Path
    kind: str
    files: list[Path]
    count: int  # number of all tensors in the files
    original: dict[str, Tensor]  # its own keys, without the prefix of the encoder -> tensors
    tensors: dict[str, Tensor]  # our names -> tensors
    keys: dict[str, str] = field(default_factory=dict)  # our name -> Hugging Face's key, if there is one
    unused: list[str] = field(default_factory=list)
    values: dict = field(default_factory=dict)  # the entries of config.json
    symbols: list[str] | None = None  # the symbols of the CTC head, in the order of its rows
    do_normalize: bool = True
    assumed: dict[str, Any] = field(default_factory=dict)  # settings that it lacks and no comparison can prove
    notes: list[str] = field(default_factory=list)  # assumptions on preprocessing and text, in words

    @property
    def paper(self) -> bool:
        """Tell whether this is a folder of the paper's code: an emotion head whose classes have no names."""
        return self.keys.get("cls_head.weight") == "cls_head.weight" and "ser" not in self.values

    def rows(self, head: str) -> int:
        """Return the number of outputs of a head, 0 without it."""
        weight = self.tensors.get(f"{head}.weight")
        return 0 if weight is None else weight.shape[0]


def by_our_names(path: Path, state: Mapping[str, Tensor], keys: Mapping[str, str]) -> dict[str, Tensor]:
    """Return the tensors of ``state`` by our names, which ``keys`` maps to its keys.

    Raises:
        ModelFolderError: two keys of ``state`` mean the same tensor.
    """
    if len(keys) < len(state):
        left = sorted(set(state) - set(keys.values()))
        raise ModelFolderError(f"{path}: tensors that mean the same stand there twice, such as {summary(left)}")
    return {name: state[key] for name, key in keys.items()}


def pickled_files(folder: Path) -> list[Path]:
    """Return the pickles of a folder that has no safetensors; an empty list if it has."""
    usual = ("pytorch_model.bin", "pytorch_model.bin.index.json")
    pickled = [name for name in usual if pretrained.stands_in(folder, name)]
    if not pickled or any(pretrained.stands_in(folder, f"model.safetensors{end}") for end in ("", ".index.json")):
        return []
    names = {pickled[0]}
    if pickled[0].endswith(".json"):
        weight_map = pretrained.read_json(folder, pickled[0]).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise ModelFolderError(f"{folder / pickled[0]}: has no weight_map of tensor names to file names")
        names = set(weight_map.values())
    return [pretrained.resolve_inside(folder, name) for name in sorted(names)]


def read_folder_tensors(folder: Path) -> tuple[list[Path], dict[str, Tensor]]:
    """Return the files of a folder that hold tensors, and the tensors by their keys."""
    state: dict[str, Tensor] = {}
    if files := pickled_files(folder):
        for file in files:
            part = copied_tensors(file, read_pickle(file))
            if state.keys() & part.keys():
                raise ModelFolderError(f"{file}: tensors of another shard: {summary(state.keys() & part.keys())}")
            state |= part
        return files, state
    stored = pretrained.TensorFiles(folder)
    for path, key in stored.names.values():
        with pretrained.opened(path) as file:
            state[key] = file.get_tensor(key).clone()
    return sorted({path for path, _ in stored.names.values()}), state


def read_hugging_face_folder(folder: Path) -> Source:
    """Read a folder in the layout of `transformers`: safetensors or pickles, one file or shards."""
    pretrained.check_folder(folder)
    values = pretrained.read_json(folder, "config.json")
    files, state = read_folder_tensors(folder)
    pretrained.refuse_adapters(folder, state)
    keys = {pretrained.canonical_name(key): key for key in state}
    tensors = by_our_names(folder, state, keys)
    source = Source(folder, "hugging-face", files, len(state), tensors, tensors, keys, values=values)
    source.do_normalize = folders.read_do_normalize(folder, source.notes)
    return source


def fairseq_symbols(path: Path, checkpoint: Mapping) -> list[str] | None:
    """Return the dictionary of a fine-tuned checkpoint, if it was saved with it.

    The CTC blank is fairseq's ``<s>``, row 0. Here and in `transformers` the blank is called ``<pad>``. So the two
    symbols exchange their names, and rows do not move.
    """
    dictionary = foreign.settings_of(checkpoint.get("task_state")).get("target_dictionary")
    if type(dictionary) is not Dictionary:
        return None
    symbols: Any = vars(dictionary).get("symbols")
    listed = isinstance(symbols, list) and all(isinstance(symbol, str) for symbol in symbols)
    folders.expect(listed, f"{path}: its dictionary", symbols, "symbols; pass --vocab", 80)
    if symbols[:2] != ["<s>", "<pad>"]:
        raise ModelFolderError(f"{path}: its dictionary does not begin with <s> and <pad>; pass --vocab")
    return ["<pad>", "<s>", *symbols[2:]]


def state_dict_in(checkpoint: Any) -> Any:
    """Return the state dict in a checkpoint, which is one of its entries or all of it."""
    for name in ("model", "state_dict"):
        if isinstance(checkpoint, Mapping) and isinstance(checkpoint.get(name), Mapping):
            return checkpoint[name]
    return checkpoint


def wrapped_source(path: Path, state: Mapping[str, Tensor], prefix: str) -> Source:
    """Make a source from a state dict with `transformers`' names, perhaps in speechbrain's wrapper."""
    outer = prefix
    for row in ARCHITECTURES.values():
        outer = outer.removesuffix(row.prefix)
    original = {key.removeprefix(outer): state[key] for key in state if key.startswith(outer)}
    unused = [key for key in state if not key.startswith(outer)]
    keys = {pretrained.canonical_name(key): key for key in original}
    tensors = by_our_names(path, original, keys)
    kind = "speechbrain" if outer else "hugging-face"
    return Source(path, kind, [path], len(state), tensors, tensors, keys, unused)


def renamed_source(path: Path, state: Mapping[str, Tensor], kind: str, prefix: str) -> Source:
    """Make a source, with our names, from a state dict with fairseq's or torchaudio's names."""
    # A fine-tuned fairseq model has its CTC head beside the encoder, w2v_encoder.proj and w2v_encoder.w2v_model.
    outer = prefix.removesuffix("w2v_model.")
    original = {key.removeprefix(prefix).removeprefix(outer): t for key, t in state.items()}
    if len(original) < len(state):
        raise ModelFolderError(f"{path}: tensors stand there twice, with and without {prefix!r} before them")
    rename = foreign.renamed_fairseq if kind == "fairseq" else foreign.renamed_torchaudio
    names: dict[str, str] = {}
    unused, strange = [], []
    for key in original:
        ours = rename(key)
        if ours is not None:
            names[pretrained.canonical_name(ours)] = key
        elif key.startswith((*foreign.FAIRSEQ_PRETRAINING, "mask_generator.", "logit_generator.")):
            unused.append(key)
        else:
            strange.append(key)
    if strange:
        what = f"{len(strange)} tensors that {kind}'s encoders have not"
        raise ModelFolderError(f"{path}: {what}: {summary(strange)}")
    tensors = by_our_names(path, {key: original[key] for key in names.values()}, names)
    return Source(path, kind, [path], len(state), original, foreign.with_split_attention(tensors), unused=unused)


def add_settings(source: Source, checkpoint: Any) -> None:
    """Add the configuration to a source of fairseq or torchaudio: stated, derived or assumed settings."""
    said: dict[str, Any] = {}
    normalize = None
    shown, assumed = foreign.derived_values(source.tensors)
    if source.kind == "fairseq":
        said, normalize = foreign.fairseq_values(source.path, checkpoint)
        if "label_embs_concat" in source.original:
            said["model_type"] = "hubert"
        source.symbols = fairseq_symbols(source.path, checkpoint)
    source.values = assumed | shown | said
    source.assumed = {name: value for name, value in assumed.items() if name not in said}
    if normalize is None:  # as in torchaudio's bundles, sound is normalised for feature encoders with layer norms
        normalize = source.assumed["do_normalize"] = source.values.get("feat_extract_norm") == "layer"
    source.do_normalize = normalize


def read_file(path: Path) -> Source:
    """Read a file with a state dict of any kind."""
    checkpoint = read_pickle(path)
    copied = copied_tensors(path, state_dict_in(checkpoint))
    state = {pretrained.without_wrappers(key): tensor for key, tensor in copied.items()}
    by_our_names(path, copied, {pretrained.without_wrappers(key): key for key in copied})
    pretrained.refuse_adapters(path, state)
    kind, prefix = foreign.recognised(path, state)
    if kind == "hugging-face":
        return wrapped_source(path, state, prefix)
    source = renamed_source(path, state, kind, prefix)
    add_settings(source, checkpoint)
    return source


def read_source(path: Path, config: Mapping) -> Source:
    """Read a folder or a file; values of config.json in ``config`` replace the source's own."""
    source = read_hugging_face_folder(path) if path.is_dir() else read_file(path)
    source.values |= config
    source.values.setdefault("model_type", "wav2vec2")
    source.assumed = {name: value for name, value in source.assumed.items() if name not in config}
    return source


# ---------------------------------------------------------------------------------------------- writing

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class TensorsInMemory(pretrained.TensorFiles):
    """Give the tensors of a source to `fill` as if they were in files, with their own types."""

    def __init__(self, source: Source) -> None:
        self.folder = source.path
        self.tensors = source.tensors
        self.names = {name: (source.path, source.keys.get(name, name)) for name in source.tensors}
        self.shapes = {name: tuple(tensor.shape) for name, tensor in source.tensors.items()}

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return the named tensors; all must be floating point, except the counter of a batch norm."""
        found = {name: self.tensors[name] for name in names}
        for name, tensor in found.items():
            if tensor.dtype not in FLOATS and not name.endswith(".num_batches_tracked"):
                raise ModelFolderError(f"{self.folder}: {name} holds {tensor.dtype}; expected floating point")
        return found


class GivenNames(TypedDict, total=False):
    """Hold the names that a caller gives to the outputs of heads; see `convert`."""

    labels: Sequence[str] | None
    speakers: Sequence[str] | None
    vocabulary: Vocabulary | None


def chosen_vocabulary(source: Source) -> Vocabulary:
    """Return the symbols of the source's CTC head, or those of LibriSpeech if no file has any."""
    vocabulary = None
    if source.symbols is not None:
        vocabulary = Vocabulary({symbol: i for i, symbol in enumerate(source.symbols)})
    elif source.path.is_dir():
        rows, values, notes = source.rows("lm_head"), source.values, source.notes
        vocabulary = folders.read_vocabulary(source.path, "librispeech", rows=rows, values=values, notes=notes)
    if vocabulary is None:
        vocabulary = Vocabulary.librispeech()
        source.assumed["vocabulary"] = "".join(vocabulary.tokens)
    return vocabulary


def check_count(source: Source, head: str, names: Sized, flag: str) -> None:
    """Refuse names, given with ``flag``, if their number is not that of a head's outputs."""
    rows = source.rows(head)
    if not rows and len(names):
        raise ModelFolderError(f"{source.path}: has no {head}; {flag} names classes that do not exist")
    if rows != len(names):
        raise ModelFolderError(f"{source.path}: {head}.weight has {rows} rows for {len(names)} names; pass {flag}")


def chosen_labels(source: Source, **given: Unpack[GivenNames]) -> dict[str, Any]:
    """Choose the names of the heads' outputs: those that were given, those of the source, or the paper's."""
    labels, speakers, vocabulary = given.get("labels"), given.get("speakers"), given.get("vocabulary")
    if labels is None:
        labels = source.assumed["emotions"] = [*PAPER_EMOTIONS.values()] if source.rows("cls_head") else []
    elif set(labels) <= PAPER_EMOTIONS.keys():
        labels = [PAPER_EMOTIONS[name] for name in labels]
    if speakers is None:
        speakers = source.assumed["speakers"] = [f"s{i}" for i in range(source.rows("speaker_head"))]
    if vocabulary is None and source.rows("lm_head"):
        vocabulary = chosen_vocabulary(source)
    check_count(source, "cls_head", labels, "--labels")
    check_count(source, "speaker_head", speakers, "--speakers")
    check_count(source, "lm_head", vocabulary or (), "--vocab")
    source.assumed = {name: value for name, value in source.assumed.items() if value != []}
    return {"emotions": labels, "speakers": speakers, "vocabulary": vocabulary}


def encoder_config(source: Source) -> Wav2Vec2Config:
    """Return the encoder's configuration; raise ModelFolderError with what is missing or wrong."""
    for name in ("num_attention_heads", "conv_stride"):
        if name not in source.values and not source.keys:
            raise ModelFolderError(
                f'{source.path}: shapes do not tell {name}; pass --config with a file such as {{"{name}": ...}}'
            )
    if "hidden_size" not in source.values:
        raise ModelFolderError(f"{source.path}: holds no configuration; pass its config.json with --config")
    try:
        return Wav2Vec2Config.from_dict(source.values)
    except (ConfigError, OverflowError) as error:  # OverflowError: a whole number beyond any float
        raise ModelFolderError(f"{source.path}: {shorten(str(error))}") from None


def check_encoder(source: Source) -> None:
    """Refuse tensors that are missing, unexpected, not finite or of a wrong shape, with one list of all."""
    config = encoder_config(source)
    encoder = pretrained.materialise(lambda: Wav2Vec2(config))
    pretrained.fill_encoder(encoder, TensorsInMemory(source), pretrained.LoadReport(source.path))


def built_recognizer(source: Source, labels: Mapping[str, Any]) -> tuple[Recognizer, pretrained.LoadReport]:
    """Make a model of the source with these labels; the tensors keep their types."""
    config, report = encoder_config(source), pretrained.LoadReport(source.path)
    try:
        sizes = HeadsConfig(source.rows("cls_head"), source.rows("lm_head"), source.rows("speaker_head"))
    except ConfigError as error:
        raise ModelFolderError(f"{source.path}: {shorten(str(error))}") from None
    model = pretrained.materialise(lambda: MultiTaskModel(config, sizes))
    files = TensorsInMemory(source)
    with torch.random.fork_rng(devices=[]):  # a mask embedding is drawn if the source has none
        torch.manual_seed(0)
        pretrained.fill_encoder(model.wav2vec2, files, report)
    pretrained.fill(model, files, report, model.names_on_encoder())
    return Recognizer(model.eval(), **labels, do_normalize=source.do_normalize), report


# Files of a Hugging Face folder that are copied, and the entries that name code or templates, which are not.
COMPANIONS = (
    *pretrained.PREPROCESSORS,
    "tokenizer.json",
    "vocab.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
CODE = ("auto_map", "custom_pipelines", "custom_object_save", "chat_template", "trust_remote_code")


def without_code(values: Mapping) -> dict:
    """Return the entries without those that name code, also inside entries such as feature_extractor."""
    return {
        key: {k: v for k, v in value.items() if k not in CODE} if isinstance(value, dict) else value
        for key, value in values.items()
        if key not in CODE
    }


def write_hugging_face(source: Source, folder: Path) -> None:
    """Write the folder's own keys, types and numbers, without code and wrappers' prefixes."""
    write_json(folder / "config.json", without_code(source.values))
    for name in COMPANIONS if source.path.is_dir() else ():
        if pretrained.stands_in(source.path, name):
            write_json(folder / name, without_code(pretrained.read_json(source.path, name)))
    tensors = {pretrained.unwrapped(source.keys[name]): tensor for name, tensor in source.tensors.items()}
    write_tensors(folder / "model.safetensors", tensors)


def name_classes(source: Source, labels: Sequence[str]) -> None:
    """Name the classes of a `transformers` classifier, if it has no names of its own."""
    form = folders.classifier_form(TensorsInMemory(source))
    rows = source.rows("cls_head") if form == "linear" else source.rows("dimension_head.out_proj")
    theirs = folders.class_names(source.path / "config.json", source.values)
    if form is None or theirs not in ([], [f"LABEL_{i}" for i in range(len(theirs))]):
        raise ModelFolderError(
            f"{source.path}: --labels names the classes of a head that has no names; "
            + (f"this one's are {', '.join(theirs)}" if form else "there is none")
        )
    if len(labels) != rows:
        raise ModelFolderError(f"{source.path}: --labels has {len(labels)} names for {rows} classes")
    folders.check_names(source.path, "--labels", list(labels))
    source.values["id2label"] = {str(i): name for i, name in enumerate(labels)}
    source.values["label2id"] = {name: i for i, name in enumerate(labels)}


# ---------------------------------------------------------------------------------------------- verification


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Tell whether type, shape and every bit agree."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(*(x.contiguous().flatten().view(torch.uint8) for x in (a, b)))


def check_tensors(source: Source, folder: Path) -> int:
    """Check that the folder holds all tensors of the source, bit for bit; return how many it holds."""
    state = read_tensors(folder / "model.safetensors")
    written = {pretrained.canonical_name(key): tensor for key, tensor in state.items()}
    wrong = [n for n, tensor in source.tensors.items() if n not in written or not same_bits(tensor, written[n])]
    loaded = {n: t for n, t in pretrained.load_encoder(folder).state_dict().items() if n in source.tensors}
    wrong += [n for n, tensor in loaded.items() if not torch.equal(tensor, source.tensors[n].to(tensor.dtype))]
    if wrong:
        raise ModelFolderError(f"{source.path}: the folder holds other numbers in {summary(wrong)}")
    return len(written)


def encoder_tensors(source: Source) -> dict[str, Tensor]:
    """Return the tensors of the encoder, by our names, in float32."""
    others = pretrained.head_parts() + pretrained.PRETRAINING_PARTS
    return {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in source.tensors.items()
        if not name.startswith(others)
    }


@torch.no_grad()
def compare_layers(source: Source, folder: Path, reference: Reference | None) -> dict:
    """Compare each layer of the folder's encoder with the reference, which uses the source's tensors.

    Raises:
        ModelFolderError: a layer differs by more than `TOLERANCE`.
    """
    encoder = pretrained.load_encoder(folder)
    config = encoder.config
    samples = max(SAMPLES, 2 * config.min_samples)
    if samples > MAX_SAMPLES:
        raise ModelFolderError(f"{source.path}: its first frame needs {config.min_samples:,} samples")
    waveform = torch.randn(1, samples, generator=torch.Generator().manual_seed(0))
    if reference is None:
        return {"reference": "none", "samples": samples, "layers": [], "largest": None}
    ours, _ = encoder.layers(waveform)
    try:
        name, theirs = reference(source, config, waveform)
    except (ImportError, OSError):
        return {"reference": "none installed", "samples": samples, "layers": [], "largest": None}
    except ModelFolderError:
        raise
    except Exception as error:  # the other library may raise any error
        refusal = f"the reference does not take this model: {shorten(str(error))}"
        raise ModelFolderError(f"{source.path}: {refusal}") from None
    ours = ours[-len(theirs) :]
    differences = [float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True)]
    if not all(difference <= TOLERANCE for difference in differences):  # so that NaN is too much
        raise ModelFolderError(
            f"{source.path}: the converted encoder differs from {name}, by layer: "
            f"{', '.join(f'{d:.1e}' for d in differences)}; at most {TOLERANCE:g} is rounding. Does the "
            "configuration belong to these weights? (--config)"
        )
    return {"reference": name, "samples": samples, "layers": differences, "largest": max(differences)}


# ---------------------------------------------------------------------------------------------- the whole


def check_paths(source: Path, target: Path, *, overwrite: bool) -> None:
    """Refuse a target that exists and must not be replaced."""
    if not pretrained.exists(source):
        raise ModelFolderError(f"{source}: there is no such file or folder")
    if not source.is_dir() and not source.is_file():
        raise ModelFolderError(f"{source}: is not a regular file")
    here, there = source.resolve(), target.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise ModelFolderError(f"{target}: lies in {source} or around it; choose a folder beside it")
    if folders.is_replaced(target) and not overwrite:
        raise ModelFolderError(f"{target}: exists; choose another folder, or --overwrite")


def certificate_of(source: Source, folder: Path, name: str, comparison: Mapping, **tensors: Any) -> dict[str, Any]:
    """Return the record of a conversion: digests of source and result, and how they were compared."""
    import ser

    return {
        "source": {"name": name, "kind": source.kind, "sha256": {f.name: digest(f) for f in source.files}},
        "model": {"type": encoder_config(source).model_type, "sha256": digest(folder / "model.safetensors")},
        "tensors": {"read": source.count, **tensors},
        "assumed": source.assumed | ({"notes": source.notes} if source.notes else {}),
        "comparison": comparison,
        "versions": {"ser": ser.__version__, "torch": str(torch.__version__)},
    }


def built_source(source: Source, given: GivenNames) -> tuple[Recognizer | None, list[str]]:
    """Complete a source and check it; return a recognizer made from it, and the names of new tensors.

    A complete folder stays as it is, and the recognizer is None.
    """
    if not source.keys or source.paper:
        recognizer, report = built_recognizer(source, chosen_labels(source, **given))
        return recognizer, report.new
    if given.get("speakers") or given.get("vocabulary"):
        raise ModelFolderError(
            f"{source.path}: --speakers and --vocab are for the paper's folders, and for heads of fairseq and "
            "torchaudio; the heads of this one keep the names that they have"
        )
    if labels := given.get("labels"):
        name_classes(source, labels)
    check_encoder(source)
    return None, []


def convert(
    source: str | Path,
    target: str | Path,
    *,
    config: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    reference: Reference | None = None,
    say: Tell = lambda line: None,
    **given: Unpack[GivenNames],
) -> dict:
    """Write the model folder ``target`` from a checkpoint of another library, after comparing the two.

    Args:
        source: a folder of `transformers`, its OWNER/NAME on the Hugging Face hub, or a file that fairseq,
            torchaudio or speechbrain saved.
        target: the folder to write; complete or not at all.
        config: values of config.json that the source lacks or has wrong.
        overwrite: replace an existing model folder.
        reference: the function that computes the layers to compare with, such as that of
            examples/convert.py; None: only the tensors are compared.
        say: is called with a line on each step.
        given: ``labels`` of the emotion head; default: those of the paper, e0..e3: neutral, happy, angry, sad. In
            a folder of `transformers`, labels can only replace missing names or LABEL_0 and so on. ``speakers`` of
            the speaker head; default: s0, s1, ... ``vocabulary`` of the CTC head; default: the source's own, else
            the 32 symbols of LibriSpeech.

    Returns:
        the certificate, which is also in the folder as certificate.json. Its entry ``assumed`` has what the source
        does not say and no comparison proves: names, and for a bare state dict attention heads, strides and so on.

    Raises:
        ModelFolderError: the source cannot be read, names other things than tensors and settings, does not fit its
            configuration, or the result differs from it by more than `TOLERANCE`.
    """
    path, target, name = Path(source), Path(target), Path(source).name
    if not pretrained.exists(path) and pretrained.is_hub_name(str(source)):
        path, name = pretrained.find_folder(str(source), pickles=True), str(source)
    check_paths(path, target, overwrite=overwrite)
    read = read_source(path, config or {})
    say(f"{source}: {read.kind}, {read.count} tensors")
    recognizer, new = built_source(read, given)
    for setting, value in read.assumed.items():
        say(f"assumed {setting}: {value}")
    for note in read.notes:
        say(note)
    certificate: dict[str, Any] = {}

    def write(folder: Path) -> None:
        if recognizer is not None:
            recognizer.write_files(folder)
        else:
            write_hugging_face(read, folder)
        written = check_tensors(read, folder)
        say(f"{written} tensors written, {len(read.tensors)} of them the source's, bit for bit")
        comparison = compare_layers(read, folder, reference)
        largest = "" if comparison["largest"] is None else f"; largest difference {comparison['largest']:.1e}"
        say(f"layers compared with: {comparison['reference']}{largest}")
        tensors = {"written": written, "unused": read.unused, "new": new}
        certificate.update(certificate_of(read, folder, name, comparison, **tensors))
        write_json(folder / "certificate.json", certificate)

    write_folder_atomically(target, write)
    say(f"{target}: written, with certificate.json")
    return certificate

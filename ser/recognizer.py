"""A model with everything that inference needs: labels, vocabulary, preprocessing.

    recognizer = ser.load("runs/demo/best")
    for prediction in recognizer.predict(["a.wav", "b.flac"]):
        print(prediction.emotion, prediction.transcript)

A `Recognizer` is what a model folder holds. Training starts from one, saves through it and loads it again, so a
folder that training wrote is all that inference needs, and nothing else decides what goes into one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ser.audio import (
    SAMPLE_RATE,
    joined_warnings,
    normalise,
)
from ser.data.dataset import SpeechDataset, pad
from ser.data.manifest import Utterance
from ser.data.text import ORTHOGRAPHIES, SPECIALS, Vocabulary
from ser.data.workers import AGAIN, WORKER_SECONDS, decoded, worker_death_explained
from ser.device import choose_precision, freed_memory_kept
from ser.errors import AudioError, ConfigError, ModelFolderError, SerError, brief_repr, shorten
from ser.files import write_folder_atomically, write_json, write_tensors
from ser.folder import FORMAT, classifier_form, read_settings, read_vocabulary
from ser.inputs import Decoder, Input, each_of, find_recording, gather, open_windows, pack, plan_batches
from ser.models.config import MODEL_TYPES, Wav2Vec2Config
from ser.models.multitask import HEADS, HeadsConfig, MultiTaskModel, Outputs
from ser.models.pretrained import (
    LoadReport,
    TensorFiles,
    check_folder,
    exists,
    fill,
    fill_encoder,
    find_folder,
    materialise,
    read_encoder_config,
    read_json,
    written_names,
)

LOG = logging.getLogger("ser")  # where loading says what a folder lacks; on standard error unless it is set up
MAX_SECONDS = 120.0  # attention's memory grows with the square of the length
# Padded seconds per forward pass in inference. On a CPU more do not stay in its caches: 64 took a quarter longer.
BATCH_SECONDS = {"cpu": 16.0, "cuda": 64.0}

# head -> the attribute of a Recognizer that names its classes, and where a folder has those names
LABELS = {"emotion": "emotions", "ctc": "vocabulary", "speaker": "speakers", "dimensions": "dimensions"}
WHERE_LABELS_STAND = {
    "emotion": "id2label in config.json",
    "ctc": "vocab.json, with tokenizer_config.json beside it",
    "speaker": "ser.speakers in config.json",
    "dimensions": "id2label in config.json, with problem_type regression or of arousal, dominance and valence",
}
# Settings of `HeadsConfig` that stand in the "ser" part of config.json; its sizes follow from the labels.
READS = ("layers", "weighted_final_norm", "pooling", "emotion_head", "dimension_head")
# model_type -> how its classes in `transformers` begin
ARCHITECTURES = {"wav2vec2": "Wav2Vec2", "hubert": "Hubert", "wavlm": "WavLM", "data2vec-audio": "Data2VecAudio"}


@dataclass(frozen=True)
class Prediction:
    """What was recognised in one recording; None where the model has no such head."""

    file: str | None  # None for samples that were passed in memory
    seconds: float
    start: float | None = None  # of a window, in seconds from the beginning of the file
    end: float | None = None
    kind: str | None = None  # "single-label", "multi-label" or "regression"; see `Recognizer.kind`
    emotion: str | None = None  # the likeliest
    probabilities: dict[str, float] | None = (
        None  # by emotion name, in the model's order; single-label: they sum to 1
    )
    dimensions: dict[str, float] | None = None  # such as arousal, on the training labels' scale
    transcript: str | None = None
    speaker: str | None = None  # the most likely of the speakers in training
    speaker_probability: float | None = None
    warning: str | None = None  # why it may mean nothing, such as silence; sentences between "; "

    def to_dict(self) -> dict:
        """As plain data, for JSON."""
        return asdict(self)


def build(config: Wav2Vec2Config, sizes: HeadsConfig) -> MultiTaskModel:
    """A model on the meta device, to be filled."""
    model = materialise(lambda: MultiTaskModel(config, sizes))
    assert isinstance(model, MultiTaskModel)
    return model


def head_sizes(labels: dict[str, Any], reads: dict[str, Any]) -> HeadsConfig:
    """The `HeadsConfig` for these labels; ``reads`` are its settings of what heads read."""
    return HeadsConfig(
        num_emotions=len(labels["emotions"]),
        vocab_size=len(labels["vocabulary"]) if labels["vocabulary"] is not None else 0,
        num_speakers=len(labels["speakers"]),
        num_dimensions=len(labels["dimensions"]),
        **reads,
    )


def head_rows(files: TensorFiles) -> int | None:
    """Outputs of the CTC head in a folder, None without one."""
    shape = files.shapes.get("lm_head.weight", ())
    return shape[0] if len(shape) == 2 else None


def projection_size(files: TensorFiles) -> int:
    """Of the projector in a folder, 0 without one."""
    shape = files.shapes.get("projector.weight", ())
    return shape[0] if len(shape) == 2 else 0


def is_preset(init: str | Path) -> bool:
    """Whether ``init`` names random weights, such as "small". A folder of that name comes first.

    Raises ConfigError for what is neither that, nor a path, nor a name on the hub.
    """
    if exists(Path(init)) or "/" in str(init):
        return False
    try:
        Wav2Vec2Config.named(str(init))
    except ConfigError as error:
        raise ConfigError(f"{init}: there is no such model folder, and {error}") from None
    return True


class Recognizer:
    """A multi-task model with its labels, vocabulary and preprocessing.

    Attributes:
        model: the `MultiTaskModel`.
        emotions, speakers: class names in the order of the heads; empty without such a head.
        dimensions: names such as arousal, likewise.
        multi_label: whether emotions are judged one by one, so that several can be likely at once.
        vocabulary: CTC symbols, or None without a CTC head.
        orthography, tags: how training cleaned its text (see `ser.data.text`).
        do_normalize: whether waveforms are made zero mean and unit variance.
        precision: in which the model predicts: torch.float32, or torch.bfloat16, which is faster where the
            processor has the instructions, and leaves scores two to three digits. Loaded so, the encoder's
            weights are rounded: for predictions and evaluation, and not to be saved or trained. Call the model
            itself inside of `autocast`.
    """

    precision = torch.float32

    def __init__(
        self,
        model: MultiTaskModel,
        *,
        emotions: Sequence[str] = (),
        speakers: Sequence[str] = (),
        dimensions: Sequence[str] = (),
        multi_label: bool = False,
        vocabulary: Vocabulary | None = None,
        orthography: str = "librispeech",
        tags: str = "remove",
        do_normalize: bool = True,
    ) -> None:
        self.model, self.multi_label = model, multi_label
        self.emotions, self.speakers, self.vocabulary = list(emotions), list(speakers), vocabulary
        self.dimensions = list(dimensions)
        self.orthography, self.tags, self.do_normalize = orthography, tags, do_normalize
        symbols = vocabulary.tokens if vocabulary is not None else ()
        found = (len(self.emotions), len(symbols), len(self.speakers), len(self.dimensions))
        heads = model.heads_config
        expected = (heads.num_emotions, heads.vocab_size, heads.num_speakers, heads.num_dimensions)
        if found != expected:
            raise ConfigError(
                f"labels and heads disagree: (emotions, symbols, speakers, dimensions) are {found}, the heads "
                f"have {expected}"
            )
        named = {"emotions": self.emotions, "speakers": self.speakers, "dimensions": self.dimensions}
        for kind, names in named.items():
            if len(set(names)) < len(names):
                raise ConfigError(f"{kind} {brief_repr(names)} name a class twice")

    @property
    def kind(self) -> str | None:
        """What the model answers with on emotions.

        "single-label": one of them, with probabilities that sum to 1. "multi-label": each by itself, with
        probabilities that do not. "regression": numbers by their names, in `Prediction.dimensions`. None: nothing.
        """
        if self.emotions:
            return "multi-label" if self.multi_label else "single-label"
        return "regression" if self.dimensions else None

    def require_single_label(self, purpose: str) -> None:
        """Raise ConfigError where several emotions can be right at once."""
        if self.kind == "multi-label":
            raise ConfigError(
                "the model judges each emotion by itself (problem_type multi_label_classification), and a "
                f"manifest has one emotion per utterance: it cannot be used {purpose}. To train a head of "
                "one label on its encoder, pass its folder as --init"
            )

    # ------------------------------------------------------------------------------------ making one

    @classmethod
    def create(
        cls,
        init: str | Path,
        *,
        emotions: Sequence[str] = (),
        speakers: Sequence[str] = (),
        dimensions: Sequence[str] = (),
        vocabulary: Vocabulary | None = None,
        orthography: str = "librispeech",
        tags: str = "remove",
        pooling: str | None = None,
        layers: str | None = None,
        seed: int = 0,
    ) -> tuple[Recognizer, LoadReport]:
        """A recognizer to train: the encoder of ``init`` and heads for these labels.

        ``init`` is a preset (small, base, large, large-lv60: random weights) or a model folder. Of a folder, a
        head is kept when its labels (or symbols) and what it reads are the same; others are new. Random weights
        depend on ``seed`` alone. ``pooling`` and ``layers`` are those of `HeadsConfig`; None: as in the folder,
        else mean and last.
        """
        labels: dict[str, Any] = {
            "emotions": list(emotions),
            "speakers": list(speakers),
            "dimensions": list(dimensions),
            "vocabulary": vocabulary,
        }
        reads = {name: value for name, value in (("pooling", pooling), ("layers", layers)) if value is not None}
        if is_preset(init):
            config = Wav2Vec2Config.named(str(init))
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = MultiTaskModel(config, head_sizes(labels, reads))
            new = [name for name in model.state_dict() if not name.startswith("wav2vec2.")]
            return cls(model, orthography=orthography, tags=tags, **labels), LoadReport(Path(init), new=new)

        folder = find_folder(init)
        config, values = read_encoder_config(folder)
        files = TensorFiles(folder)
        own = read_settings(folder, values, files)
        if vocabulary is not None:
            rows = head_rows(files)
            own.vocabulary = read_vocabulary(folder, own.orthography, rows=rows, values=values, notes=own.notes)
        there = own.reads | {"projection": projection_size(files)}
        sizes = head_sizes(labels, there | reads)
        same_input = head_sizes(labels, there) == sizes
        kept = {HEADS[name]: same_input and getattr(own, kind) == labels[kind] for name, kind in LABELS.items()}
        kept["lm_head"] = own.vocabulary is not None and own.vocabulary == vocabulary
        if own.multi_label and labels["emotions"]:
            kept["cls_head"] = False
            own.notes.append("the emotion head there is of several labels at once (multi-label): it is made anew")
        model, report = build(config, sizes), LoadReport(folder, notes=own.notes)
        parts: dict[str, list[str]] = {}  # what stands on the encoder: heads, and what they read
        for name in model.state_dict():
            if not name.startswith("wav2vec2."):
                parts.setdefault(name.split(".")[0], []).append(name)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            fill_encoder(model.wav2vec2, files, report)
            for part, names in parts.items():
                if kept.get(part, same_input) and not files.shapes.keys().isdisjoint(names):
                    fill(model, files, report, names)
                    report.unused = [name for name in report.unused if name not in names]
                else:
                    model.renew(part)
                    report.new += names
        return cls(model, orthography=orthography, tags=tags, do_normalize=own.do_normalize, **labels), report

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        device: str | torch.device = "cpu",
        revision: str | None = None,
        precision: str = "float32",
    ) -> Recognizer:
        """Read a model folder with at least one head; see `ser.load`."""
        dtype = choose_precision(precision, torch.device(device))
        folder = find_folder(folder, revision=revision)
        config, values = read_encoder_config(folder)
        files = TensorFiles(folder)
        if classifier_form(files) == "linear" and "projector.weight" not in files.names:
            raise ModelFolderError(
                f"{folder}: has classifier.weight without projector.weight: no ForSequenceClassification, but a "
                "model that judges each frame perhaps, which is not supported"
            )
        own = read_settings(folder, values, files)
        there = {name.split(".")[0] for name in files.names}
        heads = [name for name, part in HEADS.items() if part in there]
        if not heads:
            raise ModelFolderError(
                f"{folder}: holds an encoder without heads, which recognises nothing; "
                f"ser.load_encoder reads it, or train heads on it with --init {folder}"
            )
        if "ctc" in heads:  # others may leave any vocab.json behind
            rows = head_rows(files)
            vocabulary = read_vocabulary(folder, own.orthography, rows=rows, values=values, notes=own.notes)
            own.vocabulary = vocabulary
            if vocabulary is not None and rows is not None and len(vocabulary) != rows:
                raise ModelFolderError(
                    f"{folder}: vocab.json and what completes it have {len(vocabulary)} symbols, the CTC head "
                    f"(lm_head.weight) has {rows} rows: they do not belong together"
                )
            if "ser" not in values and vocabulary is not None and not vocabulary.case:
                own.orthography = "none"  # of others, with letters of both cases or none: texts keep theirs
        labels: dict[str, Any] = {"emotions": [], "speakers": [], "dimensions": [], "vocabulary": None}
        for name in heads:
            kind = LABELS[name]
            labels[kind] = getattr(own, kind)
            if not labels[kind]:
                advice = "`ser convert` makes a folder with them"
                if name == "ctc":
                    advice = "put the files of its tokenizer there"
                where = WHERE_LABELS_STAND[name]
                raise ModelFolderError(
                    f"{folder}: has {HEADS[name]} but no names for its classes ({where}); {advice}"
                )
        try:
            sizes = head_sizes(labels, own.reads | {"projection": projection_size(files)})
            recognizer = cls(
                build(config, sizes),
                multi_label=own.multi_label,
                orthography=own.orthography,
                tags=own.tags,
                do_normalize=own.do_normalize,
                **labels,
            )
        except ConfigError as error:
            raise ModelFolderError(f"{folder / 'config.json'}: {shorten(str(error))}") from None
        recognizer.precision = dtype
        model, report = recognizer.model, LoadReport(folder)
        fill_encoder(model.wav2vec2, files, report)
        fill(model, files, report, [name for name in model.state_dict() if not name.startswith("wav2vec2.")])
        if dtype != torch.float32:
            model.wav2vec2.round_weights(dtype)
        model.eval().to(device)
        for note in own.notes:
            LOG.warning("%s: %s", folder, note)
        return recognizer

    def autocast(self) -> torch.autocast:
        """The context in which the model computes in `precision`; of no effect at float32."""
        return torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32)

    def require_float32(self, purpose: str) -> None:
        """Raise ConfigError where weights were rounded when they were loaded."""
        if any(p.dtype == torch.bfloat16 for p in self.model.parameters()):
            raise ConfigError(
                "the model was loaded in bf16, for predictions: its weights are rounded. "
                f"Load it in float32 {purpose}"
            )

    def save(
        self,
        folder: str | Path,
        tensors: Mapping[str, Tensor] | None = None,
        *,
        also: Callable[[Path], None] | None = None,
    ) -> None:
        """Write a model folder: complete or not at all, replacing what stood there.

        ``tensors``, by the names of the model's, stand for its own: what they were at a moment (see `Saver`).
        ``also`` may write further files into the folder before it is put into its place. Raises FileError where
        the disk does not take it.

        `transformers` loads the encoder from it with its Model class and the CTC head with ForCTC; where
        config.json names ForSequenceClassification, also as that.
        """
        if tensors is None:
            self.require_float32("to save it")
        folder = Path(folder)
        if exists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
            try:
                ours = read_json(check_folder(folder), "config.json").get("model_type") in MODEL_TYPES
            except ModelFolderError:
                ours = False
            if not ours:
                raise ModelFolderError(f"{folder}: exists and is not a model folder; it is not replaced")
        tensors = self.model.state_dict() if tensors is None else tensors
        size = sum(tensor.nbytes for tensor in tensors.values())

        def write(new: Path) -> None:
            self.write_files(new, tensors)
            if also is not None:
                also(new)

        write_folder_atomically(folder, write, size=size)

    def write_files(self, folder: Path, tensors: Mapping[str, Tensor] | None = None) -> None:
        """Write the files of a model folder into an existing folder; ``tensors`` as in `save`."""
        heads = self.model.heads_config
        architecture = "ForCTC" if self.vocabulary is not None else "Model"
        # What that class computes: transformers 5 sums layers without a pre-norm encoder's final norm.
        raw = not (heads.weighted_final_norm and self.model.config.do_stable_layer_norm)
        theirs = heads.layers == "last" or (heads.layers == "weighted" and raw)
        if self.classifier and heads.pooling == "mean" and theirs:
            architecture = "ForSequenceClassification"
        config: dict[str, Any] = {
            "architectures": [ARCHITECTURES[self.model.config.model_type] + architecture],
            **self.model.config.to_dict(),
            "hidden_act": "gelu",
            "feat_extract_activation": "gelu",
            "ctc_loss_reduction": "sum",
        }
        if names := self.dimensions if self.classifier == "dimension_head" else self.emotions:
            config["id2label"] = {str(i): name for i, name in enumerate(names)}
            config["label2id"] = {name: i for i, name in enumerate(names)}
        if self.multi_label or self.classifier == "dimension_head":
            config["problem_type"] = "multi_label_classification" if self.multi_label else "regression"
        if self.vocabulary is not None:
            config |= {"vocab_size": len(self.vocabulary), "pad_token_id": self.vocabulary.blank}
        if heads.projection:
            config["classifier_proj_size"] = heads.projection
        config["use_weighted_layer_sum"] = heads.layers == "weighted"
        config["ser"] = {
            "format": FORMAT,
            **{name: value for name, value in heads.to_dict().items() if name in READS},
            "speakers": self.speakers,
            "dimensions": self.dimensions,
            "orthography": self.orthography,
            "tags": self.tags,
        }
        write_json(folder / "config.json", config)
        write_json(
            folder / "preprocessor_config.json",
            {
                "feature_extractor_type": "Wav2Vec2FeatureExtractor",
                "feature_size": 1,
                "sampling_rate": SAMPLE_RATE,
                "do_normalize": self.do_normalize,
                "padding_side": "right",
                "padding_value": 0.0,
                "return_attention_mask": self.model.config.feat_extract_norm == "layer",
            },
        )
        if self.vocabulary is not None:
            tokens = self.vocabulary.tokens
            write_json(folder / "vocab.json", {token: i for i, token in enumerate(tokens)})
            specials = self.vocabulary.specials
            special: dict[str, str | None] = {
                "pad_token": tokens[self.vocabulary.blank],
                "unk_token": None if self.vocabulary.unknown is None else tokens[self.vocabulary.unknown],
                "bos_token": "<s>" if "<s>" in tokens else None,
                "eos_token": "</s>" if "</s>" in tokens else None,
            }
            delimiter = {"word_delimiter_token": self.vocabulary.word_delimiter}
            if self.vocabulary.separator != " ":
                delimiter["replace_word_delimiter_char"] = self.vocabulary.separator
            lower = {"do_lower_case": self.vocabulary.lower_case}
            tokenizer: dict[str, Any] = {"tokenizer_class": "Wav2Vec2CTCTokenizer"} | lower | special | delimiter
            if others := [t for t in tokens if t in specials - SPECIALS and t not in special.values()]:
                tokenizer["additional_special_tokens"] = others
            write_json(folder / "tokenizer_config.json", tokenizer)
            write_json(folder / "special_tokens_map.json", special)
        tensors, keys = self.model.state_dict() if tensors is None else tensors, self.keys()
        write_tensors(folder / "model.safetensors", {keys[name]: tensor for name, tensor in tensors.items()})

    def keys(self) -> dict[str, str]:
        """The names of the model's tensors -> their keys in ``model.safetensors``."""
        return written_names(self.model.state_dict(), self.model.config, classifier=self.classifier)

    @property
    def classifier(self) -> str | None:
        """The part that is written as the head of ForSequenceClassification: cls_head or dimension_head."""
        heads = self.model.heads_config
        if heads.projection and heads.num_emotions and heads.emotion_head == "linear":
            return "cls_head"
        alone = heads.num_dimensions and not heads.num_emotions
        return "dimension_head" if heads.projection and alone and heads.dimension_head == "linear" else None

    # ------------------------------------------------------------------------------------ using one

    def dataset(self, utterances: Sequence[Utterance]) -> SpeechDataset:
        """Utterances with this model's labels, vocabulary and preprocessing: to train on, or to be judged by."""
        return SpeechDataset(
            utterances,
            emotions=self.emotions,
            speakers=self.speakers,
            dimensions=self.dimensions,
            vocabulary=self.vocabulary,
            orthography=self.orthography,
            tags=self.tags,
            do_normalize=self.do_normalize,
        )

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def batch_seconds(self) -> float:
        """Padded seconds per forward pass, where the model is."""
        return BATCH_SECONDS.get(self.device.type, BATCH_SECONDS["cuda"])

    def predict(
        self,
        inputs: Input | Iterable[Input],
        sampling_rate: int | None = None,
        *,
        workers: int = 0,
        max_seconds: float = MAX_SECONDS,
        timeout: float = WORKER_SECONDS,
    ) -> list[Prediction]:
        """Recognise recordings.

        Args:
            inputs: a path, a manifest row (`ser.data.manifest.Utterance`), samples ((S,) or (S, channels), float
                or integer PCM, numpy or torch), a dict of these as `datasets` decodes it (array, sampling_rate,
                path), or an iterable of these, such as a list, a generator or an array or column of paths.
            sampling_rate: of samples that are passed as arrays, in Hz; files and dicts carry their own.
            workers: processes that decode audio; 0 decodes in this one.
            max_seconds: longer recordings are refused.
            timeout: seconds to wait for one of the workers.

        Returns:
            one `Prediction` for each input, in their order.

        Raises:
            AudioError: a recording cannot be read, or is too long. `stream` goes on instead.
            ResourceError: one of the workers was killed, or gave nothing in time.
        """
        results = []
        options: dict[str, Any] = {"workers": workers, "max_seconds": max_seconds, "timeout": timeout}
        for result in self.stream(inputs, sampling_rate, **options):
            if isinstance(result, SerError):
                raise result
            results.append(result)
        return results

    def stream(
        self,
        inputs: Input | Iterable[Input],
        sampling_rate: int | None = None,
        *,
        workers: int = 0,
        max_seconds: float = MAX_SECONDS,
        timeout: float = WORKER_SECONDS,
    ) -> Iterator[Prediction | SerError]:
        """As `predict`, but lazily and in bounded memory; a bad recording gives its error and the rest go on.

        A generator is asked for a batch's worth (`batch_seconds`, at most 64 recordings) before the first result,
        and then for more at a time, since little is padded where many are sorted by length; of one that lets us
        wait, such as a microphone, results go on to come with every batch's worth. Each of ``workers`` has two
        batches more under way. Of a list, 512 are looked at together.
        """
        if not max_seconds > 0:
            raise ConfigError(f"max_seconds is {max_seconds!r}; expected a number above 0")
        items = each_of(inputs)
        recordings = (find_recording(i, item, sampling_rate, max_seconds) for i, item in enumerate(items))
        there = hasattr(items, "__len__") and hasattr(items, "__getitem__")  # and not only when they are asked for
        runs = gather(recordings, None if there else self.batch_seconds)
        batches = plan_batches(runs, self.batch_seconds)  # of recordings, not of numbers
        loader = decoded(Decoder(), batches, pack, workers=workers, timeout=timeout, then=AGAIN)
        # Batches come by length, results go out in the order of the inputs.
        waiting: dict[int, Prediction | SerError] = {}
        position = 0
        with freed_memory_kept(self.device), worker_death_explained(AGAIN), closing(loader):
            for batch in loader:
                waiting.update(batch.errors)
                if batch.recordings:
                    predictions = self.predict_waveforms(batch.samples.split(batch.lengths))
                    for (index, file, warning), prediction in zip(batch.recordings, predictions, strict=True):
                        warning = joined_warnings(warning, prediction.warning)
                        waiting[index] = replace(prediction, file=file, warning=warning)
                while position in waiting:
                    yield waiting.pop(position)
                    position += 1

    def predict_windows(
        self,
        source: Input,
        sampling_rate: int | None = None,
        *,
        window: float = 20.0,
        hop: float | None = None,
    ) -> Iterator[Prediction]:
        """Recognise a recording of any length window by window, lazily and in memory that does not grow with it.

            for prediction in recognizer.predict_windows("lecture.flac", window=10, hop=5):
                print(prediction.start, prediction.end, prediction.emotion)

        Each window is recognised as if it were a recording of its own: normalised by itself, and nothing outside
        of it has an effect, so its prediction is that of ``Utterance(file, start, end)``. Emotion models were
        trained on utterances of some seconds; a word that a window cuts is lost to its transcript.

        Args:
            source: a path, samples, or a dict, as for `predict`; or a manifest row, of whose excerpt the windows
                are then.
            sampling_rate: of samples, in Hz.
            window: seconds of each, at most 120. A remainder of under a second (or under a window, where that is
                shorter) makes the last one longer.
            hop: seconds from the start of one window to the start of the next; None: ``window``, without overlap.

        Yields:
            a `Prediction` for each window, with its ``start`` and ``end``, in order.

        Raises:
            AudioError: the recording cannot be read; predictions up to there have been given.
            ConfigError: window or hop out of range.
        """
        if not 0 < window <= MAX_SECONDS:
            raise ConfigError(f"window is {window!r} s; expected above 0 and at most {MAX_SECONDS:g}")
        file, windows = open_windows(source, sampling_rate, window=window, hop=window if hop is None else hop)
        at_once = max(1, int(self.batch_seconds // window))
        damage: AudioError | None = None
        with freed_memory_kept(self.device):
            while damage is None:
                group: list[tuple[float, float, Tensor, str | None]] = []
                try:
                    group.extend(islice(windows, at_once))  # those before the damage stay in it
                except AudioError as error:
                    damage = error
                if not group:
                    break
                predictions = self.predict_waveforms([waveform for _, _, waveform, _ in group])
                for (start, end, _, warning), prediction in zip(group, predictions, strict=True):
                    warning = joined_warnings(warning, prediction.warning)
                    yield replace(prediction, file=file, start=start, end=end, warning=warning)
        if damage is not None:
            raise damage

    @torch.inference_mode()
    def predict_waveforms(self, waveforms: Sequence[Tensor]) -> list[Prediction]:
        """Recognise one batch of (S,) float waveforms at 16 kHz, in one forward pass."""
        minimum = self.model.config.min_samples
        prepared, warnings = [], []
        for waveform in waveforms:
            x = normalise(waveform) if self.do_normalize else waveform
            short = len(x) < minimum
            warnings.append(
                f"{len(x)} samples are shorter than one frame; padded with silence to {minimum}" if short else None
            )
            prepared.append(F.pad(x, (0, minimum - len(x))) if short else x)
        was_training = self.model.training
        self.model.eval()
        try:
            with self.autocast():
                outputs = self.model(pad(prepared).to(self.device), torch.tensor([len(x) for x in prepared]))
        finally:
            self.model.train(was_training)
        return [
            replace(prediction, seconds=len(waveform) / SAMPLE_RATE, warning=warning)
            for prediction, waveform, warning in zip(self.decode(outputs), waveforms, warnings, strict=True)
        ]

    def decode(self, outputs: Outputs) -> list[Prediction]:
        """Scores of a batch to names and text; ``file`` and ``seconds`` are left empty."""
        scores = None if outputs.emotion is None else outputs.emotion.float()
        emotion = None if scores is None else (scores.sigmoid() if self.multi_label else scores.softmax(-1)).cpu()
        speaker = None if outputs.speaker is None else outputs.speaker.float().softmax(-1).cpu()
        dimensions = None if outputs.dimensions is None else outputs.dimensions.float().cpu()
        symbols = None if outputs.ctc is None else outputs.ctc.argmax(-1).cpu()
        predictions = []
        for row, frames in enumerate(outputs.num_frames.tolist()):
            found: dict[str, Any] = {"kind": self.kind}
            if emotion is not None:
                values = emotion[row].tolist()
                found["probabilities"] = dict(zip(self.emotions, values, strict=True))
                found["emotion"] = self.emotions[int(emotion[row].argmax())]
            if dimensions is not None:
                found["dimensions"] = dict(zip(self.dimensions, dimensions[row].tolist(), strict=True))
            if symbols is not None and self.vocabulary is not None:
                text = self.vocabulary.decode(symbols[row, :frames].tolist())
                found["transcript"] = ORTHOGRAPHIES[self.orthography].present(text)
            if speaker is not None:
                best = int(speaker[row].argmax())
                found["speaker"], found["speaker_probability"] = self.speakers[best], float(speaker[row, best])
            predictions.append(Prediction(file=None, seconds=0.0, **found))
        return predictions


def load(
    folder: str | Path,
    *,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    precision: str = "float32",
) -> Recognizer:
    """Load a recognizer from a model folder, ready to predict.

        recognizer = ser.load("runs/demo/best")
        prediction, = recognizer.predict("speech.wav")

    Args:
        folder: as training wrote it; as ForCTC (with its vocab.json) or ForSequenceClassification of
            `transformers` saved it, for wav2vec 2.0, HuBERT, WavLM or data2vec-audio; audEERING's dimensional
            model and the ForSpeechClassification of a widespread notebook; or the OWNER/NAME of such a one on the
            Hugging Face hub (with the extra `hub`).
        device: "cpu", "cuda", "cuda:1", as torch names it.
        revision: branch, tag or commit on the hub.
        precision: "float32"; "bf16", faster on processors with the instructions; or "auto", which knows them.
            In bf16 the recognizer predicts and is evaluated, but neither trained nor saved.

    Raises:
        ModelFolderError: the folder is incomplete or not what it claims to be.
    """
    return Recognizer.load(folder, device=device, revision=revision, precision=precision)


def labels_of(init: str | Path, kind: str) -> list[str]:
    """The "emotions", "speakers" or "dimensions" of the folder ``init``, in its order; none of a preset."""
    if is_preset(init):
        return []
    folder = find_folder(init)
    return getattr(read_settings(folder, read_json(folder, "config.json"), TensorFiles(folder)), kind)


def inherited_labels(init: str | Path, kind: str, training: Iterable[str]) -> list[str]:
    """The labels to train with: those of the folder ``init`` if all of training's are there, else those sorted.

    ``kind`` is "emotions", "speakers" or "dimensions". With the folder's own set its head can be kept
    (`Recognizer.create`). Speakers must be the very same: nobody is scored on a speaker whom this training lacks.
    """
    wanted, own = sorted(set(training)), labels_of(init, kind)
    kept = set(wanted) == set(own) if kind == "speakers" else set(wanted) <= set(own)
    return own if wanted and kept else wanted


def inherited_vocabulary(init: str | Path, orthography: str) -> Vocabulary | None:
    """The symbols of the folder ``init``, with the orthography's delimiter where it has one of its own.

    None for a preset, and for a folder without any.
    """
    if is_preset(init):
        return None
    folder = find_folder(init)
    return read_vocabulary(
        folder, orthography, rows=head_rows(TensorFiles(folder)), values=read_json(folder, "config.json")
    )

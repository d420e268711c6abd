"""A model with everything that inference needs: labels, vocabulary, preprocessing.

    recognizer = ser.load("runs/demo/best")
    for prediction in recognizer.predict(["a.wav", "b.flac"]):
        print(prediction.emotion, prediction.transcript)

A `Recognizer` is what a model folder holds. Training starts from one, saves through it and loads it again, so a
folder that training wrote is all that inference needs, and nothing else decides what goes into one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from ser.audio import SAMPLE_RATE, as_waveform, audio_info, load_audio, normalise
from ser.data.dataset import pad
from ser.data.manifest import Utterance
from ser.data.sampler import evaluation_batches
from ser.data.text import ORTHOGRAPHIES, Vocabulary
from ser.errors import AudioError, ConfigError, ModelFolderError, SerError
from ser.models.heads import new_linear
from ser.models.multitask import HEADS, HeadsConfig, MultiTaskModel, Outputs
from ser.models.pretrained import (
    LoadReport,
    TensorFiles,
    check_folder,
    fill,
    fill_encoder,
    materialise,
    read_encoder_config,
    read_json,
    resolve_inside,
    write_folder_atomically,
    write_json,
    write_tensors,
)
from ser.models.wav2vec2 import Wav2Vec2Config

FORMAT = 1  # of the "ser" part of config.json
MAX_SECONDS = 120.0  # attention's memory grows with the square of the length
BATCH_SECONDS = 64.0  # padded seconds per forward pass in inference
WINDOW = 2048  # recordings that are sorted by length together

Input = str | Path | Utterance | Any  # a path, a manifest row, or samples as an array or tensor


@dataclass(frozen=True)
class Prediction:
    """What was recognised in one recording; None where the model has no such head."""

    file: str | None  # None for samples that were passed in memory
    seconds: float
    emotion: str | None = None
    probabilities: dict[str, float] | None = None  # by emotion name, in the model's order; they sum to 1
    transcript: str | None = None
    speaker: str | None = None  # the most likely of the speakers in training
    speaker_probability: float | None = None
    warning: str | None = None  # such as a recording that had to be padded

    def to_dict(self) -> dict:
        """As plain data, for JSON."""
        return asdict(self)


class Recognizer:
    """A multi-task model with its labels, vocabulary and preprocessing.

    Attributes:
        model: the `MultiTaskModel`.
        emotions, speakers: class names in the order of the heads; empty without such a head.
        vocabulary: CTC symbols, or None without a CTC head.
        orthography, tags: how training cleaned its text (see `ser.data.text`).
        do_normalize: whether waveforms are made zero mean and unit variance.
    """

    def __init__(
        self,
        model: MultiTaskModel,
        *,
        emotions: Sequence[str] = (),
        speakers: Sequence[str] = (),
        vocabulary: Vocabulary | None = None,
        orthography: str = "librispeech",
        tags: str = "remove",
        do_normalize: bool = True,
    ) -> None:
        self.model = model
        self.emotions, self.speakers, self.vocabulary = list(emotions), list(speakers), vocabulary
        self.orthography, self.tags, self.do_normalize = orthography, tags, do_normalize
        found = (len(self.emotions), len(vocabulary) if vocabulary is not None else 0, len(self.speakers))
        heads = model.heads_config
        expected = (heads.num_emotions, heads.vocab_size, heads.num_speakers)
        if found != expected:
            raise ConfigError(
                f"labels and heads disagree: (emotions, symbols, speakers) are {found}, the heads have {expected}"
            )

    # ------------------------------------------------------------------------------------ making one

    @classmethod
    def create(
        cls,
        init: str | Path,
        *,
        emotions: Sequence[str] = (),
        speakers: Sequence[str] = (),
        vocabulary: Vocabulary | None = None,
        orthography: str = "librispeech",
        tags: str = "remove",
        pooling: str = "mean",
        seed: int = 0,
    ) -> tuple[Recognizer, LoadReport]:
        """A recognizer to train: the encoder of ``init`` and heads for these labels.

        ``init`` is a preset (small, base, large: random weights) or a model folder. Of a folder, a head is kept
        when its labels (or symbols) are the same; others are new. Random weights depend on ``seed`` alone.
        """
        sizes = HeadsConfig(
            num_emotions=len(emotions),
            vocab_size=len(vocabulary) if vocabulary is not None else 0,
            num_speakers=len(speakers),
            pooling=pooling,
        )
        options: dict[str, Any] = {
            "emotions": emotions,
            "speakers": speakers,
            "vocabulary": vocabulary,
            "orthography": orthography,
            "tags": tags,
        }
        if not Path(init).is_dir():
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = MultiTaskModel(Wav2Vec2Config.named(str(init)), sizes)
            new = [name for name in model.state_dict() if not name.startswith("wav2vec2.")]
            return cls(model, **options), LoadReport(Path(init), new=new)

        folder = check_folder(init)
        config, values = read_encoder_config(folder)
        own = read_labels(folder, values)
        files = TensorFiles(folder)
        model = build(config, sizes)
        report = LoadReport(folder)
        fill_encoder(model.wav2vec2, files, report)
        same = {
            "emotion": own["emotions"] == list(emotions) and own["pooling"] == pooling,
            "ctc": own["vocabulary"] is not None and vocabulary == own["vocabulary"],
            "speaker": own["speakers"] == list(speakers) and own["pooling"] == pooling,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for name in model.heads:
                head = model.head(name)
                assert head is not None
                if same[name] and f"{HEADS[name]}.weight" in files.shapes:
                    fill(head, files, report, prefix=f"{HEADS[name]}.")
                    report.unused = [n for n in report.unused if not n.startswith(f"{HEADS[name]}.")]
                else:
                    fresh = new_linear(head.in_features, head.out_features, config.initializer_range)
                    setattr(model, HEADS[name], fresh)
                    report.new += [f"{HEADS[name]}.weight", f"{HEADS[name]}.bias"]
        return cls(model, do_normalize=own["do_normalize"], **options), report

    @classmethod
    def load(cls, folder: str | Path, *, device: str | torch.device = "cpu") -> Recognizer:
        """Read a model folder with at least one head; see `ser.load`."""
        folder = check_folder(folder)
        config, values = read_encoder_config(folder)
        own = read_labels(folder, values)
        vocabulary = own["vocabulary"]
        files = TensorFiles(folder)
        heads = [name for name in HEADS if f"{HEADS[name]}.weight" in files.shapes]
        labels = {"emotion": own["emotions"], "ctc": vocabulary, "speaker": own["speakers"]}
        if not heads:
            raise ModelFolderError(
                f"{folder}: holds an encoder without heads, which recognises nothing; "
                f"ser.load_encoder reads it, or train heads on it with --init {folder}"
            )
        for name in heads:
            if not labels[name]:
                where = {
                    "emotion": "id2label in config.json",
                    "ctc": "vocab.json",
                    "speaker": "ser.speakers in config.json",
                }
                raise ModelFolderError(f"{folder}: has {HEADS[name]} but no names for its classes ({where[name]})")
        sizes = HeadsConfig(
            num_emotions=len(own["emotions"]) if "emotion" in heads else 0,
            vocab_size=len(vocabulary) if "ctc" in heads else 0,
            num_speakers=len(own["speakers"]) if "speaker" in heads else 0,
            pooling=own["pooling"],
        )
        model = build(config, sizes)
        report = LoadReport(folder)
        fill_encoder(model.wav2vec2, files, report)
        for name in heads:
            fill(getattr(model, HEADS[name]), files, report, prefix=f"{HEADS[name]}.")
        model.eval().to(device)
        return cls(
            model,
            emotions=own["emotions"] if "emotion" in heads else (),
            speakers=own["speakers"] if "speaker" in heads else (),
            vocabulary=vocabulary if "ctc" in heads else None,
            orthography=own["orthography"],
            tags=own["tags"],
            do_normalize=own["do_normalize"],
        )

    def save(self, folder: str | Path) -> None:
        """Write a model folder: complete or not at all, replacing what stood there.

        `transformers` loads the encoder from it with Wav2Vec2Model and the CTC head with Wav2Vec2ForCTC.
        """
        folder = Path(folder)
        if folder.exists() and not (
            folder.is_dir() and (not any(folder.iterdir()) or (folder / "config.json").exists())
        ):
            raise ModelFolderError(f"{folder}: exists and is not a model folder; it is not replaced")
        write_folder_atomically(folder, self.write_files)

    def write_files(self, folder: Path) -> None:
        """Write the files of a model folder into an existing folder."""
        heads = self.model.heads_config
        config: dict[str, Any] = {
            "architectures": ["Wav2Vec2ForCTC" if self.vocabulary is not None else "Wav2Vec2Model"],
            "model_type": "wav2vec2",
            **self.model.config.to_dict(),
            "hidden_act": "gelu",
            "feat_extract_activation": "gelu",
            "ctc_loss_reduction": "sum",
        }
        if self.emotions:
            config["id2label"] = {str(i): name for i, name in enumerate(self.emotions)}
            config["label2id"] = {name: i for i, name in enumerate(self.emotions)}
        if self.vocabulary is not None:
            config |= {"vocab_size": len(self.vocabulary), "pad_token_id": self.vocabulary.blank}
        config["ser"] = {
            "format": FORMAT,
            "pooling": heads.pooling,
            "speakers": self.speakers,
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
            self.vocabulary.write(folder / "vocab.json")
            special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
            delimiter = {"word_delimiter_token": self.vocabulary.word_delimiter}
            tokenizer = {"tokenizer_class": "Wav2Vec2CTCTokenizer", "do_lower_case": False} | special | delimiter
            write_json(folder / "tokenizer_config.json", tokenizer)
            write_json(folder / "special_tokens_map.json", special)
        write_tensors(folder / "model.safetensors", self.model.state_dict())

    # ------------------------------------------------------------------------------------ using one

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def predict(
        self,
        inputs: Input | Iterable[Input],
        sampling_rate: int | None = None,
        *,
        workers: int = 0,
        max_seconds: float = MAX_SECONDS,
    ) -> list[Prediction]:
        """Recognise recordings.

        Args:
            inputs: a path, a manifest row (`ser.data.manifest.Utterance`), samples ((S,) or (S, channels), float
                or integer PCM, numpy or torch), or an iterable of these.
            sampling_rate: of samples that are passed as arrays, in Hz; files carry their own.
            workers: processes that decode audio; 0 decodes in this one.
            max_seconds: longer recordings are refused.

        Returns:
            one `Prediction` for each input, in their order.

        Raises:
            AudioError: a recording cannot be read, or is too long. `stream` goes on instead.
        """
        if isinstance(inputs, str | Path | Utterance) or hasattr(inputs, "shape"):
            inputs = [inputs]
        results = []
        for result in self.stream(inputs, sampling_rate, workers=workers, max_seconds=max_seconds):
            if isinstance(result, SerError):
                raise result
            results.append(result)
        return results

    def stream(
        self,
        inputs: Iterable[Input],
        sampling_rate: int | None = None,
        *,
        workers: int = 0,
        max_seconds: float = MAX_SECONDS,
    ) -> Iterator[Prediction | SerError]:
        """As `predict`, but lazily and in bounded memory; a bad recording gives its error and the rest go on."""
        inputs = iter(inputs)
        while window := list(islice(inputs, WINDOW)):
            yield from self._predict_window(Recordings(self, window, sampling_rate, max_seconds), workers)

    def _predict_window(self, recordings: Recordings, workers: int) -> list[Prediction | SerError]:
        results: dict[int, Prediction | SerError] = dict(recordings.errors)
        good = [i for i in range(len(recordings)) if i not in results]
        # By length into batches, so that little is padded.
        lengths = [recordings.lengths[i] for i in good]
        plan = evaluation_batches(lengths, batch_samples=int(BATCH_SECONDS * SAMPLE_RATE))
        batches = [[good[i] for i, _ in batch] for batch in plan]
        loader = DataLoader(
            recordings,
            batch_sampler=batches,
            num_workers=min(workers, len(batches)),
            collate_fn=list,
        )
        for batch in loader:
            loaded = []
            for index, waveform in batch:
                if isinstance(waveform, SerError):
                    results[index] = waveform
                else:
                    loaded.append((index, waveform))
            if loaded:
                predictions = self.predict_waveforms([waveform for _, waveform in loaded])
                for (index, waveform), prediction in zip(loaded, predictions, strict=True):
                    seconds = len(waveform) / SAMPLE_RATE
                    results[index] = replace(prediction, file=recordings.name(index), seconds=seconds)
        return [results[i] for i in range(len(recordings))]

    @torch.inference_mode()
    def predict_waveforms(self, waveforms: Sequence[Tensor]) -> list[Prediction]:
        """Recognise one batch of (S,) float waveforms at 16 kHz, in one forward pass."""
        was_training = self.model.training
        self.model.eval()
        minimum = self.model.config.min_samples
        prepared, warnings = [], []
        for waveform in waveforms:
            x = normalise(waveform) if self.do_normalize else waveform
            short = len(x) < minimum
            warnings.append(
                f"{len(x)} samples are shorter than one frame; padded with silence to {minimum}" if short else None
            )
            prepared.append(F.pad(x, (0, minimum - len(x))) if short else x)
        outputs = self.model(pad(prepared).to(self.device), torch.tensor([len(x) for x in prepared]))
        self.model.train(was_training)
        return [
            replace(prediction, seconds=len(waveform) / SAMPLE_RATE, warning=warning)
            for prediction, waveform, warning in zip(self.decode(outputs), waveforms, warnings, strict=True)
        ]

    def decode(self, outputs: Outputs) -> list[Prediction]:
        """Scores of a batch to names and text; ``file`` and ``seconds`` are left empty."""
        emotion = None if outputs.emotion is None else outputs.emotion.float().softmax(-1).cpu()
        speaker = None if outputs.speaker is None else outputs.speaker.float().softmax(-1).cpu()
        symbols = None if outputs.ctc is None else outputs.ctc.argmax(-1).cpu()
        predictions = []
        for row, frames in enumerate(outputs.num_frames.tolist()):
            found: dict[str, Any] = {}
            if emotion is not None:
                values = emotion[row].tolist()
                found["probabilities"] = dict(zip(self.emotions, values, strict=True))
                found["emotion"] = self.emotions[int(emotion[row].argmax())]
            if symbols is not None and self.vocabulary is not None:
                text = self.vocabulary.decode(symbols[row, :frames].tolist())
                found["transcript"] = ORTHOGRAPHIES[self.orthography].present(text)
            if speaker is not None:
                best = int(speaker[row].argmax())
                found["speaker"], found["speaker_probability"] = self.speakers[best], float(speaker[row, best])
            predictions.append(Prediction(file=None, seconds=0.0, **found))
        return predictions


class Recordings(Dataset[tuple[int, Tensor | SerError]]):
    """Inputs of one window: headers read and checked now, samples on demand (in a worker perhaps)."""

    def __init__(
        self, recognizer: Recognizer, inputs: Sequence[Input], sampling_rate: int | None, max_seconds: float
    ) -> None:
        self.inputs, self.sampling_rate, self.max_seconds = inputs, sampling_rate, max_seconds
        self.lengths: dict[int, int] = {}
        self.errors: dict[int, SerError] = {}
        for index in range(len(inputs)):
            try:
                self.lengths[index] = self._length(index)
            except SerError as error:
                self.errors[index] = error

    def _excerpt(self, index: int) -> tuple[Path, float | None, float | None] | None:
        item = self.inputs[index]
        if isinstance(item, Utterance):
            return item.file, item.start, item.end
        return (Path(item), None, None) if isinstance(item, str | Path) else None

    def _length(self, index: int) -> int:
        excerpt = self._excerpt(index)
        if excerpt is None:
            if self.sampling_rate is None:
                raise AudioError(f"input {index} is an array: pass sampling_rate, in Hz, with it")
            samples = len(as_waveform(self.inputs[index], self.sampling_rate))
            seconds, name = samples / SAMPLE_RATE, f"input {index}"
        else:
            info = audio_info(excerpt[0], start=excerpt[1], end=excerpt[2], max_seconds=float("inf"))
            samples, seconds, name = info.num_samples, info.seconds, str(excerpt[0])
        if seconds > self.max_seconds:
            raise AudioError(
                f"{name}: lasts {seconds:.1f} s; at most {self.max_seconds:g} s are recognised at once. "
                "Cut it into utterances (one emotion is given for the whole), or raise the limit"
            )
        return samples

    def name(self, index: int) -> str | None:
        """Path of a file, None for an array."""
        excerpt = self._excerpt(index)
        return None if excerpt is None else str(excerpt[0])

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[int, Tensor | SerError]:
        try:
            excerpt = self._excerpt(index)
            if excerpt is None:
                assert self.sampling_rate is not None
                return index, as_waveform(self.inputs[index], self.sampling_rate)
            return index, load_audio(
                excerpt[0], start=excerpt[1], end=excerpt[2], max_seconds=self.max_seconds + 1
            )
        except SerError as error:
            return index, error


def load(folder: str | Path, *, device: str | torch.device = "cpu") -> Recognizer:
    """Load a recognizer from a model folder, ready to predict.

        recognizer = ser.load("runs/demo/best")
        prediction, = recognizer.predict("speech.wav")

    Args:
        folder: as training wrote it, or a Wav2Vec2ForCTC folder with its vocab.json.
        device: "cpu", "cuda", "cuda:1", as torch names it.

    Raises:
        ModelFolderError: the folder is incomplete or not what it claims to be.
    """
    return Recognizer.load(folder, device=device)


def build(config: Wav2Vec2Config, sizes: HeadsConfig) -> MultiTaskModel:
    """A model on the meta device, to be filled."""
    model = materialise(lambda: MultiTaskModel(config, sizes))
    assert isinstance(model, MultiTaskModel)
    return model


def read_labels(folder: Path, values: dict) -> dict[str, Any]:
    """What a folder says besides tensors: labels, vocabulary, preprocessing. ``values`` is its config.json."""
    own = values.get("ser", {})
    if not isinstance(own, dict):
        raise ModelFolderError(f"{folder / 'config.json'}: ser is {own!r}; expected an object")
    if own.get("format", FORMAT) != FORMAT:
        raise ModelFolderError(
            f"{folder / 'config.json'}: ser.format is {own['format']!r}, this version reads {FORMAT}; update ser"
        )
    id2label = values.get("id2label", {})
    numbers = [str(i) for i in range(len(id2label))] if isinstance(id2label, dict) else None
    if numbers is None or set(id2label) != set(numbers) or not all(isinstance(v, str) for v in id2label.values()):
        raise ModelFolderError(
            f'{folder / "config.json"}: id2label needs names for "0" to "K-1"; found {id2label!r}'
        )
    speakers = own.get("speakers", [])
    if not isinstance(speakers, list) or not all(isinstance(s, str) for s in speakers):
        raise ModelFolderError(f"{folder / 'config.json'}: ser.speakers needs a list of names")
    pooling, tags = own.get("pooling", "mean"), own.get("tags", "remove")
    orthography = own.get("orthography", "librispeech")
    if orthography not in ORTHOGRAPHIES:
        raise ModelFolderError(
            f"{folder / 'config.json'}: orthography {orthography!r} is unknown; there are {', '.join(ORTHOGRAPHIES)}"
        )
    do_normalize = True
    if (folder / "preprocessor_config.json").exists():
        preprocessor = read_json(folder, "preprocessor_config.json")
        rate = preprocessor.get("sampling_rate", SAMPLE_RATE)
        if rate != SAMPLE_RATE:
            raise ModelFolderError(
                f"{folder / 'preprocessor_config.json'}: sampling_rate is {rate!r}; supported: {SAMPLE_RATE}"
            )
        do_normalize = bool(preprocessor.get("do_normalize", True))
    vocabulary = None
    if (folder / "vocab.json").exists():
        delimiter = ORTHOGRAPHIES[orthography].word_delimiter
        vocabulary = Vocabulary.read(resolve_inside(folder, "vocab.json"), word_delimiter=delimiter)
    return {
        "emotions": [id2label[n] for n in numbers],
        "speakers": speakers,
        "vocabulary": vocabulary,
        "pooling": pooling,
        "orthography": orthography,
        "tags": tags,
        "do_normalize": do_normalize,
    }


def to_json(prediction: Prediction) -> str:
    """One line of JSON."""
    return json.dumps(prediction.to_dict(), ensure_ascii=False)

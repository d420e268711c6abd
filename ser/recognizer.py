"""Recognise speech with a model and everything that it needs: labels, vocabulary, preprocessing.

    recognizer = ser.load("runs/demo/best")
    for prediction in recognizer.predict(["a.wav", "b.flac"]):
        print(prediction.emotion, prediction.transcript)

A model folder holds a `Recognizer`. Training starts from a recognizer and saves it, so a folder that training
wrote is all that inference needs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby, islice
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ser import folder as folders
from ser.audio import SAMPLE_RATE, joined_warnings, normalise
from ser.data.dataset import SpeechDataset, pad
from ser.data.labels import LABELS, Labels
from ser.data.manifest import Utterance
from ser.data.text import ORTHOGRAPHIES
from ser.data.workers import AGAIN, WORKER_SECONDS, decoded, worker_death_explained
from ser.device import choose_precision
from ser.errors import AudioError, ConfigError, ModelFolderError, SerError, shorten
from ser.files import write_folder_atomically
from ser.inputs import Decoder, Input, each_of, find_recording, gather, open_windows, pack_decoded, plan_batches
from ser.models import pretrained
from ser.models.config import Wav2Vec2Config
from ser.models.heads import HEADS
from ser.models.multitask import MultiTaskModel, Outputs

LOG = logging.getLogger("ser")  # gets warnings about folders; they go to standard error by default
MAX_SECONDS = 120.0  # attention's memory grows with the square of the length
# Padded seconds per forward pass in inference. On a CPU more do not fit into its caches: 64 took a quarter longer.
BATCH_SECONDS = {"cpu": 16.0, "cuda": 64.0}


@dataclass(frozen=True)
class Prediction:
    """Hold what was recognised in one recording; None if the model has no such head."""

    file: str | None  # None for samples that were passed in memory
    seconds: float
    start: float | None = None  # of a window: its start and end, in seconds from the beginning of the file
    end: float | None = None
    kind: str | None = None  # "single-label", "multi-label" or "regression"; see `Recognizer.kind`
    emotion: str | None = None  # the likeliest emotion
    # Emotion -> probability, in the model's order; in a single-label model they sum to 1.
    probabilities: dict[str, float] | None = None
    dimensions: dict[str, float] | None = None  # such as arousal, on the scale of the training labels
    transcript: str | None = None
    speaker: str | None = None  # the most likely of the speakers in training
    speaker_probability: float | None = None
    warning: str | None = None  # why the result may mean nothing, such as silence; warnings are joined by "; "
    # Results of heads that were added to `HEADS`: numbers by their names, or the likeliest class.
    others: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict:
        """Return plain data for JSON; ``others`` only if it is not empty."""
        values = asdict(self)
        return values if self.others else {name: values[name] for name in values if name != "others"}


def given_labels(labels: Labels | None, fields: Mapping[str, Any]) -> Labels:
    """Return the labels, or make them from their fields; a TypeError says that both were given."""
    if labels is not None and fields:
        raise TypeError(f"labels are given, and so are {', '.join(fields)}: give one of the two")
    return Labels.of(**fields) if labels is None else labels


class Recognizer:
    """Hold a multi-task model with its labels, vocabulary and preprocessing, and predict with it.

    Attributes:
        model: the `MultiTaskModel`.
        labels: its `Labels`. Their fields are also attributes: emotions, speakers, dimensions, multi_label,
            vocabulary, orthography, tags, do_normalize.
        precision: the type in which the model predicts, torch.float32 or torch.bfloat16. The latter is faster on
            processors with the instructions, and scores have two to three exact digits. The encoder's weights are
            then rounded: such a model can predict and be evaluated, but not be saved or trained. Call the model
            itself inside of `autocast`.
    """

    precision = torch.float32

    def __init__(self, model: MultiTaskModel, labels: Labels | None = None, **fields: Any) -> None:
        """Put a model and its labels together.

        ``fields``, instead of ``labels``, are those of `Labels.of`: emotions, speakers, dimensions, vocabulary ...

        Raises:
            ConfigError: the number of labels is not that of the heads' outputs.
        """
        self.model, self.labels = model, given_labels(labels, fields)
        expected = model.heads_config.sizes
        found = {head: self.labels.sizes.get(head, 0) for head in expected}
        if found != expected:
            usual = {"emotion": "emotions", "ctc": "symbols", "speaker": "speakers"}
            what = ", ".join(usual.get(head, head) for head in expected)
            raise ConfigError(
                f"labels and heads disagree: ({what}) are {tuple(found.values())}, the heads "
                f"have {tuple(expected.values())}"
            )

    emotions = property(attrgetter("labels.emotions"), doc="Return the emotion head's classes, in their order.")
    speakers = property(attrgetter("labels.speakers"), doc="Return the speaker head's classes, in their order.")
    dimensions = property(attrgetter("labels.dimensions"), doc="Return the names of the dimension head's numbers.")
    multi_label = property(attrgetter("labels.multi_label"), doc="Tell whether several emotions can be right.")
    vocabulary = property(attrgetter("labels.vocabulary"), doc="Return the CTC symbols, None without a CTC head.")
    orthography = property(attrgetter("labels.orthography"), doc="Return how training wrote its text.")
    tags = property(attrgetter("labels.tags"), doc="Return what training did with tags in its text.")
    do_normalize = property(attrgetter("labels.do_normalize"), doc="Tell whether waveforms are normalised.")

    @property
    def kind(self) -> str | None:
        """Tell how the model predicts emotions.

        "single-label" gives one emotion, and probabilities that sum to 1. "multi-label" gives an independent
        probability for each emotion. "regression" gives numbers by their names, in `Prediction.dimensions`. None:
        the model does not predict emotions.
        """
        if self.emotions:
            return "multi-label" if self.multi_label else "single-label"
        return "regression" if self.dimensions else None

    def require_single_label(self, purpose: str) -> None:
        """Raise ConfigError if several emotions can be right at once."""
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
        labels: Labels | None = None,
        *,
        pooling: str | None = None,
        layers: str | None = None,
        seed: int = 0,
        **fields: Any,
    ) -> tuple[Recognizer, pretrained.LoadReport]:
        """Make a recognizer to train: the encoder of ``init`` and heads for these labels.

        ``init`` is a preset (small, base, large, large-lv60: random weights) or a model folder. A head of the
        folder is kept if its labels (or symbols) and its input are the same; other heads are new. Sound is
        normalised as the folder says. Random weights depend only on ``seed``. ``pooling`` and ``layers`` are those
        of `HeadsConfig`; None: as in the folder, else mean and last. ``fields``, instead of ``labels``, are those
        of `Labels.of`.
        """
        labels = given_labels(labels, fields)
        reads = {name: value for name, value in (("pooling", pooling), ("layers", layers)) if value is not None}
        if not folders.is_preset(init):
            return cls.from_encoder(pretrained.find_folder(init), labels, reads, seed=seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = MultiTaskModel(Wav2Vec2Config.named(str(init)), folders.head_config(labels, reads))
        return cls(model, labels), pretrained.LoadReport(Path(init), new=model.names_on_encoder())

    @classmethod
    def from_encoder(
        cls, folder: Path, labels: Labels, reads: dict[str, Any], *, seed: int
    ) -> tuple[Recognizer, pretrained.LoadReport]:
        """Make a recognizer to train on the encoder of a folder; see `create`."""
        config, values = pretrained.read_encoder_config(folder)
        files = pretrained.TensorFiles(folder)
        own = folders.read_settings(folder, values, files)
        if labels.vocabulary is not None:
            rows = folders.rows_of(files, "lm_head")
            own.vocabulary = folders.read_vocabulary(
                folder, own.orthography, rows=rows, values=values, notes=own.notes
            )
        heads = folders.head_config(labels, own.reads | reads)
        same_input = folders.head_config(labels, own.reads) == heads
        # The raw names: a head that is made anew may have had any, even one twice.
        kept = {row.key: same_input and own.names.get(h) == labels.names.get(h) for h, row in HEADS.items()}
        kept["lm_head"] = own.vocabulary is not None and own.vocabulary == labels.vocabulary
        if own.multi_label and labels.emotions:
            kept["cls_head"] = False
            own.notes.append("the emotion head there is of several labels at once (multi-label): it is made anew")
        model = pretrained.materialise(lambda: MultiTaskModel(config, heads))
        report = pretrained.LoadReport(folder, notes=own.notes)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            pretrained.fill_encoder(model.wav2vec2, files, report)
            for part, tensors in groupby(model.names_on_encoder(), lambda name: name.split(".")[0]):
                names = [*tensors]
                if kept.get(part, same_input) and not files.shapes.keys().isdisjoint(names):
                    pretrained.fill(model, files, report, names)
                    report.unused = [name for name in report.unused if name not in names]
                else:
                    model.initialise(part)
                    report.new += names
        return cls(model, replace(labels, do_normalize=own.do_normalize)), report

    @classmethod
    def load(
        cls,
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
            folder: a folder from training; or one saved by ForCTC (with its vocab.json) or
                ForSequenceClassification of `transformers`, for wav2vec 2.0, HuBERT, WavLM or data2vec-audio;
                audEERING's dimensional model or the ForSpeechClassification of a widespread notebook; or the
                OWNER/NAME of such a model on the Hugging Face hub (with the extra `hub`).
            device: "cpu", "cuda", "cuda:1", as torch names it.
            revision: branch, tag or commit on the hub.
            precision: "float32"; "bf16", faster on processors with the instructions; or "auto", which chooses.
                In bf16 the recognizer can predict and be evaluated, but not be trained or saved.

        Raises:
            ModelFolderError: the folder is incomplete or not what it claims to be.
        """
        dtype = choose_precision(precision, torch.device(device))
        folder = pretrained.find_folder(folder, revision=revision)
        config, values = pretrained.read_encoder_config(folder)
        files = pretrained.TensorFiles(folder)
        folders.check_classifier(folder, files)
        own = folders.read_settings(folder, values, files)
        heads = folders.heads_of(files)
        if "ctc" in heads:  # without a CTC head, a vocab.json may be of any other program
            folders.read_own_vocabulary(folder, own, files, values)
        try:
            labels = own.labels(heads)
            folders.check_heads(folder, heads, labels)
            sizes = folders.head_config(labels, own.reads)
            recognizer = cls(pretrained.materialise(lambda: MultiTaskModel(config, sizes)), labels)
        except ConfigError as error:
            raise ModelFolderError(f"{folder / 'config.json'}: {shorten(str(error))}") from None
        recognizer.precision = dtype
        model, report = recognizer.model, pretrained.LoadReport(folder)
        pretrained.fill_encoder(model.wav2vec2, files, report)
        pretrained.fill(model, files, report, model.names_on_encoder())
        if dtype != torch.float32:
            model.wav2vec2.round_weights(dtype)
        model.eval().to(device)
        for note in own.notes:
            LOG.warning("%s: %s", folder, note)
        return recognizer

    def autocast(self) -> torch.autocast:
        """Return the context in which the model computes in `precision`; it has no effect at float32."""
        return torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32)

    def require_float32(self, purpose: str) -> None:
        """Raise ConfigError if weights were rounded when they were loaded."""
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
        """Write a model folder completely or not at all, and replace an older one.

        ``tensors``, by the model's names, are written instead of its own, for example those of an earlier step
        (see `Saver`). ``also`` may write further files into the folder before it is put into place. FileError is
        raised if the disk cannot hold the folder.

        `transformers` loads the encoder from it with its Model class, the CTC head with ForCTC, and the classifier
        with ForSequenceClassification if config.json names this class.
        """
        if tensors is None:
            self.require_float32("to save it")
        folder = Path(folder)
        folders.is_replaced(folder)  # refuses anything that is not a model folder
        tensors = self.model.state_dict() if tensors is None else tensors
        size = sum(tensor.nbytes for tensor in tensors.values())

        def write(new: Path) -> None:
            self.write_files(new, tensors)
            if also is not None:
                also(new)

        write_folder_atomically(folder, write, size=size)

    def write_files(self, folder: Path, tensors: Mapping[str, Tensor] | None = None) -> None:
        """Write the files of a model folder into an existing folder; ``tensors`` as in `save`."""
        tensors = self.model.state_dict() if tensors is None else tensors
        folders.write_model_files(folder, self.model, self.labels, tensors)

    def keys(self) -> dict[str, str]:
        """Map the names of the model's tensors to their keys in ``model.safetensors``."""
        return folders.written_keys(self.model)

    # ------------------------------------------------------------------------------------ using one

    def dataset(self, utterances: Sequence[Utterance]) -> SpeechDataset:
        """Make a dataset of utterances with this model's labels, vocabulary and preprocessing."""
        return SpeechDataset(utterances, self.labels)

    @property
    def device(self) -> torch.device:
        """Return the device that the model is on."""
        return next(self.model.parameters()).device

    @property
    def batch_seconds(self) -> float:
        """Return the padded seconds per forward pass on the model's device."""
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
                or integer PCM, numpy or torch), a dict from `datasets` (array, sampling_rate, path), or an
                iterable of these, such as a list, a generator or an array or column of paths.
            sampling_rate: the rate of samples that are passed as arrays, in Hz; files and dicts have their own.
            workers: processes that decode audio; 0: this process decodes.
            max_seconds: longer recordings are refused.
            timeout: the limit of a wait for a worker, in seconds.

        Returns:
            one `Prediction` for each input, in their order.

        Raises:
            AudioError: a recording cannot be read, or is too long. (`stream` would continue.)
            ResourceError: a worker was killed, or returned nothing in time.
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
        """Recognise lazily and in limited memory; for a bad recording yield its error, and continue.

        From a generator, one batch (`batch_seconds`, at most 64 recordings) is read before the first result. Later
        more recordings are read at a time and sorted by length, so that there is less padding. From a slow source,
        such as a microphone, results still come batch by batch. Each of ``workers`` has two more batches in
        progress. From a list, 512 recordings are sorted together.
        """
        if not max_seconds > 0:
            raise ConfigError(f"max_seconds is {max_seconds!r}; expected a number above 0")
        items = each_of(inputs)
        recordings = (find_recording(i, item, sampling_rate, max_seconds) for i, item in enumerate(items))
        there = hasattr(items, "__len__") and hasattr(items, "__getitem__")  # all inputs exist already
        runs = gather(recordings, None if there else self.batch_seconds)
        batches = plan_batches(runs, self.batch_seconds)  # their items are recordings, not numbers
        loader = decoded(Decoder(), batches, pack_decoded, workers=workers, timeout=timeout, then=AGAIN)
        # Batches come by length, results go out in the order of the inputs.
        waiting: dict[int, Prediction | SerError] = {}
        position = 0
        with worker_death_explained(AGAIN), closing(loader):
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
        self, source: Input, sampling_rate: int | None = None, *, window: float = 20.0, hop: float | None = None
    ) -> Iterator[Prediction]:
        """Recognise a recording of any length lazily, window by window; memory does not grow with the length.

            for prediction in recognizer.predict_windows("lecture.flac", window=10, hop=5):
                print(prediction.start, prediction.end, prediction.emotion)

        Each window is normalised and recognised like a separate recording, so its prediction is that of
        ``Utterance(file, start, end)``. Emotion models were trained on utterances of some seconds; a word that is
        cut at the edge of a window is missing in its transcript.

        Args:
            source: a path, samples, or a dict, as for `predict`; or a manifest row, whose excerpt is cut into
                windows.
            sampling_rate: the rate of samples, in Hz.
            window: the length of a window in seconds, at most 120. A remainder shorter than a second (or than a
                shorter window) is joined to the last window.
            hop: seconds from the start of one window to the start of the next; None: ``window``, without overlap.

        Yields:
            a `Prediction` for each window, with its ``start`` and ``end``, in order.

        Raises:
            AudioError: the recording cannot be read; windows before the damage have been yielded.
            ConfigError: window or hop is out of range.
        """
        if not 0 < window <= MAX_SECONDS:
            raise ConfigError(f"window is {window!r} s; expected above 0 and at most {MAX_SECONDS:g}")
        file, windows = open_windows(source, sampling_rate, window=window, hop=window if hop is None else hop)
        at_once = max(1, int(self.batch_seconds // window))
        damage: AudioError | None = None
        while damage is None:
            group: list[tuple[float, float, Tensor, str | None]] = []
            try:
                group.extend(islice(windows, at_once))  # keeps the windows before an error
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

    def prepare(self, waveforms: Sequence[Tensor]) -> tuple[Tensor, Tensor, list[str | None]]:
        """Make a batch of (S,) waveforms at 16 kHz: padded (B, S) on the device, num_samples (B,), warnings."""
        minimum = self.model.config.min_samples
        prepared, warnings = [], []
        for waveform in waveforms:
            x = normalise(waveform) if self.do_normalize else waveform
            short = len(x) < minimum
            warnings.append(
                f"{len(x)} samples are shorter than one frame; padded with silence to {minimum}" if short else None
            )
            prepared.append(F.pad(x, (0, minimum - len(x))) if short else x)
        return pad(prepared).to(self.device), torch.tensor([len(x) for x in prepared]), warnings

    @torch.inference_mode()
    def predict_waveforms(self, waveforms: Sequence[Tensor]) -> list[Prediction]:
        """Recognise one batch of (S,) float waveforms at 16 kHz, in one forward pass."""
        padded, num_samples, warnings = self.prepare(waveforms)
        was_training = self.model.training
        self.model.eval()
        try:
            with self.autocast():
                outputs = self.model(padded, num_samples)
        finally:
            self.model.train(was_training)
        return [
            replace(prediction, seconds=len(waveform) / SAMPLE_RATE, warning=warning)
            for prediction, waveform, warning in zip(self.decode(outputs), waveforms, warnings, strict=True)
        ]

    def decode(self, outputs: Outputs) -> list[Prediction]:
        """Turn the scores of a batch into names and text; ``file`` and ``seconds`` are not set."""
        answers: list[dict[str, Any]] = [{"kind": self.kind} for _ in outputs.num_frames]
        for head, scores in outputs.scores.items():
            if LABELS[head].kind == "text":
                self.decode_text(scores.argmax(-1).cpu(), outputs.num_frames, answers)
            elif LABELS[head].kind == "numbers":
                self.decode_numbers(head, scores.float().cpu(), answers)
            else:
                independent = head == "emotion" and self.multi_label
                shares = scores.float().sigmoid() if independent else scores.float().softmax(-1)
                self.decode_classes(head, shares.cpu(), answers)
        return [Prediction(file=None, seconds=0.0, **answer) for answer in answers]

    def decode_text(self, symbols: Tensor, num_frames: Tensor, answers: list[dict[str, Any]]) -> None:
        """Add the transcripts of the likeliest symbols (B, T) to the answers."""
        assert self.vocabulary is not None
        present = ORTHOGRAPHIES[self.orthography].present
        for answer, row, frames in zip(answers, symbols, num_frames.tolist(), strict=True):
            answer["transcript"] = present(self.vocabulary.decode(row[:frames].tolist()))

    def decode_numbers(self, head: str, values: Tensor, answers: list[dict[str, Any]]) -> None:
        """Add numbers (B, K) with their names to the answers."""
        for answer, row in zip(answers, values, strict=True):
            place = answer if head == "dimensions" else answer.setdefault("others", {})
            place[head] = dict(zip(self.labels.names[head], row.tolist(), strict=True))

    def decode_classes(self, head: str, shares: Tensor, answers: list[dict[str, Any]]) -> None:
        """Add the likeliest class of each row of probabilities (B, K) to the answers."""
        names = self.labels.names[head]
        for answer, row in zip(answers, shares, strict=True):
            best = int(row.argmax())
            place = answer if head in ("emotion", "speaker") else answer.setdefault("others", {})
            place[head] = names[best]
            if head == "emotion":
                answer["probabilities"] = dict(zip(names, row.tolist(), strict=True))
            elif head == "speaker":
                answer["speaker_probability"] = float(row[best])


load = Recognizer.load  # as `ser.load`

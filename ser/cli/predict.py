"""Recognise emotion, transcript and speaker in recordings.

Files, whole folders and manifests, in one table:

    ser predict speech.wav recordings/ test.csv --model runs/demo/best

A million files with eight decoding processes on a GPU, one JSON object per line:

    ser predict recordings/ --model runs/demo/best --format jsonl --output predictions.jsonl \\
        --device cuda --workers 8

A lecture of any length, in windows of ten seconds that begin every five seconds:

    ser predict lecture.flac --model runs/demo/best --window 10 --hop 5 --format csv

The predictions file of Cai et al. (INTERSPEECH 2021), for their fold of IEMOCAP:

    ser predict iemocap_01F.test.csv --root IEMOCAP_full_release --model runs/01F/best --format paper

A folder stands for all recordings in it, at any depth and in sorted order. Recordings are recognised by suffix:
.wav, .flac, .ogg, .mp3. Files whose suffix says sound or video that cannot be read, such as .m4a, .opus or .mp4,
appear with their error. Links to folders are followed; hidden files and folders are left out. A file that is named
itself is read whatever its suffix is. Results come in the order of the inputs. A recording that cannot be read is
reported, and appears with its error in json, jsonl and csv, while the others go on.

The exit status is 0 if all recordings were recognised, 1 if some could not be read, and 2 if the command could not
go on (no model, no input, a decoding process died or hung). With 2, --output was not written.
"""

import io
import os
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import torch
from tqdm import tqdm

from ser.audio import audio_info
from ser.containers import OTHER_SUFFIXES, SUFFIXES, begins_as_sound
from ser.data.manifest import Utterance, parse_columns, read_manifest
from ser.data.workers import AGAIN, WORKER_SECONDS, worker_death_explained
from ser.device import freed_memory_kept
from ser.errors import AudioError, ConfigError, SerError, printable
from ser.files import check_can_write, files_below, replace_file, written
from ser.recognizer import MAX_SECONDS, Prediction, Recognizer
from ser.writers import FORMATS, Record, as_record

Source = str | Utterance  # an input: a file, or a row of a manifest
Result = tuple[Source, Prediction | SerError]

RECORDINGS = SUFFIXES + OTHER_SUFFIXES
MANIFESTS = (".csv", ".tsv", ".jsonl", ".json")
LISTS = (".txt", ".lst", ".list", ".scp", ".xls", ".xlsx", ".ods", ".parquet")  # lists that are not manifests
# Files that loading a model reads, besides *.safetensors
MODEL_FILES = ("config.json", "vocab.json", "tokens.json", "tokens_map.json", "tokenizer.json", "index.json")


@contextmanager
def errors_told() -> Iterator[None]:
    """End the process with one line and status 2 if the command cannot continue."""
    try:
        with worker_death_explained(AGAIN):
            yield
    except BrokenPipeError:  # the reader has closed the pipe, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except (SerError, OSError) as error:
        print(f"error: {printable(str(error), lines=isinstance(error, SerError))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def usable_device(name: str) -> torch.device:
    """Return the device of that name, after a test with a tensor; "auto" is a GPU if there is one."""
    device = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ArgumentTypeError(f"{name!r} cannot be used: {str(error).splitlines()[0]}") from None


def add_arguments(parser: ArgumentParser) -> None:
    """Add the flags of the command."""
    parser.add_argument("inputs", nargs="+", type=Path, metavar="INPUT",
                        help="recording, folder, or manifest (.csv, .tsv, .jsonl, .json)")  # fmt: skip
    add = parser.add_argument_group("model and answers").add_argument
    add("--model", required=True, help="model folder, or its OWNER/NAME on the Hugging Face hub")
    add("--format", choices=sorted(FORMATS), default="table",
        help="table fits the terminal and cuts what is long; csv, json and jsonl hold everything; "
        "paper: name, seconds, class, probabilities, the four classes of the paper numbered as "
        "there and others as in the model (default: %(default)s)")  # fmt: skip
    add("--output", type=Path, help="file to write, whole or not at all (default: standard output)")
    add("--device", type=usable_device, default="auto",
        help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")  # fmt: skip
    add = parser.add_argument_group("long recordings").add_argument
    add("--window", type=float, metavar="SECONDS",
        help="recognise each recording window by window, of any length and in bounded memory: a "
        "line for each window, as if it were a recording of its own; some seconds, as utterances "
        "in training are (default: a recording is one)")  # fmt: skip
    add("--hop", type=float, metavar="SECONDS",
        help="from the start of a window to that of the next (default: --window)")  # fmt: skip
    add("--max-seconds", type=float, default=MAX_SECONDS,
        help="refuse longer ones: memory grows as the square (default: %(default)g)")  # fmt: skip
    add = parser.add_argument_group("manifests").add_argument
    add("--root", type=Path, help="folder that a manifest's files are relative to")
    add("--columns", nargs="*", default=[], metavar="OURS=THEIRS", help="such as file=path")
    add = parser.add_argument_group("speed, and the hub").add_argument
    add("--precision", choices=("float32", "bf16", "auto"), default="float32",
        help="bf16: faster on processors with the instructions, scores keep two digits or three; "
        "auto: bf16 where it is faster (default: %(default)s)")  # fmt: skip
    add("--workers", type=int, choices=range(65), default=0, metavar="N",
        help="processes that decode audio (default: %(default)s, this one does)")  # fmt: skip
    add("--timeout", type=float, default=WORKER_SECONDS, metavar="SECONDS",
        help="to wait for one of them before giving up (default: %(default)g)")  # fmt: skip
    add("--revision", help="branch, tag or commit of --model on the hub")


# ----------------------------------------------------------------------------------------------------- inputs


def is_recording(path: str) -> bool:
    """Tell whether a file is a recording, by its suffix, or by its first bytes if it has none."""
    suffix = os.path.splitext(path)[1].lower()  # noqa: PTH122
    if any(letter.isalpha() for letter in suffix):
        return suffix in RECORDINGS
    return begins_as_sound(Path(path))


def warn(text: str) -> None:
    """Print a warning."""
    print(f"warning: {printable(text)}", file=sys.stderr)


def recordings_in(folder: Path) -> list[str]:
    """List the recordings in a folder, at any depth and in sorted order."""
    try:
        return sorted(filter(is_recording, files_below(folder, hidden=False, say=warn)))
    except OSError as error:
        raise ConfigError(f"{error.filename}: cannot be listed: {error.strerror}") from None


def find_inputs(arguments: Namespace) -> list[Source]:
    """Return everything that is to be recognised, in order."""
    columns = parse_columns(arguments.columns)
    inputs: list[Source] = []
    for path in arguments.inputs:
        if path.is_dir():
            inputs += recordings_in(path)
        elif path.suffix.lower() in MANIFESTS:
            # A missing recording is reported at its position, like a damaged one.
            inputs += read_manifest(path, root=arguments.root, columns=columns, check_files=False)
        elif path.suffix.lower() in LISTS and path.is_file() and not begins_as_sound(path):
            raise ConfigError(
                f"{path}: is no recording and no manifest; a list of recordings is a CSV whose first line is "
                f"`file`, for example: (echo file; cat {path}) > list.csv"
            )
        else:
            inputs.append(str(path))
    if not inputs:
        folders = ", ".join(map(str, arguments.inputs))
        raise ConfigError(f"{folders}: no recordings found; a folder's are those in {', '.join(SUFFIXES)}")
    return inputs


# ----------------------------------------------------------------------------------------------------- output


def is_same_file(source: Source, there: os.stat_result) -> bool:
    """Tell whether an input is the file with this status (`os.stat`)."""
    try:
        file = source.file if isinstance(source, Utterance) else source
        return os.path.samestat(os.stat(file), there)  # noqa: PTH116
    except (OSError, ValueError):
        return False


def check_output(output: Path, model: Path, inputs: list[Source]) -> None:
    """Refuse, before any work, an output that cannot be written or would replace an input or the model."""
    with written(output):
        check_can_write(output)
    if not output.is_file():
        return
    there, advice = output.stat(), "would be replaced; give another --output"
    if output.suffix.lower() in RECORDINGS:
        raise ConfigError(f"{output}: is a recording by its name, and {advice}")
    if any(is_same_file(source, there) for source in inputs):
        raise ConfigError(f"{output}: is one of the inputs, and {advice}")
    if output.resolve().parent == model.resolve() and output.name.endswith((".safetensors", *MODEL_FILES)):
        raise ConfigError(f"{output}: belongs to the model, and {advice}")


@contextmanager
def output_file(path: Path | None, *, as_table: bool) -> Iterator[TextIO]:
    """Open the output file or standard output, in UTF-8; a table on a terminal has the terminal's encoding."""
    if path is not None:
        with written(path), replace_file(path) as file:
            yield file
        return
    assert isinstance(sys.stdout, io.TextIOWrapper)
    sys.stdout.reconfigure(encoding=None if as_table else "utf-8", errors="backslashreplace")
    yield sys.stdout


# ------------------------------------------------------------------------------------------------------- work


def check_together(arguments: Namespace) -> None:
    """Refuse flags that contradict each other."""
    if arguments.window is None:
        if arguments.hop is not None:
            raise ConfigError("--hop is between windows: give --window too")
        return
    if arguments.workers:
        raise ConfigError("--workers decode whole recordings: with --window this process does, leave it out")
    if arguments.max_seconds != MAX_SECONDS:
        raise ConfigError("--max-seconds is for whole recordings: with --window none is too long")
    if arguments.format == "paper":
        raise ConfigError("the paper's format has no place for windows: use csv or jsonl")


def recognise_windows(recognizer: Recognizer, inputs: list[Source], arguments: Namespace) -> Iterator[Result]:
    """Recognise every window of every input; an input that cannot be read yields its error."""
    for source in inputs:
        try:
            for prediction in recognizer.predict_windows(source, window=arguments.window, hop=arguments.hop):
                yield source, prediction
        except AudioError as error:
            yield source, error


def recognise_inputs(recognizer: Recognizer, inputs: list[Source], arguments: Namespace) -> Iterable[Result]:
    """Recognise the inputs in order, as the flags say."""
    if arguments.window is not None:
        return recognise_windows(recognizer, inputs, arguments)
    options = {name: getattr(arguments, name) for name in ("workers", "max_seconds", "timeout")}
    return zip(inputs, recognizer.stream(inputs, **options), strict=True)


def header_seconds(source: Source) -> float:
    """Read the length of an input from its header; 0 if it cannot be read."""
    row = source if isinstance(source, Utterance) else Utterance(id=source, file=Path(source))
    try:
        return audio_info(row.file, start=row.start, end=row.end, max_seconds=float("inf")).seconds
    except SerError:
        return 0.0


class ProgressBar:
    """Show progress and errors on standard error, and count the failures."""

    def __init__(self, inputs: list[Source], *, in_windows: bool, silent: bool) -> None:
        total = sum(map(header_seconds, inputs)) if in_windows else len(inputs)
        self.in_windows = in_windows
        self.bar = tqdm(total=total, unit="s" if in_windows else "file", disable=silent)
        self.failed = 0
        self.reached = 0.0  # position in the present recording, in seconds

    def advance(self, source: Source, record: Record) -> None:
        """Move the bar by one file, or by the seconds between the ends of two windows."""
        if not self.in_windows:
            self.bar.update()
        elif record["error"] is None:
            end = record["end"] - ((source.start or 0.0) if isinstance(source, Utterance) else 0.0)
            self.bar.update(end - self.reached if end > self.reached else end)
            self.reached = end

    def records(self, results: Iterable[Result]) -> Iterator[Record]:
        """Pass the results on as records."""
        for source, result in results:
            record = as_record(source, result)
            if record["error"] is not None:
                self.failed += 1
                self.bar.write(f"error: {printable(record['error'])}", file=sys.stderr)
            elif record["warning"] is not None:
                self.bar.write(f"warning: {printable(record['file'])}: {record['warning']}", file=sys.stderr)
            self.advance(source, record)
            yield record


def run(arguments: Namespace) -> int:
    """Recognise the inputs and write the predictions; the exit status is 1 if some could not be read."""
    inputs = find_inputs(arguments)
    check_together(arguments)
    if arguments.output is not None:
        check_output(arguments.output, Path(arguments.model), [*map(str, arguments.inputs), *inputs])
    recognizer = Recognizer.load(
        arguments.model, device=arguments.device, revision=arguments.revision, precision=arguments.precision
    )
    results = recognise_inputs(recognizer, inputs, arguments)
    silent = (arguments.output is None and sys.stdout.isatty()) or not sys.stderr.isatty()
    progress = ProgressBar(inputs, in_windows=arguments.window is not None, silent=silent)
    output = output_file(arguments.output, as_table=arguments.format == "table")
    with freed_memory_kept(recognizer.device), progress.bar, output as file:
        for text in FORMATS[arguments.format](progress.records(results), recognizer):
            # Names that are not UTF-8 hold lone surrogates: \udc80, which JSON reads back.
            file.write(text.encode("utf-8", "backslashreplace").decode("utf-8"))
            file.flush()
    if progress.failed and len(inputs) > 1:
        print(f"{progress.failed} of {len(inputs)} recordings could not be read", file=sys.stderr)
    return 1 if progress.failed else 0

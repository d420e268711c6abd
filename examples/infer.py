"""Recognise emotion, transcript and speaker in recordings.

Files, whole folders and manifests, in one table:

    python examples/infer.py speech.wav recordings/ test.csv --model runs/demo/best

A million files with eight decoding processes on a GPU, one JSON object per line:

    python examples/infer.py recordings/ --model runs/demo/best --format jsonl --output predictions.jsonl \\
        --device cuda --workers 8

A lecture of any length, every five seconds an emotion of the ten around it:

    python examples/infer.py lecture.flac --model runs/demo/best --window 10 --hop 5 --format csv

The predictions file of Cai et al. (INTERSPEECH 2021), for their fold of IEMOCAP:

    python examples/infer.py iemocap_01F.test.csv --root IEMOCAP_full_release --model runs/01F/best --format paper

A folder stands for all recordings in it, at any depth and in sorted order, by suffix: .wav, .flac, .ogg, .mp3, and
those that are sound or video and cannot be read, such as .m4a, .opus or .mp4, which stand there with their error.
Links to folders are followed; hidden files and folders are left out. A file that is named itself is read whatever
its suffix is. Results come in the order of the inputs. A recording that cannot be read is reported, and stands
with its error in json, jsonl and csv, while the others go on.

Exit status: 0 if all were recognised, 1 if some could not be read, 2 if it could not go on (no model, no input, a
decoding process died or hung); then --output was not written.
"""

from __future__ import annotations

import gc

gc.disable()  # imports make 280,000 objects that stay: to look through them for garbage takes 0.4 s

import argparse
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch
from tqdm import tqdm

from ser.audio import audio_info
from ser.containers import OTHER_SUFFIXES, SUFFIXES
from ser.data.manifest import PAPER_EMOTIONS, Utterance, parse_columns, read_manifest
from ser.data.workers import AGAIN, WORKER_SECONDS, worker_death_explained
from ser.device import freed_memory_kept
from ser.errors import AudioError, ConfigError, SerError, printable
from ser.files import check_can_write, csv_line, files_below, finite, replace_file, written
from ser.recognizer import MAX_SECONDS, Prediction, Recognizer

RECORDINGS = SUFFIXES + OTHER_SUFFIXES
MANIFESTS = (".csv", ".tsv", ".jsonl", ".json")
LISTS = (".txt", ".lst", ".list", ".scp", ".xls", ".xlsx", ".ods", ".parquet")  # that are taken for manifests
# What loading a model reads, beside *.safetensors
MODEL_FILES = ("config.json", "vocab.json", "tokens.json", "tokens_map.json", "tokenizer.json", "index.json")


def usable_device(name: str) -> torch.device:
    device = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{name!r} cannot be used: {reason}") from None


def parse_arguments() -> argparse.Namespace:
    description, _, usage = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=usage, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("inputs", nargs="+", type=Path, metavar="INPUT",
                        help="recording, folder, or manifest (.csv, .tsv, .jsonl, .json)")  # fmt: skip
    parser.add_argument("--model", required=True,
                        help="model folder, or its OWNER/NAME on the Hugging Face hub")  # fmt: skip
    parser.add_argument("--revision", help="branch, tag or commit of --model on the hub")
    parser.add_argument("--format", choices=sorted(FORMATS), default="table",
                        help="table fits the terminal and cuts what is long; csv, json and jsonl hold everything; "
                        "paper: name, seconds, class, probabilities, the four classes of the paper numbered as "
                        "there and others as in the model (default: %(default)s)")  # fmt: skip
    parser.add_argument(
        "--output", type=Path, help="file to write, whole or not at all (default: standard output)"
    )
    parser.add_argument("--device", type=usable_device, default="auto",
                        help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")  # fmt: skip
    parser.add_argument("--precision", choices=("float32", "bf16", "auto"), default="float32",
                        help="bf16: faster on processors with the instructions, scores keep two digits or three; "
                        "auto: bf16 where it is faster (default: %(default)s)")  # fmt: skip
    parser.add_argument("--workers", type=int, choices=range(65), default=0, metavar="N",
                        help="processes that decode audio (default: %(default)s, this one does)")  # fmt: skip
    parser.add_argument("--timeout", type=float, default=WORKER_SECONDS, metavar="SECONDS",
                        help="to wait for one of them before giving up (default: %(default)g)")  # fmt: skip
    parser.add_argument("--max-seconds", type=float, default=MAX_SECONDS,
                        help="refuse longer ones: memory grows as the square (default: %(default)g)")  # fmt: skip
    parser.add_argument("--window", type=float, metavar="SECONDS",
                        help="recognise each recording window by window, of any length and in bounded memory: a "
                        "line for each window, as if it were a recording of its own; some seconds, as utterances "
                        "in training are (default: a recording is one)")  # fmt: skip
    parser.add_argument("--hop", type=float, metavar="SECONDS",
                        help="from the start of a window to that of the next (default: --window)")  # fmt: skip
    parser.add_argument("--root", type=Path, help="folder that a manifest's files are relative to")
    parser.add_argument("--columns", nargs="*", default=[], metavar="OURS=THEIRS", help="such as file=path")
    return parser.parse_args()


def begins_as_sound(path: Path) -> bool:
    """Tell whether a file begins as sound does. A broken link counts too, so that its error is shown."""
    try:
        if not path.is_file():
            return path.is_symlink() and not path.exists()
        with path.open("rb") as file:
            head = file.read(12)
    except OSError:
        return False
    if head.startswith(b"\xff") and len(head) > 1:
        return head[1] & 0xE6 == 0xE2  # of MPEG audio, layer III
    return head.startswith((b"fLaC", b"OggS", b"ID3")) or head[8:] in (b"WAVE", b"M4A ")


def is_recording(path: str) -> bool:
    suffix = os.path.splitext(path)[1].lower()  # noqa: PTH122
    if any(letter.isalpha() for letter in suffix):
        return suffix in RECORDINGS
    return begins_as_sound(Path(path))


def warn(text: str) -> None:
    print(f"warning: {printable(text)}", file=sys.stderr)


def recordings_in(folder: Path) -> list[str]:
    """List what is a recording by its name, or, where the name says nothing, by its first bytes."""
    try:
        return sorted(filter(is_recording, files_below(folder, hidden=False, say=warn)))
    except OSError as error:
        raise ConfigError(f"{error.filename}: cannot be listed: {error.strerror}") from None


# ----------------------------------------------------------------------------------------------------- inputs


def find_inputs(arguments: argparse.Namespace) -> list[str | Utterance]:
    columns = parse_columns(arguments.columns)
    found: list[str | Utterance] = []
    for path in arguments.inputs:
        if path.is_dir():
            found += recordings_in(path)
        elif path.suffix.lower() in MANIFESTS:
            # A missing recording is reported in its place, like one that is damaged.
            found += read_manifest(path, root=arguments.root, columns=columns, check_files=False)
        elif path.suffix.lower() in LISTS and path.is_file() and not begins_as_sound(path):
            raise ConfigError(
                f"{path}: is no recording and no manifest; a list of recordings is a CSV whose first line is "
                f"`file`, for example: (echo file; cat {path}) > list.csv"
            )
        else:
            found.append(str(path))
    if not found:
        folders = ", ".join(map(str, arguments.inputs))
        raise ConfigError(f"{folders}: no recordings found; a folder's are those in {', '.join(SUFFIXES)}")
    return found


def check_output(output: Path, model: Path, inputs: list[str | Utterance]) -> None:
    """Refuse, before any work, what cannot be written, or would replace a recording, a manifest or the model."""
    with written(output):
        check_can_write(output)
    if not output.is_file():
        return
    there, advice = output.stat(), "would be replaced; give another --output"
    if output.suffix.lower() in RECORDINGS:
        raise ConfigError(f"{output}: is a recording by its name, and {advice}")
    for source in inputs:
        try:
            same = os.path.samestat(os.stat(source.file if isinstance(source, Utterance) else source), there)  # noqa: PTH116
        except (OSError, ValueError):
            continue
        if same:
            raise ConfigError(f"{output}: is one of the inputs, and {advice}")
    if output.resolve().parent == model.resolve() and output.name.endswith((".safetensors", *MODEL_FILES)):
        raise ConfigError(f"{output}: belongs to the model, and {advice}")


def in_windows(
    recognizer: Recognizer, inputs: list[str | Utterance], *, window: float, hop: float | None
) -> Iterator[tuple[str | Utterance, Prediction | SerError]]:
    """Every window of every input; where one cannot be read (on), its error, and the others go on."""
    for source in inputs:
        try:
            for prediction in recognizer.predict_windows(source, window=window, hop=hop):
                yield source, prediction
        except AudioError as error:
            yield source, error


def seconds_of(source: str | Utterance) -> float:
    """From the header; 0 for what cannot be read."""
    row = source if isinstance(source, Utterance) else Utterance(id=source, file=Path(source))
    try:
        return audio_info(row.file, start=row.start, end=row.end, max_seconds=float("inf")).seconds
    except SerError:
        return 0.0


# ---------------------------------------------------------------------------------------------------- formats

# A format is a generator of text: it takes results, each a record of plain data, and gives what to write.
Record = dict[str, Any]


def decimal(seconds: float) -> str:
    """To the millisecond, however long the recording is, without zeros at the end: 2, 7200.25."""
    return f"{seconds:.3f}".rstrip("0").rstrip(".")


def as_record(source: str | Utterance, result: Prediction | SerError) -> Record:
    """The same keys for every recording, None where there is nothing to say."""
    row = source if isinstance(source, Utterance) else None
    record: Record = {
        "file": str(row.file) if row else source,
        "id": row.id if row else None,
        "start": row.start if row else None,
        "end": row.end if row else None,
    }
    if isinstance(result, Prediction) and result.start is not None and result.end is not None:  # a window
        name = record["id"] or os.path.basename(record["file"])  # noqa: PTH119
        part = f"{name}:{decimal(result.start)}-{decimal(result.end)}"
        record |= {"id": part, "start": result.start, "end": result.end}
    if isinstance(result, SerError):
        nothing = Prediction(file=None, seconds=0.0).to_dict()
        return {**dict.fromkeys(nothing), **record, "error": str(result)}
    return finite({**result.to_dict(), **record, "error": None})  # scores may overflow: no NaN in JSON


def json_list(records: Iterator[Record], recognizer: Recognizer) -> Iterator[str]:
    before = "[\n"
    for record in records:
        yield before + json.dumps(record, ensure_ascii=False)
        before = ",\n"
    yield "\n]\n"


def json_lines(records: Iterator[Record], recognizer: Recognizer) -> Iterator[str]:
    for record in records:
        yield json.dumps(record, ensure_ascii=False) + "\n"


def comma_separated(records: Iterator[Record], recognizer: Recognizer) -> Iterator[str]:
    first = ["file", "id", "start", "end", "seconds", "kind", "emotion"]
    last = ["transcript", "speaker", "speaker_probability", "warning", "error"]
    shares = [f"p_{name}" for name in recognizer.emotions]
    yield csv_line([*first, *shares, *recognizer.dimensions, *last])
    for record in records:
        middle = [(record["probabilities"] or {}).get(name) for name in recognizer.emotions]
        middle += [(record["dimensions"] or {}).get(name) for name in recognizer.dimensions]
        yield csv_line([record[c] for c in first] + middle + [record[c] for c in last])


def paper_lines(records: Iterator[Record], recognizer: Recognizer) -> Iterator[str]:
    """As their run_emotion.py --do_predict: ``NAME SECONDS CLASS  P0 P1 P2 P3``. It has no place for errors."""
    names = list(PAPER_EMOTIONS.values())
    if set(names) != set(recognizer.emotions):
        names = recognizer.emotions
    if not names:
        raise ConfigError("the model has no emotion head, and the paper's format is about nothing else")
    if recognizer.kind != "single-label":
        raise ConfigError(
            f"the paper's format is of one emotion out of several, and this model is {recognizer.kind}: use csv "
            "or jsonl"
        )
    for record in records:
        if record["error"] is None:
            shares = " ".join(str(record["probabilities"][name]) for name in names).replace("None", "nan")
            number = names.index(record["emotion"])
            yield f"{printable(os.path.basename(record['file']))} {record['seconds']} {number}  {shares}\n"  # noqa: PTH119


def rounded(score: float | None) -> str:
    """Write a score with two digits; nan where it overflowed."""
    return "nan" if score is None else f"{score:.2f}"


def likeliest(record: Record) -> str:
    """The likeliest emotion with its probability; where several can be right, all above one half."""
    shares = record["probabilities"] or {}
    names = [record["emotion"]]
    if record["kind"] == "multi-label":
        names = (
            sorted((n for n, share in shares.items() if (share or 0) >= 0.5), key=lambda n: -shares[n]) or names
        )
    return ", ".join(f"{name} {rounded(shares.get(name, 0.0))}" for name in names)


def fit(text: str, width: int, *, keep_end: bool = False, right: bool = False) -> str:
    """``text`` in exactly ``width`` characters, with an ellipsis where it is cut."""
    text = printable(text)
    if len(text) > width:
        text = "…" + text[len(text) - width + 1 :] if keep_end else text[: width - 1] + "…"
    return text.rjust(width) if right else text.ljust(width)


def table(records: Iterator[Record], recognizer: Recognizer) -> Iterator[str]:
    total = shutil.get_terminal_size((120, 24)).columns
    emotion = max([len("emotion"), *(len(name) + 5 for name in recognizer.emotions)])
    speaker = max([len("speaker"), *map(len, recognizer.speakers)])
    several = recognizer.kind == "multi-label"
    fixed = {"seconds": 7, "emotion": 32 if several else min(emotion, 20), "speaker": min(speaker, 20)}
    numbers = {f"={name}": name for name in recognizer.dimensions}  # a foreign model may call one "file"
    fixed |= {"kind": len(recognizer.kind or "")} | {key: max(len(name), 6) for key, name in numbers.items()}
    # The kind of answer is a column where it is not the usual one.
    heads: dict[str, Any] = {"kind": recognizer.kind not in (None, "single-label")}
    heads |= {"emotion": recognizer.emotions, **dict.fromkeys(numbers, True)}
    heads |= {"transcript": recognizer.vocabulary, "speaker": recognizer.speakers}
    columns = ["file", "seconds", *(name for name, there in heads.items() if there)]
    rest = max(20, total - 1 - sum(fixed.get(c, 0) for c in columns) - 2 * (len(columns) - 1))
    file = min(40, max(12, rest // 3)) if "transcript" in columns else rest
    widths = {**fixed, "file": file, "transcript": rest - file}

    def line(cells: dict[str, str]) -> str:
        right = ("seconds", *numbers)
        texts = (fit(cells[c], widths[c], keep_end=c == "file", right=c in right) for c in columns)
        return "  ".join(texts).rstrip() + "\n"

    yield line({name: name for name in columns} | numbers)
    for record in records:
        if record["error"] is not None:
            name = fit(record["id"] or record["file"], file, keep_end=True)
            cause = record["error"].removeprefix(f"{record['file']}: ")  # its name stands before it
            yield f"{name}  {fit('error: ' + cause, total - file - 3)}".rstrip() + "\n"
            continue
        cells = {
            "file": record["id"] or record["file"],
            "seconds": f"{record['seconds']:.2f}",
            "kind": record["kind"] or "",
            "emotion": likeliest(record),
            "transcript": record["transcript"] or "",
            "speaker": record["speaker"] or "",
        }
        cells |= {f"={name}": rounded(value) for name, value in (record["dimensions"] or {}).items()}
        yield line(cells)


Format = Callable[[Iterator[Record], Recognizer], Iterator[str]]
FORMATS: dict[str, Format] = {
    "table": table,
    "json": json_list,
    "jsonl": json_lines,
    "csv": comma_separated,
    "paper": paper_lines,
}


@contextmanager
def opened(path: Path | None, *, as_table: bool) -> Iterator[TextIO]:
    """The file to write, or standard output: in UTF-8, but a table as the terminal has it."""
    if path is not None:
        with written(path), replace_file(path) as file:
            yield file
        return
    assert isinstance(sys.stdout, io.TextIOWrapper)
    sys.stdout.reconfigure(encoding=None if as_table else "utf-8", errors="backslashreplace")
    yield sys.stdout


# ------------------------------------------------------------------------------------------------------- main


def main() -> int:
    arguments = parse_arguments()
    inputs = find_inputs(arguments)
    if arguments.hop is not None and arguments.window is None:
        raise ConfigError("--hop is between windows: give --window too")
    if arguments.window is not None and arguments.workers:
        raise ConfigError("--workers decode whole recordings: with --window this process does, leave it out")
    if arguments.window is not None and arguments.max_seconds != MAX_SECONDS:
        raise ConfigError("--max-seconds is for whole recordings: with --window none is too long")
    if arguments.window is not None and arguments.format == "paper":
        raise ConfigError("the paper's format has no place for windows: use csv or jsonl")
    if arguments.output is not None:
        check_output(arguments.output, Path(arguments.model), [*map(str, arguments.inputs), *inputs])
    recognizer = Recognizer.load(
        arguments.model, device=arguments.device, revision=arguments.revision, precision=arguments.precision
    )
    results: Iterator[tuple[str | Utterance, Prediction | SerError]]
    if arguments.window is None:
        stream = recognizer.stream(
            inputs, workers=arguments.workers, max_seconds=arguments.max_seconds, timeout=arguments.timeout
        )
        results = zip(inputs, stream, strict=True)
    else:
        results = in_windows(recognizer, inputs, window=arguments.window, hop=arguments.hop)
    to_terminal = arguments.output is None and sys.stdout.isatty()
    silent = to_terminal or not sys.stderr.isatty()
    total = len(inputs) if arguments.window is None else sum(map(seconds_of, inputs))
    bar = tqdm(total=total, unit="file" if arguments.window is None else "s", disable=silent)
    failed, reached = 0, 0.0  # of the recording at work, in seconds

    def records() -> Iterator[Record]:
        nonlocal failed, reached
        for source, result in results:
            record = as_record(source, result)
            failed += record["error"] is not None
            if record["error"] is not None:
                bar.write(f"error: {printable(record['error'])}", file=sys.stderr)
            elif record["warning"] is not None:
                bar.write(f"warning: {printable(record['file'])}: {record['warning']}", file=sys.stderr)
            if arguments.window is None:
                bar.update()
            elif record["error"] is None:
                end = record["end"] - ((source.start or 0.0) if isinstance(source, Utterance) else 0.0)
                bar.update(end - reached if end > reached else end)
                reached = end
            yield record

    as_table = arguments.format == "table"
    with freed_memory_kept(recognizer.device), bar, opened(arguments.output, as_table=as_table) as file:
        for text in FORMATS[arguments.format](records(), recognizer):
            # Names that are not UTF-8 hold lone surrogates: \udc80, which JSON reads back.
            file.write(text.encode("utf-8", "backslashreplace").decode("utf-8"))
            file.flush()
    if failed and len(inputs) > 1:
        print(f"{failed} of {len(inputs)} recordings could not be read", file=sys.stderr)
    return 1 if failed else 0


gc.freeze()  # nor at the end
gc.enable()

if __name__ == "__main__":
    try:
        with worker_death_explained(AGAIN):
            status = main()
        sys.exit(status)
    except SerError as error:
        print(f"error: {printable(str(error), lines=True)}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader has enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)

"""Read the corpora whose publishers list the recordings in tables: nEMO, RESD, MSP-Podcast; and CREMA-D's votes.

A row whose recording is missing, and a recording without a row, become no utterance; both are reported. A table
that cannot be read is refused with the number of its line.
"""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from ser.data.labels import DIMENSIONS
from ser.data.manifest import Utterance, check_regular, read_manifest
from ser.data.release import TWICE, Corpus, Dropped, recordings
from ser.errors import ManifestError, brief_repr, indented, summary
from ser.files import StrPath


def _named(table: Path, rows: Iterable[Utterance], emotions: Mapping[str, str | None]) -> list[Utterance]:
    """Give the rows of a table our names of the emotions; the table's own name becomes the column `code`.

    Raises:
        ManifestError: a name is not among `emotions`; one message has all of them.
    """
    rows = list(rows)
    unknown = Counter(u.emotion for u in rows if u.emotion is not None and u.emotion not in emotions)
    if unknown:
        first = {name: next(u.file.name for u in rows if u.emotion == name) for name in unknown}
        problems = (f"{brief_repr(name)} ({n}), such as of {first[name]}" for name, n in unknown.items())
        raise ManifestError(f"{table}: unknown emotions, expected {', '.join(emotions)}:{indented(problems)}")
    named = []
    for u in rows:
        code = {} if u.emotion is None else {"code": u.emotion}
        named.append(replace(u.relabelled(emotion=emotions.get(u.emotion or "")), extra=code | u.extra))
    return named


def _corpus(root: Path, audio: Iterable[Path], rows: Iterable[Utterance], warnings: list[str]) -> Corpus:
    """Make a corpus of the rows that have a recording in the folders `audio`; report what has no counterpart.

    Raises:
        ManifestError: no row has one, or a folder cannot be listed.
    """
    dropped, there = list[Dropped](), dict[Path, None]()
    for folder in audio:
        odd = list[Dropped]()
        there |= dict.fromkeys(recordings(folder, odd, warnings))
        dropped += [replace(d, what=(folder / d.what).relative_to(root).as_posix()) for d in odd]
    utterances: dict[str, Utterance] = {}
    listed = set[Path]()
    for u in rows:
        listed.add(u.file)
        if u.file not in there:
            dropped.append(Dropped(u.id, "no recording"))
        elif u.id in utterances:
            dropped.append(Dropped(u.file.relative_to(root).as_posix(), TWICE))
        else:
            utterances[u.id] = u
    dropped += [Dropped(f.relative_to(root).as_posix(), "not in the table") for f in there if f not in listed]
    if not utterances:
        raise ManifestError(
            f"{root}: none of its {len(listed)} rows has a recording there"
            + indented(f"{d.what}: {d.why}" for d in dropped)
        )
    return Corpus(root, [utterances[name] for name in sorted(utterances)], dropped, warnings)


# ------------------------------------------------------------------------------------------------------- nEMO

NEMO_EMOTIONS = {"anger": "angry", "fear": "fearful", "happiness": "happy", "neutral": "neutral"}
NEMO_EMOTIONS |= {"sadness": "sad", "surprised": "surprised"}


def read_nemo(folder: StrPath) -> Corpus:
    """Read nEMO: its data.tsv, and the recordings in its folder samples.

    Returns:
        Utterances with the columns code, gender, age and normalized_text; the text is raw_text.

    Raises:
        ManifestError: the table cannot be read, or no row has a recording.
    """
    folder = Path(folder).absolute()
    table, audio = folder / "data.tsv", folder / "samples"
    columns = {"file": "file_id", "text": "raw_text", "speaker": "speaker_id"}
    rows = read_manifest(table, root=audio, columns=columns, check_files=False)
    return _corpus(folder, [audio], (replace(u, id=u.file.stem) for u in _named(table, rows, NEMO_EMOTIONS)), [])


# ------------------------------------------------------------------------------------------------------- RESD

RESD_EMOTIONS = {"anger": "angry", "disgust": "disgusted", "enthusiasm": "enthusiastic", "fear": "fearful"}
RESD_EMOTIONS |= {"happiness": "happy", "neutral": "neutral", "sadness": "sad"}


def read_resd(folder: StrPath) -> Corpus:
    """Read RESD: train.csv and test.csv, and the recordings in the folders train and test.

    A dialogue is a folder such as anger_disgust_19, in train and in test: two actors talk, one emotion each. RESD
    does not say which actors, so there are no speakers.

    Returns:
        Utterances with the columns code, dialogue ("19") and split, RESD's own ("train" or "test"). The split cuts
        through dialogues.

    Raises:
        ManifestError: a table cannot be read, or no row has a recording.
    """
    folder = Path(folder).absolute()
    utterances = []
    for split in ("train", "test"):
        table = folder / f"{split}.csv"
        rows = read_manifest(table, root=folder / split, columns={"file": "path"}, check_files=False)
        for u in _named(table, rows, RESD_EMOTIONS):
            number = re.search(r"(?<!\d)\d\d(?!\d)", u.file.parent.name)
            if number is None:
                raise ManifestError(f"{table}: {u.file.parent.name!r} names no dialogue, such as anger_disgust_19")
            code = {name: value for name, value in u.extra.items() if name == "code"}
            extra = {**code, "dialogue": number[0], "split": split}
            utterances.append(replace(u, id=u.file.stem, extra=extra))
    return _corpus(folder, [folder / "train", folder / "test"], utterances, [])


# ------------------------------------------------------------------------------------------------ MSP-Podcast

# X: the raters do not agree.
MSP_EMOTIONS: dict[str, str | None] = {"A": "angry", "S": "sad", "H": "happy", "U": "surprised", "F": "fearful"}
MSP_EMOTIONS |= {"D": "disgusted", "C": "contemptuous", "N": "neutral", "O": "other", "X": None}
MSP_COLUMNS = {"file": "FileName", "emotion": "EmoClass", "speaker": "SpkrID"}
MSP_COLUMNS |= {"arousal": "EmoAct", "valence": "EmoVal", "dominance": "EmoDom"}
MSP_SPLITS = {"Train": "train", "Development": "valid", "Validation": "valid", "Test1": "test"}
MSP_FURTHER = ("Test2", "Test3")  # test sets that belong to no split


def _first(folder: Path, *names: str) -> Path:
    """Return the first of these names that the folder has, or the first name if it has none."""
    return next((folder / name for name in names if (folder / name).exists()), folder / names[0])


def _msp_text(path: Path, warnings: list[str]) -> str | None:
    """Read a transcript; None where there is none."""
    try:
        text = " ".join(path.read_text("utf-8-sig", errors="replace").split())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read: {error.strerror or error}") from None
    if "\ufffd" in text:
        warnings.append(f"{path.name}: is not UTF-8; characters that cannot be read become U+FFFD")
    return text or None


def _msp_warnings(table: Path, rows: Iterable[Utterance]) -> list[str]:
    """Return lines on values of Split_Set that are not known, and on dimensions that are not on the scale."""
    rows, lines = list(rows), []
    parts = Counter(u.extra.get("Split_Set", "") for u in rows)
    if unknown := sorted(parts.keys() - {*MSP_SPLITS, *MSP_FURTHER}):
        shown = summary(f"{brief_repr(part)} ({parts[part]})" for part in unknown)
        lines.append(f"{table}: utterances in no split, since Split_Set has unknown values: {shown}")
    values = {u.file.name: [u.labels.get(name) for name in DIMENSIONS] for u in rows}
    if odd := [name for name, of in values.items() if not all(v is None or 1 <= float(v) <= 7 for v in of)]:
        what = f"{len(odd)} utterances have EmoAct, EmoVal or EmoDom outside 1 to 7"
        lines.append(f"{table}: {what}, such as {odd[0]}")
    return lines


def read_msp_podcast(folder: StrPath) -> Corpus:
    """Read MSP-Podcast: Labels/labels_consensus.csv, the recordings in Audios, and Transcripts where they are.

    Returns:
        Utterances with the column part, the release's own name (Train, Development, Test1, ...). The column split
        (train, valid, test) has Test1 as test; the other test sets have none. The dialogue is the podcast. The
        speaker "Unknown" counts as no speaker. Arousal, valence and dominance are 1 to 7.

    Raises:
        ManifestError: the table cannot be read, lacks a column, or no row has a recording.
    """
    folder = Path(folder).absolute()
    table = _first(folder, "Labels/labels_consensus.csv", "labels_consensus.csv", "Labels/labels_concensus.csv")
    audio = _first(folder, "Audios", "Audio")
    utterances = []
    rows = read_manifest(table, root=audio, columns=MSP_COLUMNS, check_files=False)
    if "Split_Set" not in {name for u in rows for name in u.extra}:
        what = "the column 'Split_Set', which names the part of each utterance"
        raise ManifestError(f"{table}: {what}, is missing or empty")
    warnings = _msp_warnings(table, rows)
    for u in _named(table, rows, MSP_EMOTIONS):
        part, gender = u.extra.get("Split_Set", ""), u.extra.get("Gender", "").lower()
        podcast = re.match(r"MSP-PODCAST_(\w+?)_", u.file.name)
        extra = {"code": u.extra.get("code", ""), "dialogue": podcast[1] if podcast else "", "part": part}
        extra |= {"split": MSP_SPLITS.get(part, ""), "gender": gender if gender in ("male", "female") else ""}
        text = _msp_text(folder / "Transcripts" / f"{u.file.stem}.txt", warnings)
        u = u.relabelled(text=text, speaker=None if (u.speaker or "").casefold() == "unknown" else u.speaker)
        known = {name: value for name, value in extra.items() if value}
        utterances.append(replace(u, id=u.file.stem, extra=known))
    return _corpus(folder, [audio], utterances, warnings)


# -------------------------------------------------------------------------------------------- CREMA-D's votes

# A letter of the tables -> the code in file names, our name.
CREMA_D_LETTERS = {"A": ("ANG", "angry"), "D": ("DIS", "disgusted"), "F": ("FEA", "fearful")}
CREMA_D_LETTERS |= {"H": ("HAP", "happy"), "N": ("NEU", "neutral"), "S": ("SAD", "sad")}


def _table_rows(path: Path, needed: Collection[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the number of the line and the cells of each row of a CSV.

    Raises:
        ManifestError: the file cannot be read, lacks a column, or a row has another number of fields.
    """
    try:
        check_regular(path, "a table")
        reader = csv.reader(io.StringIO(path.read_text("utf-8-sig"), newline=""), strict=True)
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"{path}: cannot be read: {error}") from None
    names: list[str] = []
    try:
        for cells in reader:
            if not names:
                names = cells
                if missing := [name for name in needed if name not in names]:
                    raise ManifestError(f"{path}: no column {missing[0]!r}; the columns are {brief_repr(names)}")
            elif len(cells) != len(names):
                what = f"{len(cells)} fields, but the header has {len(names)}"
                raise ManifestError(f"{path}: line {reader.line_num}: {what}")
            else:
                yield reader.line_num, dict(zip(names, cells, strict=True))
    except csv.Error as error:
        raise ManifestError(f"{path}: line {reader.line_num}: {error}") from None


def _voted(letters: Collection[str]) -> dict[str, str]:
    """Return the column `voted`; nothing where several emotions have the most votes."""
    return {"voted": CREMA_D_LETTERS[next(iter(letters))][1]} if len(letters) == 1 else {}


def _tabulated_votes(cells: Mapping[str, str]) -> dict[str, str]:
    """Read a row of tabulatedVotes.csv. Raises ValueError where a cell holds no number of votes."""
    counts = {letter: int(cells[letter]) for letter in CREMA_D_LETTERS}
    raters = sum(counts.values())
    if min(counts.values()) < 0 or not raters:
        raise ValueError(f"found {raters} votes, expected 1 or more, and none below 0")
    shares = {CREMA_D_LETTERS[name][0]: round(n / raters, 4) for name, n in Counter(counts).most_common() if n}
    most = [letter for letter, n in counts.items() if n == max(counts.values())]
    return {"votes": json.dumps(shares), "raters": str(raters), **_voted(most)}


def _summarised_votes(cells: Mapping[str, str]) -> dict[str, str]:
    """Read a row of summaryTable.csv, such as "N" or "A:D". Raises ValueError for other letters."""
    letters = cells["VoiceVote"].split(":")
    if not CREMA_D_LETTERS.keys() >= set(letters):
        raise ValueError(f"the vote {cells['VoiceVote']!r}, expected {', '.join(CREMA_D_LETTERS)}")
    return _voted(letters)


def read_votes(folder: Path) -> dict[str, dict[str, str]]:
    """Read what CREMA-D's raters heard in the voice alone, from the tables in processedResults.

    The folder is in `folder` or beside it. tabulatedVotes.csv has three rows for a clip: those whose numbers begin
    with 1 are of the voice, those with 2 of the face, those with 3 of both. Without it summaryTable.csv is read,
    which has the winners alone.

    Returns:
        Name of a recording -> the columns ``votes`` (JSON: code -> share, the largest first), ``raters`` (how many
        voted) and ``voted`` (our name of the emotion with the most votes; absent where several have them). Empty
        without a table.

    Raises:
        ManifestError: a table cannot be read; the message names the line.
    """
    places = [place / "processedResults" for place in (folder, folder.parent)]
    tabulated = [place / "tabulatedVotes.csv" for place in places]
    table = next((path for path in [*tabulated, *(p / "summaryTable.csv" for p in places)] if path.exists()), None)
    if table is None:
        return {}
    votes: dict[str, dict[str, str]] = {}
    counted = table in tabulated
    name = "fileName" if counted else "FileName"
    for line, cells in _table_rows(table, ["", name, *CREMA_D_LETTERS] if counted else [name, "VoiceVote"]):
        if counted and not cells[""].startswith("1"):
            continue
        try:
            if cells[name] in votes:
                raise ValueError(f"{cells[name]} occurs twice")
            votes[cells[name]] = _tabulated_votes(cells) if counted else _summarised_votes(cells)
        except ValueError as error:
            raise ManifestError(f"{table}: line {line}: {error}") from None
    return votes

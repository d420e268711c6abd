"""Read the IEMOCAP release (Busso et al., 2008), and check it against the known counts to the last turn.

    IEMOCAP_full_release/Session1/
        dialog/EmoEvaluation/Ses01F_impro01.txt     labels; its subfolders are single annotators' and not read
        dialog/transcriptions/Ses01F_impro01.txt
        sentences/wav/Ses01F_impro01/Ses01F_impro01_M003.wav
                            |                        '-- who speaks: the man of session 1, speaker 01M
                            '-- the side: whose markers were filmed, here those of the woman, 01F

IEMOCAP consists of dialogues, and its utterances are called turns here. The paper's ten "folds" 01F..05M go by the
side, so both speakers of a test fold are in training too.
"""

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ser.data.labels import DIMENSIONS
from ser.data.manifest import PAPER_EMOTIONS, Utterance, read_manifest
from ser.data.release import Corpus, Dropped
from ser.errors import ManifestError, Tell, indented
from ser.files import StrPath

LICENCE = "IEMOCAP: on request from SAIL, University of Southern California, for research; no redistribution"
SOURCE = "Busso et al., IEMOCAP: interactive emotional dyadic motion capture database, LREC 42, 2008"

# The release's codes. Of xxx the annotators had no majority, so the turn has a transcript but no label.
EMOTIONS: dict[str, str | None] = {"neu": "neutral", "hap": "happy", "exc": "excited", "ang": "angry"}
EMOTIONS |= {"sad": "sad", "fru": "frustrated", "fea": "fearful", "sur": "surprised", "dis": "disgusted"}
EMOTIONS |= {"oth": "other", "xxx": None}
FOUR_CLASSES = {"neu": "neutral", "hap": "happy", "exc": "happy", "ang": "angry", "sad": "sad"}

# This is how single annotators' labels are spelt.
VOTES = {"neutral": "neu", "neutral state": "neu", "happiness": "hap", "excited": "exc", "anger": "ang"}
VOTES |= {"sadness": "sad", "frustration": "fru", "fear": "fea", "surprise": "sur", "disgust": "dis"}
VOTES |= {"other": "oth"}

# These are names of speakers, and of the sides, which are the paper's folds.
SIDES = tuple(f"0{session}{letter}" for session in range(1, 6) for letter in "FM")

# The counts of the whole release: its labelled turns, and how many turns of the four-class protocol have each
# value.
LABELLED, FOUR = "labelled turns", "four-class turns"
COUNTS: dict[str, dict[str, int]] = {
    "all": {LABELLED: 10_039, FOUR: 5_531},
    "code": {"neu": 1708, "hap": 595, "exc": 1041, "ang": 1103, "sad": 1084},
    "emotion": {"neutral": 1708, "happy": 1636, "angry": 1103, "sad": 1084},
    "session": {"1": 1085, "2": 1023, "3": 1151, "4": 1031, "5": 1241},
    "speaker": dict(zip(SIDES, (528, 557, 481, 542, 522, 629, 528, 503, 590, 651), strict=True)),
    "side": dict(zip(SIDES, (507, 578, 505, 518, 536, 615, 553, 478, 644, 597), strict=True)),
}

# Emotion -> labelled turns of the whole release.
_TURNS = (1708, 595, 1041, 1103, 1084, 1849, 40, 107, 2, 3, 2507)
ALL_EMOTIONS = {emotion or "unlabelled": n for emotion, n in zip(EMOTIONS.values(), _TURNS, strict=True)}

_DIALOGUE = r"Ses0[1-5][FM]_(?:impro\d\d[ab]?|script\d\d_\db?)"


@dataclass(frozen=True)
class Name:
    """Hold what the name of a turn says.

    Attributes:
        id: the name.
        dialogue: the recording that the turn is cut from.
        session: "1" to "5".
        side: the paper's fold, 01F to 05M: whose markers were filmed.
        speaker: who speaks, 01F to 05M.
        kind: "impro" or "script".
    """

    id: str
    dialogue: str
    session: str
    side: str
    speaker: str
    kind: str

    def file(self, root: Path) -> Path:
        """Find the recording in the release."""
        return root / f"Session{self.session}" / "sentences" / "wav" / self.dialogue / f"{self.id}.wav"

    def columns(self) -> dict[str, str]:
        """Name the columns of `Utterance.extra`."""
        return {"dialogue": self.dialogue, "session": self.session, "side": self.side, "kind": self.kind}


def parse_name(turn: str) -> Name | None:
    """Read ``Ses01F_impro01_M003``: side 01F, speaker 01M. Return None for others (``Ses01F_impro01_MXX1``)."""
    match = re.fullmatch(rf"({_DIALOGUE})_([FM])\d\d\d", turn)
    if not match:
        return None
    dialogue, letter = match.groups()
    session = dialogue[4]
    kind = "impro" if "impro" in dialogue else "script"
    return Name(turn, dialogue, session, dialogue[3:6], f"0{session}{letter}", kind)


# -------------------------------------------------------------------------------------------- the text files


@dataclass(frozen=True)
class Label:
    """Hold one turn of an EmoEvaluation file.

    Attributes:
        name: of the turn.
        start, end: seconds in the dialogue.
        code: the label, a key of `EMOTIONS`.
        valence, arousal, dominance: means over annotators, 1 to 5; None where the file has another number.
        votes: code -> share of the external annotators' votes; the shares sum to 1. Empty without votes.
    """

    name: Name
    start: float
    end: float
    code: str
    valence: float | None
    arousal: float | None
    dominance: float | None
    votes: Mapping[str, float]


_TURN = re.compile(r"\[\s*([\d.]+)\s*-\s*([\d.]+)\s*\]\s+(\S+)\s+(\S+)\s+\[([^\]]*)\]\s*")


def _finite_number(text: str) -> float | None:
    """Read a number; None where there is none."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _parse_label(line: str, dialogue: str, where: str, warnings: list[str]) -> Label:
    """Read the first line of a turn. Raises ValueError where it cannot be read."""
    match = _TURN.fullmatch(line)
    if not match:
        raise ValueError(f"found {line[:100]!r}, expected [start - end] turn label [V, A, D]")
    name, code = parse_name(match[3]), match[4]
    if name is None or name.dialogue != dialogue:
        raise ValueError(f"{match[3]!r} is no turn of this dialogue")
    if code not in EMOTIONS:
        raise ValueError(f"unknown label {code!r}, expected {', '.join(EMOTIONS)}")
    start, end = (_finite_number(match[i]) for i in (1, 2))
    values = [_finite_number(value) for value in match[5].split(",")]
    if start is None or end is None or len(values) != 3:
        raise ValueError(f"found {line[:100]!r}, expected two times and three values")
    valence, arousal, dominance = (v if v is not None and 1 <= v <= 5 else None for v in values)
    if None in (valence, arousal, dominance):
        warnings.append(f"{where}: [V, A, D] is [{match[5]}]; what is not within 1 to 5 is taken as unlabelled")
    return Label(name, start, end, code, valence, arousal, dominance, votes={})


def _vote_shares(ballots: Iterable[list[str]]) -> dict[str, float]:
    """Count votes: code -> share, the largest first. An annotator without a known label has no vote."""
    shares: dict[str, float] = defaultdict(float)
    ballots = [ballot for ballot in ballots if ballot]
    for ballot in ballots:
        for code in ballot:
            shares[code] += 1 / (len(ballot) * len(ballots))
    return {code: round(share, 4) for code, share in sorted(shares.items(), key=lambda item: (-item[1], item[0]))}


def parse_labels(text: str, dialogue: str, problems: list[str], warnings: list[str]) -> list[Label]:
    """Read the turns of an EmoEvaluation file.

    Only the annotators' mean valence, arousal and dominance are read, because single annotators' A- lines have
    blanks and values out of range. The external annotators (C-E1, ...) have votes, as for the release's own
    labels. An actor's view of the own performance (C-F1, C-M1) is no vote. An annotator who gives several labels
    has one vote, in equal parts.

    Args:
        text: of the file.
        dialogue: its name without ".txt".
        problems: receives what cannot be read.
        warnings: receives what was read in part.
    """
    labels: list[Label] = []
    ballots: list[list[str]] = []
    label: Label | None = None
    for number, line in enumerate(text.splitlines(), 1):
        where = f"{dialogue}.txt line {number}"
        if line.startswith("["):
            ballots, label = [], None
            try:
                label = _parse_label(line, dialogue, where, warnings)
                labels.append(label)
            except ValueError as error:
                problems.append(f"{where}: {error}")
        elif line.startswith("C-E") and label is not None:
            spelt = line.partition(":")[2].partition("(")[0].split(";")
            names = [name.strip().lower() for name in spelt if name.strip()]
            warnings += [f"{where}: unknown vote {name!r}, left out" for name in names if name not in VOTES]
            ballots.append([VOTES[name] for name in names if name in VOTES])
            labels[-1] = replace(label, votes=_vote_shares(ballots))
    return labels


_LINE = re.compile(r"(Ses\S+)\s*\[[\d.\s-]*\]\s*:(.*)")


def parse_transcripts(text: str, dialogue: str, dropped: list[Dropped], warnings: list[str]) -> dict[str, str]:
    """Read a transcriptions file: turn -> what is said. The text may hold colons and brackets of its own.

    Args:
        text: of the file.
        dialogue: its name without ".txt".
        dropped: receives the lines without a turn's id: ``M: sorry``, ``..._FXX0``, ``..._MXX1``.
        warnings: receives turns that stand twice with different texts; the first holds.
    """
    transcripts: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        where = f"transcriptions/{dialogue}.txt line {number}"
        if not line.strip():
            continue
        match = _LINE.fullmatch(line.strip())
        name = parse_name(match[1]) if match else None
        if match is None:
            dropped.append(Dropped(f"{where}: {line.strip()[:60]}", "transcript line without an id"))
        elif name is None or name.dialogue != dialogue:
            dropped.append(Dropped(match[1], "transcript with an id of no turn (such as _FXX0)"))
        elif transcripts.setdefault(name.id, match[2].strip()) != match[2].strip():
            warnings.append(f"{where}: {name.id} has another text already, which is kept")
    return transcripts


def _text(path: Path, warnings: list[str]) -> str:
    """Read a file of the release. A few have bytes of Windows' code page in transcripts."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read: {error.strerror or error}") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        warnings.append(f"{path.name} line {line}: byte 0x{content[error.start]:02x} is not UTF-8; read as cp1252")
        return content.decode("cp1252", errors="replace")


def _files(root: Path, kind: str, dropped: list[Dropped]) -> Iterator[Path]:
    """Find the dialogues' files directly in Session*/dialog/<kind>; below it are single annotators' files."""
    for session in range(1, 6):
        folder = root / f"Session{session}" / "dialog" / kind
        for path in sorted(folder.glob("*.txt")):
            if re.fullmatch(_DIALOGUE, path.stem) and path.stem[4] == str(session) and path.is_file():
                yield path
            else:  # "._Ses01F_impro01.txt" on copies made with a Mac
                name = path.relative_to(root).as_posix()
                dropped.append(Dropped(name, "file with another name than a dialogue"))


def _utterance_of(label: Label, text: str, root: Path) -> Utterance:
    """Make the utterance of a turn."""
    name = label.name
    extra = {"code": label.code, **name.columns(), "time_start": str(label.start), "time_end": str(label.end)}
    extra |= {"votes": json.dumps(label.votes)} if label.votes else {}
    labels = {"emotion": EMOTIONS[label.code], "text": text or None, "speaker": name.speaker}
    labels |= {dimension: getattr(label, dimension) for dimension in DIMENSIONS}
    return Utterance(name.id, name.file(root), labels=labels, extra=extra)


def four_classes(utterances: Iterable[Utterance]) -> list[Utterance]:
    """Select the turns of the four-class protocol, in which excited is happy: neutral, happy, angry, sad."""
    chosen = (u for u in utterances if u.extra["code"] in FOUR_CLASSES)
    return [u.relabelled(emotion=FOUR_CLASSES[u.extra["code"]]) for u in chosen]


def count_differences(utterances: Iterable[Utterance]) -> list[str]:
    """Say where the counts are not those of the whole release (`COUNTS`), one line each."""
    utterances = list(utterances)
    four = four_classes(utterances)
    found: dict[str, Counter[str]] = defaultdict(Counter)
    found["all"] = Counter({LABELLED: len(utterances), FOUR: len(four)})
    for u in four:
        for column in ("code", "session", "side"):
            found[column][u.extra[column]] += 1
        found["emotion"][str(u.emotion)] += 1
        found["speaker"][str(u.speaker)] += 1
    return [
        f"{value if column == 'all' else f'four-class turns of {column} {value}'}: "
        f"found {found[column][value]}, expected {expected}"
        for column, counts in COUNTS.items()
        for value, expected in counts.items()
        if found[column][value] != expected
    ]


# ----------------------------------------------------------------------------------------------- the release


def read_iemocap(root: StrPath, *, partial: bool = False, check_files: bool = True) -> Corpus:
    """Read the labelled turns of the release: those with a label, a transcript and a recording, joined by id.

    Args:
        root: the folder with Session1 to Session5.
        partial: go on although turns are missing or lines cannot be read; these become warnings.
        check_files: drop a turn whose recording is missing. (The recording is not opened.)

    Returns:
        Utterances with all the release's labels by the names in `EMOTIONS`; `four_classes` selects the paper's.
        The times in the dialogue are in the columns time_start and time_end: there is one file per turn, so
        `start` and `end` are None. Valence, arousal and dominance are 1 to 5. More columns: code, dialogue,
        session, side, kind ("script" or "impro") and votes, the shares of the external annotators' votes as JSON.

    Raises:
        ManifestError: there are no sessions in `root`; or, unless `partial`, the counts are not those of the whole
            release, or a line cannot be read: one message with every difference.
    """
    root = Path(root).absolute()
    problems, warnings, dropped = list[str](), list[str](), list[Dropped]()
    labels, transcripts = dict[str, Label](), dict[str, str]()
    for path in _files(root, "EmoEvaluation", dropped):
        for label in parse_labels(_text(path, warnings), path.stem, problems, warnings):
            if label.name.id in labels:
                problems.append(f"{path.name}: {label.name.id} is labelled twice")
            labels.setdefault(label.name.id, label)
    for path in _files(root, "transcriptions", dropped):
        transcripts |= parse_transcripts(_text(path, warnings), path.stem, dropped, warnings)
    if not labels:
        labelled = "Session1..5/dialog/EmoEvaluation/*.txt"
        raise ManifestError(f"{root}: no labels in {labelled}; expected the folder IEMOCAP_full_release")
    utterances = []
    for id_ in sorted(labels.keys() | transcripts.keys()):
        if id_ not in labels:
            dropped.append(Dropped(id_, "transcript without a label"))
        elif id_ not in transcripts:
            dropped.append(Dropped(id_, "label without a transcript"))
        elif check_files and not labels[id_].name.file(root).is_file():
            dropped.append(Dropped(id_, "no recording"))
        else:
            utterances.append(_utterance_of(labels[id_], transcripts[id_], root))
    corpus = Corpus(root, utterances, dropped, warnings)
    wrong = count_differences(utterances) + problems
    if wrong and not partial:
        raise ManifestError(
            f"{root}: not the whole release as it is known, these are the differences ({len(wrong)}):"
            f"{indented(wrong)}\nWhat was dropped:"
            f"{indented(f'{n} x {why}' for why, n in corpus.reasons().items())}\n"
            "Copy what is missing, or pass --partial to go on with what is there"
        )
    return replace(corpus, warnings=wrong + warnings)


# ------------------------------------------------------------------------------------------- the paper's CSVs


def read_paper_csv(
    path: StrPath, *, root: StrPath | None = None, check_files: bool = True, tell: Tell | None = None
) -> list[Utterance]:
    """Read one of the paper's files, ``iemocap_01F.train.csv`` or the like: file, emotion (e0 to e3), text.

    Args:
        path: the CSV.
        root: the release. Its recordings are found by their names, whatever folder the CSV names. Without a root
            the CSV's own paths hold.
        check_files: every recording must exist.
        tell: as of `read_manifest`.

    Returns:
        Utterances as of `read_iemocap`, as far as a file's name tells: id, speaker and the columns dialogue,
        session, side and kind. The text is the CSV's.

    Raises:
        ManifestError: the CSV cannot be read. Or there are names of no turn, other labels or missing recordings;
            one message has them all.
    """
    path = Path(path)
    problems: list[str] = []
    utterances = []
    for u in read_manifest(path, check_files=False, tell=tell):
        name = parse_name(u.file.stem)
        emotion = PAPER_EMOTIONS.get(u.emotion or "", u.emotion)  # where another label stands, none was renamed
        file = u.file if root is None or name is None else name.file(Path(root).absolute())
        if name is None:
            problems.append(f"{u.file.name!r} is no turn of IEMOCAP")
        elif emotion not in PAPER_EMOTIONS.values():
            problems.append(f"{name.id}: found the label {emotion!r}, expected {', '.join(PAPER_EMOTIONS)}")
        elif check_files and not file.is_file():
            problems.append(f"{name.id}: no recording {str(file)!r}")
        else:
            utterances.append(
                replace(u.relabelled(speaker=name.speaker), id=name.id, file=file, extra=name.columns())
            )
    if problems:
        raise ManifestError(f"{path}: these rows cannot be used ({len(problems)}):{indented(problems)}")
    return utterances


def _fold_differences(
    tests: Mapping[str, list[Utterance]], trains: Mapping[str, list[Utterance]], turns: Iterable[Utterance]
) -> Iterator[str]:
    """Say where files of the paper are not its folds: a test file holds one side, its training file the others."""
    for side, rows in tests.items():
        if strange := sorted({u.extra["side"] for u in rows} - {side}):
            yield f"iemocap_{side}.test.csv holds turns of {', '.join(strange)}"
        name = f"iemocap_{side}.train.csv"
        train = {(u.id, u.emotion) for u in trains[side]}
        rest = {(u.id, u.emotion) for u in turns if u.extra["side"] != side}
        yield from (f"{name} has no {id_} ({emotion})" for id_, emotion in sorted(rest - train))
        yield from (f"{name} has {id_} ({emotion}), but no test file" for id_, emotion in sorted(train - rest))


def read_paper_folds(
    folder: StrPath, *, root: StrPath | None = None, check_files: bool = True, tell: Tell | None = None
) -> Corpus:
    """Read the paper's twenty files, and take the turns in them, once each.

    The files say nothing more than the names of the turns: a fold's test file holds one side, its training file
    the others. That is checked, so `protocols.paper10` on the result gives the same ten folds.

    Args:
        folder: with iemocap_01F.train.csv to iemocap_05M.test.csv.
        root, check_files: as for `read_paper_csv`.
        tell: is called with what a user should know of the files that are read, once where it is the same of all.

    Raises:
        ManifestError: as `read_paper_csv`; or one message with every difference from the paper's folds.
    """
    folder = Path(folder).absolute()
    notes: dict[str, None] = {}

    def read(name: str, *, check_files: bool) -> list[Utterance]:
        def note(line: str) -> None:
            notes[line.replace(str(folder / name), str(folder), 1)] = None

        return read_paper_csv(folder / name, root=root, check_files=check_files, tell=note)

    tests = {side: read(f"iemocap_{side}.test.csv", check_files=check_files) for side in SIDES}
    trains = {side: read(f"iemocap_{side}.train.csv", check_files=False) for side in SIDES}
    if tell is not None:
        for line in notes:
            tell(line)
    turns = {u.id: u for rows in tests.values() for u in rows}
    if problems := list(_fold_differences(tests, trains, turns.values())):
        raise ManifestError(f"{folder}: not the paper's folds ({len(problems)}):{indented(problems)}")
    warnings = [] if root is not None else ["without a root, the recordings are where the CSV files say"]
    place = folder if root is None else Path(root).absolute()
    return Corpus(place, [turns[i] for i in sorted(turns)], [], warnings)

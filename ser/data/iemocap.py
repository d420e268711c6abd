"""Read the IEMOCAP release (Busso et al., 2008), and compare its counts of turns with the known ones.

    IEMOCAP_full_release/Session1/
        dialog/EmoEvaluation/Ses01F_impro01.txt     labels; subfolders with single annotators' labels are not read
        dialog/transcriptions/Ses01F_impro01.txt
        sentences/wav/Ses01F_impro01/Ses01F_impro01_M003.wav
                            |                        '-- the speaker: the man of session 1, speaker 01M
                            '-- the side: whose markers were filmed, here those of the woman, 01F

IEMOCAP consists of dialogues, and its utterances are called turns here. The paper's ten "folds" 01F..05M are
sides, so both speakers of a test fold are also in training.
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

# The codes of the release. A turn with xxx had no majority of annotators, so it has a transcript but no label.
EMOTIONS: dict[str, str | None] = {"neu": "neutral", "hap": "happy", "exc": "excited", "ang": "angry"}
EMOTIONS |= {"sad": "sad", "fru": "frustrated", "fea": "fearful", "sur": "surprised", "dis": "disgusted"}
EMOTIONS |= {"oth": "other", "xxx": None}
FOUR_CLASSES = {"neu": "neutral", "hap": "happy", "exc": "happy", "ang": "angry", "sad": "sad"}

# How the labels of single annotators are spelt -> their code.
VOTES = {"neutral": "neu", "neutral state": "neu", "happiness": "hap", "excited": "exc", "anger": "ang"}
VOTES |= {"sadness": "sad", "frustration": "fru", "fear": "fea", "surprise": "sur", "disgust": "dis"}
VOTES |= {"other": "oth"}

# Names of the speakers, and also of the sides, which are the paper's folds.
SIDES = tuple(f"0{session}{letter}" for session in range(1, 6) for letter in "FM")

# The counts of the complete release: labelled turns, and four-class turns with each value of a column.
LABELLED, FOUR = "labelled turns", "four-class turns"
COUNTS: dict[str, dict[str, int]] = {
    "all": {LABELLED: 10_039, FOUR: 5_531},
    "code": {"neu": 1708, "hap": 595, "exc": 1041, "ang": 1103, "sad": 1084},
    "emotion": {"neutral": 1708, "happy": 1636, "angry": 1103, "sad": 1084},
    "session": {"1": 1085, "2": 1023, "3": 1151, "4": 1031, "5": 1241},
    "speaker": dict(zip(SIDES, (528, 557, 481, 542, 522, 629, 528, 503, 590, 651), strict=True)),
    "side": dict(zip(SIDES, (507, 578, 505, 518, 536, 615, 553, 478, 644, 597), strict=True)),
}

# Emotion -> labelled turns of the complete release.
_TURNS = (1708, 595, 1041, 1103, 1084, 1849, 40, 107, 2, 3, 2507)
ALL_EMOTIONS = {emotion or "unlabelled": n for emotion, n in zip(EMOTIONS.values(), _TURNS, strict=True)}

_DIALOGUE = r"Ses0[1-5][FM]_(?:impro\d\d[ab]?|script\d\d_\db?)"


@dataclass(frozen=True)
class Name:
    """Hold what the name of a turn says.

    Attributes:
        id: the name.
        dialogue: the recording from which the turn is cut.
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
        """Return the path of the recording in the release."""
        return root / f"Session{self.session}" / "sentences" / "wav" / self.dialogue / f"{self.id}.wav"

    def columns(self) -> dict[str, str]:
        """Return the columns for `Utterance.extra`."""
        return {"dialogue": self.dialogue, "session": self.session, "side": self.side, "kind": self.kind}


def parse_name(turn: str) -> Name | None:
    """Read ``Ses01F_impro01_M003``: side 01F, speaker 01M. Return None for ``Ses01F_impro01_MXX1`` and others."""
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
        name: the name of the turn.
        start, end: seconds in the dialogue.
        code: the label, a key of `EMOTIONS`.
        valence, arousal, dominance: means over annotators, 1 to 5; None if the file has another number.
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
    """Read a finite number; None if the text is not one."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _parse_label(line: str, dialogue: str, where: str, warnings: list[str]) -> Label:
    """Read the first line of a turn. Raises ValueError if it cannot be read."""
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

    Only the mean valence, arousal and dominance of the annotators are read, because the lines of single annotators
    (A-) have blanks and values out of range. The external annotators (C-E1, ...) vote, as for the labels of the
    release. An actor's own label (C-F1, C-M1) is not a vote. If an annotator gives several labels, the vote is
    divided equally.

    Args:
        text: the content of the file.
        dialogue: the file's name without ".txt".
        problems: a line is added for what cannot be read.
        warnings: a line is added for what was only partly read.
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
    """Read a file of transcripts: turn -> text. The text itself may hold colons and brackets.

    Args:
        text: the content of the file.
        dialogue: the file's name without ".txt".
        dropped: lines without the id of a turn are added: ``M: sorry``, ``..._FXX0``, ``..._MXX1``.
        warnings: turns with two different texts are added; the first text is kept.
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
    """Read a file of the release. A few transcripts have bytes of the Windows code page."""
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
    """Yield the dialogues' files directly in Session*/dialog/<kind>; subfolders are for single annotators."""
    for session in range(1, 6):
        folder = root / f"Session{session}" / "dialog" / kind
        for path in sorted(folder.glob("*.txt")):
            if re.fullmatch(_DIALOGUE, path.stem) and path.stem[4] == str(session) and path.is_file():
                yield path
            else:  # such as "._Ses01F_impro01.txt" on copies made with a Mac
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
    """Select the turns of the four-class protocol: neutral, happy, angry, sad; excited counts as happy."""
    chosen = (u for u in utterances if u.extra["code"] in FOUR_CLASSES)
    return [u.relabelled(emotion=FOUR_CLASSES[u.extra["code"]]) for u in chosen]


def count_differences(utterances: Iterable[Utterance]) -> list[str]:
    """Return a line for each count that differs from the complete release (`COUNTS`)."""
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
    """Read the turns of the release that have a label, a transcript and a recording, joined by id.

    Args:
        root: the folder with Session1 to Session5.
        partial: go on if turns are missing or lines cannot be read; these become warnings.
        check_files: drop a turn whose recording is missing. (The recording is not opened.)

    Returns:
        Utterances with all labels of the release by the names in `EMOTIONS`; `four_classes` selects those of the
        paper. The times in the dialogue are in the columns time_start and time_end; `start` and `end` are None,
        since there is one file per turn. Valence, arousal and dominance are 1 to 5. More columns are code,
        dialogue, session, side, kind ("script" or "impro"), and votes, the shares of the external annotators'
        votes as JSON.

    Raises:
        ManifestError: there are no sessions in `root`; or, unless `partial`, the counts differ from the complete
            release, or a line cannot be read. The message lists every difference.
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
    """Read one of the paper's files, such as ``iemocap_01F.train.csv``: file, emotion (e0 to e3), text.

    Args:
        path: the CSV.
        root: the folder of the release. Recordings are found there by name, and the folders in the CSV are
            ignored. None: the paths of the CSV are used.
        check_files: every recording must exist.
        tell: as in `read_manifest`.

    Returns:
        Utterances as those of `read_iemocap`, with what a file's name tells: id, speaker and the columns dialogue,
        session, side and kind. The text is that of the CSV.

    Raises:
        ManifestError: the CSV cannot be read; or it has names that are not turns, other labels or missing
            recordings, all listed in the message.
    """
    path = Path(path)
    problems: list[str] = []
    utterances = []
    for u in read_manifest(path, check_files=False, tell=tell):
        name = parse_name(u.file.stem)
        emotion = PAPER_EMOTIONS.get(u.emotion or "", u.emotion)  # e0..e3 were not renamed if another label occurs
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
    """Say where files differ from the paper's folds: a test file has one side, the training file all others."""
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
    """Read the paper's twenty files, and return each of their turns once.

    The folds follow from the names of the turns: a fold's test file has one side, its training file all others.
    This is checked, so the protocol paper10 divides the result into the same ten folds.

    Args:
        folder: the folder with iemocap_01F.train.csv to iemocap_05M.test.csv.
        root, check_files: as in `read_paper_csv`.
        tell: is called with lines for the user; a line that is the same for all files comes once.

    Raises:
        ManifestError: as `read_paper_csv`; or files differ from the paper's folds, all listed in the message.
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

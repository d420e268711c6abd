"""Corpora that tell all in their file names -> utterances: EmoDB, RAVDESS, CREMA-D.

One function per corpus reads a name, `read_named` does the rest; the next such corpus is one more function. The
emotions have one name in all corpora (angry, not anger), so that a model of one can be tried on another; the
corpus's own code is kept in the column `code`.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ser.containers import OTHER_SUFFIXES, SUFFIXES
from ser.data.manifest import Utterance
from ser.errors import ManifestError, indented
from ser.files import files_below

# What their publishers say; for data sheets and model cards.
LICENCES = {
    "iemocap": "IEMOCAP: on request from SAIL, University of Southern California, for research; no redistribution",
    "emodb": "EmoDB: CC0 1.0 as audEERING publishes it; cite Burkhardt et al., Interspeech 2005",
    "ravdess": "RAVDESS: CC BY-NC-SA 4.0; cite Livingstone and Russo, PLoS ONE 2018",
    "crema-d": "CREMA-D: Open Database License 1.0; cite Cao et al., IEEE Trans. Affective Computing 2014",
}


@dataclass(frozen=True)
class Dropped:
    """Something in the corpus's folder that became no utterance.

    Attributes:
        what: a turn, a line or a file, as the corpus names it.
        why: the reason, in the same words for all that share it.
    """

    what: str
    why: str


@dataclass(frozen=True)
class Corpus:
    """What a reader found.

    Attributes:
        root: the release's folder.
        utterances: in the order of their ids.
        dropped: all that is not among them.
        warnings: what a person should know and what was done about it.
    """

    root: Path
    utterances: list[Utterance]
    dropped: list[Dropped] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def reasons(self) -> dict[str, int]:
        """Why things were dropped, and how many of each, the most frequent first."""
        return dict(Counter(d.why for d in self.dropped).most_common())


# ---------------------------------------------------------------------------------------------------- by name


@dataclass(frozen=True)
class Named:
    """What a file's name says.

    Attributes:
        emotion: our name of the class.
        code: the corpus's own.
        speaker: as the corpus numbers them.
        text: what is said.
        gender: "female", "male" or None, where the name does not tell.
        extra: further columns.
    """

    emotion: str
    code: str
    speaker: str
    text: str
    gender: str | None = None
    extra: dict[str, str] = field(default_factory=dict)


EMODB_TEXTS = {
    "a01": "Der Lappen liegt auf dem Eisschrank.",
    "a02": "Das will sie am Mittwoch abgeben.",
    "a04": "Heute abend könnte ich es ihm sagen.",
    "a05": "Das schwarze Stück Papier befindet sich da oben neben dem Holzstück.",
    "a07": "In sieben Stunden wird es soweit sein.",
    "b01": "Was sind denn das für Tüten, die da unter dem Tisch stehen.",
    "b02": "Sie haben es gerade hochgetragen und jetzt gehen sie wieder runter.",
    "b03": "An den Wochenenden bin ich jetzt immer nach Hause gefahren und habe Agnes besucht.",
    "b09": "Ich will das eben wegbringen und dann mit Karl was trinken gehen.",
    "b10": "Die wird auf dem Platz sein, wo wir sie immer hinlegen.",
}
EMODB_EMOTIONS = {
    "W": "angry",  # Wut
    "L": "bored",  # Langeweile
    "E": "disgusted",  # Ekel
    "A": "fearful",  # Angst
    "F": "happy",  # Freude
    "T": "sad",  # Trauer
    "N": "neutral",
}
EMODB_MEN, EMODB_WOMEN = ("03", "10", "11", "12", "15"), ("08", "09", "13", "14", "16")


def parse_emodb(stem: str) -> Named | None:
    """``03a01Fa``: speaker, text, emotion and take (Burkhardt et al., INTERSPEECH 2005). None: another name."""
    match = re.fullmatch(r"(\d\d)([ab]\d\d)([WLEAFTN])([a-z])", stem)
    if not match or match[1] not in EMODB_MEN + EMODB_WOMEN or match[2] not in EMODB_TEXTS:
        return None
    speaker, text, code, take = match.groups()
    gender = "male" if speaker in EMODB_MEN else "female"
    return Named(EMODB_EMOTIONS[code], code, speaker, EMODB_TEXTS[text], gender, {"text_code": text, "take": take})


RAVDESS_TEXTS = {"01": "Kids are talking by the door.", "02": "Dogs are sitting by the door."}
RAVDESS_EMOTIONS = {
    "01": "neutral",
    "02": "calm",
    "03": "happy",
    "04": "sad",
    "05": "angry",
    "06": "fearful",
    "07": "disgusted",
    "08": "surprised",
}


def parse_ravdess(stem: str) -> Named | None:
    """``03-01-06-01-02-01-12``, of which only audio (03) of speech (01) is read (Livingstone & Russo, 2018).

    Modality, channel, emotion, intensity (1 normal, 2 strong), statement, repetition, actor: 24, the even ones
    women. Songs have the same statements and are left out.
    """
    match = re.fullmatch(r"03-01-(0[1-8])-(0[12])-(0[12])-(0[12])-(0[1-9]|1\d|2[0-4])", stem)
    if not match:
        return None
    code, intensity, text, repetition, speaker = match.groups()
    extra = {"intensity": {"01": "normal", "02": "strong"}[intensity], "repetition": repetition}
    gender = "male" if int(speaker) % 2 else "female"
    return Named(RAVDESS_EMOTIONS[code], code, speaker, RAVDESS_TEXTS[text], gender, extra)


CREMA_D_TEXTS = {
    "IEO": "It's eleven o'clock.",
    "TIE": "That is exactly what happened.",
    "IOM": "I'm on my way to the meeting.",
    "IWW": "I wonder what this is about.",
    "TAI": "The airplane is almost full.",
    "MTI": "Maybe tomorrow it will be cold.",
    "IWL": "I would like a new alarm clock.",
    "ITH": "I think I have a doctor's appointment.",
    "DFA": "Don't forget a jacket.",
    "ITS": "I think I've seen this before.",
    "TSI": "The surface is slick.",
    "WSI": "We'll stop in a couple of minutes.",
}
CREMA_D_EMOTIONS = {
    "ANG": "angry",
    "DIS": "disgusted",
    "FEA": "fearful",
    "HAP": "happy",
    "NEU": "neutral",
    "SAD": "sad",
}
CREMA_D_LEVELS = {"LO": "low", "MD": "medium", "HI": "high", "XX": "unspecified", "X": "unspecified"}


def parse_crema_d(stem: str) -> Named | None:
    """``1001_DFA_ANG_XX``: actor (1001 to 1091), sentence, emotion meant, intensity (Cao et al., 2014).

    One released name ends in a single X. Gender stands in the corpus's table of actors, not in the names.
    """
    match = re.fullmatch(r"(10[0-8]\d|109[01])_([A-Z]{3})_([A-Z]{3})_(LO|MD|HI|XX?)", stem)
    if not match or match[1] == "1000" or match[2] not in CREMA_D_TEXTS or match[3] not in CREMA_D_EMOTIONS:
        return None
    speaker, text, code, level = match.groups()
    extra = {"text_code": text, "intensity": CREMA_D_LEVELS[level]}
    return Named(CREMA_D_EMOTIONS[code], code, speaker, CREMA_D_TEXTS[text], None, extra)


def read_named(folder: str | os.PathLike[str], parse: Callable[[str], Named | None]) -> Corpus:
    """The WAV files of a folder and its subfolders, by what `parse` reads in their names.

    Args:
        folder: of the corpus.
        parse: `parse_emodb`, `parse_ravdess`, `parse_crema_d`: a name without ".wav" -> what it says.

    Returns:
        Utterances whose id is the name. Files with other names are dropped, hidden ones (``._03a01Fa.wav`` on
        copies made with a Mac) too, and sound that is no WAV. A name that stands in several folders is taken once,
        from the first of them: archives of RAVDESS hold every file twice. Links to folders are followed.

    Raises:
        ManifestError: there is no such folder, or no file in it has a name of the corpus.
    """
    folder = Path(folder).absolute()
    if not folder.is_dir():
        raise ManifestError(f"{folder}: no such folder, expected a corpus")
    utterances: dict[str, Utterance] = {}
    dropped: list[Dropped] = []
    warnings: list[str] = []
    try:
        files = sorted(map(Path, files_below(folder, hidden=True, say=warnings.append)))
    except OSError as error:
        raise ManifestError(f"{error.filename}: cannot be listed: {error.strerror}") from None
    for file in files:
        if file.suffix.lower() not in SUFFIXES + OTHER_SUFFIXES:
            continue
        where = file.relative_to(folder).as_posix()
        found = parse(file.stem)
        if file.name.startswith("."):
            dropped.append(Dropped(where, "hidden file"))
        elif file.suffix.lower() != ".wav":
            dropped.append(Dropped(where, "not a WAV file"))
        elif not file.is_file():
            dropped.append(Dropped(where, "a broken link" if file.is_symlink() else "not a regular file"))
        elif found is None:
            dropped.append(Dropped(where, "not a name of this corpus's speech"))
        elif file.stem in utterances:
            dropped.append(Dropped(where, "the same name stands in another folder already"))
        else:
            gender = {} if found.gender is None else {"gender": found.gender}
            utterances[file.stem] = Utterance(
                id=file.stem,
                file=file,
                emotion=found.emotion,
                text=found.text,
                speaker=found.speaker,
                extra={"code": found.code, **gender, **found.extra},
            )
    if not utterances:
        raise ManifestError(
            f"{folder}: none of its {len(dropped)} sound files is a WAV file with a name of this corpus"
            + indented(f"{d.what}: {d.why}" for d in dropped)
        )
    return Corpus(folder, [utterances[name] for name in sorted(utterances)], dropped, warnings)

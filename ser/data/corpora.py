"""List the corpora that `ser` reads in the table `CORPORA`, and read those whose file names hold all labels.

A further corpus needs a row and a function. If file names hold all labels, as in EmoDB and RAVDESS, the function
parses a name and `read_named` does the rest. Readers of tables are in `ser.data.listed`. An emotion has the same
name in all corpora (angry, not anger), so that a model of one corpus can be tried on another. The column `code`
keeps the corpus's own code.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from ser.data import iemocap
from ser.data.emobox import read_emobox
from ser.data.listed import read_msp_podcast, read_nemo, read_resd, read_votes
from ser.data.manifest import Utterance
from ser.data.protocols import PROTOCOLS, Protocol, by_column, kfold
from ser.data.release import TWICE, Corpus, Dropped, recordings
from ser.data.text import did_you_mean
from ser.errors import ConfigError, ManifestError, indented
from ser.files import StrPath

# ---------------------------------------------------------------------------------------------------- by name


@dataclass(frozen=True)
class Named:
    """Hold what the name of a file says.

    Attributes:
        emotion: our name of the class.
        code: the corpus's own code of the class.
        speaker: the corpus's number of the speaker.
        text: what is said.
        gender: "female", "male", or None if the name does not tell.
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
# The letters stand for Wut, Langeweile, Ekel, Angst, Freude, Trauer and neutral.
EMODB_EMOTIONS = {"W": "angry", "L": "bored", "E": "disgusted", "A": "fearful", "F": "happy", "T": "sad"}
EMODB_EMOTIONS |= {"N": "neutral"}
EMODB_MEN, EMODB_WOMEN = ("03", "10", "11", "12", "15"), ("08", "09", "13", "14", "16")


def parse_emodb(stem: str) -> Named | None:
    """Read ``03a01Fa``: speaker, text, emotion and take. Return None for another name."""
    match = re.fullmatch(r"(\d\d)([ab]\d\d)([WLEAFTN])([a-z])", stem)
    if not match or match[1] not in EMODB_MEN + EMODB_WOMEN or match[2] not in EMODB_TEXTS:
        return None
    speaker, text, code, take = match.groups()
    gender = "male" if speaker in EMODB_MEN else "female"
    return Named(EMODB_EMOTIONS[code], code, speaker, EMODB_TEXTS[text], gender, {"text_code": text, "take": take})


RAVDESS_TEXTS = {"01": "Kids are talking by the door.", "02": "Dogs are sitting by the door."}
RAVDESS_EMOTIONS = {"01": "neutral", "02": "calm", "03": "happy", "04": "sad", "05": "angry", "06": "fearful"}
RAVDESS_EMOTIONS |= {"07": "disgusted", "08": "surprised"}


def parse_ravdess(stem: str) -> Named | None:
    """Read ``03-01-06-01-02-01-12``, if it names audio (03) of speech (01); return None for another name.

    The parts are modality, channel, emotion, intensity (1 normal, 2 strong), statement, repetition and actor. Of
    the 24 actors, those with even numbers are women. Songs have the same statements and are left out.
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
CREMA_D_EMOTIONS = {"ANG": "angry", "DIS": "disgusted", "FEA": "fearful", "HAP": "happy", "NEU": "neutral"}
CREMA_D_EMOTIONS |= {"SAD": "sad"}
CREMA_D_LEVELS = {"LO": "low", "MD": "medium", "HI": "high", "XX": "unspecified", "X": "unspecified"}


def parse_crema_d(stem: str) -> Named | None:
    """Read ``1001_DFA_ANG_XX``: actor (1001 to 1091), sentence, intended emotion, intensity.

    One released name ends in a single X. The gender is in the corpus's table of actors, not in the names.

    Returns:
        What the name says; None for another name.
    """
    match = re.fullmatch(r"(10[0-8]\d|109[01])_([A-Z]{3})_([A-Z]{3})_(LO|MD|HI|XX?)", stem)
    if not match or match[1] == "1000" or match[2] not in CREMA_D_TEXTS or match[3] not in CREMA_D_EMOTIONS:
        return None
    speaker, text, code, level = match.groups()
    extra = {"text_code": text, "intensity": CREMA_D_LEVELS[level]}
    return Named(CREMA_D_EMOTIONS[code], code, speaker, CREMA_D_TEXTS[text], None, extra)


# The numbers of the female speakers. In five names the digit of gender contradicts the speaker's other names.
ASED_WOMEN = {*map("{:02d}".format, range(1, 39, 2)), "43", "47", "48", "49", "58", "62"}
ASED_EMOTIONS = {"n": "neutral", "f": "fearful", "h": "happy", "s": "sad", "a": "angry"}


def parse_ased(stem: str) -> Named | None:
    """Read ``a5-03-01-02-50``: emotion (twice), sentence, repetition, gender, speaker (01 to 65).

    Sentences 01 and 02 are said in all emotions. Each emotion has five more of its own, 03 to 07, whose codes get
    its letter here (a03): such a sentence gives its emotion away. One released name has a capital S.

    Returns:
        What the name says, without the words, which are not released; None for another name.
    """
    match = re.fullmatch(r"(n1|f2|h3|[sS]4|a5)-(0[1-7])-(0[12])-(?:01|02)-(0[1-9]|[1-5]\d|6[0-5])", stem)
    if not match:
        return None
    code, sentence, repetition, speaker = match[1][0].lower(), *match.groups()[1:]
    extra = {"text_code": sentence if sentence in ("01", "02") else code + sentence, "repetition": repetition}
    return Named(ASED_EMOTIONS[code], code, speaker, "", "female" if speaker in ASED_WOMEN else "male", extra)


TESS_EMOTIONS = {"angry": "angry", "disgust": "disgusted", "fear": "fearful", "happy": "happy"}
TESS_EMOTIONS |= {"neutral": "neutral", "ps": "surprised", "sad": "sad"}


def parse_tess(stem: str) -> Named | None:
    """Read ``OAF_back_angry``: the older (OAF) or younger (YAF) woman, a word, emotion. None for another name.

    The letters ps stand for pleasant surprise. Some copies have one name that begins with OA.
    """
    match = re.fullmatch(r"(OAF?|YAF)_([a-z]+)_([a-z]+)", stem)
    if not match or match[3] not in TESS_EMOTIONS:
        return None
    speaker, word, code = match.groups()
    speaker = "OAF" if speaker == "OA" else speaker
    return Named(TESS_EMOTIONS[code], code, speaker, f"Say the word {word}.", "female", {"text_code": word})


# The letters stand for kizgin, sakin, mutlu and huzunlu (with Turkish letters).
TUREV_EMOTIONS = {"kz": "angry", "sk": "calm", "mt": "happy", "hl": "sad"}


def parse_turev(stem: str) -> Named | None:
    """Read ``7895_kz_zeytin``: speaker, emotion, word, and sometimes a take. None for another name.

    Words are written without Turkish letters, so they are a code and no text.
    """
    match = re.fullmatch(r"(\d{4})_(kz|sk|mt|hl)_([a-z]+)(\d?)", stem)
    if not match:
        return None
    speaker, code, word, take = match.groups()
    extra = {"text_code": word, **({"take": take} if take else {})}
    return Named(TUREV_EMOTIONS[code], code, speaker, "", None, extra)


def read_named(folder: StrPath, parse: Callable[[str], Named | None]) -> Corpus:
    """Read the WAV files of a folder and its subfolders; `parse` reads the labels in their names.

    Args:
        folder: the folder of the corpus.
        parse: `parse_emodb`, `parse_ravdess` or `parse_crema_d`: a name without ".wav" -> what it says.

    Returns:
        Utterances whose id is the name. Dropped are files with other names, hidden files (``._03a01Fa.wav`` on
        copies made with a Mac), and sound that is not WAV. A name in several folders is taken from the first one,
        since archives of RAVDESS hold every file twice. Links to folders are followed.

    Raises:
        ManifestError: there is no such folder, or no file in it has a name of the corpus.
    """
    folder = Path(folder).absolute()
    utterances: dict[str, Utterance] = {}
    dropped, warnings = list[Dropped](), list[str]()
    for file in recordings(folder, dropped, warnings):
        named, known = parse(file.stem), file.stem in utterances
        if named is None or known:
            why = TWICE if known else "not a name of this corpus's speech"
            if known and file.stat().st_size != utterances[file.stem].file.stat().st_size:
                why = f"{TWICE}, with another recording"
            dropped.append(Dropped(file.relative_to(folder).as_posix(), why))
        else:
            labels = {"emotion": named.emotion, "text": named.text or None, "speaker": named.speaker}
            gender = {} if named.gender is None else {"gender": named.gender}
            extra = {"code": named.code, **gender, **named.extra}
            utterances[file.stem] = Utterance(file.stem, file, labels=labels, extra=extra)
    if not utterances:
        raise ManifestError(
            f"{folder}: none of its {len(dropped)} sound files is a WAV file with a name of this corpus"
            + indented(f"{d.what}: {d.why}" for d in dropped)
        )
    return Corpus(folder, [utterances[name] for name in sorted(utterances)], dropped, warnings)


def read_crema_d(folder: StrPath) -> Corpus:
    """Read CREMA-D, and the votes of its raters where the release's tables are beside the recordings.

    Args:
        folder: of the release, or its AudioWAV.

    Returns:
        Utterances of `parse_crema_d`, with the emotion that the actor meant. With the tables they have the columns
        of `ser.data.listed.read_votes`; those with ``voted`` can be read as ``--columns emotion=voted``.

    Raises:
        ManifestError: as of `read_named`, or a table cannot be read.
    """
    corpus = read_named(folder, parse_crema_d)
    votes = read_votes(corpus.root)
    without = [u.id for u in corpus.utterances if u.id not in votes] if votes else []
    warnings = [f"{corpus.root}: {len(without)} recordings without votes, such as {without[0]}"] if without else []
    utterances = [replace(u, extra={**u.extra, **votes.get(u.id, {})}) for u in corpus.utterances]
    return replace(corpus, utterances=utterances, warnings=[*corpus.warnings, *warnings])


# -------------------------------------------------------------------------------------------------- the table


def dialogue_protocols(utterances: Sequence[Utterance]) -> list[Protocol]:
    """Return the protocols that need dialogues and sessions."""
    return list(PROTOCOLS.values())


def speaker_protocols(utterances: Sequence[Utterance]) -> list[Protocol]:
    """Return the protocol that leaves speakers out, for corpora where all say the same few sentences."""
    return [kfold("speaker", min(10, len({u.speaker for u in utterances})), shares=["transcripts"])]


def column_protocols(utterances: Sequence[Utterance], *, shares: Sequence[str] = ()) -> list[Protocol]:
    """Divide as the corpus itself says, where it has the column split or fold."""
    divided = any("split" in u.extra or "fold" in u.extra for u in utterances)
    return [by_column(shares=shares)] if divided else []


def resd_protocols(utterances: Sequence[Utterance]) -> list[Protocol]:
    """Leave dialogues out, since RESD names no speakers; and divide as RESD does, which cuts through dialogues."""
    folds = kfold("dialogue", min(10, len({u.extra["dialogue"] for u in utterances})), shares=["transcripts"])
    note = f"{folds.description} RESD names no speakers: actors of the test part may be in training too."
    return [replace(folds, description=note), *column_protocols(utterances, shares=["dialogues", "transcripts"])]


def divided_by_publisher(utterances: list[Utterance]) -> list[Utterance]:
    """Select the utterances that the publisher's split has."""
    return [u for u in utterances if "split" in u.extra]


@dataclass(frozen=True)
class CorpusRow:
    """Describe a corpus that can be read, checked and divided.

    Attributes:
        read: takes the folder of the corpus, and the keyword arguments in `options`.
        licence: what its publishers say; for data sheets and model cards.
        source: where the corpus is described.
        counts: emotion -> published number of utterances; "unlabelled" for those without one.
        options: which of partial, root and tell (see `read_corpus`) `read` takes.
        manifests: name -> a function that selects its utterances. Protocols divide the first one. Empty: one
            manifest of all utterances, named as the row.
        protocols: a function from these utterances to the protocols that divide them.
    """

    read: Callable[..., Corpus]
    licence: str
    source: str = ""
    counts: Mapping[str, int] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    manifests: Mapping[str, Callable[[list[Utterance]], list[Utterance]]] = field(default_factory=dict)
    protocols: Callable[[Sequence[Utterance]], list[Protocol]] = speaker_protocols


CORPORA: dict[str, CorpusRow] = {
    "iemocap": CorpusRow(
        iemocap.read_iemocap,
        iemocap.LICENCE,
        iemocap.SOURCE,
        iemocap.ALL_EMOTIONS,
        ("partial",),
        {"iemocap4": iemocap.four_classes, "iemocap_all": list},
        dialogue_protocols,
    ),
    "iemocap-csv": CorpusRow(
        iemocap.read_paper_folds,
        iemocap.LICENCE,
        iemocap.SOURCE,
        iemocap.COUNTS["emotion"],
        ("root", "tell"),
        protocols=dialogue_protocols,
    ),
    "emodb": CorpusRow(
        partial(read_named, parse=parse_emodb),
        "EmoDB: CC0 1.0 as audEERING publishes it; cite Burkhardt et al., Interspeech 2005",
        "Burkhardt et al., A database of German emotional speech, Interspeech 2005",
        {"angry": 127, "bored": 81, "disgusted": 46, "fearful": 69, "happy": 71, "neutral": 79, "sad": 62},
    ),
    "ravdess": CorpusRow(
        partial(read_named, parse=parse_ravdess),
        "RAVDESS: CC BY-NC-SA 4.0; cite Livingstone and Russo, PLoS ONE 2018",
        "Livingstone and Russo, The Ryerson audio-visual database of emotional speech and song, PLoS ONE 2018",
        {emotion: 96 if emotion == "neutral" else 192 for emotion in RAVDESS_EMOTIONS.values()},
    ),
    "crema-d": CorpusRow(
        read_crema_d,
        "CREMA-D: Open Database License 1.0; cite Cao et al., IEEE Trans. Affective Computing 2014",
        "Cao et al., CREMA-D: crowd-sourced emotional multimodal actors dataset, 2014",
        {emotion: 1087 if emotion == "neutral" else 1271 for emotion in CREMA_D_EMOTIONS.values()},
    ),
    "nemo": CorpusRow(
        read_nemo,
        "nEMO: CC BY-NC-SA 4.0; cite Christop, LREC-COLING 2024",
        "Christop, nEMO: dataset of emotional speech in Polish, LREC-COLING 2024",
        {"angry": 749, "fearful": 736, "happy": 749, "neutral": 809, "sad": 769, "surprised": 669},
    ),
    "resd": CorpusRow(
        read_resd,
        "RESD: MIT",
        "Aniemore, Russian emotional speech dialogs, doi 10.57967/hf/1273",
        {"angry": 219, "disgusted": 185, "enthusiastic": 198, "fearful": 223}
        | {"happy": 218, "neutral": 191, "sad": 162},
        protocols=resd_protocols,
    ),
    "ased": CorpusRow(
        partial(read_named, parse=parse_ased),
        "ASED: its authors state no licence; cite Retta et al., ACM TALLIP 2023",
        "Retta et al., A new Amharic speech emotion dataset and classification benchmark, ACM TALLIP 22, 2023",
        {"neutral": 522, "fearful": 510, "happy": 486, "sad": 470, "angry": 486},
    ),
    "tess": CorpusRow(
        partial(read_named, parse=parse_tess),
        "TESS: CC BY-NC-ND 4.0; cite Pichora-Fuller and Dupuis, 2020",
        "Pichora-Fuller and Dupuis, Toronto emotional speech set, Borealis, 2020, doi 10.5683/SP2/E8H2MF",
        dict.fromkeys(TESS_EMOTIONS.values(), 400),
    ),
    "turev": CorpusRow(
        partial(read_named, parse=parse_turev),
        "TurEV-DB: CC BY-NC-ND 4.0 by its README, GPL 3.0 by its LICENSE; cite Canpolat et al., SLTU 2020",
        "Canpolat et al., Turkish emotion voice database (TurEV-DB), SLTU-CCURL 2020",
        {"angry": 487, "calm": 408, "happy": 357, "sad": 483},
    ),
    "msp-podcast": CorpusRow(  # without counts: each release has others
        read_msp_podcast,
        "MSP-Podcast: on request from the MSP laboratory, for research; no redistribution",
        "Lotfian and Busso, Building naturalistic emotionally balanced speech corpus, IEEE Trans. Aff. Comp. 2019",
        manifests={"msp-podcast": divided_by_publisher, "msp-podcast_all": list},
        protocols=partial(column_protocols, shares=["dialogues", "transcripts"]),
    ),
    "emobox": CorpusRow(  # its reader knows how many utterances each corpus has
        read_emobox,
        "EmoBox: its lists MIT; the recordings have the licences of their corpora",
        "Ma et al., EmoBox: multilingual multi-corpus speech emotion recognition toolkit, Interspeech 2024",
        options=("root",),
        protocols=column_protocols,
    ),
}


def read_corpus(name: str, folder: StrPath, **options: Any) -> Corpus:
    """Read a corpus of `CORPORA`, and warn if its counts differ from the published ones.

    Args:
        name: the row.
        folder: the folder of the corpus.
        options: partial (go on if something is missing), root (the folder of the recordings, if `folder` has only
            tables) and tell (called with lines for the user); each goes to readers that take it.

    Raises:
        ConfigError: there is no such row.
        ManifestError: the corpus cannot be used.
    """
    if name not in CORPORA:
        raise ConfigError(
            f"no corpus is called {name!r}{did_you_mean(name, CORPORA)}; there are {', '.join(CORPORA)}"
        )
    row = CORPORA[name]
    corpus = row.read(folder, **{option: options[option] for option in row.options if option in options})
    counts = Counter(u.emotion or "unlabelled" for u in corpus.utterances)
    differences = [f"{e} {counts[e]} of {n}" for e, n in row.counts.items() if counts[e] != n]
    if not differences:
        return corpus
    warning = f"{corpus.root}: not as many utterances as are published: {', '.join(differences)}"
    return replace(corpus, warnings=[*corpus.warnings, warning])


def manifests_of(name: str, utterances: list[Utterance]) -> dict[str, list[Utterance]]:
    """Return the manifests of a corpus, name -> utterances; protocols divide the first one."""
    selections = CORPORA[name].manifests or {name: list}
    return {manifest: select(utterances) for manifest, select in selections.items()}


def divided_manifest(folder: Path) -> Path:
    """Find the manifest to divide in the folder of a prepared corpus; if none is there, name the first row's."""
    paths = [folder / f"{next(iter(row.manifests), name)}.csv" for name, row in CORPORA.items()]
    return next((path for path in paths if path.is_file()), paths[0])


def found_manifest(path: StrPath) -> Path:
    """Return the path itself, or the manifest to divide if it is the folder of a prepared corpus.

    Raises ManifestError if the folder has no such manifest.
    """
    path = Path(path)
    if not os.path.isdir(path):  # noqa: PTH112 (a name that is too long is no folder, and no error here)
        return path
    if not (found := divided_manifest(path)).is_file():
        raise ManifestError(
            f"{path}: is a folder, and has no {found.name} as preparing writes it; give a manifest"
        )
    return found

"""Divide a corpus by a protocol, a function of the manifest and a seed that declares what its parts share.

A protocol makes folds. A fold has named parts (train, valid, test), which are lists of ids. If two parts share
speakers, dialogues, sessions, transcripts or recordings, figures are better than they would be on new speakers and
data. So a protocol declares what its parts share, `audit` finds it, and `check_fold` refuses what is not declared.
"""

import hashlib
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from ser.data.manifest import Utterance
from ser.data.text import clean, did_you_mean
from ser.errors import ConfigError, ManifestError, indented, printable
from ser.files import write_json

PARTS = ("train", "valid", "test")
PAIRS = tuple(combinations(PARTS, 2))
KNOWN = "known"  # a further part: utterances of training speakers, see `with_known_turns`
KINDS = ("speakers", "dialogues", "sessions", "transcripts", "recordings", "copies")

KNOWN_SPEAKER_TURNS = 50  # utterances of each speaker that speaker-known holds out
KNOWN_TURNS = 10  # utterances of each training speaker that are held out to score a speaker head

Leaks = dict[tuple[str, str], frozenset[str]]
Having = dict[str, dict[str, str]]  # kind -> id of an utterance -> its value of this kind


@dataclass(frozen=True)
class Fold:
    """Hold one division of a manifest.

    Attributes:
        name: what is tested, such as "01F". A `Protocol` gives names that a folder can have (`folder_names`).
        parts: "train", "valid", "test" -> sorted ids. A protocol without validation has no "valid". After
            `with_known_turns` there is a part "known".
    """

    name: str
    parts: dict[str, list[str]]

    def select(self, utterances: Iterable[Utterance]) -> dict[str, list[Utterance]]:
        """Return the parts as utterances.

        Raises:
            ManifestError: an id is not among `utterances`.
        """
        by_id = {u.id: u for u in utterances}
        missing = sorted({i for ids in self.parts.values() for i in ids} - by_id.keys())
        if missing:
            raise ManifestError(
                f"fold {self.name}: {len(missing)} of its ids are not in the manifest, such as {missing[0]!r}; "
                "was it made from another manifest?"
            )
        return {part: [by_id[i] for i in ids] for part, ids in self.parts.items()}


def can_name_a_folder(name: str) -> bool:
    """Tell whether a folder can safely have this name on every system."""
    # Characters that are not printable are controls, invisible or undefined ones, and lone surrogates.
    plain = bool(name) and name.isprintable() and name[0] not in " .-~" and name[-1] not in " ."
    short = plain and FORBIDDEN.isdisjoint(name) and len(name.encode()) <= LONGEST
    return short and not RESERVED.fullmatch(name) and not TAKEN.fullmatch(name)


def folder_names(names: Iterable[str]) -> dict[str, str]:
    """Map each name to that of its folder: the name itself if it is safe, else its letters and a digest.

    All differ, even on a disk that ignores case, or that takes two Unicode forms of é for one.
    """
    folders: dict[str, str] = {}
    taken: set[str] = set()
    for name in names:
        called, plain = name, unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).casefold())
        if not can_name_a_folder(name) or plain in taken:
            letters = re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_")[:40]
            digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:12]
            called = f"{letters or 'fold'}~{digest}"
        taken.add(plain)
        folders[name] = called
    return folders


@dataclass(frozen=True)
class Protocol:
    """Describe how a corpus is divided, and what the figures then mean.

    Attributes:
        name: its name in results.
        description: what the protocol measures, and what its figures may be compared with.
        divide: (utterances, seed) -> folds; the order of the utterances does not matter.
        declares: (part, part), in the order train, valid, test -> the kinds that the two are known to share.
    """

    name: str
    description: str
    divide: Callable[[Sequence[Utterance], int], list[Fold]]
    declares: Leaks = field(default_factory=dict)

    def folds(self, utterances: Iterable[Utterance], *, seed: int = 0) -> list[Fold]:
        """Make the folds, in the order of their names.

        Raises:
            ManifestError: the manifest lacks a column that this protocol needs, or has too few utterances.
        """
        folds = self.divide(sorted(utterances, key=lambda u: u.id), seed)
        names = folder_names([fold.name for fold in folds])
        return [Fold(names[fold.name], fold.parts) for fold in folds]


# ----------------------------------------------------------------------------------------------------- names

# The name of a fold is a value in the manifest, and becomes the name of a folder and an argument of commands.
RESERVED = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|clock\$|(com|lpt)[0-9¹²³])\s*(\..*)?", re.IGNORECASE)
# Names like those of files that commands write beside the folders, and (the last kind) names of `folder_names`.
TAKEN = re.compile(r".*(\.(json|jsonl|md|csv|png|eval|log|tmp|lock)|~[0-9a-f]{12})", re.IGNORECASE | re.DOTALL)
FORBIDDEN = set('/\\:*?"<>|')  # not allowed in names of files on Windows; the first one nowhere
LONGEST = 150  # bytes of UTF-8; a path of Windows has 260 characters


# ------------------------------------------------------------------------------------------------- protocols


def _column(utterances: Sequence[Utterance], name: str, protocol: str) -> list[str]:
    """Return the value of each utterance. Raises ManifestError if one has none."""
    values = [u.speaker if name == "speaker" else u.extra.get(name) for u in utterances]
    missing = [u.id for u, value in zip(utterances, values, strict=True) if value is None]
    if missing:
        raise ManifestError(
            f"the protocol {protocol} needs the column {name!r}, which {len(missing)} of {len(utterances)} "
            f"utterances lack, such as {missing[0]!r}"
        )
    return [str(value) for value in values]


def _by_value(utterances: Sequence[Utterance], name: str, protocol: str, least: int = 2) -> dict[str, list[str]]:
    """Group the ids by value, both sorted. Raises ManifestError if there are fewer values than ``least``."""
    groups = defaultdict(list)
    for u, value in zip(utterances, _column(utterances, name, protocol), strict=True):
        groups[value].append(u.id)
    if len(groups) < least:
        raise ManifestError(
            f"the protocol {protocol} needs two values of {name!r} or more, found {sorted(groups)}"
        )
    return {value: sorted(groups[value]) for value in sorted(groups)}


def _except(groups: Mapping[str, list[str]], *names: str) -> list[str]:
    """Return the ids of all other groups."""
    return sorted(i for value, ids in groups.items() if value not in names for i in ids)


def _leave_one_out(groups: Mapping[str, list[str]], validates: Mapping[str, str] | None = None) -> list[Fold]:
    """Make a fold for each value, which tests on it and validates on the value that ``validates`` gives.

    By default the next value validates; with only two values there is no validation.
    """
    names = list(groups)
    if validates is None:
        validates = dict(zip(names, [*names[1:], names[0]], strict=True)) if len(names) > 2 else {}
    folds = []
    for name in names:
        valid = {"valid": groups[validates[name]]} if name in validates else {}
        train = _except(groups, name, validates.get(name, name))
        folds.append(Fold(name, {"train": train, **valid, "test": groups[name]}))
    return folds


def _paper10(utterances: Sequence[Utterance], seed: int) -> list[Fold]:
    groups = _by_value(utterances, "side", "paper10")
    return _leave_one_out(groups, {side: side for side in groups})


def _session5(utterances: Sequence[Utterance], seed: int) -> list[Fold]:
    return _leave_one_out(_by_value(utterances, "session", "session5"))


def _speaker10(utterances: Sequence[Utterance], seed: int) -> list[Fold]:
    groups = _by_value(utterances, "speaker", "speaker10")
    pairs = defaultdict(set)
    for u, session in zip(utterances, _column(utterances, "session", "speaker10"), strict=True):
        pairs[session].add(str(u.speaker))
    for session, speakers in sorted(pairs.items()):
        if len(speakers) != 2:
            raise ManifestError(
                f"the protocol speaker10 needs two speakers per session, found {sorted(speakers)} in {session}"
            )
    partner = {speaker: (pair - {speaker}).pop() for pair in pairs.values() for speaker in pair}
    return _leave_one_out(groups, partner)


def _draw_turns(groups: Mapping[str, list[str]], count: int, seed: int, what: str) -> set[str]:
    """Draw `count` ids of each speaker; ``what`` is for the message where a speaker has too few."""
    random = np.random.default_rng(seed)
    drawn: set[str] = set()
    for speaker, ids in groups.items():
        if len(ids) <= count:
            raise ManifestError(
                f"{what} holds out {count} utterances of each speaker, but {speaker} has only {len(ids)}; "
                "give a smaller number"
            )
        drawn |= {ids[i] for i in random.permutation(len(ids))[:count]}
    return drawn


def _speaker_known(utterances: Sequence[Utterance], seed: int, count: int) -> list[Fold]:
    groups = _by_value(utterances, "speaker", "speaker-known")
    test = _draw_turns(groups, count, seed, "the protocol speaker-known")
    return [Fold("all", {"train": [u.id for u in utterances if u.id not in test], "test": sorted(test)})]


def _transcript(u: Utterance) -> str:
    return _cleaned(u.text or "")


def _speaker_known_text(utterances: Sequence[Utterance], seed: int, count: int) -> list[Fold]:
    (fold,) = _speaker_known(utterances, seed, count)
    parts = fold.select(utterances)
    said = {text for u in parts["test"] if (text := _transcript(u))}
    train = [u for u in parts["train"] if _transcript(u) not in said]
    lost = {u.speaker for u in parts["train"]} - {u.speaker for u in train}
    if lost:
        raise ManifestError(
            f"the protocol speaker-known-text: all other utterances of {', '.join(sorted(map(str, lost)))} have a "
            "transcript that is held out, so none is left in training"
        )
    return [Fold(fold.name, {"train": [u.id for u in train], "test": fold.parts["test"]})]


_ACQUAINTED = frozenset({"speakers", "dialogues", "sessions"})


def _declared(*kinds: str) -> Leaks:
    """Declare that all pairs of parts share these kinds. Raises ConfigError for an unknown kind."""
    for kind in sorted(set(kinds) - set(KINDS)):
        raise ConfigError(f"unknown kind {kind!r}{did_you_mean(kind, KINDS)}; parts can share {', '.join(KINDS)}")
    return dict.fromkeys(PAIRS, frozenset(kinds))


def _known_speakers(count: int, *, disjoint_text: bool = False) -> Protocol:
    """Make the protocol speaker-known, or speaker-known-text."""
    suffix = "" if count == KNOWN_SPEAKER_TURNS else f":{count}"
    if disjoint_text:
        return Protocol(
            f"speaker-known-text{suffix}",
            f"The test turns of speaker-known{suffix}, and no turn in training that says what one of them says: "
            "the difference between the two figures is what remembered words give.",
            lambda utterances, seed: _speaker_known_text(utterances, seed, count),
            {("train", "test"): _ACQUAINTED},
        )
    return Protocol(
        f"speaker-known{suffix}",
        f"Every speaker is in training; {count} turns of each, drawn by the seed, are held out. For telling "
        "speakers apart. Nothing validates: evaluate the weights that training ends with.",
        lambda utterances, seed: _speaker_known(utterances, seed, count),
        {("train", "test"): _ACQUAINTED | {"transcripts"}},
    )


# Protocols for dialogues. The first three need the columns side or session, which IEMOCAP has.
PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "paper10",
            "Ten folds by recording side, as Cai et al. (INTERSPEECH 2021). Speaker-dependent: both test speakers "
            "are in training. The test fold is the evaluation fold, so what is chosen on it is chosen on the "
            "test. The only protocol whose figures may stand beside the paper's 78.15 %.",
            _paper10,
            _declared("speakers", "sessions", "transcripts") | {("valid", "test"): frozenset(KINDS)},
        ),
        # A whole session validates. A single speaker would share all dialogues with the partner, who would be in
        # training, and so the scenes, the room and the annotators.
        Protocol(
            "session5",
            "Leave one session out, the next one validates: no speaker, dialogue or session is in two parts. The "
            "scripts are the same in all sessions, so transcripts are shared.",
            _session5,
            _declared("transcripts"),
        ),
        Protocol(
            "speaker10",
            "Leave one speaker out, the partner in the same dialogues validates; the other four sessions train. "
            "Transcripts of the scripts are shared.",
            _speaker10,
            _declared("transcripts") | {("valid", "test"): frozenset({"dialogues", "sessions", "transcripts"})},
        ),
        _known_speakers(KNOWN_SPEAKER_TURNS),
        _known_speakers(KNOWN_SPEAKER_TURNS, disjoint_text=True),
    )
}


def by_column(*, shares: Iterable[str] = ()) -> Protocol:
    """Make the protocol that divides by a column `split` or `fold` of the manifest.

    With `split`, train, valid (validation, dev) and test make one fold. With `fold`, each value is the test part
    once and validates once.

    Args:
        shares: the kinds that all parts are known to share.
    """

    def divide(utterances: Sequence[Utterance], seed: int) -> list[Fold]:
        if not any(name in u.extra for u in utterances for name in ("split", "fold")):
            raise ManifestError("the protocol column needs a column 'split' or 'fold', which the manifest lacks")
        if not any("split" in u.extra for u in utterances):
            return _leave_one_out(_by_value(utterances, "fold", "column"))
        other_names = {"validation": "valid", "dev": "valid"}
        parts = defaultdict(list)
        for u, value in zip(utterances, _column(utterances, "split", "column"), strict=True):
            parts[other_names.get(value, value)].append(u.id)
        if unknown := sorted(parts.keys() - set(PARTS)):
            raise ManifestError(f"the column 'split' holds {unknown}, expected train, valid and test")
        return [Fold("all", {part: parts[part] for part in PARTS if part in parts})]

    return Protocol("column", "As the manifest's own column divides it.", divide, _declared(*shares))


def kfold(column: str, count: int, *, shares: Iterable[str] = ()) -> Protocol:
    """Make the protocol of `count` folds in which no value of `column` is in two parts; the next fold validates.

    With as many folds as values, each value is left out once. Else values are assigned to folds at random, by the
    seed.

    Args:
        column: "speaker" or an extra column.
        count: the number of folds, from 2 to the number of values.
        shares: the kinds that all parts are known to share, such as the "transcripts" of ten fixed sentences.
    """
    name = f"kfold:{column}:{count}"

    def divide(utterances: Sequence[Utterance], seed: int) -> list[Fold]:
        groups = _by_value(utterances, column, name)
        if not 2 <= count <= len(groups):
            raise ManifestError(f"{count} folds, but the column {column!r} has {len(groups)} values")
        if count < len(groups):
            values = list(groups)
            order = np.random.default_rng(seed).permutation(len(values))
            dealt = [[values[i] for i in order[first::count]] for first in range(count)]
            groups = {
                f"{number:0{len(str(count))}d}": sorted(i for value in part for i in groups[value])
                for number, part in enumerate(dealt, 1)
            }
        return _leave_one_out(groups)

    description = f"{count} folds by {column}; the next fold validates."
    return Protocol(name, description, divide, _declared(*shares))


def find_protocol(name: str, *, shares: Iterable[str] = ()) -> Protocol:
    """Find a protocol: one of `PROTOCOLS`, "speaker-known:COUNT" (utterances), "column", "kfold:COLUMN:COUNT".

    ``shares`` is for the last two: the kinds that all parts are known to share.

    Raises:
        ConfigError: there is no such protocol, or ``shares`` is given for one of the others.
    """
    own = PROTOCOLS.get(name)
    kind, _, rest = name.partition(":")
    if kind in ("speaker-known", "speaker-known-text") and rest.isdecimal() and int(rest):
        own = _known_speakers(int(rest), disjoint_text=kind.endswith("text"))
    if own is not None:
        if list(shares):
            raise ConfigError(f"the protocol {name} declares itself what its parts share")
        return own
    if name == "column":
        return by_column(shares=shares)
    column, _, count = rest.rpartition(":")
    if kind == "kfold" and column and count.isdecimal():
        return kfold(column, int(count), shares=shares)
    known = [*PROTOCOLS, "speaker-known:COUNT", "column", "kfold:COLUMN:COUNT"]
    raise ConfigError(f"no protocol is called {name!r}{did_you_mean(name, known)}; there are {', '.join(known)}")


def find_fold(protocol: Protocol, utterances: Sequence[Utterance], name: str | None, *, seed: int = 0) -> Fold:
    """Find the fold called ``name``; None: the only one. Raises ConfigError if there is none."""
    folds = {fold.name: fold for fold in protocol.folds(utterances, seed=seed)}
    if name is None and len(folds) == 1:
        return next(iter(folds.values()))
    called = name if name is None or name in folds else folder_names([name])[name]  # a name as in the manifest
    if called not in folds:
        asked = "no fold is named" if name is None else f"no fold is called {name!r}"
        raise ConfigError(f"{asked}; the protocol {protocol.name} has {', '.join(folds)}")
    return folds[called]


def usual_known_turns(fold: Fold, utterances: Iterable[Utterance]) -> int:
    """Return how many utterances of each training speaker to hold out: 10, but at most a tenth of a speaker's."""
    turns = Counter(u.speaker for u in fold.select(utterances)["train"])
    return min(KNOWN_TURNS, min(turns.values()) // 10) if None not in turns else 0


def with_known_turns(fold: Fold, utterances: Iterable[Utterance], count: int, *, seed: int = 0) -> Fold:
    """Move `count` utterances of each training speaker from "train" to a part "known".

    A speaker head cannot be scored on speakers that are not in training. If a protocol tests on such speakers, the
    head is scored on these utterances.

    Raises:
        ManifestError: a training speaker has only `count` utterances or fewer, or an utterance has no speaker.
    """
    train = fold.select(utterances)["train"]
    groups = _by_value(train, "speaker", "of known turns", least=0)
    known = _draw_turns(groups, count, seed, f"fold {fold.name}")
    parts = fold.parts | {"train": [i for i in fold.parts["train"] if i not in known], KNOWN: sorted(known)}
    return Fold(fold.name, parts)


# ----------------------------------------------------------------------------------------------------- audit


@dataclass(frozen=True)
class Shared:
    """Hold the values of one kind that two parts share.

    Attributes:
        values: names, transcripts or ids, sorted.
        utterances: how many utterances of the second part have one of these values.
        known: how many utterances of the second part have any value.
    """

    values: list[str]
    utterances: int
    known: int

    @property
    def fraction(self) -> float:
        """Return the share of utterances with a shared value, among those of the second part with any value."""
        return self.utterances / self.known if self.known else 0.0


@dataclass(frozen=True)
class Audit:
    """Hold the sizes of a fold's parts, and what the parts share.

    Attributes:
        fold: the name of the fold.
        classes: part -> emotion -> number of utterances.
        shared: (part, part) -> kind -> what is shared, or None if the manifest does not tell.
    """

    fold: str
    classes: dict[str, dict[str, int]]
    shared: dict[tuple[str, str], dict[str, Shared | None]]

    def fractions(self, part: str, *, of: str = "train") -> dict[str, float | None]:
        """Return kind -> the share of ``part`` whose speaker, text, ... is also in ``of``; None: not known."""
        kinds = self.shared.get((of, part), {})
        return {kind: None if shared is None else shared.fraction for kind, shared in kinds.items()}


_cleaned = lru_cache(maxsize=100_000)(clean)  # each text is cleaned again for every fold


def _value(u: Utterance, kind: str) -> str:
    """Return the utterance's value of a kind, which is compared between parts; empty if unknown."""
    if kind == "speakers":
        return u.speaker or ""
    if kind == "transcripts":
        return _transcript(u)
    if kind == "recordings":
        return f"{os.path.normpath(u.file.absolute())} {u.start or 0.0} {u.end}"
    return u.extra.get({"dialogues": "dialogue", "sessions": "session", "copies": "sha256"}[kind], "")


def _having(rows: Iterable[Utterance]) -> Having:
    """Collect kind -> id -> value of the utterance."""
    rows = list(rows)
    return {kind: {u.id: value for u in rows if (value := _value(u, kind))} for kind in KINDS}


def _shared(first: Mapping[str, str], second: Mapping[str, str], *, ids: bool) -> Shared | None:
    """Find what two parts share, each given as id -> value; None if one of them has no values."""
    if not first or not second:
        return None
    there = set(first.values())
    hits = {id_: value for id_, value in second.items() if value in there}
    return Shared(sorted(hits if ids else set(hits.values())), len(hits), len(second))


def _overlap(first: Having, second: Having) -> dict[str, Shared | None]:
    """Find what two parts share of each kind."""
    return {kind: _shared(first[kind], second[kind], ids=kind in ("recordings", "copies")) for kind in KINDS}


def audit(fold: Fold, utterances: Iterable[Utterance]) -> Audit:
    """Find what any two parts share.

    Transcripts are compared after `clean`; utterances without one are ignored. Recordings are the same if their
    file, start and end are the same. Copies are found by the column `sha256` of the decoded samples, which
    `datasheet.listen` adds; without this column they are unknown. Excerpts that only overlap are not found.

    Raises:
        ManifestError: the fold has an id that is not among `utterances`.
    """
    parts = fold.select(utterances)
    having = {part: _having(rows) for part, rows in parts.items()}
    shared = {
        (first, second): _overlap(having[first], having[second])
        for first, second in (*PAIRS, ("train", KNOWN))
        if first in parts and second in parts
    }
    classes = {
        part: dict(sorted(Counter(u.emotion or "unlabelled" for u in rows).items()))
        for part, rows in parts.items()
    }
    return Audit(fold.name, classes, shared)


def overlap(first: Iterable[Utterance], second: Iterable[Utterance]) -> dict[str, Shared | None]:
    """Return kind -> what both sets have; None if the manifests do not tell."""
    return _overlap(_having(first), _having(second))


def check_fold(fold: Fold, utterances: Iterable[Utterance], protocol: Protocol) -> Audit:
    """Check that a fold is complete, and that its parts share only what the protocol declares.

    If the manifest does not tell (a column is missing), nothing is refused; the audit then has None, and the table
    "unknown".

    Returns:
        The audit.

    Raises:
        ManifestError: train or test is missing, a part is empty or has an id twice, an id is unknown, or parts
            share what is not declared; the message lists all of it.
    """
    problems = [f"the part {part} is missing" for part in ("train", "test") if part not in fold.parts]
    for part, ids in fold.parts.items():
        if not ids:
            problems.append(f"the part {part} is empty")
        if twice := sorted(i for i, n in Counter(ids).items() if n > 1):
            problems.append(f"the part {part} has {twice[0]!r} twice")
    audited = audit(fold, utterances)
    for (first, second), kinds in audited.shared.items():
        for kind, shared in kinds.items():
            declared = protocol.declares.get((first, second), ())
            if second == KNOWN:  # these utterances are by training speakers, by definition
                declared = _ACQUAINTED | {"transcripts"}
            if shared is not None and shared.values and kind not in declared:
                some = ", ".join(map(repr, shared.values[:5])) + (", ..." if len(shared.values) > 5 else "")
                problems.append(
                    f"{first} and {second} share {len(shared.values)} {kind} ({some}): "
                    f"{shared.utterances} utterances of {second}"
                )
    if problems:
        raise ManifestError(
            f"fold {fold.name}: the protocol {protocol.name} does not permit this:{indented(problems)}"
        )
    return audited


def _percent(shared: Shared | None) -> str:
    """Write a share in per cent."""
    return "unknown" if shared is None else f"{100 * shared.fraction:.1f} %"


def to_table(audits: Iterable[Audit]) -> str:
    """Return a table of the sizes of parts, and of the shares of the test part that are also in training.

    The share is "unknown" for a kind that the manifest does not tell.
    """
    head = ["fold", *PARTS, *(f"{kind} in train" for kind in KINDS), "valid is test"]
    rows = [head]
    for a in audits:
        sizes = {part: sum(counts.values()) for part, counts in a.classes.items()}
        cells = [_percent(a.shared.get(("train", "test"), {}).get(kind)) for kind in KINDS]
        both = a.shared.get(("valid", "test"), {}).get("recordings")
        rows.append([printable(a.fold), *(str(sizes.get(part, "-")) for part in PARTS), *cells,
                     _percent(both) if "valid" in sizes else "-"])  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines) + "\n"


def _to_json(audited: Audit) -> dict[str, Any]:
    """Return the counts of what parts share, for a file of folds."""
    return {
        "/".join(pair): {
            kind: None if s is None else {"values": len(s.values), "utterances": s.utterances, "known": s.known}
            for kind, s in kinds.items()
        }
        for pair, kinds in audited.shared.items()
    }


# ----------------------------------------------------------------------------------------------------- files


def write_folds(
    path: Path, protocol: Protocol, folds: Sequence[Fold], utterances: Sequence[Utterance], *, seed: int
) -> list[Audit]:
    """Check the folds and write them as JSON: lists of ids, what the protocol declares, and what parts share.

    Returns:
        The audits.

    Raises:
        ManifestError: as `check_fold`; or the file cannot be written. The file is written whole or not at all.
    """
    audits = [check_fold(fold, utterances, protocol) for fold in folds]
    content = {
        "protocol": protocol.name,
        "description": protocol.description,
        "seed": seed,
        "declares": {"/".join(pair): sorted(kinds) for pair, kinds in protocol.declares.items()},
        "folds": [
            {"name": fold.name, "parts": fold.parts, "classes": audited.classes, "shared": _to_json(audited)}
            for fold, audited in zip(folds, audits, strict=True)
        ],
    }
    try:
        write_json(path, content)
    except OSError as error:
        raise ManifestError(f"{path}: cannot write the folds: {error.strerror or error}") from error
    return audits

"""Read several corpora as one set of utterances, in which equal names of two corpora stay different.

Several manifests are given by their paths, or by one JSON file that lists them:

    [{"path": "emodb/train.csv"},
     {"path": "tess.csv", "root": "TESS", "columns": {"emotion": "label"}, "map": {"ps": "surprised"},
      "name": "tess"}]

These rules hold then:

- Each utterance has its corpus in the column `corpus`. If the manifest has a cell in this column, that is the
  corpus; else it is the name of the manifest. So one manifest with this column, in a list, is the same as several.
- Ids, speakers, dialogues and sessions become ``corpus/name``, so speaker 1 of two corpora is two people.
- The map of a manifest renames labels as they are written. The common map (--map) renames the result. It has
  speakers as ``corpus/name``, so it can also say that a person is in two corpora.

A single manifest that no list names is read as before, even if it has a column `corpus`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ser.data.cells import Missing
from ser.data.corpora import found_manifest
from ser.data.manifest import (
    DECODER,
    Utterance,
    check_distinct,
    check_regular,
    collector_paused,
    map_for,
    read_unnamed,
    unknown_in_map,
    why_no_corpus,
    with_names,
)
from ser.data.spellings import check_map, spelling
from ser.data.text import did_you_mean, nfc
from ser.errors import ConfigError, ManifestError, Tell, brief_repr, shorten, summary
from ser.files import StrPath, digest

MAX_LIST_BYTES = 1024 * 1024  # of a JSON file that lists manifests; a larger one is a manifest
EXAMPLE = '[{"path": "a.csv"}, {"path": "b.csv", "root": "recordings", "name": "b"}]'  # a list in messages
# These words in the name of a file say which part of a corpus it is, or that it is a table, and not which corpus.
PARTS = re.compile(
    r"(^|[-_. ])(train|training|valid|validation|val|dev|development|test|testing|eval|metadata|manifest|labels)"
    r"(?=$|[-_. ])",
    re.IGNORECASE,
)
WITHIN_A_CORPUS = ("dialogue", "session")  # columns whose values mean something in one corpus alone


@dataclass(frozen=True)
class NamedManifest:
    """Describe one manifest of several.

    Attributes:
        path: where the manifest is.
        root: the folder that its files are relative to; None: the manifest's own folder.
        columns: our column names -> those of the manifest.
        map: the map of its labels, see `ser.data.spellings.parse_map`.
        name: the corpus of rows that have no cell in the column `corpus`.
        sha256: the digest of the manifest; empty: any content is accepted.
    """

    path: str
    root: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    map: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    sha256: str = ""

    @classmethod
    def from_dict(cls, values: object, where: str) -> NamedManifest:
        """Read one item of a list. Raises ConfigError for anything else, with a message that begins ``where``."""
        known = [f.name for f in fields(cls)]
        if not isinstance(values, dict):
            raise ConfigError(f"{where}: found {brief_repr(values)}, expected an object such as in {EXAMPLE}")
        for name in [name for name in values if name not in known]:
            near = did_you_mean(name, known[:-1])
            raise ConfigError(f"{where}: unknown key {brief_repr(name)}{near}; known are {', '.join(known[:-1])}")
        kinds = {name: str | None if value is None else type(value) for name, value in asdict(cls("")).items()}
        for name, value in values.items():
            names = value.values() if name == "columns" and isinstance(value, dict) else ()
            if not isinstance(value, kinds[name]) or not all(isinstance(one, str) for one in names):
                expected = {"columns": "an object of names", "map": "an object"}.get(name, "a text")
                raise ConfigError(f"{where}: {name} is {brief_repr(value)}, expected {expected}")
        if not values.get("path", "").strip():
            raise ConfigError(f"{where}: has no path; expected an object such as in {EXAMPLE}")
        return replace(cls(**values), map=check_map(values.get("map", {}), f"{where}: map"))


# ------------------------------------------------------------------------------------------------------ names


def default_name(path: StrPath) -> str:
    """Name a corpus after its manifest: the file's stem without train, metadata and the like, else its folder.

    emodb/train.csv, emodb/valid.csv and emodb-test.csv are all of emodb. aesdd/emobox.csv is of aesdd, since
    `ser prepare` gives the manifests of all corpora that EmoBox lists one name.
    """
    there = Path(os.path.abspath(path))  # noqa: PTH100 (which takes .. out of the path)
    stem = "" if there.stem == "emobox" else there.stem
    names = (PARTS.sub("", name).strip("-_. ") for name in (stem, *(p.name for p in there.parents)))
    return nfc(next(filter(None, names), ""))


def check_corpora(names: Iterable[str]) -> None:
    """Refuse names of corpora that differ in spelling alone. Raises ConfigError."""
    spelt: dict[str, str] = {}
    for name in sorted(names):
        if (other := spelt.setdefault(spelling(name), name)) != name:
            both = f"{brief_repr(other)} and {brief_repr(name)}"
            raise ConfigError(f"the corpora {both} differ in spelling alone; name them in a JSON list")


def check_sources(sets: Mapping[str, Sequence[NamedManifest]]) -> None:
    """Refuse bad names of corpora, and two manifests with the same name in a set.

    Args:
        sets: such as "train" and "valid" -> their manifests. The same name in two sets means the same corpus.

    Raises:
        ConfigError: a name is missing or used twice, a manifest is given twice, or two names differ only in
            spelling.
    """
    advice = f"name them in a JSON list, such as {EXAMPLE}"
    for title, sources in sets.items():
        seen: dict[str, NamedManifest] = {}
        for source in sources:
            if why := why_no_corpus(source.name):
                raise ConfigError(f"{source.path}: the corpus {brief_repr(source.name)} {why}; {advice}")
            if (other := seen.setdefault(source.name, source)) is not source:
                both = f"{other.path} and {source.path}"
                if os.path.realpath(other.path) == os.path.realpath(source.path):
                    raise ConfigError(f"{title}: {source.path} is given twice")
                raise ConfigError(f"{title}: {both} are both called {brief_repr(source.name)}; {advice}")
    check_corpora({source.name for sources in sets.values() for source in sources})


# ------------------------------------------------------------------------------------------------------ lists


def _is_manifest(row: object) -> bool:
    """Tell whether a row names a manifest by its path, and has the keys of a list alone."""
    if not isinstance(row, dict) or not row.keys() <= {f.name for f in fields(NamedManifest)}:
        return False
    return str(row.get("path")).lower().endswith((".csv", ".tsv", ".json", ".jsonl"))


def listed(path: StrPath, file_column: str = "file") -> list[dict[str, Any]] | None:
    """Return the items of a JSON file that lists manifests; None for a file that is a manifest itself.

    A .json file is a list unless an object in it has a file, as rows of a manifest have. If the column of files is
    called "path", as in a list, a list is told by its paths, which are those of tables.

    Raises:
        ConfigError: the file is neither; the message is one line.
    """
    path = Path(path)
    try:
        if path.suffix.lower() != ".json" or not path.is_file() or path.stat().st_size > MAX_LIST_BYTES:
            return None
        text = path.read_bytes().decode("utf-8-sig").strip()
    except (OSError, ValueError):
        return None  # reading a manifest says why
    try:
        items = DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        if not text.startswith("[") or '"path"' not in text or f'"{file_column}"' in text:
            return None
        raise ConfigError(f"{path}: is no JSON list of manifests: {shorten(str(error), 200)}") from None
    rows = items if isinstance(items, list) else [items]
    if any(isinstance(row, dict) and file_column in row for row in rows) and not all(map(_is_manifest, rows)):
        return None
    if not isinstance(items, list):
        raise ConfigError(f"{path}: found {brief_repr(items, 80)}, expected a list of manifests such as {EXAMPLE}")
    if not items:
        raise ConfigError(f"{path}: lists no manifest and has no rows; a list is such as {EXAMPLE}")
    return items


def read_list(path: StrPath, file_column: str = "file") -> list[NamedManifest] | None:
    """Read a JSON file that lists manifests; None for a manifest. Paths in it start from its folder.

    Raises:
        ConfigError: an item is no object, lacks the path, has an unknown key or a wrong type, or is a list itself.
    """
    items = listed(path, file_column)
    if items is None:
        return None
    sources, folder = [], Path(path).parent
    for number, item in enumerate(items, 1):
        where = f"{path}: item {number}"
        if isinstance(item, dict) and "sha256" in item:
            raise ConfigError(f"{where}: unknown key 'sha256'; known are path, root, columns, map, name")
        source = NamedManifest.from_dict(item, where)
        name = source.name or default_name(folder / source.path)
        source = replace(source, path=str(found_manifest(folder / source.path)), name=nfc(name.strip()))
        if source.root is not None:
            source = replace(source, root=str(folder / source.root))
        columns = source.columns or {"file": file_column}
        if listed(source.path, columns.get("file", "file")) is not None:
            raise ConfigError(f"{where}: {source.path} is a list of manifests itself; list manifests alone")
        sources.append(source)
    return sources


# ---------------------------------------------------------------------------------------------------- reading


def sha256_of(path: Path) -> str:
    """Return the present sha256 of a manifest. Raises ManifestError if it cannot be read."""
    try:
        check_regular(path, "a CSV or JSON lines manifest")
        return digest(path)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        cause = error.strerror if isinstance(error, OSError) else error
        raise ManifestError(f"{path}: cannot be read: {cause}") from None


def stamped(source: NamedManifest) -> NamedManifest:
    """Return the source with the present sha256 of its manifest. Raises ManifestError if it cannot be read."""
    return replace(source, sha256=sha256_of(Path(source.path)))


def composed(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Return one map for two maps of emotions that are applied in turn, and the first map of speakers."""
    own, common = (map_for(one, "emotion") for one in (first, second))
    both = common | {old: common.get(new, new) if new is not None else None for old, new in own.items()}
    return {**both, "speaker": map_for(first, "speaker")}


def _set_apart(utterances: list[Utterance]) -> None:
    """Change speakers, dialogues and sessions of rows to corpus/name, in the rows themselves, which are new."""
    shared: dict[tuple[str, str], str] = {}  # one string for all rows of a speaker
    for u in utterances:
        corpus = u.extra["corpus"]
        for cells, columns in ((u.labels, ("speaker",)), (u.extra, WITHIN_A_CORPUS)):
            for column in columns:
                if (name := cells.get(column)) is not None:
                    cells[column] = shared.setdefault((corpus, name), f"{corpus}/{name}")


@collector_paused()
def read_sources(
    sources: Sequence[NamedManifest],
    *,
    label_map: Mapping[str, Any],
    literal_labels: bool = False,
    check_files: bool = True,
    tell: Tell | None = None,
) -> list[Utterance]:
    """Read all manifests, in their order; the module's docstring has the rules.

    Args:
        sources: the manifests.
        label_map: the common map, which is applied after the manifests' own maps.
        literal_labels, check_files, tell: as in `read_manifest`.

    Raises:
        ManifestError: as in `read_manifest`; or the content of a manifest is another one than its sha256 says; or
            a recording or an id is in two manifests.
    """
    lines: list[str] = []
    everything: list[Utterance] = []
    heard: list[Utterance] = []  # one of each emotion as it is written
    for source in sources:
        if source.sha256 and stamped(source).sha256 != source.sha256:
            raise ManifestError(f"{source.path}: has changed since; its sha256 was {source.sha256}")
        missing = Missing(literal=literal_labels)
        utterances, notes = read_unnamed(
            Path(source.path), root=source.root, columns=source.columns, check_files=check_files, missing=missing,
            corpus=source.name,
        )  # fmt: skip
        lines += notes
        lines += unknown_in_map(source.map, utterances)
        heard += list({u.emotion: u for u in utterances}.values())
        utterances = with_names(utterances, composed(source.map, label_map), missing, lines)
        lines += missing.lines()
        _set_apart(utterances)
        everything += utterances
    check_distinct(everything)
    made = {new for source in sources for new in map_for(source.map, "emotion").values()}
    lines += unknown_in_map({old: new for old, new in label_map.items() if old not in made}, heard, ["emotion"])
    if speakers := map_for(label_map, "speaker"):
        lines += unknown_in_map(label_map, everything, ["speaker"])
        everything = with_names(everything, {"speaker": speakers}, Missing(literal=True), lines)
    if tell is not None:
        for line in lines:
            tell(line)
    return everything


def unfamiliar_corpora(title: str, utterances: Iterable[Utterance], training: Iterable[Utterance]) -> list[str]:
    """Return a line if a set has corpora that training does not have, since their speakers count as new."""
    here, there = ({u.corpus for u in rows} for rows in (utterances, training))
    if not (new := sorted(here - there)):
        return []
    known = summary(sorted(there))
    but = f"training does not have (it has {known}), so their speakers count as new"
    return [f"{title} has corpora that {but}: {summary(new)}"]


def combined_sha256(sources: Sequence[NamedManifest]) -> str:
    """Return a digest of the names and contents of manifests, in their order."""
    pairs = json.dumps([[source.name, source.sha256] for source in sources])
    return hashlib.sha256(pairs.encode()).hexdigest()

"""Read any corpus that EmoBox lists (Ma et al., Interspeech 2024), with its label map and its folds.

    EmoBox/data/aesdd/
        aesdd.jsonl                       an utterance a line: key, wav, emo; start_time and end_time of an excerpt
        label_map.json                    emo -> the name of the class
        fold_1/aesdd_train_fold_1.jsonl   such lines again; also ..._test_..., and of some corpora ..._valid_...
    EmoBox/downloads/aesdd/anger/a03 (3).wav

The recordings are not part of EmoBox: everyone gets them from the owners of the corpora. EmoBox names no speakers
and no texts, so a corpus that has a reader of its own is better read with that one.
"""

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ser.containers import SUFFIXES
from ser.data.cells import Files
from ser.data.manifest import Utterance, check_regular, unique_names
from ser.data.release import Corpus, Dropped
from ser.errors import ManifestError, brief_repr, indented, shorten
from ser.files import StrPath

# Classes of the label maps, in small letters -> our names; other names stay, None is no label.
NAMES: dict[str, str | None] = {"fear": "fearful", "disgust": "disgusted", "surprise": "surprised"}
NAMES |= {"boredom": "bored", "contempt": "contemptuous", "pleasure": "pleased", "pain, groan": "pained"}
NAMES |= {"disappointment, disapproval": "disappointed", "no-agreement": None, "unknown": None}

# Unlike that of manifests, it reads NaN as a number, which is no time.
DECODER = json.JSONDecoder(object_pairs_hook=unique_names)

# Utterances of each corpus, as EmoBox publishes them.
COUNTS = {"aesdd": 604, "ased": 2474, "asvpesd": 13964, "cafe": 936, "casia": 1200, "cremad": 7442, "emns": 1181}
COUNTS |= {"emodb": 535, "emovdb": 6887, "emovo": 588, "emozionalmente": 6902, "enterface": 1263, "esd": 35000}
COUNTS |= {"iemocap": 5531, "jlcorpus": 2400, "m3ed": 24437, "mead": 31729, "meld": 13706, "mer2023": 5030}
COUNTS |= {"mesd": 862, "msppodcast": 73042, "oreau": 434, "pavoque": 7334, "polish": 450, "ravdess": 1440}
COUNTS |= {"resd": 1396, "savee": 480, "shemo": 2838, "subesco": 7000, "tess": 2800, "turevdb": 1735, "urdu": 400}


def _bytes(path: Path) -> bytes:
    """Read a file of EmoBox. Raises ManifestError where it cannot be read."""
    try:
        check_regular(path, "a file of EmoBox")
        return path.read_bytes()
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read: {error.strerror or error}") from None


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number and the object of each line that is not blank.

    Raises:
        ManifestError: a line holds no object with a key; the message names it.
    """
    for number, line in enumerate(_bytes(path).splitlines(), 1):
        if line.strip():
            try:
                row = DECODER.decode(line.decode("utf-8-sig"))
                if not isinstance(row, dict) or not isinstance(row.get("key"), str) or not row["key"]:
                    raise ValueError(f"found {brief_repr(row)}, expected an object with a key")
            except (ValueError, RecursionError) as error:
                raise ManifestError(f"{path}: line {number}: {shorten(str(error), 200)}") from None
            yield number, row


def _label_map(folder: Path) -> dict[str, str]:
    """Read label_map.json (of EMOVO label_dict.json): emo, in small letters -> class, in small letters."""
    path = next((p for p in (folder / "label_map.json", folder / "label_dict.json") if p.exists()), None)
    if path is None:
        raise ManifestError(f"{folder}: no label_map.json, which names the classes")
    try:
        names = DECODER.decode(_bytes(path).decode("utf-8-sig").strip())
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise ValueError("expected an object of names")
        classes: dict[str, str] = {}
        for emo, name in names.items():
            key, value = emo.lower(), name.lower()
            if not value.strip():
                raise ValueError(f"the class of {emo!r} is empty")
            if (other := classes.setdefault(key, value)) != value:
                raise ValueError(f"{key!r} is both {other!r} and {value!r}")
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{path}: {shorten(str(error), 200)}") from None
    return classes


def _folds(folder: Path, corpus: str) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Read the folds: key -> {"split": part}, or {"fold": the fold that tests it}; return nothing without folds.

    One fold makes the column split, with train, valid and test; several make the column fold. The second result
    warns of files with other names.

    Raises:
        ManifestError: a file cannot be read, or has an utterance that another one has too.
    """
    files: dict[str, dict[str, Path]] = defaultdict(dict)
    others: list[str] = []
    for path in sorted(folder.glob("fold_*/*.jsonl")):
        name = path.relative_to(folder).as_posix()
        match = re.fullmatch(rf"fold_(\d+)/{re.escape(corpus)}_(train|valid|test)_fold_\1\.jsonl", name)
        if match:
            files[match[1]][match[2]] = path
        else:
            others.append(name)
    columns: dict[str, dict[str, str]] = {}
    for fold, parts in files.items():
        for part, path in parts.items():
            if len(files) > 1 and part != "test":
                continue
            column = {"split": part} if len(files) == 1 else {"fold": fold}
            for line, row in _objects(path):
                if columns.setdefault(row["key"], column) is not column:
                    there = " ".join(next(iter(columns[row["key"]].items())))
                    raise ManifestError(f"{path}: line {line}: {row['key']!r} is also in another list ({there})")
    if not others:
        return columns, []
    what = f"{len(others)} files of folds are not read, such as {others[0]}"
    return columns, [f"{folder}: {what}; expected names such as fold_1/{corpus}_test_fold_1.jsonl"]


def _listed_utterance(row: Mapping[str, Any], root: Path, classes: Mapping[str, str]) -> Utterance:
    """Make an utterance of a line. Raises ValueError where something is missing or no number."""
    if missing := [name for name in ("wav", "emo") if not isinstance(row.get(name), str) or not row[name]]:
        raise ValueError(f"the value of {missing[0]!r} is missing")
    if row["emo"].lower() not in classes:
        raise ValueError(f"the emotion {row['emo']!r} is not in the label map, which has {', '.join(classes)}")
    times = [row.get("start_time"), row.get("end_time")]
    for time in times:
        if time is not None and (type(time) not in (int, float) or not 0 <= time < math.inf):
            raise ValueError(f"found {brief_repr(time)}, expected seconds, 0 or more")
    name = classes[row["emo"].lower()]
    emotion = NAMES.get(name, name)
    return Utterance(
        row["key"], root / row["wav"], start=times[0], end=times[1], emotion=emotion, extra={"code": row["emo"]}
    )


def _listed(path: Path, root: Path, classes: Mapping[str, str]) -> dict[str, Utterance]:
    """Read the list: key -> utterance. Raises ManifestError, which names a line that is not one."""
    rows: dict[str, Utterance] = {}
    for line, row in _objects(path):
        try:
            u = _listed_utterance(row, root, classes)
            if u.id in rows:
                raise ValueError(f"the key {u.id!r} occurs twice")
        except ValueError as error:
            raise ManifestError(f"{path}: line {line}: {error}") from None
        rows[u.id] = u
    return rows


def _file_of(u: Utterance, files: Files) -> tuple[Path, str]:
    """Find the recording; or say why there is none. Sound that was taken out of a video may lie beside it."""
    found = files.find(u.file)
    if found.suffix.lower() in SUFFIXES:
        return found, "" if found.is_file() else "no recording"
    if not found.suffix:
        return found, "its name has no suffix such as .wav"
    sounds = (files.find(u.file.with_suffix(suffix)) for suffix in (".wav", ".flac"))
    sound = next((file for file in sounds if file.is_file()), None)
    return sound or found, "" if sound else f"no sound: convert the {found.suffix} file to .wav"


def _repeated(utterances: Iterable[Utterance]) -> Iterator[Dropped]:
    """Find utterances whose recording occurs in the list twice: with one emotion, or with several."""
    alike = defaultdict(list)
    for u in utterances:
        alike[u.file, u.start, u.end].append(u)
    for same in alike.values():
        if len({u.emotion for u in same}) > 1:
            yield from (Dropped(u.id, "its recording is listed with several emotions") for u in same)
        else:
            yield from (Dropped(u.id, "its recording is listed already") for u in same[1:])


def read_emobox(folder: StrPath, *, root: StrPath | None = None) -> Corpus:
    """Read a corpus as EmoBox lists it.

    Args:
        folder: of the lists, such as EmoBox/data/aesdd.
        root: the folder that has downloads/, by default EmoBox.

    Returns:
        Utterances with the columns code (EmoBox's emo) and split or fold, as far as there are folds. Utterances in
        none of train, valid and test are dropped.

    Raises:
        ManifestError: a list cannot be read (the message names the line), or none of the recordings is there.
    """
    folder = Path(folder).absolute()
    root = folder.parent.parent if root is None else Path(root).absolute()
    lists = sorted(folder.glob("*.jsonl"))
    if len(lists) != 1:
        raise ManifestError(f"{folder}: {len(lists)} lists of utterances, expected one as in EmoBox/data/aesdd")
    (path,) = lists
    rows = _listed(path, root, _label_map(folder))
    columns, warnings = _folds(folder, path.stem)
    dropped = list(_repeated(rows.values()))
    files, utterances = Files(), []
    for key in sorted(rows.keys() - {d.what for d in dropped}):
        u = rows[key]
        file, why = _file_of(u, files)
        if columns and key not in columns:
            why = "in none of train, valid and test"
        if why:
            dropped.append(Dropped(key, why))
        else:
            extra = {**u.extra, **columns.get(key, {})}
            utterances.append(Utterance(key, file, start=u.start, end=u.end, labels=u.labels, extra=extra))
    dropped += [Dropped(key, "in a fold, but not in the list") for key in sorted(columns.keys() - rows.keys())]
    if not utterances:
        reasons = indented(f"{n} x {why}" for why, n in Counter(d.why for d in dropped).most_common())
        advice = "Give --root, the folder that has downloads"
        raise ManifestError(f"{folder}: none of its {len(rows)} recordings is below {root}{reasons}\n{advice}")
    expected = COUNTS.get(path.stem, len(rows))
    warnings += [f"{path}: {len(rows)} utterances, EmoBox has {expected}"] if len(rows) != expected else []
    return Corpus(root, utterances, dropped, warnings)

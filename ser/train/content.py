"""Compare runs by content: by digests of their utterances, and of the weights that they began with.

Paths are recorded but not compared. So a stopped run continues after its recordings, its manifests or ``--init``
were moved.
"""

import hashlib
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from ser.data.dataset import SpeechDataset
from ser.data.labels import DIMENSIONS, label_columns
from ser.data.manifest import Utterance
from ser.data.text import nfc
from ser.errors import brief_repr
from ser.files import digest

# The keys of a `Selection`, as a dictionary, that do not depend on where the manifest is.
NAMES = ("protocol", "shares", "seed", "fold", "known_turns", "part")


def weights_sha256(folder: Path) -> str:
    """Return the sha256 of all safetensors files of a model folder, in the order of their names."""
    total = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        total.update(path.name.encode())
        total.update(bytes.fromhex(digest(path)))
    return total.hexdigest()


def rows_sha256(rows: Iterable[tuple[Any, ...]]) -> str:
    """Return the sha256 of tuples in their order."""
    total = hashlib.sha256()
    for row in rows:
        total.update(repr(row).encode("utf-8", "surrogatepass"))
    return total.hexdigest()


def names_of_files(utterances: Sequence[Utterance]) -> list[str]:
    """Return the path of each utterance's file, relative to the folder that all files share.

    So the names stay the same when the whole corpus is moved, even if the manifest has absolute paths.
    """
    files = [Path(os.path.normpath(u.file.absolute())).parts for u in utterances]
    folders = [parts[:-1] for parts in files] or [()]
    ends = zip(min(folders), max(folders), strict=False)  # the first and last in order share what all share
    shared = len(list(takewhile(lambda pair: pair[0] == pair[1], ends)))
    return [nfc("/".join(parts[shared:])) for parts in files]


def contents(utterances: Sequence[Utterance], lengths: Sequence[int] | None = None) -> dict[str, Any]:
    """Count the utterances, and return a digest of each of their properties that training depends on.

    Training does not depend on ids.
    """
    columns: dict[str, Iterable[Any]] = {
        "files": names_of_files(utterances),
        "excerpts": ((u.start, u.end) for u in utterances),
        "emotions": (u.emotion for u in utterances),
        "texts": (u.text for u in utterances),
        "speakers": (u.speaker for u in utterances),
        "dimensions": (tuple(map(u.labels.get, DIMENSIONS)) for u in utterances),
    }
    ours = {"emotion", "text", "speaker", *DIMENSIONS}
    added = [c for c in label_columns() if c not in ours and any(c in u.labels for u in utterances)]
    columns |= {column: [u.labels.get(column) for u in utterances] for column in added}
    columns |= {} if lengths is None else {"lengths": lengths}
    digests = {name: rows_sha256((row,) for row in rows) for name, rows in columns.items()}
    return {"utterances": len(utterances)} | digests


def fingerprint(dataset: SpeechDataset) -> str:
    """Return the digest that earlier releases recorded instead of `contents`. It depends on ids, perhaps paths."""
    return rows_sha256(
        (u.id, u.start, u.end, u.emotion, u.text, u.speaker, *map(u.labels.get, DIMENSIONS), length)
        for u, length in zip(dataset.utterances, dataset.lengths, strict=True)
    )


def changed_data(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """Compare the `contents` of each set. If only names of files differ, the difference is called "files"."""
    found = {}
    for part in sorted({*before, *now}):
        old, new = before.get(part) or {}, now.get(part) or {}
        differing = [name for name in {**old, **new} if old.get(name) != new.get(name)]
        if differing == ["files"]:
            found["files"] = (
                f"files: {part} has other names of files then and now, below the folder that all share; all else "
                "of it is the same"
            )
        elif differing:
            counts = f"{old.get('utterances', 0)} utterances then, {new.get('utterances', 0)} now"
            others = f"other {', '.join(differing)} now, or another order"
            found[f"data.{part}"] = f"data.{part}: {counts if 'utterances' in differing else others}"
    return found


def changed_fingerprints(before: Mapping[str, str], now: Mapping[str, str]) -> dict[str, str]:
    """Compare the `fingerprint` of each set."""
    return {
        f"data.{part}": f"data.{part}: other ids, labels, texts, excerpts or lengths now, or another order (an "
        "earlier release recorded no more; it took labels as they are written, as --literal-labels does)"
        for part in sorted({*before, *now})
        if before.get(part) != now.get(part)
    }


def settings_without_paths(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings without their paths."""
    kept = dict(settings)
    for part in ("train", "valid"):
        if isinstance(kept.get(part), Mapping):
            kept[part] = {name: kept[part].get(name) for name in NAMES}
    if "cache" in kept:
        kept["cache"] = "kept in a folder" if kept["cache"] else "none"
    return kept


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings: {"a": {"b": 1}} -> {"a.b": 1}."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found


def changed_settings(
    before: Mapping[str, Any], now: Mapping[str, Any], *, may_change: Collection[str]
) -> dict[str, str]:
    """Compare the settings that must not change: return a name, "model.encoder.hidden_size", -> what differs.

    Settings are a run's config.json. If an earlier release recorded less of the content, this less is compared.
    """
    before, now = ({k: v for k, v in values.items() if k not in may_change} for values in (before, now))
    found: dict[str, str] = {}
    settled = {"content", "init_content"}
    if "content" in before and "content" in now:
        found |= changed_data(before["content"], now["content"])
        settled.add("data")
    elif "data" in before and "data" in now:
        found |= changed_fingerprints(before["data"], now["data"])
        settled.add("data")
    weights = [settings.get("init_content") or "" for settings in (before, now)]
    if all(weights):
        settled.add("init")
        if weights[0] != weights[1]:
            inits = f"{before.get('init')} then, and {now.get('init')} now, which has other weights"
            found["init"] = f"init: {inits} ({weights[0][:12]} then, {weights[1][:12]} now)"
    kept = ({k: v for k, v in settings.items() if k not in settled} for settings in (before, now))
    old, new = (flat(settings_without_paths(settings)) for settings in kept)
    return found | {
        key: f"{key}: {brief_repr(old.get(key), 200)} then, {brief_repr(new.get(key), 200)} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    }

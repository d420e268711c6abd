"""Describe a set of utterances, so that a command line, a run's settings and a model card can name the same one.

A `Selection` is a manifest, or one part of one fold of it, with all that is needed to find the utterances again.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ser.data import protocols, several
from ser.data.corpora import divided_manifest, found_manifest
from ser.data.labels import names_in
from ser.data.manifest import Utterance, collector_paused, map_for, parse_columns, read_manifest
from ser.data.several import NamedManifest
from ser.data.spellings import (
    check_map,
    check_spellings,
    is_name,
    label_lines,
    parse_map,
    usual_line,
    usual_names,
)
from ser.errors import ConfigError, ManifestError, Tell, brief_repr
from ser.files import StrPath

Sets = dict[str, list[Utterance]]  # of utterances, by their names for people


@collector_paused()
def rename(utterances: list[Utterance], names: Mapping[str, str | None]) -> list[Utterance]:
    """Rename emotions, None for no emotion, in the list itself, since a copy of a million rows is large."""
    for place, u in enumerate(utterances if names else ()):
        if (emotion := u.emotion) is not None and emotion in names:
            utterances[place] = u.relabelled(emotion=names[emotion])
    return utterances


@dataclass(frozen=True)
class Selection:
    """Describe a manifest or several (without a protocol), or a part of a fold of them.

    Attributes:
        data: the manifest, or the folder that preparing a corpus wrote; for several, their list or their paths.
        sha256: the digest of the manifest, or of all names and contents; empty: any content is accepted.
        root: the folder that the manifest's files are relative to; None: the manifest's own folder.
        columns: our column names -> those of the manifest.
        protocol: its name, as `find_protocol` takes it.
        shares: what the parts of the protocols column and kfold are known to share.
        seed: the seed of protocols that draw.
        fold: the name of a fold; None: the only one.
        known_turns: how many utterances of each training speaker are held out as "known" (`with_known_turns`).
        part: train, valid, test or known.
        label_map, literal_labels: as in `read_manifest`.
        sources: the manifests of several corpora (see `ser.data.several`); empty: ``data`` is read alone.
        usual_names: emotions that were renamed to their usual names, after all maps; None for no emotion.
        no_usual_names: whether no emotion may be renamed so.
    """

    data: str
    sha256: str = ""
    root: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    protocol: str | None = None
    shares: list[str] = field(default_factory=list)
    seed: int = 0
    fold: str | None = None
    known_turns: int = 0
    part: str | None = None
    label_map: dict[str, Any] = field(default_factory=dict)
    literal_labels: bool = False
    sources: list[NamedManifest] = field(default_factory=list)
    usual_names: dict[str, str | None] = field(default_factory=dict)
    no_usual_names: bool = False

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Selection:
        """Read the output of `to_dict`. Raises ConfigError for anything else."""
        # The type of each field in JSON: that of its default, or a string or null if the default is null.
        kinds = {name: str | None if value is None else type(value) for name, value in asdict(cls("")).items()}
        sound = isinstance(values, Mapping) and "data" in values and values.keys() <= kinds.keys()
        if not sound or not all(isinstance(value, kinds[name]) for name, value in values.items()):
            raise ConfigError(f"{brief_repr(values)} does not name utterances")
        selection = cls(**values)
        check_map(selection.label_map, "label_map")
        names = (*selection.shares, *selection.columns, *selection.columns.values())
        usual = all(is_name(old) and (new is None or is_name(new)) for old, new in selection.usual_names.items())
        if not usual or not all(isinstance(name, str) for name in names):
            raise ConfigError(f"{brief_repr(values)} does not name utterances")
        return replace(selection, sources=[NamedManifest.from_dict(one, "sources") for one in selection.sources])

    def to_dict(self) -> dict[str, Any]:
        """Return the selection as a dictionary for JSON.

        How labels are read is left out if it is the default, so that selections of earlier releases are equal.
        """
        usual = {
            "label_map": {},
            "literal_labels": False,
            "sources": [],
            "usual_names": {},
            "no_usual_names": False,
        }
        return {name: value for name, value in asdict(self).items() if name not in usual or value != usual[name]}

    @property
    def manifest(self) -> Path:
        """Return the manifest's file: ``data``, or the manifest in that folder of a prepared corpus."""
        path = Path(self.data)
        return divided_manifest(path) if path.is_dir() else path

    def stamped(self) -> Selection:
        """Return the selection with the manifest's present sha256. Raises ManifestError if it cannot be read."""
        if self.sources:
            sources = [several.stamped(source) for source in self.sources]
            return replace(self, sources=sources, sha256=several.combined_sha256(sources))
        return replace(self, sha256=several.sha256_of(found_manifest(self.data)))

    def read(self, *, check_files: bool = True, tell: Tell | None = None) -> list[Utterance]:
        """Read all utterances of the manifest; ``tell`` is called with lines for the user.

        Raises:
            ManifestError: the manifest cannot be used, or its sha256 is another one.
        """
        if self.sources:
            read = several.read_sources(
                self.sources,
                label_map=self.label_map,
                literal_labels=self.literal_labels,
                check_files=check_files,
                tell=tell,
            )
        else:
            read = self._read_alone(check_files=check_files, tell=tell)
        return rename(read, self.usual_names)

    def _read_alone(self, *, check_files: bool, tell: Tell | None) -> list[Utterance]:
        """Read a manifest by itself."""
        if self.sha256 and self.stamped().sha256 != self.sha256:
            raise ManifestError(f"{self.manifest}: has changed since; its sha256 was {self.sha256}")
        labels = {"literal_labels": self.literal_labels, "label_map": self.label_map}
        how: dict[str, Any] = {"root": self.root, "columns": self.columns, **labels}
        return read_manifest(self.manifest, check_files=check_files, tell=tell, **how)

    def find_protocol(self) -> protocols.Protocol:
        """Return the protocol. Raises ConfigError if none is named."""
        if not self.protocol:
            raise ConfigError("--data needs --protocol, which says how it is divided")
        return protocols.find_protocol(self.protocol, shares=self.shares)

    def find_fold(self, utterances: list[Utterance]) -> tuple[protocols.Fold, protocols.Audit]:
        """Return the fold of these utterances, which is checked, and what its parts share."""
        protocol = self.find_protocol()
        fold = protocols.find_fold(protocol, utterances, self.fold, seed=self.seed)
        if self.known_turns:
            fold = protocols.with_known_turns(fold, utterances, self.known_turns, seed=self.seed)
        return fold, protocols.check_fold(fold, utterances, protocol)

    def utterances(self, *, check_files: bool = True) -> list[Utterance]:
        """Read the selected utterances. Raises ConfigError where the fold lacks the part."""
        everything = self.read(check_files=check_files)
        return self.of(self.find_fold(everything)[0], everything) if self.protocol else everything

    def of(self, fold: protocols.Fold, utterances: Iterable[Utterance]) -> list[Utterance]:
        """Select the part of the fold. Raises ConfigError where the fold lacks it."""
        if self.part not in fold.parts:
            raise ConfigError(f"fold {fold.name} of {self.protocol} has no part {self.part}")
        return fold.select(utterances)[self.part]

    def review(
        self, sets: Sets, tell: Tell, *, emotions: list[str] | None, speakers: Collection[str] = ()
    ) -> None:
        """Print the classes of sets that were read, and refuse two spellings of one class.

        Args:
            sets: name -> utterances; the others are compared with the first one.
            tell: is called with each line.
            emotions: those of the model, empty if it has or learns none; None: there is no model yet.
            speakers: those that the model was trained on.
        """
        for line in label_lines(sets, emotions=emotions, by_corpus=bool(self.sources)):
            tell(line)
        if self.sources:
            several.check_corpora({u.corpus for utterances in sets.values() for u in utterances})
        used = ["speaker"] if emotions == [] else ["emotion", "speaker"]
        maps = self.all_maps()
        check_spellings(sets, emotions=emotions or (), speakers=speakers, label_map=maps, columns=used)

    def moved(self, data: StrPath | None, root: str | None) -> Selection:
        """Return the same selection with other places of manifest and recordings; None: the recorded places.

        For several manifests ``data`` is a JSON list, in which each manifest is found by its content, and one of
        several with the same content by its name or else its place.
        """
        if not self.sources:
            return replace(self, data=str(data) if data else self.data, root=root or self.root)
        there = several.read_list(data) if data else []
        if there is None:
            raise ConfigError(f"{data}: is one manifest, expected a JSON list of {len(self.sources)}")
        left = [several.stamped(source) for source in there]
        now = dict[int, NamedManifest]()
        for keys in (("sha256", "name"), ("sha256",)):
            for number, source in enumerate(self.sources):
                same = (
                    i for i, one in enumerate(left) if all(getattr(one, k) == getattr(source, k) for k in keys)
                )
                if number not in now and (place := next(same, None)) is not None:
                    now[number] = left.pop(place)
        found = [now.get(number, source) for number, source in enumerate(self.sources)]
        sources = [
            replace(source, path=one.path, root=root or one.root)
            for source, one in zip(self.sources, found, strict=True)
        ]
        return replace(self, sources=sources)

    def as_corpora(self) -> Selection:
        """Return the same selection as a corpus with a name, so that it can be compared with several corpora."""
        if self.sources:
            return self
        path, name = str(self.manifest), several.default_name(self.data)
        one = NamedManifest(path, self.root, self.columns, self.label_map, name, self.sha256)
        sha256 = self.sha256 and several.combined_sha256([one])
        return replace(self, sources=[one], sha256=sha256, label_map={})

    def all_maps(self) -> dict[str, Any]:
        """Return all maps as one, with the speakers of the manifests' own maps as corpus/name."""
        emotions, speakers = dict[str, str | None](), dict[str, str | None]()
        for source in self.sources:
            emotions |= map_for(source.map, "emotion")
            for pair in map_for(source.map, "speaker").items():
                old, new = (name and f"{source.name}/{name}" for name in pair)
                speakers |= {str(old): new}
        emotions |= map_for(self.label_map, "emotion")
        return {**emotions, "speaker": speakers | map_for(self.label_map, "speaker")}

    @property
    def chosen_names(self) -> set[str]:
        """Return the emotions that the maps make in the end, without those that they replace or drop."""
        maps = [several.composed(source.map, self.label_map) for source in self.sources] or [self.label_map]
        return {new for one in maps for new in map_for(one, "emotion").values() if new is not None}

    def __str__(self) -> str:
        """Return a readable name of the selection."""
        if self.sources and not self.protocol:
            return ", ".join(f"{source.name} ({source.path})" for source in self.sources)
        if not self.protocol:
            return self.data
        fold = f", fold {self.fold}" if self.fold else ""
        return f"{self.part or 'all parts'} of {self.protocol}{fold} ({self.data})"

    def to_options(self) -> list[str]:
        """Return the flags of `add_data_arguments` that name this selection, except --known-turns."""
        options = ["--data", self.data, "--protocol-seed", str(self.seed)]
        options += ["--protocol", self.protocol] if self.protocol else []
        options += ["--root", self.root] if self.root else []
        columns = [f"{ours}={theirs}" for ours, theirs in self.columns.items()]
        for name, values in (("columns", columns), ("shares", self.shares)):
            options += [f"--{name}", *values] if values else []
        options += ["--map", json.dumps(self.label_map)] if self.label_map else []
        options += ["--literal-labels"] if self.literal_labels else []
        options += ["--no-usual-names"] if self.no_usual_names else []
        return options


def add_reading_arguments(add: Callable[..., Any]) -> None:
    """Add the flags that say how manifests are read; ``add`` adds one."""
    add("--root", nargs="+", help="folder that the manifests' files are relative to, one for all or one for each "
        "(default: that of the manifest)")  # fmt: skip
    add("--columns", nargs="*", default=[], metavar="OURS=THEIRS", help="names of columns, such as "
        "text=transcript")  # fmt: skip
    add("--map", metavar="JSON", help="file, or the object itself: emotion as written -> its name, or null for no "
        'label, as {"hapy": "happy", "xxx": null}; "speaker": the same for speakers')  # fmt: skip
    add("--literal-labels", action="store_true", help="take cells such as nan, NA, None and - as labels, and "
        "speakers such as 1.0 as they are written (default: they are no label, and 1.0 is 1)")  # fmt: skip
    add("--no-usual-names", action="store_true", help="do not rename emotions (default: with several corpora joy "
        "becomes happy; in evaluation a label becomes the model's name for it)")  # fmt: skip


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that name data and say how it is divided; `selected_data` reads them."""
    add = parser.add_argument_group("a corpus, divided by a protocol").add_argument
    add("--data", help="manifest to divide, JSON file that lists manifests, or the folder that preparing wrote")
    add(
        "--protocol",
        help=f"{', '.join(protocols.PROTOCOLS)} (or speaker-known:TURNS), column, or kfold:COLUMN:COUNT",
    )
    add("--shares", nargs="*", default=[], metavar="KIND",
        help=f"what the parts of column and kfold share knowingly: {', '.join(protocols.KINDS)}")  # fmt: skip
    add("--protocol-seed", type=int, default=0, metavar="SEED", help="of protocols that draw (default: 0)")
    add("--known-turns", type=int, metavar="COUNT", help="of each training speaker, held out to score a speaker "
        "head on (default: up to 10 where one is trained and the protocol tests on strangers)")  # fmt: skip
    add_reading_arguments(add)


def is_several(arguments: argparse.Namespace, paths: Sequence[StrPath]) -> bool:
    """Tell whether these paths are several corpora: two manifests or more, or a list of manifests."""
    columns = parse_columns(arguments.columns)
    return len(paths) > 1 or several.listed(paths[0], columns.get("file", "file")) is not None


def given_roots(
    arguments: argparse.Namespace, sources: Sequence[NamedManifest], like: Selection | None
) -> list[str | None]:
    """Return the folder of --root for each manifest; ``like`` has the manifests that --root is given for."""
    roots = arguments.root or [None]
    if len(roots) == 1:
        return roots * len(sources)
    if like is not None and len(like.sources) == len(roots):
        by_name = dict(zip((source.name for source in like.sources), roots, strict=True))
        if lacking := [source.path for source in sources if source.name not in by_name]:
            raise ConfigError(f"--root names no folder for {lacking[0]}; a JSON list of manifests can")
        return [by_name[source.name] for source in sources]
    if len(roots) != len(sources):
        count = f"{len(roots)} folders for {len(sources)} manifest{'s' if len(sources) > 1 else ''}"
        raise ConfigError(f"--root names {count}; give one folder, or one for each manifest")
    return roots


def sources_of(
    arguments: argparse.Namespace, paths: Sequence[StrPath], like: Selection | None = None
) -> list[NamedManifest]:
    """Return the manifests of several corpora; the flags count if a JSON list does not say it for a manifest."""
    columns = parse_columns(arguments.columns)
    lists = [several.read_list(path, columns.get("file", "file")) for path in paths]
    if len(paths) > 1 and any(one is not None for one in lists):
        path = next(path for path, one in zip(paths, lists, strict=True) if one is not None)
        raise ConfigError(f"{path}: is a list of manifests, which is given alone")
    own = [NamedManifest(str(found_manifest(path)), name=several.default_name(path)) for path in paths]
    sources = own if lists[0] is None else lists[0]
    if len(arguments.root or []) > 1 and lists[0] is not None:
        raise ConfigError("--root names several folders; a JSON list names the root of each manifest itself")
    folders = given_roots(arguments, sources, like)
    return [
        replace(source, root=source.root or root, columns=source.columns or columns)
        for source, root in zip(sources, folders, strict=True)
    ]


def selected_data(
    arguments: argparse.Namespace,
    data: StrPath | Sequence[StrPath] | None = None,
    *,
    corpora: bool = False,
    like: Selection | None = None,
) -> Selection:
    """Return the selection that flags name, a divided corpus or the manifests ``data``, with its present sha256.

    Args:
        arguments: the parsed flags of `add_data_arguments`.
        data: one or several manifests that are not divided; None: --data.
        corpora: whether a single manifest is also read as a corpus with a name, since others are.
        like: the selection whose manifests --root is given for; None: this one.
    """
    given = arguments.data if data is None else data
    paths: list[StrPath] = [given] if isinstance(given, str | os.PathLike) else list(given)
    roots = arguments.root or []
    listed = corpora or is_several(arguments, paths)
    if not listed and len(roots) > 1:
        raise ConfigError(f"--root names {len(roots)} folders for one manifest")
    plain = Selection(
        ", ".join(map(str, paths)),
        root=roots[0] if len(roots) == 1 else None,
        columns=parse_columns(arguments.columns),
        label_map={} if arguments.map is None else parse_map(arguments.map),
        literal_labels=arguments.literal_labels,
        sources=sources_of(arguments, paths, like) if listed else [],
        no_usual_names=arguments.no_usual_names,
    )
    several.check_sources({"manifests": plain.sources})
    plain = plain.stamped()
    if data is not None:
        return plain
    return replace(
        plain,
        protocol=arguments.protocol,
        shares=list(arguments.shares),
        seed=arguments.protocol_seed,
        fold=getattr(arguments, "fold", None),
        known_turns=arguments.known_turns or 0,
    )


def selected_sets(
    arguments: argparse.Namespace, sets: Mapping[str, Sequence[StrPath]], *, corpora: bool = False
) -> dict[str, Selection]:
    """Return the selection of each set of manifests; if one set has several corpora, all sets name theirs."""
    corpora = corpora or any(is_several(arguments, paths) for paths in sets.values())
    chosen: dict[str, Selection] = {}
    for name, paths in sets.items():
        first = next(iter(chosen.values()), None)
        chosen[name] = selected_data(arguments, paths, corpora=corpora, like=first)
    several.check_sources({name: selection.sources for name, selection in chosen.items()})
    return chosen


def with_usual_names(
    chosen: Mapping[str, Selection],
    sets: Sets,
    tell: Tell,
    *,
    known: Collection[str] = (),
    classes: Collection[str] | None = None,
) -> tuple[dict[str, Selection], Sets]:
    """Rename emotions to their usual names, and record this in the selections; see `usual_names`.

    Args:
        chosen: the selection of each set.
        sets: their utterances; the lists themselves are changed.
        tell: is called with a line if a name changes.
        known: the classes of the model that training begins with.
        classes: the classes of the model that is evaluated; None: the sets are for training.
    """
    counts = Counter(u.emotion for utterances in sets.values() for u in utterances if u.emotion is not None)
    kept = {name for selection in chosen.values() for name in selection.chosen_names}
    changes = usual_names(counts, kept=kept, known=known, classes=classes)
    if not changes or any(selection.no_usual_names for selection in chosen.values()):
        return dict(chosen), sets
    tell(usual_line(changes, counts))
    recorded = {name: replace(one, usual_names=one.usual_names | changes) for name, one in chosen.items()}
    return recorded, {name: rename(utterances, changes) for name, utterances in sets.items()}


def named_for_training(
    chosen: Mapping[str, Selection], sets: Sets, tell: Tell, *, known: Collection[str] = ()
) -> tuple[dict[str, Selection], Sets]:
    """Rename emotions as training does: to usual names if it has several corpora; a single one keeps its names.

    In that case, validation data of other corpora get the names of the training data. The arguments are those of
    `with_usual_names`; the first set is learnt from.
    """
    if not any(selection.sources for selection in chosen.values()):
        return dict(chosen), sets
    learnt = next(iter(sets.values()))
    if len({u.corpus for u in learnt}) > 1:
        return with_usual_names(chosen, sets, tell, known=known)
    if "valid" not in sets:
        return dict(chosen), sets
    classes = names_in("emotion", (u.labels for u in learnt))
    one, valid = with_usual_names({"valid": chosen["valid"]}, {"valid": sets["valid"]}, tell, classes=classes)
    return {**chosen, **one}, sets | valid

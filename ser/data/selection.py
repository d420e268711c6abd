"""Describe a set of utterances, so that a command line, a run's settings and a model card can name the same one.

A `Selection` is a manifest, or one part of one fold of it, with all that is needed to find the utterances again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ser.data import protocols
from ser.data.corpora import divided_manifest
from ser.data.manifest import Utterance, check_regular, parse_columns, read_manifest
from ser.data.spellings import check_map, check_spellings, label_lines, parse_map
from ser.errors import ConfigError, ManifestError, Tell, brief_repr
from ser.files import StrPath, digest

Sets = dict[str, list[Utterance]]  # of utterances, by their names for people


@dataclass(frozen=True)
class Selection:
    """Describe a manifest (without a protocol), or a part of a fold of it.

    Attributes:
        data: the manifest, or the folder that preparing a corpus wrote.
        sha256: the digest of the manifest; empty: any content is accepted.
        root: the folder that the manifest's files are relative to; None: the manifest's own folder.
        columns: our column names -> those of the manifest.
        protocol: its name, as `find_protocol` takes it.
        shares: what the parts of the protocols column and kfold are known to share.
        seed: the seed of protocols that draw.
        fold: the name of a fold; None: the only one.
        known_turns: how many utterances of each training speaker are held out as "known" (`with_known_turns`).
        part: train, valid, test or known.
        label_map, literal_labels: as in `read_manifest`.
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
        if not all(isinstance(name, str) for name in names):
            raise ConfigError(f"{brief_repr(values)} does not name utterances")
        return selection

    def to_dict(self) -> dict[str, Any]:
        """Return the selection as a dictionary for JSON.

        How labels are read is left out if it is the default, so that selections of earlier releases are equal.
        """
        usual = {"label_map": {}, "literal_labels": False}
        return {name: value for name, value in asdict(self).items() if name not in usual or value != usual[name]}

    @property
    def manifest(self) -> Path:
        """Return the manifest's file: ``data``, or the manifest in that folder of a prepared corpus."""
        path = Path(self.data)
        return divided_manifest(path) if path.is_dir() else path

    def stamped(self) -> Selection:
        """Return the selection with the manifest's present sha256. Raises ManifestError if it cannot be read."""
        path = self.manifest
        try:
            check_regular(path, "a CSV or JSON lines manifest")
            return replace(self, sha256=digest(path))
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            cause = error.strerror if isinstance(error, OSError) else error
            if path != Path(self.data) and isinstance(error, FileNotFoundError):
                cause = f"{self.data} is a folder, and has no {path.name} as preparing writes it; give a manifest"
            raise ManifestError(f"{path}: cannot be read: {cause}") from None

    def read(self, *, check_files: bool = True, tell: Tell | None = None) -> list[Utterance]:
        """Read all utterances of the manifest; ``tell`` is called with lines for the user.

        Raises:
            ManifestError: the manifest cannot be used, or its sha256 is another one.
        """
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
        for line in label_lines(sets, emotions=emotions):
            tell(line)
        used = ["speaker"] if emotions == [] else ["emotion", "speaker"]
        check_spellings(sets, emotions=emotions or (), speakers=speakers, label_map=self.label_map, columns=used)

    def __str__(self) -> str:
        """Return a readable name of the selection."""
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
        return options


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that name data and say how it is divided; `selected_data` reads them."""
    add = parser.add_argument_group("a corpus, divided by a protocol").add_argument
    add("--data", help="manifest to divide, or the folder that preparing a corpus wrote")
    add(
        "--protocol",
        help=f"{', '.join(protocols.PROTOCOLS)} (or speaker-known:TURNS), column, or kfold:COLUMN:COUNT",
    )
    add("--shares", nargs="*", default=[], metavar="KIND",
        help=f"what the parts of column and kfold share knowingly: {', '.join(protocols.KINDS)}")  # fmt: skip
    add("--protocol-seed", type=int, default=0, metavar="SEED", help="of protocols that draw (default: 0)")
    add("--known-turns", type=int, metavar="COUNT", help="of each training speaker, held out to score a speaker "
        "head on (default: up to 10 where one is trained and the protocol tests on strangers)")  # fmt: skip
    add("--root", help="folder that the manifests' files are relative to (default: that of the manifest)")
    add("--columns", nargs="*", default=[], metavar="OURS=THEIRS", help="such as text=transcript")
    add("--map", metavar="JSON", help="file, or the object itself: emotion as written -> its name, or null for no "
        'label, as {"hapy": "happy", "xxx": null}; "speaker": the same of speakers')  # fmt: skip
    add("--literal-labels", action="store_true", help="take cells such as nan, NA, None and - as labels, and "
        "speakers such as 1.0 as they are written (default: they are no label, and 1.0 is 1)")  # fmt: skip


def selected_data(arguments: argparse.Namespace, data: StrPath | None = None) -> Selection:
    """Return the selection that flags name, a divided corpus or the manifest ``data``, with its present sha256."""
    plain = Selection(
        str(data or arguments.data),
        root=arguments.root,
        columns=parse_columns(arguments.columns),
        label_map={} if arguments.map is None else parse_map(arguments.map),
        literal_labels=arguments.literal_labels,
    ).stamped()
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

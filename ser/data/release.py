"""Describe what a reader of a corpus returns: utterances, what was dropped, and warnings."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ser.containers import OTHER_SUFFIXES, SUFFIXES
from ser.data.manifest import Utterance
from ser.errors import ManifestError
from ser.files import files_below

TWICE = "another folder already has a file of this name"  # why a file is dropped


@dataclass(frozen=True)
class Dropped:
    """Name something in the folder of a corpus that did not become an utterance.

    Attributes:
        what: a turn, a line or a file, as the corpus names it.
        why: the reason; equal reasons have equal texts.
    """

    what: str
    why: str


@dataclass(frozen=True)
class Corpus:
    """Hold what a reader found.

    Attributes:
        root: the folder of the corpus.
        utterances: the utterances, in the order of their ids.
        dropped: what did not become an utterance.
        warnings: what the user should know, and what was done about it.
    """

    root: Path
    utterances: list[Utterance]
    dropped: list[Dropped] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def reasons(self) -> dict[str, int]:
        """Count what was dropped for each reason, the most frequent first."""
        return dict(Counter(d.why for d in self.dropped).most_common())


def _why_not_read(file: Path) -> str:
    """Say why a sound file is not read; "" where it is."""
    if file.name.startswith("."):
        return "hidden file"
    if file.suffix.lower() != ".wav":
        return "not a WAV file"
    if not file.is_file():
        return "a broken link" if file.is_symlink() else "not a regular file"
    return ""


def recordings(folder: Path, dropped: list[Dropped], warnings: list[str]) -> Iterator[Path]:
    """Yield the WAV files of a folder and its subfolders, in the order of their paths.

    Links to folders are followed.

    Args:
        folder: of a corpus, as an absolute path.
        dropped: receives hidden files (``._03a01Fa.wav`` on copies made with a Mac), sound that is no WAV, and
            links that lead nowhere.
        warnings: receives the links that are not followed.

    Raises:
        ManifestError: there is no such folder, or it cannot be listed.
    """
    if not folder.is_dir():
        raise ManifestError(f"{folder}: no such folder, expected a corpus")
    try:
        files = sorted(map(Path, files_below(folder, hidden=True, say=warnings.append)))
    except OSError as error:
        raise ManifestError(f"{error.filename}: cannot be listed: {error.strerror}") from None
    for file in files:
        if file.suffix.lower() in SUFFIXES + OTHER_SUFFIXES:
            if why := _why_not_read(file):
                dropped.append(Dropped(file.relative_to(folder).as_posix(), why))
            else:
                yield file

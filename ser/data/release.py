"""Describe what a reader of a corpus returns: utterances, what was dropped, and warnings."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from ser.data.manifest import Utterance


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

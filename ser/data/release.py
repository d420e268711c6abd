"""What a reader of a corpus finds: its utterances, what became none, and what a person should know."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from ser.data.manifest import Utterance


@dataclass(frozen=True)
class Dropped:
    """Name something in the folder of a corpus that became no utterance.

    Attributes:
        what: a turn, a line or a file, as the corpus names it.
        why: the reason, in the same words for all that share it.
    """

    what: str
    why: str


@dataclass(frozen=True)
class Corpus:
    """Hold what a reader found.

    Attributes:
        root: the folder of the corpus.
        utterances: in the order of their ids.
        dropped: all that is not among them.
        warnings: what a person should know, and what was done about it.
    """

    root: Path
    utterances: list[Utterance]
    dropped: list[Dropped] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def reasons(self) -> dict[str, int]:
        """Count what was dropped for each reason, the most frequent first."""
        return dict(Counter(d.why for d in self.dropped).most_common())

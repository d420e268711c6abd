"""Turn transcripts into CTC symbols and back: orthographies, the vocabulary, greedy decoding.

    text --clean--> text --Vocabulary.encode--> symbols --CTC--> symbols per frame --decode--> text --present-->

All text is Unicode NFC, so that an "é" typed as one code point and as two is one symbol.
"""

from __future__ import annotations

import difflib
import json
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from ser.errors import ConfigError, TextError, brief_repr
from ser.files import StrPath, is_lfs_pointer, replace_file

# Limits for vocabulary files of other people. The largest useful ones (Chinese characters) have some 20,000
# symbols; at 20 bytes each, 65,536 symbols still fit.
MAX_SYMBOLS = 65_536
MAX_VOCABULARY_BYTES = 2 * 1024 * 1024

# The many checkpoints that followed Hugging Face's XLSR tutorial use the second names.
BLANKS = ("<pad>", "[PAD]")
UNKNOWNS = ("<unk>", "[UNK]")
SPECIALS = frozenset({*BLANKS, *UNKNOWNS, "<s>", "</s>"})

LIBRISPEECH = ("<pad>", "<s>", "</s>", "<unk>", "|", *"ETAONIHSRDLUMWCFGYPBVK'XJQZ")


def nfc(text: str) -> str:
    """Return the Unicode normal form C (composed) of a text."""
    return unicodedata.normalize("NFC", text)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``" (did you mean 'happy'?)"``, or an empty string if no name is similar. Case is ignored."""
    by_case = {k.casefold(): k for k in known}
    near = difflib.get_close_matches(name.casefold(), by_case, n=1)
    return f" (did you mean {by_case[near[0]]!r}?)" if near else ""


def unique_names(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Raise ValueError if a JSON object has a name twice; this is an `object_pairs_hook`."""
    unique = dict(pairs)
    if len(unique) != len(pairs):
        twice = next(name for name, n in Counter(name for name, _ in pairs).items() if n > 1)
        raise ValueError(f"{twice!r} stands twice")
    return unique


# ---------------------------------------------------------------------------------------------- orthographies

# Buckwalter spells Arabic one-to-one in ASCII (qamus.org/transliteration.htm); the order is that of code points.
BUCKWALTER = {
    **dict(zip("'|>&<}AbptvjHxd*rzs$SDTZEg", map(chr, range(0x0621, 0x063B)), strict=True)),
    **dict(zip("_fqklmnhwYyFNKaui~o", map(chr, range(0x0640, 0x0653)), strict=True)),
    "`": "\u0670",  # dagger alef
    "{": "\u0671",  # alef wasla
}


def _cause(error: Exception) -> str:
    """Return the cause of an error as text, without the path of an OSError."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _tokens_by_id(ids: Mapping[str, int]) -> dict[int, str]:
    """Check a mapping token -> id, and return its inverse. Raises TextError."""
    if len(ids) > MAX_SYMBOLS:
        raise TextError(f"{len(ids)} tokens, at most {MAX_SYMBOLS} are possible")
    tokens: dict[int, str] = {}
    for token, id_ in ids.items():
        if not isinstance(token, str) or not token:
            raise TextError(f"token {brief_repr(token, 80)} is not a non-empty string")
        if not token.isprintable() and any(unicodedata.category(c) == "Cs" for c in token):
            raise TextError(f"token {brief_repr(token, 80)} is not valid Unicode")
        if isinstance(id_, bool) or not isinstance(id_, int):
            raise TextError(f"the id of {brief_repr(token, 80)} is {brief_repr(id_, 80)}, expected an integer")
        if not 0 <= id_ < len(ids):
            raise TextError(
                f"the id of {brief_repr(token, 80)} is {brief_repr(id_, 80)}, but {len(ids)} tokens have "
                f"ids 0..{len(ids) - 1}"
            )
        if id_ in tokens:
            raise TextError(f"{brief_repr(tokens[id_], 80)} and {brief_repr(token, 80)} have the same id {id_}")
        tokens[id_] = token
    return tokens


def _common_case(characters: Iterable[str]) -> str:
    """Return "upper" or "lower" if all letters have this case; "" if both occur, or letters have no case."""
    letters = [c for c in characters if len(c) == 1]
    # A sharp s does not count, since many upper-case vocabularies have it too.
    lower = any(c == c.lower() != c.upper() and len(c.upper()) == 1 for c in letters)
    upper = any(c == c.upper() != c.lower() for c in letters)
    return "" if lower == upper else "lower" if lower else "upper"


@dataclass(frozen=True, init=False)
class Vocabulary:
    """Hold the symbols of the CTC head. A vocabulary is immutable, comparable and picklable.

    Attributes:
        tokens: the symbols, in the order of their ids.
        word_delimiter: the symbol that stands for a space.
        case: "upper" or "lower" if all letters have this case; empty if both occur, or the script has no case.
        blank: id of the CTC blank, ``<pad>``.
        unknown: id of ``<unk>``, or None. Nothing is ever encoded as this symbol.
        specials: symbols that are not text: `SPECIALS`, and those of a foreign tokenizer.
        lower_case: whether decoded text is shown in lower case, while the symbols are upper case.
        separator: what a decoded delimiter is shown as.
    """

    tokens: tuple[str, ...]
    word_delimiter: str
    case: str = field(compare=False)
    blank: int
    specials: frozenset[str] = field(compare=False)
    lower_case: bool = field(compare=False)
    separator: str = field(compare=False)
    unknown: int | None = field(compare=False)
    _ids: dict[str, int] = field(compare=False, repr=False)
    _delimiter: int | None = field(compare=False, repr=False)

    def __init__(
        self,
        ids: Mapping[str, int],
        *,
        word_delimiter: str = "|",
        blank: str | None = None,
        unknown: str | None = None,
        specials: Iterable[str] = (),
        lower_case: bool = False,
        separator: str = " ",
    ) -> None:
        """Make a vocabulary from a mapping token -> id.

        ``blank`` and ``unknown`` are tokens; None: those of the usual names.

        Raises:
            TextError: the ids are not 0..n-1 without gaps or duplicates, there is no ``<pad>``, there are more
                than 65,536 tokens, or a token or id has another type.
        """
        by_id = _tokens_by_id(ids)
        blanks = [b for b in (blank, *BLANKS) if b is not None and b in ids]
        if not blanks:
            raise TextError("there is no '<pad>', which is the CTC blank")

        def keep(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        keep("tokens", tuple(by_id[i] for i in range(len(by_id))))
        keep("word_delimiter", word_delimiter)
        keep("blank", ids[blanks[0]])
        keep("unknown", next((ids[u] for u in (unknown, *UNKNOWNS) if u is not None and u in ids), None))
        named = {blanks[0], *(u for u in (unknown,) if u is not None), *specials}
        keep("specials", (SPECIALS | named) - {word_delimiter})
        keep("lower_case", lower_case)
        keep("separator", separator)
        keep("_delimiter", ids.get(word_delimiter))
        # `encode` looks up single characters of words, so it never finds a longer token or the delimiter here. A
        # decomposed token counts as its composed character, unless this character has a token of its own.
        text = {token: id_ for token, id_ in ids.items() if token not in self.specials}
        keep("_ids", {**{nfc(token): id_ for token, id_ in text.items()}, **text})
        keep("case", _common_case(self._ids))

    def __len__(self) -> int:
        """Return the number of symbols V, including the blank."""
        return len(self.tokens)

    @classmethod
    def librispeech(cls) -> Vocabulary:
        """Return the 32 symbols of facebook/wav2vec2-base-960h: four specials, ``|``, A to Z, the apostrophe."""
        return cls({token: i for i, token in enumerate(LIBRISPEECH)})

    @classmethod
    def build(cls, texts: Iterable[str], *, word_delimiter: str = "|") -> Vocabulary:
        """Build a vocabulary of the characters of cleaned training `texts`.

        The characters are sorted, and follow the four specials and the delimiter.

        Raises:
            TextError: there are more than 65,536 symbols, or the delimiter is not one visible character.
        """
        if len(word_delimiter) != 1 or word_delimiter.isspace():
            raise TextError(f"the word delimiter {word_delimiter!r} is not one visible character")
        characters = set[str]().union(*map(nfc, texts)) - {word_delimiter}
        letters = sorted(c for c in characters if not c.isspace() and unicodedata.category(c) != "Cs")
        symbols = ("<pad>", "<s>", "</s>", "<unk>", word_delimiter, *letters)
        return cls({token: i for i, token in enumerate(symbols)}, word_delimiter=word_delimiter)

    @classmethod
    def read(cls, path: StrPath, *, word_delimiter: str = "|") -> Vocabulary:
        """Read a vocab.json, an object of token -> id. The delimiter is in another file, so it is an argument.

        Raises:
            TextError: ``path`` is not a regular file of at most 2 MiB that holds such an object.
        """
        ids = cls.read_ids(path)
        try:
            return cls(ids, word_delimiter=word_delimiter)
        except TextError as error:
            raise TextError(f"{path}: not a vocabulary: {error}") from error

    @staticmethod
    def read_ids(path: StrPath) -> dict[str, Any]:
        """Read the object in a vocab.json, without a check of its content.

        Raises:
            TextError: ``path`` is not a regular file of at most 2 MiB that holds an object.
        """
        path = Path(path)
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                raise TextError(f"{path}: not a regular file, expected a vocab.json")
            if is_lfs_pointer(path):
                raise TextError(f"{path}: is a pointer of git-lfs, not the file; run `git lfs pull` in its folder")
            with path.open("rb") as file:
                content = file.read(MAX_VOCABULARY_BYTES + 1)
        except (OSError, ValueError) as error:
            raise TextError(f"{path}: cannot read the vocabulary: {_cause(error)}") from error
        if len(content) > MAX_VOCABULARY_BYTES:
            raise TextError(f"{path}: larger than {MAX_VOCABULARY_BYTES} bytes, which is no vocabulary")
        try:
            ids = json.loads(content.decode("utf-8-sig"), object_pairs_hook=unique_names)
            if not isinstance(ids, dict):
                raise TextError(f"expected an object of token -> id, found {type(ids).__name__}")
            return ids
        except (TextError, ValueError, RecursionError) as error:
            raise TextError(f"{path}: not a vocabulary: {error}") from error

    def write(self, path: StrPath) -> None:
        """Write vocab.json, whole or not at all.

        Raises:
            TextError: the file cannot be written.
        """
        path = Path(path)
        try:
            with replace_file(path) as file:
                json.dump({token: i for i, token in enumerate(self.tokens)}, file, ensure_ascii=False)
        except OSError as error:
            raise TextError(f"{path}: cannot write the vocabulary: {_cause(error)}") from error

    @property
    def has_delimiter(self) -> bool:
        """Tell whether there is a symbol between words; vocabularies of Chinese or phonemes often lack one."""
        return self._delimiter is not None

    def in_its_case(self, text: str) -> str:
        """Write `text` in the case that all letters of the vocabulary have."""
        if self.case == "upper":
            return "".join(c if c in self._ids else c.upper() for c in text)  # the vocabulary may have a sharp s
        if self.case == "lower":
            if DOT_ABOVE not in self._ids:  # Python's lower() makes "i" and this dot of a capital I with a dot
                text = text.replace("\u0130", "i")
                text = text.replace("I", "\u0131") if "\u0131" in self._ids else text  # the dotless i of Turkish
            return text.lower()
        return text

    def spell(self, text: str) -> tuple[str, str]:
        """Replace missing characters by equivalent ones; return the text, and the replaced characters."""
        others = {c: new for c in set(text).difference(self._ids) if (new := self._instead_of(c)) != c}
        if not others:
            return text, ""
        return "".join(others.get(c, c) for c in text), "".join(c for c in text if c in others)

    def _instead_of(self, character: str) -> str:
        """Return an equivalent of a character that this vocabulary lacks, or itself if there is none."""
        if character == self.word_delimiter or character.isspace():
            return character
        same = next((alike for alike in SAME if character in alike), "")
        for candidate in (*same, *SHARP_S.get(character, ()), unicodedata.normalize("NFKC", character)):
            if candidate and all(c in self._ids for c in candidate):
                return candidate
        return character

    def encode(self, text: str) -> list[int]:
        """Encode a cleaned `text`: one symbol per character, and one delimiter between words.

        Characters outside the vocabulary are left out (`unknown_characters` counts them). A delimiter in the text
        counts as a space. Neither the blank nor another special is ever produced: ``<s>`` in a text is three
        characters, of which most vocabularies have only the s.

        Returns:
            L ids in 0..V-1, without the blank; empty if nothing of the text is left.

        Raises:
            TextError: the text has several words, and the vocabulary has no word delimiter.
        """
        words = [[self._ids[c] for c in word if c in self._ids] for word in self._words(text)]
        words = [word for word in words if word]
        if len(words) > 1 and self._delimiter is None:
            raise TextError(
                f"the word delimiter {self.word_delimiter!r} is not in the vocabulary of {len(self)} symbols, "
                f"and the text has spaces: {text[:80]!r}"
            )
        symbols: list[int] = []
        for word in words:
            if symbols:
                symbols.append(self._delimiter)  # type: ignore[arg-type]  # checked above
            symbols += word
        return symbols

    def unknown_characters(self, texts: Iterable[str]) -> Counter[str]:
        """Count the characters of `texts` that `encode` leaves out. Spaces are never among them."""
        return Counter(c for text in texts for word in self._words(text) for c in word if c not in self._ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Decode the best symbol of each frame to text (greedy decoding).

        Repeats are merged, and then the blank and the other specials are dropped. Delimiters become spaces;
        leading, trailing and repeated spaces are dropped.

        Args:
            ids: (T,) symbols, one per frame; a list, array or tensor on the CPU.

        Raises:
            TextError: an id is outside 0..V-1.
        """
        symbols = [id_ for id_, _ in groupby(map(int, ids))]
        for id_ in symbols:
            if not 0 <= id_ < len(self.tokens):
                raise TextError(f"symbol {id_} is outside the vocabulary 0..{len(self.tokens) - 1}")
        return self.spelt(symbols)

    def spelt(self, ids: Iterable[int]) -> str:
        """Write a sequence of symbols as text, without specials and with delimiters as spaces."""
        shown = (self.separator if i == self._delimiter else self.tokens[i] for i in ids)
        text = "".join(token for token in shown if token not in self.specials)
        return nfc(" ".join((text.lower() if self.lower_case else text).split()))

    def _words(self, text: str) -> list[str]:
        """Split a text at spaces and delimiters, in the case of the symbols."""
        text = text.upper() if self.lower_case else text
        return nfc(text).replace(self.word_delimiter, " ").split()


@dataclass(frozen=True)
class Orthography:
    """Describe how transcripts are spelt for the model, and how its output is shown.

    The settings are those of the class of the same name in transformers,
    examples/research_projects/wav2vec2/run_asr.py (2021).

    Attributes:
        case: "upper", "lower" or "keep".
        replacements: character -> what replaces it.
        dropped_words: words that are not speech.
        word_delimiter: the symbol between words; the vocabulary must have it.
        tag_brackets: pairs that may enclose a tag. Letters of the orthography cannot be among them.
        script: character -> character of the script that people read.
    """

    case: str = "keep"
    replacements: Mapping[str, str] = field(default_factory=dict)
    dropped_words: frozenset[str] = frozenset()
    word_delimiter: str = "|"
    tag_brackets: tuple[str, ...] = ("[]", "{}", "<>")
    script: Mapping[str, str] = field(default_factory=dict)

    def clean(self, text: str, vocabulary: Vocabulary | None = None) -> str:
        """Return `text` in this spelling, NFC, with single spaces. Tags are not removed; see the function `clean`.

        If all letters of the `vocabulary` have one case, it replaces the case of the orthography.
        """
        text = nfc(text).translate({ord(c): instead for c, instead in self.replacements.items()})
        if vocabulary is not None and self.follows(vocabulary):
            text = vocabulary.in_its_case(text)
        else:
            text = {"upper": text.upper(), "lower": text.lower(), "keep": text}[self.case]
        return nfc(" ".join(word for word in text.split() if word not in self.dropped_words))

    def follows(self, vocabulary: Vocabulary) -> bool:
        """Tell whether text takes the vocabulary's case; in Buckwalter's, case distinguishes letters, so never."""
        return vocabulary.case not in ("", self.case) and not self.script

    def present(self, text: str) -> str:
        """Return decoded `text` as people read it: in Arabic script for "buckwalter", else unchanged."""
        return nfc(text.translate({ord(c): letter for c, letter in self.script.items()}))


ORTHOGRAPHIES = {
    # This is the spelling of LibriSpeech, on which facebook/wav2vec2-base-960h was trained.
    "librispeech": Orthography(case="upper", replacements=dict.fromkeys("\u2019\u2018\u201b\u02bc\uff07", "'")),
    # Compounds such as "quarter-century-old" are split, and the pause "--" is dropped. Build a vocabulary for it,
    # since `Vocabulary.librispeech` has no lower-case letters and would drop every character.
    "timit": Orthography(case="lower", replacements={"-": " "}),
    # The Arabic Speech Corpus writes pauses as "-" and "sil" and the letter theh as "^". The delimiter is "/",
    # since "|" is the letter alef with madda. The characters < > { } are letters too, so they are no brackets.
    "buckwalter": Orthography(
        replacements={"-": " ", "^": "v"},
        dropped_words=frozenset({"sil"}),
        word_delimiter="/",
        tag_brackets=("[]",),
        script=BUCKWALTER,
    ),
    "none": Orthography(),
}


def remove_tags(text: str, brackets: Iterable[str]) -> str:
    """Replace each balanced pair of `brackets` ("[]", "{}", ...) and its content by spaces.

    A bracket without a partner stays, and so does the text after it. The time is linear in the text's length.
    """
    # Steps have +1 at the beginning of a tag and -1 after its end, so their running sum is 0 outside tags.
    steps = [0] * (len(text) + 1)
    for pair in brackets:
        opening, closing = pair[0], pair[1]
        unclosed: list[int] = []
        for i, character in enumerate(text):
            if character == opening:
                unclosed.append(i)
            elif character == closing and unclosed:
                steps[unclosed.pop()] += 1
                steps[i + 1] -= 1
    depth, kept = 0, []
    for character, step in zip(text, steps, strict=False):
        depth += step
        kept.append(" " if depth else character)
    return "".join(kept)


def clean(
    text: str, *, orthography: str = "librispeech", tags: str = "remove", vocabulary: Vocabulary | None = None
) -> str:
    """Return a transcript as the model learns it: without tags, in the given spelling, NFC, with single spaces.

    Args:
        text: the transcript of the corpus.
        orthography: a name in `ORTHOGRAPHIES`.
        tags: what to do with ``[LAUGHTER]``, ``{LG}`` and ``<LG>``. "remove" deletes them with their letters.
            "keep-letters" deletes only the brackets. This is what the cleaner of Cai et al. (2021) does, since it
            only deletes characters that are not in the vocabulary.
        vocabulary: if all its letters have one case, the text is written in this case.

    Returns:
        The text. It may be empty; the utterance then has no transcript.

    Raises:
        ConfigError: `orthography` or `tags` is unknown.
    """
    if orthography not in ORTHOGRAPHIES:
        raise ConfigError(
            f"unknown orthography {orthography!r}{did_you_mean(orthography, ORTHOGRAPHIES)}; "
            f"known are {', '.join(ORTHOGRAPHIES)}"
        )
    spelling = ORTHOGRAPHIES[orthography]
    if tags == "remove":
        text = remove_tags(text, spelling.tag_brackets)
    elif tags == "keep-letters":
        text = text.translate(dict.fromkeys(map(ord, "".join(spelling.tag_brackets))))
    else:
        raise ConfigError(f"tags must be 'remove' or 'keep-letters', not {tags!r}")
    return spelling.clean(text, vocabulary)


# ------------------------------------------------------------------------------------------------- vocabulary

# These characters mean the same in a transcript. If a vocabulary lacks one, the first one that it has replaces it.
SAME = ("'\u2019\u02bc\u2018\u201b`\u00b4\uff07", "-\u2010\u2011")
SHARP_S = {"\u00df": ("\u1e9e", "ss", "SS"), "\u1e9e": ("\u00df", "SS", "ss")}
DOT_ABOVE = "\u0307"


def counted(characters: Counter[str], most: int = 20) -> str:
    """Show the most frequent characters with their counts, and how many more there are."""
    shown = ", ".join(f"{c!r} x{n}" for c, n in characters.most_common(most))
    return shown + (f" and {len(characters) - most} more" if len(characters) > most else "")


@dataclass
class Rewriting:
    """Count the changes to references that a vocabulary needs to write them. Counts are added with ``+=``.

    Attributes:
        case: "upper" or "lower", if the vocabulary has letters of one case, which is not the orthography's.
        recased: how many references were written in that case.
        replaced: character -> how often an equivalent one replaces it, such as another apostrophe.
        removed: character -> how often it was left out. A space is left out if there is no word delimiter.
        emptied: how many references have nothing left, so that no error rate counts them.
    """

    case: str = ""
    recased: int = 0
    replaced: Counter[str] = field(default_factory=Counter)
    removed: Counter[str] = field(default_factory=Counter)
    emptied: int = 0

    def __iadd__(self, other: Rewriting) -> Rewriting:
        """Add the changes of other references for the same vocabulary."""
        self.case = self.case or other.case
        self.recased += other.recased
        self.replaced += other.replaced
        self.removed += other.removed
        self.emptied += other.emptied
        return self

    def to_dict(self) -> dict[str, object]:
        """Return the changes for a report, without counts of 0."""
        changes = {
            "references_recased": {self.case: self.recased} if self.recased else {},
            "characters_replaced": dict(self.replaced.most_common()),
            "characters_outside_vocabulary": dict(self.removed.most_common()),
            "references_left_empty": self.emptied,
        }
        return {name: value for name, value in changes.items() if value}

    @classmethod
    def of(cls, report: Mapping[str, Any]) -> Rewriting:
        """Read the output of `to_dict`."""
        case, recased = next(iter(report.get("references_recased", {}).items()), ("", 0))
        replaced = Counter(report.get("characters_replaced", {}))
        removed = Counter(report.get("characters_outside_vocabulary", {}))
        return cls(case, recased, replaced, removed, report.get("references_left_empty", 0))

    def notes(self) -> list[str]:
        """Write a line for each kind of change."""
        alone = f"{self.case}-case letters alone"
        notes = (
            (self.recased, f"the vocabulary has {alone}: {self.recased} texts are written so"),
            (
                self.replaced,
                f"characters that the vocabulary writes otherwise, replaced: {counted(self.replaced)}",
            ),
            (self.removed, f"characters outside the vocabulary, removed: {counted(self.removed)}"),
            (self.emptied, f"{self.emptied} texts have no character of the vocabulary: no error rate counts them"),
        )
        return [note for changes, note in notes if changes]


def minimum_frames(targets: Iterable[int]) -> int:
    """Return the smallest number of frames on which CTC can align `targets`.

    L symbols with r equal neighbours need L + r frames, since a blank must separate these (Graves et al., 2006).
    """
    symbols = [int(t) for t in targets]
    return len(symbols) + sum(a == b for a, b in pairwise(symbols))

"""Define the kinds of errors, and functions that show values and texts of files in messages.

Every error that `ser` raises on purpose is a `SerError`, so ``except ser.SerError`` separates bad input from
defects. Its message says what was found, what was expected and what to do. It is a single string, so errors can be
pickled: an error in a data-loader worker reaches the user with its text.

One of five functions shows what a file holds, so that a message stays short and cannot control a terminal:

    brief_repr   any value that is not a text
    shorten      a text that may be long
    printable    a text that may hold control characters
    summary      names, in one line
    indented     messages, each on a line of its own
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

Tell = Callable[[str], None]  # shows a user a line


def _pieces(value: Any, most: int, depth: int = 0) -> Iterator[str]:
    """Yield the parts of a value's ``repr`` one by one, so that the caller can stop early."""
    if isinstance(value, str | bytes):
        yield repr(value[: most + 1])
    elif isinstance(value, int) and value.bit_length() > 4 * most:
        yield f"<a whole number of {value.bit_length():,} bits>"
    elif value is None or isinstance(value, int | float):
        yield repr(value)
    elif isinstance(value, list | tuple | set | frozenset | Mapping) and depth < 20:
        opening, closing = "[]" if isinstance(value, list) else "()" if isinstance(value, tuple) else "{}"
        yield opening
        for number, item in enumerate(value):
            yield ", " if number else ""
            if isinstance(value, Mapping):
                yield from _pieces(item, most, depth + 1)
                yield ": "
                item = value[item]
            yield from _pieces(item, most, depth + 1)
        yield closing
    else:
        yield f"<{type(value).__name__}>"


def brief_repr(value: Any, most: int = 200) -> str:
    """Return the ``repr`` of a foreign value, cut at about ``most`` characters.

    The time is limited for any value: one that is deeply nested or contains itself, or a number of a million
    digits. For a value that is not plain data, only the type is shown.
    """
    text = ""
    for piece in _pieces(value, most):
        text += piece
        if len(text) > most:
            return f"{text[:most]}..."
    return text


def shorten(text: str, most: int = 500) -> str:
    """Cut a foreign text that is longer than ``most`` characters."""
    return text if len(text) <= most else f"{text[:most]}..."


def printable(text: str, *, lines: bool = False) -> str:
    """Replace the characters that could control a terminal in a foreign text, such as a file's name or a label.

    Control and format characters, separators other than a space, and surrogates (bytes of a file name that are not
    UTF-8) become U+FFFD. With ``lines``, line ends are kept, for a message of several lines.
    """
    kept = "\n" if lines else ""
    return "".join(c if c.isprintable() or c in kept else "\N{REPLACEMENT CHARACTER}" for c in text)


def summary(names: Iterable[str], most: int = 8) -> str:
    """Join the first few foreign names in one line, and say how many more there are."""
    names = list(names)
    shown = printable(", ".join(shorten(name, 200) for name in names[:most]))
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


def pip_line(extra: str = "") -> str:
    """Return the shell command that installs this distribution, with an extra such as "plots"."""
    name = "ser-speech"  # on PyPI, where another project is called ser; the import and the command are `ser`
    return f"pip install '{name}[{extra}]'" if extra else f"pip install {name}"


def indented(messages: Iterable[str], most: int = 50) -> str:
    """Put each of the first messages on an indented line of its own, and say how many more there are."""
    lines = [printable(message) for message in messages]
    more = [f"and {len(lines) - most} more"] if len(lines) > most else []
    return "".join(f"\n  {line}" for line in [*lines[:most], *more])


class SerError(Exception):
    """Something is wrong with input, configuration or files; this is the base of all others."""


class AudioError(SerError):
    """A recording cannot be read: missing, not a regular file, an unsupported format, damaged."""


class MissingLibraryError(AudioError):
    """A library that reads or resamples sound is not installed or does not load: no fault of the recording."""


class ManifestError(SerError):
    """A manifest is unusable. The message lists every bad row, not only the first."""


class TextError(SerError):
    """A vocabulary or a transcript cannot be used."""


class ConfigError(SerError):
    """A setting is unknown, out of range or contradicts another."""


class ModelFolderError(SerError):
    """A model folder is incomplete, malformed or not what it claims to be."""


class RunFolderError(SerError):
    """A training run's folder cannot be used: foreign files, another configuration, a bad checkpoint."""


class FileError(SerError):
    """A file or folder cannot be written: no room, no permission. The message has the bytes needed and free."""


class ResourceError(SerError):
    """The machine failed: memory ran out, or a process that decodes audio was killed."""

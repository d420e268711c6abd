"""Check the names of emotions and speakers: their spelling, possible errors, and how often each occurs.

A class in two spellings (angry, Angry) would be two classes, so it is refused, and the message has a map that
unifies them. A possible misspelling (hapy beside happy) is shown with the counts of all classes, before training.
"""

from __future__ import annotations

import difflib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ser.data.cells import MAX_SHOWN, whole
from ser.data.manifest import Utterance, check_regular, map_for
from ser.data.text import did_you_mean, nfc, unique_names
from ser.errors import ConfigError, ManifestError, brief_repr, indented, shorten, summary

MAX_MAP_BYTES = 16 * 1024 * 1024
MAX_EXAMPLE = 1000  # characters of a map in a message
EXAMPLE = '{"hapy": "happy", "xxx": null}'  # the example of a map in messages
MAX_CLASSES = 12  # classes that have a column in a table of corpora
MAX_COMPARED = 200  # with more classes, they are not compared with each other for misspellings

# These characters are invisible, like those of the categories Cc and Cf: joiners, fillers, variation selectors.
INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)

# The usual name of an emotion -> other names for it, which several corpora may have. The emotions of "" are left
# out, since most corpora do not have them.
USUAL_NAMES = {
    "angry": ("anger",),
    "bored": ("boredom",),
    "contemptuous": ("contempt",),
    "disgusted": ("disgust",),
    "enthusiastic": ("enthusiasm",),
    "excited": ("excitement",),
    "fearful": ("fear",),
    "frustrated": ("frustration",),
    "happy": ("happiness", "joy"),
    "neutral": ("neutrality",),
    "sad": ("sadness",),
    "surprised": ("surprise",),
    "": ("calm",),
}

# These cells are not taken as missing, but they are hardly meant as a class.
SEEMS_MISSING = frozenset({"nan", "na", "n/a", "#n/a", "<na>", "null", "none", "nil", "nat", "?", "--", "missing"})


def is_name(value: object) -> bool:
    """Tell whether a value can be a label: a text that is not empty and has no lone surrogate."""
    return isinstance(value, str) and bool(value.strip()) and not any("\ud800" <= c <= "\udfff" for c in value)


def _checked(where: str, values: Mapping[str, Any]) -> dict[str, str | None]:
    """Check one level of a map, and normalise its names as labels are normalised."""
    names: dict[str, str | None] = {}
    for old, new in values.items():
        if not is_name(old) or (new is not None and not is_name(new)):
            pair = f"{brief_repr(old)} is {brief_repr(new)}"
            raise ConfigError(f"{where}: {pair}, expected a name, or null for no label")
        old = nfc(old.strip())
        if old in names:
            raise ConfigError(f"{where}: {brief_repr(old)} stands twice")
        names[old] = None if new is None else nfc(new.strip())
    for old, new in names.items():
        if new is not None and names.get(new, new) != new:
            end = "no label" if names[new] is None else brief_repr(names[new])
            raise ConfigError(
                f"{where}: {brief_repr(old)} is to be {brief_repr(new)}, but that is to be {end}; each name is "
                "replaced once, so write what it is to be in the end"
            )
    return names


def check_map(values: object, where: str) -> dict[str, Any]:
    """Check a label map from JSON, and normalise its names as labels are normalised; ``where`` is for messages.

    Raises:
        ConfigError: it is not a label map.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: found {brief_repr(values)}, expected an object such as {EXAMPLE}")
    speakers = values.get("speaker")
    if not isinstance(speakers, dict):
        return dict(_checked(where, values))
    emotions = {old: new for old, new in values.items() if old != "speaker"}
    return _checked(where, emotions) | {"speaker": _checked(where, speakers)}


# ------------------------------------------------------------------------------------------------------- maps


def parse_map(source: str) -> dict[str, Any]:
    """Read a label map: emotion as written -> its name, None for no label; under "speaker", the same for speakers.

        {"hapy": "happy", "xxx": null, "speaker": {"s1": "S1"}}

    A name that maps to itself (``"A": "A"``) is kept, even if another one looks similar.

    Args:
        source: the JSON object, or the path of a file that holds it.

    Raises:
        ConfigError: there is no such file, it holds no such object, or a new name is to be renamed itself.
    """
    inline = source.lstrip().startswith("{")
    where = "--map" if inline else f"--map {source}"
    try:
        if not inline:
            check_regular(Path(source), "a JSON object of names")
            with Path(source).open("rb") as file:
                content = file.read(MAX_MAP_BYTES + 1)
            if len(content) > MAX_MAP_BYTES:
                raise ConfigError(f"{where}: larger than {MAX_MAP_BYTES} bytes")
            source = content.decode("utf-8-sig")
        return check_map(json.loads(source, object_pairs_hook=unique_names), where)
    except OSError as error:
        raise ConfigError(f"{where}: cannot be read: {error.strerror}") from None
    except (ManifestError, ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: is not a JSON object such as {EXAMPLE}: {error}") from None


def is_invisible(character: str) -> bool:
    """Tell whether a character is invisible and has no width."""
    return unicodedata.category(character) in ("Cc", "Cf") or INVISIBLE.match(character) is not None


# -------------------------------------------------------------------------------------------------- spellings


def spelling(name: str) -> str:
    """Reduce a name to a form without case, spaces, invisible characters and variants of a character.

    Spaces between digits stay, since they separate numbers, and 1.0 becomes 1.
    """
    name = whole(name)
    if name.isascii() and name.isalnum():  # a shortcut for most names: a million speakers take a second
        return name.lower()
    name = unicodedata.normalize("NFKC", name)
    name = "".join(" " if c.isspace() else c for c in name if c.isspace() or not is_invisible(c))
    name = re.sub(r"(?<=[0-9]) +(?=[0-9])", "\0", name).replace(" ", "").casefold()
    return unicodedata.normalize("NFKC", name)


def _example(maps: Sequence[Mapping[str, Any]]) -> str:
    """Merge maps into one, as JSON that can be copied; if that is too long, write only the first map."""
    speakers = {old: new for one in maps for old, new in map_for(one, "speaker").items()}
    together = {old: new for one in maps for old, new in map_for(one, "emotion").items()}
    text = json.dumps(together | ({"speaker": speakers} if speakers else {}))
    return text if len(text) <= MAX_EXAMPLE else json.dumps(maps[0])


def shown_name(name: str) -> str:
    """Quote a name; escape it if a character is invisible, or looks like another one."""
    plain = unicodedata.normalize("NFKC", name) == name and not any(map(is_invisible, name))
    return brief_repr(name) if plain else shorten(ascii(name), 200)


def _twins(
    column: str, names: Sequence[str], where: Mapping[str, Sequence[str]], right: Collection[str]
) -> tuple[str, dict[str, Any]]:
    """Return a line that shows the spellings of one name, and a map that unifies them."""
    shown = [f"{shown_name(n)} ({', '.join(where[n]) or 'of the model'})" for n in names[:MAX_SHOWN]]
    kept = next((n for n in names if n in right), names[0])
    renamed = {n: kept for n in names if n != kept}
    return f"{column} {' and '.join(shown)}", {"speaker": renamed} if column == "speaker" else renamed


def _places(sets: Mapping[str, Iterable[Utterance]], column: str, right: Collection[str]) -> dict[str, list[str]]:
    """Collect the names of a column, and how often each occurs in each set; names of the model come first."""
    where: dict[str, list[str]] = {name: [] for name in right}
    for title, utterances in sets.items():
        counts = Counter(u.labels[column] for u in utterances if column in u.labels)
        for name, count in counts.items():
            where.setdefault(name, []).append(f"{title} {count}")
    return where


def _spelt_alike(names: Iterable[str], right: Collection[str], meant: Collection[str]) -> list[list[str]]:
    """Group names that differ only in spelling, except ``meant`` names and groups that are all ``right``."""
    groups: dict[str, list[str]] = {}
    for name in names:
        if name not in meant:
            groups.setdefault(spelling(name), []).append(name)
    return [group for group in groups.values() if len(group) > 1 and not set(group) <= set(right)]


def check_spellings(
    sets: Mapping[str, Iterable[Utterance]],
    *,
    emotions: Collection[str] = (),
    speakers: Collection[str] = (),
    label_map: Mapping[str, Any] | None = None,
    columns: Collection[str] = ("emotion", "speaker"),
) -> None:
    """Refuse a class or a speaker that is spelt in two ways, and would be two classes or speakers.

    Args:
        sets: name -> utterances.
        emotions, speakers: names that are correct, such as the classes of a model.
        label_map: the map with which the sets were read. A name that it maps to itself (``"A": "A"``) is correct.
        columns: the columns that are used.

    Raises:
        ManifestError: names differ only in case, spaces, invisible characters or Unicode form. The message shows
            where each occurs, and a map that unifies them.
    """
    twins = []
    for column, right in (("emotion", emotions), ("speaker", speakers)):
        if column in columns:
            meant = {old for old, new in map_for(label_map or {}, column).items() if old == new}
            where = _places(sets, column, right)
            twins += [_twins(column, names, where, right) for names in _spelt_alike(where, right, meant)]
    if twins:
        advice = "old name: new name, or null to drop the label; a name that maps to itself is meant as it is"
        raise ManifestError(
            "these names differ in case, spaces, invisible characters or Unicode form alone, and would be several "
            f"classes or speakers:{indented((line for line, _ in twins), MAX_SHOWN)}\nwrite each in one way, or "
            f"give --map labels.json ({advice}), such as {_example([one for _, one in twins])}"
        )


def _plain(name: str) -> str:
    """Show a name, in quotes if it has more than letters and digits."""
    return name if name.replace("_", "").replace("-", "").isalnum() and len(name) < 50 else shown_name(name)


def _set_line(title: str, utterances: Sequence[Utterance], counts: Counter[str]) -> str:
    """Describe a set: its size, its classes, most frequent first, and how many utterances lack a label."""
    classes = [f"{_plain(name)} {count}" for name, count in sorted(counts.items(), key=lambda i: (-i[1], i[0]))]
    parts = [f"emotions {summary(classes, MAX_SHOWN)}"] if classes else []
    speakers = {u.speaker for u in utterances if u.speaker is not None}
    parts += [f"{len(speakers)} speakers"] if speakers else []
    lacking = {name: sum(name not in u.labels for u in utterances) for name in ("emotion", "text", "speaker")}
    without = [f"{count} without {name}" for name, count in lacking.items() if count]
    return f"{title}: {len(utterances)} utterances; {'; '.join([*parts, *without])}"


def _near(name: str, counts: Counter[str]) -> str:
    """Find a class, at least twice as frequent, of which ``name`` may be a misspelling by one letter."""
    digits = re.sub(r"[^0-9]", "", name)
    for other in counts:
        if counts[other] < 2 * counts[name] or abs(len(other) - len(name)) > 1:
            continue
        likeness = difflib.SequenceMatcher(None, name.casefold(), other.casefold(), autojunk=False).ratio()
        if likeness >= 0.8 and spelling(name) != spelling(other) and digits == re.sub(r"[^0-9]", "", other):
            return other
    return ""


def _odd_names(counts: Counter[str]) -> list[str]:
    """Point out doubtful classes: misspellings, cells for a missing value, names with invisible characters."""
    lines = []
    for name in sorted(counts):
        if name.casefold() in SEEMS_MISSING:
            drop = json.dumps({name: None})
            lines.append(f"{brief_repr(name)} ({counts[name]}) is taken as a class; if it is none: --map '{drop}'")
        elif not name.isprintable() or INVISIBLE.search(name):
            lines.append(f"{name!a} ({counts[name]}) has characters that cannot be seen")
        elif len(counts) <= MAX_COMPARED and (near := _near(name, counts)):
            lines.append(f"{brief_repr(name)} ({counts[name]}): did you mean {brief_repr(near)} ({counts[near]})?")
    return lines[:MAX_SHOWN]


def _lacking(title: str, here: Collection[str], other: str, there: Collection[str], consequence: str) -> list[str]:
    """Say which classes only this set has, and which only the other one (the first set or the model) has."""
    near = list(there)[:MAX_COMPARED]
    more = [f"{_plain(name)}{did_you_mean(name, near)}" for name in sorted(set(here) - set(there))]
    fewer = [_plain(name) for name in sorted(set(there) - set(here))]
    differences = {
        f"has emotions that {other} lacks, {consequence}": more,
        f"lacks emotions that {other} has, and says nothing of them": fewer,
    }
    return [
        f"warning: {title} {what}: {summary(names, MAX_SHOWN)}" for what, names in differences.items() if names
    ]


def _zeros(sets: Mapping[str, Sequence[Utterance]]) -> list[str]:
    """Point out speakers whose numbers differ only in leading zeros, which a spreadsheet removes."""
    numbers: dict[str, list[str]] = {}
    for name in {u.speaker or "" for utterances in sets.values() for u in utterances}:
        if name.isdecimal():
            numbers.setdefault(name.lstrip("0") or "0", []).append(name)
    twins = [
        " and ".join(map(brief_repr, sorted(names))) for _, names in sorted(numbers.items()) if len(names) > 1
    ]
    shown = summary(twins, MAX_SHOWN)
    return [f"speakers differ in leading zeros alone, and count as different people: {shown}"] if twins else []


# ------------------------------------------------------------------------------------------------ usual names


def usual_names(
    names: Iterable[str],
    *,
    kept: Collection[str] = (),
    known: Collection[str] = (),
    classes: Collection[str] | None = None,
) -> dict[str, str | None]:
    """Return old -> new for emotions that have another usual name (`USUAL_NAMES`), None if they are left out.

    Args:
        names: emotions of several corpora.
        kept: names that a map of the user makes. They stay, and other names of the same emotion become them.
        known: the classes of the model that training begins with. They are kept likewise, except another name of
            an emotion that the user names.
        classes: the classes of a model that is evaluated. Then a name changes only if it is not a class but
            another name of exactly one class, and it becomes that class.
    """
    group_of = {spelling(name): usual for usual, others in USUAL_NAMES.items() for name in (usual, *others)}
    named = {group_of.get(spelling(name), name) for name in kept}
    kept = [*kept, *(name for name in known if group_of.get(spelling(name), name) not in named)]
    chosen: dict[str, list[str]] = {}  # usual name -> what it is called here
    for name in dict.fromkeys(kept if classes is None else classes):
        if group := group_of.get(spelling(name)):
            chosen.setdefault(group, []).append(name)
    found: dict[str, str | None] = {}
    for name in sorted(set(names).difference(kept, classes or ())):
        group = group_of.get(spelling(name)) if name else None
        if group is None or (classes is not None and spelling(name) in map(spelling, classes)):
            continue
        called = chosen.get(group, [])
        if len(called) == 1 or classes is None:
            new = called[0] if len(called) == 1 else group or None
            found |= {name: new} if new != name else {}
    return found


def usual_line(changes: Mapping[str, str | None], counts: Mapping[str, int]) -> str:
    """Return a line that says which names changed; ``counts`` are those of the old names."""
    new: dict[str | None, list[str]] = {}
    for name, to in changes.items():
        new.setdefault(to, []).append(f"{_plain(name)} ({counts[name]})")
    parts = [
        f"{summary(old, MAX_SHOWN)} {'left out' if to is None else f'is {_plain(to)}'}" for to, old in new.items()
    ]
    return f"usual names of emotions (--no-usual-names leaves them as they are): {'; '.join(parts)}"


# ----------------------------------------------------------------------------------------------------- counts


def corpus_lines(title: str, utterances: Iterable[Utterance]) -> list[str]:
    """Return the lines of a table: utterances by corpus and class, all utterances, and speakers of each corpus."""
    cells: Counter[tuple[str, str]] = Counter((u.corpus, u.emotion or "") for u in utterances)
    speakers = Counter(corpus for corpus, _ in {(u.corpus, u.speaker) for u in utterances if u.speaker})
    corpora, classes = Counter[str](), Counter[str]()
    for (corpus, emotion), count in cells.items():
        corpora[corpus] += count
        classes[emotion] += count
    without = classes.pop("", 0)
    shown = sorted(name for name, _ in classes.most_common(MAX_CLASSES))
    known = list(corpora)[:MAX_SHOWN]
    columns = [(_plain(name), {c: cells[c, name] for c in known}) for name in shown]
    if len(classes) > len(shown):
        columns += [("others", {c: corpora[c] - sum(cells[c, e] for e in (*shown, "")) for c in known})]
    columns += [("no emotion", {c: cells[c, ""] for c in known})] if without else []
    columns += [("utterances", corpora), ("speakers", speakers)]
    rows = [[title, *(shorten(name, 20) for name, _ in columns)]]
    rows += [[f"  {shorten(_plain(c), 40)}", *(str(counts[c]) for _, counts in columns)] for c in known]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return [*lines, *([f"  and {len(corpora) - MAX_SHOWN} more corpora"] if len(corpora) > MAX_SHOWN else [])]


def _differing_classes(counts: Mapping[str, Counter[str]], emotions: Collection[str] | None) -> list[str]:
    """Compare the classes of each set with those of the model, or without a model with those of the first set."""
    (first, learnt), *others = counts.items()
    other, there, consequence = first, list(learnt), "which nothing learns"
    if emotions is not None:
        other, there, consequence = "the model", list(emotions), "which are in no figure (--map renames labels)"
        others = list(counts.items())
    if not there:
        return []
    return [line for title, here in others if here for line in _lacking(title, here, other, there, consequence)]


def label_lines(
    sets: Mapping[str, Sequence[Utterance]],
    *,
    emotions: Collection[str] | None = None,
    by_corpus: bool = False,
) -> list[str]:
    """Describe the labels before they are used: classes, counts, and what looks wrong.

    Args:
        sets: name -> utterances; the others are compared with the first one.
        emotions: the classes of the model that is evaluated on them, empty if it has none; None: there is no model
            yet.
        by_corpus: whether each set is also counted by corpus.
    """
    counts = {title: Counter(u.emotion for u in us if u.emotion is not None) for title, us in sets.items()}
    lines = [_set_line(title, utterances, counts[title]) for title, utterances in sets.items()]
    lines += [line for title, us in sets.items() if by_corpus for line in corpus_lines(title, us)]
    lines += [f"  {line}" for line in _odd_names(sum(counts.values(), Counter[str]()))]
    lines += [f"warning: {line}" for line in _zeros(sets)]
    lines += _differing_classes(counts, emotions)
    alone = counts if emotions is None else {"the model": emotions}
    only = {title: shown_name(*names) for title, names in alone.items() if len(names) == 1}
    consequence = "there is nothing to tell apart, and accuracy, UA and F1 of 1 mean nothing"
    return lines + [
        f"warning: {title} has only one emotion, {name}: {consequence}" for title, name in only.items()
    ]

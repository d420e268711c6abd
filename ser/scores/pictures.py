"""Draw the pictures of a report, with matplotlib (the extra `plots`)."""

import math
import sys
import unicodedata
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ser.errors import ConfigError, Tell, pip_line, printable
from ser.scores.across import OTHERS, Result, cell_texts, chance_text, grid, most_classes
from ser.scores.report import Part, Report

LONGEST_LABEL = 30  # characters of a label in a picture
# (largest number of classes, size of a cell in inches, font size in it)
CELLS = ((12, 0.9, 9), (40, 0.5, 5), (math.inf, 0.2, 0))


def new_figure(width: float = 1, height: float = 1) -> Any:
    """Return a figure of this size in inches, without a window; ConfigError if matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except Exception as error:  # one built for another numpy fails with other errors
        why = f"{type(error).__name__}: {error}"
        raise ConfigError(f"pictures need matplotlib: {pip_line('plots')} ({why})") from None
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: Path) -> None:
    """Write a figure as a PNG file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # on missing characters, which `drawable` has replaced
        figure.tight_layout()
        figure.savefig(path, dpi=120)


def draw_curves(curves: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Draw accuracy and WER per epoch, a line per curve: Figure 2 of Cai et al. (2021).

    Args:
        curves: name -> points with "epoch", "accuracy" and "wer" (None: not measured).
        path: the PNG file.
    """
    figure = new_figure(9, 3.6)
    titles = {"accuracy": "accuracy (WA)", "wer": "WER"}
    for axes, (name, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        for label, curve in curves.items():
            points = [(p["epoch"], p[name]) for p in curve if p[name] is not None]
            if points:
                axes.plot(*zip(*points, strict=True), marker="." if len(points) < 30 else None, label=label)
        axes.set(xlabel="epoch", ylabel=title)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    _save(figure, path)


def needs_matplotlib() -> None:
    """Raise ConfigError if matplotlib is missing; call this before hours of work."""
    new_figure()


def needs_shaping(character: str) -> bool:
    """Tell whether a character belongs to a script that runs from right to left, or has to be combined."""
    return unicodedata.bidirectional(character) in ("R", "AL") or unicodedata.category(character) in ("Mn", "Mc")


def font_characters(path: str, wanted: set[str]) -> set[str]:
    """Return the wanted characters that the font of a file has."""
    from matplotlib import font_manager

    try:
        return wanted.intersection(map(chr, font_manager.get_font(path).get_charmap()))
    except (OSError, RuntimeError):  # a font of coloured pictures, or a file that was removed
        return set()


def families_for(wanted: set[str]) -> tuple[list[str], set[str]]:
    """Return font families that have the wanted characters, and the characters that no font has.

    The families are matplotlib's own, and those of the system with characters that it lacks (such as Chinese).
    """
    from matplotlib import font_manager

    families = ["DejaVu Sans"]
    missing = wanted - font_characters(font_manager.findfont(families[0]), wanted)
    # Skip the font "Last Resort", which has a box for every character.
    fonts = [f for f in font_manager.fontManager.ttflist if "lastresort" not in f.name.replace(" ", "").lower()]
    counts = Counter[str]()
    for font in fonts if missing else ():
        counts[font.name] = max(counts[font.name], len(font_characters(font.fname, missing)))
    for name, count in counts.most_common():
        # findfont returns the file of the regular style
        if count and (has := font_characters(font_manager.findfont(name), missing)):
            families.append(name)
            missing -= has
    return families, missing


def drawable(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return labels that a picture can show, and the font families to draw them with.

    A label that no font has is replaced by its number: #2 is the second label. So is a label in a script that
    matplotlib cannot draw, because it runs from right to left or characters have to be combined.
    """
    texts = [printable(name) for name in names]
    families, missing = families_for({c for text in texts for c in text if c != " "})
    shown = []
    for number, text in enumerate(texts, 1):
        if not text.strip() or not missing.isdisjoint(text) or any(map(needs_shaping, text)):
            text = f"#{number}"
        shown.append(text if len(text) <= LONGEST_LABEL else f"{text[: LONGEST_LABEL - 1]}…")
    return shown, families


def draw_confusion(names: Sequence[str], counts: NDArray[np.int64], path: Path) -> dict[str, str]:
    """Draw the matrix (K, K), with rows for the reference; return number -> label for labels without a font."""
    from matplotlib import rc_context

    shown, families = drawable(names)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    # Many classes have small cells, and very many have no space for numbers.
    cell, size = next((cell, size) for most, cell, size in CELLS if len(names) <= most)
    with rc_context({"font.family": families, "text.parse_math": False}):  # so a dollar sign is shown as it is
        figure = new_figure(1.6 + cell * len(names), 1.4 + 0.9 * cell * len(names))
        axes = figure.subplots()
        axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
        axes.set_xticks(range(len(names)), shown, rotation=30, ha="right", fontsize=max(size + 1, 5))
        axes.set_yticks(range(len(names)), shown, fontsize=max(size + 1, 5))
        for (row, column), count in np.ndenumerate(counts) if size else ():
            shade = "white" if shares[row, column] > 0.5 else "black"
            text = f"{count}\n{shares[row, column]:.0%}"
            axes.text(column, row, text, ha="center", va="center", color=shade, fontsize=size)
        axes.set(xlabel="recognised", ylabel="reference")
        _save(figure, path)
    return {label: name for i, (label, name) in enumerate(zip(shown, names, strict=True), 1) if label == f"#{i}"}


def draw_corpora(results: Sequence[Result], path: Path) -> dict[str, str]:
    """Draw the UA of each training set (row) on each tested corpus (column) with its interval and marks.

    A figure that heard speakers may have made better is in a red frame. Returns number -> name of corpora that
    could not be drawn.
    """
    from matplotlib import rc_context
    from matplotlib.patches import Rectangle

    rows, columns, cells = grid(results)
    names = list(dict.fromkeys([*columns, *rows]))
    shown, families = drawable(names)
    label = dict(zip(names, shown, strict=True))
    values = np.array([[cells[r, c].ua if (r, c) in cells else None for c in columns] for r in rows], float)
    most = most_classes(results)
    with rc_context({"font.family": families, "text.parse_math": False}):
        figure = new_figure(2.2 + 1.15 * len(columns), 1.6 + 0.62 * len(rows))
        axes = figure.subplots()
        axes.set_facecolor("0.93")
        axes.imshow(np.ma.masked_invalid(values), vmin=0, vmax=1, cmap="Blues", aspect="auto")
        axes.set_xticks(range(len(columns)), [label[c] for c in columns], rotation=30, ha="right", fontsize=9)
        axes.set_yticks(range(len(rows)), [label[r] for r in rows], fontsize=9)
        for (row, column), value in np.ndenumerate(values):
            if not np.isfinite(value):
                continue
            result = cells[rows[row], columns[column]]
            text, interval = cell_texts(result, most)
            where, color = {"ha": "center", "va": "center"}, "white" if value > 0.6 else "black"
            axes.text(column, row - 0.14, text, color=color, fontsize=9, **where)
            axes.text(column, row + 0.24, interval, color=color, fontsize=6, **where)
            if result.heard_by_model or result.heard_by_head:
                corner = (column - 0.47, row - 0.45)
                axes.add_patch(Rectangle(corner, 0.94, 0.9, fill=False, edgecolor="tab:red", linewidth=1.5))
        if OTHERS in rows:
            axes.axhline(rows.index(OTHERS) - 0.5, color="black", linewidth=1)
        axes.set(xlabel="tested", ylabel="trained on")
        axes.set_title(f"UA, and 95 % over speakers; chance {chance_text(results)}", fontsize=10)
        _save(figure, path)
    return {drawn: name for name, drawn in label.items() if drawn.startswith("#") and drawn != name}


def draw_reliability(bins: Sequence[Mapping[str, Any]], ece: float | None, path: Path) -> None:
    """Draw the accuracy of each bin of confidence (`Report.calibration`), and show the calibration error."""
    figure = new_figure(4.2, 4)
    axes = figure.subplots()
    sizes = np.array([b["count"] for b in bins], dtype=float)
    axes.plot([0, 1], [0, 1], color="grey", linewidth=1, label="perfectly calibrated")
    x, y = ([b[name] for b in bins] for name in ("confidence", "accuracy"))
    axes.scatter(x, y, s=20 + 200 * sizes / sizes.max(), alpha=0.7, label="bins (area: utterances)")
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy")
    axes.set_title("" if ece is None else f"expected calibration error {ece:.3f}", fontsize=10)
    axes.legend(fontsize=8, loc="upper left")
    _save(figure, path)


def draw_lengths(parts: Mapping[str, Part], path: Path) -> None:
    """Draw the accuracy of utterances of each length."""
    figure = new_figure(5, 3.4)
    axes = figure.subplots()
    axes.bar(range(len(parts)), [part.figures["accuracy"] for part in parts.values()], color="tab:blue")
    labels = [f"{name}\nn = {part.utterances}" for name, part in parts.items()]
    axes.set_xticks(range(len(parts)), labels, fontsize=8)
    axes.set(ylim=(0, 1), ylabel="accuracy (WA)")
    _save(figure, path)


def print_warning(text: str) -> None:
    """Print a line on standard error."""
    print(text, file=sys.stderr)


def draw(result: Report, folder: Path, *, say: Tell = print_warning) -> list[Path]:
    """Draw the confusion matrix, the reliability diagram and accuracy by length of a report, as PNG files.

    Returns the files. ``say`` is called with a line on labels that could not be drawn. Raises ConfigError if
    matplotlib is missing or cannot be loaded.
    """
    needs_matplotlib()
    folder.mkdir(parents=True, exist_ok=True)
    confusion, reliability, length = (folder / f"{name}.png" for name in ("confusion", "reliability", "length"))
    written = []
    if result.confusion is not None:
        numbered = draw_confusion(result.emotions, np.array(result.confusion), confusion)
        if numbered:
            labels = ", ".join(f"{number} {printable(name)}" for number, name in numbered.items())
            say(f"{confusion}: labels that cannot be drawn here are numbers: {labels}")
        draw_reliability(result.calibration or [], result.value("ece"), reliability)
        written += [confusion, reliability]
    lengths = {n.removeprefix("length: "): p for n, p in result.parts.items() if n.startswith("length")}
    if lengths and all(part.figures.get("accuracy") is not None for part in lengths.values()):
        draw_lengths(lengths, length)
        written.append(length)
    return written

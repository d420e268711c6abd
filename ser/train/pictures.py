"""Pictures of a report, with matplotlib (the extra ser[plots])."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ser.errors import ConfigError


def draw_curves(curves: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Accuracy and WER per epoch, a line per curve: Figure 2 of Cai et al. (2021).

    Args:
        curves: name -> points with "epoch", "accuracy" and "wer" (None: not measured).
        path: of the PNG.
    """
    canvas, figure_of = _matplotlib()
    figure = figure_of(figsize=(9, 3.6))
    for axes, name, title in zip(
        figure.subplots(1, 2), ("accuracy", "wer"), ("accuracy (WA)", "WER"), strict=True
    ):
        for label, curve in curves.items():
            points = [(p["epoch"], p[name]) for p in curve if p[name] is not None]
            if points:
                axes.plot(*zip(*points, strict=True), marker="." if len(points) < 30 else None, label=label)
        axes.set(xlabel="epoch", ylabel=title)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    canvas(figure)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def needs_matplotlib() -> None:
    """Raises ConfigError where it is missing: better before hours of work than after them."""
    _matplotlib()


def _matplotlib() -> tuple[Any, Any]:
    """Canvas and Figure, which open no window."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except Exception as error:  # one built for another numpy fails with other errors
        why = f"{type(error).__name__}: {error}"
        raise ConfigError(f"pictures need matplotlib: pip install 'ser[plots]' ({why})") from None
    return FigureCanvasAgg, Figure


def draw(found: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw the confusion matrix, the reliability diagram and accuracy by part of a report, as PNG files.

    Returns the files. Raises ConfigError where matplotlib is missing or does not load.
    """
    canvas, figure_of = _matplotlib()
    folder.mkdir(parents=True, exist_ok=True)
    written = []

    def finish(figure: Any, name: str) -> None:
        canvas(figure)
        figure.tight_layout()
        figure.savefig(folder / name, dpi=120)
        written.append(folder / name)

    if "confusion" in found:
        names, counts = found["emotions"], np.array(found["confusion"])
        shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        figure = figure_of(figsize=(1.6 + 0.9 * len(names), 1.4 + 0.8 * len(names)))
        axes = figure.subplots()
        axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
        axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
        axes.set_yticks(range(len(names)), names)
        for (row, column), count in np.ndenumerate(counts):
            shade = "white" if shares[row, column] > 0.5 else "black"
            text = f"{count}\n{shares[row, column]:.0%}"
            axes.text(column, row, text, ha="center", va="center", color=shade, fontsize=9)
        axes.set_xlabel("recognised")
        axes.set_ylabel("reference")
        finish(figure, "confusion.png")

        figure = figure_of(figsize=(4.2, 4))
        axes = figure.subplots()
        bins = found["calibration"]
        sizes = np.array([b["count"] for b in bins], dtype=float)
        axes.plot([0, 1], [0, 1], color="grey", linewidth=1, label="perfectly calibrated")
        axes.scatter(
            [b["confidence"] for b in bins],
            [b["accuracy"] for b in bins],
            s=20 + 200 * sizes / sizes.max(),
            alpha=0.7,
            label="bins (area: utterances)",
        )
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy")
        ece = found["figures"].get("ece", {}).get("value")
        axes.set_title("" if ece is None else f"expected calibration error {ece:.3f}", fontsize=10)
        axes.legend(fontsize=8, loc="upper left")
        finish(figure, "reliability.png")

    lengths = {n.removeprefix("length: "): p for n, p in found["parts"].items() if n.startswith("length")}
    values = {n: p["figures"].get("accuracy") for n, p in lengths.items()}
    if lengths and all(v is not None for v in values.values()):
        figure = figure_of(figsize=(5, 3.4))
        axes = figure.subplots()
        axes.bar(range(len(lengths)), list(values.values()), color="tab:blue")
        labels = [f"{name}\nn = {part['utterances']}" for name, part in lengths.items()]
        axes.set_xticks(range(len(lengths)), labels, fontsize=8)
        axes.set(ylim=(0, 1), ylabel="accuracy (WA)")
        finish(figure, "length.png")
    return written

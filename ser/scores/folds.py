"""What all folds of a protocol say together: pooled figures, curves, and ablations side by side.

Pooled means over all utterances (or words) of all folds; the mean over folds stands beside it.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ser.data.protocols import Protocol
from ser.data.text import Rewriting
from ser.files import csv_line, replace_file
from ser.scores.card import as_block, as_text
from ser.scores.report import Outcomes, compare, report, shared_line, table

SHORT = {"WA": "accuracy", "UA": "unweighted_accuracy", "WER": "wer", "speaker": "speaker_accuracy"}


def curve_of(run: Path) -> dict[int, dict[str, Any]]:
    """Epoch (from 1) -> the last evaluation in it on the validation part; empty without one."""
    log = run / "metrics.jsonl"
    entries = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    return {entry["epoch"] + 1: entry for entry in entries if entry["kind"] == "valid"}


def pooled_curve(runs: Sequence[Path]) -> list[dict[str, Any]]:
    """Accuracy over all folds' validation utterances and WER over all their words, epoch by epoch."""
    curves = [curve_of(run) for run in runs]
    found = []
    for epoch in sorted(set.intersection(*(set(curve) for curve in curves)) if curves else ()):
        row: dict[str, Any] = {"epoch": epoch}
        for name, weight in (("accuracy", "emotion_utterances"), ("wer", "words")):
            entries = [c[epoch] for c in curves if c[epoch].get(name) is not None and c[epoch].get(weight)]
            total = sum(e[weight] for e in entries)
            row[name] = sum(e[name] * e[weight] for e in entries) / total if total else None
        found.append(row)
    return found


def best_on_test(runs: Sequence[Path]) -> dict[str, float] | None:
    """WA over all folds if each fold's epoch were chosen by its test part: no result, but what others print."""
    chosen = []
    for run in runs:
        entries = [e for e in curve_of(run).values() if e.get("accuracy") is not None]
        if not entries:
            return None
        chosen.append(max(entries, key=lambda e: e["accuracy"]))
    total = sum(e["emotion_utterances"] for e in chosen)
    return {"accuracy": sum(e["accuracy"] * e["emotion_utterances"] for e in chosen) / total, "utterances": total}


def pooled_report(out: Path, folds: Sequence[str], protocol: Protocol, *, resamples: int) -> dict[str, Any]:
    """All folds as one.

    Args:
        out: folder with FOLD/predictions.csv and FOLD/report.json of each, and FOLD/run where it was trained.
        folds: their names.
        protocol: that made them.
        resamples: of the bootstrap.
    """
    outcomes = Outcomes.joined([Outcomes.read(out / fold / "predictions.csv") for fold in folds])
    found = report(outcomes, resamples=resamples)
    by_fold, known, rewriting = {}, [], Rewriting()
    for fold in folds:
        judged = json.loads((out / fold / "report.json").read_text())
        by_fold[fold] = {"utterances": judged["utterances"], "shared": judged.get("shared_with_training")}
        by_fold[fold]["shared_line"] = shared_line(judged)
        rewriting += Rewriting.of(judged)
        by_fold[fold] |= {name: figure["value"] for name, figure in judged["figures"].items()}
        if turns := judged.get("known_turns"):
            value = turns["figures"]["speaker_accuracy"]["value"]
            by_fold[fold]["speaker_accuracy_on_known_turns"] = value
            known.append((value, turns["judged"]["speaker"]))
    found |= rewriting.to_dict()
    over = {}
    for name in found["figures"]:
        values = [entry[name] for entry in by_fold.values() if entry.get(name) is not None]
        if values:
            spread = statistics.stdev(values) if len(values) > 1 else None
            over[name] = {"mean": statistics.mean(values), "spread": spread, "folds": len(values)}
    found |= {"protocol": protocol.name, "description": protocol.description, "folds": by_fold, "over_folds": over}
    runs = [out / fold / "run" for fold in folds]
    found["curve"] = pooled_curve(runs)
    if "recordings" in protocol.declares.get(("valid", "test"), ()):
        found["best_on_test"] = best_on_test(runs)
    if known:
        turns = sum(count for _, count in known)
        value = sum(value * count for value, count in known) / turns
        found["speaker_accuracy_on_known_turns"] = {"value": value, "utterances": turns}
    return found


def show(value: float | None) -> str:
    """A figure with four digits; a dash for none."""
    return "-" if value is None else f"{value:.4f}"


def to_markdown(found: Mapping[str, Any]) -> str:
    """The report for people."""
    names = {short: name for short, name in SHORT.items() if name in found["figures"]}
    lines = [f"# {as_text(found['protocol'])}: {found['utterances']} utterances, {len(found['folds'])} folds", ""]
    lines += [as_text(found["description"]), "", f"The {found['weights']} weights of each fold are judged.", ""]
    lines += ["| fold | utterances | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for fold, entry in found["folds"].items():
        cells = " | ".join(show(entry.get(name)) for name in names.values())
        lines.append(f"| {as_text(fold)} | {entry['utterances']} | {cells} |")
    over = found["over_folds"]
    cells = " | ".join(f"{show(over[n]['mean'])} ± {show(over[n]['spread'])}" for n in names.values())
    lines.append(f"| mean ± spread | | {cells} |")
    pooled = " | ".join(f"**{show(found['figures'][n]['value'])}**" for n in names.values())
    lines.append(f"| pooled | {found['utterances']} | {pooled} |")
    lines += ["", "What the judged models know of each fold's test part:", ""]
    lines += [f"- {as_text(fold)}: {as_text(entry['shared_line'])}" for fold, entry in found["folds"].items()]
    if best := found.get("best_on_test"):
        lines += [
            "",
            f"Best on test: WA {show(best['accuracy'])}, if each fold's epoch were chosen by its test part. It is "
            "optimistic and no result; it stands here because others print it.",
        ]
    if known := found.get("speaker_accuracy_on_known_turns"):
        lines += [
            "",
            "No speaker of a test part is in its training, so the speaker head is scored on "
            f"{known['utterances']} turns that were held out of the training speakers: {show(known['value'])}.",
        ]
    for title, text in (("", table(found)), ("What the parts share:", found["audit"].rstrip()),
                        ("To repeat:", json.dumps(found["repeat"], indent=1))):  # fmt: skip
        lines += ["", *([title, ""] if title else []), *as_block(text)]
    return "\n".join([*lines, ""])


def write_curves(path: Path, curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """value, epoch, accuracy, wer: a row per point of each curve."""
    with replace_file(path) as file:
        file.write(csv_line(["value", "epoch", "accuracy", "wer"]))
        for value, curve in curves.items():
            file.writelines(csv_line([value, row["epoch"], row["accuracy"], row["wer"]]) for row in curve)


def ablation_summary(
    name: str, found: Mapping[str, Mapping[str, Any]], predictions: Mapping[str, Outcomes], *, resamples: int
) -> dict[str, Any]:
    """Several cross-validations of the same folds, side by side, each tested against the first.

    Args:
        name: of what differs.
        found: value -> its `pooled_report`.
        predictions: value -> of all folds.
        resamples: of the bootstrap.
    """
    first = next(iter(found))
    rows = {}
    for value, one in found.items():
        figures, over = one["figures"], one["over_folds"]
        speaker = figures.get("speaker_accuracy") or one.get("speaker_accuracy_on_known_turns")
        against = compare(predictions[first], predictions[value], resamples=resamples)
        rows[value] = {
            "accuracy": figures.get("accuracy"),
            "accuracy_over_folds": over.get("accuracy"),
            "unweighted_accuracy": figures.get("unweighted_accuracy"),
            "wer": figures.get("wer"),  # all edits over all words
            "wer_over_folds": over.get("wer"),  # the mean over folds: the paper's equation 5
            "speaker_accuracy": None if speaker is None else speaker["value"],
            "best_on_test": one.get("best_on_test"),
            f"against {first}": None if value == first else against,
        }
    same = {key: found[first][key] for key in ("protocol", "description", "utterances", "weights", "repeat")}
    drawn = any(one["curve"] for one in found.values())
    return same | {"ablation": name, "folds": list(found[first]["folds"]), "values": rows, "drawn": drawn}


def ablation_markdown(summary: Mapping[str, Any], beside: Sequence[str] = ()) -> str:
    """An ablation for people, as Table 4 of Cai et al. (2021) is for alpha; ``beside``: more lines."""
    name, rows, count = summary["ablation"], summary["values"], len(summary["folds"])
    folds = f"{count} fold{'s' if count > 1 else ''}"
    first = next(iter(rows))
    lines = [f"# {name} under {as_text(summary['protocol'])}: {summary['utterances']} utterances, {folds}", ""]
    lines += [
        as_text(summary["description"]),
        "",
        f"The {summary['weights']} weights of each fold are judged.",
        "",
    ]
    columns = [name, "WA", "95 %", "WA, mean over folds", "UA", "WER", "WER, mean over folds", "speaker"]
    lines += [f"| {' | '.join([*columns, f'WA against {first}'])} |", "|---" * 9 + "|"]
    for value, row in rows.items():
        low, high = (row["accuracy"] or {}).get("interval_utterances", (None, None))
        against = row[f"against {first}"]
        p = "" if against is None else f"p = {against['mcnemar_p']:.3f}"
        means = [show((row[key] or {}).get("mean")) for key in ("accuracy_over_folds", "wer_over_folds")]
        pooled = [show((row[key] or {}).get("value")) for key in ("accuracy", "unweighted_accuracy", "wer")]
        cells = [
            as_text(value),
            pooled[0],
            f"{show(low)} to {show(high)}",
            means[0],
            pooled[1],
            pooled[2],
            means[1],
        ]
        lines.append(f"| {' | '.join([*cells, show(row['speaker_accuracy']), p])} |")
    lines += [
        "",
        "WA, UA and WER are pooled: over all utterances, or words, of all folds. The mean over folds of the WER "
        "is the paper's equation 5. p is McNemar's, exact, for the utterances that only one of the two has right.",
    ]
    if any(row["best_on_test"] for row in rows.values()):
        best = ", ".join(f"{v}: {show((row['best_on_test'] or {}).get('accuracy'))}" for v, row in rows.items())
        lines += ["", f"Best on test (WA, each epoch chosen by its test part: optimistic, no result): {best}."]
    lines += beside
    if summary["drawn"]:
        title = "Accuracy and WER on the validation part, epoch by epoch (the paper's Figure 2; curves.csv):"
        lines += ["", title, "", "![curves](curves.png)"]
    return "\n".join([*lines, "", "To repeat:", "", *as_block(json.dumps(summary["repeat"], indent=1)), ""])

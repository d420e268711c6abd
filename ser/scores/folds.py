"""Combine the results of all folds of a protocol: pooled figures, learning curves, and tables of ablations.

"Pooled" means over all utterances (or words) of all folds. The mean over folds is reported beside it.
"""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ser.data.protocols import Protocol
from ser.files import csv_line, replace_file
from ser.scores.card import as_block, as_text
from ser.scores.report import (
    PARTS,
    Outcomes,
    Report,
    compare_predictions,
    four_digits,
    interval_text,
    plain,
    report,
    shared_line,
    table,
)

SHORT = {"WA": "accuracy", "UA": "unweighted_accuracy", "WER": "wer", "speaker": "speaker_accuracy"}


def curve_of(run: Path) -> dict[int, dict[str, Any]]:
    """Return epoch (from 1) -> its last evaluation on the validation part; empty if there is none."""
    log = run / "metrics.jsonl"
    entries = map(json.loads, log.read_text().splitlines() if log.is_file() else ())
    return {entry["epoch"] + 1: entry for entry in entries if entry["kind"] == "valid"}


def pooled_curve(runs: Sequence[Path]) -> list[dict[str, Any]]:
    """Pool accuracy over all folds' validation utterances and WER over all their words, epoch by epoch."""
    curves = [curve_of(run) for run in runs]
    points = []
    for epoch in sorted(set.intersection(*(set(curve) for curve in curves)) if curves else ()):
        row: dict[str, Any] = {"epoch": epoch}
        for name, weight in (("accuracy", "emotion_utterances"), ("wer", "words")):
            entries = [c[epoch] for c in curves if c[epoch].get(name) is not None and c[epoch].get(weight)]
            total = sum(e[weight] for e in entries)
            row[name] = sum(e[name] * e[weight] for e in entries) / total if total else None
        points.append(row)
    return points


def best_on_test(runs: Sequence[Path]) -> dict[str, float] | None:
    """Return the WA if each fold's epoch were chosen on its test part; it is optimistic, but often published."""
    curves = [[e for e in curve_of(run).values() if e.get("accuracy") is not None] for run in runs]
    if not all(curves):
        return None
    chosen = [max(curve, key=lambda e: e["accuracy"]) for curve in curves]
    total = sum(e["emotion_utterances"] for e in chosen)
    return {"accuracy": sum(e["accuracy"] * e["emotion_utterances"] for e in chosen) / total, "utterances": total}


def fold_entry(result: Report) -> dict[str, Any]:
    """Return the part of a fold's report that a pooled report keeps."""
    shared = {"shared": result.shared_with_training, "shared_line": shared_line(result)}
    entry = {"utterances": result.utterances} | shared | {name: f.value for name, f in result.figures.items()}
    if turns := result.known_turns:
        entry["speaker_accuracy_on_known_turns"] = turns.figures["speaker_accuracy"].value
    return entry


@dataclass
class PooledReport:
    """Hold the results of all folds of a protocol.

    Attributes:
        pooled: the report on the utterances of all folds.
        protocol, description: name and description of the protocol.
        folds: name -> report.
        over_folds: figure -> its mean over the folds, its spread (standard deviation) and the number of folds.
        curve: accuracy and WER on the validation part, epoch by epoch (see `pooled_curve`).
        validates_on_test: whether each fold's validation part is its test part.
        best_on_test: the optimistic WA of `best_on_test`, if the folds validate on their test part.
        known_turns: accuracy of the speaker head on held-out utterances, and their number; None: not measured.
        weights: which weights of each fold were evaluated.
        audit: what the parts of each fold share, as a table.
        repeat: what is needed to repeat the run.
    """

    pooled: Report
    protocol: str
    description: str
    folds: dict[str, Report]
    over_folds: dict[str, dict[str, Any]]
    curve: list[dict[str, Any]]
    validates_on_test: bool = False
    best_on_test: dict[str, float] | None = None
    known_turns: dict[str, Any] | None = None
    weights: str = ""
    audit: str = ""
    repeat: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a dictionary for JSON."""
        content = self.pooled.to_dict() | {"protocol": self.protocol, "description": self.description}
        content |= {"folds": {name: fold_entry(fold) for name, fold in self.folds.items()}}
        content |= {"over_folds": self.over_folds, "curve": self.curve}
        content |= {"best_on_test": self.best_on_test} if self.validates_on_test else {}
        content |= {"speaker_accuracy_on_known_turns": self.known_turns} if self.known_turns else {}
        return content | {"weights": self.weights, "audit": self.audit, "repeat": self.repeat}


def over_folds(folds: Iterable[Report], name: str) -> dict[str, Any] | None:
    """Return a figure's mean over the folds that have it, its spread and their number; None without any."""
    values = [value for fold in folds if (value := fold.value(name)) is not None]
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.mean(values), "spread": spread, "folds": len(values)} if values else None


def pooled_known_turns(reports: Iterable[Report]) -> dict[str, Any] | None:
    """Pool the speaker head's accuracy on held-out turns over the folds that have it; None without any."""
    known = [r.known_turns for r in reports if r.known_turns is not None]
    if not known:
        return None
    turns = sum(k.judged["speaker"] for k in known)
    right = sum((k.figures["speaker_accuracy"].value or 0.0) * k.judged["speaker"] for k in known)
    return {"value": right / turns, "utterances": turns}


def pooled_report(
    out: Path, folds: Sequence[str], protocol: Protocol, *, resamples: int, parts: Sequence[str] = PARTS
) -> PooledReport:
    """Report all folds as one.

    Args:
        out: the folder with FOLD/predictions.csv and FOLD/report.json of each fold, and the training in FOLD/run.
        folds: the names of the folds.
        protocol: the protocol that made the folds.
        resamples: the number of resamples of the bootstrap.
        parts: columns of the predictions files by which figures are reported in parts.
    """
    outcomes = Outcomes.joined([Outcomes.read(out / fold / "predictions.csv", parts) for fold in folds])
    pooled = report(outcomes, resamples=resamples)
    reports = {fold: Report.read(out / fold / "report.json") for fold in folds}
    for result in reports.values():
        pooled.rewriting += result.rewriting
    over = {name: over_folds(reports.values(), name) for name in pooled.figures}
    runs = [out / fold / "run" for fold in folds]
    validates_on_test = "recordings" in protocol.declares.get(("valid", "test"), ())
    return PooledReport(
        pooled,
        protocol.name,
        protocol.description,
        reports,
        {name: figure for name, figure in over.items() if figure is not None},
        pooled_curve(runs),
        validates_on_test,
        best_on_test(runs) if validates_on_test else None,
        pooled_known_turns(reports.values()),
    )


def fold_table(result: PooledReport) -> str:
    """Write a row for each fold, their mean and spread, and the pooled figures."""
    names = {short: name for short, name in SHORT.items() if name in result.pooled.figures}
    lines = ["| fold | utterances | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for fold, entry in result.folds.items():
        cells = " | ".join(four_digits(entry.value(name)) for name in names.values())
        lines.append(f"| {as_text(fold)} | {entry.utterances} | {cells} |")
    over = [result.over_folds[name] for name in names.values()]
    cells = " | ".join(f"{four_digits(o['mean'])} ± {four_digits(o['spread'])}" for o in over)
    pooled = " | ".join(f"**{four_digits(result.pooled.value(name))}**" for name in names.values())
    lines += [f"| mean ± spread | | {cells} |", f"| pooled | {result.pooled.utterances} | {pooled} |"]
    return "\n".join(lines)


def pooled_markdown(result: PooledReport) -> str:
    """Write the report as Markdown."""
    known = "\n".join(f"- {as_text(fold)}: {as_text(shared_line(entry))}" for fold, entry in result.folds.items())
    notes = ""
    if best := result.best_on_test:
        notes += (
            f"\nBest on test: WA {four_digits(best['accuracy'])}, if each fold's epoch were chosen by its test "
            "part. It is optimistic and no result; it stands here because others print it.\n"
        )
    if turns := result.known_turns:
        notes += (
            "\nNo speaker of a test part is in its training, so the speaker head is scored on "
            f"{turns['utterances']} turns that were held out of the training speakers: "
            f"{four_digits(turns['value'])}.\n"
        )
    return f"""\
# {as_text(result.protocol)}: {result.pooled.utterances} utterances, {len(result.folds)} folds

{as_text(result.description)}

The {result.weights} weights of each fold are judged.

{fold_table(result)}

What the judged models know of each fold's test part:

{known}
{notes}
{as_block(table(result.pooled))}

What the parts share:

{as_block(result.audit.rstrip())}

To repeat:

{as_block(json.dumps(result.repeat, indent=1))}
"""


def write_curves(path: Path, curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Write a CSV of value, epoch, accuracy and wer, with a row for each point of each curve."""
    with replace_file(path) as file:
        file.write(csv_line(["value", "epoch", "accuracy", "wer"]))
        for value, curve in curves.items():
            file.writelines(csv_line([value, row["epoch"], row["accuracy"], row["wer"]]) for row in curve)


def ablation_row(result: PooledReport, against: Mapping[str, Any] | None, first: str) -> dict[str, Any]:
    """Return the row of one cross-validation in an ablation; ``against`` compares it with the ``first`` value."""
    figures, over = plain(result.pooled.figures), result.over_folds
    speaker = figures.get("speaker_accuracy") or result.known_turns
    return {
        "accuracy": figures.get("accuracy"),
        "accuracy_over_folds": over.get("accuracy"),
        "unweighted_accuracy": figures.get("unweighted_accuracy"),
        "wer": figures.get("wer"),  # all edits over all words
        "wer_over_folds": over.get("wer"),  # the mean over folds: the paper's equation 5
        "speaker_accuracy": None if speaker is None else speaker["value"],
        "best_on_test": result.best_on_test,
        f"against {first}": against,
    }


def ablation_summary(
    name: str, results: Mapping[str, PooledReport], predictions: Mapping[str, Outcomes], *, resamples: int
) -> dict[str, Any]:
    """Compare several cross-validations of the same folds, each tested against the first.

    Args:
        name: the name of the setting that differs.
        results: value of the setting -> report.
        predictions: value of the setting -> predictions of all folds.
        resamples: the number of resamples of the bootstrap.
    """
    first = next(iter(results))
    rows = {}
    for value, result in results.items():
        against = compare_predictions(predictions[first], predictions[value], resamples=resamples)
        rows[value] = ablation_row(result, None if value == first else against, first)
    content = results[first].to_dict()
    same = {key: content[key] for key in ("protocol", "description", "utterances", "weights", "repeat")}
    drawn = any(result.curve for result in results.values())
    return same | {"ablation": name, "folds": list(results[first].folds), "values": rows, "drawn": drawn}


def ablation_cells(value: str, row: Mapping[str, Any], first: str) -> str:
    """Write the cells of one value."""
    span = interval_text((row["accuracy"] or {}).get("interval_utterances", (None, None)))
    against = row[f"against {first}"]
    p = "" if against is None else f"p = {against['mcnemar_p']:.3f}"
    mean_wa, mean_wer = (four_digits((row[f"{key}_over_folds"] or {}).get("mean")) for key in ("accuracy", "wer"))
    names = ("accuracy", "unweighted_accuracy", "wer")
    wa, ua, wer = (four_digits((row[name] or {}).get("value")) for name in names)
    return " | ".join(
        [as_text(value), wa, span, mean_wa, ua, wer, mean_wer, four_digits(row["speaker_accuracy"]), p]
    )


def ablation_markdown(summary: Mapping[str, Any], beside: Sequence[str] = ()) -> str:
    """Write an ablation as Markdown, like Table 4 of Cai et al. (2021) for alpha; ``beside`` are more lines."""
    name, rows, count = summary["ablation"], summary["values"], len(summary["folds"])
    folds = f"{count} fold{'s' if count > 1 else ''}"
    first = next(iter(rows))
    lines = "\n".join(f"| {ablation_cells(value, row, first)} |" for value, row in rows.items())
    notes = ""
    if any(row["best_on_test"] for row in rows.values()):
        shown = [f"{v}: {four_digits((row['best_on_test'] or {}).get('accuracy'))}" for v, row in rows.items()]
        note = "Best on test (WA, each epoch chosen by its test part: optimistic, no result)"
        notes = f"\n{note}: {', '.join(shown)}.\n"
    notes += "".join(f"{line}\n" for line in beside)
    if summary["drawn"]:
        title = "Accuracy and WER on the validation part, epoch by epoch (the paper's Figure 2; curves.csv):"
        notes += f"\n{title}\n\n![curves](curves.png)\n"
    return f"""\
# {name} under {as_text(summary["protocol"])}: {summary["utterances"]} utterances, {folds}

{as_text(summary["description"])}

The {summary["weights"]} weights of each fold are judged.

| {name} | WA | 95 % | WA, mean over folds | UA | WER | WER, mean over folds | speaker | WA against {first} |
|---|---|---|---|---|---|---|---|---|
{lines}

WA, UA and WER are pooled: over all utterances, or words, of all folds. The mean over folds of the WER is the \
paper's equation 5. p is McNemar's, exact, for the utterances that only one of the two has right.
{notes}
To repeat:

{as_block(json.dumps(summary["repeat"], indent=1))}
"""

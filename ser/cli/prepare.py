"""Make manifests, folds and a data sheet of a corpus's release, and check its counts.

    ser prepare IEMOCAP_full_release --out data/iemocap
    ser prepare PAPER_CSVS --corpus iemocap-csv --root IEMOCAP_full_release --out data/paper
    ser prepare EMODB/wav --corpus emodb --out data/emodb
    ser prepare EmoBox/data/aesdd --corpus emobox --out data/aesdd

In --out: iemocap4.csv (the four-class protocol) and iemocap_all.csv (every label), or one manifest with the name
of the corpus; folds/PROTOCOL.json (lists of ids); report.json (all that was dropped and why) and data_sheet.md.
The manifests name files relative to the release: read them with --root RELEASE.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from ser.data.corpora import CORPORA, manifests_of, read_corpus
from ser.data.datasheet import data_sheet, listen, sheet_to_markdown
from ser.data.manifest import Utterance, write_manifest
from ser.data.protocols import Protocol, to_table, write_folds
from ser.data.spellings import label_lines
from ser.errors import SerError, printable
from ser.files import replace_file, write_json


def write_protocols(out: Path, protocols: list[Protocol], utterances: list[Utterance], seed: int) -> list[str]:
    """Print and write the folds of each protocol; return the reasons why some were not written."""
    refused = []
    for protocol in protocols:
        path = out / "folds" / f"{protocol.name.replace(':', '-')}.json"
        path.unlink(missing_ok=True)
        try:
            folds = protocol.folds(utterances, seed=seed)
            audits = write_folds(path, protocol, folds, utterances, seed=seed)
        except SerError as error:
            refused.append(f"no folds {protocol.name}: {error}")
        else:
            print(f"\n{protocol.name}: {protocol.description}\n{to_table(audits)}", end="")
    return refused


def add_arguments(parser: ArgumentParser) -> None:
    """Add the flags of the command."""
    add = parser.add_argument
    add("folder", type=Path, help="the release; for iemocap-csv and emobox the folder of the lists")
    add("--out", type=Path, required=True, help="folder for all that is written")
    add("--corpus", choices=list(CORPORA), default="iemocap", help="(default: iemocap)")
    add("--root", type=Path, help="where the recordings are, for iemocap-csv and emobox")
    add("--partial", action="store_true", help="go on where turns are missing or unusable")
    add("--seed", type=int, default=0, help="of the protocols that draw (default: 0)")


def show_report(dropped: dict[str, list[str]], warnings: list[str], path: Path) -> None:
    """Print what was dropped and the first warnings."""
    print("\ndropped:" if dropped else "\nnothing was dropped")
    for why, what in dropped.items():
        print(printable(f"  {len(what)} x {why}, such as {what[0]}"))
    for warning in warnings[:20]:
        print(printable(f"warning: {warning}", lines=True))
    print(f"{len(warnings)} warnings; all of them and all that was dropped: {printable(str(path))}")


def run(arguments: Namespace) -> int:
    """Write the manifests, folds, report and data sheet of a corpus."""
    out, row = arguments.out, CORPORA[arguments.corpus]
    options = {"root": arguments.root, "partial": arguments.partial, "tell": lambda line: print(printable(line))}
    corpus, sounds = listen(read_corpus(arguments.corpus, arguments.folder, **options), partial=arguments.partial)
    manifests = manifests_of(arguments.corpus, corpus.utterances)
    divided = next(iter(manifests.values()))
    protocols = row.protocols(divided)

    print("\n".join(line for name, rows in manifests.items() for line in label_lines({name: rows})))
    (out / "folds").mkdir(parents=True, exist_ok=True)
    sheets = {name: data_sheet(utterances, sounds) for name, utterances in manifests.items()}
    for name, utterances in manifests.items():
        write_manifest(out / f"{name}.csv", utterances, root=corpus.root)
        where = printable(f"{out / name}.csv")
        print(f"{where}: {len(utterances)} utterances, {sheets[name]['hours']} hours")
    warnings = corpus.warnings + write_protocols(out, protocols, divided, arguments.seed)
    with replace_file(out / "data_sheet.md") as file:
        file.write("\n".join(sheet_to_markdown(sheet, name) for name, sheet in sheets.items()))
    dropped = {why: [d.what for d in corpus.dropped if d.why == why] for why in corpus.reasons()}
    report = {
        "root": str(corpus.root),
        "licence": row.licence,
        "dropped": dropped,
        "warnings": warnings,
        "sheets": sheets,
    }
    write_json(out / "report.json", report)
    show_report(dropped, warnings, out / "report.json")
    return 0

"""The IEMOCAP release becomes manifests with the known counts, whatever else lies in its folders."""

import csv
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from iemocap_tree import PLANTED, needs_iemocap, said, wav, write_paper_csvs, write_tree

from ser.data.datasheet import data_sheet, listen, sheet_to_markdown
from ser.data.iemocap import (
    COUNTS,
    SIDES,
    count_differences,
    four_classes,
    parse_labels,
    parse_name,
    parse_transcripts,
    read_iemocap,
    read_paper_csv,
    read_paper_folds,
)
from ser.data.manifest import Utterance, read_manifest, write_manifest
from ser.data.protocols import PROTOCOLS
from ser.data.release import Corpus
from ser.errors import AudioError, ManifestError


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Path:
    """The whole release, which no test changes."""
    return write_tree(tmp_path_factory.mktemp("iemocap") / "IEMOCAP_full_release")


@pytest.fixture(scope="module")
def corpus(release) -> Corpus:
    return read_iemocap(release)


# --------------------------------------------------------------------------------------------------- counts


@needs_iemocap
def test_the_whole_release_gives_the_known_counts_to_the_last_turn(corpus):
    four = four_classes(corpus.utterances)
    assert (len(corpus.utterances), len(four)) == (10_039, 5_531)
    codes = Counter(u.extra["code"] for u in corpus.utterances)
    assert [codes[c] for c in ("neu", "hap", "exc", "ang", "sad")] == [1708, 595, 1041, 1103, 1084]
    assert Counter(u.emotion for u in four) == {"neutral": 1708, "happy": 1636, "angry": 1103, "sad": 1084}
    assert [n for _, n in sorted(Counter(u.extra["session"] for u in four).items())] == [
        1085,
        1023,
        1151,
        1031,
        1241,
    ]
    speakers = [528, 557, 481, 542, 522, 629, 528, 503, 590, 651]
    assert [n for _, n in sorted(Counter(u.speaker for u in four).items())] == speakers
    sides = [507, 578, 505, 518, 536, 615, 553, 478, 644, 597]
    assert [n for _, n in sorted(Counter(u.extra["side"] for u in four).items())] == sides
    assert len({u.extra["dialogue"] for u in four}) == 151
    assert count_differences(corpus.utterances) == []


@needs_iemocap
def test_all_that_was_dropped_is_said_with_its_reason_and_all_that_was_read_otherwise(corpus):
    assert corpus.reasons() == PLANTED
    dropped = {d.what for d in corpus.dropped}
    assert {"Ses01F_impro01_M998", "Ses01F_impro01_M999", "Ses05M_script03_2_FXX0"} <= dropped
    assert "Session3/dialog/EmoEvaluation/._Ses03F_impro01.txt" in dropped
    assert len(corpus.warnings) == 5 and all("0x92 is not UTF-8; read as cp1252" in w for w in corpus.warnings)


def test_the_known_counts_agree_with_each_other():
    for column in ("code", "emotion", "session", "speaker", "side"):
        assert sum(COUNTS[column].values()) == 5_531, column


@needs_iemocap
def test_every_difference_from_the_known_counts_is_listed_and_partial_copies_are_read_when_asked_for(tmp_path):
    root = write_tree(tmp_path / "release", audio=False)
    labels = root / "Session4/dialog/EmoEvaluation/Ses04F_impro02.txt"
    text = labels.read_text()
    turn = next(line.split("\t")[1] for line in text.splitlines() if "\tfru\t" in line)
    labels.write_text(text.replace(f"\t{turn}\tfru", f"\t{turn[:-3]}997\tfru", 1))
    with pytest.raises(
        ManifestError, match=r"differences \(1\):\n  labelled turns: found 10038, expected 10039\n"
    ):
        read_iemocap(root, check_files=False)
    turn = next(line.split("\t")[1] for line in text.splitlines() if "\tsad\t" in line and "_M0" in line)
    labels.write_text(text.replace(f"{turn}\tsad", f"{turn}\thap", 1))
    with pytest.raises(ManifestError) as caught:
        read_iemocap(root, check_files=False)
    for difference in (
        "code hap: found 596, expected 595",
        "code sad: found 1083, expected 1084",
        "emotion happy: found 1637, expected 1636",
        "emotion sad: found 1083, expected 1084",
        "differences (4)",
        "5 x label without a transcript",
    ):
        assert difference in str(caught.value)
    labels.unlink()
    with pytest.raises(ManifestError) as caught:
        read_iemocap(root, check_files=False)
    for column in ("speaker 04M", "side 04F", "session 4", "emotion sad"):
        assert f"four-class turns of {column}: found" in str(caught.value)
    partial = read_iemocap(root, partial=True, check_files=False)
    assert 9_900 < len(partial.utterances) < 10_039
    assert any("side 04F: found" in w for w in partial.warnings)


@needs_iemocap
def test_a_turn_without_its_recording_is_dropped_and_then_the_counts_differ(tmp_path):
    root = write_tree(tmp_path / "release", every=20)
    folder = root / "Session1/sentences/wav/Ses01F_impro02"
    count = len(list(folder.iterdir()))
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(ManifestError, match=f"{count} x no recording"):
        read_iemocap(root)
    partial = read_iemocap(root, partial=True)
    assert partial.reasons()["no recording"] == count
    assert "Ses01F_impro02" not in {u.extra["dialogue"] for u in partial.utterances}


def test_another_folder_is_refused_with_what_was_expected(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ManifestError, match="expected the folder IEMOCAP_full_release"):
            read_iemocap(folder, partial=True)


# ------------------------------------------------------------------------------------------------ utterances


def test_the_first_letter_is_the_side_and_the_last_one_the_speaker():
    name = parse_name("Ses03M_impro05a_F012")
    assert (name.speaker, name.side, name.session, name.kind) == ("03F", "03M", "3", "impro")
    assert name.dialogue == "Ses03M_impro05a"
    assert parse_name("Ses05M_script01_1b_M003").dialogue == "Ses05M_script01_1b"
    for wrong in (
        "Ses01F_impro01_FXX0",
        "Ses01F_impro01_MXX1",
        "Ses06F_impro01_F000",
        "._Ses01F_impro01_F000",
        "M",
    ):
        assert parse_name(wrong) is None


@needs_iemocap
def test_a_turn_becomes_an_utterance_of_its_own_file(release, corpus):
    u = next(u for u in corpus.utterances if u.id == "Ses01F_script01_1_M001")
    assert u.file == release / "Session1/sentences/wav/Ses01F_script01_1/Ses01F_script01_1_M001.wav"
    assert u.file.is_file()
    assert (u.speaker, u.start, u.end) == ("01M", None, None), "the dialogue's times are not the file's"
    assert [u.labels[name] for name in ("valence", "arousal", "dominance")] == [2.0, 3.0, 4.5]
    assert {k: u.extra[k] for k in ("dialogue", "session", "side", "kind")} == {
        "dialogue": "Ses01F_script01_1", "session": "1", "side": "01F", "kind": "script",
    }  # fmt: skip
    assert float(u.extra["time_end"]) == float(u.extra["time_start"]) + 2
    for u in corpus.utterances:
        assert u.text.replace("\u2019", "'") == said(u.id).strip()
    assert sum("\u2019" in u.text for u in corpus.utterances) == 5, "as Windows wrote it"
    assert ": line 1 of M" in next(u.text for u in corpus.utterances if u.id == "Ses01F_script01_1_M001")


@needs_iemocap
def test_every_label_has_a_name_and_only_the_four_class_protocol_merges_excited_with_happy(corpus):
    by_code = {u.extra["code"]: u.emotion for u in corpus.utterances}
    assert by_code["exc"] == "excited" and by_code["hap"] == "happy" and by_code["fru"] == "frustrated"
    assert by_code["xxx"] is None, "no majority is no emotion"
    assert {u.extra["code"]: u.emotion for u in four_classes(corpus.utterances)}["exc"] == "happy"


@needs_iemocap
def test_a_manifest_of_turns_reads_as_it_was_written(release, corpus, tmp_path):
    write_manifest(tmp_path / "all.csv", corpus.utterances[:300], root=release)
    assert read_manifest(tmp_path / "all.csv", root=release) == corpus.utterances[:300]
    with (tmp_path / "all.csv").open() as file:
        row = next(csv.DictReader(file))
    assert row["file"] == "Session1/sentences/wav/Ses01F_impro01/Ses01F_impro01_F000.wav"
    assert "start" not in row and json.loads(row["votes"]) == {"neu": 0.8333, "ang": 0.1667}


# ------------------------------------------------------------------------------------------------ text files

LABELS = """% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]

[6.2901 - 8.2357]\tSes01F_impro01_F000\tneu\t[2.5000, 3.5000, 4.0000]
C-E2:\tNeutral;\t()
C-E3:\tNeutral; Frustration;\t(a; b)
C-E4:\t;\t()
C-F1:\tSadness;\t(curious)
A-E3:\tval 3; act 9; dom  ;\t()
"""


def labels_of(text):
    problems, warnings = [], []
    return parse_labels(text, "Ses01F_impro01", problems, warnings), problems, warnings


def test_votes_are_the_external_annotators_one_each_and_blank_lines_none():
    (label,), problems, warnings = labels_of(LABELS)
    assert label.votes == {"neu": 0.75, "fru": 0.25}, "the actor's own view (C-F1) and an empty line do not count"
    assert (label.valence, label.arousal, label.dominance) == (2.5, 3.5, 4.0), "A-lines do not count"
    assert (label.start, label.end, label.code) == (6.2901, 8.2357, "neu")
    assert not problems and not warnings


def test_values_out_of_range_are_unlabelled_and_an_unknown_vote_is_left_out_both_with_a_warning():
    (label,), problems, warnings = labels_of(LABELS.replace("3.5000", "5.5000").replace("Frustration", "Bored"))
    assert (label.valence, label.arousal, label.dominance) == (2.5, None, 4.0)
    assert label.votes == {"neu": 1.0}
    assert not problems and len(warnings) == 2
    assert "line 3" in warnings[0] and "1 to 5" in warnings[0] and "'bored'" in warnings[1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[6.2 - 8.2]\tSes01F_impro01_F001\tneu", "expected [start - end] turn label [V, A, D]"),
        ("[6.2 - 8.2]\tSes01F_impro01_F001\tboo\t[2, 3, 4]", "unknown label 'boo'"),
        ("[6.2 - 8.2]\tSes01F_impro02_F001\tneu\t[2, 3, 4]", "no turn of this dialogue"),
        ("[6.2 - 8.2]\tSes01F_impro01_FXX0\tneu\t[2, 3, 4]", "no turn of this dialogue"),
        ("[6.2 - 8..2]\tSes01F_impro01_F001\tneu\t[2, 3, 4]", "two times and three values"),
        ("[6.2 - 8.2]\tSes01F_impro01_F001\tneu\t[2, 3]", "two times and three values"),
    ],
)
def test_a_label_line_that_cannot_be_read_is_a_problem_and_its_votes_go_to_nobody(line, message):
    (label,), problems, _ = labels_of(f"{LABELS}{line}\nC-E2:\tAnger;\t()\n")
    assert label.votes == {"neu": 0.75, "fru": 0.25}
    assert len(problems) == 1 and message in problems[0] and "line 9" in problems[0]


@needs_iemocap
def test_problems_of_lines_refuse_the_release_together_with_the_counts(tmp_path):
    root = write_tree(tmp_path / "release", audio=False)
    file = root / "Session2/dialog/EmoEvaluation/Ses02F_impro01.txt"
    text = file.read_text()
    start = text.index("[0.0000")
    file.write_text(text + text[start : text.index("C-E1", start)] + "[1 - 2]\tbroken\n")
    with pytest.raises(ManifestError) as caught:
        read_iemocap(root, check_files=False)
    assert "is labelled twice" in str(caught.value) and "broken" in str(caught.value)
    assert "differences (2)" in str(caught.value)
    assert len(read_iemocap(root, check_files=False, partial=True).utterances) == 10_039


def test_transcripts_keep_colons_and_tags_and_lines_without_a_turn_are_dropped():
    dropped, warnings = [], []
    transcripts = parse_transcripts(
        "Ses01F_impro01_F000 [006.2901-008.2357]: He said: [LAUGHTER] no [1-2]: never.\n\nM: sorry\n"
        "Ses01F_impro01_FXX0 [006.2901-008.2357]: Hm.\nSes01F_impro01_M000 [7-10]:\n"
        "Ses01F_impro02_M000 [7-10]: of another dialogue\nSes01F_impro01_F000 [006.2901-008.2357]: Again.\n",
        "Ses01F_impro01",
        dropped,
        warnings,
    )
    assert transcripts == {
        "Ses01F_impro01_F000": "He said: [LAUGHTER] no [1-2]: never.",
        "Ses01F_impro01_M000": "",
    }
    assert [d.what.split()[-1] for d in dropped] == ["sorry", "Ses01F_impro01_FXX0", "Ses01F_impro02_M000"]
    assert len(warnings) == 1 and "another text" in warnings[0]


# ------------------------------------------------------------------------------------------- the paper's CSVs


@pytest.fixture(scope="module")
def paper(tmp_path_factory) -> Path:
    return write_paper_csvs(tmp_path_factory.mktemp("paper"))


@needs_iemocap
def test_the_paper_s_files_read_with_another_root_and_give_the_ten_folds(paper, release):
    corpus = read_paper_folds(paper, root=release)
    assert len(corpus.utterances) == 5_531
    u = next(u for u in corpus.utterances if u.id == "Ses02F_impro03_M010")
    assert (u.speaker, u.extra["side"], u.extra["session"]) == ("02M", "02F", "2")
    assert u.file == release / "Session2/sentences/wav/Ses02F_impro03/Ses02F_impro03_M010.wav"
    ours = {u.id: u.emotion for u in four_classes(read_iemocap(release).utterances)}
    assert {u.id: u.emotion for u in corpus.utterances} == ours
    for fold in PROTOCOLS["paper10"].folds(corpus.utterances)[::9]:  # the first and the last
        for part in ("train", "test"):
            rows = read_paper_csv(paper / f"iemocap_{fold.name}.{part}.csv", root=release)
            assert sorted(u.id for u in rows) == fold.parts[part]


@needs_iemocap
def test_without_a_root_the_paths_are_the_csv_s_and_missing_recordings_are_listed(paper, release):
    path = paper / "iemocap_01F.test.csv"
    with pytest.raises(ManifestError, match=r"\(507\)") as caught:
        read_paper_csv(path)
    assert "/somebody/else" in str(caught.value) and "and 457 more" in str(caught.value)
    assert read_paper_csv(path, check_files=False)[0].file.is_relative_to("/somebody/else")


@needs_iemocap
@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("_F001.wav", "_FXX1.wav", "no turn of IEMOCAP"),
        (".wav,e0", ".wav,e4", "found the label 'e4', expected e0, e1, e2, e3"),
        ("_F001.wav", "_F901.wav", "no recording"),
    ],
)
def test_rows_of_the_paper_s_files_that_are_no_turns_are_refused(paper, release, tmp_path, before, after, message):
    text = (paper / "iemocap_01F.test.csv").read_text()
    path = tmp_path / "iemocap_01F.test.csv"
    path.write_text(text.replace(before, after, 1))
    with pytest.raises(ManifestError, match=r"\(1\)") as caught:
        read_paper_csv(path, root=release)
    assert message in str(caught.value)


@needs_iemocap
def test_files_that_are_not_the_paper_s_folds_are_refused(tmp_path):
    folder = write_paper_csvs(tmp_path / "paper")
    rows = (folder / "iemocap_02M.train.csv").read_text().splitlines()
    (folder / "iemocap_02M.train.csv").write_text("\n".join([*rows[:2], *rows[3:]]) + "\n")
    test = folder / "iemocap_01F.test.csv"
    test.write_text(
        test.read_text().replace("Ses01F", "Ses01M", 1).replace("Ses01F_impro01_F000", "Ses01M_impro01_F800")
    )
    with pytest.raises(ManifestError) as caught:
        read_paper_folds(folder, check_files=False)
    assert "iemocap_02M.train.csv has no Ses01F_impro01_F001 (neutral)" in str(caught.value)
    assert "iemocap_01F.test.csv holds turns of 01M" in str(caught.value)


# ------------------------------------------------------------------------------------------------ data sheet


@pytest.fixture
def odd(tmp_path) -> Corpus:
    """Four recordings: silent, clipped, and one twice with another header."""
    random = np.random.default_rng(0)
    noise = 0.1 * random.standard_normal(1600)
    loud = noise.copy()
    loud[100:104] = 1.0
    peaks = noise.copy()
    peaks[100:103] = peaks[200:203] = -1.0  # three and three are not four in a row
    sounds = {"silent": np.full(1600, 1e-4), "clipped": loud, "peaks": peaks, "one": noise, "two": noise}
    for name, samples in sounds.items():
        soundfile.write(tmp_path / f"{name}.wav", samples, 16_000)
    soundfile.write(tmp_path / "two.flac", soundfile.read(tmp_path / "two.wav", dtype="int16")[0], 16_000)
    files = {name: tmp_path / (f"{name}.flac" if name == "two" else f"{name}.wav") for name in sounds}
    rows = [
        Utterance(n, file, text=text, speaker=speaker, emotion="sad")
        for (n, file), text, speaker in zip(
            files.items(), ["Yes.", "yes. [LAUGHTER]", "No.", "No.", None], "abccc", strict=True
        )
    ]
    return Corpus(tmp_path, rows)


def test_the_data_sheet_names_what_is_odd(odd):
    heard, sounds = listen(odd, progress=False)
    sheet = data_sheet(heard.utterances, sounds)
    assert sheet["silent"] == ["silent"] and sheet["clipped"] == ["clipped"]
    assert sheet["same_audio"] == [["one", "two"]], "in another container too"
    assert sheet["seconds"] == {"shortest": 0.1, "median": 0.1, "mean": 0.1, "longest": 0.1}
    text = sheet["transcripts"]
    assert text["most_shared"] == {"YES.": 2}, "said by a and b; No. is said by one speaker"
    assert (text["with_text"], text["different"], text["utterances_with_shared"]) == (4, 2, 2)
    assert sheet["labels_per_speaker"] == {"a": {"sad": 1}, "b": {"sad": 1}, "c": {"sad": 3}}
    shown = sheet_to_markdown(sheet, "odd")
    assert "1 silent (peak below 0.001): silent" in shown and "one = two" in shown and "| c | 3 | 3 |" in shown
    assert {u.extra["sha256"] for u in heard.utterances} == {s.sha256 for s in sounds.values()}


def test_all_unusable_recordings_are_in_one_message_and_partial_leaves_them_out(odd, tmp_path):
    (tmp_path / "one.wav").write_bytes(wav(0)[:-10])
    (tmp_path / "peaks.wav").write_bytes(b"")
    with pytest.raises(AudioError, match="2 of 5") as caught:
        listen(odd, progress=False)
    assert "one.wav" in str(caught.value) and "peaks.wav" in str(caught.value)
    rest, sounds = listen(odd, partial=True, progress=False)
    assert [u.id for u in rest.utterances] == ["silent", "clipped", "two"] and len(sounds) == 3
    assert rest.reasons() == {"unusable recording": 2} and len(rest.warnings) == 2
    with pytest.raises(AudioError):
        listen(replace(odd, utterances=odd.utterances[2:4]), partial=True, progress=False)


def test_the_columns_of_the_paper_s_files_are_told_once_where_all_have_the_same(tmp_path):
    for side in SIDES:
        rows = {"test": [side], "train": [other for other in SIDES if other != side]}
        for part, turns in rows.items():
            header = "file,emotion,Text" if (side, part) == ("01F", "test") else "file,emotion,text"
            lines = [header, *(f"Ses{turn}_impro01_F000.wav,e0,nan" for turn in turns), ""]
            (tmp_path / f"iemocap_{side}.{part}.csv").write_text("\n".join(lines))
    told: list[str] = []
    corpus = read_paper_folds(tmp_path, check_files=False, tell=told.append)
    assert len(corpus.utterances) == len(SIDES)
    assert f"{tmp_path}: columns read: file, emotion, text; not read: none" in told
    assert f"{tmp_path}: columns read: file, emotion; not read: 'Text'" in told
    assert "  'Text' is not read; did you mean --columns text=Text?" in told and len(told) == 5


# ----------------------------------------------------------------------------------------------- the script


def prepare(*arguments, cwd):
    command = [sys.executable, "-m", "ser", "prepare", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)


@needs_iemocap
def test_the_script_makes_manifests_folds_and_a_report_of_the_whole_release(release, corpus, tmp_path):
    done = prepare(release, "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    four = read_manifest(out / "iemocap4.csv", root=release)
    assert len(four) == 5_531 and len(read_manifest(out / "iemocap_all.csv", root=release)) == 10_039
    without_sound = [replace(u, extra={k: v for k, v in u.extra.items() if k != "sha256"}) for u in four]
    assert without_sound == four_classes(corpus.utterances)
    assert sorted(p.stem for p in (out / "folds").iterdir()) == sorted(PROTOCOLS)
    for name, protocol in PROTOCOLS.items():
        written = json.loads((out / "folds" / f"{name}.json").read_text())["folds"]
        assert [(fold["name"], fold["parts"]) for fold in written] == [
            (fold.name, fold.parts) for fold in protocol.folds(four)
        ]
    report = json.loads((out / "report.json").read_text())
    assert {why: len(what) for why, what in report["dropped"].items()} == PLANTED
    assert report["sheets"]["iemocap4"]["emotions"] == {"angry": 1103, "happy": 1636, "neutral": 1708, "sad": 1084}
    assert report["sheets"]["iemocap_all"]["same_audio"] == []
    assert "# iemocap4" in (out / "data_sheet.md").read_text()
    assert "5 x label without a transcript" in done.stdout and "01F   5024   507    507   100.0 %" in done.stdout
    assert not list(out.rglob("*.tmp"))


@needs_iemocap
def test_the_script_refuses_a_part_of_the_release_in_one_message_unless_told_otherwise(tmp_path):
    root = write_tree(tmp_path / "release", every=20)
    done = prepare(root, "--out", "out", cwd=tmp_path)
    assert done.returncode == 1 and not (tmp_path / "out").exists()
    assert (
        "four-class turns: found" in done.stderr and "--partial" in done.stderr and "Traceback" not in done.stderr
    )
    (root / "Session1/sentences/wav/Ses01F_impro01/Ses01F_impro01_F000.wav").write_bytes(b"RIFF")
    done = prepare(root, "--out", "out", "--partial", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["dropped"]["unusable recording"] == ["Ses01F_impro01_F000"]
    warnings = "\n".join(report["warnings"])
    assert "labelled turns: found" in warnings and "no folds speaker-known:" in warnings
    assert sorted(p.stem for p in (tmp_path / "out/folds").iterdir()) == ["paper10", "session5", "speaker10"]


@needs_iemocap
def test_the_script_reads_the_paper_s_files(paper, release, tmp_path):
    done = prepare(paper, "--corpus", "iemocap-csv", "--root", release, "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = read_manifest(tmp_path / "out/iemocap-csv.csv", root=release)
    assert len(rows) == 5_531 and rows[0].emotion == "neutral" and rows[0].speaker == "01F"
    assert len(json.loads((tmp_path / "out/folds/paper10.json").read_text())["folds"]) == 10

"""Manifests: what is read, what is refused (all bad rows at once), what is written, what sets share."""

import csv
import io
import json
import math
import os
import pickle
import stat
import tracemalloc
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ser.data.cells import MAX_LINE_BYTES, MISSING_LABELS, MISSING_TEXTS, find_quoting, whole
from ser.data.labels import label_columns
from ser.data.manifest import (
    COLUMNS,
    PAPER_EMOTIONS,
    Overlap,
    Utterance,
    check_labels,
    check_overlap,
    find_overlap,
    parse_columns,
    read_manifest,
    write_manifest,
)
from ser.errors import ConfigError, ManifestError

SHARED = Path(__file__).resolve().parents[1].parent / "shared"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "wav").mkdir()
    for name in "abcd":
        (tmp_path / "wav" / f"{name}.wav").touch()
    return tmp_path


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refusal(path: Path, **options) -> str:
    """The message with which `path` is refused."""
    with pytest.raises(ManifestError) as caught:
        read_manifest(path, **options)
    message = str(caught.value)
    assert str(path) in message
    assert len(message) < 20_000
    assert str(pickle.loads(pickle.dumps(caught.value))) == message
    return message


# ---------------------------------------------------------------------------------------- reading


def test_a_row_becomes_an_utterance(folder):
    path = write(
        folder / "m.csv",
        "speaker,file,emotion,age,text,start,end,id\n"
        'S1,wav/a.wav, happy ,31,"Yes, ""you""",0.5,2,u1\n'
        f",{folder}/wav/b.wav,,,,,,\n",
    )
    first, second = read_manifest(path)
    assert first == Utterance(
        "u1",
        folder / "wav/a.wav",
        emotion="happy",
        text='Yes, "you"',
        speaker="S1",
        start=0.5,
        end=2.0,
        extra={"age": "31"},
    )
    assert second == Utterance(f"{folder}/wav/b.wav", folder / "wav/b.wav")


@pytest.mark.parametrize("cell", ["", " ", "\t "])
def test_an_empty_cell_is_none(folder, cell):
    names = [name for name in COLUMNS if name != "file"]
    cells = dict.fromkeys([*names, "age"], cell)
    write(folder / "m.csv", f"file,{','.join(cells)}\nwav/a.wav,{','.join(cells.values())}\n")
    write(folder / "m.jsonl", json.dumps({"file": "wav/a.wav", **cells}))
    for name in ("m.csv", "m.jsonl"):
        assert read_manifest(folder / name) == [Utterance("wav/a.wav", folder / "wav/a.wav")]


def test_only_the_file_is_required_and_the_default_id_is_the_file_as_written(folder):
    path = write(
        folder / "m.csv", "file,start,end\nwav/a.wav,,\nwav/a.wav,1,2.5\n./wav/a.wav,3,\nwav/a.wav,,0.5\n"
    )
    ids = ["wav/a.wav", "wav/a.wav#1.0-2.5", "./wav/a.wav#3.0-", "wav/a.wav#-0.5"]
    assert [u.id for u in read_manifest(path)] == ids


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_byte_order_mark_line_ends_and_blank_lines_do_not_matter(folder, ends, mark):
    lines = ["", "file,text", "", "wav/a.wav,Ä", "", "wav/b.wav,b", "", ""]
    path = write(folder / "m.csv", mark + ends.join(lines[1:] if mark else lines))
    assert [(u.id, u.text) for u in read_manifest(path)] == [("wav/a.wav", "Ä"), ("wav/b.wav", "b")]


def test_quoted_fields_keep_their_line_ends(folder):
    path = write(folder / "m.csv", b'file,text\r\nwav/a.wav,"one\r\ntwo\n\nthree"\r\nwav/b.wav,x\r\n')
    assert [u.text for u in read_manifest(path)] == ["one\r\ntwo\n\nthree", "x"]


def test_tsv_and_json_lines_give_the_same_as_csv(folder):
    table = [["file", "text", "speaker", "start"], ["wav/a.wav", "a, b", "3", "1.5"], ["wav/b.wav", "", "", ""]]
    for suffix, delimiter in ((".csv", ","), (".tsv", "\t"), (".txt", ",")):
        with (folder / f"m{suffix}").open("w", newline="") as file:
            csv.writer(file, delimiter=delimiter).writerows(table)
    rows = [{"file": "wav/a.wav", "text": "a, b", "speaker": 3, "start": 1.5}, {"file": "wav/b.wav", "text": None}]
    write(folder / "m.jsonl", "\n\n".join(map(json.dumps, rows)))
    write(folder / "m.json", "\r\n".join(map(json.dumps, rows)) + "\r\n")
    read = [read_manifest(folder / f"m{s}") for s in (".csv", ".tsv", ".txt", ".jsonl", ".json")]
    assert all(r == read[0] for r in read)
    assert read[0][0] == Utterance("wav/a.wav#1.5-", folder / "wav/a.wav", text="a, b", speaker="3", start=1.5)


def test_json_values_of_other_columns_are_kept_as_strings(folder):
    path = write(folder / "m.jsonl", '{"file": "wav/a.wav", "n": 1, "ok": true, "list": [1, "ä"], "none": null}')
    assert read_manifest(path)[0].extra == {"n": "1", "ok": "true", "list": '[1, "ä"]'}


def test_relative_files_start_from_root_and_paths_do_not_depend_on_the_working_folder(folder, monkeypatch):
    (folder / "lists").mkdir()
    write(folder / "lists/m.csv", "file\nwav/a.wav\n")
    assert "does not exist" in refusal(folder / "lists/m.csv")
    monkeypatch.chdir(folder)
    (utterance,) = read_manifest("lists/m.csv", root=".")
    assert utterance.file == folder / "wav/a.wav"
    assert "not a folder" in refusal(Path("lists/m.csv"), root="elsewhere")


def test_labels_are_nfc_and_text_is_kept_as_it_is(folder):
    path = write(folder / "m.csv", "file,emotion,speaker,text\nwav/a.wav,A\u0308rger , Zo\u0308 , u\u0308 \n")
    (utterance,) = read_manifest(path)
    assert (utterance.emotion, utterance.speaker, utterance.text) == ("Ärger", "Zö", " u\u0308 ")


def test_the_papers_labels_become_names(folder):
    path = write(
        folder / "m.csv", "file,emotion,text\nwav/a.wav,e0,A\nwav/b.wav,e1,\nwav/c.wav,e2,C\nwav/d.wav,e3,D\n"
    )
    utterances = read_manifest(path)
    assert [u.emotion for u in utterances] == ["neutral", "happy", "angry", "sad"]
    assert [u.text for u in utterances] == ["A", None, "C", "D"]
    write(path, "file,emotion\nwav/a.wav,e2\nwav/b.wav,\n")
    assert [u.emotion for u in read_manifest(path)] == ["angry", None]


def test_the_papers_labels_beside_others_are_names_already(folder):
    path = write(folder / "m.csv", "file,emotion\nwav/a.wav,e0\nwav/b.wav,e4\n")
    assert [u.emotion for u in read_manifest(path)] == ["e0", "e4"]


def test_an_utterance_can_be_pickled_and_hashed(folder):
    utterance = Utterance("u", folder / "wav/a.wav", extra={"age": "31"})
    assert pickle.loads(pickle.dumps(utterance)) == utterance
    assert len({utterance, pickle.loads(pickle.dumps(utterance))}) == 1


# ---------------------------------------------------------------------------------------- columns


def test_columns_map_our_names_to_the_manifests(folder):
    path = write(folder / "m.csv", "path,text,transcript\nwav/a.wav,a01,Hello\n")
    (utterance,) = read_manifest(path, columns={"file": "path", "text": "transcript"})
    assert (utterance.id, utterance.text, utterance.extra) == ("wav/a.wav", "Hello", {"text_original": "a01"})
    write(folder / "m.jsonl", '{"path": "wav/a.wav", "text": "a01", "transcript": "Hello"}')
    assert read_manifest(folder / "m.jsonl", columns={"file": "path", "text": "transcript"}) == [utterance]


@pytest.mark.parametrize("name", ["m.csv", "m.jsonl"])
def test_an_unknown_or_missing_column_fails_with_the_nearest_name(folder, name):
    path = write(folder / name, "File,transcript\nwav/a.wav,x\n" if name == "m.csv" else '{"File": "wav/a.wav"}')
    message = refusal(path, check_files=False)
    assert "no column 'file' (did you mean 'File'?)" in message
    assert "no column of ours is called 'txt' (did you mean 'text'?)" in refusal(path, columns={"txt": "x"})
    message = refusal(path, columns={"file": "Fil", "text": "transcripts"})
    assert "no column 'Fil' (to be our 'file') (did you mean 'File'?)" in message
    assert "no column 'transcripts' (to be our 'text')" in message
    assert "cannot be two of ours" in refusal(path, columns={"text": "File", "file": "File"})


def test_a_manifest_with_another_delimiter_is_recognised(folder):
    message = refusal(write(folder / "m.csv", "file;text\nwav/a.wav;x\n"))
    assert "no column 'file'" in message
    assert "separated by commas, in a .tsv file by tabs" in message


def test_a_column_that_stands_twice_is_refused(folder):
    assert "'text' stands twice" in refusal(write(folder / "m.csv", "file,text, text\nwav/a.wav,x,y\n"))
    path = write(folder / "m.csv", "file,text,transcript,text_original\nwav/a.wav,x,y,z\n")
    assert "'text_original' stands twice" in refusal(path, columns={"text": "transcript"})


def test_columns_without_a_name_are_ignored(folder):
    path = write(folder / "m.csv", ",file,,\n0,wav/a.wav,,\n1,wav/b.wav,,x\n")
    assert [u.extra for u in read_manifest(path)] == [{}, {}]


def test_columns_are_parsed_from_a_command_line():
    assert parse_columns(["text=transcript", "file = a=b"]) == {"text": "transcript", "file": "a=b"}
    assert parse_columns([]) == {}


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (["text"], "expected OURS=THEIRS, such as text=transcript, found 'text'"),
        (["=x"], "expected OURS"),
        (["text="], "expected OURS"),
        (["emotoin=label"], "'emotoin' (did you mean 'emotion'?)"),
        (["text=a", "text=b"], "'text' is given twice: 'a' and 'b'"),
    ],
)
def test_columns_that_cannot_be_parsed_are_refused(pairs, message):
    with pytest.raises(ConfigError) as caught:
        parse_columns(pairs)
    assert message in str(caught.value)


# ---------------------------------------------------------------------------------------- refusing


def test_all_bad_rows_are_listed_in_one_message_with_their_lines(folder):
    (folder / "wav" / "folder.wav").mkdir()
    rows = [
        "file,start,end,id",
        "wav/a.wav,,,a",
        "wav/x.wav,,,x",  # 3
        "",
        "wav/b.wav,one,,b",  # 5
        "wav/b.wav,-1,,b1",
        "wav/b.wav,nan,inf,b2",
        "wav/b.wav,2,2,b3",
        "wav/b.wav,2,1,b4",
        "wav/b.wav,,0,b5",  # 10
        "wav/b.wav,1,2",
        "wav/b.wav,1,2,b6,x",
        "wav/c.wav,,,a",
        "wav/../wav/a.wav,0,,a2",
        ",,,e",  # 15
        "wav/d\xff.wav,,,d",
        "wav/d\0.wav,,,d",
        "wav/folder.wav,,,f",
        'wav/c.wav,,,"a"b',
        "wav/d.wav,1_0,,d",  # 20
    ]
    path = write(folder / "m.csv", "\n".join(rows).encode("latin-1"))
    listed = refusal(path).splitlines()[1:]
    expected = [
        f"line 3: the file '{folder}/wav/x.wav' does not exist",
        "line 5: start is 'one', expected seconds, 0 or more",
        "line 6: start is '-1', expected seconds, 0 or more",
        "line 7: start is 'nan', expected seconds, 0 or more",
        "line 7: end is 'inf', expected seconds, 0 or more",
        "line 8: end 2.0 is not after start 2.0",
        "line 9: end 1.0 is not after start 2.0",
        "line 10: end 0.0 is not after start 0.0",
        "line 11: 3 fields, but the header has 4",
        "line 12: 5 fields, but the header has 4",
        "line 13: the id 'a' is that of line 2 already",
        "line 14: the same recording (file, start, end) is line 2 already",
        "line 15: has no file",
        "line 16: not UTF-8: byte 0xff at position 5; save the manifest as UTF-8",
        "line 17: holds a NUL character; save the manifest as UTF-8",
        f"line 18: the file '{folder}/wav/folder.wav' is not a regular file",
        "line 19: ',' expected after '\"'; is a quote left open, or one inside a field not doubled?",
        "line 20: start is '1_0', expected seconds, 0 or more",
    ]
    assert [line.strip() for line in listed] == expected
    assert f"({len(expected)}):" in refusal(path).splitlines()[0]


def test_bad_rows_of_json_lines_are_listed_too(folder):
    rows = [
        '{"file": "wav/a.wav"}',
        '{"file": "wav/b.wav"',  # 2
        '["wav/b.wav"]',
        '{"text": "x"}',
        '{"file": ["wav/b.wav"]}',  # 5
        '{"file": "wav/b.wav", "text": "x", "text": "y"}',
        '{"file": "wav/b.wav", "text": "\\ud800"}',
        '{"file": "wav/b.wav", "text": "\\u0000"}',
        "[" * 100_000,
        '{"file": "wav/b.wav", "start": ' + "9" * 5000 + "}",  # 10
        '{"file": "wav/b.wav", "start": 1e999}',
        '{"file": "wav/b.wav", "start": "x"}',
        '{"file": "wav/b.wav", "text": "x", " text": "y"}',
        '{"file": "wav/y.wav"}',
    ]
    listed = [line.strip() for line in refusal(write(folder / "m.jsonl", "\n".join(rows))).splitlines()[1:]]
    assert [int(line.split()[1].rstrip(":")) for line in listed] == list(range(2, 15))
    for line, part in zip(
        listed,
        [
            "Expecting",
            "expected one object per line",
            "has no file",
            "'file' is ['wav/b.wav'], expected a string or number",
            "'text' stands twice",
            "half a surrogate pair",
            "NUL",
            "recursion",
            "not a JSON row",
            "start is 'Infinity'",
            "start is 'x'",
            "become one column",
            "does not exist",
        ],
        strict=True,
    ):
        assert part in line


def test_at_most_fifty_bad_rows_are_printed_and_all_are_counted(folder):
    path = write(folder / "m.csv", "file\n" + "".join(f"wav/{i}.wav\n" for i in range(1000)))
    lines = refusal(path).splitlines()
    assert "(1000):" in lines[0]
    assert len(lines) == 1 + 50 + 1
    assert lines[-1].strip() == "and 950 more"


def test_files_are_not_looked_for_when_not_asked(folder):
    path = write(folder / "m.csv", "file\nwav/missing.wav\n")
    assert read_manifest(path, check_files=False)[0].file == folder / "wav/missing.wav"
    assert "does not exist" in refusal(path)


@pytest.mark.parametrize("content", ["", "\n\n", "\ufeff", "file,text\n", "file,text\r\n\r\n"])
@pytest.mark.parametrize("name", ["m.csv", "m.tsv", "m.jsonl"])
def test_a_manifest_without_rows_is_refused(folder, name, content):
    path = write(folder / name, content.replace(",", "\t") if name == "m.tsv" else content)
    if name == "m.jsonl" and "file" in content:
        assert "line 1: not a JSON row" in refusal(path)
    else:
        assert "the manifest has no rows" in refusal(path)


@pytest.mark.usefixtures("time_limit")
def test_what_is_no_regular_file_is_refused_without_waiting(folder):
    os.mkfifo(folder / "fifo.csv")
    message = refusal(folder / "fifo.csv")
    assert "not a regular file but a pipe" in message and "save its content to a file" in message
    assert "not a regular file but a folder" in refusal(folder / "wav")
    assert "not a regular file but a device" in refusal(Path("/dev/zero"))
    (folder / "link.csv").symlink_to(folder / "fifo.csv")
    assert "not a regular file but a pipe" in refusal(folder / "link.csv")
    assert "No such file" in refusal(folder / "missing.csv")
    assert "null" in refusal(folder / "a\0b.csv")
    assert "No such file" in refusal(folder / "missing" / "m.csv")


@pytest.mark.parametrize("name", ["m.csv", "m.jsonl"])
def test_a_line_without_end_is_refused_with_what_was_found_before(folder, name):
    rows = "file,text\nwav/x.wav,a\n" if name == "m.csv" else '{"file": "wav/x.wav"}\n\n'
    path = write(folder / name, rows)
    os.truncate(path, 1 << 30)
    tracemalloc.start()
    message = refusal(path)
    assert tracemalloc.get_traced_memory()[1] < 20 * MAX_LINE_BYTES
    tracemalloc.stop()
    assert "wav/x.wav' does not exist" in message
    assert f"line 3: longer than {MAX_LINE_BYTES} bytes; the rest of the manifest was not read" in message


def test_an_open_quote_is_found_where_it_opens(folder):
    path = write(folder / "m.csv", 'file,text\nwav/a.wav,a\nwav/b.wav,"b\nwav/c.wav,c\n')
    assert "line 3: unexpected end of data; is a quote left open" in refusal(path)
    write(path, 'file,text\nwav/a.wav,a\nwav/b.wav,"b\n' + "wav/c.wav,c\n" * 20_000)
    message = refusal(path)
    assert "line 3: field larger than field limit (131072); is a quote left open" in message
    assert "the rest of the manifest was not read" in message
    assert len(message.splitlines()) == 3


def test_an_old_mac_line_end_is_an_error_and_not_one_long_row(folder):
    assert "line 1: a carriage return outside quotes ends no line" in refusal(
        write(folder / "m.csv", "file\rwav/a.wav\r")
    )


def test_utf_16_is_refused(folder):
    assert "line 1: not UTF-8: byte 0xff" in refusal(write(folder / "m.csv", "file\nwav/a.wav\n".encode("utf-16")))


def test_a_damaged_line_inside_a_quoted_field_spoils_its_row_only(folder):
    path = write(folder / "m.csv", b'file,text\nwav/a.wav,"one\n\xff\nthree"\nwav/b.wav,x\nwav/y.wav,y\n')
    lines = refusal(path).splitlines()
    assert len(lines) == 3
    assert "line 3: not UTF-8" in lines[1]
    assert "line 6: the file" in lines[2]


def test_too_many_columns_are_refused_at_once(folder):
    header = ",".join(f"c{i}" for i in range(100_000))
    assert "100001 columns, at most 1000" in refusal(write(folder / "m.csv", f"file,{header}\n"))


# ---------------------------------------------------------------------------------------- what stands for nothing


def read_with_notes(path: Path, **options) -> tuple[list[Utterance], str]:
    """The utterances, and what the user is told."""
    notes: list[str] = []
    return read_manifest(path, tell=notes.append, check_files=False, **options), "\n".join(notes)


def column(path: Path, name: str, cells: list[str]) -> Path:
    """A CSV with these cells in one column."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["file", name], *([f"{i}.wav", cell] for i, cell in enumerate(cells))])
    return path


NOTHING = ["nan", "NaN", "NA", "N/A", "null", "NULL", "None", "-", " nan ", "-\u00a0", ""]
SOMETHING = ["NAN", "Na", "n/a", "#N/A", "none", "Null", "--", "na", "nil"]


@pytest.mark.parametrize("name", ["emotion", "speaker"])
def test_cells_that_stand_for_nothing_are_no_label_and_are_counted(folder, name):
    path = column(folder / "m.csv", name, [*NOTHING, *SOMETHING, "nan"])
    utterances, told = read_with_notes(path)
    assert [getattr(u, name) for u in utterances] == [None] * len(NOTHING) + SOMETHING + [None]
    assert f"{name} '-' (2), 'N/A' (1), 'NA' (1), 'NULL' (1), 'NaN' (1), 'None' (1), 'nan' (3), 'null' (1)" in told
    assert "--literal-labels" in told
    utterances, told = read_with_notes(path, literal_labels=True)
    assert [getattr(u, name) for u in utterances] == [c.strip() or None for c in [*NOTHING, *SOMETHING, "nan"]]
    assert "--literal-labels" not in told


def test_in_numbers_too_but_what_is_no_number_stays_an_error(folder):
    for cell in NOTHING:
        utterances, told = read_with_notes(column(folder / "m.csv", "arousal", [cell, "2.5"]))
        assert [u.labels.get("arousal") for u in utterances] == [None, 2.5]
        assert ("taken as empty" in told) == bool(cell)
    for cell in [*SOMETHING, "inf"]:
        assert "expected a number" in refusal(column(folder / "m.csv", "valence", [cell]), check_files=False)
    assert "expected a number" in refusal(
        column(folder / "m.csv", "valence", ["NA"]), check_files=False, literal_labels=True
    )


def test_in_texts_only_nan_stands_for_nothing(folder):
    words = ["None", "NA", "N/A", "null", "NULL", "-", "NAN", "Nan", "nan nan"]
    path = column(folder / "m.csv", "text", ["nan", "NaN", " nan ", *words])
    utterances, told = read_with_notes(path)
    assert [u.text for u in utterances] == [None, None, None, *words]
    assert "text 'NaN' (1), 'nan' (2)" in told
    assert [u.text for u in read_with_notes(path, literal_labels=True)[0]] == ["nan", "NaN", " nan ", *words]


def test_other_columns_ids_and_files_are_never_taken_for_nothing(folder):
    write(folder / "m.csv", "file,id,age\nNone,NA,nan\n")
    assert read_with_notes(folder / "m.csv")[0] == [Utterance("NA", folder / "None", extra={"age": "nan"})]


def test_nan_in_json_is_null_wherever_it_stands_and_infinity_is_no_label(folder):
    names = [name for name in COLUMNS if name != "file"]
    cells = ", ".join(f'"{name}": NaN' for name in [*names, "age"])
    write(folder / "m.jsonl", f'{{"file": "a.wav", {cells}}}')
    assert read_with_notes(folder / "m.jsonl")[0] == [Utterance("a.wav", folder / "a.wav")]
    assert read_with_notes(folder / "m.jsonl", literal_labels=True)[0] == [Utterance("a.wav", folder / "a.wav")]
    write(folder / "m.jsonl", '{"file": NaN}')
    assert "has no file" in refusal(folder / "m.jsonl")
    for name in ("emotion", "speaker", "text", "id"):
        for value in ("Infinity", "-Infinity", "1e999"):
            write(folder / "m.jsonl", f'{{"file": "a.wav", "{name}": {value}}}')
            assert f"'{name}' is {'-' * (value[0] == '-')}inf" in refusal(folder / "m.jsonl", check_files=False)


def test_json_numbers_and_booleans_are_labels_as_json_writes_them(folder):
    values = [1, 1.5, True, "1", "null", 10**20]
    write(folder / "m.jsonl", "\n".join(json.dumps({"file": f"{i}", "emotion": v}) for i, v in enumerate(values)))
    labels = [u.emotion for u in read_with_notes(folder / "m.jsonl")[0]]
    assert labels == ["1", "1.5", "true", "1", None, "100000000000000000000"]


# ---------------------------------------------------------------------------------------- who speaks


def test_speakers_that_are_whole_floats_are_the_whole_numbers_and_it_is_said(folder):
    names = ["1.0", "2", "3.00", "-4.0", "0.0", "-0.0", "1e+16", "1.2e+3"]
    others = ["1.5", "01.0", "1.", "1e5", "12e4", ".0", "1.0a", "1e+999", "v1.0", "1_0.0", "1.05"]
    utterances, told = read_with_notes(column(folder / "m.csv", "speaker", [*names, *others]))
    whole = ["1", "2", "3", "-4", "0", "0", "10000000000000000", "1200"]
    assert [u.speaker for u in utterances] == [*whole, *others]
    assert "speakers that are whole numbers written as floats are those: '1.0' is '1', '3.00' is '3'" in told
    rows = [{"file": f"{i}", "speaker": s} for i, s in enumerate([1, 1.0, 2.5, "1.0", 1e16, 1e22])]
    write(folder / "m.jsonl", "\n".join(map(json.dumps, rows)))
    speakers = [u.speaker for u in read_with_notes(folder / "m.jsonl")[0]]
    assert speakers == ["1", "1", "2.5", "1", "10000000000000000", "10000000000000000000000"]


def test_whole_floats_stay_where_labels_are_literal_and_in_other_columns(folder):
    path = column(folder / "m.csv", "speaker", ["1.0"])
    utterances, told = read_with_notes(path, literal_labels=True)
    assert utterances[0].speaker == "1.0" and "whole numbers" not in told
    utterances, told = read_with_notes(column(folder / "m.csv", "emotion", ["1.0"]))
    assert utterances[0].emotion == "1.0" and "whole numbers" not in told


def test_the_same_speaker_as_float_and_whole_number_is_shared(folder):
    train = read_with_notes(column(folder / "t.csv", "speaker", ["1", "2"]))[0]
    valid = read_with_notes(column(folder / "v.csv", "speaker", ["1.0", "3.0"]))[0]
    assert find_overlap(train, valid).speakers == ["1"]


# ---------------------------------------------------------------------------------------- what a user is told


def test_the_columns_that_are_read_and_those_that_are_not_are_named(folder):
    path = write(folder / "m.csv", "path,Emotion,transcript,speaker,,age\na.wav,happy,hello,s,,3\n")
    _, told = read_with_notes(path, columns={"file": "path", "text": "transcript"})
    assert told.splitlines() == [
        f"{path}: columns read: file (from 'path'), text (from 'transcript'), speaker; not read: 'Emotion', "
        "'age', 1 without a name",
        "  'Emotion' is not read; did you mean --columns emotion=Emotion?",
    ]


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("Emotion", "emotion"),
        ("EMOTION", "emotion"),
        ("emotions", "emotion"),
        ("emo", "emotion"),
        ("label", "emotion"),
        ("emotoin", "emotion"),
        ("emotion\u200b", "emotion"),
        ("\uff45motion", "emotion"),
        ("speaker_id", "speaker"),
        ("Speaker ID", "speaker"),
        ("client_id", "speaker"),
        ("spk", "speaker"),
        ("transcript", "text"),
        ("Transcription", "text"),
        ("sentence", "text"),
        ("Text", "text"),
        ("start_time", "start"),
        ("End", "end"),
        ("Valence", "valence"),
        ("EmoAct", "arousal"),
    ],
)
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_a_column_that_seems_to_be_meant_is_pointed_at(folder, suffix, theirs, ours):
    path = folder / f"m{suffix}"
    if suffix == ".jsonl":
        write(path, json.dumps({"file": "a.wav", theirs: "1"}))
    else:
        write(
            path,
            "\n".join(("," if suffix == ".csv" else "\t").join(r) for r in (["file", theirs], ["a.wav", "1"])),
        )
    told = read_with_notes(path)[1]
    assert f"{theirs!r} is not read; did you mean --columns" in told and f"{ours}={repr(theirs)[1:-1]}" in told


def test_no_column_is_pointed_at_where_ours_is_read_or_nothing_is_near(folder):
    path = write(folder / "m.csv", "file,emotion,label,Emotion,age,split,kind,seconds,path,session\na" + "," * 9)
    told = read_with_notes(path)[1]
    assert "did you mean" not in told
    path = write(folder / "m.csv", "file,text,transcript\na.wav,b,c\n")
    told = read_with_notes(path, columns={"text": "transcript"})[1]
    assert "did you mean" not in told and "not read: 'text'" in told


def test_foreign_column_names_cannot_write_on_a_terminal_and_long_lists_are_cut(folder):
    names = ["file", "\x1b[31mred", "Emotion\x07", *(f"c{i}" for i in range(500))]
    path = write(folder / "m.csv", f"{','.join(names)}\na.wav{',' * (len(names) - 1)}\n")
    told = read_with_notes(path)[1]
    assert "\x1b" not in told and "'\\x1b[31mred'" in told and "482 more" in told and len(told) < 1000
    assert told.replace("\n", "").isprintable() and "did you mean --columns 'emotion=Emotion\\x07'?" in told


def test_nothing_is_told_without_asking(folder, capsys):
    read_manifest(write(folder / "m.csv", "file,Emotion,speaker\nwav/a.wav,nan,1.0\n"))
    assert capsys.readouterr() == ("", "")


# ---------------------------------------------------------------------------------------- maps of labels


def test_a_map_renames_and_drops_labels_and_the_rest_stays(folder):
    path = column(folder / "m.csv", "emotion", ["hapy", "happy", "xxx", "", "NA", "sad", " hapy "])
    utterances, told = read_with_notes(path, label_map={"hapy": "happy", "xxx": None, "angy": "angry"})
    assert [u.emotion for u in utterances] == ["happy", "happy", None, None, None, "sad", "happy"]
    assert "--map, emotion: 'hapy' is 'happy' (2), 'xxx' is no label (1)" in told
    assert "--map: no emotion here is called 'angy'" in told
    assert [u.speaker for u in utterances] == [None] * 7


def test_a_map_goes_before_the_cells_that_stand_for_nothing_and_the_papers_labels(folder):
    path = column(folder / "m.csv", "emotion", ["NA", "-", "e0", "e1"])
    utterances, told = read_with_notes(path, label_map={"NA": "neutral", "e0": "zero"})
    assert [u.emotion for u in utterances] == ["neutral", None, "zero", "e1"]
    assert "emotion '-' (1)" in told and "'NA' (1)" not in told
    labels = [
        u.emotion for u in read_with_notes(column(path, "emotion", ["e0", "e1", "e9"]), label_map={"e9": None})[0]
    ]
    assert labels == ["neutral", "happy", None]


def test_a_map_of_speakers_renames_speakers_alone(folder):
    path = write(folder / "m.csv", "file,emotion,speaker\na,1,1\nb,2,2.0\nc,s1,s1\n")
    label_map = {"1": "angry", "speaker": {"s1": "S1", "2": "two"}}
    rows = [(u.emotion, u.speaker) for u in read_with_notes(path, label_map=label_map)[0]]
    assert rows == [("angry", "1"), ("2", "two"), ("s1", "S1")]


# ---------------------------------------------------------------------------------------- quotation marks


def texts_of(path: Path, **options) -> tuple[list[str | None], str]:
    utterances, told = read_with_notes(path, **options)
    return [u.text for u in utterances], told


def tsv(path: Path, texts: list[str], end: str = "\n", mark: str = "") -> Path:
    """The texts as they are, in the middle of three columns."""
    lines = ["file\ttext\tage", *(f"{i}.wav\t{text}\t3" for i, text in enumerate(texts))]
    return write(path, mark + end.join([*lines, ""]))


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize(
    "texts",
    [
        ["one", '"two', "three", 'four"', "five"],
        ["one", '"'],
        ['"', '"'],
        ['"yes" she said'],
        ['"yes" she said "no"'],
        ['"quoted"', '"open'],
        ['"open', '"quoted"', 'x "y" z'],
        ['""quoted""'],
        ['"a" "b"'],
    ],
)
def test_in_a_tsv_an_unpaired_quotation_mark_is_a_character(folder, texts, end, mark):
    assert texts_of(tsv(folder / "m.tsv", texts, end, mark))[0] == texts
    told = texts_of(folder / "m.tsv")[1]
    line = next(i for i, text in enumerate(texts, 2) if text.startswith('"') and text not in ('"quoted"', '""'))
    assert f"quotation marks are characters, as those in line {line} do not enclose a cell" in told


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_in_a_tsv_paired_quotation_marks_quote_as_pandas_writes_them(folder, end):
    texts = ['"two words"', '"say ""no"""', 'it is 5"', '""', '"a\tb"', "plain"]
    found, told = texts_of(tsv(folder / "m.tsv", texts, end))
    assert found == ["two words", 'say "no"', 'it is 5"', None, "a\tb", "plain"]
    assert "quotation marks quote" in told
    write(folder / "all.tsv", end.join(['"file"\t"text"', '"a.wav"\t"x"', '"b.wav"\t"y ""z"""', ""]))
    assert texts_of(folder / "all.tsv")[0] == ["x", 'y "z"']


def test_in_a_tsv_without_a_mark_at_the_beginning_of_a_cell_nothing_is_said_of_them(folder):
    found, told = texts_of(tsv(folder / "m.tsv", ['a "b" c', 'd"', "", ' "e']))
    assert found == ['a "b" c', 'd"', None, ' "e']
    assert "quotation" not in told


def test_cells_side_by_side_are_not_one_quoted_cell_with_a_tab(folder):
    write(folder / "m.tsv", 'file\ttext\temotion\na.wav\t"one\ttwo"\n')
    (utterance,) = read_with_notes(folder / "m.tsv")[0]
    assert (utterance.text, utterance.emotion) == ('"one', 'two"')


def test_a_quoted_cell_of_several_lines_in_a_tsv_is_an_error_that_says_why(folder):
    path = write(folder / "m.tsv", 'file\ttext\na.wav\t"one\ntwo"\nb.wav\tx\n')
    message = refusal(path, check_files=False)
    assert "quotation marks are characters here, as those in line 2 do not enclose a cell" in message
    assert "line 3: 1 fields, but the header has 2" in message
    path = write(folder / "m.tsv", '"file"\t"text"\n"a.wav"\t"one\n')
    assert "no column 'file'" in refusal(path) and "quotation marks are characters here" in refusal(path)


def test_an_open_mark_in_the_header_or_in_a_row_of_another_width_is_a_character_too(folder):
    for text, line in (
        ('file\t"text\na.wav\tx\n', 1),
        ('\n"file\ttext\n', 2),
        ('file\ttext\na.wav\t"x\ty\n', 2),
        ('file\ttext\na.wav\t"x" y\tz\n', 2),
        ('file\ttext\na.wav\t"x"\tz\n', 0),
    ):
        found = find_quoting(io.BytesIO(text.encode()))
        assert (found.seen, found.broken) == (True, line), text


def test_a_carriage_return_that_ends_no_line_is_named(folder):
    for name, sep in (("m.csv", ","), ("m.tsv", "\t")):
        path = write(folder / name, f"file{sep}text\ra.wav{sep}x\rb.wav{sep}y\r")
        assert "a carriage return outside quotes ends no line" in refusal(path, check_files=False)


def test_a_damaged_or_endless_line_does_not_decide_what_quotation_marks_mean(folder):
    write(folder / "m.tsv", b'file\ttext\na.wav\t"\xff"\nb.wav\t"x"\n')
    assert "line 2: not UTF-8" in refusal(folder / "m.tsv", check_files=False)
    path = write(folder / "long.tsv", 'file\ttext\na.wav\t"x"\n')
    os.truncate(path, 1 << 30)
    assert "line 3: longer than" in refusal(path, check_files=False)


@pytest.mark.parametrize(
    "rows",
    [
        ["0.wav,happy,one", '1.wav,happy,"two', "2.wav,sad,three", '3.wav,happy,four"', "4.wav,sad,five"],
        ["0.wav,happy,one", '1.wav,happy,"two', '2.wav,sad,four"'],
    ],
)
def test_an_open_quote_in_a_csv_that_takes_whole_rows_is_an_error(folder, rows):
    message = refusal(write(folder / "m.csv", "\n".join(["file,emotion,text", *rows, ""])), check_files=False)
    assert (
        "line 3: a quoted cell holds line 4, which looks like a row of its own; is a quote left open?" in message
    )


def test_so_it_is_where_the_file_stands_last(folder):
    path = write(folder / "m.csv", 'emotion,text,file\nhappy,"two,1.wav\nsad,four",2.wav\n')
    assert "line 2: a quoted cell holds line 3" in refusal(path, check_files=False)


def test_a_quoted_text_of_several_lines_in_a_csv_is_read(folder):
    write(folder / "m.csv", 'file,emotion,text\n1.wav,happy,"one, two\nthree, four, five\n\nsix"\n2.wav,sad,x\n')
    assert texts_of(folder / "m.csv")[0] == ["one, two\nthree, four, five\n\nsix", "x"]
    write(folder / "m.csv", 'text,file\n"one\ntwo",1.wav\n"x, y\nz",2.wav\n')
    assert texts_of(folder / "m.csv")[0] == ["one\ntwo", "x, y\nz"]


# ---------------------------------------------------------------------------------------- names of files

NFC, NFD = (unicodedata.normalize(form, "k\u00e4se \u1eadt") for form in ("NFC", "NFD"))


@pytest.mark.parametrize("written", [NFC, NFD, "k\u00e4se \u1ea1\u0302t"])
@pytest.mark.parametrize("there", [NFC, NFD])
@pytest.mark.parametrize("check_files", [True, False])
def test_a_file_is_found_whatever_the_unicode_form_of_its_name(tmp_path, written, there, check_files):
    (tmp_path / there / there).mkdir(parents=True)
    file = tmp_path / there / there / f"{there}.wav"
    file.touch()
    path = write(
        tmp_path / "m.csv",
        f"file,start,end\n{written}/{written}/{written}.wav,,\n{written}/{written}/{written}.wav,1,2\n",
    )
    utterances = read_manifest(path, check_files=check_files)
    assert [str(u.file) for u in utterances] == [str(file)] * 2
    name = f"{written}/{written}/{written}.wav"
    assert [u.id for u in utterances] == [name, f"{name}#1.0-2.0"]


def test_one_file_under_two_spellings_is_one_recording(tmp_path):
    (tmp_path / f"{NFD}.wav").touch()
    path = write(tmp_path / "m.csv", f"file\n{NFC}.wav\n{NFD}.wav\n")
    assert "line 3: the same recording (file, start, end) is line 2 already" in refusal(path)
    sets = [
        read_manifest(write(tmp_path / f"{i}.csv", f"file\n{name}.wav\n"), check_files=i == 0)
        for i, name in enumerate((NFC, NFD))
    ]
    assert find_overlap(*sets).utterances == [f"{NFD}.wav"]


def test_where_both_spellings_are_files_each_is_itself(tmp_path):
    for name in (NFC, NFD):
        (tmp_path / f"{name}.wav").touch()
    path = write(tmp_path / "m.csv", f"file\n{NFC}.wav\n{NFD}.wav\n")
    assert [u.file.name for u in read_manifest(path)] == [f"{NFC}.wav", f"{NFD}.wav"]
    path = write(tmp_path / "m.csv", "file\nk\u00e4se \u1ea1\u0302t.wav\n")
    assert "does not exist" in refusal(path), "neither is chosen"


def test_another_name_is_not_found(tmp_path):
    (tmp_path / f"{NFD}.wav").touch()
    for name in ("kase at", "k\u00c4se \u1eadt", f"{NFC}/x"):
        assert "does not exist" in refusal(write(tmp_path / "m.csv", f"file\n{name}.wav\n"))
    long = "\u00e4/" * 30_000
    assert "cannot be found: File name too long" in refusal(write(tmp_path / "m.csv", f"file\n{long}a.wav\n"))


def test_where_both_forms_name_one_file_they_are_one_recording(tmp_path, monkeypatch):
    monkeypatch.setattr("ser.data.manifest.ONE_FILE_IN_ANY_FORM", True)
    sets = [[Utterance(name, tmp_path / name)] for name in (NFC, NFD)]
    assert find_overlap(*sets).utterances == [NFD]


# ---------------------------------------------------------------------------------------- writing

characters = st.characters(exclude_characters="\0", exclude_categories=["Cs"])
texts = st.text(characters, min_size=1, max_size=12).filter(lambda t: not t.isspace())
difficult = texts | st.sampled_from(
    ['a, "b"', "\n", "a\r\nb", '"', "\t", "'", "\ufeff", " x ", "\u2028", "1", "\r"]
)
text_cells = difficult.filter(lambda t: t and not t.isspace() and t.strip() not in MISSING_TEXTS)
label_cells = text_cells.map(lambda t: unicodedata.normalize("NFC", t.strip())).filter(
    lambda t: t and t == t.strip() and t not in PAPER_EMOTIONS and t not in MISSING_LABELS and whole(t) == t
)
file_names = st.text(characters, min_size=1, max_size=8).map(lambda t: "f" + t.replace("/", "_"))
times = st.floats(0, 1e6, allow_subnormal=False)
rows = st.fixed_dictionaries(
    {
        "name": file_names,
        "inside": st.booleans(),
        "emotion": st.none() | label_cells,
        "text": st.none() | text_cells,
        "speaker": st.none() | label_cells,
        "times": st.none() | st.tuples(times, times).filter(lambda t: t[0] < t[1]),
        "id": text_cells,
        "extra": st.dictionaries(st.sampled_from(["age", "Größe", 'a "b", c']), text_cells, max_size=3),
    }
)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.lists(rows, min_size=1, max_size=5, unique_by=(lambda r: r["id"], lambda r: r["name"])),
    literal=st.none() | st.sampled_from(sorted(MISSING_LABELS)),
)
def test_what_is_written_reads_as_the_same_utterances(tmp_path_factory, suffix, rows, literal):
    root = tmp_path_factory.getbasetemp() / "corpus"
    utterances = [
        Utterance(
            id=row["id"],
            file=(root if row["inside"] else Path("/elsewhere")) / row["name"],
            emotion=literal or row["emotion"],
            text=literal or row["text"],
            speaker="1.0" if literal else row["speaker"],
            start=row["times"] and row["times"][0],
            end=row["times"] and row["times"][1],
            extra=row["extra"],
        )
        for row in rows
    ]
    path = tmp_path_factory.getbasetemp() / f"written{suffix}"
    root.mkdir(exist_ok=True)
    values = [
        value for u in utterances for value in (u.id, str(u.file), u.emotion, u.text, u.speaker, *u.extra.values())
    ]
    if suffix == ".tsv" and any("\n" in value for value in values if value):
        with pytest.raises(ManifestError, match=r"holds a line end, which cannot stand in a .tsv"):
            write_manifest(path, utterances, root=root, literal_labels=literal is not None)
        return
    write_manifest(path, utterances, root=root, literal_labels=literal is not None)
    again = read_manifest(path, root=root, check_files=False, literal_labels=literal is not None)
    assert again == utterances


def test_files_are_written_relative_to_the_manifest_where_possible(folder):
    utterances = [Utterance("a", folder / "wav/a.wav"), Utterance("b", Path("/elsewhere/b.wav"))]
    write_manifest(folder / "m.csv", utterances)
    assert (folder / "m.csv").read_text() == "file,id\nwav/a.wav,a\n/elsewhere/b.wav,b\n"
    write_manifest(folder / "m.csv", utterances, root=folder / "wav")
    assert (folder / "m.csv").read_text() == "file,id\na.wav,a\n/elsewhere/b.wav,b\n"
    write_manifest(folder / "m.jsonl", utterances[:1])
    write_manifest(folder / "m.JSON", utterances[:1])
    for name in ("m.jsonl", "m.JSON"):
        assert json.loads((folder / name).read_text()) == {"file": "wav/a.wav", "id": "a"}


def test_a_written_manifest_has_the_mode_of_any_file_and_leaves_nothing_beside_it(folder):
    write_manifest(folder / "wav" / "m.csv", [Utterance("a", folder / "wav/a.wav")])
    mode = stat.S_IMODE((folder / "wav" / "m.csv").stat().st_mode)
    assert mode == stat.S_IMODE((folder / "wav" / "a.wav").stat().st_mode)
    assert sorted(p.name for p in (folder / "wav").iterdir()) == ["a.wav", "b.wav", "c.wav", "d.wav", "m.csv"]


def test_writing_replaces_the_file_and_does_not_write_into_it(folder):
    path = write(folder / "m.csv", "old")
    os.link(path, folder / "link.csv")
    write_manifest(path, [Utterance("a", folder / "wav/a.wav")])
    assert (folder / "link.csv").read_text() == "old"
    assert read_manifest(path)[0].id == "a"


def test_a_manifest_that_cannot_be_written_leaves_the_old_one(folder):
    path = write(folder / "m.csv", "old")
    good, bad = Utterance("a", folder / "wav/a.wav"), folder / "wav/b.wav"
    for utterances, message in [
        ([], "there are no utterances to write"),
        ([good, Utterance("a", bad)], "utterance 2 'a': the id 'a' is that of utterance 1 already"),
        ([good, Utterance("b", good.file, start=0.0)], "the same recording (file, start, end) is utterance 1"),
        ([good, Utterance("b", bad, text="\0")], "holds a NUL or half a surrogate pair"),
        ([good, Utterance("b", bad, speaker="\ud800")], "holds a NUL or half a surrogate pair"),
        ([good, Utterance("b", bad, start=2.0, end=1.0)], "end 1.0 is not after start 2.0"),
        ([good, Utterance("b", bad, start=float("nan"))], "start is 'nan'"),
        ([good, Utterance("b", bad, text="x" * 131_073)], "too long"),
        ([good, Utterance("b", bad, extra={f"c{i}": "x" * 120_000 for i in range(10)})], "too long"),
        ([good, Utterance("b", bad, extra={"text": "x"})], "extra column 'text': is not a name of its own"),
        ([good, Utterance("b", bad, extra={" x": "x"})], "extra column ' x'"),
        ([good, Utterance("b", bad, extra={"": "x"})], "extra column ''"),
        ([good, Utterance("b", bad, extra={"\0": "x"})], "extra column"),
        (
            [good, Utterance("b", bad, emotion="None")],
            "emotion 'None' would be read as none; write and read it with",
        ),
        ([good, Utterance("b", bad, speaker="-")], "speaker '-' would be read as none"),
        ([good, Utterance("b", bad, speaker="1.0")], "speaker '1.0' would be read as '1'"),
        ([good, Utterance("b", bad, text="nan")], "text 'nan' would be read as none"),
        ([good, Utterance("b", bad, arousal=float("nan"))], "arousal is 'nan', expected a number"),
    ]:
        for target in (path, folder / "m.jsonl"):
            with pytest.raises(ManifestError) as caught:
                write_manifest(target, utterances)
            assert message in str(caught.value)
            assert str(target) in str(caught.value)
    assert path.read_text() == "old"
    assert sorted(p.name for p in folder.iterdir()) == ["m.csv", "wav"]
    with pytest.raises(ManifestError, match="cannot write the manifest: No such file"):
        write_manifest(folder / "missing" / "m.csv", [good])


def test_the_longest_text_that_can_be_written_can_be_read(folder):
    utterances = [Utterance("a", folder / "wav/a.wav", text="ä" * 131_072)]
    for name in ("m.csv", "m.jsonl"):
        write_manifest(folder / name, utterances)
        assert read_manifest(folder / name) == utterances


# ---------------------------------------------------------------------------------------- checking


def speech(name: str, emotion: str | None = None, speaker: str | None = None, **times: float) -> Utterance:
    return Utterance(name, Path("/corpus") / f"{name[0]}.wav", emotion=emotion, speaker=speaker, **times)


def test_unknown_labels_are_listed_for_all_utterances_with_the_nearest_name():
    utterances = [speech("a", "happy", "S1"), speech("b", "hapy", "S2"), speech("c", "Angry", "S9"), speech("d")]
    with pytest.raises(ManifestError) as caught:
        check_labels(utterances, emotions=["happy", "angry"], speakers={"S1", "S2"})
    assert [line.strip() for line in str(caught.value).splitlines()] == [
        "the emotions are ['angry', 'happy']; the speakers are ['S1', 'S2']; these are other labels, which "
        "--map can rename or drop (3):",
        "utterance 'b': unknown emotion 'hapy' (did you mean 'happy'?)",
        "utterance 'c': unknown emotion 'Angry' (did you mean 'angry'?)",
        "utterance 'c': unknown speaker 'S9'",
    ]


def test_labels_that_are_known_or_missing_or_not_asked_about_pass():
    utterances = [speech("a", "happy", "S1"), speech("b")]
    check_labels(utterances)
    check_labels(utterances, emotions=["happy"])
    check_labels(iter(utterances), emotions=["happy"], speakers=["S1"])
    with pytest.raises(ManifestError, match=r"unknown emotion 'happy'$"):
        check_labels(utterances, emotions=[])


def test_overlap_is_the_shared_speakers_and_recordings():
    train = [speech("a", speaker="S2"), speech("b1", speaker="S1", start=0.0, end=1.0), speech("c")]
    other = [
        speech("b2", speaker="S3", end=1.0),
        speech("b3", speaker="S2", start=1.0, end=2.0),
        speech("d", speaker="S1"),
        Utterance("e", Path("/corpus/x/../a.wav")),
        speech("f"),
    ]
    assert find_overlap(train, other) == Overlap(speakers=["S1", "S2"], utterances=["b2", "e"])
    assert find_overlap(iter(train), iter(other[-1:])) == Overlap([], [])
    assert find_overlap([], other) == find_overlap(train, []) == Overlap([], [])


@pytest.mark.parametrize(
    ("shared", "passes"),
    [
        ([], {"none", "speakers", "utterances"}),
        ([speech("n", speaker="S1")], {"speakers", "utterances"}),
        ([speech("a", speaker="S1")], {"utterances"}),
        ([speech("a", speaker="S3")], {"utterances"}),
    ],
)
def test_overlap_is_refused_unless_it_is_allowed(shared, passes):
    train, other = [speech("a", speaker="S1")], [speech("z", speaker="S2"), *shared]
    for allow in ("none", "speakers", "utterances"):
        if allow in passes:
            assert check_overlap(train, other, allow=allow) == find_overlap(train, other)
        else:
            need = "utterances" if "speakers" not in passes else "speakers"
            with pytest.raises(ManifestError, match=f"^test: 1 .* --allow-overlap {need}$"):
                check_overlap(train, other, allow=allow, name="test")


def test_shared_speakers_are_named_and_the_default_allows_nothing():
    everyone = [speech("a", speaker=f"S{i:03}") for i in range(60)]
    with pytest.raises(ManifestError, match=r"valid: 60 speakers stand in training too: 'S000', .* and 10 more"):
        check_overlap(everyone, everyone)


def test_another_word_for_allow_is_refused():
    with pytest.raises(ConfigError, match=r"not 'speaker' \(did you mean 'speakers'\?\)"):
        check_overlap([], [], allow="speaker")


# ---------------------------------------------------------------------------------------- real ones


def shared(*parts: str) -> Path:
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{'/'.join(parts)} of the shared folder is not here")
    return path


def test_emodb_reads_as_it_is():
    utterances = read_manifest(shared("corpora", "emodb-4class", "metadata.csv"), columns={"text": "transcript"})
    assert len(utterances) == 339
    assert {u.emotion for u in utterances} == {"anger", "happiness", "neutral", "sadness"}
    assert len({u.speaker for u in utterances}) == len({u.text for u in utterances}) == 10
    extra = {"gender", "age", "text_code", "recognised_pct", "natural_pct"}
    assert all(set(u.extra) <= extra and u.text for u in utterances)
    one, other = ([u for u in utterances if (u.speaker == "03") == is_one] for is_one in (True, False))
    assert check_overlap(other, one) == Overlap([], [])


def test_librispeech_reads_and_writes_as_it_is(tmp_path):
    path = shared("corpora", "librispeech-test-other-100", "metadata.csv")
    utterances = read_manifest(path, columns=parse_columns(["text=transcript"]))
    assert len(utterances) == 100
    assert len({u.speaker for u in utterances}) == 10
    assert all(u.text and u.text == u.text.upper() and u.emotion is None for u in utterances)
    for name in ("m.csv", "m.jsonl"):
        write_manifest(tmp_path / name, utterances, root=path.parent)
        assert read_manifest(tmp_path / name, root=path.parent) == utterances


def test_the_labels_of_the_iemocap_list_become_names(tmp_path):
    path = shared("iemocap", "utterances.csv")
    utterances = read_manifest(path, columns={"file": "utterance"}, check_files=False)
    counts = [sum(u.emotion == e for u in utterances) for e in ("neutral", "happy", "angry", "sad")]
    assert counts == [1708, 1636, 1103, 1084]


def test_our_columns_are_the_fields_of_an_utterance():
    assert {*COLUMNS} == {*Utterance.__slots__, *label_columns()} - {"labels", "extra"}


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", ["m.json", "m.jsonl"])
def test_a_json_array_of_rows_reads_as_the_same_rows_line_by_line(folder, name, indent):
    """As `frame.to_json(orient="records")` writes it, and editors that indent."""
    rows = [
        {"file": "wav/a.wav", "emotion": "sad", "text": "\u00e9", "speaker": 1.0},
        {"file": "wav/b.wav", "emotion": math.nan, "text": None, "speaker": 2.0},
    ]
    lines = read_manifest(write(folder / "lines.jsonl", "\n".join(map(json.dumps, rows))))
    assert read_manifest(write(folder / name, "\ufeff\n " + json.dumps(rows, indent=indent) + "\n")) == lines
    assert [u.emotion for u in lines] == ["sad", None] and [u.speaker for u in lines] == ["1", "2"]


def test_problems_of_a_json_array_name_the_item(folder):
    rows = [
        {"file": "wav/a.wav"},
        7,
        {"file": "wav/y.wav"},
        {"file": "wav/a.wav"},
        {"file": "wav/b.wav", "text": "\0"},
    ]
    told = refusal(write(folder / "m.json", json.dumps(rows)))
    for part in (
        "item 2: not a JSON row: found 7, expected one object per item",
        "item 3: the file",
        "item 4: the same recording (file, start, end) is item 1 already",
        "item 5: not a JSON row: half a surrogate pair or a NUL",
    ):
        assert part in told
    assert "the array: cannot be read" in refusal(write(folder / "m.json", '[{"file": "wav/a.wav"}'))
    assert "the array: cannot be read" in refusal(write(folder / "m.json", "[" * 100_000))
    assert "no rows" in refusal(write(folder / "m.json", "[]"))


def test_a_json_array_beyond_its_limit_is_refused(folder, monkeypatch):
    monkeypatch.setattr("ser.data.manifest.MAX_ARRAY_BYTES", 20)
    assert "larger than 20 bytes" in refusal(write(folder / "m.json", '[{"file": "wav/a.wav"}]'))

"""Manifests: what is read, what is refused (all bad rows at once), what is written, what sets share."""

import csv
import json
import os
import pickle
import stat
import tracemalloc
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ser.data.cells import MAX_LINE_BYTES, MISSING_LABELS, MISSING_TEXTS, whole
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
        "u1", folder / "wav/a.wav", "happy", 'Yes, "you"', "S1", start=0.5, end=2.0, extra={"age": "31"}
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


def test_what_is_no_regular_file_is_refused_without_waiting(folder):
    os.mkfifo(folder / "fifo.csv")
    assert "not a regular file" in refusal(folder / "fifo.csv")
    assert "not a regular file" in refusal(folder / "wav")
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
    assert "line 1: new-line character" in refusal(write(folder / "m.csv", "file\rwav/a.wav\r"))


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
    return Utterance(name, Path("/corpus") / f"{name[0]}.wav", emotion, None, speaker, **times)


def test_unknown_labels_are_listed_for_all_utterances_with_the_nearest_name():
    utterances = [speech("a", "happy", "S1"), speech("b", "hapy", "S2"), speech("c", "Angry", "S9"), speech("d")]
    with pytest.raises(ManifestError) as caught:
        check_labels(utterances, emotions=["happy", "angry"], speakers={"S1", "S2"})
    assert [line.strip() for line in str(caught.value).splitlines()] == [
        "the emotions are ['angry', 'happy']; the speakers are ['S1', 'S2']; these are other labels (3):",
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
    assert {*COLUMNS, "extra"} == set(Utterance.__slots__)

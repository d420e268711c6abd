"""Files and folders are written whole or not at all (N7; FAULTS A2, B1)."""

import csv
import io
import json
import math
import os
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from toy import toy_recognizer

import ser
from ser.errors import FileError
from ser.files import (
    csv_line,
    finite,
    read_tensors,
    recover_folder,
    replace_file,
    write_folder_atomically,
    write_json,
    write_tensors,
)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


class Killed(BaseException):
    pass


@pytest.mark.parametrize("error", [RuntimeError, Killed, KeyboardInterrupt, OSError])
def test_a_failed_write_leaves_the_old_folder_and_nothing_else(tmp_path, error):
    def good(folder: Path) -> None:
        (folder / "a").write_text("old")

    def bad(folder: Path) -> None:
        (folder / "a").write_text("half")
        raise error

    target = tmp_path / "deep" / "model"
    raised = FileError if error is OSError else error
    with pytest.raises(raised):
        write_folder_atomically(target, bad)
    assert list(target.parent.iterdir()) == []
    write_folder_atomically(target, good)
    with pytest.raises(raised):
        write_folder_atomically(target, bad)
    assert snapshot(target) == {"a": b"old"}
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("moment", [1, 2])
def test_a_crash_between_the_two_renames_loses_neither_folder(tmp_path, monkeypatch, moment):
    target = tmp_path / "model"
    write_folder_atomically(target, lambda folder: (folder / "a").write_text("old"))
    renames = 0
    real = Path.rename

    def crash(self, other):
        nonlocal renames
        renames += 1
        if renames == moment:
            os._exit(9)
        return real(self, other)

    child = os.fork()
    if not child:
        monkeypatch.setattr(Path, "rename", crash)
        write_folder_atomically(target, lambda folder: (folder / "a").write_text("new"))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    recover_folder(target)
    assert snapshot(target) == {"a": b"old"}
    write_folder_atomically(target, lambda folder: (folder / "a").write_text("newer"))
    assert snapshot(target) == {"a": b"newer"}
    assert list(tmp_path.iterdir()) == [target]


def test_writing_through_a_link_keeps_the_link(tmp_path):
    (tmp_path / "link").symlink_to("real")
    for text in ("1", "2", "3"):
        write_folder_atomically(tmp_path / "link", lambda folder, text=text: (folder / "a").write_text(text))
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "a").read_text() == "3"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "real"]


@pytest.mark.parametrize(("umask", "file_mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_written_tensors_have_the_mode_of_other_files(tmp_path, umask, file_mode):
    before = os.umask(umask)
    try:
        write_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(2)})
        write_json(tmp_path / "x.json", {})
    finally:
        os.umask(before)
    assert {(tmp_path / n).stat().st_mode & 0o777 for n in ("x.safetensors", "x.json")} == {file_mode}


def test_a_strided_tensor_is_written_as_its_values(tmp_path):
    matrix = torch.arange(6.0).reshape(2, 3).t()
    write_tensors(tmp_path / "x.safetensors", {"a": matrix})
    assert torch.equal(load_file(tmp_path / "x.safetensors")["a"], matrix)


@given(st.lists(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=4), max_size=4))
@settings(max_examples=200, deadline=None, derandomize=True)
@example([["a\rb", "c\r\nd", "\n", '"', '"",'], ["\u2028", "\x85", "\x1c", " ", ""], ["\r"], [""], ["\0"]])
def test_what_is_written_as_csv_reads_back_whatever_the_cells_hold(rows):
    for delimiter in (",", "\t"):
        text = "".join(csv_line(row, delimiter) for row in rows)
        assert list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)) == rows


def test_a_name_that_is_no_utf_8_is_written_as_its_escape(tmp_path):
    name = os.fsdecode(b"caf\xe9.wav")
    write_json(tmp_path / "x.json", {"file": name})
    assert json.loads((tmp_path / "x.json").read_bytes().decode("utf-8")) == {"file": name}
    with replace_file(tmp_path / "x.csv") as file:
        file.write(csv_line([name, "Größe"]))
    assert (tmp_path / "x.csv").read_bytes().decode("utf-8") == "caf\\udce9.wav,Größe\n"


def test_json_holds_null_for_what_is_no_number():
    found = finite({"a": [math.nan, 1.0, {"b": math.inf}], "c": "nan", "d": None})
    assert json.loads(json.dumps(found, allow_nan=False)) == {"a": [None, 1.0, {"b": None}], "c": "nan", "d": None}


def test_tensors_are_read_below_a_folder_whose_name_is_no_utf_8(tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    write_tensors(folder / "x.safetensors", {"a": torch.arange(3.0)})
    assert torch.equal(read_tensors(folder / "x.safetensors")["a"], torch.arange(3.0))
    toy_recognizer(heads=["emotion"]).save(folder / "model")
    assert ser.load(folder / "model").emotions

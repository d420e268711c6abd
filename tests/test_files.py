"""Files and folders are written whole or not at all (N7; FAULTS A2, B1)."""

import csv
import errno
import io
import json
import math
import os
import re
import signal
import socket
import stat
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from toy import toy_recognizer

import ser
from ser import files
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
    written,
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


def forked(work: Callable[[], object], seconds: int = 60) -> int:
    """The status of a process that does ``work`` and ends: negative for a signal, 1 for an exception."""
    child = os.fork()
    if not child:
        signal.alarm(seconds)
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at_rename(number: int, work: Callable[[], object]) -> Callable[[], object]:
    """``work`` in a process that is killed before it renames for the ``number``-th time."""

    def until_then():
        count = 0

        def hook(event, _):
            nonlocal count
            if event == "os.rename":
                count += 1
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        work()

    return until_then


def write_text(target: Path, text: str) -> None:
    write_folder_atomically(target, lambda folder: (folder / "a").write_text(text))


@pytest.mark.parametrize(("swap", "renames"), [(True, 2), (False, 4)])
def test_a_kill_at_any_rename_loses_neither_folder_and_its_remains_go(tmp_path, monkeypatch, swap, renames):
    if not swap:  # as on other systems than Linux
        monkeypatch.setattr(files, "exchange", lambda *_: False)
    target = tmp_path / "model"
    for number in range(1, renames + 2):
        write_text(target, "old")
        status = forked(killed_at_rename(number, lambda: write_text(target, "new")))
        assert status == (-signal.SIGKILL if number <= renames else 0)
        if swap:
            assert target.is_dir(), "it is there for readers at every moment"
        recover_folder(target)
        found = snapshot(target)["a"]
        assert found == (b"old" if number <= (2 if swap else 3) else b"new")
        write_text(target, "newer")
        assert snapshot(target) == {"a": b"newer"}
        assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("swap", [True, False])
def test_processes_that_write_one_folder_leave_a_whole_one_and_nothing_else(tmp_path, monkeypatch, swap):
    """Each file of a folder holds the same text, so one of two writers would show."""
    if not swap:
        monkeypatch.setattr(files, "exchange", lambda *_: False)
    target, stop = tmp_path / "model", tmp_path / "stop"

    def fill(folder: Path, text: str) -> None:
        for name in "abc":
            (folder / name).write_text(text)

    def write_on(text: str) -> None:
        while not stop.exists():
            write_folder_atomically(target, lambda folder: fill(folder, text))

    write_folder_atomically(target, lambda folder: fill(folder, "0"))
    children = []
    for text in "123":
        child = os.fork()
        if not child:
            signal.alarm(60)
            try:
                write_on(text)
                os._exit(0)
            finally:
                traceback.print_exc()
                os._exit(1)
        children.append(child)
    try:
        seen, absent = set(), 0
        for _ in range(3000):
            if swap:
                assert target.is_dir(), "nobody ever finds nothing there"
            handle = None
            try:
                handle = os.open(target, os.O_RDONLY)  # of one and the same folder
                seen.add(os.stat("a", dir_fd=handle).st_size)
            except FileNotFoundError:
                absent += 1
            finally:
                if handle is not None:
                    os.close(handle)
    finally:
        stop.touch()
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert statuses == [0, 0, 0] and seen == {1}
    assert len({*snapshot(target).values()}) == 1 and len(snapshot(target)) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "stop"]


def test_a_writer_that_is_overtaken_between_its_two_renames_replaces_that_one_too(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "exchange", lambda *_: False)
    target = tmp_path / "model"
    write_text(target, "old")
    tries, real = 0, Path.rename

    def rename(self, other):
        nonlocal tries
        if other == target:
            tries += 1
            if tries == 2:  # what was there is at its hidden name
                assert not target.exists()
                target.mkdir()
                (target / "a").write_text("faster")
        return real(self, other)

    monkeypatch.setattr(Path, "rename", rename)
    write_text(target, "new")
    assert tries == 3 and snapshot(target) == {"a": b"new"}
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_killed_writer_left_goes_and_what_a_living_one_writes_stays(tmp_path, kind):
    target = tmp_path / "a[b]"  # a pattern, to those who take it for one

    def write(during: Callable[[], object]) -> None:
        if kind == "file":
            with replace_file(target) as file:
                file.write("x")
                file.flush()
                during()
        else:
            write_folder_atomically(target, lambda folder: during())

    assert forked(lambda: write(lambda: os.kill(os.getpid(), signal.SIGKILL))) == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert re.fullmatch(r"\.a\[b\]\.\d+-[0-9a-f]{8}\.(tmp|new)", left.name)
    hidden = []
    write(lambda: (hidden.extend(tmp_path.glob(".*")), forked(lambda: write(lambda: None))))
    assert hidden != [left] and len(hidden) == 1, "the dead one's is gone, the own one's there"
    assert list(tmp_path.iterdir()) == [target], "and the other's writing did not disturb"


def test_an_old_folder_under_its_hidden_name_is_put_back_or_cleared_but_never_lost(tmp_path):
    """As a kill between two renames leaves it."""
    target, old = tmp_path / "model", tmp_path / ".model.12-0123abcd.old"
    write_text(target, "old")
    target.rename(old)
    files.clear_ended(target)
    assert old.is_dir(), "while nothing else stands there"
    with replace_file(tmp_path / "model.json") as file:  # another name
        file.write("{}")
    assert old.is_dir()
    seen = []
    write_folder_atomically(target, lambda folder: seen.append(snapshot(target)))
    assert seen == [{"a": b"old"}], "it is back for readers while the new one is written"
    write_text(old, "older")
    write_text(target, "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "model.json"]


def test_a_folder_passes_its_mode_on_to_the_one_that_takes_its_place(tmp_path):
    write_text(tmp_path / "model", "old")
    (tmp_path / "model").chmod(0o750)
    write_text(tmp_path / "model", "new")
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o750


# ------------------------------------------------------------------------------------- what is written into


def write_file(path: Path, text: str = "new") -> None:
    with replace_file(path) as file:
        file.write(text)


def test_a_file_is_replaced_whole_and_passes_on_its_mode_and_owner(tmp_path):
    target = tmp_path / "private"
    target.write_text("old")
    target.chmod(0o600)
    if not os.getuid():
        os.chown(target, 1234, 4321)
    before = target.stat()
    with replace_file(target) as file:
        file.write("new")
        (hidden,) = tmp_path.glob(".*")
        assert hidden.stat().st_mode & 0o077 == 0, "nor may others read it meanwhile"
        assert target.read_text() == "old"
    after = target.stat()
    assert target.read_text() == "new" and after.st_ino != before.st_ino
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("there", [True, False])
def test_a_link_to_a_file_stays_one_and_what_it_leads_to_is_written(tmp_path, there):
    (tmp_path / "deep").mkdir()
    real = tmp_path / "deep" / "real"
    if there:
        real.write_text("old")
    (tmp_path / "link").symlink_to("deep/middle")
    (tmp_path / "deep" / "middle").symlink_to("real")
    write_file(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "deep" / "middle").is_symlink()
    assert real.read_text() == "new" and not real.is_symlink()
    assert {p.name for p in tmp_path.rglob("*")} == {"link", "deep", "middle", "real"}


def test_another_name_of_a_file_keeps_the_old_content(tmp_path):
    (tmp_path / "a").write_text("old")
    os.link(tmp_path / "a", tmp_path / "b")
    write_file(tmp_path / "a")
    assert [(tmp_path / name).read_text() for name in "ab"] == ["new", "old"]


@pytest.mark.parametrize("through", ["itself", "a link"])
def test_a_named_pipe_is_written_into_and_stays_one(tmp_path, through):
    os.mkfifo(tmp_path / "pipe")
    path = tmp_path / "pipe"
    if through == "a link":
        path = tmp_path / "link"
        path.symlink_to("pipe")
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()), daemon=True)
    threading.Timer(0.1, reader.start).start()  # the writer is there first
    write_file(path, "x" * 100_000)
    reader.join(20)
    assert read == ["x" * 100_000] and path.is_fifo()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_pipe_that_nobody_reads_from_is_an_error_after_a_while(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "READER_SECONDS", 0.1)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match=r"no process reads from this pipe.*pipe'"):
        write_file(tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="needs /dev/fd")
def test_what_is_no_pipe_is_not_waited_for_and_what_is_open_for_reading_is_refused(tmp_path, monkeypatch):
    def without_terminal(path, *_):
        raise OSError(errno.ENXIO, os.strerror(errno.ENXIO), str(path))

    with pytest.raises(OSError, match="No such device"), monkeypatch.context() as patched:
        patched.setattr(files.os, "open", without_terminal)
        files.open_as_it_is(Path("/dev/tty"))
    with (tmp_path / "a").open("wb+") as file, Path(os.devnull).open() as null:
        files.check_can_write(Path(f"/dev/fd/{file.fileno()}"))
        with pytest.raises(OSError, match="Bad file descriptor"):
            files.check_can_write(Path(f"/dev/fd/{null.fileno()}"))
    assert (tmp_path / "a").read_bytes() == b""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can make a device")
@pytest.mark.parametrize("through", ["itself", "a link"])
def test_a_device_is_written_into_and_stays_one(tmp_path, through):
    node = tmp_path / "null"
    os.mknod(node, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    (tmp_path / "link").symlink_to("null")
    write_file(node if through == "itself" else tmp_path / "link")
    assert stat.S_ISCHR(node.lstat().st_mode) and (tmp_path / "link").is_symlink()
    disk = tmp_path / "disk"
    os.mknod(disk, 0o600 | stat.S_IFBLK, os.makedev(7, 250))
    with pytest.raises(OSError, match="is a block device, such as a disk; give a file"):
        write_file(disk)


def test_a_device_without_room_is_an_error_of_ours():
    if not Path("/dev/full").exists():
        pytest.skip("has no /dev/full")
    message = r"/dev/full: cannot be written: No space left on device"
    with pytest.raises(FileError, match=message), written(Path("/dev/full")) as path:
        write_file(path)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
@pytest.mark.parametrize("name", ["/dev/fd/{}", "/proc/self/fd/{}", "link"])
def test_a_handle_is_written_to_where_it_stands_whatever_it_leads_to(tmp_path, name):
    log = tmp_path / "log"
    log.write_text("before\n")
    with log.open("a") as file:  # as `>> log` opens it
        path = Path(name.format(file.fileno()))
        if name == "link":
            path = tmp_path / "link"
            path.symlink_to(f"/dev/fd/{file.fileno()}")
        write_file(path, "new\n")
        file.write("after\n")
    assert log.read_text() == "before\nnew\nafter\n"
    log.unlink()
    with pytest.raises(OSError, match="Bad file descriptor"):
        write_file(Path(name.format(777)) if name != "link" else Path("/dev/fd/777"))


def test_what_cannot_be_written_is_refused_by_name_and_left_as_it_is(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("old")
    (tmp_path / "loop").symlink_to("loop")
    with socket.socket(socket.AF_UNIX) as server:
        before = Path.cwd()
        os.chdir(tmp_path)  # a socket's path is short
        try:
            server.bind("socket")
        finally:
            os.chdir(before)
        for name, message in {
            "folder": "is a folder; give a file",
            "socket": "is a socket; give a file",
            "none/file": "No such file or directory: .*none",
            "file/file": "Not a directory",
            "loop": "Too many levels of symbolic links",
        }.items():
            with pytest.raises(OSError, match=message) as caught:
                write_file(tmp_path / name)
            assert caught.value.filename == str(tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder", "loop", "socket"]


@pytest.mark.skipif(os.getuid() != 0, reason="needs the right to become another user")
def test_a_file_or_folder_that_is_read_only_is_refused_by_name(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "file").chmod(0o444)
    (tmp_path / "locked").mkdir(0o555)
    tmp_path.chmod(0o777)

    def as_nobody():
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        os.chdir(tmp_path)
        with pytest.raises(PermissionError, match="is read-only; make it writable"):
            write_file(Path("file"))
        with pytest.raises(PermissionError, match=r"the folder .*locked is read-only"):
            write_file(Path("locked/file"))
        Path("writable").mkdir()
        Path("writable/file").write_text("old")
        Path("writable").chmod(0o300)  # not to be listed
        write_file(Path("writable/file"))
        assert Path("writable/file").read_text() == "new"

    for folder in [*tmp_path.parents][:3]:
        if not folder.stat().st_mode & 0o001:
            folder.chmod(folder.stat().st_mode | 0o011)
    assert forked(as_nobody) == 0
    assert (tmp_path / "file").read_text() == "old"


# ----------------------------------------------------------------------------------------------------------


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

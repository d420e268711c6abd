"""Write files and folders whole or not at all: at any moment, the complete old one or the new one is there.

A file or folder is built under a hidden name beside its target, and replaces the target at the end, in this order:

    write, fsync of every file, [a manifest, fsync,] fsync of the folder, rename, fsync of the parent

So several processes may write the same target at the same time: each replaces it as a whole, and the last one
stays. On Linux, old and new folder change places in one step. Elsewhere this takes two renames. Between them the
old folder is at `.NAME.PID-RANDOM.old`; if the process dies there, the next writing puts it back.

A killed process leaves hidden files or folders (`.NAME.PID-RANDOM.new`, `.old`, `.tmp`, `.NAME.gone`), which are
never read. The next writing of NAME removes them, since their lock is free. On Windows, and where folders cannot
be locked, as on NFS, they stay; `clear_remains` removes them without a look at locks.
"""

import csv
import ctypes
import errno
import glob
import hashlib
import io
import json
import math
import os
import re
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ser.errors import FileError

StrPath = str | os.PathLike[str]
LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # the beginning of pointer files
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
OCCUPIED = {errno.ENOTEMPTY, errno.EEXIST}  # errors of a rename if a folder exists at the target
READER_SECONDS = 30.0  # how long a named pipe may be without a reader


def cannot_write(path: Path, error: OSError, size: int = 0) -> FileError:
    """Return the error for a path that could not be written and needs about ``size`` bytes (0: unknown)."""
    cause = error.strerror or str(error) or error.__class__.__name__
    if error.errno not in NO_ROOM:
        return FileError(f"{path}: cannot be written: {cause}")
    free = shutil.disk_usage(next(p for p in path.absolute().parents if p.is_dir())).free
    needed = f"{size:,} bytes needed, " if size else ""
    return FileError(
        f"{path}: cannot be written: {cause} ({needed}{free:,} free); what stood there is untouched; make room "
        "and give the same command again"
    )


def is_lfs_pointer(path: Path) -> bool:
    """Tell whether a file is a pointer of git-lfs, which replaces a file that was not downloaded."""
    with path.open("rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER


def digest(path: Path) -> str:
    """Return the sha256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """Raise FileError if a file cannot be written in this block, with its path and what to do."""
    try:
        yield path
    except BrokenPipeError:  # the reader of a pipe has closed it
        raise
    except OSError as error:
        raise cannot_write(path, error) from error


# -------------------------------------------------------------------------------------------- hidden names


def lock(path: Path, *, wait: bool) -> int | None:
    """Lock a file or folder and return the handle; None if another process has the lock, or locks do not exist.

    The system releases the lock when this process ends, however it ends.
    """
    try:
        import fcntl  # not on Windows

        handle = os.open(path, os.O_RDONLY)
    except (ImportError, OSError):
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return handle
    except OSError:
        os.close(handle)
        return None


def unlock(handle: int | None) -> None:
    """Release a lock, also for forked processes that have a copy of the handle."""
    if handle is not None:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)


def remove(path: Path) -> None:
    """Remove a file or folder if it exists, as far as possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def clear_ended(target: Path) -> None:
    """Remove the hidden remains of ended writers of ``target``; those that cannot be locked may be in use."""
    hidden = re.compile(re.escape(f".{target.name}.") + r"\d+-[0-9a-f]{8}\.(new|old|tmp|gone)")
    try:
        names = [name for name in os.listdir(target.parent) if hidden.fullmatch(name)]  # noqa: PTH208
    except OSError:  # some folders can be written but not listed
        return
    for remains in map(target.with_name, names):
        handle = lock(remains, wait=False)
        if handle is not None and (remains.suffix != ".old" or target.exists()):
            gone = remains.with_suffix(".gone")  # so a half-removed folder is never taken for a complete old one
            with suppress(OSError):
                remains.rename(gone)
            remove(gone)
        unlock(handle)


@contextmanager
def new_beside(target: Path, kind: str, make: Callable[[Path], object]) -> Iterator[Path]:
    """Let ``make`` create a file or folder under a hidden name beside ``target``; remove it at the end."""
    clear_ended(target)
    while True:
        path = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.{kind}")
        make(path)
        handle = lock(path, wait=True)
        if path.exists():
            break
        unlock(handle)  # another process removed it, since it was not locked yet
    try:
        yield path
    finally:
        remove(path)
        unlock(handle)


def keep_mode(old: Path, new: Path) -> None:
    """Give ``new`` the mode of ``old``, and its owner and group if that is permitted."""
    try:
        before, now = old.stat(), new.stat()
    except FileNotFoundError:
        return
    if (before.st_uid, before.st_gid) != (now.st_uid, now.st_gid):
        for owner, group in ((-1, before.st_gid), (before.st_uid, -1)):
            with suppress(PermissionError):
                os.chown(new, owner, group)
    if before.st_mode != now.st_mode:
        new.chmod(stat.S_IMODE(before.st_mode))


# ------------------------------------------------------------------------------------------------- files


def descriptor(path: Path) -> int | None:
    """Return N if a path is, or links to, /dev/fd/N or /proc/self/fd/N of this process, as /dev/stdout does."""
    own = {os.path.realpath("/dev/fd"), os.path.realpath("/proc/self/fd")}
    for _ in range(40):  # as many links to links as the system follows
        folder = os.path.realpath(path.parent)
        if folder in own and path.name.isdecimal():
            return int(path.name)
        if not path.is_symlink():
            return None
        path = Path(folder, path.readlink())
    return None


def check_can_write(path: Path) -> None:
    """Raise OSError for a path that `replace_file` cannot write: a folder, a socket, a read-only file."""
    number = descriptor(path)
    if number is not None:
        os.write(number, b"")  # fails if the descriptor is closed or read-only
        return
    folder = Path(os.path.realpath(path)).parent
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:  # the file may be new, also behind a link
        mode = stat.S_IFREG
        if not folder.is_dir():
            raise FileNotFoundError(errno.ENOENT, f"No such file or directory: {folder}", str(path)) from None
    else:
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, "is a folder; give a file", str(path))
        if stat.S_ISSOCK(mode) or stat.S_ISBLK(mode):
            kind = "a socket" if stat.S_ISSOCK(mode) else "a block device, such as a disk"
            raise OSError(errno.EINVAL, f"is {kind}; give a file, a pipe or a character device", str(path))
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, "is read-only; make it writable or give another file", str(path))
    if stat.S_ISREG(mode) and not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, f"the folder {folder} is read-only; give another one", str(path))


def open_as_it_is(path: Path) -> int:
    """Open a descriptor, a character device or a named pipe to write to; wait a while for a pipe's reader."""
    number = descriptor(path)
    if number is not None:
        return os.dup(number)  # with its position, since other processes may write into the same file
    until = time.monotonic() + READER_SECONDS
    while True:
        try:
            handle = os.open(path, os.O_WRONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0))
            break
        except OSError as error:
            if error.errno != errno.ENXIO or not path.is_fifo():  # a missing terminal gives the same error
                raise
            if time.monotonic() > until:
                cause = f"no process reads from this pipe (waited {READER_SECONDS:g} s)"
                raise OSError(errno.ENXIO, cause, str(path)) from None
        time.sleep(0.05)
    if hasattr(os, "O_NONBLOCK"):
        os.set_blocking(handle, True)
    return handle


@contextmanager
def replace_file(path: Path) -> Iterator[TextIO]:
    """Open a UTF-8 file that replaces ``path`` when the block ends, whole or not at all.

    A byte of a file name that is not UTF-8 is written as its escape, \\udce9, which JSON reads back.

    Until then the file has a hidden name in the same folder, and it is removed if the block fails. It gets the
    mode of the old file, and its owner if that is permitted. A new file has the mode of the user's umask, and not
    the 0600 of `tempfile`. A link is kept, and the file behind it is replaced; a hard link to that file keeps the
    old content. A pipe or character device, such as /dev/stdout, cannot be replaced and is written directly.

    Raises:
        OSError: the path cannot be written.
    """
    check_can_write(path)
    how: dict[str, Any] = {"encoding": "utf-8", "errors": "backslashreplace", "newline": ""}
    if descriptor(path) is not None or (path.exists() and not path.is_file()):
        with open(open_as_it_is(path), "w", **how) as file:
            yield file
        return
    target = Path(os.path.realpath(path))
    mode = target.stat().st_mode & 0o777 | 0o200 if target.exists() else 0o666  # never more open than the old one
    with new_beside(target, "tmp", lambda new: new.touch(mode=mode, exist_ok=False)) as temporary:
        with temporary.open("w", **how) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        keep_mode(target, temporary)
        temporary.replace(target)


def csv_line(cells: Iterable[object], delimiter: str = ",") -> str:
    """Return a row of a CSV file with its line end; `csv.reader` reads any cells back unchanged.

    The row is first written with the end \\r\\n: Python 3.11 quotes a carriage return in a cell only then.
    """
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=delimiter, lineterminator="\r\n").writerow(cells)
    return text.getvalue().removesuffix("\r\n") + "\n"


def finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON cannot hold, by None at any depth."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON, whole or not at all."""
    with replace_file(path) as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file with the usual mode of new files, without fsync."""
    path.touch()
    mode = path.stat().st_mode  # which save_file changes to 0600
    try:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, path, metadata={"format": "pt"})
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code) if number else str(error), str(path)) from error
    path.chmod(mode)


def open_tensors(path: Path) -> Any:
    """Open a file like `safetensors.safe_open`, with its errors, but also if the path is not UTF-8."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        with path.open("rb") as file:  # safe_open maps the file, so the file may be closed afterwards
            return safe_open(f"/proc/self/fd/{file.fileno()}", framework="pt")
    return safe_open(path, framework="pt")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file."""
    with open_tensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's own entries, are on the disk.

    On Windows, folders cannot be opened, so there is no wait for their entries, and a file has to be open for
    writing.
    """
    on_windows = hasattr(os, "O_BINARY")
    if on_windows and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if on_windows else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ----------------------------------------------------------------------------------------------- folders


def files_below(folder: Path, *, hidden: bool, say: Callable[[str], object]) -> Iterator[str]:
    """Yield the paths of all files in a folder and its subfolders.

    Links to folders are followed, but no folder is entered twice, even if links form a circle. A link to a folder
    that contains the link itself, above ``folder``, would add everything there. Such a link is not followed, and
    ``say`` is called with a line about it.

    Args:
        folder: where to begin.
        hidden: whether to include names that begin with a dot.
        say: is called with a line for the user.

    Raises:
        OSError: a folder cannot be listed.
    """

    def stop(error: OSError) -> None:
        raise error

    entered: set[str] = set()
    tops = [str(folder)]
    while tops:
        links: list[str] = []
        for top in tops:
            for where, folders, files in os.walk(top, onerror=stop):
                real = os.path.realpath(where)
                if real in entered:
                    folders.clear()
                    continue
                entered.add(real)
                folders[:] = [name for name in folders if hidden or not name.startswith(".")]
                # These are strings, since a million Path objects take a gigabyte.
                paths = [os.path.join(where, name) for name in folders]  # noqa: PTH118
                links += [path for path in paths if os.path.islink(path)]  # noqa: PTH114
                yield from (os.path.join(where, n) for n in files if hidden or not n.startswith("."))  # noqa: PTH118
        tops = []
        for link in sorted(links):
            real = os.path.realpath(link)
            if real not in entered and Path(link).parent.resolve().is_relative_to(real):
                say(f"{link}: is a link to {real}, which holds it; it is not followed")
            elif real not in entered:
                tops.append(link)


def exchange(a: Path, b: Path) -> bool:
    """Exchange two names in one step, so that neither is ever missing; False if that is not possible."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2  # of Linux
    except (OSError, AttributeError, TypeError):
        return False
    sys.audit("os.rename", str(a), str(b), -1, -1)
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2(here, os.fsencode(a), here, os.fsencode(b), swap) == 0


def put_in_place(temporary: Path, target: Path) -> None:
    """Give the folder ``temporary`` the name ``target``, and an old folder of this name the name ``temporary``.

    Other processes may do the same at the same time.
    """
    old = temporary.with_suffix(".old")
    while True:
        try:
            temporary.rename(target)  # works if there is nothing, or an empty folder
            break
        except OSError as error:
            if error.errno not in OCCUPIED:
                raise
        if exchange(temporary, target):
            return
        remove(old)  # left from an earlier round, in which another process was faster
        with suppress(FileNotFoundError):
            target.rename(old)
    with suppress(FileNotFoundError):
        old.rename(temporary)


def recover_folder(target: Path) -> None:
    """Undo a replacement that was interrupted between its two renames."""
    if target.exists():
        return
    hidden = target.parent.glob(f".{glob.escape(target.name)}.*old")
    olds = [old for old in hidden if re.fullmatch(r"(\d+-[0-9a-f]{8}\.)?old", old.name[len(target.name) + 2 :])]
    for old in sorted(olds, key=lambda old: old.stat().st_mtime, reverse=True):
        with suppress(OSError):  # another process may have put a folder there
            old.rename(target)
            return


def write_folder_atomically(
    target: Path, write: Callable[[Path], None], *, seal: Callable[[Path], None] | None = None, size: int = 0
) -> None:
    """Let ``write`` fill a new folder, then replace ``target`` by it.

    A crash leaves the old folder or the new one. If the system cannot exchange two names, this takes two renames.
    Between them the old folder has a hidden name, and `recover_folder` puts it back.

    Args:
        target: the folder; its parents are made.
        write: puts files into the folder that it is given.
        seal: adds a last file, when all others are on the disk.
        size: about how many bytes the folder needs, for the message if the disk is full.

    Raises:
        FileError: the folder cannot be written.
    """
    given = target
    target = target.resolve()  # so a link to a folder is kept
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        recover_folder(target)
        with new_beside(target, "new", Path.mkdir) as temporary:
            try:
                write(temporary)
                for file in sorted(temporary.iterdir()):
                    sync(file)
                if seal is not None:
                    seal(temporary)
                keep_mode(target, temporary)
                sync(temporary)
                put_in_place(temporary, target)
                sync(target.parent)
            except BaseException:
                recover_folder(target)
                raise
    except OSError as error:
        raise cannot_write(given, error, size) from error


def remove_folder(target: Path) -> None:
    """Remove a folder so that no half-removed folder has its name."""
    gone = target.with_name(f".{target.name}.gone")
    shutil.rmtree(gone, ignore_errors=True)
    target.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def clear_remains(folder: Path, name: str) -> None:
    """Remove what interrupted writers of ``name``, a pattern, left in ``folder``; no process may be writing it."""
    for old in folder.glob(f".{name}.*old"):
        recover_folder(folder / re.sub(r"(\.\d+-[0-9a-f]{8})?\.old$", "", old.name[1:]))
    for remains in folder.glob(f".{name}.*"):
        if remains.suffix in (".new", ".old", ".gone"):
            shutil.rmtree(remains, ignore_errors=True)
        elif re.fullmatch(r"\..+\.\d+(-[0-9a-f]{8})?\.tmp", remains.name):
            remains.unlink(missing_ok=True)

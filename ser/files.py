"""Writing files and folders: whatever happens meanwhile, the old one or the new one is there, whole.

Everything is built under a hidden name beside its target and takes its place at the end, in this order:

    write, fsync of every file, [a manifest, fsync,] fsync of the folder, rename, fsync of the parent

What an interruption leaves is hidden (`.NAME.new`, `.NAME.old`, `.NAME.gone`, `.NAME.PID.tmp`), is never read, and
goes with the next writing; `clear_remains` removes it at once.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ser.errors import FileError

LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # with which its files of some 130 bytes begin
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def cannot_write(path: Path, error: OSError, size: int = 0) -> FileError:
    """The error to raise where ``path``, of about ``size`` bytes (0: not known), could not be written."""
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
    """Tell whether the file is a pointer of git-lfs, which stands where the file itself was not fetched."""
    with path.open("rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """The path of a file that is being written; a disk that does not take it is a FileError."""
    try:
        yield path
    except OSError as error:
        raise cannot_write(path, error) from error


# ------------------------------------------------------------------------------------------------- files


@contextmanager
def replace_file(path: Path) -> Iterator[TextIO]:
    """A UTF-8 file to write into, which takes the place of `path` when the block ends, whole or not at all.

    It stands in the same folder until then, and is removed when the block fails. Opened as any file is, so its
    mode is the user's umask's and not the 0600 of `tempfile`.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """JSON that people can read, whole or not at all."""
    with replace_file(path) as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file with the mode that other new files have. `write_folder_atomically` waits for the disk."""
    path.touch()
    mode = path.stat().st_mode  # save_file makes it 0600
    try:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, path, metadata={"format": "pt"})
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code) if number else str(error), str(path)) from error
    path.chmod(mode)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's own entries, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ----------------------------------------------------------------------------------------------- folders


def write_folder_atomically(
    target: Path,
    write: Callable[[Path], None],
    *,
    seal: Callable[[Path], None] | None = None,
    size: int = 0,
) -> None:
    """Let ``write`` fill a new folder, then put it in the place of ``target`` at once.

    A crash leaves the old folder or the new one. Between the two renames that replacing a folder takes, the
    old one is at ``.<name>.old``; `recover_folder` puts it back.

    Args:
        target: the folder; its parents are made.
        write: puts files into the folder it is given.
        seal: adds a last file, when all others are on the disk.
        size: about how many bytes it takes, for the message where the disk is full.

    Raises:
        FileError: the disk does not take it.
    """
    given = target
    target = target.resolve()  # a link to a folder stays one
    temporary, old = target.with_name(f".{target.name}.new"), target.with_name(f".{target.name}.old")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        recover_folder(target)
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir()
        try:
            write(temporary)
            for file in sorted(temporary.iterdir()):
                sync(file)
            if seal is not None:
                seal(temporary)
            sync(temporary)
            if target.exists():
                target.rename(old)
            temporary.rename(target)
            sync(target.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            recover_folder(target)
            raise
    except OSError as error:
        raise cannot_write(given, error, size) from error
    shutil.rmtree(old, ignore_errors=True)


def recover_folder(target: Path) -> None:
    """Undo a replacement that was interrupted between its two renames."""
    old = target.with_name(f".{target.name}.old")
    if old.is_dir() and not target.exists():
        old.rename(target)


def remove_folder(target: Path) -> None:
    """Remove a folder so that it is never there in part."""
    gone = target.with_name(f".{target.name}.gone")
    shutil.rmtree(gone, ignore_errors=True)
    target.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def clear_remains(folder: Path, name: str) -> None:
    """Undo what interrupted writing of ``name``, a pattern, left in ``folder``. Nobody may be writing it."""
    for old in folder.glob(f".{name}.old"):
        recover_folder(folder / old.name[1:].removesuffix(".old"))
    for remains in folder.glob(f".{name}.*"):
        if remains.suffix in (".new", ".old", ".gone"):
            shutil.rmtree(remains, ignore_errors=True)
        elif re.fullmatch(r"\..+\.\d+\.tmp", remains.name):
            remains.unlink(missing_ok=True)

"""Read tensors and settings from a file of ``torch.save``; no other file reads a pickle.

A pickle is a program. So every pickle has to pass three checks:

1. It is first read as a list of instructions, without running them. All names in it must be in `GLOBALS`; any
   other name is refused.
2. Then ``torch.load(weights_only=True)`` runs it, with its own list of allowed names. The classes that fairseq
   puts into its checkpoints are replaced by empty ones, `Namespace` and `Dictionary`.
3. Sizes are limited: that of the file, of the pickle in it, and of each tensor by its bytes in the file.
"""

import io
import pickletools
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ser.errors import ModelFolderError, shorten, summary
from ser.models.pretrained import refuse_lfs_pointer

MAX_FILE_BYTES = 20 * 2**30  # the largest public checkpoints of this family, of 2 billion parameters, have 8 GB
MAX_PICKLE_BYTES = 64 * 2**20  # for the instructions; the tensors are stored separately
MAX_TUPLE_ITEMS = 1_000  # with nested items: a tuple as the key of a dict is hashed, perhaps a million times

# These replace classes of fairseq's checkpoints. They hold what was saved, and have no methods that could run.
Namespace = type("Namespace", (), {"__module__": "argparse", "__doc__": "Settings, as attributes."})
Dictionary = type(
    "Dictionary", (), {"__module__": "fairseq.data.dictionary", "__doc__": "Symbols, as a list of that name."}
)

# All names that a file may use, as "module name".
GLOBALS = {
    "argparse Namespace",
    "fairseq.data.dictionary Dictionary",
    "collections OrderedDict",
    "torch Size",
    "torch device",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    *(f"torch {kind}Storage" for kind in ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Bool", "Byte")),
    *(f"torch {dtype}" for dtype in ("float32", "float64", "float16", "bfloat16", "int64", "int32", "bool")),
}

ADVICE = (
    "such files can run code, and only tensors and plain settings are read. Where the file is trusted, load it "
    "with the library that wrote it, and save its state dict (of fairseq also args, or cfg as a plain dict, which "
    "OmegaConf.to_container makes) with torch.save"
)


class TupleSizes:
    """Count the items of a pickle's tuples by following its stack; nothing is built.

    A tuple may hold another one twice, which does the same, and so on 60 times. It has a few hundred bytes, and as
    a key of a dict it is hashed for ever.
    """

    def __init__(self) -> None:
        self.stack: list[int | None] = []  # number of items of each value, 1 unless it is a tuple; None: a mark
        self.memo: dict[int, int | None] = {}

    def run(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
        """Follow one instruction. ValueError: a tuple is too large; IndexError, KeyError: an invalid pickle."""
        name = opcode.name
        if name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if argument is None else argument] = self.stack[-1]
            return
        if name in ("GET", "BINGET", "LONG_BINGET", "DUP"):
            self.stack.append(self.stack[-1] if name == "DUP" else self.memo[argument])
            return
        taken: list[int | None] = []
        before = list(opcode.stack_before)
        if pickletools.markobject in before:  # take everything above the mark
            while (value := self.stack.pop()) is not None:
                taken.append(value)
            before = before[: before.index(pickletools.markobject)]
        taken += [self.stack.pop() for _ in before]
        size = 1 + sum(value or 0 for value in taken) if "TUPLE" in name else 1
        if size > MAX_TUPLE_ITEMS:
            raise ValueError(f"tuples in tuples, of more than {MAX_TUPLE_ITEMS:,} items together")
        self.stack += [None if kind is pickletools.markobject else size for kind in opcode.stack_after]


def brief(error: Exception) -> str:
    """Return the first lines of an error, without torch's advice to load the file without its checks."""
    text = str(error).split("Weights only load failed.")[-1].strip() or error.__class__.__name__
    return " ".join(text.split())[:300]


def globals_of_pickle(file: IO[bytes]) -> set[str]:
    """Collect the globals in one pickle, as "module name", without running it; ValueError if it is malformed."""
    names, strings = set(), ["", ""]
    tuples = TupleSizes()
    try:
        for opcode, argument, position in pickletools.genops(file):
            if (position or 0) > MAX_PICKLE_BYTES:
                raise ValueError(f"more than {MAX_PICKLE_BYTES:,} bytes of instructions")
            tuples.run(opcode, argument)
            if opcode.name in ("GLOBAL", "INST"):
                names.add(str(argument))
            elif opcode.name == "STACK_GLOBAL":  # of a protocol that torch.load does not read either
                names.add(" ".join(strings))
            elif opcode.name.startswith("EXT"):
                names.add(f"copyreg {argument}")
            elif isinstance(argument, str):
                strings = [strings[1], argument]
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
        # Some of the names are enough to refuse the file.
        if names - GLOBALS:
            return names
        raise ValueError(f"malformed pickle: {brief(error)}") from None
    return names


def globals_of_zip(path: Path) -> set[str]:
    """Collect the globals in ``data.pkl`` of the archive that torch.save writes."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):  # could expand without limit
                raise ModelFolderError(f"{path}: has compressed entries, which torch.save never writes")
            found = [entry for entry in entries if entry.filename.rpartition("/")[2] == "data.pkl"]
            if len(found) != 1:
                raise ModelFolderError(f"{path}: is a zip with {len(found)} data.pkl; expected a torch.save file")
            if (size := found[0].file_size) > MAX_PICKLE_BYTES:
                raise ModelFolderError(
                    f"{path}: its pickle has {size:,} bytes; at most {MAX_PICKLE_BYTES:,} are read"
                )
            content = archive.read(found[0])
            # If a file has two directories, torch might read the other one.
            if torch._C.PyTorchFileReader(str(path)).get_record("data.pkl") != content:
                raise ModelFolderError(f"{path}: is two archives in one, which torch.save never writes")
            return globals_of_pickle(io.BytesIO(content))
    except (zipfile.BadZipFile, ValueError, OSError, RuntimeError, NotImplementedError) as error:
        # zipfile raises the last one for an unknown compression.
        raise ModelFolderError(f"{path}: is not a sound file of torch.save: {brief(error)}") from None


def globals_of_legacy(path: Path) -> set[str]:
    """Collect the globals in the five pickles with which a file of torch.save before 1.6 begins.

    The pickles are a magic number, a version, the system, the object, and the keys of the storages that follow.
    """
    names: set[str] = set()
    with path.open("rb") as file:
        try:
            for _ in range(5):
                names |= globals_of_pickle(file)
        except ValueError as error:
            if names - GLOBALS:  # a refused name is a better message than a damaged file
                return names
            raise ModelFolderError(f"{path}: is not a file of torch.save: {brief(error)}") from None
    return names


def read_pickle(path: Path) -> Any:
    """Load what ``torch.save`` put into ``path``, zip or legacy; tensors are on the CPU, maybe views of the file.

    Raises ModelFolderError for a file that is missing, too large, not of torch.save, or that names something
    outside `GLOBALS`.
    """
    if torch.__version__ < "2.6":  # CVE-2025-32434: there weights_only=True could be made to run code
        raise ModelFolderError(f"{path}: pickles are read with torch 2.6 or newer; this is {torch.__version__}")
    if not path.is_file():
        raise ModelFolderError(f"{path}: there is no such file")
    refuse_lfs_pointer(path, path)
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise ModelFolderError(f"{path}: {size:,} bytes; at most {MAX_FILE_BYTES:,} are read")
    with path.open("rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"  # the test that torch.load uses
    names = globals_of_zip(path) if zipped else globals_of_legacy(path)
    refused = sorted(name.replace(" ", ".") for name in names - GLOBALS)
    if refused:
        raise ModelFolderError(f"{path}: names {shorten(summary(refused))}; {ADVICE}")
    try:
        with torch.serialization.safe_globals([Namespace, Dictionary]):
            return torch.load(str(path), map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # damage can cause any error in torch: KeyError, AssertionError, ...
        raise ModelFolderError(f"{path}: cannot be read: {brief(error)}") from None


def copied_tensors(path: Path, state: Any) -> dict[str, Tensor]:
    """Copy the tensors of a state dict that `read_pickle` returned, each into separate memory.

    Raises ModelFolderError for anything that is not a plain tensor on the CPU, and for tensors with more elements
    than the file holds for them: a view may show one number a billion times.
    """
    if not isinstance(state, Mapping) or not state or not all(isinstance(key, str) for key in state):
        raise ModelFolderError(f"{path}: holds no state dict: a {type(state).__name__}, not tensors by name")
    most, total = path.stat().st_size, 0
    for key, tensor in state.items():
        named = f"{path}: {key[:200]}"
        if type(tensor) not in (Tensor, torch.nn.Parameter):
            raise ModelFolderError(f"{named} is a {type(tensor).__name__}; expected a tensor")
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise ModelFolderError(f"{named} is {tensor.layout} on {tensor.device}; expected a plain tensor")
        shown, held = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
        total += shown
        if shown > held or held > most or total > 2 * most:  # twice, since tied weights have two names
            shape = tuple(tensor.shape)
            raise ModelFolderError(f"{named} has shape {shape}, more than the file's {most:,} bytes hold")
    return {key: tensor.detach().clone(memory_format=torch.contiguous_format) for key, tensor in state.items()}

"""Read the tensors of a model folder into a model, and translate the keys of other libraries.

The layout is Hugging Face's: ``config.json`` and ``model.safetensors`` (or shards named by
``model.safetensors.index.json``). Folders of its classes of wav2vec 2.0, HuBERT, WavLM and data2vec-audio can be
loaded (the models themselves, ForPreTraining, ForCTC, ForSequenceClassification), with and without the prefix of
the base model, and with both names of weight norm. Its classes can load the folders written here.

A folder is untrusted input. Only safetensors are read, never a pickle; sizes are checked before anything is
allocated; names in the folder cannot lead out of it.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ser.errors import ConfigError, ModelFolderError, brief_repr, pip_line, shorten, summary
from ser.files import is_lfs_pointer, open_tensors
from ser.models.config import ARCHITECTURES, Wav2Vec2Config
from ser.models.heads import HEADS
from ser.models.wav2vec2 import Wav2Vec2

MAX_JSON_BYTES = 4 * 2**20
MAX_HEADER_BYTES = 4 * 2**20  # in a safetensors file; 1,000 tensors need 0.1 MB
MAX_PARAMETERS = 2_500_000_000  # 10 GB in float32; the largest public encoder, XLS-R 2B, has 2.2 * 10^9

# Old keys of weight norm -> new keys, of the parametrization, which we write.
WEIGHT_NORM = {
    "encoder.pos_conv_embed.conv.weight_g": "encoder.pos_conv_embed.conv.parametrizations.weight.original0",
    "encoder.pos_conv_embed.conv.weight_v": "encoder.pos_conv_embed.conv.parametrizations.weight.original1",
}

# Parts that wrappers add to keys, anywhere (DataParallel, torch.compile, FSDP, activation checkpointing) or at the
# beginning (Lightning, speechbrain, PEFT); and the names of PEFT's adapters.
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
OUTER_WRAPPERS = ("base_model.model.", "model.")
ADAPTERS = {"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", "base_layer"} | {
    "modules_to_save", "original_module", "ia3_l", "hada_w1_a", "lokr_w1", "oft_r", "boft_R", "vera_lambda_b",
}  # fmt: skip

# All other names of keys -> ours.
SPELLINGS = WEIGHT_NORM | {
    # ForSequenceClassification's head, of emotions or dimensions: see `ser.folder`
    "classifier.weight": "cls_head.weight",
    "classifier.bias": "cls_head.bias",
    # the head of Wagner et al. (audEERING), of dimensions, and of ForSpeechClassification, of emotions
    "classifier.dense.weight": "dimension_head.dense.weight",
    "classifier.dense.bias": "dimension_head.dense.bias",
    "classifier.out_proj.weight": "dimension_head.out_proj.weight",
    "classifier.out_proj.bias": "dimension_head.out_proj.bias",
    # the speaker head of followers of Cai et al.
    "spk_head.weight": "speaker_head.weight",
    "spk_head.bias": "speaker_head.bias",
}

# Files that say how sound is preprocessed; the first one that does so counts (`ser.folder`).
PREPROCESSORS = ("processor_config.json", "preprocessor_config.json")

# Tensors for pre-training, which are not read. Any other tensor that the configuration does not ask for is
# refused, since then configuration and weights disagree.
PRETRAINING_PARTS = ("quantizer.", "project_hid.", "project_q.", "dropout_features.")


@dataclass
class LoadReport:
    """Report which tensors were loaded from a folder. ``print(report)`` is readable."""

    folder: Path
    matched: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)  # in the model, not in the folder: initialised at random
    unused: list[str] = field(default_factory=list)  # in the folder, not used by this model
    ignored_settings: list[str] = field(default_factory=list)  # keys of config.json that are not the encoder's
    notes: list[str] = field(default_factory=list)  # what its files lack or contradict, and what was used instead

    def __str__(self) -> str:
        loaded = f"{len(self.matched)} tensors loaded" if self.matched else "random weights"
        lines = [f"{self.folder}: {loaded}"]
        if self.new:
            lines.append(f"  {len(self.new)} newly initialised: {', '.join(self.new)}")
        if self.unused:
            lines.append(f"  {len(self.unused)} not used: {summary(self.unused)}")
        lines += [f"  {note}" for note in self.notes]
        return "\n".join(lines)


# ---------------------------------------------------------------------------------------------- reading


def exists(path: Path) -> bool:
    """Tell whether a path exists; False also for an impossible name, for which Path.exists raises an error."""
    return os.path.exists(path)  # noqa: PTH110


def refuse_lfs_pointer(path: Path, target: Path) -> None:
    """Raise ModelFolderError if ``target``, the file behind ``path``, is a pointer of git-lfs."""
    if is_lfs_pointer(target):
        raise ModelFolderError(
            f"{path}: is a pointer of git-lfs, which stands in place of the file itself; fetch it: run "
            f"`git lfs pull` in {path.parent}"
        )


def resolve_inside(folder: Path, name: str) -> Path:
    """Follow links to the regular file ``name`` of ``folder``, and refuse a file outside the folder.

    The only exception is the hub's cache, where ``snapshots/<commit>/config.json`` is a link into ``blobs/`` of
    the same repository.
    """
    if Path(name).name != name:
        raise ModelFolderError(
            f"{folder}: {brief_repr(name, 200)} is not a plain file name; files outside the folder are not read"
        )
    path = folder / name
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as error:  # ValueError: a NUL in the name
        raise ModelFolderError(
            f"{path}: cannot be read ({error.__class__.__name__}: missing, or a broken or looping link?)"
        ) from None
    home = folder.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if target.parent not in (home, blobs):
        raise ModelFolderError(
            f"{path}: links to {target}, outside the model folder; copy the file into the folder"
        )
    if not target.is_file():
        raise ModelFolderError(f"{path}: is not a regular file")
    return target


def read_json(folder: Path, name: str) -> dict:
    """Read a JSON object from a file of the folder, if the file is not too large."""
    path = resolve_inside(folder, name)
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise ModelFolderError(f"{folder / name}: {size:,} bytes; at most {MAX_JSON_BYTES:,} are read")
    try:
        refuse_lfs_pointer(folder / name, path)
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelFolderError(f"{folder / name}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ModelFolderError(f"{folder / name}: is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelFolderError(f"{folder / name}: holds a {type(value).__name__}; expected an object")
    return value


def stands_in(folder: Path, name: str) -> bool:
    """Tell whether the folder has such an entry; a broken link counts, since it is reported as an error."""
    return os.path.lexists(folder / name)


SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")


def is_hub_name(name: str) -> bool:
    """Tell whether a name looks like the OWNER/NAME of a repository on the Hugging Face hub."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None and len(name) < 200


def refuse_adapter(folder: Path) -> None:
    """Raise ModelFolderError if PEFT saved only adapters, without the model that they belong to."""
    if stands_in(folder, "adapter_config.json"):
        raise ModelFolderError(
            f"{folder}: holds an adapter of PEFT (adapter_config.json) and not the model that it changes; {MERGE}"
        )


def check_folder(folder: str | Path) -> Path:
    """Return ``folder`` as a Path, or raise an error that says why it is not a model folder."""
    folder = Path(folder)
    if not exists(folder):
        raise ModelFolderError(f"{shorten(str(folder))}: there is no such folder")
    if not folder.is_dir():
        raise ModelFolderError(f"{folder}: is a file; expected a folder with config.json and model.safetensors")
    if not stands_in(folder, "config.json"):
        refuse_adapter(folder)
        entries = summary(sorted(p.name for p in folder.iterdir())) or "nothing"
        raise ModelFolderError(f"{folder}: has no config.json, so it is not a model folder; it holds {entries}")
    return folder


def hub_folder(name: str, revision: str | None, *, cached: bool, pickled: bool = False) -> Path:
    """Return the folder of a repository in the hub's cache; unless ``cached``, first download what it lacks.

    Only config files and safetensors are downloaded; with ``pickled`` also pytorch_model.bin. The hub's client
    raises its own errors; if a repository is not in the cache, an OSError or ValueError.
    """
    try:
        from huggingface_hub import snapshot_download
    except Exception as error:  # missing, or broken by one of its own requirements
        raise ModelFolderError(
            f"{name}: there is no such folder; were it a name on the Hugging Face hub, the package "
            f"huggingface_hub would be needed: {pip_line('hub')} ({type(error).__name__}: {error})"
        ) from None
    patterns = ["*.json", "model*.safetensors", *(["pytorch_model*.bin"] if pickled else [])]
    return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=cached))


def holds_any(folder: Path, names: Iterable[str]) -> bool:
    """Tell whether the folder has an entry of one of these names."""
    return any(stands_in(folder, name) for name in names)


def has_weights(folder: Path, *, pickles: bool) -> bool:
    """Tell whether the folder has safetensors, or with ``pickles`` a pytorch_model.bin.

    The index of pickles does not count, since it is downloaded with the config files, before the pickles.
    """
    return holds_any(folder, SAFETENSORS) or (pickles and any(folder.glob("pytorch_model*.bin")))


def fetch_folder(name: str, revision: str | None, *, pickles: bool) -> Path:
    """Download a repository from the Hugging Face hub; with ``pickles``, take those if it has no safetensors."""
    try:
        folder = hub_folder(name, revision, cached=False)
        if pickles and not holds_any(folder, SAFETENSORS):
            folder = hub_folder(name, revision, cached=False, pickled=True)
    except ModelFolderError:
        raise
    except Exception as error:  # the hub's client raises its own errors and those of its HTTP library
        reason = str(error).strip().partition("\n")[0]
        at = f" at revision {revision}" if revision else ""
        raise ModelFolderError(
            f"{name}: there is no such folder, and the Hugging Face hub could not give it{at}: {reason}"
        ) from None
    if not has_weights(folder, pickles=pickles):
        refuse_adapter(folder)
    if not pickles and not holds_any(folder, SAFETENSORS):
        raise ModelFolderError(
            f"{name}: the repository on the Hugging Face hub has no model.safetensors, and of it config files and "
            "safetensors alone are fetched. Where it has pytorch_model.bin, a pickle, this makes a folder of it: "
            f"ser convert {name} FOLDER"
        )
    return folder


def find_folder(name: str | Path, *, revision: str | None = None, pickles: bool = False) -> Path:
    """Find the model folder called ``name``: a path, or else OWNER/NAME on the Hugging Face hub.

    Only config files and safetensors are downloaded, into the hub's cache. If they are in the cache, the hub is
    not asked. ``revision`` is a branch, tag or commit; a commit never changes. With ``pickles``, for conversion,
    pytorch_model.bin is downloaded if a repository has no safetensors.

    Raises ModelFolderError, which says why there is no model folder.
    """
    path = Path(name)
    if exists(path) or not (isinstance(name, str) and is_hub_name(name)):
        if revision is not None:
            raise ModelFolderError(
                f"{shorten(str(name))}: is no name on the hub, so it has no revision {revision}"
            )
        return check_folder(path)
    try:
        cached = hub_folder(name, revision, cached=True)
    except (OSError, ValueError):
        cached = None
    # Other programs may leave an incomplete folder in the cache, without the preprocessor's file.
    if cached is not None and holds_any(cached, PREPROCESSORS) and has_weights(cached, pickles=pickles):
        return check_folder(cached)
    return check_folder(fetch_folder(name, revision, pickles=pickles))


def read_encoder_config(folder: Path) -> tuple[Wav2Vec2Config, dict]:
    """Read the encoder's configuration, and the whole of config.json."""
    values = read_json(folder, "config.json")
    try:
        config = Wav2Vec2Config.from_dict(values)
        hop, first = math.prod(config.conv_stride), config.min_samples
        if not 8 <= hop <= 16_000 or first > 160_000:  # memory depends on it, and no tensor's shape limits it
            raise ConfigError(
                f"conv_stride is {config.conv_stride}: a frame per {hop:,} samples, the first after {first:,}; "
                "8 to 16,000 and up to 160,000 are computed (published models: 320 and 400)"
            )
        return config, values
    except (ConfigError, OverflowError) as error:  # OverflowError: a whole number beyond any float
        raise ModelFolderError(f"{folder / 'config.json'}: {shorten(str(error))}") from None


def opened(path: Path):
    """Call `open_tensors`, with errors that name the file, and a limit for the size of the header."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
        refuse_lfs_pointer(path, path)
    except OSError as error:
        raise ModelFolderError(f"{path}: cannot be read: {error.strerror}") from None
    if MAX_HEADER_BYTES < size < path.stat().st_size:
        raise ModelFolderError(f"{path}: its header has {size:,} bytes; at most {MAX_HEADER_BYTES:,} are read")
    try:
        return open_tensors(path)
    except (SafetensorError, OSError, ValueError) as error:
        head = path.open("rb").read(2)
        pickled = head == b"PK" or (head[:1] == b"\x80" and head[1:] in b"\2\3\4\5")
        kind = " (it is a zip or a pickle under another name, which is never read)" if pickled else ""
        raise ModelFolderError(f"{path}: is not a sound safetensors file{kind}: {error}") from None


def refuse_adapters(path: Path, keys: Iterable[str]) -> None:
    """Raise ModelFolderError if a file has PEFT's adapters beside the weights that they change."""
    adapters = [key for key in keys if not ADAPTERS.isdisjoint(key.split("."))]
    if adapters:
        raise ModelFolderError(
            f"{path}: {len(adapters)} tensors are adapters of PEFT: {summary(adapters, 3)}; {MERGE}"
        )


def without_wrappers(key: str) -> str:
    """Remove the parts in `WRAPPERS` from a checkpoint's key."""
    return ".".join(part for part in key.split(".") if part not in WRAPPERS)


def unwrapped(key: str) -> str:
    """Remove everything that wrappers add from a checkpoint's key."""
    key = without_wrappers(key)
    while key.startswith(OUTER_WRAPPERS):
        for prefix in OUTER_WRAPPERS:
            key = key.removeprefix(prefix)
    return key


def canonical_name(key: str) -> str:
    """Return our name for a checkpoint's key, without the base model's prefix."""
    key = unwrapped(key)
    for architecture in ARCHITECTURES.values():
        key = key.removeprefix(architecture.prefix)
    return SPELLINGS.get(key, key)


class TensorFiles:
    """Hold the names of the tensors in a folder's safetensors files, and read tensors on demand.

    ``names`` maps each tensor's canonical name (encoder names without prefix, new names of weight norm) to its
    file and key.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: dict[str, tuple[Path, str]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        stray = {}
        for path in self._files():
            with opened(path) as file:
                for key in file.keys():  # noqa: SIM118 (a handle, not a dict)
                    name = canonical_name(key)
                    if name in self.names:
                        stray[name] = (self.names[name][1], key)
                    self.names[name] = (path, key)
                    self.shapes[name] = tuple(file.get_slice(key).get_shape())
        refuse_adapters(folder, (key for _, key in self.names.values()))
        if stray:
            listed = summary(f"{a} and {b}" for a, b in stray.values())
            raise ModelFolderError(f"{folder}: tensors that mean the same stand there twice: {listed}")

    def _files(self) -> list[Path]:
        folder = self.folder
        if stands_in(folder, "model.safetensors"):
            return [resolve_inside(folder, "model.safetensors")]
        index = "model.safetensors.index.json"
        if stands_in(folder, index):
            weight_map = read_json(folder, index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
                raise ModelFolderError(f"{folder / index}: has no weight_map of tensor names to file names")
            shards = sorted(set(weight_map.values()))
            missing = [name for name in shards if Path(name).name == name and not stands_in(folder, name)]
            if missing:
                raise ModelFolderError(f"{folder}: shards named by {index} are missing: {summary(missing)}")
            return [resolve_inside(folder, name) for name in shards]
        refuse_adapter(folder)
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"))
        advice = f"; {', '.join(pickles)} is a pickle, which can run code, so it is not read here; "
        advice += "`ser convert` takes nothing but the tensors out of it"
        raise ModelFolderError(f"{folder}: has no model.safetensors{advice if pickles else ''}")

    def move(self, old: str, new: str) -> None:
        """Rename the tensors of the part ``old`` (such as cls_head), if config.json gives them to another part."""
        for name in [name for name in self.names if name.startswith(f"{old}.")]:
            renamed = name.replace(old, new, 1)
            self.names[renamed], self.shapes[renamed] = self.names.pop(name), self.shapes.pop(name)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read the named tensors as float32.

        Each tensor is copied, because safetensors only maps the file: if the file were truncated later, SIGBUS
        would kill the process. The file is opened for each tensor, which unmaps the last one, so that file and
        copies are not both in memory. Two tensors are read at a time, since most of the time is waiting for pages.
        """

        def read(name: str) -> Tensor:
            path, key = self.names[name]
            with opened(path) as file:
                tensor = file.get_tensor(key)
                if name.endswith(".num_batches_tracked"):  # a counter of batch norm, which has no effect
                    return tensor.to(torch.int64, copy=True)
                if not tensor.is_floating_point():
                    raise ModelFolderError(f"{path}: {name} holds {tensor.dtype}; expected floating point")
                return tensor.to(torch.float32, copy=True)

        names = list(names)
        with ThreadPoolExecutor(2) as pool:
            return dict(zip(names, pool.map(read, names), strict=True))


MERGE = "merge it into the model with PEFT first (merge_and_unload(), then save_pretrained)"


def written_names(names: Iterable[str], config: Wav2Vec2Config, *, classifier: str | None) -> dict[str, str]:
    """Map the names of a `MultiTaskModel`'s tensors to the keys that `transformers` uses.

    ``classifier`` is the part that ForSequenceClassification has as its head, such as cls_head.
    """
    keys = {name: name.replace("wav2vec2.", config.architecture.prefix, 1) for name in names}
    if classifier:
        head = f"{classifier}."
        keys |= {name: name.replace(head, "classifier.", 1) for name in keys if name.startswith(head)}
    return keys


def is_finite(tensor: Tensor) -> bool:
    """Tell whether all elements are finite. A finite sum proves it in one pass; else each element is checked."""
    return math.isfinite(float(tensor.sum())) or bool(torch.isfinite(tensor).all())


def fill(module: nn.Module, files: TensorFiles, report: LoadReport, names: Iterable[str] | None = None) -> None:
    """Load the tensors of ``module`` (on the meta device) called ``names`` (None: all) from the files.

    Raises ModelFolderError with one list of all missing and misshapen tensors.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    expected = shapes if names is None else {name: shapes[name] for name in names}
    # Old checkpoints lack the mask embedding, which matters only in training.
    new = {"masked_spec_embed"} & (expected.keys() - files.shapes.keys())
    told = {name: f"found {shape}" for name, shape in files.shapes.items()}
    problems = [
        f"{name}: {told.get(name, 'missing')}, expected {shape}"
        for name, shape in expected.items()
        if files.shapes.get(name) != shape and name not in new
    ]
    if problems:
        listed = "\n  ".join(problems)
        raise ModelFolderError(
            f"{files.folder}: {len(problems)} of {len(expected)} tensors do not fit config.json:\n  {listed}"
        )
    count = sum(math.prod(shape) for shape in expected.values())
    if count > MAX_PARAMETERS:  # a sparse file may be large without taking space on the disk
        raise ModelFolderError(f"{files.folder}: {count:,} parameters; at most {MAX_PARAMETERS:,} are loaded")
    tensors = files.read(name for name in expected if name not in new)
    infinite = [name for name, tensor in tensors.items() if not is_finite(tensor)]
    if infinite:
        raise ModelFolderError(f"{files.folder}: tensors hold NaN or infinity: {summary(infinite)}")
    report.matched += tensors
    report.new += new
    tensors |= {name: torch.empty(expected[name]).uniform_() for name in new}
    module.load_state_dict(tensors, assign=True, strict=names is None)


def head_parts() -> tuple[str, ...]:
    """Return the prefixes of tensors that are on top of the encoder."""
    return ("layer_weights", "projector.", "pooling.", *(f"{row.key}." for row in HEADS.values()))


def fill_encoder(encoder: Wav2Vec2, files: TensorFiles, report: LoadReport) -> None:
    """Call `fill` for the encoder, and refuse encoder tensors that the configuration does not ask for."""
    own = set(encoder.state_dict())
    left = [name for name in files.names if name not in own]
    strange = [n for n in left if n != "masked_spec_embed" and not n.startswith(head_parts() + PRETRAINING_PARTS)]
    if strange:
        raise ModelFolderError(
            f"{files.folder}: {len(strange)} tensors that config.json does not ask for (does it belong to these "
            f"weights?): {summary(strange)}"
        )
    fill(encoder, files, report)
    report.unused += left


Built = TypeVar("Built", bound=nn.Module)


class Unfilled(TorchFunctionMode):
    """Skip the operations that compute the initial values of a module, on the meta device.

    torch can run them there only with its tracer, whose 900 modules take 2 s to import.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init":
            return None  # these functions work in place, and nobody uses what they return
        if func in (torch.Tensor.normal_, torch.randn_like, torch.Tensor.mul, torch._weight_norm):
            return args[0].detach()  # which has the same shape
        if func is torch.norm_except_dim:
            values, _, dim = args
            return values.new_empty([size if i == dim else 1 for i, size in enumerate(values.shape)])
        return func(*args, **(kwargs or {}))


def materialise(build: Callable[[], Built]) -> Built:
    """Run ``build`` on the meta device: the modules take no memory until tensors are assigned."""
    with torch.device("meta"), Unfilled():
        return build()


def load_encoder(
    folder: str | Path, *, device: str | torch.device = "cpu", report: bool = False, revision: str | None = None
):
    """Load an encoder (wav2vec 2.0, HuBERT, WavLM or data2vec-audio) from a model folder.

        encoder = ser.load_encoder("wav2vec2-base")
        hidden, num_frames = encoder(waveforms, num_samples)

    Args:
        folder: as `ser` or a class of `transformers` saved it, or its OWNER/NAME on the Hugging Face hub.
        device: where to put the encoder.
        report: also return the `LoadReport`.
        revision: branch, tag or commit on the hub.

    Returns:
        a `Wav2Vec2` in eval mode, float32; with ``report`` a pair of encoder and report.

    Raises:
        ModelFolderError: the folder, its configuration or its tensors are invalid; the message lists every
            missing or unexpected tensor, and every wrong shape.
    """
    folder = find_folder(folder, revision=revision)
    config, values = read_encoder_config(folder)
    encoder = materialise(lambda: Wav2Vec2(config))
    loaded = LoadReport(folder, ignored_settings=sorted(set(values) - set(config.to_dict())))
    fill_encoder(encoder, TensorFiles(folder), loaded)
    encoder.eval().to(device)
    return (encoder, loaded) if report else encoder

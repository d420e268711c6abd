"""Raise an error that explains where memory ran out: on which utterances, and what helps."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from errno import ENOMEM

import torch

from ser.audio import SAMPLE_RATE
from ser.data.dataset import Batch
from ser.errors import ResourceError

# Advice where memory ran out outside of a batch.
SMALLER_MODEL = (
    "A smaller micro-batch does not help here: train fewer parameters (--freeze feature-encoder, or encoder), "
    "take a smaller --init, end other programs, or use a machine with more memory; a run that has a checkpoint "
    "continues from it"
)
SIGNS_OF_NO_MEMORY = ("out of memory", "allocate memory", "ALLOC_FAILED")  # of the CPU, CUDA and cuBLAS


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory ran out, on the GPU or on the machine."""
    if isinstance(error, OSError):  # for example, when a process is started
        return error.errno == ENOMEM
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or (isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS_OF_NO_MEMORY))


def utterances_at_work(batch: Batch, names: Sequence[str]) -> str:
    """Say how many utterances a batch has, how long they are, and which."""
    seconds = [n / SAMPLE_RATE for n in batch.num_samples.tolist()]
    held = ", ".join(
        f"{names[i] if names else f'utterance {i}'} ({s:.1f} s)"
        for i, s in zip(batch.indices, seconds, strict=True)
    )
    return f"{len(seconds)} utterance{'s' if len(seconds) > 1 else ''} padded to {max(seconds):.1f} s: {held}"


@contextmanager
def memory_explained(
    advice: str, batch: Batch | None = None, names: Sequence[str] = (), *, doing: str = ""
) -> Iterator[None]:
    """Raise ResourceError if memory runs out in this context: on which utterances or task, and what helps."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        if batch is not None:
            doing = f"with {utterances_at_work(batch, names)}"
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise ResourceError(f"out of memory {doing}. {advice}. ({reason})") from error

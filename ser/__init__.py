"""Speech emotion recognition: wav2vec 2.0 from scratch, with emotion, text and speaker heads trained together.

import ser

recognizer = ser.load("runs/demo/best")
prediction, = recognizer.predict("speech.wav")

encoder = ser.load_encoder("wav2vec2-base")
hidden, num_frames = encoder(waveforms, num_samples)
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ser.audio import SAMPLE_RATE, load_audio
    from ser.errors import SerError
    from ser.models.pretrained import load_encoder
    from ser.recognizer import Prediction, Recognizer, load

__version__ = "0.1.0"
__all__ = ["SAMPLE_RATE", "Prediction", "Recognizer", "SerError", "load", "load_audio", "load_encoder"]

# A public name is imported when it is first used, so `ser --help` need not import torch.
_PLACES = {
    "SAMPLE_RATE": "ser.audio",
    "Prediction": "ser.recognizer",
    "Recognizer": "ser.recognizer",
    "SerError": "ser.errors",
    "load": "ser.recognizer",
    "load_audio": "ser.audio",
    "load_encoder": "ser.models.pretrained",
}


def __getattr__(name: str) -> Any:
    """Import a public name, or a module of the package such as `ser.errors`."""
    if name in _PLACES:
        value = getattr(import_module(_PLACES[name]), name)
        globals()[name] = value  # from now on it is found without this function
        return value
    if name.isidentifier() and not name.startswith("_") and find_spec(f"ser.{name}") is not None:
        return import_module(f"ser.{name}")
    raise AttributeError(f"module 'ser' has no attribute {name!r}")


def __dir__() -> list[str]:
    """List all public names, imported or not."""
    return sorted({*globals(), *__all__})

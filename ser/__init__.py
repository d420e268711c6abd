"""Speech emotion recognition: wav2vec 2.0 from scratch, with emotion, text and speaker heads trained together.

import ser

recognizer = ser.load("runs/demo/best")
prediction, = recognizer.predict("speech.wav")

encoder = ser.load_encoder("wav2vec2-base")
hidden, num_frames = encoder(waveforms, num_samples)
"""

from ser.audio import SAMPLE_RATE, load_audio
from ser.errors import SerError
from ser.models.pretrained import load_encoder
from ser.recognizer import Prediction, Recognizer, load

__version__ = "0.1.0"
__all__ = [
    "SAMPLE_RATE",
    "Prediction",
    "Recognizer",
    "SerError",
    "load",
    "load_audio",
    "load_encoder",
]

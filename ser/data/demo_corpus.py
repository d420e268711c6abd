"""Make the demonstration corpus: synthetic speech with emotions by rule, in well under a minute on one core.

`ser demo` makes it and trains on it; `ser demo --corpus-only --data FOLDER` only makes it. It needs the extra
`demo`.

espeak-ng speaks sentences of a small grammar ("bring two red boxes now") with English voices, at 22.05 kHz. An
emotion is a rule for rate, pitch, pitch range and loudness with a random spread, so classes overlap. IT IS NOT
HUMAN SPEECH: the corpus shows that training, checkpoints and scores work, and a figure measured on it says nothing
about people. Its README, its corpus.json and every speaker's name say so too.

There are four manifests, with the columns file, emotion, text, speaker, id, voice, rate, pitch, range, volume. No
sentence is in two of them, and every word of the last three is in the first:

    train.csv   the training voices
    valid.csv   the training voices: choose the best model here
    known.csv   the training voices: score the speaker head here
    test.csv    voices that are in no other part: score emotions and transcripts of new voices and sentences here

The same seed, size, espeak-ng and machine give the same bytes. A complete corpus of the same parameters is kept,
an incomplete one is made again, and a folder that holds anything else is refused and not changed.
"""

import contextlib
import ctypes
import dataclasses
import io
import json
import os
import random
import shutil
import tempfile
import wave
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from tqdm import tqdm

from ser.data.manifest import Utterance, write_manifest
from ser.errors import ConfigError, SerError, pip_line
from ser.files import write_json

RECIPE = 1  # to be raised after a change of the code below that the parameters in corpus.json do not show
NOTICE = "SYNTHETIC: spoken by espeak-ng, emotions by rule. Not human speech; figures say nothing about people."

# One word of each slot, "" for none: 22 words, 2,400 sentences of 3 to 5 words.
GRAMMAR = (
    ("bring", "take", "show", "move"),
    ("", "two", "five", "seven", "nine"),
    ("red", "blue", "green", "yellow", "black"),
    ("boxes", "lamps", "chairs", "spoons", "apples", "flowers"),
    ("", "now", "today", "please"),
)

# Voices are espeak-ng's "accent+variant"; half of each part is female. The accents of the test voices occur in
# training. Their variants do not, and none sounds almost like a training variant (as belinda and linda do).
TRAIN_VOICES = (
    *("en-us+f2", "en+f4", "en-gb-scotland+f1", "en-029+steph", "en-us-nyc+Annie", "en-gb-x-rp+f3"),
    *("en-us+m3", "en+m7", "en-gb-scotland+m1", "en-029+victor", "en-us-nyc+klatt4", "en-gb-x-rp+m4"),
)
TEST_VOICES = ("en+linda", "en-gb-x-rp+f5", "en-gb-scotland+max", "en-us+robert")

# The number of sentences of each part if training has 24, and the voices that say them.
PARTS = {
    "train": (24, TRAIN_VOICES),
    "valid": (3, TRAIN_VOICES),
    "known": (3, TRAIN_VOICES),
    "test": (5, TEST_VOICES),
}

# How an emotion sounds: (mean, standard deviation) of four settings of espeak-ng, and the limits of drawn values.
# Pitch and range are relative to the voice (50: unchanged), rate is in words per minute, volume in per cent.
LIMITS = {"rate": (80, 450), "pitch": (0, 100), "range": (0, 100), "volume": (20, 150)}
STYLES = {
    "neutral": {"rate": (175, 10), "pitch": (45, 6), "range": (40, 8), "volume": (60, 6)},
    "happy": {"rate": (190, 12), "pitch": (70, 8), "range": (85, 10), "volume": (70, 7)},
    "angry": {"rate": (235, 14), "pitch": (50, 7), "range": (65, 10), "volume": (90, 9)},
    "sad": {"rate": (130, 10), "pitch": (32, 6), "range": (15, 7), "volume": (45, 5)},
}


@dataclasses.dataclass(frozen=True)
class Turn:
    """Hold one row of a manifest: text, voice and settings. `file` is relative to the corpus folder."""

    file: str
    emotion: str
    text: str
    speaker: str
    voice: str
    rate: int
    pitch: int
    range: int
    volume: int

    def utterance(self, folder: Path) -> Utterance:
        """Return the row as a manifest in `folder` has it."""
        file = folder.absolute() / self.file
        extra = {name: str(getattr(self, name)) for name in ("voice", *LIMITS)}
        return Utterance(file.stem, file, emotion=self.emotion, text=self.text, speaker=self.speaker, extra=extra)


# --- what is said ----------------------------------------------------------------------------------------------


def deal_sentences(count: int, taken: set[str], rng: random.Random) -> list[str]:
    """Make `count` new sentences in which the words of a slot are equally frequent; add them to `taken`."""
    columns = [[slot[i % len(slot)] for i in range(count)] for slot in GRAMMAR]
    for column in columns:
        rng.shuffle(column)

    def sentences() -> list[str]:
        return [" ".join(filter(None, row)) for row in zip(*columns, strict=True)]

    # A sentence that exists already is changed by swapping a word between two rows. This keeps the counts of
    # words, so training still has every word.
    new = len(set(sentences()) - taken)
    while new < count:
        column, i, j = rng.choice(columns), rng.randrange(count), rng.randrange(count)
        column[i], column[j] = column[j], column[i]
        before, new = new, len(set(sentences()) - taken)
        if new < before:
            column[i], column[j] = column[j], column[i]
            new = before
    taken.update(sentences())
    return sentences()


def draw_settings(emotion: str, rng: random.Random) -> dict[str, int]:
    """Draw the settings of espeak-ng for a turn."""
    return {
        name: round(min(max(rng.gauss(*STYLES[emotion][name]), low), high)) for name, (low, high) in LIMITS.items()
    }


def plan(seed: int, size: int) -> dict[str, list[Turn]]:
    """Return the turns of each manifest.

    Every sentence occurs in all four emotions, so words do not predict the emotion.
    """
    rng = random.Random(f"ser demo corpus {seed}")
    taken: set[str] = set()
    corpus: dict[str, list[Turn]] = {}
    for part, (share, voices) in PARTS.items():
        sentences = deal_sentences(size * share // 24, taken, rng)
        turns: list[Turn] = []
        for emotion in STYLES:
            cast = [voices[(len(turns) + i) % len(voices)] for i in range(len(sentences))]
            rng.shuffle(cast)
            for text, voice in zip(sentences, cast, strict=True):
                file = f"wav/{part}-{len(turns):04d}.wav"
                speaker = "synthetic-" + voice.replace("+", "-")
                turns.append(Turn(file, emotion, text, speaker, voice, **draw_settings(emotion, rng)))
        corpus[part] = turns
    return corpus


# --- who says it -----------------------------------------------------------------------------------------------


class Espeak:
    """Call espeak-ng through ctypes. After each `open_espeak`, the same calls give the same samples."""

    SYNCHRONOUS, DO_NOT_EXIT, UTF8 = 2, 0x8000, 1
    PARAMETERS: ClassVar = {"rate": 1, "volume": 2, "pitch": 3, "range": 4}

    def __init__(self, library: Path, data_parent: Path) -> None:
        try:
            self.library = ctypes.CDLL(str(library))
        except OSError as error:
            raise SerError(
                f"cannot load espeak-ng from a temporary folder ({error}): try another TMPDIR"
            ) from error
        self.voices_folder = data_parent / "espeak-ng-data" / "voices" / "!v"
        self.sample_rate = self.library.espeak_Initialize(
            self.SYNCHRONOUS, 0, os.fsencode(data_parent), self.DO_NOT_EXIT
        )
        if self.sample_rate <= 0:
            raise SerError(f"espeak-ng cannot read its data through {data_parent}: reinstall espeakng-loader")
        self.library.espeak_Info.restype = ctypes.c_char_p
        self.version = self.library.espeak_Info(None).decode()
        self.chunks: list[bytes] = []
        # Python raises Ctrl-C in the main thread. If the callback ran there, ctypes would drop the exception.
        self.worker = ThreadPoolExecutor(max_workers=1)
        prototype = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
        self.callback = prototype(self.receive)  # kept alive here, since the library holds only its address
        self.library.espeak_SetSynthCallback(self.callback)

    def receive(self, samples: int | None, count: int, events: int) -> int:
        """Collect a piece of sound, and return 0, which lets the speech go on."""
        if samples and count > 0:
            self.chunks.append(ctypes.string_at(samples, 2 * count))
        return 0

    def check(self, status: int, action: str) -> None:
        """Raise SerError if a status is not 0."""
        if status != 0:
            raise SerError(f"espeak-ng {self.version} failed to {action}: status {status}, expected 0")

    def say(self, turn: Turn) -> np.ndarray:
        """Speak a turn: int16 samples at `self.sample_rate`, with at most 50 ms of silence around them."""
        variant = turn.voice.partition("+")[2]
        if not (self.voices_folder / variant).exists():  # espeak-ng would use the plain voice and say nothing
            raise SerError(f"espeak-ng {self.version} has no voice variant {variant!r} (of {turn.voice})")
        self.check(self.library.espeak_SetVoiceByName(turn.voice.encode()), f"find the voice {turn.voice}")
        for name, number in self.PARAMETERS.items():
            value = getattr(turn, name)
            self.check(self.library.espeak_SetParameter(number, value, 0), f"set {name} to {value}")
        self.chunks.clear()
        text = turn.text.encode()
        speech = self.worker.submit(self.library.espeak_Synth, text, len(text) + 1, 0, 1, 0, self.UTF8, None, None)
        self.check(speech.result(), f"say {turn.text!r}")
        samples = np.frombuffer(b"".join(self.chunks), dtype=np.int16)
        loud = np.flatnonzero(np.abs(samples.astype(np.int32)) > 0.01 * 2**15)
        margin = self.sample_rate // 20  # 50 ms of silence stay on either side
        if len(loud) < margin:
            raise SerError(f"espeak-ng {self.version} gave no sound for {turn.text!r} in {turn.voice}")
        return samples[max(loud[0] - margin, 0) : loud[-1] + margin]


@contextlib.contextmanager
def open_espeak(seed: int) -> Iterator[Espeak]:
    """Load a fresh espeak-ng from the package espeakng-loader.

    It is loaded from a copy in a short temporary folder, for two reasons. The library cuts the path of its data at
    160 bytes. And its static variables (such as the phase of the flutter) survive espeak_Terminate, so its sound
    would depend on earlier calls in this process; a new copy of the file starts with new variables.
    """
    try:
        import espeakng_loader

        source, data = espeakng_loader.get_library_path(), espeakng_loader.get_data_path()
    except Exception as error:  # the package is missing, or its library is for another system (OSError)
        raise SerError(
            f"the demonstration corpus needs espeak-ng: {pip_line('demo')} ({type(error).__name__}: {error})"
        ) from error
    with tempfile.TemporaryDirectory(prefix="ser-", ignore_cleanup_errors=True) as folder:
        if len(os.fsencode(folder)) > 100:
            raise SerError(f"espeak-ng needs a short temporary folder, not {folder}: set TMPDIR to a shorter one")
        library = Path(folder, "espeak-ng")
        shutil.copyfile(source, library)
        Path(folder, "espeak-ng-data").symlink_to(data, target_is_directory=True)
        espeak = Espeak(library, Path(folder))
        # Flutter, breath and roughness are random, and by default the library's seed is the time.
        espeak.library.espeak_ng_SetRandSeed(ctypes.c_long(seed))
        try:
            yield espeak
        finally:
            espeak.worker.shutdown()
            espeak.library.espeak_Terminate()


# --- the folder ------------------------------------------------------------------------------------------------


def parameters(seed: int, size: int) -> dict[str, Any]:
    """Return all parameters of the corpus, as JSON reads them back."""
    values = {"recipe": RECIPE, "seed": seed, "size": size, "grammar": GRAMMAR, "parts": PARTS, "styles": STYLES}
    return json.loads(json.dumps(values))


def claim(out: Path, wanted: dict[str, Any]) -> None:
    """Make the folder, or check that it is empty or holds a corpus of these parameters."""
    if out.exists() and not out.is_dir():
        raise SerError(f"{out} is a file, not the folder of a corpus: give another --out")
    out.mkdir(parents=True, exist_ok=True)
    if not any(out.iterdir()):
        return
    for name in ("corpus.json", "corpus.unfinished.json"):
        try:
            state = json.loads((out / name).read_text(encoding="utf-8"))
            notice, present = state["notice"], dict(state["parameters"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if notice == NOTICE:
            break
    else:
        raise SerError(
            f"{out} is not empty and holds no demonstration corpus, so it is left alone: give another --out"
        )
    for key, value in wanted.items():
        if present.get(key) != value:
            raise SerError(
                f"{out} holds a demonstration corpus with another {key} ({present.get(key)}; wanted {value}): "
                "give another --out, or remove that folder"
            )


def write_wav(path: Path, samples: np.ndarray, sample_rate: int) -> None:
    """Write int16 samples as a mono WAV file."""
    memory = io.BytesIO()
    with wave.open(memory, "wb") as file:
        file.setparams((1, 2, sample_rate, len(samples), "NONE", "not compressed"))
        file.writeframes(samples.astype("<i2").tobytes())
    path.write_bytes(memory.getvalue())


def readme(corpus: dict[str, list[Turn]], state: dict[str, Any]) -> str:
    """Return the README.md of the corpus."""
    rows = "".join(
        f"| {part}.csv | {len(turns)} | {len({turn.text for turn in turns})} "
        f"| {len({turn.voice for turn in turns})} | {state['seconds'][part] / 60:.1f} |\n"
        for part, turns in corpus.items()
    )
    return f"""# Synthetic demonstration corpus

**{NOTICE}**

Made by `ser demo` with espeak-ng {state["espeak_ng"]}: 16-bit mono WAV files of
{state["sample_rate"]} Hz in `wav/`. No sentence is in two parts, the voices of test.csv are in no other part, and
every sentence is said in every emotion. The parameters are in `corpus.json`.

| manifest | utterances | sentences | voices | minutes |
|---|---|---|---|---|
{rows}"""


def build_corpus(out: Path, seed: int = 0, size: int = 192, *, progress: bool = True) -> dict[str, list[Turn]]:
    """Make the corpus in `out`, or keep the corpus that is there. `size` is the number of training sentences.

    Returns:
        The turns of each manifest: train, valid, known, test.

    Raises:
        ConfigError: a seed or size out of range.
        SerError: `out` holds something else or a corpus of other parameters; espeak-ng is missing or fails.
    """
    if not 24 <= size <= 480:
        raise ConfigError(f"size {size}: expected 24 to 480 training sentences")
    if not 0 <= seed < 2**31:
        raise ConfigError(f"seed {seed}: expected 0 to {2**31 - 1}")
    corpus = plan(seed, size)
    state: dict[str, Any] = {"synthetic": True, "notice": NOTICE, "parameters": parameters(seed, size)}
    whole, unfinished = out / "corpus.json", out / "corpus.unfinished.json"
    claim(out, state["parameters"])
    files = [out / turn.file for turns in corpus.values() for turn in turns]
    files += [out / "README.md", *(out / f"{part}.csv" for part in corpus)]
    if whole.exists() and all(file.is_file() for file in files):
        return corpus

    # From here to the last line, the folder says that it holds an incomplete demonstration corpus.
    write_json(unfinished, state)
    whole.unlink(missing_ok=True)
    (out / "wav").mkdir(exist_ok=True)
    seconds = dict.fromkeys(corpus, 0.0)
    with open_espeak(seed) as espeak:
        state |= {"espeak_ng": espeak.version, "sample_rate": espeak.sample_rate}
        for part, turns in corpus.items():
            for turn in tqdm(turns, desc=f"speaking {part}", unit="turn", disable=not progress):
                samples = espeak.say(turn)
                write_wav(out / turn.file, samples, espeak.sample_rate)
                seconds[part] += len(samples) / espeak.sample_rate
            write_manifest(out / f"{part}.csv", (turn.utterance(out) for turn in turns))
    state["utterances"] = {part: len(turns) for part, turns in corpus.items()}
    state["seconds"] = {part: round(value, 1) for part, value in seconds.items()}
    (out / "README.md").write_text(readme(corpus, state), encoding="utf-8")
    write_json(unfinished, state)
    unfinished.replace(whole)
    return corpus

"""Make the data sheet of a corpus: decode and count its recordings before anything is trained on it."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tqdm import tqdm

from ser.audio import audio_info, load_audio
from ser.data.manifest import Utterance
from ser.data.release import Corpus, Dropped
from ser.data.text import clean
from ser.errors import AudioError, indented

SILENT = 0.001  # a lower peak counts as silence: -60 dB of full scale. Recorded speech is louder.
FULL_SCALE = 0.999
CLIPPED = 4  # this many neighbouring samples at full scale mean clipping; a single one may be a peak

MAX_SHOWN = 20  # how many ids or texts of a kind the Markdown shows; report.json has all


@dataclass(frozen=True)
class Sound:
    """Describe a recording.

    Attributes:
        seconds: the length of the utterance.
        sample_rate: the sample rate of the file in Hz.
        channels: the number of channels of the file.
        peak: the largest absolute sample, as `load_audio` returns it; full scale is 1.
        clipped: whether at least four neighbouring samples are at full scale.
        sha256: the digest of the decoded samples (16 kHz mono float32), which finds copies with another header.
    """

    seconds: float
    sample_rate: int
    channels: int
    peak: float
    clipped: bool
    sha256: str


def _sound(u: Utterance) -> Sound:
    """Decode a recording and describe it."""
    info = audio_info(u.file, start=u.start, end=u.end)
    samples = load_audio(u.file, start=u.start, end=u.end).numpy()
    level = np.abs(samples)
    full = np.flatnonzero(level >= FULL_SCALE)
    return Sound(
        seconds=info.seconds,
        sample_rate=info.sample_rate,
        channels=info.channels,
        peak=float(level.max()),
        # Four ascending indices are neighbours if the last one is the first plus three.
        clipped=bool((full[CLIPPED - 1 :] - full[: len(full) - CLIPPED + 1] == CLIPPED - 1).any()),
        sha256=hashlib.sha256(samples.astype("<f4").tobytes()).hexdigest(),
    )


def listen(corpus: Corpus, *, partial: bool = False, progress: bool = True) -> tuple[Corpus, dict[str, Sound]]:
    """Decode every recording of a corpus once.

    Args:
        corpus: a corpus from any reader.
        partial: drop utterances whose recording is unusable.
        progress: show a progress bar on a terminal.

    Returns:
        The corpus, whose utterances have a new column `sha256` (by which `protocols.audit` finds copies), and a
        mapping id -> `Sound`.

    Raises:
        AudioError: recordings are unusable, and not `partial` (the message lists all); or none is usable.
    """
    utterances, sounds, bad = [], {}, {}
    for u in tqdm(corpus.utterances, desc="reading audio", unit="file", disable=None if progress else True):
        try:
            sounds[u.id] = _sound(u)
            utterances.append(replace(u, extra={**u.extra, "sha256": sounds[u.id].sha256}))
        except AudioError as error:
            bad[u.id] = str(error)
    if bad and not (partial and utterances):
        raise AudioError(
            f"{corpus.root}: {len(bad)} of {len(corpus.utterances)} recordings cannot be used:"
            f"{indented(bad.values())}\nReplace them, or pass --partial to leave them out"
        )
    dropped = [*corpus.dropped, *(Dropped(id_, "unusable recording") for id_ in bad)]
    warnings = [*corpus.warnings, *bad.values()]
    return replace(corpus, utterances=utterances, dropped=dropped, warnings=warnings), sounds


def _transcripts(utterances: Iterable[Utterance]) -> dict[str, Any]:
    """Count the transcripts, and those that several speakers say."""
    said: dict[str, list[Utterance]] = defaultdict(list)
    for u in utterances:
        if text := clean(u.text or ""):
            said[text].append(u)
    shared = {text: rows for text, rows in said.items() if len({u.speaker for u in rows if u.speaker}) > 1}
    counts = {text: len(rows) for text, rows in shared.items()}
    return {
        "with_text": sum(map(len, said.values())),
        "different": len(said),
        "shared_across_speakers": len(shared),
        "utterances_with_shared": sum(counts.values()),
        "most_shared": dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))),
    }


def data_sheet(utterances: Iterable[Utterance], sounds: Mapping[str, Sound]) -> dict[str, Any]:
    """Collect facts about the data for report.json: counts, durations, and ids of suspicious recordings.

    Args:
        utterances: at least one.
        sounds: those of all utterances, as `listen` returns them.
    """
    utterances = sorted(utterances, key=lambda u: u.id)
    heard = [sounds[u.id] for u in utterances]
    seconds = np.array([sound.seconds for sound in heard])
    statistics = {"shortest": seconds.min(), "median": np.median(seconds)}
    statistics |= {"mean": seconds.mean(), "longest": seconds.max()}
    copies = defaultdict(list)
    labels: dict[str, Counter[str]] = defaultdict(Counter)
    for u in utterances:
        copies[sounds[u.id].sha256].append(u.id)
        labels[u.speaker or "unknown"][u.emotion or "unlabelled"] += 1
    return {
        "utterances": len(utterances),
        "hours": round(float(seconds.sum()) / 3600, 3),
        "seconds": {name: round(float(value), 3) for name, value in statistics.items()},
        "formats": dict(Counter(f"{s.sample_rate} Hz, {s.channels} channel(s)" for s in heard)),
        "emotions": dict(sorted(sum(labels.values(), Counter()).items())),
        "labels_per_speaker": {speaker: dict(sorted(labels[speaker].items())) for speaker in sorted(labels)},
        "silent": [u.id for u in utterances if sounds[u.id].peak < SILENT],
        "clipped": [u.id for u in utterances if sounds[u.id].clipped],
        "same_audio": [ids for ids in copies.values() if len(ids) > 1],
        "transcripts": _transcripts(utterances),
    }


def _some(items: Iterable[str]) -> str:
    """Write the first items after a colon, and how many more there are."""
    items = list(items)
    more = f" and {len(items) - MAX_SHOWN} more" if len(items) > MAX_SHOWN else ""
    return f": {', '.join(items[:MAX_SHOWN])}{more}" if items else ""


def sheet_to_markdown(sheet: Mapping[str, Any], title: str) -> str:
    """Write the result of `data_sheet` as Markdown."""
    seconds, text = sheet["seconds"], sheet["transcripts"]
    emotions = list(sheet["emotions"])
    rows = {**sheet["labels_per_speaker"], "all": sheet["emotions"]}
    lines = "\n".join(
        f"| {speaker} | {' | '.join(str(counts.get(e, 0)) for e in emotions)} | {sum(counts.values())} |"
        for speaker, counts in rows.items()
    )
    formats = "".join(f"- {count} files of {name}\n" for name, count in sheet["formats"].items())
    copies, shared = map(" = ".join, sheet["same_audio"]), (f"{t!r} ({n})" for t, n in text["most_shared"].items())
    return f"""\
# {title}

{sheet["utterances"]} utterances, {sheet["hours"]} hours; seconds: shortest {seconds["shortest"]}, median \
{seconds["median"]}, mean {seconds["mean"]}, longest {seconds["longest"]}.

{formats}\
- {len(sheet["silent"])} silent (peak below {SILENT}){_some(sheet["silent"])}
- {len(sheet["clipped"])} clipped ({CLIPPED} neighbouring samples at full scale){_some(sheet["clipped"])}
- {len(sheet["same_audio"])} groups with the same samples{_some(copies)}
- {text["with_text"]} with a transcript, {text["different"]} different ones; {text["utterances_with_shared"]} \
utterances say one of the {text["shared_across_speakers"]} that several speakers say{_some(shared)}

| speaker | {" | ".join(emotions)} | all |
{"|---" * (len(emotions) + 2)}|
{lines}
"""

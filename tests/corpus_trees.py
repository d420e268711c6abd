"""Small folders in the layouts of published corpora, with 0.1 s of near silence for every recording."""

import csv
import json
import wave
from collections.abc import Mapping, Sequence
from pathlib import Path

NEMO_HEAD = ["file_id", "emotion", "raw_text", "normalized_text", "speaker_id", "gender", "age"]
RESD_HEAD = ["name", "path", "emotion", "text"]
MSP_HEAD = ["FileName", "EmoClass", "EmoAct", "EmoVal", "EmoDom", "SpkrID", "Gender", "Split_Set"]
VOTES_HEAD = ["", "A", "D", "F", "H", "N", "S", "fileName", "numResponses", "agreement", "emoVote"]


def write_wavs(folder: Path, *names: str) -> None:
    """Write recordings; each differs from the others, so that none is a copy."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with wave.open(str(folder / name), "wb") as file:
            file.setparams((1, 2, 16_000, 0, "NONE", ""))
            file.writeframes(b"".join(n.to_bytes(2, "little") for n in Path(name).stem.encode()) + bytes(3200))


def write_rows(path: Path, head: Sequence[str], *rows: Sequence[object]) -> None:
    """Write a table: of a .tsv without quotes, else as R and pandas write it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        if path.suffix == ".tsv":
            file.writelines("\t".join(map(str, row)) + "\n" for row in (head, *rows))
        else:
            csv.writer(file, quoting=csv.QUOTE_NONNUMERIC).writerows((head, *rows))


def write_nemo(folder: Path) -> None:
    """nEMO: data.tsv, whose speakers are padded with spaces, and samples/."""
    rows = []
    for speaker, gender, age in (("AB0", "female", 27), ("CD0", "male", 23), ("EF0", "male", 30)):
        for emotion in ("anger", "surprised"):
            for number, text in (("1", "Lubię czytać."), ("2", "Kupiłem nową szafę.")):
                name = f"{speaker}_{emotion}_{number}.wav"
                rows.append([name, emotion, text, text.lower(), f"        {speaker}", gender, age])
    write_rows(folder / "data.tsv", NEMO_HEAD, *rows)
    write_wavs(folder / "samples", *(str(row[0]) for row in rows))


def write_resd(folder: Path) -> None:
    """RESD: both kinds of names of dialogues, in train and in test."""
    names = {"a": "anger", "f": "fear", "e": "enthusiasm"}
    for split, numbers in (("train", ("010", "020")), ("test", ("030",))):
        rows = []
        for dialogue, stem in (
            ("01_fear_anger", "01_fear_anger "),
            ("fear_enthusiasm_31", "31_fear_enthusiasm_"),
            ("enthusiasm_anger_32", "32_enthusiasm_anger_"),
        ):
            for letter, name in names.items():
                if name in dialogue:
                    for number in numbers:
                        path = f"{dialogue}/{stem}{letter}_{number}.wav"
                        rows.append([Path(path).stem, path, name, f"Привет, {stem}{letter} {number}!"])
        write_rows(folder / f"{split}.csv", RESD_HEAD, *rows)
        write_wavs(folder / split, *(str(row[1]) for row in rows))


def write_msp(folder: Path) -> None:
    """MSP-Podcast: labels_consensus.csv of release 1.12, Audios, Transcripts."""
    rows = [
        ["MSP-PODCAST_0001_0008.wav", "N", 4.2, 3.0, 4.6, "30", "Male", "Train"],
        ["MSP-PODCAST_0001_0009.wav", "A", 5.5, 2.25, 5.0, "Unknown", "Unknown", "Train"],
        ["MSP-PODCAST_0002_0001.wav", "X", 4.0, 4.0, 4.0, "31", "Female", "Development"],
        ["MSP-PODCAST_0003_0001_0002.wav", "C", 3.0, 3.0, 3.0, "32", "Female", "Test1"],
        ["MSP-PODCAST_0004_0001.wav", "H", 6.0, 6.0, 6.0, "33", "Male", "Test2"],
    ]
    write_rows(folder / "Labels" / "labels_consensus.csv", MSP_HEAD, *rows)
    write_wavs(folder / "Audios", *(str(row[0]) for row in rows))
    (folder / "Transcripts").mkdir()
    (folder / "Transcripts" / "MSP-PODCAST_0001_0008.txt").write_text("So  it is.\n")


def write_emobox(
    folder: Path, corpus: str, emotions: Mapping[str, str], folds: Mapping[str, Mapping[str, str]]
) -> Path:
    """EmoBox: lists in data/CORPUS and recordings in downloads/CORPUS.

    Args:
        emotions: key -> emo; the label map makes names of EmoBox of them.
        folds: number -> key -> part.

    Returns:
        The folder of the lists.
    """
    lists = folder / "data" / corpus
    objects = {
        key: {
            "key": key,
            "dataset": corpus,
            "wav": f"downloads/{corpus}/{key}.wav",
            "type": "raw",
            "emo": emo,
            "channel": 1,
        }
        for key, emo in emotions.items()
    }

    def write(path: Path, keys: Sequence[str]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(objects[key]) + "\n" for key in keys))

    write(lists / f"{corpus}.jsonl", list(objects))
    for number, parts in folds.items():
        for part in dict.fromkeys(parts.values()):
            keys = [key for key in parts if parts[key] == part]
            write(lists / f"fold_{number}" / f"{corpus}_{part}_fold_{number}.jsonl", keys)
    label_map = {"w": "Angry", "f": "Fear", "s": "Surprise", "Neutral": "Neutral", "x": "No-agreement"}
    (lists / "label_map.json").write_text(json.dumps(label_map))
    write_wavs(folder / "downloads" / corpus, *(f"{key}.wav" for key in emotions))
    return lists

"""A folder like IEMOCAP_full_release: the real dialogues, turns and labels, everything else made up.

The 5,531 turns of the four-class protocol are those of utterances.csv; turns with other labels are added up to
10,039. The irregularities of the release are planted in it, and no count may be changed by them.
"""

import csv
import struct
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

UTTERANCES = Path(__file__).resolve().parents[2] / "shared" / "iemocap" / "utterances.csv"
needs_iemocap = pytest.mark.skipif(not UTTERANCES.is_file(), reason="no utterances.csv at ../shared/iemocap")

OTHERS = {"fru": 1849, "fea": 40, "sur": 107, "dis": 2, "oth": 3, "xxx": 2507}  # 4,508: with 5,531 they are 10,039
HAPPY = 595  # of the 1,636 turns e1, the rest being excited
SPELT = {
    "neu": "Neutral",
    "hap": "Happiness",
    "exc": "Excited",
    "ang": "Anger",
    "sad": "Sadness",
    "fru": "Frustration",
    "fea": "Fear",
    "sur": "Surprise",
    "dis": "Disgust",
    "oth": "Other",
    "xxx": "Other",
}

# What is planted beside the labelled turns, and how often in the whole tree (once per dialogue or session).
PLANTED = {
    "label without a transcript": 5,
    "transcript without a label": 5,
    "transcript with an id of no turn (such as _FXX0)": 2 * 151,
    "transcript line without an id": 151,
    "file with another name than a dialogue": 2 * 5,
}


def real_turns() -> list[tuple[str, str]]:
    """(turn, code) of the 5,531, in the list's order."""
    with UTTERANCES.open(newline="") as file:
        rows = [(row["utterance"], row["emotion"]) for row in csv.DictReader(file)]
    happy = [turn for turn, emotion in rows if emotion == "e1"][:HAPPY]
    codes = {"e0": "neu", "e1": "exc", "e2": "ang", "e3": "sad"}
    return [(turn, "hap" if turn in set(happy) else codes[emotion]) for turn, emotion in rows]


def all_turns() -> dict[str, list[tuple[str, str]]]:
    """Dialogue -> its (turn, code): 10,039 in 151 dialogues."""
    dialogues = defaultdict(list)
    for turn, code in real_turns():
        dialogues[turn.rpartition("_")[0]].append((turn, code))
    names = sorted(dialogues)
    for i, code in enumerate(code for code, count in OTHERS.items() for _ in range(count)):
        dialogue = names[i % len(names)]
        # No dialogue of the release has 500 turns of one speaker.
        dialogues[dialogue].append((f"{dialogue}_{'FM'[i // len(names) % 2]}{500 + i // len(names)}", code))
    return dialogues


def said(turn: str) -> str:
    """The sides of a session and the sessions share the scripts; short answers are everywhere."""
    dialogue, _, last = turn.rpartition("_")
    number = int(last[1:])
    if number % 9 == 0:
        return "Yeah."
    scene = dialogue.partition("_")[2]
    who = scene if "script" in scene else dialogue
    return f"[LAUGHTER] {who.replace('_', ' ')}: line {number} of {last[0]}, o'clock. "


def wav(number: int, samples: int = 40) -> bytes:
    """16 kHz mono 16-bit, other samples for each number."""
    values = (1000 + 7919 * number * np.arange(1, samples + 1, dtype=np.int64)) % 20_001 - 10_000
    data = values.astype("<i2").tobytes()
    form = struct.pack("<4sIHHIIHH4sI", b"fmt ", 16, 1, 1, 16_000, 32_000, 2, 16, b"data", len(data))
    return b"RIFF" + struct.pack("<I", 4 + len(form) + len(data)) + b"WAVE" + form + data


def write_tree(root: Path, *, every: int = 1, audio: bool = True, samples: int = 40) -> Path:
    """The release in `root`, with each dialogue's first turn and every `every`-th after it; returns `root`.

    Its recordings have as many samples, too few to train on unless more are asked for; without `audio` there are
    none.
    """
    number = 0
    for dialogue, turns in sorted(all_turns().items()):
        session = root / f"Session{dialogue[4]}"
        folders = {name: session / "dialog" / name for name in ("EmoEvaluation", "transcriptions")}
        first_of_session = not session.exists()
        for folder in folders.values():
            folder.mkdir(parents=True, exist_ok=True)
        turns = turns[::every]
        labels, lines = ["% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]", ""], []
        for i, (turn, code) in enumerate(turns):
            labels += _label(turn, code, 2.5 * i)
            lines.append(f"{turn} [{2.5 * i:08.4f}-{2.5 * i + 2:08.4f}]: {said(turn)}")
        lines[1:1] = ["", "M: sorry", f"{dialogue}_FXX0 [001.0000-002.0000]: Hm.",
                      f"{dialogue}_MXX1 [001.0000-002.0000]: A colon: here."]  # fmt: skip
        if first_of_session:
            labels += _label(f"{dialogue}_M998", "neu", 0.0)  # no transcript
            lines.append(f"{dialogue}_M999 [001.0000-002.0000]: Without a label.")
            _plant_foreign_files(folders, dialogue, turns[0][0])
        text = ("\n".join(lines) + "\n").encode()
        if first_of_session:  # an apostrophe as Windows writes it
            text = text.replace(b"o'clock", b"o\x92clock", 1)
        (folders["EmoEvaluation"] / f"{dialogue}.txt").write_text("\n".join(labels) + "\n")
        (folders["transcriptions"] / f"{dialogue}.txt").write_bytes(text)
        sounds = session / "sentences" / "wav" / dialogue
        sounds.mkdir(parents=True)
        for turn, _ in turns if audio else []:
            number += 1
            (sounds / f"{turn}.wav").write_bytes(wav(number, samples))
    return root


def _label(turn: str, code: str, start: float) -> list[str]:
    """One for all irregular lines of annotators: several labels, blanks, values out of range."""
    other = "Anger" if code != "ang" else "Sadness"
    return [
        f"[{start:.4f} - {start + 2:.4f}]\t{turn}\t{code}\t[2.0000, 3.0000, 4.5000]",
        f"C-E1:\t{SPELT[code]};\t()",
        f"C-E2:\t{SPELT[code]}; {other};\t(torn; between: two)",
        f"C-E4:\t{'Neutral state' if code == 'neu' else SPELT[code]};\t()",
        "C-F1:\tFear;\t(curious)",
        "A-E3:\tval 3; act 2; dom  2;\t()",
        "A-E4:\tval ; act 9; dom  ;\t()",
        "A-F1:\tval 1; act 1; dom  1;\t()",
        "",
    ]


def _plant_foreign_files(folders: dict[str, Path], dialogue: str, turn: str) -> None:
    for folder in folders.values():
        (folder / f"._{dialogue}.txt").write_bytes(b"\x00\x05\x16\x07\xff of a Mac")
    for name in ("Attribute", "Categorical", "Self-evaluation"):
        folder = folders["EmoEvaluation"] / name
        folder.mkdir()
        wrong = "\n".join(_label(turn, "fea", 0.0))
        (folder / f"{dialogue}.txt").write_text(wrong)  # as a recursive walk would find it
        (folder / f"{dialogue}_e1.anvil").write_text("<xml/>")


def write_paper_csvs(folder: Path, *, prefix: str = "/somebody/else/IEMOCAP_full_release") -> Path:
    """The paper's twenty CSV files: other people's paths, e0 to e3, text in upper case; returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    codes = {"neu": "e0", "hap": "e1", "exc": "e1", "ang": "e2", "sad": "e3"}
    rows = []
    for turn, code in real_turns():
        dialogue = turn.rpartition("_")[0]
        file = f"{prefix}/Session{turn[4]}/sentences/wav/{dialogue}/{turn}.wav"
        rows.append((turn[3:6], [file, codes[code], said(turn).replace("[LAUGHTER]", "{LG}").upper()]))
    for side in sorted({side for side, _ in rows}):
        for part in ("train", "test"):
            with (folder / f"iemocap_{side}.{part}.csv").open("w", newline="") as file:
                table = csv.writer(file)
                table.writerow(["file", "emotion", "text"])
                table.writerows(row for of, row in rows if (of == side) == (part == "test"))
    return folder


if __name__ == "__main__":  # python tests/iemocap_tree.py FOLDER: the whole tree, with recordings of 0.1 s
    write_tree(Path(sys.argv[1]), samples=1600)

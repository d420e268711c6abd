"""Corpora that tell all in their file names."""

import csv
import os
from collections import defaultdict
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from ser.audio import load_audio
from ser.data.corpora import (
    CORPORA,
    CREMA_D_TEXTS,
    EMODB_TEXTS,
    CorpusRow,
    Named,
    manifests_of,
    parse_ased,
    parse_crema_d,
    parse_emodb,
    parse_ravdess,
    parse_tess,
    parse_turev,
    read_corpus,
    read_named,
)
from ser.data.iemocap import COUNTS
from ser.data.protocols import check_fold, kfold
from ser.data.selection import Selection
from ser.errors import ConfigError, ManifestError

EMODB = Path(__file__).resolve().parents[2] / "shared" / "corpora" / "emodb-4class"
needs_emodb = pytest.mark.skipif(not EMODB.is_dir(), reason="EmoDB is not at ../shared/corpora")


@needs_emodb
def test_emodb_s_names_say_what_its_table_says():
    names = {"anger": "angry", "happiness": "happy", "neutral": "neutral", "sadness": "sad"}
    with (EMODB / "metadata.csv").open(newline="", encoding="utf-8") as file:
        table = {Path(row["file"]).stem: row for row in csv.DictReader(file)}
    corpus = read_named(EMODB, parse_emodb)
    assert {u.id for u in corpus.utterances} == table.keys() and not corpus.dropped
    for u in corpus.utterances:
        row = table[u.id]
        assert (u.emotion, u.speaker, u.text) == (names[row["emotion"]], row["speaker"], row["transcript"])
        assert u.extra["text_code"] == row["text_code"]
        assert u.file == EMODB / row["file"]
    assert {u.text for u in corpus.utterances} == set(EMODB_TEXTS.values())


def pitch(utterance) -> float:
    """Median fundamental frequency of the voiced frames, Hz, by autocorrelation."""
    samples = load_audio(utterance.file).numpy()
    found = []
    for start in range(0, len(samples) - 640, 320):
        frame = samples[start : start + 640] - samples[start : start + 640].mean()
        similar = np.correlate(frame, frame, "full")[639:]
        lag = 45 + int(similar[45:229].argmax())  # 70 to 350 Hz
        if frame.std() > 0.03 and similar[lag] > 0.5 * similar[0]:
            found.append(16_000 / lag)
    return float(np.median(found))


@needs_emodb
def test_emodb_s_women_speak_higher_than_its_men():
    # Not compared with the table's gender, which has 09, 10, 12 and 13 the other way round: 10 speaks at 105 Hz.
    voices = defaultdict(list)
    gender = {}
    for u in read_named(EMODB, parse_emodb).utterances:
        if u.emotion == "neutral":
            voices[u.speaker].append(pitch(u))
            gender[u.speaker] = u.extra["gender"]
    means = {
        name: {s: np.median(v) for s, v in voices.items() if gender[s] == name} for name in ("male", "female")
    }
    assert len(means["male"]) == len(means["female"]) == 5
    assert max(means["male"].values()) < min(means["female"].values())


@needs_emodb
def test_emodb_leaves_each_of_its_ten_speakers_out_once():
    utterances = read_named(EMODB, parse_emodb).utterances
    protocol = kfold("speaker", 10, shares=["transcripts"])
    folds = protocol.folds(utterances)
    assert sorted(i for fold in folds for i in fold.parts["test"]) == sorted(u.id for u in utterances)
    assert [fold.name for fold in folds] == ["03", "08", "09", *map(str, range(10, 17))]
    for fold in folds:
        found = check_fold(fold, utterances, protocol)
        assert found.shared["train", "test"]["transcripts"].fraction == 1.0
        assert found.shared["train", "test"]["speakers"].values == []
        assert found.shared["train", "test"]["dialogues"] is None


@pytest.mark.parametrize(
    ("parse", "stem", "emotion", "speaker", "text", "gender", "extra"),
    [
        (parse_emodb, "16b10Lb", "bored", "16", "Die wird auf dem Platz", "female", {"take": "b"}),
        (parse_emodb, "11a05Ed", "disgusted", "11", "Das schwarze Stück Papier", "male", {"text_code": "a05"}),
        (parse_emodb, "08b09Ab", "fearful", "08", "Ich will das eben", "female", {}),
        (parse_ravdess, "03-01-06-01-02-01-12", "fearful", "12", "Dogs are", "female", {"intensity": "normal"}),
        (parse_ravdess, "03-01-02-02-01-02-23", "calm", "23", "Kids are", "male", {"intensity": "strong"}),
        (parse_ravdess, "03-01-08-01-01-02-07", "surprised", "07", "Kids are", "male", {"repetition": "02"}),
        (parse_crema_d, "1001_DFA_ANG_XX", "angry", "1001", "Don't forget", None, {"intensity": "unspecified"}),
        (parse_crema_d, "1091_IEO_HAP_HI", "happy", "1091", "It's eleven", None, {"intensity": "high"}),
        (parse_crema_d, "1040_ITH_SAD_X", "sad", "1040", "I think I have", None, {"intensity": "unspecified"}),
        (parse_ased, "a5-03-01-02-50", "angry", "50", "", "male", {"text_code": "a03", "repetition": "01"}),
        (parse_ased, "n1-02-02-01-62", "neutral", "62", "", "female", {"text_code": "02", "repetition": "02"}),
        (parse_ased, "S4-04-02-01-29", "sad", "29", "", "female", {"text_code": "s04"}),
        (parse_ased, "f2-07-02-02-21", "fearful", "21", "", "female", {}),  # the digit of gender says male
        (parse_tess, "OAF_back_ps", "surprised", "OAF", "Say the word back.", "female", {"text_code": "back"}),
        (parse_tess, "OA_bite_neutral", "neutral", "OAF", "Say the word bite.", "female", {}),
        (parse_tess, "YAF_neat_fear", "fearful", "YAF", "Say the word neat.", "female", {}),
        (parse_turev, "7895_hl_ogul1", "sad", "7895", "", None, {"text_code": "ogul", "take": "1"}),
        (parse_turev, "1157_sk_cekirge", "calm", "1157", "", None, {"text_code": "cekirge"}),
    ],
)
def test_a_name_says_emotion_speaker_text_and_gender(parse, stem, emotion, speaker, text, gender, extra):
    found = parse(stem)
    assert (found.emotion, found.speaker, found.gender) == (emotion, speaker, gender)
    assert found.text.startswith(text)
    assert extra.items() <= found.extra.items()


@pytest.mark.parametrize(
    ("parse", "stem"),
    [
        (parse_emodb, "03a01Xa"),  # no such emotion
        (parse_emodb, "04a01Fa"),  # no such speaker
        (parse_emodb, "03a03Fa"),  # no such text
        (parse_emodb, "03a01F"),
        (parse_ravdess, "03-02-06-01-02-01-12"),  # a song
        (parse_ravdess, "02-01-06-01-02-01-12"),  # video without sound
        (parse_ravdess, "03-01-09-01-02-01-12"),
        (parse_ravdess, "03-01-06-01-02-01-25"),
        (parse_ravdess, "03-01-06-01-02-01-00"),
        (parse_crema_d, "1000_DFA_ANG_XX"),
        (parse_crema_d, "1092_DFA_ANG_XX"),
        (parse_crema_d, "1001_ABC_ANG_XX"),
        (parse_crema_d, "1001_DFA_SUR_XX"),
        (parse_crema_d, "1001_DFA_ANG_XY"),
        (parse_ased, "a4-03-01-02-50"),  # the letter of one emotion, the number of another
        (parse_ased, "a5-08-01-02-50"),
        (parse_ased, "a5-03-01-03-50"),
        (parse_ased, "a5-03-01-02-66"),
        (parse_ased, "a5-03-01-02-00"),
        (parse_tess, "MAF_back_sad"),
        (parse_tess, "OAF_back_calm"),
        (parse_tess, "0testOAF_back_sad"),
        (parse_turev, "7895_xx_ogul"),
        (parse_turev, "789_hl_ogul"),
        (parse_turev, "7895_hl_ogul12"),
    ],
)
def test_other_names_are_none_of_the_corpus(parse, stem):
    assert parse(stem) is None


def test_crema_d_has_twelve_sentences_of_their_own():
    assert len(CREMA_D_TEXTS) == len(set(CREMA_D_TEXTS.values())) == 12


def test_tess_has_two_speakers_so_nothing_validates(tmp_path):
    for name in ("OAF_back_sad", "YAF_back_sad"):
        (tmp_path / f"{name}.wav").touch()
    utterances = read_named(tmp_path, parse_tess).utterances
    (protocol,) = CORPORA["tess"].protocols(utterances)
    assert [sorted(fold.parts) for fold in protocol.folds(utterances)] == [["test", "train"]] * 2


def test_ased_has_as_many_women_and_men_as_its_readme_says():
    genders = [parse_ased(f"n1-01-01-01-{number:02d}").gender for number in range(1, 66)]
    assert (genders.count("female"), genders.count("male")) == (25, 40)


def test_a_name_that_stands_twice_with_other_content_is_told_as_such(tmp_path):
    for folder, content in (("a", b"1"), ("b", b"1"), ("c", b"23")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "OAF_back_sad.wav").write_bytes(content)
    corpus = read_named(tmp_path, parse_tess)
    assert [u.file.parent.name for u in corpus.utterances] == ["a"]
    assert {d.what: d.why for d in corpus.dropped} == {
        "b/OAF_back_sad.wav": "another folder already has a file of this name",
        "c/OAF_back_sad.wav": "another folder already has a file of this name, with another recording",
    }


def test_a_folder_is_read_by_names_whatever_else_lies_in_it(tmp_path):
    for file in (
        "Actor_01/03-01-01-01-01-01-01.wav",
        "Actor_02/03-01-03-01-01-01-02.WAV",
        "Actor_02/03-02-03-01-01-01-02.wav",
        "Actor_02/._03-01-03-01-01-01-02.wav",
        "Actor_02/notes.txt",
        "copy/Actor_01/03-01-01-01-01-01-01.wav",
    ):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    corpus = read_named(tmp_path, parse_ravdess)
    first, second = corpus.utterances
    assert (first.id, first.file) == ("03-01-01-01-01-01-01", tmp_path / "Actor_01/03-01-01-01-01-01-01.wav")
    assert (second.emotion, second.extra["gender"], second.extra["code"]) == ("happy", "female", "03")
    assert {d.what: d.why for d in corpus.dropped} == {
        "Actor_02/._03-01-03-01-01-01-02.wav": "hidden file",
        "Actor_02/03-02-03-01-01-01-02.wav": "not a name of this corpus's speech",
        "copy/Actor_01/03-01-01-01-01-01-01.wav": "another folder already has a file of this name",
    }


def test_linked_folders_are_read_and_what_else_is_sound_or_leads_nowhere_is_told(tmp_path):
    root, disk = tmp_path / "corpus", tmp_path / "disk"
    root.mkdir()
    (disk / "Actor_01").mkdir(parents=True)
    (disk / "Actor_01" / "03-01-01-01-01-01-01.wav").touch()
    (disk / "Actor_01" / "01-01-01-01-01-01-01.mp4").touch()
    (root / "Actor_01").symlink_to(disk / "Actor_01")
    (root / "all").symlink_to(tmp_path)
    (root / "03-01-03-01-01-01-02.flac").touch()
    (root / "03-01-03-01-01-01-04.wav").symlink_to("nowhere")
    os.mkfifo(root / "03-01-03-01-01-01-06.wav")
    corpus = read_named(root, parse_ravdess)
    assert [u.file for u in corpus.utterances] == [root / "Actor_01" / "03-01-01-01-01-01-01.wav"]
    assert {d.what: d.why for d in corpus.dropped} == {
        "03-01-03-01-01-01-02.flac": "not a WAV file",
        "Actor_01/01-01-01-01-01-01-01.mp4": "not a WAV file",
        "03-01-03-01-01-01-04.wav": "a broken link",
        "03-01-03-01-01-01-06.wav": "not a regular file",
    }
    (warning,) = corpus.warnings
    assert f"{root / 'all'}: is a link to {tmp_path}, which holds it" in warning


def test_a_folder_without_the_corpus_is_refused(tmp_path):
    (tmp_path / "a.wav").touch()
    with pytest.raises(ManifestError, match=r"none of its 1 sound files .*\n  a.wav: not a name"):
        read_named(tmp_path, parse_emodb)
    with pytest.raises(ManifestError, match="no such folder"):
        read_named(tmp_path / "missing", parse_emodb)


def test_the_rows_of_the_table_agree_with_the_readers():
    iemocap = CORPORA["iemocap"].counts
    assert sum(iemocap.values()) == 10_039 and CORPORA["iemocap-csv"].counts == COUNTS["emotion"]
    assert iemocap["happy"] + iemocap["excited"] == COUNTS["emotion"]["happy"]
    assert sum(CORPORA["emodb"].counts.values()) == 535
    assert sum(CORPORA["ravdess"].counts.values()) == 1440
    assert sum(CORPORA["crema-d"].counts.values()) == 7442
    totals = {"nemo": 4481, "resd": 1396, "ased": 2474, "tess": 2800, "turev": 1735}
    assert {name: sum(CORPORA[name].counts.values()) for name in totals} == totals
    for name, row in CORPORA.items():
        called, _, licence = row.licence.partition(": ")
        assert called.lower().startswith(name.partition("-csv")[0]) and licence and row.source, name


@needs_emodb
def test_a_corpus_with_fewer_utterances_than_are_published_is_read_with_a_warning():
    corpus = read_corpus("emodb", EMODB, partial=True, root=None, tell=print)
    assert len(corpus.utterances) == 339 and manifests_of("emodb", corpus.utterances) == {
        "emodb": corpus.utterances
    }
    (warning,) = corpus.warnings
    assert warning.endswith("published: bored 0 of 81, disgusted 0 of 46, fearful 0 of 69")
    assert [protocol.name for protocol in CORPORA["emodb"].protocols(corpus.utterances)] == ["kfold:speaker:10"]


def parse_toy(stem):
    speaker, _, emotion = stem.partition("_")
    return Named(emotion, emotion, speaker, "") if emotion else None


def test_a_user_s_row_is_read_checked_and_divided(tmp_path, monkeypatch):
    row = CorpusRow(partial(read_named, parse=parse_toy), licence="ours", counts={"sad": 2, "happy": 2})
    monkeypatch.setitem(CORPORA, "toy", row)
    for speaker in "ab":
        (tmp_path / f"{speaker}_sad.wav").touch()
    (tmp_path / "a_happy.wav").touch()
    corpus = read_corpus("toy", tmp_path, partial=True)
    assert [(u.speaker, u.emotion) for u in corpus.utterances] == [("a", "happy"), ("a", "sad"), ("b", "sad")]
    assert corpus.warnings == [f"{tmp_path}: not as many utterances as are published: happy 1 of 2"]
    (protocol,) = row.protocols(corpus.utterances)
    assert [fold.name for fold in protocol.folds(corpus.utterances)] == ["a", "b"]
    (tmp_path / "toy.csv").touch()
    assert Selection(str(tmp_path)).manifest == tmp_path / "toy.csv"


def test_an_unknown_corpus_is_refused_with_the_nearest_name(tmp_path):
    with pytest.raises(ConfigError, match=r"'emo-db' \(did you mean 'emodb'\?\); there are iemocap, "):
        read_corpus("emo-db", tmp_path)

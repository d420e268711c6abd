"""Corpora that are listed in tables: nEMO, RESD, MSP-Podcast, CREMA-D's votes; all of them through ser prepare."""

import json
import shutil
from collections import Counter

import pytest
from corpus_trees import (
    MSP_HEAD,
    NEMO_HEAD,
    RESD_HEAD,
    VOTES_HEAD,
    write_emobox,
    write_msp,
    write_nemo,
    write_resd,
    write_rows,
    write_wavs,
)

from ser.cli import call
from ser.data.corpora import CORPORA, manifests_of, read_corpus, read_crema_d
from ser.data.listed import read_msp_podcast, read_nemo, read_resd
from ser.data.manifest import read_manifest
from ser.data.protocols import check_fold
from ser.data.selection import Selection
from ser.errors import ManifestError


def reasons(corpus):
    return {d.what: d.why for d in corpus.dropped}


# ------------------------------------------------------------------------------------------------------ nEMO


def test_nemo_is_read_with_its_texts_speakers_and_our_names_of_emotions(tmp_path):
    write_nemo(tmp_path)
    corpus = read_nemo(tmp_path)
    assert len(corpus.utterances) == 12 and not corpus.dropped and not corpus.warnings
    u = corpus.utterances[0]
    assert (u.id, u.file) == ("AB0_anger_1", tmp_path / "samples" / "AB0_anger_1.wav")
    assert (u.emotion, u.speaker, u.text) == ("angry", "AB0", "Lubię czytać.")
    assert u.extra == {"code": "anger", "normalized_text": "lubię czytać.", "gender": "female", "age": "27"}
    assert Counter(u.emotion for u in corpus.utterances) == {"angry": 6, "surprised": 6}
    (protocol,) = CORPORA["nemo"].protocols(corpus.utterances)
    assert [fold.name for fold in protocol.folds(corpus.utterances)] == ["AB0", "CD0", "EF0"]


def test_rows_without_recordings_and_recordings_without_rows_are_told(tmp_path):
    write_nemo(tmp_path)
    (tmp_path / "samples" / "AB0_anger_1.wav").rename(tmp_path / "samples" / "AB0_anger_3.wav")
    (tmp_path / "samples" / "AB0_anger_2.wav").rename(tmp_path / "samples" / "AB0_anger_2.ogg")
    write_wavs(tmp_path / "samples", "._CD0_anger_1.wav")
    (tmp_path / "samples" / "CD0_anger_1.wav").unlink()
    (tmp_path / "samples" / "CD0_anger_1.wav").symlink_to("nowhere")
    corpus = read_corpus("nemo", tmp_path)
    assert len(corpus.utterances) == 9
    assert reasons(corpus) == {
        "AB0_anger_1": "no recording",
        "AB0_anger_2": "no recording",
        "CD0_anger_1": "no recording",
        "samples/AB0_anger_2.ogg": "not a WAV file",
        "samples/AB0_anger_3.wav": "not in the table",
        "samples/CD0_anger_1.wav": "a broken link",
        "samples/._CD0_anger_1.wav": "hidden file",
    }
    (warning,) = corpus.warnings
    assert "published: angry 3 of 749, fearful 0 of 736" in warning


def test_a_damaged_table_is_refused_with_its_line(tmp_path):
    write_nemo(tmp_path)
    table = tmp_path / "data.tsv"
    lines = table.read_text().splitlines(keepends=True)
    table.write_text("".join([*lines[:3], "torn\trow\n", *lines[3:]]))
    with pytest.raises(ManifestError, match=r"data.tsv.*\n  line 4: 2 fields, but the header has 7"):
        read_nemo(tmp_path)
    table.write_text("".join([*lines, lines[1]]))
    with pytest.raises(ManifestError, match=r"line 14: the same recording .* is line 2 already"):
        read_nemo(tmp_path)
    table.write_text("".join([*lines[:2], lines[2].replace("\tanger\t", "\trage\t"), *lines[3:]]))
    with pytest.raises(
        ManifestError, match=r"unknown emotions, expected anger, .*\n  'rage' \(1\), such as of AB0_a"
    ):
        read_nemo(tmp_path)
    write_rows(table, NEMO_HEAD[:4], ["AB0_anger_1.wav", "anger", "a", "a"])
    with pytest.raises(ManifestError, match="no column 'speaker_id'"):
        read_nemo(tmp_path)
    table.unlink()
    with pytest.raises(ManifestError, match=r"data.tsv: cannot read"):
        read_nemo(tmp_path)


def test_a_table_without_any_recording_is_refused(tmp_path):
    write_nemo(tmp_path)
    shutil.rmtree(tmp_path / "samples")
    (tmp_path / "samples").mkdir()
    with pytest.raises(
        ManifestError, match=r"none of its 12 rows has a recording there\n  AB0_anger_1: no recording"
    ):
        read_nemo(tmp_path)


# ------------------------------------------------------------------------------------------------------ RESD


def test_resd_has_dialogues_and_its_own_split_but_no_speakers(tmp_path):
    write_resd(tmp_path)
    corpus = read_resd(tmp_path)
    assert len(corpus.utterances) == 18 and not corpus.dropped
    u = next(u for u in corpus.utterances if u.id == "01_fear_anger a_030")
    assert u.file == tmp_path / "test" / "01_fear_anger" / "01_fear_anger a_030.wav"
    assert (u.emotion, u.speaker, u.text) == ("angry", None, "Привет, 01_fear_anger a 030!")
    assert u.extra == {"code": "anger", "dialogue": "01", "split": "test"}
    assert {u.extra["dialogue"] for u in corpus.utterances} == {"01", "31", "32"}
    assert Counter(u.extra["split"] for u in corpus.utterances) == {"train": 12, "test": 6}


def test_resd_is_divided_by_dialogue_and_as_it_divides_itself(tmp_path):
    write_resd(tmp_path)
    utterances = read_resd(tmp_path).utterances
    dialogues, column = CORPORA["resd"].protocols(utterances)
    assert dialogues.name == "kfold:dialogue:3" and "may be in training too" in dialogues.description
    for fold in dialogues.folds(utterances):
        assert check_fold(fold, utterances, dialogues).shared["train", "test"]["dialogues"].values == []
    (fold,) = column.folds(utterances)
    assert {part: len(ids) for part, ids in fold.parts.items()} == {"train": 12, "test": 6}
    assert check_fold(fold, utterances, column).shared["train", "test"]["dialogues"].values == ["01", "31", "32"]


def test_a_name_in_both_parts_of_resd_is_taken_once(tmp_path):
    write_resd(tmp_path)
    name = "01_fear_anger/01_fear_anger a_010.wav"
    write_rows(tmp_path / "test.csv", RESD_HEAD, ["01_fear_anger a_010", name, "anger", "Привет!"])
    write_wavs(tmp_path / "test", name)
    corpus = read_resd(tmp_path)
    assert len(corpus.utterances) == 12
    assert reasons(corpus)[f"test/{name}"] == "another folder already has a file of this name"
    assert reasons(corpus)["test/01_fear_anger/01_fear_anger a_030.wav"] == "not in the table"


def test_a_folder_of_resd_that_names_no_dialogue_is_refused(tmp_path):
    write_resd(tmp_path)
    write_rows(tmp_path / "test.csv", RESD_HEAD, ["x", "fear_anger/x.wav", "anger", ""])
    with pytest.raises(ManifestError, match=r"test.csv: 'fear_anger' names no dialogue"):
        read_resd(tmp_path)


# ----------------------------------------------------------------------------------------------- MSP-Podcast


def test_msp_podcast_is_read_with_dimensions_parts_and_transcripts(tmp_path):
    write_msp(tmp_path)
    corpus = read_corpus("msp-podcast", tmp_path)
    assert not corpus.dropped and not corpus.warnings
    neutral, angry, disputed, contempt, happy = corpus.utterances
    assert (neutral.emotion, neutral.speaker, neutral.text) == ("neutral", "30", "So it is.")
    dimensions = {name: neutral.labels[name] for name in ("arousal", "valence", "dominance")}
    assert dimensions == {"arousal": 4.2, "valence": 3.0, "dominance": 4.6}
    assert neutral.extra == {"code": "N", "dialogue": "0001", "part": "Train", "split": "train", "gender": "male"}
    assert (angry.speaker, angry.text, "gender" in angry.extra) == (None, None, False)
    assert (disputed.emotion, disputed.extra["code"], disputed.extra["split"]) == (None, "X", "valid")
    assert (contempt.emotion, contempt.extra["split"], contempt.extra["dialogue"]) == (
        "contemptuous",
        "test",
        "0003",
    )
    assert happy.extra["part"] == "Test2" and "split" not in happy.extra


def test_msp_podcast_s_own_parts_are_the_folds_and_further_test_sets_stay_outside(tmp_path):
    write_msp(tmp_path)
    corpus = read_msp_podcast(tmp_path)
    manifests = manifests_of("msp-podcast", corpus.utterances)
    assert {name: len(rows) for name, rows in manifests.items()} == {"msp-podcast": 4, "msp-podcast_all": 5}
    (protocol,) = CORPORA["msp-podcast"].protocols(manifests["msp-podcast"])
    (fold,) = protocol.folds(manifests["msp-podcast"])
    assert {part: len(ids) for part, ids in fold.parts.items()} == {"train": 2, "valid": 1, "test": 1}


def test_msp_podcast_of_earlier_releases_has_other_names_of_folders_and_parts(tmp_path):
    write_msp(tmp_path)
    (tmp_path / "Audios").rename(tmp_path / "Audio")
    table = tmp_path / "Labels" / "labels_consensus.csv"
    table.write_text(table.read_text().replace("Development", "Validation"))
    table.rename(tmp_path / "Labels" / "labels_concensus.csv")
    corpus = read_msp_podcast(tmp_path)
    assert [u.extra["split"] for u in corpus.utterances if u.emotion is None] == ["valid"]


def test_msp_podcast_names_recordings_without_labels_and_transcripts_that_are_not_utf_8(tmp_path):
    write_msp(tmp_path)
    write_wavs(tmp_path / "Audios", "MSP-PODCAST_test3_0001.wav")
    (tmp_path / "Transcripts" / "MSP-PODCAST_0001_0009.txt").write_bytes(b"caf\xe9")
    corpus = read_msp_podcast(tmp_path)
    assert reasons(corpus) == {"Audios/MSP-PODCAST_test3_0001.wav": "not in the table"}
    assert corpus.utterances[1].text == "caf\ufffd"
    assert corpus.warnings == [
        "MSP-PODCAST_0001_0009.txt: is not UTF-8; characters that cannot be read become U+FFFD"
    ]


def test_msp_podcast_warns_of_unknown_parts_and_of_dimensions_that_are_not_on_the_scale(tmp_path):
    write_msp(tmp_path)
    table = tmp_path / "Labels" / "labels_consensus.csv"
    text = table.read_text().replace('"Development"', '"Tset1"').replace('"Test1"', '""').replace("5.5", "99")
    table.write_text(text.replace('"Unknown","Unknown"', '"unknown","Unknown"'))
    corpus = read_msp_podcast(tmp_path)
    assert corpus.warnings == [
        f"{table}: utterances in no split, since Split_Set has unknown values: '' (1), 'Tset1' (1)",
        f"{table}: 1 utterances have EmoAct, EmoVal or EmoDom outside 1 to 7, such as MSP-PODCAST_0001_0009.wav",
    ]
    assert corpus.utterances[1].speaker is None, "unknown in small letters"


def test_a_table_of_msp_podcast_without_parts_or_with_a_word_for_a_number_is_refused(tmp_path):
    write_msp(tmp_path)
    table = tmp_path / "Labels" / "labels_consensus.csv"
    row = ["MSP-PODCAST_0001_0008.wav", "N", 4.2, 3.0, 4.6, "30", "Male"]
    write_rows(table, MSP_HEAD[:-1], row)
    with pytest.raises(
        ManifestError, match=r"labels_consensus.csv: the column 'Split_Set', .* is missing or empty"
    ):
        read_msp_podcast(tmp_path)
    write_rows(table, MSP_HEAD, [*row, ""])
    with pytest.raises(ManifestError, match=r"the column 'Split_Set', .* is missing or empty"):
        read_msp_podcast(tmp_path)
    write_rows(table, MSP_HEAD, [*row[:2], "high", *row[3:], "Train"])
    with pytest.raises(ManifestError, match="line 2: arousal is 'high', expected a number"):
        read_msp_podcast(tmp_path)


# -------------------------------------------------------------------------------------------- CREMA-D's votes

NAMES = ("1001_DFA_ANG_XX", "1001_IEO_HAP_LO", "1002_IEO_SAD_HI")
VOTES = [
    ["100001", 6, 2, 0, 0, 1, 0, NAMES[0], 9, 0.67, "A"],
    ["100002", 0, 0, 0, 4, 4, 0, NAMES[1], 8, 0.5, "H:N"],
    ["200001", 0, 9, 0, 0, 0, 0, NAMES[0], 9, 1, "D"],
    ["300002", 0, 0, 0, 9, 0, 0, NAMES[1], 9, 1, "H"],
]


def write_crema_d(folder):
    write_wavs(folder / "AudioWAV", *(f"{name}.wav" for name in NAMES))
    write_rows(folder / "processedResults" / "tabulatedVotes.csv", VOTES_HEAD, *VOTES)


@pytest.mark.parametrize("part", ["", "AudioWAV"])
def test_crema_d_has_the_votes_on_the_voice_beside_the_emotion_that_was_meant(tmp_path, part):
    write_crema_d(tmp_path)
    corpus = read_crema_d(tmp_path / part)
    first, second, third = corpus.utterances
    assert [u.emotion for u in corpus.utterances] == ["angry", "happy", "sad"]
    assert (first.extra["voted"], first.extra["raters"]) == ("angry", "9")
    assert first.extra["votes"] == '{"ANG": 0.6667, "DIS": 0.2222, "NEU": 0.1111}'
    assert "voted" not in second.extra and json.loads(second.extra["votes"]) == {"HAP": 0.5, "NEU": 0.5}
    assert third.extra.keys() == {"code", "text_code", "intensity"}
    assert corpus.warnings == [f"{corpus.root}: 1 recordings without votes, such as 1002_IEO_SAD_HI"]


def test_the_voted_emotions_of_a_prepared_manifest_can_be_read_as_the_labels(tmp_path):
    write_crema_d(tmp_path / "release")
    assert call("prepare", [str(tmp_path / "release"), "--corpus", "crema-d", "--out", str(tmp_path / "out")]) == 0
    manifest = tmp_path / "out" / "crema-d.csv"
    rows = read_manifest(manifest, root=tmp_path / "release", columns={"emotion": "voted"})
    assert [row.emotion for row in rows] == ["angry", None, None]
    assert [row.extra["emotion_original"] for row in rows] == ["angry", "happy", "sad"]


def test_without_the_counts_of_votes_their_summary_is_read_and_without_tables_names_alone(tmp_path):
    write_crema_d(tmp_path)
    (tmp_path / "processedResults" / "tabulatedVotes.csv").unlink()
    summary = tmp_path / "processedResults" / "summaryTable.csv"
    head = ["", "FileName", "VoiceVote", "VoiceLevel"]
    write_rows(
        summary, head, ["1", NAMES[0], "N", "71.5"], ["2", NAMES[1], "A:D", "40:60"], ["3", NAMES[2], "S", "9"]
    )
    corpus = read_crema_d(tmp_path)
    assert [u.extra.get("voted") for u in corpus.utterances] == ["neutral", None, "sad"] and not corpus.warnings
    summary.unlink()
    corpus = read_crema_d(tmp_path)
    assert all("voted" not in u.extra for u in corpus.utterances) and not corpus.warnings


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (["100003", 1, 0, 0, 0, 0, "x", NAMES[2], 1, 1, "A"], "line 6: invalid literal"),
        (["100003", 0, 0, 0, 0, 0, 0, NAMES[2], 0, 0, "A"], "line 6: found 0 votes, expected 1 or more"),
        (["100003", 1, 0, 0, 0, 0, 0, NAMES[0], 1, 1, "A"], "line 6: 1001_DFA_ANG_XX occurs twice"),
        (["100003", 1, 0], "line 6: 3 fields, but the header has 11"),
    ],
)
def test_a_damaged_table_of_votes_is_refused_with_its_line(tmp_path, row, why):
    write_crema_d(tmp_path)
    write_rows(tmp_path / "processedResults" / "tabulatedVotes.csv", VOTES_HEAD, *VOTES, row)
    with pytest.raises(ManifestError, match=f"tabulatedVotes.csv: {why}"):
        read_crema_d(tmp_path)


def test_a_table_of_votes_that_is_no_table_is_refused(tmp_path):
    write_crema_d(tmp_path)
    table = tmp_path / "processedResults" / "tabulatedVotes.csv"
    write_rows(table, VOTES_HEAD[:7], VOTES[0][:7])
    with pytest.raises(ManifestError, match="no column 'fileName'"):
        read_crema_d(tmp_path)
    table.write_text('"","A"\n"1","2')
    with pytest.raises(ManifestError, match=r"no column|line 2"):
        read_crema_d(tmp_path)
    table.write_bytes(b"\xff\xfe")
    with pytest.raises(ManifestError, match=r"tabulatedVotes.csv: cannot be read"):
        read_crema_d(tmp_path)
    write_rows(table.with_name("summaryTable.csv"), ["FileName", "VoiceVote"], [NAMES[0], "Z"])
    table.unlink()
    with pytest.raises(ManifestError, match=r"summaryTable.csv: line 2: the vote 'Z', expected A, D, F, H, N, S"):
        read_crema_d(tmp_path)


# --------------------------------------------------------------------------------------------- ser prepare


def write_ased(folder):
    write_wavs(folder, "01Neutral/n1-01-01-02-04.wav", "04Sad/S4-04-02-01-29.wav", "05Angry/a5-03-01-02-50.wav")


def write_tess(folder):
    write_wavs(
        folder, "OAF_angry/OAF_back_angry.wav", "YAF_sad/YAF_back_sad.wav", "OAF_neutral/OA_bite_neutral.wav"
    )


def write_turev(folder):
    write_wavs(folder / "Sound Source", "Angry/1157_kz_acik.wav", "Sad/7895_hl_ogul1.wav", "Calm/1234_sk_acik.wav")


def write_aesdd(folder):
    folds = {"1": {"a": "train", "b": "train", "c": "test"}}
    return write_emobox(folder, "aesdd", {"a": "w", "b": "f", "c": "f"}, folds)


WRITERS = {
    "nemo": (write_nemo, "kfold-speaker-3"),
    "resd": (write_resd, "kfold-dialogue-3"),
    "msp-podcast": (write_msp, "column"),
    "crema-d": (write_crema_d, "kfold-speaker-2"),
    "ased": (write_ased, "kfold-speaker-3"),
    "tess": (write_tess, "kfold-speaker-2"),
    "turev": (write_turev, "kfold-speaker-3"),
    "emobox": (write_aesdd, "column"),
}


@pytest.mark.parametrize("corpus", WRITERS)
def test_each_corpus_is_prepared_to_manifests_folds_and_a_data_sheet(tmp_path, corpus, capsys):
    write, folds = WRITERS[corpus]
    release = tmp_path / "release"
    out = tmp_path / "out"
    lists = write(release) or release
    assert call("prepare", [str(lists), "--corpus", corpus, "--out", str(out)]) == 0
    rows = read_manifest(Selection(str(out)).manifest, root=release)
    assert Selection(str(out)).manifest == out / f"{corpus}.csv" and rows
    assert f"{corpus}: {len(rows)} utterances; emotions " in capsys.readouterr().out
    report = json.loads((out / "report.json").read_text())
    assert report["licence"] == CORPORA[corpus].licence and report["dropped"] == {}
    assert not any("no folds" in warning for warning in report["warnings"])
    assert f"# {corpus}\n" in (out / "data_sheet.md").read_text()
    assert (out / "folds" / f"{folds}.json").is_file()
    (u,) = [u for u in read_corpus(corpus, lists).utterances if u.id == rows[0].id]
    assert (rows[0].file, rows[0].labels) == (u.file, u.labels) and rows[0].extra.items() > u.extra.items()

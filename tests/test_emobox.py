"""EmoBox's lists: label map, folds, excerpts, and what is wrong with a list."""

import json

import pytest
from corpus_trees import write_emobox, write_wavs

from ser.data.corpora import CORPORA, read_corpus
from ser.data.emobox import COUNTS, read_emobox
from ser.data.protocols import check_fold
from ser.errors import ManifestError

EMOTIONS = {"a-1": "w", "a-2": "f", "b-1": "s", "b-2": "neutral", "c-1": "w", "c-2": "x"}
ONE_FOLD = {"1": {"a-1": "train", "a-2": "train", "b-1": "valid", "b-2": "valid", "c-1": "test", "c-2": "test"}}


def folds(*tests):
    """As many folds as there are groups of keys to test on."""
    return {
        str(number): {key: "test" if key in test else "train" for key in EMOTIONS}
        for number, test in enumerate(tests, 1)
    }


def reasons(corpus):
    return {d.what: d.why for d in corpus.dropped}


def append(path, **values):
    with path.open("a") as file:
        file.write(json.dumps(values) + "\n")


def test_a_list_is_read_with_our_names_of_its_classes_and_its_parts_as_a_column(tmp_path):
    corpus = read_corpus("emobox", write_emobox(tmp_path, "mini", EMOTIONS, ONE_FOLD))
    assert corpus.root == tmp_path and not corpus.dropped and not corpus.warnings
    assert [u.id for u in corpus.utterances] == sorted(EMOTIONS)
    assert [u.emotion for u in corpus.utterances] == ["angry", "fearful", "surprised", "neutral", "angry", None]
    first = corpus.utterances[0]
    assert (
        first.file == tmp_path / "downloads" / "mini" / "a-1.wav" and first.speaker is None and first.text is None
    )
    assert first.extra == {"code": "w", "split": "train"}
    (protocol,) = CORPORA["emobox"].protocols(corpus.utterances)
    (fold,) = protocol.folds(corpus.utterances)
    check_fold(fold, corpus.utterances, protocol)
    assert fold.parts == {"train": ["a-1", "a-2"], "valid": ["b-1", "b-2"], "test": ["c-1", "c-2"]}


def test_several_folds_become_a_column_and_each_is_tested_as_emobox_does(tmp_path):
    tests = (["a-1", "a-2"], ["b-1", "b-2"], ["c-1", "c-2"])
    corpus = read_emobox(write_emobox(tmp_path, "mini", EMOTIONS, folds(*tests)))
    (protocol,) = CORPORA["emobox"].protocols(corpus.utterances)
    assert [fold.parts["test"] for fold in protocol.folds(corpus.utterances)] == list(tests)


def test_without_folds_there_is_no_protocol(tmp_path):
    corpus = read_emobox(write_emobox(tmp_path, "mini", EMOTIONS, {}))
    assert len(corpus.utterances) == 6 and CORPORA["emobox"].protocols(corpus.utterances) == []


def test_recordings_are_found_below_the_given_root_and_missing_ones_are_told(tmp_path):
    lists = write_emobox(tmp_path / "EmoBox", "mini", EMOTIONS, ONE_FOLD)
    (tmp_path / "EmoBox" / "downloads").rename(tmp_path / "downloads")
    with pytest.raises(ManifestError, match=r"none of its 6 .*EmoBox\n  6 x no recording\nGive --root"):
        read_emobox(lists)
    (tmp_path / "downloads" / "mini" / "a-1.wav").unlink()
    corpus = read_emobox(lists, root=tmp_path)
    assert reasons(corpus) == {"a-1": "no recording"} and len(corpus.utterances) == 5


def test_the_sound_of_a_video_is_taken_from_beside_it(tmp_path):
    lists = write_emobox(tmp_path, "mini", EMOTIONS, {})
    downloads = tmp_path / "downloads" / "mini"
    for number, sound in enumerate((".wav", ".flac", ""), 1):
        append(lists / "mini.jsonl", key=f"v{number}", wav=f"downloads/mini/v{number}.mp4", emo="w")
        (downloads / f"v{number}.mp4").touch()
        if sound:
            (downloads / f"v{number}{sound}").touch()
    corpus = read_emobox(lists)
    assert [u.file.name for u in corpus.utterances if u.id[0] == "v"] == ["v1.wav", "v2.flac"]
    assert reasons(corpus) == {"v3": "no sound: convert the .mp4 file to .wav"}


def test_a_file_whose_name_has_no_suffix_is_told(tmp_path):
    lists = write_emobox(tmp_path, "mini", EMOTIONS, {})
    (tmp_path / "downloads/mini/plain").touch()
    append(lists / "mini.jsonl", key="p", wav="downloads/mini/plain", emo="w")
    assert reasons(read_emobox(lists)) == {"p": "its name has no suffix such as .wav"}


def test_excerpts_keep_their_times_and_repeated_ones_are_told(tmp_path):
    lists = write_emobox(tmp_path, "mini", EMOTIONS, {})
    write_wavs(tmp_path / "downloads" / "mini", "long.wav")
    for key, end, emo in (("l1", 1.5, "w"), ("l2", 2.5, "w"), ("l3", 2.5, "f"), ("l4", 1.5, "w")):
        append(lists / "mini.jsonl", key=key, wav="downloads/mini/long.wav", emo=emo, start_time=0.5, end_time=end)
    corpus = read_emobox(lists)
    (excerpt,) = [u for u in corpus.utterances if u.id[0] == "l"]
    assert (excerpt.id, excerpt.start, excerpt.end) == ("l1", 0.5, 1.5)
    assert reasons(corpus) == {
        "l2": "its recording is listed with several emotions",
        "l3": "its recording is listed with several emotions",
        "l4": "its recording is listed already",
    }


def test_utterances_outside_all_parts_and_keys_outside_the_list_are_told(tmp_path):
    parts = {key: part for key, part in ONE_FOLD["1"].items() if key != "a-2"}
    lists = write_emobox(tmp_path, "mini", EMOTIONS, {"1": parts})
    append(lists / "fold_1" / "mini_test_fold_1.jsonl", key="d-1", wav="x.wav", emo="w")
    append(lists / "fold_1" / "mini_test3_fold_1.jsonl", key="a-2", wav="x.wav", emo="w")
    corpus = read_emobox(lists)
    assert reasons(corpus) == {
        "a-2": "in none of train, valid and test",
        "d-1": "in a fold, but not in the list",
    }
    what = "1 files of folds are not read, such as fold_1/mini_test3_fold_1.jsonl"
    assert corpus.warnings == [f"{lists}: {what}; expected names such as fold_1/mini_test_fold_1.jsonl"]


def test_folds_that_have_the_name_of_another_list_are_told(tmp_path):
    lists = write_emobox(tmp_path, "mini", EMOTIONS, ONE_FOLD)
    (lists / "mini.jsonl").rename(lists / "maxi.jsonl")
    corpus = read_emobox(lists)
    (warning,) = corpus.warnings
    assert "3 files of folds are not read, such as fold_1/mini_test_fold_1.jsonl" in warning
    assert all("split" not in u.extra for u in corpus.utterances)


def test_a_list_of_another_length_than_emobox_s_is_read_with_a_warning(tmp_path):
    lists = write_emobox(tmp_path, "urdu", EMOTIONS, {})
    assert read_emobox(lists).warnings == [f"{lists / 'urdu.jsonl'}: 6 utterances, EmoBox has 400"]
    assert len(COUNTS) == 32 and sum(COUNTS.values()) == 262_020


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"key": "z", "wav": ', "line 7: Expecting value"),
        ("[1]", r"line 7: found \[1\], expected an object with a key"),
        ('{"wav": "a.wav", "emo": "w"}', "line 7: found .* expected an object with a key"),
        ('{"key": "z", "emo": "w"}', "line 7: the value of 'wav' is missing"),
        ('{"key": "z", "wav": "a.wav", "emo": 3}', "line 7: the value of 'emo' is missing"),
        (
            '{"key": "z", "wav": "a.wav", "emo": "q"}',
            "line 7: the emotion 'q' is not in the label map, which has w, f",
        ),
        ('{"key": "z", "wav": "a.wav", "emo": "w", "start_time": "0"}', "line 7: found '0', expected seconds"),
        ('{"key": "z", "wav": "a.wav", "emo": "w", "start_time": NaN}', "line 7: found nan, expected seconds"),
        ('{"key": "a-1", "wav": "a.wav", "emo": "w"}', "line 7: the key 'a-1' occurs twice"),
    ],
)
def test_a_damaged_list_is_refused_with_its_line(tmp_path, line, why):
    lists = write_emobox(tmp_path, "mini", EMOTIONS, {})
    with (lists / "mini.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ManifestError, match=rf"mini.jsonl: {why}"):
        read_emobox(lists)


def test_folds_that_contradict_each_other_are_refused(tmp_path):
    lists = write_emobox(tmp_path, "mini", EMOTIONS, folds(["a-1"], ["a-1", "b-1"]))
    with pytest.raises(
        ManifestError, match=r"mini_test_fold_2.jsonl: line 1: 'a-1' is also in another list \(fold 1\)"
    ):
        read_emobox(lists)


def test_a_folder_that_is_none_of_emobox_is_refused(tmp_path):
    lists = write_emobox(tmp_path, "mini", EMOTIONS, {})
    (lists / "label_map.json").write_text('{"w": 1}')
    with pytest.raises(ManifestError, match=r"label_map.json: expected an object of names"):
        read_emobox(lists)
    for text, why in (
        ('{"w": "Angry", "W": "Sad"}', "'w' is both 'angry' and 'sad'"),
        ('{"w": "Angry", "w": "Sad"}', "'w'"),
        ('{"w": " "}', "the class of 'w' is empty"),
    ):
        (lists / "label_map.json").write_text(text)
        with pytest.raises(ManifestError, match=rf"label_map.json: .*{why}"):
            read_emobox(lists)
    (lists / "label_map.json").unlink()
    with pytest.raises(ManifestError, match=r"mini: no label_map.json"):
        read_emobox(lists)
    with pytest.raises(ManifestError, match=r"data: 0 lists of utterances, expected one as in EmoBox"):
        read_emobox(tmp_path / "data")

"""Labels: maps of names, spellings that are one name, what is shown of them, and selections that keep all that."""

import argparse
import hashlib
import json
import os
import re
import shlex

import pytest
from test_manifest import column
from toy import toy_recognizer, write_corpus

from ser.cli import execute
from ser.data import selection
from ser.data.manifest import Utterance
from ser.data.selection import Selection
from ser.data.spellings import check_spellings, label_lines, parse_map, spelling
from ser.errors import ConfigError, ManifestError


def said(*emotions, speakers=()) -> list[Utterance]:
    """An utterance of each emotion, and of each speaker."""
    found = [Utterance(f"e{i}", f"e{i}.wav", emotion=emotion) for i, emotion in enumerate(emotions)]
    return found + [Utterance(f"s{i}", f"s{i}.wav", speaker=name) for i, name in enumerate(speakers)]


# ---------------------------------------------------------------------------------------- maps


def test_a_map_is_a_file_or_the_object_itself(tmp_path):
    text = '{" hapy ": "happy", "xxx": null, "A\\u0308rger": "anger", "speaker": {"s1": "S1", "x": null}}'
    expected = {"hapy": "happy", "xxx": None, "Ärger": "anger", "speaker": {"s1": "S1", "x": None}}
    assert parse_map(text) == parse_map(f"\n {text}") == expected
    for mark in ("", "\ufeff"):
        (tmp_path / "labels.json").write_text(mark + text, encoding="utf-8")
        assert parse_map(str(tmp_path / "labels.json")) == expected
    assert parse_map('{"speaker": "narrator"}') == {"speaker": "narrator"}
    assert parse_map('{"happy": "happy", "joy": "happy"}') == {"happy": "happy", "joy": "happy"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not a JSON object such as"),
        ("hapy=happy", "is not a JSON object such as"),
        ("{", "is not a JSON object such as"),
        ("[1]", "found [1], expected an object such as"),
        ("null", "found None, expected an object"),
        ('{"a": 1}', "'a' is 1, expected a name, or null for no label"),
        ('{"a": ["b"]}', "'a' is ['b'], expected a name"),
        ('{"a": {"b": "c"}}', "'a' is {'b': 'c'}, expected a name"),
        ('{"a": " "}', "'a' is ' ', expected a name"),
        ('{"a": NaN}', "'a' is nan, expected a name"),
        ('{"": "b"}', "'' is 'b', expected a name"),
        ('{"a": "\\ud800"}', "expected a name"),
        ('{"a": "b", "a": "c"}', "'a' stands twice"),
        ('{"a": "b", " a ": "c"}', "'a' stands twice"),
        ('{"a": "b", "b": "c"}', "'a' is to be 'b', but that is to be 'c'; each name is replaced once"),
        ('{"a": "b", "b": null}', "'a' is to be 'b', but that is to be no label"),
        ('{"speaker": {"a": 1}}', "'a' is 1, expected a name"),
        ('{"speaker": {"a": {}}}', "'a' is {}, expected a name"),
        ("[" * 100_000, "is not a JSON object such as"),
    ],
)
def test_what_is_no_map_is_refused_with_its_file(tmp_path, text, message):
    path = tmp_path / "labels.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        parse_map(str(path))
    assert message in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.usefixtures("time_limit")
def test_a_map_that_is_no_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "latin").write_bytes(b'{"\xff": null}')
    for name, message in [("pipe", "a pipe"), ("none", "No such file"), (".", "a folder"), ("latin", "utf-8")]:
        with pytest.raises(ConfigError, match=message):
            parse_map(str(tmp_path / name))
    with pytest.raises(ConfigError, match="a device"):
        parse_map("/dev/zero")
    with pytest.raises(ConfigError, match="null"):
        parse_map("a\0b")


# ---------------------------------------------------------------------------------------- spellings

TWINS = [
    ("happy", "Happy"),
    ("happy", "HAPPY"),
    ("straße", "STRASSE"),
    ("very happy", "very  happy"),
    ("very happy", "veryhappy"),
    ("very happy", "very\xa0happy"),
    ("very happy", "very\u2003happy"),
    ("happy", "happy\u200b"),
    ("happy", "hap\u200dpy"),
    ("happy", "\ufeffhappy"),
    ("happy", "happy\u2060"),
    ("happy", "hap\xadpy"),
    ("happy", "happy\ufe0f"),
    ("happy", "happy\u200e"),
    ("happy", "happy\x08"),
    ("happy", "happy\u034f"),
    ("happy", "\uff48\uff41\uff50\uff50\uff59"),
    ("ﬁne", "fine"),
    ("1", "1.0"),
]
DIFFERENT = [
    ("happy", "hapy"),
    ("happy", "unhappy"),
    ("S1 1", "S11"),
    ("1 12", "11 2"),
    ("1", "01"),
    ("1.5", "15"),
    ("a-b", "ab"),
    ("é", "e"),
    ("1", "-1"),
    ("喜", "怒"),
]


@pytest.mark.parametrize(("one", "other"), TWINS)
@pytest.mark.parametrize("kind", ["emotion", "speaker"])
def test_names_that_look_alike_are_refused_in_one_set_and_across_sets(one, other, kind):
    def make(*names):
        return said(*names) if kind == "emotion" else said(speakers=names)

    for sets in ({"train": make(one, other)}, {"train": make(one), "valid": make(other)}):
        with pytest.raises(ManifestError) as caught:
            check_spellings(sets)
        message = str(caught.value)
        assert message.isprintable() or message.replace("\n", "").isprintable()
        first, second = (f"{kind} " in message, "--map labels.json" in message)
        assert first and second and "train 1" in message and ("valid 1" in message) == ("valid" in sets)
        # The map that is offered mends it.
        offered = parse_map(message.rpartition("such as ")[2])
        assert offered == ({"speaker": {other: one}} if kind == "speaker" else {other: one})


def test_both_spellings_are_shown_so_that_they_can_be_told_apart():
    with pytest.raises(ManifestError) as caught:
        check_spellings({"train": said("happy", "happy", "happy\u200b", "Sad", "very\xa0sad", "sad", "very sad")})
    assert r"'happy' (train 2) and 'happy\u200b' (train 1)" in str(caught.value)
    assert r"'very\xa0sad' (train 1) and 'very sad' (train 1)" in str(caught.value)
    offered = parse_map(str(caught.value).rpartition("such as ")[2])
    assert offered == {"happy\u200b": "happy", "sad": "Sad", "very sad": "very\xa0sad"}


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_names_that_differ_otherwise_are_different(one, other):
    assert spelling(one) != spelling(other)
    check_spellings({"train": said(one, other, speakers=[one, other]), "valid": said(other)})


def test_columns_that_are_not_used_are_not_looked_at():
    check_spellings({"train": said("a", "A")}, columns=["speaker"])
    with pytest.raises(ManifestError, match="speaker 'a'"):
        check_spellings({"train": said("a", "A", speakers=["a", "A"])}, columns=["speaker"])


def test_an_emotion_and_a_speaker_are_never_one():
    check_spellings({"train": said("a", speakers=["A"])})


def test_a_name_that_maps_to_itself_is_meant_as_it_is():
    sets = {"train": said(speakers=["a", "A"])}
    check_spellings(sets, label_map={"speaker": {"A": "A"}})
    check_spellings(sets, label_map={"speaker": {"a": "a"}})
    with pytest.raises(ManifestError, match="speaker 'a'"):
        check_spellings(sets, label_map={"A": "A"})
    with pytest.raises(ManifestError, match=r"'a' .* and 'a\\u200b'"):
        check_spellings({"train": said("A", "a", "a\u200b")}, label_map={"A": "A"})


def test_a_label_in_another_spelling_than_the_models_is_refused_and_the_models_own_are_right():
    with pytest.raises(ManifestError) as caught:
        check_spellings({"test": said("Happy", "sad")}, emotions=["happy", "sad"])
    assert "'happy' (of the model) and 'Happy' (test 1)" in str(caught.value)
    assert str(caught.value).endswith('{"Happy": "happy"}')
    check_spellings({"test": said("happy", "Happy")}, emotions=["happy", "Happy"])
    check_spellings({"test": said("neu", "sad")}, emotions=["happy", "Happy"], speakers=["x", "X"])
    with pytest.raises(ManifestError, match="speaker"):
        check_spellings({"test": said(speakers=["S1"])}, speakers=["s1"])


def test_many_spellings_are_counted_and_cut():
    names = [name for i in range(3000) for name in (f"name{i}", f"Name{i}")]
    with pytest.raises(ManifestError, match="and 2980 more") as caught:
        check_spellings({"train": said(*names)})
    assert len(str(caught.value)) < 5000


# ---------------------------------------------------------------------------------------- what is shown


def test_classes_are_listed_with_counts_per_set_and_what_is_lacking():
    train = [
        *said("happy", "sad", "happy", None, speakers=["s"]),
        Utterance("t", "t.wav", emotion="sad", text="text", speaker="s"),
    ]
    lines = label_lines({"train": train, "valid": said("happy", "sad", "sad")})
    assert lines == [
        "train: 6 utterances; emotions happy 2, sad 2; 1 speakers; 2 without emotion; 5 without text; "
        "4 without speaker",
        "valid: 3 utterances; emotions sad 2, happy 1; 3 without text; 3 without speaker",
    ]


def test_a_slip_is_shown_beside_the_class_it_is_near():
    def hints(*names):
        return [line for line in label_lines({"train": said(*names)}) if "did you mean" in line]

    assert hints(*["happy"] * 3, "hapy") == ["  'hapy' (1): did you mean 'happy' (3)?"]
    for slip in ("happpy", "happi", "hapyp", "neutrl", "neutal", "Hapy"):
        assert len(hints(*["happy"] * 5, *["neutral"] * 5, slip)) == 1, slip
    for names in (["happy", "hapy"], ["happy"] * 9 + ["unhappy"], ["emo1"] * 9 + ["emo2"], ["sad"] * 9 + ["bad"]):
        assert not hints(*names), names


def test_a_class_that_seems_to_be_missing_and_one_that_cannot_be_seen_are_shown():
    lines = "\n".join(label_lines({"train": said("n/a", "#N/A", "none", "NAN", "happy\u200b", "a\xa0b")}))
    for name in ("n/a", "#N/A", "none", "NAN"):
        assert f"{name!r} (1) is taken as a class; if it is none: --map '{{\"{name}\": null}}'" in lines
    assert r"'happy\u200b' (1) has characters that cannot be seen" in lines
    assert r"'a\xa0b' (1) has characters that cannot be seen" in lines
    assert lines.replace("\n", "").isprintable()


def test_one_class_alone_is_said_loudly():
    lines = label_lines({"train": said("happy", "happy", None), "valid": said("happy")})
    assert sum("has only one emotion, 'happy': there is nothing to tell apart" in line for line in lines) == 2
    assert not any("warning" in line for line in label_lines({"train": said(None, speakers=["s"])}))
    assert len(label_lines({"t": said("a")}, emotions=[])) == 1, "nobody judges emotions"
    assert any("the model has only one emotion" in line for line in label_lines({"t": said("a")}, emotions=["a"]))


def test_a_class_that_one_set_lacks_is_said_loudly():
    lines = label_lines({"train": said("a", "b", "c"), "valid": said("a", "b", "d"), "test": said(None)})
    assert [line for line in lines if line.startswith("warning")] == [
        "warning: valid has emotions that train lacks, which nothing learns: d",
        "warning: valid lacks emotions that train has, and says nothing of them: c",
    ]
    lines = label_lines({"test": said("a", "x")}, emotions=["a", "b"])
    assert [line for line in lines if line.startswith("warning")] == [
        "warning: test has emotions that the model lacks, which are in no figure (--map renames labels): x",
        "warning: test lacks emotions that the model has, and says nothing of them: b",
    ]
    lines = label_lines({"test": said("ang", "happy")}, emotions=["angry", "happy"])
    assert any(line.endswith("ang (did you mean 'angry'?)") for line in lines)
    assert any(line.endswith("says nothing of them: angry") for line in lines)


def test_speakers_that_differ_in_leading_zeros_are_said():
    sets = {"train": said(speakers=["01", "2", "0"]), "valid": said(speakers=["1", "00", "a", "20"])}
    told = "speakers differ in leading zeros alone, and count as different people: '0' and '00', '01' and '1'"
    assert f"warning: {told}" in label_lines(sets)


def test_lists_are_cut_and_foreign_names_cannot_write_on_a_terminal():
    names = [f"class{i}" for i in range(5000)]
    lines = label_lines({"train": said(*names, "\x1b]0;x\x07", "x" * 5000), "valid": said("other")})
    assert "and 4982 more" in lines[0]
    assert all(len(line) < 1500 and line.isprintable() for line in lines)
    lines = label_lines({"train": said("\x1b[31m", "a, b 3")})
    assert r"'\x1b[31m' 1, 'a, b 3' 1" in lines[0]


# ---------------------------------------------------------------------------------------- selections


def parsed(*options: str, data=None) -> Selection:
    parser = argparse.ArgumentParser()
    selection.add_data_arguments(parser)
    return selection.selected_data(parser.parse_args(options), data)


def test_a_selection_keeps_its_map_and_finds_the_same_labels_again(tmp_path):
    path = column(tmp_path / "m.csv", "emotion", ["hapy", "happy", "xxx", "NA"])
    (tmp_path / "labels.json").write_text('{"hapy": "happy", "xxx": null}')
    chosen = parsed("--map", str(tmp_path / "labels.json"), "--literal-labels", data=path)
    (tmp_path / "labels.json").unlink()
    again = Selection.from_dict(json.loads(json.dumps(chosen.to_dict())))
    assert again == chosen
    for one in (chosen, again, parsed(*chosen.to_options())):
        notes: list[str] = []
        labels = [u.emotion for u in one.read(check_files=False, tell=notes.append)]
        assert labels == ["happy", "happy", None, "NA"]
        assert any("--map, emotion" in note for note in notes)
    assert shlex.join(chosen.to_options()).count("--literal-labels") == 1


def test_a_selection_without_map_is_recorded_as_ever(tmp_path):
    path = column(tmp_path / "m.csv", "emotion", ["a"])
    chosen = parsed(data=path)
    assert chosen.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert chosen.to_dict().keys().isdisjoint({"label_map", "literal_labels"})
    assert "--map" not in chosen.to_options() and "--literal-labels" not in chosen.to_options()


@pytest.mark.usefixtures("time_limit")
def test_a_selection_does_not_wait_for_a_pipe_or_read_a_device(tmp_path):
    os.mkfifo(tmp_path / "m.csv")
    for path, kind in [
        (tmp_path / "m.csv", "a pipe"),
        ("/dev/zero", "a device"),
        (tmp_path / "none", "No such file"),
    ]:
        with pytest.raises(ManifestError, match=kind):
            Selection(str(path)).stamped()
        with pytest.raises(ManifestError, match=kind):
            Selection(str(path), sha256="0" * 64).read()
    with pytest.raises(ManifestError, match="null"):
        Selection("a\0b").stamped()
    (tmp_path / "real.csv").write_text("file\na\n")
    (tmp_path / "link.csv").symlink_to("real.csv")
    assert (
        Selection(str(tmp_path / "link.csv")).stamped().sha256
        == Selection(str(tmp_path / "real.csv")).stamped().sha256
    )


@pytest.mark.parametrize(
    "change",
    [
        {"data": 1},
        {"data": None},
        {"sha256": None},
        {"root": 3},
        {"columns": []},
        {"columns": {"text": 1}},
        {"shares": "speakers"},
        {"shares": [1]},
        {"seed": "0"},
        {"label_map": []},
        {"label_map": {"a": [1]}},
        {"label_map": {"speaker": {"a": 1}}},
        {"literal_labels": 1},
        {"other": 1},
    ],
)
def test_what_is_no_selection_is_refused(change):
    with pytest.raises(ConfigError):
        Selection.from_dict({"data": "m.csv"} | change)
    for value in (None, [], "m.csv", {}):
        with pytest.raises(ConfigError):
            Selection.from_dict(value)


# ---------------------------------------------------------------------------------------- evaluation


def test_evaluation_shows_the_classes_and_refuses_another_spelling_than_the_models(tmp_path, capsys):
    toy_recognizer(heads=("emotion",)).save(tmp_path / "model")
    toy_recognizer(heads=("ctc",)).save(tmp_path / "ctc")
    path = write_corpus(tmp_path, 4)
    path.write_text(path.read_text().replace(",happy,", ",Happy,").replace(",sad,", ",NA,"))
    options = ["--manifest", str(path), "--device", "cpu", "--resamples", "2"]
    with pytest.raises(ManifestError, match=r"'happy' \(of the model\) and 'Happy' \(data 1\)"):
        execute("evaluate", ["--model", str(tmp_path / "model"), *options])
    execute("evaluate", ["--model", str(tmp_path / "ctc"), *options])  # which judges no emotions
    capsys.readouterr()
    out = ["--out", str(tmp_path / "out"), "--no-pictures"]
    execute("evaluate", ["--model", str(tmp_path / "model"), *options, "--map", '{"Happy": "happy"}', *out])
    said = capsys.readouterr().err
    assert "data: 4 utterances; emotions angry 1, happy 1, neutral 1; 3 speakers; 1 without emotion" in said
    assert "emotion 'NA' (1)" in said and "--map, emotion: 'Happy' is 'happy' (1)" in said
    assert "warning: data lacks emotions that the model has, and says nothing of them: sad" in said
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["judged"]["emotion"] == 3
    assert report["selection"]["label_map"] == {"Happy": "happy"}


def test_labels_of_other_names_than_the_models_are_said_once_with_what_to_do(tmp_path, capsys):
    toy_recognizer(heads=("emotion", "speaker")).save(tmp_path / "model")
    path = write_corpus(tmp_path, 4)
    path.write_text(re.sub(r",s(?=\d)", ",t", path.read_text().replace(",happy,", ",hapy,")))
    execute("evaluate", ["--model", str(tmp_path / "model"), "--manifest", str(path), "--resamples", "2"])
    said = capsys.readouterr()
    both = said.err + said.out
    assert both.count("did you mean 'happy'?") == 1 and both.count("--map") == 1
    assert "in no figure (--map renames labels): hapy (did you mean 'happy'?)" in said.err
    assert "emotions are judged on 3: 1 have one that is no class of the model ('hapy' x1)" in said.out
    assert "no speaker is one whom the model knows" in said.out and "speakers are judged on" not in said.out


@pytest.mark.parametrize("mode", [["--compare", "a", "b"], ["--verify", "a"]])
def test_labels_that_stand_already_are_not_renamed_in_vain(mode):
    maps = [["--map", "{}"]] if mode[0] == "--verify" else []  # two files may have other names of the same classes
    for options in (*maps, ["--literal-labels"], ["--columns", "emotion=label"], ["--no-usual-names"]):
        with pytest.raises(ConfigError, match=rf"{mode[0]} takes no {options[0]}: labels "):
            execute("evaluate", [*mode, *options])


def test_an_empty_map_of_a_command_line_is_no_map(tmp_path):
    with pytest.raises(ConfigError, match="not a regular file"):
        parsed("--map", "", data=column(tmp_path / "m.csv", "emotion", ["a"]))


@pytest.mark.usefixtures("time_limit")
def test_predictions_to_compare_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "p.csv")
    with pytest.raises(ConfigError, match="not a regular file but a pipe, expected a predictions file"):
        execute("evaluate", ["--compare", str(tmp_path / "p.csv"), str(tmp_path / "p.csv")])

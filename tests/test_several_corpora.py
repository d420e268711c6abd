"""Several corpora in one training: names, lists, maps, usual names, figures of each."""

import json
import re
import shutil
from argparse import ArgumentParser
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy import toy_recognizer, write_corpus

from ser.cli import execute
from ser.data import several
from ser.data.manifest import Utterance, read_manifest
from ser.data.selection import Selection, add_data_arguments, selected_data, selected_sets, with_usual_names
from ser.data.spellings import USUAL_NAMES, label_lines, usual_line, usual_names
from ser.errors import ConfigError, ManifestError, SerError
from ser.scores.card import read_record, write_card
from ser.train.content import contents

NAMES = {"emo": {"angry": "anger", "happy": "joy", "sad": "sadness"}, "tess": {"neutral": "calm"}}
QUICK = ["--epochs", "2", "--effective-batch", "4", "--save-every", "1", "--keep", "99", "--device", "cpu"]
BOTH = ["--heads", "emotion,speaker", "--beta", "0.5", "--allow-overlap", "speakers"]


def renamed(path: Path, names: dict[str, str]) -> Path:
    """A manifest with other names of emotions."""
    text = path.read_text()
    for old, new in names.items():
        text = text.replace(f",{old},", f",{new},")
    path.write_text(text)
    return path


def write_corpora(folder: Path) -> Path:
    """Two corpora with other names of the same emotions, and the same ids and speakers."""
    for name, names in NAMES.items():
        for seed, part in enumerate(("train", "valid", "test")):
            renamed(write_corpus(folder / name, 12, speakers=2, seed=seed, name=part), names)
    toy_recognizer(heads=["emotion"]).save(folder / "init")
    return folder


def paths(folder: Path, part: str, *names: str) -> list[str]:
    return [str(folder / name / f"{part}.csv") for name in names or NAMES]


def train(folder: Path, out: Path, *options: object, train=None, valid=None) -> int:
    """`ser train` on both corpora."""
    data = ["--train", *(train or paths(folder, "train")), "--valid", *(valid or paths(folder, "valid"))]
    words = [*data, "--init", folder / "init", *QUICK, *BOTH, "--out", out, *options]
    return execute("train", [str(word) for word in words])


def chosen(*options: str, **sets) -> dict[str, Selection]:
    """The selections of sets of manifests."""
    parser = ArgumentParser()
    add_data_arguments(parser)
    return selected_sets(parser.parse_args(options), sets)


def rows_of(*options: str, tell=None, **sets) -> dict[str, list[Utterance]]:
    return {name: one.read(check_files=False, tell=tell) for name, one in chosen(*options, **sets).items()}


def manifest(path: Path, *rows: str, header: str = "file,emotion,speaker,id") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *rows]) + "\n")
    return str(path)


def listing(path: Path, value: object) -> str:
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return str(path)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> Path:
    """Two corpora, and a run on both."""
    folder = write_corpora(tmp_path_factory.mktemp("corpora"))
    train(folder, folder / "run")
    return folder


# ------------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("emodb/train.csv", "emodb"),
        ("emodb/valid.csv", "emodb"),
        ("x/emodb_test.csv", "emodb"),
        ("x/train-emodb.jsonl", "emodb"),
        ("x/emodb.dev.tsv", "emodb"),
        ("x/emodb_v2_train.csv", "emodb_v2"),
        ("emodb/train/test.csv", "emodb"),
        ("x/trains.csv", "trains"),
        ("x/VALID.csv", "x"),
        ("x/y/../train.csv", "x"),
        ("data/aesdd/emobox.csv", "aesdd"),
        ("data/emobox/emobox.csv", "emobox"),
        ("emobox/train.csv", "emobox"),
    ],
)
def test_a_corpus_is_called_after_its_manifest_or_its_folder(path, name):
    assert several.default_name(path) == name


def test_a_manifest_in_no_folder_has_no_name_and_is_refused():
    assert several.default_name("/train.csv") == ""
    with pytest.raises(ConfigError, match=r"/train.csv: the corpus '' is no name; name them in a JSON list"):
        several.check_sources({"train": [several.NamedManifest("/train.csv")]})


def test_the_same_names_in_two_corpora_are_two_utterances_and_two_people(tmp_path):
    a = manifest(tmp_path / "a/train.csv", "1.wav,sad,s1,u1", "2.wav,sad,,u2", header="file,emotion,speaker,id")
    b = manifest(tmp_path / "b/train.csv", "1.wav,sad,s1,u1")
    rows = rows_of(train=[a, b])["train"]
    assert [u.id for u in rows] == ["a/u1", "a/u2", "b/u1"]
    assert [u.speaker for u in rows] == ["a/s1", None, "b/s1"]
    assert [u.corpus for u in rows] == ["a", "a", "b"]


def test_dialogues_and_sessions_are_of_a_corpus_too(tmp_path):
    header = "file,session,dialogue,room"
    files = [manifest(tmp_path / name / "train.csv", "1.wav,1,d,x", header=header) for name in "ab"]
    extras = [u.extra for u in rows_of(train=files)["train"]]
    assert extras == [{"session": f"{c}/1", "dialogue": f"{c}/d", "room": "x", "corpus": c} for c in "ab"]


def test_one_manifest_alone_is_read_and_recorded_as_ever_also_with_a_column_corpus(tmp_path):
    path = manifest(tmp_path / "a/train.csv", "1.wav,joy,s1,u1,x", header="file,emotion,speaker,id,corpus")
    one = chosen(train=[path])["train"]
    keys = ["data", "sha256", "root", "columns", "protocol", "shares", "seed", "fold", "known_turns", "part"]
    assert list(one.to_dict()) == keys and one.to_dict()["data"] == path
    (row,) = one.read(check_files=False)
    assert (row.id, row.speaker, row.emotion, row.corpus) == ("u1", "s1", "joy", "x")
    assert [row] == read_manifest(path, check_files=False)


def test_a_pooled_manifest_in_a_list_is_the_same_as_its_corpora(tmp_path):
    a = manifest(tmp_path / "a/train.csv", "1.wav,sad,s1,u1", "2.wav,joy,s2,u2")
    b = manifest(tmp_path / "b/train.csv", "1.wav,sad,s1,u1")
    rows = ["a/1.wav,sad,s1,u1,a", "a/2.wav,joy,s2,u2,a", "b/1.wav,sad,s1,u1,b"]
    header = "file,emotion,speaker,id,corpus"
    pooled = manifest(tmp_path / "pooled.csv", *rows, header=header)
    one = rows_of(train=[listing(tmp_path / "list.json", [{"path": "pooled.csv"}])])["train"]
    two = rows_of(train=[a, b])["train"]
    assert one == two and contents(one) == contents(two)
    with pytest.raises(ManifestError, match="the id 'u1' is that of line 2 already"):
        rows_of(train=[pooled])


def test_where_one_set_has_several_corpora_the_other_names_its_corpus_too(tmp_path):
    a, b, v = (manifest(tmp_path / f"{n}.csv", "1.wav,sad,s1,u1") for n in ("a/train", "b/train", "a/valid"))
    both = rows_of(train=[a, b], valid=[v])
    assert both["valid"][0].speaker == "a/s1"


# -------------------------------------------------------------------------------------------- what is refused


def test_manifests_that_cannot_be_told_apart_are_refused(tmp_path):
    a, b, c = (manifest(tmp_path / f"{n}.csv", "1.wav,sad,s1,u1") for n in ("a/train", "b/a_train", "c/A_valid"))
    (tmp_path / "link").symlink_to(tmp_path / "a")
    for again in (a, tmp_path / "link/../a/train.csv"):
        with pytest.raises(ConfigError, match=r"manifests: .*train.csv is given twice"):
            chosen(train=[a, again])
    with pytest.raises(ConfigError, match=r"are both called 'a'; name them in a JSON list, such as \[\{"):
        chosen(train=[a, b])
    with pytest.raises(ConfigError, match=r"the corpora 'A' and 'a' differ in spelling alone"):
        chosen(train=[a, manifest(tmp_path / "d/train.csv", "1.wav,sad,s1,u1")], valid=[c])


def test_a_recording_or_an_id_that_stands_in_two_manifests_is_refused(tmp_path):
    a, b = (manifest(tmp_path / f"{n}/train.csv", "1.wav,sad,s1,u1") for n in "ab")
    with pytest.raises(ManifestError, match=r"utterance 'b/u1': is the same recording as 'a/u1'"):
        rows_of("--root", str(tmp_path), train=[a, b])
    header = "file,emotion,speaker,id,corpus"
    manifest(tmp_path / "c.csv", "1.wav,sad,s1,u1,a", "2.wav,sad,s1,u2,a", header=header)
    both = listing(tmp_path / "list.json", [{"path": "a/train.csv"}, {"path": "c.csv"}])
    with pytest.raises(ManifestError, match=r"these are their problems \(1\):\n  utterance 'a/u1': its id"):
        rows_of(train=[both])


def test_a_cell_that_can_be_no_corpus_is_a_bad_row(tmp_path):
    header = "file,emotion,speaker,id,corpus"
    manifest(tmp_path / "c.csv", "1.wav,sad,s1,u1,a/b", "2.wav,sad,s1,u2,\x1b", header=header)
    with pytest.raises(
        ManifestError, match=r"line 2: the corpus 'a/b' holds a /.*\n  line 3: the corpus .* is no n"
    ):
        rows_of(train=[listing(tmp_path / "list.json", [{"path": "c.csv"}])])


def test_corpora_that_two_manifests_spell_differently_are_refused(tmp_path):
    header = "file,emotion,speaker,id,corpus"
    path = manifest(tmp_path / "c.csv", "1.wav,sad,s1,u1,Emo", "2.wav,sad,s1,u1,emo", header=header)
    one = chosen(train=[listing(tmp_path / "list.json", [{"path": path}])])["train"]
    with pytest.raises(ConfigError, match=r"the corpora 'Emo' and 'emo' differ in spelling alone"):
        one.review({"train": one.read(check_files=False)}, print, emotions=None)


HOSTILE = [
    ("{}", "expected a list of manifests such as"),
    ('{"path": "a.csv"}', "found .* expected a list of manifests such as"),
    ("[]", "lists no manifest"),
    ("7", "found 7, expected a list"),
    ('"a.csv"', "expected a list"),
    ("null", "found None, expected a list"),
    ("[1]", "item 1: found 1, expected an object"),
    ("[[]]", r"item 1: found \[\], expected an object"),
    ('[{"path": "a.csv"}, "b.csv"]', "item 2: found 'b.csv', expected an object"),
    ("[{}]", "item 1: has no path"),
    ('[{"root": "a"}]', "item 1: has no path"),
    ('[{"path": ""}]', "item 1: has no path"),
    ('[{"path": 3}]', "item 1: path is 3, expected a text"),
    ('[{"path": null}]', "item 1: path is None, expected a text"),
    ('[{"path": "a.csv", "rot": "x"}]', "item 1: unknown key 'rot' .did you mean 'root'.*; known are path, root"),
    ('[{"path": "a.csv", "sha256": "x"}]', "item 1: unknown key 'sha256'"),
    ('[{"path": "a.csv", "root": 1}]', "item 1: root is 1, expected a text"),
    ('[{"path": "a.csv", "columns": []}]', r"item 1: columns is \[\], expected an object of names"),
    ('[{"path": "a.csv", "columns": {"text": 1}}]', "item 1: columns is .* expected an object of names"),
    ('[{"path": "a.csv", "map": "x"}]', "item 1: map is 'x', expected an object"),
    ('[{"path": "a.csv", "map": {"a": 1}}]', "item 1: map: 'a' is 1, expected a name, or null"),
    ('[{"path": "a.csv", "name": null}]', "item 1: name is None, expected a text"),
    ('[{"path": "a.csv", "name": "x/y"}]', "the corpus 'x/y' holds a /"),
    ('[{"path": "a.csv", "name": "\\u001b"}]', "is no name"),
    ('[{"path": "a.csv", "path": "b.csv"}]', "is no JSON list of manifests"),
    ('[{"path": "a.csv"}', "is no JSON list of manifests"),
    ('[{"path": "a.csv"}, {"path": "b/a.csv"}]', "are both called 'a'"),
    ('[{"path": "a.csv", "name": "x"}, {"path": "b/a.csv", "name": "x"}]', "are both called 'x'"),
    ('[{"path": "a.csv", "name": "x"}, {"path": "a.csv", "name": "y"}]', "is the same recording as 'x/u1'"),
    ('[{"path": "list.json"}]', "is a list of manifests itself"),
    ('[{"path": "other.json"}]', "is a list of manifests itself"),
    ('[{"path": "none.csv"}]', "none.csv: cannot be read: No such file"),
    ('[{"path": "a\\u0000b"}]', "is no name; name them"),
    ('[{"path": "a\\u0000b", "name": "a"}]', "cannot be read: "),
    ('[{"path": "."}]', "is a folder, and has no iemocap4.csv as preparing writes it"),
    ('[{"path": "a.csv", "root": "none"}]', "none, which is not a folder"),
    ('[{"path": "a.csv", "columns": {"emo": "x"}}]', "no column of ours is called 'emo'"),
]


@pytest.mark.parametrize(("text", "message"), HOSTILE, ids=range(len(HOSTILE)))
def test_a_list_that_is_none_is_refused_in_one_line(tmp_path, text, message):
    for name in ("a.csv", "b/a.csv"):
        manifest(tmp_path / name, "1.wav,sad,s1,u1")
    listing(tmp_path / "other.json", [{"path": "a.csv"}])
    with pytest.raises(SerError, match=message) as refused:
        rows_of(train=[listing(tmp_path / "list.json", text)])
    assert "\n" not in str(refused.value) or "is the same recording" in message


def test_a_list_of_a_megabyte_or_nested_without_end_is_refused_soon(tmp_path):
    for text in ("[" * 100_000, '[{"path": "' + "a" * 900_000 + '"}]', '[{"path":' * 50_000):
        with pytest.raises(SerError) as refused:
            rows_of(train=[listing(tmp_path / "list.json", text)])
        assert len(str(refused.value)) < 1_000_000


def test_a_list_is_given_alone_and_a_manifest_in_json_is_no_list(tmp_path):
    a = manifest(tmp_path / "a/train.csv", "1.wav,sad,s1,u1")
    one = listing(tmp_path / "list.json", [{"path": "a/train.csv"}])
    with pytest.raises(ConfigError, match=r"list.json: is a list of manifests, which is given alone"):
        chosen(train=[a, one])
    rows = listing(tmp_path / "rows.json", [{"file": "1.wav", "emotion": "sad", "speaker": "s1"}])
    lines = listing(tmp_path / "lines.json", '{"file": "1.wav"}\n{"file": "2.wav"}\n')
    other = listing(tmp_path / "other.json", [{"path": "1.wav", "name": "joy"}])
    assert [u.speaker for u in rows_of(train=[rows])["train"]] == ["s1"]
    assert len(rows_of(train=[lines])["train"]) == 2
    assert rows_of("--columns", "file=path", "emotion=name", train=[other])["train"][0].emotion == "joy"
    assert [u.id for u in rows_of(train=[a, lines])["train"]] == ["a/u1", "lines/1.wav", "lines/2.wav"]


def test_a_list_whose_manifests_call_the_column_of_files_path_is_a_list(tmp_path):
    for name in ("a", "b"):
        manifest(tmp_path / f"{name}/train.csv", f"{name}.wav,sad,s1,u1", header="path,emotion,speaker,id")
    listing(tmp_path / "rows.json", [{"path": "c.wav", "name": "joy"}])
    items = [{"path": "a/train.csv"}, {"path": "b/train.csv", "name": "B"}, {"path": "rows.json"}]
    path = listing(tmp_path / "list.json", items)
    read = rows_of("--columns", "file=path", train=[path])["train"]
    assert [u.id for u in read] == ["a/u1", "B/u1", "rows/c.wav"]
    assert [u.file.name for u in read] == ["a.wav", "b.wav", "c.wav"]
    for row in ({"path": "1.csv", "emotion": "sad"}, {"path": "1.wav"}):  # rows of a manifest
        assert several.listed(listing(tmp_path / "one.json", [row]), "path") is None


def test_the_folder_of_a_prepared_corpus_is_given_or_listed_like_its_manifest(tmp_path):
    prepared = manifest(tmp_path / "prep/emodb.csv", "1.wav,sad,s1,u1")
    other = manifest(tmp_path / "other.csv", "1.wav,sad,s1,u1")
    path = listing(tmp_path / "list.json", [{"path": "prep"}, {"path": "other.csv"}])
    for given in ([path], [str(tmp_path / "prep"), other]):
        read = rows_of(train=given)["train"]
        assert [(u.id, u.file) for u in read] == [
            ("prep/u1", tmp_path / "prep/1.wav"),
            ("other/u1", tmp_path / "1.wav"),
        ]
    parser = ArgumentParser()
    add_data_arguments(parser)
    arguments = parser.parse_args(["--data", str(tmp_path / "prep"), "--protocol", "column"])
    one = selected_data(arguments, corpora=True)
    assert one.sources[0].path == prepared
    alone = selected_data(arguments).as_corpora()
    assert (alone.sources, alone.sha256) == (one.sources, one.sha256), "so its fold is known again"


# ------------------------------------------------------------------------------------------------------ roots


def test_each_manifest_has_its_root_and_validation_that_of_the_same_corpus(tmp_path):
    a, b, v = (manifest(tmp_path / f"{n}.csv", "1.wav,sad,s1,u1") for n in ("a/train", "b/train", "b/valid"))
    for name in ("ra", "rb"):
        (tmp_path / name).mkdir()
    roots = [str(tmp_path / name) for name in ("ra", "rb")]
    read = rows_of("--root", *roots, train=[a, b], valid=[v])
    assert [u.file.parent.name for u in (*read["train"], *read["valid"])] == ["ra", "rb", "rb"]
    other = manifest(tmp_path / "c/valid.csv", "1.wav,sad,s1,u1")
    for sets, message in [
        ({"train": [a, b], "valid": [other]}, "--root names no folder for .*c/valid.csv; a JSON list"),
        ({"train": [a]}, "--root names 2 folders for one manifest"),
        ({"train": [a, b, other]}, "--root names 2 folders for 3 manifests"),
        ({"train": [listing(tmp_path / "list.json", [{"path": "a/train.csv"}])]}, "names the root of each"),
    ]:
        with pytest.raises(ConfigError, match=message):
            chosen("--root", *roots, **sets)


def test_a_list_names_paths_roots_columns_and_what_it_does_not_say_the_flags_say(tmp_path):
    manifest(tmp_path / "lists/a/x.csv", "1.wav,sad,s1,u1", header="file,label,speaker,id")
    manifest(tmp_path / "lists/b/y.csv", "1.wav,sad,s1,u1", header="file,mood,speaker,id")
    (tmp_path / "lists/r").mkdir()
    first = {"path": "a/x.csv", "root": "r", "columns": {"emotion": "label"}, "name": "one"}
    path = listing(tmp_path / "lists/list.json", [first, {"path": "b/y.csv"}])
    (one,) = chosen("--root", str(tmp_path), "--columns", "emotion=mood", train=[path]).values()
    rows = one.read(check_files=False)
    assert [(u.id, u.emotion) for u in rows] == [("one/u1", "sad"), ("y/u1", "sad")]
    assert [u.file for u in rows] == [tmp_path / "lists/r/1.wav", tmp_path / "1.wav"]
    assert Selection.from_dict(json.loads(json.dumps(one.to_dict()))) == one


# ------------------------------------------------------------------------------------------------------- maps


def test_a_manifests_own_map_goes_first_and_the_common_one_sees_what_it_made(tmp_path):
    manifest(tmp_path / "a.csv", "1.wav,J,s1,u1", "2.wav,xx,s2,u2", "3.wav,NA,s2,u3")
    manifest(tmp_path / "b.csv", "1.wav,J,s1,u1", "2.wav,sad,s2,u2")
    items = [{"path": "a.csv", "map": {"J": "joy", "speaker": {"s1": "S", "s9": "x"}}, "root": "/tmp"}]
    path = listing(tmp_path / "list.json", [*items, {"path": "b.csv"}])
    common = {"joy": "happy", "sad": None, "NA": "neutral", "hapy": "x", "speaker": {"b/s1": "a/S", "s2": "x"}}
    told: list[str] = []
    rows = rows_of("--map", json.dumps(common), train=[path], tell=told.append)["train"]
    assert [u.emotion for u in rows] == ["happy", "xx", "neutral", "J", None]
    assert [u.speaker for u in rows] == ["a/S", "a/s2", "a/s2", "a/S", "b/s2"]
    remarks = [line for line in told if "--map: no " in line]
    assert len(remarks) == 3, remarks
    assert any("no emotion here is called 'hapy'" in line for line in remarks)
    assert any("no speaker here is called 's2' (did you mean" in line for line in remarks)


# ------------------------------------------------------------------------------------------------ usual names


def test_the_usual_names_are_words_that_stand_once():
    words = [name for usual, others in USUAL_NAMES.items() for name in (usual, *others) if name]
    assert len(set(words)) == len(words)


@pytest.mark.parametrize(
    ("names", "options", "changes"),
    [
        (["joy", "happy", "Anger", "odd"], {}, {"joy": "happy", "Anger": "angry"}),
        (["calm", "neutral"], {}, {"calm": None}),
        (["joy", "happiness", "calm"], {"kept": ["joy", "calm"]}, {"happiness": "joy"}),
        (["joy", "sad"], {"kept": ["joy", "happiness"]}, {}),
        (["joy", "happy", "fear", "calm"], {"known": ["joy", "calm"]}, {"happy": "joy", "fear": "fearful"}),
        (["joy", "happy", "fear"], {"known": ["joy", "fear"], "kept": ["happy"]}, {"joy": "happy"}),
        (["joy", "happy", "happiness"], {"known": ["joy", "happy"]}, {"happiness": "happy"}),
        (["joy", "fear", "calm"], {"classes": ["happiness", "sad"]}, {"joy": "happiness"}),
        (["happy"], {"classes": ["joy", "happiness"]}, {}),
        (["Happy", "joy"], {"classes": ["happy", "joy"]}, {}),
        (["joy"], {"classes": ["happy"], "kept": ["joy"]}, {}),
        (["joy"], {"classes": []}, {}),
        (["Happy"], {"classes": ["happy"]}, {}),  # another spelling, which is refused
        ([""], {}, {}),
    ],
)
def test_usual_names_follow_the_table_a_persons_choice_and_the_models_classes(names, options, changes):
    assert usual_names(names, **options) == changes


def test_what_the_table_changed_is_said_with_counts():
    line = usual_line({"joy": "happy", "calm": None, "happiness": "happy"}, {"joy": 3, "calm": 2, "happiness": 1})
    assert line.endswith(": joy (3), happiness (1) is happy; calm (2) left out") and "--no-usual-names" in line


def emotions(rows: list[Utterance]) -> list[str | None]:
    return [u.emotion for u in rows]


def test_usual_names_are_recorded_and_read_again(tmp_path):
    a, b = (
        manifest(tmp_path / f"{n}/t.csv", f"1.wav,{e},s,u", "2.wav,calm,s,v")
        for n, e in (("a", "joy"), ("b", "x"))
    )
    path = listing(tmp_path / "list.json", [{"path": a, "name": "a"}, {"path": b, "name": "b"}])
    one = chosen(train=[path])
    rows = {"train": one["train"].read(check_files=False)}
    named, renamed_rows = with_usual_names(one, rows, print)
    assert emotions(renamed_rows["train"]) == ["happy", None, "x", None]
    again = Selection.from_dict(json.loads(json.dumps(named["train"].to_dict())))
    assert again.usual_names == {"joy": "happy", "calm": None}
    assert emotions(again.read(check_files=False)) == ["happy", None, "x", None]
    off = chosen("--no-usual-names", train=[path])
    assert off["train"].to_dict()["no_usual_names"] and "--no-usual-names" in off["train"].to_options()
    rows = {"train": off["train"].read(check_files=False)}
    assert with_usual_names(off, rows, print) == (off, rows)
    assert emotions(rows["train"]) == ["joy", "calm", "x", "calm"]


def mapped(folder: Path, own: dict, common: dict, *, a: str, b: str) -> list[str | None]:
    """The emotions of two corpora, after the own map of a, the common map and usual names."""
    rows = {name: ",".join(["1.wav", emotion, "s", "u"]) for name, emotion in (("a", a), ("b", b))}
    files = {name: manifest(folder / f"{name}/train.csv", row) for name, row in rows.items()}
    path = listing(folder / "list.json", [{"path": files["a"], "map": own}, {"path": files["b"]}])
    one = chosen("--map", json.dumps(common), train=[path])
    sets = {"train": one["train"].read(check_files=False)}
    return emotions(with_usual_names(one, sets, print)[1]["train"])


@pytest.mark.parametrize(
    ("own", "common", "a", "b", "expected"),
    [
        ({"joy": None}, {}, "joy", "happy", [None, "happy"]),
        ({"joy": None}, {}, "joy", "joy", [None, "happy"]),  # the map of a says nothing of b
        ({}, {"excitement": "happy"}, "excitement", "excited", ["happy", "excited"]),
        ({}, {"happiness": "joy"}, "happiness", "happy", ["joy", "joy"]),
        ({"J": "happiness"}, {"happiness": "joy"}, "J", "happy", ["joy", "joy"]),
        ({"joy": "joy"}, {}, "joy", "happy", ["joy", "joy"]),
    ],
)
def test_a_name_that_a_map_drops_or_replaces_is_no_name_for_other_emotions(tmp_path, own, common, a, b, expected):
    assert mapped(tmp_path, own, common, a=a, b=b) == expected


def test_one_manifest_in_training_is_never_renamed(tmp_path, capsys):
    write_corpora(tmp_path)
    options = {"train": paths(tmp_path, "train", "emo"), "valid": paths(tmp_path, "valid", "emo")}
    train(tmp_path, tmp_path / "run", **options)
    record = read_record(tmp_path / "run/best")
    assert record["emotions"] == ["anger", "joy", "neutral", "sadness"]
    assert "sources" not in record["settings"]["train"] and "usual names" not in capsys.readouterr().err
    assert "corpora" not in record["evaluations"][0]


def test_training_on_several_corpora_keeps_the_classes_of_the_model_that_it_begins_with(tmp_path, capsys):
    write_corpora(tmp_path)
    for name in NAMES:
        sets = {part: paths(tmp_path, part, name) for part in ("train", "valid")}
        train(tmp_path, tmp_path / name / "run", "--heads", "emotion", **sets)
    capsys.readouterr()
    words = ["--heads", "emotion", "--map", '{"calm": "neutral"}']
    train(tmp_path, tmp_path / "run", *words, "--init", tmp_path / "emo/run/best")
    said = capsys.readouterr().err
    assert "angry (6) is anger; happy (6) is joy; sad (6) is sadness" in said and "is not kept" not in said
    assert read_record(tmp_path / "run/best")["emotions"] == ["anger", "joy", "neutral", "sadness"]
    train(tmp_path, tmp_path / "calm", "--heads", "emotion", "--init", tmp_path / "tess/run/best")
    assert "calm (6)" not in capsys.readouterr().err
    assert read_record(tmp_path / "calm/best")["emotions"] == ["angry", "calm", "happy", "neutral", "sad"]


def test_one_manifest_with_a_column_corpus_is_not_renamed_either(tmp_path, capsys):
    write_corpora(tmp_path)
    for part in ("train", "valid"):
        path = tmp_path / f"emo/{part}.csv"
        header, *rows = path.read_text().splitlines()
        path.write_text("\n".join([f"{header},corpus", *(f"{row},{i % 2}" for i, row in enumerate(rows))]) + "\n")
    options = {"train": paths(tmp_path, "train", "emo"), "valid": paths(tmp_path, "valid", "emo")}
    train(tmp_path, tmp_path / "run", **options)
    record = read_record(tmp_path / "run/best")
    assert record["emotions"] == ["anger", "joy", "neutral", "sadness"]
    assert "corpora" not in record["evaluations"][0] and "emo 0" not in capsys.readouterr().err


def test_validation_of_several_takes_the_names_of_the_one_that_is_trained_on(tmp_path, capsys):
    write_corpora(tmp_path)
    only, both = paths(tmp_path, "train", "emo"), paths(tmp_path, "valid")
    train(tmp_path, tmp_path / "run", "--map", '{"calm": null}', train=only, valid=both)
    said = capsys.readouterr().err
    assert "angry (3) is anger; happy (3) is joy; sad (3) is sadness" in said
    assert read_record(tmp_path / "run/best")["emotions"] == ["anger", "joy", "neutral", "sadness"]


def test_evaluation_gives_a_label_the_models_name_unless_it_is_told_not_to(tmp_path, capsys):
    toy_recognizer(heads=["emotion"]).save(tmp_path / "model")
    path = renamed(write_corpus(tmp_path / "emo", 8), {"happy": "joy", "neutral": "calm"})
    words = ["--model", str(tmp_path / "model"), "--manifest", str(path), "--resamples", "2", "--no-pictures"]
    execute("evaluate", [*words, "--out", str(tmp_path / "out")])
    assert "(--no-usual-names leaves them as they are): joy (2) is happy\n" in capsys.readouterr().err
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["judged"]["emotion"] == 6 and report["other_labels"] == {"calm": 2}
    assert report["selection"]["usual_names"] == {"joy": "happy"} and "sources" not in report["selection"]
    execute("evaluate", [*words, "--out", str(tmp_path / "off"), "--no-usual-names"])
    report = json.loads((tmp_path / "off/report.json").read_text())
    assert report["judged"]["emotion"] == 4 and report["other_labels"] == {"joy": 2, "calm": 2}


# ------------------------------------------------------------------------------------------------ the listing


def test_classes_are_counted_by_corpus(tmp_path):
    files = [manifest(tmp_path / f"{n}/train.csv", *rows) for n, rows in {
        "a": ["1.wav,sad,s1,u1", "2.wav,sad,s2,u2", "3.wav,,s2,u3"],
        "b": ["1.wav,joy,s1,u1"],
    }.items()]  # fmt: skip
    lines = label_lines({"train": rows_of(train=files)["train"]}, by_corpus=True)
    table = lines[lines.index("train  joy  sad  no emotion  utterances  speakers") :]
    assert table[1:3] == [
        "  a      0    2           1           3         2",
        "  b      1    0           0           1         1",
    ]
    assert not any(line.startswith("train  joy") for line in label_lines({"train": rows_of(train=files)["train"]}))


def test_a_table_of_many_corpora_and_classes_is_cut_and_commands_no_terminal(tmp_path):
    def row(i: int) -> Utterance:
        return Utterance(str(i), Path("x"), emotion=f"e\x1b{i % 40:02d}" * 30, extra={"corpus": f"c\x1b{i % 50}"})

    lines = label_lines({"train": [row(i) for i in range(200)]}, by_corpus=True)
    assert any("others" in line for line in lines) and "  and 30 more corpora" in lines
    assert all(len(line) < 6000 and line.isprintable() for line in lines)
    named = {"train": [Utterance("1", Path("x"), emotion="speakers", extra={"corpus": "c"})]}
    assert label_lines(named, by_corpus=True)[1].split() == ["train", "speakers", "utterances", "speakers"]


# ------------------------------------------------------------------------------------------------- end to end


def test_a_run_lists_and_records_its_corpora_and_tells_their_speakers_apart(corpora, tmp_path, capsys):
    train(corpora, tmp_path / "run")
    said = capsys.readouterr().err
    assert "anger (6) is angry; calm (6) left out; joy (6) is happy; sadness (6) is sad" in said
    assert re.search(
        r"train +angry +happy +neutral +sad +no emotion +utterances +speakers\n  emo +3 +3 +3 +3 +0", said
    )
    assert re.search(r"unweighted_accuracy emo [\d.]+ +unweighted_accuracy tess [\d.]+", said)
    settings = json.loads((tmp_path / "run/config.json").read_text())
    assert settings["speakers"] == ["emo/s0", "emo/s1", "tess/s0", "tess/s1"]
    assert settings["labels"] == ["angry", "happy", "neutral", "sad"]
    assert [source["name"] for source in settings["train"]["sources"]] == ["emo", "tess"]
    assert all(len(source["sha256"]) == 64 for source in settings["train"]["sources"])


def test_cards_hold_with_figures_of_each_corpus_and_pooled(corpora, tmp_path, capsys):
    shutil.copytree(corpora / "run/best", tmp_path / "best")
    words = ["--manifest", *paths(corpora, "test"), "--resamples", "5", "--card", "--no-pictures"]
    execute("evaluate", ["--model", str(tmp_path / "best"), *words, "--out", str(tmp_path / "out")])
    shown = capsys.readouterr().out
    assert re.search(r"^corpus: emo +12 .*\ncorpus: tess +12 ", shown, re.MULTILINE)
    assert "known from training: speakers 100.0 %" in shown
    report = json.loads((tmp_path / "out/report.json").read_text())
    parts = {name: part for name, part in report["parts"].items() if name.startswith("corpus: ")}
    right = sum(part["figures"]["accuracy"] * (12 if "emo" in name else 9) for name, part in parts.items())
    assert report["figures"]["accuracy"]["value"] == pytest.approx(right / 21)
    assert report["judged"] == {"emotion": 21, "words": 0, "speaker": 24}
    for entry in read_record(tmp_path / "best")["evaluations"]:
        assert set(entry["corpora"]) == {"emo", "tess"}
    assert "| tess | 12 | " in (tmp_path / "best/README.md").read_text()
    assert execute("evaluate", ["--verify", str(tmp_path / "best")]) == 0
    record = json.loads((tmp_path / "best/training.json").read_text())
    record["evaluations"][0]["corpora"]["tess"]["figures"]["accuracy"] += 0.1
    write_card(tmp_path / "best", record)
    capsys.readouterr()
    assert execute("evaluate", ["--verify", str(tmp_path / "best")]) == 1
    assert re.findall(r"^  (.*?)  .*DIFFERS", capsys.readouterr().out, re.MULTILINE) == ["tess: accuracy"]


def test_a_changed_manifest_is_noticed_and_a_list_says_where_they_are_now(corpora, tmp_path, capsys):
    moved = tmp_path / "moved"
    shutil.copytree(corpora, moved)
    train(moved, moved / "here")
    model = moved / "here/best"
    assert execute("evaluate", ["--verify", str(model)]) == 0
    for name in NAMES:
        shutil.move(moved / name, tmp_path / name)
    items = [
        {"path": f"{name}/{part}.csv", "name": f"{name}{part}"} for name in NAMES for part in ("train", "valid")
    ]
    with pytest.raises(SerError):
        execute("evaluate", ["--verify", str(model)])
    now = listing(tmp_path / "now.json", items)
    assert execute("evaluate", ["--verify", str(model), "--data", now]) == 0
    with pytest.raises(ConfigError, match="is one manifest, expected a JSON list of 2"):
        execute("evaluate", ["--verify", str(model), "--data", str(tmp_path / "emo/train.csv")])
    renamed(tmp_path / "emo/train.csv", {"anger": "joy"})
    for name in NAMES:
        shutil.copytree(tmp_path / name, moved / name)
    with pytest.raises(ManifestError, match=r"emo/train.csv: has changed since"):
        execute("evaluate", ["--verify", str(model)])


def test_manifests_of_the_same_content_are_found_by_their_names_and_else_in_order(tmp_path):
    for folder in ("old/a", "old/b", "new/a", "new/b"):
        manifest(tmp_path / folder / "train.csv", "1.wav,sad,s1,u1")
    (one,) = chosen(train=[str(tmp_path / f"old/{name}/train.csv") for name in "ab"]).values()

    def found(*names: str, order: str) -> list[tuple[str, str | None]]:
        items = [
            {"path": f"new/{folder}/train.csv", "root": folder, "name": name}
            for folder, name in zip(order, names, strict=False)
        ]
        sources = one.moved(listing(tmp_path / "now.json", items), None).sources
        return [(str(Path(s.path).relative_to(tmp_path)), s.root and Path(s.root).name) for s in sources]

    there = [("new/a/train.csv", "a"), ("new/b/train.csv", "b")]
    assert found("b", "a", order="ba") == found("x", "y", order="ab") == found("b", "y", order="ba") == there
    assert found("b", order="b") == [("old/a/train.csv", None), ("new/b/train.csv", "b")]


def state(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors") | load_file(folder / "optimizer.safetensors")


def test_a_stopped_run_goes_on_exactly_also_where_its_corpora_moved(corpora, tmp_path):
    steps = sorted((corpora / "run/checkpoints").iterdir())
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    for name in ("config.json", "metrics.jsonl"):
        shutil.copy(corpora / "run" / name, tmp_path / "run")
    shutil.copytree(steps[4], tmp_path / "run/checkpoints" / steps[4].name)
    for name in NAMES:
        shutil.copytree(corpora / name, tmp_path / "elsewhere" / name)
    data = {part: paths(tmp_path / "elsewhere", part) for part in ("train", "valid")}
    train(corpora, tmp_path / "run", **data)
    first, second = state(steps[-1]), state(sorted((tmp_path / "run/checkpoints").iterdir())[-1])
    assert len(steps) == 12 and first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(SerError, match=r"data.train: other .*speakers"):  # tess is called otherwise
        shutil.move(tmp_path / "elsewhere/tess", tmp_path / "elsewhere/toronto")
        data = {part: paths(tmp_path / "elsewhere", part, "emo", "toronto") for part in data}
        train(corpora, tmp_path / "run", **data)


def test_a_list_a_pooled_manifest_and_two_manifests_train_the_same_weights(corpora, tmp_path):
    header = "file,emotion,text,speaker,arousal,valence,corpus"
    for part in ("train", "valid"):
        lines = {n: (corpora / n / f"{part}.csv").read_text().splitlines()[1:] for n in NAMES}
        rows = [f"{n}/{line},{n}" for n in NAMES for line in lines[n]]
        manifest(corpora / f"pooled_{part}.csv", *rows, header=header)
        listing(corpora / f"{part}.json", [{"path": f"pooled_{part}.csv"}])
    data = {part: [str(corpora / f"{part}.json")] for part in ("train", "valid")}
    train(corpora, tmp_path / "run", **data)
    first, second = (load_file(run / "last/model.safetensors") for run in (corpora / "run", tmp_path / "run"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_overlap_is_of_a_corpus(corpora, tmp_path, capsys):
    words = ["--allow-overlap", "none"]
    with pytest.raises(ManifestError, match=r"valid: 2 speakers stand in training too: 'emo/s0', 'emo/s1'"):
        train(corpora, tmp_path / "a", *words, valid=paths(corpora, "valid", "emo"))
    with pytest.raises(ManifestError, match=r"12 utterances stand in training too"):
        train(corpora, tmp_path / "b", valid=paths(corpora, "train", "emo"))
    other = renamed(write_corpus(tmp_path / "other", 8, speakers=2, seed=9, name="valid"), {})
    train(corpora, tmp_path / "c", *words, "--map", '{"calm": null}', valid=[str(other)])
    assert "valid has corpora that training does not have (it has " in capsys.readouterr().err
    shared = json.loads((tmp_path / "c/config.json").read_text())["shared_with_training"]["valid"]
    assert shared["speakers"] == 0.0, "s0 and s1 of another corpus are other people"


def test_one_manifest_is_evaluated_as_a_corpus_of_those_that_training_had(corpora, tmp_path, capsys):
    words = ["--model", str(corpora / "run/best"), "--resamples", "2", "--no-pictures", "--manifest"]
    execute("evaluate", [*words, *paths(corpora, "test", "emo"), "--out", str(tmp_path / "emo")])
    assert "speakers 100.0 %" in capsys.readouterr().out
    assert json.loads((tmp_path / "emo/report.json").read_text())["judged"]["speaker"] == 12
    other = write_corpus(tmp_path / "other", 8, speakers=2, name="test")
    execute("evaluate", [*words, str(other)])
    said = capsys.readouterr()
    assert "training does not have (it has emo, tess), so their speakers count as new: other\n" in said.err
    assert "known from training: speakers 0.0 %" in said.out


def test_a_model_of_one_corpus_is_evaluated_on_several_and_knows_its_own_speakers_again(corpora, tmp_path, capsys):
    one = {part: paths(corpora, part, "emo") for part in ("train", "valid")}
    train(corpora, tmp_path / "run", **one)
    capsys.readouterr()
    words = ["--model", str(tmp_path / "run/best"), "--resamples", "2", "--card", "--manifest"]
    execute("evaluate", [*words, *paths(corpora, "test")])
    said = capsys.readouterr()
    assert "known from training: speakers 50.0 %" in said.out and "corpus: tess" in said.out
    assert "angry (3) is anger" in said.err
    execute("evaluate", [*words, *paths(corpora, "test", "tess")])
    assert execute("evaluate", ["--verify", str(tmp_path / "run/best")]) == 0
    selections = [entry["selection"] for entry in read_record(tmp_path / "run/best")["evaluations"]]
    renamings = [selection.get("usual_names") for selection in selections]
    assert renamings == [None, *[{"angry": "anger", "happy": "joy", "sad": "sadness"}] * 2]
    assert ["sources" in selection for selection in selections] == [False, True, False]


def test_weights_that_some_of_the_corpora_chose_say_so(corpora, tmp_path):
    shutil.copytree(corpora / "run/best", tmp_path / "best")
    words = ["--model", str(tmp_path / "best"), "--card", "--resamples", "2", "--manifest"]
    execute("evaluate", [*words, *paths(corpora, "valid", "emo")])
    execute("evaluate", [*words, *paths(corpora, "test", "emo")])
    chosen_on = [entry["chosen_on"] for entry in read_record(tmp_path / "best")["evaluations"]]
    assert chosen_on == [True, True, False]
    assert execute("evaluate", ["--verify", str(tmp_path / "best")]) == 0


def test_a_list_is_divided_by_corpus(corpora, tmp_path, capsys):
    items = [{"path": str(corpora / n / "train.csv"), "name": n} for n in NAMES]
    path = listing(tmp_path / "list.json", items)
    words = ["--data", path, "--protocol", "kfold:corpus:2", "--fold", "tess", "--init", corpora / "init"]
    words += ["--shares", "transcripts", *QUICK, "--out", tmp_path / "run", "--heads", "emotion"]
    execute("train", [str(word) for word in words])
    assert "is angry; calm (3) left out" in capsys.readouterr().err
    words = ["--data", path, "--protocol", "kfold:corpus:2", "--fold", "tess", "--shares", "transcripts"]
    execute("evaluate", ["--model", str(tmp_path / "run/last"), *words, "--resamples", "2", "--card"])
    assert "12 utterances, 2 speakers" in capsys.readouterr().out
    assert execute("evaluate", ["--verify", str(tmp_path / "run/last")]) == 0


# ------------------------------------------------------------------------------------------------ comparisons


def test_a_map_makes_two_predictions_files_with_other_names_comparable(corpora, tmp_path, capsys):
    words = ["--model", str(corpora / "run/best"), "--resamples", "2", "--no-pictures"]
    execute("evaluate", [*words, "--manifest", *paths(corpora, "test"), "--out", str(tmp_path)])
    first, second = tmp_path / "predictions.csv", tmp_path / "other.csv"
    text = first.read_text()
    second.write_text(re.sub(r"\bhappy\b", "joy", text))
    capsys.readouterr()
    with pytest.raises(ConfigError, match="different labels for some utterances"):
        execute("evaluate", ["--compare", str(first), str(second)])
    execute("evaluate", ["--compare", str(first), str(second), "--map", '{"joy": "happy"}', "--resamples", "2"])
    compared = json.loads(capsys.readouterr().out)
    assert compared["only_first_right"] == compared["only_second_right"] == 0
    assert compared["differences"]["unweighted_accuracy"]["value"] == 0
    dropped = ["--map", '{"joy": null, "happy": null}', "--resamples", "2"]
    execute("evaluate", ["--compare", str(first), str(second), *dropped])
    assert json.loads(capsys.readouterr().out)["utterances"] == 24


@pytest.mark.parametrize(
    "change",
    [{"sources": {}}, {"sources": [1]}, {"sources": [{}]}, {"sources": [{"path": 1}]}, {"usual_names": []},
     {"usual_names": {"a": 1}}, {"usual_names": {"": "a"}}, {"no_usual_names": 1}],
)  # fmt: skip
def test_what_is_no_record_of_several_is_refused(change):
    with pytest.raises(ConfigError):
        Selection.from_dict({"data": "list.json"} | change)


def test_a_pipe_is_not_waited_for(tmp_path):
    parser = ArgumentParser()
    add_data_arguments(parser)
    with pytest.raises(ManifestError, match="cannot be read: No such file"):
        selected_data(parser.parse_args([]), tmp_path / "none.json")

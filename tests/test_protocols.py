"""Protocols: who is tested on what, and that what is shared is declared."""

import json
import re
from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from iemocap_tree import needs_iemocap, real_turns, said

from ser.data import protocols
from ser.data.iemocap import FOUR_CLASSES, SIDES, parse_name
from ser.data.manifest import Utterance
from ser.data.protocols import (
    KINDS,
    PARTS,
    PROTOCOLS,
    Fold,
    Protocol,
    audit,
    by_column,
    check_fold,
    find_fold,
    find_protocol,
    folder_names,
    kfold,
    to_table,
    write_folds,
)
from ser.errors import ConfigError, ManifestError


@pytest.fixture(scope="module")
def turns() -> list[Utterance]:
    """The 5,531 turns of the four-class protocol."""
    utterances = []
    for turn, code in real_turns():
        name = parse_name(turn)
        columns = {"code": code, "sha256": turn, **name.columns()}
        file = name.file(Path("/release"))
        utterances.append(
            Utterance(turn, file, emotion=FOUR_CLASSES[code], text=said(turn), speaker=name.speaker, extra=columns)
        )
    return utterances


def sizes(folds: list[Fold], part: str) -> list[int]:
    return [len(fold.parts[part]) for fold in folds]


# ------------------------------------------------------------------------------------------------ on IEMOCAP


@needs_iemocap
def test_paper10_has_the_paper_s_ten_folds_and_the_test_fold_is_the_evaluation_fold(turns):
    folds = PROTOCOLS["paper10"].folds(turns)
    assert [fold.name for fold in folds] == list(SIDES)
    assert sizes(folds, "test") == [507, 578, 505, 518, 536, 615, 553, 478, 644, 597]
    for fold in folds:
        assert fold.parts["valid"] == fold.parts["test"]
        assert sorted(fold.parts["train"] + fold.parts["test"]) == sorted(u.id for u in turns)
        assert all(i.startswith(f"Ses{fold.name}_") for i in fold.parts["test"])


@needs_iemocap
def test_paper10_is_reported_with_all_its_test_speakers_in_training(turns):
    for fold in PROTOCOLS["paper10"].folds(turns):
        found = check_fold(fold, turns, PROTOCOLS["paper10"])
        speakers = found.shared["train", "test"]["speakers"]
        assert speakers.values == [f"0{fold.name[1]}F", f"0{fold.name[1]}M"]
        assert speakers.fraction == 1.0 and speakers.known == len(fold.parts["test"])
        assert found.shared["valid", "test"]["recordings"].values == fold.parts["test"]
        assert found.shared["train", "test"]["dialogues"].values == []
    table = to_table([found])
    assert table.splitlines()[1].split()[:6] == ["05M", "4934", "597", "597", "100.0", "%"]


def test_only_paper10_says_that_the_paper_s_figure_is_comparable():
    assert [name for name, p in PROTOCOLS.items() if "78.15" in p.description] == ["paper10"]
    assert "Speaker-dependent" in PROTOCOLS["paper10"].description
    assert "speakers" in PROTOCOLS["paper10"].declares["train", "test"]


@needs_iemocap
def test_session5_shares_no_speaker_dialogue_or_session_between_any_parts(turns):
    folds = PROTOCOLS["session5"].folds(turns)
    by_session = [1085, 1023, 1151, 1031, 1241]
    assert sizes(folds, "test") == by_session
    assert sizes(folds, "valid") == by_session[1:] + by_session[:1]
    for fold in folds:
        found = check_fold(fold, turns, PROTOCOLS["session5"])
        for kinds in found.shared.values():
            assert [kind for kind in KINDS if kinds[kind].values] == ["transcripts"]


@needs_iemocap
def test_speaker10_leaves_the_true_speaker_out_and_the_partner_validates(turns):
    folds = PROTOCOLS["speaker10"].folds(turns)
    by_speaker = [528, 557, 481, 542, 522, 629, 528, 503, 590, 651]
    assert [fold.name for fold in folds] == list(SIDES) and sizes(folds, "test") == by_speaker
    assert sizes(folds, "valid") == [by_speaker[i ^ 1] for i in range(10)]
    speakers = {u.id: u.speaker for u in turns}
    for fold in folds:
        assert {speakers[i] for i in fold.parts["test"]} == {fold.name}
        assert len({speakers[i] for i in fold.parts["train"]}) == 8
        check_fold(fold, turns, PROTOCOLS["speaker10"])


@needs_iemocap
def test_speaker_known_holds_out_fifty_turns_of_each_speaker_by_the_seed(turns):
    (fold,) = PROTOCOLS["speaker-known"].folds(turns, seed=3)
    speakers = {u.id: u.speaker for u in turns}
    assert Counter(speakers[i] for i in fold.parts["test"]) == dict.fromkeys(SIDES, 50)
    assert sizes([fold], "train") == [5_031] and not set(fold.parts["train"]) & set(fold.parts["test"])
    check_fold(fold, turns, PROTOCOLS["speaker-known"])
    assert PROTOCOLS["speaker-known"].folds(turns, seed=3) == [fold]
    (other,) = PROTOCOLS["speaker-known"].folds(turns, seed=4)
    assert other.parts["test"] != fold.parts["test"]


@needs_iemocap
def test_speaker_known_text_has_the_same_test_turns_and_none_of_their_transcripts_in_training(turns):
    (plain,) = PROTOCOLS["speaker-known"].folds(turns)
    (fold,) = PROTOCOLS["speaker-known-text"].folds(turns)
    assert fold.parts["test"] == plain.parts["test"] and set(fold.parts["train"]) < set(plain.parts["train"])
    found = check_fold(fold, turns, PROTOCOLS["speaker-known-text"])
    assert found.shared["train", "test"]["transcripts"].values == []
    assert found.shared["train", "test"]["speakers"].fraction == 1.0
    by_id = {u.id: u for u in turns}
    held_out = {by_id[i].text.upper() for i in fold.parts["test"]}
    removed = set(plain.parts["train"]) - set(fold.parts["train"])
    assert all(by_id[i].text.upper() in held_out for i in removed), "nothing else is removed"
    with pytest.raises(ManifestError, match=r"train and test share \d+ transcripts"):
        check_fold(plain, turns, PROTOCOLS["speaker-known-text"])


# --------------------------------------------------------------------------------------- on any such manifest


@st.composite
def manifests(draw) -> list[Utterance]:
    """Sessions of two speakers, four utterances and more of each."""
    utterances = []
    for session in range(1, draw(st.integers(2, 6)) + 1):
        for speaker in "FM":
            for i in range(draw(st.integers(4, 8))):
                side = draw(st.sampled_from("FM")) if i > 1 else "FM"[i]
                text = draw(st.sampled_from(["", "Yes.", "No.", None])) if i > 2 else f"{session}{speaker}{i}"
                utterances.append(
                    Utterance(
                        f"{session}{side}{speaker}{i}",
                        Path(f"/{session}{side}{speaker}{i}.wav"),
                        text=text,
                        speaker=f"{session}{speaker}",
                        extra={
                            "session": str(session),
                            "side": f"{session}{side}",
                            "dialogue": f"{session}{side}",
                        },
                    )
                )
    return utterances


ALL = [
    *(protocol for name, protocol in PROTOCOLS.items() if not name.startswith("speaker-known")),
    *(find_protocol(name) for name in ("speaker-known:2", "speaker-known-text:2")),
    *(kfold(column, count) for column, count in (("speaker", 3), ("session", 2), ("dialogue", 4))),
]


@pytest.mark.parametrize("protocol", ALL, ids=lambda p: p.name)
@settings(max_examples=40, deadline=None)
@given(utterances=manifests(), seed=st.integers(0, 2**32 - 1), order=st.randoms(use_true_random=False))
def test_folds_are_partitions_and_functions_of_manifest_and_seed_alone(protocol, utterances, seed, order):
    shuffled = list(utterances)
    order.shuffle(shuffled)
    folds = protocol.folds(utterances, seed=seed)
    assert protocol.folds(shuffled, seed=seed) == folds
    ids = sorted(u.id for u in utterances)
    tested = sorted(i for fold in folds for i in fold.parts["test"])
    assert len(set(tested)) == len(tested), "tested at most once"
    if not protocol.name.startswith("speaker-known"):
        assert tested == ids
    for fold in folds:
        parts = dict(fold.parts)
        if protocol.name == "paper10":
            assert parts.pop("valid") == parts["test"]
        for part in parts.values():
            assert part and part == sorted(set(part))
        for first, second in combinations(parts.values(), 2):
            assert not set(first) & set(second)
        whole = sorted(i for part in parts.values() for i in part)
        assert set(whole) <= set(ids) if "text" in protocol.name else whole == ids
        if not protocol.name.startswith("kfold"):
            check_fold(fold, utterances, protocol)


@settings(max_examples=40, deadline=None)
@given(utterances=manifests(), count=st.integers(2, 4), seed=st.integers(0, 99))
def test_kfold_puts_no_value_into_two_parts(utterances, count, seed):
    speakers = {u.id: u.speaker for u in utterances}
    for fold in kfold("speaker", count).folds(utterances, seed=seed):
        parts = [{speakers[i] for i in ids} for ids in fold.parts.values()]
        assert sum(map(len, parts)) == len(set().union(*parts)) == len(set(speakers.values()))
        assert ("valid" in fold.parts) == (count > 2)


# ----------------------------------------------------------------------------------------------------- leaks


def row(name: str, **columns) -> Utterance:
    text, speaker = columns.pop("text", f"text of {name}"), columns.pop("speaker", f"speaker of {name}")
    file = columns.pop("file", f"/{name}.wav")
    extra = {"dialogue": name, "session": name, "sha256": name} | columns
    return Utterance(name, Path(file), emotion="sad", text=text, speaker=speaker, extra=extra)


STRICT = Protocol("strict", "shares nothing", lambda utterances, seed: [])
FOLD = Fold("one", {"train": ["a", "b"], "valid": ["c"], "test": ["d", "e"]})
CLEAN = {name: row(name) for name in "abcde"}


def test_a_fold_without_leaks_passes_and_its_classes_are_counted():
    found = check_fold(FOLD, CLEAN.values(), STRICT)
    assert all(shared.values == [] for kinds in found.shared.values() for shared in kinds.values())
    assert found.classes == {"train": {"sad": 2}, "valid": {"sad": 1}, "test": {"sad": 2}}


LEAKS = [
    ("speakers", {"speaker": "S"}, "'S'"),
    ("dialogues", {"dialogue": "D"}, "'D'"),
    ("sessions", {"session": "1"}, "'1'"),
    ("transcripts", {"text": "[LAUGHTER] so what?"}, "'SO WHAT?'"),
    ("recordings", {"file": "/x/../same.wav"}, None),
    ("copies", {"sha256": "0f"}, None),
]


@pytest.mark.parametrize("pair", [("train", "valid"), ("train", "test"), ("valid", "test")], ids="-".join)
@pytest.mark.parametrize(("kind", "columns", "shown"), LEAKS, ids=[kind for kind, *_ in LEAKS])
def test_a_planted_leak_is_found_named_and_refused_unless_it_is_declared(kind, columns, shown, pair):
    first, second = (FOLD.parts[part][0] for part in pair)
    other = columns | {"text": "So  What? {LG}"} if kind == "transcripts" else columns
    other = other | {"file": "/same.wav"} if kind == "recordings" else other
    utterances = {**CLEAN, first: row(first, **columns), second: row(second, **other)}.values()
    found = audit(FOLD, utterances)
    for p, kinds in found.shared.items():
        assert [k for k in KINDS if kinds[k].values] == ([kind] if p == pair else [])
    shared = found.shared[pair][kind]
    assert (shared.utterances, shared.known) == (1, len(FOLD.parts[pair[1]]))
    with pytest.raises(ManifestError) as caught:
        check_fold(FOLD, utterances, STRICT)
    message = str(caught.value)
    assert f"{pair[0]} and {pair[1]} share 1 {kind} ({shown or repr(second)})" in message
    assert message.count("share") == 1 and "the protocol strict does not permit" in message
    check_fold(FOLD, utterances, replace(STRICT, declares={pair: frozenset({kind})}))
    elsewhere = ("train", "valid") if pair != ("train", "valid") else ("train", "test")
    for declares in ({elsewhere: frozenset({kind})}, {pair: frozenset(KINDS) - {kind}}):
        with pytest.raises(ManifestError):
            check_fold(FOLD, utterances, replace(STRICT, declares=declares))


def test_what_a_manifest_cannot_tell_is_unknown_and_not_nothing():
    utterances = [Utterance(name, Path(f"/{name}.wav")) for name in "abcde"]
    found = check_fold(FOLD, utterances, STRICT)
    kinds = found.shared["train", "test"]
    assert [kind for kind in KINDS if kinds[kind] is None] == [k for k in KINDS if k != "recordings"]
    assert to_table([found]).splitlines()[1].count("unknown") == 5
    half = [replace(u, speaker="s") if u.id in "ad" else u for u in utterances]
    shared = audit(FOLD, half).shared["train", "test"]["speakers"]
    assert (shared.values, shared.utterances, shared.known, shared.fraction) == (["s"], 1, 1, 1.0)


def test_empty_transcripts_are_not_shared_ones():
    utterances = [row(name, text="[LAUGHTER]" if name in "ad" else name) for name in "abcde"]
    assert audit(FOLD, utterances).shared["train", "test"]["transcripts"].values == []


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"train": ["a"]}, "the part test is missing"),
        ({"train": [], "test": ["a"]}, "the part train is empty"),
        ({"train": ["a", "a"], "test": ["b"]}, "the part train has 'a' twice"),
        ({"train": ["a", "z"], "test": ["b"]}, "'z'; was it made from another manifest"),
    ],
)
def test_a_fold_that_is_not_whole_is_refused(parts, message):
    with pytest.raises(ManifestError, match="fold one") as caught:
        check_fold(Fold("one", parts), CLEAN.values(), STRICT)
    assert message in str(caught.value)


# --------------------------------------------------------------------------------------- columns and refusals


def test_a_split_column_makes_one_fold_and_a_fold_column_leaves_one_out():
    rows = [row(n, split=s) for n, s in zip("abcde", ["train", "dev", "test", "train", "test"], strict=True)]
    (fold,) = by_column().folds(rows)
    assert fold.parts == {"train": ["a", "d"], "valid": ["b"], "test": ["c", "e"]}
    rows = [row(n, fold=f) for n, f in zip("abcde", "12312", strict=True)]
    folds = by_column().folds(rows)
    assert [fold.parts for fold in folds] == [
        {"train": ["c"], "valid": ["b", "e"], "test": ["a", "d"]},
        {"train": ["a", "d"], "valid": ["c"], "test": ["b", "e"]},
        {"train": ["b", "e"], "valid": ["a", "d"], "test": ["c"]},
    ]
    spoken = [replace(u, speaker="same") for u in rows]
    with pytest.raises(ManifestError, match="share 1 speakers"):
        check_fold(folds[0], spoken, by_column())
    check_fold(folds[0], spoken, by_column(shares=["speakers"]))


@pytest.mark.parametrize(
    ("protocol", "columns", "message"),
    [
        (PROTOCOLS["paper10"], {}, "paper10 needs the column 'side', which 5 of 5 utterances lack, such as 'a'"),
        (PROTOCOLS["session5"], {"session": "1"}, "two values of 'session' or more, found ['1']"),
        (PROTOCOLS["speaker10"], {}, "two speakers per session, found ['speaker of a'] in a"),
        (PROTOCOLS["speaker-known"], {}, "speaker of a has only 1"),
        (by_column(), {}, "needs a column 'split' or 'fold', which the manifest lacks"),
        (by_column(), {"split": "learn"}, "holds ['learn'], expected train, valid and test"),
        (kfold("speaker", 6), {}, "6 folds, but the column 'speaker' has 5 values"),
        (kfold("speaker", 1), {}, "1 folds, but the column 'speaker' has 5 values"),
    ],
)
def test_a_manifest_that_a_protocol_cannot_divide_is_refused(protocol, columns, message):
    with pytest.raises(ManifestError) as caught:
        protocol.folds([row(name, **columns) for name in "abcde"])
    assert message in str(caught.value)


def test_speaker_known_text_says_when_a_speaker_has_nothing_left_to_train_on():
    rows = [row(f"{s}{i}", speaker=s, text="Yes." if s == "x" else f"{s}{i}") for s in "xy" for i in range(60)]
    with pytest.raises(ManifestError, match="all other utterances of x have a transcript that is held out"):
        PROTOCOLS["speaker-known-text"].folds(rows)


def test_an_unknown_kind_of_leak_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'transcripts'"):
        kfold("speaker", 2, shares=["transcript"])
    for protocol in PROTOCOLS.values():
        assert set().union(*protocol.declares.values()) <= set(KINDS)
        assert all(pair in protocols.PAIRS for pair in protocol.declares)


# ----------------------------------------------------------------------------------------------------- names

HARMLESS = [
    "s0",
    "01F",
    "a b",
    "a.b",
    "F-12_x",
    "Jörg",
    "Jo\u0308rg 2",
    "田中",
    "O'Neil",
    "1",
    "spk=3",
    "ear",
    "x" * 150,
]
PATHS = [
    "",
    ".",
    "..",
    "../../x",
    "/etc/x",
    "a/b",
    "a\\b",
    "c:",
    "a:b",
    ".hidden",
    "-rf",
    "~root",
    "x" * 300,
    "田" * 60,
]
SIGNS = [
    "a\0",
    "a\nb",
    "\x1b[2J",
    "a\u200bb",
    "a\u00a0b",
    "\u202eabc",
    "\ud800",
    *(f"a{sign}" for sign in '*?"<>| .'),
]
WINDOWS = ["CON", "nul", "Aux.txt", "com1", "LPT9 .x", "COM¹"]
OURS = ["report.json", "REPORT.MD", "curves.csv", "confusion.png", "s0.eval", "x~0123456789ab"]
HOSTILE = [*PATHS, *SIGNS, " a", *WINDOWS, *OURS]


def test_what_can_be_a_folder_s_name_is_kept():
    assert folder_names(HARMLESS) == {name: name for name in HARMLESS}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_that_could_reach_elsewhere_or_is_not_the_same_everywhere_becomes_letters_and_a_digest(name):
    (called,) = folder_names([name]).values()
    assert re.fullmatch(r"[A-Za-z0-9_]{1,40}~[0-9a-f]{12}", called)
    assert Path("/out", called).parent == Path("/out")
    assert folder_names([called])[called] != called, "what looks like one is none, so two never meet"


def test_no_two_names_are_one_folder_on_any_disk():
    names = ["Anna", "anna", "ANNA", "é", "e\u0301", "a/b", "a:b", "a_b", *HOSTILE, *HARMLESS]
    called = folder_names(names)
    assert called["Anna"] == "Anna" and called["é"] == "é" and called["a_b"] == "a_b", "the first is kept"
    assert len({name.casefold() for name in called.values()}) == len(called) == len(set(names))
    assert folder_names(names) == called


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(max_size=12), unique=True, max_size=8))
def test_any_names_at_all_become_as_many_harmless_ones(names):
    called = list(folder_names(names).values())
    assert len({name.casefold() for name in called}) == len(names)
    for name in called:
        assert name.isprintable() and not set(name) & set('/\\:*?"<>|') and name[0] not in " .-~"
        assert len(name.encode()) <= 255


@pytest.mark.parametrize("column", ["speaker", "fold", "session", "side"])
def test_the_folds_of_every_protocol_that_names_them_by_the_data_are_called_harmlessly(column):
    values = ["../../x", "/abs", "b"]
    rows = [row(f"{value}{i}", **{column: value}) for value in values for i in range(2)]
    name = {"speaker": "kfold:speaker:3", "fold": "column", "session": "session5", "side": "paper10"}[column]
    folds = find_protocol(name).folds(rows)
    assert sorted(fold.name.partition("~")[0] for fold in folds) == ["abs", "b", "x"]
    assert [len(fold.parts["test"]) for fold in folds] == [2, 2, 2]
    assert find_fold(find_protocol(name), rows, "../../x") == find_fold(find_protocol(name), rows, folds[0].name)


# ----------------------------------------------------------------------------------------------------- files


def test_folds_read_as_they_were_written_with_what_they_declare_and_share(tmp_path):
    protocol = kfold("speaker", 5, shares=["transcripts"])
    rows = [row(name, text="Yes.") for name in "abcde"]
    folds = protocol.folds(rows)
    audits = write_folds(tmp_path / "folds.json", protocol, folds, rows, seed=0)
    assert audits == [audit(fold, rows) for fold in folds]
    content = json.loads((tmp_path / "folds.json").read_text())
    assert [Fold(fold["name"], fold["parts"]) for fold in content["folds"]] == folds
    assert content["protocol"] == "kfold:speaker:5" and content["seed"] == 0
    assert content["declares"]["train/test"] == ["transcripts"]
    assert content["folds"][0]["shared"]["train/test"]["transcripts"] == {"values": 1, "utterances": 1, "known": 1}


def test_an_undeclared_leak_is_not_written(tmp_path):
    rows = [row(name, text="Yes.") for name in "abcde"]
    protocol = kfold("speaker", 5)
    with pytest.raises(ManifestError, match="share 1 transcripts"):
        write_folds(tmp_path / "folds.json", protocol, protocol.folds(rows), rows, seed=0)
    assert not list(tmp_path.iterdir())


def test_select_gives_the_utterances_of_each_part():
    parts = FOLD.select(CLEAN.values())
    assert {part: [u.id for u in rows] for part, rows in parts.items()} == FOLD.parts
    assert tuple(parts) == PARTS

"""Corpora compared with each other: the probe, the cells, their marks, and the command."""

import csv
import json
import re
import shutil
from argparse import Namespace
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from toy import toy_recognizer, toy_rows, write_corpus

from ser.cli import crosscorpus, execute, make_parser
from ser.cli.crosscorpus import LinearHeads, Training, Trainings, all_trainings, write_training
from ser.data.manifest import Utterance, read_manifest
from ser.data.selection import Selection
from ser.errors import AudioError, ConfigError, ManifestError, ModelFolderError
from ser.files import write_json
from ser.models.heads import mix_layers
from ser.scores import across, probe
from ser.scores.across import OTHERS, Heard, heard_by, plan_cells, score
from ser.scores.card import training_record, write_card
from ser.scores.pictures import draw_corpora
from ser.scores.probe import deal, held_out_figures, learn, ridge
from ser.scores.report import report, write_rows

MEAN_STD = (("layers", "weighted"), ("pooling", "mean"))


def call(*arguments) -> None:
    """``ser crosscorpus`` in this process."""
    assert execute("crosscorpus", [str(a) for a in arguments]) == 0


def rows(corpus: str, emotions: str, speakers: str, part: str = "") -> list[Utterance]:
    """An utterance for each letter: emotions a, b, c, and speakers 1, 2, 3; a space is no speaker."""
    return [
        Utterance(
            f"{corpus}/{i}",
            Path(f"/{corpus}/{i}.wav"),
            emotion=emotion,
            speaker=None if speaker == " " else f"{corpus}/{speaker}",
            extra={"corpus": corpus}
            | ({"part": {"t": "test", "v": "valid"}.get(part[i], "train")} if part else {}),
        )
        for i, (emotion, speaker) in enumerate(zip(emotions, speakers, strict=True))
    ]


# ------------------------------------------------------------------------------------------------------ vectors


def test_a_vector_is_the_mean_and_spread_of_the_layers_whatever_else_is_in_the_batch(tmp_path):
    utterances = toy_rows(tmp_path, 12)
    recognizer = toy_recognizer(reads=MEAN_STD)
    together, errors = probe.vectors_of(recognizer, utterances, layers="all")
    assert together.shape == (12, 3 * 2 * 16) and not errors
    for i, u in enumerate(utterances):
        (alone,), _ = probe.vectors_of(recognizer, [u], layers="all")
        assert torch.allclose(alone, together[i], atol=1e-5)
        padded, lengths, _ = recognizer.prepare([probe.Decoder()[probe.find_recording(0, u, None, 9.0)][1]])
        with torch.inference_mode():
            layers, _ = recognizer.model.wav2vec2.layers(padded, lengths)
        expected = torch.cat([torch.cat([x.mean(1), x.std(1, correction=0)], 1) for x in layers], 1)[0]
        assert torch.allclose(alone, expected, atol=1e-5)
    assert len({tuple(row) for row in together.tolist()}) == 12


def test_layers_can_be_chosen(tmp_path):
    utterances = toy_rows(tmp_path, 4)
    recognizer = toy_recognizer(reads=MEAN_STD)
    with torch.no_grad():
        recognizer.model.layer_weights.copy_(torch.tensor([3.0, 0.0, 1.0]))
    of = {
        layers: probe.vectors_of(recognizer, utterances, layers=layers)[0]
        for layers in ("all", "mean", "2,0", "1")
    }
    first, second, third = of["all"].split(32, 1)
    assert torch.allclose(of["mean"], (first + second + third) / 3, atol=1e-6)
    assert torch.equal(of["2,0"], torch.cat([third, first], 1)) and torch.equal(of["1"], second)
    weighted, _ = probe.vectors_of(recognizer, utterances, layers="weighted")
    means = mix_layers([part[:, :16] for part in (first, second, third)], recognizer.model.layer_weights)
    assert torch.allclose(weighted[:, :16], means, atol=1e-5)
    for layers in ("3", "-1", "x", "", "1,"):
        with pytest.raises(ConfigError, match="expected mean, all, weighted, or numbers from 0 to 2"):
            probe.chosen_layers(recognizer, layers)
    with pytest.raises(ConfigError, match="have learnt no mean of layers; they read layer 2"):
        probe.chosen_layers(toy_recognizer(reads=()), "weighted")


def test_a_recording_that_cannot_be_read_has_no_vector(tmp_path):
    utterances = toy_rows(tmp_path, 6)
    utterances[2].file.write_bytes(b"RIFF")
    vectors, errors = probe.vectors_of(toy_recognizer(), utterances)
    assert list(errors) == [2] and isinstance(errors[2], AudioError)
    assert [i for i in range(6) if not vectors[i].any()] == [2]


# -------------------------------------------------------------------------------------------------- linear head


@pytest.mark.parametrize(("n", "d", "k"), [(60, 8, 3), (30, 90, 4), (40, 12, 2)])
@pytest.mark.parametrize("penalty", [0.01, 1.0, 100.0])
def test_the_head_equals_scikit_learns_ridge_classifier(n, d, k, penalty):
    from sklearn.linear_model import RidgeClassifier
    from sklearn.preprocessing import StandardScaler

    random = np.random.default_rng(n)
    y = np.concatenate([np.arange(k), random.choice(k, n - k, p=np.arange(1, k + 1) / (k * (k + 1) / 2))])
    x = 5 + random.normal(size=(n, d)) * random.uniform(0.1, 9, d) + y[:, None]
    new = 5 + random.normal(size=(200, d)) * 3
    scaler = StandardScaler().fit(x)
    theirs = RidgeClassifier(alpha=n * penalty, class_weight="balanced").fit(scaler.transform(x), y)
    standard = torch.from_numpy(scaler.transform(x))
    ((weights, bias),) = ridge(standard, torch.from_numpy(y), k, [penalty])
    scores = torch.from_numpy(scaler.transform(new)) @ weights + bias
    expected = theirs.decision_function(scaler.transform(new))
    ours = scores.numpy() if k > 2 else (scores[:, 1] - scores[:, 0]).numpy() / 2
    np.testing.assert_allclose(ours, expected, rtol=1e-7, atol=1e-9)
    assert np.array_equal(scores.argmax(1), theirs.predict(scaler.transform(new)))
    head = learn(torch.from_numpy(x), torch.from_numpy(y), k, [None] * n)
    assert head.penalty == probe.USUAL_PENALTY and head.held_out == {}
    theirs = RidgeClassifier(alpha=n * head.penalty, class_weight="balanced").fit(scaler.transform(x), y)
    assert np.array_equal(head.classify(torch.from_numpy(new)), theirs.predict(scaler.transform(new)))


def test_the_penalty_is_the_one_that_recognises_held_out_speakers_best():
    from sklearn.linear_model import RidgeClassifier
    from sklearn.metrics import balanced_accuracy_score

    random = np.random.default_rng(1)
    y = random.integers(0, 3, 120)
    speakers = [f"s{i}" for i in random.integers(0, 9, 120)]
    x = random.normal(size=(120, 40)) + 0.6 * y[:, None] * (np.arange(40) < 4)
    x += 2 * np.array([hash_of(s) for s in speakers])
    x = (x - x.mean(0)) / x.std(0)
    found = held_out_figures(torch.from_numpy(x), torch.from_numpy(y), 3, speakers)
    parts = deal(speakers, 3)
    for penalty, figure in found.items():
        correct = np.zeros(120, int)
        for part in range(3):
            inside = parts != part
            theirs = RidgeClassifier(alpha=penalty * inside.sum(), class_weight="balanced").fit(
                x[inside], y[inside]
            )
            correct[~inside] = theirs.predict(x[~inside])
        assert figure == pytest.approx(balanced_accuracy_score(y, correct))
    assert len(set(found.values())) > 1
    best = max(found.values())
    assert learn(torch.from_numpy(x), torch.from_numpy(y), 3, speakers).penalty == max(
        p for p, figure in found.items() if figure == best
    )


def hash_of(name: str) -> np.ndarray:
    """What a speaker adds to each of 40 numbers."""
    return np.random.default_rng(int(name[1:])).normal(size=40)


def test_a_number_that_does_not_vary_and_a_class_that_is_missing_do_no_harm():
    random = np.random.default_rng(0)
    x = torch.from_numpy(random.normal(size=(30, 5)))
    x[:, 2] = 7.0
    head = learn(x, torch.tensor([0, 2] * 15), 3, ["s"] * 30)
    assert head.scale[2] == 1.0
    assert set(head.classify(x).tolist()) <= {0, 2} and torch.isfinite(head.weights).all()


def test_speakers_are_dealt_whole_into_parts_of_like_size():
    names = ["e"] * 50 + ["d"] * 20 + ["c"] * 20 + ["b"] * 9 + ["a"]
    parts = deal(names, 3)
    of = {name: {int(p) for n, p in zip(names, parts, strict=True) if n == name} for name in "abcde"}
    assert of == {"e": {0}, "c": {1}, "d": {2}, "b": {1}, "a": {2}}, "the largest first, each to the smallest part"
    assert set(deal(["a", "b"], 5)) == {0, 1}
    shuffled = np.random.default_rng(0).permutation(len(names))
    assert np.array_equal(deal([names[i] for i in shuffled], 3), parts[shuffled])


# -------------------------------------------------------------------------------------------------------- cells


def test_no_speaker_of_a_test_is_in_its_training_and_all_others_are_all_others():
    utterances = rows("x", "abcabcabc", "111222345") + rows("y", "abab", "1122") + rows("z", "abcab", "11223")
    cells = plan_cells(utterances, folds=3)
    assert [(c.row, c.test) for c in cells] == [(r, t) for r in ("x", "y", "z", OTHERS) for t in "xyz"]
    for cell in cells:
        for piece in cell.pieces:
            train, test = ({utterances[i].speaker for i in side} for side in (piece.train, piece.test))
            assert train.isdisjoint(test) and train and test
            assert {utterances[i].corpus for i in piece.train} == set(cell.train)
            assert {utterances[i].corpus for i in piece.test} == {cell.test}
            assert {utterances[i].emotion for i in (*piece.train, *piece.test)} <= set(cell.classes)
        tested = [i for piece in cell.pieces for i in piece.test]
        assert (
            len(tested)
            == len(set(tested))
            == sum(u.corpus == cell.test and u.emotion in cell.classes for u in utterances)
        )
    within = {c.test: len(c.pieces) for c in cells if c.within}
    assert within == {"x": 3, "y": 2, "z": 3}
    assert {c.test: c.train for c in cells if c.row == OTHERS} == {
        "x": ("y", "z"),
        "y": ("x", "z"),
        "z": ("x", "y"),
    }


def test_only_classes_in_common_are_compared_and_the_others_are_counted():
    utterances = rows("x", "aabbccd", "1212121") + rows("y", "abee", "1212") + rows("z", "ccce", "1212")
    cells = {(c.row, c.test): c for c in plan_cells(utterances, folds=2)}
    xy = cells["x", "y"]
    assert xy.classes == ("a", "b") and xy.left_out == {"train": 3, "test": 2}
    assert {utterances[i].emotion for i in xy.pieces[0].train} == {"a", "b"}
    for pair in (("x", "z"), ("z", "x"), ("y", "z")):
        assert cells[pair].pieces == () and cells[pair].why_empty == "the corpora have 1 class in common"
    assert cells[OTHERS, "z"].classes == ("c", "e"), "of what any other corpus has"
    assert cells["y", "y"].classes == ("a", "b", "e")


def test_the_table_says_where_chance_is_another():
    utterances = rows("x", "abcabc", "112233") + rows("y", "abab", "1122")
    answers = {i: str(u.emotion) for i, u in enumerate(utterances)}
    results = [score(utterances, c, answers, Heard(), resamples=20) for c in plan_cells(utterances, folds=2)]
    assert across.chance_text(results) == "0.33 (0.50 with 2 classes)"
    lines = across.table_lines(results)
    assert lines[0].split() == ["train", "\\", "test", "x", "y"]
    assert lines[2].split() == ["1.00-1.00", "1.00-1.00", "of", "2"] and "*" in lines[1]
    assert across.chance_text([]) == "-" and across.notes([]) == ["chance: -"]


def test_the_test_part_of_a_corpus_is_tested_in_every_cell_and_trained_on_in_none():
    utterances = rows("x", "ababab", "112233", "rrrvtt") + rows("y", "abab", "1122") + rows("z", "abab", "1122")
    for cell in plan_cells(utterances, folds=2):
        for piece in cell.pieces:
            assert {4, 5}.isdisjoint(piece.train)
            assert cell.test != "x" or piece.test == (4, 5)
    within = next(c for c in plan_cells(utterances, folds=0) if c.row == c.test == "x")
    assert within.pieces[0].train == (0, 1, 2, 3), "validation too"
    everywhere = [u.relabelled() for u in utterances]
    for u in everywhere[:6]:
        u.extra["part"] = "test"
    assert next(c for c in plan_cells(everywhere, folds=2) if c.row == c.test == "x").left_out == {
        "train": 0,
        "test": 0,
    }


def test_a_test_part_is_found_in_part_and_in_split_and_in_any_case_of_its_letters():
    utterances = rows("x", "ababab", "112233") + rows("y", "abab", "1122")
    names = [("Train", "train"), ("Development", "valid"), ("Test1", "test")]
    for i, u in enumerate(utterances[:6]):
        u.extra.update(zip(("part", "split"), names[i // 2], strict=True))
    assert [across.part_of(u) for u in utterances[:6]] == ["", "", "valid", "valid", "test", "test"]
    assert across.part_of(rows("x", "a", "1")[0].relabelled()) == ""
    for cell in plan_cells(utterances, folds=2):
        assert all({4, 5}.isdisjoint(piece.train) for piece in cell.pieces)
        assert cell.test != "x" or cell.pieces[0].test == (4, 5)
    for u in utterances[4:6]:
        u.extra["split"] = "TEST"
    assert across.part_of(utterances[5]) == "test"


def test_further_test_sets_which_a_split_does_not_have_are_left_out():
    utterances = rows("x", "ababab", "112233", "rrttrr") + rows("y", "abab", "1122", "rrtt")
    for u, split in zip(utterances, ["train", "train", "test", "test"], strict=False):
        u.extra["split"] = split
    for u, part in zip(utterances[4:], ("Test2", "Test3"), strict=False):
        u.extra["part"] = part
    kept, lines = across.with_own_parts(utterances)
    assert [u.id for u in kept] == ["x/0", "x/1", "x/2", "x/3", "y/0", "y/1", "y/2", "y/3"]
    assert lines == [
        "x: 2 utterances have a part, but no split, and are left out: Test2, Test3",
        "x, y: their own test parts are tested (column part or split)",
    ]
    assert across.with_own_parts(rows("x", "ab", "12")) == (rows("x", "ab", "12"), [])


def test_a_corpus_may_not_have_the_name_of_the_row_of_all_others():
    with pytest.raises(ConfigError, match="the corpus 'all others' has the name of a row of the table"):
        plan_cells(rows(OTHERS, "abab", "1122") + rows("y", "abab", "1122"), folds=2)


def test_a_corpus_without_speakers_is_not_tested_within_itself():
    utterances = rows("x", "abab", "    ") + rows("y", "abab", "1122") + rows("z", "ababab", "1111  ")
    cells = {(c.row, c.test): c for c in plan_cells(utterances, folds=2)}
    assert cells["x", "x"].why_empty == "the speakers are not known"
    assert cells["z", "z"].why_empty == "the corpus has only one speaker"
    assert cells["y", "x"].pieces and cells["x", "y"].pieces
    assert {c.why_empty for c in plan_cells(utterances, folds=0) if c.within} == {"--folds 0 leaves it out"}
    two = rows("x", "ababab", "1122  ") + rows("y", "abab", "1122")
    cell = plan_cells(two, folds=2)[0]
    assert cell.left_out == {"train": 2, "test": 2}, "those without a speaker might be anybody"
    assert {i for piece in cell.pieces for i in piece.train} == {0, 1, 2, 3}


# ------------------------------------------------------------------------------------------------------ results


def cell_and_answers(speakers: str, wrong: set[int]):
    utterances = rows("x", "abab", "1122") + rows("y", "ab" * (len(speakers) // 2), speakers)
    cell = next(c for c in plan_cells(utterances, folds=2) if (c.row, c.test) == ("x", "y"))
    other = {"a": "b", "b": "a"}
    predicted = {
        i: other[str(u.emotion)] if i - 4 in wrong else str(u.emotion) for i, u in enumerate(utterances) if i > 3
    }
    return utterances, cell, predicted


def test_the_interval_is_that_of_a_bootstrap_over_speakers():
    utterances, cell, predicted = cell_and_answers("11112222334455", {0, 2, 5, 9})
    result = score(utterances, cell, predicted, Heard(), resamples=500)
    tested = [(u.speaker, u.emotion, predicted[i]) for i, u in enumerate(utterances) if i > 3]

    def ua(sample) -> float:
        right, count = Counter(), Counter()
        for _, emotion, answer in sample:
            count[emotion] += 1
            right[emotion] += emotion == answer
        return float(np.mean([right[e] / count[e] for e in count]))

    names = sorted({speaker for speaker, *_ in tested})
    random = np.random.default_rng(0)
    draws = [
        ua([row for k in random.integers(0, len(names), len(names)) for row in tested if row[0] == names[k]])
        for _ in range(500)
    ]
    assert result.ua == pytest.approx(ua(tested))
    assert result.interval == pytest.approx(np.percentile(draws, [2.5, 97.5]))
    assert (result.utterances, result.speakers, result.unread) == (14, 5, 0)
    content = result.to_dict()
    assert content["chance"] == 0.5 and content["interval_speakers"] == list(result.interval)


@pytest.mark.parametrize("speakers", ["1111", "12 1", "    "], ids=["one speaker", "one unknown", "none known"])
def test_without_speakers_to_draw_there_is_no_interval(speakers):
    utterances, cell, predicted = cell_and_answers(speakers, {0})
    result = score(utterances, cell, predicted, Heard(), resamples=50)
    assert result.interval is None and result.ua == 0.75
    assert result.to_dict()["interval_speakers"] is None


def test_a_fold_whose_training_lacks_a_class_is_told():
    utterances = rows("x", "aabbc", "12123") + rows("y", "abc", "111")
    cell = plan_cells(utterances, folds=3)[0]
    result = score(utterances, cell, dict.fromkeys(range(5), "a"), Heard(), resamples=50)
    assert result.to_dict()["folds_lacking_a_class"] == 1
    assert "x > x: the training of 1 of 3 folds lacks a class of the test" in across.notes([result])


def test_what_could_not_be_read_is_counted_and_in_no_figure():
    utterances, cell, predicted = cell_and_answers("112233", {1})
    del predicted[5]
    result = score(utterances, cell, predicted, Heard(), resamples=50)
    assert (result.ua, result.utterances, result.unread) == (1.0, 5, 1)
    assert "1 utterances of a cell could not be read" in "\n".join(across.notes([result]))
    empty = score(utterances, cell, {}, Heard(), resamples=50)
    assert empty.figures == {} and "could be read" in empty.to_dict()["why_empty"]
    why = "no recording of the training or of the test could be read"
    assert f"no figure for x > y: {why}" in across.notes([empty])


# -------------------------------------------------------------------------------------------------------- marks


def test_speakers_in_training_and_test_of_a_cell_mark_it():
    utterances = rows("x", "abab", "1122") + [u.relabelled(speaker="x/1") for u in rows("y", "ab", "11")]
    cell = next(c for c in plan_cells(utterances, folds=2) if (c.row, c.test) == ("x", "y"))
    result = score(utterances, cell, {4: "a", 5: "b"}, Heard(), resamples=50)
    assert result.heard_by_head == 1 and result.marks == "t"
    assert any(line.startswith("t  ") for line in across.notes([result]))
    parted = rows("x", "ababab", "112222", "rrrrtt") + rows("y", "ab", "11")
    within = plan_cells(parted, folds=2)[0]
    assert score(parted, within, {4: "a", 5: "b"}, Heard(), resamples=50).marks == "*t", "its own part shares one"


def record_of(folder: Path, utterances: list[Utterance], **settings) -> Path:
    """A model folder whose card says that it was trained on these."""
    recognizer = toy_recognizer(reads=MEAN_STD)
    recognizer.save(folder)
    write_card(folder, training_record(recognizer, utterances, [1] * len(utterances), settings))
    return folder


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """Two corpora with the same names of speakers, and models that know one, both, or do not say."""
    folder = tmp_path_factory.mktemp("corpora")
    for seed, name in enumerate(("one", "two")):
        write_corpus(folder / name, 32, speakers=5, seed=seed, name=f"{name}-all")
        (folder / name / f"{name}-all.csv").rename(folder / name / "metadata.csv")
        lines = (folder / name / "metadata.csv").read_text().splitlines(keepends=True)
        kept = [line for line in lines if ",s0," in line or ",s1," in line]
        (folder / name / "train.csv").write_text("".join([lines[0], *kept]))
    train = {name: Selection(str(folder / name / "train.csv")).to_dict() for name in ("one", "two")}
    read = read_manifest(folder / "one" / "train.csv")
    record_of(folder / "knows-one", read, train=train["one"], init="small")
    record_of(folder / "knows-two-through-init", read, train=train["one"], init=str(folder / "knows-two"))
    record_of(folder / "knows-two", read, train=train["two"], init="small")
    record_of(folder / "gone", read, train=Selection(str(folder / "nothing.csv")).to_dict(), init="small")
    record_of(folder / "from-a-foreign-one", read, train=train["one"], init=str(folder / "silent"))
    toy_recognizer(reads=MEAN_STD).save(folder / "silent")
    return folder


def manifests(corpora: Path) -> list[Path]:
    return [corpora / name / "metadata.csv" for name in ("one", "two")]


def heard_speakers(corpora: Path, model: str) -> tuple[dict[str, list[str]], bool]:
    """Corpus -> its speakers that the model heard, and whether there may be others."""
    heard = heard_by(corpora / model if (corpora / model).exists() else model)
    found = {}
    for manifest in manifests(corpora):
        name = manifest.parent.name
        us = [
            Utterance(f"{name}/{u.id}", u.file, labels=u.labels | {"speaker": f"{name}/{u.speaker}"},
                      extra={"corpus": name}) for u in read_manifest(manifest)
        ]  # fmt: skip
        found[name] = sorted(heard.speakers(us))
    return found, bool(heard.unknown)


@pytest.mark.parametrize(
    ("model", "one", "two", "unknown"),
    [
        ("small", [], [], False),
        ("knows-one", ["one/s0", "one/s1"], [], False),
        ("knows-two-through-init", ["one/s0", "one/s1"], ["two/s0", "two/s1"], False),
        ("silent", [], [], True),
        ("gone", [], [], True),
        ("from-a-foreign-one", ["one/s0", "one/s1"], [], True),
    ],
)
def test_what_a_model_heard_is_found_on_its_card_and_on_that_of_its_initial_weights(
    corpora, model, one, two, unknown
):
    assert heard_speakers(corpora, model) == ({"one": one, "two": two}, unknown)


def test_a_speaker_is_known_by_recording_where_the_corpus_has_another_name(corpora):
    heard = heard_by(corpora / "knows-one")
    (u, *_) = (u for u in read_manifest(corpora / "one/metadata.csv") if u.speaker == "s1")
    nameless = Utterance("z/1", u.file, emotion="sad", extra={"corpus": "z"})
    renamed = Utterance("z/2", u.file.with_name("new.wav"), speaker="z/s1", extra={"corpus": "z"})
    stranger = Utterance("z/3", Path("/elsewhere/new.wav"), speaker="z/s1", extra={"corpus": "z"})
    assert heard.speakers([nameless, renamed, stranger]) == {"z/1", "z/s1"}
    assert heard.speakers([stranger]) == set()


def test_a_speaker_is_known_through_another_path_to_the_same_recordings(corpora, tmp_path):
    heard = heard_by(corpora / "knows-one")
    (tmp_path / "link").symlink_to(corpora / "one")
    own = [u for u in read_manifest(corpora / "one/metadata.csv") if u.speaker == "s1"]
    linked = [
        Utterance(f"z/{i}", tmp_path / "link" / u.file.name, speaker=f"z/{s}", extra={"corpus": "z"})
        for i, (u, s) in enumerate(zip(own, ["s1", "other"], strict=False))
    ]
    assert heard.speakers(linked[:1]) == {"z/s1"} and heard.speakers(linked[1:]) == {"z/other"}
    other = Utterance("z/9", tmp_path / "link/new.wav", speaker="z/s1", extra={"corpus": "z"})
    assert heard.speakers([other]) == {"z/s1"}, "by the folder"


def test_validation_data_count_as_heard_if_they_chose_the_weights(corpora, tmp_path):
    read = read_manifest(corpora / "one/train.csv")
    both = {name: Selection(str(corpora / name / "train.csv")).to_dict() for name in ("one", "two")}
    folder = record_of(tmp_path / "model", read, train=both["one"], valid=both["two"], init="small")
    assert heard_speakers(corpora, str(folder))[0] == {"one": ["one/s0", "one/s1"], "two": []}
    record = json.loads((folder / "training.json").read_text())
    write_card(folder, record | {"weights": "best"})
    found = heard_speakers(corpora, str(folder))
    assert found == ({"one": ["one/s0", "one/s1"], "two": ["two/s0", "two/s1"]}, False)


# ------------------------------------------------------------------------------------------------------ picture


def test_the_picture_frames_what_was_heard_and_numbers_names_that_cannot_be_drawn(tmp_path, monkeypatch):
    from matplotlib.image import imread

    names = {"x": "\u0639\u0631\u0628", "y": "a$b$", "z": "#2"}
    utterances = [
        Utterance(u.id, u.file, labels=u.labels, extra={"corpus": names[u.corpus]})
        for u in rows("x", "abab", "1122") + rows("y", "abab", "1122") + rows("z", "abab", "    ")
    ]
    answers = {i: str(u.emotion) for i, u in enumerate(utterances)}
    heard = Heard(frozenset({("file", "/y/0.wav")}))
    red = []
    for known in (Heard(), heard):
        results = [score(utterances, c, answers, known, resamples=20) for c in plan_cells(utterances, folds=2)]
        assert draw_corpora(results, tmp_path / "a.png") == {"#1": names["x"]}, "and z's own name is no number"
        pixels = imread(tmp_path / "a.png")[..., :3]
        red.append(int(((pixels[..., 0] > 0.8) & (pixels[..., 1] < 0.2)).sum()))
    assert red[0] == 0 and red[1] > 1000
    empty = [r for r in results if not r.figures]
    assert empty and draw_corpora(empty, tmp_path / "none.png") == {}, "a picture without a figure"


# ---------------------------------------------------------------------------------------------------- a command


def test_the_command_fills_a_matrix_and_marks_what_the_model_heard(corpora, tmp_path, capsys):
    options = ["--corpora", *manifests(corpora), "--folds", 2, "--resamples", 50]
    call("--model", corpora / "knows-one", *options, "--out", tmp_path)
    told = capsys.readouterr().out
    content = json.loads((tmp_path / "crosscorpus.json").read_text())
    cells = {(cell["row"], cell["test"]): cell for cell in content["cells"]}
    assert content["unweighted_accuracy"] == {
        row: {test: cells[row, test]["unweighted_accuracy"] for test in ("one", "two")} for row in ("one", "two")
    }
    assert cells["two", "one"]["unweighted_accuracy"] > 0.5, "tones are easy"
    assert cells["one", "one"]["folds"] == 2 and cells["one", "one"]["trained_on"] == 19
    assert [cells[pair]["speakers_heard_by_model"] for pair in (("two", "one"), ("one", "two"))] == [2, 0]
    assert {c["speakers_heard_by_head"] for c in cells.values()} == {0}
    assert f"{cells['two', 'one']['unweighted_accuracy']:.3f}m" in told
    assert f"{cells['one', 'one']['unweighted_accuracy']:.3f}*m" in told
    assert "chance: 0.25\n" in told and "2 of 5" in told
    table = list(csv.DictReader((tmp_path / "crosscorpus.csv").open()))
    assert [(row["row"], row["test"]) for row in table] == list(cells)
    assert float(table[1]["low"]) == cells["one", "two"]["interval_speakers"][0]
    assert (tmp_path / "crosscorpus.png").stat().st_size > 5000
    call("--model", corpora / "silent", *options)
    told = capsys.readouterr().out
    assert "does not say what it was trained on" in told and told.count("unknown") >= 3


def test_vectors_are_kept_by_weights_layers_and_recordings(corpora, tmp_path, monkeypatch):
    for name in ("one", "two"):
        shutil.copytree(corpora / name, tmp_path / name)
    shutil.copytree(corpora / "silent", tmp_path / "model")
    computed = []
    whole = probe.vectors_of

    def counted(recognizer, utterances, **options):
        computed.append(utterances[0].corpus)
        return whole(recognizer, utterances, **options)

    monkeypatch.setattr(probe, "vectors_of", counted)
    options = ["--corpora", *manifests(tmp_path), "--out", tmp_path / "out", "--resamples", 20, "--no-pictures"]

    def again(*more) -> list[str]:
        computed.clear()
        call("--model", tmp_path / "model", *options, *more)
        return [*computed]

    assert again() == ["one", "two"]
    first = (tmp_path / "out/crosscorpus.json").read_text()
    assert again() == [] and (tmp_path / "out/crosscorpus.json").read_text() == first
    assert again("--map", '{"happy": "joy"}') == [], "labels make no vector"
    assert again("--layers", "1") == ["one", "two"]
    file = next((tmp_path / "two").glob("*.wav"))
    file.write_bytes(file.read_bytes() + b"\0\0")
    assert again() == ["two"]
    kept = sorted((tmp_path / "out/vectors").glob("one-*"))
    for path in kept:
        path.write_bytes(b"damaged")
    assert again() == ["one"]
    toy_recognizer(reads=MEAN_STD, seed=1).save(tmp_path / "model")
    assert again() == ["one", "two"]


def test_the_same_is_computed_without_out_and_by_workers(corpora, tmp_path, capsys):
    options = ["--model", corpora / "silent", "--corpora", *manifests(corpora), "--resamples", 20]
    tables = []
    for more in ([], ["--out", tmp_path, "--no-pictures"], ["--workers", 1]):
        call(*options, *more)
        tables.append(capsys.readouterr().out.partition("unweighted accuracy")[2].partition("written")[0])
    assert tables[0] and tables[0] == tables[1] == tables[2]


def test_a_list_of_manifests_a_map_and_classes_choose_what_is_compared(corpora, tmp_path, capsys):
    listed = [{"path": str(path), "name": name} for name, path in zip("pq", manifests(corpora), strict=True)]
    (tmp_path / "corpora.json").write_text(
        json.dumps([*listed, {"path": str(corpora / "one/train.csv"), "name": "r"}])
    )
    with pytest.raises(ManifestError, match="is the same recording as"):
        call("--model", "small", "--corpora", tmp_path / "corpora.json")
    (tmp_path / "corpora.json").write_text(json.dumps(listed))
    options = [
        "--model",
        corpora / "silent",
        "--corpora",
        tmp_path / "corpora.json",
        "--out",
        tmp_path,
        "--no-pictures",
    ]
    call(*options, "--classes", "angry", "sad", "--folds", 0)
    content = json.loads((tmp_path / "crosscorpus.json").read_text())
    assert {tuple(cell["classes"]) for cell in content["cells"]} == {("angry", "sad")}
    assert content["unweighted_accuracy"]["p"]["p"] is None
    assert "p > p: --folds 0 leaves it out" in capsys.readouterr().out
    call(*options, "--map", json.dumps({"angry": None, "speaker": {"p/s0": "q/s0"}}))
    cells = json.loads((tmp_path / "crosscorpus.json").read_text())["cells"]
    assert cells[0]["classes"] == ["happy", "neutral", "sad"]
    assert [cell["speakers_heard_by_head"] for cell in cells] == [0, 1, 1, 0]


def test_corpora_whose_rows_are_mixed_in_one_manifest_have_the_same_figures(corpora, tmp_path):
    tables = [list(csv.reader(path.read_text().splitlines())) for path in manifests(corpora)]
    pairs = zip(*([[path.parent.name, str(path.parent / r[0]), *r[1:]] for r in table[1:]] for path, table in zip(
        manifests(corpora), tables, strict=True)), strict=True)  # fmt: skip
    with (tmp_path / "mixed.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["corpus", *tables[0][0]], *(row for pair in pairs for row in pair)])
    (tmp_path / "list.json").write_text(json.dumps([{"path": "mixed.csv"}]))
    found = []
    for out, given in (("two", manifests(corpora)), ("mixed", [tmp_path / "list.json"])):
        call("--model", corpora / "silent", "--corpora", *given, "--out", tmp_path / out, "--no-pictures")
        found.append(json.loads((tmp_path / out / "crosscorpus.json").read_text())["unweighted_accuracy"])
    assert found[0] == found[1] and list(found[0]) == ["one", "two"]


def test_a_preset_has_the_same_random_weights_each_time_and_has_heard_nobody(corpora, tmp_path):
    found = []
    for out in ("a", "b"):
        torch.manual_seed(len(found))
        call("--model", "small", "--corpora", *manifests(corpora), "--out", tmp_path / out, "--no-pictures")
        found.append(json.loads((tmp_path / out / "crosscorpus.json").read_text())["cells"])
    assert found[0] == found[1] and {cell["speakers_heard_by_model"] for cell in found[0]} == {0}
    kept = [sorted(path.name for path in (tmp_path / out / "vectors").iterdir()) for out in ("a", "b")]
    assert kept[0] == kept[1], "whose names have the digest of the weights"


def test_the_heads_of_cells_with_the_same_training_set_are_one(corpora):
    utterances = rows("x", "abab", "1122") + rows("y", "abab", "1122") + rows("z", "abab", "1122")
    vectors = torch.from_numpy(np.random.default_rng(0).normal(size=(12, 3)))
    heads = LinearHeads(utterances, vectors, torch.ones(12, dtype=torch.bool))
    for cell in plan_cells(utterances, folds=2):
        heads.predicted(cell)
    assert len(heads.heads) == 3 + 3 * 2 + 3


# ------------------------------------------------------------------------------------------------ hostile inputs


def changed(corpora: Path, folder: Path, change) -> list[Path]:
    """The manifests, of which the second has lines that were changed."""
    one, two = manifests(corpora)
    header, *lines = csv.reader(two.read_text().splitlines())
    folder.mkdir()
    table = change(header, [list(line) for line in lines])
    with (folder / "two.csv").open("w", newline="") as file:
        csv.writer(file).writerows([[str(two.parent / c[0]), *c[1:]] if i else c for i, c in enumerate(table)])
    return [one, folder / "two.csv"]


def without(column: str):
    def change(header, lines):
        i = header.index(column)
        return [row[:i] + row[i + 1 :] for row in (header, *lines)]

    return change


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (without("emotion"), ConfigError, "no utterance of the corpus 'two' has an emotion; see --columns"),
        (lambda header, lines: [header], ManifestError, "the manifest has no rows"),
        (
            lambda header, lines: [header, *([*r[:1], "x", *r[2:]] for r in lines)],
            ConfigError,
            "two classes in common",
        ),
    ],
    ids=["no emotion", "empty", "other classes"],
)
def test_corpora_that_cannot_be_compared_are_refused_in_a_line(corpora, tmp_path, change, error, says):
    given = changed(corpora, tmp_path / "changed", change)
    with pytest.raises(error, match=says):
        call("--model", corpora / "silent", "--corpora", *given, "--folds", 0 if "classes" in says else 2)


def test_the_command_tests_the_part_that_the_column_split_names_and_says_so(corpora, tmp_path, capsys):
    def change(header, lines):
        for i, line in enumerate(lines):
            line += [("Train", "train"), ("Test1", "test"), ("Test2", "")][0 if i < 16 else 1 if i < 24 else 2]
        return [[*header, "part", "split"], *lines]

    given = changed(corpora, tmp_path / "changed", change)
    call("--model", corpora / "silent", "--corpora", *given, "--out", tmp_path, "--no-pictures", "--resamples", 9)
    told = capsys.readouterr().out
    assert "two: 8 utterances have a part, but no split, and are left out: Test2" in told
    assert "two: its own test part is tested (column part or split)" in told
    cells = json.loads((tmp_path / "crosscorpus.json").read_text())["cells"]
    assert [(cell["utterances"], cell["trained_on"]) for cell in cells[1:]] == [(8, 32), (32, 16), (8, 16)]


def test_a_corpus_without_speakers_has_figures_without_intervals(corpora, tmp_path, capsys):
    given = changed(corpora, tmp_path / "changed", without("speaker"))
    call("--model", corpora / "silent", "--corpora", *given, "--out", tmp_path / "out")
    assert "no figure for two > two: the speakers are not known" in capsys.readouterr().out
    first, across_, back, within = json.loads((tmp_path / "out/crosscorpus.json").read_text())["cells"]
    assert first["interval_speakers"] and across_["interval_speakers"] is None and back["interval_speakers"]
    assert back["penalties"] == [probe.USUAL_PENALTY] and "unweighted_accuracy" not in within


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        (["--corpora", "ONE"], ConfigError, "there is one corpus, 'one'; give two or more"),
        (["--corpora", "ONE", "ONE"], ConfigError, "is given twice"),
        (["--corpora", "ONE", "TWO", "--layers", "9"], ConfigError, "numbers from 0 to 2"),
        (["--corpora", "ONE", "TWO", "--classes", "angri"], ConfigError, "did you mean 'angry'"),
        (["--corpora", "ONE", "TWO", "--classes", "angri"], ConfigError, "there are angry, happy, neutral, sad"),
        (["--corpora", "ONE", "TWO", "--classes", "angry"], ConfigError, "--classes names one emotion; give two"),
        (["--corpora", "ONE", "TWO", "--classes", "sad", "sad"], ConfigError, "names one emotion; give two"),
        (["--corpora", "ONE", "TWO", "--workers", "-1"], ConfigError, "--workers -1: expected 0 or more"),
        (["--corpora", "ONE", "TWO", "--timeout", "0"], ConfigError, "--timeout 0.0: expected seconds"),
        (["--corpora", "ONE", "TWO", "--max-bad-audio", "7"], ConfigError, "7.0: expected a share from 0 to 1"),
        (["--corpora", "ONE", "TWO", "--processes", "2"], ConfigError, "--processes .* --train"),
        (["--corpora", "ONE", "TWO", "--parallel", "2"], ConfigError, "--parallel .* --train"),
        (
            ["--corpora", "ONE", "TWO", "--train", "--out", "X", "--heads", "speaker"],
            ConfigError,
            "--heads speaker: the table needs emotion among the heads",
        ),
        (
            ["--corpora", "ONE", "TWO", "--train", "--out", "X", "--heads=ctc,speaker"],
            ConfigError,
            "--heads ctc,speaker: the table needs emotion",
        ),
        (["--corpora", "ONE", "TWO", "--folds", "1"], ConfigError, "--folds 1: expected 2 or more, or 0"),
        (["--corpora", "ONE", "TWO", "--resamples", "0"], ConfigError, "1 or more"),
        (["--corpora", "ONE", "TWO", "--epochs", "3"], ConfigError, "--epochs: .* need --train"),
        (["--corpora", "ONE", "TWO", "--train"], ConfigError, "--train needs --out"),
        (["--corpora", "ONE", "TWO", "--train", "--out", "X", "--layers", "1"], ConfigError, "takes no --layers"),
        (
            ["--corpora", "ONE", "TWO", "--train", "--out", "X", "--init", "y"],
            ConfigError,
            "--init: this command sets it itself",
        ),
        (["--corpora", "ONE", "TWO", "--out", "ONE"], ConfigError, "is a file; expected a folder"),
        (["--corpora", "ONE", "TWO", "--model", "EMPTY"], ModelFolderError, "config.json"),
        (["--corpora", "ONE", "gone.csv"], ManifestError, "gone.csv: cannot be read"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(corpora, tmp_path, monkeypatch, arguments, error, says):
    monkeypatch.chdir(tmp_path)
    one, two = map(str, manifests(corpora))
    (tmp_path / "empty").mkdir()
    words = {"ONE": one, "TWO": two, "EMPTY": str(tmp_path / "empty")}
    with pytest.raises(error, match=says):
        call("--model", corpora / "silent", *(words.get(a, a) for a in arguments))


def test_a_recording_that_cannot_be_read_ends_the_run_or_is_left_out(corpora, tmp_path, capsys):
    for name in ("one", "two"):
        shutil.copytree(corpora / name, tmp_path / name)
    next((tmp_path / "two").glob("*.wav")).write_bytes(b"RIFF")
    options = ["--model", corpora / "silent", "--corpora", *manifests(tmp_path), "--out", tmp_path / "out"]
    with pytest.raises(AudioError, match="1 of 32 recordings of two cannot be used"):
        call(*options)
    with pytest.raises(AudioError, match="1 of 32 recordings of two cannot be used"):
        call(*options, "--on-bad-audio", "skip", "--max-bad-audio", "0.01")
    for _ in range(2):
        call(*options, "--on-bad-audio", "skip", "--max-bad-audio", "0.05")
        cells = json.loads((tmp_path / "out/crosscorpus.json").read_text())["cells"]
        assert [cell["unread"] for cell in cells] == [0, 1, 0, 1]
        assert "up to 1 utterances of a cell could not be read" in capsys.readouterr().out
    with pytest.raises(AudioError, match="1 of 32 recordings of two cannot be used") as refused:
        call(*options)
    assert "could not be read when the vectors were computed" in str(refused.value), "they are kept by now"


def test_a_corpus_of_which_nothing_can_be_read_has_no_figures(corpora, tmp_path, capsys):
    for name in ("one", "two"):
        shutil.copytree(corpora / name, tmp_path / name)
    for path in (tmp_path / "two").glob("*.wav"):
        path.write_bytes(b"RIFF")
    options = ["--model", corpora / "silent", "--corpora", *manifests(tmp_path), "--out", tmp_path / "out"]
    call(*options, "--on-bad-audio", "skip", "--max-bad-audio", 1, "--no-pictures", "--resamples", 20)
    cells = json.loads((tmp_path / "out/crosscorpus.json").read_text())["cells"]
    assert ["unweighted_accuracy" in cell for cell in cells] == [True, False, False, False]
    assert {cell.get("why_empty", "") for cell in cells[1:]} == {
        "no recording of the training or of the test could be read"
    }
    assert "no figure for two > one: no recording" in capsys.readouterr().out


def test_the_results_of_linear_heads_and_of_trainings_do_not_replace_each_other(corpora, tmp_path):
    options = ["--model", corpora / "silent", "--corpora", *manifests(corpora), "--out", tmp_path]
    for head, more in (("whole trainings", []), ("linear (ridge)", ["--train"])):
        (tmp_path / "crosscorpus.json").write_text(json.dumps({"head": head}))
        with pytest.raises(ConfigError, match=re.escape(f"has results of {head}; choose another --out")):
            call(*options, *more)
    (tmp_path / "crosscorpus.json").write_text("[")
    call(*options, "--no-pictures", "--resamples", 20)


# --------------------------------------------------------------------------------------------- whole trainings


@pytest.mark.slow
def test_whole_trainings_fill_the_same_table_and_none_is_done_twice(corpora, tmp_path, capsys):
    out = tmp_path / "out"
    options = [
        "--train",
        "--model",
        corpora / "silent",
        "--corpora",
        *manifests(corpora),
        "--folds",
        0,
        "--out",
        out,
    ]
    options += ["--resamples", 20, "--no-pictures", "--epochs", 2, "--rate", "1e-3", "--effective-batch", "8"]
    call(*options)
    told = capsys.readouterr().out
    assert "2 trainings: one, two" in told and "whole trainings from" in told
    first = (out / "crosscorpus.json").read_text()
    cells = {(c["row"], c["test"]): c for c in json.loads(first)["cells"]}
    assert cells["one", "two"]["utterances"] == 32 and cells["one", "two"]["interval_speakers"]
    assert cells["one", "two"]["speakers_heard_by_head"] == 0
    record = json.loads((out / "trainings/one/run/last/training.json").read_text())
    assert record["trained_on"]["utterances"] == 32 and record["heads"] == ["emotion"]
    assert record["settings"]["epochs"] == 2
    weights = [out / "trainings" / name / "run/last/model.safetensors" for name in ("one", "two")]
    before = [path.stat().st_mtime_ns for path in weights]
    (out / "trainings/two/predictions.csv").unlink()
    call(*options)
    assert [path.stat().st_mtime_ns for path in weights] == before, "a training that is finished is not repeated"
    assert "one: done already" in capsys.readouterr().out
    assert (out / "crosscorpus.json").read_text() == first
    with pytest.raises(ConfigError, match="was begun with other settings"):
        call(*options, "--seed", "3")


def test_cells_share_trainings_whose_names_stay_when_a_corpus_is_added():
    two = rows("x", "ababab", "112233", "rvrvtt") + rows("y", "abca", "1122")
    three = two + rows("z", "abc/"[:3], "123")
    names = []
    for utterances in (two, three):
        trainings, places = all_trainings(utterances, cells := plan_cells(utterances, folds=2))
        assert [len(place) for place in places] == [len(cell.pieces) for cell in cells]
        for cell, place in zip(cells, places, strict=True):
            for name, piece in zip(place, cell.pieces, strict=True):
                assert trainings[name].train == piece.train and trainings[name].test.issuperset(piece.test)
        names.append([*trainings])
    assert names[0] == ["x", "y a+b", "y fold 1 of 2", "y fold 2 of 2"], "x is tested by its own part and by y"
    assert set(names[0]) < set(names[1]) and {"x+y", "y+z a+b", "x+z"} < set(names[1])


def test_other_tests_are_evaluated_again_and_another_training_is_refused(tmp_path):
    utterances = rows("x", "ababab", "112233", "rrvvtt")
    for u in utterances:
        u.extra["kind"] = "acted"
    arguments = Namespace(model="small", training_options=["--epochs", "2", "--workers", "3"])

    def write(train, test, **changes) -> bool:
        """Write a training whose report is there, and tell whether the report stays."""
        write_training(tmp_path, Training(train, test), utterances, Namespace(**vars(arguments) | changes))
        stays = (tmp_path / "report.json").exists()
        (tmp_path / "report.json").write_text("{}")
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run/config.json").write_text("{}")
        return stays

    assert not write((0, 1, 2, 3), {4})
    assert [u.id for u in read_manifest(tmp_path / "valid.csv", check_files=False)] == ["x/2", "x/3"]
    train = read_manifest(tmp_path / "train.csv", check_files=False)
    assert train == [utterances[0], utterances[1]], "speakers, corpus and columns too"
    assert write((0, 1, 2, 3), {4}) and not write((0, 1, 2, 3), {4, 5}) and write((0, 1, 2, 3), {4, 5})
    assert write((0, 1, 2, 3), {4, 5}, training_options=["--workers", "1", "--epochs=2"])
    for train, changes in (
        ((0, 1, 2), {}),
        ((0, 2, 3), {}),
        ((0, 1, 2, 3), {"training_options": ["--epochs", "3"]}),
        ((0, 1, 2, 3), {"model": "base"}),
    ):
        with pytest.raises(ConfigError, match="was begun with other settings"):
            write(train, {4, 5}, **changes)


def test_a_report_of_other_utterances_than_the_test_is_evaluated_again(tmp_path, monkeypatch):
    utterances = rows("x", "ababab", "112233")
    arguments = Namespace(model="small", training_options=[])
    write = crosscorpus.write_manifest

    def killed(path, members, **options):
        write(path, members, **options)
        if path.name.startswith("test"):
            raise KeyboardInterrupt

    write_training(tmp_path, Training((0, 1), {4}), utterances, arguments)
    (tmp_path / "report.json").write_text("{}")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(crosscorpus, "write_manifest", killed)
        write_training(tmp_path, Training((0, 1), {4, 5}), utterances, arguments)
    write_training(tmp_path, Training((0, 1), {4, 5}), utterances, arguments)
    assert not (tmp_path / "report.json").exists(), "after a kill between two files"

    def evaluated(*numbers, unread=0) -> bool:
        """Write a report on some utterances, and tell whether it stays for a test of utterances 4 and 5."""
        records = [
            {"id": f"x/{i}", "emotion": "a", "speaker": "x/1", "predicted": "a", "confidence": 1.0}
            for i in numbers
        ]
        written = report(write_rows(tmp_path / "predictions.csv", [records], ["a"]), resamples=1)
        write_json(tmp_path / "report.json", written.to_dict() | {"unread": unread})
        write_training(tmp_path, Training((0, 1), {4, 5}), utterances, arguments)
        return (tmp_path / "report.json").exists()

    assert evaluated(4, 5) and evaluated(4, unread=1)
    assert not evaluated(4) and not evaluated(3, 4) and not evaluated(3, 4, 5)


def test_a_training_whose_utterances_are_all_for_validation_is_refused(tmp_path):
    utterances = rows("x", "abab", "1122", "vvtt")
    with pytest.raises(ConfigError, match="x: all 2 utterances of this training are for validation"):
        write_training(
            tmp_path / "x", Training((0, 1), {2, 3}), utterances, Namespace(model="small", training_options=[])
        )


def test_a_training_is_told_of_the_workers_and_may_share_speakers_with_its_validation(tmp_path):
    parser = make_parser("", "x")
    crosscorpus.add_arguments(parser)
    given = ["--model", "small", "--corpora", "a", "--train", "--out", str(tmp_path), "--epochs", "2"]

    def commands(*more) -> dict[str, str]:
        arguments = crosscorpus.parse(parser, [*given, *more])
        return {step: " ".join(c) for step, c in Trainings(arguments, Selection(""), "").commands("x").items()}

    plain = commands()
    assert not any(word in plain["train"] for word in ("--workers", "--timeout", "--allow-overlap"))
    (tmp_path / "x").mkdir()
    (tmp_path / "x/valid.csv").write_text("")
    for command in commands("--workers", "2", "--timeout", "9").values():
        assert "--workers 2 --timeout 9.0" in command
    assert "--allow-overlap speakers" in commands()["train"]


def test_trainings_of_different_corpora_never_have_the_same_name():
    names = ("a", "b", "a+b", "c", "a fold 1 of 2", "a a+b")
    utterances = [u for name in names for u in rows(name, "ababab" if name == "c" else "ababcc", "112233")]
    cells = plan_cells(utterances, folds=2)
    trainings, places = all_trainings(utterances, cells)
    for cell, names in zip(cells, places, strict=True):
        assert [trainings[name].train for name in names] == [piece.train for piece in cell.pieces]

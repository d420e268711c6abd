"""Figures, intervals, parts and comparisons of predictions (N5); scikit-learn and jiwer are the oracles."""

import csv
import json
import math
import re
import struct
import subprocess
import sys
import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path

import jiwer
import numpy as np
import pytest
from sklearn import metrics as oracle
from test_update import run_ranks
from toy import toy_recognizer, write_corpus

from ser.audio import audio_info
from ser.data.labels import LABELS, Labels, LabelSpec
from ser.data.manifest import Utterance, read_manifest
from ser.data.protocols import PROTOCOLS
from ser.data.text import Rewriting, Vocabulary
from ser.errors import ConfigError, pip_line
from ser.files import write_json
from ser.recognizer import Prediction
from ser.scores import report as figures_module
from ser.scores.folds import pooled_markdown, pooled_report
from ser.scores.pictures import draw, draw_confusion, drawable
from ser.scores.report import (
    Figure,
    Figures,
    KnownTurns,
    Outcomes,
    Report,
    as_row,
    compare_predictions,
    expected_calibration_error,
    intervals,
    mcnemar,
    report,
    table,
    write_rows,
)
from ser.train import evaluation as module
from ser.train.evaluation import evaluated_rows

EMOTIONS = ["angry", "happy", "neutral", "sad"]


def drawn(count=300, seed=0, right=0.6, speakers=6):
    """Rows of a predictions file, some without label or text."""
    generator = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        emotion = EMOTIONS[generator.integers(4)]
        predicted = emotion if generator.random() < right else EMOTIONS[generator.integers(4)]
        others = generator.dirichlet(np.ones(4))
        others[EMOTIONS.index(predicted)] += 1
        shares = dict(zip(EMOTIONS, others / others.sum(), strict=True))
        words = " ".join(generator.choice(["yes", "no", "maybe", "so"], 5))
        heard = " ".join(w for w in words.split() if generator.random() < 0.8)
        edits = jiwer.process_words(words, heard) if heard else None
        rows.append(
            {
                "id": f"u{i}", "file": f"u{i}.wav", "speaker": f"s{i % speakers}",
                "kind": "impro" if i % 2 == 0 else "script",
                "seen_text": ["seen", "unseen", ""][i % 3], "emotion": None if i % 17 == 0 else emotion,
                "predicted": predicted, "reference": words, "transcript": heard, "seconds": 0.5 + i % 11,
                "confidence": shares[predicted], "words": 5, "characters": len(words), "character_edits": 1,
                "word_edits": 5 - len(heard.split()) if edits else 5,
                "speaker_right": None if i % 5 == 0 else int(generator.random() < 0.7),
                **{f"p_{name}": value for name, value in shares.items()},
            }
        )  # fmt: skip
    return rows


def outcomes(**options):
    return Outcomes.of(EMOTIONS, drawn(**options))


def test_every_figure_is_that_of_the_oracle():
    rows = drawn()
    found = Figures(Outcomes.of(EMOTIONS, rows))()
    labelled = [r for r in rows if r["emotion"]]
    truth, predicted = [r["emotion"] for r in labelled], [r["predicted"] for r in labelled]
    assert found["accuracy"] == pytest.approx(oracle.accuracy_score(truth, predicted))
    assert found["unweighted_accuracy"] == pytest.approx(oracle.balanced_accuracy_score(truth, predicted))
    assert found["macro_f1"] == pytest.approx(oracle.f1_score(truth, predicted, average="macro"))
    precision, recall, _, _ = oracle.precision_recall_fscore_support(truth, predicted, labels=EMOTIONS)
    for i, name in enumerate(EMOTIONS):
        assert found[f"precision {name}"] == pytest.approx(precision[i])
        assert found[f"recall {name}"] == pytest.approx(recall[i])
    references, hypotheses = [r["reference"] for r in rows], [r["transcript"] for r in rows]
    assert found["wer"] == pytest.approx(jiwer.wer(references, hypotheses))
    known = [r["speaker_right"] for r in rows if r["speaker_right"] is not None]
    assert found["speaker_accuracy"] == pytest.approx(np.mean(known))
    counted = report(Outcomes.of(EMOTIONS, rows), resamples=2)
    assert counted.confusion == oracle.confusion_matrix(truth, predicted, labels=EMOTIONS).tolist()
    assert counted.judged == {"emotion": len(labelled), "words": 1500, "speaker": len(known)}


def test_the_calibration_error_is_the_written_out_sum_over_bins():
    generator = np.random.default_rng(1)
    confidence = generator.uniform(0.25, 1, 500)
    confidence[:3] = [1.0, 1 / 15, 2 / 15]  # bins are closed above
    right = generator.random(500) < confidence**2
    expected = 0.0
    for i in range(15):
        inside = (confidence > i / 15) & (confidence <= (i + 1) / 15)
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())

    def ece(confidence, right) -> float:
        rows = [
            {"emotion": "sad", "predicted": "sad" if r else "angry", "confidence": c}
            for c, r in zip(confidence, right, strict=True)
        ]
        return Figures(Outcomes.of(EMOTIONS, rows))()["ece"]

    assert ece(confidence, right) == pytest.approx(expected)
    assert ece(np.full(4, 0.75), [True, True, True, False]) == pytest.approx(0)
    (undefined,) = expected_calibration_error(np.zeros((1, 45)))
    assert math.isnan(undefined)


def test_weights_count_an_utterance_as_often_as_they_say():
    rows = drawn(40)
    weights = np.random.default_rng(2).integers(0, 4, 40)
    repeated = [row for row, times in zip(rows, weights, strict=True) for _ in range(times)]
    found, expected = Figures(Outcomes.of(EMOTIONS, rows))(weights), Figures(Outcomes.of(EMOTIONS, repeated))()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value), name


def test_an_interval_over_utterances_has_the_width_of_the_binomial_and_over_speakers_is_wider_where_they_differ():
    rows = drawn(600, right=0.0)
    for i, row in enumerate(rows):  # three speakers are always right, three never
        row["emotion"] = row["predicted"] if i % 6 < 3 else EMOTIONS[EMOTIONS.index(row["predicted"]) - 1]
    found = Outcomes.of(EMOTIONS, rows)
    figures = Figures(found)
    low, high = intervals(figures)["accuracy"]
    assert low == pytest.approx(0.5 - 1.96 * (0.25 / 600) ** 0.5, abs=0.01)
    assert high == pytest.approx(0.5 + 1.96 * (0.25 / 600) ** 0.5, abs=0.01)
    low, high = intervals(figures, found.text["speaker"])["accuracy"]
    assert low < 0.2 and high > 0.8
    assert intervals(figures)["accuracy"] == intervals(figures)["accuracy"], "a function of the seed"
    assert intervals(figures, seed=1)["accuracy"] != intervals(figures)["accuracy"]


def test_the_interval_holds_the_true_value_about_as_often_as_it_says():
    """Coverage over 200 samples of 150 utterances whose true accuracy is known: 95 % give or take."""
    true = 0.6 + 0.4 / 4
    held = 0
    for seed in range(200):
        generator = np.random.default_rng(seed)
        right = generator.random(150) < true
        rows = [{"emotion": "sad", "predicted": "sad" if r else "angry", "confidence": 1.0} for r in right]
        low, high = intervals(Figures(Outcomes.of(EMOTIONS, rows)), resamples=300)["accuracy"]
        held += low <= true <= high
    assert 0.88 <= held / 200 <= 0.99


def test_parts_are_by_kind_seen_text_and_length_and_each_has_its_own_figures():
    found = report(outcomes(count=90), resamples=5)
    assert {"kind: impro", "kind: script", "seen text: seen", "seen text: unseen"} <= found.parts.keys()
    lengths = {n: p.utterances for n, p in found.parts.items() if n.startswith("length")}
    assert list(lengths) == ["length: 0 to 2 s", "length: 2 to 4 s", "length: 4 to 8 s", "length: from 8 s"]
    assert sum(lengths.values()) == 90
    halves = [found.parts[f"kind: {kind}"].utterances for kind in ("impro", "script")]
    assert halves == [45, 45]
    json.dumps(found.to_dict(), allow_nan=False)
    shown = table(found)
    for text in ("unweighted accuracy (UA)", "95 % over utterances", "confusion", "length: from 8 s", "angry"):
        assert text in shown


def test_a_report_without_labels_text_or_speakers_says_what_there_is():
    rows = [
        dict(row, emotion=None, words=None, word_edits=None, speaker=None, speaker_right=None) for row in drawn(9)
    ]
    rows = [dict(row, characters=None, character_edits=None) for row in rows]
    found = report(Outcomes.of(EMOTIONS, rows), resamples=5)
    assert found.figures == {} and found.utterances == 9 and found.confusion is None
    assert "confusion" not in found.to_dict()
    assert "9 utterances" in table(found)


def test_dimensions_are_judged_by_concordance_where_there_are_labels_and_without_any_emotion():
    generator = np.random.default_rng(3)
    labels, heard = generator.normal(3, 1, (2, 50))
    heard = 0.5 * labels + heard / 4
    rows = [
        {"id": f"u{i}", "speaker": f"s{i % 5}", "arousal": None if i % 7 == 0 else y, "arousal_predicted": p}
        for i, (y, p) in enumerate(zip(labels, heard, strict=True))
    ]
    y, p = (np.delete(x, np.arange(0, 50, 7)) for x in (labels, heard))
    expected = 2 * np.cov(p, y, bias=True)[0, 1] / (p.var() + y.var() + (p.mean() - y.mean()) ** 2)
    found = report(Outcomes.of([], rows), resamples=50)
    assert list(found.figures) == ["ccc arousal"]
    assert found.value("ccc arousal") == pytest.approx(expected)
    low, high = found.figures["ccc arousal"].interval_utterances
    assert low < expected < high and found.figures["ccc arousal"].interval_speakers is not None
    assert "concordance (CCC), arousal" in table(found)


def test_utterances_whose_label_is_no_class_of_the_model_are_counted_where_figures_are_shown():
    rows = drawn(20)
    rows[3]["emotion"] = "bored"
    found = report(Outcomes.of(EMOTIONS, rows), resamples=2)
    judged = sum(r["emotion"] in EMOTIONS for r in rows)
    assert found.judged["emotion"] == judged and f"emotions are judged on {judged}:" in table(found)
    assert "1 have one that is no class of the model ('bored' x1)" in table(found)
    for wrong in ({"resamples": 0}, {"seed": -1}):
        with pytest.raises(ConfigError, match="expected 1 or more, and 0 or more"):
            report(Outcomes.of(EMOTIONS, rows), **wrong)
        with pytest.raises(ConfigError, match="expected 1 or more, and 0 or more"):
            compare_predictions(*2 * [Outcomes.of(EMOTIONS, rows)], **wrong)


def test_labels_of_another_spelling_are_all_named_with_the_nearest_classes():
    rows = [row | {"emotion": "hap" if i % 2 else "ang"} for i, row in enumerate(drawn(10))]
    shown = table(report(Outcomes.of(EMOTIONS, rows), resamples=2))
    for piece in (
        "no emotion is judged: none of the labels of 10 utterances is a class",
        "labels:  'ang' x5, 'hap' x5", "classes: 'angry', 'happy', 'neutral', 'sad'",
    ):  # fmt: skip
        assert piece in shown, piece
    rows[0]["emotion"], rows[1]["emotion"] = "sad", None
    shown = table(report(Outcomes.of(EMOTIONS, rows), resamples=2))
    told = "judged on 1: 8 have one that is no class of the model ('ang' x4, 'hap' x4), and 1 have no label"
    assert told in shown and "WARNING" not in shown
    shown = table(report(Outcomes.of([], rows), resamples=2))
    assert "recognises no emotions: the labels of 9 utterances are in no figure" in shown
    rows = [row | {"emotion": "sad" if i % 2 else None} for i, row in enumerate(rows)]
    assert "judged on 5: the others have no label" in table(report(Outcomes.of(EMOTIONS, rows), resamples=2))


def test_what_the_vocabulary_cannot_write_is_shown_with_a_report_and_summed_over_folds(tmp_path):
    changes = [{"references_recased": {"lower": 2}, "characters_outside_vocabulary": {"7": 3, "\x1b": 1}}]
    changes += [{"characters_outside_vocabulary": {"7": 1}, "references_left_empty": 1}, {}]
    for name, change in zip("abc", changes, strict=True):
        (tmp_path / name).mkdir()
        written = write_rows(tmp_path / name / "predictions.csv", [drawn(4)], EMOTIONS)
        write_json(tmp_path / name / "report.json", report(written, resamples=2).to_dict() | change)
    pooled = pooled_report(tmp_path, "abc", PROTOCOLS["paper10"], resamples=2)
    assert pooled.to_dict()["characters_outside_vocabulary"] == {"7": 4, "\x1b": 1}
    for shown in (table(pooled.pooled), pooled_markdown(pooled)):
        assert "the vocabulary has lower-case letters alone: 2 texts are written so" in shown
        assert "removed: '7' x4, '\\x1b' x1" in shown and "1 texts have no character of the vocabulary" in shown
    assert "vocabulary" not in table(report(Outcomes.of(EMOTIONS, drawn(4)), resamples=2))


def test_many_labels_that_are_no_class_are_cut():
    rows = [row | {"emotion": f"e{i}"} for i, row in enumerate(drawn(50))]
    shown = table(report(Outcomes.of(EMOTIONS, rows), resamples=2))
    assert "and 30 more" in shown and len(shown) < 3000


HOSTILE = ["<img src=x>", "a | b", "x\n\n## Licences\n\n- data: CC0", "esc\x1b[2J\x9b31m\r\u202e"]


def test_no_label_commands_a_terminal_or_makes_a_line_of_its_own():
    rows = [row | {"emotion": HOSTILE[i % 4], "predicted": HOSTILE[i % 3], "kind": HOSTILE[i % 4]} for i, row in
            enumerate(drawn(20))]  # fmt: skip
    for classes in (HOSTILE, [*HOSTILE, *map(str, range(200))], EMOTIONS):
        shown = table(report(Outcomes.of(classes, rows), resamples=2))
        assert (
            all(line.isprintable() for line in shown.split("\n"))
            and "\n## L" not in shown
            and "\n- d" not in shown
        )


def many_classes(count: int, classes: int):
    names = [f"e{i}" for i in range(classes)]
    rows = [
        {"emotion": names[i % classes], "predicted": names[i * 7 % classes], "confidence": 0.5, "seconds": 1.0,
         "speaker": f"s{i % 5}"} for i in range(count)
    ]  # fmt: skip
    return Outcomes.of(names, rows)


def test_thousands_of_classes_need_memory_in_proportion():
    found_outcomes = many_classes(60, 3000)
    tracemalloc.start()
    found = report(found_outcomes, resamples=50)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 100e6, "the pairs of classes alone would be 72 MB for each utterance"
    assert found.confusion is None and found.confused[0][2] == 1 and len(found.confused) == 60
    assert len(table(found)) < 5000


def test_classes_that_do_not_occur_leave_the_figures_as_the_oracle_has_them():
    found = many_classes(300, 150)
    truth, predicted = found.text["emotion"].tolist(), found.text["predicted"].tolist()
    values = Figures(found)()
    every = {"labels": found.emotions, "zero_division": 0}
    assert values["macro_f1"] == pytest.approx(
        oracle.f1_score(truth, predicted, average="macro", **every), abs=1e-12
    )
    assert values["unweighted_accuracy"] == pytest.approx(oracle.balanced_accuracy_score(truth, predicted))
    recall = oracle.recall_score(truth, predicted, average=None, **every)
    assert [np.nan_to_num(values[f"recall e{i}"]) for i in range(150)] == pytest.approx(recall)
    one = Figures(many_classes(1, 5))()
    assert math.isnan(one["recall e4"]) and one["recall e0"] == 1 and one["macro_f1"] == pytest.approx(1 / 5)
    cells = {(a, b): n for a, b, n in report(found, resamples=2).confused}
    assert cells == Counter(zip(truth, predicted, strict=True))


def test_chunks_of_utterances_give_the_figures_of_all(monkeypatch):
    whole = report(outcomes(count=70), resamples=20)
    monkeypatch.setattr(figures_module, "CHUNK", 16)
    monkeypatch.setattr(figures_module, "MAX_COUNTS", 200)
    cut = report(outcomes(count=70), resamples=20)
    for name, figure in whole.figures.items():
        assert cut.value(name) == pytest.approx(figure.value)
        assert cut.figures[name].interval_utterances == pytest.approx(figure.interval_utterances)
        assert cut.figures[name].interval_speakers == pytest.approx(figure.interval_speakers)


def test_a_predictions_file_gives_its_figures_back(tmp_path):
    rows = drawn(50)
    written = write_rows(tmp_path / "predictions.csv", [rows[:20], rows[20:]], EMOTIONS)
    for mark in (b"", b"\xef\xbb\xbf"):  # which spreadsheets add
        (tmp_path / "predictions.csv").write_bytes(mark + (tmp_path / "predictions.csv").read_bytes())
        again = Outcomes.read(tmp_path / "predictions.csv")
        assert report(again, resamples=20) == report(written, resamples=20)
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match="no predictions file"):
        Outcomes.read(tmp_path / "other.csv")


def test_a_predictions_file_reads_back_whatever_names_and_texts_hold(tmp_path):
    rows = drawn(8)
    odd = ["a\rb", "c\r\nd", "\n", 'quo"te', "com,ma", "\u2028", " lead", "\x85"]
    for row, text in zip(rows, odd, strict=True):
        row |= {"id": f"id {text}", "speaker": text, "reference": text, "transcript": text, "file": f"/x/{text}"}
    classes = ["a\rb", *EMOTIONS[1:]]
    written = write_rows(tmp_path / "predictions.csv", [rows], classes)
    again = Outcomes.read(tmp_path / "predictions.csv")
    assert again.emotions == classes and len(again) == 8
    for column in ("id", "speaker", "reference", "transcript", "file"):
        assert again.text[column].tolist() == written.text[column].tolist(), column


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (",0.5,", ",inf,", "line 2: seconds is 'inf'; expected a number from 0"),
        (",0.5,", ",1e999,", "line 2: seconds is '1e999'"),
        (",0.5,", ",x,", "line 2: seconds is 'x'"),
        (",0.5,", ",", "line 2: has more or fewer cells"),
        (",0.5,", ",0.5,7,", "line 2: has more or fewer cells"),
        (",0.5,", ",-1,", "line 2: seconds is '-1'; expected a number from 0"),
        ("u0,", '"u0,', "no sound predictions file"),
        ("p_angry,", "p_sad,", "several columns p_sad"),
    ],
)
def test_a_damaged_predictions_file_is_refused_with_its_line(tmp_path, old, new, message):
    path = tmp_path / "predictions.csv"
    write_rows(path, [drawn(3)], EMOTIONS)
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        Outcomes.read(path)
    assert str(path) in str(error.value)


def test_scores_that_overflowed_are_unknown_and_no_number_of_the_file(tmp_path):
    rows = drawn(3)
    rows[0] |= {"confidence": math.nan, "p_angry": math.nan, "arousal": 1.0, "arousal_predicted": math.inf}
    written = write_rows(tmp_path / "p.csv", [rows], EMOTIONS)
    assert math.isnan(written.numbers["arousal_predicted"][0]) and "inf" not in (tmp_path / "p.csv").read_text()
    assert math.isnan(Outcomes.read(tmp_path / "p.csv").numbers["confidence"][0])


# ------------------------------------------------------------------------------- reports, parts, other heads


def test_a_report_is_read_back_as_it_was_written_whatever_it_holds():
    turns = KnownTurns(3, 2, {"speaker": 3}, {"speaker_accuracy": Figure(0.5, [0.1, 0.9])})
    plain_one = report(outcomes(count=40), resamples=3)
    full = replace(
        plain_one,
        about={"model": "m", "selection": {"data": "a.csv"}, "fold": "01F"},
        training_is_assumed=True,
        shared_with_training={"recordings": 0.5, "speakers": None},
        unread=0,
        rewriting=Rewriting(case="lower", recased=2, removed=Counter({"7": 3})),
        known_turns=turns,
    )
    for whole in (plain_one, full, report(many_classes(20, 130), resamples=2)):
        content = json.loads(json.dumps(whole.to_dict(), allow_nan=False))
        again = Report.from_dict(content)
        assert again == whole and again.to_dict() == content and list(again.to_dict()) == list(content)
    assert full.trained_on_some and not plain_one.trained_on_some
    assert {"unread", "fold", "references_recased", "known_turns"} <= full.to_dict().keys()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"utterances": 3}', '{"figures": 5, "parts": {}}'])
def test_what_is_no_report_is_refused_with_its_file(tmp_path, text):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(ConfigError, match=r"report\.json: is no sound report"):
        Report.read(tmp_path / "report.json")


def test_figures_are_reported_by_any_column_that_is_named(tmp_path):
    rows = [row | {"room": ["hall", "car", ""][i % 3]} for i, row in enumerate(drawn(60))]
    parts = ("kind", "seen_text", "room", "speaker")
    written = write_rows(tmp_path / "p.csv", [rows], EMOTIONS, parts)
    found = report(written, resamples=2)
    assert {name: p.utterances for name, p in found.parts.items() if name.startswith("room")} == {
        "room: car": 20,
        "room: hall": 20,
    }
    assert {f"speaker: s{i}" for i in range(6)} < found.parts.keys() and "kind: impro" in found.parts
    assert report(Outcomes.read(tmp_path / "p.csv", parts), resamples=2) == found
    usual = report(Outcomes.read(tmp_path / "p.csv"), resamples=2)
    assert usual == report(Outcomes.of(EMOTIONS, rows), resamples=2), "unless it is named"
    with pytest.raises(ConfigError, match="it lacks the columns side"):
        Outcomes.read(tmp_path / "p.csv", ("kind", "side"))


def test_a_head_that_somebody_adds_has_figures_by_the_kind_of_its_labels(monkeypatch, tmp_path):
    monkeypatch.setitem(LABELS, "age", LabelSpec("numbers", ("age",)))
    monkeypatch.setitem(LABELS, "gender", LabelSpec("class", ("gender",)))
    generator = np.random.default_rng(4)
    rows = []
    for i, row in enumerate(drawn(80)):
        age = None if i % 9 == 0 else float(generator.normal(40, 9))
        row |= {"age": age, "age_predicted": (age or 30) + generator.normal(0, 4)}
        rows.append(row | {"gender": ("f", "m")[i % 2], "gender_predicted": ("f", "m")[i % 5 > 2]})
    found = report(write_rows(tmp_path / "p.csv", [rows], EMOTIONS), resamples=5)
    assert report(Outcomes.read(tmp_path / "p.csv"), resamples=5) == found
    y, p = np.array([(r["age"], r["age_predicted"]) for r in rows if r["age"] is not None]).T
    expected = 2 * np.cov(y, p, bias=True)[0, 1] / (y.var() + p.var() + (y.mean() - p.mean()) ** 2)
    assert found.value("ccc age") == pytest.approx(expected) and "concordance (CCC), age" in table(found)
    pairs = [[r["gender"] for r in rows], [r["gender_predicted"] for r in rows]]
    assert found.value("gender accuracy") == pytest.approx(oracle.accuracy_score(*pairs))
    assert found.value("gender unweighted_accuracy") == pytest.approx(oracle.balanced_accuracy_score(*pairs))
    assert found.value("gender recall f") == pytest.approx(oracle.recall_score(*pairs, pos_label="f"))
    assert found.judged["gender"] == 80 and found.figures["gender accuracy"].interval_speakers is not None
    usual = report(Outcomes.of(EMOTIONS, drawn(80)), resamples=5)
    assert found.value("accuracy") == usual.value("accuracy") and found.confusion == usual.confusion
    utterance = Utterance("a", Path("a.wav"), labels={"age": 41.0, "gender": "f"}, extra={"room": "hall"})
    prediction = Prediction("a.wav", 1.0, others={"age": {"age": 39.5}, "gender": "m"})
    row = as_row(toy_recognizer(), utterance, "", prediction)
    assert (row["age"], row["age_predicted"], row["room"]) == (41.0, 39.5, "hall")
    assert (row["gender"], row["gender_predicted"]) == ("f", "m")


# ---------------------------------------------------------------------------------------------- comparison


def test_a_model_does_not_differ_from_itself_and_differs_from_a_much_better_one():
    rows = drawn(400, right=0.5)
    better = [
        dict(row, predicted=row["emotion"] or row["predicted"]) if i % 3 else row for i, row in enumerate(rows)
    ]
    first, second = Outcomes.of(EMOTIONS, rows), Outcomes.of(EMOTIONS, better[::-1])  # in another order
    same = compare_predictions(first, first, resamples=50)
    assert same["mcnemar_p"] == 1.0 and same["differences"]["accuracy"]["value"] == 0
    found = compare_predictions(first, second, resamples=200)
    assert found["only_first_right"] == 0 < found["only_second_right"] and found["mcnemar_p"] < 1e-6
    low, high = found["differences"]["accuracy"]["interval"]
    assert 0 < low < found["differences"]["accuracy"]["value"] < high
    with pytest.raises(ConfigError, match="not of the same utterances"):
        compare_predictions(first, Outcomes.of(EMOTIONS, rows[:-1]))
    with pytest.raises(ConfigError, match="different labels"):
        compare_predictions(first, Outcomes.of(EMOTIONS, [dict(r, emotion="sad") for r in rows]))


def test_a_model_of_one_corpus_is_compared_with_a_model_of_several_on_the_same_recordings(tmp_path):
    rows = [row | {"id": f"wav/{row['id']}"} for row in drawn(40)]

    def written(corpus: str, rows: list[dict]) -> Outcomes:
        named = [row | {"id": f"{corpus}/{row['id']}", "corpus": corpus} for row in rows]
        write_rows(tmp_path / f"{corpus}.csv", [named], EMOTIONS, ("kind", "corpus"))
        return Outcomes.read(tmp_path / f"{corpus}.csv", ())

    alone, us, gb = Outcomes.of(EMOTIONS, rows), written("us", rows[::-1]), written("gb", rows)
    same = compare_predictions(alone, alone, resamples=5)
    assert compare_predictions(alone, us, resamples=5) == compare_predictions(us, alone, resamples=5) == same
    twice = Outcomes.joined([us, gb])
    for first, second in ((gb, us), (alone, twice), (twice, alone), (us, written("us", rows[1:]))):
        with pytest.raises(ConfigError, match="not of the same utterances"):
            compare_predictions(first, second)
    assert compare_predictions(twice, twice, resamples=5)["utterances"] == 80


def test_mcnemar_is_the_exact_binomial_test():
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(1, 0) == pytest.approx(1.0)
    assert mcnemar(8, 1) == pytest.approx(2 * (1 + 9) / 2**9)
    assert mcnemar(5, 5) == 1.0
    assert mcnemar(3000, 2000) < 1e-40


# ------------------------------------------------------------------------------------------------ judging


def judged_on_ranks(world, manifest):
    return [row for rows in evaluated_rows(toy_recognizer(), read_manifest(manifest), world=world) for row in rows]


def test_every_utterance_is_judged_exactly_once_on_any_number_of_ranks_in_chunks(tmp_path, monkeypatch):
    manifest = write_corpus(tmp_path, 11)
    expected = judged_on_ranks(None, manifest)
    utterances = read_manifest(manifest)
    assert [row["id"] for row in expected] == [u.id for u in utterances]
    assert [row["seconds"] for row in expected] == [audio_info(u.file).num_samples / 16_000 for u in utterances]
    assert [row["file"] for row in expected] == [str(u.file) for u in utterances]
    monkeypatch.setattr(module, "CHUNK", 4)
    sizes = [len(rows) for rows in evaluated_rows(toy_recognizer(), utterances)]
    assert sizes == [4, 4, 3], "what is held at once is bounded"
    for found in run_ranks(judged_on_ranks, 2, tmp_path, manifest):
        assert [row["id"] for row in found] == [row["id"] for row in expected]
        for row, other in zip(found, expected, strict=True):
            assert row["predicted"] == other["predicted"] and row["transcript"] == other["transcript"]
            assert row["confidence"] == pytest.approx(other["confidence"], rel=1e-5)


def test_a_speaker_whom_training_did_not_know_is_not_scored(tmp_path):
    utterances = read_manifest(write_corpus(tmp_path, 8, speakers=4))  # the model knows s0 to s2
    chunks = evaluated_rows(toy_recognizer(), utterances, seen_texts=frozenset({"AB"}))
    rows = [row for chunk in chunks for row in chunk]
    assert [row["speaker_right"] is None for row in rows] == [row["speaker"] == "s3" for row in rows]
    assert [row["seen_text"] for row in rows[:4]] == ["seen", "unseen", "unseen", ""]
    prediction = toy_recognizer(heads=["emotion"]).predict(utterances[0].file)[0]
    row = as_row(toy_recognizer(heads=["emotion"]), utterances[0], "", prediction)
    assert row["transcript"] is row["words"] is row["speaker_right"] is None
    assert row["confidence"] == max(prediction.probabilities.values())


def test_the_command_writes_table_json_predictions_and_pictures_and_compares(tmp_path):
    manifest = write_corpus(tmp_path, 9)
    toy_recognizer().save(tmp_path / "model")

    def run(*arguments):
        command = [sys.executable, "-m", "ser", "evaluate", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path)

    done = run("--model", "model", "--manifest", manifest, "--train", manifest, "--out", "out", "--resamples", 20)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("9 utterances, 3 speakers") and "seen text: seen" in done.stdout
    found = json.loads((tmp_path / "out/report.json").read_text())
    assert found["figures"]["accuracy"]["value"] is not None
    with (tmp_path / "out/predictions.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 9
    for name in ("confusion", "reliability", "length"):
        assert (tmp_path / f"out/{name}.png").read_bytes()[:4] == b"\x89PNG"
    parted = run("--model", "model", "--manifest", manifest, "--resamples", 2, "--parts", "speaker")
    assert "speaker: s2 " in parted.stdout, parted.stderr
    refused = run("--model", "model", "--manifest", manifest, "--parts", "room")
    assert refused.returncode == 1 and "--parts room: is no column of texts here; there are" in refused.stderr
    compared = run("--compare", "out/predictions.csv", "out/predictions.csv", "--resamples", 5)
    assert json.loads(compared.stdout)["mcnemar_p"] == 1.0
    whole = ["--model", "model", "--manifest", manifest]
    for arguments in ([], ["--compare", "out/report.json", "nowhere.csv"], [*whole, "--out", "out/report.json"]):
        failed = run(*arguments)
        assert failed.returncode != 0 and "error: " in failed.stderr and "Traceback" not in failed.stderr


def test_pictures_need_matplotlib_and_say_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=re.escape(pip_line("plots"))):
        draw(report(outcomes(count=9), resamples=2), tmp_path)


def test_dimensions_of_a_model_that_spells_them_with_capitals_are_judged():
    recognizer = toy_recognizer(heads=["dimensions"])
    recognizer.labels = Labels.of(dimensions=["Arousal", "Valence"])
    utterance = Utterance("a", Path("a.wav"), arousal=3.0, valence=2.0)
    row = as_row(recognizer, utterance, "", Prediction("a.wav", 1.0, dimensions={"Arousal": 2.5, "Valence": 1.0}))
    assert (row["arousal"], row["arousal_predicted"], row["valence_predicted"]) == (3.0, 2.5, 1.0)


def test_a_lower_case_model_that_is_right_in_every_letter_has_no_errors(tmp_path):
    utterances = read_manifest(write_corpus(tmp_path, 4))
    recognizer = toy_recognizer(heads=["ctc"])
    lower = Vocabulary({t.lower(): i for i, t in enumerate(recognizer.vocabulary.tokens)})
    recognizer.labels = replace(recognizer.labels, vocabulary=lower)
    heard = recognizer.predict([u.file for u in utterances])
    assert lower.case == "lower" and any(p.transcript for p in heard)
    texts = [(p.transcript or "a").capitalize() + ", 7" for p in heard]
    rows = [replace(u, text=text) for u, text in zip(utterances, texts, strict=True)]
    found = module.evaluate(recognizer, rows).metrics()
    right = sum(bool(p.transcript) for p in heard)
    assert found["wer"] == pytest.approx((4 - right) / found["words"])
    assert found["characters_outside_vocabulary"] == 8 and found["references_recased"] == 4
    total = Rewriting()
    for _ in evaluated_rows(recognizer, rows, rewriting=total):
        pass
    assert total.to_dict() == {
        "references_recased": {"lower": 4},
        "characters_outside_vocabulary": {",": 4, "7": 4},
    }
    emptied = [replace(u, text="7") for u in utterances]
    found = module.evaluate(recognizer, emptied).metrics()
    assert found["references_left_empty"] == 4 and "wer" not in found


# ------------------------------------------------------------------------------------------------ pictures


def test_a_label_that_cannot_be_drawn_is_a_number_and_told_in_one_line(tmp_path, recwarn):
    names = ["中性", "غضب", "क्रोध", "<b>$\\nope$_x_</b>", "Größe", "x" * 200, "a\nb\x1b"]
    shown, families = drawable(names)
    assert shown == ["#1", "#2", "#3", names[3], "Größe", "x" * 29 + "…", "a�b�"] and families[0] == "DejaVu Sans"
    rows = [row | {"emotion": names[i % 7], "predicted": names[i % 5]} for i, row in enumerate(drawn(20))]
    said = []
    assert draw(report(Outcomes.of(names, rows), resamples=2), tmp_path, say=said.append)[0].is_file()
    assert len(said) == 1 and said[0].endswith("are numbers: #1 中性, #2 غضب, #3 क्रोध")
    assert not recwarn.list


def test_a_font_of_the_system_that_has_the_characters_draws_them():
    from matplotlib import font_manager

    fonts = {f.name for f in font_manager.fontManager.ttflist}
    if "STIXGeneral" not in fonts:
        pytest.skip("a matplotlib without its own further fonts")
    lacked = "\u1d81"  # in matplotlib's STIX and not in its DejaVu Sans
    shown, families = drawable([f"a{lacked}"])
    assert shown == [f"a{lacked}"] and len(families) > 1


def test_pictures_of_many_classes_stay_of_a_size_that_can_be_opened(tmp_path):
    for count in (13, 60):
        draw_confusion([f"class {i}" for i in range(count)], np.eye(count, dtype=int), tmp_path / "a.png")
        width, height = struct.unpack(">II", (tmp_path / "a.png").read_bytes()[16:24])
        assert width < 2000 and height < 2000

"""Accuracy, F1 and error rates: equal to scikit-learn's and jiwer's, and summable."""

import math
from functools import reduce
from operator import add

import jiwer
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from ser.scores.counts import (
    ClassificationCounts,
    ErrorRateCounts,
    character_errors,
    class_figures,
    edit_distance,
    word_errors,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:sklearn")

sentences = st.lists(st.sampled_from(["a", "b", "c", "ab", "ba"]), max_size=8).map(" ".join)
labels = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40)


def counts_of(reference, predicted) -> ClassificationCounts:
    """The counts of classes 0 to 3."""
    pairs = [np.array(reference, int), np.array(predicted, int)]
    right = pairs[0][pairs[0] == pairs[1]]
    return ClassificationCounts(np.stack([np.bincount(classes, minlength=4) for classes in (right, *pairs)]))


def random_text(generator: np.random.Generator, words: int) -> str:
    return " ".join("".join(generator.choice(list("abc"), generator.integers(1, 4))) for _ in range(words))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text("abc", max_size=10), st.text("abc", max_size=10))
def test_edit_distance_equals_jiwers_total_and_is_a_possible_alignment(reference, hypothesis):
    substitutions, deletions, insertions = edit_distance(reference, hypothesis)
    assert min(substitutions, deletions, insertions) >= 0
    assert substitutions + deletions <= len(reference)
    assert len(reference) - deletions + insertions == len(hypothesis)
    if reference:
        theirs = jiwer.process_characters(reference, hypothesis)
        total = theirs.substitutions + theirs.deletions + theirs.insertions
        assert substitutions + deletions + insertions == total


@pytest.mark.parametrize(
    ("reference", "hypothesis", "expected"),
    [
        ("kitten", "sitting", (2, 0, 1)),
        ("", "", (0, 0, 0)),
        ("ab", "", (0, 2, 0)),
        ("", "ab", (0, 0, 2)),
        ("abc", "xyz", (3, 0, 0)),
        ("abcd", "bcde", (0, 1, 1)),
    ],
)
def test_edit_distance_of_known_pairs(reference, hypothesis, expected):
    assert edit_distance(reference, hypothesis) == expected


def test_edit_distance_compares_words_as_words():
    assert edit_distance(["new", "york"], ["newyork"]) == (1, 1, 0)


def test_edit_distance_of_long_sentences_equals_jiwers():
    generator = np.random.default_rng(0)
    reference, hypothesis = (generator.choice(list("abcdefgh"), size).tolist() for size in (1200, 900))
    theirs = jiwer.process_words(" ".join(reference), " ".join(hypothesis))
    assert sum(edit_distance(reference, hypothesis)) == theirs.substitutions + theirs.deletions + theirs.insertions


def test_word_and_character_error_rates_of_a_corpus_equal_jiwers():
    generator = np.random.default_rng(1)
    references = [random_text(generator, generator.integers(1, 12)) for _ in range(60)]
    hypotheses = [random_text(generator, generator.integers(0, 12)) for _ in range(60)]
    pairs = list(zip(references, hypotheses, strict=True))
    assert sum((word_errors(*p) for p in pairs), ErrorRateCounts()).rate == jiwer.wer(references, hypotheses)
    assert sum((character_errors(*p) for p in pairs), ErrorRateCounts()).rate == jiwer.cer(references, hypotheses)


def test_an_inserted_word_counts_where_the_reference_is_empty():
    parts = [word_errors("", "a b"), word_errors("a b c d", "a b c d")]
    assert parts[0] == ErrorRateCounts(2, 0)
    assert reduce(add, parts).rate == 0.5


def test_spaces_count_in_characters_but_not_at_the_ends_and_never_in_words():
    assert character_errors(" ab c ", "abc") == ErrorRateCounts(1, 4)
    assert word_errors("  a \t b ", "a b") == ErrorRateCounts(0, 2)


def test_rates_without_any_reference_are_nan():
    empty = counts_of([], [])
    assert empty.count == 0
    for rate in (
        ErrorRateCounts().rate,
        ErrorRateCounts(3, 0).rate,
        *empty.figures.values(),
    ):
        assert math.isnan(rate)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(labels)
def test_figures_equal_scikit_learns(pairs):
    reference, predicted = zip(*pairs, strict=True)
    counts = counts_of(reference, predicted)
    every = {"labels": range(4), "zero_division": 0}
    confusion = sk.confusion_matrix(reference, predicted, labels=range(4))
    assert np.array_equal(counts.totals, [confusion.diagonal(), confusion.sum(1), confusion.sum(0)])
    assert counts.count == len(pairs)
    assert counts.figures == pytest.approx(
        {
            "accuracy": sk.accuracy_score(reference, predicted),
            "unweighted_accuracy": sk.balanced_accuracy_score(reference, predicted),
            "macro_f1": sk.f1_score(reference, predicted, average="macro", **every),
        }
    )
    # Classes that neither occur nor are predicted may be left out of the totals.
    kept = counts.totals[:, counts.totals.any(0)]
    assert class_figures(kept, 4) == pytest.approx(counts.figures)


def test_figures_of_several_resamples_at_once_are_those_of_each():
    totals = np.random.default_rng(3).integers(0, 9, (5, 3, 4))
    totals[:, 1:] += totals[:, :1]
    totals[2] = 0
    together = class_figures(totals, 4)
    for i in range(5):
        one = ClassificationCounts(totals[i]).figures
        assert {name: values[i] for name, values in together.items()} == pytest.approx(one, nan_ok=True)


def test_unweighted_accuracy_is_over_the_classes_that_occur_in_the_reference():
    counts = counts_of([0, 0, 1], [0, 2, 0])
    assert counts.figures["unweighted_accuracy"] == 0.25


@settings(max_examples=50, deadline=None, derandomize=True)
@given(labels, st.integers(1, 7))
def test_the_sum_over_parts_is_the_whole(pairs, size):
    parts = [pairs[i : i + size] for i in range(0, len(pairs), size)]
    counted = [counts_of(*zip(*p, strict=True)).totals for p in parts]
    whole = counts_of(*zip(*pairs, strict=True))
    assert np.array_equal(sum(counted), whole.totals)
    assert class_figures(sum(counted), 4) == pytest.approx(whole.figures)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.tuples(sentences, sentences), max_size=6))
def test_error_counts_add_in_any_order(pairs):
    counts = [word_errors(*pair) for pair in pairs]
    forwards, backwards = sum(counts, ErrorRateCounts()), sum(reversed(counts), ErrorRateCounts())
    assert forwards == backwards == ErrorRateCounts(sum(c.edits for c in counts), sum(c.length for c in counts))

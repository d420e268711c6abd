"""The parts that are held out of four corpora: whole groups, once and for all."""

import json
from collections import Counter

import heldout
import pytest

import ser
from ser.data.manifest import Utterance

LISTS = json.loads(heldout.LISTS.read_text())


@pytest.mark.parametrize("name", heldout.GROUPS)
def test_a_fifth_of_the_groups_is_tested_and_a_tenth_validates(name):
    held = LISTS[name]
    test, valid = (held[part]["groups"] for part in ("test", "valid"))
    assert held["by"] == heldout.GROUPS[name] and not set(test) & set(valid)
    groups = {"resd": 50, "ravdess": 24, "ased": 65, "nemo": 9}[name]
    assert (len(test), len(valid)) == (round(groups / 5), round(groups / 10))
    total = {"resd": 1396, "ravdess": 1440, "ased": 2474, "nemo": 4481}[name]
    assert sum(held[part]["utterances"] for part in ("train", "valid", "test")) == total


def rows(count=40, groups=10):
    return [Utterance(f"u{i}", f"u{i}.wav", speaker=f"s{i % groups}") for i in range(count)]


def test_parts_hold_whole_groups_and_each_utterance_once():
    utterances = rows()
    held = heldout.draw("ravdess", utterances)
    parts = heldout.parts_of("ravdess", utterances, held)
    assert Counter(u.id for part in parts.values() for u in part) == Counter(u.id for u in utterances)
    speakers = [{u.speaker for u in part} for part in parts.values()]
    assert [len(part) for part in speakers] == [7, 2, 1] and len(set().union(*speakers)) == 10


def test_the_draw_does_not_depend_on_the_order_of_rows_and_notices_other_rows():
    held = heldout.draw("ased", rows())
    assert held == heldout.draw("ased", rows()[::-1])
    assert held != heldout.draw("ased", rows(39))


def test_a_row_without_its_group_is_named():
    with pytest.raises(ser.SerError, match="x: has no speaker"):
        heldout.draw("nemo", [Utterance("x", "x.wav")])


@pytest.mark.parametrize(("name", "groups"), [("resd", 50), ("ravdess", 24), ("ased", 65)])
def test_the_lists_are_what_seed_0_draws_from_the_names_of_the_groups(name, groups):
    names = [f"{number:02}" for number in range(1, groups + 1)]
    columns = [{"speaker": n} if heldout.GROUPS[name] == "speaker" else {"extra": {"dialogue": n}} for n in names]
    drawn = heldout.draw(
        name, [Utterance(n, f"{n}.wav", **column) for n, column in zip(names, columns, strict=True)]
    )
    for part in ("test", "valid"):
        assert drawn[part]["groups"] == LISTS[name][part]["groups"]

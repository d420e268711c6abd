"""Foreign values are shown in messages in bounded time and length."""

import argparse
import json
import time
from collections import OrderedDict

import pytest
import torch

from ser.errors import brief_repr, indented, summary


def laughs(times: int) -> list:
    """A list that holds itself twice, and so on: 2 ** times strings out of a few lines of a pickle."""
    value = ["ha"]
    for _ in range(times):
        value = [value, value]
    return value


def inside_itself(kind):
    value = kind()
    if isinstance(value, dict):
        value["self"] = value
    else:
        value.append(value)
    return value


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value",
    [
        laughs(60),
        (laughs(60),),
        {"a": laughs(60)},
        OrderedDict(a=laughs(60)),
        {laughs: laughs(60)},
        inside_itself(list),
        inside_itself(dict),
        nested(100_000),
        10**100_000,
        [10**100_000],
        "x" * 50_000_000,
        b"x" * 50_000_000,
        [0] * 10_000_000,
        dict.fromkeys(range(1_000_000)),
        torch.zeros(1).expand(10**9),
        argparse.Namespace(a=laughs(60)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_any_value_is_shown_at_once_and_in_few_characters(value):
    started = time.perf_counter()
    text = brief_repr(value, 80)
    assert time.perf_counter() - started < 0.5
    assert 0 < len(text) < 90


@pytest.mark.parametrize(
    "text", ["1", "-1.5", '"a\'b"', "null", "true", "[]", "{}", '[1, "a", {"b": [null, []]}]', '"\\ud800\\n"']
)
def test_a_small_value_is_shown_as_repr_shows_it(text):
    value = json.loads(text)
    assert brief_repr(value) == repr(value)


def test_names_stand_in_one_line_and_messages_on_lines_of_their_own_and_the_rest_is_counted():
    foreign = [f"\x1b[2J{i}" for i in range(60)]
    assert summary(foreign, 2) == "\N{REPLACEMENT CHARACTER}[2J0, \N{REPLACEMENT CHARACTER}[2J1 and 58 more"
    lines = indented(foreign).split("\n  ")
    assert len(lines) == 52 and not lines[0] and lines[1] == "\N{REPLACEMENT CHARACTER}[2J0"
    assert lines[-1] == "and 10 more"
    assert indented(["one"]) == "\n  one" and not indented([]) and not summary([])
    assert len(summary(["x" * 10**6])) < 210

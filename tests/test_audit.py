"""Updates that can learn nothing are told before training: an error where none can, else a line (N7)."""

import math
from dataclasses import replace

import pytest
import torch
from test_train import log, quick
from toy import toy_recognizer, toy_rows

from ser.data.audit import check_learnable
from ser.data.labels import labels_vary
from ser.data.manifest import read_manifest
from ser.errors import ConfigError
from ser.scores.counts import concordance
from ser.train.loop import fit

DIMENSIONS = {"heads": ("dimensions",)}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return toy_rows(tmp_path_factory.mktemp("corpus"), 12)


def told(capsys, tmp_path, rows, *, heads=("emotion", "dimensions"), valid=(), speakers=3, **changes) -> str:
    """What a run of an epoch says before its first update."""
    config = quick(epochs=1, log_every=1, **changes)
    fit(toy_recognizer(heads=heads, speakers=speakers), rows, list(valid), config, tmp_path / "run")
    return capsys.readouterr().err.partition("train epoch 1")[0]


def audited(recognizer, rows, plan, weights, **options) -> list[str]:
    """What `check_learnable` says before this recognizer is trained on these rows."""
    frames = recognizer.model.config.num_frames
    return check_learnable(recognizer.dataset(rows), plan, weights, frames, concordant=["dimensions"], **options)


def refused(tmp_path, rows, *, heads=("dimensions",), speakers=3, **changes) -> str:
    with pytest.raises(ConfigError, match="no update would have a gradient") as caught:
        fit(toy_recognizer(heads=heads, speakers=speakers), rows, [], quick(epochs=1, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists(), "nothing was begun"
    return str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"effective_batch": 1, "micro_batch": 1},
        {"effective_batch": 0, "batch_seconds": 0.2},
        {"effective_batch": 1, "micro_batch": 0},
        {"effective_batch": 1, "micro_batch": 1, "batching": "random"},
    ],
)
def test_dimensions_alone_with_updates_of_one_utterance_are_refused_before_a_run_is_begun(tmp_path, rows, changes):
    message = refused(tmp_path, rows, **changes)
    for name in ("arousal", "valence"):
        assert f"nothing of {name} is learnt: no update has two different labels of it" in message
    assert "concordance no gradient" in message and "a larger --effective-batch" in message


def test_accumulation_is_no_smaller_update(tmp_path, rows, capsys):
    said = told(capsys, tmp_path, rows, **DIMENSIONS, effective_batch=0, micro_batch=1, accumulate=6)
    assert "nothing of" not in said and "updates of an epoch" not in said
    assert log(tmp_path / "run", "train")[0]["grad_norm"] > 0


def test_with_another_head_that_learns_it_is_a_line_for_each_dimension(tmp_path, rows, capsys):
    said = told(capsys, tmp_path, rows, effective_batch=1, micro_batch=1)
    assert said.count("is learnt: no update has two different labels of it") == 2


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"valence": 3.0}, "nothing of valence is learnt: all 12 labels are 3, and concordance needs different"),
        ({"valence": 0.1 + 0.2}, "nothing of valence is learnt: all 12 labels are 0.3, and"),
        ({"valence": None}, "nothing of valence is learnt: 0 labels, and concordance needs different ones"),
    ],
)
@pytest.mark.parametrize("heads", [("dimensions",), ("emotion", "dimensions")])
def test_one_constant_dimension_of_several_is_said_and_the_others_are_learnt(
    tmp_path, rows, capsys, heads, change, line
):
    said = told(capsys, tmp_path, [replace(row, **change) for row in rows], heads=heads, effective_batch=6)
    assert line in said and said.count("nothing of") == 1
    assert log(tmp_path / "run", "train")[0]["grad_norm"] > 0


def test_one_label_in_all_is_said(tmp_path, rows, capsys):
    few = [replace(row, valence=2.0 if i == 5 else None) for i, row in enumerate(rows)]
    assert "nothing of valence is learnt: 1 labels" in told(capsys, tmp_path, few)


def test_constant_dimensions_alone_are_refused(tmp_path, rows):
    message = refused(tmp_path, [replace(row, arousal=1.0, valence=4.5) for row in rows])
    assert "nothing of arousal is learnt: all 12 labels are 1, and" in message
    assert "nothing of valence is learnt: all 12 labels are 4.5, and" in message
    assert "--effective-batch" not in message, "which would not help"


def test_few_labelled_among_many_are_counted_by_update(tmp_path, rows, capsys):
    few = [replace(row, arousal=float(i) if i < 4 else None, valence=float(i)) for i, row in enumerate(rows)]
    said = told(capsys, tmp_path, few, heads=("dimensions",), effective_batch=4, batching="random")
    assert "of the 3 updates of an epoch have no two different labels of arousal" in said
    assert "valence" not in said and "is learnt" not in said


def test_an_unlucky_first_epoch_is_not_refused_where_another_teaches(rows):
    few = [replace(row, arousal=float(i) if i < 2 else None, valence=None) for i, row in enumerate(rows)]
    recognizer = toy_recognizer(heads=("dimensions",))

    def plan(epoch):
        order = range(12) if epoch == 3 else [0, *range(2, 12), 1]
        return [list(order[k : k + 2]) for k in range(0, 12, 2)]

    told = audited(recognizer, few, plan, {"dimensions": 1.0}, epochs=4)
    assert any("6 of the 6 updates of an epoch have no two different labels of arousal" in line for line in told)
    with pytest.raises(ConfigError, match="no update would have a gradient"):
        audited(recognizer, few, plan, {"dimensions": 1.0}, epochs=3)
    with pytest.raises(ConfigError, match="1 labels, and concordance needs different ones"):
        unread = [few[1].id]
        audited(recognizer, few, plan, {"dimensions": 1.0}, epochs=4, unread=unread)


def test_labels_of_recordings_that_cannot_be_read_teach_nothing(rows):
    few = [replace(row, emotion="sad" if i == 1 else None) for i, row in enumerate(rows)]
    recognizer = toy_recognizer(heads=("emotion",))

    def check(unread):
        plan = [list(range(12))]
        return audited(recognizer, few, lambda epoch: plan, {"emotion": 1.0}, epochs=2, unread=unread)

    assert check([few[0].id]) == []
    with pytest.raises(ConfigError, match="nothing of emotion is learnt: no training utterance has a label"):
        check([few[1].id])


def test_a_small_last_update_is_not_worth_a_line(tmp_path, rows, capsys):
    many = [replace(row, id=f"{row.id}{n}", start=0.001 * n) for n in range(7) for row in rows][:81]
    many = [replace(row, arousal=float(i), valence=float(i)) for i, row in enumerate(many)]
    said = told(capsys, tmp_path, many, heads=("dimensions",), effective_batch=4)
    assert "updates of an epoch" not in said and "nothing of" not in said


def test_updates_without_any_label_are_counted(tmp_path, rows, capsys):
    few = [replace(row, emotion="sad" if i == 0 else None) for i, row in enumerate(rows)]
    said = told(capsys, tmp_path, few, heads=("emotion",), effective_batch=4)
    assert "2 of the 3 updates of an epoch have no label that any head learns from" in said


LONG = "AB" * 200


@pytest.mark.parametrize(
    ("change", "heads", "speakers", "line"),
    [
        ({"text": LONG}, ("emotion", "ctc"), 3, "nothing of ctc is learnt: no transcript fits its audio"),
        ({"text": ""}, ("emotion", "ctc"), 3, "nothing of ctc is learnt: no training utterance has a transcript"),
        (
            {"text": "[LAUGHTER]"},
            ("ctc", "emotion"),
            3,
            "nothing of ctc is learnt: no training utterance has a trans",
        ),
        ({"speaker": "s0"}, ("emotion", "speaker"), 1, "nothing of speaker is learnt: all of training is by one"),
        ({"speaker": None}, ("emotion", "speaker"), 3, "nothing of speaker is learnt: no training utterance has"),
    ],
)
def test_a_head_without_a_gradient_is_said_and_alone_it_is_refused(
    tmp_path, rows, capsys, change, heads, speakers, line
):
    changed = [replace(row, **change) for row in rows]
    assert line in told(capsys, tmp_path, changed, heads=heads, speakers=speakers, beta=0.1)
    alone = tuple(head for head in heads if head != "emotion")
    assert line in refused(tmp_path / "alone", changed, heads=alone, speakers=speakers)


def test_a_head_of_weight_0_is_said(tmp_path, rows, capsys):
    said = told(capsys, tmp_path, rows, heads=("emotion", "ctc", "dimensions"), alpha=0.0, gamma=0.0)
    assert "the weight of ctc is 0 (--alpha): this head is not trained" in said
    assert "the weight of dimensions is 0 (--gamma)" in said and "nothing of" not in said


def test_what_is_said_is_what_concordance_says(rows):
    """One rule decides: a dimension teaches where its concordance is defined."""
    for labels in ([1.0], [2.0, 2.0], [2.0, 2.0 + 1e-9], [1e6, 1e6 + 1], [0.0, 0.0], [0.3] * 7, [1.0, 2.0], []):
        y = torch.tensor(labels, dtype=torch.float64)
        n = torch.tensor(float(len(y)), dtype=torch.float64)
        moments = torch.stack([n, y.sum() + 1, y.sum(), y.square().sum() + 9, y.square().sum(), y.sum()])[:, None]
        defined = bool(concordance(moments).isfinite())
        assert bool(labels_vary(n, y.sum(), y.square().sum())) == defined, labels


def test_a_validation_set_with_one_label_of_a_dimension_says_that_two_are_needed(tmp_path, rows):
    valid = [replace(row, arousal=None, valence=1.0 if i == 0 else None) for i, row in enumerate(rows)]
    with pytest.raises(
        ConfigError, match=r"no label for any head \(dimensions; of a dimension two different ones"
    ):
        fit(toy_recognizer(**DIMENSIONS), rows, valid, quick(epochs=1), tmp_path / "run")
    one = [replace(row, emotion="sad" if i == 0 else None) for i, row in enumerate(valid)]
    result = fit(toy_recognizer(heads=("emotion", "dimensions")), rows, one, quick(epochs=1), tmp_path / "run")
    assert result.metric == "unweighted_accuracy" and math.isfinite(result.progress.best)


def test_an_ordinary_run_is_told_nothing_new(tmp_path, capsys):
    rows = read_manifest(toy_rows(tmp_path, 24)[0].file.with_name("train.csv"))
    said = told(
        capsys, tmp_path, rows, heads=("emotion", "ctc", "speaker", "dimensions"), effective_batch=8, beta=0.1
    )
    assert "nothing of" not in said and "updates of an epoch" not in said and "weight of" not in said

"""The benchmarks: turns are those of the corpus in small, both sides do the same work, and tables come out."""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers", reason="transformers is the rival: see the extra test")

import common
import inference
import rival
import scaling
import startup
import training
from common import BEGIN, END, Bar, Row

BENCHMARKS = Path(common.__file__).parent
SHARED = {"shape": "tiny", "threads": 1, "device": "cpu", "repeat": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """Tiny models and three turns, as a benchmark prepares them."""
    folder = str(tmp_path_factory.mktemp("benchmark"))
    common.prepare(folder, seconds=[0.7, 0.4, 1.1], shape="tiny", rates=training.RATES)
    return folder


@pytest.mark.parametrize("count", [8, 48])
def test_a_few_turns_have_the_mean_and_the_spread_of_the_corpus_and_are_always_the_same(count):
    corpus, drawn = np.loadtxt(BENCHMARKS / "seconds.txt"), np.array(common.draw_seconds(count))
    assert len(corpus) == 5531 and len(drawn) == count
    assert abs(drawn.mean() / corpus.mean() - 1) < 0.03
    assert abs(drawn.std() / corpus.std() - 1) < 0.03
    assert common.draw_seconds(count) == drawn.tolist()
    # One of each part of the distribution.
    ranks = np.searchsorted(corpus, drawn) / len(corpus)
    assert np.all(np.abs(ranks - (np.arange(count) + 0.5) / count) <= 0.5 / count + 0.001)


def test_both_sides_give_the_same_layers_scores_loss_and_gradient(folder):
    differ = rival.check(folder=folder, shape="tiny", threads=1, device="cpu")
    exact = {"layers", "scores", "loss", "gradient"}
    rounded = {f"{key} in bf16, {side}" for key in exact - {"loss"} for side in ("ours", "theirs")}
    assert set(differ) == exact | rounded
    assert max(differ[key] for key in exact) < 1e-5 and max(differ[key] for key in rounded) < 0.1


def test_a_rival_with_other_weights_is_refused(folder, monkeypatch):
    import torch

    right = rival.load

    def wrong(*arguments, **options):
        model = right(*arguments, **options)
        with torch.no_grad():
            model.wav2vec2.encoder.layers[0].attention.v_proj.weight *= 1.01
        return model

    monkeypatch.setattr(rival, "load", wrong)
    with pytest.raises(RuntimeError, match="do not compute the same"):
        rival.check(folder=folder, shape="tiny", threads=1, device="cpu")


def test_a_side_that_loses_more_in_bf16_is_refused(folder, monkeypatch):
    import torch

    from ser.models import kernels

    right = kernels.GroupedConv.apply

    def wrong(x, *arguments):
        y = right(x, *arguments)
        return y if y.dtype == torch.float32 else y * 1.5

    monkeypatch.setattr(kernels.GroupedConv, "apply", wrong)
    with pytest.raises(RuntimeError, match="loses more in bf16"):
        rival.check(folder=folder, shape="tiny", threads=1, device="cpu")


def test_counted_operations_are_those_that_torch_counts_in_the_rival():
    import torch
    import transformers
    from torch.utils.flop_counter import FlopCounterMode

    # One group: torch counts the backward pass of a grouped convolution once per group.
    config, samples = replace(common.shape_config("tiny"), num_conv_pos_embedding_groups=1), 64_000
    for frozen in (False, True):
        model = rival.PaperModel(transformers.Wav2Vec2Config(**config.to_dict(), vocab_size=32)).train()
        if frozen:
            model.freeze_feature_encoder()
        math = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
        with FlopCounterMode(display=False) as counter, math:
            emotion, symbols, _ = model.scores(torch.randn(1, samples))
            (emotion.sum() + symbols.sum()).backward()
        counted = common.training_flop(config, [samples], frozen=frozen)
        if not frozen:  # it asks for the gradient of the waveform too, which nobody needs
            counted += common.forward_flop(config, samples)[0]
        assert counted == pytest.approx(counter.get_total_flops(), rel=0.005)


def test_rows_of_both_sides_tell_time_memory_padding_and_work(folder):
    started = time.perf_counter()
    ours = training.train(folder=folder, freeze="feature-encoder", **SHARED)
    assert ours["first_seconds"] + ours["seconds"] < time.perf_counter() - started
    assert ours["seconds"] < ours["first_seconds"]  # in which all is loaded and built
    values = {"dtype": "float32", "batch": 2, "order": "random", "freeze": True, "paper": True}
    theirs = rival.train(folder=folder, **values, **SHARED)
    assert ours["flop"] == theirs["flop"] > 0
    assert ours["padding"] == pytest.approx(1 - 2.2 / 3.3) and 0 < theirs["padding"] < 1
    for found in (ours, theirs):
        assert found["seconds"] > 0 and found["peak_gib"] > 0.1
        assert found["per_audio_second"] == pytest.approx(found["seconds"] / 2.2)


def test_inference_rows_recognise_all_turns(folder):
    ours = inference.predict(folder=folder, dtype="bfloat16", **SHARED)
    theirs = rival.infer(folder=folder, dtype="bfloat16", batch=8, order="sorted", **SHARED)
    assert ours["flop"] == theirs["flop"]
    for found in (ours, theirs):
        assert found["per_second"] * found["seconds"] == pytest.approx(3)
    assert theirs["padding"] == pytest.approx(1 - 2.2 / 3.3)


def test_decoding_is_measured_at_each_rate(folder):
    for rate in training.RATES:
        values = {"threads": 1, "device": "cpu", "repeat": 0, "rate": rate}
        found = training.decode(folder=folder, **values)
        assert found["seconds"] / found["per_audio_second"] == pytest.approx(2.2, abs=0.01)


def test_a_bar_compares_the_medians_of_the_fastest_rows_and_leaves_out_those_without_a_figure():
    def row(name, seconds, peak=1.0, **options):
        found = [{"seconds": s, "peak_gib": peak} for s in seconds]
        return Row(name, "", "", "", found=found, **options)

    rows = [row("a", [2, 9, 1]), row("b", [3, 3, 3]), row("c", [8, 6, 7], peak=4.0), row("d", [], skipped="no")]
    bar = Bar("speed", 2, ["a", "b", "d"], ["c", "d"])
    assert bar.judge(rows) == {"measure": "speed", "at_least": 2, "ratio": 3.5, "ours": "a", "rival": "c"}
    assert Bar("memory", 2, ["a"], ["c"], key="peak_gib").judge(rows)["ratio"] == 4.0
    assert Bar("nothing", 2, ["d"], ["c"]).judge(rows)["ratio"] is None


def test_filling_a_cache_is_paid_back_by_what_each_later_epoch_saves():
    def row(name, seconds, first):
        found = {"seconds": seconds, "first_seconds": first}
        return Row(name, "ours", "frozen", "train", found=[found])

    told = training.further([row("ser, float32, frozen", 10.0, 11.0), row("ser, float32, cached", 6.0, 17.0)])
    # After 2 epochs 11 + 2 x 6 = 23 s instead of 1 + 2 x 10 = 21, after 3 they are 29 and 31.
    assert told["ser, float32, cached"].startswith("filling takes 10.00 s, an epoch 4.00 s less")
    assert "in epoch 3" in told["ser, float32, cached"]


def test_the_script_prints_a_table_and_writes_json_and_the_report_replaces_what_stood_between_the_markers(
    tmp_path,
):
    command = [sys.executable, "benchmarks/training.py", "--shape", "tiny", "--turns", "3", "--threads", "1"]
    command += ["--dtypes", "float32", "--only", "frozen: ser, float32", "--out", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(BENCHMARKS.parent)}
    done = subprocess.run(command, cwd=BENCHMARKS.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "training.json").read_text())
    assert result["turns"]["lengths"] == common.draw_seconds(3)
    assert {"cpu", "cores", "threads", "commit", "torch", "transformers", "device"} <= set(result["machine"])
    by_name = {row["name"]: row for row in result["rows"]}
    for name in ("ser, float32, frozen", "ser, float32, nothing frozen"):
        assert len(by_name[name]["found"]) == 1 and 0 < by_name[name]["medians"]["share_of_ceiling"] < 1
        assert f"| {name} |" in done.stdout
    assert by_name["ceiling float32"]["medians"]["flop_per_second"] > 1e9

    page = tmp_path / "performance.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    common.write_report([tmp_path / "training.json"], page)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert done.stdout.strip() in text

    result["bars"][0] |= {"ours": "this", "rival": "that", "ratio": 6.543}
    (tmp_path / "judged.json").write_text(json.dumps(result))
    common.write_report([tmp_path / "training.json", tmp_path / "judged.json"], page)
    bars = page.read_text().partition(BEGIN)[2].partition("###")[0]
    assert "| epoch, frozen, beside the paper's settings | this | that | 6.54 | 6 |" in bars
    assert bars.count("\n| ") == 2, "bars without a ratio stand in no table"


def test_a_row_that_fails_stands_in_the_table_with_its_reason(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(BENCHMARKS / "training.py")])
    arguments = argparse.Namespace(
        turns=1, repeats=2, threads=1, device="cpu", shape="tiny", dtypes=[], only="", out=tmp_path
    )
    rows = [Row("without a rate", "ours", "w", "decode"), Row("ours", "ours", "w", "decode", {"rate": 16_000})]
    common.run("example", arguments, rows, [])
    printed = capsys.readouterr().out
    assert "| w | without a rate | none: status 1: TypeError: decode() missing 1 required" in printed
    assert len(rows[0].found) == 0 and len(rows[1].found) == 2


def test_start_up_of_both_sides_ends_with_the_same_emotion(tmp_path):
    startup.prepare(str(tmp_path), seconds=[0.5], shape="tiny", rates=[])
    rows = []
    for what in ("ser", "transformers"):
        found = startup.start(folder=str(tmp_path), what=what, **(SHARED | {"repeat": 1}))
        rows.append(Row(what, "", "", "", found=[found]))
        assert found["seconds"] > 0
    assert startup.same(rows)["emotion that both print"] in common.EMOTIONS
    rows[0].found[0]["emotion"] = None
    with pytest.raises(RuntimeError, match="do not say the same"):
        startup.same(rows)


def test_two_processes_are_one_row_beside_one():
    rows = scaling.make_rows("tiny", ["none"])
    assert [row.values["launcher"][-1] for row in rows] == ["--nproc-per-node=1", "--nproc-per-node=2"]
    assert {row.values["threads"] for row in rows} == {1}

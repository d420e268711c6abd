"""Kills, signals, lost launchers, second runs, errors of one rank, on real processes (FAULTS A1, A4, A5, A7, H4).

Most runs here have torchrun's own agent with workers that fork (`forking_agent.py`), which saves a restart seconds
of imports; one has the command itself, and so have all in `tests/soak/processes.py`.
"""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_train import assert_identical, log, quick
from toy import toy_recognizer, toy_rows, write_corpus

from ser.cli.demo import run_shown
from ser.recognizer import Recognizer
from ser.train import update
from ser.train.checkpoint import checkpoints
from ser.train.loop import fit
from ser.train.processes import OWNER, PREEMPTED, own_run, run_command, stop_on_signals

HERE = Path(__file__).parent
SETTINGS = ["--epochs", "6", "--effective-batch", "4", "--micro-batch", "1", "--rate", "1e-3", "--beta", "0.1"]
SETTINGS += ["--log-every", "1", "--keep", "99"]
UPDATES = 24
LIMIT = 120  # seconds for what takes a few on an idle machine


class Run:
    """A training run on several processes in a group of their own, which ends with the ``with`` block."""

    def __init__(
        self, corpus: Path, out: Path, *arguments: str, torchrun=False, restarts=0, processes=2, **settings
    ):
        self.out, self.record = out, out.with_suffix(".record")
        self.record.mkdir(exist_ok=True)
        training = ["--train", f"{corpus}/train.csv", "--init", f"{corpus}/init", "--out", str(out), *SETTINGS]
        launcher = [HERE / "forking_agent.py", processes, restarts]
        if torchrun:
            launcher = f"-m torch.distributed.run --standalone --nproc-per-node={processes}".split()
            launcher += [f"--max-restarts={restarts}", HERE / "training_process.py"]
        elif processes == 1 and "ENDPOINT" not in settings:
            launcher = [HERE / "training_process.py"]
        self.errors = out.parent / f"stderr{len(list(out.parent.glob('stderr*')))}"
        self.process = subprocess.Popen(
            [sys.executable, *map(str, launcher), *training, *arguments],
            env=os.environ | {"RECORD": str(self.record), "OMP_NUM_THREADS": "1"} | settings,
            stderr=self.errors.open("w"),
            start_new_session=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for pid in (*self.workers(), self.process.pid):
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(LIMIT)

    def workers(self) -> list[int]:
        """Process ids that have recorded an update."""
        return sorted({line["pid"] for rank in (0, 1) for line in self.lines(rank)})

    def lines(self, rank: int) -> list[dict]:
        """What a rank has recorded, of all attempts."""
        file = self.record / f"rank{rank}.jsonl"
        return [json.loads(line) for line in file.read_text().split("\n")[:-1]] if file.exists() else []

    def await_update(self, rank: int, *, attempt: int = 0, after: int = 0) -> int:
        """Wait until a rank has done ``after`` updates in an attempt; returns its process id."""
        deadline = time.monotonic() + LIMIT
        while time.monotonic() < deadline:
            found = [line for line in self.lines(rank) if line["attempt"] == attempt]
            if len(found) > after:
                return found[-1]["pid"]
            assert self.process.poll() is None, self.said()
            time.sleep(0.01)
        raise AssertionError(f"no update {after} of attempt {attempt} in {LIMIT} s:\n{self.said()}")

    def said(self) -> str:
        return self.errors.read_text()

    def end(self) -> int:
        return self.process.wait(LIMIT)


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def seconds_until(condition, limit: float) -> float:
    started = time.monotonic()
    while not condition() and time.monotonic() - started < limit:
        time.sleep(0.02)
    return time.monotonic() - started


def errors(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith(("error: ", "Traceback"))]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, 16)
    toy_recognizer().save(folder / "init")
    return folder


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """A run on two processes that nothing happened to, with a checkpoint after every update."""
    with Run(corpus, tmp_path_factory.mktemp("whole") / "run", "--save-every", "1") as run:
        assert run.end() == 0, run.said()
        assert len(run.lines(0)) == len(run.lines(1)) == UPDATES
    return run


def same_utterances(run: Run, whole: Run) -> bool:
    """Whether each update held, on each rank and in each attempt, what it holds without faults."""
    return all(
        line["items"] == whole.lines(rank)[line["step"]]["items"] for rank in (0, 1) for line in run.lines(rank)
    )


def kill_at_random(run: Run, generator: random.Random, *, attempt: int) -> None:
    """kill -9 of a random rank, one to four updates into an attempt and up to 0.2 s later."""
    pid = run.await_update(generator.randrange(2), attempt=attempt, after=generator.randrange(4))
    time.sleep(0.2 * generator.random())
    os.kill(pid, signal.SIGKILL)


def test_six_kills_cost_six_restarts_and_end_in_the_same_weights_after_the_same_utterances(
    corpus, whole, tmp_path
):
    # Two ranks: the sum of two numbers does not depend on their order, so regrouped buckets change no bit.
    with Run(corpus, tmp_path / "run", "--save-every", "2", restarts=6, PACE="0.1") as run:
        generator = random.Random(1)
        for attempt in range(6):
            kill_at_random(run, generator, attempt=attempt)
        assert run.end() == 0, run.said()
        attempts = [line["attempt"] for line in run.lines(0)]
        assert sorted(set(attempts)) == list(range(7)), "one restart per kill"
        assert same_utterances(run, whole)
        for attempt in range(1, 7):
            before = [line["step"] for line in run.lines(0) if line["attempt"] < attempt][-1] + 1  # updates done
            steps = [line["step"] for line in run.lines(0) if line["attempt"] == attempt]
            assert before - 2 <= steps[0] <= before, "from the last checkpoint"
            assert steps == list(range(steps[0], steps[-1] + 1))
    assert_identical(checkpoints(run.out)[-1], checkpoints(whole.out)[-1])
    assert [e["step"] for e in log(run.out, "train")] == list(range(1, UPDATES + 1))


def test_places_hear_the_same_after_kills_with_any_number_of_workers_and_ranks(tmp_path):
    """Balance and every augmentation: the waveforms bit for bit, and the weights on equally many ranks."""
    rows = write_corpus(tmp_path / "skewed", 20, speakers=4).read_text().splitlines()
    (tmp_path / "skewed/train.csv").write_text("\n".join(row for row in rows if ",sad," not in row) + "\n")
    with (tmp_path / "skewed/train.csv").open("a") as file:
        file.write(rows[4] + "\n")  # one that is sad, beside five of each other emotion
    toy_recognizer().save(tmp_path / "skewed/init")
    options = ["--balance", "1", "--save-every", "1", "--augment", "gain", "noise", "babble", "reverb"]
    options += ["telephone:p=0.5", "clipping", "speed", "crop:seconds=0.3"]
    with Run(tmp_path / "skewed", tmp_path / "whole", *options) as whole:
        assert whole.end() == 0, whole.said()
    options += ["--workers", "1"]
    with Run(tmp_path / "skewed", tmp_path / "killed", *options, restarts=2, PACE="0.1") as killed:
        for attempt in range(2):
            kill_at_random(killed, random.Random(attempt), attempt=attempt)
        assert killed.end() == 0, killed.said()
        assert {line["attempt"] for line in killed.lines(0)} == {0, 1, 2}
    assert same_utterances(killed, whole)
    assert_identical(checkpoints(killed.out)[-1], checkpoints(whole.out)[-1])
    with Run(tmp_path / "skewed", tmp_path / "alone", *options[:-1], "4", processes=1) as alone:
        assert alone.end() == 0, alone.said()
    per_update = [[line["items"] for line in whole.lines(rank)] for rank in (0, 1)]
    for both, one in zip(zip(*per_update, strict=True), alone.lines(0), strict=True):
        assert sorted(both[0] + both[1]) == sorted(one["items"])
    heard = [item for line in alone.lines(0) for item in line["items"]]
    sad = [item for item in heard if item[0] == 15]
    assert len(sad) == 6 * 4 and len({item[3] for item in sad}) == len(sad), "drawn anew for each place"


def test_on_two_nodes_a_kill_costs_one_restart_of_each(corpus, whole, tmp_path):
    """Two launchers of one process each on this machine, as docs/reliability.md sets several nodes up."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        endpoint = f"localhost:{free.getsockname()[1]}"
    settings = {"ENDPOINT": endpoint, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "PACE": "0.1"}
    arguments = (corpus, tmp_path / "run", "--save-every", "1")
    with (
        Run(*arguments, processes=1, restarts=1, **settings) as first,
        Run(*arguments, processes=1, restarts=1, **settings) as second,
    ):
        os.kill(first.await_update(1, after=4), signal.SIGKILL)
        assert first.end() == second.end() == 0, first.said() + second.said()
        for rank in (0, 1):
            steps = [line["step"] for line in first.lines(rank)]
            assert sorted(set(steps)) == list(range(UPDATES)) and len(steps) <= UPDATES + 1
        assert same_utterances(first, whole)
    assert_identical(checkpoints(first.out)[-1], checkpoints(whole.out)[-1])


def test_workers_of_a_killed_launcher_save_and_end_within_five_seconds(corpus, whole, tmp_path):
    with Run(corpus, tmp_path / "run", "--save-every", "99", PACE="0.3") as run:
        pids = [run.await_update(rank, after=1) for rank in (0, 1)]
        run.process.kill()
        assert seconds_until(lambda: not any(map(alive, pids)), 10) < 5
        (saved,) = checkpoints(run.out)
        assert_identical(saved, whole.out / "checkpoints" / saved.name)


def test_a_worker_that_hangs_when_its_launcher_is_killed_is_killed_too(corpus, tmp_path):
    with Run(corpus, tmp_path / "run", FAULT="0:2:hang") as run:
        pids = [run.await_update(rank, after=1) for rank in (0, 1)]
        run.process.kill()
        assert seconds_until(lambda: not any(map(alive, pids)), 10) < 5


@pytest.mark.parametrize("later", [0.0, 0.5, 2.0])
def test_workers_of_a_launcher_that_is_killed_while_they_import_do_not_wait_for_it(corpus, tmp_path, later):
    """In their first instant, amid the import, and (on an idle machine) at its end; with a --timeout of 600 s."""
    with Run(corpus, tmp_path / "run", torchrun=True, PACE="0.3") as run:
        children = Path(f"/proc/{run.process.pid}/task/{run.process.pid}/children")
        seconds_until(lambda: len(children.read_text().split()) == 2, LIMIT)
        pids = list(map(int, children.read_text().split()))
        try:
            assert len(pids) == 2
            time.sleep(later)
            run.process.kill()
            assert seconds_until(lambda: not any(map(alive, pids)), 60) < 30
        finally:
            for pid in filter(alive, pids):
                os.kill(pid, signal.SIGKILL)
    assert not errors(run.said())


SLEEPS = "import os, pathlib, sys, time; pathlib.Path(sys.argv[1]).write_text(str(os.getpid())); time.sleep(99)"


def forked(function, *arguments) -> int:
    """A copy of this process that calls a function: its process id."""
    pid = os.fork()
    if not pid:
        status = 99
        try:
            function(*arguments)
        except SystemExit as end:
            status = end.code
        finally:
            os._exit(status)
    return pid


@pytest.mark.parametrize("script", ["run_command", "demo"])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGKILL"])
def test_what_a_process_has_started_ends_with_it_whatever_ends_it(tmp_path, script, name):
    file = tmp_path / "pid"
    if script == "demo":
        starter = forked(run_shown, sys.executable, "-c", SLEEPS, str(file))
    else:
        starter = forked(run_command, [sys.executable, "-c", SLEEPS, str(file)], dict(os.environ))
    seconds_until(lambda: file.exists() and file.read_text(), LIMIT)
    started = int(file.read_text())
    try:
        os.kill(starter, getattr(signal, name))
        seconds_until(lambda: not alive(starter), LIMIT)
        if alive(starter):
            os.kill(starter, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(starter, 0)[1])
        number = getattr(signal, name)
        assert status == (-number if name == "SIGKILL" else 128 + number)
        assert seconds_until(lambda: not alive(started), 30) < 10
    finally:
        if alive(started):
            os.kill(started, signal.SIGKILL)


def test_a_command_gives_its_own_status_and_environment():
    code = "import os, sys; sys.exit(int(os.environ['STATUS']))"
    for status in (0, 3):
        assert run_command([sys.executable, "-c", code], os.environ | {"STATUS": str(status)}) == status


def test_a_hangup_stops_a_run_as_a_signal_does_and_under_nohup_nothing():
    before = signal.getsignal(signal.SIGHUP)
    try:
        for handler, asked_by in ((signal.SIG_DFL, "SIGHUP"), (signal.SIG_IGN, "")):
            signal.signal(signal.SIGHUP, handler)
            with stop_on_signals() as asked:
                os.kill(os.getpid(), signal.SIGHUP)
            assert asked.signal == asked_by and signal.getsignal(signal.SIGHUP) == handler
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_run_in_a_folder_is_refused_once_by_name_of_the_holder_until_that_is_killed(corpus, tmp_path):
    with Run(corpus, tmp_path / "run", processes=1, FAULT="0:1:hang") as run:
        pid = run.await_update(0)
        name = json.loads((run.out / OWNER).read_text())
        config = (run.out / "config.json").read_bytes()
        with Run(corpus, tmp_path / "run", "--overwrite") as second:  # on two ranks: one of them speaks
            assert second.end() == 1
            (told,) = errors(second.said().partition("torch/")[0])
        assert f"{run.out}: process {pid} on {name['host']} (since {name['since']}) trains in this folder" in told
        assert run.process.poll() is None and (run.out / "config.json").read_bytes() == config
        os.kill(pid, signal.SIGKILL)
        run.end()
        with own_run(run.out):
            assert json.loads((run.out / OWNER).read_text())["pid"] == os.getpid()


def test_signals_once_and_twice_save_on_all_ranks_and_the_same_command_continues(corpus, whole, tmp_path):
    arguments = (corpus, tmp_path / "run", "--save-every", "99")

    def newest_is_as_if_nothing_had_happened(stopped_before: int) -> int:
        saved = checkpoints(tmp_path / "run")
        assert_identical(saved[-1], whole.out / "checkpoints" / saved[-1].name)
        state, expected = (
            json.loads((folder / saved[-1].name / "state.json").read_text())
            for folder in (tmp_path / "run/checkpoints", whole.out / "checkpoints")
        )
        assert state == expected
        assert state["step"] <= stopped_before + 3, "two updates after the signal at the latest"
        return state["step"]

    with Run(*arguments, restarts=1, PACE="0.3") as run:
        second = run.await_update(1, after=2)
        os.kill(
            second, signal.SIGUSR1
        )  # to one rank alone, which is no scheduler's way: all stop, and are restarted
        os.kill(second, signal.SIGUSR1)
        run.await_update(0, attempt=1, after=2)
        done = [line["step"] for line in run.lines(0) if line["attempt"] == 0]
        assert run.lines(0)[len(done)]["step"] == done[-1] + 1, "nothing is repeated"
        # (By the other's signal, unless torchrun has seen that one end by then and sent its own.)
        assert re.search(rf"stopped by .* after update {done[-1] + 1} of", run.said())
        stopped = run.lines(0)[-1]["step"]
        os.kill(run.process.pid, signal.SIGTERM)  # as a scheduler does
        assert run.end() != 0
        assert "stopped by SIGTERM" in run.said() and not errors(run.said().partition("stopped by SIGTERM")[0])
    stopped = newest_is_as_if_nothing_had_happened(stopped)
    with Run(*arguments, PACE="0.3") as run:
        run.await_update(0, after=len(run.lines(0)) + 1)
        now = run.lines(0)[-1]["step"]
        pids = run.workers()[-2:]
        os.kill(run.process.pid, signal.SIGTERM)
        time.sleep(0.05)
        os.kill(run.process.pid, signal.SIGTERM)  # an impatient one: the launcher leaves its workers alone
        assert run.end() != 0
        assert seconds_until(lambda: not any(map(alive, pids)), 10) < 5
        assert same_utterances(run, whole)
    assert newest_is_as_if_nothing_had_happened(now) > stopped


def test_one_process_with_loader_workers_answers_sigterm_to_all_of_them_with_a_checkpoint_and_status_75(
    corpus, tmp_path
):
    with Run(corpus, tmp_path / "run", "--save-every", "99", "--workers", "2", processes=1, PACE="0.3") as run:
        run.await_update(0, after=1)
        done = len(run.lines(0))
        os.killpg(run.process.pid, signal.SIGTERM)
        assert run.end() == PREEMPTED == 75
        (saved,) = checkpoints(run.out)
        assert done <= int(saved.name.removeprefix("step-")) <= done + 2
        assert "stopped by SIGTERM" in run.said() and not errors(run.said()), run.said()
        assert not (run.out / "last").exists()


def send_on_call(monkeypatch, owner, name: str, call: int, number: int) -> None:
    """A real signal to this process on the n-th call of a function."""
    original, calls = getattr(owner, name), []

    def wrapper(*arguments, **options):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, wrapper)


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """A run in this process with three evaluations."""
    folder = tmp_path_factory.mktemp("judged")
    rows, valid = toy_rows(folder, 8), toy_rows(folder, 6, seed=1, name="valid")
    fit(toy_recognizer(), rows, valid, quick(save_every="99"), folder / "run")
    return folder / "run", rows, valid


@pytest.mark.parametrize("call", [1, 3, 5, 7, 9])  # of three batches in each of three evaluations
def test_a_signal_during_an_evaluation_ends_it_and_the_continued_run_makes_it_up(
    judged, tmp_path, monkeypatch, call
):
    whole, rows, valid = judged
    settings = quick(save_every="99", eval_seconds=1.0)
    send_on_call(monkeypatch, Recognizer, "decode", call, signal.SIGTERM)
    before = signal.getsignal(signal.SIGTERM)
    stopped = fit(toy_recognizer(), rows, valid, settings, tmp_path / "run")
    assert stopped.stopped and stopped.progress.evaluation_due and not (tmp_path / "run/last").exists()
    assert signal.getsignal(signal.SIGTERM) == before
    shutil.copytree(tmp_path / "run", tmp_path / "stopped")
    result = fit(toy_recognizer(), rows, valid, settings, tmp_path / "run")
    assert result.resumed and result.progress.finished
    assert_identical(checkpoints(tmp_path / "run")[-1], checkpoints(whole)[-1])
    best = [load_file(folder / "best/model.safetensors") for folder in (whole, tmp_path / "run")]
    assert all(torch.equal(best[0][name], best[1][name]) for name in best[0])
    expected = [e["step"] for e in log(whole, "valid")]
    assert [e["step"] for e in log(tmp_path / "run", "valid")] == expected
    # Killed after the evaluation was logged and before that was saved, it logs it once all the same.
    shutil.copy(tmp_path / "run/metrics.jsonl", tmp_path / "stopped")
    fit(toy_recognizer(), rows, valid, settings, tmp_path / "stopped")
    assert [e["step"] for e in log(tmp_path / "stopped", "valid")] == expected


def test_an_evaluation_that_is_made_up_for_may_end_the_run_early(judged, tmp_path, monkeypatch):
    _, rows, valid = judged
    settings = quick(epochs=9, early_stop=1, rate=1e-9, metric="unweighted_accuracy", eval_seconds=1.0)
    send_on_call(monkeypatch, Recognizer, "decode", 4, signal.SIGTERM)  # in the second evaluation
    stopped = fit(toy_recognizer(), rows, valid, settings, tmp_path / "run").progress
    assert stopped.step == 4 and stopped.evaluation_due and not stopped.finished
    for _ in range(2):  # what came of it is saved
        result = fit(toy_recognizer(), rows, valid, settings, tmp_path / "run")
        assert result.progress.finished and result.progress.step == 4 and not result.progress.evaluation_due
    assert (tmp_path / "run/last/model.safetensors").is_file()
    assert [e["step"] for e in log(tmp_path / "run", "valid")] == [2, 4]


def test_a_second_ctrl_c_interrupts_at_once(judged, tmp_path, monkeypatch):
    _, rows, _ = judged
    send_on_call(monkeypatch, update, "draw_masks", 1, signal.SIGINT)
    send_on_call(monkeypatch, update, "draw_masks", 3, signal.SIGINT)  # its second micro-batch, twice
    with pytest.raises(KeyboardInterrupt):
        fit(toy_recognizer(), rows, [], quick(), tmp_path / "run")
    assert not checkpoints(tmp_path / "run")


def test_an_error_on_one_rank_ends_torchrun_within_fifteen_seconds_and_is_told_first_and_once(corpus, tmp_path):
    with Run(corpus, tmp_path / "run", torchrun=True, FAULT="1:3:error") as run:
        run.await_update(1, after=2)
        started = time.monotonic()
        assert run.end() == 1
        assert time.monotonic() - started < 15
        said = run.said()
        assert not any(map(alive, run.workers()))
    own, _, summary = said.partition("torch/distributed/elastic")
    assert errors(own) == ["error: broken.wav: cannot be decoded"], said
    assert "lost" not in said, "the other rank has nothing to add"
    assert "broken.wav: cannot be decoded" in summary, "torchrun's closing lines have it too"
    assert "\r" not in said and "%|" not in said
    for line in ("trained parameters", "train epoch 1 update 2"):
        assert said.count(line) == 1, "one rank speaks"


def test_a_rank_that_hangs_is_given_up_after_the_timeout_that_was_set(corpus, tmp_path):
    with Run(corpus, tmp_path / "run", "--timeout", "3", FAULT="1:2:hang") as run:
        run.await_update(1, after=1)
        assert seconds_until(lambda: "--timeout" in run.said(), 60) < 30, run.said()
        assert len(errors(run.said())) == 1, run.said()

"""Processes that decode audio: stopped, killed, left behind; in training, evaluation and inference (A9, N7)."""

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from toy import toy_recognizer, toy_rows, write_corpus

from ser.audio import normalise, resample
from ser.data.workers import decoded, worker_death_explained
from ser.errors import ConfigError, ResourceError
from ser.train.evaluation import evaluate
from ser.train.processes import outlive_signals

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
LIMIT = 120  # seconds for what takes a few on an idle machine


class Sound(torch.utils.data.Dataset):
    """Recordings that take a moment to decode."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds

    def __getitem__(self, index: int) -> torch.Tensor:
        time.sleep(self.seconds)
        return torch.full((5,), float(index))


def batches_of(count: int, *, seconds: float = 0.0, timeout: float = 1.0, workers: int = 1):
    return decoded(
        Sound(seconds), [[i] for i in range(count)], torch.stack, workers=workers, timeout=timeout,
        worker_init_fn=outlive_signals,
    )  # fmt: skip


def children() -> list[int]:
    return [process.pid for process in multiprocessing.active_children()]


def test_batches_come_in_order_and_no_process_is_left():
    for workers in (0, 1, 2):
        assert [int(b[0, 0]) for b in batches_of(7, workers=workers, timeout=30.0)] == list(range(7))
        assert not children()


class Heard(torch.utils.data.Dataset):
    """Recordings of 8 kHz, from 2 s on, as training hears them; 3 threads would change last bits of the first."""

    def __getitem__(self, index: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(index)
        return normalise(resample(torch.randn(16_000 * (1 + index), generator=generator), 8_000))


def test_this_process_decodes_the_bits_of_a_worker_with_any_number_of_threads():
    def all_heard(**how):
        return [batch[0] for batch in decoded(Heard(), [[i] for i in range(4)], list, **how)]

    before = torch.get_num_threads()
    by_worker = all_heard(workers=1)
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            assert all(map(torch.equal, all_heard(workers=0), by_worker)), threads
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def limit():
    """A test that hangs fails."""

    def hangs(*_):
        raise TimeoutError(f"not done in {LIMIT} s")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(LIMIT)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    for process in multiprocessing.active_children():  # Python's end would wait for a stopped one
        process.kill()


@pytest.mark.parametrize("after", [1, 3, 8])
def test_a_stopped_worker_is_given_up_and_killed_wherever_it_is_waited_for(after):
    """After the first batch, amid those asked ahead, and when nothing is missing but its end."""
    found = batches_of(8)
    for _ in range(after):
        next(found)
    os.kill(children()[0], signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises(ResourceError, match=r"gave nothing within --timeout: .* killed after 1\.0 seconds"):
        list(found)
    assert time.monotonic() - started < 10 and not children()


def test_a_worker_that_does_not_end_in_time_is_given_up_too_though_no_batch_is_missing():
    """torch itself waits five seconds for it, and five more after a SIGTERM."""
    found = batches_of(4, timeout=6.0)
    for _ in range(4):
        next(found)
    os.kill(children()[0], signal.SIGSTOP)
    with pytest.raises(ResourceError, match="gave nothing within"):
        next(found)
    assert not children()


def test_one_stopped_worker_among_several_ends_all():
    found = batches_of(40, workers=2)
    next(found)
    os.kill(children()[-1], signal.SIGSTOP)
    with pytest.raises(ResourceError, match="gave nothing within"):
        list(found)
    assert not children()


def test_a_killed_worker_is_told_at_once_and_the_others_end():
    found = batches_of(40, workers=2, seconds=0.05, timeout=60.0)
    started = time.monotonic()
    with pytest.raises(ResourceError, match=r"decodes audio died: .*lower --workers"), worker_death_explained():
        next(found)
        os.kill(children()[0], signal.SIGKILL)
        list(found)
    found.close()
    assert time.monotonic() - started < 15 and not children()


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.EAGAIN, errno.EMFILE])
def test_where_one_worker_cannot_be_started_none_is_left_to_be_waited_for(monkeypatch, number):
    fork, started = os.fork, []

    def second_fails():
        if len(started) == 1:
            raise OSError(number, os.strerror(number))
        started.append(fork())
        return started[-1]

    monkeypatch.setattr(os, "fork", second_fails)
    with pytest.raises(ResourceError, match=f"cannot be started: {os.strerror(number)}. Lower --workers") as held:
        list(batches_of(4, workers=2))
    deadline = time.monotonic() + 5
    while children() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert started and not children(), held  # which holds the loader, as a script's last error does


def test_slow_batches_and_slow_planning_are_no_silence():
    """Each batch takes longer than half of the limit, all together many times the limit."""

    def live():
        for i in range(3):
            time.sleep(1.2)
            yield [i]

    assert len(list(batches_of(6, seconds=0.3, timeout=0.6))) == 6
    found = decoded(Sound(), live(), torch.stack, workers=1, timeout=0.5)
    assert [int(b[0, 0]) for b in found] == [0, 1, 2]


def test_an_error_of_who_names_the_batches_is_not_a_worker_s():
    def live():
        yield from [[0], [1], [2]]
        raise ConnectionResetError("the source is gone")

    with pytest.raises(ConnectionResetError, match="the source is gone"), worker_death_explained():
        list(decoded(Sound(), live(), torch.stack, workers=1, timeout=30.0))
    with pytest.raises(BrokenPipeError), worker_death_explained():
        raise BrokenPipeError("standard output is gone")  # to `head`, say


def test_a_process_that_was_itself_stopped_does_not_blame_its_workers():
    """Ctrl-Z for longer than the limit, and then fg."""
    child = os.fork()
    if not child:
        try:
            numbers = [int(b[0, 0]) for b in batches_of(30, seconds=0.1, timeout=1.0)]
            os._exit(0 if numbers == list(range(30)) else 1)
        except BaseException:
            os._exit(2)
    try:
        time.sleep(1)
        os.kill(child, signal.SIGSTOP)
        time.sleep(2.5)
        os.kill(child, signal.SIGCONT)
        status = os.waitpid(child, 0)[1]
    except TimeoutError:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise
    assert os.waitstatus_to_exitcode(status) == 0


@pytest.mark.parametrize("timeout", [0.0, -1.0, float("nan")])
def test_a_limit_that_is_none_is_refused(timeout):
    with pytest.raises(ConfigError, match="more than 0"):
        list(batches_of(1, timeout=timeout))


def test_no_worker_is_left_where_batches_are_not_taken_to_their_end():
    found = batches_of(40, workers=2, timeout=30.0)
    next(found)
    assert len(children()) == 2
    found.close()
    assert not children()


def test_a_stopped_worker_does_not_outlive_its_use_where_nobody_waits_for_it():
    found = batches_of(40, timeout=60.0)
    next(found)
    (worker,) = children()
    os.kill(worker, signal.SIGSTOP)
    found.close()  # torch waits ten seconds
    deadline = time.monotonic() + 5
    while children() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not children()


def test_a_worker_that_dies_while_the_model_is_at_work_is_told_as_such(monkeypatch):
    recognizer = toy_recognizer()
    decode = recognizer.decode

    def kill_the_worker(outputs):
        for pid in children():
            os.kill(pid, signal.SIGKILL)
        time.sleep(5)
        return decode(outputs)

    monkeypatch.setattr(recognizer, "decode", kill_the_worker)
    with pytest.raises(ResourceError, match=r"decodes audio died: .*give the same command again$"):
        list(recognizer.stream([np.ones(3000, dtype="f4")] * 2000, 16_000, workers=1))
    assert not children()


def test_an_evaluation_gives_up_a_stopped_worker(tmp_path, monkeypatch):
    rows, recognizer = toy_rows(tmp_path, 12), toy_recognizer()
    decode = recognizer.decode

    def stop_the_worker(outputs):
        for pid in children():
            os.kill(pid, signal.SIGSTOP)
        return decode(outputs)

    monkeypatch.setattr(recognizer, "decode", stop_the_worker)
    with pytest.raises(ResourceError, match="gave nothing within --timeout"):
        evaluate(recognizer, rows, workers=1, timeout=1.0, batch_seconds=0.5)
    assert not children()


def test_a_stream_gives_up_a_stopped_worker_and_tells_of_a_killed_one():
    sounds = [np.sin(np.arange(3000 + 10 * i) / 9).astype("f4") for i in range(64)]
    recognizer = toy_recognizer()
    for number, message in ((signal.SIGSTOP, "gave nothing within"), (signal.SIGKILL, "decodes audio died")):
        results = recognizer.stream(sounds * 40, 16_000, workers=1, timeout=1.0)
        next(results)
        os.kill(children()[0], number)
        with pytest.raises(ResourceError, match=message):
            list(results)
        assert not children()


# ------------------------------------------------------------------------------------------------ the commands


def loader_workers(pid: int) -> list[int]:
    """Children of a process that are copies of it (importing torch starts ldconfig for a moment)."""
    found = []
    for line in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, line.read_text().split()):
            try:
                same = Path(f"/proc/{child}/cmdline").read_bytes() == Path(f"/proc/{pid}/cmdline").read_bytes()
                name = Path(f"/proc/{child}/comm").read_text().strip()
            except OSError:
                continue
            found += [child] if same and name == "pt_data_worker" else []
    return found


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, 12)
    toy_recognizer(heads=("emotion", "speaker")).save(folder / "init")
    return folder


def disturbed(arguments: list, number: int, ready: Path | None = None) -> tuple[int, str, float]:
    """Run a script and send a signal to a loader worker: its status, what it said, and seconds until it ended."""
    command = [sys.executable, *map(str, arguments)]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    try:
        deadline = time.monotonic() + LIMIT
        workers: list[int] = []
        while not (workers and (ready is None or ready.exists())) and process.poll() is None:
            assert time.monotonic() < deadline
            workers = loader_workers(process.pid) if process.poll() is None else []
            time.sleep(0.01)
        os.kill(workers[0], number)
        sent = time.monotonic()
        said = process.communicate(timeout=LIMIT)[1]
        return process.returncode, said, time.monotonic() - sent
    finally:
        process.kill()


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="finds processes through Linux's /proc"
)


@needs_proc
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_inference_ends_with_one_line_and_status_2_and_leaves_no_half_file(corpus, tmp_path, number):
    files = [corpus / f"train{i % 12}.wav" for i in range(6000)]
    options = ["--model", corpus / "init", "--workers", 1, "--timeout", 2, "--format", "jsonl"]
    options += ["--output", tmp_path / "out.jsonl"]
    status, said, seconds = disturbed([EXAMPLES / "infer.py", *files, *options], number)
    assert status == 2 and seconds < 40, said
    (line,) = [line for line in said.splitlines() if line]
    assert line.startswith("error: a process that decodes audio ")
    assert line.endswith("give the same command again"), "nothing is kept to continue from"
    assert not list(tmp_path.iterdir())


@needs_proc
def test_a_training_process_whose_worker_is_stopped_ends_with_one_line(corpus, tmp_path):
    options = f"--train {corpus}/train.csv --init {corpus}/init --out {tmp_path}/run --heads emotion --epochs 999"
    options += " --effective-batch 4 --workers 1 --timeout 2 --save-every 999ep"
    command = [EXAMPLES / "train_iemocap.py", *options.split()]
    status, said, seconds = disturbed(command, signal.SIGSTOP, tmp_path / "run/metrics.jsonl")
    assert status == 1 and seconds < 40
    assert said.splitlines()[-1].startswith("error: a process that decodes audio gave nothing within --timeout")
    assert "Traceback" not in said


@needs_proc
def test_of_two_training_processes_the_one_that_waits_for_its_worker_tells_why(corpus, tmp_path):
    options = f"--train {corpus}/train.csv --init {corpus}/init --out {tmp_path}/run --heads emotion --epochs 999"
    options += " --effective-batch 4 --workers 1 --timeout 3 --save-every 999ep"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(EXAMPLES / "train_iemocap.py"), *options.split()]
    errors = tmp_path / "errors"
    with errors.open("w") as file:
        process = subprocess.Popen(command, stderr=file, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        log, deadline = tmp_path / "run/metrics.jsonl", time.monotonic() + LIMIT
        workers: list[int] = []
        while not workers:
            assert time.monotonic() < deadline and process.poll() is None, errors.read_text()
            time.sleep(0.02)
            if log.exists():
                ranks = [int(k) for t in Path(f"/proc/{process.pid}/task").glob("*/children")
                         for k in t.read_text().split()]  # fmt: skip
                workers = [w for rank in ranks for w in loader_workers(rank)]
        os.kill(workers[0], signal.SIGSTOP)
        sent = time.monotonic()
        assert process.wait(LIMIT) != 0
        assert time.monotonic() - sent < 40
    finally:
        process.kill()
    own = errors.read_text().partition("torch/distributed/elastic")[0]
    told = [line for line in own.splitlines() if line.startswith(("error: ", "Traceback"))]
    assert len(told) == 1 and "gave nothing within --timeout" in told[0], own
    assert json.loads((tmp_path / "run/config.json").read_text())["timeout"] == 3

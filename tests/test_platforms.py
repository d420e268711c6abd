"""Systems that lack what Linux has: Windows and macOS, as far as hiding modules and functions stands for them."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
from toy import toy_recognizer, write_corpus

from ser.cli import COMMANDS
from ser.train import processes

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

# Run by every Python that starts, before anything else. Processes are spawned there, not forked.
BOTH = """
import ctypes, multiprocessing, os, signal, sys
multiprocessing.set_start_method("spawn")
for name in ("sigwaitinfo", "sigtimedwait"):
    delattr(signal, name)
for name in ("sched_getaffinity", "sched_setaffinity"):
    delattr(os, name)
real = ctypes.CDLL
"""
MACOS = """
class Library(real):
    def __getattr__(self, name):
        if self._name is None and name in ("prctl", "mallopt", "malloc_trim"):
            raise AttributeError(name)
        return super().__getattr__(name)
ctypes.CDLL = Library
"""
WINDOWS = """
sys.modules["fcntl"] = sys.modules["resource"] = None
for name in ("SIGUSR1", "SIGUSR2", "SIGHUP", "SIGQUIT", "pthread_sigmask", "pthread_kill", "sigwait"):
    delattr(signal, name)
for name in ("mkfifo", "mknod", "killpg", "getpgid", "geteuid", "fchmod", "O_DIRECTORY", "O_NOFOLLOW"):
    delattr(os, name)
os.O_BINARY = 0
opened = os.open
def no_folders(path, *arguments, **options):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", str(path))
    return opened(path, *arguments, **options)
os.open = no_folders
def library(name, *arguments, **options):
    if name is None:
        raise TypeError("LoadLibrary() argument 1 must be str, not None")
    return real(name, *arguments, **options)
ctypes.CDLL = library
"""
SYSTEMS = {"windows": BOTH + WINDOWS, "macos": BOTH + MACOS}

# Scripts and commands one after the other in one process, which spares imports: a line of words for each.
DRIVER = """
import runpy, shlex, sys
def call(line):
    sys.argv = shlex.split(line)
    try:
        if sys.argv[0] == "ser":
            runpy.run_module("ser", run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            sys.exit(f"{line}: status {end.code!r}")
if __name__ == "__main__":
    for line in sys.stdin.read().splitlines():
        call(line)
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, 8)
    toy_recognizer().save(folder / "init")
    return folder


def hide(system: str, folder: Path) -> None:
    (folder / "hidden").mkdir()
    (folder / "hidden/sitecustomize.py").write_text(SYSTEMS[system])


def run(command: list[str], folder: Path, text: str = "") -> subprocess.CompletedProcess:
    """A command in a folder, on the system that is hidden there, with all that it starts."""
    paths = os.pathsep.join([str(folder / "hidden"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, input=text, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def on(system: str, folder: Path, lines: list[str]) -> subprocess.CompletedProcess:
    """Run scripts in a process of another system."""
    hide(system, folder)
    (folder / "driver.py").write_text(DRIVER)
    return run([sys.executable, "driver.py"], folder, "\n".join(lines))


@pytest.mark.parametrize("system", SYSTEMS)
def test_importing_is_silent_and_every_command_and_script_shows_its_help(system, tmp_path):
    commands = [f"ser {name}" for name in COMMANDS]
    scripts = [path for path in sorted(EXAMPLES.glob("*.py")) if "__main__" in path.read_text(encoding="utf-8")]
    done = on(system, tmp_path, [f"{start} --help" for start in ("ser", *commands, *scripts)])
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert done.stdout.count("usage: ") == 1 + len(commands) + len(scripts) >= 11


LOST = {  # what a training run there says, once each
    "windows": [
        "this system has no lock of the run's folder (no fcntl): nothing but you keeps a second run out of it",
        "this system has no SIGUSR1, SIGHUP: of all signals Ctrl-C alone is sure to let a run save and end",
        "this system has no peak memory in the log (no module resource)",
    ],
    "macos": [],
}


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("workers", [0, 1])
def test_one_process_trains_goes_on_is_judged_and_recognises_and_says_once_what_is_lost(
    system, workers, corpus, tmp_path
):
    data, many = f"{corpus}/train.csv", f"--workers {workers}"
    train = f"{EXAMPLES}/train_iemocap.py --train {data} --valid {data} --allow-overlap utterances --out run"
    train += f" --init {corpus}/init --effective-batch 4 --log-every 1 {many}"
    judge = f"ser evaluate --model run/best --manifest {data} --out judged --no-pictures {many}"
    recognise = f"ser predict {corpus}/train0.wav {corpus}/train1.wav --model run/best {many} --output table"
    lines = [f"{train} --epochs 1", judge, recognise]
    done = on(system, tmp_path, lines)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "Error" not in done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("this system")] == LOST[system]
    assert "nan" not in done.stderr
    assert (tmp_path / "run/last/model.safetensors").is_file() and (tmp_path / "judged/report.json").is_file()
    assert len((tmp_path / "table").read_text().splitlines()) == 3


def test_two_processes_under_torchrun_train_on_macos(corpus, tmp_path):
    """(torchrun of Linux does not do without what Windows lacks.)"""
    hide("macos", tmp_path)
    command = (
        f"--train {corpus}/train.csv --init {corpus}/init --out run --epochs 1 --effective-batch 4 --workers 1"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = run([*torchrun, "-m", "ser", "train", *command.split()], tmp_path)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert (tmp_path / "run/last/model.safetensors").is_file()


def test_a_command_follows_this_process_only_where_the_system_can_do_that(monkeypatch):
    command = [sys.executable, "-c", "pass"]
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert processes.following(command) == command

    def refused(name):
        raise TypeError("LoadLibrary() argument 1 must be str, not None")

    monkeypatch.setattr(ctypes, "CDLL", refused)
    assert processes.following(command) == command
    assert processes.run_command(command, dict(os.environ)) == 0


def test_linux_loses_nothing():
    assert sys.platform != "linux" or processes.lost_here() == []

"""React to events outside a run's own process: signals, the end of its launcher, a second run, errors of ranks.

    SIGTERM, SIGUSR1, SIGHUP, Ctrl-C -> all ranks finish the update, a checkpoint is saved, the status is 75
    the launcher is killed           -> the same, within seconds
    a second run in the folder       -> it is refused, and the message names the process that trains there
    an error on one rank             -> it is printed once, with its cause, by the process in which it occurred

Some systems lack some of these functions; `lost_here` says what does not work there.
"""

import ctypes
import errno
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ser.device import resource
from ser.errors import RunFolderError, SerError, printable

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

OWNER = "owner.json"
PREEMPTED = 75  # the exit status of a run that was asked to stop: EX_TEMPFAIL, "try again"
ASKS = ("SIGTERM", "SIGUSR1", "SIGHUP", "SIGINT")  # signals that ask a run to stop
LAUNCHER_POLL = 0.25  # seconds between two looks at the launcher, or at a command that was started
ORPHAN_GRACE = 3.5  # seconds in which a process without a launcher may finish its update and save


# ---------------------------------------------------------------------------------------- other systems


def lost_here() -> list[str]:
    """Return a line for each function of a run that this system lacks. Linux lacks none."""
    missing = [name for name in ASKS if not hasattr(signal, name)]
    reasons = {
        "no lock of the run's folder (no fcntl): nothing but you keeps a second run out of it": fcntl is None,
        f"no {', '.join(missing)}: of all signals Ctrl-C alone is sure to let a run save and end": bool(missing),
        "no peak memory in the log (no module resource)": resource is None,
    }
    return [f"this system has {reason}" for reason, holds in reasons.items() if holds]


# ---------------------------------------------------------------------------------------- being asked to stop


class StopRequest:
    """Hold the name of the signal that asked this process to stop; false while there is none."""

    def __init__(self) -> None:
        self.signal = ""

    def __bool__(self) -> bool:
        return bool(self.signal)


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn SIGTERM, SIGUSR1, SIGHUP and Ctrl-C into a request that the training loop reads once per update.

    A second signal changes nothing, except a second Ctrl-C, which interrupts at once. Outside the context, and so
    before training begins, signals act as usual, since there is nothing to save. An ignored SIGHUP stays ignored,
    as nohup wants. Only the main thread can handle signals, so in another thread nothing changes.
    """
    request = StopRequest()

    def note(number: int, _: Any) -> None:
        if number == signal.SIGINT and request.signal == "SIGINT":
            raise KeyboardInterrupt
        request.signal = signal.Signals(number).name

    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    numbers = [getattr(signal, name) for name in ASKS if hasattr(signal, name)]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        numbers.remove(signal.SIGHUP)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def outlive_signals(_: int = 0) -> None:
    """Ignore the signals that ask to stop, in a data-loader worker; the training process handles them.

    torchrun signals the process group, and a scheduler signals every process of the job. If a worker ended, the
    current update could not be finished. The training process ends its workers through a queue, and kills those
    that remain.
    """
    for name in ASKS:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def store_answers() -> bool:
    """Tell whether torchrun's key-value store answers; True if torchrun does not hold the store itself."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    try:
        socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), timeout=5).close()
    except OSError as error:  # any other error may be a slow network; joining the other ranks will show
        return not isinstance(error, ConnectionRefusedError)
    return True


# ---------------------------------------------------------------------------------------- who started whom


def end_with_launcher(launcher: int | None = None) -> None:
    """Start a thread, under torchrun, that ends this process soon after its launcher has ended.

    If torchrun is killed, its processes remain, and would hold the GPUs and the run's folder. They get the same
    signal as in a pre-emption, and `ORPHAN_GRACE` seconds to finish.

    ``launcher`` is the id of the parent process before a script's imports, which take seconds; None: its id now.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    launcher = os.getppid() if launcher is None else launcher  # read first: if the store then answers, it is alive
    there = store_answers()

    def watch() -> None:
        while there and os.getppid() == launcher:
            time.sleep(LAUNCHER_POLL)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(ORPHAN_GRACE)
        os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))

    threading.Thread(target=watch, name="launcher", daemon=True).start()


# Code that runs before a command: it sets PR_SET_PDEATHSIG, which execv keeps, and checks that its parent lives.
FOLLOW = (
    "import ctypes, os, signal, sys; ctypes.CDLL(None).prctl(1, signal.SIGTERM); "
    "os.getppid() == int(sys.argv[1]) or sys.exit(1); os.execv(sys.argv[2], sys.argv[2:])"
)


def following(command: list[str]) -> list[str]:
    """Wrap a command so that it gets SIGTERM when this process ends in any way, even by SIGKILL.

    Only Linux can do this; elsewhere the command is returned unchanged. The thread that starts the command must
    live longer than the command.
    """
    try:
        ctypes.CDLL(None).prctl  # noqa: B018
    except (AttributeError, OSError, TypeError):
        return command
    return [sys.executable, "-I", "-S", "-c", FOLLOW, str(os.getpid()), *command]


def run_command(command: list[str], environment: dict[str, str]) -> int:
    """Run a command that ends when this process ends, and return its exit status.

    If this process is asked to stop, it asks the command to stop, and then exits with the status of the signal.
    """
    with stop_on_signals() as asked:
        process = subprocess.Popen(following(command), env=environment)
        try:
            while process.poll() is None and not asked:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(LAUNCHER_POLL)
            if asked:
                process.terminate()
            process.wait()
        finally:
            if process.poll() is None:  # a second Ctrl-C
                process.terminate()
    if asked:
        print(f"stopped by {asked.signal}", file=sys.stderr)
        sys.exit(128 + signal.Signals[asked.signal])
    return process.returncode


def is_run(folder: Path) -> bool:
    """Tell whether a folder is a run's, or empty."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {"a file"}
    return not names or not names.isdisjoint({OWNER, "config.json"})


def holder(text: str) -> str:
    """Describe the process that wrote an `OWNER` file."""
    try:
        owner = json.loads(text)
        return f"process {owner['pid']} on {owner['host']} (since {owner['since']})"
    except (ValueError, KeyError, TypeError):
        return "another process"


# ---------------------------------------------------------------------------------------- one run per folder


@contextmanager
def own_run(run: Path) -> Iterator[None]:
    """Lock a run's folder, so that no other process trains in it.

    The lock is one of the operating system, on the file `OWNER`, which says which process holds it. It is released
    however the process ends, even by SIGKILL. Nothing is locked if the folder is not a run's, or if the system or
    its file system has no locks.

    Raises:
        RunFolderError: another process holds the lock; the message has its host, process id and start time.
    """
    if run.exists() and not is_run(run):
        yield  # a folder of other files will be refused later, and nothing is written into it
        return
    run.mkdir(parents=True, exist_ok=True)
    with (run / OWNER).open("a+", encoding="utf-8") as file:
        try:
            # With flock, data-loader workers would inherit the lock and hold it for seconds after a kill.
            if fcntl is not None:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                who = holder(file.read())
                raise RunFolderError(
                    f"{run}: {who} trains in this folder; wait for its end, stop it, or choose another folder"
                ) from None
            note = f"{run}: no lock ({error.strerror}): nothing but you keeps a second run out of this folder"
            print(printable(note), file=sys.stderr, flush=True)
        file.truncate(0)
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        json.dump({"host": socket.gethostname(), "pid": os.getpid(), "since": since}, file)
        file.flush()
        yield


def lost_peer(error: BaseException) -> bool:
    """Tell whether an error only says that the connection to another process was lost."""
    return isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or "gloo" in str(error))


def attempt() -> str:
    """Return how often torchrun has restarted the processes."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def error_store() -> dist.Store | None:
    """Open a connection of our own to torchrun's key-value store; None without torchrun."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "MASTER_PORT" not in os.environ:
        return None
    with suppress(RuntimeError, ValueError):
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, timeout=timedelta(seconds=5))
        return dist.PrefixStore(f"ser-errors-{attempt()}", store)
    return None


def print_once(text: str, *, consequence: bool = False) -> None:
    """Print an error once over all ranks; print a consequence only if no rank has printed an error.

    A consequence is an error that only follows from an error of another rank. Control characters in the text are
    replaced, since it may hold names of files and tensors.
    """
    text = printable(text, lines=True)
    if threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGCHLD"):
        # At a worker's death, torch raises an error wherever this process is, and again for each further worker.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    first = before = 0
    if (store := error_store()) is not None:
        key = "consequences" if consequence else hashlib.sha256(text.encode()).hexdigest()
        with suppress(RuntimeError):  # the launcher and its store are gone: better print twice than never
            first, before = store.add(key, 1), store.add("errors", int(not consequence))
    if first <= 1 and not (consequence and before):
        print(text, file=sys.stderr, flush=True)
    if consequence:
        time.sleep(1.1)  # torchrun shows the error with the earliest time, in whole seconds
    elif name := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        message = {"message": text.removeprefix("error: "), "extraInfo": {"timestamp": str(int(time.time()))}}
        Path(name).write_text(json.dumps({"message": message}))


# ---------------------------------------------------------------------------------------- one voice


@contextmanager
def one_voice() -> Iterator[None]:
    """Print an error of a command once over all ranks, and end the process with status 1.

    For a `SerError` the message is printed, for any other error the traceback. A process that ends only because
    another one failed prints nothing if the other one has printed its error.
    """
    try:
        yield
    except KeyboardInterrupt:
        print_once("interrupted")
        sys.exit(130)
    except Exception as error:
        if isinstance(error, SerError):
            print_once(f"error: {error}")
        elif lost_peer(error):
            print_once(
                "error: another process of this run was lost: it was killed, its machine ended, or it did not "
                "answer within --timeout seconds. What it said stands above. The same command continues from the "
                f"last checkpoint. ({type(error).__name__}: {str(error).splitlines()[0][:200]})",
                consequence=True,
            )
        else:
            print_once(traceback.format_exc().rstrip())
        sys.exit(1)


def launch() -> str:
    """Return a name of this launch of torchrun, the same in all its attempts; it is empty without torchrun.

    With several nodes the name is just the --rdzv-id, which all launchers have in common.
    """
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    if not name or os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
        return name
    began = ""
    with suppress(OSError):  # when the launcher started, since process ids are reused
        stat = Path(f"/proc/{os.getppid()}/stat").read_text(encoding="utf-8", errors="replace")
        began = stat.rpartition(")")[2].split()[19]
    return f"{name} {socket.gethostname()} {os.getppid()} {began}".rstrip()

"""Answer what reaches a run from outside: signals, its launcher's end, a second run, one process's error.

    SIGTERM, SIGUSR1, SIGHUP, Ctrl-C -> all ranks finish the update, a checkpoint is saved, the status is 75
    the launcher is killed           -> the same, within seconds
    a second run in the folder       -> it is refused, with the name of the process that trains there
    an error on one rank             -> it is reported once, with its cause, by the process that met it

Not every system has all of this. This file looks for what a system lacks, and `lost_here` says what is lost with
it.
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
ASKS = ("SIGTERM", "SIGUSR1", "SIGHUP", "SIGINT")  # to stop
LAUNCHER_POLL = 0.25  # seconds; also for whether something that was started has ended
ORPHAN_GRACE = 3.5  # seconds in which a process without a launcher may finish its update and save


# ---------------------------------------------------------------------------------------- other systems


def lost_here() -> list[str]:
    """Say in a line each what a run on this system has to do without. Linux lacks nothing."""
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
    before training begins, signals do what they did before, since there is nothing to save. A SIGHUP that is
    ignored stays ignored: nohup asks for that. In a thread that is not the main one signals cannot be handled, so
    nothing is changed there.
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
    """Ignore the signals that ask to stop, in a data-loader worker: the training process answers them.

    torchrun signals the process group, and a scheduler signals every process of the job. A worker that ended would
    end the update that is being finished. The training process tells its workers to end through a queue, and kills
    them at last.
    """
    for name in ASKS:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def store_answers() -> bool:
    """Tell whether torchrun's key-value store answers, where torchrun itself holds it from the start."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    try:
        socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), timeout=5).close()
    except OSError as error:  # of another kind: a slow network, perhaps; joining the others will tell
        return not isinstance(error, ConnectionRefusedError)
    return True


# ---------------------------------------------------------------------------------------- who started whom


def end_with_launcher(launcher: int | None = None) -> None:
    """Start a thread, under torchrun, that ends this process soon after its launcher has gone.

    A torchrun that is killed leaves its processes behind, and they would hold the GPUs and the run. They get the
    same signal as in a pre-emption, and `ORPHAN_GRACE` seconds to answer it.

    ``launcher`` is the parent process as a script asked for it before its imports, which take seconds. None means
    the parent now.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    launcher = os.getppid() if launcher is None else launcher  # before its store is tried, which proves it alive
    there = store_answers()

    def watch() -> None:
        while there and os.getppid() == launcher:
            time.sleep(LAUNCHER_POLL)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(ORPHAN_GRACE)
        os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))

    threading.Thread(target=watch, name="launcher", daemon=True).start()


# Run before a command: PR_SET_PDEATHSIG, which lasts over execv. Whoever started it may have ended by then.
FOLLOW = (
    "import ctypes, os, signal, sys; ctypes.CDLL(None).prctl(1, signal.SIGTERM); "
    "os.getppid() == int(sys.argv[1]) or sys.exit(1); os.execv(sys.argv[2], sys.argv[2:])"
)


def following(command: list[str]) -> list[str]:
    """Wrap a command so that it gets SIGTERM when this process ends in any way, SIGKILL included.

    Linux alone does that; elsewhere the command is returned as it is. The thread that starts it has to outlive it.
    """
    try:
        ctypes.CDLL(None).prctl  # noqa: B018
    except (AttributeError, OSError, TypeError):
        return command
    return [sys.executable, "-I", "-S", "-c", FOLLOW, str(os.getpid()), *command]


def run_command(command: list[str], environment: dict[str, str]) -> int:
    """Run a command that ends with this process, and return its exit status.

    When this process is asked to stop, it asks the command to stop, and then ends with the status of that signal.
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
    """Name the process that wrote an `OWNER` file."""
    try:
        owner = json.loads(text)
        return f"process {owner['pid']} on {owner['host']} (since {owner['since']})"
    except (ValueError, KeyError, TypeError):
        return "another process"


# ---------------------------------------------------------------------------------------- one run per folder


@contextmanager
def own_run(run: Path) -> Iterator[None]:
    """Be the one process that trains in a folder.

    The process takes a lock of the operating system on `OWNER`, a file that says which process it is. Any end of
    the process frees the lock, SIGKILL included. Nothing is locked where the folder is not a run's, or where the
    system or its file system has no locks.

    Raises:
        RunFolderError: another process holds the lock; the message has its host, number and time.
    """
    if run.exists() and not is_run(run):
        yield  # somebody's thesis: it will be refused, and nothing is left in it
        return
    run.mkdir(parents=True, exist_ok=True)
    with (run / OWNER).open("a+", encoding="utf-8") as file:
        try:
            # Not flock: data-loader workers would inherit that lock, and outlive a killed process by seconds.
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
    """Tell whether an error says no more than that another process went away."""
    return isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or "gloo" in str(error))


def attempt() -> str:
    """Return how often torchrun has restarted the processes, as it says."""
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
    """Print an error, unless another rank has printed the same one; of a consequence, unless one has printed any.

    A consequence is an error that only follows from another rank's. Control characters in the text are replaced,
    since the names of files and tensors in it are foreign.
    """
    text = printable(text, lines=True)
    if threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGCHLD"):
        # torch raises the death of a loader worker wherever this process is, and again for each that ends with it.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    first = before = 0
    if (store := error_store()) is not None:
        key = "consequences" if consequence else hashlib.sha256(text.encode()).hexdigest()
        with suppress(RuntimeError):  # the launcher is gone, and the store with it: better twice than never
            first, before = store.add(key, 1), store.add("errors", int(not consequence))
    if first <= 1 and not (consequence and before):
        print(text, file=sys.stderr, flush=True)
    if consequence:
        time.sleep(1.1)  # torchrun counts in seconds what failed first, and shows that one
    elif name := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        message = {"message": text.removeprefix("error: "), "extraInfo": {"timestamp": str(int(time.time()))}}
        Path(name).write_text(json.dumps({"message": message}))


# ---------------------------------------------------------------------------------------- one voice


@contextmanager
def one_voice() -> Iterator[None]:
    """End the process with status 1 after an error in a command's main, and print it once over all ranks.

    Of a `SerError` the message is printed, of any other error the traceback. Processes that end because another
    one ended print nothing after that one has printed why.
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
    """Name this launch of torchrun, by the same words in all its attempts; the name is empty without torchrun.

    Over several nodes the name is the launchers' common --rdzv-id alone.
    """
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    if not name or os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
        return name
    began = ""
    with suppress(OSError):  # the launcher's first moment, for ids of processes come again
        stat = Path(f"/proc/{os.getppid()}/stat").read_text(encoding="utf-8", errors="replace")
        began = stat.rpartition(")")[2].split()[19]
    return f"{name} {socket.gethostname()} {os.getppid()} {began}".rstrip()

"""torchrun's own agent, whose workers fork: a restart costs no seconds of imports.

python forking_agent.py PROCESSES RESTARTS ARGUMENTS OF examples/train_iemocap.py ...

    ENDPOINT  HOST:PORT where two of these meet, as two nodes; without it one stands for itself
"""

import ctypes
import os
import signal
import sys
import uuid

import torch._dynamo  # noqa: F401  an optimizer imports it
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from training_process import main


def worker(*arguments: str) -> None:
    for number in (
        signal.SIGTERM,
        signal.SIGINT,
        signal.SIGHUP,
        signal.SIGQUIT,
    ):  # a new interpreter has no handlers
        signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)
    ctypes.CDLL(None).prctl(1, 0)  # nor a signal at the parent's death, which torch.multiprocessing asks for
    main(*arguments)


if __name__ == "__main__":
    processes, restarts, *arguments = sys.argv[1:]
    endpoint = os.environ.get("ENDPOINT", "")
    config = LaunchConfig(
        min_nodes=2 if endpoint else 1,
        max_nodes=2 if endpoint else 1,
        nproc_per_node=int(processes),
        max_restarts=int(restarts),
        start_method="fork",
        rdzv_backend="c10d",
        rdzv_endpoint=endpoint or "localhost:0",
        run_id=endpoint or str(uuid.uuid4()),
    )
    elastic_launch(config, worker)(*arguments)

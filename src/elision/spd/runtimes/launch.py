"""Starts the ranks of a command from within it, by the launcher behind torchrun.

    launch(2, body, argument)       # two processes, body(argument) in each; rank 0's result comes back

A process that torchrun has started already is a rank itself: there `launch` calls the body and starts nothing, so the
same command serves several machines:

    torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint HOST:PORT --no-python elision spd probe

The launcher watches its processes. When one dies or fails it ends the others at once, and what is raised here names
the one that was first. Libraries are imported once, by a process that the ranks are forked from.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from elision.errors import InputError
from elision.spd.runtimes.ranks import RankLostError, of_the_network

GRACE = 5.0  # seconds that a rank which lost another leaves the launcher to find that one out
_SIGNALS = "TORCHELASTIC_SIGNALS_TO_HANDLE"  # the launcher sets it


def started() -> bool:
    """Whether torchrun has started this process, so that it is a rank."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_first() -> bool:
    """Whether this process speaks for its run: rank 0, or the command that starts the ranks."""
    return not started() or os.environ.get("RANK", "0") == "0"


def launch(ranks: int, body: Callable[..., Any], *arguments: Any) -> Any:
    """Run `body(*arguments)` in `ranks` processes of this machine and return what rank 0's returned.

    Args:
        ranks: how many processes.
        body: a function of a module, so that the processes can import it.
        arguments: what pickle can carry.

    Raises:
        InputError: a rank refused its input, there are GPUs, but fewer than ranks, or the path of temporary files is
            too long for the socket that ranks are started through.
        RankLostError: a rank died or failed; the sentence names it.
    """
    if started():
        return body(*arguments)
    if 0 < (devices := torch.cuda.device_count()) < ranks:
        raise InputError(
            f"{ranks} ranks need a GPU each, this machine has {devices}: use torchrun on machines that have as "
            "many together, or hide them (CUDA_VISIBLE_DEVICES=) and compute on the CPU"
        )
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    if method == "forkserver":
        multiprocessing.get_context(method).set_forkserver_preload(["elision.spd.runtimes.tasks"])
    with tempfile.TemporaryDirectory(prefix="elision-ranks-") as logs, _contained():
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=ranks,
            logs_specs=DefaultLogsSpecs(log_dir=logs),
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            start_method=method,
        )
        try:
            return elastic_launch(config, _rank)(ranks, body, *arguments)[0]
        except OSError as error:
            if "AF_UNIX" not in str(error):
                raise
            raise InputError(
                f"TMPDIR {tempfile.gettempdir()} is too long for the sockets that ranks are started through: set it to "
                "a short directory such as /tmp"
            ) from None
        except ChildFailedError as error:
            raise _blamed(*error.get_first_failure()) from None
        except SignalException as error:  # the ranks are ended by now
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            raise SystemExit(128 + error.sigval) from None


def _rank(ranks: int, body: Callable[..., Any], *arguments: Any) -> Any:
    """One process: its share of the machine's cores, the loopback for gloo, and the body."""
    if "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // ranks))
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        result = body(*arguments)
    except RuntimeError as error:
        # The rank that failed closes its connections, and those at their other ends may be heard of before it is.
        if isinstance(error, RankLostError) or of_the_network(error):
            time.sleep(GRACE)
        raise
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return result


def _blamed(rank: int, failure: Any) -> Exception:
    """What to raise for the rank that failed first."""
    told = failure.error_file_data.get("message")
    text = told.get("message", "") if isinstance(told, dict) else ""
    kind, _, words = text.partition(": ")
    if kind == InputError.__name__:
        return InputError(words)
    if kind == RankLostError.__name__:
        return RankLostError(words)
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        return RankLostError(f"rank {rank} was killed by {name}; the other ranks were ended: start the command again")
    return RankLostError(f"rank {rank} stopped with {text or f'exit code {failure.exitcode}'}; the others were ended")


@contextmanager
def _contained() -> Iterator[None]:
    """Keep the launcher from reporting in its own words what is raised in ours, and undo what it leaves behind."""
    level, variable = logging.root.manager.disable, os.environ.get(_SIGNALS)
    names = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")
    main = threading.current_thread() is threading.main_thread()
    handlers = {name: signal.getsignal(getattr(signal, name)) for name in names if main}
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(level)
        for name, handler in handlers.items():
            signal.signal(getattr(signal, name), handler)
        os.environ.pop(_SIGNALS, None)
        if variable is not None:
            os.environ[_SIGNALS] = variable

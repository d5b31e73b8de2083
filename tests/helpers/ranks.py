"""Several processes on this machine for a test, with gloo: `run_ranks(job, world, **arguments)`."""

import io
import multiprocessing
import multiprocessing.forkserver
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "MASTER_ADDR": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    # the fork server of Python 3.11 looks nowhere else
    "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), *sys.path])),
}


@cache
def _server() -> Any:
    """Processes are forked from one that has imported what takes long."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["helpers.rank_jobs"])
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ.update(ENVIRONMENT)
    # the server inherits this process's environment
    multiprocessing.forkserver.ensure_running()
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value
    return context


def run_ranks(
    job: Callable[..., Any], world: int = 2, timeout: float = 120, dies: int | None = None, **arguments: Any
) -> list[Any]:
    """`job(**arguments)` in `world` processes that find each other; what each returns, but for a rank that dies."""
    context = _server()
    results = context.Queue()
    port = free_port()
    processes = [
        context.Process(target=_run, args=(results, job, arguments, rank, world, port), daemon=True)
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    found: dict[int, Any] = {}
    end = time.monotonic() + timeout
    try:
        while len(found) < world - (dies is not None):
            if time.monotonic() > end:
                raise AssertionError(f"ranks {set(range(world)) - set(found)} took more than {timeout} s")
            if not results.empty():
                rank, error, value = results.get()
                assert not error, f"rank {rank}: {error}"
                found[rank] = torch.load(io.BytesIO(value), weights_only=False)
            elif any(process.exitcode not in (None, 0) for rank, process in enumerate(processes) if rank != dies):
                codes = [process.exitcode for process in processes]
                raise AssertionError(f"a rank ended with {codes}")
            else:
                time.sleep(0.02)
    finally:
        for process in processes:
            process.join(5 if len(found) == world else 0)
            process.kill()
    assert dies not in found
    return [found[rank] for rank in sorted(found)]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def _run(results: Any, job: Callable[..., Any], arguments: dict[str, Any], rank: int, world: int, port: int) -> None:
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in own.items()})
    log = open(os.environ.get("KAPPATUNE_RANK_LOG", os.devnull), "a", buffering=1)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    torch.set_num_threads(1)
    try:
        # as bytes: shared memory ends with this process
        value = io.BytesIO()
        torch.save(job(**arguments), value)
        results.put((rank, "", value.getvalue()))
    except BaseException:
        results.put((rank, traceback.format_exc(), b""))
    results.close()
    results.join_thread()
    sys.stdout.flush()
    # gloo's threads and DeepSpeed's exit handlers have nothing to add
    os._exit(0)

"""Several processes, forked from the test: what torchrun does, without its start-up time."""

import os
import runpy
import socket
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist


def fork(processes: int, function: Callable[[int], None]) -> None:
    """Runs `function(rank)` in `processes` processes; fails if it raises in one of them."""
    children = []
    for rank in range(processes):
        child = os.fork()
        if child:
            children.append(child)
            continue
        try:
            torch.set_num_threads(1)
            function(rank)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert statuses == [0] * processes, f"the ranks ended with {statuses}"


def on_ranks(processes: int, function: Callable[[], None], folder: Path) -> None:
    """Runs `function` in the ranks of a gloo process group that meet in `folder`."""

    def ranked(rank: int) -> None:
        store = dist.FileStore(str(folder / f"store{processes}"), processes)
        timeout = timedelta(seconds=120)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=processes, timeout=timeout)
        function()
        dist.destroy_process_group()

    fork(processes, ranked)


def run_script(script: Path, *arguments: object, processes: int = 0) -> None:
    """Runs a Python file; with `processes` in as many, by the environment that torchrun gives them."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]

    def run(rank: int) -> None:
        if processes:
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
            os.environ |= {name: str(value) for name, value in (ranks | meeting).items()}
        sys.argv = [str(script), *map(str, arguments)]
        runpy.run_path(str(script), run_name="__main__")

    fork(max(1, processes), run)

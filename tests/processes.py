"""Two processes that exchange messages over gloo, and a limit to their time: a failing one never hangs the other."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

RANKS = 2
SECONDS = 150  # for both, on a loaded machine; alone they take a tenth of it

needs_processes = pytest.mark.skipif(not distributed.is_available(), reason="torch was built without torch.distributed")


@contextmanager
def joined(rank: int, folder: Path) -> Iterator[None]:
    """Inside, this process is ``rank`` of the group that meets in ``folder``."""
    torch.set_num_threads(1)
    store, limit = f"file://{folder / 'store'}", timedelta(seconds=SECONDS / 2)
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS, timeout=limit)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def found_by_ranks(script: str, folder: Path) -> list[dict[str, Any]]:
    """Run ``script folder rank`` once a rank; each leaves ``rank.pt`` in the folder."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, script, str(folder)]
    processes = [subprocess.Popen([*command, str(rank)], env=environment) for rank in range(RANKS)]
    end = time.monotonic() + SECONDS
    try:
        assert [process.wait(timeout=end - time.monotonic()) for process in processes] == [0] * RANKS
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]

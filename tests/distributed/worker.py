"""The ranks of one world: forked from a process that imported everything; a new process group after a failed check."""

from __future__ import annotations

import datetime
import json
import os
import sys
import time
import traceback
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.distributed.registry import Check, SkipError, checks
from tests.models import tiny

CHECK_TIMEOUT = datetime.timedelta(seconds=120)


def main(folder: Path, world: int, only: str, slow: bool) -> None:
    """Fork the ranks; where one dies, end the others."""
    chosen = {name: function for name, function in sorted(checks(world, slow).items()) if only in name}
    tiny("llama")  # so that what it imports is imported once
    store = dist.TCPStore("localhost", 0, None, True, CHECK_TIMEOUT, wait_for_workers=False)
    ranks = {}
    for rank in range(world):
        if (pid := os.fork()) == 0:
            variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
            address = {"MASTER_ADDR": "localhost", "MASTER_PORT": store.port}
            os.environ.update({name: str(value) for name, value in (variables | address).items()})
            try:
                run(folder, rank, world, store.port, chosen)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)  # groups that a failed check left behind do not hold up the end
        ranks[pid] = rank
    while ranks:
        pid, status = os.wait()
        rank = ranks.pop(pid)
        if status:
            print(f"rank {rank} ended with status {status}", file=sys.stderr, flush=True)
            for other in ranks:
                os.kill(other, 9)


def run(folder: Path, rank: int, world: int, port: int, chosen: dict[str, Check]) -> None:
    """Run every check in this rank, one after the other, and write what came of each."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    store = dist.TCPStore("localhost", port, None, False, CHECK_TIMEOUT)
    results: dict[str, str] = {}
    joined = False
    for number, (name, function) in enumerate(chosen.items()):
        began = time.perf_counter()
        if not joined:
            joined = True
            prefixed = dist.PrefixStore(f"check{number}", store)
            timeout = datetime.timedelta(seconds=60)
            dist.init_process_group("gloo", store=prefixed, rank=rank, world_size=world, timeout=timeout)
        torch.manual_seed(0)
        try:
            function()
            results[name] = "passed"
        except (Exception, pytest.fail.Exception) as error:
            skipped = isinstance(error, SkipError)
            results[name] = f"skipped: {error}" if skipped else traceback.format_exc()
        (folder / f"{rank}.json").write_text(json.dumps(results))
        store.set(f"done{number}/{rank}", results[name][:7])
        everyone = [f"done{number}/{other}" for other in range(world)]
        store.wait(everyone, CHECK_TIMEOUT)
        if any(store.get(key) == b"Traceba" for key in everyone):
            dist.destroy_process_group()  # messages of a check that broke off must not meet those of the next
            joined = False
        if rank == 0:
            seconds = time.perf_counter() - began
            print(f"{name}: {results[name].strip().splitlines()[-1][:200]} ({seconds:.1f} s)", flush=True)


if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if argument != "--slow"]
    main(Path(arguments[0]), int(arguments[1]), "".join(arguments[2:3]), "--slow" in sys.argv)

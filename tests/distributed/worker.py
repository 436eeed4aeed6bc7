"""What torchrun starts: every check of this world size, one after the other; a new process group after a failure."""

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

from tests.distributed.registry import checks


class SkipError(Exception):
    """A check cannot run here; the text says why."""


def main(folder: Path, only: str) -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world, False, datetime.timedelta(seconds=120)
    )
    results: dict[str, str] = {}
    check_timeout = datetime.timedelta(seconds=120)
    joined = False
    for number, (name, function) in enumerate(sorted(checks(world).items())):
        if only not in name:
            continue
        began = time.perf_counter()
        if not joined:
            joined = True
            prefixed = dist.PrefixStore(f"check{number}", store)
            timeout = datetime.timedelta(seconds=20)
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
        store.wait(everyone, check_timeout)
        if any(store.get(key) == b"Traceba" for key in everyone):
            dist.destroy_process_group()  # messages of a check that broke off must not meet those of the next
            joined = False
        if rank == 0:
            seconds = time.perf_counter() - began
            print(f"{name}: {results[name].strip().splitlines()[-1][:200]} ({seconds:.1f} s)", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "")
    os._exit(0)  # groups that a failed check left behind do not hold up the end

"""What a launcher told this process: torchrun, accelerate launch, or SLURM's srun."""

from __future__ import annotations

import os
from typing import NamedTuple


class Launch(NamedTuple):
    """This process among those that were launched with it."""

    rank: int
    local_rank: int
    world: int


def launch() -> Launch:
    """Read the environment; a process that no launcher started is the only one."""
    for names in (("RANK", "LOCAL_RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS")):
        values = [os.environ.get(name, "") for name in names]
        if all(value.isdigit() for value in values):
            return Launch(*map(int, values))
    return Launch(0, 0, 1)

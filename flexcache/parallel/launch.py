"""The environment of a launcher: torchrun, accelerate launch, or SLURM's srun."""

from __future__ import annotations

import os
from typing import NamedTuple


class Launch(NamedTuple):
    """The rank of this process among those of its launcher."""

    rank: int
    local_rank: int
    world: int


def launch() -> Launch:
    """Return rank, local rank and world size from the environment; without a launcher the process is the only one.

    ::

        if launch().rank == 0:
            print("one line for the whole run")
    """
    for names in (("RANK", "LOCAL_RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS")):
        values = [os.environ.get(name, "") for name in names]
        if all(value.isdigit() for value in values):
            return Launch(*map(int, values))
    return Launch(0, 0, 1)

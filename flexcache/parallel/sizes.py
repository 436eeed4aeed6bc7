"""Numbers of processes over which a model is spread."""

from __future__ import annotations

from typing import Any

from pydantic import ConfigDict, Field

from flexcache.errors import ConfigError
from flexcache.parallel.launch import launch
from flexcache.validation import Options


class Parallel(Options):
    """The numbers of processes over which transformers distributes one model.

    If the launcher started more processes, they hold copies of the model.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tensor: int = Field(1, ge=1, description="processes that share each weight, by the model's tensor-parallel plan")
    fsdp: int = Field(1, ge=1, description="processes that shard the weights and gather them block by block (FSDP2)")
    pipeline: int = Field(1, ge=1, description="processes that each hold some of the blocks")

    def config(self) -> Any:
        """Return the configuration with which transformers loads a distributed model, or None if it is not distributed.

        Raises
        ------
        ConfigError
            The launcher started a number of processes that does not fit, or transformers cannot combine the sizes.
        """
        size, world = self.tensor * self.fsdp * self.pipeline, launch().world
        if size == 1:
            return None
        if world % size or (self.pipeline > 1 and world > size):
            raise ConfigError(
                f"model.parallel does not fit the {world} process{'es' if world > 1 else ''} of the launcher",
                expected=f"tensor {self.tensor} · fsdp {self.fsdp} · pipeline {self.pipeline} = {size} processes"
                + ("" if self.pipeline > 1 else ", or a multiple"),
                found=str(world),
                remedy=f"use torchrun --nproc-per-node {size}; several such launchers may fill one store",
            )
        from transformers.distributed.configuration_utils import DistributedConfig

        try:
            return DistributedConfig(
                tp_size=self.tensor, fsdp_size=self.fsdp, pp_size=self.pipeline, dp_replicate_size=world // size
            )
        except ValueError as error:
            raise ConfigError("transformers cannot combine these parallel sizes", found=str(error)) from error

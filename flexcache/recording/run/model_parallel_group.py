"""The processes that share one model and compute each unit together."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import reduce
from operator import or_
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from flexcache.errors import CaptureError, ConfigError, FlexCacheError
from flexcache.hooks.locate.encoder_decoder import is_encoder_decoder
from flexcache.hooks.locate.hook_point import HookPoint
from flexcache.hooks.read.measure import ExampleRun, read_example
from flexcache.identity import check_model
from flexcache.identity.behavior import record_behavior
from flexcache.identity.describe import describe_model
from flexcache.identity.structure import describe_structure
from flexcache.parallel.distribution import Distribution
from flexcache.parallel.peers import broadcast_value, gather_values
from flexcache.recording.forward.capture_targets import CaptureTargets
from flexcache.recording.run.fingerprint import fingerprint
from flexcache.recording.run.gathering import Gathering
from flexcache.recording.run.recorder import Recorder
from flexcache.store.format.ledger import FileRecord, UnitContent
from flexcache.store.format.model_record import IDENTITY
from flexcache.store.read.selection import ArrayKey

IDLE, DONE = -1, -2
PAUSE = 0.2
"""Seconds between two searches for a unit while other processes with the same weights run."""
RUN_AGAIN = (
    "the model changed during the run: leave its hooks and adapters as they are, and run the same call again; the last"
    " unit is not kept"
)


class ModelParallelGroup:
    """This process, alone or with those that hold other shards and stages of the same model.

    The first of them, the leader, claims a unit and broadcasts it; each process computes its part of every forward and
    writes the files of its own sites and layers; when all files are in place, the leader commits the unit.

    Where the weights are sharded over data-parallel groups (FSDP, ZeRO-3), every forward needs all groups: before each
    forward they agree on whether any has a batch, and a group that has none runs a single token.

    If the model is distributed, the constructor and all methods are collective.
    """

    def __init__(self, model: nn.Module) -> None:
        self._distribution = Distribution(model, {})
        mesh = self._distribution.mesh
        self._members = tuple(rank for rank, at in enumerate(mesh.coordinates) if at.dp == mesh.coordinate.dp)
        self._here = mesh.rank
        self._searched = 0.0
        self.in_step = mesh.sizes.dp > 1
        self.gathering = None if self._distribution.is_alone else Gathering(model, self._distribution)
        self.sizes = mesh.sizes
        self._is_encoder_decoder = is_encoder_decoder(model)

    @property
    def alone(self) -> bool:
        """True if this process has the whole model, and waits for no other in a forward."""
        return self._distribution.is_alone

    @property
    def processes(self) -> int:
        """Number of processes that share the model's weights; 1 if this one has the whole model."""
        return len(self._distribution.mesh.ranks)

    @property
    def leads(self) -> bool:
        """True if this process claims and commits the units."""
        return self._here == self._members[0]

    def close(self) -> None:
        """Release the process group."""
        self._distribution.close()

    def read_example(self, model: nn.Module, points: Sequence[HookPoint], example: Any = None) -> ExampleRun:
        """Return whole activations of a small example, on every rank."""
        read = read_example if self.gathering is None else self.gathering.read_example
        return read(model, points, example)

    def describe_model(self, model: nn.Module, example: Any = None) -> dict[str, Any]:
        """Return the identity of the model, see `flexcache.identity.describe.describe_model`. Collective."""
        ranks = self.processes
        conditions = fingerprint(model, self.sizes.tp) | ({"processes": ranks} if ranks > 1 else {})
        reader, gathered = self.read_example, self._distribution.gather_objects
        return describe_model(model, conditions, reader=reader, gathered=gathered, example=example)

    def check_unchanged(self, model: nn.Module, before: dict[str, Any], where: str, example: Any = None) -> None:
        """Raise MismatchError if a model computes something else on the fixed input than at the start of a run.

        A model on several processes is not checked, because they finish their units at different times.
        """
        if not self.alone:
            return
        held = before[IDENTITY]
        ran = record_behavior(model, fingerprint(model, self.sizes.tp), example=example)
        now = {**before, IDENTITY: {**held, "behavior": ran, "structure": describe_structure(model)}}
        check_model(before, now, where, remedy=RUN_AGAIN)

    def keys(self, points: Sequence[HookPoint], extra: Sequence[ArrayKey] = ()) -> list[ArrayKey]:
        """Return the sites and layers that this process writes; *extra* ones are the leader's."""
        mine = points if self.gathering is None else self.gathering.written_points(points)
        return [(point.array, point.layer) for point in mine] + (list(extra) if self.leads else [])

    def remote_modules(self) -> set[str]:
        """Return the names of modules that only other pipeline stages have."""
        return set() if self.gathering is None else self.gathering.remote_modules()

    def check_targets(self, targets: CaptureTargets) -> None:
        """Raise ConfigError if *targets* cannot be read from a model on several processes.

        Those are gradients through a pipeline, whose transfers between stages are outside of autograd, and
        encoder-decoder models.
        """
        if self._is_encoder_decoder and not self.alone:
            raise ConfigError(
                "an encoder and its decoder are captured only by processes that each have the whole model",
                found=f"tensor parallel {self.sizes.tp}, data parallel {self.sizes.dp}, {self.sizes.pp} stages",
                remedy="load the whole model in each process; several may fill one store at the same time",
            )
        if self.sizes.pp > 1 and targets.objective is not None:
            raise ConfigError(
                "gradients cannot be captured through a pipeline",
                found=f"{self.sizes.pp} stages, and "
                + ", ".join(point.array for point in targets.points if point.gradient),
                remedy="use tensor parallel or FSDP instead, or leave the .grad sites out",
            )

    def gather_values(self, value: Any) -> list[Any]:
        """Return the values of all processes of the model. Collective."""
        return self._distribution.gather_objects(value)

    # Units

    def claim_unit(self, recorder: Recorder) -> int:
        """Return the unit to compute next, `IDLE` if others have all pending units, or `DONE`."""
        unit = IDLE
        if self.leads and not (self.in_step and time.monotonic() - self._searched < PAUSE):
            found = recorder.claim_unit()
            if found is not None:
                return self._tell(found)
            self._searched = time.monotonic()
            unit = IDLE if recorder.growing or recorder.pending() else DONE
        return self._tell(unit)

    def commit_unit(self, recorder: Recorder) -> None:
        """Put this process's files of the unit in place; once all have, the leader commits it.

        CaptureError, on all processes, if one of them could not write its files.
        """
        if len(self._members) == 1:
            recorder.commit_unit()
            return
        error: FlexCacheError | None = None
        content: UnitContent | None = None
        try:
            content = recorder.place_files()
        except FlexCacheError as raised:
            error = raised
        told = {"content": None if content is None else asdict(content), "error": str(error) if error else ""}
        parts = gather_values(self._group, self._members, self._here, told)
        failed = next((place for place, part in enumerate(parts) if part["error"]), IDLE)
        if self._tell(failed) != IDLE:
            raise error or CaptureError(
                "another process of the group could not write its part of a unit",
                found=parts[failed]["error"] if self.leads else "see the error of that process",
            )
        if not self.leads:
            recorder.leave_unit()
        elif any(part["content"] is None for part in parts):  # taken for gone, after a suspension: others compute it
            recorder.abandon_unit()
        else:
            recorder.commit_unit(reduce(or_, (_content(part["content"]) for part in parts)))

    # Forwards in step

    def agree_on_work(self, running: bool, done: bool) -> tuple[bool, bool]:
        """Return if any group that shares the weights has a batch to run, and if all of them are done."""
        if not self.in_step:
            return running, done
        state = torch.tensor([int(running), int(not done)])
        dist.all_reduce(state, op=dist.ReduceOp.MAX, group=self._group)
        return bool(state[0]), not state[1]

    @property
    def _group(self) -> Any:
        return self._distribution.group

    def _tell(self, value: int) -> int:
        return value if len(self._members) == 1 else broadcast_value(self._group, self._members, self._here, value)


def _content(told: dict[str, Any]) -> UnitContent:
    """Return the content of a unit as another process told it, as plain values."""
    files = {name: FileRecord(**file) for name, file in told["files"].items()}
    return UnitContent(files, {name: tuple(digests) for name, digests in told["virtual"].items()})

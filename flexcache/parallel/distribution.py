"""The distribution of one model over processes, and the exchange of its activations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from flexcache.errors import ConfigError, HookError, LayoutError
from flexcache.parallel.activation_shapes import ActivationShapes
from flexcache.parallel.assembly import Assembly, assemble
from flexcache.parallel.discover import discover_axes
from flexcache.parallel.header import ActivationKey, Header, pack_header, unpack_header
from flexcache.parallel.layout import Layout, Local, find_sharded_dim
from flexcache.parallel.mesh import Mesh, build_meshes
from flexcache.parallel.meta_model import BatchExtent, ShapeProbe
from flexcache.parallel.peers import exchange_tensors, exchange_values
from flexcache.parallel.shard_group import ShardGroup, join_parts

Sizes = Mapping[str, int | None]


@dataclass(frozen=True)
class LocalPiece:
    """The piece of an activation on this rank: a separate tensor, to be sent to the ranks that keep the whole."""

    key: ActivationKey
    chunk: int
    tensor: torch.Tensor
    layout: Layout


class Distribution:
    """The mesh of a model, and the shapes of its activations.

    Creating it is collective for a distributed model: all ranks of *process_group* take part.

    >>> Distribution(nn.Linear(2, 2), {}).is_alone
    True

    Attributes
    ----------
    mesh : Mesh
    group : ProcessGroup or None
        A separate group, so that its messages are never mixed with those of the model. None in a single process.

    Raises
    ------
    ConfigError
        Given sizes differ from those found, or do not fit the number of processes.
    """

    def __init__(self, model: nn.Module, sizes: Sizes, process_group: Any = None) -> None:
        self.mesh = Mesh()
        self.group: Any = None
        found = discover_axes(model) if dist.is_available() and dist.is_initialized() else {}
        if found or any((size or 1) > 1 for size in sizes.values()):
            self._join(found, sizes, process_group)
        self._shapes = ActivationShapes()
        self._summed: set[tuple[str, ActivationKey, int]] = set()
        self._assemblies: dict[tuple[tuple[int, ...], ...], Assembly] = {}

    @property
    def is_alone(self) -> bool:
        """True if this process has the whole model and the whole batch."""
        return len(self.mesh.ranks) == 1

    def close(self) -> None:
        """Release the process group."""
        if self.group is not None and dist.is_initialized():
            with suppress(ValueError):  # torch.distributed was ended before, and the group with it
                dist.destroy_process_group(self.group)
        self.group = None

    # What a rank holds

    def begin_forward(self, root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Keep the inputs of a root module that is about to run; shapes of activations follow from them."""
        self._shapes.keep_inputs(root, args, kwargs)

    def end_forward(self) -> None:
        """Release the inputs of the forward."""
        self._shapes.drop_inputs()

    def layout(
        self,
        key: ActivationKey,
        local: Local,
        where: str,
        expected: tuple[int | None, ...] | None,
        probes: Callable[[], Iterable[ShapeProbe]],
        microbatches: int = 1,
    ) -> Layout:
        """Return the layout of this rank's piece in the whole activation.

        Parameters
        ----------
        expected
            The whole shape that the user gave, None for dims of any size.
        probes
            Returns the places whose shapes may be needed; called only if the model must run on the meta device.

        Raises
        ------
        LayoutError
            The piece is not a shard of the whole along one dim, or the whole's shape is not known.
        HookError
            *expected* is not the shape found.
        """
        shape, sizes = tuple(local.tensor.shape), self.mesh.sizes
        if self.is_alone and microbatches == 1:
            _check_expected(expected, shape, None, where)
            return Layout(shape, None, 0 if shape else None)
        rule, why = self._shapes.find_shape(key, probes)
        whole: tuple[int, ...] | None = shape
        sharded = None
        if local.known:
            whole, sharded = local.shape, local.sharded
        elif sizes.tp > 1:
            whole = None if rule is None else tuple(size.of(self._shapes.extent) for size in rule)
            if expected is not None and (whole is None or len(expected) != len(shape)):
                if len(expected) != len(shape):
                    _check_expected(expected, shape, None, where)
                whole = tuple(n if size is None else size for n, size in zip(shape, expected, strict=True))
            sharded = find_sharded_dim(shape, whole, where, sizes.tp, why)
        assert whole is not None
        if rule is not None and len(rule) == len(whole) and any(size.batch for size in rule):
            rows = next(dim for dim, size in enumerate(rule) if size.batch)
        elif rule is not None and len(rule) == len(whole) and self._shapes.known_for_any_batch:
            rows = None
        else:
            rows = _guess_rows(whole, self._shapes.extent)
        _check_expected(expected, whole, rows if sizes.dp > 1 or microbatches > 1 else None, where)
        return Layout(whole, sharded, rows)

    # Edits

    @contextmanager
    def edit_group(
        self, key: ActivationKey, piece: torch.Tensor, layout: Layout, where: str, microbatches: int, chunk: int = 0
    ) -> Iterator[ShardGroup]:
        """Yield the group of ranks that hold an activation, with the same state of torch's random numbers on each.

        Collective on the group, whose first rank draws the seed.

        Raises
        ------
        LayoutError
            The pieces do not fit together, or the ranks are at different hooks.
        """
        ranks = self.mesh.stage_ranks
        sums = self._sums("edit", key, chunk, piece, layout, microbatches)
        seed = int(torch.randint(2**62, ())) if self.mesh.rank == ranks[0] else 0
        packed = exchange_values(
            self.group, ranks, self.mesh.rank, [seed, *pack_header(key, chunk, piece, layout, sums)]
        )
        seed, told = packed[0][0], tuple(tuple(values[1:]) for values in packed)
        if told not in self._assemblies:
            if len({values[:3] for values in told}) > 1:
                raise LayoutError(
                    "ranks are at different hooks",
                    where=where,
                    expected="the same hooks enabled, and run in the same order, on every rank",
                    found=", ".join(f"hook {values[0]} run {values[1]}" for values in told),
                )
            if len(self._assemblies) > 4096:
                self._assemblies.clear()
            headers: list[list[Header]] = [[] for _ in self.mesh.ranks]
            for rank, values in zip(ranks, told, strict=True):
                headers[rank] = [unpack_header(values)]
            names = [where] * (key.hook + 1)
            (self._assemblies[told],) = assemble(headers, self.mesh.coordinates, names)
        scale = self.mesh.sizes.dp * microbatches
        devices = [piece.device] if piece.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            yield ShardGroup(self.group, self.mesh.rank, ranks, self._assemblies[told], scale)

    def broadcast_module(self, module: nn.Module) -> None:
        """Send rank 0's weights and buffers of a module to all ranks. Collective."""
        if self.is_alone:
            return
        with torch.no_grad():
            for tensor in [*module.parameters(), *module.buffers()]:
                if self.mesh.rank == 0:
                    exchange_tensors(self.group, [(rank, tensor) for rank in range(1, len(self.mesh.ranks))], [])
                else:
                    received = torch.empty_like(tensor, memory_format=torch.contiguous_format)
                    exchange_tensors(self.group, [], [(0, received)])
                    tensor.copy_(received)

    def average_over_copies(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the mean of a tensor over the data-parallel ranks. Collective on them."""
        here = self.mesh.coordinate
        ranks = [rank for rank, at in enumerate(self.mesh.coordinates) if (at.pp, at.tp) == (here.pp, here.tp)]
        if len(ranks) == 1:
            return tensor
        found = {rank: torch.empty_like(tensor) for rank in ranks if rank != self.mesh.rank}
        exchange_tensors(self.group, [(rank, tensor) for rank in found], list(found.items()))
        found[self.mesh.rank] = tensor
        return torch.stack([found[rank] for rank in ranks]).mean(dim=0)

    def gather_objects(self, value: Any) -> list[Any]:
        """Return the value of each rank, by group rank. Collective."""
        if self.is_alone:
            return [value]
        found: list[Any] = [None] * len(self.mesh.ranks)
        dist.all_gather_object(found, value, group=self.group)
        return found

    # Whole activations

    def assemble_activations(
        self,
        pieces: Sequence[LocalPiece],
        keepers: Sequence[int],
        names: Sequence[str],
        fired: Iterable[int] = (),
        microbatches: int = 1,
    ) -> tuple[dict[ActivationKey, torch.Tensor], set[int]]:
        """Assemble activations on the ranks that keep them; each piece is sent only where it is needed. Collective.

        Parameters
        ----------
        keepers
            Group ranks that receive whole activations.
        names
            Names of the hooks by number, for errors.
        fired
            Numbers of the hooks that fired on this rank.

        Returns
        -------
        whole
            The whole tensors, in the order of their keys; empty on other ranks than *keepers*.
        fired
            Numbers of the hooks that fired on any rank.

        Raises
        ------
        LayoutError
            On every rank, before anything is sent.
        """
        own = [
            Header(
                piece.key,
                piece.chunk,
                tuple(piece.tensor.shape),
                str(piece.tensor.dtype),
                piece.layout,
                self._sums("read", piece.key, piece.chunk, piece.tensor, piece.layout, microbatches),
            )
            for piece in pieces
        ]
        told = self.gather_objects((own, sorted(fired)))
        whole: dict[ActivationKey, torch.Tensor] = {}
        headers = [headers for headers, _ in told]
        gradients = {header.key for held in headers for header in held if header.layout.gradient}
        for assembly in assemble(headers, self.mesh.coordinates, names):
            collected = self._collect(assembly, pieces, keepers, assembly.key in gradients)
            if collected is not None:
                whole[assembly.key] = collected
        return whole, {number for _, numbers in told for number in numbers}

    def _collect(
        self, assembly: Assembly, pieces: Sequence[LocalPiece], keepers: Sequence[int], gradient: bool
    ) -> torch.Tensor | None:
        here = self.mesh.rank
        dtype = getattr(torch, assembly.dtype.removeprefix("torch."))
        device = self._device(pieces)
        sends, receives, buffers = [], [], []
        for part in assembly.addends if gradient else assembly.parts:
            for keeper in keepers:
                giver, number = part.holder(keeper)
                if keeper == here and giver == here:
                    buffers.append((part, pieces[number].tensor))
                elif keeper == here:
                    buffer = torch.empty(part.shape, dtype=dtype, device=device)
                    receives.append((giver, buffer))
                    buffers.append((part, buffer))
                elif giver == here:
                    sends.append((keeper, pieces[number].tensor))
        exchange_tensors(self.group, sends, receives)
        if here not in keepers:
            return None
        if len(buffers) == 1:
            return buffers[0][1]
        return join_parts(assembly.shape, buffers, added=gradient and assembly.addends != assembly.parts)

    def _device(self, pieces: Sequence[LocalPiece]) -> torch.device:
        if pieces:
            return pieces[0].tensor.device
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")

    def _sums(
        self, use: str, key: ActivationKey, chunk: int, tensor: torch.Tensor, layout: Layout, microbatches: int
    ) -> tuple[float, float] | None:
        """Return checksums the first time that copies of an activation may differ, else None."""
        sizes = self.mesh.sizes
        shared = layout.rows is None and not layout.gradient and (sizes.dp > 1 or microbatches > 1)
        copies = shared or (sizes.tp > 1 and layout.sharded is None)
        if (use, key, chunk) in self._summed or not (copies or sizes.pp > 1):
            return None
        self._summed.add((use, key, chunk))
        values = tensor.detach().reshape(-1).to(torch.float64)
        if not values.numel():
            return None
        weights = torch.linspace(1, 2, values.numel(), dtype=torch.float64, device=values.device)
        return float((values * weights).mean()), float(values.abs().mean())

    # Joining the others

    def _join(self, found: dict[str, tuple[int, ...]], sizes: Sizes, process_group: Any) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise ConfigError(
                "the model is not distributed",
                expected="a process group, for parallel sizes over 1",
                found=", ".join(f"{axis} {size}" for axis, size in sizes.items() if size),
                remedy="start with torchrun and call torch.distributed.init_process_group, or leave the sizes out",
            )
        base = process_group if process_group is not None else dist.group.WORLD
        ranks = dist.get_process_group_ranks(base)
        told: list[Any] = [None] * len(ranks)
        dist.all_gather_object(told, found, group=base)
        everyone = dict(zip(ranks, told, strict=True))
        self.mesh = build_meshes(everyone, sizes)[dist.get_rank()]
        members = self.mesh.ranks
        if len(members) > 1:
            subset = len(members) < dist.get_world_size()
            backend = "cpu:gloo,cuda:nccl" if "nccl" in str(dist.get_backend(base)) else None
            self.group = dist.new_group(
                list(members) if subset else None,
                timeout=_timeout(base),
                backend=backend,
                use_local_synchronization=subset,
            )


def _timeout(group: Any) -> Any:
    """Return the timeout of a process group, for the group made from it."""
    for device in ("cpu", "cuda"):
        try:
            return group._get_backend(torch.device(device)).options._timeout
        except (RuntimeError, AttributeError):
            continue
    return None


def _guess_rows(shape: tuple[int, ...], extent: BatchExtent) -> int | None:
    """Return the dim of rows by its size, if the model cannot run on the meta device."""
    if shape and shape[0] in (extent.batch, extent.batch * extent.length):
        return 0
    return None


def _check_expected(
    expected: tuple[int | None, ...] | None, shape: tuple[int, ...], rows: int | None, where: str
) -> None:
    if expected is None:
        return
    fits = len(expected) == len(shape) and all(
        size is None or size == n or dim == rows for dim, (size, n) in enumerate(zip(expected, shape))
    )
    if not fits:
        raise HookError(
            "an activation does not have the shape that its hook function expects",
            where=where,
            expected=str(expected),
            found=str(shape),
            remedy="leave expected_shape out: whole shapes are found automatically",
        )

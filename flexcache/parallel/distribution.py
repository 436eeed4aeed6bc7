"""How one model is distributed, and what that asks of every activation that is read or edited in it."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from flexcache.errors import ConfigError, HookError, LayoutError
from flexcache.parallel.assembly import Assembly, Header, Key, assemble
from flexcache.parallel.discover import discover
from flexcache.parallel.layout import Layout, Local, explain
from flexcache.parallel.mesh import Mesh, arrange
from flexcache.parallel.meta_model import Extent, Learned, MetaModel, ShapeProbe, extent_of
from flexcache.parallel.peers import swap, transfer
from flexcache.parallel.shard_group import ShardGroup, join

MAX_DIMS = 8

Sizes = Mapping[str, int | None]


@dataclass(frozen=True)
class Piece:
    """What this rank holds of an activation: a tensor of its own, on its way to the ranks that keep the whole."""

    key: Key
    chunk: int
    tensor: torch.Tensor
    layout: Layout


class Distribution:
    """The mesh that a model lies on, and the shapes of its activations.

    Making one is collective where anything is distributed: all ranks of *process_group* take part.

    Attributes
    ----------
    mesh : Mesh
    group : ProcessGroup or None
        A group of this object's own, so that its messages never meet the model's. None in a single process.

    Raises
    ------
    ConfigError
        Sizes given are not those found, or do not fit the number of processes.
    """

    def __init__(self, model: nn.Module, sizes: Sizes, process_group: Any = None) -> None:
        self.mesh = Mesh()
        self.group: Any = None
        found = discover(model) if dist.is_available() and dist.is_initialized() else {}
        if found or any((size or 1) > 1 for size in sizes.values()):
            self._join(found, sizes, process_group)
        self._twins: dict[int, MetaModel] = {}
        self._learned: dict[int, Learned] = {}
        self._failures: dict[int, str] = {}
        self._inputs: tuple[nn.Module, tuple[Any, ...] | None, Mapping[str, Any]] | None = None
        self._extent = Extent(1, 1)
        self._summed: set[tuple[str, Key, int]] = set()
        self._assemblies: dict[tuple[tuple[int, ...], ...], Assembly] = {}

    @property
    def alone(self) -> bool:
        """Whether this process has the whole model and the whole batch."""
        return len(self.mesh.ranks) == 1

    def close(self) -> None:
        """Give back the process group."""
        if self.group is not None and dist.is_initialized():
            with suppress(ValueError):  # whoever ended torch.distributed in between ended the group as well
                dist.destroy_process_group(self.group)
        self.group = None

    # What a rank holds

    def begin(self, root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Take note of the inputs that a root module is about to run with; shapes of activations follow from them."""
        self._inputs = root, args, kwargs
        self._extent = extent_of(args, kwargs)

    def end(self) -> None:
        """Let go of the inputs; the root and the extent stay, for modules that run again in the backward pass."""
        if self._inputs is not None:
            self._inputs = self._inputs[0], None, {}

    def layout(
        self,
        key: Key,
        local: Local,
        where: str,
        expected: tuple[int | None, ...] | None,
        probes: Callable[[], Iterable[ShapeProbe]],
        microbatches: int = 1,
    ) -> Layout:
        """Return how this rank's piece of an activation lies in the whole.

        Parameters
        ----------
        expected
            The whole's shape as the user gave it, None for dims that are as they are.
        probes
            Where shapes may be asked for: a function, since it is called only when the twin has to run.

        Raises
        ------
        LayoutError
            The piece is no shard of the whole along one dim, or the whole's shape is not known.
        HookError
            *expected* is not the shape found.
        """
        shape, sizes = tuple(local.tensor.shape), self.mesh.sizes
        if self.alone and microbatches == 1:
            _check_expected(expected, shape, None, where)
            return Layout(shape, None, 0 if shape else None)
        rule, why = self._rule(key, probes)
        whole: tuple[int, ...] | None = shape
        sharded = None
        if local.known:
            whole, sharded = local.shape, local.sharded
        elif sizes.tp > 1:
            whole = None if rule is None else tuple(size.of(self._extent) for size in rule)
            if expected is not None and (whole is None or len(expected) != len(shape)):
                if len(expected) != len(shape):
                    _check_expected(expected, shape, None, where)
                whole = tuple(n if size is None else size for n, size in zip(shape, expected, strict=True))
            sharded = explain(shape, whole, where, sizes.tp, why)
        assert whole is not None
        if rule is not None and len(rule) == len(whole) and any(size.batch for size in rule):
            rows = next(dim for dim, size in enumerate(rule) if size.batch)
        elif rule is not None and len(rule) == len(whole) and self._any_batch():
            rows = None
        else:
            rows = _guess_rows(whole, self._extent)
        _check_expected(expected, whole, rows if sizes.dp > 1 or microbatches > 1 else None, where)
        return Layout(whole, sharded, rows)

    def _rule(self, key: Key, probes: Callable[[], Iterable[ShapeProbe]]) -> tuple[Any, str]:
        """Return the sizes of an activation's dims by the twin, or None and why they are not known."""
        if self._inputs is None:
            return None, "the module runs outside of the model's forward"
        root, args, kwargs = self._inputs
        number = id(root)
        learned = self._learned.get(number)
        stale = learned is None or not learned.covers(self._extent) or key.hook not in learned.shapes
        if stale and args is not None and number not in self._failures:
            try:
                twin = (
                    self._twins.setdefault(number, MetaModel(root))
                    if number not in self._twins
                    else self._twins[number]
                )
                learned = self._learned[number] = twin.learn(probes(), args, kwargs)
            except Exception as error:
                first = (str(error) or type(error).__name__).strip().splitlines()[0]
                self._failures[number] = f"the model does not run on the meta device: {first}"
        if learned is None or not learned.covers(self._extent):
            return None, self._failures.get(number, "")
        runs = learned.shapes.get(key.hook, [])
        if key.call >= len(runs):
            return None, "on the meta device the module did not run, or its shape follows from neither rows nor length"
        return runs[key.call], ""

    def _any_batch(self) -> bool:
        assert self._inputs is not None
        learned = self._learned.get(id(self._inputs[0]))
        return learned is not None and learned.any_batch

    # Edits

    @contextmanager
    def editing(
        self, key: Key, piece: torch.Tensor, layout: Layout, where: str, microbatches: int, chunk: int = 0
    ) -> Iterator[ShardGroup]:
        """Give the plane of ranks that hold an activation, with the same state of torch's random numbers on each.

        Collective on the plane. The seed of the random numbers is drawn by the plane's first rank.

        Raises
        ------
        LayoutError
            The pieces do not fit together, or the ranks are not at the same hook.
        """
        ranks = self.mesh.plane
        sums = self._sums("edit", key, chunk, piece, layout, microbatches)
        seed = int(torch.randint(2**62, ())) if self.mesh.rank == ranks[0] else 0
        packed = swap(self.group, ranks, self.mesh.rank, [seed, *_pack(key, chunk, piece, layout, sums)])
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
                headers[rank] = [_unpack(values)]
            names = [where] * (key.hook + 1)
            (self._assemblies[told],) = assemble(headers, self.mesh.coordinates, names)
        scale = self.mesh.sizes.dp * microbatches
        devices = [piece.device] if piece.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            yield ShardGroup(self.group, self.mesh.rank, ranks, self._assemblies[told], scale)

    def share(self, module: nn.Module) -> None:
        """Give every rank the weights and buffers that rank 0 has of a module. Collective."""
        if self.alone:
            return
        with torch.no_grad():
            for tensor in [*module.parameters(), *module.buffers()]:
                if self.mesh.rank == 0:
                    transfer(self.group, [(rank, tensor) for rank in range(1, len(self.mesh.ranks))], [])
                else:
                    received = torch.empty_like(tensor, memory_format=torch.contiguous_format)
                    transfer(self.group, [], [(0, received)])
                    tensor.copy_(received)

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the mean of a tensor over the data-parallel ranks. Collective on them."""
        here = self.mesh.here
        ranks = [rank for rank, at in enumerate(self.mesh.coordinates) if (at.pp, at.tp) == (here.pp, here.tp)]
        if len(ranks) == 1:
            return tensor
        found = {rank: torch.empty_like(tensor) for rank in ranks if rank != self.mesh.rank}
        transfer(self.group, [(rank, tensor) for rank in found], list(found.items()))
        found[self.mesh.rank] = tensor
        return torch.stack([found[rank] for rank in ranks]).mean(dim=0)

    def gathered(self, value: Any) -> list[Any]:
        """Return what each rank gives, by group rank. Collective."""
        if self.alone:
            return [value]
        found: list[Any] = [None] * len(self.mesh.ranks)
        dist.all_gather_object(found, value, group=self.group)
        return found

    # Whole activations

    def exchange(
        self,
        pieces: Sequence[Piece],
        keepers: Sequence[int],
        names: Sequence[str],
        fired: Iterable[int] = (),
        microbatches: int = 1,
    ) -> tuple[dict[Key, torch.Tensor], set[int]]:
        """Put activations together on the ranks that keep them; each piece goes only where it is needed. Collective.

        Parameters
        ----------
        names
            Of the hooks by number, for errors.
        fired
            Numbers of the hooks that fired on this rank.

        Returns
        -------
        whole
            The whole tensors, in the order of their keys; empty on ranks that are no keepers.
        fired
            Numbers of the hooks that fired on any rank.

        Raises
        ------
        LayoutError
            On every rank alike, before anything is sent.
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
        told = self.gathered((own, sorted(fired)))
        whole: dict[Key, torch.Tensor] = {}
        headers = [headers for headers, _ in told]
        gradients = {header.key for held in headers for header in held if header.layout.gradient}
        for assembly in assemble(headers, self.mesh.coordinates, names):
            collected = self._collect(assembly, pieces, keepers, assembly.key in gradients)
            if collected is not None:
                whole[assembly.key] = collected
        return whole, {number for _, numbers in told for number in numbers}

    def _collect(
        self, assembly: Assembly, pieces: Sequence[Piece], keepers: Sequence[int], gradient: bool
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
        transfer(self.group, sends, receives)
        if here not in keepers:
            return None
        if len(buffers) == 1:
            return buffers[0][1]
        return join(assembly.shape, buffers, added=gradient and assembly.addends != assembly.parts)

    def _device(self, pieces: Sequence[Piece]) -> torch.device:
        if pieces:
            return pieces[0].tensor.device
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")

    def _sums(
        self, use: str, key: Key, chunk: int, tensor: torch.Tensor, layout: Layout, microbatches: int
    ) -> tuple[float, float] | None:
        """Return checksums the first time that copies of an activation could differ, else None."""
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
        self.mesh = arrange(everyone, sizes)[dist.get_rank()]
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
    """Return the timeout of a process group, so that one made beside it is no more patient."""
    for device in ("cpu", "cuda"):
        try:
            return group._get_backend(torch.device(device)).options._timeout
        except (RuntimeError, AttributeError):
            continue
    return None


def _guess_rows(shape: tuple[int, ...], extent: Extent) -> int | None:
    """Return the dim of rows by its size, where the twin could not tell."""
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
            remedy="leave expected_shape out: whole shapes are found by themselves",
        )


def _pack(key: Key, chunk: int, piece: torch.Tensor, layout: Layout, sums: tuple[float, float] | None) -> list[int]:
    if piece.ndim > MAX_DIMS:
        raise LayoutError(
            "an activation has too many dims to edit", expected=f"{MAX_DIMS} at most", found=str(piece.ndim)
        )
    padding = [0] * (MAX_DIMS - piece.ndim)
    bits = struct.unpack("2q", struct.pack("2d", *sums)) if sums else (0, 0)
    return [
        *(key.hook, key.call, chunk, piece.ndim),
        *(*piece.shape, *padding, *layout.shape, *padding),
        -1 if layout.sharded is None else layout.sharded,
        -1 if layout.rows is None else layout.rows,
        _DTYPES.index(piece.dtype) if piece.dtype in _DTYPES else -1,
        *(int(sums is not None), *bits),
    ]


def _unpack(values: Sequence[int]) -> Header:
    hook, call, _, ndim, *rest = values
    shape, whole = tuple(rest[:ndim]), tuple(rest[MAX_DIMS : MAX_DIMS + ndim])
    sharded, rows, dtype, summed, first, second = rest[2 * MAX_DIMS :]
    layout = Layout(whole, None if sharded < 0 else sharded, None if rows < 0 else rows)
    sums = struct.unpack("2d", struct.pack("2q", first, second)) if summed else None
    return Header(Key(hook, call), 0, shape, str(_DTYPES[dtype]), layout, sums)


_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.complex64)

"""Read a site once for all statistics: one task for each shard, and states merged in a tree of fixed order."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, cast

import numpy as np
import xarray as xr
import zarr

from analysis.dataset.aligned_store import AlignedStore
from analysis.dataset.layer_choice import choose_layers
from analysis.dataset.store_argument import accept_store_path
from analysis.statistics.onepass.row_block import RowBlock
from analysis.statistics.onepass.scheduler import choose_scheduler
from analysis.statistics.onepass.statistic import State, Statistic
from flexcache.errors import AnalysisError, nearest
from flexcache.site import Layers
from flexcache.store.format.reference import StoreReference
from flexcache.store.read.shard_reader import RowReader
from flexcache.store.read.store import Store
from flexcache.store.storage.backend import storage_of

BLOCK_BYTES = 8 << 20
"""Bytes of a block as float64."""
SCAN_SHARE = 0.5
"""Share of sampled rows in a shard above which reading the whole shard is faster."""
COORDINATES = ("position", "token_id", "document")

States = dict[str, State]


@dataclass(frozen=True)
class PassResult:
    """Result of one read of a site: a state for every layer and statistic.

    ::

        found = onepass.read(store, "resid_post", {"moments": Moments(), "pca": PCA()})
        found["moments"], found.merged("pca")

    Attributes
    ----------
    site : str
    layers : tuple of int, or (None,)
    statistics : dict of Statistic
        Statistics by the names of their results.
    states : dict
        ``states[layer][name]``.
    rows : int
        Number of rows read of each layer.
    """

    site: str
    layers: tuple[int | None, ...]
    statistics: Mapping[str, Statistic]
    states: dict[int | None, States] = field(repr=False)
    rows: int

    def __getitem__(self, name: str) -> xr.Dataset:
        """Return the results of a statistic with a leading dim ``layer``, which is -1 for a site without layers."""
        statistic = self.statistics[name]
        found = [statistic.result(self.states[layer][name]) for layer in self.layers]
        index = xr.IndexVariable("layer", np.array([-1 if layer is None else layer for layer in self.layers]))
        return xr.concat(found, index, data_vars="all", coords="minimal", compat="override", join="outer")

    def merged(self, name: str) -> xr.Dataset:
        """Return the results over the rows of all layers together."""
        statistic = self.statistics[name]
        total = self.states[self.layers[0]][name]
        for layer in self.layers[1:]:
            total = statistic.merge(total, self.states[layer][name])
        return statistic.result(total)


@accept_store_path
def read(
    store: Store,
    site: str,
    statistics: Mapping[str, Statistic],
    *,
    layers: Layers = "all",
    other: AlignedStore | None = None,
    scheduler: str | Any = "threads",
    workers: int | None = None,
    progress: bool = True,
) -> PassResult:
    """Read every committed row of some layers once, for all statistics.

    ::

        from analysis import moments, onepass, quantiles

        statistics = {"moments": moments.Moments(), "quantiles": quantiles.Histogram()}
        onepass.read(store, "resid_post", statistics, layers=[0, 12])["quantiles"]

    Each shard is one Dask task, which reads it in large blocks (no memory map: a Dask worker would count mapped pages
    as its own memory). If all statistics sample documents, only rows of sampled documents are read. Results are equal
    to the bit for any scheduler and number of workers.

    Parameters
    ----------
    other
        A store with the same rows, whose values are read too, as `RowBlock.other`; rows that it has not committed are
        left out. It is read through a memory map if its rows are in another order.
    scheduler
        ``"threads"``; ``"synchronous"``; ``"processes"``, a cluster of worker processes on this machine; the address
        of a scheduler, ``"tcp://…"``, whose workers can open the store by the same path; or a `distributed.Client`.
    workers
        Number of threads or processes; the number of cores by default.
    progress
        Show a progress bar on a terminal.

    Raises
    ------
    AnalysisError
        The store does not have the site or layer, or no committed row; or the states would not fit into memory.
    """
    if site not in store.sites:
        raise AnalysisError(f"the store has no site {site!r}", remedy=nearest(site, tuple(store.sites)))
    chosen = choose_layers(store, site, layers)
    units = store.committed_units.tolist()
    if not units:
        raise AnalysisError("the store has no committed row", where=str(store.path), remedy="complete the capture")
    runner = choose_scheduler(scheduler, workers)
    features = store.arrays[site].features
    _check_memory(statistics, features, len(chosen), len(units), runner.workers)
    run = uuid.uuid4().hex[:12]  # keeps runs on one cluster apart
    job = Job(store, site, dict(statistics), other)
    graph: dict[Any, Any] = {f"job-{run}": job}
    roots = []
    recomputed = store.attached and store.attached.virtual.get(site)
    if recomputed:  # all layers of a unit together, so that the model walks up its blocks once
        graph |= {(f"unit-{run}", unit): (read_unit, f"job-{run}", chosen, unit) for unit in units}
    for layer in chosen:
        keys: list[Any] = []
        for unit in units:
            keys.append((f"shard-{run}", -1 if layer is None else layer, unit))
            graph[keys[-1]] = (
                (read_shard, f"job-{run}", layer, unit)
                if not recomputed
                else (_states_of, (f"unit-{run}", unit), layer)
            )
        roots.append(_tree(graph, keys, run))
    found = runner.run_graph(graph, roots, f"reading {site}", len(chosen) * len(units), progress)
    states = dict(zip(chosen, cast("list[States]", found)))
    rows = sum(min(store.shard_rows, store.n_rows - unit * store.shard_rows) for unit in units)
    return PassResult(site, chosen, dict(statistics), states, rows)


@dataclass(frozen=True, eq=False)
class Job:
    """Parameters that all tasks share."""

    store: Store
    site: str
    statistics: dict[str, Statistic]
    other: AlignedStore | None = None


def read_shard(job: Job, layer: int | None, unit: int) -> States:
    """Return the states of all statistics for the rows of one shard."""
    store = job.store
    features = store.arrays[job.site].features
    states = {name: statistic.zero(features) for name, statistic in job.statistics.items()}
    for block in blocks(store, job.site, layer, unit, list(job.statistics.values())):
        if job.other is not None:
            block = _with_other(block, job.other, job.site, layer)
        parts: dict[Any, RowBlock] = {None: block}
        for name, statistic in job.statistics.items():
            sample = statistic.sample
            if sample not in parts:
                parts[sample] = block.select_rows(np.flatnonzero(cast("Any", sample)(block.document, block.position)))
            if len(parts[sample]):
                states[name] = statistic.update(states[name], parts[sample])
    return states


def read_unit(job: Job, layers: tuple[int | None, ...], unit: int) -> dict[int | None, States]:
    """Return the states of all statistics for the rows of each layer of a unit."""
    rows = range(*slice(unit * job.store.shard_rows, (unit + 1) * job.store.shard_rows).indices(job.store.n_rows))
    found = {}
    for number, layer in enumerate(layers):
        job.store.prefetch(job.site, [one for one in layers[number:] if one is not None], rows)
        found[layer] = read_shard(job, layer, unit)
    return found


def _states_of(states: dict[int | None, States], layer: int | None) -> States:
    return states[layer]


def _with_other(block: RowBlock, other: AlignedStore, site: str, layer: int | None) -> RowBlock:
    """Return the rows of a block that another store has committed, with its values."""
    rows = other.find_rows(block.rows)
    known = rows >= 0
    if not known.all():
        block, rows = block.select_rows(known), rows[known]
    reader = other.values.reader(site)
    if len(rows) and (np.diff(rows) == 1).all():
        block.other = reader.scan(layer, int(rows[0]), int(rows[-1]) + 1, _as_stored(reader))
    else:
        block.other = reader.gather(layer, rows, _as_stored(reader))
    return block


def _as_stored(reader: RowReader) -> bool:
    """Return False for int8, whose values mean nothing without their scales, so that float32 is read."""
    return reader.array.dtype != "int8"


def merge_states(job: Job, first: States, second: States) -> States:
    """Return the states of all statistics for the rows of both."""
    return {name: statistic.merge(first[name], second[name]) for name, statistic in job.statistics.items()}


def blocks(
    store: Store, site: str, layer: int | None, unit: int, statistics: list[Statistic] | None = None
) -> Iterator[RowBlock]:
    """Yield the rows of a shard in order, in blocks; only rows of sampled documents if all statistics sample."""
    reader = store.reader(site)
    raw = _as_stored(reader)
    held = reader.layout.rows(unit)
    about = unit_coordinates(store.reference, held.start, held.stop)
    step = max(1, BLOCK_BYTES // (8 * reader.array.features))
    samples = [statistic.sample for statistic in statistics or ()]
    wanted: np.ndarray | None = None
    if samples and all(sample is not None for sample in samples):
        wanted = np.logical_or.reduce(
            [sample(about["document"], about["position"]) for sample in set(samples) if sample is not None]
        )
        if wanted.mean() > SCAN_SHARE:
            wanted = None
    if wanted is not None:
        chosen = np.flatnonzero(wanted)
        for start in range(0, len(chosen), step):
            local = chosen[start : start + step]
            values = reader.gather(layer, held.start + local, raw)
            yield RowBlock(values, held.start + local, *(about[name][local] for name in COORDINATES))
        return
    buffer = np.empty((min(step, len(held)), reader.array.features), reader.dtype if raw else np.float32)
    for start in range(held.start, held.stop, step):
        stop = min(start + step, held.stop)
        values = reader.scan(layer, start, stop, raw, buffer)
        place = slice(start - held.start, stop - held.start)
        yield RowBlock(values, np.arange(start, stop), *(about[name][place] for name in COORDINATES))


@lru_cache(maxsize=8)
def unit_coordinates(reference: StoreReference, start: int, stop: int) -> dict[str, np.ndarray]:
    """Return position, token id and document of the rows of a unit, which all layers share."""
    return {
        name: np.asarray(zarr.open_array(storage_of(reference.path / name).zarr_store(), mode="r")[start:stop])
        for name in COORDINATES
    }


def _tree(graph: dict[Any, Any], keys: list[Any], run: str) -> Any:
    """Add the merges of *keys* to the graph, neighbours first, and return the key of the last merge."""
    level = 0
    while len(keys) > 1:
        level += 1
        above = []
        for i in range(0, len(keys) - 1, 2):
            key = (f"merge-{run}", keys[i][1], level, i)
            graph[key] = (merge_states, f"job-{run}", keys[i], keys[i + 1])
            above.append(key)
        keys = above + ([keys[-1]] if len(keys) % 2 else [])
    return keys[0]


def _check_memory(statistics: Mapping[str, Statistic], features: int, layers: int, units: int, workers: int) -> None:
    sizes = {name: statistic.state_bytes(features) for name, statistic in statistics.items()}
    alive = layers + workers * (1 + max(1, units).bit_length())
    needed, memory = alive * sum(sizes.values()), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > 0.8 * memory:
        worst = max(sizes, key=lambda name: sizes[name])
        raise AnalysisError(
            "the statistics would not fit into memory",
            expected=f"at most {0.8 * memory / 2**30:.1f} GiB",
            found=f"{needed / 2**30:.1f} GiB for {layers} layers, most of it {worst}",
            remedy="compute fewer layers, groups or statistics at a time",
        )

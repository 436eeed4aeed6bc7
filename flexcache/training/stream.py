"""Make a training stream of the rows of one or several stores."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from flexcache.errors import ConfigError, StoreError, UncommittedError
from flexcache.site import Layers, plain_layers
from flexcache.spec import dtype_name, is_whole, listed
from flexcache.store.read.row_alignment import matching_rows
from flexcache.store.read.selection import layer_number, row_numbers, select
from flexcache.store.read.store import Store
from flexcache.store.storage.location import is_location
from flexcache.training.normalization import Normalize
from flexcache.training.order import Ints, Order
from flexcache.training.pools import ArraySource
from flexcache.training.reader_options import ReaderOptions
from flexcache.training.row_stream import Stream, StreamBatch


def stream(
    store: Store | str | os.PathLike | Mapping[str, Store | str | os.PathLike],
    site: str | Sequence[str],
    layer: int | None = None,
    *,
    layers: Layers | None = None,
    batch_size: int = 4096,
    seed: int = 0,
    rows: ArrayLike | None = None,
    normalize: Normalize = "none",
    dtype: Any = None,
    transform: Callable[[StreamBatch], StreamBatch] | None = None,
    return_tokens: bool = False,
    drop_last: bool = False,
    **reading: Any,
) -> Stream:
    """Return the committed rows of a store as a stream of shuffled batches.

    ::

        store = flexcache.open("run.zarr")
        for batch in flexcache.training.stream(store, "resid_post", layer=12, batch_size=4096):
            ...                                         # Tensor (4096, features)

    Rows are read in runs of *run_bytes*, in random order. A pool of runs is shuffled and given batch by batch while the
    next pool is read. The batches of all ranks together depend only on the rows, *seed*, the epoch and their size: one
    rank with batches of 64 trains on the same rows at each step as two ranks with batches of 32, whatever the number of
    workers.

    Parameters
    ----------
    store
        A store or its path; or a dict of several by name, over the same documents. Their rows are joined by document id
        and position; rows that are not in all stores are left out.
    site, layer, layers
        One site and layer give tensors (batch, features). *layers* give (batch, layers, features): numbers in any
        order, or text such as ``"all"``, ``"0,8"`` or ``"8:24"``. Several sites, or stores, give dicts of tensors by
        name.
    batch_size
        Rows of a batch of one rank; the last batch of an epoch may be smaller, unless *drop_last*.
    rows
        Row numbers, each once, or a boolean mask of all rows; every committed row by default.
    normalize
        ``"center"`` subtracts the mean. ``"standard"`` also divides by the standard deviation of each feature.
        ``"unit_norm"`` scales rows so that their mean squared norm is the number of features. Mean and scale are
        estimated from some runs; see `Stream.mean` and `Stream.scale`.
    dtype
        A floating-point dtype of torch or numpy, or its name; by default the stored one, or float32 if normalised.
    transform
        Function that is applied to each batch.
    return_tokens
        Give dicts with ``activations``, and ``row``, ``token_id``, ``position`` and ``document`` of each row.
    reading
        Fields of `flexcache.training.reader_options.ReaderOptions`: pool_bytes, run_bytes, keep_cache, threads, rank,
        ranks.

    Raises
    ------
    SiteError
        A store does not have the site or layer.
    UncommittedError
        *rows* names rows that are not committed.
    ConfigError, StoreError
        An argument is unknown or cannot be used; a row or layer is given twice, or none is given; the stores have no
        row in common; *drop_last* is set and no rank has a whole batch.
    """
    named = {"": store} if isinstance(store, Store) or is_location(store) else store  # a store is a mapping as well
    options = ReaderOptions.from_keywords(reading, stream)
    if not is_whole(batch_size) or batch_size < 1:
        raise ConfigError("batch_size is a whole number of at least 1", found=repr(batch_size))
    if not is_whole(seed) or seed < 0:
        raise ConfigError("seed is a whole number of at least 0", found=repr(seed))
    given = [*named.values()] if isinstance(named, Mapping) else []
    if not given or not all(isinstance(one, Store) or is_location(one) for one in given):
        raise ConfigError(
            "that is no store", expected="a store, its path, or a dict of these by name", found=repr(store)
        )
    stores = {name: one if isinstance(one, Store) else Store(one) for name, one in named.items()}
    if transform is not None and not callable(transform):
        raise ConfigError("transform is a function of a batch", found=repr(transform))
    if layers is not None and layer is not None:
        raise ConfigError("layer and layers are both given", remedy="leave one of them out")
    if normalize not in ("none", "center", "unit_norm", "standard"):
        raise ConfigError(f"there is no normalisation {normalize!r}", expected="none, center, unit_norm or standard")
    first = next(iter(stores.values()))
    chosen = _row_numbers(first, rows)
    sources: dict[str, ArraySource] = {}
    sites = listed(site, str, "site")
    if not sites:
        raise ConfigError("no site is given", expected=f"one or several of {', '.join(first.sites)}", found=repr(site))
    for name, one in stores.items():
        match = None
        if one is not first:
            match = matching_rows(one, first)
            chosen = chosen[match[chosen] >= 0]
            there = np.isin(match[chosen] // one.shard_rows, one.committed_units)
            chosen = chosen[there]
        for at in sites:
            for number in [layer] if layers is None else _layer_numbers(one, at, layers):
                found = layer_number(one.reader(at).array, number, one.path)
                parts = [name] * bool(name) + [at] * (len(sites) > 1 or not name)
                parts += [str(found)] * (layers is not None)
                key = ".".join(parts)
                if key in sources:
                    raise ConfigError("a site or layer is given twice", found=key, remedy="give each once")
                sources[key] = ArraySource(one, at, found, match)
    if not len(chosen):
        raise StoreError("there are no rows to stream", where=str(first.path))
    options = options.with_group()
    ranks = options.ranks or 1
    if drop_last and len(chosen) < batch_size * ranks:  # else a loop over epochs would wait for a batch forever
        raise ConfigError(
            "an epoch has no whole batch, and smaller ones are dropped",
            where=str(first.path),
            expected=f"at least {batch_size * ranks:,} rows: batches of {batch_size:,} on {ranks} ranks",
            found=f"{len(chosen):,}",
            remedy="lower batch_size, or keep the last batch: drop_last=False",
        )
    width = sum(source.row_bytes for source in sources.values())
    order = Order(
        rows=chosen,
        unit_rows=first.shard_rows,
        run_rows=max(1, int(options.run_bytes) // width),
        pool_rows=max(1, int(options.pool_bytes) // width),
        batch_size=int(batch_size) * ranks,
        seed=int(seed),
    )
    if options.keep_cache is None:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        options = replace(options, keep_cache=len(chosen) * width < memory / 4)
    return Stream(
        sources,
        order,
        options,
        stacked=layers is not None and len(sites) == 1 and len(stores) == 1,
        normalize=normalize,
        dtype=_floating_dtype(dtype),
        transform=transform,
        return_tokens=return_tokens,
        drop_last=bool(drop_last),
    )


def _layer_numbers(store: Store, site: str, layers: Layers) -> list[int | None]:
    """Return the requested layers of a site, in the requested order."""
    asked = plain_layers(layers)
    if isinstance(asked, str):  # a range means the layers of it that the store has
        return [layer for array in select(store, site, asked) if array.name == site for layer in array.slices]
    if asked == []:
        raise ConfigError(
            "no layer is given", expected=f"some of {', '.join(map(str, store.layers(site)))}", found="[]"
        )
    return list(asked) if isinstance(asked, list) else [asked]


def _floating_dtype(dtype: Any) -> torch.dtype | None:
    if dtype is None:
        return None
    name = dtype_name(dtype)
    found = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(
            "dtype cannot be read",
            expected="a floating-point dtype of torch or numpy, or its name: bfloat16, float16, float32 or float64",
            found=repr(dtype),
        )
    return found


def _row_numbers(store: Store, rows: ArrayLike | None) -> Ints:
    if rows is None:
        return store.committed_rows
    try:
        given = row_numbers(rows, store.n_rows, store.path)
    except (IndexError, ValueError) as error:
        raise ConfigError(
            "rows cannot be read",
            where=str(store.path),
            expected=f"row numbers from 0 to {store.n_rows - 1}, or a boolean mask of {store.n_rows} entries",
            found=str(error),
        ) from None
    wanted = np.unique(given)
    if len(wanted) < len(given):
        raise ConfigError(
            "rows has a row more than once, and an epoch gives each row once",
            where=str(store.path),
            expected="row numbers, each once, or a boolean mask",
            found=f"{len(given):,} numbers of {len(wanted):,} rows",
            remedy="convert a mask of 0 and 1 with mask.astype(bool), and numbers with numpy.unique(rows)",
        )
    missing = wanted[~store.committed[wanted // store.shard_rows]]
    if len(missing):
        raise UncommittedError(
            f"{len(missing)} of the rows are not committed, the first is row {missing[0]}",
            where=str(store.path),
            remedy="complete the capture, or leave rows out to stream what is there",
        )
    return wanted

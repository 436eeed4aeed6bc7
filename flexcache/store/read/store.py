"""A store, opened for reading: sites by name, rows by number, documents and tokens as tables."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator, Mapping
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import xarray as xr

from flexcache.errors import SiteError, nearest
from flexcache.images.encoded import IMAGE
from flexcache.patches import Patches
from flexcache.plan import ranges
from flexcache.spec import ArraySpec
from flexcache.store.format.committed_units import CommittedUnits, shared_units
from flexcache.store.format.int8 import is_scale, scale_name
from flexcache.store.format.metadata import StoreMetadata, parse_metadata
from flexcache.store.format.reference import StoreReference, refer
from flexcache.store.format.schema import COORDINATES, DOCUMENTS, SEQUENCES, read_attributes
from flexcache.store.read import display
from flexcache.store.read.coordinates import coordinate_variable
from flexcache.store.read.object_reader import reader_class
from flexcache.store.read.parquet import open_table, read_first_lines, read_store_table
from flexcache.store.read.replayable import Replayable, replayable
from flexcache.store.read.row_images import read_image, read_patches
from flexcache.store.read.row_labels import label_names, row_labels
from flexcache.store.read.selection import document_numbers, layer_number, row_numbers, select_positions
from flexcache.store.read.shard_reader import RowReader
from flexcache.store.read.xarray_arrays import data_array
from flexcache.store.storage.location import Place, place


class Store(Mapping[str, xr.DataArray]):
    """A store of activations, read-only: a mapping from site to a lazy float32 DataArray.

    Opening reads metadata and the names of the ledger's records, and executes nothing of the store. What is not
    in the ledger does not exist: reading it raises UncommittedError. A store may be open while others write to
    it; `refresh` looks for units committed since. Any number of threads may read.

    Stores, and the arrays made from them, pickle as a location and a description, without files or tables. An unpickled
    store has the rows and sites of the original, even if the store on disk was extended meanwhile, and at least the
    units that were committed. It opens files when it first reads them, once in each process.

    Attributes
    ----------
    provenance : dict
        Model, tokenizer, corpus and versions that the store was made with.
    Raises
    ------
    StoreError
        The path is no store; VersionError, DamagedError where that is known better.
    """

    def __init__(self, path: str | os.PathLike | Place) -> None:
        found = place(path)
        said = parse_metadata(read_attributes(found), str(found / "zarr.json"))
        self._open(found, said, CommittedUnits(found, int(said.plan["units"])))
        self.refresh()

    def _open(self, path: Place, said: StoreMetadata, units: CommittedUnits) -> None:
        self.path, self._units = path, units
        self.arrays, self.spec, self.plan, self.provenance = said.arrays, said.spec, said.plan, said.provenance
        self.n_rows = int(self.plan["rows"])
        self.n_units = int(self.plan["units"])
        self.shard_rows = int(self.plan["shard_rows"])
        self.compressed = self.spec.get("compression", "none") != "none"
        self.ledger = units.ledger
        self._readers: dict[str, RowReader] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        said = StoreMetadata(self.arrays, self.spec, self.plan, self.provenance)
        return shared_store, (type(self), self.reference, pickle.dumps(said))

    @cached_property
    def reference(self) -> StoreReference:
        """Where the store is, and what tells it from another one at the same path."""
        return refer(self.path, self.provenance, self.plan, self.committed)

    # What is in it

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the arrays, as `store[name]` takes them."""
        return tuple(name for name in self.arrays if not is_scale(name, self.arrays))

    def layers(self, site: str) -> tuple[int, ...]:
        """Return the captured layers of a site; none for a module path."""
        return self._array(site).layers or ()

    @cached_property
    def documents(self) -> pa.Table:
        """The documents in row order: id, source_index, n_tokens, text, labels, row_start, n_rows."""
        return read_store_table(self.path, DOCUMENTS, self.n_rows)

    def head(self, count: int = 1) -> pa.Table:
        """Return the first *count* documents; reads no others."""
        return read_first_lines(self.path / DOCUMENTS, count)

    @cached_property
    def tokens(self) -> pa.Table:
        """The sequences in row order, with their token ids: document, unit, batch, start, tokens, keep_start, ….

        Those of images are without them, see `image`.
        """
        if not self.images:
            return read_store_table(self.path, SEQUENCES, self.n_rows)
        with open_table(self.path / SEQUENCES) as file:
            columns = [name for name in file.schema_arrow.names if name != IMAGE]
        return read_store_table(self.path, SEQUENCES, self.n_rows, columns)

    @property
    def images(self) -> bool:
        """Whether the documents are images; see `patches` and `image`."""
        return "patches" in self.provenance

    @cached_property
    def patches(self) -> Patches:
        """Which token of an image is which patch, where the documents are images.

        Raises
        ------
        StoreError
            They are not.
        """
        return read_patches(self.provenance, self.path)

    def image(self, document: Any) -> bytes:
        """Return the encoded image of a document, by id or number, as it was found; `flexcache.images.decode` opens it.

        Raises
        ------
        StoreError
            The documents are no images.
        """
        _ = self.patches
        row, *_ = self.rows(document=document)
        return read_image(self.path, row)

    @cached_property
    def coordinates(self) -> dict[str, xr.Variable]:
        """Token id, position and document of every row, read when used; -1 for token and position of a mean."""
        return {name: coordinate_variable(self.reference, name, np.dtype(dtype)) for name, dtype in COORDINATES.items()}

    @property
    def token_labels(self) -> tuple[str, ...]:
        """The names of the labels that single tokens have, as `token_label` takes them."""
        return label_names(self.tokens, self.spec)

    def token_label(self, name: str) -> pa.Array:
        """Return the label of each row's token, null where it has none.

        Raises
        ------
        StoreError
            The tokens have no such label, or rows are means.
        """
        return row_labels(self.tokens, self.spec, name, self.path)

    # How complete it is

    def refresh(self) -> None:
        """Look for units that were committed since the store was opened."""
        self._units.refresh()

    @property
    def committed(self) -> np.ndarray:
        """Which units were committed when last looked, bool of shape (units,); see `refresh`."""
        return self._units.mask

    @property
    def complete(self) -> bool:
        """Whether every unit is committed."""
        return bool(self.committed.all())

    @property
    def committed_units(self) -> np.ndarray:
        """Numbers of the committed units."""
        return np.flatnonzero(self.committed)

    @property
    def committed_rows(self) -> np.ndarray:
        """Numbers of the committed rows, sorted."""
        starts = self.committed_units * self.shard_rows
        return ranges(starts, np.minimum(self.shard_rows, self.n_rows - starts))

    @property
    def replayable(self) -> Replayable:
        """Whether `analysis.replay` can go on from its rows; false with the reasons where it cannot."""
        return replayable(self)

    # Reading

    def __getitem__(self, site: str) -> xr.DataArray:
        return data_array(self.reader(site), self.coordinates)

    def raw(self, site: str) -> xr.DataArray:
        """Return a site lazily in its stored dtype; numpy's reductions on bfloat16 fail or are wrong.

        Of an int8 site, these are whole numbers, to be multiplied by their row's scale: ``raw(site + ".scale")``.
        """
        return data_array(self.reader(site), self.coordinates, raw=True)

    def dataset(self, *, committed: bool = False) -> xr.Dataset:
        """Return all sites as one lazy float32 dataset; a layer that a site lacks is NaN there.

        Parameters
        ----------
        committed
            Keep only rows that are committed, instead of an error when one that is not is read.
        """
        rows = self.committed_rows if committed else None
        arrays = [data_array(self.reader(site), self.coordinates, rows=rows) for site in self.sites]
        return xr.merge(arrays, join="outer", compat="override", combine_attrs="drop").assign_attrs(
            store=str(self.path), model=str(self.provenance.get("model", {}).get("name", ""))
        )

    def read(self, site: str, layer: int | None = None, rows: Any = slice(None), *, raw: bool = False) -> np.ndarray:
        """Read rows of one layer into memory.

        Parameters
        ----------
        layer
            A captured layer, negative from the model's end; None for a module path.
        rows
            Row numbers in any order, with repeats if wanted, negative from the end; a slice; or a boolean mask
            of all rows.
        raw
            Return the stored dtype instead of float32.

        Returns
        -------
        ndarray of shape (rows, features)

        Raises
        ------
        SiteError
            The site or layer was not captured.
        UncommittedError
            A row has not been captured yet.
        IndexError
            A row number is out of range.
        ConfigError
            *rows* is text.
        """
        reader = self.reader(site)
        layer = layer_number(reader.array, layer, self.path)
        if isinstance(rows, slice):
            start, stop, step = rows.indices(self.n_rows)
            if step == 1:
                return reader.scan(layer, start, stop, raw)
            return reader.gather(layer, np.arange(start, stop, step), raw)
        return reader.gather(layer, row_numbers(rows, self.n_rows, self.path), raw)

    def scan(
        self, site: str, layer: int | None = None, *, raw: bool = False, block_bytes: int = 16 << 20
    ) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield all committed rows of one layer in order, a block at a time, each in the same buffer.

        A block is valid until the next one is asked for; it is read from the disk in large pieces, so this is the
        fastest way through more than memory holds. Blocks never straddle units.

        Parameters
        ----------
        block_bytes
            Size of the buffer.

        Yields
        ------
        rows, values : slice, ndarray of shape (rows, features)
        """
        reader = self.reader(site)
        layer = layer_number(reader.array, layer, self.path)
        dtype = reader.dtype if raw else np.dtype(np.float32)
        count = min(self.shard_rows, max(1, block_bytes // (reader.array.features * dtype.itemsize)))
        buffer = np.empty((count, reader.array.features), dtype)
        for unit in self.committed_units.tolist():
            held = reader.layout.rows(unit)
            for start in range(held.start, held.stop, count):
                stop = min(start + count, held.stop)
                yield slice(start, stop), reader.scan(layer, start, stop, raw, buffer)

    def rows(self, document: Any = None, position: int | slice | None = None) -> np.ndarray:
        """Return the numbers of the rows that belong to documents and positions, in row order of each document.

        Parameters
        ----------
        document
            An id, several ids, or integer indices into `documents`; None for all.
        position
            A token position within its document, negative from the document's end, or a slice of positions.
            Documents that keep no such position give no row.
        """
        chosen = document_numbers(document, self._extents, self.path)
        starts = self._extents.column("row_start").to_numpy()[chosen]
        counts = self._extents.column("n_rows").to_numpy()[chosen]
        found = ranges(starts, counts)
        if position is None:
            return found
        lengths = np.repeat(self._extents.column("n_tokens").to_numpy()[chosen].astype(np.int64), counts)
        at = np.asarray(self.coordinates["position"][found].values)
        return found[select_positions(at, position, lengths)]

    def reader(self, site: str) -> RowReader:
        """Return the row reader of a site, one per store."""
        if site not in self._readers:
            array = self._array(site)
            scales = self.reader(scale_name(site)) if array.dtype == "int8" else None
            kind = reader_class(self.path)
            reader = kind(self.reference, array, self.compressed, self._units, scales)
            _ = reader.foreign  # an array that zarr-python cannot open is an error now
            self._readers[site] = reader
        return self._readers[site]

    # Mapping and display

    def __iter__(self) -> Iterator[str]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __contains__(self, site: object) -> bool:
        return site in self.sites

    def __repr__(self) -> str:
        return display.text(self)

    def _repr_html_(self) -> str:
        return display.html(self)

    # Private

    def _array(self, site: str) -> ArraySpec:
        try:
            return self.arrays[site]
        except KeyError:
            raise SiteError(
                f"the store has no site {site!r}", where=str(self.path), remedy=nearest(str(site), self.sites)
            ) from None

    @cached_property
    def _extents(self) -> pa.Table:
        """The documents without texts and labels."""
        return read_store_table(self.path, DOCUMENTS, self.n_rows, ["id", "n_tokens", "row_start", "n_rows"])


@lru_cache(maxsize=8)
def shared_store(kind: type[Store], reference: StoreReference, said: bytes) -> Store:
    """Return the unpickled store, one object for all tasks of a process. Nothing is read yet."""
    store = kind.__new__(kind)
    store._open(reference.path, pickle.loads(said), shared_units(reference))
    store.__dict__["reference"] = reference
    return store

"""Open a store for reading: sites by name, rows by number, documents and tokens as tables."""

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
from flexcache.store.format.reference import StoreReference, make_reference
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
from flexcache.store.storage.location import StoreLocation, parse_location


class Store(Mapping[str, xr.DataArray]):
    """A store of activations, read-only: a mapping from site to a lazy float32 DataArray.

    ::

        store = flexcache.open("run.zarr")
        store["resid_post"].sel(layer=8)        # xarray.DataArray (token, hidden), lazy
        store.read("resid_post", 8, [0, 5])     # numpy array of shape (2, features)

    Opening reads the metadata and lists the ledger; it executes no code from the store. Rows of units without a ledger
    record cannot be read: UncommittedError is raised. Other processes may write to the store meanwhile; `refresh` finds
    the units that they have committed. Any number of threads may read.

    A store and the arrays made from it are pickled as location and metadata, without files or tables. An unpickled
    store has the rows and sites of the original, even if the store on disk was extended meanwhile, and at least the
    units that were committed. It opens files when it first reads them, once in each process.

    Attributes
    ----------
    provenance : dict
        Model, tokenizer, corpus and versions from which the store was created.

    Raises
    ------
    StoreError
        There is no store at *path*. VersionError if a newer version wrote it, DamagedError if its metadata is damaged.
    """

    def __init__(self, path: str | os.PathLike | StoreLocation) -> None:
        found = parse_location(path)
        metadata = parse_metadata(read_attributes(found), str(found / "zarr.json"))
        self._open(found, metadata, CommittedUnits(found, int(metadata.plan["units"])))
        self.refresh()

    def _open(self, path: StoreLocation, metadata: StoreMetadata, units: CommittedUnits) -> None:
        self.path, self._units = path, units
        self.arrays, self.spec = metadata.arrays, metadata.spec
        self.plan, self.provenance = metadata.plan, metadata.provenance
        self.n_rows = int(self.plan["rows"])
        self.n_units = int(self.plan["units"])
        self.shard_rows = int(self.plan["shard_rows"])
        self.compressed = self.spec.get("compression", "none") != "none"
        self.ledger = units.ledger
        self._readers: dict[str, RowReader] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        metadata = StoreMetadata(self.arrays, self.spec, self.plan, self.provenance)
        return shared_store, (type(self), self.reference, pickle.dumps(metadata))

    @cached_property
    def reference(self) -> StoreReference:
        """Location of the store, with an identity that tells it from another store at the same path."""
        return make_reference(self.path, self.provenance, self.plan, self.committed)

    # Contents

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites, the keys of the mapping."""
        return tuple(name for name in self.arrays if not is_scale(name, self.arrays))

    def layers(self, site: str) -> tuple[int, ...]:
        """Return the captured layers of a site; empty for a module path.

        ::

            store.layers("resid_post")              # (0, 8, 16)
        """
        return self._array(site).layers or ()

    @cached_property
    def documents(self) -> pa.Table:
        """The documents in row order: id, source_index, n_tokens, text, labels, row_start, n_rows.

        ::

            store.documents.to_pandas()
        """
        return read_store_table(self.path, DOCUMENTS, self.n_rows)

    def head(self, count: int = 1) -> pa.Table:
        """Return the first *count* documents without reading the others.

        ::

            store.head(5).to_pylist()
        """
        return read_first_lines(self.path / DOCUMENTS, count)

    @cached_property
    def tokens(self) -> pa.Table:
        """The sequences in row order with their token ids: document, unit, batch, start, tokens, keep_start, ….

        ::

            store.tokens["tokens"][0].as_py()       # token ids of the first sequence

        Sequences of images come without the images, see `image`.
        """
        if not self.images:
            return read_store_table(self.path, SEQUENCES, self.n_rows)
        with open_table(self.path / SEQUENCES) as file:
            columns = [name for name in file.schema_arrow.names if name != IMAGE]
        return read_store_table(self.path, SEQUENCES, self.n_rows, columns)

    @property
    def images(self) -> bool:
        """True if the documents are images; see `patches` and `image`."""
        return "patches" in self.provenance

    @cached_property
    def patches(self) -> Patches:
        """Layout of the tokens of an image.

        Raises
        ------
        StoreError
            The documents are not images.
        """
        return read_patches(self.provenance, self.path)

    def image(self, document: Any) -> bytes:
        """Return the encoded image of a document, given by id or number, unchanged.

        ::

            flexcache.images.decode_image(store.image("cat-7"))

        Raises
        ------
        StoreError
            The documents are not images, or there is no such document.
        """
        _ = self.patches
        row, *_ = self.rows(document=document)
        return read_image(self.path, row)

    @cached_property
    def coordinates(self) -> dict[str, xr.Variable]:
        """Token id, position and document of each row, read when used; -1 for token and position of a mean.

        ::

            store.coordinates["token_id"].values    # int32 array of shape (rows,)
        """
        return {name: coordinate_variable(self.reference, name, np.dtype(dtype)) for name, dtype in COORDINATES.items()}

    @property
    def token_labels(self) -> tuple[str, ...]:
        """Names of the labels of single tokens, see `token_label`."""
        return label_names(self.tokens, self.spec)

    def token_label(self, name: str) -> pa.Array:
        """Return the label of the token of each row, null for a token without one.

        ::

            store.token_label("part_of_speech")     # pyarrow array of length n_rows

        Raises
        ------
        StoreError
            The tokens have no such label, or rows are means over tokens.
        """
        return row_labels(self.tokens, self.spec, name, self.path)

    # Progress

    def refresh(self) -> None:
        """List the ledger again, to find units that other processes have committed.

        ::

            store.refresh()
            store.complete
        """
        self._units.refresh()

    @property
    def committed(self) -> np.ndarray:
        """Mask of the committed units as of the last `refresh`, bool of shape (units,)."""
        return self._units.mask

    @property
    def complete(self) -> bool:
        """True if all units are committed."""
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
        """True if `analysis.replay` can run the model from the stored rows; otherwise false, with the reasons."""
        return replayable(self)

    # Reading

    def __getitem__(self, site: str) -> xr.DataArray:
        return data_array(self.reader(site), self.coordinates)

    def raw(self, site: str) -> xr.DataArray:
        """Return a lazy array of a site in its stored dtype. Reductions of numpy fail or are wrong on bfloat16.

        ::

            store.raw("resid_post").dtype           # bfloat16

        Rows of an int8 site are whole numbers; multiply each by its scale, ``raw(site + ".scale")``.
        """
        return data_array(self.reader(site), self.coordinates, raw=True)

    def dataset(self, *, committed: bool = False) -> xr.Dataset:
        """Return all sites as one lazy float32 dataset; layers that a site lacks are NaN.

        ::

            store.dataset(committed=True).sel(layer=8).mean("token").compute()

        Parameters
        ----------
        committed
            Keep only committed rows. By default, reading an uncommitted row raises UncommittedError.
        """
        rows = self.committed_rows if committed else None
        arrays = [data_array(self.reader(site), self.coordinates, rows=rows) for site in self.sites]
        return xr.merge(arrays, join="outer", compat="override", combine_attrs="drop").assign_attrs(
            store=str(self.path), model=str(self.provenance.get("model", {}).get("name", ""))
        )

    def read(self, site: str, layer: int | None = None, rows: Any = slice(None), *, raw: bool = False) -> np.ndarray:
        """Read rows of one layer into memory.

        ::

            store.read("resid_post", layer=-1, rows=store.rows(position=-1))

        Parameters
        ----------
        layer
            A captured layer, negative from the end of the model; None for a module path.
        rows
            Row numbers in any order, repeats allowed, negative from the end; a slice; or a boolean mask of all rows.
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
        """Yield all committed rows of one layer in order, in blocks that share one buffer.

        ::

            for rows, values in store.scan("resid_post", 8):
                total += values.sum(0)

        A block is valid until the next one is requested. Files are read in large pieces, so this is the fastest way to
        read more than fits into memory. A block never spans two units.

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
        """Return the row numbers of documents and positions, document by document.

        ::

            store.rows("doc-3", slice(0, 10))       # first ten tokens of a document
            store.rows(position=-1)                 # last token of each document

        Parameters
        ----------
        document
            An id, several ids, or integer indices into `documents`; None for all.
        position
            A token position within its document, negative from the end of the document, or a slice of positions.
            A document without a stored row at the position contributes none.
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
        """Return the row reader of a site; there is one per store and site.

        ::

            store.reader("resid_post").gather(8, numpy.array([5, 3]), raw=True)
        """
        if site not in self._readers:
            array = self._array(site)
            scales = self.reader(scale_name(site)) if array.dtype == "int8" else None
            kind = reader_class(self.path)
            reader = kind(self.reference, array, self.compressed, self._units, scales)
            _ = reader.foreign  # raise the error now if zarr-python cannot open the array
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
def shared_store(kind: type[Store], reference: StoreReference, metadata: bytes) -> Store:
    """Return an unpickled store, one object for all tasks of a process. Nothing is read yet."""
    store = kind.__new__(kind)
    store._open(reference.path, pickle.loads(metadata), shared_units(reference))
    store.__dict__["reference"] = reference
    return store

"""Open a store for reading: sites by name, rows by number, documents and tokens as tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from flexcache.site import Layers
from flexcache.store.format.int8 import scale_name
from flexcache.store.format.label_table import LabelTable
from flexcache.store.read import display
from flexcache.store.read.object_reader import reader_class
from flexcache.store.read.open_store import OpenStore
from flexcache.store.read.replayable import Replayable, replayable
from flexcache.store.read.selection import layer_number, row_numbers, virtual_error
from flexcache.store.read.shard_reader import RowReader
from flexcache.store.read.xarray_arrays import data_array

if TYPE_CHECKING:
    from flexcache.virtual.plan import ReadPlan


class Store(OpenStore, Mapping[str, xr.DataArray]):
    """A store of activations, which are never changed: a mapping from site to a lazy float32 DataArray.

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
    spec : CaptureSpec
        What was captured: sites, rows, dtype, ….
    provenance : Provenance
        Model, tokenizer, corpus and versions from which the store was created.

    Raises
    ------
    StoreError
        There is no store at *path*. VersionError if a newer version wrote it, DamagedError if its metadata is damaged.
    """

    @property
    def replayable(self) -> Replayable:
        """True if `analysis.replay` can run the model from the stored rows; otherwise false, with the reasons."""
        return replayable(self)

    # Reading

    def __getitem__(self, site: str) -> xr.DataArray:
        return data_array(self._readable(site), self.coordinates)

    def raw(self, site: str) -> xr.DataArray:
        """Return a lazy array of a site in its stored dtype. Reductions of numpy fail or are wrong on bfloat16.

        ::

            store.raw("resid_post").dtype           # bfloat16

        Rows of an int8 site are whole numbers: multiply each by its scale, the first value of
        ``raw(site + ".scale")``; -128 stands for the next of the values after it.
        """
        return data_array(self._readable(site), self.coordinates, raw=True)

    def dataset(self, *, committed: bool = False) -> xr.Dataset:
        """Return all sites as one lazy float32 dataset; layers that a site lacks are NaN, and virtual ones, too.

        ::

            store.dataset(committed=True).sel(layer=8).mean("token").compute()

        Parameters
        ----------
        committed
            Keep only committed rows. By default, reading an uncommitted row raises UncommittedError.
        """
        rows = self.committed_rows if committed else None
        arrays = [
            data_array(self.reader(site), self.coordinates, rows=rows)
            for site in self.sites
            if self.arrays[site].slices
        ]
        return xr.merge(arrays, join="outer", compat="override", combine_attrs="drop").assign_attrs(
            store=str(self.path), model=self.provenance.model_name
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
            The site or layer was not captured, or the layer is virtual and no model is attached.
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
            return reader.read_slice(layer, rows, raw)
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

    def reader(self, site: str) -> RowReader:
        """Return the row reader of a site; there is one per store and site.

        ::

            store.reader("resid_post").gather(8, numpy.array([5, 3]), raw=True)
        """
        if site not in self._readers:
            array = self._array(site) if self.attached is None else self.attached.stored_arrays[self._array(site).name]
            scales = self.reader(scale_name(site)) if array.dtype == "int8" else None
            kind = reader_class(self.path)
            reader = kind(self.reference, array, self.compressed, self._units, scales)
            _ = reader.foreign  # raise the error now if zarr-python cannot open the array
            self._readers[site] = reader if self.attached is None else self.attached.reader(reader)
        return self._readers[site]

    def explain(
        self, site: str | Sequence[str] | None = None, layers: Layers = "all", rows: Any = slice(None)
    ) -> ReadPlan:
        """Return how rows of some sites and layers would be read: from disk, or by which blocks of the model.

        ::

            print(store.explain("resid_post", "8:24", store.rows(position=-1)))

        Nothing is computed, and no model is needed.

        Parameters
        ----------
        site, layers
            As for `flexcache.store.select`, virtual layers among them.
        rows
            As for `read`.
        """
        from flexcache.virtual.explain import explain

        return explain(self, site, layers, rows)

    def prefetch(self, site: str, layers: Layers = "all", rows: Any = None) -> None:
        """Recompute virtual layers that are read next in one walk, see `flexcache.virtual.Attachment.prefetch`.

        ::

            store.prefetch("resid_post", [1, 2, 3])

        Nothing is done if no model is attached.
        """
        if self.attached is not None:
            self.attached.prefetch(site, layers, rows)

    def set_attached(self, attached: Any) -> None:
        """Take the model that recomputes virtual layers, or None; `flexcache.attach` and `detach` call it."""
        self.arrays = self.attached.stored_arrays if attached is None else attached.arrays
        self.attached = attached
        self._readers.clear()

    # Labels

    def join(
        self,
        table: Any,
        on: str = "id",
        *,
        name: str | None = None,
        columns: str | Sequence[str] | None = None,
        token_labels: str | Sequence[str] = (),
        tokenizer: Any = None,
        replace: bool = False,
    ) -> LabelTable:
        """Join a table of labels to the documents; they can then be used as labels that were captured.

        ::

            print(store.join("sentiment.csv", on="id"))
            probes.sweep(store, "sentiment", "resid_post")

        The labels become columns of `documents`, or `token_label` of tokens. They lie in a file of the store of their
        own; no other file changes. Documents without a line in the table, and those that `flexcache.extend` adds later,
        have null; lines for unknown documents are left out. Both are counted in the result.

        Parameters
        ----------
        table
            A Parquet, JSON Lines or CSV file; a DataFrame, Arrow table or dataset; dicts, or a dict of columns.
        on
            Column of the table with one line for each value, and of the documents: ``id``, or another column of text or
            whole numbers, whose label then applies to all documents with the value.
        name
            Name of the label table; that of the file, or ``labels``, by default.
        columns
            Columns of the table to join; all by default.
        token_labels
            Those of them that label single tokens: lists with an entry for each token, or lists of ``{start, end,
            label}``: spans of characters of texts, and of tokens of other documents.
        tokenizer
            Tokenizer of the capture, its folder or name, for spans of characters; that of the model by default.
        replace
            Replace the table of this name. Without it, joining an equal table again does nothing.

        Returns
        -------
        The record of the table, with the counts.

        Raises
        ------
        DocumentsError
            The table cannot be read, has two lines for one value, no line for any document, or a column that the store
            has already; a label of tokens does not fit its document.
        StoreError
            The store has another label table of this name, or cannot be written.
        MismatchError
            The tokenizer gives other tokens than those of the store.
        """
        from flexcache.store.manage.labels.join import join_labels

        options: dict[str, Any] = {"name": name, "columns": columns, "token_labels": token_labels}
        joined = join_labels(self.path, table, on, **options, tokenizer=tokenizer, replace=replace)
        self._forget_labels()
        return joined

    def remove_labels(self, name: str) -> None:
        """Remove a label table for good.

        ::

            store.remove_labels("sentiment")

        Raises
        ------
        StoreError
            There is no such table, or the store cannot be written.
        """
        from flexcache.store.manage.labels.tables import remove_labels

        remove_labels(self.path, name)
        self._forget_labels()

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

    def _readable(self, site: str) -> RowReader:
        """Return the row reader of a site; raise SiteError if all of its layers are virtual."""
        reader = self.reader(site)
        if not reader.array.slices:
            raise virtual_error(reader.array, reader.array.virtual, self.path)
        return reader

    def _forget_labels(self) -> None:
        for cached in ("_joined", "documents"):
            self.__dict__.pop(cached, None)

    @cached_property
    def _readers(self) -> dict[str, RowReader]:
        return {}

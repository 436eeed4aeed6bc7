"""Open a store without its activations: metadata, tables, labels, images and committed units."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterable
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import xarray as xr

from flexcache.array_spec import ArraySpec
from flexcache.errors import SiteError, nearest
from flexcache.images.encoded import IMAGE
from flexcache.patches import Patches
from flexcache.plan import ranges
from flexcache.store.format.committed_units import CommittedUnits, shared_units
from flexcache.store.format.int8 import is_scale
from flexcache.store.format.label_table import LabelTable, read_label_tables
from flexcache.store.format.metadata import StoreMetadata, parse_metadata
from flexcache.store.format.reference import StoreReference, make_reference
from flexcache.store.format.schema import COORDINATES, DOCUMENTS, GROWING, SEQUENCES, read_attributes
from flexcache.store.read.coordinates import coordinate_variable, document_numbers, select_positions
from flexcache.store.read.parquet import open_table, read_first_lines, read_store_table
from flexcache.store.read.row_images import read_image, read_patches
from flexcache.store.read.row_labels import JoinedLabels, label_names, row_labels
from flexcache.store.storage.location import StoreLocation, parse_location


class OpenStore:
    """An open store without access to activations; `flexcache.Store` adds that."""

    attached: Any = None
    """The model that recomputes virtual layers, a `flexcache.virtual.Attachment`; None if none is attached."""

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
        self.compressed = self.spec.compression != "none"
        self.ledger = units.ledger

    def __reduce__(self) -> tuple[Any, ...]:
        arrays = self.arrays if self.attached is None else self.attached.stored_arrays
        metadata = StoreMetadata(arrays, self.spec, self.plan, self.provenance)
        return shared_store, (type(self), self.reference, pickle.dumps((metadata, self._joined.tables, self.attached)))

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
        """Return the layers of a site that are on disk; empty for a module path.

        ``arrays[site].virtual`` has the layers that were captured and are not on disk.

        ::

            store.layers("resid_post")              # (0, 8, 16)
        """
        return self._array(site).layers or ()

    @cached_property
    def documents(self) -> pa.Table:
        """The documents in row order: id, source_index, n_tokens, text, labels, row_start, n_rows, joined labels.

        ::

            store.documents.to_pandas()
        """
        return self._joined.add_to(read_store_table(self.path, DOCUMENTS, self.n_rows))

    def head(self, count: int = 1) -> pa.Table:
        """Return the first *count* documents without reading the others.

        ::

            store.head(5).to_pylist()
        """
        return self._joined.add_to(read_first_lines(self.path / DOCUMENTS, count))

    @property
    def label_tables(self) -> dict[str, LabelTable]:
        """The tables of labels that were joined after the capture, by name; see `flexcache.Store.join`.

        They are those of the first use of labels or documents; open the store again to see what other processes join.

        ::

            for table in store.label_tables.values():
                print(table)
        """
        return dict(self._joined.tables)

    def label_checksums(self, columns: Iterable[str] | None = None) -> dict[str, str]:
        """Return the XXH3-128 of the label table of each joined column, or of those among *columns*.

        Saved results that depend on a joined label keep it, because the label may be replaced.

        ::

            store.label_checksums(["sentiment"])
        """
        return self._joined.checksums(columns)

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
        return "patches" in self.provenance.others

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
        return (*label_names(self.tokens, self.spec), *self._joined.of_tokens)

    def token_label(self, name: str) -> pa.Array:
        """Return the label of the token of each row, null for a token without one.

        ::

            store.token_label("part_of_speech")     # pyarrow array of length n_rows

        Raises
        ------
        StoreError
            The tokens have no such label, or rows are means over tokens.
        """
        if name in self._joined.of_tokens:
            return self._joined.row_labels(name, self._extents["id"], self.coordinates)
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
        """True if all documents are planned and all units are committed."""
        return not self.growing and bool(self.committed.all())

    @property
    def growing(self) -> bool:
        """True if documents of the corpus were not planned yet when the store was opened."""
        return GROWING in self.plan

    @property
    def committed_units(self) -> np.ndarray:
        """Numbers of the committed units."""
        return np.flatnonzero(self.committed)

    @property
    def committed_rows(self) -> np.ndarray:
        """Numbers of the committed rows, sorted."""
        starts = self.committed_units * self.shard_rows
        return ranges(starts, np.minimum(self.shard_rows, self.n_rows - starts))

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

    # Private

    @cached_property
    def _joined(self) -> JoinedLabels:
        return JoinedLabels(self.path, read_label_tables(self.path))

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
def shared_store(kind: type[OpenStore], reference: StoreReference, metadata: bytes) -> OpenStore:
    """Return an unpickled store, one object for all tasks of a process. Nothing is read yet."""
    store = kind.__new__(kind)
    opened, tables, attached = pickle.loads(metadata)
    store._open(reference.path, opened, shared_units(reference))
    store.__dict__ |= {"reference": reference, "_joined": JoinedLabels(reference.path, tables)}
    if attached is not None:
        attached.attach(store)
    return store

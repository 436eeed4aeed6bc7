"""Documents of a corpus that a store does not have yet."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import xxhash

from flexcache.documents.columns import content_of
from flexcache.errors import DocumentsError
from flexcache.images.encoded import IMAGE, IMAGE_DIGEST
from flexcache.options import SequenceOptions
from flexcache.sequences import encode_documents, image_digests, messages_digests, text_digests
from flexcache.sequences.targets import TARGET, shift_right, split_target
from flexcache.store.format.schema import CONTEXT
from flexcache.store.read.store import Store

if TYPE_CHECKING:
    from flexcache.documents import Documents


class NothingNewError(Exception):
    """Every document is in the store already."""


class NewDocuments:
    """A corpus without the documents whose ids a store has; read once, like `Documents`.

    Memory: 16 bytes for each document of the store, and its documents table. *known* and *new* count documents so far;
    a corpus of known and new ones raises DocumentsError unless *new_only*.
    """

    def __init__(self, documents: Documents, store: Store, new_only: bool) -> None:
        self._documents, self._store, self._new_only = documents, store, new_only
        self.known = self.new = 0
        self._ids = store.documents.column("id").combine_chunks()
        hashes = _hashes(self._ids)
        self._order = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._order]

    def describe(self) -> dict[str, Any]:
        """Return the description of the whole corpus."""
        return self._documents.describe()

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Yield the new documents in corpus order; at the end, NothingNewError is raised if every document is known.

        DocumentsError if known documents and new ones are mixed, or a known id has other contents.
        """
        for batch in self._documents.batches():
            places = self._places(batch.column("id"))
            known, new = np.flatnonzero(places >= 0), np.flatnonzero(places < 0)
            self._check_contents(batch.take(pa.array(known)), places[known])
            self.known += len(known)
            self.new += len(new)
            if self.known and self.new and not self._new_only:
                example = batch.column("id")[int(known[0])].as_py() if len(known) else self._ids[0].as_py()
                raise DocumentsError(
                    "some of the documents are in the store already, and some are not",
                    where=str(self._store.path),
                    expected="new documents only, by their ids",
                    found=f"{self.known} known and {self.new} new ones so far; known is {example!r}",
                    remedy="leave the known ones out by new_only=True (--new-only)",
                )
            if len(new):
                yield batch.take(pa.array(new))
        if self.known and not self.new:
            raise NothingNewError

    def _places(self, ids: pa.Array) -> np.ndarray:
        """Return the line of each id in the documents of the store, -1 for none."""
        hashes = _hashes(ids)
        at = np.minimum(np.searchsorted(self._hashes, hashes), len(self._hashes) - 1)
        lines: np.ndarray = np.where(self._hashes[at] == hashes, self._order[at], -1)
        return lines

    def _check_contents(self, known: pa.RecordBatch, places: np.ndarray) -> None:
        if not len(places):
            return
        for name, stored, given in zip(known.column("id"), *self._contents(known, places), strict=True):
            if stored != given:
                raise DocumentsError(
                    f"document {name.as_py()!r} is in the store with other contents",
                    where=str(self._store.path),
                    expected=_short(stored),
                    found=_short(given),
                    remedy="ids must tell documents of the old and the new corpus apart: give the documents an id of"
                    " their own (without one, it is the number of the document in its corpus)",
                )

    def _contents(self, known: pa.RecordBatch, places: np.ndarray) -> tuple[list[Any], list[Any]]:
        """Return the stored and the given contents of known documents; both sides of encoder-decoder inputs."""
        inputs = self._store.spec.decoder
        if inputs is None:
            return self._one_side(known, places, "tokens")
        given, target = split_target(known)
        ours, theirs = self._one_side(given, places, CONTEXT)
        if content_of(target) == "tokens":
            read = shift_right(encode_documents(target, None, SequenceOptions(max_length=self._limit)), inputs).tokens
            target = target.set_column(1, "tokens", read)
        held, read_now = self._one_side(target, places, "tokens", TARGET)
        return list(zip(ours, held, strict=True)), list(zip(theirs, read_now, strict=True))

    @property
    def _limit(self) -> int | None:
        return self._store.spec.max_length

    def _one_side(
        self, known: pa.RecordBatch, places: np.ndarray, tokens_name: str, text_name: str = "text"
    ) -> tuple[list[Any], list[Any]]:
        """Return the stored and the given contents of one side, by the names of its columns in the store."""
        documents, content = self._store.documents, content_of(known)
        if content == "text":
            texts = known.column(1).to_pylist()
            if text_name in documents.column_names:
                return documents.column(text_name).take(pa.array(places)).to_pylist(), texts
            if (hashed := f"{text_name}_xxh3_128") in documents.column_names:
                return documents.column(hashed).take(pa.array(places)).to_pylist(), text_digests(texts)
            return ["tokens"] * len(texts), ["a text"] * len(texts)
        if content == "messages":
            given = messages_digests(known.column(1).to_pylist())
            if "messages_xxh3_128" not in documents.column_names:
                return ["no chat"] * len(given), ["a chat"] * len(given)
            return documents.column("messages_xxh3_128").take(pa.array(places)).to_pylist(), given
        if content == IMAGE:
            given = image_digests(known.column(1))
            if IMAGE_DIGEST not in documents.column_names:
                return ["no image"] * len(given), ["an image"] * len(given)
            return documents.column(IMAGE_DIGEST).take(pa.array(places)).to_pylist(), given
        if not self._store.spec.whole:
            return self._rows_of(places, known.column(1).to_pylist())
        lines = np.searchsorted(self._store.tokens.column("document").to_numpy(), places)
        stored = self._store.tokens.column(tokens_name).take(pa.array(lines)).to_pylist()
        tokens = known.column(1).to_pylist()
        return stored, [given[: self._limit] for given in tokens]

    def _rows_of(self, places: np.ndarray, given: list[list[int]]) -> tuple[list[Any], list[Any]]:
        """Return the tokens of the stored rows of known documents, and the given tokens at their positions."""
        token_id, position = (self._store.coordinates[name].values for name in ("token_id", "position"))
        lengths = self._store.documents.column("n_tokens").to_pylist()
        stored, now = [], []
        for place, tokens in zip(places.tolist(), given, strict=True):
            rows = self._store.rows(document=place)
            stored.append([lengths[place], *token_id[rows].tolist()])
            now.append([len(tokens), *(tokens[at] for at in position[rows].tolist() if at < len(tokens))])
        return stored, now


def _hashes(ids: pa.Array) -> np.ndarray:
    texts = ids.cast(pa.binary()).to_pylist()
    return np.fromiter(map(xxhash.xxh3_64_intdigest, texts), np.uint64, len(texts))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else text[:77] + "…"

"""Write activations with the text that they were computed from, to train models that describe activations in words.

- ``activation-oracle``: for activation oracles (Karvonen et al. 2025, https://github.com/adamkarvonen/activation_oracles),
  whose training data have a layer, vectors and the tokens of their context. Columns: ``document``, ``position``,
  ``token_id``, ``layer``, ``text``, ``activation_vector`` (list<float32>), and the labels of the document.
- ``nla``: for natural-language autoencoders (https://github.com/kitft/natural_language_autoencoders, nla/datagen), as
  its stage 0 writes them: ``n_raw_tokens``, ``detokenized_text_truncated``, ``activation_vector`` (a list<float32> of
  fixed size), ``activation_layer``, ``doc_id``; and the file ``….parquet.nla_meta.yaml`` that the next stages read.

The text is that of the tokens which the forward had read, up to the token of the row, without special tokens. Vectors
are as stored, not normalized.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from flexcache.array_spec import ArraySpec
from flexcache.errors import ConfigError, MismatchError
from flexcache.exchange.table import GROUP_BYTES
from flexcache.identity.store_tokenizer import load_tokenizer, store_tokenizer
from flexcache.identity.tokenizer import DIGEST, describe_tokenizer
from flexcache.site import STANDARD
from flexcache.store.format.text import TABLE_COLUMNS
from flexcache.store.manage.store_contents import ledger_digest
from flexcache.store.read.store import Store

TEXT_FORMATS = ("activation-oracle", "nla")
SIDECAR = ".nla_meta.yaml"


class RowChoiceOptions(TypedDict, total=False):
    """Keywords of `flexcache.export` for the fields of `RowChoice`."""

    per_document: int | None
    min_position: int
    limit: int | None
    seed: int


@dataclass(frozen=True)
class RowChoice:
    """The rows that an export with text takes: a function of the store and of these values.

    Attributes
    ----------
    per_document : int or None
        Rows of a document, drawn at random by its id and the seed; all by default.
    min_position : int
        Smallest position in the document.
    limit : int or None
        Rows of all documents together: those of the first documents.
    seed : int
    """

    per_document: int | None = None
    min_position: int = 0
    limit: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("per_document", 1), ("min_position", 0), ("limit", 1), ("seed", 0)):
            value = getattr(self, name)
            whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
            if not (whole and value >= least) and not (value is None and name in ("per_document", "limit")):
                raise ConfigError(f"{name} cannot be {value!r}", expected=f"a whole number of at least {least}")

    def select_rows(self, store: Store, rows: np.ndarray) -> np.ndarray:
        """Return the chosen ones of ascending row numbers."""
        rows = rows[store.coordinates["position"].values[rows] >= self.min_position]
        if self.per_document is not None and len(rows):
            documents = store.coordinates["document"].values[rows]
            ids = store.documents.column("id")
            groups = np.split(rows, np.flatnonzero(np.diff(documents)) + 1)
            rows = np.concatenate(
                [
                    self._draw(group, ids[int(store.coordinates["document"].values[group[0]])].as_py())
                    for group in groups
                ]
            )
        return rows if self.limit is None else rows[: self.limit]

    def _draw(self, rows: np.ndarray, document: str) -> np.ndarray:
        if self.per_document is None or len(rows) <= self.per_document:
            return rows
        generator = np.random.default_rng(xxhash.xxh3_64_intdigest(f"{self.seed}|{document}".encode()))
        return np.sort(generator.choice(rows, self.per_document, replace=False))


def check_text_arrays(store: Store, arrays: list[ArraySpec], to: str) -> None:
    """Raise ConfigError unless there is one site with layers, and each row is one token of a document of its own."""
    if len(arrays) != 1 or arrays[0].site not in STANDARD:
        raise ConfigError(
            f"an export to {to} takes one site with layers",
            found=", ".join(array.name for array in arrays) or "none",
            remedy="choose it: --site resid_post (sites=['resid_post'])",
        )
    spec = store.spec
    reasons = {
        "rows are means over tokens": spec.rows == "mean",
        "the documents are images": store.images,
        "documents are packed into one sequence": spec.packing is not None,
        "the model has an encoder and a decoder": spec.decoder is not None,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ConfigError(f"{reason}, so a row has no text of its own", where=str(store.path))


def text_tokenizer(store: Store, tokenizer: Any) -> Any:
    """Return a tokenizer to decode the tokens of a store: the given one, or that of the store's model.

    Raises
    ------
    ConfigError
        There is none, or it cannot be loaded.
    MismatchError
        It is not the one that the store was captured with.
    """
    if tokenizer is None:
        found = store_tokenizer(store)
        if found is None:
            raise ConfigError(
                "the tokenizer of the store cannot be loaded, which its texts need",
                where=str(store.path),
                remedy="give it: --tokenizer FOLDER (tokenizer=…)",
            )
        return found
    if isinstance(tokenizer, str | Path):
        tokenizer = load_tokenizer(tokenizer)
    if not callable(getattr(tokenizer, "decode", None)):
        raise ConfigError("the tokenizer cannot decode", expected="a tokenizer of transformers, or its folder")
    recorded = (store.provenance.tokenizer or {}).get(DIGEST)
    if recorded is not None and describe_tokenizer(tokenizer).get(DIGEST) != recorded:
        raise MismatchError("the tokenizer is not the one that the store was captured with", where=str(store.path))
    return tokenizer


def write_text_table(
    store: Store,
    layer: int,
    array: ArraySpec,
    rows: np.ndarray,
    to: str,
    tokenizer: Any,
    path: Path,
    progress: Callable[[int], None],
) -> None:
    """Write rows of one layer as a Parquet file, in row groups of at most 32 MB of vectors or text."""
    schema = _schema(store, array.features, to)
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for chosen, places, texts in _groups(store, rows, array.features * 4, tokenizer):
            values = np.ascontiguousarray(store.read(array.name, layer, chosen), np.float32)
            flat = pa.array(values.reshape(-1))
            if to == "nla":
                vectors = pa.FixedSizeListArray.from_arrays(flat, array.features)
            else:
                offsets = pa.array(np.arange(len(chosen) + 1, dtype=np.int32) * np.int32(array.features))
                vectors = pa.ListArray.from_arrays(offsets, flat)
            columns = _columns(store, layer, chosen, places, texts, to) | {"activation_vector": vectors}
            table = pa.table([columns[name] for name in schema.names], schema=schema)
            writer.write_table(table, row_group_size=len(chosen))
            progress(len(chosen))


def sidecar(store: Store, layer: int, features: int, rows: int, choice: RowChoice) -> bytes:
    """Return the metadata of a file for natural-language autoencoders, as JSON, which is YAML, too."""
    model = str(store.provenance.model_name or "unknown")
    documents = store.provenance.documents
    content = {
        "dataset_id": f"base_{model.rpartition('/')[2]}_L{layer}_{ledger_digest(store)[:8]}",
        "stage": "base",
        "row_count": rows,
        "extraction": {
            "base_model": model,
            "d_model": features,
            "layer_index": layer,
            "norm": "none",
            "corpus": f"{store.path.name}, documents {documents.get(DIGEST) or documents.get('kind')}",
            "corpus_slice": {"start": 0, "length": len(store.documents)},
            "positions_per_doc": choice.per_document or int(max(store.documents.column("n_rows").to_numpy())),
        },
        "kind": "nla_dataset",
        "schema_version": 1,
        "keep_debug_metadata": True,
        "prompt_templates": {},
        "parent_datasets": [],
        "created_at": store.provenance.created,
        "created_by": "flexcache.export",
        "git_commit": "",
    }
    return json.dumps(content, indent=2, ensure_ascii=False).encode()


def describe_choice(choice: RowChoice, tokenizer: Any) -> dict[str, Any]:
    """Return what the manifest of an export says about its rows and texts."""
    values = {name: None if value is None else int(value) for name, value in asdict(choice).items()}
    return {"choice": values, "tokenizer": describe_tokenizer(tokenizer)}


def _labels(store: Store) -> dict[str, str]:
    """Return the columns of labels by the names that they have in the documents."""
    own = ("document", "position", "token_id", "layer", "activation_vector")
    names = [name for name in store.documents.column_names if name not in TABLE_COLUMNS]
    return {(f"label_{name}" if name in own else name): name for name in names}


def _schema(store: Store, features: int, to: str) -> pa.Schema:
    if to == "nla":
        return pa.schema(
            [
                ("n_raw_tokens", pa.int64()),
                ("detokenized_text_truncated", pa.string()),
                ("activation_vector", pa.list_(pa.float32(), features)),
                ("activation_layer", pa.int64()),
                ("doc_id", pa.string()),
            ]
        )
    labels = [(name, store.documents.schema.field(own).type) for name, own in _labels(store).items()]
    return pa.schema(
        [
            ("document", pa.string()),
            ("position", pa.int64()),
            ("token_id", pa.int64()),
            ("layer", pa.int64()),
            ("text", pa.string()),
            ("activation_vector", pa.list_(pa.float32())),
            *labels,
        ]
    )


def _columns(
    store: Store, layer: int, rows: np.ndarray, places: np.ndarray, texts: list[str], to: str
) -> dict[str, pa.Array]:
    lines = pa.array(store.coordinates["document"].values[rows])
    documents = store.documents
    layers = pa.array(np.full(len(rows), layer, np.int64))
    names = documents.column("id").take(lines).combine_chunks().cast(pa.string())
    words = pa.array(texts, pa.string())
    if to == "nla":
        counts = pa.array(places.astype(np.int64) + 1)
        return {
            "n_raw_tokens": counts,
            "detokenized_text_truncated": words,
            "activation_layer": layers,
            "doc_id": names,
        }
    position, token = (store.coordinates[name].values[rows].astype(np.int64) for name in ("position", "token_id"))
    labels = {name: documents.column(own).take(lines) for name, own in _labels(store).items()}
    return {
        "document": names,
        "position": pa.array(position),
        "token_id": pa.array(token),
        "layer": layers,
        "text": words,
    } | labels


def _groups(
    store: Store, rows: np.ndarray, row_bytes: int, tokenizer: Any
) -> Iterator[tuple[np.ndarray, np.ndarray, list[str]]]:
    """Yield chosen rows, their places in the tokens of the forward, and texts, for a row group at a time."""
    texts: list[str] = []
    places: list[int] = []
    done = size = 0
    for first, kept, tokens in _sequences(store):
        last = first + len(kept)
        inside = rows[done + len(texts) : np.searchsorted(rows, last)]
        for row in inside.tolist():
            place = int(kept[row - first])
            texts.append(tokenizer.decode(tokens[: place + 1].tolist(), skip_special_tokens=True))
            places.append(place)
            size += row_bytes + len(texts[-1])
            if size >= GROUP_BYTES:
                yield rows[done : done + len(texts)], np.array(places), texts
                done, texts, places, size = done + len(texts), [], [], 0
    if texts:
        yield rows[done : done + len(texts)], np.array(places), texts


def _sequences(store: Store) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield the first row of each sequence, the places of its rows in it, and its token ids."""
    for batch in store.tokens.to_batches():
        chosen = batch.column("keep") if "keep" in batch.schema.names else None
        starts, first = batch.column("keep_start").to_numpy(), batch.column("row_start").to_numpy()
        counts = batch.column("n_rows").to_numpy()
        for line in range(batch.num_rows):
            tokens = batch.column("tokens")[line].values.to_numpy()
            if chosen is None:
                kept = np.arange(starts[line], starts[line] + counts[line])
            else:
                kept = chosen[line].values.to_numpy()
            yield int(first[line]), kept, tokens

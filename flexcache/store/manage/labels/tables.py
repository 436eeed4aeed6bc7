"""Write, remove and copy the label tables of stores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from flexcache.errors import ConfigError, DocumentsError, MismatchError, StoreError, nearest
from flexcache.paths import check_writable
from flexcache.store.format.label_table import (
    LABEL_RECORDS,
    LABELS,
    LabelTable,
    list_label_tables,
    read_label_tables,
)
from flexcache.store.format.ledger import measure_file
from flexcache.store.read.open_store import OpenStore
from flexcache.store.read.row_labels import read_joined
from flexcache.store.storage.atomic_files import fsync_folder, json_bytes
from flexcache.store.storage.backend import disk_path, storage_of
from flexcache.store.storage.disk_errors import clear_errors
from flexcache.store.storage.location import StoreLocation
from flexcache.store.write.election import elect, working

AnyStore = TypeVar("AnyStore", bound=OpenStore)


def remove_labels(path: StoreLocation, name: str) -> None:
    """Remove a label table from a store; see `flexcache.Store.remove_labels`."""
    known = list_label_tables(path)
    if name not in known:
        raise StoreError(
            f"the store has no label table {name!r}",
            where=str(path),
            remedy=nearest(name, known) if known else "no table was joined",
        )
    with changing_labels(path):
        storage_of(path / LABEL_RECORDS).delete(f"{name}.json")
        _delete_files(path, name)


def check_same_labels(stores: Sequence[OpenStore]) -> None:
    """Raise MismatchError if two stores have different label tables of one name, or one label in two tables."""
    tables: dict[str, tuple[OpenStore, LabelTable]] = {}
    owners: dict[str, tuple[OpenStore, LabelTable]] = {}
    for store in stores:
        for table in store.label_tables.values():
            pairs = [tables.setdefault(table.name, (store, table))]
            pairs += [owners.setdefault(column, (store, table)) for column in table.columns]
            for other, known in pairs:
                if known != table:
                    raise MismatchError(
                        "the stores have different labels",
                        where=f"{other.path} and {store.path}",
                        expected=str(known),
                        found=str(table),
                        remedy="remove the table from one of them: flexcache label STORE --remove NAME",
                    )


def copy_labels(sources: Sequence[OpenStore], target: AnyStore) -> AnyStore:
    """Copy the label tables of stores over one plan to another store over it, and return that store with them.

    Raises
    ------
    DamagedError
        A table of a source is damaged.
    CaptureError
        The disk refuses a write.
    """
    there = read_label_tables(target.path)
    missing = {
        name: (source, table)
        for source in sources
        for name, table in source.label_tables.items()
        if there.get(name) != table or measure_file(target.path / table.path) != table.file
    }
    if missing:
        with changing_labels(target.path):
            for source, table in missing.values():
                read_joined(source.path, table)
                write_table(target.path, storage_of(source.path).read_bytes(table.path), table)
    return type(target)(target.path) if missing else target


def check_new_labels(store: OpenStore, names: Sequence[str]) -> None:
    """Raise DocumentsError if a label of documents that extend a store has the name of a joined one."""
    if taken := [name for name in names if name in store.label_checksums()]:
        table = next(table.name for table in store.label_tables.values() if taken[0] in table.columns)
        raise DocumentsError(
            f"label {taken[0]!r} of the new documents has the name of a label that was joined to the store",
            where=f"{store.path}, table {table}",
            remedy="leave it out by flexcache.open_documents(…, labels=[…]), and join the labels of all documents again"
            " afterwards; or remove the table first: flexcache label STORE --remove NAME",
        )


@contextmanager
def changing_labels(path: StoreLocation) -> Iterator[None]:
    """Hold the claim under which extensions are staged and committed, so that only one process changes the tables."""
    if (folder := disk_path(path)) is not None:
        try:
            check_writable(folder)
        except ConfigError as error:
            raise StoreError(
                "the store cannot be written, so its labels cannot change",
                where=str(path),
                expected=error.expected,
                found=error.found,
                remedy="make a copy with flexcache copy, and join the labels to the copy",
            ) from None
    with clear_errors(path), working(path) as (worker, claims):
        elect(worker, claims, "grow", lambda: False)
        yield


def write_table(path: StoreLocation, content: bytes, record: LabelTable) -> None:
    """Write the file, then the record, which makes it visible, then delete files that the record replaces."""
    for name, written in ((record.path, content), (record.record_path, json_bytes(record.to_json()))):
        folder = disk_path((path / name).parent)
        if folder is not None and not folder.is_dir():
            folder.mkdir(exist_ok=True)
            fsync_folder(folder.parent)
        storage_of(path).write_bytes(name, written)
    _delete_files(path, record.name, keep=record.path)


def _delete_files(path: StoreLocation, name: str, keep: str = "") -> None:
    """Delete the files of a label table except *keep*, also those of joins that were interrupted."""
    folder = storage_of(path / LABELS)
    for entry in folder.list_names():
        if entry.removesuffix(".parquet")[:-33] == name and f"{LABELS}/{entry}" != keep:
            folder.delete(entry)

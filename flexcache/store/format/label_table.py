"""Tables of labels that were joined to a store: a file in ``labels``, and a record in ``ledger/labels`` for each."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from flexcache.store.format.ledger import FileRecord, read_checked_json, reading, with_checksum
from flexcache.store.storage.backend import storage_of
from flexcache.store.storage.location import StoreLocation

LABELS = "labels"
"""Folder of the tables, Parquet files with the checksum in their names."""
LABEL_RECORDS = "ledger/labels"
"""Folder of their records. A table without a record is not part of the store."""
TABLE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
_KEYS = {"schema", "name", "on", "documents", "matched", "unknown", "columns", "file"}


@dataclass(frozen=True)
class LabelColumn:
    """A column of a label table.

    Attributes
    ----------
    type : str
        Its Arrow type.
    of : {"documents", "tokens"}
        ``tokens`` for a list with an entry for each token of a document.
    missing : int
        Documents of the store without a value: null or NaN, or no line in the table.
    """

    type: str
    of: str
    missing: int


@dataclass(frozen=True)
class LabelTable:
    """Record of a label table. It does not depend on time or machine, so equal tables have equal records.

    ::

        print(store.label_tables["labels"])

    Attributes
    ----------
    name : str
    on : str
        Column of the documents whose values were looked up in the table.
    documents, matched : int
        Documents of the store at the time, and those of them with a line in the table.
    unknown : int
        Lines of the table that match no document; they were left out.
    columns : dict of str to LabelColumn
    file : FileRecord
        Size and XXH3-128 of the file.
    """

    name: str
    on: str
    documents: int
    matched: int
    unknown: int
    columns: dict[str, LabelColumn]
    file: FileRecord

    @property
    def path(self) -> str:
        """Path of the file relative to the store."""
        return f"{LABELS}/{self.name}.{self.file.xxh3_128}.parquet"

    @property
    def record_path(self) -> str:
        """Path of the record relative to the store."""
        return f"{LABEL_RECORDS}/{self.name}.json"

    def to_json(self) -> dict[str, Any]:
        """Return the content of the record."""
        return with_checksum({"schema": 1, **asdict(self)})

    def describe_later(self, documents: int) -> str:
        """Return a sentence about the documents that were added since, if the store has more than the table."""
        if documents <= self.documents:
            return ""
        return (
            f"{documents - self.documents:,} documents that were added later have no labels of the table {self.name}:"
            " join a table of all documents again, with replace"
        )

    def __str__(self) -> str:
        noun = "line" if self.unknown == 1 else "lines"
        unknown = f"; {self.unknown:,} {noun} with an unknown {self.on} left out" if self.unknown else ""
        lines = [f"{self.name}: {self.matched:,} of {self.documents:,} documents by {self.on}{unknown}"]
        for name, column in self.columns.items():
            missing = f", {column.missing:,} documents without a value" if column.missing else ""
            lines.append(f"  {name}: {column.type}, of {column.of}{missing}")
        return "\n".join(lines)


def read_label_tables(root: StoreLocation) -> dict[str, LabelTable]:
    """Return the records of the label tables of a store by name, sorted.

    Raises
    ------
    DamagedError
        A record cannot be read or is malformed.
    """
    return {name: read_label_table(root, name) for name in list_label_tables(root)}


def list_label_tables(root: StoreLocation) -> list[str]:
    """Return the names of the label tables of a store, sorted, without reading their records."""
    found = [
        name.removesuffix(".json") for name in storage_of(root / LABEL_RECORDS).list_names() if name.endswith(".json")
    ]
    return sorted(name for name in found if TABLE_NAME.fullmatch(name))


def read_label_table(root: StoreLocation, name: str) -> LabelTable:
    """Return the record of a label table; raise DamagedError if it cannot be read or is malformed."""
    path = root / LABEL_RECORDS / f"{name}.json"
    with reading(f"the record of the label table {name}", path, remove_remedy(name)):
        data = read_checked_json(root, path, _KEYS)
        if data["schema"] != 1 or data["name"] != name:
            raise ValueError(f"it has schema {data['schema']} and name {data['name']}")
        columns = {
            str(key): LabelColumn(str(c["type"]), str(c["of"]), int(c["missing"])) for key, c in data["columns"].items()
        }
        file = FileRecord(int(data["file"]["size"]), str(data["file"]["xxh3_128"]))
        documents, matched, unknown = (int(data[key]) for key in ("documents", "matched", "unknown"))
        if not re.fullmatch(r"[0-9a-f]{32}", file.xxh3_128):
            raise ValueError("its checksum is malformed")
        return LabelTable(name, str(data["on"]), documents, matched, unknown, columns, file)


def remove_remedy(name: str) -> str:
    """Return what to do about a label table that is damaged."""
    return f"remove it with flexcache label STORE --remove {name}, or store.remove_labels({name!r}), and join it again"

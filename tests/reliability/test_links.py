"""Links, pipes, devices and crafted tables in an untrusted store: nothing outside is read, and nothing blocks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import flexcache
from flexcache.errors import DamagedError, FlexCacheError
from flexcache.store.manage.copy import copy
from tests.golden.make import FOLDER
from tests.reliability.test_hostile import read_all

ROOT = Path(__file__).parents[2]
FILES = (
    "zarr.json",
    "documents.parquet",
    "sequences.parquet",
    "token_id/zarr.json",
    "token_id/c/0",
    "ledger/plan.json",
    "ledger/0/0.json",
    "resid_post/c/0/0/0",
)
FOLDERS = ("token_id", "token_id/c", "ledger", "ledger/0", "resid_post", "resid_post/c/0")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    shutil.copytree(FOLDER / "1-plain.zarr", tmp_path / "run.zarr")
    return tmp_path / "run.zarr"


@pytest.mark.parametrize("name", [*FILES, *FOLDERS])
@pytest.mark.parametrize("kind", ["plain", "zstd"])
def test_a_link_out_of_the_store_raises_an_error_although_it_leads_to_the_right_bytes(
    name: str, kind: str, tmp_path: Path
) -> None:
    path = tmp_path / "run.zarr"
    shutil.copytree(FOLDER / f"1-{kind}.zarr", path)
    (path / name).rename(tmp_path / "outside")
    (path / name).symlink_to(tmp_path / "outside")
    try:
        read_all(path)
    except DamagedError as error:
        assert "leads out of it" in str(error)  # noqa: PT017
        assert name in str(error)  # noqa: PT017
    else:  # records are read only by capture and verify
        problems = [finding.problem for finding in flexcache.verify(path).findings]
        assert name.startswith("ledger")
        assert any("leads out of it" in problem for problem in problems)


def test_a_store_may_be_a_link_and_links_inside_it_are_followed(path: Path) -> None:
    (path.parent / "link.zarr").symlink_to(path)
    (path / "resid_post/c/0/0/0").rename(path / "resid_post/c/0/0/moved")
    (path / "resid_post/c/0/0/0").symlink_to("moved")
    flexcache.open(path.parent / "link.zarr").read("resid_post", 0)


READ = """
import resource, sys
from pathlib import Path
from flexcache.errors import FlexCacheError
from tests.reliability.test_hostile import read_all
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, resource.RLIM_INFINITY))
for path in map(Path, sys.argv[1:]):
    try:
        read_all(path)
        print("read")
    except FlexCacheError as error:
        print(str(error).splitlines()[0])
"""


def test_a_pipe_or_a_device_raises_an_error_without_waiting(tmp_path: Path) -> None:
    makes: list[Callable[[Path], object]] = [os.mkfifo, lambda path: path.symlink_to("/dev/zero")]
    cases = [(name, tmp_path / f"{kind}-{i}.zarr", kind) for kind in range(2) for i, name in enumerate(FILES)]
    for name, path, kind in cases:
        shutil.copytree(FOLDER / "1-plain.zarr", path)
        (path / name).unlink()
        makes[kind](path / name)
    command = [sys.executable, "-c", READ, *(str(path) for _, path, _ in cases)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    for (name, path, _), said in zip(cases, done.stdout.splitlines(), strict=True):
        if name.startswith("ledger"):  # used only by capture and verify
            assert not flexcache.verify(path).sound
        else:
            assert "not a file" in said or "is not a store" in said, (name, said)


def test_metadata_and_records_of_excessive_length_are_not_read(path: Path) -> None:
    for name in ("ledger/0/0.json", "zarr.json"):
        with (path / name).open("ab") as file:
            file.truncate(10**13)  # a sparse file: nothing is written
        with pytest.raises(DamagedError, match="at most"):
            flexcache.open(path).ledger.read_record(0)


def test_a_copy_reads_nothing_outside_the_store(path: Path) -> None:
    shard = path / "resid_post/c/0/0/0"
    shard.rename(path.parent / "outside")
    shard.symlink_to(path.parent / "outside")
    with pytest.raises(FlexCacheError, match="leads out of it"):
        copy(path, path.parent / "copy.zarr")


# Tables


def swap(path: Path, table: pa.Table) -> None:
    pq.write_table(table, path / "documents.parquet")


def test_a_table_with_more_lines_than_rows_raises_an_error_before_it_is_read(path: Path) -> None:
    """A billion lines of one value make a small file."""
    lines = pa.chunked_array([pa.array([0] * (1 << 20), pa.int64())] * 8)
    swap(path, pa.table(dict.fromkeys(("row_start", "n_rows", "n_tokens", "source_index", "id"), lines)))
    assert (path / "documents.parquet").stat().st_size < 1 << 20
    with pytest.raises(DamagedError, match="lines for"):
        flexcache.open(path).documents  # noqa: B018


def test_a_column_declared_as_pickled_python_stays_bytes(path: Path) -> None:
    """Arrow once unpickled columns by their metadata, and pandas still does on request."""
    table = pq.read_table(path / "documents.parquet")
    evil = b"cos\nsystem\n(S'touch " + str(path.parent / "executed").encode() + b"'\ntR."
    extension = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": evil}
    field = pa.field("label", pa.binary(), metadata=extension)
    index = table.column_names.index("label")
    table = table.set_column(index, field, pa.array([evil] * len(table), pa.binary()))
    meta = {"pandas": json.dumps({"columns": [{"name": "label", "pandas_type": "object", "numpy_type": "object"}]})}
    swap(path, table.replace_schema_metadata(meta))
    found = flexcache.open(path).documents
    assert found.column("label").to_pylist() == [evil] * len(table)
    assert not (path.parent / "executed").exists()


@pytest.mark.parametrize("column", ["row_start", "n_rows", "id", "n_tokens"])
@pytest.mark.parametrize("change", ["gone", "text", "negative", "huge", "null", "float"])
def test_a_column_of_another_type_raises_a_clear_error_or_does_no_harm(column: str, change: str, path: Path) -> None:
    table = pq.read_table(path / "documents.parquet")
    index, count = table.column_names.index(column), len(table)
    values = {
        "text": pa.array(["x"] * count),
        "negative": pa.array([-(10**9)] * count),
        "huge": pa.array([10**18] * count),
        "null": pa.nulls(count, pa.int64()),
        "float": pa.array([float("nan")] * count),
    }
    table = table.remove_column(index) if change == "gone" else table.set_column(index, column, values[change])
    swap(path, table)
    try:
        store = flexcache.open(path)
        rows = store.rows(document=0, position=-1)
        assert ((rows >= 0) & (rows < store.n_rows)).all(), "rows that are not there"
        store.read("resid_post", 0, rows)
    except FlexCacheError as error:
        assert str(error)  # noqa: PT017

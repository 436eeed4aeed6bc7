"""Reading an untrusted store, with any metadata, ledger and tables, gives right values or a clear error.

Hypothesis changes any value of any JSON file of a small store, which is then read in every way. Only a FlexCacheError
may be raised, and values that are read without an error must be those that were written.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flexcache
from flexcache.errors import FlexCacheError
from tests.golden.make import FOLDER, value

GOLDEN = FOLDER / "1-plain.zarr"
FILES = ("zarr.json", "resid_post/zarr.json", "token_id/zarr.json", "ledger/plan.json", "ledger/0/0.json")
HOSTILE = [
    None,
    True,
    -1,
    0,
    3,
    10**18,
    10**400,
    0.5,
    1e300,
    "",
    "..",
    "../../etc/passwd",
    "/etc/passwd",
    "resid_post",
    "float64",
    "\x00",
    [],
    {},
    [[]] * 3,
    {"a": {"b": []}},
]


def places(content: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Return the path of every value inside a JSON value."""
    if at:
        yield at
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, item in items:
        yield from places(item, (*at, key))


PLACES = [(name, at) for name in FILES for at in places(json.loads((GOLDEN / name).read_bytes()))]


def read_all(path: Path) -> None:
    """Read a store in every way, and check the values."""
    store = flexcache.open(path)
    repr(store)
    store._repr_html_()
    for site in store.sites:
        for layer in store.layers(site)[:4]:
            rows = np.arange(min(store.n_rows, 45))
            found = store.read(site, layer, rows)
            if site == "resid_post" and found.shape == (45, 4):
                assert np.array_equal(found, value(rows, layer, 4))
        np.asarray(store[site][:1, :3])
    assert len(store.documents) < 100
    assert len(store.tokens) < 100
    store.rows(document=0, position=-1)
    store.provenance, store.complete, store.replayable  # noqa: B018
    flexcache.verify(path)


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    path = Path(mkdtemp()) / "run.zarr"
    yield path
    shutil.rmtree(path.parent)


def changed(path: Path, name: str, at: tuple[Any, ...], new: Any, remove: bool) -> None:
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(GOLDEN, path)
    content = json.loads((path / name).read_bytes())
    inner = content
    for key in at[:-1]:
        inner = inner[key]
    if remove:
        del inner[at[-1]]
    else:
        inner[at[-1]] = new
    (path / name).write_text(json.dumps(content))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(PLACES), st.sampled_from(HOSTILE), st.booleans())
def test_any_wrong_value_in_the_metadata_raises_a_clear_error(
    place: Path, where: tuple[str, tuple[Any, ...]], new: Any, remove: bool
) -> None:
    changed(place, *where, new, remove)
    try:
        read_all(place)
    except FlexCacheError as error:
        assert str(error)  # noqa: PT017


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "content", [b"", b"{", b"[" * 100_000, b"null", b"\xff\xfe", b'{"a":' * 50_000, b"12345678" * 9000]
)
def test_a_file_of_nonsense_raises_a_clear_error(name: str, content: bytes, place: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(GOLDEN, place)
    (place / name).write_bytes(content)
    try:
        read_all(place)
        assert not flexcache.verify(place).sound, "what is not read is still verified"
    except FlexCacheError as error:
        assert str(error)  # noqa: PT017

from __future__ import annotations

import google_crc32c
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexcache.array_spec import DTYPES
from flexcache.store.format.shard import ShardLayout, index_bytes
from flexcache.store.write.row_encoding import first_nonfinite

LAYOUTS = st.builds(
    ShardLayout, st.integers(1, 5000), st.integers(0, 10).map(lambda n: 1 << n), st.integers(1, 3_000_000)
)


@given(LAYOUTS)
def test_shards_tile_the_rows(layout: ShardLayout) -> None:
    rows = [row for shard in range(layout.n_shards) for row in layout.rows(shard)]
    assert rows == list(range(layout.n_rows))


@given(LAYOUTS)
def test_inner_chunks_divide_a_shard_and_hold_about_a_mebibyte(layout: ShardLayout) -> None:
    assert layout.shard_rows % layout.chunk_rows == 0
    assert layout.chunk_rows == 1 or layout.chunk_rows * layout.row_bytes <= 1 << 20
    assert layout.chunk_rows == layout.shard_rows or 2 * layout.chunk_rows * layout.row_bytes > 1 << 20


@given(LAYOUTS)
def test_rows_padding_and_footer_make_the_file(layout: ShardLayout) -> None:
    for shard in {0, layout.n_shards - 1}:
        whole = layout.row_span(shard) + layout.padding(shard)
        assert whole % (layout.chunk_rows * layout.row_bytes) == 0
        footer = layout.footer(shard)
        assert whole + len(footer) == layout.file_bytes(shard)
        table, check = footer[:-4], int.from_bytes(footer[-4:], "little")
        assert google_crc32c.value(table) == check
        index = np.frombuffer(table, "<u8").reshape(-1, 2)
        present = index[:, 0] != 2**64 - 1
        assert int(index[present, 1].sum()) == whole
        assert (np.diff(index[present, 0].astype(np.int64)) == layout.chunk_rows * layout.row_bytes).all()


def test_an_index_counts_missing_chunks_as_missing() -> None:
    index = np.frombuffer(index_bytes([5, 7], 4)[:-4], "<u8").reshape(4, 2)
    assert index[:2].tolist() == [[0, 5], [5, 7]]
    assert (index[2:] == 2**64 - 1).all()


@pytest.mark.parametrize("name", list(DTYPES))
@given(data=st.data())
def test_nonfinite_values_are_found_as_by_numpy(name: str, data: st.DataObject) -> None:
    dtype = DTYPES[name]
    bits = data.draw(
        st.lists(st.integers(0, 2 ** (8 * dtype.itemsize) - 1), max_size=20).map(
            lambda x: np.array(x, f"<u{dtype.itemsize}")
        )
    )
    values = bits.view(dtype).astype(np.float32) if name != "float32" else bits.view(dtype)
    bad = np.flatnonzero(~np.isfinite(values))
    assert first_nonfinite(bits.view(np.uint8), dtype) == (int(bad[0]) if len(bad) else None)


@pytest.mark.parametrize("name", [name for name in DTYPES if name != "int8"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_nonfinite_value_is_found_among_many(name: str, value: float) -> None:
    values = np.linspace(-1e4, 1e4, 5000).astype(DTYPES[name])
    assert first_nonfinite(values.view(np.uint8), DTYPES[name]) is None
    values[4321] = value
    assert first_nonfinite(values.view(np.uint8), DTYPES[name]) == 4321

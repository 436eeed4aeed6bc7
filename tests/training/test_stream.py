from __future__ import annotations

import errno
import os
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import flexcache
from flexcache import training
from flexcache.errors import ConfigError, DamagedError, SiteError, StoreError, UncommittedError
from tests.analysis.stores import value_store

LENGTHS = [int(n) for n in np.random.default_rng(3).integers(5, 30, 40)]
SMALL: dict[str, Any] = {"batch_size": 32, "run_bytes": 300, "pool_bytes": 6000}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> flexcache.Store:
    values = np.random.default_rng(0).normal(size=(3, sum(LENGTHS), 6)) * [1, 2, 3, 4, 5, 6] + 7
    return value_store(tmp_path_factory.mktemp("stream") / "run.zarr", values, LENGTHS, dtype="bfloat16")


def rows_of(batches: list[Any]) -> list[int]:
    return np.concatenate([batch["row"].numpy() for batch in batches]).tolist()


def test_an_epoch_gives_each_row_once_with_its_values_and_tokens(store: flexcache.Store) -> None:
    batches = list(training.stream(store, "resid_post", 1, return_tokens=True, **SMALL))
    rows = rows_of(batches)
    assert sorted(rows) == list(range(store.n_rows))
    assert rows != sorted(rows)
    assert {len(batch["row"]) for batch in batches[:-1]} == {32}
    found = torch.cat([batch["activations"] for batch in batches])
    assert found.dtype == torch.bfloat16
    assert np.array_equal(found.float().numpy(), store.read("resid_post", 1, np.array(rows)))
    for name in ("token_id", "position", "document"):
        told = torch.cat([batch[name] for batch in batches]).numpy()
        assert np.array_equal(told, np.asarray(store.coordinates[name].values)[rows])


def test_plain_batches_are_tensors_and_the_next_epoch_has_another_order(store: flexcache.Store) -> None:
    stream = training.stream(store, "resid_post", 2, dtype=torch.float32, **SMALL)
    first, second = torch.cat(list(stream)), torch.cat(list(stream))
    assert first.dtype == torch.float32
    assert stream.epoch == 2
    assert not torch.equal(first, second)
    assert torch.equal(first.sort(0).values, second.sort(0).values)
    again = training.stream(store, "resid_post", 2, dtype=torch.float32, **SMALL)
    assert torch.equal(torch.cat(list(again)), first)


def test_layers_and_sites_are_aligned_by_row(store: flexcache.Store) -> None:
    batches = list(training.stream(store, "resid_post", layers=[0, 2], return_tokens=True, **SMALL))
    rows = np.array(rows_of(batches))
    found = torch.cat([batch["activations"] for batch in batches])
    assert found.shape == (store.n_rows, 2, 6)
    for place, layer in enumerate((0, 2)):
        assert np.array_equal(found[:, place].float().numpy(), store.read("resid_post", layer, rows))


def test_two_stores_are_joined_by_document_and_position(store: flexcache.Store, tmp_path: Path) -> None:
    order = np.random.default_rng(1).permutation(len(LENGTHS))[:30]
    ids = store.documents["id"].to_pylist()
    tokens = {ids[d]: t for d, t in zip(store.tokens["document"].to_pylist(), store.tokens["tokens"].to_pylist())}
    documents = [{"id": f"d{i}", "tokens": tokens[f"d{i}"]} for i in order]
    rng = np.random.default_rng(5)
    with flexcache.record(
        tmp_path / "b.zarr", documents, sites={"resid_post": (3, 4)}, model="other", dtype="float32", batch_tokens=64
    ) as to:
        for batch in to.batches():
            for layer in range(3):
                to.put("resid_post", rng.normal(size=(len(batch.rows), 4)), rows=batch.rows, layer=layer)
    other = flexcache.open(tmp_path / "b.zarr")
    stores = {"a": store, "b": str(other.path)}
    batches = list(training.stream(stores, "resid_post", 1, return_tokens=True, **SMALL))
    rows = np.array(rows_of(batches))
    assert len(rows) == other.n_rows
    mine = torch.cat([batch["a"] for batch in batches]).float().numpy()
    theirs = torch.cat([batch["b"] for batch in batches]).numpy()
    assert np.array_equal(mine, store.read("resid_post", 1, rows))
    for row, value in list(zip(rows, theirs))[::17]:
        document = ids[int(store.coordinates["document"].values[row])]
        position = int(store.coordinates["position"].values[row])
        assert np.array_equal(other.read("resid_post", 1, other.rows(document=document, position=position))[0], value)


@pytest.mark.parametrize("refuses", ["nothing", "opening", "reading"])
def test_reading_past_the_page_cache_gives_the_same_rows(
    store: flexcache.Store, refuses: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of 12 bytes let runs start and end anywhere; some file systems do not support O_DIRECT."""
    through = list(training.stream(store, "resid_post", 1, keep_cache=True, **SMALL))
    opening, reading, direct, tried = os.open, os.preadv, set(), 0

    def opened(path: Any, flags: int, *more: Any, **options: Any) -> int:
        nonlocal tried
        tried += bool(flags & os.O_DIRECT)
        if flags & os.O_DIRECT and refuses == "opening":
            raise OSError(errno.EINVAL, "Invalid argument")
        handle = opening(path, flags, *more, **options)
        if flags & os.O_DIRECT:
            direct.add(handle)
        else:
            direct.discard(handle)
        return handle

    def read(handle: int, buffers: Any, offset: int, *more: Any) -> int:
        if handle in direct:
            if refuses == "reading":
                raise OSError(errno.EINVAL, "Invalid argument")
            assert offset % 4096 == 0
        return reading(handle, buffers, offset, *more)

    monkeypatch.setattr("os.open", opened)
    monkeypatch.setattr("os.preadv", read)
    past = list(training.stream(store, "resid_post", 1, keep_cache=False, threads=1, **SMALL))
    assert all(torch.equal(a, b) for a, b in zip(past, through, strict=True))
    assert tried > 1 if refuses == "nothing" else tried == 1


def test_aligned_rows_are_read_into_place(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(2, 300, 2048)).astype(np.float32)
    store = value_store(tmp_path / "run.zarr", values, [50] * 6, dtype="bfloat16")
    options: dict[str, Any] = {"batch_size": 16, "run_bytes": 5 << 12, "pool_bytes": 40 << 12, "return_tokens": True}
    past = list(training.stream(store, "resid_post", layers=[0, 1], keep_cache=False, **options))
    rows = np.array(rows_of(past))
    assert sorted(rows.tolist()) == list(range(300))
    found = torch.cat([batch["activations"] for batch in past]).float().numpy()
    for layer in (0, 1):
        assert np.array_equal(found[:, layer], store.read("resid_post", layer, rows))


@pytest.mark.parametrize("keep_cache", [False, True])
@pytest.mark.parametrize("damage", ["ended early", "missing"])
def test_a_damaged_shard_is_named(tmp_path: Path, keep_cache: bool, damage: str) -> None:
    values = np.random.default_rng(0).normal(size=(1, 60, 6))
    store = value_store(tmp_path / "run.zarr", values, [20] * 3, dtype="bfloat16")
    shard = store.path / "resid_post" / "c" / "0" / "0" / "0"
    if damage == "missing":
        shard.unlink()
    else:
        os.truncate(shard, 100)
    with pytest.raises(DamagedError, match=f"{damage}(.|\n)*{shard}"):
        list(training.stream(store, "resid_post", 0, keep_cache=keep_cache, **SMALL))


@pytest.mark.parametrize("stop", [0, 1, 7, 15])
def test_an_epoch_resumes_in_the_middle(store: flexcache.Store, stop: int) -> None:
    whole = list(training.stream(store, "resid_post", 0, seed=4, **SMALL))
    stream = training.stream(store, "resid_post", 0, seed=4, **SMALL)
    iterator = iter(stream)
    for _ in range(stop):
        next(iterator)
    state = stream.state_dict()
    again = training.stream(store, "resid_post", 0, seed=4, **SMALL)
    again.load_state_dict(state)
    rest = list(again)
    assert len(rest) == len(whole) - stop
    assert all(torch.equal(a, b) for a, b in zip(rest, whole[stop:]))
    with pytest.raises(ConfigError, match="another seed"):
        training.stream(store, "resid_post", 0, seed=5, **SMALL).load_state_dict(state)


SHARES = [(1, 1), (1, 3), (2, 0), (2, 2), (4, 2)]
"""Numbers of ranks and of workers of each."""


def shared_batches(
    store: flexcache.Store, ranks: int, workers: int, state: Any = None, stop: int | None = None, **options: Any
) -> tuple[list[list[int]], list[Any]]:
    """Return the sorted rows of each batch of all ranks together, and the states of their loaders in the end."""
    given, states = [], []
    for rank in range(ranks):
        settings = {**SMALL, "batch_size": 32 // ranks, **options}
        stream = training.stream(store, "resid_post", 0, return_tokens=True, rank=rank, ranks=ranks, **settings)
        loader = stream.loader(num_workers=workers)
        if state is not None:
            loader.load_state_dict(state)
        batches = []
        for number, batch in enumerate(loader, 1):
            batches.append(batch["row"].tolist())
            if number == stop:
                break
        given.append(batches)
        states.append(loader.state_dict())
        assert stop is not None or state is not None or len(batches) == len(loader)
    return [sorted(row for part in parts for row in part or ()) for parts in zip_longest(*given)], states


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker")
@pytest.mark.parametrize(("ranks", "workers"), SHARES)
def test_batches_of_all_ranks_do_not_depend_on_ranks_and_workers(
    store: flexcache.Store, ranks: int, workers: int
) -> None:
    expected = [
        sorted(batch["row"].tolist()) for batch in training.stream(store, "resid_post", 0, return_tokens=True, **SMALL)
    ]
    assert shared_batches(store, ranks, workers)[0] == expected


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker")
@pytest.mark.parametrize("way", [{}, {"transform": dict}], ids=["parts", "whole"])
def test_an_epoch_resumes_with_other_numbers_of_ranks_and_workers(store: flexcache.Store, way: dict[str, Any]) -> None:
    whole, _ = shared_batches(store, 1, 0)
    begun, states = shared_batches(store, 2, 2, stop=5, **way)
    assert begun == whole[:5]
    assert states[0] == states[1]
    for ranks, workers in ((1, 3), (4, 0)):
        rest, ends = shared_batches(store, ranks, workers, state=states[0], **way)
        assert rest == whole[5:]
        assert (ends[0]["epoch"], ends[0]["batches"]) == (1, 0), "the next epoch is whole"


def test_a_transform_in_workers_gets_whole_batches(store: flexcache.Store) -> None:
    options = {**SMALL, "transform": lambda batch: batch.float().mean(0)}
    here = list(training.stream(store, "resid_post", 0, **options))
    there = list(training.stream(store, "resid_post", 0, **options).loader(num_workers=2))
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


def test_a_worker_resumes_from_its_own_state(store: flexcache.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A DataLoader of torchdata saves and loads the state of the stream of each worker."""
    whole = [batch["row"].tolist() for batch in training.stream(store, "resid_post", 0, return_tokens=True, **SMALL)]
    monkeypatch.setattr("flexcache.training.row_stream._worker_share", lambda: (1, 2))
    stream = training.stream(store, "resid_post", 0, return_tokens=True, **SMALL)
    again = training.stream(store, "resid_post", 0, return_tokens=True, **SMALL)
    again.load_state_dict(stream.state_dict())
    assert [batch["row"].tolist() for batch in again] == whole[1::2]
    iterator = iter(stream)
    assert [next(iterator)["row"].tolist() for _ in range(3)] == whole[1:6:2]
    again.load_state_dict(stream.state_dict())
    assert [batch["row"].tolist() for batch in again] == whole[7::2]
    again.load_state_dict(stream.state_dict())
    monkeypatch.setattr("flexcache.training.row_stream._worker_share", lambda: (0, 2))
    with pytest.raises(ConfigError, match="another worker, or number of workers"):
        next(iter(again))


def test_only_chosen_rows_are_given(store: flexcache.Store) -> None:
    mask = np.asarray(store.coordinates["position"].values) > 0
    batches = list(training.stream(store, "resid_post", 0, rows=mask, return_tokens=True, **SMALL))
    rows = np.array(rows_of(batches))
    assert np.array_equal(np.sort(rows), np.flatnonzero(mask))
    found = torch.cat([batch["activations"] for batch in batches]).float().numpy()
    assert np.array_equal(found, store.read("resid_post", 0, rows))
    few = training.stream(store, "resid_post", 0, rows=[3, 500, 9], return_tokens=True, **SMALL)
    assert sorted(rows_of(list(few))) == [3, 9, 500]


def test_a_compressed_store_can_be_streamed(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(1, 120, 6))
    store = value_store(tmp_path / "z.zarr", values, [12] * 10, compression="zstd")
    batches = list(training.stream(store, "resid_post", return_tokens=True, **SMALL))
    rows = np.array(rows_of(batches))
    found = torch.cat([batch["activations"] for batch in batches]).numpy()
    assert np.array_equal(found, store.read("resid_post", 0, rows))


def test_values_are_normalised_as_requested(store: flexcache.Store) -> None:
    whole = torch.from_numpy(store.read("resid_post", 0))
    options = {**SMALL, "run_bytes": 10**6}  # every row is in the estimate
    center, standard, unit = (
        torch.cat(list(training.stream(store, "resid_post", 0, normalize=how, **options)))
        for how in ("center", "standard", "unit_norm")
    )
    assert center.dtype == torch.float32
    assert center.mean(0).abs().max() < 1e-4
    assert torch.allclose(standard.std(0, correction=0), torch.ones(6), atol=1e-4)
    assert float(unit.square().sum(1).mean()) == pytest.approx(6, rel=1e-4)
    ratio = unit.sort(0).values / whole.sort(0).values
    assert ratio.std() < 1e-4 * ratio.mean(), "one number for all"


def test_a_transform_gets_each_batch(store: flexcache.Store) -> None:
    sizes = list(training.stream(store, "resid_post", 0, transform=len, drop_last=True, **SMALL))  # type: ignore[arg-type]
    assert sizes == [32] * (store.n_rows // 32)


def test_rows_that_are_not_committed_are_left_out_or_refused(tmp_path: Path) -> None:
    documents = [{"id": str(i), "tokens": [1] * 40} for i in range(40)]
    with flexcache.record(
        tmp_path / "half.zarr", documents, sites={"resid_post": (1, 4)}, model="x", dtype="float32", batch_tokens=64
    ) as to:
        for batch in to.batches():
            if batch.unit > 1:
                break
            to.put("resid_post", np.ones((len(batch.rows), 4)), rows=batch.rows, layer=0)
    store = flexcache.open(tmp_path / "half.zarr")
    assert 0 < len(store.committed_rows) < store.n_rows
    stream = training.stream(store, "resid_post", return_tokens=True, **SMALL)
    assert sorted(rows_of(list(stream))) == store.committed_rows.tolist()
    with pytest.raises(UncommittedError, match="not committed"):
        training.stream(store, "resid_post", rows=[store.n_rows - 1])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_size": 0}, ConfigError, "at least 1"),
        ({"normalize": "unit"}, ConfigError, "no normalisation"),
        ({"rank": 2, "ranks": 2}, ConfigError, "below ranks"),
        ({"rank": 1}, ConfigError, "given together"),
        ({"site": "resid_pots"}, SiteError, "did you mean resid_post"),
        ({"layer": 9}, SiteError, "not captured"),
        ({"layer": None}, SiteError, "has layers, and none is given"),
        ({"rows": np.zeros(0, np.int64)}, StoreError, "no rows to stream"),
        ({"rows": [3, 4, 3]}, ConfigError, "a row more than once"),
        ({"rows": [-1, 0, sum(LENGTHS) - 1]}, ConfigError, "a row more than once"),
        ({"rows": np.ones(sum(LENGTHS), int)}, ConfigError, r"more than once[\s\S]*mask.astype\(bool\)"),
        ({"rows": [True, False]}, ConfigError, "rows cannot be read"),
        ({"rows": [0.5]}, ConfigError, "rows cannot be read"),
        ({"rows": 10**6}, ConfigError, "rows cannot be read"),
        ({"rows": "last"}, ConfigError, "cannot be selected by a word"),
        ({"dtype": "bf16"}, ConfigError, "dtype cannot be read"),
        ({"dtype": np.int8}, ConfigError, "dtype cannot be read"),
        ({"dtype": torch.int64}, ConfigError, "dtype cannot be read"),
        ({"dtype": "Tensor"}, ConfigError, "dtype cannot be read"),
        ({"layer": None, "layers": []}, ConfigError, "no layer is given"),
        ({"layer": None, "layers": [1, 1]}, ConfigError, "given twice"),
        ({"layers": [1]}, ConfigError, "both given"),
        ({"site": None}, ConfigError, "no site is given"),
        ({"site": []}, ConfigError, "no site is given"),
        ({"site": 3}, ConfigError, "site cannot be read"),
        ({"site": ["resid_post", "resid_post"]}, ConfigError, "given twice"),
        ({"seed": "x"}, ConfigError, "seed is a whole number"),
        ({"seed": -1}, ConfigError, "seed is a whole number"),
        ({"seed": None}, ConfigError, "seed is a whole number"),
        ({"batch_size": 4.0}, ConfigError, "at least 1"),
        ({"rank": "0", "ranks": "2"}, ConfigError, "whole numbers"),
        ({"transform": 2}, ConfigError, "function of a batch"),
        ({"thread": 2}, ConfigError, "did you mean threads"),
    ],
)
def test_invalid_stream_arguments_are_refused(store: Any, options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        training.stream(store, **{"site": "resid_post", "layer": 0, **options})


@pytest.mark.parametrize("wrong", [{}, {"a": 3}, None])
def test_a_value_that_is_not_a_store_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="no store"):
        training.stream(wrong, "resid_post", 0)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("bfloat16", torch.bfloat16), ("torch.float32", torch.float32), (np.float16, torch.float16)],
)
def test_a_dtype_may_be_a_name_or_a_numpy_dtype(store: flexcache.Store, dtype: Any, expected: torch.dtype) -> None:
    assert next(iter(training.stream(store, "resid_post", 0, dtype=dtype, **SMALL))).dtype == expected


OTHER: list[dict[str, Any]] = [
    {"batch_size": 16},
    {"run_bytes": 600},
    {"pool_bytes": 3000},
    {"drop_last": True},
    {"rows": np.arange(3, sum(LENGTHS))},
    {"rows": np.arange(sum(LENGTHS) - 3)},
    {"rank": 0, "ranks": 2},
]


@pytest.mark.parametrize("other", OTHER, ids=lambda other: next(iter(other)))
@pytest.mark.parametrize("loads", ["stream", "loader"])
def test_a_state_of_another_order_is_refused(store: flexcache.Store, other: dict[str, Any], loads: str) -> None:
    def made(**options: Any) -> Any:
        stream = training.stream(store, "resid_post", 0, **{**SMALL, **options})
        return stream if loads == "stream" else stream.loader()

    first = made()
    next(iter(first))
    state = first.state_dict()
    with pytest.raises(ConfigError, match=r"the state is of another[\s\S]*with the rows and arguments"):
        made(**other).load_state_dict(state)
    again = made()
    again.load_state_dict(state)
    assert len(list(again)) == len(again) - 1
    earlier = {"epoch": 2, "batches": 3, "seed": 0, "of_rank": loads == "loader", "batch_size": 32}
    with pytest.raises(ConfigError, match=r"of an earlier version[\s\S]*stream.epoch = 2"):
        again.load_state_dict(earlier)


def test_a_state_is_plain_data_and_a_loader_resumes_from_a_stream_state(store: flexcache.Store, tmp_path: Path) -> None:
    options: dict[str, Any] = {**SMALL, "batch_size": np.int64(32), "seed": np.int64(4)}
    stream = training.stream(store, "resid_post", 0, **options)
    next(iter(stream))
    torch.save(stream.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    loader = training.stream(store, "resid_post", 0, **options).loader()
    loader.load_state_dict(state)
    assert len(list(loader)) == len(loader) - 1
    with pytest.raises(ConfigError, match="one worker of several"):
        training.stream(store, "resid_post", 0, **options).loader(2).load_state_dict({**state, "worker": [0, 2]})


@pytest.mark.parametrize("wrong", [{}, None, 3, {"epoch": 0}, "bad batches"])
def test_a_value_that_is_not_a_state_is_refused(store: flexcache.Store, wrong: Any) -> None:
    stream = training.stream(store, "resid_post", 0, **SMALL)
    state = {**stream.state_dict(), "batches": -1} if wrong == "bad batches" else wrong
    for one in (stream, stream.loader()):
        with pytest.raises(ConfigError, match="not a state to resume from"):
            one.load_state_dict(state)


def test_a_partly_read_stream_lets_the_interpreter_exit(store: flexcache.Store) -> None:
    import subprocess
    import sys

    code = (
        "import flexcache, os, sys; os.held = iter(flexcache.training.stream(sys.argv[1], 'resid_post', 0,"
        " batch_size=32, run_bytes=300, pool_bytes=600)); next(os.held)  # os outlives most modules"
    )
    found = subprocess.run([sys.executable, "-c", code, str(store.path)], check=True, capture_output=True, text=True)
    assert found.stderr == ""


def test_importing_flexcache_imports_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, flexcache; assert 'torch' not in sys.modules; flexcache.training; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_epoch_without_a_whole_batch_is_refused(store: flexcache.Store) -> None:
    few = np.arange(255)
    with pytest.raises(ConfigError, match=r"no whole batch[\s\S]*batches of 256 on 1 ranks[\s\S]*found: 255"):
        training.stream(store, "resid_post", 0, batch_size=256, rows=few, drop_last=True)
    assert [len(b) for b in training.stream(store, "resid_post", 0, batch_size=256, rows=few)] == [255]
    assert len(list(training.stream(store, "resid_post", 0, batch_size=255, rows=few, drop_last=True))) == 1

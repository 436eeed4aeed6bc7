"""Virtual layers read through an attached model, against a full store of the same capture."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import flexcache
from analysis import comparison, moments, onepass, probes
from flexcache import training
from flexcache.errors import ConfigError, FlexCacheError, MismatchError, SiteError
from flexcache.store.format.ledger import with_checksum
from flexcache.store.storage.atomic_files import json_bytes
from flexcache.training.preshuffle import preshuffle
from tests.corpora import lengths, token_documents
from tests.models import DEPTH, VOCABULARY, tiny

SITES = ["resid_post", "mlp_post", "z"]
EVERY = [(site, layer) for site in SITES for layer in range(DEPTH)]
DOCUMENTS = token_documents(lengths(40, longest=12), vocabulary=VOCABULARY)
CAPTURE: dict[str, Any] = {"sites": SITES, "batch_tokens": 40, "progress": False}
Made = tuple[Path, Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Return the paths of a store with all layers, and of one that keeps the residual stream of one layer."""
    folder = tmp_path_factory.mktemp("virtual")
    flexcache.capture(tiny("llama"), None, DOCUMENTS, folder / "full", **CAPTURE)
    flexcache.capture(tiny("llama"), None, DOCUMENTS, folder / "virtual", keep={"resid_post": [1]}, **CAPTURE)
    return folder / "full", folder / "virtual"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a folder with the model."""
    folder = tmp_path_factory.mktemp("model")
    tiny("llama").save_pretrained(folder)
    return str(folder)


@contextmanager
def counted(model: nn.Module) -> Iterator[Counter[int]]:
    """Count the forwards of each block that compute something, by hooks on its attention."""
    calls: Counter[int] = Counter()
    handles = [
        block.self_attn.register_forward_hook(lambda _, args, output, number=number: calls.update([number]))
        for number, block in enumerate(model.model.layers)
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def counting(store: flexcache.Store) -> Any:
    """Return the counter of the model that is attached to a store."""
    return counted(store.attached.walk().model)


def batches(store: flexcache.Store) -> int:
    """Return the number of batches of a store's plan."""
    table = store.tokens
    return len(set(zip(table["unit"].to_pylist(), table["batch"].to_pylist(), strict=True)))


def test_virtual_layers_are_read_as_those_of_a_full_store(made: Made) -> None:
    full, store = map(flexcache.open, made)
    assert store.layers("resid_post") == (1,)
    assert store.layers("mlp_post") == ()
    with flexcache.attach(store, tiny("llama")) as attached:
        assert attached is store
        assert store.layers("mlp_post") == tuple(range(DEPTH))
        for site, layer in EVERY:
            assert np.array_equal(store.read(site, layer, raw=True), full.read(site, layer, raw=True))
            scanned = {rows.start: values.copy() for rows, values in store.scan(site, layer)}
            assert all(np.array_equal(full.read(site, layer, slice(at, at + len(v))), v) for at, v in scanned.items())
        chosen = np.array([200, 3, -1, 3])
        assert np.array_equal(store.read("z", -1, chosen), full.read("z", -1, chosen))
        assert np.array_equal(store["mlp_post"].values, full["mlp_post"].values)
        assert np.array_equal(store.dataset()["z"].values, full.dataset()["z"].values)
        assert store.attached.notes == []
    assert store.layers("mlp_post") == ()


@pytest.mark.parametrize("site", ["resid_post", "mlp_post"])
def test_a_virtual_layer_without_a_model_is_one_clear_error(site: str, made: Made) -> None:
    store = flexcache.open(made[1])
    for read in (
        lambda: store.read(site, 2),
        lambda: next(iter(store.scan(site, 2))),
        lambda: training.stream(store, site, layer=2, batch_size=4),
        lambda: flexcache.export(made[1], made[1].parent / "x", "npy", sites=[site], layers=[2]),
        lambda: onepass.read(store, site, {"m": moments.Moments()}, layers=[2], progress=False),
        lambda: probes.sweep(store, "label", site, layers=[2], progress=False),
    ):
        with pytest.raises(SiteError, match=r"virtual(.|\n)*flexcache.attach\(store, model\)"):
            read()


def test_lazy_arrays_of_a_detached_model_are_a_clear_error(made: Made) -> None:
    store = flexcache.open(made[1])
    with flexcache.attach(store, tiny("llama")):
        lazy = store["mlp_post"]
    with pytest.raises(SiteError, match="was detached"):
        lazy.compute()


def test_a_small_read_runs_only_the_blocks_and_batches_that_it_needs(made: Made) -> None:
    store = flexcache.open(made[1])
    with flexcache.attach(store, tiny("llama")), counting(store) as calls:
        row = int(store.rows(position=-1)[3])
        plan = store.explain("mlp_post", 2, [row])
        assert "mlp_post 2, from resid_post 1, block 2, 1 batches" in repr(plan)
        store.read("mlp_post", 2, [row])
        assert calls == {2: 1}
        assert plan.blocks == 1
        store.read("mlp_post", 2, [row])
        assert calls == {2: 1}  # from the cache
        assert store.explain("mlp_post", 2, [row]).cached == (("mlp_post", 2),)


def test_an_explained_plan_is_what_runs(made: Made) -> None:
    store = flexcache.open(made[1])
    with flexcache.attach(store, tiny("llama")), counting(store) as calls:
        plan = store.explain("resid_post", "all", store.rows(position=0))
        store.prefetch("resid_post", "all", store.rows(position=0))
        assert plan.blocks == sum(calls.values()) > 0


def test_a_sweep_over_all_layers_runs_each_block_once_for_each_batch_and_has_the_same_scores(made: Made) -> None:
    full, store = map(flexcache.open, made)
    kept = {"rows": "last", "progress": False}
    expected = probes.sweep(full, "label", "resid_post", **kept)
    with flexcache.attach(store, tiny("llama")), counting(store) as calls:
        found = probes.sweep(store, "label", "resid_post", **kept)
        assert max(calls.values()) <= batches(store)
    assert found.results.identical(expected.results)


@pytest.mark.parametrize("scheduler", ["synchronous", "threads"])
def test_statistics_run_each_block_once_for_each_batch_and_are_equal_to_the_bit(made: Made, scheduler: str) -> None:
    full, store = map(flexcache.open, made)
    asked = {"moments": moments.Moments()}
    settings: Any = {"progress": False, "scheduler": scheduler}
    for site in SITES:
        expected = onepass.read(full, site, asked, **settings)["moments"]
        with flexcache.attach(store, tiny("llama")), counting(store) as calls:
            assert onepass.read(store, site, asked, **settings)["moments"].identical(expected)
            assert max(calls.values()) <= batches(store)


def test_a_layer_after_a_cached_one_starts_from_it(made: Made) -> None:
    store = flexcache.open(made[1])
    with flexcache.attach(store, tiny("llama")), counting(store) as calls:
        for layer in range(DEPTH):
            store.read("resid_post", layer)
        whole = batches(store)
        assert calls[3] == whole
        assert calls[2] < 1.5 * whole


def test_a_model_that_was_changed_after_it_was_attached_is_found_by_the_digests(made: Made) -> None:
    store, model = flexcache.open(made[1]), tiny("llama")
    with flexcache.attach(store, model):
        with torch.no_grad():
            model.model.layers[2].mlp.up_proj.weight[0, 0] += 0.5
        with pytest.raises(MismatchError, match="not those of the capture") as raised:
            store.read("mlp_post", 2)
        assert "mlp_post of layer 2" in str(raised.value)
        assert "unit 0" in str(raised.value)
        with pytest.raises(MismatchError):  # nothing wrong was cached
            store.read("mlp_post", 2)


def test_another_model_is_refused(made: Made) -> None:
    other = tiny("llama")
    with torch.no_grad():
        other.lm_head.weight[0] += 1
    with pytest.raises(MismatchError, match="weights"):
        flexcache.attach(made[1], other)
    with pytest.raises(ConfigError, match="attached to the store already"):
        store = flexcache.open(made[1])
        with flexcache.attach(store, tiny("llama")):
            flexcache.attach(store, tiny("llama"))


@pytest.mark.parametrize("family", ["mixtral", "t5_encoder"])
def test_a_model_that_cannot_start_from_a_residual_stream_is_run_from_the_beginning(
    family: str, tmp_path: Path
) -> None:
    documents, settings = DOCUMENTS[:12], {**CAPTURE, "sites": ["resid_post", "attn_out"]}
    flexcache.capture(tiny(family), None, documents, tmp_path / "f", **settings)
    flexcache.capture(tiny(family), None, documents, tmp_path / "v", keep={"resid_post": [0, 2]}, **settings)
    full, store = flexcache.open(tmp_path / "f"), flexcache.open(tmp_path / "v")
    with flexcache.attach(store, tiny(family)):
        for site, layer in [("resid_post", 1), ("attn_out", 3), ("resid_post", 3)]:
            assert np.array_equal(store.read(site, layer), full.read(site, layer))
        assert family != "t5_encoder" or "not exact for this model" in store.attached.notes[0]


def test_rows_of_other_conditions_need_a_tolerance(made: Made, tmp_path: Path) -> None:
    before = torch.get_float32_matmul_precision()
    (tmp_path / "v").symlink_to(made[1])
    store, model = flexcache.open(made[1]), tiny("llama")

    def nudged(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output * (1 + 1e-6)

    torch.set_float32_matmul_precision("high" if before == "highest" else "highest")
    try:
        with flexcache.attach(store, model):
            model.model.layers[2].mlp.down_proj.register_forward_hook(nudged)  # in place of another device
            with pytest.raises(MismatchError, match="tolerance=0.001"):
                store.read("resid_post", 2)
        model = tiny("llama")
        with flexcache.attach(store, model, tolerance=1e-3) as opened:
            model.model.layers[2].mlp.down_proj.register_forward_hook(nudged)
            found = opened.read("resid_post", 2)
            assert "other conditions" in opened.attached.notes[-1]
            assert "matmul_precision" in opened.attached.notes[-1]
        assert np.allclose(found, flexcache.open(made[0]).read("resid_post", 2), atol=1e-4)
    finally:
        torch.set_float32_matmul_precision(before)


def test_rows_are_recomputed_with_the_threads_of_the_capture(tmp_path: Path) -> None:
    before, model, seen = torch.get_num_threads(), tiny("llama"), list[int]()
    try:
        torch.set_num_threads(2)
        flexcache.capture(model, None, DOCUMENTS, tmp_path / "two", keep={"resid_post": [1]}, **CAPTURE)
        torch.set_num_threads(1)
        with flexcache.attach(tmp_path / "two", model) as store:
            block = model.model.layers[2]
            handle = block.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
            store.read("z", 2, [0])
            handle.remove()
        assert set(seen) == {2}
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_threads_share_a_model(made: Made) -> None:
    full, store = map(flexcache.open, made)
    with flexcache.attach(store, tiny("llama")), ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda key: store.read(*key), EVERY))
    assert all(np.array_equal(values, full.read(*key)) for values, key in zip(found, EVERY, strict=True))


def test_the_cache_stays_within_its_bytes(made: Made) -> None:
    full, store = map(flexcache.open, made)
    most = 300_000
    with flexcache.attach(store, tiny("llama"), cache_bytes=most):
        for _ in range(2):
            for site, layer in EVERY:
                assert np.array_equal(store.read(site, layer), full.read(site, layer))
                assert store.attached.cache.used_bytes <= most
        folder = store.attached.cache.folder
        assert folder.exists()
    assert not folder.exists()


def test_a_cache_is_shared_and_outlives_the_model(made: Made, tmp_path: Path) -> None:
    store, other = flexcache.open(made[1]), flexcache.open(made[1])
    with flexcache.attach(store, tiny("llama"), cache=tmp_path / "c"):
        store.read("mlp_post", 3)
    with flexcache.attach(other, tiny("llama"), cache=tmp_path / "c"), counting(other) as calls:
        assert np.array_equal(other.read("mlp_post", 3), flexcache.open(made[0]).read("mlp_post", 3))
        assert not calls


def test_a_loaded_model_is_not_sent_to_other_processes(made: Made) -> None:
    store = flexcache.open(made[1])
    with flexcache.attach(store, tiny("llama")):
        for value in (store, store["mlp_post"]):
            with pytest.raises(ConfigError, match="each worker loads"):
                pickle.dumps(value)


WORKER = """
import pickle, sys, numpy
lazy = pickle.load(sys.stdin.buffer)
assert "torch" not in sys.modules
numpy.save(sys.stdout.buffer, lazy.values)
"""


def test_a_worker_process_loads_the_model_by_its_source(made: Made, source: str) -> None:
    full, store = map(flexcache.open, made)
    with flexcache.attach(store, source):
        sent = pickle.dumps(store["mlp_post"].isel(layer=2))
        ran = subprocess.run([sys.executable, "-c", WORKER], input=sent, capture_output=True, check=False)
    assert ran.returncode == 0, ran.stderr.decode()
    assert np.array_equal(np.load(BytesIO(ran.stdout)), full["mlp_post"].isel(layer=2).values)


def test_streams_exports_and_shuffles_read_virtual_layers(made: Made, tmp_path: Path) -> None:
    full, store = map(flexcache.open, made)
    with flexcache.attach(store, tiny("llama")):
        asked: Any = {"layers": [0, 2, 3], "batch_size": 16, "seed": 1}
        for ours, theirs in zip(
            islice(training.stream(store, "resid_post", **asked), 20),
            islice(training.stream(full, "resid_post", **asked), 20),
            strict=True,
        ):
            assert torch.equal(ours, theirs)
        flexcache.export(store, tmp_path / "v", "npy", sites=["mlp_post"])
        shuffled = preshuffle(store, tmp_path / "s", sites=["mlp_post"])
    flexcache.export(made[0], tmp_path / "f", "npy", sites=["mlp_post"])
    for layer in range(DEPTH):
        name = f"mlp_post.layer_{layer}.npy"
        assert (tmp_path / "v" / name).read_bytes() == (tmp_path / "f" / name).read_bytes()
        order = np.array(shuffled.token_label("source_row"))
        assert np.array_equal(shuffled.read("mlp_post", layer), full.read("mlp_post", layer, order))
    with flexcache.attach(store, tiny("llama"), cache_bytes=1000), pytest.raises(ConfigError, match="random order"):
        preshuffle(store, tmp_path / "t", sites=["mlp_post"])


def test_all_layers_without_a_model_are_those_on_disk_which_is_said(made: Made) -> None:
    with pytest.warns(UserWarning, match="layers 0, 2, 3 of resid_post are virtual and are left out"):
        found = probes.sweep(flexcache.open(made[1]), "label", "resid_post", rows="last", progress=False)
    assert list(found.layers) == [1]


def test_a_comparison_names_the_virtual_layers_that_it_leaves_out(made: Made) -> None:
    full, kept = (flexcache.open(path) for path in made)
    found = comparison.compare_stores(full, kept, progress=False)
    assert {site: result["layer"].values.tolist() for site, result in found.results.items()} == {"resid_post": [1]}
    assert found.skipped["resid_post, layer 0, 2, 3"] == "virtual in the second store: attach its model to compare them"
    assert "z, layer 0, 1, 2, 3" in found.skipped


def test_reading_without_a_model_does_not_import_torch(made: Made) -> None:
    code = (
        f"import flexcache, sys; s = flexcache.open({str(made[1])!r}); s.read('resid_post', 1);"
        " print(s.explain('mlp_post', 2)); assert 'torch' not in sys.modules"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("options", [{"cache_bytes": 0}, {"cache_bytes": "many"}, {"tolerance": 0}, {"cach": "x"}])
def test_options_are_checked_first(options: dict[str, Any], made: Made) -> None:
    with pytest.raises(FlexCacheError, match=next(iter(options))):
        flexcache.attach(made[1], object(), **options)  # type: ignore[arg-type]


def test_a_damaged_digest_is_found(made: Made, tmp_path: Path) -> None:
    flexcache.capture(tiny("llama"), None, DOCUMENTS[:4], tmp_path / "v", keep={}, **CAPTURE)
    record = tmp_path / "v" / "ledger" / "0" / "0.json"
    content = json.loads(record.read_bytes())
    content["virtual"] = {name: ["0" * 32] * len(held) for name, held in content["virtual"].items()}
    plain = {name: value for name, value in content.items() if name != "xxh3_128"}
    record.write_bytes(json_bytes(with_checksum(plain)))
    store = flexcache.open(tmp_path / "v")
    with flexcache.attach(store, tiny("llama")), pytest.raises(MismatchError, match="verify tells"):
        store.read("z", 0)

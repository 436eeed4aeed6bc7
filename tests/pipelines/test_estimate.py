from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import flexcache
from tests.pipelines.test_cli import run


def told(capsys: pytest.CaptureFixture[str], config: Path, *options: object) -> dict[str, Any]:
    text = run(capsys, "estimate", config, "-q", "--json", *options)
    return json.loads(text)


def inodes(store: Path) -> tuple[int, int]:
    """Count the files and folders of a store, without the notes of runs."""
    found = [(folder, names) for folder, _, names in os.walk(store)]
    return sum(len(names) for folder, names in found if Path(folder).name != "runs"), len(found)


def test_an_estimate_of_the_whole_corpus_equals_plan_and_store(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = told(capsys, config, "--tokens-per-second", 1000, "--set", "batch_tokens=16")
    assert not Path("run.zarr").exists()
    assert [path.name for path in Path().iterdir()] == ["config.yaml"]
    run(capsys, "capture", config, "-q", "--set", "batch_tokens=16")
    store = flexcache.open("run.zarr")
    assert store.n_units > 1
    for name, value in found["plan"].items():
        assert store.plan[name] == value, name
    assert found["sample"] == {"documents": 80, "tokens_error": 0.0}

    shards = [path for path in Path("run.zarr").glob("*/c/**/0") if path.is_file() and path.parts[1] in store.arrays]
    assert found["bytes"]["shards"] == sum(path.stat().st_size for path in shards)
    assert found["plan"]["files"] == len(shards)
    assert (found["inodes"]["files"], found["inodes"]["folders"]) == inodes(store.path)
    tables = [store.path / "documents.parquet", store.path / "sequences.parquet"]
    tables += [path for name in ("token_id", "position", "document") for path in (store.path / name).rglob("*")]
    assert found["bytes"]["tables"] == sum(path.stat().st_size for path in tables if path.is_file())


def test_bytes_and_records_of_the_ledger(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from flexcache.store.manage.footprint import footprint

    run(capsys, "capture", config, "-q", "--set", "batch_tokens=16")
    store = flexcache.open("run.zarr")
    records = [store.ledger.path(unit) for unit in store.ledger.units()]
    fingerprint = store.ledger.read_record(0).fingerprint
    expected = footprint(list(store.arrays.values()), store.n_rows, store.shard_rows, fingerprint).ledger_bytes
    assert sum(path.stat().st_size for path in records) == pytest.approx(expected, rel=0.02)


def test_hours_memory_and_cost_follow_from_the_rates(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--tokens-per-second", 50, "--write-rate", 1e-3, "--processes", 4)
    found = told(capsys, config, *options, "--price-hour", 3, "--price-tb-month", 20)
    model = found["plan"]["tokens_padded"] / 50 / 4 / 3600
    disk = found["bytes"]["total"] / 1000 / 3600
    assert found["hours"]["model"] == pytest.approx(model)
    assert found["hours"]["disk"] == pytest.approx(disk)
    assert found["hours"]["total"] == pytest.approx(max(model, disk))
    assert found["cost"]["compute"] == pytest.approx(3 * 4 * max(model, disk))
    assert found["cost"]["storage_month"] == pytest.approx(20 * found["bytes"]["total"] / 1e12)
    weights = sum(path.stat().st_size for path in Path(str(config_model(config))).glob("*.safetensors"))
    assert found["memory"]["weights"] == pytest.approx(weights, rel=0.05)
    assert found["memory"]["host"] == found["memory"]["weights"] + (256 << 20)
    text = run(capsys, "estimate", config, "-q", *options, "--price-hour", 3)
    for part in ("bound by the disk", "4 processes", "cost of the capture", "all tokenized", "weights"):
        assert part in text


def config_model(config: Path) -> str:
    return config.read_text().splitlines()[0].removeprefix("model: ")


def test_the_model_is_tried_and_no_files_are_left(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, config, "--seconds", 0.2)
    trial = found["trial"]
    assert trial["batches"] >= 4
    assert trial["seconds"] >= 0.2
    assert found["tokens_per_second"] == pytest.approx(trial["tokens"] / trial["seconds"])
    assert trial["error"] > 0
    assert trial["host_bytes"] > found["memory"]["weights"]
    assert found["write_rate"] > 0
    assert [path.name for path in Path().iterdir()] == ["config.yaml"]
    text = run(capsys, "estimate", config, "--seconds", 0.1)
    assert "peak of the trial" in text


def test_batches_of_equal_lengths_are_estimated_as_they_are_captured(
    config: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import FNetConfig, FNetModel

    shutil.copytree(checkpoint, "fnet")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
    FNetModel(FNetConfig(vocab_size=257, pad_token_id=0, **sizes)).save_pretrained("fnet")
    capsys.readouterr()
    text = config.read_text().replace(str(checkpoint), "fnet").replace("  mlp_post: [0, -1]\n", "")
    config.write_text(text)
    found = told(capsys, config, "--seconds", 0.1)
    assert found["plan"]["tokens_padded"] == found["plan"]["tokens_run"]
    run(capsys, "capture", config)
    store = flexcache.open("run.zarr")
    assert {name: store.plan[name] for name in found["plan"]} == found["plan"]
    assert store.provenance.others["batching"]["batches"] == "equal_lengths"


def test_int8_is_estimated_as_it_is_captured(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, config, "--seconds", 0.1, "--set", "dtype=int8")
    assert found["trial"]["batches"] >= 4
    run(capsys, "capture", config, "-q", "--set", "dtype=int8")
    store = flexcache.open("run.zarr")
    shards = [path for path in Path("run.zarr").glob("*/c/**/0") if path.is_file() and path.parts[1] in store.arrays]
    assert found["bytes"]["shards"] == sum(path.stat().st_size for path in shards)
    assert {array.dtype for array in store.arrays.values()} == {"int8", "float32"}, "values, and a scale for each row"


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "table of files"])
def test_a_sample_estimates_the_whole_corpus(kind: str, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{word}" for word in rng.integers(4, 250, n)) for n in rng.integers(1, 60, 20_000)]
    table = pa.table({"id": [f"d{i}" for i in range(len(texts))], "text": texts})
    if kind == "jsonl":
        Path("texts.jsonl").write_text("\n".join(json.dumps(row) for row in table.to_pylist()))
        path = "texts.jsonl"
    elif kind == "parquet":
        pq.write_table(table, "texts.parquet", row_group_size=700)
        path = "texts.parquet"
    else:
        for part in range(4):
            pq.write_table(table.slice(part * 5000, 5000), f"texts-{part}.parquet")
        path = "texts-*.parquet"
    options = ("--tokens-per-second", 1000, "--set", f"documents={path}")
    found = told(capsys, config, *options, "--sample", 1000)
    whole = told(capsys, config, *options, "--sample", 20_000)
    assert found["sample"]["documents"] == 960
    assert whole["sample"]["tokens_error"] == 0
    error = found["sample"]["tokens_error"]
    assert 0.005 < error < 0.1
    for name in ("rows", "tokens", "tokens_run", "tokens_padded"):
        assert found["plan"][name] == pytest.approx(whole["plan"][name], rel=1.5 * error), name
    assert found["plan"]["documents"] == whole["plan"]["documents"] == 20_000
    assert found["plan"]["shard_rows"] == whole["plan"]["shard_rows"]
    assert found["bytes"]["tables"] == pytest.approx(whole["bytes"]["tables"], rel=0.15)
    text = run(capsys, "estimate", config, "-q", *options, "--sample", 1000)
    assert "960 tokenized" in text
    assert "±" in text


def test_a_corpus_that_drifts_has_a_larger_error(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(lengths: np.ndarray) -> float:
        texts = [" ".join(["w5"] * int(n)) for n in lengths]
        pq.write_table(pa.table({"text": texts}), "texts.parquet")
        options = ("--tokens-per-second", 1000, "--set", "documents=texts.parquet", "--sample", 640)
        return told(capsys, config, *options)["sample"]["tokens_error"]

    lengths = np.random.default_rng(0).integers(1, 60, 10_000)
    assert error(np.sort(lengths)) > 2 * error(lengths)


def test_parquet_row_groups_outside_of_the_sample_are_not_read(tmp_path: Path) -> None:
    from flexcache.documents.runs import spread_runs

    table = pa.table({"id": [str(i) for i in range(1000)], "text": [f"w{i % 7}" for i in range(1000)]})
    pq.write_table(table, tmp_path / "texts.parquet", row_group_size=10, compression="none")
    documents = flexcache.open_documents(tmp_path / "texts.parquet")
    runs = spread_runs(1000, 4, seed=1)
    content = bytearray((tmp_path / "texts.parquet").read_bytes())
    file = pq.ParquetFile(tmp_path / "texts.parquet")
    for group in range(file.num_row_groups):
        if not any(run.start < 10 * group + 10 and 10 * group < run.stop for run in runs):
            column = file.metadata.row_group(group).column(1)
            start = column.dictionary_page_offset or column.data_page_offset
            content[start : start + 8] = b"\xff" * 8
    (tmp_path / "texts.parquet").write_bytes(content)
    found = [name for batch in documents.select_runs(runs).batches() for name in batch.column("id").to_pylist()]
    assert found == [str(i) for run in runs for i in run]
    with pytest.raises(flexcache.errors.DocumentsError):
        list(documents.batches())


def test_an_estimate_fails_where_the_capture_would_fail(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "estimate", config, "-q", "--set", "model.parallel={tensor: 2}", status=2)
    assert "--tokens-per-second" in text
    assert "resid_post" in run(capsys, "estimate", config, "--set", "sites=resid_pots", status=1)


def test_a_disk_that_is_too_small_is_reported(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(".")
    monkeypatch.setattr("pipelines.forecast.shutil.disk_usage", lambda path: usage._replace(free=10))
    assert "too little" in run(capsys, "estimate", config, "-q", "--tokens-per-second", 1, "--write-rate", 100)

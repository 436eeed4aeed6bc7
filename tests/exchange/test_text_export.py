"""Exports with texts, for activation oracles and natural-language autoencoders, read by pyarrow, datasets and yaml."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import flexcache
from flexcache.errors import ConfigError, MismatchError
from flexcache.exchange import text_export
from tests.corpora import build_store, padded_activation
from tests.sequences.conftest import WORDS

LAYERS = (0, 3)


def word_tokenizer() -> Any:
    """A word a token, with an opening and a closing special token around a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "<s>", "</s>", "<pad>", *WORDS]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


@pytest.fixture(scope="module")
def words() -> Any:
    return word_tokenizer()


def texts(count: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    return [
        {"id": f"d{n}", "text": " ".join(rng.choice(WORDS, rng.integers(1, 30))), "label": n % 3, "layer": "a label"}
        for n in range(count)
    ]


@pytest.fixture(scope="module")
def store(words: Any, tmp_path_factory: pytest.TempPathFactory) -> flexcache.Store:
    return build_store(tmp_path_factory.mktemp("texts") / "run.zarr", texts(80), tokenizer=words, dtype="bfloat16")


def export(store: flexcache.Store, out: Path, to: str, words: Any, **options: Any) -> list[Path]:
    return flexcache.export(store.path, out, to, sites=["resid_post"], tokenizer=words, **options)


def test_the_table_of_an_oracle_has_vectors_layers_positions_and_texts(
    store: flexcache.Store, words: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_export, "GROUP_BYTES", 10_000)
    files = export(store, tmp_path / "out", "activation-oracle", words)
    assert [path.name for path in files] == ["train.layer_0.parquet", "train.layer_3.parquet"]
    assert pq.ParquetFile(files[0]).num_row_groups > 3
    documents = {line["id"]: line for line in texts(80)}
    for layer, path in zip(LAYERS, files, strict=True):
        found = pq.read_table(path)
        assert found.schema.field("activation_vector").type == pa.list_(pa.float32())
        assert len(found) == store.n_rows
        vectors = np.array(found.column("activation_vector").to_pylist(), np.float32)
        assert np.array_equal(vectors, store.read("resid_post", layer))
        for line in found.select([n for n in found.column_names if n != "activation_vector"]).to_pylist():
            document = documents[line["document"]]
            ids = words(document["text"]).input_ids
            assert line["layer"] == layer
            assert line["token_id"] == ids[line["position"]]
            assert line["text"] == words.decode(ids[: line["position"] + 1], skip_special_tokens=True)
            assert (line["label"], line["label_layer"]) == (document["label"], "a label")


def test_the_table_of_an_autoencoder_is_that_of_its_first_stage(
    store: flexcache.Store, words: Any, tmp_path: Path
) -> None:
    files = export(store, tmp_path / "out", "nla", words, layers=[3], per_document=4, min_position=2)
    assert [path.name for path in files] == ["base.layer_3.parquet"]
    found = pq.read_table(files[0])
    expected = [
        ("n_raw_tokens", pa.int64()),
        ("detokenized_text_truncated", pa.string()),
        ("activation_vector", pa.list_(pa.float32(), 24)),
        ("activation_layer", pa.int64()),
        ("doc_id", pa.string()),
    ]
    assert [(field.name, field.type) for field in found.schema] == expected
    documents = {line["id"]: line["text"] for line in texts(80)}
    counts: dict[str, int] = {}
    for line in found.to_pylist():
        counts[line["doc_id"]] = counts.get(line["doc_id"], 0) + 1
        ids = words(documents[line["doc_id"]]).input_ids[: line["n_raw_tokens"]]
        assert line["n_raw_tokens"] >= 3
        assert line["detokenized_text_truncated"] == words.decode(ids, skip_special_tokens=True)
        row = store.rows(line["doc_id"])[line["n_raw_tokens"] - 1]
        assert np.array_equal(np.float32(line["activation_vector"]), store.read("resid_post", 3, [row])[0])
    sizes = {name: len(words(text).input_ids) for name, text in documents.items()}
    assert counts == {name: min(4, size - 2) for name, size in sizes.items() if size > 2}
    meta = yaml.safe_load((tmp_path / "out" / "base.layer_3.parquet.nla_meta.yaml").read_text())
    assert (meta["kind"], meta["schema_version"], meta["stage"]) == ("nla_dataset", 1, "base")
    assert meta["row_count"] == len(found)
    extraction = meta["extraction"]
    keys = ["base_model", "corpus", "corpus_slice", "d_model", "layer_index", "norm", "positions_per_doc"]
    assert sorted(extraction) == keys
    assert (extraction["base_model"], extraction["d_model"], extraction["layer_index"]) == ("arithmetic", 24, 3)
    assert (extraction["norm"], extraction["positions_per_doc"]) == ("none", 4)


def test_datasets_reads_the_tables(store: flexcache.Store, words: Any, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    for to in ("activation-oracle", "nla"):
        files = export(store, tmp_path / to, to, words, limit=50)
        found = datasets.Dataset.from_parquet([str(path) for path in files], cache_dir=str(tmp_path / "cache"))
        assert len(found) == 100
        assert len(found[0]["activation_vector"]) == 24


@settings(max_examples=15)
@given(
    st.integers(1, 9) | st.none(), st.integers(0, 12), st.integers(1, 500) | st.none(), st.integers(0, 3),
    st.integers(500, 60_000),
)  # fmt: skip
def test_chosen_rows_do_not_depend_on_row_groups(
    store: flexcache.Store, words: Any, tmp_path_factory: pytest.TempPathFactory, each: int | None, least: int,
    limit: int | None, seed: int, group: int,
) -> None:  # fmt: skip
    options: Any = {"per_document": each, "min_position": least, "limit": limit, "seed": seed, "layers": [3]}
    tables = []
    for size in (group, 1 << 30):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(text_export, "GROUP_BYTES", size)
            (path,) = export(store, tmp_path_factory.mktemp("out") / "out", "activation-oracle", words, **options)
            tables.append(pq.read_table(path))
    assert tables[0].equals(tables[1])
    position, names = tables[0].column("position").to_pylist(), tables[0].column("document").to_pylist()
    assert all(p >= least for p in position)
    counts = {name: names.count(name) for name in names}
    assert each is None or max(counts.values(), default=0) <= each
    assert len(names) <= (limit or store.n_rows)
    assert len(set(zip(names, position, strict=True))) == len(names)
    if each is None and limit is None:
        assert len(names) == int((store.coordinates["position"].values >= least).sum())


def test_the_rows_of_a_document_depend_on_its_id_and_the_seed_alone(words: Any, tmp_path: Path) -> None:
    drawn = []
    for number, documents in enumerate((texts(40), texts(40)[::-1][:30])):
        store = build_store(tmp_path / f"{number}.zarr", documents, tokenizer=words)
        for seed in (0, 1):
            out = tmp_path / f"{number}-{seed}"
            (path, _) = export(store, out, "nla", words, per_document=3, seed=seed)
            found = pq.read_table(path)
            pairs = set(zip(found.column("doc_id").to_pylist(), found.column("n_raw_tokens").to_pylist(), strict=True))
            drawn.append(pairs)
    assert drawn[2] < drawn[0]
    assert drawn[3] < drawn[1]
    assert drawn[0] != drawn[1]


def test_windows_and_chosen_rows_have_the_text_that_the_forward_had_read(words: Any, tmp_path: Path) -> None:
    documents = texts(30)
    windows = {"length": 8, "stride": 4}
    store = build_store(tmp_path / "run.zarr", documents, tokenizer=words, windows=windows, rows={"every": 3})
    (path, _) = export(store, tmp_path / "out", "activation-oracle", words)
    rows = pq.read_table(path).to_pylist()
    assert len(rows) == store.n_rows
    ids = {line["id"]: words(line["text"]).input_ids for line in documents}
    for line in rows:
        own, place = ids[line["document"]], line["position"]
        start = max(0, -(-(place - 7) // 4)) * 4  # the first window that contains it
        assert line["text"] == words.decode(own[start : place + 1], skip_special_tokens=True)


def test_a_killed_export_with_texts_is_resumed(store: flexcache.Store, words: Any, tmp_path: Path) -> None:
    words.save_pretrained(tmp_path / "words")
    code = """
        import os, sys, flexcache
        def stop(done, total):
            if done > total * 0.6:
                os._exit(9)
        store, folder = sys.argv[1:]
        options = {"sites": ["resid_post"], "tokenizer": folder + "/words", "progress": stop}
        flexcache.export(store, folder + "/out", "nla", **options)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(store.path), str(tmp_path)]
    assert subprocess.run(command, cwd=Path(__file__).parents[2]).returncode == 9
    first = tmp_path / "out" / "base.layer_0.parquet"
    assert first.exists()
    assert not (tmp_path / "out" / "base.layer_3.parquet").exists()
    before = first.stat().st_mtime_ns
    files = export(store, tmp_path / "out", "nla", tmp_path / "words")
    assert first.stat().st_mtime_ns == before
    whole = export(store, tmp_path / "whole", "nla", words)
    assert [path.read_bytes() for path in files] == [path.read_bytes() for path in whole]
    assert not list((tmp_path / "out").glob(".*"))
    with pytest.raises(MismatchError, match="another export"):
        export(store, tmp_path / "out", "nla", words, seed=1)


def test_a_partial_store_gives_its_committed_rows(words: Any, tmp_path: Path) -> None:
    sites = {"resid_post": (5, 24)}
    options: Any = {"sites": sites, "layers": [3], "model": "arithmetic", "tokenizer": words, "batch_tokens": 64}
    with flexcache.record(tmp_path / "run.zarr", texts(60), **options) as recorder:
        batches = recorder.batches()
        for batch in batches:
            if batch.unit == 2:
                break
            recorder.put("resid_post", batch.kept(padded_activation(batch, 3, 24)), rows=batch.rows, layer=3)
    store = flexcache.open(tmp_path / "run.zarr")
    assert 0 < len(store.committed_rows) < store.n_rows
    (path,) = export(store, tmp_path / "out", "activation-oracle", words, rows="committed")
    vectors = np.array(pq.read_table(path).column("activation_vector").to_pylist(), np.float32)
    assert np.array_equal(vectors, store.read("resid_post", 3, store.committed_rows))


@pytest.mark.parametrize(
    ("options", "words_"),
    [
        ({"to": "nla", "sites": None}, "takes one site with layers"),
        ({"to": "nla", "sites": ["model.embed"]}, "takes one site with layers"),
        ({"to": "nla", "per_document": 0}, "per_document cannot be 0"),
        ({"to": "nla", "limit": 2.5}, "limit cannot be 2.5"),
        ({"to": "nla", "min_position": None}, "min_position cannot be None"),
        ({"to": "nla", "per_documents": 3}, "no argument 'per_documents'"),
        ({"to": "nla", "tokenizer": None}, "tokenizer of the store cannot be loaded"),
        ({"to": "nla", "tokenizer": "no/such folder"}, "tokenizer cannot be loaded"),
        ({"to": "nla", "tokenizer": 3}, "cannot decode"),
        ({"to": "parquet", "limit": 5}, "no use for limit"),
        ({"to": "npy"}, "no use for tokenizer"),
        ({"to": "oracle"}, "there is no format 'oracle'"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    store: flexcache.Store, words: Any, options: dict[str, Any], words_: str, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"sites": ["resid_post"], "tokenizer": words, **options}
    with pytest.raises(ConfigError, match=words_):
        flexcache.export(store.path, tmp_path / "out", given.pop("to"), **given)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "reason"), [({"rows": "mean"}, "means"), ({"packing": {"length": 32}}, "packed into one sequence")]
)
def test_rows_without_a_text_of_their_own_are_refused(
    words: Any, options: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    store = build_store(tmp_path / "run.zarr", texts(30), tokenizer=words, **options)
    with pytest.raises(ConfigError, match=reason):
        export(store, tmp_path / "out", "nla", words)


def test_the_tokenizer_of_another_model_is_refused(store: flexcache.Store, words: Any, tmp_path: Path) -> None:
    import copy

    other = copy.deepcopy(words)
    other.add_tokens(["more"])
    with pytest.raises(MismatchError, match="not the one"):
        export(store, tmp_path / "out", "nla", other)

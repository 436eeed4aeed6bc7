"""Samples that engines write, in the public formats, imported and compared with what a second reader finds in them."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import flexcache
from flexcache.errors import ConfigError, DamagedError, FlexCacheError, MismatchError, StoreError
from flexcache.exchange import engine_import
from tests.corpora import lengths
from tests.models import tiny
from tests.recording.test_recorder import shard_hashes

FEATURES, IDS = 8, [1, 3, 4]
KINDS = ["speculators", "speculators-0.4", "specforge", "specforge-gz", "specforge-dspark", "torchspec", "npy"]


def kind_of(form: str) -> str:
    return form.partition("-")[0]


def prompt(number: int, length: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Token ids, loss mask, states (tokens, layers, features) and last hidden state of one prompt."""
    made = torch.Generator().manual_seed(number)
    return {
        "ids": torch.randint(3, 999, (length,), generator=made),
        "mask": torch.randint(0, 2, (length,), generator=made),
        "states": torch.randn(length, len(IDS), FEATURES, generator=made).to(dtype),
        "last": torch.randn(length, FEATURES, generator=made).to(dtype),
    }


def write(folder: Path, form: str, number: int, sample: dict[str, torch.Tensor]) -> Path:
    """Write one sample as the engine does; return its file."""
    ids, mask, states, last = (sample[name] for name in ("ids", "mask", "states", "last"))
    wide = states.flatten(1)[None]
    folder.mkdir(parents=True, exist_ok=True)
    if form == "speculators":
        path = folder / f"hs_{number}.safetensors"
        save_file({"hidden_states": states.contiguous(), "token_ids": ids.contiguous()}, path)
        return path
    if form == "npy":
        path = folder / f"sample{number}.npy"
        np.save(path, states.numpy())
        np.save(folder / f"sample{number}.tokens.npy", ids.numpy())
        np.save(folder / f"sample{number}.loss_mask.npy", mask.numpy().astype(bool))
        return path
    content: dict[str, Any] = {"input_ids": ids, "loss_mask": mask}
    if form == "speculators-0.4":
        content["hidden_states"] = [states[:, layer].contiguous() for layer in range(states.shape[1])]
    elif form == "specforge-dspark":
        content |= {"hidden_states": wide, "target_last_hidden_states": last[None]}
    elif form == "torchspec":
        content |= {"aux_hidden_states": wide, "hidden_states": last[None]}
    else:
        content |= {"aux_hidden_state": wide, "hidden_state": last[None]}
    ending = "pt" if form == "speculators-0.4" else "ckpt"
    group = folder / "rows_0-2000" if kind_of(form) == "specforge" else folder
    group.mkdir(exist_ok=True)
    path = group / f"data_{number}.{ending}"
    torch.save(content, path)
    if form == "specforge-gz":
        packed = path.with_name(f"{path.name}.gz")
        packed.write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
        return packed
    return path


def read_again(path: Path) -> dict[str, torch.Tensor]:
    """Read a file with the reader of its format; return ids, mask, states and last as `prompt` does."""
    if path.suffix == ".npy":
        ids, mask = (np.load(path.with_name(f"{path.stem}.{part}.npy")) for part in ("tokens", "loss_mask"))
        return {name: torch.from_numpy(a) for name, a in (("states", np.load(path)), ("ids", ids), ("mask", mask))}
    if path.suffix == ".safetensors":
        content = load_file(path)
        return {"states": content["hidden_states"], "ids": content["token_ids"]}
    file: Any = io.BytesIO(gzip.decompress(path.read_bytes())) if path.suffix == ".gz" else path
    content = torch.load(file, weights_only=True)
    found = {"ids": content["input_ids"], "mask": content["loss_mask"]}
    if isinstance(content["hidden_states" if "hidden_states" in content else "input_ids"], list):
        return found | {"states": torch.stack(content["hidden_states"], dim=1)}
    names = ("aux_hidden_state", "aux_hidden_states", "hidden_states")
    wide = next(content[name] for name in names if name in content)[0]
    names = ("target_last_hidden_states", "hidden_state", "hidden_states")
    last = next(content[name] for name in names if name in content)[0]
    return found | {"states": wide.reshape(len(wide), len(IDS), -1), "last": last}


def options_of(form: str) -> dict[str, Any]:
    return {"layer_ids": IDS, "depth": 6} | ({"final_state": "normed"} if form == "torchspec" else {})


def targets_of(form: str) -> list[int]:
    """The layers of resid_post: the ids of vLLM are inputs of blocks."""
    return [one - 1 for one in IDS] if form == "speculators" else IDS


@pytest.mark.parametrize("form", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_imported_states_are_those_of_the_files(form: str, dtype: str, tmp_path: Path) -> None:
    if form == "npy" and dtype == "bfloat16":
        pytest.skip("npy has no bfloat16")
    samples = [prompt(number, length, getattr(torch, dtype)) for number, length in enumerate(lengths(30, 20))]
    files = [write(tmp_path / "in", form, number, sample) for number, sample in enumerate(samples)]
    seen: list[tuple[int, int]] = []
    store = flexcache.import_folder(
        tmp_path / "in", tmp_path / "run.zarr", kind_of(form), progress=lambda *at: seen.append(at), **options_of(form)
    )
    total = sum(len(sample["ids"]) for sample in samples)
    assert seen[-1] == (total, total)
    assert flexcache.verify(store.path).sound
    assert store.layers("resid_post") == tuple(targets_of(form))
    assert store.arrays["resid_post"].depth == 6
    assert store.arrays["resid_post"].dtype == dtype
    assert len(store.documents) == len(files)
    mask = store.token_label("loss_mask").to_numpy() if form != "speculators" else None
    for path in files:
        read = read_again(path)
        name = path.relative_to(tmp_path / "in").as_posix().removesuffix(".gz").rpartition(".")[0]
        rows = store.rows(name)
        assert np.array_equal(store.coordinates["position"].values[rows], np.arange(len(read["ids"])))
        assert np.array_equal(store.coordinates["token_id"].values[rows], read["ids"].numpy())
        for column, layer in enumerate(targets_of(form)):
            assert np.array_equal(store.read("resid_post", layer, rows), read["states"][:, column].float().numpy())
        if "last" in read:
            assert np.array_equal(store.read("final_norm", None, rows), read["last"].float().numpy())
        if mask is not None:
            assert np.array_equal(mask[rows], read["mask"].numpy().astype(np.int64))
    assert ("final_norm" in store.sites) == (form in ("specforge", "specforge-gz", "specforge-dspark", "torchspec"))


def block_outputs(model: Any, tokens: torch.Tensor, blocks: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what plain hooks see: the outputs of blocks (tokens, blocks, features), and of the last norm."""
    outputs: list[torch.Tensor] = []
    handles = [
        model.model.layers[block].register_forward_hook(
            lambda _, args, out: outputs.append((out[0] if isinstance(out, tuple) else out).reshape(len(tokens), -1))
        )
        for block in blocks
    ]
    with torch.no_grad():
        last = model.model(tokens[None]).last_hidden_state[0]
    for handle in handles:
        handle.remove()
    return torch.stack(outputs, dim=1), last


@pytest.mark.parametrize("form", ["speculators", "speculators-0.4", "specforge", "torchspec"])
def test_layer_ids_are_those_of_the_engine(form: str, tmp_path: Path) -> None:
    """Every format numbers the blocks of a real model as its engine does, and a capture finds the same states."""
    model = tiny("llama", num_hidden_layers=4)
    blocks = [0, 2, 3]
    documents, ids = [], [block + (form == "speculators") for block in blocks]
    for number, length in enumerate([9, 4, 13]):
        tokens = prompt(number, length)["ids"] % 60
        documents.append({"id": str(number), "tokens": tokens.tolist()})
        states, last = block_outputs(model, tokens, blocks)
        write(tmp_path / "in", form, number, {"ids": tokens, "mask": tokens % 2, "states": states, "last": last})
    store = flexcache.import_folder(
        tmp_path / "in", tmp_path / "run.zarr", kind_of(form), layer_ids=ids, depth=4,
        **({"final_state": "normed"} if form == "torchspec" else {}),
    )  # fmt: skip
    sites = ["resid_post", *(["final_norm"] if "final_norm" in store.sites else [])]
    own = flexcache.capture(model, None, documents, tmp_path / "own.zarr", sites=sites, dtype="float32")
    for document in documents:
        rows = store.rows(next(name for name in store.documents.column("id").to_pylist() if name[-1] == document["id"]))
        ours = own.rows(document["id"])
        for block in blocks:
            theirs = store.read("resid_post", block, rows)
            np.testing.assert_allclose(theirs, own.read("resid_post", block, ours), atol=1e-4)
        if "final_norm" in sites:
            np.testing.assert_allclose(
                store.read("final_norm", None, rows), own.read("final_norm", None, ours), atol=1e-4
            )


def test_a_raw_last_state_is_the_output_of_the_last_block(tmp_path: Path) -> None:
    sample = prompt(0, 7)
    write(tmp_path / "in", "torchspec", 0, sample)
    asked = {"layer_ids": [0, 1, 2], "final_state": "raw"}
    with pytest.raises(ConfigError, match="whose number is not known"):
        flexcache.import_folder(tmp_path / "in", tmp_path / "run.zarr", "torchspec", **asked)
    with pytest.raises(ConfigError, match="two states are of one layer"):
        flexcache.import_folder(tmp_path / "in", tmp_path / "run.zarr", "torchspec", depth=3, **asked)
    with pytest.raises(ConfigError, match="it is not known what the last hidden state is"):
        flexcache.import_folder(tmp_path / "in", tmp_path / "run.zarr", "torchspec", layer_ids=[0, 1, 2])
    store = flexcache.import_folder(tmp_path / "in", tmp_path / "run.zarr", "torchspec", depth=5, **asked)
    assert store.layers("resid_post") == (0, 1, 2, 4)
    assert np.array_equal(store.read("resid_post", 4), sample["last"].numpy())


@settings(max_examples=12)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=25),
    st.sampled_from(["speculators", "speculators-0.4", "specforge"]),
    st.integers(1, 40),
    st.integers(1, 7),
)
def test_the_sizes_of_batches_change_no_value(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], form: str, tokens: int, documents: int
) -> None:
    folder = tmp_path_factory.mktemp("sizes")
    samples = [prompt(number, length) for number, length in enumerate(sizes)]
    for number, sample in enumerate(samples):
        write(folder / "in", form, number, sample)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_import, "BATCH_TOKENS", tokens)
        patch.setattr(engine_import, "DOCUMENTS_AT_A_TIME", documents)
        patch.setattr(engine_import, "_BLOCK", tokens)
        store = flexcache.import_folder(folder / "in", folder / "run.zarr", kind_of(form), **options_of(form))
    assert store.n_rows == sum(sizes)
    source = store.documents.column("source_index").to_numpy()[store.coordinates["document"].values]
    position = store.coordinates["position"].values
    for column, layer in enumerate(targets_of(form)):
        expected = np.stack([samples[s]["states"][p, column].numpy() for s, p in zip(source, position, strict=True)])
        assert np.array_equal(store.read("resid_post", layer), expected)


def test_a_killed_import_resumes_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_import, "BATCH_TOKENS", 64)
    for number, length in enumerate(lengths(400, 30)):
        write(tmp_path / "in", "speculators", number, prompt(number, length))
    code = """
        import os, sys, flexcache
        from flexcache.exchange import engine_import
        engine_import.BATCH_TOKENS = 64
        def stop(done, total):
            if done > total // 2:
                os._exit(9)
        folder = sys.argv[1]
        target = folder + "/run.zarr"
        flexcache.import_folder(folder + "/in", target, "speculators", layer_ids=[1, 3, 4], progress=stop)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    killed = subprocess.run(command, cwd=Path(__file__).parents[2])
    assert killed.returncode == 9
    partial = flexcache.open(tmp_path / "run.zarr")
    assert 0 < len(partial.committed_units) < partial.n_units
    store = flexcache.import_folder(tmp_path / "in", tmp_path / "run.zarr", "speculators", layer_ids=IDS)
    assert store.complete
    whole = flexcache.import_folder(tmp_path / "in", tmp_path / "whole.zarr", "speculators", layer_ids=IDS)
    assert shard_hashes(store.path) == shard_hashes(whole.path)


def test_an_import_into_the_store_of_others_is_refused(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / "in", "specforge", number, prompt(number, 5))
    target = tmp_path / "run.zarr"
    flexcache.import_folder(tmp_path / "in", target, "specforge", layer_ids=IDS)
    for changed in (
        {"layer_ids": [0, 1, 2]},
        {"layer_ids": IDS, "engine": "sglang==0.5"},
        {"layer_ids": IDS, "depth": 9},
    ):
        with pytest.raises(MismatchError):
            flexcache.import_folder(tmp_path / "in", target, "specforge", **changed)
    write(tmp_path / "in", "specforge", 1, prompt(7, 5))
    with pytest.raises(MismatchError, match="documents"):
        flexcache.import_folder(tmp_path / "in", target, "specforge", layer_ids=IDS)


# Problems


def spoil(form: str, path: Path, sample: dict[str, torch.Tensor], how: str) -> None:
    """Write a sample again with something wrong."""
    number = int("".join(c for c in path.stem.partition(".")[0] if c.isdigit()))
    sample = dict(sample)
    if how == "fewer states":
        sample |= {"states": sample["states"][:-1], "last": sample["last"][:-1]}
    elif how == "more states":
        sample |= {name: torch.cat([sample[name], sample[name][:1]]) for name in ("states", "last")}
    elif how == "nan":
        states = sample["states"].clone()
        states[2, 1, 5] = float("nan")
        sample["states"] = states
    elif how == "infinite":
        states = sample["states"].clone()
        states[-1, 0, 0] = float("-inf")
        sample["states"] = states
    elif how == "dtype":
        sample |= {name: sample[name].half() for name in ("states", "last")}
    elif how == "width":
        sample |= {name: sample[name][..., :4] for name in ("states", "last")}
    elif how == "layers":
        sample["states"] = torch.cat([sample["states"], sample["states"][:, :1, :1].expand(-1, 1, FEATURES)], dim=1)
    elif how == "ids":
        sample["ids"] = sample["ids"] - 999
    elif how == "float ids":
        sample["ids"] = sample["ids"].float()
    elif how == "empty":
        sample = {name: value[:0] for name, value in sample.items()}
    if how == "link to nothing":
        path.unlink()
        path.symlink_to(path.with_name("gone"))
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == "no file content":
        path.write_bytes(b"")
    elif how == "other tensors" and path.suffix == ".safetensors":
        save_file({"something": sample["last"].contiguous()}, path)
    elif how == "other tensors" and path.suffix != ".npy":
        torch.save({"something": sample["last"]}, path)
    else:
        write(path.parent if path.parent.name == "in" else path.parents[1], form, number, sample)


HOW = {
    "fewer states": "token ids, but",
    "more states": "token ids, but",
    "nan": "not finite, at token 2",
    "infinite": "not finite",
    "dtype": "float16",
    "width": "4 features",
    "layers": "layers",
    "ids": "token ids from",
    "float ids": "whole numbers",
    "empty": "no tokens",
    "truncated": "cannot be read",
    "no file content": "cannot be read",
    "link to nothing": "No such file",
    "other tensors": "something",
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("form", ["speculators", "speculators-0.4", "specforge", "npy"])
def test_every_spoiled_sample_is_named_before_anything_is_written(form: str, how: str, tmp_path: Path) -> None:
    if form == "npy" and how == "other tensors":
        pytest.skip("npy has no names")
    samples = [prompt(number, 6 + number) for number in range(6)]
    files = [write(tmp_path / "in", form, number, sample) for number, sample in enumerate(samples)]
    for number in (0, 4):
        spoil(form, files[number], samples[number], how)
    with pytest.raises(DamagedError) as caught:
        flexcache.import_folder(tmp_path / "in", tmp_path / "run.zarr", kind_of(form), layer_ids=IDS)
    text = str(caught.value)
    assert "2 of 6 samples" in text
    for number in (0, 4):
        assert files[number].stem.partition(".")[0] in text
    assert HOW[how] in text or (form in ("specforge",) and how in ("layers", "width") and "features" in text)
    assert not (tmp_path / "run.zarr").exists()


def test_code_in_a_sample_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "pwned"),)

    for number in range(2):
        write(tmp_path / "in", "specforge", number, prompt(number, 5))
    torch.save({"input_ids": Evil()}, tmp_path / "in" / "rows_0-2000" / "data_1.ckpt")
    with pytest.raises(DamagedError, match="data_1.*else than tensors") as caught:
        flexcache.import_folder(tmp_path / "in", tmp_path / "run.zarr", "specforge", layer_ids=IDS)
    assert "weights_only" not in str(caught.value), "torch advises to run it"
    assert not (tmp_path / "pwned").exists()


def test_layer_ids_that_fit_no_sample_are_named_as_a_cause(tmp_path: Path) -> None:
    for number in range(2):
        write(tmp_path / "in", "speculators", number, prompt(number, 5))
    with pytest.raises(DamagedError, match="check the format and the layer ids"):
        flexcache.import_folder(tmp_path / "in", tmp_path / "run.zarr", "speculators", layer_ids=IDS[:1])


# Layers, engine and labels


def layer_folder(folder: Path, form: str = "speculators", **files: Any) -> Path:
    for number in range(3):
        write(folder, form, number, prompt(number, 5))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("form", "files", "layers", "engine"),
    [
        (
            "speculators",
            {"engine": {"layer_ids": [2, 5, 9], "depth": 9, "engine": {"name": "vllm", "version": "0.22.0"}}},
            (1, 4, 8),
            {"name": "vllm", "version": "0.22.0"},
        ),
        (
            "speculators-0.4",
            {
                "data_config": {
                    "hidden_states": {"layer_ids": [2, 5, 9]},
                    "model": {"target_model_path": "Qwen/Qwen3-8B"},
                    "reproducibility": {"package_versions": {"torch": "2.9", "vllm": "0.11.0"}},
                }
            },
            (2, 5, 9),
            {"name": "vllm", "version": "0.11.0"},
        ),
        (
            "specforge",
            {"config": {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [2, 5, 9]}}},
            (2, 5, 9),
            {"name": "sglang"},
        ),
    ],
)
def test_layers_and_engine_are_read_from_files_beside_the_samples(
    form: str, files: dict[str, Any], layers: tuple[int, ...], engine: dict[str, str], tmp_path: Path
) -> None:
    folder = layer_folder(tmp_path / "in", form, **files)
    store = flexcache.import_folder(folder, tmp_path / "run.zarr", kind_of(form))
    assert store.layers("resid_post") == layers
    assert store.provenance.model["engine"] == engine
    assert store.provenance.model["imported"]["samples"] == 3
    assert store.provenance.model_name == ("Qwen/Qwen3-8B" if "data_config" in files else "in")
    given = {"name": "vllm", "version": "1", "settings": {"tensor_parallel_size": 2}}
    other = flexcache.import_folder(folder, tmp_path / "other.zarr", kind_of(form), engine=given, model="mine")
    assert other.provenance.model["engine"] == given
    assert other.provenance.model_name == "mine"


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("speculators", {}, "not known which layers"),
        ("speculators", {"layer_ids": [1, 2]}, None),
        ("speculators", {"layer_ids": [0, 1, 2]}, "layer id 0 is the input of the first block"),
        ("speculators", {"layer_ids": [1, 2, 5], "depth": 4}, "layer id 5"),
        ("speculators", {"layer_ids": [1, 2, 2]}, "two states are of one layer"),
        ("speculators", {"layer_ids": "1,x"}, "layer ids cannot be read"),
        ("speculators", {"layer_ids": [1, 2.5, 3]}, "layer ids cannot be read"),
        ("speculators", {"layer_ids": []}, "layer ids cannot be read"),
        ("speculators", {"layer_ids": IDS, "site": "mlp_out"}, "no use for a site"),
        ("speculators", {"layer_ids": IDS, "final_state": "raw"}, "no last hidden state"),
        ("speculators", {"layer_ids": IDS, "token_ids": "x"}, "no use for token_ids"),
        ("speculators", {"layer_ids": IDS, "engine": 3}, "engine cannot be read"),
        ("speculators", {"layer_ids": IDS, "layers": "all"}, "no argument 'layers'"),
        ("safetensors", {"layer_ids": IDS, "site": "resid_post"}, "no use for layer_ids"),
        ("safetensors", {}, "needs a site"),
        ("specforge", {"layer_ids": IDS}, None),
    ],
)
def test_options_that_do_not_fit_are_refused(
    kind: str, options: dict[str, Any], words: str | None, tmp_path: Path
) -> None:
    folder = layer_folder(tmp_path / "in")
    error = ConfigError if words else FlexCacheError
    with pytest.raises(error, match=words):
        flexcache.import_folder(folder, tmp_path / "run.zarr", kind, **options)
    assert not (tmp_path / "run.zarr").exists()


def test_layer_ids_that_contradict_the_files_are_refused(tmp_path: Path) -> None:
    folder = layer_folder(tmp_path / "in", engine={"layer_ids": [2, 5, 9]})
    with pytest.raises(ConfigError, match="not those in the files"):
        flexcache.import_folder(folder, tmp_path / "run.zarr", "speculators", layer_ids=IDS)
    (folder / "config.json").write_text(json.dumps({"target_layer_ids": [1, 2, 3]}), encoding="utf-8")
    with pytest.raises(ConfigError, match="not known which layers"):
        flexcache.import_folder(folder, tmp_path / "run.zarr", "speculators")
    (folder / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(DamagedError, match="beside the samples"):
        flexcache.import_folder(folder, tmp_path / "run.zarr", "speculators")


def test_two_versions_of_speculators_in_one_folder_are_refused(tmp_path: Path) -> None:
    layer_folder(tmp_path / "in")
    write(tmp_path / "in", "speculators-0.4", 9, prompt(9, 5))
    with pytest.raises(ConfigError, match="two versions"):
        flexcache.import_folder(tmp_path / "in", tmp_path / "run.zarr", "speculators", layer_ids=IDS)
    with pytest.raises(StoreError, match="holds no torchspec files"):
        flexcache.import_folder(tmp_path / "in", tmp_path / "run.zarr", "torchspec", layer_ids=IDS)


@pytest.mark.parametrize("saved", ["datasets", "parquet"])
def test_masks_and_labels_come_from_the_dataset_of_prompts(saved: str, tmp_path: Path) -> None:
    samples = {number: prompt(number, 4 + number) for number in (0, 2, 3, 11)}  # some prompts have failed
    lines = [prompt(number, 4 + number) for number in range(12)]
    columns = {
        "input_ids": [line["ids"].tolist() for line in lines],
        "loss_mask": [line["mask"].tolist() for line in lines],
        "source": [f"chat {number}" for number in range(12)],
    }
    if saved == "datasets":
        datasets = pytest.importorskip("datasets")
        datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "prompts")
        documents, folder = tmp_path / "prompts", tmp_path / "prompts" / "hidden_states"
    else:
        documents, folder = tmp_path / "prompts.parquet", tmp_path / "in"
        pq.write_table(pa.table(columns), documents)
    for number, sample in samples.items():
        write(folder, "speculators", number, sample)
    store = flexcache.import_folder(
        folder, tmp_path / "run.zarr", "speculators", layer_ids=IDS, documents=documents
    )  # fmt: skip
    mask = store.token_label("loss_mask").to_numpy()
    for number, sample in samples.items():
        assert np.array_equal(mask[store.rows(f"hs_{number}")], sample["mask"].numpy())
    found = {line["id"]: line["source"] for line in store.documents.to_pylist()}
    assert found == {f"hs_{number}": f"chat {number}" for number in samples}

    write(folder, "speculators", 2, prompt(5, 6))
    with pytest.raises(DamagedError, match="hs_2: other token ids than in line 2"):
        flexcache.import_folder(folder, tmp_path / "new.zarr", "speculators", layer_ids=IDS, documents=documents)
    write(folder, "speculators", 12, prompt(5, 6))
    with pytest.raises(MismatchError, match="not those of the samples"):
        flexcache.import_folder(folder, tmp_path / "new.zarr", "speculators", layer_ids=IDS, documents=documents)


def test_a_mask_that_differs_from_the_dataset_is_named(tmp_path: Path) -> None:
    samples = [prompt(number, 6) for number in range(3)]
    for number, sample in enumerate(samples):
        write(tmp_path / "in", "specforge", number, sample)
    masks = [sample["mask"].tolist() for sample in samples]
    masks[2] = [1 - value for value in masks[2]]
    pq.write_table(pa.table({"loss_mask": masks}), tmp_path / "prompts.parquet")
    with pytest.raises(DamagedError, match="data_2: another loss mask than in line 2"):
        flexcache.import_folder(
            tmp_path / "in", tmp_path / "run.zarr", "specforge", layer_ids=IDS, documents=tmp_path / "prompts.parquet"
        )


def test_a_sample_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "in", "specforge", 1, prompt(1, 6))
    write(tmp_path / "in", "specforge-gz", 2, prompt(2, 6))
    write(tmp_path / "in", "specforge", 2, prompt(2, 6))
    with pytest.raises(FlexCacheError, match="rows_0-2000/data_2"):
        flexcache.import_folder(tmp_path / "in", tmp_path / "run.zarr", "specforge", layer_ids=IDS)
    assert not (tmp_path / "run.zarr").exists()


def test_states_in_float8_are_named(tmp_path: Path) -> None:
    sample = prompt(0, 6)
    write(tmp_path / "in", "speculators", 0, sample | {"states": sample["states"].to(torch.float8_e4m3fn)})
    with pytest.raises(DamagedError, match="hs_0: no hidden states .* of a dtype that can be read"):
        flexcache.import_folder(tmp_path / "in", tmp_path / "run.zarr", "speculators", layer_ids=IDS)


def test_npy_files_may_be_of_any_site(tmp_path: Path) -> None:
    sample = prompt(0, 6)
    write(tmp_path / "in", "npy", 0, sample | {"states": sample["states"][:, 0]})
    store = flexcache.import_folder(tmp_path / "in", tmp_path / "run.zarr", "npy", site="final_norm")
    assert np.array_equal(store.read("final_norm"), sample["states"][:, 0].numpy())
    store = flexcache.import_folder(tmp_path / "in", tmp_path / "mlp.zarr", "npy", site="mlp_out", layer_ids=[5])
    assert store.layers("mlp_out") == (5,)
    (tmp_path / "in" / "sample0.npy").rename(tmp_path / "in" / "sample1.npy")
    with pytest.raises(DamagedError, match="token ids have no states"):
        flexcache.import_folder(tmp_path / "in", tmp_path / "new.zarr", "npy", layer_ids=[5])


def test_float64_states_need_a_dtype(tmp_path: Path) -> None:
    write(tmp_path / "in", "npy", 0, prompt(0, 6, torch.float64))
    with pytest.raises(ConfigError, match="float64 cannot be stored"):
        flexcache.import_folder(tmp_path / "in", tmp_path / "run.zarr", "npy", layer_ids=IDS)
    store = flexcache.import_folder(tmp_path / "in", tmp_path / "run.zarr", "npy", layer_ids=IDS, dtype="float16")
    assert store.arrays["resid_post"].dtype == "float16"


def test_a_last_hidden_state_in_some_samples_only_is_named(tmp_path: Path) -> None:
    for number in range(12):
        write(tmp_path / "in", "specforge", number, prompt(number, 5))
    without = torch.load(tmp_path / "in" / "rows_0-2000" / "data_3.ckpt", weights_only=True)
    for number in (3, 7):
        torch.save(without | {"hidden_state": None}, tmp_path / "in" / "rows_0-2000" / f"data_{number}.ckpt")
    with pytest.raises(DamagedError, match="2 of 12 samples") as caught:
        flexcache.import_folder(tmp_path / "in", tmp_path / "run.zarr", "specforge", layer_ids=IDS)
    assert "data_7: no last hidden state" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "site"),
    [
        ("engine", {"final_state": "raw", "depth": 9}, "resid_post"),
        ("engine", {"final_state": "normed"}, "final_norm"),
        ("config", {"inference": {"last_hidden_states_prenorm": False}}, "final_norm"),
        ("config", {"inference": {"last_hidden_states_prenorm": True}}, None),
        ("config", {"inference": {"last_hidden_states_prenorm": None, "other": True}}, ""),
        ("engine", {"final_state": True}, ""),
    ],
)
def test_the_last_hidden_state_is_found_in_files_beside_the_samples(
    name: str, content: dict[str, Any], site: str | None, tmp_path: Path
) -> None:
    folder = layer_folder(tmp_path / "in", "torchspec", **{name: content})
    if site:
        store = flexcache.import_folder(folder, tmp_path / "run.zarr", "torchspec", layer_ids=IDS)
        assert (8 in store.layers("resid_post")) == (site == "resid_post")
        assert ("final_norm" in store.sites) == (site == "final_norm")
        return
    words = "whose number is not known" if site is None else "not known what the last hidden state is"
    with pytest.raises(ConfigError, match=words):
        flexcache.import_folder(folder, tmp_path / "run.zarr", "torchspec", layer_ids=IDS)


@pytest.mark.parametrize("ids", ["2,5,9", [2, "5", 9], [True, False, True], [], {"a": 1}])
def test_layer_ids_of_another_type_in_files_are_not_used(ids: Any, tmp_path: Path) -> None:
    folder = layer_folder(tmp_path / "in", engine={"layer_ids": ids})
    with pytest.raises(ConfigError, match="not known which layers"):
        flexcache.import_folder(folder, tmp_path / "run.zarr", "speculators")

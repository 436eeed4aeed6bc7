"""The examples run as a newcomer would run them, and what they print is true."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import flexcache
from tests import processes

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *arguments: str) -> str:
    with TemporaryDirectory() as folder:
        return processes.run(
            processes.script, str(EXAMPLES / name), *arguments, folder=EXAMPLES, output=Path(folder) / "output"
        )


def start_python(*command: str) -> str:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=EXAMPLES, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def numbers(pattern: str, text: str) -> list[float]:
    return [float(found) for found in re.findall(pattern, text)]


def test_capture_reads_every_block_and_every_step() -> None:
    out = run("capture.py")
    assert len(re.findall(r"^model\.layers\.\d: \(2, 12, 64\)", out, re.MULTILINE)) == 4
    assert "model.layers.1.mlp.down_proj: (2, 12, 128)" in out
    assert "tokens per forward: [12, 12, 1, 1]" in out


def test_edit_steers_and_leaves_no_trace() -> None:
    out = run("edit.py")
    ((before, steered),) = re.findall(r"rank (\d+) before, (\d+) steered", out)
    assert int(before) == 256
    assert int(steered) < 10
    assert "after restore, largest difference: 0.0" in out


def test_a_trainable_module_learns() -> None:
    out = run("trainable_module.py")
    losses = numbers(r"model ([\d.e+-]+) nats", out)
    assert losses[-1] < 0.2 * losses[0]
    assert "trainable_modules.linear.weight" in out


def test_groups_ablate_what_they_name() -> None:
    out = run("groups.py")
    losses = numbers(r"ablated: ([\d.]+)", out)
    assert len(losses) == len(set(losses)) == 5
    assert "['model.layers.0.self_attn.o_proj', 'model.layers.0.mlp']" in out


@pytest.mark.parametrize("world", [2])
def test_tensor_parallel_equals_the_whole_model(world: int) -> None:
    torchrun = ("-m", "torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0")
    out = start_python(*torchrun, "--nproc-per-node", str(world), "tensor_parallel.py")
    differences = numbers(r"difference(?: of edited logits)? ([\d.e+-]+)", out)
    assert len(differences) == world + 1
    assert max(differences) < 1e-5
    assert "neurons (2, 12, 128)" in out
    assert "rank 1: keeps None" in out


def test_a_sparse_autoencoder_is_trained_judged_and_shown(tmp_path: Path) -> None:
    out = run("sae.py", "--steps", "120", "--batch", "512", "--k", "8", "--output", str(tmp_path))
    ((first, last),) = re.findall(r"while training: ([\d.]+) … ([\d.]+)", out)
    assert float(last) < 0.75 * float(first)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["variance unexplained"] < 0.7, "on documents that were not trained on"
    assert report["active latents a row"] <= 8
    assert abs(report["loss, autoencoder"] - report["loss, model"]) < 0.1
    assert (tmp_path / "latents.html").read_text().count("<h2>latent") == 30
    assert len(json.loads((tmp_path / "curve.json").read_text())) == 120


def test_the_files_of_an_engine_become_a_store_and_a_table_with_texts() -> None:
    out = run("engine_files.py")
    differences = numbers(r"layer \d: largest difference from a capture ([\d.e+-]+)", out)
    assert len(differences) == 3
    assert max(differences) < 1e-5
    assert "engine: {'name': 'vllm', 'version': '0.22.0'" in out
    lines = re.findall(r"hs_\d: 64 values of \|([a-z ]+)\|", out)
    assert len(lines) == 6
    assert any(line.startswith(("the capital", "the film")) for line in lines)


def test_vllm_gives_the_states_of_transformers(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    import numpy as np
    import transformers

    import flexcache
    from pipelines.demo import assets

    folder, texts = assets.smollm2(), ["Lima is the capital of Peru.", "No.", "A play that is too short for a film."]
    (tmp_path / "texts.txt").write_text("\n".join(texts), encoding="utf-8")
    start_python("vllm_capture.py", str(folder), str(tmp_path / "vllm.zarr"), "--texts", str(tmp_path / "texts.txt"))
    store = flexcache.open(tmp_path / "vllm.zarr")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    documents = [{"text": text} for text in texts]
    layers = list(store.layers("resid_post"))
    own = flexcache.capture(model, tokenizer, documents, tmp_path / "own.zarr", sites=["resid_post"], layers=layers)
    for layer in layers:
        theirs, ours = store.read("resid_post", layer), own.read("resid_post", layer)
        assert np.linalg.norm(theirs - ours) < 0.05 * np.linalg.norm(ours)


def test_what_fine_tuning_changed_is_found_in_the_adapted_blocks(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    out = run("finetuning.py", str(tmp_path))
    stores = [flexcache.open(tmp_path / "runs" / f"{name}.zarr") for name in ("base", "tuned")]

    def after(text: str) -> list[float]:
        return numbers(r"(-?[\d.]+)(?=[\s\]])", out.partition(text)[2].partition("]")[0] + "]")

    norms = after("difference ÷ norm, by layer:")
    assert norms[:2] == [0, 0]
    for layer in (2, 3):
        base, tuned = (store.read("resid_post", layer, np.arange(store.n_rows)) for store in stores)
        expected = (np.linalg.norm(tuned - base, axis=1) / np.linalg.norm(base, axis=1)).mean()
        assert norms[layer] == pytest.approx(expected, abs=0.01)
    cka = after("CKA of each layer with itself:")
    assert cka[:2] == [1, 1]
    assert max(cka[2:]) < 0.6
    assert max(after("accuracy of a probe for the step, base:")) < 0.5
    assert after("accuracy of a probe for the step, adapter:")[-1] > 0.7
    ((own,),) = [numbers(r"loss of the adapter: ([\d.]+)", out)]
    patched = after("residual stream after each block:")
    assert patched[:2] == [own, own]
    tokens = stores[0].coordinates["token_id"].values.reshape(-1, 16).astype(np.int64)
    ids = torch.from_numpy(tokens)
    with torch.no_grad():
        alone = AutoModelForCausalLM.from_pretrained(tmp_path / "base")(input_ids=ids, labels=ids).loss.item()
    assert patched[-1] == pytest.approx(alone, abs=0.01), "after the last block, nothing of the adapter is left"
    assert patched[-1] > 10 * own
    assert numbers(r"crosscoder: ([\d.]+) of the variance", out)[0] < 0.1

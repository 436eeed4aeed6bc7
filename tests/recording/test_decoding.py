"""Activations captured while completions are generated, against plain PyTorch hooks around ``model.generate``."""

from __future__ import annotations

import json
import os
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

import flexcache
from analysis import probes
from analysis.dataset import targets
from flexcache.errors import CaptureError, ConfigError, DocumentsError, MismatchError
from flexcache.hooks.locate.blocks import find_blocks
from flexcache.recording import completions as completions_module
from tests.corpora import lengths, token_documents
from tests.models import VOCABULARY, tiny
from tests.pipelines.conftest import checkpoint, config, corpus  # noqa: F401
from tests.pipelines.test_cli import run

NEW = 6
PROMPTS = token_documents(lengths(9, longest=12), vocabulary=VOCABULARY)
GREEDY = {"max_new_tokens": NEW, "batch": 16, "capture": True}
QUIET = {"progress": False}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completions_module, "PART", 4)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama")


def plain(model: Any, prompts: list[list[int]], ends: set[int]) -> dict[tuple[int, ...], np.ndarray]:
    """By the tokens of each prompt with its completion, the outputs of all blocks: shape (layers, tokens, features)."""
    order = sorted(prompts, key=len)
    width = max(map(len, order))
    pads = [width - len(prompt) for prompt in order]
    ids = torch.tensor([[0] * pad + prompt for pad, prompt in zip(pads, order)])
    mask = torch.tensor([[0] * pad + [1] * len(prompt) for pad, prompt in zip(pads, order)])
    blocks = list(find_blocks(model)[1])
    steps: list[list[torch.Tensor]] = [[] for _ in blocks]

    def keep(layer: int) -> Any:
        return lambda _, args, output: steps[layer].append((output if torch.is_tensor(output) else output[0]).clone())

    handles = [block.register_forward_hook(keep(layer)) for layer, block in enumerate(blocks)]
    settings = GenerationConfig(
        max_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=sorted(ends), return_dict_in_generate=True
    )
    with torch.no_grad():
        made = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
        seen = made.sequences.shape[1]
        whole = torch.cat([mask, torch.ones(len(mask), seen - width, dtype=torch.long)], 1)
        places = (whole.cumsum(1) - 1)[:, -1:]
        cached = {"past_key_values": made.past_key_values, "attention_mask": whole, "use_cache": True}
        model(input_ids=made.sequences[:, -1:], position_ids=places, **cached)
    for handle in handles:
        handle.remove()
    layers = torch.stack([torch.cat(step, 1) for step in steps]).numpy()
    found = {}
    for line, pad in enumerate(pads):
        tokens = made.sequences[line, pad:].tolist()
        prompt = width - pad
        end = next((at for at in range(prompt, len(tokens)) if tokens[at] in ends), len(tokens) - 1)
        found[tuple(tokens[: end + 1])] = layers[:, line, pad : pad + end + 1]
    return found


def rows_of(store: flexcache.Store, site: str, document: int) -> tuple[tuple[int, ...], np.ndarray]:
    rows = store.rows(document=document)
    tokens = tuple(store.coordinates["token_id"].values[rows].tolist())
    return tokens, np.stack([store.read(site, layer, rows) for layer in store.arrays[site].slices])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "bloom", "mixtral"])
def test_rows_are_the_values_of_the_steps_of_generate(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    prompts = [item["tokens"] for item in PROMPTS]
    usual = plain(model, prompts, {2})
    ends = {2, next(iter(usual))[-3]}  # one completion ends early
    expected = plain(model, prompts, ends)
    model.generation_config.eos_token_id = sorted(ends)
    store = flexcache.capture(model, None, PROMPTS, tmp_path / "run.zarr", generate=GREEDY, **QUIET)
    lengths_made = set()
    for document in range(len(PROMPTS)):
        tokens, values = rows_of(store, "resid_post", document)
        assert np.array_equal(values, expected[tokens])
        lengths_made.add(len(tokens) - store.documents["prompt_tokens"][document].as_py())
    assert len(lengths_made) > 1
    again = flexcache.capture(
        model, None, PROMPTS, tmp_path / "again.zarr", generate=GREEDY | {"capture": False}, **QUIET
    )
    for document in range(len(PROMPTS)):
        name = store.documents["id"][document].as_py()
        tokens, values = rows_of(store, "resid_post", document)
        other = again.documents["id"].to_pylist().index(name)
        same, rerun = rows_of(again, "resid_post", other)
        assert same == tokens
        assert np.linalg.norm(values - rerun) <= 1e-5 * np.linalg.norm(rerun)


def test_prompts_share_no_batch_where_padding_before_them_changes_activations(tmp_path: Path) -> None:
    model = tiny("gpt2")
    without = {"position_ids": None}  # so that positions count padding
    model.register_forward_pre_hook(lambda _, args, given: (args, given | without), with_kwargs=True)
    store = flexcache.capture(model, None, PROMPTS, tmp_path / "run.zarr", generate=GREEDY, **QUIET)
    found = flexcache.recompute(model, store.path, units=9)
    assert max(item.relative_error for item in found) < 1e-5
    request = json.loads((tmp_path / "run.zarr.completions" / "request").read_text())
    assert request["capture"]["batching"] == "equal_lengths"


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"guidance_scale": 2.0}], ids=["beams", "guidance"])
def test_a_generation_whose_steps_read_other_sequences_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    model = tiny("llama")
    model.generation_config.update(**settings)
    with pytest.raises(CaptureError, match="do not read each token once"):
        flexcache.capture(model, None, PROMPTS, tmp_path / "run.zarr", generate=GREEDY, **QUIET)
    assert not list(tmp_path.rglob("part-*"))


def test_each_row_knows_its_phase_and_rows_can_be_chosen_by_it(model: Any, tmp_path: Path) -> None:
    store = flexcache.capture(model, None, PROMPTS, tmp_path / "run.zarr", generate=GREEDY, layers=[1], **QUIET)
    phases = np.array(store.token_label("phase").to_pylist())
    prompts = store.documents["prompt_tokens"].to_numpy()
    position, document = (store.coordinates[name].values for name in ("position", "document"))
    assert np.array_equal(phases == "decode", position >= prompts[document])
    assert set(phases) == {"prefill", "decode"}
    chosen = flexcache.capture(
        model, None, PROMPTS, tmp_path / "new.zarr", generate=GREEDY, layers=[1], rows={"phases": ["decode"]}, **QUIET
    )
    assert chosen.n_rows == (phases == "decode").sum()
    for line in range(len(PROMPTS)):
        at = store.documents["id"].to_pylist().index(chosen.documents["id"][line].as_py())
        kept = chosen.read("resid_post", 1, chosen.rows(document=line))
        whole = store.read("resid_post", 1, store.rows(document=at))
        assert np.array_equal(kept, whole[prompts[at] :])


def test_a_probe_takes_the_phase_as_target_or_as_groups(model: Any, tmp_path: Path) -> None:
    prompts = token_documents(lengths(20, longest=12), vocabulary=VOCABULARY)
    store = flexcache.capture(model, None, prompts, tmp_path / "run.zarr", generate=GREEDY, layers=[1], **QUIET)
    [phase], [position] = (targets.read(store, name) for name in ("phase", "position"))
    found = probes.sweep(store, target=phase, site="resid_post", probe=probes.Logistic(), groups="document")
    assert sorted(found.results.attrs["classes"]) == ["decode", "prefill"]
    options: dict[str, Any] = {"rows": "all", "groups": "phase", "cv": 2, "task": "regression"}
    grouped = probes.sweep(store, target=position, site="resid_post", probe=probes.Ridge(), **options)
    assert np.isfinite(grouped.results.to_array()).any()


def test_a_mean_and_other_dtypes_are_made_of_the_same_values(model: Any, tmp_path: Path) -> None:
    whole = flexcache.capture(model, None, PROMPTS, tmp_path / "run.zarr", generate=GREEDY, layers=[1], **QUIET)
    mean = flexcache.capture(
        model, None, PROMPTS, tmp_path / "mean.zarr", generate=GREEDY, layers=[1], rows="mean", dtype="float16", **QUIET
    )
    for line in range(len(PROMPTS)):
        at = whole.documents["id"].to_pylist().index(mean.documents["id"][line].as_py())
        expected = whole.read("resid_post", 1, whole.rows(document=at)).mean(axis=0).astype(np.float16)
        assert np.allclose(mean.read("resid_post", 1, mean.rows(document=line))[0], expected, rtol=1e-3)


def contents(store: Path) -> dict[str, bytes]:
    left = ("runs", ".claims", ".partial", "ledger/plan.json", "zarr.json", "README.md")
    files = {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}
    return {name: content for name, content in files.items() if not name.startswith(left)}


def capture_in_process(path: Path, stop: tuple[Any, str, int] | None = None) -> int:
    """Fork a process that captures, and that ends abruptly before a call of a function; return its id."""
    process = os.fork()
    if process:
        return process
    try:
        if stop is not None:
            owner, name, calls = stop
            function, count = getattr(owner, name), iter(range(calls))
            setattr(owner, name, lambda *a, **k: function(*a, **k) if next(count, None) is not None else os._exit(9))
        flexcache.capture(tiny("llama"), None, PROMPTS, path, generate=SAMPLED, batch_tokens=16, **QUIET)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


SAMPLED = GREEDY | {"temperature": 1.0, "seed": 3, "batch": 3}


@pytest.mark.usefixtures("small_parts")
def test_a_killed_capture_resumes_to_the_same_bytes_and_two_processes_write_them_too(tmp_path: Path) -> None:
    from flexcache.recording import make_completions
    from flexcache.recording.decoded_activations import ActivationReader
    from flexcache.recording.run.recorder import Recorder

    def end(path: Path, stop: tuple[Any, str, int] | None = None) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(capture_in_process(path, stop), 0)[1])

    assert end(tmp_path / "whole" / "run.zarr") == 0
    whole = contents(tmp_path / "whole" / "run.zarr")
    places = [(ActivationReader, "begin_last_step", 4), (make_completions, "write_durably", 1), (Recorder, "put", 7)]
    for number, place in enumerate([*places, (Recorder, "commit_unit", 0)]):
        path = tmp_path / str(number) / "run.zarr"
        assert end(path, place) == 9
        assert end(path) == 0
        assert contents(path) == whole
        assert flexcache.open(path).complete
        assert not list(path.with_name("run.zarr.completions").glob("*.activations"))
        assert not list(path.with_name("run.zarr.completions").glob(".*"))
    path = tmp_path / "two" / "run.zarr"
    processes = [capture_in_process(path) for _ in range(2)]
    assert [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes] == [0, 0]
    assert contents(path) == whole


@pytest.mark.usefixtures("small_parts")
def test_a_retracted_unit_is_made_again_from_a_second_generation(model: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"generate": GREEDY, "layers": [1], "batch_tokens": 16, **QUIET}
    store = flexcache.capture(model, None, PROMPTS, tmp_path / "run.zarr", **options)
    before = contents(store.path)
    record = next((store.path / "ledger" / "0").glob("*.json"))
    record.unlink()
    flexcache.capture(model, None, PROMPTS, tmp_path / "run.zarr", **options)
    assert contents(store.path) == before


def test_a_store_knows_how_its_rows_were_computed(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    store = flexcache.capture(model, None, PROMPTS, path, generate=GREEDY, layers=[1], **QUIET)
    assert store.spec.generate is not None
    assert store.spec.generate.capture
    assert store.ledger.read_record(0).fingerprint["decoding"] is True
    with pytest.raises(MismatchError, match=r"capture"):
        flexcache.capture(model, None, PROMPTS, path, generate=GREEDY | {"capture": False}, layers=[1], **QUIET)
    with pytest.raises(ConfigError, match="generat"):
        flexcache.extend(model, None, PROMPTS, path, **QUIET)
    found = flexcache.recompute(model, path, units=9)
    assert not any(item.wrong for item in found)
    assert 0 < max(item.relative_error for item in found) < 1e-5
    rerun = flexcache.capture(
        model, None, PROMPTS, tmp_path / "re.zarr", generate=GREEDY | {"capture": False}, layers=[1], **QUIET
    )
    values, others = (
        np.concatenate(
            [rows_of(one, "resid_post", one.documents["id"].to_pylist().index(p["id"]))[1] for p in PROMPTS], 1
        )
        for one in (store, rerun)
    )
    expected = np.linalg.norm(values - others) / np.linalg.norm(values)
    assert max(item.relative_error for item in found) == pytest.approx(expected, rel=0.5)


def test_what_a_generation_cannot_give_is_refused_before_any_work(model: Any, tmp_path: Path) -> None:
    def refused(match: str, model: Any = model, error: type[Exception] = ConfigError, **fields: Any) -> None:
        with pytest.raises(error, match=match):
            flexcache.capture(model, None, PROMPTS, tmp_path / "run.zarr", **{"generate": GREEDY, **QUIET, **fields})
        assert not list(tmp_path.rglob("part-*"))

    scaled = flexcache.Transform("scaled", "resid_post", layers=[1], function=torch.abs)
    refused("transforms", transforms=[scaled])
    refused("gradients", sites=["resid_post.grad"])
    refused("windows", windows={"length": 4})
    refused("packing", packing={"length": 8, "separator": None, "bos": None})
    refused("lm_head", sites=["lm_head"])
    refused("phases", generate=GREEDY | {"capture": False}, rows={"phases": ["decode"]})
    refused("cannot generate", model=tiny("bert"))
    refused("encoder and a decoder", model=tiny("t5"))
    refused("cache of keys and values", model=tiny("mamba"))
    labelled = [{**item, "phase": "x"} for item in PROMPTS]
    with pytest.raises(DocumentsError, match="'phase'"):
        flexcache.capture(model, None, labelled, tmp_path / "label.zarr", generate=GREEDY, **QUIET)
    with pytest.raises(ConfigError, match="stores no activations"):
        flexcache.generate(model, None, PROMPTS, tmp_path / "made", **GREEDY)


def test_the_command_captures_while_it_generates_and_verify_says_how_far_a_rerun_is(
    config: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--set", "generate={max_new_tokens: 3, capture: true}", "--set", "rows={phases: [decode]}"]
    run(capsys, "capture", config, "-q", *options)
    store = flexcache.open("run.zarr")
    assert store.complete
    assert set(store.documents["n_rows"].to_pylist()) <= {1, 2, 3}
    assert set(store.token_label("phase").to_pylist()) == {"decode"}
    run(capsys, "capture", config, "-q", *options)
    run(capsys, "plan", config, "-q", *options)
    told = run(capsys, "verify", "run.zarr", "--recompute", 2, "--config", config, "-q", *options)
    assert "relative error" in told
    assert "✗" not in told
    assert "not made yet" in run(capsys, "extend", config, "-q", *options, status=2)

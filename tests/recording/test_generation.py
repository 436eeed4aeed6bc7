"""Generated completions: made once, kept as documents of tokens, and captured with their prompts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import flexcache
from analysis.replay.engine.identity import identity_error
from flexcache.errors import CaptureError, ConfigError, DocumentsError, MismatchError
from flexcache.options import Generation
from flexcache.recording import completions as completions_module
from flexcache.store.write.claims import Claims
from flexcache.store.write.worker import Worker
from tests.corpora import lengths, token_documents
from tests.models import VOCABULARY, tiny
from tests.pipelines.conftest import checkpoint, config, corpus  # noqa: F401
from tests.pipelines.test_cli import run

PROMPTS = token_documents(lengths(9, longest=12), vocabulary=VOCABULARY)
GREEDY = Generation(max_new_tokens=6, batch=4)
DRAWN = Generation(max_new_tokens=6, batch=4, temperature=1.0, seed=3)


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(completions_module, "PART", 4)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama")


def table(documents: flexcache.Documents) -> list[dict[str, Any]]:
    return [row for batch in documents.batches() for row in batch.to_pylist()]


def test_completions_are_the_most_likely_tokens_one_by_one(model: Any, tmp_path: Path) -> None:
    rows = table(flexcache.generate(model, None, PROMPTS, tmp_path / "made", GREEDY))
    assert [row["id"] for row in rows] == [item["id"] for item in PROMPTS]
    for row, item in zip(rows, PROMPTS):
        tokens = list(item["tokens"])
        for _ in range(6):
            with torch.no_grad():
                tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
            if tokens[-1] == 2:
                break
        assert row["tokens"] == tokens
        assert row["prompt_tokens"] == len(item["tokens"])
        assert row["generated"] == [{"start": len(item["tokens"]), "end": len(tokens), "label": "completion"}]
        assert row["score"] == item["score"]


def test_a_completion_ends_with_the_end_token(model: Any, tmp_path: Path) -> None:
    whole = table(flexcache.generate(model, None, PROMPTS, tmp_path / "whole", GREEDY))
    third = {row["id"]: row["tokens"][row["prompt_tokens"] + 2] for row in whole}
    ends, kept = third["doc-0"], model.generation_config.eos_token_id
    try:
        model.generation_config.eos_token_id = [ends]
        short = table(flexcache.generate(model, None, PROMPTS, tmp_path / "short", GREEDY))
    finally:
        model.generation_config.eos_token_id = kept
    for before, after in zip(whole, short):
        new = before["tokens"][before["prompt_tokens"] :]
        expected = new[: new.index(ends) + 1] if ends in new else new
        assert after["tokens"][after["prompt_tokens"] :] == expected
    assert len(short[0]["tokens"]) < len(whole[0]["tokens"])


def test_settings_of_the_model_that_change_completions_are_part_of_their_identity(tmp_path: Path) -> None:
    model = tiny("llama")
    flexcache.generate(model, None, PROMPTS, tmp_path / "made", GREEDY)
    model.generation_config.update(temperature=0.6, use_cache=False)
    flexcache.generate(model, None, PROMPTS, tmp_path / "made", GREEDY)
    model.generation_config.update(repetition_penalty=1.8)
    with pytest.raises(MismatchError, match=r"generation_config\.repetition_penalty"):
        flexcache.generate(model, None, PROMPTS, tmp_path / "made", GREEDY)
    request = tmp_path / "made" / "request"
    content = json.loads(request.read_bytes())
    del content["generation_config"]  # as an earlier version wrote it
    request.write_text(json.dumps(content))
    flexcache.generate(model, None, PROMPTS, tmp_path / "made", GREEDY)


def test_settings_that_the_model_cannot_generate_with_are_named(tmp_path: Path) -> None:
    model = tiny("llama")
    model.generation_config.update(prompt_lookup_num_tokens=2)
    with pytest.raises(CaptureError, match=r"(?s)batch_size = 1.*model\.generation_config"):
        flexcache.generate(model, None, PROMPTS, tmp_path / "made", GREEDY)


def test_stopped_generation_resumes_to_the_same_completions(model: Any, tmp_path: Path) -> None:
    whole = flexcache.generate(model, None, PROMPTS, tmp_path / "whole", DRAWN)

    def stop(documents: int, tokens: int) -> None:
        if documents == 4:
            raise KeyboardInterrupt

    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        flexcache.generate(model, None, PROMPTS, tmp_path / "two", DRAWN, stop)
    assert torch.equal(torch.random.get_rng_state(), state)
    first = (tmp_path / "two" / "part-000000.parquet").stat().st_mtime_ns
    with pytest.raises(DocumentsError, match="not made yet"):
        completions_module.Completions(tmp_path / "two").open()
    told: list[tuple[int, int]] = []
    again = flexcache.generate(model, None, PROMPTS, tmp_path / "two", DRAWN, lambda *done: told.append(done))
    assert table(again) == table(whole)
    assert [documents for documents, _ in told] == [4, 8, 9]
    assert (tmp_path / "two" / "part-000000.parquet").stat().st_mtime_ns == first
    other = table(flexcache.generate(model, None, PROMPTS, tmp_path / "seed", DRAWN.model_copy(update={"seed": 4})))
    assert [row["tokens"] for row in other] != [row["tokens"] for row in table(whole)]
    with pytest.raises(MismatchError, match=r"generate\.temperature"):
        flexcache.generate(model, None, PROMPTS, tmp_path / "two", GREEDY)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_generation_waits_for_parts_of_other_processes(model: Any, tmp_path: Path) -> None:
    flexcache.generate(model, None, PROMPTS, tmp_path / "whole", DRAWN)
    shared = tmp_path / "shared"
    shared.mkdir()
    other = Worker(shared)
    claims = Claims(other)
    assert claims.take_claim([1]) == "1"
    told: list[int] = []

    def finish(documents: int, tokens: int) -> None:
        told.append(documents)
        if documents == 5:  # parts 0 and 2, of four documents and of one
            assert not (shared / "part-000001.parquet").exists()
            shutil.copy(tmp_path / "whole" / "part-000001.parquet", shared)
            claims.release(1)

    flexcache.generate(model, None, PROMPTS, shared, DRAWN, finish)
    claims.close()
    other.close()
    assert told == [4, 5, 9]
    assert contents(shared) == contents(tmp_path / "whole")
    assert not [path for path in shared.iterdir() if path.is_dir()], "nothing of the processes is left"


def test_generation_takes_over_parts_of_a_process_that_is_gone(model: Any, tmp_path: Path) -> None:
    flexcache.generate(model, None, PROMPTS, tmp_path / "whole", DRAWN)
    shared = tmp_path / "shared"
    shared.mkdir()
    other = Worker(shared)
    Claims(other).take_claim([1])
    other.close()  # with its claim left behind, as a kill does
    flexcache.generate(model, None, PROMPTS, shared, DRAWN)
    assert contents(shared) == contents(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_make_the_same_completions_as_one(config: Path) -> None:  # noqa: F811
    options = ["--set", "generate={max_new_tokens: 3, temperature: 1.0, batch: 4}"]
    command = [sys.executable, "-m", "pipelines", "capture", str(config), "-q", *options]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    started = [subprocess.Popen([*command, "--set", "store=two.zarr"], env=environment) for _ in range(2)]
    assert [process.wait(timeout=300) for process in started] == [0, 0]
    assert subprocess.run([*command, "--set", "store=one.zarr"], env=environment, timeout=300).returncode == 0
    assert contents(Path("two.zarr.completions")) == contents(Path("one.zarr.completions"))
    one, two = flexcache.open("one.zarr"), flexcache.open("two.zarr")
    assert two.complete
    assert one.documents.equals(two.documents)


def test_prompt_and_completion_are_captured_and_can_be_replayed(model: Any, tmp_path: Path) -> None:
    documents = flexcache.generate(model, None, PROMPTS, tmp_path / "made", DRAWN)
    store = flexcache.capture(model, None, documents, tmp_path / "run.zarr", layers=[1], progress=False)
    assert store.replayable
    assert identity_error(store, model, site="resid_post", layer=1) == 0.0
    rows = {"token_spans": "generated"}
    alone = flexcache.capture(model, None, documents, tmp_path / "new.zarr", layers=[1], rows=rows, progress=False)
    starts = dict(zip(alone.documents["id"].to_pylist(), alone.documents["prompt_tokens"].to_pylist()))
    for name, start in starts.items():
        positions = alone.coordinates["position"].values[alone.rows(document=name)].tolist()
        both = store.coordinates["position"].values[store.rows(document=name)].tolist()
        assert positions == both[start:]
    assert np.isfinite(alone.read("resid_post", 1)).all()


def test_a_configuration_generates_completions_before_the_capture(
    config: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--set", "generate={max_new_tokens: 3}", "--set", "rows={token_spans: generated}"]
    assert "not made yet" in run(capsys, "plan", config, *options, status=1)
    run(capsys, "capture", config, "-q", *options)
    store = flexcache.open("run.zarr")
    assert store.plan["documents"] == 80
    assert set(store.documents["n_rows"].to_pylist()) <= {1, 2, 3}
    line = store.documents["id"].to_pylist().index("t3")
    texts = {json.loads(text)["id"]: json.loads(text)["text"] for text in corpus_lines(config)}
    assert store.documents["prompt"][line].as_py() == texts["t3"]
    assert store.documents["label"][line].as_py() == "yes"
    assert store.provenance.tokenizer["class"]
    run(capsys, "capture", config, "-q", *options)
    run(capsys, "plan", config, "-q", *options)
    assert "not made yet" in run(capsys, "extend", config, "-q", *options, status=2)


def corpus_lines(path: Path) -> list[str]:
    where = next(line for line in path.read_text().splitlines() if line.startswith("documents: "))
    return Path(where.removeprefix("documents: ")).read_text().splitlines()


def test_unusable_prompts_and_models_are_refused(model: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot generate"):
        flexcache.generate(tiny("bert"), None, PROMPTS, tmp_path / "bert", GREEDY)
    long = Generation(max_new_tokens=int(model.config.max_position_embeddings))
    with pytest.raises(DocumentsError, match="a prompt cannot be completed"):
        flexcache.generate(model, None, PROMPTS, tmp_path / "long", long)
    with pytest.raises(DocumentsError, match="no tokenizer"):
        flexcache.generate(model, None, [{"id": "a", "text": "w4"}], tmp_path / "text", GREEDY)
    with pytest.raises(DocumentsError, match="'prompt'"):
        flexcache.generate(model, None, [{"id": "a", "tokens": [4], "prompt": 1}], tmp_path / "label", GREEDY)

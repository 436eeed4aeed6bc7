from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import flexcache
from tests.corpora import token_documents
from tests.models import VOCABULARY, tiny
from tests.pipelines.test_cli import run


def test_stats_and_report_from_the_command_line(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "capture", config, "-q")
    text = run(capsys, "stats", "run.zarr", "--by", "layer,position,label", "--rows", "100", "-q")
    for words in ("norm", "rank", "CKA next", "stats/resid_post.stats.zarr", "each read once"):
        assert words in text
    model = str(flexcache.open("run.zarr").provenance.model_name)
    assert model
    assert "reused" in run(capsys, "stats", "run.zarr", "--by", "layer,position,label", "--rows", "100", "-q")
    text = run(capsys, "stats", "run.zarr", "--only", "moments,pca", "--layers", "1:3", "-o", "few", "-q")
    assert "lens" not in text
    page = run(capsys, "report", "run.zarr", "-q").split("report")[1].split()[0]
    assert "<h2>Norms</h2>" in Path(page).read_text("utf-8")


def test_token_types_and_lens_with_the_model(
    config: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "capture", config, "-q")
    text = run(capsys, "stats", "run.zarr", "--by", "layer,token_type", "--model", checkpoint, "-q")
    assert "lens" in text
    text = " ".join(
        run(capsys, "stats", "run.zarr", "--only", "lens", "--model", checkpoint, "-o", "few", "-q").split()
    )
    assert "KL of the logit lens from layer" in text
    page = run(capsys, "report", "run.zarr", "--model", checkpoint, "-o", "page.html", "-q")
    assert "page.html" in page
    written = Path("page.html").read_text("utf-8")
    assert "<h2>Logit lens</h2>" in written
    assert ">w" in written


def test_a_report_uses_the_results_that_exist(
    config: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "capture", config, "-q")
    run(capsys, "stats", "run.zarr", "--only", "moments,pca", "--layers", "1:3", "-q")
    made = Path("stats/resid_post.stats.zarr/zarr.json").stat().st_mtime_ns
    text = run(capsys, "report", "run.zarr", "-q")
    assert "not in it: quantiles, outliers, similarity, lens, examples" in " ".join(text.split())
    assert Path("stats/resid_post.stats.zarr/zarr.json").stat().st_mtime_ns == made
    written = Path("stats/resid_post.html").read_text("utf-8")
    assert "<h2>Spectra</h2>" in written
    assert "<h2>Outliers</h2>" not in written
    text = run(
        capsys,
        "stats",
        "run.zarr",
        "--model",
        checkpoint,
        "--own-logits",
        "--similarity-rows",
        "40",
        "--only",
        "lens",
        "-q",
    )
    assert "the model's own logits" in " ".join(text.split())
    run(capsys, "report", "run.zarr", "--model", checkpoint, "-q")
    shutil.copytree(checkpoint, "other")
    other = AutoModelForCausalLM.from_pretrained(checkpoint)
    other.get_output_embeddings().weight.data += 1
    other.save_pretrained("other")
    assert "reused" not in run(capsys, "report", "run.zarr", "--model", "other", "-q")


def test_own_logits_without_a_model_are_refused(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "capture", config, "-q")
    text = run(capsys, "stats", "run.zarr", "--only", "moments", "--own-logits", "-q", status=2)
    assert "give the checkpoint folder" in " ".join(text.split())


def test_mistakes_end_in_one_message(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "capture", config, "-q")
    for arguments, message, status in (
        (("--only", "momentz"), "did you mean moments", 1),
        (("--by", "lable"), "did you mean label", 1),
        (("--site", "resid_pots"), "did you mean resid_post", 1),
        (("--scheduler", "thread"), "did you mean threads", 2),
        (("--by", "token_type", "--model", "/nowhere"), "cannot be loaded", 1),
        (("--layers", "77"), "no layer 77", 1),
    ):
        assert message in " ".join(run(capsys, "stats", "run.zarr", "-q", *arguments, status=status).split())


def test_a_report_of_token_ids_needs_no_tokenizer_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny("llama")
    model.save_pretrained("plain")
    flexcache.capture(model, None, token_documents([6] * 20, vocabulary=VOCABULARY), "run.zarr", progress=False)
    text = " ".join(run(capsys, "report", "run.zarr", "--model", "plain", "-q").split())
    assert "tokens are numbers: --model FOLDER" in text
    assert "<h2>Logit lens</h2>" in Path("stats/resid_post.html").read_text("utf-8")

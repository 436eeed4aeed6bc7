"""Images from the command line: a checkpoint with its image processor, and a folder of images."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import transformers as hf
from PIL import Image

import flexcache
from tests.pipelines.test_cli import run
from tests.vision import DEPTH, GRID, arrays, processor, tiny_vision


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint, images and a configuration in a folder of its own, which is also the working folder."""
    monkeypatch.chdir(tmp_path)
    tiny_vision("dinov2_registers").save_pretrained("model")
    processor().save_pretrained("model")
    for number, array in enumerate(arrays(12)):
        path = Path("pictures") / ("left" if number % 2 else "right") / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)
    path = tmp_path / "config.yaml"
    path.write_text(
        "model: model\ndocuments: pictures\nstore: run.zarr\nsites: {resid_post: all, attn_out: [0]}\n"
        "batch_tokens: 48\nthreads: 1\n"
    )
    return path


def test_plan_capture_verify_and_extend(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = 12 * (3 + GRID**2)
    assert str(rows) in run(capsys, "plan", config)
    assert not Path("run.zarr").exists()
    run(capsys, "capture", config, "-q")
    store = flexcache.open("run.zarr")
    assert store.complete
    assert store.n_rows == rows
    assert store.documents.column("folder").to_pylist().count("left") == 6
    assert store.patches.before == ("cls", "register_0", "register_1")
    assert store.provenance.tokenizer["class"].startswith("ViTImageProcessor")
    assert "nothing to do" in run(capsys, "capture", config)
    run(capsys, "extend", config, "-q", "--set", "sites={attn_out: [1]}")
    assert flexcache.open("run.zarr").layers("attn_out") == (0, 1)
    shutil.rmtree("pictures")
    text = run(capsys, "verify", "run.zarr", "--recompute", "3", "--config", config, "-q", "--set", "sites=resid_post")
    assert "byte for byte" in text


def test_estimate_and_sites(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "tokens/s" in run(capsys, "estimate", config, "--seconds", "0.1", "-q")
    text = run(capsys, "sites", "model", "--match", "encoder.layer.*")
    assert f"batch × {3 + GRID**2} × 48" in text
    assert "resid_post" in text


@pytest.mark.slow
def test_the_vision_tower_of_clip_is_captured(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seeing = tiny_vision("clip_vision").config
    words = hf.CLIPTextConfig(
        vocab_size=50, hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48
    )
    whole = hf.CLIPModel(hf.CLIPConfig(text_config=words.to_dict(), vision_config=seeing.to_dict()))
    whole.save_pretrained("clip")
    processor().save_pretrained("clip")
    change = ("--set", "model.name=clip", "--set", "store=clip.zarr")
    assert "side: vision" in run(capsys, "capture", config, "-q", *change, status=2)
    run(capsys, "capture", config, "-q", *change, "--set", "model.side=vision")
    assert flexcache.open("clip.zarr").layers("resid_post") == tuple(range(DEPTH))
    assert "batch × 10 × 48" in run(capsys, "sites", "clip", "--side", "vision")
    assert "has no vision tower" in run(capsys, "sites", "model", "--side", "vision", status=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("packing={length: 32}", "for texts"),
        ("rows={roles: [user]}", "for texts"),
        ("generate={max_new_tokens: 3}", "the model cannot generate"),
        ("documents.labels=[none]", "no label column"),
    ],
)
def test_mistakes_fail_before_anything_is_written(
    change: str, message: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in run(capsys, "capture", config, "-q", "--set", change, status=1 if "labels" in change else 2)
    assert not Path("run.zarr").exists()


def test_a_checkpoint_without_a_processor_is_named(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("model/preprocessor_config.json").unlink()
    assert "image processor of model cannot be loaded" in run(capsys, "capture", config, "-q", status=2)

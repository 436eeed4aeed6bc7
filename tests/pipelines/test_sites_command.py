from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flexcache.errors import SiteError
from flexcache.hooks.checks.survey import survey
from pipelines.sites import chosen, collapse
from tests.models import DEPTH, tiny
from tests.pipelines.test_cli import run

ROOT = Path(__file__).parents[2]


def line(text: str, path: str) -> list[str]:
    """Return the cells of the one line of a table that begins with *path*."""
    found = [row for row in text.splitlines() if row.split()[:1] == [path]]
    assert len(found) == 1, text
    return [cell.strip() for cell in found[0].split("  ") if cell.strip()]


def launched(*arguments: object, world: int = 2) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world)),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"),
            *("-m", "pipelines", "sites", *map(str, arguments)),
        ],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_equal_blocks_share_a_line(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "sites", checkpoint)
    assert line(text, "model.layers.*.mlp.down_proj") == [
        "model.layers.*.mlp.down_proj",
        f"× {DEPTH}",
        "Linear",
        "batch × length × 112",
        "batch × length × 64",
        "float32",
        "mlp_out, mlp_post",
    ]
    assert line(text, "model.layers.*")[-1] == "resid_pre, resid_post"
    assert line(text, "lm_head")[1:3] == ["Linear", "batch × length × 64"]
    assert "model.layers.0" not in text
    assert "on ranks" not in text


def test_all_gives_every_module_a_line(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "sites", checkpoint, "--all")
    for layer in range(DEPTH):
        assert line(text, f"model.layers.{layer}.mlp.down_proj")[1] == "Linear"
    assert "*" not in text


def test_a_glob_chooses_modules(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "sites", checkpoint, "--match", "model.layers.[12].*.o_proj")
    assert line(text, "model.layers.*.self_attn.o_proj")[1] == "× 2"
    assert len(text.strip().splitlines()) == 3
    text = run(capsys, "sites", checkpoint, "--match", "model.layers.*.mpl", status=1)
    assert text.startswith("error: no module that runs matches 'model.layers.*.mpl'")
    assert "did you mean model.layers" in text


def test_json_has_an_object_for_every_module(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = json.loads(run(capsys, "sites", checkpoint, "--json", "--match", "model.layers.*.mlp.down_proj"))
    assert [record["module"] for record in records] == [f"model.layers.{i}.mlp.down_proj" for i in range(DEPTH)]
    assert records[1] == {
        "module": "model.layers.1.mlp.down_proj",
        "class": "Linear",
        "input": ["batch", "length", "112"],
        "output": ["batch", "length", "64"],
        "dtype": "float32",
        "runs": 1,
        "sites": [
            {"site": "mlp_out", "layer": 1, "side": "output"},
            {"site": "mlp_post", "layer": 1, "side": "input"},
        ],
    }


def test_no_weights_are_read(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    assert "resid_post" in run(capsys, "sites", tmp_path)


def test_a_folder_without_a_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "cannot be loaded" in run(capsys, "sites", tmp_path / "nowhere", status=2)


def test_a_model_that_reads_no_token_ids_is_refused_with_the_way_in_python(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    transformers.Wav2Vec2Config(**sizes, architectures=["Wav2Vec2Model"]).save_pretrained(tmp_path)
    text = run(capsys, "sites", tmp_path, status=1)
    assert text.startswith("error: the model cannot be surveyed")
    assert "Wav2Vec2Model" in text
    assert "in Python" in text


def test_blocks_that_differ_are_listed_with_their_numbers() -> None:
    model = tiny("llama", device="meta")
    model.model.layers[2].mlp = tiny("llama", device="meta", intermediate_size=80).model.layers[2].mlp
    lines = {found.pattern: found.times for found in collapse(survey(model), {})}
    assert lines["model.layers.*.mlp.up_proj (0–1, 3)"] == "× 3"
    assert lines["model.layers.2.mlp.up_proj"] == ""
    assert lines["model.layers.*.mlp"] == "× 4"
    assert lines["(the model)"] == ""


def test_a_glob_that_matches_the_empty_path_leaves_the_model_itself_out() -> None:
    found = survey(tiny("llama", device="meta"))
    assert [entry.path for entry in chosen(found, "**")] == [entry.path for entry in found if entry.path]
    with pytest.raises(SiteError, match="no module that runs matches"):
        chosen(found, "nothing")


@pytest.mark.slow
def test_two_processes_print_how_they_share_each_activation(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    done = launched(tmp_path)
    assert done.returncode == 0, done.stderr
    text = done.stdout
    half, whole = "sharded on dim 2 (32+32)", "replicated"
    attention = line(text, "model.layers.*.self_attn.o_proj")
    assert attention[3:7] == ["batch × length × 64", half, "batch × length × 64", whole]
    block = line(text, "model.layers.*")
    assert block[:7] == [
        *("model.layers.*", f"× {DEPTH}", "LlamaDecoderLayer"),
        *("batch × length × 64", whole, "batch × length × 64", whole),
    ]
    assert line(text, "model.layers.*.mlp.up_proj")[6] == "sharded on dim 2 (56+56)"
    assert text.count("on 2 processes") == 1  # one rank prints


@pytest.mark.slow
def test_experts_with_an_unknown_layout_are_marked_in_the_table(tmp_path: Path) -> None:
    tiny("mixtral").save_pretrained(tmp_path)
    done = launched(tmp_path, "--json", "--match", "model.layers.1.mlp**")
    assert done.returncode == 0, done.stderr
    records = {record["module"]: record for record in json.loads(done.stdout)}
    assert "inside experts" in records["model.layers.1.mlp.experts.act_fn"]["output_on_ranks"]
    assert records["model.layers.1.mlp"]["output_on_ranks"] == "replicated"


@pytest.mark.slow
def test_a_model_that_cannot_be_sharded_is_refused(tmp_path: Path) -> None:
    tiny("gpt2").save_pretrained(tmp_path)
    done = launched(tmp_path)
    assert done.returncode != 0
    assert done.stdout == ""
    assert "cannot be loaded over 2 processes" in done.stderr
    assert "no `tp_plan`" in done.stderr


def test_an_error_of_every_rank_is_printed_once(tmp_path: Path) -> None:
    done = launched(tmp_path / "nowhere")
    assert done.returncode != 0
    assert done.stderr.count("error: model") == 1

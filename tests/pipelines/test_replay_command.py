from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import flexcache
from analysis import replay, saved
from analysis.replay.edits.edit import from_json
from analysis.replay.sweeps.charts import make_charts
from flexcache.errors import AnalysisError, ConfigError
from flexcache.validation import validate
from pipelines.config import replay_config
from pipelines.config.yaml_remedies import as_yaml, key_names
from tests.models import HIDDEN
from tests.pipelines.test_cli import run

ASKED: dict[str, Any] = {
    "at": {"layers": [0, 2], "positions": ["last", 0]},
    "edits": [
        {"zero": {"dims": [3]}},
        {"steer": {"vector": {"target": "label"}, "alpha": [1, 4]}},
        {"erase": {"target": "label"}},
        {"patch": {"donor": {"same_length": 0, "differing": "label"}}},
        {"chain": [{"scale": {"factor": 2.0}}, {"noise": {"scale": 0.1}}]},
        {"function": "tests.analysis.replay.test_edits:doubled"},
    ],
    "metrics": ["kl", "logit_diff", "recovered"],
    "baselines": ["identity", "random_direction", "norm_matched"],
    "answers": ["w5", 6],
    "documents": 12,
    "attribution": {"donors": {"same_length": 1}, "top": 6, "sample": 5, "method": "ig", "steps": 2, "layers": "0,2"},
    "logit_attribution": {},
}


@pytest.fixture
def asked(config: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, checkpoint: Path) -> Path:
    run(capsys, "capture", config, "-q", "--set", "sites=[resid_post, resid_post.grad, z, mlp_out]")
    path = tmp_path / "edits.yaml"
    path.write_text(yaml.safe_dump({"model": str(checkpoint), **ASKED}))
    return path


def test_a_sweep_from_the_command_line(asked: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = run(capsys, "replay", "run.zarr", asked, "-o", "out", "-q")
    assert "identity error: 0 at most" in text
    assert "largest by kl" in text
    assert "attribution (ig) against exact: 5 cells drawn uniformly: rank correlation" in text
    assert "6 largest estimates" in text
    found = replay.load(tmp_path / "out")
    assert found.results.sizes["document"] == 12
    assert list(found.results["edit"].values) == [
        "Zero(dims=(3,))",
        "Steer by layer",
        "Erase by layer",
        "Patch",
        "Scale >> Noise",
        "Function(function='tests.analysis.replay.test_edits:doubled')",
    ]
    assert list(found.results["alpha"].values) == [1, 2, 4]
    report = (tmp_path / "out/report.html").read_text()
    assert "rank correlation" in report
    panels = [
        panel for name in ASKED["metrics"] for chart in make_charts(found.effect(), name) for panel in chart.panels
    ]
    assert report.count('<svg role="img"') == len(panels) + 2
    assert "Direct logit attribution" in report
    direct = saved.load(tmp_path / "out/logit_attribution.zarr")[0]["logit_attribution"]
    assert set(direct["token"].values.tolist()) == {direct["token"].values[0]}
    assert (direct["other"] == 6).all()
    assert direct.sizes["row"] == 12
    assert "layer 2 head 1" in direct["component"].values
    assert "mean over 12 rows" in text
    assert (tmp_path / "out/logit_attribution.png").exists()
    assert "bytes" in report
    assert all((tmp_path / f"out/{name}.png").exists() for name in ASKED["metrics"])
    store = flexcache.open("run.zarr")
    question = found.results.attrs["question"]
    fitted = question["edits"][1]["documents"]
    assert len(fitted) == 40
    assert question["edits"][2]["documents"] == fitted
    judged = found.results["document"].values.tolist()
    assert judged == [name for name in store.documents["id"].to_pylist() if name not in fitted][:12]
    assert "fitted to 40 documents and judged on 12 others (divided by documents, seed 0)" in " ".join(text.split())
    assert "fitted to 40 documents" in report
    chosen = np.isin(store.documents["id"].to_pylist(), fitted)
    by_label = np.where(chosen, store.documents["label"].to_pylist(), "")
    X = store.read("resid_post", 2, store.rows(position=-1)).astype(np.float64)
    steer: Any = from_json(question["edits"][1])
    vector = X[by_label == "yes"].mean(0) - X[by_label == "no"].mean(0)
    np.testing.assert_allclose(dict(steer.edit.edits)[2].vector, vector, atol=1e-6)
    assert vector.shape == (HIDDEN,)
    assert "identity error" in run(capsys, "replay", "run.zarr", asked, "-o", "out", "-q"), "resumed"
    wrong = ("--set", "metrics=[flips]")
    assert "another sweep" in run(capsys, "replay", "run.zarr", asked, "-o", "out", "-q", *wrong, status=1)


def test_answers_in_python_are_texts_of_one_token(asked: Path, checkpoint: Path) -> None:
    model = flexcache.ModelSource(name=str(checkpoint)).load()

    def logit_diff(answers: Any) -> Any:
        options: dict[str, Any] = {"metrics": ["logit_diff"], "documents": ["t0"], "progress": False}
        at = replay.grid(layers=[0])
        return replay.sweep("run.zarr", model, at, replay.Zero(), answers=answers, **options).results["value"]

    expected = logit_diff((5, 6))
    for answers in (("w5", "w6"), ("w5", 6), {"t0": ("w5", "w6")}, [("w5", "w6")]):
        assert logit_diff(answers).equals(expected)
    for wrong, found in ((("w5 w6", 3), "'w5 w6' is not one token: 2 tokens"), (("", 3), "0 tokens")):
        with pytest.raises(AnalysisError, match="answers cannot be read") as error:
            logit_diff(wrong)
        assert found in str(error.value.found)


@pytest.mark.parametrize(
    ("change", "message", "status"),
    [
        ("edits=[{zeroo: {}}]", "there is no edit 'zeroo'", 2),
        ("edits=[{zero: {dim: [1]}}]", "edit zero cannot be made from these settings", 2),
        ("edits=[{zero: {}, mean: {}}]", "an edit cannot be read", 2),
        ("edits=[{steer: {vector: no.npy}}]", "edit steer cannot be made from these settings", 2),
        ("answers=[w5 w6, 3]", "is not one token", 2),
        ("answers=[3]", "answers cannot be read", 2),
        ("answers=null; metrics=[prob]", "give answers: [token, other]", 1),
        ("at.positions=[]", 'write positions: "last"', 1),
        ("edits=[{patch: {donor: {same_length: label}}}]", "write {same_length: 0, differing: label}", 2),
        ("edits=[{patch: {donor: {same_length: 0, differs: label}}}]", "did you mean differing", 2),
        ("readout=41", "no document has all tokens of the readout", 1),
        ("metric=[kl]", "unknown key 'metric'", 2),
        ("metrics=[kll]", "there is no metric 'kll'", 1),
        ("at.layers=[7]", "no layer 7", 1),
        ("at={site: z, heads: [9]}", "z has no head 9", 1),
        ("at={site: z, receiver: {site: q}}", "key 'at.receiver.layer' is missing", 2),
        ("at={site: z, layers: [2], receiver: {site: q, layer: 1}}", "no path leads", 1),
        ("model=nowhere", "cannot be loaded", 2),
        ("attribution={donors: doc-1, steps: 4}", "steps belong to integrated gradients", 1),
        ("attribution={donors: doc-1, layers: [7]}", "no layer 7", 1),
        ("attribution={donors: doc-1, sample: -1}", "sample", 2),
        ("logit_attribution={rows: 99}", "no row has an answer", 1),
        ("logit_attribution={head: true}", "unknown key 'logit_attribution.head'", 2),
        ("attribution={donors: t5, objective: {logit_difference: [w5, 6]}}", "those of another objective", 1),
    ],
)
def test_a_mistake_ends_in_one_message(
    change: str, message: str, status: int, asked: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    none = ("attribution=null", "logit_attribution=null", "answers=null", "edits=[{zero: {}}]", "metrics=[kl]")
    changes = [word for one in (*none, *change.split("; ")) for word in ("--set", one)]
    text = run(capsys, "replay", "run.zarr", asked, "-q", *changes, status=status)
    assert message in text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("metrics=nothing", "there is no metric 'nothing'"),
        ("baselines=nothing", "there is no baseline 'nothing'"),
        ("documents=[nobody]", "no document 'nobody'"),
        ("readout=first", "readout"),
        ("at.layers=[99]", "99"),
    ],
)
def test_wrong_arguments_are_found_before_the_model_is_loaded(
    change: str, message: str, asked: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flexcache.ModelSource, "load", lambda *_: pytest.fail("loaded"))
    none = ("attribution=null", "logit_attribution=null", "answers=null", "edits=[{zero: {}}]", "metrics=kl")
    changes = [word for one in (*none, change) for word in ("--set", one)]
    assert message in run(capsys, "replay", "run.zarr", asked, "-q", *changes, status=1)


@pytest.mark.parametrize(
    ("key", "asked"),
    [
        ("documents", {"documents": -1}),
        ("documents", {"documents": 0}),
        ("at.heads", {"at": {"heads": "all"}}),
        ("logit_attribution.rows", {"logit_attribution": {"rows": "first"}}),
    ],
)
def test_a_value_of_no_type_that_a_key_has_is_refused_under_the_name_of_the_key(
    key: str, asked: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=f"^key '{key}' has a value[\\s\\S]* or "):
        validate(replay_config.ReplayConfig, {"model": "m", "edits": [{"zero": {}}], **asked}, "edits.yaml")


def test_a_remedy_for_a_file_has_its_keys_in_place_of_python_arguments() -> None:
    for file, remedy, expected in (
        ("replay", "accept=['weights'] replays it", "accept: ['weights'] replays it"),
        ("capture", "cut with max_length=512, or size={1}", "cut with max_length: 512, or size={1}"),
        ("capture", "(allow_mixed=True, --allow-mixed)", "(allow_mixed: true, --allow-mixed)"),
        ("capture", "flexcache.open_documents(…, labels=['a, b', 'c'])", "documents: {labels: ['a, b', 'c']}"),
        ("capture", "flexcache.open_documents(…, text=None)", "documents: {text: null}"),
        ("capture", "flexcache.Transform('a', 'q', function=…)", "flexcache.Transform('a', 'q', function=…)"),
        ("capture", "f(" + "'a', " * 5000, "f(" + "'a', " * 5000),
        ("capture", "run it with --set batch_tokens=64", "run it with --set batch_tokens=64"),
    ):
        assert as_yaml(remedy, key_names(file)) == expected  # type: ignore[arg-type]


def test_heads_and_a_path_from_the_command_line(
    asked: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    one = ("attribution=null", "logit_attribution=null", "edits=[{zero: {}}]", "metrics=[kl]", "readout=last")
    path = "{site: q, layer: 3, heads: [2], positions: last}"
    for folder, receiver in (("heads", "null"), ("paths", path)):
        cells = f"at={{site: z, layers: [0, 2], heads: [3, 1], receiver: {receiver}}}"
        changes = [part for change in (*one, cells) for part in ("--set", change)]
        run(capsys, "replay", "run.zarr", asked, "-q", "-o", folder, *changes)
    heads, paths = (replay.load(tmp_path / name).results for name in ("heads", "paths"))
    assert heads["edit"].values.tolist() == paths["edit"].values.tolist() == ["Zero head 3", "Zero head 1"]
    assert paths.attrs["question"]["receiver"] == {"site": "q", "layer": 3, "heads": [2], "positions": "last"}
    sizes = [float(found["value"].sel(arm="edit").mean()) for found in (heads, paths)]
    assert 0 < sizes[1] < sizes[0]


def test_the_example_is_valid() -> None:
    (path,) = (Path(replay_config.__file__).parents[1] / "configs/replay").glob("*.yaml")
    assert [next(iter(edit)) for edit in replay_config.read_replay(path).edits] == ["steer", "erase", "patch"]

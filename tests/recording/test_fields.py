"""Options of the calls: the same fields as objects, as keywords, and in a file; and what a wrong one ends in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import flexcache
from flexcache.errors import ConfigError, MismatchError
from flexcache.recording.fields import CaptureFields, ExtendFields, GenerateFields, RecordFields, RunFields
from flexcache.recording.run_options import RunOptions
from flexcache.spec import CaptureSpec
from pipelines.config import CaptureConfig
from pipelines.config.replay_config import ReplayConfig
from tests.models import tiny

DOCS = [{"id": str(i), "tokens": list(range(5, 9 + i))} for i in range(6)]


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return tiny("llama")


def described(model: Any) -> set[type]:
    """Return a model and the models of its fields, checking that every field is described."""
    found = {model}
    for name, field in model.model_fields.items():
        assert field.description, f"{model.__name__}.{name} has no description"
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(kind, type) and hasattr(kind, "model_fields"):
                found |= described(kind)
    return found


def test_every_field_of_specs_options_and_files_has_a_description() -> None:
    names = {kind.__name__ for one in (CaptureConfig, ReplayConfig) for kind in described(one)}
    assert {"ModelSource", "DocumentsSource", "ObjectiveSource", "Windows", "Packing", "Generation", "Cells"} <= names


def test_the_docstring_of_a_model_lists_its_fields() -> None:
    for model in (CaptureSpec, RunOptions, flexcache.Windows):
        listed = (model.__doc__ or "").partition("Attributes\n----------\n")[2].splitlines()
        assert [line for line in listed if not line.startswith(" ")] == list(model.names())


def test_keywords_of_the_calls_are_the_fields_of_the_models() -> None:
    spec, run = set(CaptureSpec.names()), set(RunOptions.names())
    assert set(RunFields.__annotations__) == run
    assert set(CaptureFields.__annotations__) == spec | run
    assert set(RecordFields.__annotations__) < spec | run
    assert set(ExtendFields.__annotations__) < spec | run
    assert set(GenerateFields.__annotations__) == {*flexcache.Generation.model_fields, "heartbeat_timeout"}
    assert set(CaptureConfig.names()) >= spec | run


def test_one_capture_from_objects_and_from_keywords_is_one_store(model: Any, tmp_path: Path) -> None:
    spec = CaptureSpec(sites="resid_post", layers=[0, 1], rows={"every": 2}, dtype="float32")
    options = RunOptions(buffer_bytes="64 MiB", progress=False)
    first = flexcache.capture(model, None, DOCS, tmp_path / "run.zarr", spec, options=options)
    fields: dict[str, Any] = {"sites": ["resid_post"], "layers": "0,1", "rows": {"every": 2}, "dtype": "float32"}
    again = flexcache.capture(model, None, DOCS, first.path, **fields, progress=False)
    assert again.spec == first.spec
    assert again.layers("resid_post") == (0, 1)
    changed = flexcache.capture(model, None, DOCS, tmp_path / "other.zarr", spec, layers=[2], options=options)
    assert changed.layers("resid_post") == (2,)
    assert changed.spec.choice.every == 2
    other = flexcache.capture(model, None, DOCS, tmp_path / "last.zarr", spec, rows="last", options=options)
    assert other.n_rows == len(DOCS)
    reused = first.spec
    copied = flexcache.capture(model, None, DOCS, tmp_path / "copied.zarr", reused, options=options)
    assert copied.spec == first.spec


def test_an_unknown_keyword_names_the_nearest_field(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    calls: dict[str, Any] = {
        "capture": lambda **fields: flexcache.capture(model, None, DOCS, path, **fields),
        "record": lambda **fields: flexcache.record(path, DOCS, sites={"a": 8}, model="m", **fields),
    }
    for call in calls.values():
        with pytest.raises(ConfigError, match="did you mean batch_tokens"):
            call(batch_token=64)
        with pytest.raises(ConfigError, match="'patience' is now called 'heartbeat_timeout'"):
            call(patience=60)
        with pytest.raises(ConfigError, match="'buffer_mb' is now called 'buffer_bytes'"):
            call(buffer_mb=64)
        with pytest.raises(ConfigError, match="spec cannot be used"):
            call(spec=3)
        with pytest.raises(ConfigError, match="unknown key 'choice'"):
            call(choice={"every": 2})
    store = flexcache.capture(model, None, DOCS, path, progress=False)
    with pytest.raises(ConfigError, match="did you mean layers"):
        flexcache.extend(model, None, DOCS, path, layer=[0])  # type: ignore[call-arg]
    with pytest.raises(MismatchError, match="seed: 0 in the store, 4"):
        flexcache.extend(model, None, DOCS, path, spec=CaptureSpec(seed=4))
    with pytest.raises(ConfigError, match="did you mean top_p"):
        flexcache.generate(model, None, DOCS, tmp_path / "made", max_new_tokens=3, to_p=0.5)  # type: ignore[call-arg]
    assert flexcache.Store(path).spec == store.spec


def test_a_spec_that_describes_a_transform_needs_its_function(model: Any, tmp_path: Path) -> None:
    norm = flexcache.Transform("norm", "resid_post", lambda values: values.norm(dim=-1, keepdim=True), layers=[0])
    store = flexcache.capture(model, None, DOCS, tmp_path / "run.zarr", transforms=[norm], progress=False)
    spec = store.spec
    with pytest.raises(ConfigError, match="function of transform 'norm' is missing"):
        flexcache.capture(model, None, DOCS, store.path, spec, progress=False)
    again = flexcache.capture(model, None, DOCS, store.path, spec, transforms=[norm], progress=False)
    assert again.spec == store.spec
    assert again.spec.sites == {}


@pytest.mark.parametrize(
    ("given", "size"), [("256 MiB", 256 << 20), ("1 GB", 10**9), ("100000000", 10**8), (4096, 4096)]
)
def test_the_buffer_takes_bytes_as_a_number_or_with_a_unit(given: Any, size: int) -> None:
    assert RunOptions(buffer_bytes=given).buffer_bytes == size


@pytest.mark.parametrize("given", [0, -1, 1.5, True, "0", "many", "3 XB", None, "-1"])
def test_a_buffer_that_is_no_size_is_a_clear_error(given: Any) -> None:
    with pytest.raises(ConfigError, match="key 'buffer_bytes'"):
        RunOptions(buffer_bytes=given)


def test_options_that_are_constructed_wrongly_raise_the_errors_of_the_project() -> None:
    with pytest.raises(ConfigError, match="did you mean stride"):
        flexcache.Windows(strde=3)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="key 'length'"):
        flexcache.Packing(length=1)
    with pytest.raises(ConfigError, match="expected: a list\n"):
        flexcache.Choice(roles="assistant")  # type: ignore[arg-type]

"""Checks by small forwards are made once for a model in a process, and again when it has changed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import flexcache
from flexcache.errors import CaptureError, SiteError
from flexcache.recording.forward.batch_reader import BatchReader
from flexcache.recording.forward.capture_targets import find_targets
from flexcache.recording.run.forward_loop import on_device, run_pending_units, try_largest
from flexcache.recording.run.recorder import Recorder
from tests.corpora import token_documents
from tests.models import VOCABULARY, tiny
from tests.recording.test_recorder import shard_hashes

DOCUMENTS = token_documents([3, 9, 17, 9, 40, 1, 17, 41, 9, 3, 26, 40], vocabulary=VOCABULARY)
QUIET: dict[str, Any] = {"progress": False, "sites": ["resid_post", "attn_out"], "layers": [1], "batch_tokens": 96}
SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}


def drops(model: Any) -> bool:
    """Return True if a model drops its mask."""
    return bool(model.drops_mask or model.options["drops_mask"] or SETTINGS["drops"](model))


def never(model: Any) -> bool:
    """Return False."""
    return False


def always(model: Any) -> bool:
    """Return True."""
    return True


SETTINGS: dict[str, Any] = {"drops": never}


class Counted(hf.LlamaForCausalLM):
    """An encoder that notes the shape of each forward, and can drop its mask; without padding that changes nothing."""

    drops_mask = False
    options: dict[str, bool]

    def forward(self, input_ids: Any = None, attention_mask: Any = None, **more: Any) -> Any:
        vars(self).setdefault("shapes", []).append(tuple(input_ids.shape))
        count, length = input_ids.shape
        mask = torch.zeros(count, 1, length, length)
        if attention_mask is not None and not drops(self):
            mask = mask.masked_fill(attention_mask[:, None, None] == 0, torch.finfo(torch.float32).min)
        return super().forward(input_ids=input_ids, attention_mask=mask, **more)


def passing(forward: Callable[..., Any], masked: bool) -> Callable[..., Any]:
    """Return a forward that passes the mask on, or drops it."""

    def replaced(*args: Any, attention_mask: Any = None, **more: Any) -> Any:
        return forward(*args, attention_mask=attention_mask if masked else None, **more)

    return replaced


def counted() -> Counted:
    torch.manual_seed(0)
    model = Counted(hf.LlamaConfig(**SIZES, num_attention_heads=4)).eval()
    model.options = {"drops_mask": False}
    return model


def shapes_of_capture(model: Counted, path: Path) -> tuple[flexcache.Store, list[tuple[int, int]]]:
    vars(model)["shapes"] = []
    return flexcache.capture(model, None, DOCUMENTS, path, **QUIET), vars(model)["shapes"]


def test_a_later_capture_repeats_no_check_and_stores_the_same_bytes(tmp_path: Path) -> None:
    model = counted()
    first, before = shapes_of_capture(model, tmp_path / "first.zarr")
    second, after = shapes_of_capture(model, tmp_path / "second.zarr")
    assert len(before) - len(after) >= 4  # of the sites; of one sequence alone, in company, and padded
    assert shard_hashes(Path(str(first.path))) == shard_hashes(Path(str(second.path)))
    assert first.provenance.batching == second.provenance.batching == "padded"
    assert shapes_of_capture(counted(), tmp_path / "other.zarr")[1] == before


def test_no_planned_batch_runs_twice_on_a_cpu(tmp_path: Path) -> None:
    store, shapes = shapes_of_capture(counted(), tmp_path / "run.zarr")
    reader = BatchReader(store.path)
    planned = [batch.shape for unit in range(store.n_units) for batch in reader.read_unit(unit)]
    assert [shape for shape in shapes if shape in planned] == planned


def set_attribute(model: Counted, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model.drops_mask = not masked


def replace_class_forward(model: Counted, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Counted, "forward", passing(Counted.forward, masked))


def replace_own_forward(model: Counted, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "forward", passing(model.forward, masked))


def set_value_of_a_mapping(model: Counted, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model.options["drops_mask"] = not masked


def replace_function(model: Counted, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "drops", never if masked else always)


def replace_registered_function(model: Counted, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SETTINGS, "drops", never if masked else always)


CHANGES = [
    *(set_attribute, set_value_of_a_mapping, replace_class_forward, replace_own_forward),
    *(replace_function, replace_registered_function),
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_begins_to_leak_between_captures_is_noticed(
    change: Callable[[Counted, bool, pytest.MonkeyPatch], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = counted()
    for masked, batching in ((True, "padded"), (False, "equal_lengths")):
        with monkeypatch.context() as patched:
            change(model, masked, patched)
            store = shapes_of_capture(model, tmp_path / f"{batching}.zarr")[0]
        assert store.provenance.batching == batching


def test_a_site_that_becomes_wrong_between_captures_is_noticed(tmp_path: Path) -> None:
    model = counted()
    shapes_of_capture(model, tmp_path / "before.zarr")
    block = model.model.layers[1]
    handle = block.register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.raises(SiteError, match="adds something else to the residual stream"):
        shapes_of_capture(model, tmp_path / "hooked.zarr")
    handle.remove()
    forward = block.forward
    block.forward = lambda *args, **kwargs: 2 * forward(*args, **kwargs)
    with pytest.raises(SiteError, match="adds something else to the residual stream"):
        shapes_of_capture(model, tmp_path / "replaced.zarr")


def test_a_trial_of_the_largest_batch_halves_the_budget_before_anything_is_written(tmp_path: Path) -> None:
    path = flexcache.capture(tiny("llama"), None, DOCUMENTS, tmp_path / "run.zarr", **QUIET).path
    for record in (path / "ledger" / "0").glob("*.json"):
        record.unlink()
    model, limit = tiny("llama"), 50
    targets = find_targets(model, Recorder(path).store.spec)

    def before(_: object, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs["input_ids"].numel() > limit:
            raise torch.OutOfMemoryError(f"no room for {kwargs['input_ids'].numel()} tokens")

    model.register_forward_pre_hook(before, with_kwargs=True)
    recorder = Recorder(path)
    try_largest(model, targets, recorder, 0)
    assert recorder.batch_tokens <= limit
    assert not list((path / "ledger" / "0").glob("*.json"))
    run_pending_units(model, targets, recorder, 0)
    assert flexcache.verify(path).sound
    limit = 2
    for record in (path / "ledger" / "0").glob("*.json"):
        record.unlink()
    with pytest.raises(CaptureError, match="one sequence alone does not fit"):
        try_largest(model, targets, Recorder(path), 0)


def test_memory_is_a_devices_where_any_weight_is_on_one() -> None:
    assert not on_device(torch.nn.Linear(2, 2))
    assert not on_device(torch.nn.Linear(2, 2, device="meta"))

"""Verify names a damaged file, repair takes back exactly its unit, and the next capture restores the bytes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import flexcache
from flexcache.errors import DamagedError, MismatchError, StoreError
from tests.models import tiny
from tests.recording.test_recorder import shard_hashes
from tests.reliability.test_steps import capture


def flip(path: Path, at: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(at * (len(content) - 1))] ^= 4
    path.write_bytes(bytes(content))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def swap(path: Path) -> None:
    other = next(
        p for p in sorted(path.parents[2].glob("*/*/0")) if p != path and p.stat().st_size == path.stat().st_size
    )
    path.write_bytes(other.read_bytes())


DAMAGES: dict[str, Callable[[Path], None]] = {
    "a flipped bit": flip,
    "a flipped bit at the front": lambda path: flip(path, 0.0),
    "a flipped bit at the end": lambda path: flip(path, 1.0),
    "truncated": truncate,
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "another shard": swap,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> flexcache.Store:
    return capture(tmp_path_factory.mktemp("whole") / "run.zarr")


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_a_damaged_shard_is_named_and_only_its_unit_is_recomputed(
    damage: str, whole: flexcache.Store, tmp_path: Path
) -> None:
    path = tmp_path / "run.zarr"
    shutil.copytree(whole.path, path)
    name = "resid_post/c/3/1/0"
    DAMAGES[damage](path / name)
    found = flexcache.verify(path)
    assert [(finding.file, finding.unit) for finding in found.findings] == [(name, 1)]
    if damage in ("truncated", "missing", "empty"):
        with pytest.raises(DamagedError):
            flexcache.open(path).read("resid_post", 3)
    before = {p: p.stat().st_mtime_ns for p in path.glob("resid_post/c/*/*/0")}
    assert flexcache.repair(path).units == (1,)
    assert flexcache.open(path).committed_units.tolist() == [0, *range(2, whole.n_units)]
    assert flexcache.verify(path).sound
    capture(path)
    assert shard_hashes(path) == shard_hashes(whole.path)
    changed = {p.parent.name for p, when in before.items() if p.stat().st_mtime_ns != when}
    assert changed <= {"1"}
    assert flexcache.verify(path).sound
    assert flexcache.repair(path).units == ()


@pytest.mark.parametrize("damage", ["a flipped bit", "other conditions", "truncated", "empty"])
def test_a_damaged_record_is_taken_back(damage: str, whole: flexcache.Store, tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    shutil.copytree(whole.path, path)
    record = path / "ledger/0/2.json"
    if damage == "a flipped bit":
        record.write_text(record.read_text().replace('"size": ', '"size": 1', 1))
    elif damage == "other conditions":
        record.write_text(record.read_text().replace('"threads": 1', '"threads": 5', 1))
        assert record.read_bytes() != (whole.path / "ledger/0/2.json").read_bytes()
    else:
        DAMAGES[damage](record)
    assert flexcache.repair(path).units == (2,)
    capture(path)
    assert flexcache.open(path).ledger.read_record(2) == whole.ledger.read_record(2)
    assert flexcache.verify(path).sound


@pytest.mark.parametrize(
    "name",
    ["documents.parquet", "sequences.parquet", "token_id/c/0", "position/zarr.json", "README.md", "ledger/plan.json"],
)
def test_a_damaged_plan_is_reported(name: str, whole: flexcache.Store, tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    shutil.copytree(whole.path, path)
    if name == "ledger/plan.json":  # well-formed record with another file size
        (path / name).write_text((path / name).read_text().replace('"size": ', '"size": 1', 1))
    else:
        truncate(path / name)
    done = flexcache.repair(path)
    assert done.units == ()
    assert name in {finding.file for finding in done.beyond}
    assert flexcache.open(path).complete


def test_recomputed_units_are_equal_and_a_wrong_value_is_found(whole: flexcache.Store, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    model = tiny("llama")
    found = flexcache.recompute(model, whole.path, units=2)
    assert len(found) == 2 * 2 * 2, "of each unit, two layers on disk and two virtual ones"
    assert all(item.equal and item.same_conditions and not item.wrong for item in found)
    path = tmp_path / "run.zarr"
    shutil.copytree(whole.path, path)
    flip(path / "resid_post/c/1/0/0", 0.01)
    wrong = [item for item in flexcache.recompute(model, path, units=whole.n_units) if item.wrong]
    assert [(item.unit, item.site, item.layer) for item in wrong] == [(0, "resid_post", 1)]
    torch.set_num_threads(2)
    try:
        assert not any(item.same_conditions for item in flexcache.recompute(model, whole.path, units=1))
    finally:
        torch.set_num_threads(1)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.01)
    with pytest.raises(MismatchError, match="weights: 1 of 39 tensors differ"):
        flexcache.recompute(model, whole.path)
    shutil.rmtree(path / "ledger/0")
    with pytest.raises(StoreError, match="no unit is committed"):
        flexcache.recompute(model, path)

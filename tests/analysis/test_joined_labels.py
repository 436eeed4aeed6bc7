"""Analyses take labels that were joined to a store as they take labels that were captured with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

import flexcache
from analysis import probes
from analysis.dataset import targets
from analysis.dataset.probe_dataset import build_dataset
from analysis.replay.edits.donors import same_length
from analysis.statistics import moments
from analysis.survey import load_existing, survey
from tests.analysis.stores import value_store

COUNT = 30
LENGTHS = [int(n) for n in np.random.default_rng(0).integers(2, 5, COUNT)]
VALUES = np.random.default_rng(1).normal(size=(2, sum(LENGTHS), 4))
IDS = [f"d{i}" for i in range(COUNT)]
LABELS: dict[str, list[Any]] = {
    "mood": [("good", "bad", None)[i % 3] for i in range(COUNT)],
    "author": [i // 2 for i in range(COUNT)],
    "grade": [None if i % 7 == 0 else i / 3 for i in range(COUNT)],
    "topics": [[["red", "blue"], ["red"], []][i % 3] for i in range(COUNT)],
    "spans": [[{"start": 0, "end": 1, "label": ("name", "place")[i % 2]}] if i % 3 else [] for i in range(COUNT)],
    "tags": [[("x", "y")[(i + at) % 2] for at in range(length)] for i, length in enumerate(LENGTHS)],
}
TOKENS = ["tags"]


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> flexcache.Store:
    path = tmp_path_factory.mktemp("captured") / "run.zarr"
    return value_store(path, VALUES, LENGTHS, labels=LABELS, token_labels=TOKENS)


@pytest.fixture
def joined(tmp_path: Path) -> flexcache.Store:
    store = value_store(tmp_path / "run.zarr", VALUES, LENGTHS)
    store.join({"id": IDS, **LABELS}, token_labels=TOKENS)
    return store


def test_targets_and_groups_are_those_of_captured_labels(captured: flexcache.Store, joined: flexcache.Store) -> None:
    for name in (*LABELS, "spans"):
        for one, other in zip(targets.read(captured, name), targets.read(joined, name), strict=True):
            a, b = (
                build_dataset(store, "resid_post", t, groups="author")
                for store, t in ((captured, one), (joined, other))
            )
            assert (a.target, a.task, a.classes, a.dropped) == (b.target, b.task, b.classes, b.dropped)
            for column in ("y", "group", "document", "row"):
                assert np.array_equal(getattr(a, column), getattr(b, column))
            assert a.labels == {}
            assert set(b.labels) >= {"author"}


def test_statistics_by_a_joined_label_equal_those_by_a_captured_one(
    captured: flexcache.Store, joined: flexcache.Store
) -> None:
    a, b = (moments.compute(store, "resid_post", by=["layer", "mood"], progress=False) for store in (captured, joined))
    xr.testing.assert_identical(a.drop_attrs(), b.drop_attrs())
    assert same_length(joined, seed=3, differing="mood") == same_length(captured, seed=3, differing="mood")


def test_a_sweep_keeps_the_checksum_of_the_labels_it_used(joined: flexcache.Store, tmp_path: Path) -> None:
    options: dict[str, Any] = {"resamples": 20, "progress": False, "mdl": False, "cv": 3, "baselines": ["majority"]}
    sweep = probes.sweep(joined, "mood", "resid_post", probes.MassMean(), groups="author", **options)
    assert sweep.results.attrs["labels"] == joined.label_checksums(["mood", "author"])
    sweep.save(tmp_path / "results")
    assert probes.load(tmp_path / "results").results.attrs["labels"] == joined.label_checksums(["mood", "author"])
    assert sweep.to_direction(0).provenance["labels"] == joined.label_checksums(["mood", "author"])


def test_saved_statistics_are_computed_again_after_their_labels_were_replaced(
    joined: flexcache.Store, tmp_path: Path
) -> None:
    def run(**options: Any) -> Any:
        return survey(joined, only=["moments"], folder=tmp_path / "stats", progress=False, **options)

    first = run(by=["layer", "mood"])
    assert run(by=["layer", "mood"]).reused
    joined.join({"id": IDS, "other": LABELS["author"]}, name="unrelated")
    assert run(by=["layer", "mood"]).reused
    assert load_existing(joined, tmp_path / "stats", "resid_post") is not None
    flipped = {"good": "bad", "bad": "good", None: None}
    labels = {**LABELS, "mood": [flipped[mood] for mood in LABELS["mood"]]}
    joined.join({"id": IDS, **labels}, token_labels=TOKENS, replace=True)
    assert load_existing(joined, tmp_path / "stats", "resid_post") is None
    second = run(by=["layer", "mood"])
    assert not second.reused
    np.testing.assert_array_equal(second["moments"]["mean"].sel(mood="good"), first["moments"]["mean"].sel(mood="bad"))

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import flexcache
from analysis import replay
from tests.corpora import lengths, token_documents
from tests.models import VOCABULARY, tiny

DOCUMENTS = token_documents(lengths(24, longest=12), vocabulary=VOCABULARY)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


Made = tuple[flexcache.Store, nn.Module]


@pytest.fixture(scope="session")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Made]:
    """Return a function that captures a family's residual stream once, and returns the store with a fresh model."""
    made: dict[str, Path] = {}

    def make(family: str = "llama", compute: torch.dtype = torch.float32, **options: object) -> Made:
        key = f"{family} {compute} {sorted(options.items())}"
        if key not in made:
            path = tmp_path_factory.mktemp("replay") / "run.zarr"
            settings = {"sites": "resid_post", "batch_tokens": 48, "progress": False, **options}
            documents = settings.pop("documents", DOCUMENTS)
            flexcache.capture(tiny(family, compute), None, documents, path, **settings)  # type: ignore[arg-type]
            made[key] = path
        return flexcache.open(made[key]), tiny(family, compute)

    return make


def swept(made: Any, **options: Any) -> Any:
    """Return the results of a small sweep of a store and model, with other arguments if given."""
    asked = {"at": replay.grid(layers=1), "edit": replay.Zero(), "metrics": ["kl"], "progress": False}
    return replay.sweep(*made, **{**asked, **options}).results

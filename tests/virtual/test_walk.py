"""Recomputed rows against stored ones, bit for bit: the rows of a full store are the oracle."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

import flexcache
from flexcache import hooks
from flexcache.errors import SiteError
from flexcache.recording.forward.batch import Batch
from flexcache.recording.forward.batch_reader import BatchReader
from flexcache.site import Site
from flexcache.store.read.selection import ArrayKey
from flexcache.virtual.plan import BEGINNING, Segment, Start, divide, stored_starts
from flexcache.virtual.walk import Pieces, Walk
from tests.corpora import lengths, token_documents
from tests.models import DEPTH, FAMILIES, VOCABULARY, tiny

SITES = ("resid_post", "attn_out", "mlp_post", "q", "z")
WITHOUT = ("albert", "t5_encoder")
"""Families that are not recomputed from the middle: blocks that stand for several layers, a bias from the first."""
MIXTURES = ("mixtral", "qwen3_moe", "olmoe", "jamba")
"""Families whose experts may round the last bit differently with other padding, which replays do not have."""
REFUSED = {"granite": ("attn_out",), "deepseek_v3": ("mlp_post",), "jamba": ("mlp_post",)}
"""Sites that a capture refuses, since the models scale what they add, or have other neurons in some layers."""
FLOAT32_INSIDE = ("mamba", "mamba2")
"""Families whose residual stream is float32 in a bfloat16 model, and is rounded when it is stored."""
REPLAYED = [family for family in FAMILIES if family not in WITHOUT]
QUICK = 25
"""Families that are tested in float32 by default, and every fifth of them in bfloat16; all with ``-m slow``, too."""
KINDS = [
    pytest.param(
        family,
        getattr(torch, dtype),
        id=f"{family}-{dtype}",
        marks=() if number < QUICK and (dtype == "float32" or number % 5 == 0) else pytest.mark.slow,
    )
    for number, family in enumerate(REPLAYED)
    for dtype in ("float32", "bfloat16")
    if dtype == "float32" or family not in FLOAT32_INSIDE
]
DOCUMENTS = token_documents(lengths(8, longest=10), vocabulary=VOCABULARY)


def sites_of(family: str, model: torch.nn.Module) -> list[str]:
    """Return those of `SITES` that a model has."""
    found = []
    for site in (site for site in SITES if site not in REFUSED.get(family, ())):
        try:
            hooks.find_hook_points(model, Site.parse(site), "all")
        except SiteError:
            continue
        found.append(site)
    return found


def differing(walk: Walk, store: flexcache.Store, segments: list[Segment]) -> set[ArrayKey]:
    """Return the sites and layers of some segments whose recomputed bytes are not those of the store."""
    wrong: set[ArrayKey] = set()
    seen: set[ArrayKey] = set()

    def read(start: Start, batch: Batch) -> np.ndarray:
        return store.read(start.site, start.layer, slice(batch.rows.start, batch.rows.stop), raw=True)

    def compare(batch: Batch, key: ArrayKey, pieces: Pieces) -> None:
        seen.add(key)
        held = store.read(*key, slice(batch.rows.start, batch.rows.stop), raw=True).tobytes()
        if b"".join(pieces) != held:
            wrong.add(key)

    reader = BatchReader(store.path)
    for segment in segments:
        for unit in store.committed_units.tolist():
            record = store.ledger.read_record(unit)
            walk.run(segment, reader.read_unit(unit, record.batch_tokens), read, compare, record.fingerprint)
    assert seen == {key for segment in segments for key in segment.keys}
    return wrong


@pytest.mark.parametrize(("family", "dtype"), KINDS)
def test_recomputed_rows_are_the_stored_ones_to_the_bit(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny(family, dtype)
    sites = sites_of(family, model)
    flexcache.capture(model, None, DOCUMENTS, tmp_path / "s", sites=sites, batch_tokens=40, progress=False)
    store = flexcache.open(tmp_path / "s")
    walk = Walk(store, tiny(family, dtype), store.arrays.values())
    every = [(site, layer) for site, layer in product(sites, range(DEPTH))]
    assert differing(walk, store, [Segment(BEGINNING, tuple(every))]) == set()
    if family in MIXTURES:
        return
    assert differing(walk, store, divide(every, stored_starts(store.arrays))) == set()  # each from the block before
    middle = Start(2, "resid_post", 1)
    assert differing(walk, store, [Segment(middle, tuple(key for key in every if key[1] >= 2))]) == set()

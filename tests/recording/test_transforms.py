from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import flexcache
from analysis.induction import transforms
from flexcache import LogitDifference, NextTokenLoss, Transform
from flexcache.errors import CaptureError, ConfigError, MismatchError, SiteError
from flexcache.provenance import callable_fingerprint, import_object
from flexcache.recording.forward.batch import Batch
from tests.corpora import lengths, token_documents
from tests.models import DEPTH, HIDDEN, VOCABULARY, tiny

DOCUMENTS = token_documents(lengths(60, longest=30), vocabulary=VOCABULARY)
QUIET: dict[str, Any] = {"progress": False, "batch_tokens": 128}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


class Encoder(torch.nn.Module):
    """The encoder of a sparse autoencoder."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.linear = torch.nn.Linear(HIDDEN, 96)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.linear(x))


def entropy(pattern: torch.Tensor) -> torch.Tensor:
    """Map (sequences, heads, queries, keys) to (sequences, queries, heads)."""
    return -(pattern * pattern.clamp_min(1e-9).log()).sum(-1).transpose(1, 2)


def own_token(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    ids = torch.from_numpy(batch.input_ids(0))
    return logits.gather(2, ids[..., None])[..., 0]


def test_a_transform_is_stored_with_or_without_its_activation(tmp_path: Path) -> None:
    model, encoder = tiny("llama"), Encoder()
    sae = Transform("sae", "resid_post", encoder, layers=[1, 3])
    store = flexcache.capture(
        model, None, DOCUMENTS, tmp_path / "run.zarr", sites="resid_post", transforms=[sae], **QUIET
    )
    assert store.layers("sae") == (1, 3)
    assert store.arrays["sae"].features == 96
    assert store["sae"].dims == ("layer", "token", "feature_sae")
    with torch.no_grad():
        expected = encoder(torch.from_numpy(store.read("resid_post", 3))).numpy()
    assert np.allclose(store.read("sae", 3), expected, atol=1e-5)
    alone = flexcache.capture(model, None, DOCUMENTS, tmp_path / "alone.zarr", transforms=[sae], **QUIET)
    assert alone.sites == ("sae",)
    assert np.array_equal(alone.read("sae", 3), store.read("sae", 3))
    told = alone.spec.transforms["sae"]
    assert told["function"].endswith("test_transforms.Encoder")
    assert told["site"] == "resid_post"
    with pytest.raises(MismatchError, match=r"transforms\.sae\.state"):
        other = Transform("sae", "resid_post", Encoder(1), layers=[1, 3])
        flexcache.capture(model, None, DOCUMENTS, tmp_path / "alone.zarr", transforms=[other], **QUIET)


def test_attention_patterns_are_reduced_as_they_are_computed(tmp_path: Path) -> None:
    model = tiny("llama", attn_implementation="eager")
    store = flexcache.capture(
        model, None, DOCUMENTS, tmp_path / "run.zarr", transforms=[Transform("entropy", "pattern", entropy)], **QUIET
    )
    assert store.layers("entropy") == tuple(range(DEPTH))
    for document in DOCUMENTS[:6]:
        with torch.no_grad():
            patterns = model(torch.tensor([document["tokens"]]), output_attentions=True).attentions
        found = store.read("entropy", 2, store.rows(document["id"]))
        assert np.allclose(found, entropy(patterns[2])[0].numpy(), atol=1e-4)
    with pytest.raises(SiteError, match="eager"):
        flexcache.capture(
            tiny("llama", attn_implementation="sdpa"), None, DOCUMENTS, tmp_path / "b.zarr",
            transforms=[Transform("entropy", "pattern", entropy)], **QUIET,
        )  # fmt: skip
    with pytest.raises(SiteError, match="has no row for each token"):
        flexcache.capture(model, None, DOCUMENTS, tmp_path / "b.zarr", sites="pattern", **QUIET)


def test_a_function_may_take_the_batch_and_return_one_number_per_token(tmp_path: Path) -> None:
    model = tiny("llama")
    store = flexcache.capture(
        model, None, DOCUMENTS, tmp_path / "run.zarr",
        transforms=[Transform("own", "lm_head", own_token, batch=True)], **QUIET,
    )  # fmt: skip
    document = DOCUMENTS[4]
    with torch.no_grad():
        logits = model(torch.tensor([document["tokens"]])).logits[0]
    expected = logits[torch.arange(len(document["tokens"])), document["tokens"]].numpy()
    assert np.allclose(store.read("own", None, store.rows(document["id"]))[:, 0], expected, atol=1e-4)


def test_gradients_are_transformed_too(tmp_path: Path) -> None:
    model = tiny("llama")
    store = flexcache.capture(
        model, None, DOCUMENTS, tmp_path / "run.zarr", sites=["resid_post.grad"], layers=[2],
        transforms=[Transform("norm", "resid_post.grad", partial(torch.linalg.vector_norm, dim=-1), layers=[2])],
        **QUIET,
    )  # fmt: skip
    expected = np.linalg.norm(store.read("resid_post.grad", 2), axis=-1)
    assert np.allclose(store.read("norm", 2)[:, 0], expected, rtol=1e-5)


def test_invalid_transforms_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    model, path = tiny("llama"), tmp_path / "run.zarr"

    def capture(*transforms: Transform, sites: Any = None) -> None:
        flexcache.capture(model, None, DOCUMENTS, path, sites=sites, transforms=transforms, **QUIET)

    with pytest.raises(ConfigError, match="cannot have this name"):
        Transform("resid_post", "resid_post", entropy)
    with pytest.raises(SiteError, match="did you mean resid_post"):
        Transform("a", "resid_pots", entropy)
    with pytest.raises(CaptureError, match="returned no value for each token"):
        capture(Transform("a", "resid_post", lambda x: x.mean(dim=(0, 1))))
    with pytest.raises(CaptureError, match="the function of transform a failed"):
        capture(Transform("a", "resid_post", torch.nn.Linear(3, 3)))
    with pytest.raises(ConfigError, match="two arrays would be named"):
        capture(Transform("a", "resid_post", torch.tanh), Transform("a", "resid_pre", torch.tanh))
    assert list(tmp_path.iterdir()) == []


def test_functions_of_this_project_keep_the_fingerprints_that_stores_have_recorded() -> None:
    induction = "analysis.induction.transforms"
    recorded = [
        (NextTokenLoss(), "flexcache.recorder.objective.NextTokenLoss", "638153c4", "99aa06d3"),
        (LogitDifference(3, 5), "flexcache.recorder.objective.LogitDifference", "4592dafb", "c2e59b77"),
        (transforms.induction, f"{induction}.induction", "eb012240", "32bb32fb"),
        (transforms.previous_token, f"{induction}.previous_token", "cfad7242", "32bb32fb"),
        (transforms.next_token_loss, f"{induction}.next_token_loss", "96fb0288", "32bb32fb"),
    ]
    for function, name, source, state in recorded:
        found = callable_fingerprint(function)
        assert found["function"] == name
        assert found["source_xxh3_128"].startswith(source)
        assert found["state_xxh3_128"].startswith(state)


def test_a_fingerprint_of_a_function_differs_between_functions_but_not_between_runs() -> None:
    def scaled(x: torch.Tensor, by: float) -> torch.Tensor:
        return x * by

    assert callable_fingerprint(partial(scaled, by=2.0)) == callable_fingerprint(partial(scaled, by=2.0))
    assert callable_fingerprint(partial(scaled, by=2.0)) != callable_fingerprint(partial(scaled, by=3.0))
    assert callable_fingerprint(Encoder(0)) == callable_fingerprint(Encoder(0)) != callable_fingerprint(Encoder(1))
    assert callable_fingerprint(torch.tanh)["source_xxh3_128"] is None
    found = []
    for matrix in (torch.eye(2), 2 * torch.eye(2), torch.eye(2)):

        def rotate(x: torch.Tensor, by: torch.Tensor = matrix) -> torch.Tensor:
            return x @ by

        def closed(x: torch.Tensor, rotate: Any = rotate) -> torch.Tensor:
            return rotate(x)

        found.append((callable_fingerprint(rotate), callable_fingerprint(closed)))
    assert found[0] == found[2]
    assert found[0][0] != found[1][0]
    assert found[0][1] != found[1][1]
    assert import_object("tests.recording.test_transforms:Encoder", "here") is Encoder
    with pytest.raises(ConfigError, match="cannot be imported"):
        import_object("no_such_module:f", "here")
    with pytest.raises(ConfigError, match="did you mean entropy"):
        import_object("tests.recording.test_transforms:entrpy", "here")

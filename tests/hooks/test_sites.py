"""Every standard site of every family, compared with plain PyTorch hooks on modules listed by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flexcache.errors import SiteError
from flexcache.hooks import ActivationHooks, HookPoint, check_sites, find_blocks, find_hook_points, measure
from flexcache.site import Site
from tests.hooks.oracle import BLOCKS, INNER, read
from tests.hooks.sites_table import PAGE, with_mixtures, with_table
from tests.models import DEPTH, HIDDEN, tiny, token_ids

NO_FINAL_NORM = ("opt_post_norm", "bert", "roberta", "distilbert", "electra", "xlm_roberta", "deberta_v2")
HIDDEN_SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
MASK = torch.tensor([[1] * 7, [1] * 5 + [0] * 2, [1] * 2 + [0] * 5])


def located(model: torch.nn.Module, family: str, inner: bool = False) -> list[HookPoint]:
    sites = ("resid_pre", "resid_post", *BLOCKS[family][1], *(INNER[family] if inner else ()))
    return [point for site in sites for point in find_hook_points(model, Site(site))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", BLOCKS)
def test_every_site_equals_a_plain_hook_bit_for_bit(family: str, dtype: torch.dtype) -> None:
    model = tiny(family, dtype)
    inputs = {"input_ids": token_ids(), "attention_mask": MASK}
    expected = read(model, family, inner=True, **inputs)
    found = {}
    with ActivationHooks(
        model,
        located(model, family, inner=True),
        lambda point, t: found.update({(point.array, point.layer): t.clone()}),
    ) as points:
        points.forward(**inputs)
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        assert tensor.shape[:2] == (3, 7)
        assert tensor.dtype == dtype
        assert torch.equal(tensor.flatten(), expected[key].flatten()), key


@pytest.mark.parametrize("family", BLOCKS)
def test_resid_post_equals_the_hidden_states_of_transformers(family: str) -> None:
    model, ids = tiny(family), token_ids()
    with torch.no_grad():
        cache = {"use_cache": False} if hasattr(model, "lm_head") else {}  # with one, GPT-J's bits are others
        states = model(input_ids=ids, output_hidden_states=True, **cache).hidden_states
    found = {}
    with ActivationHooks(
        model,
        find_hook_points(model, Site("resid_post"), "0:3"),
        lambda point, t: found.update({point.layer: t.clone()}),
    ) as t:
        t.forward(input_ids=ids)
    assert list(found) == [0, 1, 2]
    for layer, tensor in found.items():
        assert torch.equal(tensor, states[layer + 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", BLOCKS)
def test_the_residual_identity_holds(family: str, dtype: torch.dtype) -> None:
    model = tiny(family, dtype)
    check_sites(model, located(model, family, inner=True))


NEEDS_WEIGHTS = ("biogpt",)  # its positions are counted by the values of the mask


@pytest.mark.parametrize("family", [family for family in BLOCKS if family not in NEEDS_WEIGHTS])
def test_a_model_without_weights_measures_the_same(family: str) -> None:
    points = located(tiny(family), family, inner=True)
    real = measure(tiny(family, torch.bfloat16), points)
    assert measure(tiny(family, torch.bfloat16, device="meta"), points) == real
    assert list(real) == points
    assert all(real[point] == ((HIDDEN,), torch.bfloat16) for point in points if point.array in HIDDEN_SITES)


@pytest.mark.parametrize("family", BLOCKS)
def test_blocks_are_found_where_the_oracle_lists_them(family: str) -> None:
    model = tiny(family, device="meta")
    path, blocks = find_blocks(model)
    assert path == BLOCKS[family][0]
    assert blocks is model.get_submodule(path)
    assert len(blocks) == DEPTH


@pytest.mark.parametrize("family", BLOCKS)
def test_the_embedding_and_the_last_norm_are_those_of_the_model(family: str) -> None:
    model = tiny(family)
    (embed,) = find_hook_points(model, Site("embed"))
    assert model.get_submodule(embed.module) is model.get_input_embeddings()
    path = BLOCKS[family][0]
    if family in NO_FINAL_NORM:
        with pytest.raises(SiteError, match="no final_norm"):
            find_hook_points(model, Site("final_norm"))
        return
    (norm,) = find_hook_points(model, Site("final_norm"))
    check_sites(model, [norm])
    with pytest.raises(SiteError, match="final_norm is not what its name says"):
        check_sites(model, [replace(norm, module=f"{path}.1")])


def test_the_table_in_the_docs_agrees_with_the_models() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert with_mixtures(with_table(page)) == page, "run python -m tests.hooks.sites_table"

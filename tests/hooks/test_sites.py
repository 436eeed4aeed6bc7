"""Every standard site of every family, against plain PyTorch hooks on modules that a person found."""

from __future__ import annotations

import pytest
import torch

from flexcache.hooks import Tap, Taps, check_identity, find_blocks, locate, measure
from flexcache.site import Site
from tests.hooks.oracle import BLOCKS, read
from tests.models import DEPTH, HIDDEN, tiny, token_ids

MASK = torch.tensor([[1] * 7, [1] * 5 + [0] * 2, [1] * 2 + [0] * 5])


def located(model: torch.nn.Module, family: str) -> list[Tap]:
    sites = ("resid_pre", "resid_post", *BLOCKS[family][1])
    return [tap for site in sites for tap in locate(model, Site(site))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", BLOCKS)
def test_every_site_equals_a_plain_hook_bit_for_bit(family: str, dtype: torch.dtype) -> None:
    model = tiny(family, dtype)
    inputs = {"input_ids": token_ids(), "attention_mask": MASK}
    expected = read(model, family, **inputs)
    found = {}
    with Taps(model, located(model, family), lambda tap, t: found.update({(tap.array, tap.layer): t.clone()})) as taps:
        taps.forward(**inputs)
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
    with Taps(
        model, locate(model, Site("resid_post"), "0:3"), lambda tap, t: found.update({tap.layer: t.clone()})
    ) as t:
        t.forward(input_ids=ids)
    assert list(found) == [0, 1, 2]
    for layer, tensor in found.items():
        assert torch.equal(tensor, states[layer + 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", BLOCKS)
def test_the_residual_identity_holds(family: str, dtype: torch.dtype) -> None:
    model = tiny(family, dtype)
    check_identity(model, located(model, family))


@pytest.mark.parametrize("family", BLOCKS)
def test_a_model_without_weights_measures_the_same(family: str) -> None:
    taps = located(tiny(family), family)
    real = measure(tiny(family, torch.bfloat16), taps)
    assert measure(tiny(family, torch.bfloat16, device="meta"), taps) == real
    assert list(real) == taps
    assert all(real[tap] == ((HIDDEN,), torch.bfloat16) for tap in taps if tap.array != "mlp_post")


@pytest.mark.parametrize("family", BLOCKS)
def test_blocks_are_where_a_person_finds_them(family: str) -> None:
    model = tiny(family, device="meta")
    path, blocks = find_blocks(model)
    assert path == BLOCKS[family][0]
    assert blocks is model.get_submodule(path)
    assert len(blocks) == DEPTH

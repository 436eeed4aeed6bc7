from __future__ import annotations

import pytest
import torch

from flexcache.errors import ConfigError, HookError, SiteError
from flexcache.hooks import FlexModel, HookFunction
from flexcache.hooks.flexmodel.hook_groups import matches
from tests.models import DEPTH, tiny, token_ids


@pytest.fixture
def acts() -> dict[str, list[torch.Tensor]]:
    return {}


@pytest.fixture
def flex(acts: dict[str, list[torch.Tensor]]) -> FlexModel:
    return FlexModel(tiny("llama"), acts)


BLOCKS = [f"model.layers.{layer}" for layer in range(DEPTH)]


def fired(flex: FlexModel, acts: dict[str, list[torch.Tensor]], **options: object) -> list[str]:
    acts.clear()
    flex(input_ids=token_ids(), use_cache=False, **options)
    return sorted(acts)


def test_a_group_is_made_by_a_glob_or_by_a_part_of_the_names(flex: FlexModel, acts: dict) -> None:
    made = flex.create_hook_group("blocks", "model.layers.*")
    assert [function.module_name for function in made] == BLOCKS
    flex.create_hook_group("up", "up_proj", hook_type="forward_pre")
    assert fired(flex, acts) == sorted([*BLOCKS, *(f"{block}.mlp.up_proj" for block in BLOCKS)])
    assert fired(flex, acts, groups="blocks") == BLOCKS
    assert fired(flex, acts, groups="blocks", complement=True) == [f"{block}.mlp.up_proj" for block in BLOCKS]
    assert fired(flex, acts, groups=["up", "blocks"]) == fired(flex, acts)
    assert flex.hook_groups == ["all", "blocks", "up"]


def test_a_group_of_parameters_reads_their_gradients(flex: FlexModel, acts: dict) -> None:
    made = flex.create_hook_group("norms", "*.norm.weight", hook_type="tensor")
    made += flex.create_hook_group("norms", "layers.0.mlp", hook_type="tensor")
    flex(input_ids=token_ids()).logits.sum().backward()
    assert set(acts) == {function.module_name for function in made}
    assert torch.equal(acts["model.norm.weight"][0], flex.module.model.norm.weight.grad)


def test_a_group_broadcasts_its_edit(flex: FlexModel) -> None:
    flex.create_hook_group("zero", "model.layers.*.mlp", editing_function=lambda m, x, c, t: 0 * x)
    flex.create_hook_group("zero", "model.layers.*.self_attn", editing_function=lambda m, x, c, t: 0 * x)
    embedded = flex.module.model.norm(flex.module.model.embed_tokens(token_ids()))
    assert torch.equal(flex(input_ids=token_ids()).logits, flex.module.lm_head(embedded))


def test_functions_join_and_leave_groups(flex: FlexModel, acts: dict) -> None:
    functions = [HookFunction(block) for block in BLOCKS]
    for function in functions:
        flex.register_forward_hook(function)
    flex.update_hook_groups(functions[:2], "early")
    flex.update_hook_groups(functions[2], "early")
    flex.update_hook_groups("layers.3", "late")
    assert flex.get_group_hook_functions("early") == functions[:3]
    assert flex.get_hook_function_groups(functions[3]) == {"all", "late"}
    assert fired(flex, acts, groups="early") == BLOCKS[:3]
    flex.remove_hook_groups("layers.1", "early")
    flex.remove_hook_groups(functions[2], "early")
    assert fired(flex, acts, groups="early") == BLOCKS[:1]
    flex.remove_hook_groups([functions[0]], "early")
    with pytest.raises(HookError, match="no group 'early'"):
        flex.get_group_hook_functions("early")
    assert fired(flex, acts) == BLOCKS, "they stay registered"


def test_enabled_groups_persist_and_groups_of_one_forward_do_not(flex: FlexModel, acts: dict) -> None:
    flex.create_hook_group("first", "model.layers.0")
    flex.enable_hook_groups("first", complement=True)
    later = HookFunction(BLOCKS[1])
    flex.register_forward_hook(later)
    assert fired(flex, acts) == BLOCKS[1:2]
    assert "model.layers.0" in fired(flex, acts, groups="all")
    assert fired(flex, acts) == BLOCKS[1:2]
    acts.clear()
    with torch.no_grad():
        flex.generate(token_ids(), max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert list(acts) == BLOCKS[1:2]
    flex.enable_hook_groups()
    assert BLOCKS[1] in fired(flex, acts)


def test_a_group_that_loses_its_last_member_while_enabled_leaves_nothing_active(flex: FlexModel, acts: dict) -> None:
    (function, *_) = flex.create_hook_group("one", "lm_head")
    flex.enable_hook_groups("one")
    flex.remove_hook_groups(function, "one")
    assert fired(flex, acts) == []


def test_unknown_names_raise(flex: FlexModel) -> None:
    function = flex.create_hook_group("blocks", "model.layers.*")[0]
    for call in (
        lambda: flex(input_ids=token_ids(), groups="blokcs"),
        lambda: flex.enable_hook_groups(["blocks", "blokcs"]),
        lambda: flex.remove_hook_groups(function, "blokcs"),
        lambda: flex.get_group_hook_functions("blokcs"),
    ):
        with pytest.raises(HookError, match=r"no group 'blokcs'\n.*did you mean blocks"):
            call()
    with pytest.raises(HookError, match="no hook function's module matches 'lm_head'"):
        flex.update_hook_groups("lm_head", "head")
    with pytest.raises(HookError, match="not registered"):
        flex.update_hook_groups(HookFunction("lm_head"), "head")
    with pytest.raises(HookError, match="all holds every"):
        flex.remove_hook_groups(function, "all")
    flex.update_hook_groups(function, "other")
    with pytest.raises(HookError, match=r"group other does not have model\.layers\.1"):
        flex.remove_hook_groups(flex.get_group_hook_functions("blocks")[:2], "other")
    assert flex.get_group_hook_functions("other") == [function], "nothing is done by halves"
    with pytest.raises(SiteError, match="no name matches"):
        flex.create_hook_group("none", "model.layer.*")
    with pytest.raises(ConfigError, match="did you mean forward_pre"):
        flex.create_hook_group("none", "mlp", hook_type="forward_pro")


def test_a_pattern_is_a_glob_only_with_wildcards() -> None:
    assert matches("layers.1", "model.layers.1.mlp")
    assert matches("layers.1", "model.layers.11")
    assert not matches("model.layers.*", "model.layers.1.mlp")
    assert matches("**.mlp", "model.layers.1.mlp")
    assert not matches("model.layers.[0-3]", "model.layers.11")

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from flexcache.errors import SiteError
from flexcache.hooks import find_hook_points
from flexcache.hooks.checks.sharding import LocalActivation, compare_ranks, read_local_activations
from flexcache.hooks.checks.survey import SurveyedModule, standard_hook_points, survey
from flexcache.hooks.locate.names import is_container, modules_by_path
from flexcache.parallel.meta_model import BatchExtent
from flexcache.site import ONCE, STANDARD, Site
from tests.models import DEPTH, FAMILIES, tiny, token_ids

PLACE: Any = ("model.layers.0.mlp", "output")

ROUTED = {"router_logits", "expert_out", "expert_index", "expert_weight"}
"""Sites of mixtures of experts alone."""


def first_tensor(value: Any) -> torch.Tensor | None:
    if isinstance(value, torch.Tensor):
        return value
    values = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
    return next((found for item in values if (found := first_tensor(item)) is not None), None)


def by_hand(model: nn.Module, **inputs: torch.Tensor) -> dict[str, list[tuple[Any, ...]]]:
    """Return class, input and output shape of every module that runs, read by plain hooks from a real forward."""
    found: dict[str, list[tuple[Any, ...]]] = {}

    def note(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given, returned = first_tensor(args), first_tensor(output)
        given = first_tensor(kwargs) if given is None else given
        shapes = (None if tensor is None else tuple(tensor.shape) for tensor in (given, returned))
        found.setdefault(name, []).append((type(module).__name__, *shapes))

    handles = [
        module.register_forward_hook(lambda *call, name=name: note(name, *call), with_kwargs=True)
        for name, module in model.named_modules()
    ]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ("mixtral", "biogpt")])
def test_a_survey_without_weights_agrees_with_hooks_on_a_real_batch(family: str) -> None:
    truth = by_hand(tiny(family), input_ids=token_ids(2, 9))
    found = {entry.path: entry for entry in survey(tiny(family, device="meta"))}
    assert list(found) == [name for name in modules_by_path(tiny(family, device="meta")) if name in truth]
    for name, runs in truth.items():
        entry, extent = found[name], BatchExtent(2, 9)
        sizes = [shape and tuple(size.of(extent) for size in shape) for shape in (entry.input, entry.output)]
        assert (entry.kind, *sizes) == runs[0], name
        assert entry.runs == len(runs), name


def test_shapes_are_symbols() -> None:
    found = {entry.path: entry for entry in survey(tiny("mixtral", torch.bfloat16, device="meta"))}
    assert found["model.layers.0.mlp"].shape("input") == "batch × length × 64"
    assert found["model.layers.0.mlp.gate"].shape("output") == "batch·length × 4"
    assert found["lm_head"].shape("output") == "batch × length × 257"
    assert found["lm_head"].dtype == "bfloat16"
    assert found["model.embed_tokens"].shape("input") == "batch × length"
    assert SurveyedModule("a", "B", None, (), None).shape("input") == "–"
    assert SurveyedModule("a", "B", None, (), None).shape("output") == "a number"


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "bert", "opt"])
def test_the_standard_sites_are_those_of_find_hook_points(family: str) -> None:
    model = tiny(family, device="meta")
    found = [point for entry in survey(model) for point in entry.points]
    sites = {point.array for point in found}
    assert {*STANDARD, *ONCE} - sites <= {*ROUTED, "final_norm", "cross_attn_out"}
    assert len(found) == len(sites & STANDARD.keys()) * DEPTH + len(sites & ONCE.keys())
    for name in sites:
        assert {point for point in found if point.array == name} == set(find_hook_points(model, Site(name)))


def test_a_site_that_no_layer_has_is_left_out() -> None:
    found = {point.array for point in standard_hook_points(tiny("mixtral", device="meta"))}
    assert found == {*STANDARD, *ONCE} - {"mlp_pre", "cross_attn_out"}


def test_a_site_that_some_layers_have_is_shown_there() -> None:
    model = tiny("llama", device="meta")
    model.model.layers[2].mlp = nn.Sequential(nn.Linear(64, 64, device="meta"))
    assert [point.layer for point in standard_hook_points(model) if point.array == "mlp_post"] == [0, 1, 3]


def test_a_model_without_one_stack_of_blocks_is_surveyed_without_sites() -> None:
    found = survey(tiny("albert", device="meta"))
    assert not any(entry.points for entry in found)
    assert max(entry.runs for entry in found) > 1


def test_an_encoder_decoder_is_surveyed_and_its_decoder_has_the_sites() -> None:
    found = survey(tiny("t5", device="meta"))
    assert {"encoder", "decoder"} <= {entry.path for entry in found}
    assert {point.array for entry in found for point in entry.points} == {*STANDARD, *ONCE} - ROUTED
    assert all(entry.path.startswith("decoder") for entry in found if entry.points)


def test_a_survey_leaves_the_model_as_it_was() -> None:
    model = tiny("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    survey(model)
    read_local_activations(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_model_without_token_ids_is_surveyed_with_an_example() -> None:
    net = nn.Sequential(nn.Linear(5, 3), nn.ReLU())
    for example in (
        lambda batch, length: torch.zeros(batch, length, 5),
        lambda batch, length: (torch.zeros(batch, length, 5),),
        lambda batch, length: {"input": torch.zeros(batch, length, 5)},
    ):
        found = survey(net, example=example)
        assert [(entry.path, entry.shape("output")) for entry in found] == [
            (name, "batch × length × 3") for name in ("", "0", "1")
        ]
        assert read_local_activations(net, example=example)["0", "input"].shape == (3, 11, 5)


def test_a_model_that_does_not_run_raises_with_its_error() -> None:
    with pytest.raises(SiteError, match="cannot be surveyed") as error:
        survey(nn.Linear(5, 3), example=lambda batch, length: torch.zeros(batch, length, 4))
    assert error.value.where == "Linear"
    assert "RuntimeError" in str(error.value.found)
    assert "example=" in str(error.value.remedy)


def test_one_process_reads_whole_activations() -> None:
    model = tiny("llama")
    found, held = survey(model), read_local_activations(model)
    places = [(entry.path, side) for entry in found for side in ("input", "output")]
    assert set(held) == set(places)
    for entry in found:
        for side, sizes in (("input", entry.input), ("output", entry.output)):
            assert held[entry.path, side].shape == tuple(size.of(BatchExtent(3, 11)) for size in sizes)
    assert not any(is_container(modules_by_path(model)[path]) for path, _ in held)


SUMS = (0.5, 1.0)


@pytest.mark.parametrize(
    ("held", "said"),
    [
        ([LocalActivation((3, 11, 64), SUMS)] * 2, "replicated"),
        ([LocalActivation((3, 11, 64), (float("inf"), float("inf")))] * 2, "replicated"),
        ([LocalActivation((3, 11, 32), SUMS), LocalActivation((3, 11, 32), (0.1, 2.0))], "sharded on dim 2 (32+32)"),
        (
            [LocalActivation((3, 11, 22)), LocalActivation((3, 11, 21)), LocalActivation((3, 11, 21))],
            "sharded on dim 2 (22+21+21)",
        ),
        ([LocalActivation((3, 6, 64)), LocalActivation((3, 5, 64))], "sharded on dim 1 (6+5)"),
        (
            [LocalActivation((3, 11, 64), SUMS), LocalActivation((3, 11, 64), (0.1, 1.0))],
            "cannot be explained: ranks have different values",
        ),
        ([LocalActivation((3, 11, 30))] * 2, "cannot be explained: (3, 11, 30) of (3, 11, 64)"),
        (
            [LocalActivation((17, 64)), LocalActivation((16, 64))],
            "cannot be explained: (17, 64) and (16, 64) of (3, 11, 64)",
        ),
        (
            [LocalActivation((3, 11, 64)), LocalActivation((3, 11, 32))],
            "cannot be explained: (3, 11, 64) and (3, 11, 32) of (3, 11, 64)",
        ),
        (
            [LocalActivation((3, 11, 32)), LocalActivation((3, 5, 64))],
            "cannot be explained: (3, 11, 32) and (3, 5, 64) of (3, 11, 64)",
        ),
        ([LocalActivation((3, 5, 32))] * 2, "cannot be explained: (3, 5, 32) of (3, 11, 64)"),
    ],
)
def test_the_sharding_follows_from_local_shapes_and_checksums(held: list[LocalActivation], said: str) -> None:
    assert str(compare_ranks((3, 11, 64), [{PLACE: each} for each in held], PLACE)) == said


def test_an_activation_missing_on_some_ranks_is_unexplained() -> None:
    held = LocalActivation((3, 11, 64))
    assert compare_ranks((3, 11, 64), [{}, {PLACE: held}], PLACE).why == "not read on rank 0"
    assert compare_ranks((3, 11, 64), [{}, {}], PLACE).why == "no rank reads it"


def test_activations_inside_experts_are_unexplained_even_if_shapes_fit() -> None:
    inside: Any = ("model.layers.0.mlp.experts.act_fn", "output")
    around: Any = ("model.layers.0.mlp.experts", "output")
    assert "inside experts" in str(compare_ranks((66, 112), [{inside: LocalActivation((66, 56))}] * 2, inside))
    assert str(compare_ranks((66, 112), [{around: LocalActivation((66, 112))}] * 2, around)) == "replicated"

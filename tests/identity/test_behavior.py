from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from flexcache.identity import comparable_record, differences, stored_record
from flexcache.identity.behavior import GROUPS, SHAPE, record_behavior, sketch
from flexcache.identity.describe import describe_model
from flexcache.recording.run.fingerprint import fingerprint
from flexcache.store.format.model_comparison import TOLERANCES
from tests.models import FAMILIES, tiny

OTHER = {"device": "another"}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@settings(deadline=None, max_examples=50)
@given(rows=st.integers(1, 40), features=st.integers(1, 70), seed=st.integers(0, 999))
def test_a_sketch_measures_the_distance_of_two_outputs(rows: int, features: int, seed: int) -> None:
    """Against numpy: norms are exact, projections are linear, and of the size of the norm."""
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((2, rows, features)).astype(np.float32)
    one, other, both = (sketch(values) for values in (a, b, a + b))
    assert one.shape == (GROUPS, 2)
    groups = np.array_split(a.astype(np.float64), GROUPS)
    assert np.allclose(one[:, 1], [np.linalg.norm(group) for group in groups])
    assert np.allclose(one[:, 0] + other[:, 0], both[:, 0], atol=1e-4)
    assert (np.abs(one[:, 0]) <= np.sqrt(features * -(-rows // GROUPS)) * one[:, 1] + 1e-9).all()


def test_projections_of_many_differences_have_the_size_of_their_norms() -> None:
    values = np.random.default_rng(0).standard_normal((SHAPE[0] * SHAPE[1], 64)).astype(np.float32)
    found = np.array([sketch(values * scale)[:, 0] / sketch(values * scale)[:, 1] for scale in (1, 3)])
    assert np.allclose(found[0], found[1], rtol=1e-5)
    assert 0.5 < np.sqrt(np.mean(found**2)) < 2


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_has_a_record_of_a_few_kilobytes_that_repeats(family: str) -> None:
    first, second = (describe_model(model, fingerprint(model)) for model in (tiny(family), tiny(family)))
    assert differences(stored_record(first), second) == []
    assert first["identity"]["behavior"]["names"][-1] == "(output)"
    assert len(json.dumps(stored_record(first))) < 16_000


def test_under_other_conditions_outputs_agree_to_a_tolerance() -> None:
    model = tiny("llama")
    record = stored_record(describe_model(model, fingerprint(model)))

    def nudge(relative: float) -> list[str]:
        handle = model.model.layers[0].register_forward_hook(lambda module, args, output: output * (1 + relative))
        found = differences(record, describe_model(model, {**fingerprint(model), **OTHER}))
        handle.remove()
        return found

    assert nudge(0) == []
    assert nudge(TOLERANCES["float32"] / 10) == []
    assert any("under other conditions" in line for line in nudge(TOLERANCES["float32"] * 10))
    handle = model.model.layers[0].register_forward_hook(lambda module, args, output: output * (1 + 1e-6))
    assert any("bit for bit" in line for line in differences(record, describe_model(model, fingerprint(model))))
    handle.remove()


def test_outputs_of_two_threads_agree_under_other_conditions() -> None:
    model = tiny("llama").bfloat16()
    record = stored_record(describe_model(model, fingerprint(model)))
    torch.set_num_threads(2)
    try:
        assert differences(record, describe_model(model, fingerprint(model))) == []
    finally:
        torch.set_num_threads(1)


def test_a_model_whose_weights_are_not_loaded_has_no_behavior() -> None:
    assert record_behavior(tiny("llama").to("meta"), {}) is None


def test_a_record_of_an_earlier_version_is_compared_by_its_sample() -> None:
    model = tiny("llama")
    now = describe_model(model, fingerprint(model))
    old = {key: value for key, value in comparable_record(now).items() if key != "identity"}
    assert differences(old, now) == []
    model.model.embed_tokens.weight.data += 1
    assert differences(old, describe_model(model, fingerprint(model))) == ["weights: a sample of their values differs"]
    assert differences({**old, "class": "Other"}, now) == ["class: Other before, LlamaForCausalLM now"]


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_a_model_with_few_positions_runs_a_shorter_input(family: str) -> None:
    overrides = {"n_positions": 13} if family == "gpt2" else {"max_position_embeddings": 13}
    model = tiny(family, **overrides)
    assert record_behavior(model, {}) == record_behavior(tiny(family, **overrides), {})


def test_the_model_is_left_as_it_was() -> None:
    model = tiny("llama").train()
    values = {name: value.clone() for name, value in model.state_dict().items()}
    describe_model(model, fingerprint(model))
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_a_module_without_blocks_is_recorded_by_its_output() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Embedding(50, 8), nn.Linear(8, 50)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.out(self.embed(input_ids))

    torch.manual_seed(0)
    model = Plain()
    example = lambda sequences, tokens: {"input_ids": torch.arange(sequences * tokens).reshape(sequences, tokens) % 50}  # noqa: E731
    record = record_behavior(model, {}, example=example)
    assert record is not None
    assert record["names"] == ["(output)"]

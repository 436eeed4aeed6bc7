from __future__ import annotations

import pytest
import torch
from torch import nn

from flexcache.errors import SiteError
from flexcache.hooks import ActivationHooks, HookPoint, find_hook_points
from flexcache.site import Site
from tests.models import tiny, token_ids


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def ignore(point: HookPoint, tensor: torch.Tensor) -> None:
    pass


class Keep:
    """A sink that clones."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}

    def __call__(self, point: HookPoint, tensor: torch.Tensor) -> None:
        self.tensors[f"{point.array}.{point.layer}"] = tensor.clone()


def executed(model: nn.Module) -> list[str]:
    """Return a list that names modules as they begin to run from now on."""
    names: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda _, args, name=name: names.append(name))
    return names


def test_the_forward_stops_after_all_points_are_read() -> None:
    model = tiny("llama")
    ran = executed(model)
    with ActivationHooks(model, find_hook_points(model, Site("mlp_post"), [0, 1]), ignore) as points:
        assert points.forward(input_ids=token_ids()) is None
    assert ran[-1] == "model.layers.1.mlp.act_fn" or "up_proj" in ran[-1]
    assert "model.layers.1.mlp.down_proj" not in ran
    assert not any(name.startswith(("model.layers.2", "model.norm", "lm_head")) for name in ran)


def test_the_lm_head_never_runs_for_the_last_block() -> None:
    model = tiny("gpt2")
    ran = executed(model)
    with ActivationHooks(model, find_hook_points(model, Site("resid_post")), ignore) as points:
        points.forward(input_ids=token_ids())
    assert "transformer.h.3" in ran
    assert not {"transformer.ln_f", "lm_head"} & set(ran)


def test_without_stop_the_output_is_that_of_the_model() -> None:
    model, ids = tiny("llama"), token_ids()
    with ActivationHooks(model, find_hook_points(model, Site("resid_post"), 0), ignore, stop=False) as points:
        output = points.forward(input_ids=ids)
    assert torch.equal(output.logits, model(input_ids=ids).logits)
    assert output.past_key_values is None
    assert not output.logits.requires_grad


def test_one_registration_reads_many_forwards_of_different_shapes() -> None:
    model, keep = tiny("llama"), Keep()
    with ActivationHooks(model, find_hook_points(model, Site("resid_post"), 2), keep) as points:
        before = hooks(model)
        for shape in [(3, 7), (2, 5), (1, 1)]:
            ids = token_ids(*shape)
            points.forward(input_ids=ids)
            expected = model(input_ids=ids, output_hidden_states=True).hidden_states[3]
            assert torch.equal(keep.tensors["resid_post.2"], expected)
        assert hooks(model) >= before


def test_other_forwards_of_the_model_are_not_read() -> None:
    model, keep = tiny("llama"), Keep()
    with ActivationHooks(model, find_hook_points(model, Site("resid_post")), keep):
        model(input_ids=token_ids())
    assert keep.tensors == {}


def test_hooks_are_removed_after_the_context() -> None:
    model = tiny("llama")
    with ActivationHooks(model, find_hook_points(model, Site("resid_pre")), ignore) as points:
        assert hooks(model) == 4
        points.forward(input_ids=token_ids())
        assert hooks(model) == 4
    assert hooks(model) == 0
    with pytest.raises(SiteError, match="hooks are not registered"):
        points.forward(input_ids=token_ids())


def test_hooks_are_removed_after_an_error_in_the_sink_which_is_raised_unchanged() -> None:
    def full(point: HookPoint, tensor: torch.Tensor) -> None:
        raise OSError("disk full")

    model = tiny("llama")
    with (
        pytest.raises(OSError, match="disk full"),
        ActivationHooks(model, find_hook_points(model, Site("resid_pre")), full) as points,
    ):
        points.forward(input_ids=token_ids())
    assert hooks(model) == 0


def test_a_forward_after_a_failed_one_reads_all_points() -> None:
    model, keep = tiny("llama"), Keep()
    with ActivationHooks(model, find_hook_points(model, Site("resid_post")), keep) as points:
        with pytest.raises(IndexError):
            points.forward(input_ids=torch.full((3, 7), 9999))
        points.forward(input_ids=token_ids())
    assert len(keep.tensors) == 4


def test_hooks_are_removed_if_a_later_one_cannot_be_registered() -> None:
    model = tiny("llama")
    bad = HookPoint("lm_haed", None, "lm_haed", "output")
    with pytest.raises(SiteError, match="no module 'lm_haed'"):
        ActivationHooks(model, [*find_hook_points(model, Site("resid_pre")), bad], ignore).__enter__()
    assert hooks(model) == 0


class Outer(nn.Module):
    """Runs a model of its own with points, and swallows what goes wrong in it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
        self.after = nn.Linear(5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        try:
            with ActivationHooks(self.net, find_hook_points(self.net, Site.parse("1")), ignore) as points:
                points.forward(x)
        except Exception:
            pass
        return self.after(x)


def test_nested_activation_hooks_each_stop_their_own_forward() -> None:
    model, x, keep = Outer(), torch.randn(2, 3, 5), Keep()
    ran = executed(model)
    with ActivationHooks(model, find_hook_points(model, Site.parse("net.0")), keep) as points:
        assert points.forward(x) is None
    assert ran == ["", "net", "net.0"]
    del ran[:]
    with ActivationHooks(model, find_hook_points(model, Site.parse("after")), keep) as points:
        points.forward(x)
    assert ran == ["", "net", "net.0", "net.1", "after"]


def test_hooks_read_the_values_that_hooks_of_the_user_return() -> None:
    model, keep = tiny("llama"), Keep()
    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, args: (args[0] * 0,))
    model.model.layers[1].mlp.register_forward_hook(lambda _, args, output: output + 1)
    points = (*find_hook_points(model, Site.parse("model.layers.1.mlp")), *find_hook_points(model, Site("mlp_post"), 1))
    with ActivationHooks(model, points, keep) as opened:
        opened.forward(input_ids=token_ids())
    assert torch.equal(keep.tensors["model.layers.1.mlp.None"], torch.ones(3, 7, 64))
    assert keep.tensors["mlp_post.1"].any(), "outer: what the code around the module passes, before other pre-hooks"


def test_activations_of_flat_tokens_are_reshaped_to_batch_and_sequence() -> None:
    model, ids, keep, flat = tiny("opt"), token_ids(), Keep(), []
    model.model.decoder.layers[0].fc2.register_forward_hook(lambda _, args, output: flat.append(output.clone()))
    with ActivationHooks(model, find_hook_points(model, Site("mlp_out"), 0), keep) as points:
        points.forward(input_ids=ids)
    assert flat[0].shape == (21, 64)
    assert torch.equal(keep.tensors["mlp_out.0"], flat[0].view(3, 7, 64))


def test_a_tensor_without_one_row_per_token_raises_with_its_name() -> None:
    model = tiny("gpt2")
    with (
        ActivationHooks(model, find_hook_points(model, Site.parse("transformer.wpe")), ignore) as points,
        pytest.raises(SiteError, match=r"transformer\.wpe.* not one for each token") as error,
    ):
        points.forward(input_ids=token_ids())
    assert error.value.found == "(1, 7, 64)"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("model.embed_tokens:input", "a tensor of torch.int64"),
        ("model.rotary_emb", "(1, 7, 16)"),
        ("model:input", "keywords input_ids"),
    ],
)
def test_an_output_that_is_no_activation_raises(text: str, found: str) -> None:
    model = tiny("llama")
    with (
        ActivationHooks(model, find_hook_points(model, Site.parse(text)), ignore) as points,
        pytest.raises(SiteError) as error,
    ):
        points.forward(input_ids=token_ids())
    assert error.value.found is not None
    assert error.value.found.startswith(found)


def test_an_input_may_be_passed_as_hidden_states() -> None:
    model, keep, ids, seen = tiny("llama"), Keep(), token_ids(), []
    model.model.layers[1].input_layernorm.register_forward_hook(lambda _, args, output: seen.append(output.clone()))
    with ActivationHooks(model, find_hook_points(model, Site.parse("model.layers.1.self_attn:input")), keep) as points:
        points.forward(input_ids=ids)
    assert torch.equal(keep.tensors["model.layers.1.self_attn.input.None"], seen[0])


def test_the_output_of_a_whole_model_is_its_first_tensor() -> None:
    model, keep, ids = tiny("llama"), Keep(), token_ids()
    with ActivationHooks(model, find_hook_points(model, Site.parse("model")), keep) as points:
        points.forward(input_ids=ids)
    assert torch.equal(keep.tensors["model.None"], model.model(input_ids=ids).last_hidden_state)


def test_the_error_names_a_module_that_does_not_run() -> None:
    model = tiny("llama")
    model.model.spare = nn.Linear(2, 2)
    with (
        ActivationHooks(
            model, [HookPoint("model.spare", None, "model.spare"), *find_hook_points(model, Site("resid_pre"))], ignore
        ) as points,
        pytest.raises(SiteError, match="did not run") as error,
    ):
        points.forward(input_ids=token_ids())
    assert error.value.where == "model.spare:output"


def test_the_error_names_a_module_that_runs_twice() -> None:
    model = tiny("albert")
    layer = "encoder.albert_layer_groups.0.albert_layers.0"
    with (
        ActivationHooks(model, find_hook_points(model, Site.parse(layer)), ignore, stop=False) as points,
        pytest.raises(SiteError, match="more than once") as error,
    ):
        points.forward(input_ids=token_ids())
    assert error.value.where == f"{layer}:output"


@pytest.mark.parametrize("whole", [True, False], ids=["torch.compile", "Module.compile"])
def test_a_model_that_was_compiled_and_run_before_is_read(whole: bool) -> None:
    torch._dynamo.reset()
    model, ids, expected, keep = tiny("llama", num_hidden_layers=1), token_ids(), Keep(), Keep()
    points = find_hook_points(model, Site("resid_post"))
    with ActivationHooks(model, points, expected) as opened:
        opened.forward(input_ids=ids)
    if whole:
        compiled = torch.compile(model, backend="aot_eager")
    else:
        compiled = model
        model.compile(backend="aot_eager")
    with torch.no_grad():
        compiled(input_ids=ids, use_cache=False)
    with ActivationHooks(compiled, points, keep) as opened:
        opened.forward(input_ids=ids)
    assert all(torch.equal(keep.tensors[key], tensor) for key, tensor in expected.tensors.items())
    assert len(keep.tensors) == 1
    torch._dynamo.reset()


def test_blocks_compiled_one_by_one_are_read() -> None:
    torch._dynamo.reset()
    model, ids, keep = tiny("llama", num_hidden_layers=2), token_ids(), Keep()
    for layer in range(2):
        model.model.layers[layer] = torch.compile(model.model.layers[layer], backend="aot_eager")
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    with ActivationHooks(model, find_hook_points(model, Site("resid_post")), keep) as opened:
        opened.forward(input_ids=ids)
    assert len(keep.tensors) == 2
    torch._dynamo.reset()


def test_a_wrapped_model_keeps_its_module_names() -> None:
    model, keep, ids = tiny("llama"), Keep(), token_ids()
    wrapped = nn.DataParallel(model)
    with ActivationHooks(wrapped, find_hook_points(wrapped, Site("resid_post"), 1), keep) as points:
        points.forward(input_ids=ids)
    assert torch.equal(keep.tensors["resid_post.1"], model(input_ids=ids, output_hidden_states=True).hidden_states[2])


def test_any_module_can_be_read_with_its_own_inputs() -> None:
    net, keep, x = nn.Sequential(nn.Linear(5, 3), nn.ReLU()), Keep(), torch.randn(2, 7, 5)
    with ActivationHooks(net, find_hook_points(net, Site.parse("0")), keep) as points:
        points.forward(x)
    assert torch.equal(keep.tensors["0.None"], net[0](x))


def test_inputs_without_a_number_of_tokens_raise() -> None:
    model = tiny("llama")
    with (
        ActivationHooks(model, find_hook_points(model, Site("resid_pre")), ignore) as points,
        pytest.raises(SiteError, match="number of tokens in the inputs is not known"),
    ):
        points.forward(input_ids=[[1, 2]])

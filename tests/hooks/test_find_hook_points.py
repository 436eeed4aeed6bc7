from __future__ import annotations

import pytest
import torch
import transformers as hf
from torch import nn

from flexcache.errors import SiteError
from flexcache.hooks import HookPoint, find_blocks, find_hook_points
from flexcache.site import Site
from tests.models import tiny


def paths(model: nn.Module, text: str) -> list[str]:
    return [point.module for point in find_hook_points(model, Site.parse(text))]


def test_layers_count_from_both_ends() -> None:
    points = find_hook_points(tiny("llama"), Site("mlp_post"), [-1, 0])
    assert points == (
        HookPoint("mlp_post", 0, "model.layers.0.mlp.down_proj", "input"),
        HookPoint("mlp_post", 3, "model.layers.3.mlp.down_proj", "input"),
    )


def test_a_module_path_is_an_array_without_layers() -> None:
    model = tiny("llama")
    assert find_hook_points(model, Site.parse("model.layers.2.self_attn.q_proj")) == (
        HookPoint("model.layers.2.self_attn.q_proj", None, "model.layers.2.self_attn.q_proj", "output"),
    )
    assert find_hook_points(model, Site.parse("model.norm:input"), [1]) == (
        HookPoint("model.norm.input", None, "model.norm", "input"),
    )


@pytest.mark.parametrize(
    ("glob", "expected"),
    [
        ("model.layers.*", [f"model.layers.{n}" for n in range(4)]),
        ("model.layers.*.mlp", [f"model.layers.{n}.mlp" for n in range(4)]),
        ("model.layers.[0-1].mlp.*n_proj", [f"model.layers.{n}.mlp.down_proj" for n in (0, 1)]),
        ("model.layers.[!0-2].mlp", ["model.layers.3.mlp"]),
        ("**.q_proj", [f"model.layers.{n}.self_attn.q_proj" for n in range(4)]),
        ("model.layers.?.self_attn.?_norm", []),
        ("model.*", ["model.embed_tokens", "model.norm", "model.rotary_emb"]),
    ],
)
def test_a_star_stops_at_dots_and_two_do_not(glob: str, expected: list[str]) -> None:
    model = tiny("llama")
    if expected:
        assert paths(model, glob) == expected
    else:
        with pytest.raises(SiteError, match="no module matches"):
            paths(model, glob)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model.layers.0.mpl", "did you mean model.layers.0.mlp\\?"),
        ("model.layers.*.mpl", "no module matches"),
        ("module.model.layers.0.mlp", "did you mean model.layers.0.mlp\\?"),
        ("model.layers", "only holds modules"),
        ("qq", "q"),
    ],
)
def test_the_error_for_an_unknown_name_lists_the_nearest(text: str, message: str) -> None:
    with pytest.raises(SiteError, match=message):
        find_hook_points(tiny("llama"), Site.parse(text))


def test_a_layer_that_the_model_does_not_have_raises() -> None:
    with pytest.raises(SiteError, match="no layer 4"):
        find_hook_points(tiny("llama"), Site("resid_post"), [4])


def test_a_mixture_whose_experts_read_sorted_rows_has_no_mlp_post() -> None:
    with pytest.raises(SiteError, match="mixture of experts") as error:
        find_hook_points(tiny("llama4"), Site("mlp_post"))
    assert (
        error.value.expected == "one of resid_pre, resid_mid, resid_post, attn_out, mlp_out, q, k, v, z, router_logits"
    )


def test_the_error_names_the_layers_that_have_a_site() -> None:
    model = tiny("llama")
    model.model.layers[1].mlp = nn.Linear(64, 64)
    with pytest.raises(SiteError, match=r"no mlp_post in layer 1\n(.*\n)*.*ask for layers \[0, 2, 3\]"):
        find_hook_points(model, Site("mlp_post"))
    assert find_hook_points(model, Site("mlp_out"), 1)[0].module == "model.layers.1.mlp"


def test_modules_inside_experts_raise_and_the_experts_module_does_not() -> None:
    model = tiny("mixtral")
    assert paths(model, "model.layers.0.mlp.experts") == ["model.layers.0.mlp.experts"]
    with pytest.raises(SiteError, match="inside experts"):
        paths(model, "**.act_fn")
    with pytest.raises(SiteError, match="inside experts"):
        paths(model, "model.layers.0.mlp.experts.act_fn")


def test_names_have_no_prefixes_of_wrappers() -> None:
    model = tiny("llama")
    plain = find_hook_points(model, Site("attn_out"))
    wrapped = torch.compile(nn.DataParallel(torch.compile(model, backend="aot_eager")), backend="aot_eager")
    assert find_blocks(wrapped) == find_blocks(model)
    assert find_hook_points(wrapped, Site("attn_out")) == plain
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="aot_eager")
    model.model.layers[1].self_attn = torch.compile(model.model.layers[1].self_attn, backend="aot_eager")
    assert find_hook_points(model, Site("attn_out")) == plain
    assert paths(model, "model.layers.*.self_attn.o_proj") == [point.module for point in plain]


def test_a_module_with_two_names_is_found_by_either() -> None:
    model = tiny("llama")
    model.model.layers[3].mlp = model.model.layers[0].mlp
    assert paths(model, "model.layers.[03].mlp") == ["model.layers.0.mlp", "model.layers.3.mlp"]


def test_the_decoder_is_searched_in_an_encoder_decoder() -> None:
    model = tiny("t5", num_layers=4)  # as many blocks on either side
    assert {point.module for point in find_hook_points(model, Site("resid_post"))} == {
        f"decoder.block.{n}" for n in range(4)
    }
    encoder = model.get_encoder()
    assert find_blocks(encoder)[0] == "block"
    with pytest.raises(SiteError, match="no router_logits"):
        find_hook_points(encoder, Site("router_logits"))


def test_blocks_that_several_layers_share_raise() -> None:
    with pytest.raises(SiteError, match="cannot be found") as error:
        find_blocks(tiny("albert"))
    assert "ALBERT" in str(error.value)
    model = tiny("llama")
    model.model.layers[2] = model.model.layers[1]
    with pytest.raises(SiteError, match="several layers"):
        find_blocks(model)


def test_without_a_configuration_the_longest_list_is_taken() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixed = nn.ModuleList([nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU()])
            self.heads = nn.ModuleList([nn.Linear(2, 2) for _ in range(2)])
            self.body = nn.ModuleList([nn.TransformerEncoderLayer(8, 2) for _ in range(3)])

    assert find_blocks(Net())[0] == "body"
    with pytest.raises(SiteError, match="cannot be found"):
        find_blocks(nn.Linear(2, 2))


def test_the_language_part_is_searched_in_a_multimodal_model() -> None:
    text = {
        "vocab_size": 257, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 16,
        "num_key_value_heads": 2, "intermediate_size": 32,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 32, "image_size": 28,
        "patch_size": 14,
    }  # fmt: skip
    config = hf.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    with torch.device("meta"):
        model = hf.Gemma3ForConditionalGeneration._from_config(config)
    assert find_blocks(model)[0] == "model.language_model.layers"

"""Sites of vision transformers compared with plain PyTorch hooks, and the token of each patch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers as hf

from flexcache.errors import SiteError
from flexcache.hooks import ActivationHooks, HookPoint, check_sites, find_hook_points, measure
from flexcache.hooks.checks.survey import survey
from flexcache.hooks.locate.vision import count_image_tokens, default_image_size, find_patches
from flexcache.site import Site
from tests.hooks.oracle import read_at
from tests.hooks.sites_table import PAGE, with_vision
from tests.vision import DEPTH, GRID, HIDDEN, SIDE, SPECIALS, VISION, noise, tiny_vision

VIT = {"attn_out": "attention.o_proj", "mlp_out": "mlp.fc2", "mlp_post": "mlp.fc2"}
DINO = {"attn_out": "layer_scale1", "mlp_out": "layer_scale2", "mlp_post": "mlp.fc2"}
CLIP = {"attn_out": "self_attn.out_proj", "mlp_out": "mlp.fc2", "mlp_post": "mlp.fc2"}
BLOCKS: dict[str, tuple[str, dict[str, str]]] = {
    **dict.fromkeys(("vit", "deit", "vit_msn", "ijepa"), ("layers", VIT)),
    **dict.fromkeys(("dinov2", "dinov2_registers"), ("encoder.layer", DINO)),
    **dict.fromkeys(("clip_vision", "siglip_vision"), ("encoder.layers", CLIP)),
    "beit": ("layers", {"mlp_post": "mlp.fc2"}),
    "dinov2_swiglu": ("encoder.layer", {**DINO, "mlp_post": "mlp.down_proj"}),
    "dinov3": ("model.layer", {**DINO, "mlp_post": "mlp.down_proj"}),
    "yolos": (
        "encoder.layer",
        {"attn_out": "attention.output.dense", "mlp_out": "output.dense", "mlp_post": "output.dense"},
    ),
    "aimv2_vision": (
        "encoder.layers",
        {"attn_out": "attention.out_proj", "mlp_out": "ffn", "mlp_post": "ffn.down_proj"},
    ),
    "data2vec_vision": ("encoder.layer", {"mlp_post": "output.dense"}),
}
QKV = {name: (f"attention.{name}_proj", "output") for name in "qkv"}
VIT_INNER = {
    **QKV,
    "z": ("attention.o_proj", "input"),
    "resid_mid": ("layernorm_after", "input"),
    "mlp_pre": ("mlp.fc1", "output"),
}
DINO_INNER = {**VIT_INNER, "resid_mid": ("norm2", "input")}
CLIP_INNER = {
    **{name: (f"self_attn.{name}_proj", "output") for name in "qkv"},
    "z": ("self_attn.out_proj", "input"),
    "resid_mid": ("layer_norm2", "input"),
    "mlp_pre": ("mlp.fc1", "output"),
}
DATA2VEC = {
    **{n: (f"attention.attention.{w}", "output") for n, w in zip("qkv", ("query", "key", "value"))},
    "z": ("attention.output.dense", "input"),
    "mlp_pre": ("intermediate.dense", "output"),
}
INNER: dict[str, dict[str, tuple]] = {
    **dict.fromkeys(("vit", "deit", "vit_msn", "ijepa"), VIT_INNER),
    **dict.fromkeys(("dinov2", "dinov2_registers"), DINO_INNER),
    **dict.fromkeys(("clip_vision", "siglip_vision"), CLIP_INNER),
    "beit": {name: place for name, place in VIT_INNER.items() if name != "resid_mid"},
    "dinov2_swiglu": {**DINO_INNER, "mlp_pre": ("mlp.gate_proj", "output")},
    "dinov3": {**DINO_INNER, "mlp_pre": ("mlp.up_proj", "output")},
    "aimv2_vision": {
        **QKV,
        "z": ("attention.out_proj", "input"),
        "resid_mid": ("rms_norm2", "input"),
        "mlp_pre": ("ffn.gate_proj", "output"),
    },
    "data2vec_vision": DATA2VEC,
    "yolos": {**DATA2VEC, "resid_mid": ("layernorm_after", "input")},
}
FINAL_NORM = dict.fromkeys(VISION, "layernorm") | {
    "dinov3": "norm",
    "siglip_vision": "post_layernorm",
    "aimv2_vision": "rms_norm",
}
EMBEDDINGS = "embeddings"
OFTEN = ("vit", "dinov2_registers", "clip_vision")
FAMILIES = [family if family in OFTEN else pytest.param(family, marks=pytest.mark.slow) for family in VISION]
"""Those that are run by default, and the others."""
HALF = pytest.param(torch.bfloat16, id="bfloat16", marks=pytest.mark.slow)


def located(model: torch.nn.Module, family: str) -> list[HookPoint]:
    sites = ("resid_pre", "resid_post", *BLOCKS[family][1], *INNER[family])
    return [point for site in sites for point in find_hook_points(model, Site(site))]


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, id="float32"), HALF])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_site_equals_a_plain_hook_and_the_residual_identity_holds(family: str, dtype: torch.dtype) -> None:
    model = tiny_vision(family, dtype)
    expected = read_at(model, *BLOCKS[family], INNER[family], pixel_values=noise(dtype=dtype))
    found = {}
    points = located(model, family)
    with ActivationHooks(
        model, points, lambda point, t: found.update({(point.array, point.layer): t.clone()})
    ) as opened:
        opened.forward(pixel_values=noise(dtype=dtype))
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        assert tensor.shape[:2] == (2, len(SPECIALS[family]) + GRID**2 + 5 * (family == "yolos"))
        assert torch.equal(tensor.flatten(), expected[key].flatten()), key
    check_sites(model, points)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_embedding_and_the_last_norm_are_those_of_the_model(family: str) -> None:
    model = tiny_vision(family)
    (embed,) = find_hook_points(model, Site("embed"))
    assert embed.module == EMBEDDINGS
    if family == "clip_vision":  # whose last norm reads the class token alone
        with pytest.raises(SiteError, match="not one for each token"):
            check_sites(model, find_hook_points(model, Site("final_norm")))
    else:
        (norm,) = find_hook_points(model, Site("final_norm"))
        assert norm.module == FINAL_NORM[family]
        check_sites(model, [norm])
        with pytest.raises(SiteError, match="final_norm is not what its name says"):
            check_sites(model, [replace(norm, module=f"{BLOCKS[family][0]}.1")])
    assert measure(model, [embed]) == {embed: ((HIDDEN,), torch.float32)}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_without_weights_measures_and_surveys_the_same(family: str) -> None:
    model, empty = tiny_vision(family), tiny_vision(family, device="meta")
    points = located(model, family)
    assert measure(empty, points) == measure(model, points)
    pixels = (3, SIDE, SIDE)
    first = find_patches(model, pixels, torch.device("cpu"))
    if family != "yolos":  # whose detection tokens come last, as only values can tell
        assert find_patches(empty, pixels, torch.device("meta")) == first
    tokens = str(first.tokens)
    block = next(entry for entry in survey(empty) if entry.path == f"{BLOCKS[family][0]}.0")
    assert block.shape("output") == f"batch × {tokens} × {HIDDEN}"
    assert {"resid_pre", "resid_post"} <= {point.array for point in block.points}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_token_is_the_patch_that_the_layout_states(family: str) -> None:
    model = tiny_vision(family)
    patches = find_patches(model, default_image_size(model), torch.device("cpu"))
    assert patches.before == SPECIALS[family]
    assert (patches.rows, patches.columns) == (GRID, GRID)
    assert patches.after == (tuple(f"detection_{i}" for i in range(5)) if family == "yolos" else ())
    plain = noise(1)
    changed = plain.clone()
    changed[:, :, 8:16, 16:24] += 1  # the second row, the third column
    embedded = []
    with ActivationHooks(
        model, find_hook_points(model, Site("resid_pre"), 0), lambda _, t: embedded.append(t.clone())
    ) as points:
        points.forward(pixel_values=plain)
        points.forward(pixel_values=changed)
    (touched,) = (embedded[0] != embedded[1]).any(-1)[0].nonzero().flatten().tolist()
    assert touched == patches.position(1, 2)


@pytest.mark.parametrize("family", ["beit", pytest.param("data2vec_vision", marks=pytest.mark.slow)])
@pytest.mark.parametrize("site", ["attn_out", "mlp_out", "resid_mid"])
def test_a_scale_without_a_module_raises(family: str, site: str) -> None:
    model = tiny_vision(family)
    with pytest.raises(SiteError, match="adds something else|not what its name says"):
        check_sites(model, find_hook_points(model, Site(site)))


def test_a_site_before_its_layer_scale_raises() -> None:
    model = tiny_vision("dinov2")
    points = [
        replace(point, module=f"encoder.layer.{point.layer}.attention.o_proj")
        for point in find_hook_points(model, Site("attn_out"))
    ]
    with pytest.raises(SiteError, match="adds something else"):
        check_sites(model, points)


def test_the_forward_stops_after_the_last_site() -> None:
    model, ran = tiny_vision("vit"), []
    for number, block in enumerate(model.layers):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    pixels = noise()
    count_image_tokens(model, pixels)
    assert ran == []
    with ActivationHooks(model, find_hook_points(model, Site("resid_post"), 0), lambda *_: None) as points:
        points.forward(pixel_values=pixels)
    assert ran == [0]
    assert len(model.layers) == DEPTH


@pytest.mark.slow
def test_the_table_in_the_docs_agrees_with_the_models() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert with_vision(page) == page, "run python -m tests.hooks.sites_table"


SMALL = {"hidden_size": 48, "num_attention_heads": 3, "num_hidden_layers": 2, "intermediate_size": 48}


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("Swin", {"embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 2}, "do not keep one token"),
        pytest.param("Pvt", {"image_size": 32}, "do not read one vector", marks=pytest.mark.slow),
        ("ViTMAE", {**SMALL, "mask_ratio": 0.5}, "not the patches of an image"),
        ("ViTMAE", {**SMALL, "mask_ratio": 0.0}, "not the same in every forward"),
        ("VitDet", SMALL, "do not read one vector"),
        ("Siglip2Vision", SMALL, "cannot run on an image"),
    ],
)
def test_a_model_without_one_row_for_each_patch_raises(name: str, settings: dict, message: str) -> None:
    cls = getattr(hf, f"{name}Model")
    model = cls._from_config(cls.config_class(**{"image_size": 32, "patch_size": 4, **settings}))
    with pytest.raises(SiteError, match=message):
        find_patches(model.eval(), (3, 32, 32), torch.device("cpu"))

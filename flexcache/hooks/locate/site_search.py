"""Find the hook points of a site in a model."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace

from torch import nn

from flexcache.errors import SiteError, nearest
from flexcache.hooks.locate.aliases import FINAL_NORM, MLP, find_block_site, find_submodule
from flexcache.hooks.locate.blocks import find_blocks, is_remote_block
from flexcache.hooks.locate.encoder_decoder import get_token_embedding, is_encoder_decoder
from flexcache.hooks.locate.hook_point import HookPoint
from flexcache.hooks.locate.names import (
    adapter_prefix,
    glob_regex,
    is_container,
    modules_by_path,
    runnable_paths,
    unwrap_model,
    unwrap_module,
)
from flexcache.hooks.locate.vision import reads_images
from flexcache.site import GRADIENT, ONCE, PATTERN, STANDARD, Layers, Site, array_name, resolve_layers


def find_hook_points(
    model: nn.Module, site: Site, layers: Layers = "all", remote_modules: Collection[str] = ()
) -> tuple[HookPoint, ...]:
    """Return the hook points of *site* in *model*: one for each layer, or each module that matches.

    In a glob ``*`` and ``?`` stop at dots, ``**`` does not, and ``[…]`` is a set of characters:
    ``model.layers.*.mlp`` matches the MLP of every block, ``**.up_proj`` every up-projection.
    *layers* applies to standard sites only; a module path names its layers itself. *remote_modules* are paths of
    modules that other pipeline stages have. In a PeftModel, a path may leave out that of the model inside it, so that a
    site is called the same with and without an adapter.

    Standard sites are found by the names of a block's modules, not by the type of the model. `check_sites` proves that
    the result is right.

    >>> find_hook_points(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), Site("*"))[1].module
    '1'

    Raises
    ------
    SiteError
        Nothing matches, and the nearest names are given; or the blocks lack a standard site, and those they have are
        given.
    """
    points = _locate(model, site, layers, remote_modules)
    if not site.gradient:
        return points
    beside = next((point for point in points if point.of_experts), None)
    if beside is not None:
        raise SiteError(
            f"{site.name} of experts has no gradient",
            where=str(beside),
            expected="an activation that the model itself computes",
            found="one that is computed beside the forward",
            remedy="ask for mlp_out.grad: all summands of the MLP's output have this gradient",
        )
    return tuple(replace(point, array=point.array + GRADIENT, gradient=True) for point in points)


def _locate(model: nn.Module, site: Site, layers: Layers, remote_modules: Collection[str]) -> tuple[HookPoint, ...]:
    if site.standard or site.side == PATTERN:
        return _in_blocks(model, site.name, layers)
    if site.name in ONCE:
        return (_once(model, site.name),)
    prefix = adapter_prefix(model)
    named = {**modules_by_path(model), **{name: nn.Identity() for name in remote_modules}}
    if not re.search(r"[*?\[]", site.name):
        return (_exact(site, named, prefix),)
    glob = re.compile(glob_regex(site.name))
    paths = {name: (name.removeprefix(prefix), name) for name, module in named.items() if not is_container(module)}
    found = tuple(
        HookPoint(array_name(matching[0], site.side), None, name, site.side)
        for name, spellings in paths.items()
        if name and (matching := [path for path in spellings if glob.fullmatch(path)])
    )
    if not found:
        raise SiteError(f"no module matches {site.name!r}", remedy=nearest(site.name, runnable_paths(named)))
    for point in found:
        _refuse_expert(point.module)
    return found


def _in_blocks(model: nn.Module, site: str, layers: Layers) -> tuple[HookPoint, ...]:
    path, blocks = find_blocks(model)
    points, missing, crossed = [], [], is_encoder_decoder(model)
    here = next((block for block in blocks if not is_remote_block(block)), blocks[0])
    for layer in resolve_layers(layers, len(blocks)):
        place = find_block_site(here if is_remote_block(blocks[layer]) else blocks[layer], site, crossed)
        if place is None:
            missing.append(layer)
        else:
            module = f"{path}.{layer}.{place.path}".rstrip(".")
            points.append(HookPoint(site, layer, module, place.side, fused_slice=place.fused_slice))
    if missing:
        raise _missing(site, missing, path, blocks, crossed)
    return tuple(points)


def _once(model: nn.Module, site: str) -> HookPoint:
    """Return the hook point of the embedding, or of the last norm after the list of blocks."""
    names = {id(module): name for name, module in modules_by_path(model).items()}
    if site == "embed":
        found = get_token_embedding(model)
        name = None if found is None else names.get(id(unwrap_module(found)))
        if reads_images(model):  # the module around the patch embedding adds special tokens and positions
            name = next((path for path in names.values() if path.rpartition(".")[2] == "embeddings"), name)
    else:
        path, _ = find_blocks(model)
        name = _norm_beside(model, path)
        if name is None and reads_images(model) and "." in path:  # the norm of an encoder that holds only blocks
            name = _norm_beside(model, path.rpartition(".")[0])
    if name is None:
        raise SiteError(
            f"the model has no {site}" + (" next to its blocks" if site == "final_norm" else ""),
            where=type(unwrap_model(model)).__name__,
            remedy="give the module path; flexcache sites MODEL lists them",
        )
    return HookPoint(site, None, name)


def _norm_beside(model: nn.Module, path: str) -> str | None:
    """Return the path of the last norm next to a module; None if there is none."""
    holder, _, own = path.rpartition(".")
    siblings = [child for child in modules_by_path(model)[holder]._modules if child != own]
    return next((f"{holder}.{child}".lstrip(".") for child in siblings if child in FINAL_NORM), None)


def _missing(site: str, layers: list[int], path: str, blocks: nn.ModuleList, crossed: bool) -> SiteError:
    block = unwrap_module(blocks[layers[0]])
    has = [name for name in STANDARD if find_block_site(block, name, crossed)]
    others = [layer for layer, other in enumerate(blocks) if find_block_site(other, site, crossed)]
    remedy = f"ask for layers {others}" if others else "ask for one of those, or give a module path"
    if site in ("mlp_pre", "mlp_post") and _has_experts(block):
        remedy = "its MLP is a mixture of experts, in which no single projection reads every token; " + remedy
    if site == "resid_mid" and find_block_site(block, "attn_out") and find_block_site(block, "mlp_out"):
        remedy = "its attention and its MLP may read the same residual stream in parallel; " + remedy
    return SiteError(
        f"the model has no {site} in layer {', '.join(map(str, layers))}",
        where=f"{path}.{layers[0]}, a {type(block).__name__} of {', '.join(n for n, _ in block.named_children())}",
        expected=f"one of {', '.join(has)}",
        remedy=remedy,
    )


def _has_experts(block: nn.Module) -> bool:
    mlps = (find_submodule(block, name) for name in MLP)
    return any("experts" in name for mlp in mlps if mlp is not None for name, _ in mlp.named_modules())


def _exact(site: Site, named: dict[str, nn.Module], prefix: str) -> HookPoint:
    path = site.name if site.name in named else prefix + site.name
    if path not in named:
        raise SiteError(
            f"the model has no module {site.name!r}",
            remedy=nearest(site.name, (*STANDARD, *ONCE, *runnable_paths(named))),
        )
    if is_container(named[path]):
        raise SiteError(
            f"{site.name} only holds modules and never runs itself",
            found=f"a {type(named[path]).__name__} of {len(list(named[path].children()))}",
            remedy=f"write {site.name}.* for each of the modules in it",
        )
    _refuse_expert(site.name)
    return HookPoint(site.activation_array, None, path, site.side)


def _refuse_expert(module: str) -> None:
    if "experts" in module.split(".")[:-1]:
        raise SiteError(
            f"{module} is inside experts",
            expected="a module that sees every token once and in order",
            found="rows of (token, expert) pairs, sorted by expert",
            remedy="store expert_out, expert_index or mlp_post, the experts module as a whole, or its router",
        )

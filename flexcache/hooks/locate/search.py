"""From sites, as users name them, to points on the modules of a model."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace

from torch import nn

from flexcache.errors import SiteError, nearest
from flexcache.hooks.locate.aliases import FINAL_NORM, MLP, find_part, part
from flexcache.hooks.locate.blocks import find_blocks, is_elsewhere
from flexcache.hooks.locate.encoder_decoder import embedding, is_encoder_decoder
from flexcache.hooks.locate.hook_point import HookPoint
from flexcache.hooks.locate.names import inner, modules, unwrap
from flexcache.hooks.locate.vision import reads_images
from flexcache.site import GRADIENT, ONCE, PATTERN, STANDARD, Layers, Site, array_name, resolve_layers


def find_hook_points(
    model: nn.Module, site: Site, layers: Layers = "all", remote_modules: Collection[str] = ()
) -> tuple[HookPoint, ...]:
    """Return the points that *site* means in *model*: one per layer, or per module that a path or glob matches.

    In a glob ``*`` and ``?`` stop at dots, ``**`` does not, and ``[…]`` is a set of characters:
    ``model.layers.*.mlp`` matches every block's MLP, ``**.up_proj`` every up-projection.
    *layers* counts for standard sites alone; a module path names its own.

    Standard sites are found by the names of a block's parts, not by the type of the model. That the find is right
    is for `check_identity` to show. *remote_modules* names modules that other stages of a pipeline have.

    Raises
    ------
    SiteError
        Nothing matches; the nearest names are given. A standard site that the blocks do not have, and which they do.
    """
    points = _locate(model, site, layers, remote_modules)
    return (
        tuple(replace(point, array=point.array + GRADIENT, gradient=True) for point in points)
        if site.gradient
        else points
    )


def _locate(model: nn.Module, site: Site, layers: Layers, remote_modules: Collection[str]) -> tuple[HookPoint, ...]:
    if site.standard or site.side == PATTERN:
        return _in_blocks(model, site.name, layers)
    if site.name in ONCE:
        return (_once(model, site.name),)
    named = {**modules(model), **{name: nn.Identity() for name in remote_modules}}
    if not re.search(r"[*?\[]", site.name):
        return (_exact(site, named),)
    glob = re.compile(glob_regex(site.name))
    found = tuple(
        HookPoint(array_name(name, site.side), None, name, site.side)
        for name, module in named.items()
        if name and glob.fullmatch(name) and not is_container(module)
    )
    if not found:
        raise SiteError(f"no module matches {site.name!r}", remedy=nearest(site.name, runnable(named)))
    for point in found:
        _refuse_expert(point.module)
    return found


def _in_blocks(model: nn.Module, site: str, layers: Layers) -> tuple[HookPoint, ...]:
    path, blocks = find_blocks(model)
    points, missing, crossed = [], [], is_encoder_decoder(model)
    here = next((block for block in blocks if not is_elsewhere(block)), blocks[0])
    for layer in resolve_layers(layers, len(blocks)):
        place = find_part(here if is_elsewhere(blocks[layer]) else blocks[layer], site, crossed)
        if place is None:
            missing.append(layer)
        else:
            module = f"{path}.{layer}.{place.path}".rstrip(".")
            points.append(HookPoint(site, layer, module, place.side, slots=place.slots))
    if missing:
        raise _missing(site, missing, path, blocks, crossed)
    return tuple(points)


def _once(model: nn.Module, site: str) -> HookPoint:
    """Return the hook point of the embedding or of the last norm: the one beside the blocks that comes after them."""
    names = {id(module): name for name, module in modules(model).items()}
    if site == "embed":
        found = embedding(model)
        name = None if found is None else names.get(id(inner(found)))
        if reads_images(model):  # that is of patches alone; around it, special tokens and positions are added
            name = next((path for path in names.values() if path.rpartition(".")[2] == "embeddings"), name)
    else:
        path, _ = find_blocks(model)
        name = _norm_beside(model, path)
        if name is None and reads_images(model) and "." in path:  # of an encoder that is all blocks
            name = _norm_beside(model, path.rpartition(".")[0])
    if name is None:
        raise SiteError(
            f"the model has no {site}" + (" beside its blocks" if site == "final_norm" else ""),
            where=type(unwrap(model)).__name__,
            remedy="give the module path, as flexcache sites MODEL shows it",
        )
    return HookPoint(site, None, name)


def _norm_beside(model: nn.Module, path: str) -> str | None:
    """Return the path of the last norm beside a module; None where there is none."""
    holder, _, own = path.rpartition(".")
    beside = [child for child in modules(model)[holder]._modules if child != own]
    return next((f"{holder}.{child}".lstrip(".") for child in beside if child in FINAL_NORM), None)


def _missing(site: str, layers: list[int], path: str, blocks: nn.ModuleList, crossed: bool) -> SiteError:
    block = inner(blocks[layers[0]])
    has = [name for name in STANDARD if find_part(block, name, crossed)]
    others = [layer for layer, other in enumerate(blocks) if find_part(other, site, crossed)]
    remedy = f"ask for layers {others}" if others else "ask for one of those, or give a module path"
    if site in ("mlp_pre", "mlp_post") and _has_experts(block):
        remedy = "its MLP is a mixture of experts, where no one projection reads every token; " + remedy
    if site == "resid_mid" and find_part(block, "attn_out") and find_part(block, "mlp_out"):
        remedy = "its attention and its MLP may read the same residual stream, side by side; " + remedy
    return SiteError(
        f"the model has no {site} in layer {', '.join(map(str, layers))}",
        where=f"{path}.{layers[0]}, a {type(block).__name__} of {', '.join(n for n, _ in block.named_children())}",
        expected=f"one of {', '.join(has)}",
        remedy=remedy,
    )


def _has_experts(block: nn.Module) -> bool:
    mlps = (part(block, name) for name in MLP)
    return any("experts" in name for mlp in mlps if mlp is not None for name, _ in mlp.named_modules())


def _exact(site: Site, named: dict[str, nn.Module]) -> HookPoint:
    if site.name not in named:
        raise SiteError(
            f"the model has no module {site.name!r}", remedy=nearest(site.name, (*STANDARD, *ONCE, *runnable(named)))
        )
    if is_container(named[site.name]):
        raise SiteError(
            f"{site.name} only holds modules and never runs itself",
            found=f"a {type(named[site.name]).__name__} of {len(list(named[site.name].children()))}",
            remedy=f"write {site.name}.* for each of the modules in it",
        )
    _refuse_expert(site.name)
    return HookPoint(site.activation_array, None, site.name, site.side)


def _refuse_expert(module: str) -> None:
    if "experts" in module.split(".")[:-1]:
        raise SiteError(
            f"{module} is inside experts",
            expected="a module that sees every token once and in order",
            found="rows of (token, expert) pairs, sorted by expert",
            remedy="read the experts module as a whole, its router, or mlp_out",
        )


def is_container(module: nn.Module) -> bool:
    """Whether *module* only holds others and never runs itself."""
    return isinstance(module, nn.ModuleList | nn.ModuleDict)


def runnable(named: dict[str, nn.Module]) -> tuple[str, ...]:
    """Return the names of the modules that can run."""
    return tuple(name for name, module in named.items() if name and not is_container(module))


def glob_regex(glob: str) -> str:
    """Return the regular expression of a glob over dotted paths; see `find_hook_points`."""
    words = {"**": ".*", "*": r"[^.]*", "?": r"[^.]"}
    parts = re.split(r"(\*\*|\*|\?|\[!?[^\]]+\])", glob)
    return "".join(
        words.get(word) or (f"[{word[1:-1].replace('!', '^', 1)}]" if word.startswith("[") else re.escape(word))
        for word in parts
        if word
    )

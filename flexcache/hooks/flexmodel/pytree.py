"""Tensors in the inputs and outputs of modules: tuples, dicts, dataclasses of transformers, any pytree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from flexcache.errors import HookError

Rebuild = Callable[[torch.Tensor], Any]


def find_tensor(tree: Any, index: int, where: str) -> tuple[torch.Tensor, Rebuild]:
    """Return tensor number *index* of a pytree, and a function that returns the same tree with another tensor there.

    Only tensors are counted; numbers, None and caches are not.

    >>> tensor, rebuild = find_tensor({"n": 1, "x": torch.ones(2)}, 0, "layer")
    >>> rebuild(2 * tensor)
    {'n': 1, 'x': tensor([2., 2.])}

    Raises
    ------
    HookError
        The tree has fewer tensors.
    """
    if index == 0:
        if isinstance(tree, torch.Tensor):
            return tree, _itself
        if type(tree) is tuple and tree and isinstance(tree[0], torch.Tensor):
            return tree[0], lambda tensor: (tensor, *tree[1:])
    leaves, spec = pytree.tree_flatten(tree)
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    if not 0 <= index < len(places):
        kinds = sorted({type(leaf).__name__ for leaf in leaves if leaf is not None})
        raise HookError(
            f"there is no tensor number {index} to read",
            where=where,
            expected="unpack_idx, which counts tensors from 0, below their number",
            found=f"{len(places)} tensors in a {type(tree).__name__}" + (f" of {', '.join(kinds)}" if kinds else ""),
            remedy="give another unpack_idx or hook another module; for a container type of your own, register it"
            " with torch.utils._pytree.register_pytree_node",
        )
    place = places[index]

    def rebuild(tensor: torch.Tensor) -> Any:
        return pytree.tree_unflatten([*leaves[:place], tensor, *leaves[place + 1 :]], spec)

    return leaves[place], rebuild


def find_input_tensor(
    args: tuple[Any, ...], kwargs: dict[str, Any], index: int, where: str
) -> tuple[torch.Tensor, Callable[[torch.Tensor], tuple[tuple[Any, ...], dict[str, Any]]]]:
    """Return tensor number *index* of a call: positional arguments first, then keywords in order."""
    if index == 0 and args and isinstance(args[0], torch.Tensor):
        return args[0], lambda tensor: ((tensor, *args[1:]), kwargs)
    leaf, rebuild = find_tensor((args, kwargs), index, where)
    return leaf, rebuild


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor

"""Load the part of a checkpoint that a replay runs, without the blocks that are skipped."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flexcache.errors import ConfigError
from flexcache.hooks.locate.blocks import find_blocks
from flexcache.identity.weights import combine_digests, digest_tensors
from flexcache.model import ModelSource
from flexcache.paths import local_path

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
ATTRIBUTE = "_flexcache_partial_load"


@dataclass(frozen=True)
class PartialLoad:
    """Identity of a partly loaded model: hashes of its checkpoint's files, and of the weights that were loaded."""

    files: Any
    weights: str


def partial_load(model: nn.Module) -> PartialLoad | None:
    """Return the identity that `load_rest` gave to a model; None for a model that was loaded whole."""
    found: PartialLoad | None = getattr(model, ATTRIBUTE, None)
    return found


def load_rest(source: ModelSource, after: int) -> nn.Module:
    """Return a model whose blocks up to *after* have no weights, for replays that start after that block or later.

    Only the tensors that the other blocks need are read from the checkpoint and take memory. The checkpoint is
    identified by the hashes of its files: a replay raises MismatchError for another one than the capture's. ::

        rest = replay.load_rest(flexcache.ModelSource(name="path/to/model"), after=19)

    Raises
    ------
    ConfigError
        The checkpoint is not a local folder of safetensors, or its tensors are named differently than in the model.
    """
    source = source.resolved()
    if source.adapter:
        raise ConfigError(
            "a model with an adapter is loaded whole",
            where=source.adapter[0].path,
            expected="a source without adapter",
            remedy="load it with source.load()",
        )
    folder = local_path(source.name)
    model = source.skeleton()
    path, blocks = find_blocks(model)
    if not 0 <= after < len(blocks):
        raise ConfigError("there is no such block", expected=f"0 to {len(blocks) - 1}", found=str(after))
    skipped = re.compile(rf"{re.escape(path)}\.({'|'.join(map(str, range(after + 1)))})\.")
    wanted = {name for name in model.state_dict() if not skipped.match(name)}
    held = _tensor_files(folder)
    names = _locate_tensors(model, wanted, held, folder)
    dtype = next(model.parameters()).dtype
    given = {}
    for name, (key, file) in names.items():
        given[name] = _read_tensor(file, key)
        if source.dtype != "auto" and given[name].is_floating_point():
            given[name] = given[name].to(dtype)
    _initialise_buffers(model, skipped)  # before the weights: the model's own code may draw some of them anew
    model.load_state_dict(given, strict=False, assign=True)
    tie: Any = getattr(model, "tie_weights", None)
    if tie is not None:
        tie()
    left = [
        name
        for name, value in (*model.named_parameters(), *model.named_buffers())
        if value.is_meta and not skipped.match(name)
    ]
    if left:
        raise _naming_error(folder, left)
    setattr(model, ATTRIBUTE, PartialLoad(source.weights(), combine_digests(digest_tensors(model).weights)))
    return model.eval()


def _tensor_files(folder: Path) -> dict[str, Path]:
    from safetensors import safe_open

    if (folder / INDEX).is_file():
        by_name = json.loads((folder / INDEX).read_text("utf-8"))["weight_map"]
        return {name: folder / file for name, file in by_name.items()}
    if not (folder / SINGLE).is_file():
        raise ConfigError(
            "the checkpoint has no safetensors",
            where=str(folder),
            expected=f"{SINGLE} or {INDEX}, in a local folder",
            remedy="load the whole model, or save it with save_pretrained",
        )
    with safe_open(folder / SINGLE, framework="pt") as file:
        return dict.fromkeys(file.keys(), folder / SINGLE)


def _locate_tensors(
    model: nn.Module, wanted: set[str], held: dict[str, Path], folder: Path
) -> dict[str, tuple[str, Path]]:
    """Return key and file of each tensor, whose key may have or lack the model's prefix; tied tensors are left out."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    found = {}
    for name in wanted:
        key = next((k for k in (name, prefix + name, name.removeprefix(prefix)) if k in held), None)
        if key is not None:
            found[name] = (key, held[key])
        elif name not in tied:
            raise _naming_error(folder, [name])
    return found


def _read_tensor(file: Path, key: str) -> torch.Tensor:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        tensor: torch.Tensor = opened.get_tensor(key)
        return tensor


def _initialise_buffers(model: nn.Module, skipped: re.Pattern[str]) -> None:
    """Compute buffers that no checkpoint holds, such as rotary frequencies, by the model's own code."""
    own: Any = getattr(model, "_init_weights", None)
    for name, module in model.named_modules():
        pending = [key for key, value in module._buffers.items() if value is not None and value.is_meta]
        if not pending or skipped.match(f"{name}."):
            continue
        for key in pending:
            value = module._buffers[key]
            assert value is not None
            module._buffers[key] = torch.full_like(
                value, float("nan") if value.is_floating_point() else 0, device="cpu"
            )
        if own is not None:
            own(module)
        if any(torch.isnan(module.get_buffer(key)).any() for key in pending):
            raise ConfigError(
                "a part of the model can only be computed when the whole model is loaded",
                where=name,
                found=f"buffers {', '.join(pending)}",
                remedy="load the whole model",
            )


def _naming_error(folder: Path, names: list[str]) -> ConfigError:
    return ConfigError(
        "the checkpoint's tensors are named differently than the model's",
        where=str(folder),
        expected=", ".join(sorted(names)[:5]),
        remedy="load the whole model, or save it again with save_pretrained",
    )

"""The stack of blocks that the residual stream passes through."""

from __future__ import annotations

from torch import nn

from flexcache.errors import SiteError
from flexcache.hooks.locate.encoder_decoder import get_decoder, is_encoder_decoder
from flexcache.hooks.locate.names import modules_by_path, text_config, unwrap_model, unwrap_module
from flexcache.parallel.stages import Stages

DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
DECODER_DEPTHS = ("num_decoder_layers", "decoder_layers")
"""Names of the number of blocks in configurations."""

REMOTE_BLOCK = "PipelineIdentityLayer"
"""The class that transformers puts in place of modules of other pipeline stages; it returns its input."""


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the path and the list of the model's blocks.

    The blocks are the first ModuleList, in module order, that has as many items as the configuration has layers, each
    with submodules. Block classes may differ, as in hybrid models. In a multimodal model the language part is searched,
    in an encoder–decoder the decoder. Without a configuration, the longest ModuleList of modules of one class is taken.

    >>> class Model(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    >>> path, blocks = find_blocks(Model())
    >>> path, len(blocks)
    ('layers', 3)

    Returns
    -------
    path : str
        Dotted, without prefixes of wrappers: ``"model.layers"``.
    blocks : ModuleList

    Raises
    ------
    SiteError
        There is no such list, or one block is run several times.
    """
    if isinstance(model, Stages):
        return model.path, model.blocks
    named, sided = modules_by_path(model), is_encoder_decoder(model)
    within = next(name for name, module in named.items() if module is get_decoder(model)) + "." if sided else ""
    lists = {
        name: module
        for name, module in named.items()
        if isinstance(module, nn.ModuleList) and len(module) and name.startswith(within)
    }
    depth = _depth(get_decoder(model), DECODER_DEPTHS + DEPTHS) if sided else _depth(model, DEPTHS)
    if depth is None:
        alike = [name for name, items in lists.items() if len({type(unwrap_module(item)) for item in items}) == 1]
        path = max(alike, key=lambda name: len(lists[name]), default=None)
    else:
        fits = [
            name
            for name, items in lists.items()
            if len(items) == depth
            and all(is_remote_block(item) or any(True for _ in unwrap_module(item).children()) for item in items)
        ]
        textual = (name for name in fits if not sided and _reads_text(name, named, model))
        path = next(textual, next(iter(fits), None))
    if path is None:
        seen = [f"{name} ({len(items)} of {type(unwrap_module(items[0])).__name__})" for name, items in lists.items()]
        raise SiteError(
            "the model's blocks cannot be found",
            where=type(unwrap_model(model)).__name__,
            expected="a ModuleList of blocks of one class"
            if depth is None
            else f"a ModuleList of {depth} blocks, as many as the configuration has layers",
            found=", ".join(seen[:8]) or "no ModuleList",
            remedy="give module paths instead of standard sites; a model that runs one block several times, as ALBERT"
            " does, has no separate sites for each layer",
        )
    if len({id(item) for item in lists[path]}) < len(lists[path]):
        raise SiteError(
            "one block of the model stands for several layers",
            where=path,
            expected="a separate module for each layer",
            remedy="activations of shared blocks cannot be told apart; give paths of modules outside the blocks",
        )
    return path, lists[path]


def is_remote_block(block: nn.Module) -> bool:
    """Return True if a block stands for one of another pipeline stage."""
    return type(block).__name__ == REMOTE_BLOCK


def _depth(model: nn.Module, names: tuple[str, ...]) -> int | None:
    config = text_config(model)
    found = (getattr(config, name, None) for name in names)
    return next((depth for depth in found if isinstance(depth, int)), None)


def _reads_text(path: str, named: dict[str, nn.Module], model: nn.Module) -> bool:
    """Return True if the nearest module above *path* with a configuration has that of the language part."""
    while path:
        path = path.rpartition(".")[0]
        config = getattr(named[path], "config", None)
        if config is not None:
            return type(config) is type(text_config(model)) or config is getattr(unwrap_model(model), "config", None)
    return True

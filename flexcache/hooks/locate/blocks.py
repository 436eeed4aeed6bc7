"""The stack of blocks that the residual stream runs through."""

from __future__ import annotations

from torch import nn

from flexcache.errors import SiteError
from flexcache.hooks.locate.encoder_decoder import decoder, is_encoder_decoder
from flexcache.hooks.locate.names import inner, modules, text_config, unwrap
from flexcache.parallel.stages import Stages

DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
DECODER_DEPTHS = ("num_decoder_layers", "decoder_layers")
"""What configurations call the number of blocks."""

NOT_OWNED = "PipelineIdentityLayer"
"""What transformers puts in place of modules that another pipeline stage has; it passes its input on."""


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the path and the list of the model's blocks.

    They are the first ModuleList, in module order, of as many modules with parts of their own as the configuration
    has layers. Hybrid models mix block classes in it. Of a model that sees and reads, the language part is meant, of
    one with an encoder and a decoder the decoder. A model without a configuration: its longest ModuleList of modules
    of one class.

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
    named, sided = modules(model), is_encoder_decoder(model)
    within = next(name for name, module in named.items() if module is decoder(model)) + "." if sided else ""
    lists = {
        name: module
        for name, module in named.items()
        if isinstance(module, nn.ModuleList) and len(module) and name.startswith(within)
    }
    depth = _depth(decoder(model), DECODER_DEPTHS + DEPTHS) if sided else _depth(model, DEPTHS)
    if depth is None:
        alike = [name for name, items in lists.items() if len({type(inner(item)) for item in items}) == 1]
        path = max(alike, key=lambda name: len(lists[name]), default=None)
    else:
        fits = [
            name
            for name, items in lists.items()
            if len(items) == depth
            and all(is_elsewhere(item) or any(True for _ in inner(item).children()) for item in items)
        ]
        said = (name for name in fits if not sided and _reads_text(name, named, model))
        path = next(said, next(iter(fits), None))
    if path is None:
        seen = [f"{name} ({len(items)} of {type(inner(items[0])).__name__})" for name, items in lists.items()]
        raise SiteError(
            "the model's blocks cannot be found",
            where=type(unwrap(model)).__name__,
            expected="a ModuleList of blocks of one class"
            if depth is None
            else f"a ModuleList of {depth} blocks, as many as the configuration has layers",
            found=", ".join(seen[:8]) or "no ModuleList",
            remedy="a model that runs one block several times, as ALBERT does, has no sites of its own for each layer;"
            " for other models give module paths instead of standard sites",
        )
    if len({id(item) for item in lists[path]}) < len(lists[path]):
        raise SiteError(
            "one block of the model stands for several layers",
            where=path,
            expected="a module of its own for each layer",
            remedy="activations of shared blocks cannot be told apart; give module paths outside of them",
        )
    return path, lists[path]


def is_elsewhere(block: nn.Module) -> bool:
    """Whether a block stands for one that another pipeline stage has, as transformers puts it there."""
    return type(block).__name__ == NOT_OWNED


def _depth(model: nn.Module, names: tuple[str, ...]) -> int | None:
    config = text_config(model)
    found = (getattr(config, name, None) for name in names)
    return next((depth for depth in found if isinstance(depth, int)), None)


def _reads_text(path: str, named: dict[str, nn.Module], model: nn.Module) -> bool:
    """Whether the nearest module above *path* that carries a configuration carries the language part's."""
    while path:
        path = path.rpartition(".")[0]
        config = getattr(named[path], "config", None)
        if config is not None:
            return type(config) is type(text_config(model)) or config is getattr(unwrap(model), "config", None)
    return True

"""Models with an encoder and a decoder: the decoder is what is read, and the encoder runs before it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from flexcache.errors import SiteError
from flexcache.hooks.locate.names import unwrap

TARGET = "decoder_input_ids"
"""The keyword of the token ids that a decoder reads; ``input_ids`` are then the encoder's."""


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a model has an encoder and a decoder, two residual streams over two sequences of tokens."""
    root = unwrap(model)
    if not getattr(getattr(root, "config", None), "is_encoder_decoder", False):
        return False
    return any(name.rpartition(".")[2] == "decoder" for name, _ in root.named_modules())


def decoder(model: nn.Module) -> nn.Module:
    """Return the decoder of a model that has an encoder as well.

    Raises
    ------
    SiteError
        The model does not say which of its modules it is.
    """
    return _side(model, "get_decoder")


def embedding(model: nn.Module) -> nn.Module | None:
    """Return the module that embeds the tokens: of a model with an encoder and a decoder, the decoder's."""
    root = unwrap(model)
    try:
        found: Any = (decoder(root) if is_encoder_decoder(root) else root).get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError, TypeError):
        return None
    return found if isinstance(found, nn.Module) else None


def encoded(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs of a forward in which the encoder has run already, without gradients.

    Where a decoder is to read something, the encoder's token ids are replaced by what it makes of them; else the
    inputs are as they were. So modules that both sides share run once in the forward that follows, for the decoder.
    """
    if TARGET not in inputs or "input_ids" not in inputs:
        return dict(inputs)
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    given = {"input_ids": inputs["input_ids"]} | (
        {} if (mask := rest.get("attention_mask")) is None else {"attention_mask": mask}
    )
    with torch.no_grad():
        states = _side(model, "get_encoder")(**given)
    return rest | {"encoder_outputs": states}


def example_of_both(model: nn.Module, shape: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Return token ids for a decoder to read, shape (sequences, tokens), and others for its encoder, two tokens longer.

    The lengths differ, so that what has the encoder's cannot be taken for the decoder's.
    """
    lengths = {"input_ids": shape[1] + 2, TARGET: shape[1]}
    sides = {"input_ids": _side(model, "get_encoder"), TARGET: decoder(model)}
    generator, made = torch.Generator().manual_seed(0), {}
    config = unwrap(model).config
    special = {value for name, value in vars(config).items() if name.endswith("token_id") and isinstance(value, int)}
    for name, side in sides.items():
        count = _vocabulary(side)
        ids = torch.randint(count, (shape[0], lengths[name]), generator=generator)
        plain = next((token for token in range(count) if token not in special), 0)
        for token in special:
            ids[ids == token] = plain
        made[name] = ids
    return made


def _vocabulary(side: nn.Module) -> int:
    try:
        return int(side.get_input_embeddings().num_embeddings)  # type: ignore[operator]
    except (AttributeError, NotImplementedError) as error:
        raise SiteError(
            "the model does not say how many token ids its encoder and its decoder know",
            where=type(side).__name__,
            expected="a method get_input_embeddings()",
        ) from error


def _side(model: nn.Module, getter: str) -> nn.Module:
    found = getattr(unwrap(model), getter, lambda: None)()
    if not isinstance(found, nn.Module):
        raise SiteError(
            "the model does not say which of its modules are its encoder and its decoder",
            where=type(unwrap(model)).__name__,
            expected=f"a method {getter}()",
            remedy="pass the encoder alone as the model",
        )
    return found

"""Encoder–decoder models: the decoder is read, and the encoder runs before it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from flexcache.errors import SiteError
from flexcache.hooks.locate.names import unwrap_model

DECODER_INPUT_IDS = "decoder_input_ids"
"""The keyword of the token ids that a decoder reads; ``input_ids`` are then those of the encoder."""


def is_encoder_decoder(model: nn.Module) -> bool:
    """Return True if a model has an encoder and a decoder, with a residual stream each."""
    root = unwrap_model(model)
    if not getattr(getattr(root, "config", None), "is_encoder_decoder", False):
        return False
    return any(name.rpartition(".")[2] == "decoder" for name, _ in root.named_modules())


def get_decoder(model: nn.Module) -> nn.Module:
    """Return the decoder of an encoder–decoder.

    Raises
    ------
    SiteError
        The model does not state which of its modules that is.
    """
    return _get_half(model, "get_decoder")


def get_token_embedding(model: nn.Module) -> nn.Module | None:
    """Return the module that embeds the tokens, in an encoder–decoder those of the decoder; None if it is not known."""
    root = unwrap_model(model)
    try:
        found: Any = (get_decoder(root) if is_encoder_decoder(root) else root).get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError, TypeError):
        return None
    return found if isinstance(found, nn.Module) else None


def run_encoder(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs of a forward with the encoder's token ids replaced by its output.

    The encoder runs here, without gradients. A module that encoder and decoder share then runs only once, for the
    decoder, in the forward that follows. Inputs without ``decoder_input_ids`` are returned as they are.
    """
    if DECODER_INPUT_IDS not in inputs or "input_ids" not in inputs:
        return dict(inputs)
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    given = {"input_ids": inputs["input_ids"]} | (
        {} if (mask := rest.get("attention_mask")) is None else {"attention_mask": mask}
    )
    with torch.no_grad():
        states = _get_half(model, "get_encoder")(**given)
    return rest | {"encoder_outputs": states}


def example_token_ids(model: nn.Module, shape: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Return token ids for a decoder, shape (sequences, tokens), and for its encoder, with two more tokens.

    The lengths differ so that activations of the encoder cannot be mistaken for those of the decoder.
    """
    lengths = {"input_ids": shape[1] + 2, DECODER_INPUT_IDS: shape[1]}
    sides = {"input_ids": _get_half(model, "get_encoder"), DECODER_INPUT_IDS: get_decoder(model)}
    generator, made = torch.Generator().manual_seed(0), {}
    config = unwrap_model(model).config
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
            "the model does not state the vocabulary of its encoder or its decoder",
            where=type(side).__name__,
            expected="a method get_input_embeddings()",
        ) from error


def _get_half(model: nn.Module, getter: str) -> nn.Module:
    found = getattr(unwrap_model(model), getter, lambda: None)()
    if not isinstance(found, nn.Module):
        raise SiteError(
            "the model does not state which of its modules are its encoder and its decoder",
            where=type(unwrap_model(model)).__name__,
            expected=f"a method {getter}()",
            remedy="pass the encoder alone as the model",
        )
    return found

"""How the decoder of a model is taught: what it reads of a target, found out from the model's own way with labels."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, Literal, cast

import torch
from torch import nn

from flexcache.errors import ConfigError
from flexcache.hooks.locate.encoder_decoder import embedding, is_encoder_decoder
from flexcache.hooks.locate.names import unwrap
from flexcache.options import DecoderInputMode, DecoderInputs


def decoder_inputs(model: nn.Module, how: DecoderInputMode = "shifted") -> DecoderInputs | None:
    """Return what the decoder of a model reads of a target; None for a model that is not an encoder with a decoder.

    ``"shifted"`` is what the model itself makes of labels when it is trained: the target one place later, behind the
    token that it begins with. So each token that is read stands where the model predicts the next one of the target.

    Raises
    ------
    ConfigError
        Nothing says what a shifted target begins with, or a model without both sides is to have one.
    """
    if not is_encoder_decoder(model):
        if how != "shifted":
            raise ConfigError(
                "decoder_inputs is for models with an encoder and a decoder",
                found=type(unwrap(model)).__name__,
                remedy="leave it out; other models read text or tokens as they are",
            )
        return None
    return DecoderInputs(inputs=how, start=_start(unwrap(model)) if how == "shifted" else None)


def _start(model: nn.Module) -> int | Literal["last"]:
    """Return the token that a shifted target begins with, by what the model makes of two labels that differ."""
    config: Any = model.config
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None) or _of_the_class(model)
    start = getattr(config, "decoder_start_token_id", None)
    if shift is None:
        if isinstance(start, int):
            return start
        raise _unknown(model, "nothing")
    special = {value for name, value in vars(config).items() if name.endswith("token_id") and isinstance(value, int)}
    count = int(getattr(embedding(model), "num_embeddings", 2**15))
    one, two, three, four = [token for token in range(count) if token not in special][:4]
    try:
        made = [shift(torch.tensor([[one, two, last]])).tolist()[0] for last in (three, four)]
    except Exception as error:  # whatever a model's own code raises where its configuration lacks a token
        raise _unknown(model, f"{type(error).__name__}: {str(error)[:200]}") from error
    if all(line[1:] == [one, two] for line in made):
        if made[0][0] == made[1][0]:
            return int(made[0][0])
        if [line[0] for line in made] == [three, four]:
            return "last"
    raise _unknown(model, f"labels {[one, two, three]} become {made[0]}")


def _of_the_class(model: nn.Module) -> Any:
    """Return the way of the class that has the same model with a head, where transformers knows one."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING

    with suppress(KeyError):
        kind = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING[type(cast(Any, model).config)]
        method = getattr(kind, "prepare_decoder_input_ids_from_labels", None)
        return None if method is None else lambda labels: method(model, labels)
    return None


def _unknown(model: nn.Module, found: str) -> ConfigError:
    return ConfigError(
        "nothing says which token a target begins with when it is shifted",
        where=type(model).__name__,
        expected="decoder_start_token_id in the model's configuration",
        found=found,
        remedy="set it, or give targets as the decoder is to read them, with decoder_inputs: as_given",
    )

"""Decoder inputs for teacher forcing, inferred from the model's own shift of labels."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, Literal, cast

import torch
from torch import nn

from flexcache.errors import ConfigError
from flexcache.hooks.locate.encoder_decoder import get_token_embedding, is_encoder_decoder
from flexcache.hooks.locate.names import unwrap_model
from flexcache.options import DecoderInputMode, DecoderInputs


def infer_decoder_inputs(model: nn.Module, how: DecoderInputMode = "shifted") -> DecoderInputs | None:
    """Return the decoder inputs of an encoder-decoder model for a target; None for other models.

    ``"shifted"`` is the way in which the model is trained: labels shifted right by one, after a start token. So at each
    position the model predicts the token of the target there. ConfigError if the start token is unknown, or *how* is
    given for another model.
    """
    if not is_encoder_decoder(model):
        if how != "shifted":
            raise ConfigError(
                "decoder_inputs is for models with an encoder and a decoder",
                found=type(unwrap_model(model)).__name__,
                remedy="leave it out; other models read texts or tokens as they are",
            )
        return None
    return DecoderInputs(inputs=how, start=_start(unwrap_model(model)) if how == "shifted" else None)


def _start(model: nn.Module) -> int | Literal["last"]:
    """Return the start token of a shifted target, from the model's shift of two labels that differ."""
    config: Any = model.config
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None) or _shift_of_head_class(model)
    start = getattr(config, "decoder_start_token_id", None)
    if shift is None:
        if isinstance(start, int):
            return start
        raise _unknown_start(model, "nothing")
    special = {value for name, value in vars(config).items() if name.endswith("token_id") and isinstance(value, int)}
    count = int(getattr(get_token_embedding(model), "num_embeddings", 2**15))
    one, two, three, four = [token for token in range(count) if token not in special][:4]
    try:
        made = [shift(torch.tensor([[one, two, last]])).tolist()[0] for last in (three, four)]
    except Exception as error:  # model code raises anything if its configuration lacks a token
        raise _unknown_start(model, f"{type(error).__name__}: {str(error)[:200]}") from error
    if all(line[1:] == [one, two] for line in made):
        if made[0][0] == made[1][0]:
            return int(made[0][0])
        if [line[0] for line in made] == [three, four]:
            return "last"
    raise _unknown_start(model, f"labels {[one, two, three]} become {made[0]}")


def _shift_of_head_class(model: nn.Module) -> Any:
    """Return the shift of labels of the class of the same model with a head, if transformers has one."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING

    with suppress(KeyError):
        kind = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING[type(cast(Any, model).config)]
        method = getattr(kind, "prepare_decoder_input_ids_from_labels", None)
        return None if method is None else lambda labels: method(model, labels)
    return None


def _unknown_start(model: nn.Module, found: str) -> ConfigError:
    return ConfigError(
        "the start token of a shifted target is unknown",
        where=type(model).__name__,
        expected="decoder_start_token_id in the model's configuration",
        found=found,
        remedy="set it, or give targets exactly as the decoder reads them, with decoder_inputs: as_given",
    )

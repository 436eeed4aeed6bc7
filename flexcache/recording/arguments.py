"""Load and check what callers pass, before any work: models, tokenizers, objectives, documents and path."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from torch import nn

from flexcache.errors import ConfigError, FlexCacheError
from flexcache.hooks.locate.names import as_one_module, unwrap_model
from flexcache.hooks.locate.vision import reads_images
from flexcache.model import ModelSource
from flexcache.model.loading import keep_4bit_layout
from flexcache.parallel.stages import Stages
from flexcache.recording.forward.objective import LogitDifference, Objective, describe_objective
from flexcache.recording.forward.transform import Transform
from flexcache.store.storage.location import is_location, parse_location

P = ParamSpec("P")
R = TypeVar("R")
IN_THE_CACHE = ("PREFIX_TUNING", "CARTRIDGE")
"""Adapters of PEFT whose virtual tokens are keys and values only, which have no activations of their own."""
TAKEN = ("input_ids", "attention_mask")
"""Keywords of the forward of a language model."""


def model_of(model: Any) -> nn.Module:
    """Return the model to run; a `ModelSource`, a folder or a name on the hub is loaded.

    ConfigError if it cannot be loaded, is not a model, has no weights or configuration, takes no attention mask, or its
    adapter adds tokens.
    """
    if isinstance(model, str | os.PathLike | ModelSource):
        return (model if isinstance(model, ModelSource) else ModelSource(name=os.fspath(model))).load()
    if isinstance(model, type):
        raise _no_model("a class", model.__name__, f"make one of it: {model.__name__}.from_pretrained(name)")
    inner = getattr(model, "model", None)
    if not isinstance(model, nn.Module) and isinstance(inner, nn.Module):
        remedy = "pass the model in it and its tokenizer: pipeline.model, pipeline.tokenizer"
        raise _no_model("an object that holds a model", type(model).__name__, remedy)
    stage = hasattr(model, "submod") or isinstance(model, list)
    if not isinstance(model, nn.Module) and not stage:
        raise _no_model("none", type(model).__name__, "load one, as with AutoModelForCausalLM.from_pretrained(name)")
    found = as_one_module(model)
    if not isinstance(found, Stages):
        _check_module(found)
    return found


def _check_module(model: nn.Module) -> None:
    root = unwrap_model(model)
    keep_4bit_layout(root)
    tensors = [*root.parameters(), *root.buffers()]
    offloaded = any(hasattr(module, "_hf_hook") for module in root.modules())
    if tensors and all(tensor.device.type == "meta" for tensor in tensors) and not offloaded:
        remedy = "load the weights, as with from_pretrained, outside of torch.device('meta')"
        raise _no_model("without weights: it is on the meta device", type(root).__name__, remedy)
    if getattr(root, "config", None) is None:
        inside = next((name for name, module in root.named_modules() if hasattr(module, "config")), None)
        own = "run its forward yourself, and store the activations with flexcache.record"
        remedy = own if inside is None else f"pass the model inside: model.{inside}; or {own}"
        raise _no_model("without a configuration (an attribute config)", type(root).__name__, remedy)
    _check_prompt_tokens(root)
    if reads_images(root):
        return
    parameters = inspect.signature(type(root).forward).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    if missing := [name for name in TAKEN if name not in parameters]:
        raise ConfigError(
            f"the forward of the model takes no {' and no '.join(missing)}",
            where=type(root).__name__,
            expected="forward(input_ids, attention_mask, …), as models of transformers have it",
            found=f"forward({', '.join(name for name in parameters if name != 'self')})",
            remedy="rename its arguments, or run the forward yourself and store the activations with flexcache.record",
        )


def _check_prompt_tokens(model: Any) -> None:
    """Raise ConfigError for an active adapter of PEFT that puts tokens of its own in front of each sequence."""
    config = getattr(model, "active_peft_config", None)
    kind = getattr(getattr(config, "peft_type", None), "value", "")
    if getattr(config, "is_prompt_learning", False) and kind not in IN_THE_CACHE and not model._adapters_disabled:
        raise ConfigError(
            "the adapter puts tokens of its own in front of each sequence, so its activations are not those of the"
            " documents' tokens",
            where=type(model).__name__,
            expected="LoRA, IA³, prefix tuning, or another adapter that keeps the sequence as it is",
            found=f"{kind}, {getattr(config, 'num_virtual_tokens', '')} virtual tokens",
            remedy="capture the model inside with model.disable_adapter(), or run its forward yourself, and store the"
            " activations of the documents' tokens with flexcache.record",
        )


def _no_model(what: str, found: str, remedy: str) -> ConfigError:
    return ConfigError(
        f"the model is {what}" if what != "none" else "that is no model",
        expected="a model of transformers, the folder or the name of one, or stages of a torch pipeline",
        found=found,
        remedy=remedy,
    )


def tokenizer_of(tokenizer: Any, model: nn.Module) -> Any:
    """Return the tokenizer, or the processor of an image model; a folder or a name is loaded.

    ConfigError if it cannot be loaded, or is not a tokenizer.
    """
    images = reads_images(model)
    if isinstance(tokenizer, str | os.PathLike):
        source = ModelSource(name=os.fspath(tokenizer))
        return source.processor() if images else source.tokenizer()
    if tokenizer is None or images:
        return tokenizer
    name = getattr(tokenizer, "__name__", type(tokenizer).__name__)
    if isinstance(tokenizer, nn.Module):
        raise _no_tokenizer("a model", name, "the order is model, tokenizer, documents, path")
    if isinstance(tokenizer, type):
        raise _no_tokenizer("a class", name, f"make one of it: {name}.from_pretrained(name)")
    if hasattr(tokenizer, "tokenizer") and hasattr(tokenizer, "save_pretrained"):  # a processor, or a pipeline
        remedy = f"pass the tokenizer in it: the attribute tokenizer of the {name}"
        raise _no_tokenizer("an object that holds a tokenizer", name, remedy)
    if not callable(tokenizer):
        wrap = (
            "wrap it: transformers.PreTrainedTokenizerFast(tokenizer_object=…)"
            if hasattr(tokenizer, "encode")
            else None
        )
        raise _no_tokenizer("not callable", name, wrap or "load one, as with AutoTokenizer.from_pretrained(name)")
    return tokenizer


def _no_tokenizer(what: str, found: str, remedy: str) -> ConfigError:
    return ConfigError(
        f"the tokenizer is {what}",
        expected="a tokenizer of transformers, the folder or the name of one, a function from texts to lists of token"
        " ids, or None for documents of tokens",
        found=found,
        remedy=remedy,
    )


def objective_of(objective: Objective | None, tokenizer: Any) -> Objective | None:
    """Return an objective whose tokens are ids; texts are looked up in the tokenizer.

    ConfigError if a text is not one token, or the objective is not a function.
    """
    if isinstance(objective, LogitDifference):
        token, other = (one_token(value, tokenizer) for value in (objective.token, objective.other))
        return replace(objective, token=token, other=other)
    if objective is not None and (not callable(objective) or isinstance(objective, type)):
        raise ConfigError(
            "the objective cannot be called",
            expected="flexcache.NextTokenLoss(), flexcache.LogitDifference(token, other), or a function of the model's"
            " output and the batch",
            found=repr(objective),
        )
    return objective


def described(transforms: Sequence[Transform], objective: Objective | None) -> dict[str, Any]:
    """Return the fields ``transforms`` and ``objective`` of a `CaptureSpec`, which describe functions."""
    return {
        "transforms": {transform.name: transform.describe() for transform in transforms},
        "objective": None if objective is None else describe_objective(objective),
    }


def one_token(value: int | str, tokenizer: Any) -> int:
    """Return the id of a token that is given by id or as text.

    ConfigError if the text is not one token, or there is no tokenizer to look it up in.
    """
    if not isinstance(value, str):
        try:
            return value.__index__()
        except AttributeError:
            raise ConfigError("a token is given by its id or by text", found=repr(value)) from None
    ids: list[Any] = []
    try:
        if hasattr(tokenizer, "convert_tokens_to_ids"):
            ids = tokenizer(value, add_special_tokens=False)["input_ids"]
        elif tokenizer is not None:  # a plain callable
            ids = tokenizer([value])[0]
    except FlexCacheError:
        raise
    except Exception:  # the tokenizer rejects the text
        ids = []
    if len(ids) != 1:
        raise ConfigError(
            f"{value!r} is not one token",
            found="no tokenizer" if tokenizer is None else f"{len(ids)} tokens {ids}",
            remedy="give a text that is one token, often with a space before it, or a token id",
        )
    return int(ids[0])


def either_order(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function of (model, tokenizer, documents, path) also accept (model, tokenizer, path, documents).

    The argument that is a store is the path; arguments given by name keep their names.
    """

    @wraps(function)
    def called(*args: Any, **named: Any) -> R:
        first, given = args[:2], list(args[2:])
        if len(given) > 2:
            raise TypeError(f"{function.__name__}() takes at most 4 arguments by position, and {len(args)} were given")
        if given and "documents" in named:
            given = [named.pop("documents"), *given]
        elif given and "path" in named:
            given = [*given, named.pop("path")]
        documents, path = _in_order(*given) if given else (named.pop("documents", None), named.pop("path", None))
        return function(*first, documents=documents, path=path, **named)

    return called


def _in_order(first: Any, second: Any = None) -> tuple[Any, Any]:
    """Return documents and path from two arguments in any order; ConfigError if both are stores."""
    stores = [_is_store(first), _is_store(second)]
    if all(stores) and first is not second:
        raise ConfigError(
            "two stores are given, but only one can be extended",
            expected="documents and the path of a store",
            found=f"{first} and {second}",
            remedy="name them, as in documents=…, path=…",
        )
    if any(stores):
        return (second, first) if stores[0] else (first, second)
    paths = [_may_be_path(first), _may_be_path(second)]
    return (second, first) if paths[0] and not paths[1] else (first, second)


def _may_be_path(given: Any) -> bool:
    return is_location(given) or hasattr(given, "arrays")


def _is_store(given: Any) -> bool:
    if not _may_be_path(given):
        return False
    try:
        return (parse_location(given) / "zarr.json").exists()
    except (ConfigError, OSError):
        return False

"""Checks of the arguments of a sweep, before any work is done."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from operator import index
from typing import Any

from torch import nn

from analysis.replay.engine.compatibility import check_store_and_model, short_repr
from analysis.replay.engine.engine import Engine
from analysis.replay.sweeps.grid import Grid, grid
from flexcache.errors import AnalysisError, ConfigError
from flexcache.identity.store_tokenizer import store_tokenizer
from flexcache.recording.arguments import one_token
from flexcache.store.read.store import Store

Token = int | str
Answers = Sequence[Token] | Sequence[Sequence[Token]] | Mapping[str, Sequence[Token]] | None
ModelLoader = Callable[[], nn.Module]
Pair = tuple[int, int]


def load_model(store: Any, model: Any) -> nn.Module:
    """Return a model; if *model* is a function without arguments, call it to load the model.

    Raises
    ------
    AnalysisError
        *model* is neither a module nor such a function, or *store* is not a store.
    """
    function = callable(model) and not isinstance(model, type | nn.Module)
    found = model() if function and isinstance(store, Store) else model
    check_store_and_model(store, found)
    checked: nn.Module = found
    return checked


def check_grid(at: Any) -> Grid:
    """Return the grid of a sweep; by default the last token at every layer.

    Raises
    ------
    AnalysisError
        *at* is not a `Grid`.
    """
    if at is None:
        return grid()
    if isinstance(at, Grid):
        return at
    options = repr(at) if isinstance(at, str) else f"layers={at}" if type(at) is int else '"resid_post"'
    raise AnalysisError(
        "a sweep needs a grid",
        expected="what replay.grid returns",
        found=short_repr(at),
        remedy=f"write at=replay.grid({options})",
    )


def parse_answers(answers: Any, engine: Engine, documents: Sequence[str] | None) -> Pair | dict[str, Pair] | None:
    """Return answers as one pair of token ids for all documents, or as a pair by document id.

    Texts are looked up in the tokenizer of the store; each must be one token.

    Parameters
    ----------
    documents
        Ids, in the order of a sequence of pairs; None for all documents of the store.

    Raises
    ------
    AnalysisError
        A pair is not two tokens of the model; a document is not in the store; there are more or fewer pairs than
        documents.
    """
    if answers is None:
        return None
    source, tokenizer = engine.source, cache(partial(store_tokenizer, engine.store, engine.model))
    pair_of = partial(_pair, vocabulary=engine.vocabulary, load_tokenizer=tokenizer)
    if isinstance(answers, Mapping):
        source.check_documents(answers, "answers")
        pairs = {str(name): pair_of(pair, where=f"answers of {name!r}") for name, pair in answers.items()}
        names = source.numbers if documents is None else documents
        if not any(str(name) in pairs for name in names):
            raise AnalysisError("no document of the sweep has answers", where="answers", found=short_repr(answers))
        return pairs
    given = answers.tolist() if hasattr(answers, "tolist") else answers
    if not isinstance(given, list | tuple) or not any(isinstance(part, list | tuple) for part in map(_plain, given)):
        return pair_of(given, where="answers")
    ids = [*source.numbers] if documents is None else [str(name) for name in documents]
    if len(given) != len(ids):
        raise AnalysisError(
            "answers do not fit the documents",
            where="answers",
            expected=f"a pair for each of {len(ids)} documents, in their order",
            found=f"{len(given)} pairs",
            remedy="give one pair for all, or a mapping from document id to pair",
        )
    return {name: pair_of(pair, where=f"answers of {name!r}") for name, pair in zip(ids, given, strict=True)}


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def _pair(value: Any, vocabulary: int, load_tokenizer: Callable[[], Any], where: str) -> Pair:
    given, found = _plain(value), short_repr(value)
    try:
        if not isinstance(given, list | tuple) or any(isinstance(part, bool) for part in given):
            raise TypeError
        first, second = (
            one_token(part, load_tokenizer()) if isinstance(part, str) else index(_plain(part)) for part in given
        )
    except (TypeError, ValueError):
        first = second = -1
    except ConfigError as error:
        first, second, found = -1, -1, f"{error.message}: {error.found}"
    if not (0 <= first < vocabulary and 0 <= second < vocabulary):
        raise AnalysisError(
            "answers cannot be read",
            where=where,
            expected=f"two token ids from 0 to {vocabulary - 1}, or texts of one token of the store's tokenizer",
            found=found,
            remedy='give ids of the model, or texts that are one token each, such as " good"',
        )
    return first, second

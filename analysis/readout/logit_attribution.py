"""Direct logit attribution: a logit as the sum of what each head, MLP and bias writes into the residual stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import nn

from analysis.dataset.store_argument import accept_store_path
from analysis.readout.frozen_norm import Floats, FrozenNorm
from analysis.readout.lens import Head, next_tokens
from analysis.readout.residual_terms import Component, ResidualTerms
from flexcache.errors import AnalysisError, ConfigError
from flexcache.hooks import find_hook_points
from flexcache.hooks.read.measure import read_example
from flexcache.identity.store_tokenizer import store_tokenizer
from flexcache.recording.arguments import one_token
from flexcache.site import Site
from flexcache.spec import is_whole, listed
from flexcache.store.read.store import Store

BLOCK = 4096
"""Rows in memory at once."""
ROUNDINGS = 4
EPS = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7, "int8": 2.0**-6}
Answer = int | str | Sequence[int | str]


@accept_store_path
def compute(
    store: Store,
    model: nn.Module,
    answers: Answer | Mapping[str, Answer] | None = None,
    *,
    rows: str | int = "last",
    documents: Sequence[str] | None = None,
    heads: bool | None = None,
) -> xr.Dataset:
    """Return what each component of a model writes directly into a logit, or into the difference of two.

    The last residual stream is a sum of the embedding, of attention and of MLPs, and logits are linear in it once the
    scale of the final norm is kept fixed at that of the stored row (Elhage et al. 2021, "A mathematical framework for
    transformer circuits"; Wang et al. 2022, arXiv 2211.00593). Each term is a component: with ``z`` stored, attention
    is split by head, and norms after attention are kept fixed as well. Biases, a softcap and the rounding of the stored
    terms have names of their own, so that the components sum to the model's logit exactly. Effects by way of later
    components are not in it: see `analysis.replay`. ::

        found = logit_attribution.compute(store, model, answers=(good, bad))
        found["contribution"].mean("row").to_series().nlargest(10)

    Parameters
    ----------
    model
        The loaded model of the store, a causal language model; a small forward checks its head.
    answers
        A token, by id or as text; or two, for the logit of the first less that of the second; or either by document id.
        By default the next token of each row, where there is one.
    rows
        ``"last"`` token of each document, ``"all"``, or a position, negative from the end.
    documents
        Ids; all committed documents by default.
    heads
        Split attention into heads, from ``z``; by default if ``z`` is stored.

    Returns
    -------
    Dataset
        ``contribution`` (row, component), float64, with coordinates kind, layer and head (-1 where there is none);
        ``logit`` (row), their sum: the logit, or the difference of two, that the model's head computes from the stored
        row; coordinates document (id), position, token and other (-1 for none). ``rounding_error``, an attribute, is
        the largest contribution of rounding

    Raises
    ------
    AnalysisError
        The store lacks a term, or they do not sum to the residual stream; the model's head or a norm is of another
        form; an answer is no token; no row is left.
    """
    head = _check_head(model)
    terms = ResidualTerms(store, model, heads)
    chosen = _choose_rows(store, rows, documents)
    pairs = _read_answers(store, answers, chosen, _TokenIds(store, model, len(head.weight)))
    known = pairs[:, 0] >= 0
    if not known.any():
        raise AnalysisError(
            "no row has an answer",
            where=str(store.path),
            expected="answers=, or rows that a token follows" if answers is None else "answers of the rows' documents",
            found=f"{len(chosen)} rows, rows={rows!r}",
            remedy='pass answers=(token, other), or rows="all"',
        )
    chosen, pairs = chosen[known], pairs[known]
    found: list[Floats] = []
    components: list[Component] = []
    for first in range(0, len(chosen), BLOCK):
        part = slice(first, first + BLOCK)
        components, values = _attribute(store, model, head, terms, chosen[part], pairs[part])
        found.append(values)
    contribution = np.concatenate(found)
    ids = np.array(store.documents["id"].to_pylist(), object)
    about = {name: np.asarray(store.coordinates[name].values)[chosen] for name in ("document", "position")}
    rounding = contribution[:, [component.kind for component in components].index("rounding")]
    return xr.Dataset(
        {"contribution": (("row", "component"), contribution), "logit": ("row", contribution.sum(1))},
        {
            "component": np.array([component.label for component in components], object),
            "kind": ("component", np.array([component.kind for component in components], object)),
            "layer": ("component", [component.layer for component in components]),
            "head": ("component", [component.head for component in components]),
            "row": chosen,
            "document": ("row", ids[about["document"]]),
            "position": ("row", about["position"].astype(np.int64)),
            "token": ("row", pairs[:, 0]),
            "other": ("row", pairs[:, 1]),
        },
        {"rounding_error": float(np.abs(rounding).max()), "first_layer": terms.first, "store": store.path.name},
    )


def _attribute(
    store: Store,
    model: nn.Module,
    head: Head,
    terms: ResidualTerms,
    rows: NDArray[np.int64],
    pairs: NDArray[np.int64],
) -> tuple[list[Component], Floats]:
    """Return the components, and their contributions for a block of rows."""
    last = terms.read_stream(terms.depth - 1, rows)
    norm = FrozenNorm.of(head.norm, last.shape[1])  # type: ignore[arg-type]
    signs = np.where(pairs >= 0, [[1.0, -1.0]], 0.0)
    weights, biases = _unembed(head, pairs)
    token_logits = np.einsum("rtf,rf->rt", weights, norm.apply(last)) + biases
    unembedding = np.einsum("rt,rtf->rf", signs, weights)
    directions = norm.pull_back(unembedding, norm.measure_scales(last))
    components: list[Component] = []
    columns: list[Floats] = []
    stream, bound, eps = np.zeros_like(last), np.zeros_like(last), _rounding_unit(store, model)
    for term in terms.read_terms(rows, directions):
        components += term.components
        columns.append(term.contributions)
        stream += term.added
        magnitude = np.abs(stream) + term.magnitude
        bound += magnitude.max(-1, keepdims=True) if eps == EPS["int8"] else magnitude
    _check_sum(model, last - stream, ROUNDINGS * eps * bound)
    capped = token_logits if head.softcap is None else head.softcap * np.tanh(token_logits / head.softcap)
    columns += [
        (unembedding @ norm.bias)[:, None],
        (signs * biases).sum(1)[:, None],
        (signs * (capped - token_logits)).sum(1)[:, None],
    ]
    rounding = (signs * capped).sum(1) - np.hstack(columns).sum(1)
    components += [Component(kind) for kind in ("final norm bias", "logit bias", "softcap", "rounding")]
    return components, np.hstack([*columns, rounding[:, None]])


def _unembed(head: Head, tokens: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Return the weights, (rows, 2, hidden), and biases, (rows, 2), of tokens, with the scale of the logits."""
    weights = head.weight[torch.from_numpy(np.maximum(tokens, 0))].double().numpy() * head.scale
    if head.bias is None:
        return weights, np.zeros(tokens.shape)
    return weights, head.bias[torch.from_numpy(np.maximum(tokens, 0))].double().numpy() * head.scale


def _check_sum(model: nn.Module, difference: Floats, bound: Floats) -> None:
    beyond = np.abs(difference) > bound
    if beyond.any() or not np.isfinite(difference).all():
        worst = float(np.max(np.abs(difference) / np.where(bound, bound, 1)))
        raise AnalysisError(
            "the stored terms do not sum to the last residual stream",
            where=type(model).__name__,
            expected="embedding + attention + MLPs, to rounding",
            found=f"a difference of {worst:.3g} times the bound, {beyond.any(1).sum()} of {len(beyond)} rows beyond it",
            remedy="its blocks normalize or scale the residual stream, or add something else; such a model cannot be"
            " decomposed",
        )


def _rounding_unit(store: Store, model: nn.Module) -> float:
    """Return the larger of the rounding units of the stored and of the computed values."""
    names = [store.arrays[name].dtype for name in ("resid_post", "mlp_out", "attn_out", "z") if name in store.arrays]
    names.append(str(next(model.parameters()).dtype).removeprefix("torch."))
    return max(EPS.get(name, EPS["float32"]) for name in names)


def _check_head(model: Any) -> Head:
    """Return the head of a model whose logits are those of its norm and unembedding, in a small forward.

    Raises
    ------
    AnalysisError
        The model has no such head, or its logits are something else.
    """
    if not isinstance(model, nn.Module) or not hasattr(model, "get_output_embeddings"):
        raise AnalysisError(
            "direct logit attribution needs a loaded causal language model",
            expected="a model of transformers with an unembedding",
            found=type(model).__name__,
            remedy='load it: flexcache.ModelSource(name="…").load()',
        )
    head = Head.of(model)
    (point,) = find_hook_points(model, Site("resid_post"), -1)
    ran = read_example(model, [point])
    away = float("inf")
    if ran.values[point].shape[-1] == head.weight.shape[1]:
        with torch.inference_mode():
            hidden = head.norm(ran.values[point].float().cpu())
            made = head.scale * torch.nn.functional.linear(hidden, head.weight, head.bias)
            made = made if head.softcap is None else head.softcap * torch.tanh(made / head.softcap)
            logits = ran.output.logits.float().cpu()
            away = float((made - logits).abs().max() / logits.std())
    wide = next(model.parameters()).dtype in (torch.float32, torch.float64)
    if not away < (1e-3 if wide else 0.1):
        raise AnalysisError(
            "the model's logits are not those of its final norm and unembedding",
            where=type(model).__name__,
            expected="the unembedding of the normalized last residual stream, with bias, scale and softcap",
            found=f"a distance of {away:.2g} times the spread of the logits",
        )
    return head


def _choose_rows(store: Store, rows: Any, documents: Sequence[str] | None) -> NDArray[np.int64]:
    """Return the committed rows at the positions that *rows* names."""
    committed = store.committed_rows
    about = {name: np.asarray(store.coordinates[name].values)[committed] for name in ("document", "position")}
    ids = [str(name) for name in store.documents["id"].to_pylist()]
    keep = np.ones(len(committed), bool)
    if documents is not None:
        wanted = listed(documents, str, "documents")
        unknown = set(wanted) - set(ids)
        if unknown:
            raise AnalysisError(f"the store has no document {min(unknown)!r}", found=f"{len(unknown)} unknown ids")
        keep = np.isin(about["document"], [ids.index(name) for name in wanted])
    lengths = store.documents["n_tokens"].to_numpy().astype(np.int64)[about["document"]]
    if isinstance(rows, str) and rows in ("last", "all"):
        keep &= (about["position"] == lengths - 1) | (rows == "all")
    elif isinstance(rows, int) and not isinstance(rows, bool):
        keep &= about["position"] == (rows if rows >= 0 else lengths + rows)
    else:
        raise AnalysisError("rows cannot be read", expected='"last", "all" or a position', found=repr(rows)[:80])
    found: NDArray[np.int64] = committed[keep].astype(np.int64)
    return found


def _read_answers(store: Store, answers: Any, rows: NDArray[np.int64], tokens: _TokenIds) -> NDArray[np.int64]:
    """Return two tokens for each row, shape (rows, 2); −1 where there is none."""
    found = np.full((len(rows), 2), -1, np.int64)
    if answers is None:
        found[:, 0] = next_tokens(store, rows)[0]
    elif isinstance(answers, Mapping):
        numbers = {str(name): line for line, name in enumerate(store.documents["id"].to_pylist())}
        unknown = [name for name in answers if str(name) not in numbers]
        if unknown:
            raise AnalysisError(f"the store has no document {unknown[0]!r}", where="answers")
        document = np.asarray(store.coordinates["document"].values)[rows]
        for name, answer in answers.items():
            found[document == numbers[str(name)]] = tokens.find_pair(answer, f"answers of {name!r}")
    else:
        found[:] = tokens.find_pair(answers, "answers")
    return found


class _TokenIds:
    """Token ids of answers; texts are looked up in the tokenizer of the store."""

    def __init__(self, store: Store, model: nn.Module, vocabulary: int) -> None:
        self.store, self.model, self.vocabulary = store, model, vocabulary

    @cached_property
    def tokenizer(self) -> Any:
        return store_tokenizer(self.store, self.model)

    def find_pair(self, answer: Any, where: str) -> tuple[int, int]:
        """Return one or two token ids; −1 in place of a second one."""
        given = answer.tolist() if hasattr(answer, "tolist") else answer
        asked = list(given) if isinstance(given, list | tuple) else [given]
        found, text = [], repr(answer)[:80]
        try:
            found = [one_token(token, self.tokenizer) if isinstance(token, str) else token for token in asked]
        except ConfigError as error:
            text = f"{error.message}: {error.found}"
        if len(found) not in (1, 2) or not all(is_whole(token) and 0 <= token < self.vocabulary for token in found):
            raise AnalysisError(
                "answers cannot be read",
                where=where,
                expected=f"a token, or two: texts of one token, or ids from 0 to {self.vocabulary - 1}",
                found=text,
                remedy='give ids of the model, or texts that are one token each, such as " good"',
            )
        return int(found[0]), int(found[1]) if len(found) > 1 else -1

"""Logit lens: predictions after each layer, from stored residuals, the final norm and the unembedding.

Needs torch, because the norm is that of the model; nothing else of the model is loaded.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from analysis.dataset.store_argument import accept_store_path
from analysis.statistics.kept_rows import Rows
from analysis.statistics.onepass import DocumentSample, read
from flexcache.errors import AnalysisError
from flexcache.paths import local_path
from flexcache.site import Layers
from flexcache.store.read.store import Store

if TYPE_CHECKING:
    import torch

ROWS = 1024
LOGIT_BYTES = 64 << 20
CHUNK = 8192
"""Tokens of the vocabulary in one product."""
NORMS = ("model.norm", "transformer.ln_f", "gpt_neox.final_layer_norm", "model.decoder.final_layer_norm", "norm")
OUTPUTS = ("lm_head", "embed_out", "output")
"""Names of the unembedding in checkpoint files, which may differ from the name of the module."""


@dataclass(frozen=True, eq=False)
class Head:
    """Final norm and unembedding, which turn a residual into logits.

    ::

        head = lens.Head.load("path/to/model")          # or lens.Head.of(model)
        head.log_probabilities(store.read("resid_post", 12, rows=[0, 1]))

    Attributes
    ----------
    norm : callable
        The final norm of the model, on float32.
    weight : Tensor of shape (vocabulary, hidden)
        The unembedding.
    bias : Tensor of shape (vocabulary,), or None
    scale : float
        Factor of the logits.
    softcap : float, or None
        c of ``c tanh(logits / c)``.
    """

    norm: Callable[[Any], Any]
    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, model: Any) -> Head:
        """Return the head of a loaded causal language model.

        Raises
        ------
        AnalysisError
            The final norm or unembedding is not found.
        """
        named, output = dict(model.named_modules()), model.get_output_embeddings()
        norm = next((named[name] for name in NORMS if name in named), None) or _norm_beside_blocks(model)
        if norm is None or output is None or model.config.is_encoder_decoder:
            raise AnalysisError(
                "the model has no head that a logit lens can use",
                where=type(model).__name__,
                expected=f"a causal language model with one of {', '.join(NORMS)}",
                found="no final norm" if norm is None else "no unembedding",
                remedy="make one: lens.Head(norm=…, weight=…)",
            )
        config = model.config
        scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
            getattr(config, "logits_scaling", None) or 1.0
        )
        bias = getattr(output, "bias", None)
        return cls(
            norm.float().eval(),
            output.weight.detach().float(),
            None if bias is None else bias.detach().float(),
            scale,
            getattr(config, "final_logit_softcapping", None),
        )

    @classmethod
    def load(cls, folder: str | Path) -> Head:
        """Load the head of a checkpoint folder; only the norm and the unembedding are read from its safetensors.

        Raises
        ------
        AnalysisError
            The folder has no such weights.
        """
        import torch
        from safetensors import safe_open
        from transformers import AutoConfig, AutoModelForCausalLM

        folder = local_path(folder)
        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            files = _weight_files(folder)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
            named = dict(model.named_modules())
            place = next((name for name in NORMS if name in named), None)
            output = next(name for name, module in named.items() if module is model.get_output_embeddings())
            source = next(name for name, module in named.items() if module is model.get_input_embeddings())
            wanted = {f"{place}.{name}": (place, name) for name, _ in named[str(place)].named_parameters()}
            stored = [name for name in (output, *OUTPUTS) if f"{name}.weight" in files]
            if not stored and config.get_text_config().tie_word_embeddings:
                stored = [source]  # tied weights are stored only once
            unembedding = stored[0]
            loaded: dict[str, torch.Tensor] = {}
            for name in [*wanted, f"{unembedding}.weight", f"{output}.bias"]:
                if name in files:
                    with safe_open(files[name], framework="pt") as file:
                        loaded[name] = file.get_tensor(name)
            norm = named[str(place)].to_empty(device="cpu")
            norm.load_state_dict({short: loaded[name] for name, (_, short) in wanted.items()})
            whole = model.get_output_embeddings()
            whole.weight = torch.nn.Parameter(loaded[f"{unembedding}.weight"], requires_grad=False)
            if f"{output}.bias" in loaded:
                whole.bias = torch.nn.Parameter(loaded[f"{output}.bias"], requires_grad=False)
            return cls.of(model)
        except (OSError, LookupError, StopIteration, ValueError) as error:
            raise AnalysisError(
                "the head of the model cannot be loaded",
                where=str(folder),
                expected="a checkpoint folder of a causal language model, with safetensors",
                found=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
                remedy="give its folder, or a head made with lens.Head.of(model)",
            ) from error

    def log_probabilities(self, residual: np.ndarray) -> torch.Tensor:
        """Return log-probabilities, float64 (rows, vocabulary), of residuals (rows, hidden).

        Logits are float32, as in the model.
        """
        import torch
        from torch.nn import functional

        with torch.inference_mode():
            hidden = self.norm(torch.from_numpy(np.ascontiguousarray(residual, np.float32)))
            logits = hidden.new_empty(len(hidden), len(self.weight))
            for start in range(0, len(self.weight), CHUNK):
                part = slice(start, start + CHUNK)
                bias = None if self.bias is None else self.bias[part]
                logits[:, part] = functional.linear(hidden, self.weight[part], bias)
            if self.scale != 1.0:
                logits *= self.scale
            if self.softcap:
                logits = self.softcap * torch.tanh(logits / self.softcap)
            return torch.log_softmax(logits, dim=-1, dtype=torch.float64)


@accept_store_path
def compute(
    store: Store,
    head: Head | str | Path | None = None,
    *,
    site: str = "resid_post",
    rows: int = ROWS,
    seed: int = 0,
    layers: Layers = "all",
    **where: Any,
) -> xr.Dataset:
    """Return the predictions after each layer (nostalgebraist 2020), compared with those of the last layer.

    ::

        found = lens.compute(store, "path/to/model", rows=2048)
        found["agreement"], found["loss"]

    Parameters
    ----------
    head
        A `Head` or a checkpoint folder; by default that of the model of the store.
    rows
        Approximate number of rows, whole documents of a seeded sample. Logits are computed for a few rows at a time.
    layers
        Layers to read; the others are compared with the last of them.
    where
        scheduler, workers and progress; see `analysis.statistics.onepass.read`.

    Returns
    -------
    Dataset
        See `of_rows`.

    Raises
    ------
    AnalysisError
        *head* is neither a head nor a path; no head is found; its hidden size does not fit the site; or the rows of the
        store are means of documents.
    """
    statistic = Rows(rows, DocumentSample.of_rows(rows, store.n_rows, seed))
    head = chosen_head(store, head, site)
    found = read(store, site, {"rows": statistic}, layers=layers, **where)
    values = {int(layer or 0): found.states[layer]["rows"]["values"] for layer in found.layers}
    return of_rows(store, head, values, found.states[found.layers[0]]["rows"]["row"])


def chosen_head(store: Store, head: Head | str | Path | None, site: str) -> Head:
    """Return the head to use; raise AnalysisError if there is none or it does not fit the site."""
    if store.spec.rows == "mean":
        raise AnalysisError("means of documents predict no token", where=str(store.path), expected="rows of tokens")
    if head is not None and not isinstance(head, Head | str | bytes | os.PathLike):
        raise AnalysisError(
            "a logit lens cannot use this as a head",
            expected="a lens.Head, or the path of a checkpoint folder",
            found=type(head).__name__,
            remedy="write lens.Head.of(model) for a loaded model",
        )
    if not isinstance(head, Head):
        place = local_path(head or store.provenance.model_name or ".")
        if not place.is_dir():
            raise AnalysisError(
                "the model's final norm and unembedding are needed",
                where=str(place),
                expected="the checkpoint folder",
                found="no folder",
                remedy="give the folder as model=, or lens.Head.of(model)",
            )
        head = Head.load(place)
    if site not in store.arrays or head.weight.shape[1] != store.arrays[site].features:
        raise AnalysisError(
            "the head does not fit the site",
            where=site,
            expected=f"{head.weight.shape[1]} features",
            found=str(store.arrays[site].features if site in store.arrays else "no such site"),
        )
    return head


def of_rows(store: Store, head: Head, values: Mapping[int, np.ndarray], rows: np.ndarray) -> xr.Dataset:
    """Return the logit lens of given rows of several layers.

    ::

        values = {layer: store.read("resid_post", layer, rows) for layer in (0, 12, 29)}
        lens.of_rows(store, head, values, rows)["kl_mean"]

    ``kl`` (layer, row): KL divergence of the layer's prediction from the final one in nats, Σ p_last (log p_last −
    log p_layer); 0 at the last layer and never negative. ``entropy`` (layer, row), in nats. ``rank`` (layer, row):
    number of tokens that are more probable than the next token of the document; ``log_probability`` (layer, row) of
    that token; -1 and NaN at the end of a document. ``agrees`` (layer, row): True if the most probable token is that
    of the last layer. Over rows without first tokens: ``kl_mean``, ``entropy_mean``, ``agreement``, ``rank_median``,
    ``loss`` (layer). Logits are float32; everything else is computed in float64.
    """
    import torch

    from analysis.statistics.divergence import entropy, kl_divergence

    layers = sorted(values)
    target, position = next_tokens(store, rows)
    shape = (len(layers), len(rows))
    data = {name: np.full(shape, np.nan) for name in ("kl", "entropy", "log_probability")}
    rank, agrees = np.full(shape, -1, np.int64), np.zeros(shape, bool)
    step = max(1, LOGIT_BYTES // (8 * len(head.weight)))
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        final = head.log_probabilities(values[layers[-1]][part])
        with torch.inference_mode():
            best = final.argmax(1)
            known = torch.from_numpy(np.flatnonzero(target[part] >= 0))
            wanted = torch.from_numpy(target[part])[known].long()
            at = known.numpy() + start
            for i, layer in enumerate(layers):
                guess = final if layer == layers[-1] else head.log_probabilities(values[layer][part])
                data["kl"][i, part] = kl_divergence(final, guess)
                data["entropy"][i, part] = entropy(guess)
                agrees[i, part] = guess.argmax(1) == best
                own = guess[known, wanted]
                data["log_probability"][i, at] = own
                rank[i, at] = (guess[known] > own[:, None]).sum(1)
    inner = position > 0 if (position > 0).any() else np.ones(len(rows), bool)
    scored = inner & (target >= 0)
    dims, many = ("layer", "row"), scored.any()
    return xr.Dataset(
        {
            **{name: (dims, found) for name, found in data.items()},
            "rank": (dims, rank),
            "agrees": (dims, agrees),
            "kl_mean": ("layer", data["kl"][:, inner].mean(1)),
            "entropy_mean": ("layer", data["entropy"][:, inner].mean(1)),
            "agreement": ("layer", agrees[:, inner].mean(1)),
            "rank_median": ("layer", np.median(rank[:, scored], axis=1) if many else np.full(len(layers), np.nan)),
            "loss": ("layer", -data["log_probability"][:, scored].mean(1) if many else np.full(len(layers), np.nan)),
        },
        {"layer": layers, "row": rows, "position": ("row", position)},
        {"n": int(inner.sum())},
    )


def next_tokens(store: Store, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the next token of each row in its document, -1 if there is none, and the position of each row."""
    about = {name: np.asarray(variable.values) for name, variable in store.coordinates.items()}
    position, document = about["position"][rows].astype(np.int64), about["document"][rows]
    after = np.minimum(rows + 1, store.n_rows - 1)
    follows = (about["document"][after] == document) & (about["position"][after] == position + 1)
    return np.where(follows, about["token_id"][after], -1).astype(np.int64), position


def _norm_beside_blocks(model: Any) -> Any:
    """Return the last norm of a model, found by its place next to the blocks; None without one."""
    from flexcache.errors import SiteError
    from flexcache.hooks import find_hook_points
    from flexcache.hooks.locate.names import modules_by_path
    from flexcache.site import Site

    try:
        return modules_by_path(model)[find_hook_points(model, Site("final_norm"))[0].module]
    except SiteError:
        return None


def _weight_files(folder: Path) -> dict[str, Path]:
    """Return the safetensors file of each weight."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return {name: folder / file for name, file in json.loads(index.read_text("utf-8"))["weight_map"].items()}
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return dict.fromkeys(file.keys(), folder / "model.safetensors")

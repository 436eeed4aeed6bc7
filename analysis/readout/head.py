"""Final norm and unembedding of a model, which turn a residual into logits; nothing else of the model is loaded."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from flexcache.errors import AnalysisError
from flexcache.model import ModelSource
from flexcache.model.adapters import CONFIG_FILE
from flexcache.paths import local_path

if TYPE_CHECKING:
    import torch

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
        if hasattr(output, "adapter_layer_names"):
            raise AnalysisError(
                "the unembedding of the model has an adapter",
                where=type(model).__name__,
                expected="a model whose adapter leaves the unembedding as it is, or is merged",
                remedy="merge it: flexcache.ModelSource(name=…, merge=True).load(), or merge_and_unload() of peft",
            )
        norm = next((named[name] for name in NORMS if name in named), None) or _norm_after_blocks(model)
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
            copy.deepcopy(norm).float().cpu().eval(),
            output.weight.detach().float().cpu(),
            None if bias is None else bias.detach().float().cpu(),
            scale,
            getattr(config, "final_logit_softcapping", None),
        )

    @classmethod
    def load(cls, folder: str | Path) -> Head:
        """Load the head of a checkpoint folder; only the norm and the unembedding are read from its safetensors.

        Of a PEFT adapter, the whole base model is loaded, and the adapter merged into it.

        Raises
        ------
        AnalysisError
            The folder has no such weights.
        """
        import torch
        from safetensors import safe_open
        from transformers import AutoConfig, AutoModelForCausalLM

        folder = local_path(folder)
        if (folder / CONFIG_FILE).is_file():
            return cls.of(ModelSource(name=str(folder), merge=True, loader="AutoModelForCausalLM").load())
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

    def normalize(self, residual: np.ndarray) -> np.ndarray:
        """Return residuals after the final norm, float32, shape (rows, hidden)."""
        import torch

        with torch.inference_mode():
            return np.asarray(self.norm(torch.from_numpy(np.ascontiguousarray(residual, np.float32))).float())

    def logits(self, hidden: np.ndarray, tokens: slice = slice(None)) -> np.ndarray:
        """Return logits of some tokens, float32 (rows, tokens), from residuals after the final norm."""
        bias = None if self.bias is None else self.bias[tokens].numpy()
        return self._scale(hidden @ self.weight[tokens].numpy().T, bias)

    def token_logits(self, hidden: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Return the logit of one token for each row, float32 (rows,)."""
        bias = None if self.bias is None else self.bias.numpy()[tokens]
        return self._scale(np.einsum("rh,rh->r", hidden, self.weight.numpy()[tokens]), bias)

    def log_probabilities(self, residual: np.ndarray) -> torch.Tensor:
        """Return log-probabilities, float64 (rows, vocabulary), of residuals (rows, hidden).

        Logits are float32, as in the model.
        """
        import torch

        logits = torch.from_numpy(self.logits(self.normalize(residual)))
        return torch.log_softmax(logits, dim=-1, dtype=torch.float64)

    def identity(self) -> dict[str, Any]:
        """Return digests of all that makes the logits, by which saved results are told apart.

        The norm is represented by its outputs on fixed inputs of three magnitudes, so that its weights and its epsilon
        count, whatever function it is.

        >>> import torch
        >>> one, other = (Head(norm, torch.eye(3)).identity() for norm in (torch.nn.Identity(), torch.nn.Tanh()))
        >>> one == other, one["weight"] == other["weight"]
        (False, True)
        """
        inputs = np.random.default_rng(0).normal(size=(3, self.weight.shape[1])) * [[1e-3], [1.0], [1e3]]
        return {
            "norm": _digest(self.normalize(inputs)),
            "weight": _digest(self.weight.numpy()),
            "bias": None if self.bias is None else _digest(self.bias.numpy()),
            "scale": self.scale,
            "softcap": self.softcap,
        }

    def _scale(self, logits: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
        if bias is not None:
            logits += bias
        if self.scale != 1.0:
            logits *= np.float32(self.scale)
        if self.softcap:
            logits = np.float32(self.softcap) * np.tanh(logits / np.float32(self.softcap))
        return logits


def _digest(values: np.ndarray) -> str:
    return f"{values.shape} {xxhash.xxh3_128_hexdigest(values.tobytes())}"


def _norm_after_blocks(model: Any) -> Any:
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

"""Models by name: loading through the transformers auto classes."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from flexcache.errors import ConfigError
from flexcache.parallel.launch import launch
from flexcache.spec import AnyDType
from flexcache.store.storage.backend import digest
from flexcache.validation import Options

if TYPE_CHECKING:
    import torch

WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")
VISION_PARTS = ("vision_model", "vision_tower", "vision_encoder", "visual")
"""Attribute names of the vision tower in multimodal models."""


def _expanded(name: Any) -> Any:
    """Return a model's name as text; ``~`` is the home folder."""
    return os.path.expanduser(name) if isinstance(name, str | os.PathLike) else name


class Parallel(Options):
    """The numbers of processes over which transformers distributes one model.

    If the launcher started more processes, they hold copies of the model.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tensor: int = Field(1, ge=1, description="processes that share each weight, by the model's tensor-parallel plan")
    fsdp: int = Field(1, ge=1, description="processes that shard the weights and gather them block by block (FSDP2)")
    pipeline: int = Field(1, ge=1, description="processes that each hold some of the blocks")

    def config(self) -> Any:
        """Return the configuration with which transformers loads a distributed model, or None if it is not distributed.

        Raises
        ------
        ConfigError
            The launcher started a number of processes that does not fit, or transformers cannot combine the sizes.
        """
        size, world = self.tensor * self.fsdp * self.pipeline, launch().world
        if size == 1:
            return None
        if world % size or (self.pipeline > 1 and world > size):
            raise ConfigError(
                f"model.parallel does not fit the {world} process{'es' if world > 1 else ''} of the launcher",
                expected=f"tensor {self.tensor} · fsdp {self.fsdp} · pipeline {self.pipeline} = {size} processes"
                + ("" if self.pipeline > 1 else ", or a multiple"),
                found=str(world),
                remedy=f"use torchrun --nproc-per-node {size}; several such launchers may fill one store",
            )
        from transformers.distributed.configuration_utils import DistributedConfig

        try:
            return DistributedConfig(
                tp_size=self.tensor, fsdp_size=self.fsdp, pp_size=self.pipeline, dp_replicate_size=world // size
            )
        except ValueError as error:
            raise ConfigError("transformers cannot combine these parallel sizes", found=str(error)) from error


class ModelSource(Options):
    """A Hugging Face model, as a folder or a hub name, and how to load it.

    >>> source = ModelSource(name="openai-community/gpt2", dtype="bfloat16")
    >>> source.revision is None, source.parallel.tensor
    (True, 1)
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    name: Annotated[str, BeforeValidator(_expanded)] = Field(description="a local folder, or a name on the hub")
    revision: str | None = Field(None, description="revision of a model on the hub")
    loader: Literal["auto", "AutoModel", "AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForSeq2SeqLM"] = (
        Field("auto", description="the auto class of transformers that loads the model")
    )
    side: Literal["encoder", "decoder", "vision"] | None = Field(
        None,
        description="part of the model: the encoder or decoder of an encoder-decoder, or the vision tower of a"
        " multimodal model (CLIP)",
    )
    dtype: Annotated[Literal["auto", "float32", "bfloat16", "float16"], AnyDType] = Field(
        "auto", description="dtype of the weights; auto is that of the checkpoint"
    )
    attention: Literal["eager", "sdpa", "flash_attention_2", "flex_attention"] | None = Field(
        None, description="implementation of attention; that of transformers by default"
    )
    device: str = Field("auto", description="device of the model, such as cuda:0; auto takes a GPU if there is one")
    parallel: Parallel = Field(Parallel(), description="processes over which transformers spreads the model")
    gguf_file: str | None = Field(None, description="name of a GGUF file in the folder or repository")
    trust_remote_code: bool = Field(False, description="run code that comes with the model")

    @model_validator(mode="after")
    def _on_one_process(self) -> Self:
        if self.side == "decoder" and self.parallel != Parallel():
            raise ConfigError(
                "a decoder with its encoder cannot be captured from a distributed model",
                where="model.parallel",
                expected="no parallel with side: decoder",
                found=f"tensor {self.parallel.tensor} · fsdp {self.parallel.fsdp} · pipeline {self.parallel.pipeline}",
                remedy="leave parallel out; several processes, each with the whole model, may fill one store",
            )
        return self

    def config(self) -> Any:
        """Return the model's configuration, without reading weights."""
        from transformers import AutoConfig

        with _translated(self.name):
            return AutoConfig.from_pretrained(self.name, **self._where(), **self._gguf())

    def load(self) -> torch.nn.Module:
        """Return the model with its weights, in evaluation mode, on its device."""
        options: dict[str, Any] = {**self._where(), **self._gguf(), "dtype": self.dtype}
        if self.attention:
            options["attn_implementation"] = self.attention
        distributed = self.parallel.config()
        if distributed is not None:
            options["distributed_config"] = distributed
        with _translated(self.name):
            model = self._select_side(self._auto_class().from_pretrained(self.name, **options))
        return (model if distributed is not None else model.to(self._device())).eval()

    def skeleton(self) -> torch.nn.Module:
        """Return the model on the meta device: modules and shapes, without weights."""
        import torch

        config = self.config()
        with torch.device("meta"):
            options: dict[str, Any] = {} if self.dtype == "auto" else {"dtype": getattr(torch, self.dtype)}
            if self.attention:
                options["attn_implementation"] = self.attention
            return self._select_side(self._auto_class().from_config(copy.deepcopy(config), **options)).eval()

    def _select_side(self, model: torch.nn.Module) -> torch.nn.Module:
        """Return the encoder or the vision tower of a model, if it is selected.

        If the decoder is selected, the whole model is returned.

        Raises
        ------
        ConfigError
            The model has no such part.
        """
        if self.side is None:
            return model
        if self.side == "vision":
            return self._vision_tower(model)
        if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise ConfigError(
                f"model {self.name} is not an encoder-decoder",
                found=type(model).__name__,
                remedy="leave side out of the configuration",
            )
        if self.side == "decoder":
            return model
        encoder: torch.nn.Module = model.get_encoder()  # type: ignore[operator]
        return encoder

    def _vision_tower(self, model: torch.nn.Module) -> torch.nn.Module:
        holders = (model, getattr(model, "base_model", model))
        found = [getattr(holder, name) for name in VISION_PARTS for holder in holders if hasattr(holder, name)]
        if not found:
            raise ConfigError(
                f"model {self.name} has no vision tower",
                found=type(model).__name__,
                remedy="leave side out: a vision transformer is captured as it is",
            )
        part: torch.nn.Module = found[0]
        return part

    def processor(self) -> Any:
        """Return the model's image processor on Pillow and numpy, which gives equal results on every machine.

        Raises
        ------
        ConfigError
            The checkpoint has none.
        """
        import transformers

        modern = int(transformers.__version__.partition(".")[0]) >= 5
        kind: dict[str, Any] = {"backend": "pil"} if modern else {"use_fast": False}
        try:
            return transformers.AutoImageProcessor.from_pretrained(self.name, **self._where(), **kind)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ConfigError(
                f"the image processor of {self.name} cannot be loaded",
                expected="preprocessor_config.json in the checkpoint, of a processor that works with Pillow",
                found=f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}",
                remedy="copy that file from the checkpoint, or save one: processor.save_pretrained(folder)",
            ) from error

    def tokenizer(self) -> Any:
        """Return the model's tokenizer."""
        from transformers import AutoTokenizer

        with _translated(self.name):
            return AutoTokenizer.from_pretrained(self.name, **self._where(), **self._gguf())

    def weights(self) -> dict[str, str]:
        """Return the XXH3-128 of each weight file of the checkpoint, by file name."""
        folder = Path(self.name)
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            with _translated(self.name):
                folder = Path(snapshot_download(self.name, revision=self.revision, local_files_only=True))
        patterns = [self.gguf_file] if self.gguf_file else WEIGHTS
        return {path.name: digest(path) for pattern in patterns for path in sorted(folder.glob(pattern))}

    def _where(self) -> dict[str, Any]:
        return {"revision": self.revision or "main", "trust_remote_code": self.trust_remote_code}

    def _gguf(self) -> dict[str, Any]:
        return {"gguf_file": self.gguf_file} if self.gguf_file else {}

    def _auto_class(self) -> Any:
        import transformers

        if self.loader != "auto":
            return getattr(transformers, self.loader)
        if self.side == "decoder":
            return transformers.AutoModelForSeq2SeqLM
        architectures = getattr(self.config(), "architectures", None) or []
        causal = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures) or self.gguf_file
        return transformers.AutoModelForCausalLM if causal else transformers.AutoModel

    def _device(self) -> str:
        import torch

        if self.device != "auto":
            return self.device
        count = torch.cuda.device_count()
        return f"cuda:{launch().local_rank % count}" if count else "cpu"


def _cached(name: str, file: str) -> Path | None:
    """Return a file of a hub model that is in the cache, or None."""
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(name, file)
    except ValueError:  # not a name on the hub
        return None
    return Path(found) if isinstance(found, str) else None


def _check_adapter(name: str, folder: Path) -> None:
    """Raise ConfigError if a folder holds a PEFT adapter, which is not a model without its base."""
    try:
        said = json.loads((folder / "adapter_config.json").read_bytes())
    except (OSError, ValueError):
        return
    base = said.get("base_model_name_or_path") if isinstance(said, dict) else None
    raise ConfigError(
        f"model {name} is a PEFT adapter of base model {base or 'unknown'}",
        where=str(folder / "adapter_config.json"),
        expected="the folder or the name of a whole model",
        remedy="merge the adapter into its base with merge_and_unload() of peft, and save that; or load it in Python"
        " with peft, and call flexcache.capture with the model",
    )


@contextmanager
def _translated(name: str) -> Iterator[None]:
    _check_adapter(name, Path(name))
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError) as error:
        if (cached := _cached(name, "adapter_config.json")) is not None:
            _check_adapter(name, cached.parent)
        raise ConfigError(
            f"model {name} cannot be loaded",
            found=f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}",
            remedy="check the name, the revision and the folder; without a network only local folders and cached"
            " models can be loaded",
        ) from error

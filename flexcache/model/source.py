"""Models by name: loading through the transformers auto classes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from flexcache.errors import ConfigError
from flexcache.model.adapters import (
    RECORD,
    AdapterSource,
    adapter_list,
    check_variant_names,
    copy_model,
    describe_adapter,
    expanded,
    load_adapters,
    read_adapter_config,
    resolve_base,
    written_tensors,
)
from flexcache.model.loading import WeightOptions, keep_4bit_layout, moves_scales, translate_failures
from flexcache.parallel.sizes import Parallel
from flexcache.spec import AnyDType
from flexcache.store.storage.backend import digest

if TYPE_CHECKING:
    import torch

WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")
VISION_PARTS = ("vision_model", "vision_tower", "vision_encoder", "visual")
"""Attribute names of the vision tower in multimodal models."""


ADAPTERS_SCHEMA = {"anyOf": [{"type": "string"}, {"type": "object"}, {"type": "array"}]}
Adapters = Annotated[tuple[AdapterSource, ...], BeforeValidator(adapter_list), WithJsonSchema(ADAPTERS_SCHEMA)]


class ModelSource(WeightOptions):
    """A Hugging Face model, as a folder or a hub name, and how to load it.

    The name can be that of a PEFT adapter, which names its base model; or *adapter* is loaded into the model *name*.

    >>> source = ModelSource(name="openai-community/gpt2", dtype="bfloat16")
    >>> source.revision is None, source.parallel.tensor
    (True, 1)
    >>> [one.weight for one in ModelSource(adapter=["runs/french", {"path": "runs/polite", "weight": 0.3}]).adapter]
    [1.0, 0.3]
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    name: Annotated[str, BeforeValidator(expanded)] = Field(
        "", description="a local folder, or a name on the hub; by default the base model of the adapter"
    )
    revision: str | None = Field(None, description="revision of a model on the hub")
    adapter: Adapters = Field(
        (), description="PEFT adapter of the model, as a folder or a hub name; or several with weights, which add up"
    )
    adapters: dict[str, Adapters] | None = Field(
        None, description="variants by name, captured side by side: each an adapter, several, or null for the base"
    )
    merge: bool = Field(False, description="merge adapters into the weights, as PEFT's merge_and_unload does")
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
    gguf_file: str | None = Field(None, description="name of a GGUF file in the folder or repository")
    trust_remote_code: bool = Field(False, description="run code that comes with the model")

    @model_validator(mode="after")
    def _check_adapter(self) -> Self:
        if self.adapters is not None:
            self._check_variants(self.adapters)
        elif not self.name and not self.adapter:
            raise ConfigError("the model has no name", expected="name, adapter, or both", where="model")
        if (self.adapter or self.adapters) and self.parallel != Parallel():
            raise ConfigError(
                "an adapter cannot be loaded into a model that several processes share",
                where="model.parallel",
                expected="no parallel with adapter",
                remedy="leave parallel out; several processes, each with the whole model, may fill one store",
            )
        if self.merge and self.quantization is not None:
            raise ConfigError(
                "an adapter cannot be merged into quantized weights, which would round it",
                where="model.merge",
                remedy="leave merge out, or merge it without quantization",
            )
        return self

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

    def _check_variants(self, adapters: dict[str, tuple[AdapterSource, ...]]) -> None:
        check_variant_names(adapters)
        if self.adapter:
            raise ConfigError(
                "a model has one adapter, or several variants",
                where="model",
                expected="adapter or adapters",
                remedy="write model: {adapters: {base: null, NAME: FOLDER}}",
            )
        if not self.name and not any(adapters.values()):
            raise ConfigError("the model has no name", expected="name, or a variant with an adapter", where="model")

    def variants(self) -> dict[str, Self]:
        """Return a source for each of the variants in *adapters*, all with one base model."""
        adapters = self.adapters or {}
        first = next((adapter for adapter in adapters.values() if adapter), ())
        base = self.model_copy(update={"adapters": None, "adapter": first}).resolved()
        return {name: base.model_copy(update={"adapter": adapter}) for name, adapter in adapters.items()}

    def resolved(self) -> Self:
        """Return the source with the name of the base model, if an adapter is given in its place.

        With variants, it is the source of the base model.

        Raises
        ------
        ConfigError
            The base model is not named, or is an adapter itself.
        """
        if self.adapters is not None:
            return next(iter(self.variants().values())).model_copy(update={"adapter": ()})
        name, revision, adapter = resolve_base(self.name, self.revision, self.adapter)
        return self.model_copy(update={"name": name, "revision": revision, "adapter": adapter})

    def config(self) -> Any:
        """Return the model's configuration, without reading weights."""
        from transformers import AutoConfig

        base = self.resolved()
        with base._translated():
            return AutoConfig.from_pretrained(base.name, **base._where(), **base._gguf())

    def load(self) -> torch.nn.Module:
        """Return the model with its weights, in evaluation mode, on its device."""
        if self.adapters is not None:
            raise ConfigError(
                "the model has several variants",
                where="model.adapters",
                found=", ".join(self.adapters),
                remedy="name the adapter of one: model: {name: …, adapter: …}; flexcache.capture_variants takes all",
            )
        base = self.resolved()
        options: dict[str, Any] = {**base._where(), **base._gguf(), "dtype": base.dtype}
        options |= base.weight_options(base.config())
        if base.attention:
            options["attn_implementation"] = base.attention
        distributed = base.parallel.config()
        if distributed is not None:
            options["distributed_config"] = distributed
        with base._translated(), translate_failures(base.quantization):
            model = base._auto_class().from_pretrained(base.name, **options)
        keep_4bit_layout(model)
        if distributed is None and "device_map" not in options:
            model = model.to(base.find_device())
        return base._adapted(model)

    def load_variants(self) -> dict[str, torch.nn.Module]:
        """Return the model of each variant; those that are not merged share the memory of the base model's weights.

        Tensors of the base that an adapter changes are copied for it.
        """
        variants = self.variants()
        base = self.resolved().model_copy(update={"side": None}).load()
        whole = self.merge or moves_scales(base)
        models = {
            name: copy_model(base, whole, written_tensors(base, source.adapter)) if source.adapter else base
            for name, source in variants.items()
        }
        before = _states(base)
        loaded = {name: source._adapted(models[name]) for name, source in variants.items()}
        if before != _states(base):
            raise ConfigError(
                "an adapter changes the weights that the variants share",
                where="model.adapters",
                found=", ".join(str(one.path) for source in variants.values() for one in source.adapter),
                remedy="capture each variant by itself: model: {adapter: FOLDER}; or set merge: true",
            )
        return loaded

    def _adapted(self, model: torch.nn.Module) -> torch.nn.Module:
        """Return a base model with the adapters of this source, or the side of it that is selected."""
        placed = self.device_map is not None or getattr(model, "hf_quantizer", None) is not None
        device = None if placed else next((parameter.device for parameter in model.parameters()), None)
        if self.adapter:
            model = load_adapters(model, self.adapter, self.merge)
        model = self._select_side(model).eval()
        if self.adapter:
            setattr(model, RECORD, [describe_adapter(adapter, self.merge) for adapter in self.adapter])
        return model if not self.adapter or device is None else model.to(device)

    def skeleton(self) -> torch.nn.Module:
        """Return the model on the meta device: modules and shapes, without weights."""
        import torch

        base = self.resolved()
        config = base.config()
        with torch.device("meta"):
            options: dict[str, Any] = {} if base.dtype == "auto" else {"dtype": getattr(torch, base.dtype)}
            if base.attention:
                options["attn_implementation"] = base.attention
            model = base._auto_class().from_config(copy.deepcopy(config), **options)
            if base.adapter:
                model = load_adapters(model, base.adapter, base.merge, weights=False)
            return base._select_side(model).eval()

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

        base = self.resolved()
        modern = int(transformers.__version__.partition(".")[0]) >= 5
        kind: dict[str, Any] = {"backend": "pil"} if modern else {"use_fast": False}
        try:
            return transformers.AutoImageProcessor.from_pretrained(base.name, **base._where(), **kind)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ConfigError(
                f"the image processor of {self.name} cannot be loaded",
                expected="preprocessor_config.json in the checkpoint, of a processor that works with Pillow",
                found=f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}",
                remedy="copy that file from the checkpoint, or save one: processor.save_pretrained(folder)",
            ) from error

    def tokenizer(self) -> Any:
        """Return the model's tokenizer: that of its adapter, if there is one adapter and it comes with a tokenizer."""
        from transformers import AutoTokenizer

        base = self.resolved()
        if len(base.adapter) == 1:
            found = read_adapter_config(base.adapter[0].path, base.adapter[0].revision)
            if found is not None and (found[0] / "tokenizer_config.json").is_file():
                base = base.model_copy(update={"name": str(found[0]), "revision": None, "gguf_file": None})
        with base._translated():
            return AutoTokenizer.from_pretrained(base.name, **base._where(), **base._gguf())

    def weights(self) -> dict[str, str]:
        """Return the XXH3-128 of each weight file of the checkpoint, by file name; of an adapter, those of its base."""
        base = self.resolved()
        folder = Path(base.name)
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            with base._translated():
                folder = Path(snapshot_download(base.name, revision=base.revision, local_files_only=True))
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

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, KeyError, ImportError) as error:
            of = self.adapter[0].path if self.adapter else ""
            raise ConfigError(
                f"model {of} is a PEFT adapter of base model {self.name}, which cannot be loaded"
                if of
                else f"model {self.name} cannot be loaded",
                found=f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}",
                remedy="check the name, the revision and the folder; without a network only local folders and cached"
                " models can be loaded"
                + (f"; name another base: model: {{name: FOLDER, adapter: {of}}}" if of else ""),
            ) from error


def _states(model: torch.nn.Module) -> list[tuple[int, int]]:
    """Return version and address of each plain tensor of a model; a write changes one of them."""
    import torch

    plain = [one for one in (*model.parameters(), *model.buffers()) if type(one.data) is torch.Tensor]
    return [(one._version, one.data_ptr()) for one in plain if not one.is_inference()]

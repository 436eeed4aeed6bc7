"""Models by name: loading through the transformers auto classes, and saying what a model is."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import xxhash
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
"""Under which models that see and read have the part that sees."""


CHAT_TEMPLATE = "chat_template_xxh3_128"


def _expanded(name: Any) -> Any:
    """Return a model's name as text; ``~`` is the home folder."""
    return os.path.expanduser(name) if isinstance(name, str | os.PathLike) else name


class Parallel(Options):
    """Over how many processes transformers spreads one model; all those of a launcher are used, as copies of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tensor: int = Field(1, ge=1, description="processes that share every weight, by the model's tensor-parallel plan")
    fsdp: int = Field(1, ge=1, description="processes that share the weights, and gather them block by block (FSDP2)")
    pipeline: int = Field(1, ge=1, description="processes that have a part of the blocks each")

    def config(self) -> Any:
        """Return what transformers loads a distributed model by, or None where it is not distributed.

        Raises
        ------
        ConfigError
            The launcher did not start as many processes, or transformers cannot combine these.
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
                remedy=f"torchrun --nproc-per-node {size}; several such launchers may fill one store",
            )
        from transformers.distributed.configuration_utils import DistributedConfig

        try:
            return DistributedConfig(
                tp_size=self.tensor, fsdp_size=self.fsdp, pp_size=self.pipeline, dp_replicate_size=world // size
            )
        except ValueError as error:
            raise ConfigError("transformers cannot distribute a model so", found=str(error)) from error


class ModelSource(Options):
    """A Hugging Face model, as a folder or a hub name, and how to load it."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    name: Annotated[str, BeforeValidator(_expanded)] = Field(description="a local folder, or a name on the hub")
    revision: str | None = Field(None, description="revision of a model on the hub")
    loader: Literal["auto", "AutoModel", "AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForSeq2SeqLM"] = (
        Field("auto", description="the auto class of transformers that loads the model")
    )
    side: Literal["encoder", "decoder", "vision"] | None = Field(
        None,
        description="the part that is meant: of a model with an encoder and a decoder, one of them; of one that sees"
        " and reads (CLIP), the part that sees",
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
                "a decoder is captured beside its encoder by processes that each have the whole model",
                where="model.parallel",
                expected="no parallel with side: decoder",
                found=f"tensor {self.parallel.tensor} · fsdp {self.parallel.fsdp} · pipeline {self.parallel.pipeline}",
                remedy="leave parallel out; several processes may fill one store side by side",
            )
        return self

    def config(self) -> Any:
        """Return the model's configuration; no weights are read."""
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
            model = self._one_side(self._auto_class().from_pretrained(self.name, **options))
        return (model if distributed is not None else model.to(self._device())).eval()

    def skeleton(self) -> torch.nn.Module:
        """Return the model on the meta device: modules and shapes, without weights."""
        import torch

        config = self.config()
        with torch.device("meta"):
            options: dict[str, Any] = {} if self.dtype == "auto" else {"dtype": getattr(torch, self.dtype)}
            if self.attention:
                options["attn_implementation"] = self.attention
            return self._one_side(self._auto_class().from_config(copy.deepcopy(config), **options)).eval()

    def _one_side(self, model: torch.nn.Module) -> torch.nn.Module:
        """Return the encoder of a model, or the part that sees, where that is asked for.

        For the decoder it is the whole, in which that is read.

        Raises
        ------
        ConfigError
            The model has no such part.
        """
        if self.side is None:
            return model
        if self.side == "vision":
            return self._seeing(model)
        if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise ConfigError(
                f"model {self.name} has no encoder beside a decoder",
                found=type(model).__name__,
                remedy="leave side out of the configuration",
            )
        if self.side == "decoder":
            return model
        encoder: torch.nn.Module = model.get_encoder()  # type: ignore[operator]
        return encoder

    def _seeing(self, model: torch.nn.Module) -> torch.nn.Module:
        holders = (model, getattr(model, "base_model", model))
        found = [getattr(holder, name) for name in VISION_PARTS for holder in holders if hasattr(holder, name)]
        if not found:
            raise ConfigError(
                f"model {self.name} has no part that sees",
                found=type(model).__name__,
                remedy="leave side out: a vision transformer is captured as it is",
            )
        part: torch.nn.Module = found[0]
        return part

    def processor(self) -> Any:
        """Return the model's image processor: the one that works with Pillow and numpy, the same on every machine.

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
                expected="preprocessor_config.json beside the weights, of a processor that works with Pillow",
                found=f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}",
                remedy="copy that file from the checkpoint, or save one: processor.save_pretrained(folder)",
            ) from error

    def tokenizer(self) -> Any:
        """Return the model's tokenizer."""
        from transformers import AutoTokenizer

        with _translated(self.name):
            return AutoTokenizer.from_pretrained(self.name, **self._where(), **self._gguf())

    def weights(self) -> dict[str, str]:
        """Return the XXH3-128 of each of the checkpoint's weight files, by file name."""
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
    """Return a file of a model on the hub that was loaded before, or None."""
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(name, file)
    except ValueError:  # not a name on the hub
        return None
    return Path(found) if isinstance(found, str) else None


def _refuse_adapter(name: str, folder: Path) -> None:
    """Raise ConfigError if a folder holds an adapter of PEFT, which is no model without its base."""
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
    _refuse_adapter(name, Path(name))
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError) as error:
        if (cached := _cached(name, "adapter_config.json")) is not None:
            _refuse_adapter(name, cached.parent)
        raise ConfigError(
            f"model {name} cannot be loaded",
            found=f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}",
            remedy="check the name, the revision and the folder; without a network only local folders and cached"
            " models can be loaded",
        ) from error


def describe_tokenizer(tokenizer: Any, chat: bool = False) -> dict[str, Any]:
    """Return what a tokenizer is: its class and a digest of its whole state; and one of its template, for chats."""
    if chat:
        template = str(getattr(tokenizer, "chat_template", None))
        return {**describe_tokenizer(tokenizer), CHAT_TEMPLATE: xxhash.xxh3_128_hexdigest(template.encode())}
    if tokenizer is None:
        return {"class": None}
    if hasattr(tokenizer, "tokens_of"):  # flexcache.images.input.ImageInput
        described: dict[str, Any] = tokenizer.describe()
        return described
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # padding and truncation are settings of the last call, not of the tokenizer
        state = {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("padding", "truncation")}
        text = json.dumps(state, sort_keys=True)
    elif hasattr(tokenizer, "get_vocab"):
        text = json.dumps([tokenizer.get_vocab(), str(tokenizer.special_tokens_map)], sort_keys=True)
    else:
        return {"class": getattr(tokenizer, "__qualname__", type(tokenizer).__qualname__)}
    return {"class": type(tokenizer).__name__, "xxh3_128": xxhash.xxh3_128_hexdigest(text.encode())}


def longest_input(model: torch.nn.Module, tokenizer: Any) -> int | None:
    """Return how many tokens the model can read at once, or None where nothing says so, as of images."""
    from flexcache.hooks.locate.vision import reads_images

    if reads_images(model):
        return None
    config = getattr(model, "config", None)
    limits = [getattr(config, "max_position_embeddings", None), getattr(tokenizer, "model_max_length", None)]
    known = [int(limit) for limit in limits if isinstance(limit, int) and 0 < limit < 10**9]
    known += [limit for limit in positions(model) if limit is not None]
    return min(known, default=None)


POSITIONS = re.compile(r"(wpe|position_embeddings?|embed_positions?|positions_embed|pos_embed|pos_encoding)")
"""Names of modules and buffers that hold a row for each position."""
OTHER_INPUTS = ("vision", "visual", "image", "audio")


def positions(model: torch.nn.Module) -> tuple[int | None, int | None]:
    """Return how many positions a model, and the encoder of an encoder–decoder, has a table for; None without one.

    Rotary positions, relative ones and ALiBi are computed for any length, whatever the configuration says; only MPT's
    biases are made for a fixed one.
    """
    from flexcache.hooks.locate.encoder_decoder import is_encoder_decoder
    from flexcache.hooks.locate.names import unwrap
    from flexcache.hooks.locate.vision import reads_images

    root: Any = unwrap(model)
    if reads_images(root):
        return None, None
    if is_encoder_decoder(root) and hasattr(root, "get_encoder") and hasattr(root, "get_decoder"):
        return _table_of(root.get_decoder()), _table_of(root.get_encoder())
    return _table_of(root), None


def _table_of(part: torch.nn.Module) -> int | None:
    config: Any = getattr(part, "config", None)
    found = [int(config.max_seq_len)] if getattr(config, "model_type", None) == "mpt" else []
    for path, module in part.named_modules():
        if any(word in path for word in OTHER_INPUTS) or not POSITIONS.fullmatch(path.rpartition(".")[2]):
            continue
        count, padding = getattr(module, "num_embeddings", None), getattr(module, "padding_idx", None)
        if count is not None and path.endswith("position_embeddings") and padding is not None:
            found.append(int(count) - int(padding) - 1)  # RoBERTa counts positions from there
        elif count is not None:
            found.append(int(count) - int(getattr(module, "offset", 0)))
    for path, buffer in part.named_buffers():
        if POSITIONS.fullmatch(path.rpartition(".")[2]) and buffer.ndim > 1:
            found.append(int(buffer.shape[-2]))
    return min(found, default=None)


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode, and each back into its own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def native_bfloat16() -> bool:
    """Return whether torch multiplies matrices of bfloat16 on this processor by kernels made for it.

    They need AVX-512, AMX, or what ARM has for it; without them a forward is some 40 times slower than in float32.
    """
    import torch

    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):  # a build without oneDNN
        return False


def vocabulary(model: torch.nn.Module) -> int | None:
    """Return how many token ids the model's embedding has, or None where it has none that says so."""
    from flexcache.hooks.locate.encoder_decoder import embedding

    count = getattr(embedding(model), "num_embeddings", None)
    return None if count is None else int(count)


def encoder_vocabulary(model: torch.nn.Module) -> int | None:
    """Return how many token ids the encoder of a model knows beside its decoder, or None where nothing says so."""
    from flexcache.hooks.locate.encoder_decoder import is_encoder_decoder
    from flexcache.hooks.locate.names import unwrap

    if not is_encoder_decoder(model):
        return None
    try:
        return int(unwrap(model).get_encoder().get_input_embeddings().num_embeddings)  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None


def pad_id(model: torch.nn.Module, tokenizer: Any) -> int:
    """Return the token id for padding; where there is none, 0, which the attention mask hides."""
    for holder in (tokenizer, getattr(model, "config", None)):
        found = getattr(holder, "pad_token_id", None)
        if isinstance(found, int) and found >= 0:
            return found
    return 0

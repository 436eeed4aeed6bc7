"""PEFT adapters of a model: where they are, how they are combined, and loading them into their base model."""

from __future__ import annotations

import copy
import json
import os
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field

from flexcache.errors import ConfigError
from flexcache.store.storage.backend import digest
from flexcache.validation import Options

if TYPE_CHECKING:
    from torch import nn

CONFIG_FILE = "adapter_config.json"
WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
RECORD = "_flexcache_adapters"
"""Attribute of a model with loaded adapters: their description for the provenance of a store."""
EMPTY: tuple[Any, ...] = (None, [], {}, "none")
"""Values of settings of an adapter that train nothing more."""
FAILURES = (OSError, ValueError, TypeError, KeyError, RuntimeError, AttributeError)
"""Errors that PEFT raises for an adapter that does not fit."""


def expanded(name: Any) -> Any:
    """Return a path or a name as text; ``~`` is the home folder."""
    return os.path.expanduser(name) if isinstance(name, str | os.PathLike) else name


class AdapterSource(Options):
    """A PEFT adapter, as a folder or a hub name, and the factor of its change of the model.

    >>> AdapterSource(path="runs/french", weight=0.7).weight
    0.7
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Annotated[str, BeforeValidator(expanded)] = Field(description="a local folder, or a name on the hub")
    weight: float = Field(1.0, description="factor of what the adapter adds to the weights (LoRA without DoRA)")
    revision: str | None = Field(None, description="revision of an adapter on the hub")


def adapter_list(value: Any) -> Any:
    """Return the long form of one adapter or several: a list of mappings.

    >>> adapter_list(["a", {"path": "b", "weight": 0.3}])
    [{'path': 'a'}, {'path': 'b', 'weight': 0.3}]
    """
    items = value if isinstance(value, list | tuple) else () if value is None else (value,)
    return [{"path": item} if isinstance(item, str | os.PathLike) else item for item in items]


def read_adapter_config(name: str, revision: str | None = None) -> tuple[Path, dict[str, Any]] | None:
    """Return the folder of an adapter and its configuration; None if *name* is not an adapter.

    A name on the hub that is not in the cache is asked for over the network, unless a model of that name is cached.
    """
    folder: Path | None = Path(name)
    if folder is not None and not folder.is_dir():
        found = _cached(name, CONFIG_FILE, revision)
        if found is None and _cached(name, "config.json", revision) is None:
            found = _downloaded(name, CONFIG_FILE, revision)
        folder = None if found is None else found.parent
    if folder is None:
        return None
    try:
        content = json.loads((folder / CONFIG_FILE).read_bytes())
    except (OSError, ValueError):
        return None
    return (folder, content) if isinstance(content, dict) else None


def resolve_base(
    name: str, revision: str | None, adapters: tuple[AdapterSource, ...]
) -> tuple[str, str | None, tuple[AdapterSource, ...]]:
    """Return name and revision of a base model and its adapters, if *name* is that of an adapter or is left out.

    ConfigError if the base model is not named, or is an adapter itself.
    """
    found = read_adapter_config(name, revision) if name else None
    if name and (found is None or adapters):
        if found is not None:
            raise ConfigError(
                f"model {name} is a PEFT adapter itself",
                where=str(found[0]),
                expected="the base model of the adapters",
                remedy="list both as adapters: model: {adapter: [FIRST, SECOND]}",
            )
        return name, revision, adapters
    adapters = adapters or (AdapterSource(path=name, revision=revision),)
    found = found or read_adapter_config(adapters[0].path, adapters[0].revision)
    if found is None:
        raise ConfigError(
            f"adapter {adapters[0].path} cannot be loaded",
            expected="a folder with adapter_config.json, or the name of one on the hub",
            remedy="check the path; without a network only local folders and cached adapters can be loaded",
        )
    return _base_of(adapters[0].path, *found), found[1].get("revision"), adapters


def _base_of(name: str, folder: Path, content: Mapping[str, Any]) -> str:
    """Return the folder or the hub name of the base model of an adapter; ConfigError if it names none.

    A relative path is looked for in the working directory, then in the folder of the adapter.
    """
    base = content.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ConfigError(
            f"adapter {name} does not name its base model",
            where=str(folder / CONFIG_FILE),
            expected="base_model_name_or_path",
            remedy=f"name the base model too: model: {{name: FOLDER, adapter: {name}}}",
        )
    beside = folder / base
    return str(beside.resolve()) if not Path(base).is_dir() and beside.is_dir() else base


def check_variant_names(names: Iterable[str]) -> None:
    """Raise ConfigError unless there are names of variants, each of which can be that of a folder."""
    names = list(names)
    if not names or not all(isinstance(name, str) and re.fullmatch(r"\w[\w.-]*", name) for name in names):
        raise ConfigError(
            "variants cannot be read",
            where="model.adapters",
            expected="names of letters, digits and -_. , each with an adapter, or null for the base model",
            found=", ".join(map(repr, names)) or "none",
        )


def written_tensors(model: nn.Module, adapters: Sequence[AdapterSource]) -> set[str]:
    """Return the names of the parameters of a base model that adapters write to while they are loaded.

    These are biases, weights that come with the adapter, and those of which PiSSA and others take a first part away.
    """
    names, written = {name for name, _ in model.named_parameters(remove_duplicate=False)}, set[str]()
    for adapter in adapters:
        found = read_adapter_config(adapter.path, adapter.revision)
        content: Mapping[str, Any] = {} if found is None else found[1]
        start = content.get("init_lora_weights")
        if isinstance(start, str) and start not in ("gaussian", "orthogonal"):
            return names
        if content.get("bias") not in EMPTY:
            written |= {name for name in names if name.endswith("bias")}
        own = (key.removeprefix("base_model.model.") for key in _weight_names(adapter) if ".base_layer." in key)
        written |= names & {key.replace(".base_layer.", ".") for key in own}
    return written


def _weight_names(adapter: AdapterSource) -> list[str]:
    """Return the names of the tensors of an adapter; none if they are not in a file of safetensors."""
    from safetensors import safe_open

    file: Path | None = Path(adapter.path) / WEIGHT_FILES[0]
    if not Path(adapter.path).is_dir():
        where = adapter.path, WEIGHT_FILES[0], adapter.revision
        file = _cached(*where) or _downloaded(*where)
    if file is None or not file.is_file():
        return []
    with safe_open(file, "pt") as opened:
        return list(opened.keys())


def copy_model(model: nn.Module, whole: bool, own: Collection[str] = ()) -> nn.Module:
    """Return a copy of a model that shares its parameters and buffers, but for its *own*, unless *whole*."""
    apart = {id(model.get_parameter(name)) for name in own}
    shared = [] if whole else [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared if id(tensor) not in apart})


def load_adapters(model: nn.Module, adapters: Sequence[AdapterSource], merge: bool, *, weights: bool = True) -> Any:
    """Return a model with adapters, all active, as a PeftModel; or with *merge* the model with changed weights.

    An adapter that is alone is called ``default``, as in PEFT; several are called after their folders, with a
    number. Without *weights*, the modules are made on the meta device, and nothing is merged.

    Raises
    ------
    ConfigError
        PEFT is not installed, an adapter cannot be loaded, or its tensors are not those that the model needs.
    """
    try:
        import peft
    except ImportError as error:
        raise ConfigError(
            "the model has an adapter, and the package peft is not installed",
            where=adapters[0].path,
            remedy="pip install peft",
        ) from error
    base: Any = model
    names = _names(adapters)
    for name, adapter in zip(names, adapters, strict=True):
        where = {} if adapter.revision is None else {"revision": adapter.revision}
        with _translated(adapter, base):
            config = peft.PeftConfig.from_pretrained(adapter.path, **where)
            config.inference_mode = True
            _check_weight(adapter, config)
            if model is base:
                kind = peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, peft.PeftModel)
                model = kind(base, config, name, low_cpu_mem_usage=not weights)
            else:
                model.add_adapter(name, config, low_cpu_mem_usage=not weights)  # type: ignore[operator]
            if weights:
                found = model.load_adapter(adapter.path, name, torch_device="cpu", **where)  # type: ignore[operator]
                missing = [key for key in found.missing_keys if f".{name}." in key]
                _check_tensors(adapter, base, missing, [] if config.is_prompt_learning else found.unexpected_keys)
    tuner: Any = model.base_model
    with _translated(adapters[-1], base):
        if len(names) > 1:
            tuner.set_adapter(names, inference_mode=True)
        for module in tuner.modules():
            for name, adapter in zip(names, adapters, strict=True):
                if adapter.weight != 1 and hasattr(module, "set_scale"):
                    module.set_scale(name, adapter.weight)
        if merge and weights:
            model = tuner.merge_and_unload(adapter_names=names)
        elif merge:
            model = tuner.unload()
    return model


def describe_adapter(adapter: AdapterSource, merged: bool) -> dict[str, Any]:
    """Return the name of an adapter, its weight and the digest of its file, for the provenance of a store."""
    found = read_adapter_config(adapter.path, adapter.revision)
    folder = Path(adapter.path) if found is None else found[0]
    return {
        "name": folder.resolve().name if Path(adapter.path).is_dir() else adapter.path,
        **({} if adapter.revision is None else {"revision": adapter.revision}),
        "weight": adapter.weight,
        "merged": merged,
        "files": {name: digest(folder / name) for name in WEIGHT_FILES if (folder / name).is_file()},
    }


def _names(adapters: Sequence[AdapterSource]) -> list[str]:
    """Return a name for each adapter, as PEFT takes it: without dots, and no part of the names of its modules."""
    if len(adapters) == 1:
        return ["default"]
    folders = (re.sub(r"\W", "_", Path(adapter.path).resolve().name) for adapter in adapters)
    return [f"{folder}_{number}" for number, folder in enumerate(folders)]


def _check_weight(adapter: AdapterSource, config: Any) -> None:
    """Raise ConfigError for a weight of an adapter whose change of the model is not a sum that it scales."""
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if adapter.weight != 1 and (kind != "LORA" or getattr(config, "use_dora", False)):
        raise ConfigError(
            "the weight of an adapter applies to LoRA only",
            where=adapter.path,
            expected="LoRA without DoRA",
            found="DoRA" if kind == "LORA" else kind,
            remedy="leave weight out",
        )
    parts = {name: getattr(config, name, None) for name in ("modules_to_save", "trainable_token_indices", "bias")}
    if adapter.weight != 1 and (fixed := [f"{name}: {value}" for name, value in parts.items() if value not in EMPTY]):
        raise ConfigError(
            "the weight of an adapter does not apply to all that the adapter changes",
            where=adapter.path,
            expected="LoRA without modules, tokens and biases that are trained as a whole",
            found=", ".join(fixed),
            remedy="leave weight out",
        )


def _check_tensors(adapter: AdapterSource, base: nn.Module, missing: list[str], unexpected: list[str]) -> None:
    if missing or unexpected:
        lines = [f"without {', '.join(missing[:3])}"] if missing else []
        lines += [f"with {', '.join(unexpected[:3])}, which the model lacks"] if unexpected else []
        raise ConfigError(
            f"the tensors of adapter {adapter.path} are not those that the model needs",
            where=type(base).__name__,
            found="; ".join(lines),
            remedy="give the base model of the adapter; or load both in Python with peft, and capture that",
        )


@contextmanager
def _translated(adapter: AdapterSource, base: nn.Module) -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # names of transformers that peft still uses
            yield
    except FAILURES as error:
        raise ConfigError(
            f"adapter {adapter.path} cannot be loaded into a {type(base).__name__}",
            found=f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}",
            remedy="check the folder, that the model is the base of the adapter, and model.loader",
        ) from error


def _cached(name: str, file: str, revision: str | None) -> Path | None:
    """Return a file of a hub repository that is in the cache, or None."""
    found = None
    with suppress(ImportError, ValueError):  # ValueError: not a name on the hub
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(name, file, revision=revision)
    return Path(found) if isinstance(found, str) else None


def _downloaded(name: str, file: str, revision: str | None) -> Path | None:
    with suppress(ImportError, OSError, ValueError):  # no such repository or file, no network, not a name
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(name, file, revision=revision))
    return None

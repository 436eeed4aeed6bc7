"""Options by which transformers quantizes the weights of a model and spreads them over devices."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from flexcache.errors import ConfigError, nearest
from flexcache.model.adapters import expanded
from flexcache.parallel.launch import launch
from flexcache.parallel.sizes import Parallel
from flexcache.validation import Options

if TYPE_CHECKING:
    from torch import nn

PACKAGES = {
    "bitsandbytes": "bitsandbytes",
    "torchao": "torchao",
    "quanto": "optimum-quanto",
    "compressed-tensors": "compressed-tensors",
    "gptq": "gptqmodel",
    "awq": "gptqmodel",
    "hqq": "hqq",
    "aqlm": "aqlm",
}
"""Package that each method of transformers needs, where it is not of the same name."""
SWITCH = "support_avx512bf16_for_cpu"
"""Attribute of a 4-bit linear module: True if its first forward on this CPU packs the weights in another order."""
FAILURES = (ImportError, OSError, ValueError, TypeError, KeyError, AttributeError, AssertionError, NotImplementedError)
"""Errors of transformers and of these packages, in addition to RuntimeError."""


def _settings(value: Any) -> Any:
    """Return settings as a mapping; an object of transformers is read by its ``to_dict``."""
    return value.to_dict() if hasattr(value, "to_dict") else value


class WeightOptions(Options):
    """Quantization of the weights of a model, and the devices and processes that hold them.

    >>> WeightOptions(quantization={"method": "bitsandbytes", "load_in_8bit": True}).quantization["method"]
    'bitsandbytes'
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    device: str = Field("auto", description="device of the model, such as cuda:0; auto takes a GPU if there is one")
    parallel: Parallel = Field(Parallel(), description="processes over which transformers spreads the model")
    quantization: Annotated[dict[str, Any] | None, BeforeValidator(_settings)] = Field(
        None,
        description="how transformers quantizes the weights while it loads them: method (bitsandbytes, torchao, quanto,"
        " …) and its settings, by the names of transformers",
    )
    device_map: str | dict[str, int | str] | None = Field(
        None,
        description="device of each module: auto, balanced, sequential, or a mapping from modules to devices, cpu or"
        " disk; in place of device",
    )
    max_memory: dict[int | str, int | str] | None = Field(
        None, description="memory of each device that device_map may use, such as {0: 20GiB, cpu: 60GiB}"
    )
    offload_folder: Annotated[str | None, BeforeValidator(expanded)] = Field(
        None, description="folder for weights that device_map keeps on disk"
    )

    @model_validator(mode="after")
    def _check_weights(self) -> Self:
        asked = [name for name in ("quantization", "device_map") if getattr(self, name) is not None]
        if asked and self.parallel != Parallel():
            raise ConfigError(
                f"{asked[0]} cannot be combined with a model that several processes share",
                where=f"model.{asked[0]}",
                expected=f"{asked[0]} or parallel",
                remedy="leave parallel out; several processes, each with the whole model, may fill one store",
            )
        if self.device_map is not None and self.device != "auto":
            raise ConfigError(
                "a model takes device or device_map",
                where="model.device_map",
                found=f"device: {self.device}, device_map: {self.device_map}",
                remedy="leave one of them out",
            )
        if self.device_map is None and (self.max_memory is not None or self.offload_folder is not None):
            name = "offload_folder" if self.max_memory is None else "max_memory"
            raise ConfigError(f"{name} is for device_map", where=f"model.{name}", remedy="add device_map: auto")
        if self.quantization is not None:
            _method(self.quantization)
        return self

    def find_device(self) -> str:
        """Return the device of the model; for auto, the GPU of this process if there is one."""
        import torch

        if self.device != "auto":
            return self.device
        count = torch.cuda.device_count()
        return f"cuda:{launch().local_rank % count}" if count else "cpu"

    def weight_options(self, config: Any) -> dict[str, Any]:
        """Return the arguments of ``from_pretrained`` for a model of *config*.

        Quantized weights are loaded onto their device, because they cannot all be moved later.

        Raises
        ------
        ConfigError
            The package of the method is not installed, a setting is not one of it, or the checkpoint is quantized
            already and a setting would be ignored.
        """
        found: dict[str, Any] = {}
        if self.quantization is not None:
            found["quantization_config"] = quantization_config(self.quantization)
            _check_checkpoint(self.quantization, found["quantization_config"], config)
        if self.device_map is not None:
            names = ("device_map", "max_memory", "offload_folder")
            found |= {name: copy.copy(getattr(self, name)) for name in names if getattr(self, name) is not None}
        elif found or (self.parallel == Parallel() and getattr(config, "quantization_config", None) is not None):
            found["device_map"] = {"": self.find_device()}
        return found


def quantization_config(asked: Mapping[str, Any]) -> Any:
    """Return the object of transformers for settings such as ``{"method": "bitsandbytes", "load_in_8bit": True}``.

    The names of settings are those of transformers, where the method is also called ``quant_method``. The type of
    torchao is a name, or a name with its settings: ``{"Int8WeightOnlyConfig": {"group_size": 32}}``.

    Raises
    ------
    ConfigError
        There is no such method or setting, or its package is not installed.
    """
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as KINDS
    from transformers.quantizers.auto import AutoQuantizationConfig

    method = _method(asked)
    settings = {name: value for name, value in asked.items() if name not in ("method", "quant_method")}
    known = {name.removesuffix("_4bit").removesuffix("_8bit"): kind for name, kind in KINDS.items()}
    if method not in known:
        raise ConfigError(
            f"transformers has no quantization method {method!r}",
            where="model.quantization.method",
            remedy=nearest(method, tuple(known)),
        )
    names = [
        name
        for name, parameter in inspect.signature(known[method]).parameters.items()
        if parameter.kind is not parameter.VAR_KEYWORD and name not in ("self", "quant_method")
    ]
    for name in settings:
        if names and name not in names and not name.startswith("_"):
            raise ConfigError(
                f"{method} has no setting {name!r}", where="model.quantization", remedy=nearest(name, tuple(names))
            )
    with translate_failures(asked):
        if method == "torchao":
            settings["quant_type"] = _torchao_type(settings.get("quant_type"))
            return known[method](**settings)
        return AutoQuantizationConfig.from_dict({"quant_method": method, **settings})


def _check_checkpoint(asked: Mapping[str, Any], made: Any, config: Any) -> None:
    """Raise ConfigError for settings that transformers ignores because the checkpoint has its own."""
    own = _settings(getattr(config, "quantization_config", None))
    if own is None:
        return
    given, method = made.to_dict(), str(own.get("quant_method"))
    taken = made.get_loading_attributes() if hasattr(made, "get_loading_attributes") else {}
    names = [name for name in asked if name not in ("method", "quant_method")]
    ignored = [name for name in names if name not in taken and given.get(name) != own.get(name)]
    if ignored or method != given.get("quant_method"):
        raise ConfigError(
            "the weights of the checkpoint are quantized already",
            where="model.quantization",
            expected=f"{method}, with the settings of the checkpoint",
            found=f"{_method(asked)}" + (f" with {', '.join(ignored)}" if ignored else ""),
            remedy="leave quantization out, or name a checkpoint that is not quantized",
        )


def keep_4bit_layout(model: nn.Module) -> None:
    """Switch off that 4-bit modules of bitsandbytes pack their weights again in their first forward on a CPU.

    Packing rounds the scales to bfloat16, so that a model computes something else on a CPU with bfloat16 instructions
    than on others; and reading the state dict of packed modules leaves scales in the wrong order (bitsandbytes 0.50).

    Raises
    ------
    ConfigError
        A forward has packed the weights already.
    """
    for name, module in model.named_modules():
        if not getattr(module, SWITCH, False):
            continue
        state: Any = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise ConfigError(
                "the 4-bit weights were packed again by an earlier forward on this CPU, which rounds their scales",
                where=name,
                expected="weights as bitsandbytes loaded them",
                remedy="load the model again and capture it before its first forward, or by flexcache.ModelSource",
            )
        setattr(module, SWITCH, False)


def moves_scales(model: nn.Module) -> bool:
    """Return True for LLM.int8, whose first forward moves the scales from a weight to its module.

    Copies of such a model cannot share weights.
    """
    return any(kind.__name__ == "Linear8bitLt" for module in model.modules() for kind in type(module).__mro__)


@contextmanager
def translate_failures(asked: Mapping[str, Any] | None) -> Iterator[None]:
    """Raise ConfigError for an error of transformers while it quantizes, if quantization was *asked* for."""
    try:
        yield
    except (*FAILURES, RuntimeError) as error:
        if asked is None or isinstance(error, ConfigError):
            raise
        method = _method(asked)
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        package = PACKAGES.get(method, method)
        raise ConfigError(
            f"the weights cannot be quantized by {method}",
            where="model.quantization",
            found=f"{type(error).__name__}: {lines[0][:300] if lines else ''}",
            remedy=f"pip install {package}; some methods need a GPU, or weights of certain sizes"
            if isinstance(error, ImportError)
            else "see the settings of the method in the documentation of transformers; some need a GPU",
        ) from error


def _method(asked: Mapping[str, Any]) -> str:
    given = [asked[name] for name in ("method", "quant_method") if name in asked]
    if len(given) != 1 or not isinstance(given[0], str):
        raise ConfigError(
            "quantization names no method" if not given else "quantization names its method twice, or not by a name",
            where="model.quantization",
            expected="{method: bitsandbytes, load_in_8bit: true}, or another method of transformers",
            found=str(dict(asked)),
        )
    return given[0]


def _torchao_type(asked: Any) -> Any:
    """Return the configuration object of torchao for a name, ``{name: settings}``, or the form in a checkpoint."""
    from torchao import quantization
    from torchao.core.config import AOBaseConfig, config_from_dict

    if isinstance(asked, Mapping) and "default" in asked:
        return config_from_dict(asked["default"])
    name, settings = next(iter(asked.items())) if isinstance(asked, Mapping) and len(asked) == 1 else (asked, None)
    kinds = {
        key: kind
        for key, kind in vars(quantization).items()
        if isinstance(kind, type) and issubclass(kind, AOBaseConfig) and kind is not AOBaseConfig
    }
    if name not in kinds:
        raise ConfigError(
            f"torchao has no type {name!r}",
            where="model.quantization.quant_type",
            remedy=nearest(str(name), tuple(kinds)),
        )
    return kinds[name](**(settings or {}))

"""What a capture is asked for: the part of a configuration that determines the bytes of a store."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal, TypeVar

import ml_dtypes
import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from flexcache.errors import ConfigError, nearest
from flexcache.options import Options, SequenceOptions
from flexcache.site import Layers, Site, plain_layers

DTypeName = Literal["bfloat16", "float16", "float32", "int8"]
DTYPES: dict[str, np.dtype] = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
    "int8": np.dtype(np.int8),
}

SitesLike = str | Sequence[str | Mapping[str, Any]] | Mapping[str, Layers]


def parse_sites(sites: Any, layers: Any = "all", optional: bool = False) -> dict[str, Any]:
    """Return sites as a mapping from each site's canonical text to its layers.

    One site, a list of sites that all take *layers*, a mapping ``{site: layers}``, or a list that mixes names
    with ``{"site": …, "layers": …}``. A module path names its own layer, so it takes none.

    Raises
    ------
    ConfigError
        Another form, no site at all where one is needed, or one twice.
    SiteError
        A site that cannot be read.
    """
    form = "a site, a list of sites, or a mapping from site to layers"
    if isinstance(sites, str):
        pairs: list[tuple[Any, Any]] = [(sites, layers)]
    elif isinstance(sites, Mapping):
        pairs = list(sites.items())
    elif isinstance(sites, Sequence):
        pairs = []
        for item in sites:
            if isinstance(item, Mapping):
                unknown = [key for key in item if key not in ("site", "layers")]
                if unknown or "site" not in item:
                    raise ConfigError(
                        "a site in the list cannot be read",
                        expected="keys site and layers",
                        found=str(dict(item)),
                    )
                pairs.append((item["site"], item.get("layers", layers)))
            else:
                pairs.append((item, layers))
    else:
        raise ConfigError("sites cannot be read", expected=form, found=repr(sites))
    result: dict[str, Any] = {}
    for text, asked in pairs:
        if not isinstance(text, str):
            raise ConfigError("sites cannot be read", expected=form, found=repr(text))
        site = Site.parse(text)
        if str(site) in result:
            raise ConfigError(f"site {site} is given twice", remedy="write all its layers in one place")
        plain = plain_layers(asked)
        kept = asked.strip() if isinstance(asked, str) and isinstance(plain, int) else plain  # as stores always had it
        result[str(site)] = kept if site.standard else "all"
    if not result and not optional:
        raise ConfigError("no site is given", expected=form, remedy="for example sites: [resid_post]")
    return result


def dtype_name(dtype: Any) -> Any:
    """Return a dtype's name: of torch, numpy or ml_dtypes, or as text with or without ``torch.``.

    Anything else is returned as it is, for whoever checks it.

    >>> dtype_name("torch.bfloat16"), dtype_name(np.float32), dtype_name(np.dtype("float16")), dtype_name("auto")
    ('bfloat16', 'float32', 'float16', 'auto')
    """
    if isinstance(dtype, str):
        return dtype.strip().removeprefix("torch.")
    if isinstance(dtype, type | np.dtype) and dtype is not type(None):
        try:
            return np.dtype(dtype).name
        except TypeError:
            return dtype
    text = str(dtype)  # a dtype of torch, which is not imported here
    return text.removeprefix("torch.") if text.startswith("torch.") else dtype


AnyDType = BeforeValidator(dtype_name)


class Spec(SequenceOptions):
    """What determines the bytes of a store beside model, tokenizer and corpus. Stored in it and compared on resume."""

    sites: dict[str, Any] = Field(description="layers by site, as `parse_sites` gives them")
    transforms: dict[str, dict[str, Any]] = Field({}, description="by name, as `Transform.describe` gives them")
    objective: dict[str, Any] | None = Field(None, description="as `objective.describe` gives it")
    dtype: Annotated[Literal[DTypeName, "auto"], AnyDType] = Field("auto", description="as stored; auto is as computed")
    batch_tokens: int = Field(4096, ge=1, description="most tokens of a forward, padding included")
    seed: int = Field(0, ge=0, description="of the order of batches within a unit")
    compression: Literal["none", "zstd"] = "none"
    keep_text: bool = Field(True, description="whether documents.parquet holds the texts or their hashes")
    empty_documents: Literal["error", "skip"] = "error"


@dataclass(frozen=True)
class ArraySpec:
    """One array of a store.

    Attributes
    ----------
    name : str
        In the store: a standard site, or a module path.
    site : str
        As the user wrote it.
    layers : tuple of int, or None
        Captured layers of a stacked array; None for a module path.
    depth : int or None
        Layers of the model, which is the first dim of a stacked array.
    features : int
        Length of a row, in values.
    feature_dim : str
        Name of the last dim.
    dtype : str
        As stored.
    """

    name: str
    site: str
    layers: tuple[int, ...] | None
    depth: int | None
    features: int
    feature_dim: str
    dtype: str

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of one layer."""
        return self.features * DTYPES[self.dtype].itemsize

    @property
    def slices(self) -> tuple[int | None, ...]:
        """The captured layers, or None once for an array that has no layers."""
        return (None,) if self.layers is None else self.layers

    @property
    def dims(self) -> tuple[str, ...]:
        """Names of the array's dims."""
        return ("token", self.feature_dim) if self.layers is None else ("layer", "token", self.feature_dim)

    def __str__(self) -> str:
        depth = "" if self.depth is None else f"{self.depth} layers of "
        return f"{depth}{self.features} {self.feature_dim} in {self.dtype}, site {self.site}"

    def to_json(self) -> dict[str, Any]:
        """Return the array as plain values."""
        return {**asdict(self), "layers": None if self.layers is None else list(self.layers)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ArraySpec:
        """Read what `to_json` wrote."""
        layers = data["layers"]
        return cls(**{**data, "layers": None if layers is None else tuple(int(layer) for layer in layers)})


Model = TypeVar("Model", bound=BaseModel)
T = TypeVar("T")


def validate(model: type[Model], data: Mapping[str, Any], where: str) -> Model:
    """Return *data* as a pydantic model, with errors in the project's own words.

    Raises
    ------
    ConfigError
        The first thing that is wrong: an unknown key with the nearest known one, a missing key, a bad value.
    """
    try:
        return model.model_validate(_without_numpy(data))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = ".".join(str(part) for part in first["loc"])
        parent = _model_at(model, first["loc"][:-1])
        names = tuple(parent.model_fields) if parent else ()
        if first["type"] == "extra_forbidden":
            raise ConfigError(
                f"unknown key {path!r}", where=where, remedy=nearest(str(first["loc"][-1]), names)
            ) from None
        if first["type"] == "missing":
            raise ConfigError(f"key {path!r} is missing", where=where, expected=f"one of {', '.join(names)}") from None
        raise ConfigError(
            f"key {path!r} has a value that cannot be used",
            where=where,
            expected=first["msg"].removeprefix("Input should be "),
            found=repr(first["input"]),
        ) from None


def _without_numpy(value: Any) -> Any:
    """Return plain values in place of numpy's numbers and arrays, and of sets."""
    if isinstance(value, Mapping):
        return {key: _without_numpy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_without_numpy, value)) if type(value) in (list, tuple) else value
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else value


def _model_at(model: type[BaseModel], path: tuple[int | str, ...]) -> type[BaseModel] | None:
    current: Any = model
    for part in path:
        field = getattr(current, "model_fields", {}).get(part)
        if field is None:
            continue
        options = [field.annotation, *getattr(field.annotation, "__args__", ())]
        current = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), current)
    return current if isinstance(current, type) and issubclass(current, BaseModel) else None


class Running(Options):
    """Options of how a capture runs, which do not change what is stored."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    buffer_bytes: int = Field(ge=1)
    heartbeat_timeout: float = Field(gt=0)
    model_info: dict[str, Any] | None
    batch_tokens: int | None = Field(ge=1)
    max_tokens: int | None = Field(ge=1)


def check_running(
    buffer_bytes: Any,
    heartbeat_timeout: Any,
    model_info: Any,
    where: str,
    *,
    batch_tokens: Any = None,
    max_tokens: Any = None,
) -> Running:
    """Return the options as numbers, or raise ConfigError if one of them cannot be used."""
    options = {"buffer_bytes": buffer_bytes, "heartbeat_timeout": heartbeat_timeout, "model_info": model_info}
    return validate(Running, {**options, "batch_tokens": batch_tokens, "max_tokens": max_tokens}, where)


def is_whole(value: Any) -> bool:
    """Return True for an integer of Python or numpy that is not a boolean.

    >>> is_whole(np.int64(5)), is_whole(5.0), is_whole("5"), is_whole(True)
    (True, False, False, False)
    """
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def listed(given: Any, kind: type[T], name: str) -> tuple[T, ...]:
    """Return one item or several of a kind as a tuple; None is none.

    Raises
    ------
    ConfigError
        Something of another kind is among them.
    """
    if given is None or isinstance(given, kind):
        return () if given is None else (given,)
    items = tuple(given) if isinstance(given, Iterable) and not isinstance(given, str | bytes) else (given,)
    if wrong := [item for item in items if not isinstance(item, kind)]:
        raise ConfigError(
            f"{name} cannot be read",
            expected=f"a list of {kind.__name__}",
            found=f"{type(wrong[0]).__name__} {wrong[0]!r}",
        )
    return items

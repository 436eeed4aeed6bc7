"""The form of an array of a store: dtype, features, and its layers, on disk or virtual."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import ml_dtypes
import numpy as np

from flexcache.errors import ConfigError
from flexcache.site import Site, plain_layers, resolve_layers

DTypeName = Literal["bfloat16", "float16", "float32", "int8"]
DTYPES: dict[str, np.dtype] = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
    "int8": np.dtype(np.int8),
}
RESIDUAL = ("resid_post", "resid_pre")
"""Sites from which later layers are recomputed."""
_FORM = "a mapping from site to layers on disk, such as {resid_post: every 6}; or layers of resid_post, such as every 6"


@dataclass(frozen=True)
class ArraySpec:
    """The form of one array of a store.

    Attributes
    ----------
    name : str
        Name in the store: a standard site, or a module path.
    site : str
        The site as the user wrote it.
    layers : tuple of int, or None
        Layers of a stacked array that are on disk; None for a module path.
    depth : int or None
        Layers of the model, which is the first dim of a stacked array.
    features : int
        Length of a row, in values.
    feature_dim : str
        Name of the last dim.
    dtype : str
        Dtype of the stored values.
    virtual : tuple of int
        Layers that were computed and hashed, and are not on disk.
    """

    name: str
    site: str
    layers: tuple[int, ...] | None
    depth: int | None
    features: int
    feature_dim: str
    dtype: str
    virtual: tuple[int, ...] = ()

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of one layer."""
        return self.features * DTYPES[self.dtype].itemsize

    @property
    def slices(self) -> tuple[int | None, ...]:
        """The layers on disk, or None once for an array that has no layers."""
        return (None,) if self.layers is None else self.layers

    @property
    def captured(self) -> tuple[int | None, ...]:
        """The captured layers, on disk and virtual, or None once for an array that has no layers."""
        return (None,) if self.layers is None else tuple(sorted((*self.layers, *self.virtual)))

    @property
    def dims(self) -> tuple[str, ...]:
        """Names of the array's dims."""
        return ("token", self.feature_dim) if self.layers is None else ("layer", "token", self.feature_dim)

    def __str__(self) -> str:
        depth = "" if self.depth is None else f"{self.depth} layers of "
        return f"{depth}{self.features} {self.feature_dim} in {self.dtype}, site {self.site}"

    def to_json(self) -> dict[str, Any]:
        """Return the array as plain values."""
        content = {**asdict(self), "layers": None if self.layers is None else list(self.layers)}
        virtual = content.pop("virtual")
        return content | ({"virtual": list(virtual)} if virtual else {})

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ArraySpec:
        """Return the array that `to_json` wrote."""
        layers, virtual = data["layers"], tuple(int(layer) for layer in data.get("virtual", ()))
        layers = None if layers is None else tuple(int(layer) for layer in layers)
        return cls(**{**data, "layers": layers, "virtual": virtual})


def parse_keep(keep: Any) -> dict[str, Any]:
    """Return *keep* as a mapping from the text of each site to its layers; layers alone are those of ``resid_post``.

    >>> parse_keep("every:6"), parse_keep({"z": "8"})
    ({'resid_post': 'every 6'}, {'z': 8})

    Raises
    ------
    ConfigError
        *keep* has another form. SiteError if a site cannot be parsed.
    """
    if isinstance(keep, str):
        keep = {RESIDUAL[0]: keep}
    if not isinstance(keep, Mapping) or not all(isinstance(site, str) for site in keep):
        raise ConfigError("keep cannot be read", expected=_FORM, found=repr(keep))
    return {str(Site.parse(site)): plain_layers(layers) for site, layers in keep.items()}


def can_be_virtual(site: str) -> bool:
    """Return True for the text of a site that exists in every block and is no gradient.

    >>> can_be_virtual("mlp_post"), can_be_virtual("mlp_post.grad"), can_be_virtual("model.norm")
    (True, False, False)
    """
    parsed = Site.parse(site)
    return parsed.standard and not parsed.gradient


def check_one_window(keep: Mapping[str, Any] | None, linked: np.ndarray | None) -> None:
    """Raise ConfigError if layers are virtual and a document has several windows, which *linked* sequences show."""
    if keep is not None and linked is not None and linked.any():
        raise ConfigError(
            "virtual layers cannot be recomputed for a document that is cut into windows",
            where="keep",
            expected="one sequence for each document",
            found="rows that two windows of a document share, and only one of them stores",
            remedy="leave keep or windows out; max_length truncates long documents",
        )


def divide_layers(array: ArraySpec, keep: Mapping[str, Any] | None) -> ArraySpec:
    """Return an array whose layers are all on disk with those that *keep* leaves out as virtual ones.

    Raises
    ------
    ConfigError
        *keep* names layers that are not captured. SiteError if the model does not have them.
    """
    if keep is None or array.layers is None or array.depth is None:
        return array
    asked = keep.get(array.site)
    if asked is None:
        return replace(array, layers=(), virtual=array.layers)
    numbers = resolve_layers(asked, array.depth)
    kept = tuple(layer for layer in array.layers if layer in numbers)
    if not kept or (not isinstance(asked, str) and len(kept) < len(numbers)):
        raise ConfigError(
            f"keep names layers of {array.site} that are not captured",
            expected=f"some of {', '.join(map(str, array.layers))}",
            found=str(asked),
        )
    return replace(array, layers=kept, virtual=tuple(layer for layer in array.layers if layer not in kept))


def check_starts(arrays: Collection[ArraySpec], computed: Mapping[str, str]) -> None:
    """Raise ConfigError if a stored residual stream is rounded, and virtual layers would be recomputed from it.

    *computed* has the dtype in which the model computes each array.
    """
    last = max((layer for array in arrays for layer in array.virtual), default=-1)
    for array in arrays:
        dtype = computed.get(array.name, array.dtype)
        starts = [layer + (array.site == RESIDUAL[0]) for layer in array.layers or () if array.site in RESIDUAL]
        if array.dtype not in (dtype, "float32") and any(start <= last for start in starts):
            raise ConfigError(
                f"{array.name} is rounded, so virtual layers cannot be recomputed exactly from it",
                where="keep",
                expected=f"{dtype}, the dtype in which the model computes it",
                found=array.dtype,
                remedy="set keep_dtype to compute, or dtype to auto",
            )


def keep_of(
    arrays: Iterable[ArraySpec], keep: Mapping[str, Any] | None, keep_dtype: str = "stored"
) -> dict[str, Any] | None:
    """Return the `keep` of a capture of these arrays: in the form of *keep*, if it means the same layers.

    It is None if no layer is virtual, and `keep_dtype` does not need it.
    """
    held = [array for array in arrays if array.name == array.site and can_be_virtual(array.site)]
    if not any(array.virtual for array in held) and keep_dtype == "stored":
        return None
    found: dict[str, Any] = {}
    for array in held:
        if array.layers:
            asked = (keep or {}).get(array.site)
            form: Any = list(array.layers) if array.virtual else "all"
            found[array.site] = asked if asked is not None and _means(asked, array) else form
    return found


def _means(asked: Any, array: ArraySpec) -> bool:
    """Return True if layers as they were asked for are the layers of an array that are on disk."""
    numbers = resolve_layers(asked, array.depth or 0)
    return tuple(layer for layer in array.captured if layer in numbers) == array.layers


def blocks_to_run(arrays: Collection[ArraySpec]) -> dict[tuple[str, int], int]:
    """Return, for each virtual layer, the blocks that recompute it from the last residual stream on disk before it."""
    starts = {0}
    for array in arrays:
        if array.site in RESIDUAL and array.name == array.site:
            starts |= {layer + (array.site == RESIDUAL[0]) for layer in array.layers or ()}
    found = {}
    for array in arrays:
        for layer in array.virtual:
            end = layer + (array.site != "resid_pre")
            found[array.name, layer] = end - max(start for start in starts if start < max(end, 1))
    return found


def mean_blocks(arrays: Collection[ArraySpec], wanted: Collection[tuple[str, int | None]]) -> float:
    """Return the blocks that recompute a virtual layer on average; *wanted* are the layers to count, 0 if none."""
    counts = [count for key, count in blocks_to_run(arrays).items() if key in wanted]
    return sum(counts) / max(1, len(counts))

"""The spec of a capture, and the arrays of a store."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from pydantic import BeforeValidator, Field, ValidationInfo, WithJsonSchema, model_validator
from pydantic.json_schema import SkipJsonSchema

from flexcache.array_spec import DTypeName, can_be_virtual, parse_keep
from flexcache.errors import ConfigError, nearest
from flexcache.options import Choice, DecoderInputMode, SequenceOptions, parse_rows
from flexcache.site import Layers, Site, plain_layers
from flexcache.validation import validate

SitesLike = str | Sequence[str | Mapping[str, Any]] | Mapping[str, Layers]


def parse_sites(sites: Any, layers: Any = "all", optional: bool = False) -> dict[str, Any]:
    """Return sites as a mapping from the canonical text of each site to its layers.

    *sites* is one site, a list of sites that all take *layers*, a mapping ``{site: layers}``, or a list that mixes
    names with ``{"site": …, "layers": …}``. A module path names its own layer, so it takes none.

    Raises
    ------
    ConfigError
        The sites have another form, or a site is missing or given twice.
    SiteError
        A site cannot be parsed.
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
        as_text = isinstance(asked, str) and isinstance(plain, int)  # a number as text is stored as text
        kept = asked.strip() if as_text else plain
        result[str(site)] = kept if site.standard else "all"
    if not result and not optional:
        raise ConfigError("no site is given", expected=form, remedy="for example sites: [resid_post]")
    return result


def dtype_name(dtype: Any) -> Any:
    """Return the name of a dtype of torch, numpy or ml_dtypes, or of text with or without ``torch.``.

    Anything else is returned unchanged, for the caller to check.

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


SITES_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": ["string", "object"]}},
        {"type": "object", "additionalProperties": True},
    ]
}
KEEP_SCHEMA = {"anyOf": [{"type": "null"}, {"type": "string"}, {"type": "object", "additionalProperties": True}]}
SEGMENT_TOKENS = 1 << 22
RESOLVED = ("choice", "transforms", "objective", "decoder")
"""Fields of a `CaptureSpec` that follow from others, from functions, or from the model: a user does not write them."""


class CaptureSpec(SequenceOptions):
    """The content of a capture: with model, tokenizer and corpus, it determines the bytes of a store.

    It is stored with the activations and compared when a capture is resumed. Fields can be given as `flexcache.capture`
    takes them: one site or several, with *layers*; *rows* as a word or as rules. `sites` is then a mapping from each
    site to its layers.

    >>> spec = CaptureSpec(sites=["resid_post"], layers="0,8", rows={"every": 4}, max_length=512)
    >>> spec.sites, spec.rows, spec.choice.every
    ({'resid_post': [0, 8]}, 'some', 4)

    Raises
    ------
    ConfigError, SiteError
        A field is unknown or cannot be used.
    """

    sites: Annotated[dict[str, Any], WithJsonSchema(SITES_SCHEMA)] = Field(
        {"resid_post": "all"}, description="a site, a list of sites, or a mapping from site to layers"
    )
    transforms: SkipJsonSchema[dict[str, dict[str, Any]]] = Field(
        {}, description="by name, the description of each `flexcache.Transform`"
    )
    objective: SkipJsonSchema[dict[str, Any] | None] = Field(None, description="the description of the objective")
    dtype: Annotated[Literal[DTypeName, "auto"], AnyDType] = Field(
        "auto", description="dtype of the stored values: int8 has a scale for each row; auto is the dtype of the model"
    )
    batch_tokens: int = Field(4096, ge=1, description="tokens of a forward pass, padding included, at most")
    seed: int = Field(0, ge=0, description="seed of the order of the batches within a unit")
    compression: Literal["none", "zstd"] = Field("none", description="codec of the stored values")
    keep: Annotated[dict[str, Any] | None, WithJsonSchema(KEEP_SCHEMA)] = Field(
        None,
        description="layers on disk of each site, such as {resid_post: every 6}; all other layers of sites of blocks"
        " are virtual: computed and hashed, and recomputed when they are read. By default, all layers are on disk",
    )
    keep_dtype: Literal["stored", "compute"] = Field(
        "stored",
        description="dtype of the residual streams in keep: the dtype of the other sites (stored), or of the model"
        " (compute)",
    )
    keep_text: bool = Field(True, description="store the texts of the documents; false stores their hashes")
    empty_documents: Literal["error", "skip"] = Field("error", description="stop at an empty document, or skip it")
    segment_tokens: int = Field(
        SEGMENT_TOKENS,
        ge=1,
        description="tokens of documents from which the size of the units follows; a larger corpus is captured while"
        " the rest is planned",
    )
    layers: Annotated[Any, WithJsonSchema({"type": ["string", "integer", "array"]})] = Field(
        "all",
        exclude=True,
        description="layers of the sites that do not name their own: all, a number, a list, or a range such as 8:24",
    )
    decoder_inputs: DecoderInputMode = Field(
        "shifted",
        exclude=True,
        description="decoder inputs of an encoder-decoder model: the target shifted right (shifted), or as_given",
    )

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Return the names that a user can set."""
        return tuple(name for name in cls.model_fields if name not in RESOLVED)

    @model_validator(mode="before")
    @classmethod
    def _read_user_forms(cls, data: Any, info: ValidationInfo) -> Any:
        if not isinstance(data, Mapping) or (info.context or {}).get("stored"):
            return data
        fields = dict(data)
        sites, layers = fields.pop("sites", None), fields.pop("layers", "all")
        transforms = bool(fields.get("transforms"))
        if sites is not None or not (isinstance(layers, str) and layers == "all"):
            default = () if transforms else "resid_post"
            fields["sites"] = parse_sites(default if sites is None else sites, layers, optional=transforms)
        elif transforms:
            fields["sites"] = {}
        if fields.get("keep") is not None:
            fields["keep"] = parse_keep(fields["keep"])
        if "token_labels" in fields:
            fields["token_labels"] = listed(fields["token_labels"], str, "token_labels")
        if "rows" in fields and "choice" not in fields:
            fields |= parse_rows(fields["rows"])
            if fields["choice"] is not None:
                fields["choice"] = validate(Choice, fields["choice"], "rows")
        return fields

    def check(self) -> None:
        """Raise ConfigError if options contradict each other."""
        super().check()
        self.check_keep()

    def check_keep(self) -> None:
        """Raise ConfigError if layers are virtual in a capture whose rows cannot be recomputed exactly."""
        if self.keep is None:
            if self.keep_dtype == "compute":
                raise ConfigError(
                    "keep_dtype applies to the sites in keep, and there is no keep", remedy="leave it out"
                )
            return
        for site, layers in self.keep.items():
            if site not in self.sites:
                raise ConfigError(
                    f"keep names {site}, which is not captured",
                    expected=f"some of {', '.join(self.sites)}",
                    remedy=nearest(site, tuple(self.sites)),
                )
            if layers != "all" and not can_be_virtual(site):
                raise ConfigError(
                    f"all layers of {site} are on disk, whatever keep says",
                    expected="sites that exist in every block, and are no gradients",
                    remedy="leave it out of keep",
                )
        wrong = {
            f"rows: {self.rows}": self.rows != "all",
            "packing": self.packing is not None,
            "dtype: int8": self.dtype == "int8",
            f"compression: {self.compression}": self.compression != "none",
            "generate.capture": self.decoding,
        }
        if found := [name for name, given in wrong.items() if given]:
            raise ConfigError(
                "virtual layers cannot be recomputed exactly from such a store",
                where="keep",
                expected="rows: all, without packing; a floating-point dtype, without compression; no generate.capture",
                found=", ".join(found),
                remedy="leave keep out, or change these options; virtual layers take no disk",
            )

    def to_json(self) -> dict[str, Any]:
        """Return the fields that are set as plain values, as in the attributes of a store."""
        return self.model_dump(mode="json", exclude_unset=True)

    @classmethod
    def from_store(cls, content: Mapping[str, Any]) -> CaptureSpec:
        """Return the spec in the attributes of a store; a field that an older store lacks has its default."""
        spec = validate(cls, content, "the spec of the store", stored=True)
        mode = "shifted" if spec.decoder is None else spec.decoder.inputs
        return spec.model_copy(update={"decoder_inputs": mode})

    def with_fields(self, fields: Mapping[str, Any], where: str) -> CaptureSpec:
        """Return the spec with some fields replaced; they take the same forms as in the constructor.

        *layers* without *sites* apply to the sites that this spec sets.

        Raises
        ------
        ConfigError, SiteError
            A field is unknown or cannot be used.
        """
        kept = self.model_dump(exclude_unset=True)
        changes = dict(fields)
        unwritten = {"decoder_inputs", "special_tokens", "generate"} & self.model_fields_set
        kept |= {name: getattr(self, name) for name in unwritten}
        if "rows" in changes:
            kept.pop("choice", None)
        if changes.get("sites") is None and "layers" in changes and "sites" in kept:
            changes["sites"] = list(self.sites)
        return validate(CaptureSpec, kept | changes, where)


T = TypeVar("T")


def is_whole(value: Any) -> bool:
    """Return True for an integer of Python or numpy that is not a boolean.

    >>> is_whole(np.int64(5)), is_whole(5.0), is_whole("5"), is_whole(True)
    (True, False, False, False)
    """
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def listed(given: Any, kind: type[T], name: str) -> tuple[T, ...]:
    """Return one item or several of a kind as a tuple; None becomes an empty tuple.

    Raises
    ------
    ConfigError
        An item is of another kind.
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

"""Fields of `CaptureSpec` and `RunOptions` as keywords of the calls, with their types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from flexcache.chat_options import ChatOptions
from flexcache.errors import ConfigError
from flexcache.options import Choice, DecoderInputMode, Generation, Packing, SpecialTokens, Windows
from flexcache.recording.run_options import RunOptions
from flexcache.site import Layers
from flexcache.spec import CaptureSpec, SitesLike
from flexcache.validation import unknown_key, validate


class _RowFields(TypedDict, total=False):
    layers: Layers
    rows: str | Mapping[str, Any] | Choice
    dtype: Any
    max_length: int | None
    max_tokens: int | None
    windows: Windows | Mapping[str, Any] | None
    packing: Packing | Mapping[str, Any] | None
    special_tokens: SpecialTokens
    chat: ChatOptions | Mapping[str, Any] | None
    token_labels: Sequence[str]
    batch_tokens: int
    seed: int
    compression: str
    keep_text: bool
    empty_documents: str
    segment_tokens: int


class _WriterFields(TypedDict, total=False):
    buffer_bytes: int | str
    heartbeat_timeout: float
    allow_mixed: bool


class RunFields(_WriterFields, total=False):
    """Fields of `RunOptions`."""

    allow_changed_model: bool
    progress: bool
    model_info: dict[str, Any] | None


class CaptureFields(_RowFields, RunFields, total=False):
    """Keywords of `flexcache.capture`: the fields of `CaptureSpec` and of `RunOptions`."""

    sites: SitesLike | None
    keep: Mapping[str, Layers] | str | None
    keep_dtype: str
    decoder_inputs: DecoderInputMode
    generate: Generation | Mapping[str, Any] | None


class RecordFields(_RowFields, _WriterFields, total=False):
    """Keywords of `flexcache.record`: the fields that need no model."""


class ExtendFields(RunFields, total=False):
    """Keywords of `flexcache.extend`: the fields that a store leaves open."""

    sites: SitesLike | None
    layers: Layers
    max_tokens: int | None
    batch_tokens: int | None


class GenerateFields(TypedDict, total=False):
    """Keywords of `flexcache.generate`: the fields of `Generation`, and *heartbeat_timeout* of `RunOptions`."""

    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int | None
    seed: int
    batch: int
    capture: bool
    heartbeat_timeout: float


def split_fields(
    fields: Mapping[str, Any], accepted: type, spec: CaptureSpec | None, options: RunOptions | None, where: str
) -> tuple[CaptureSpec, dict[str, Any], RunOptions]:
    """Return the `CaptureSpec` of a call, the keywords that change it, and `RunOptions` with the other keywords.

    *accepted* is the TypedDict of the keywords that the call accepts. ConfigError if a keyword is unknown, with the
    nearest known one, or an option cannot be used.
    """
    names = tuple(accepted.__annotations__)
    for name in fields:
        if name not in names:
            raise unknown_key(name, names, where)
    spec = CaptureSpec() if spec is None else spec
    spec = spec if isinstance(spec, CaptureSpec) else validate(CaptureSpec, _mapping(spec, "spec", where), where)
    kept: Any = {} if options is None else options
    kept = kept.model_dump(exclude_unset=True) if isinstance(kept, RunOptions) else _mapping(kept, "options", where)
    changes = {name: value for name, value in fields.items() if name in RunOptions.model_fields}
    content = {name: value for name, value in fields.items() if name not in changes}
    return spec, content, validate(RunOptions, {**kept, **changes}, where)


def _mapping(value: Any, name: str, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        expected = "flexcache.CaptureSpec" if name == "spec" else "flexcache.RunOptions"
        raise ConfigError(
            f"{name} cannot be used", where=where, expected=f"{expected}, or a mapping", found=repr(value)
        )
    return value

"""Options of how a capture runs; they do not change the stored values."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, ByteSize, ConfigDict, Field, TypeAdapter, ValidationError, WithJsonSchema

from flexcache.store.write.worker import HEARTBEAT_TIMEOUT
from flexcache.validation import Options

DEFAULT_BUFFER = 256 << 20
"""Bytes of memory for rows that wait to be written."""


def parse_bytes(value: Any) -> Any:
    """Return a size such as ``256 MiB`` in bytes; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return int(TypeAdapter(ByteSize).validate_python(value))
    except ValidationError:
        raise ValueError("a number of bytes, or text such as 256 MiB") from None


class RunOptions(Options):
    """Options of the run of a capture: memory, heartbeat, progress bars, and accepted differences from an earlier run.

    >>> RunOptions(buffer_bytes="64 MiB").buffer_bytes
    67108864

    Raises
    ------
    ConfigError
        A field is unknown or cannot be used.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    buffer_bytes: Annotated[
        int, BeforeValidator(parse_bytes), WithJsonSchema({"type": ["integer", "string"], "minimum": 1})
    ] = Field(
        DEFAULT_BUFFER,
        ge=1,
        description="memory for rows that wait to be written, at most: a number of bytes, or text such as 256 MiB",
    )
    heartbeat_timeout: float = Field(
        HEARTBEAT_TIMEOUT,
        gt=0,
        description="seconds without a heartbeat after which a process on another machine counts as gone",
    )
    allow_mixed: bool = Field(
        False, description="resume a store that was begun on another device, version, or number of threads"
    )
    allow_changed_model: bool = Field(
        False,
        description="resume a store that was begun with a model that computes something else; the ledger says which"
        " units come from which model",
    )
    progress: Annotated[bool, BeforeValidator(lambda shown: shown is not None and shown)] = Field(
        True, description="show progress bars"
    )
    model_info: dict[str, Any] | None = Field(
        None, description="more about the model for the provenance: its name, revision, and the hashes of its files"
    )

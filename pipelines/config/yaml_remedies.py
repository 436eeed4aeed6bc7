"""Remedies of errors in the words of configuration files."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

from flexcache.errors import FlexCacheError
from flexcache.validation import Options

File = Literal["capture", "replay"]
VALUE = r"""\[[^]]*\]|\([^()]*\)|'[^']*'|"[^"]*"|[^\s,;)]+"""
ARGUMENT = re.compile(rf"(?<!--set )\b([a-z_]+)=(?:({VALUE})|(?=[\s,;]))")
DOCUMENTS = re.compile(r"flexcache\.open_documents\(…, (.*)\)")
CALL = re.compile(r"""(\w[\w.]*\((?:\[[^]]*\]|\([^()]*\)|'[^']*'|"[^"]*"|[^][()'"])*\))""")
CONSTANTS = {"None": "null", "True": "true", "False": "false"}


@contextmanager
def yaml_remedies(file: File) -> Iterator[None]:
    """Rewrite the remedy of an error that leaves this context for a user whose arguments come from a file.

    ::

        @yaml_remedies("replay")
        def replay(store, config): ...
    """
    try:
        yield
    except FlexCacheError as error:
        error.remedy = error.remedy and as_yaml(error.remedy, key_names(file))
        raise


def as_yaml(text: str, names: Collection[str]) -> str:
    """Return a text in which Python arguments that are also keys of a file are written as these; calls stay.

    >>> as_yaml("give answers=(token, other), or model=ModelSource(name=…)", {"answers", "model", "name"})
    'give answers: [token, other], or model=ModelSource(name=…)'
    >>> as_yaml("leave it out by flexcache.open_documents(…, text=None, labels=['a'])", ())
    "leave it out by documents: {text: null, labels: ['a']}"
    """
    parts = CALL.split(text)
    for number, part in enumerate(parts):
        documents = DOCUMENTS.fullmatch(part)
        if documents:
            keys = (f"{name}: {_yaml_value(value)}" for name, value in ARGUMENT.findall(documents[1]))
            parts[number] = f"documents: {{{', '.join(keys)}}}"
        elif number % 2 == 0:  # between two calls
            parts[number] = ARGUMENT.sub(
                lambda found: f"{found[1]}: {_yaml_value(found[2] or '')}".rstrip() if found[1] in names else found[0],
                part,
            )
    return "".join(parts)


def key_names(file: File) -> set[str]:
    """Return the keys of a file, and those of its sections.

    >>> {"answers", "positions"} <= key_names("replay")
    True
    """
    from pipelines.config.capture_config import CaptureConfig
    from pipelines.config.replay_config import ReplayConfig

    model: type[Options] = CaptureConfig if file == "capture" else ReplayConfig
    sections = (section for name in model.names() for section in _sections(model.model_fields[name].annotation))
    return {*model.names(), *(key for section in sections for key in section.names())}


def _sections(annotation: Any) -> list[type[Options]]:
    """Return the options in an annotation, such as a union with None."""
    if isinstance(annotation, type) and issubclass(annotation, Options):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections(part)]


def _yaml_value(text: str) -> str:
    if text.startswith("("):
        return f"[{text[1:-1].rstrip(',')}]"
    return CONSTANTS.get(text, text)

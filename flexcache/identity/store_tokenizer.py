"""Load the tokenizer that a store was captured with, or one that a user names."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from flexcache.errors import ConfigError, FlexCacheError
from flexcache.identity.tokenizer import DIGEST, describe_tokenizer
from flexcache.model import ModelSource
from flexcache.store.read.store import Store


def store_tokenizer(store: Store, model: Any = None) -> Any:
    """Return the tokenizer of a store; None if it cannot be loaded.

    It is loaded from the folder or name of *model*, or of the model in the store's record, and compared with the record
    of the capture's tokenizer: another one is None, too. ::

        store_tokenizer(store)(" good", add_special_tokens=False).input_ids

    Parameters
    ----------
    model
        A loaded model of transformers.
    """
    recorded = (store.provenance.tokenizer or {}).get(DIGEST)
    names = (getattr(model, "name_or_path", None), store.provenance.model_name)
    for name in filter(None, names if recorded else ()):
        with suppress(Exception):  # a store can be read without its model; loaders raise many kinds of errors
            found = ModelSource(name=str(name)).tokenizer()
            if describe_tokenizer(found).get(DIGEST) == recorded:
                return found
    return None


def load_tokenizer(name: str | Path, error: type[FlexCacheError] = ConfigError) -> Any:
    """Return the tokenizer in a folder or of a name; raise *error* if it cannot be loaded. Remote code never runs."""
    try:
        return ModelSource(name=str(name)).tokenizer()
    except Exception as reason:  # transformers and its backends raise many kinds
        raise error(
            "the tokenizer cannot be loaded",
            where=str(name),
            found=f"{type(reason).__name__}: {str(reason).partition(chr(10))[0][:200]}",
            remedy="give the folder of the model that the store was captured from",
        ) from reason

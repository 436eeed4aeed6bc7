"""The tokenizer that a store was captured with."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

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

"""Documents into sequences: tokenized once, cut, and told which of their tokens are rows."""

from flexcache.sequences.encoding import Tokenizer
from flexcache.sequences.spool import KEPT, Corpus, Spool, image_digests, messages_digests, spool

__all__ = [
    "KEPT",
    "Corpus",
    "Spool",
    "Tokenizer",
    "image_digests",
    "messages_digests",
    "spool",
]

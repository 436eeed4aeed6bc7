"""Documents into sequences: tokenized once, cut, and told which of their tokens are rows."""

from flexcache.sequences.encoding import Tokenizer
from flexcache.sequences.lengths import Positions
from flexcache.sequences.spool import KEPT, Corpus, Spool, image_digests, messages_digests, spool
from flexcache.sequences.targets import SPOOLED

__all__ = [
    "KEPT",
    "SPOOLED",
    "Corpus",
    "Positions",
    "Spool",
    "Tokenizer",
    "image_digests",
    "messages_digests",
    "spool",
]

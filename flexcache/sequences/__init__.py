"""Documents into sequences: tokenized once, cut, and told which of their tokens are rows."""

from flexcache.sequences.encoding import Tokenizer
from flexcache.sequences.spool import KEPT, Corpus, Spool, messages_digests, spool

__all__ = ["KEPT", "Corpus", "Spool", "Tokenizer", "messages_digests", "spool"]

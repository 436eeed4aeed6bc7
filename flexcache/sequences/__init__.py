"""Documents to sequences: tokens, the tokens that become rows, and the segments of documents in sequences."""

from flexcache.sequences.document_columns import ENCODER_TOKENS, image_digests, messages_digests, text_digests
from flexcache.sequences.encoding import Tokenizer, encode_documents
from flexcache.sequences.limits import Positions
from flexcache.sequences.tokenization import Corpus, tokenize_corpus
from flexcache.sequences.tokenized_corpus import ROW_POSITIONS, TokenizedCorpus

__all__ = [
    "ENCODER_TOKENS",
    "ROW_POSITIONS",
    "Corpus",
    "Positions",
    "TokenizedCorpus",
    "Tokenizer",
    "encode_documents",
    "image_digests",
    "messages_digests",
    "text_digests",
    "tokenize_corpus",
]

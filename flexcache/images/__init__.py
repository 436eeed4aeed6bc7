"""Images as documents: the encoded bytes that a store keeps, the pixels a model reads, and which token is which patch.

`flexcache.images.input` and `flexcache.images.processor` need torch or transformers; the rest does not.
"""

from flexcache.images.encoded import decode, encode
from flexcache.patches import Patches

__all__ = ["Patches", "decode", "encode"]

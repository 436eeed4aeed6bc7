"""Images as documents: the encoded bytes that a store keeps, and the pixels that a model reads.

`flexcache.images.input` needs torch and `flexcache.images.processor` needs transformers; the rest needs neither.
"""

from flexcache.images.encoded import decode_image, encode_image
from flexcache.patches import Patches

__all__ = ["Patches", "decode_image", "encode_image"]

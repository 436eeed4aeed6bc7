"""Documents: what a corpus holds, read in batches from files, tables or dicts, so that it may be larger than memory."""

from flexcache.documents.documents import Documents, open_documents
from flexcache.documents.roles import RESERVED

__all__ = ["RESERVED", "Documents", "open_documents"]

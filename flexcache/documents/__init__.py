"""Documents: a corpus read in batches from files, tables, datasets or dicts, so that it may be larger than memory."""

from flexcache.documents.documents import Documents
from flexcache.documents.opening import open_documents
from flexcache.documents.roles import RESERVED
from flexcache.documents.sources.csv_source import CSV_NULLS
from flexcache.documents.sources.dataset_source import load_dataset

__all__ = ["CSV_NULLS", "RESERVED", "Documents", "load_dataset", "open_documents"]

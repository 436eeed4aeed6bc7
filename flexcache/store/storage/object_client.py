"""Open clients of object storage: one for each bucket and process."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from flexcache.errors import ConfigError

SCHEMES = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "az": "az", "abfs": "az", "memory": "memory"}
"""Kind of storage of each URL scheme."""
REQUESTS = 64
"""Requests for parts of objects that one process has on their way at a time."""
_CONNECT_SECONDS, _READ_SECONDS, _REQUEST_LIMIT = 5, 60, timedelta(hours=1)
_OPTIONS = {
    "s3": ("anon", "endpoint_url", "key", "profile", "secret", "token", "client_kwargs"),
    "gs": ("token",),
    "az": ("account_key", "account_name", "anon", "sas_token"),
    "memory": (),
}
"""Options that are taken from fsspec's configuration, where there is one."""


@dataclass(frozen=True)
class ObjectClient:
    """Clients of one bucket, for any number of threads: obstore's, boto3's for multipart uploads (S3), and threads."""

    objects: Any
    multipart: Any
    threads: ThreadPoolExecutor


_clients: dict[tuple[int, str, str], ObjectClient] = {}
_lock = threading.RLock()


def check_scheme(scheme: str) -> None:
    """Raise ConfigError if URLs of *scheme* cannot be opened."""
    if scheme not in SCHEMES:
        raise ConfigError(
            f"{scheme}:// cannot be opened",
            expected=", ".join(f"{known}://" for known in SCHEMES) + ", or a path",
            remedy="copy the store to one of these, or to a disk",
        )
    missing = [name for name in ("obstore", "boto3") if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"{scheme}:// cannot be opened",
            found=f"{' and '.join(missing)} not installed",
            remedy="pip install 'flexcache-activations[remote]'",
        )


def open_client(scheme: str, bucket: str) -> ObjectClient:
    """Return this process's client of a bucket.

    ConfigError if an option is unknown, or this process was forked from one that has used object storage: threads of
    the client do not survive a fork, so that a request would wait for ever.
    """
    kind, process = SCHEMES[scheme], os.getpid()
    bucket = "" if kind == "memory" else bucket
    client = _clients.get((process, kind, bucket))
    if client is not None:
        return client
    if any(owner != process for owner, _, _ in _clients):
        raise ConfigError(
            "object storage cannot be used in a process that was forked from one that has used it",
            where=f"{scheme}://{bucket}",
            remedy="start processes by spawn or forkserver, as in DataLoader(…, multiprocessing_context='spawn')",
        )
    with _lock:
        if (process, kind, bucket) not in _clients:
            objects, multipart = _OPENERS[kind](bucket, _configured(kind))
            threads = ThreadPoolExecutor(REQUESTS, "flexcache-requests")
            _clients[process, kind, bucket] = ObjectClient(objects, multipart, threads)
    return _clients[process, kind, bucket]


def _open_s3(bucket: str, options: dict[str, Any]) -> tuple[Any, Any]:
    """Return clients of an S3 bucket, configured as botocore is: environment, ~/.aws, roles of the machine."""
    import boto3
    from botocore import UNSIGNED
    from botocore.config import Config
    from botocore.exceptions import NoCredentialsError
    from obstore.auth.boto3 import Boto3CredentialProvider
    from obstore.store import S3Store

    anonymous = _is_true(options.get("anon", os.environ.get("AWS_SKIP_SIGNATURE", False)))
    session = boto3.Session(
        options.get("key"), options.get("secret"), options.get("token"), profile_name=options.get("profile")
    )
    if not anonymous and session.get_credentials() is None:
        raise NoCredentialsError
    multipart = session.client(
        "s3",
        **{"endpoint_url": options.get("endpoint_url"), **options.get("client_kwargs", {})},
        config=Config(
            connect_timeout=_CONNECT_SECONDS,
            read_timeout=_READ_SECONDS,
            retries={"total_max_attempts": 1},
            max_pool_connections=REQUESTS,
            signature_version=UNSIGNED if anonymous else None,
        ),
    )
    certificates = os.environ.get("AWS_CA_BUNDLE")
    objects = S3Store(
        bucket,
        endpoint=multipart.meta.endpoint_url,
        region=_region(multipart, bucket),
        skip_signature=anonymous,
        credential_provider=None if anonymous else Boto3CredentialProvider(session),
        client_options=_client_options(
            allow_http=True, **({"root_certificate": Path(certificates).read_bytes()} if certificates else {})
        ),
        disable_bulk_delete=True,  # which not every server that speaks the protocol has
        retry_config={"max_retries": 0},  # `retry.attempt` repeats requests, also those that break midway
    )
    return objects, multipart


def _region(client: Any, bucket: str) -> str:
    """Return the region by which requests are signed; Amazon's storage tells that of a bucket to anyone."""
    from botocore.exceptions import ClientError

    region = str(client.meta.region_name)
    if ".amazonaws.com" in client.meta.endpoint_url:
        try:
            answer = client.head_bucket(Bucket=bucket)
        except ClientError as error:
            answer = error.response
        region = answer["ResponseMetadata"]["HTTPHeaders"].get("x-amz-bucket-region", region)
    return "us-east-1" if region == "aws-global" else region


def _open_gs(bucket: str, options: dict[str, Any]) -> tuple[Any, Any]:
    from obstore.store import GCSStore

    token = options.get("token")  # the path of a service account's file; or anon, for public buckets
    given = {} if token is None else {"skip_signature": True} if token == "anon" else {"service_account": token}
    return GCSStore(bucket, client_options=_client_options(), config=cast(Any, given)), None


def _open_az(bucket: str, options: dict[str, Any]) -> tuple[Any, Any]:
    """Return the client of a container, named as ``container`` or ``container@account.dfs.core.windows.net``."""
    from obstore.store import AzureStore

    container, _, host = bucket.partition("@")
    names = {"anon": "skip_signature", "sas_token": "sas_key"}
    given = {names.get(name, name): value for name, value in options.items()}
    if host:
        given["account_name"] = host.partition(".")[0]
    return AzureStore(container, client_options=_client_options(), config=cast(Any, given)), None


def _open_memory(bucket: str, options: dict[str, Any]) -> tuple[Any, Any]:
    from obstore.store import MemoryStore

    return MemoryStore(), None


_OPENERS: dict[str, Callable[[str, dict[str, Any]], tuple[Any, Any]]] = {
    "s3": _open_s3,
    "gs": _open_gs,
    "az": _open_az,
    "memory": _open_memory,
}


def _client_options(**options: Any) -> Any:
    return {
        **options,
        "connect_timeout": timedelta(seconds=_CONNECT_SECONDS),
        "read_timeout": timedelta(seconds=_READ_SECONDS),
        "timeout": _REQUEST_LIMIT,
    }


def _configured(kind: str) -> dict[str, Any]:
    """Return the options of a kind of storage in fsspec's configuration; none where fsspec is not installed."""
    try:
        from fsspec.config import conf
    except ImportError:
        return {}
    options = {
        name: value for scheme, of in SCHEMES.items() if of == kind for name, value in conf.get(scheme, {}).items()
    }
    nested = set(options.get("client_kwargs", ())).difference(("endpoint_url", "region_name"))
    unknown = sorted({*set(options).difference(_OPTIONS[kind]), *(f"client_kwargs.{name}" for name in nested)})
    if unknown:
        raise ConfigError(
            f"fsspec's configuration has unknown options for {kind}://",
            expected=", ".join(_OPTIONS[kind]) or "no options",
            found=", ".join(unknown),
            remedy="remove them; docs/remote.md lists the variables of the environment that do the same",
        )
    return options


def _is_true(value: Any) -> bool:
    return str(value).lower() in ("true", "1", "yes")

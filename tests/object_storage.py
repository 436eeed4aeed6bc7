"""Fixtures of object storage: an S3 server on loopback, and memory."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from typing import Any

import pytest

BUCKET = "bucket"
_numbers = itertools.count()


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """The address of a server that speaks S3's protocol."""
    server = pytest.importorskip("moto.server")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running = server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{host}:{port}"
    running.stop()


def environment(address: str) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def connect(address: str) -> Any:
    """Return boto3's client of this server; clients of the library remember their address, and are opened anew."""
    import boto3

    from flexcache.store.storage import object_client

    for key in [key for key in object_client._clients if key[1] == "s3"]:
        object_client._clients.pop(key).multipart.close()
    return boto3.Session().client("s3", endpoint_url=address)


@pytest.fixture(scope="session")
def s3(server: str) -> Iterator[Any]:
    """A client of the server, with a bucket."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(server).items():
            patch.setenv(name, value)
        client = connect(server)
        client.create_bucket(Bucket=BUCKET)
        yield client
        client.close()


def _fresh(kind: str, request: pytest.FixtureRequest) -> str:
    number = next(_numbers)
    if kind == "memory":
        return f"memory://place-{number}"
    request.getfixturevalue("s3")
    return f"s3://{BUCKET}/place-{number}"


@pytest.fixture(params=["memory", pytest.param("s3", marks=pytest.mark.slow)])
def base(request: pytest.FixtureRequest) -> str:
    """A place where there is nothing yet, in memory; on S3 as well where the slow tests run."""
    return _fresh(request.param, request)


@pytest.fixture(params=["memory", "s3"])
def everywhere(request: pytest.FixtureRequest) -> str:
    """A place where there is nothing yet, on each kind of storage."""
    return _fresh(request.param, request)

"""Clients of object storage: where their options come from, and which processes may use them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec.config
import pytest
from botocore import UNSIGNED

from flexcache.errors import ConfigError, UnreachableError
from flexcache.store.storage import object_client
from flexcache.store.storage.object_path import ObjectPath
from tests.object_storage import connect, environment


@pytest.fixture
def bare(s3: Any, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """An environment without server and credentials, and a public object ``s3://bucket/client``."""
    ObjectPath("s3://bucket/client").write_bytes(b"content")
    s3.put_object_acl(Bucket="bucket", Key="client", ACL="public-read")
    for name in environment(server):
        if name not in ("AWS_EC2_METADATA_DISABLED", "AWS_MAX_ATTEMPTS"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setattr(fsspec.config, "conf", {})
    connect(server).close()
    yield monkeypatch
    connect(server).close()


def test_endpoint_and_credentials_come_from_a_profile(bare: pytest.MonkeyPatch, server: str, tmp_path: Path) -> None:
    (tmp_path / "config").write_text(f"[profile lab]\nendpoint_url = {server}\nregion = eu-central-1\n")
    (tmp_path / "credentials").write_text("[lab]\naws_access_key_id = key\naws_secret_access_key = secret\n")
    with pytest.raises(UnreachableError, match="denies access"):
        ObjectPath("s3://bucket/client").read_bytes()
    bare.setenv("AWS_PROFILE", "lab")
    assert ObjectPath("s3://bucket/client").read_bytes() == b"content"
    assert ObjectPath("s3://bucket/client").client.objects.config["region"] == "eu-central-1"


def test_options_come_from_fsspecs_configuration(bare: pytest.MonkeyPatch, server: str) -> None:
    options = {"endpoint_url": server, "key": "key", "secret": "secret", "client_kwargs": {"region_name": "eu-west-1"}}
    bare.setitem(fsspec.config.conf, "s3", options)
    assert ObjectPath("s3://bucket/client").read_bytes() == b"content"
    assert ObjectPath("s3://bucket/client").client.objects.config["region"] == "eu-west-1"


@pytest.mark.parametrize("name", ["environment", "configuration"])
def test_a_public_bucket_needs_no_credentials(name: str, bare: pytest.MonkeyPatch, server: str) -> None:
    bare.setenv("AWS_ENDPOINT_URL", server)
    if name == "environment":
        bare.setenv("AWS_SKIP_SIGNATURE", "true")
    else:
        bare.setitem(fsspec.config.conf, "s3", {"anon": True})
    path = ObjectPath("s3://bucket/client")
    assert path.client.objects.config["skip_signature"]
    assert path.client.multipart.meta.config.signature_version is UNSIGNED
    assert path.read_bytes() == b"content"


def test_an_unknown_option_names_the_known_ones(bare: pytest.MonkeyPatch) -> None:
    bare.setitem(fsspec.config.conf, "s3", {"anonymous": True, "client_kwargs": {"verify": False}})
    with pytest.raises(ConfigError, match="unknown options for s3") as caught:
        ObjectPath("s3://bucket/client").read_bytes()
    assert caught.value.found == "anonymous, client_kwargs.verify"
    assert "anon, endpoint_url, key" in str(caught.value.expected)


def test_options_of_google_and_azure_reach_their_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_client, "_clients", {})
    monkeypatch.setattr(fsspec.config, "conf", {"az": {"account_key": "a2V5"}})
    client = ObjectPath("abfs://container@account.dfs.core.windows.net/run.zarr").client.objects
    assert (client.config["container_name"], client.config["account_name"]) == ("container", "account")
    monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "anon"})
    assert ObjectPath("gs://bucket/run.zarr").client.objects.config["skip_signature"]
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "other")
    assert ObjectPath("az://container/run.zarr").client.objects.config["container_name"] == "container"


FORKED = """
import os, sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)
from flexcache.store.storage.object_path import ObjectPath
path = ObjectPath("memory://bucket/object")
if sys.argv[1] == "used":
    path.write_bytes(b"content")
child = os.fork()
if child == 0:
    try:
        path.write_bytes(b"from the child")
        print("written", flush=True)
    except Exception as error:
        print(error, flush=True)
    os._exit(0)
os.waitpid(child, 0)
"""


@pytest.mark.parametrize(
    ("parent", "told"), [("used", "cannot be used in a process that was forked"), ("new", "written")]
)
def test_a_process_forked_from_one_that_used_object_storage_says_so(parent: str, told: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKED, parent], capture_output=True, text=True, timeout=60, check=True
    )
    assert told in done.stdout

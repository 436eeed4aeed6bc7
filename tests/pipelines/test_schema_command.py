"""flexcache schema: the JSON schema of files, made from their models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from flexcache.documents.sources.files import FORMATS
from pipelines.config import CaptureConfig
from tests.pipelines.test_cli import run

CONFIGS = Path(__file__).parents[2] / "pipelines" / "configs"


@pytest.mark.parametrize("kind", ["capture", "replay"])
def test_the_schema_describes_every_key_of_the_example_files(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    schema = json.loads(run(capsys, "schema", kind))
    assert schema["additionalProperties"] is False
    assert all("description" in one for one in schema["properties"].values())
    files = sorted(CONFIGS.glob("*.yaml") if kind == "capture" else (CONFIGS / "replay").glob("*.yaml"))
    assert files
    for path in files:
        assert set(yaml.safe_load(path.read_text())) <= set(schema["properties"])


def test_the_schema_has_the_keys_that_a_file_can_have(capsys: pytest.CaptureFixture[str]) -> None:
    properties = json.loads(run(capsys, "schema"))["properties"]
    assert set(properties) == set(CaptureConfig.names())
    assert properties["rows"]["anyOf"][0]["enum"] == ["all", "last", "first", "mean"]
    assert {kind["type"] for kind in properties["sites"]["anyOf"]} == {"string", "array", "object"}


def test_every_format_of_documents_can_be_configured(capsys: pytest.CaptureFixture[str]) -> None:
    schema = json.loads(run(capsys, "schema"))
    (formats,) = (
        option["enum"]
        for part in schema["$defs"].values()
        for option in part["properties"].get("format", {}).get("anyOf", [])
        if "enum" in option
    )
    assert set(formats) == set(FORMATS)


def test_renamed_keys_name_the_new_key(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for change, new in (("buffer_mb=64", "buffer_bytes: 256 MiB"), ("patience=3", "heartbeat_timeout: 120")):
        text = run(capsys, "plan", config, "--set", change, status=2)
        assert f"{change.partition('=')[0]!r} is now called" in text
        assert new in text
    config.write_text(config.read_text() + "patience: 3\n")
    assert "'patience' is now called 'heartbeat_timeout'" in run(capsys, "plan", config, status=2)

"""YAML files of the commands, validated whole before anything is loaded."""

from pipelines.config.capture_config import CaptureConfig, read_config
from pipelines.config.sections import DocumentsSource

__all__ = ["CaptureConfig", "DocumentsSource", "read_config"]

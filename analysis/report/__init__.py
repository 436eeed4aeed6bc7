"""Write a self-contained HTML page about a capture, the result of a probe, and its reliability."""

from __future__ import annotations

from analysis.report.page import write

__all__ = ["write"]

"""One HTML page that says what was captured, what a probe found in it, and how much to believe it."""

from __future__ import annotations

from analysis.report.page import write

__all__ = ["write"]

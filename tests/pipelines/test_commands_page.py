from __future__ import annotations

from tests.pipelines.commands_page import PAGE, page


def test_the_page_of_commands_matches_the_command_line() -> None:
    again = "write it again: python -m tests.pipelines.commands_page"
    assert PAGE.read_text(encoding="utf-8") == page(), again

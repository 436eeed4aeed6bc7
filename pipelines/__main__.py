"""``python -m pipelines``: the same commands as ``flexcache``, for launchers that take a module."""

from pipelines.cli import main

main()

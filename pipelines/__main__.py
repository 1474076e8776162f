"""``python -m pipelines`` is the command ``rlsparse``."""

from pipelines.cli import main

main()

"""``python -m edgeattn`` is ``edgeattn``."""

from edgeattn.cli import main

main()

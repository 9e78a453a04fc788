"""``python -m tilepipe``."""

from tilepipe.cli.main import main

main()

"""``python -m secateur`` is the console script."""

from secateur.cli.main import main

main()

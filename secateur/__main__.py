"""The entry point of ``python -m secateur``, which runs the console script ``secateur``."""

from secateur.cli.main import main

main()

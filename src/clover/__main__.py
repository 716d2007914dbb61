"""``python -m clover`` is the command ``clover``."""

from clover.command.cli import main

main()

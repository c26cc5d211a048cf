"""``python -m explain2me``."""

from explain2me.cli import main

main()

"""``python -m explain2me``."""

from explain2me.cli.entry import main

main()

"""Draw the tables of a run as docs/terminal.svg: python docs/terminal.py runs/demo/run."""

import io
import re
import sys
from pathlib import Path

from rich.console import Console

from explain2me import open_run
from explain2me.report.terminal import show_run

console = Console(record=True, width=172, highlight=False, file=io.StringIO())
show_run(open_run(sys.argv[1]), console)
svg = console.export_svg(title="explain2me demo")
svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.S)  # a picture in a README loads nothing from elsewhere
Path(__file__).with_name("terminal.svg").write_text("\n".join(line.rstrip() for line in svg.splitlines()) + "\n")

"""`explain2me verify` and `compact`: check and pack the files of a run."""

import contextlib
from typing import Annotated

import typer

from explain2me.cli.console import make_console, print_line, progress_bar
from explain2me.cli.options import RunFolder


def verify(
    run: RunFolder,
    verify_hashes: Annotated[
        bool, typer.Option("--verify-hashes", help="Read every image too and compare its sha256.")
    ] = False,
) -> None:
    """Check that every model x image x condition of RUN is there once, or in the quarantine, and no file changed."""
    from explain2me.run.files import only_writer
    from explain2me.run.folder import open_run
    from explain2me.stages.verify import verify_run

    console = make_console()
    with progress_bar(console, "verify") as on_done:
        problems = verify_run(open_run(run), images=verify_hashes, on_done=on_done)
        if problems:  # another command may have replaced files meanwhile: look again while none does
            with contextlib.suppress(OSError), only_writer(run):  # a folder that is only to be read has no lock
                problems = verify_run(open_run(run), images=verify_hashes, on_done=on_done)
    for problem in problems:
        print_line(console, problem)
    if problems:
        console.print(
            "Call `explain2me run` with the same config and folder to make what is missing; move away what is damaged first."
        )
        raise typer.Exit(2)
    console.print("whole")


def compact(run: RunFolder) -> None:
    """Put the many small files of RUN into few large ones; nothing is lost and every command reads them."""
    from explain2me.run.folder import open_run
    from explain2me.stages.compact import compact_run

    console = make_console()
    done = compact_run(open_run(run))
    for folder, (before, after) in done.items():
        print_line(console, f"{folder}: {before} files -> {after}")
    if not done:
        console.print("nothing to do")

"""Options and arguments that several commands share."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from explain2me.config.schema import Config


def set_option(example: str) -> Any:
    """The option ``--set`` with an example of its own."""
    return typer.Option("--set", metavar="KEY=VALUE", help=f"Change one field, e.g. {example}.")


ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="TOML file of the run.", show_default=False)]
StudyFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="TOML file of the study.", show_default=False)]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.", show_default=False)]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the run or study; default: runs/NAME.")]
ShardOf = Annotated[
    str | None,
    typer.Option("--shard", metavar="I/N", help="Do the I-th (from 0) of N shares; N machines work in one folder."),
]
Sets = Annotated[list[str] | None, set_option("compute.batch_size=16")]
VerifyHashes = Annotated[
    bool, typer.Option("--verify-hashes", help="Insist on a sha256 in the manifest for every image, and compare it.")
]


def load_settings(
    config: Path, out: Path | None, sets: list[str] | None, *, verify_hashes: bool = False
) -> "tuple[Config, Path]":
    """The config with ``--set`` applied, and the folder of its run; every image must have a hash where that is asked."""
    from explain2me.config.load import load_config

    settings = load_config(config, sets or ())
    if verify_hashes:
        from explain2me.stages.refusals import require_all_hashes

        require_all_hashes(settings)
    return settings, out or Path("runs") / settings.name


def parse_shard(shard: str | None) -> tuple[int, int]:
    """``I/N``, 0 <= I < N."""
    from explain2me.errors import ConfigError

    if shard is None:
        return 0, 1
    index, slash, count = shard.partition("/")
    if not slash or not index.isdecimal() or not count.isdecimal() or int(index) >= int(count):
        raise ConfigError(f"--shard: expected I/N with I from 0 to N-1, such as 0/4, got {shard!r}")
    return int(index), int(count)

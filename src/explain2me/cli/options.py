"""Options and arguments that several commands share."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from explain2me.config.schema import Config
    from explain2me.images.select import Selection


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
Reuse = Annotated[
    list[Path] | None,
    typer.Option("--reuse", metavar="RUN", help="Take equal maps from another run instead of making them; repeatable."),
]
VerifyHashes = Annotated[
    bool, typer.Option("--verify-hashes", help="Insist on a sha256 in the manifest for every image, and compare it.")
]


def load_settings(config: Path, out: Path | None, sets: list[str] | None) -> "tuple[Config, Path]":
    """The config with ``--set`` applied, and the folder of its run."""
    from explain2me.config.load import load_config

    settings = load_config(config, sets or ())
    return settings, out or Path("runs") / settings.name


def select(config: "Config", *, verify_hashes: bool) -> "Selection":
    """The images of a run, which must all have a hash to verify.

    A mistake in their list, or in the files of a detector, is reported before PyTorch is imported.
    """
    from explain2me.detectors.runs import check_runs
    from explain2me.images.select import list_data, refuse_unlabelled_target, require_all_hashes, select_images

    listing = list_data(config.data)
    if verify_hashes:
        require_all_hashes(config.data, config.training, config.seed, listing)
    selection = select_images(config.data, config.seed, listing)
    refuse_unlabelled_target(config.salience.target, selection.images)
    check_runs(config.detectors, config.measures, config.seed)
    return selection


def parse_shard(shard: str | None) -> tuple[int, int]:
    """(I, N) of ``I/N``, 0 <= I < N; (0, 1) for None."""
    from explain2me.errors import ConfigError

    if shard is None:
        return 0, 1
    index, slash, count = shard.partition("/")
    if not slash or not index.isdecimal() or not count.isdecimal() or int(index) >= int(count):
        raise ConfigError(f"--shard: expected I/N with I from 0 to N-1, such as 0/4, got {shard!r}")
    return int(index), int(count)

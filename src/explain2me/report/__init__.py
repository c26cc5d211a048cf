"""Stage 4: summary tables to a page, figures, tables for a paper, sentences and model cards.

``summary`` reads the summary tables, ``sheets`` makes every table once, ``material`` reads what figures need beside it;
``terminal``, ``page``, ``export`` and ``cards`` lay out. Names below are imported when they are first used, so that
``explain2me show`` waits neither for matplotlib nor for torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from explain2me.report.write import Plots, write_report

__all__ = ["Plots", "write_report"]


def __getattr__(name: str) -> Any:
    """Import on first use."""
    if name not in __all__:
        raise AttributeError(f"module 'explain2me.report' has no attribute {name!r}")
    import explain2me.report.write as write

    return getattr(write, name)

"""What all figures share: colours, names, axes, maps laid over images."""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from explain2me.report.material import Material
from explain2me.text import printable_line

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F", "#8C564B", "#BCBD22")
"""Okabe and Ito's colours first: colour-blind readers can distinguish them."""
MARKERS = "osD^vPX*<>"
LINES: Any = ("-", "--", "-.", ":")
STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "figure.constrained_layout.use": True,
    "svg.fonttype": "none",
    "svg.hashsalt": "explain2me",
    "pdf.fonttype": 42,
}
MOST_NAME = 40
ALPHA = 0.55  # of a map over its image


class Drawn(NamedTuple):
    """A figure: ``name`` of its files, a ``title``, a ``text`` that says what it shows, and the figure itself."""

    name: str
    title: str
    text: str
    figure: Figure


Draw = Callable[[Material, Colormap], Drawn | None]
DrawMeasure = Callable[..., Drawn | None]
"""(material, colormap, *, measure, row): a figure of one measure, its file and title those of the row."""


def safe(text: str, most: int = MOST_NAME) -> str:
    """A name as matplotlib can draw it: printable, no formulas, not too long.

    >>> safe("a$b$" + 40 * "x", 8)
    'a\\\\$b\\\\$xxx…'
    """
    text = printable_line(text)
    text = text if len(text) <= most else text[: most - 1] + "…"
    return text.replace("$", "\\$")


def distinct(names: Sequence[str], most: int) -> list[str]:
    """Names cut to ``most`` characters that still differ: without the start that they share.

    >>> distinct(["resnet50-seed1", "resnet50-seed2"], 8), distinct(["a", "b"], 8)
    (['…1', '…2'], ['a', 'b'])
    """
    if len(names) < 2 or max(map(len, names)) <= most:
        return [safe(name, most) for name in names]
    shared = next((i for i, signs in enumerate(zip(*names, strict=False)) if len(set(signs)) > 1), min(map(len, names)))
    return [safe(f"…{name[shared:]}" if shared else name, most) for name in names]


def wrapped(name: str, width: int = 16, lines: int = 3) -> str:
    """A name on a few short lines, cut at hyphens and underscores where it has them."""
    words = re.split(r"(?<=[-_ ./])", printable_line(name))
    texts = [""]
    for word in words:
        if texts[-1] and len(texts[-1]) + len(word) > width:
            texts.append("")
        texts[-1] += word
    texts = [text if len(text) <= width + 4 else text[: width + 3] + "…" for text in texts]
    kept = texts if len(texts) <= lines else [*texts[: lines - 1], texts[lines - 1] + "…"]
    return "\n".join(kept).replace("$", "\\$")


def colour_of(index: int) -> str:
    """Colour of a detector by its position."""
    return PALETTE[index % len(PALETTE)]


def look_of(index: int) -> Any:
    """Colour and marker of a detector by its position, as arguments of matplotlib."""
    return {"color": colour_of(index), "marker": MARKERS[index % len(MARKERS)]}


def panel_grid(rows: int, columns: int, *, width: float, height: float) -> tuple[Figure, np.ndarray]:
    """A figure of a size in inches, and its axes (rows, columns)."""
    figure = Figure(figsize=(width, height))
    return figure, figure.subplots(rows, columns, squeeze=False)


def add_legend(figure: Figure, detectors: Sequence[str], *lines: tuple[str, Any]) -> None:
    """One entry a detector below the figure, and one a kind of line."""
    styles: list[Any] = ["-"] * len(detectors) if lines else [LINES[i % len(LINES)] for i in range(len(detectors))]
    handles = [
        Line2D([], [], **look_of(i), linestyle=style, label=safe(name))
        for i, (name, style) in enumerate(zip(detectors, styles, strict=True))
    ]
    handles += [Line2D([], [], color="0.3", linestyle=style, label=name) for name, style in lines]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(3, len(handles)), frameon=False, fontsize=8)


def enlarged(salience: Float[np.ndarray, "h w"], size: tuple[int, ...]) -> Float[np.ndarray, "H W"]:
    """A map scaled min-max and enlarged smoothly, as it is laid over an image; zeros where it is dead or flat."""
    tensor = torch.nan_to_num(torch.from_numpy(np.array(salience, dtype=np.float32)))
    tensor = tensor - tensor.min()
    tensor = tensor / tensor.max().clamp_min(1e-12)
    fine = torch.nn.functional.interpolate(tensor[None, None], size=tuple(size), mode="bicubic", align_corners=False)
    return fine[0, 0].clamp(0, 1).numpy()


def show_overlay(ax: Axes, pixels: np.ndarray | None, overlay: np.ndarray | None, colormap: Colormap) -> None:
    """Draw an image, a map, or a map over an image."""
    hide_axes(ax)
    if pixels is not None:
        ax.imshow(pixels.transpose(1, 2, 0), interpolation="antialiased")
    if overlay is not None:
        ax.imshow(overlay, cmap=colormap, vmin=0, vmax=1, alpha=ALPHA if pixels is not None else 1.0)


def hide_axes(ax: Axes) -> None:
    """Take the ticks away."""
    ax.set_xticks([])
    ax.set_yticks([])

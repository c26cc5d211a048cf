"""Draw everything and write it into the folder ``report`` of a run."""

import contextlib
import functools
import io
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from PIL import Image

from explain2me.config.schema import Config
from explain2me.errors import RunFolderError
from explain2me.report.cards import findings_list, model_cards
from explain2me.report.export import to_csv, to_latex
from explain2me.report.figures import all_figures, draws
from explain2me.report.figures.drawing import STYLE, Drawn
from explain2me.report.findings import findings
from explain2me.report.findings.kinds import Finding
from explain2me.report.material import Material, drawn, gather
from explain2me.report.page.render import render
from explain2me.report.page.viewer import data_uri, webp_uri
from explain2me.report.sheets import sheets
from explain2me.report.sheets.sheet import Sheet
from explain2me.report.summary import Tables
from explain2me.run.events import log_event
from explain2me.run.files import atomic_path, only_writer, replaced_folder
from explain2me.run.folder import Run

MOST_SVG_BYTES = 150_000
"""A picture that is larger as SVG (it holds photographs or many points) stands in the page as WebP."""
DOTS_PER_INCH = 130
WRITTEN = ".written"
"""Names of the files of a report."""
MOST_CHARACTERS = 2**24
"""That are read of such a list."""


def write_report(
    run: Run,
    config: Config,
    *,
    on_done: Callable[[int, int], None] | None = None,
    on_findings: Callable[[Sequence[Finding]], None] | None = None,
) -> Path:
    """Write ``report/``: index.html, findings.md, figures/*.pdf, *.svg, *.png, tables/*.csv, *.tex,
    model-cards/DETECTOR/model-card.md.

    Args:
        run: with a summary.
        config: of the run, possibly with another table [report].
        on_done: called with the number of figures drawn and to draw.
        on_findings: called at the end with what the numbers say, the most decisive first.

    Returns:
        ``report/index.html``.

    Raises:
        RunFolderError: there is no summary, it was made from other scores, or a file is damaged.
        BusyError: another process writes into the run.
    """
    started = time.monotonic()
    with only_writer(run.folder):
        run.refuse_changed()
        if run.summary_is_old():
            raise RunFolderError(
                f"the tables in {str(run.folder / 'summary')!r} were made from other scores than those in scores/; call "
                f"`explain2me summarise {run.folder}` first"
            )
        with replaced_folder(run.folder / "report") as folder:
            sentences = _write_into(folder, run, config, on_done)
            _keep_own_files(run.folder / "report", folder)
    log_event(run.folder, (0, 1), "report", "done", seconds=round(time.monotonic() - started, 3))
    if on_findings:
        on_findings(sentences)
    return run.folder / "report" / "index.html"


def _write_into(
    folder: Path, run: Run, config: Config, on_done: Callable[[int, int], None] | None
) -> Sequence[Finding]:
    """Write every file of a report, and return the findings."""
    material = gather(run, images_per_measure=config.report.images)
    colormap = matplotlib.colormaps[config.report.colormap]
    tables, sentences = list(sheets(material.tables)), findings(material)
    figures = _draw_all(drawn(material), colormap, folder / "figures", on_done)
    texts = _texts(material.tables, tables, sentences)
    texts["index.html"] = render(material, figures, tables, sentences, colormap)
    for name, text in texts.items():
        _write(folder / name, text)
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    _write(folder / WRITTEN, "\n".join(names) + "\n")
    return sentences


def _texts(tables: Tables, shown: Sequence[Sheet], sentences: Sequence[Finding]) -> dict[str, str]:
    """Tables, model cards and findings, by the names of their files."""
    texts = {"findings.md": findings_list(sentences)}
    for sheet in shown:
        texts |= {f"tables/{sheet.name}.csv": to_csv(sheet), f"tables/{sheet.name}.tex": to_latex(sheet)}
    for name, card in model_cards(tables, sentences):
        texts[f"model-cards/{name}/model-card.md"] = card
    return texts


def _draw_all(
    material: Material, colormap: Colormap, folder: Path, on_done: Callable[[int, int], None] | None
) -> dict[str, list[tuple[Drawn, str]]]:
    """Draw and save every figure; returns those of each section of the page, each with its picture as a data URI."""
    figures: dict[str, list[tuple[Drawn, str]]] = {}
    draws_by_section = all_figures(material)
    with matplotlib.rc_context(STYLE):
        for number, (section, draw) in enumerate(draws_by_section, start=1):
            figure = draw(material, colormap)
            if figure is not None:
                figures.setdefault(section, []).append((figure, _save(figure, folder)))
            if on_done:
                on_done(number, len(draws_by_section))
    return figures


class Plots:
    """Figures of a run for notebooks: ``run.plot.radar()``, ``run.plot.roc()`` and so on return matplotlib figures.

    ``dir(run.plot)`` lists them.
    """

    def __init__(self, run: Run) -> None:
        self._run = run

    @functools.cached_property
    def _material(self) -> Material:
        return drawn(gather(self._run, images_per_measure=self._run.config.report.images))

    def __getattr__(self, name: str) -> Callable[[], Figure]:
        by_name = draws()
        if name not in by_name:
            raise AttributeError(f"no figure {name!r}; there are {', '.join(by_name)}")

        def draw_it() -> Figure:
            colormap: Colormap = matplotlib.colormaps[self._run.config.report.colormap]
            with matplotlib.rc_context(STYLE):
                figure = by_name[name](self._material, colormap)
            if figure is None:
                raise ValueError(f"{name}: this run has no data for it (the measure is off, or there are no labels)")
            return figure.figure

        return draw_it

    def __dir__(self) -> list[str]:
        return list(draws())


def _keep_own_files(old: Path, new: Path) -> None:
    """Copy the files that a person put beside the report of before; its own are in its list, which opens none."""
    with contextlib.suppress(FileNotFoundError):
        with (old / WRITTEN).open(encoding="utf-8", errors="replace") as file:
            written = {WRITTEN, "index.html", *file.read(MOST_CHARACTERS).splitlines()}
        for path in old.rglob("*"):
            target = new / path.relative_to(old)
            if path.is_file() and path.relative_to(old).as_posix() not in written and not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, target, follow_symlinks=False)


def _save(named: Drawn, folder: Path) -> str:
    """PDF, SVG and PNG; returns the picture for the page as a data URI."""
    figure = named.figure
    figure.dpi = DOTS_PER_INCH
    figure.draw_without_rendering()  # lays it out once; savefig would do it again for each format, and draw it twice
    figure.set_layout_engine("none")
    data: dict[str, bytes] = {}
    for kind, write in KINDS.items():
        stream = io.BytesIO()
        write(figure, stream)
        data[kind] = stream.getvalue()
        with atomic_path(folder / f"{named.name}.{kind}") as temporary:
            temporary.write_bytes(data[kind])
    if len(data["svg"]) <= MOST_SVG_BYTES:
        return data_uri("image/svg+xml", data["svg"])
    return webp_uri(Image.open(io.BytesIO(data["png"])).convert("RGB"), quality=72)


def _pdf(figure: Figure, stream: io.BytesIO) -> None:
    canvas: Any = FigureCanvasPdf(figure)
    canvas.print_pdf(stream, metadata={"CreationDate": None})


def _svg(figure: Figure, stream: io.BytesIO) -> None:
    canvas: Any = FigureCanvasSVG(figure)
    canvas.print_svg(stream, metadata={"Date": None})


def _png(figure: Figure, stream: io.BytesIO) -> None:
    canvas: Any = FigureCanvasAgg(figure)
    canvas.print_png(stream)


KINDS = {"pdf": _pdf, "svg": _svg, "png": _png}
"""How a figure is written in each format: without a time, so that the same figure is the same bytes."""


def _write(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")

"""The page in Debian's Chromium, with the network cut: by mouse, by keyboard, at two widths, for axe and for print."""

import shutil
from collections.abc import Iterator

import pytest

from explain2me.report.material import gather

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium here; on Debian and Ubuntu: apt-get install chromium"
)
TAGS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]


@pytest.fixture(scope="module")
def browser() -> Iterator:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser):
    """Open the page of a run offline; fails afterwards on anything in the console or on any request."""
    opened = []

    def go(run, *, width=1440, scheme="light"):
        context = browser.new_context(viewport={"width": width, "height": 900}, offline=True, color_scheme=scheme)
        page = context.new_page()
        messages, requests = [], []
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("dialog", lambda dialog: messages.append(dialog.message))
        page.on("request", lambda request: requests.append(request.url))
        page.goto((run.folder / "report" / "index.html").as_uri())
        opened.append((context, messages, requests))
        return page

    yield go
    for context, messages, requests in opened:
        context.close()
        assert messages == []
        assert [url for url in requests if not url.startswith(("file:", "data:"))] == []


def status(page, name):
    return page.inner_text(f"#{name}-status")


def test_it_opens_without_a_network(visit, reported):
    page = visit(reported)
    assert page.title() == "tiny: where the detectors look"
    assert "26 of 26 images" in status(page, "table")
    assert "Image 1 of" in status(page, "viewer")
    decoded = page.evaluate("""Promise.all([...document.images].map(image => {
        image.loading = 'eager';
        return image.decode().then(() => image.naturalWidth > 0);
    }))""")
    assert len(decoded) > 15
    assert all(decoded)


@pytest.mark.parametrize("width", [390, 1440])
def test_nothing_is_wider_than_the_window(visit, reported, width):
    page = visit(reported, width=width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1440, "light")])
def test_axe_finds_nothing(visit, reported, width, scheme):
    from axe_playwright_python.sync_playwright import Axe

    page = visit(reported, width=width, scheme=scheme)
    result = Axe().run(page, options={"runOnly": TAGS})
    assert result.violations_count == 0, result.generate_report()


def test_sorting_by_mouse_and_keyboard(visit, reported):
    page = visit(reported)
    button = page.locator("#table thead button", has_text="entropy")
    column = page.evaluate(
        "[...document.querySelectorAll('#table thead button')].findIndex(b => b.textContent === 'entropy')"
    )

    def shown():
        texts = page.locator(f"#table tbody tr > *:nth-child({column + 1})").all_inner_texts()
        return [float(text) for text in texts if text != "-"]

    button.click()
    assert shown() == sorted(shown(), reverse=True)
    assert page.locator("#table thead th[aria-sort=descending]").inner_text() == "entropy"
    button.focus()
    page.keyboard.press("Enter")
    assert shown() == sorted(shown())
    assert page.locator("#table thead th[aria-sort]").count() == 1


def test_filtering_and_pages(visit, reported):
    page = visit(reported)
    assert page.locator("#table tbody tr").count() == 20
    page.click("#table-next")
    assert page.locator("#table tbody tr").count() == 6
    assert page.get_attribute("#table-next", "aria-disabled") == "true"
    page.click("#table-next", force=True)
    assert page.locator("#table tbody tr").count() == 6
    page.fill("#table-find", "gan_b")
    assert status(page, "table").startswith("5 of 26 images")
    page.fill("#table-find", "")
    page.select_option("#table-which", "wrong")
    wrong = int(status(page, "table").split()[0])
    images = reported.image_table.to_pandas()
    material = gather(reported, images_per_measure=1)
    first = material.scores[material.scores.detector == "first-detector"]
    predictions = [reported.classes[i] for i in first.predicted]
    assert wrong == (images.label.to_numpy() != predictions).sum() > 0
    for row in page.locator("#table tbody tr").all():
        cells = row.locator("td").all_inner_texts()
        assert cells[0] != cells[2]
    page.select_option("#table-detector", "1")
    assert "of 26 images" in status(page, "table")


def test_the_viewer_by_keyboard_and_mouse(visit, reported):
    page = visit(reported)
    page.focus("#viewer")
    page.keyboard.press("ArrowRight")
    assert status(page, "viewer").startswith("Image 2 of")
    page.keyboard.press("ArrowDown")
    assert "Condition: salt pepper@0.05" in status(page, "viewer")
    page.keyboard.press("ArrowUp")
    assert "Condition: clean" in status(page, "viewer")
    page.click("#viewer-previous")
    assert status(page, "viewer").startswith("Image 1 of")
    assert page.get_attribute("#viewer-previous", "aria-disabled") == "true"
    page.keyboard.press("ArrowRight")  # the focus is still in the viewer
    assert status(page, "viewer").startswith("Image 2 of")
    assert page.locator("#viewer-maps canvas").count() == 4  # two detectors, two runs
    page.select_option("#viewer-why", "entropy|lowest")
    assert "entropy: lowest" in status(page, "viewer")
    label = page.locator("#viewer-maps canvas").first.get_attribute("aria-label")
    assert "peak in row" in label or "dead map" in label
    page.select_option("#viewer-condition", "3")
    assert page.locator("#viewer-maps canvas").count() == 2


def test_a_canvas_shows_the_map(visit, reported):
    page = visit(reported)
    page.wait_for_timeout(200)
    colours = page.evaluate("""[...document.querySelectorAll('#viewer-maps canvas')].map(c =>
        new Set(c.getContext('2d').getImageData(0, 0, c.width, c.height).data).size)""")
    assert max(colours) > 20


def test_a_name_in_the_table_opens_the_viewer(visit, reported):
    page = visit(reported)
    button = page.locator("#table tbody button").first
    name = button.inner_text()
    button.click()
    assert f": {name} (" in status(page, "viewer")
    assert page.evaluate("document.activeElement.id") == "viewer"


def test_every_control_is_reached_by_the_keyboard(visit, reported):
    page = visit(reported)
    num_controls = page.evaluate(
        "[...document.querySelectorAll('a, button:not(:disabled), select, input, summary, [tabindex=\"0\"]')].length"
    )
    seen = set()
    page.keyboard.press("Tab")
    for i in range(num_controls + 5):
        seen.add(page.evaluate("(e => [...document.querySelectorAll('*')].indexOf(e))(document.activeElement)"))
        page.keyboard.press("Tab")
        assert i < 1000
    assert len(seen) >= num_controls


def test_hostile_names_run_nothing_and_are_shown(visit, hostile):
    page = visit(hostile)
    page.wait_for_timeout(200)
    assert page.evaluate("typeof evil") == "undefined"
    assert "<img src=x onerror=evil()>" in page.inner_text("h1")
    assert "</script><script>evil()</script>" in page.inner_text("#table tbody")
    assert "[red]x[/red]" in page.inner_text("#table tbody")
    assert page.locator("img[src=x]").count() == 0
    page.locator("#table tbody button").first.click()


def test_it_prints(visit, reported, tmp_path):
    page = visit(reported)
    page.pdf(path=tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").stat().st_size > 50_000

"""Photograph the top of a report as docs/report.png: python docs/screenshot.py runs/demo/run (needs chromium)."""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

page_file = Path(sys.argv[1]) / "report" / "index.html"
with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
    page = browser.new_page(viewport={"width": 1200, "height": 1320})
    page.goto(page_file.resolve().as_uri())
    page.screenshot(path=Path(__file__).with_name("report.png"))
    browser.close()

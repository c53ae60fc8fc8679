"""The HTML report in a real browser: no console errors, every plot shown, nothing wider than the window."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from test_report import full_run

from minisgl.profiling.report import write_reports

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium (apt-get install chromium)")
# Appended to a copy of the page; the report itself has no script.
PROBE = """<script>addEventListener('load', () => {
  const seen = {
    plots: [...document.images].map(i => i.complete && i.naturalWidth > 0 && i.getBoundingClientRect().width > 200),
    width: innerWidth, page: document.documentElement.scrollWidth, tables: document.querySelectorAll('table').length,
    cut: [...document.querySelectorAll('h1, h2, p, li, img')]
      .filter(e => e.getBoundingClientRect().right > innerWidth).length,
    requests: performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).length,
  }
  const out = document.createElement('pre'); out.id = 'seen'; out.textContent = JSON.stringify(seen)
  document.body.append(out) })</script>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = full_run(tmp_path_factory.mktemp("run"))
    write_reports([run], run / "report")
    probed = run / "probed.html"
    probed.write_text((run / "report" / "report.html").read_text().replace("</body>", f"{PROBE}</body>"))
    return probed


@pytest.mark.parametrize("width", [500, 1600])  # headless windows are no narrower; see the frame below for 400
def test_page_is_whole_at_every_width(page: Path, tmp_path: Path, width: int) -> None:
    seen, log = look(page, tmp_path, width)
    check(seen, log)


def test_page_is_whole_in_400_pixels(page: Path, tmp_path: Path) -> None:
    narrow = page.with_name("narrow.html")
    source = page.read_text().replace("&", "&amp;").replace('"', "&quot;")
    collect = """<script>addEventListener('load', () => setTimeout(() => {
      document.body.append(document.querySelector('iframe').contentDocument.getElementById('seen').cloneNode(true)) }))
      </script>"""
    narrow.write_text(f'<!DOCTYPE html><body><iframe width=400 height=4000 srcdoc="{source}"></iframe>{collect}</body>')
    seen, log = look(narrow, tmp_path, 800)
    assert seen["width"] <= 400
    check(seen, log)


def check(seen: dict[str, object], log: str) -> None:
    assert seen["plots"] and all(seen["plots"])  # type: ignore[arg-type]
    assert seen["page"] <= seen["width"], "the page scrolls sideways"  # type: ignore[operator]
    assert (seen["cut"], seen["requests"]) == (0, 0)
    assert seen["tables"] > 10  # type: ignore[operator]
    assert "CONSOLE" not in log, log


def look(page: Path, profile: Path, width: int) -> tuple[dict[str, object], str]:
    """What the probe saw, and what the browser logged."""
    assert CHROMIUM is not None
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--disable-dev-shm-usage"]
    flags += [f"--user-data-dir={profile}", f"--window-size={width},3000", "--virtual-time-budget=5000", "--dump-dom"]
    done = subprocess.run([CHROMIUM, *flags, page.as_uri()], capture_output=True, text=True, timeout=240)
    found = re.findall(r'<pre id="seen">(.*?)</pre>', done.stdout)
    assert found, f"the page didn't load: {done.stderr[-2000:]}"
    seen: dict[str, object] = json.loads(found[-1].replace("&amp;", "&"))
    return seen, done.stderr

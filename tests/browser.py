"""Pages in a real browser, for tests: headless Chromium looks at them in frames of several widths."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium on the path (apt-get install chromium)")

# Of each frame: its width, whether it scrolls sideways, images that loaded, the smallest letters of a chart in pixels, and the
# sections whose charts, tables and images all end left of the middle.
_SCRIPT = """
addEventListener('load', () => {
  const told = [...document.querySelectorAll('iframe')].map(frame => {
    const page = frame.contentDocument, width = frame.clientWidth, sections = [];
    for (const part of page.body.children) {
      if (part.tagName == 'H2') sections.push([part.textContent, []]);
      else if (sections.length) {
        const shown = [part, ...part.querySelectorAll('*')].filter(one => one.matches('table, svg, figure img, .tile'));
        sections.at(-1)[1].push(...shown.map(one => one.getBoundingClientRect().right));
      }
    }
    return {
      width, scrolls: page.documentElement.scrollWidth > width,
      loaded: [...page.images].filter(one => one.naturalWidth > 0).length,
      letters: Math.min(99, ...[...page.querySelectorAll('svg text')].map(one => {
        const turn = one.getScreenCTM();
        return 12 * Math.hypot(turn.a, turn.b);
      })),
      halves: sections.filter(([, ends]) => ends.length && Math.max(...ends) < width / 2).map(([name]) => name),
    };
  });
  document.title = JSON.stringify(told);
});
"""


class Look(NamedTuple):
    """A page in a window of some width; what each is, the script says."""

    width: int
    scrolls: bool
    loaded: int
    letters: float
    halves: list[str]


def look_at(page: Path, folder: Path, widths: tuple[int, ...] = (1400, 400)) -> list[Look]:
    """What a page is in windows of these widths; ``folder`` takes what Chromium leaves behind."""
    assert CHROMIUM is not None
    text = html.escape(page.read_text())
    frames = (f'<iframe width="{width}" height="4000" style="border:0" srcdoc="{text}"></iframe>' for width in widths)
    around = folder / "frames.html"
    around.write_text(f'<!DOCTYPE html><meta charset="utf-8"><script>{_SCRIPT}</script>{"".join(frames)}')
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--window-size=1500,9000",
        f"--user-data-dir={folder}/profile",
    ]
    run = subprocess.run(
        [CHROMIUM, *options, "--virtual-time-budget=5000", "--dump-dom", around.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    found = re.search(r"<title>(.*?)</title>", run.stdout)
    assert found is not None, run.stdout[:500]
    return [Look(**one) for one in json.loads(html.unescape(found[1]))]

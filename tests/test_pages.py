import base64
import re

import cv2
import numpy as np
import pytest

from backbones.errors import UserError
from detection import charts, pages


def test_text_is_escaped_and_html_is_not() -> None:
    assert pages.paragraph("a < b & c") == "<p>a &lt; b &amp; c</p>"
    assert pages.paragraph(pages.code("x<y")) == "<p><code>x&lt;y</code></p>"
    assert pages.element("a", "go", href='#"x') == '<a href="#&quot;x">go</a>'


def test_page_is_one_file() -> None:
    image = np.full((40, 80, 3), (200, 30, 30), np.uint8)
    text = pages.page("T <1>", pages.section("S", pages.figure(image, "red")), subtitle="sub")
    assert text.startswith("<!DOCTYPE html>")
    assert "<title>T &lt;1&gt;</title>" in text
    assert not re.findall(r'(?:src|href)="(?!data:|#)', text)
    assert "<script" not in text


def test_figure_is_the_image_made_smaller() -> None:
    image = np.full((40, 80, 3), (200, 30, 30), np.uint8)
    encoded = pages.data_uri(image, side=20).removeprefix("data:image/jpeg;base64,")
    decoded = cv2.imdecode(np.frombuffer(base64.b64decode(encoded), np.uint8), cv2.IMREAD_COLOR_RGB)
    assert decoded.shape == (10, 20, 3)
    assert np.abs(decoded.astype(int) - (200, 30, 30)).max() <= 4  # RGB in, RGB out
    assert 'alt="a &quot;b&quot;"' in pages.figure(image, 'a "b"')
    with pytest.raises(UserError, match="at least one pixel"):
        pages.data_uri(np.zeros((0, 4, 3), np.uint8))


def test_table_sets_numbers_right() -> None:
    text = pages.table(["name", "count"], [["a", 1234], ["b", 5]])
    assert '<td class="number">1,234</td>' in text
    assert "<td>a</td>" in text
    text = pages.table(
        ["AP", "share", "file"], [[None, "5.0 %", "1.jpg"], [0.5, "-", "2.jpg"], [float("nan"), "+1.2%", "3"]]
    )
    assert re.findall(r"<td[^>]*>([^<]*)", text) == ["-", "5.0 %", "1.jpg", "0.500", "-", "2.jpg", "-", "+1.2%", "3"]
    assert text.count('td class="number"') == 6
    assert "<tbody></tbody>" in pages.table(["name"], [])


def test_charts_of_nothing_and_of_zeros() -> None:
    assert "<svg" in charts.column_chart("none", [], [])
    assert "nan" not in charts.column_chart("zeros", ["a", "b"], [0, 0])
    assert "nan" not in charts.heat_map("zeros", np.zeros((3, 3)))
    heights = re.findall(r'<rect [^>]*height="([\d.]+)" fill', charts.column_chart("two", ["a", "b"], [1, 2]))
    assert float(heights[1]) == 2 * float(heights[0])
    widths = re.findall(r'width="([\d.]+)" height="16"', charts.bar_chart("two", ["a", "b"], [3, 1]))
    assert float(widths[0]) == pytest.approx(3 * float(widths[1]), abs=0.2)

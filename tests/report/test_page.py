"""The page as text: nothing escapes escaping, nothing is fetched, nothing is lost when writing."""

import base64
import io
import os
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from undiffuse.core.errors import ArgumentError
from undiffuse.metrics import Protocol, Result
from undiffuse.report import Neighbours, ReportData, render, write_report
from undiffuse.report.results import by_protocol, gauge
from undiffuse.report.style import DARK, LIGHT
from undiffuse.report.text import count, duration, escape, significant, tick, with_spread

VOID = {"meta", "link", "img", "br", "hr", "input", "col", "source"}
SVG_LEAVES = {"path", "line", "rect", "circle"}


class Outline(HTMLParser):
    """Elements with their attributes and text, and a check that every tag is closed in turn."""

    def __init__(self, page: str):
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict]] = []
        self.text: list[str] = []
        self.stack: list[str] = []
        self.feed(page)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        assert len({name for name, _ in attrs}) == len(attrs)
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in SVG_LEAVES
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def pictures_in(page: str) -> list[np.ndarray]:
    data = re.findall(r'src="data:image/png;base64,([^"]*)"', page)
    return [np.array(Image.open(io.BytesIO(base64.b64decode(one)))) for one in data]


@pytest.fixture(scope="module")
def runs(digits_run, points_run, hostile_run):
    return {"digits": digits_run, "points": points_run, "hostile": hostile_run, "empty": ReportData(title="nothing")}


@pytest.mark.parametrize("name", ["digits", "points", "hostile", "empty"])
def test_page_is_well_formed_and_asks_for_nothing(runs, name):
    page = render(runs[name])
    outline = Outline(page)
    used = {tag for tag, _ in outline.elements}
    assert not used & {
        "script",
        "iframe",
        "object",
        "embed",
        "base",
        "form",
        "audio",
        "video",
        "use",
        "image",
        "foreignobject",
    }
    for tag, attributes in outline.elements:
        assert not any(key.startswith("on") for key in attributes), (tag, attributes)
        for key in ("src", "srcset", "data", "poster", "action", "xlink:href"):
            assert attributes.get(key, "data:").startswith("data:")
        assert attributes.get("href", "#").startswith(("#", "data:,"))
    style = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert "@font-face" not in style
    policies = [m["content"] for m in outline.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert len(policies) == 1
    assert {"default-src 'none'", "img-src data:", "style-src 'unsafe-inline'"} <= set(policies[0].split("; "))
    for attributes in (a for _, a in outline.elements if "scroll" in a.get("class", "").split()):
        # Not every browser lets the keyboard reach a scrolling box by itself.
        assert attributes["tabindex"] == "0"
        assert attributes["aria-label"]
    identifiers = [attributes["id"] for _, attributes in outline.elements if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))


def test_hostile_text_reads_as_it_was_written_everywhere(hostile_run):
    outline = Outline(render(hostile_run))
    text = "".join(outline.text)
    hostile = hostile_run.subtitle
    # Title twice (head and heading), subtitle, facts, classes, film, metrics, protocol, recipe, commands, neighbours.
    assert text.count(hostile) >= 15
    alternatives = " ".join(attributes["alt"] for attributes in outline.all("img"))
    assert hostile in alternatives


def test_escape_covers_tags_quotes_and_hidden_characters():
    assert escape("<a b='c' d=\"e\">&") == "&lt;a b=&#x27;c&#x27; d=&quot;e&quot;&gt;&amp;"
    assert escape("a\u202eb\x00c\td\n") == "a\ufffdb\ufffdc\td\n"
    assert escape("Fréchet × 10⁻³ · 数字") == "Fréchet × 10⁻³ · 数字"


def test_the_same_data_make_the_same_page(digits_run):
    assert render(digits_run) == render(digits_run)


def test_each_class_has_its_row_in_order_with_its_own_samples(digits_run):
    page = render(digits_run)
    rows = re.findall(r'<div class="row"><dt[^>]*>(.*?)</dt><dd>.*?base64,([^"]*)"', page)
    assert [name for name, _ in rows] == [str(i) for i in range(10)]
    for name, data in rows:
        pixels = np.array(Image.open(io.BytesIO(base64.b64decode(data))))
        own = digits_run.samples[digits_run.labels == int(name)]
        assert pixels.shape == (8, 10 * 8 + 9, 2)
        for i in range(min(10, len(own))):
            wanted = ((own[i, 0] + 1) * 127.5).round().numpy()
            assert (pixels[:, 9 * i : 9 * i + 8, 0] == wanted).all()


def test_a_class_of_few_samples_lines_up_with_the_others():
    x = torch.ones(4, 3, 2, 2)
    page = render(ReportData(title="few", samples=x, labels=torch.tensor([0, 1, 1, -1])))
    assert [p.shape[:2] for p in pictures_in(page)] == [(2, 29)] * 3
    assert [int((p[0, :, -1] > 0).sum()) for p in pictures_in(page)] == [2, 4, 2]
    assert re.findall(r"<dt[^>]*>(.*?)</dt><dd>", page) == ["0", "1", "no label"]


def test_unlabelled_samples_make_one_grid_and_many_classes_are_cut_and_said_so():
    x = torch.zeros(150, 1, 2, 2)
    (grid,) = pictures_in(render(ReportData(title="u", samples=x)))
    assert grid.shape[:2] == (10 * 3 - 1, 10 * 3 - 1)
    page = render(ReportData(title="many", samples=x, labels=torch.arange(150)))
    assert len(pictures_in(page)) == 20
    assert "The first 20 of 150 classes." in page


def test_film_frames_keep_their_order(digits_run):
    page = render(digits_run)
    section = page[page.index('<section id="film"') : page.index('<section id="curves"')]
    assert re.findall("<figcaption>(.*?)</figcaption>", section) == [caption for caption, _ in digits_run.film]
    frames = pictures_in(section)
    last = ((digits_run.film[-1][1].clamp(-1, 1) + 1) * 127.5).round().numpy()
    for i in range(4):
        assert (frames[-1][9 * i : 9 * i + 8, :, 0] == last[i, 0]).all()
    assert not (frames[0][:8, :, 0] == last[0, 0]).all()


def test_points_are_scattered_not_gridded(points_run):
    page = render(points_run)
    assert [p.shape for p in pictures_in(page)] == [(480, 480, 4)] * 2 + [(160, 160, 4)] * 8
    assert "upper moon" in page


@pytest.mark.parametrize("shape", [(1,), (7, 3), (2, 4, 4), (3, 5)])
def test_other_kinds_of_data_are_shown_as_figures(shape):
    x = torch.full((4, *shape), 0.25) + torch.arange(4.0).reshape(-1, *[1] * len(shape))
    page = render(ReportData(title="other", samples=x, film=[("t = 1", x)]))
    assert pictures_in(page) == []
    cells = re.findall(r'<th scope="row">1</th><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td>', page)
    assert cells == [("1.75", "1.12", "0.250", "3.25")]


def test_vectors_show_their_first_two_coordinates():
    page = render(ReportData(title="vectors", samples=torch.randn(50, 5, generator=torch.Generator().manual_seed(0))))
    assert "Coordinates 1 and 2 of 5." in page
    assert len(pictures_in(page)) == 1


def test_broken_samples_are_counted_not_hidden():
    x = torch.zeros(4, 1, 2, 2)
    x[0, 0, 0, 0], x[1, 0, 0, 0] = float("nan"), float("inf")
    assert "2 of 16 values are not finite." in render(ReportData(title="nan", samples=x))


def test_an_empty_run_says_what_is_missing():
    page = render(ReportData(title="early", samples=torch.zeros(0, 1, 8, 8)))
    for sentence in ("no samples yet", "no figures yet", "not been evaluated yet"):
        assert sentence in page
    assert 'id="film"' not in page
    assert 'id="recipe"' not in page
    assert "<dl" not in page


# ---------------------------------------------------------------- metrics


def protocol(**changes) -> Protocol:
    fields = {"n": 10_000, "reference": "digits", "split": "train", "reference_n": 1437, "reference_fingerprint": "ab"}
    return Protocol(**{**fields, **changes})


def test_results_of_the_metrics_room_are_shown_with_protocol_settings_and_warnings():
    result = Result("kernel", 0.0123, protocol(), 0.0004, {"subsets": 77}, {}, ("rank is low",)).to_dict()
    page = render(ReportData(title="m", results=[{**result, "references": {"resampled training": 0.011}}]))
    text = "".join(Outline(page).text)
    for piece in ("Kernel distance", "0.0123", "± 0.0004", "resampled training", "0.0110", "rank is low"):
        assert piece in text
    folded = page[page.index("<summary>Protocol") :]
    for piece in ("<dt>Samples</dt><dd>10,000</dd>", "<dt>Split</dt><dd>train</dd>", "subsets 77"):
        assert piece in folded
    assert "Guidance" not in folded, "what does not apply is left out"


def test_unlike_protocols_are_not_put_in_one_table():
    a, b = protocol(), protocol(n=2000)
    results = [Result(name, 1.0, p).to_dict() for name, p in (("frechet", a), ("kernel", b), ("recall", a))]
    groups = by_protocol(results)
    assert [[r["name"] for r in members] for _, members in groups] == [["frechet", "recall"], ["kernel"]]
    page = render(ReportData(title="two", results=results))
    assert page.count("<table") == 2
    assert "figures of different tables do not compare" in page
    alone = render(ReportData(title="none", results=[{"name": "frechet", "value": 1.0}]))
    assert "No protocol is recorded" in alone


def test_gauge_places_the_value_among_its_references():
    html = gauge({"name": "frechet", "value": 0.1, "references": {"low": 0.01, "high": 1.0, "none": float("nan")}})
    assert re.findall(r"left:([\d.]+)%", html) == ["0.00", "50.00", "100.00"]
    assert re.findall(r'<span class="(own|ref)">(.*?)</span>', html) == [
        ("ref", "low"), ("own", "these samples"), ("ref", "high")
    ]  # fmt: skip
    assert "log scale" in html
    # Close values are shown close: a linear gauge starts at zero.
    html = gauge({"name": "x", "value": 0.9, "references": {"r": 1.0}})
    assert re.findall(r"left:([\d.]+)%", html) == ["90.00", "100.00"]
    assert gauge({"name": "x", "value": 1.0}) == ""


def test_recipe_and_commands_come_back_exactly(digits_run):
    page = render(digits_run)
    recipe = Outline(re.search(r'id="recipe".*?(<pre>.*?</pre>)', page, re.S).group(1))
    assert "".join(recipe.text) == digits_run.recipe_yaml.rstrip("\n")
    commands = re.search(r'<pre class="commands">(.*?)</pre>', page).group(1)
    assert ["".join(Outline(c).text) for c in re.findall("<code>(.*?)</code>", commands)] == list(digits_run.commands)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": torch.tensor([1])}, "one per sample"),
        ({"film": [("t", torch.zeros(1, 3, 8, 8))]}, "film frame 0 has event shape"),
        ({"reference": torch.zeros(2, 1, 4, 4)}, "reference has event shape"),
        ({"results": [{"name": "frechet"}]}, "result 0 lacks value"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ArgumentError, match=message):
        replace(ReportData(title="x", samples=torch.zeros(2, 1, 8, 8)), **changes)


def test_neighbours_that_do_not_fit_are_refused():
    with pytest.raises(ArgumentError, match="expected"):
        Neighbours(torch.zeros(2, 1), torch.zeros(3, 1), torch.zeros(2))


# ---------------------------------------------------------------- the file


def test_writing_replaces_the_old_page_and_leaves_nothing_else(tmp_path):
    file = tmp_path / "new" / "report.html"
    for title in ("first", "second"):
        assert write_report(ReportData(title=title), file) == file
        assert file.read_text(encoding="utf-8") == render(ReportData(title=title))
    assert os.listdir(file.parent) == ["report.html"]


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_page(tmp_path, monkeypatch, broken):
    file = write_report(ReportData(title="old"), tmp_path / "report.html")
    before = file.read_bytes()

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, broken, full_disk)
    with pytest.raises(OSError, match="No space"):
        write_report(ReportData(title="new"), file)
    assert file.read_bytes() == before
    assert os.listdir(tmp_path) == ["report.html"]


def test_the_old_page_is_there_until_the_new_one_is_on_the_disk(tmp_path, monkeypatch):
    file = write_report(ReportData(title="old"), tmp_path / "report.html")
    before, order = file.read_bytes(), []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(handle):
        order.append("fsync")
        real_fsync(handle)

    def rename(source, target):
        assert file.read_bytes() == before
        order.append("rename")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", rename)
    write_report(ReportData(title="new"), file)
    assert order[:2] == ["fsync", "rename"]


def test_importing_the_room_loads_neither_pil_nor_matplotlib():
    code = (
        "import sys, undiffuse.report, undiffuse.report.pictures;"
        "print([m for m in ('PIL', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---------------------------------------------------------------- words, numbers, colours


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0367, "0.0367"), (0.016, "0.0160"), (12.3456, "12.3"), (1234.5, "1,234"), (1_312_449, "1,312,449"),
        (3.2e-6, "3.2\u00a0×\u00a010⁻⁶"), (-0.5, "−0.500"), (0.0, "0"), (float("nan"), "not a number"),
        (float("-inf"), "−∞"), (2.5e9, "2.5\u00a0×\u00a010⁹"), ("cpu", "cpu"), (True, "True"), (9.999, "10.0"),
    ],
)  # fmt: skip
def test_significant_digits(value, text):
    assert significant(value) == text


@pytest.mark.parametrize(
    ("value", "spread", "parts"),
    [
        (0.0367, 0.00121, ("0.0367", " ± 0.0012")), (0.0367, None, ("0.0367", "")),
        (12.3, 0.004, ("12.300", " ± 0.004")),
        (1.2e-4, 3e-5, ("(1.20 ± 0.30)\u00a0×\u00a010⁻⁴", "")), (-0.5, 0.25, ("−0.500", " ± 0.250")),
        (1.0, float("nan"), ("1.00", "")), (0.0, 0.02, ("0.00", " ± 0.02")), (5.0, 0.0, ("5.00", " ± 0.00")),
    ],
)  # fmt: skip
def test_value_and_spread_have_the_same_decimals(value, spread, parts):
    assert with_spread(value, spread) == parts


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(4.21, "4.2 s"), (59.7, "1 min 00 s"), (161.4, "2 min 41 s"), (3599.6, "1 h 00 min"), (190_000, "2 d 4 h"),
     (float("nan"), "unknown"), ("soon", "unknown")],
)  # fmt: skip
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_ticks_and_counts():
    assert [tick(v) for v in (0.0, 0.05, 200.0, 1500.0, 2e6, 1e-5, 2e-4, -4.0)] == [
        "0", "0.05", "200", "1.5k", "2M", "10⁻⁵", "2·10⁻⁴", "−4"
    ]  # fmt: skip
    assert [count(v) for v in (1437, 1_312_449, 2.1e9, "many")] == ["1,437", "1.31 million", "2.1 billion", "many"]


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_contrast_meets_the_guidelines(colours):
    """WCAG 2.2: text 4.5 to 1, lines that carry meaning 3 to 1."""

    def luminance(name: str) -> float:
        channels = [int(colours[name][i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(a: str, b: str) -> float:
        low, high = sorted((luminance(a), luminance(b)))
        return (high + 0.05) / (low + 0.05)

    for ground in ("bg", "card"):
        for text in ("ink", "muted", "accent", "bad"):
            assert contrast(text, ground) >= 4.5, (text, ground)
        for line in ("middle", "early"):
            assert contrast(line, ground) >= 3, (line, ground)
    assert contrast("accent", "band") >= 3

"""The page in a real browser: headless Chromium, driven through chromedriver's HTTP protocol on the loopback.

Skipped, saying so, where `chromium` or `chromedriver` is not on PATH (Debian: packages chromium, chromium-driver).
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from undiffuse.report import ReportData, write_report

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    BROWSER is None or DRIVER is None,
    reason=f"needs chromium and chromedriver on PATH (found {BROWSER} and {DRIVER})",
)
PHONE, DESKTOP = (390, 844), (1280, 900)
QUIET = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions",
    "--no-default-browser-check", "--host-resolver-rules=MAP * ~NOTFOUND",
]  # fmt: skip


class Browser:
    """One browser session: the few commands of the WebDriver protocol that these tests need."""

    def __init__(self, address: str, profile: Path):
        self.address = address
        options = {"binary": BROWSER, "args": [*QUIET, f"--user-data-dir={profile}"]}
        capabilities = {
            "browserName": "chrome", "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }  # fmt: skip
        answer = self.call("POST", "/session", {"capabilities": {"alwaysMatch": capabilities}})
        self.session = f"/session/{answer['sessionId']}"

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        request = urllib.request.Request(
            self.address + path, method=method, data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )  # fmt: skip
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=60) as response:
                return json.load(response)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(error.read().decode()) from error

    def devtools(self, command: str, **parameters: Any) -> Any:
        return self.call("POST", f"{self.session}/goog/cdp/execute", {"cmd": command, "params": parameters})

    def run(self, script: str) -> Any:
        """The value of a script; it is evaluated by the debugger, so the page's policy does not forbid it."""
        return self.call("POST", f"{self.session}/execute/sync", {"script": script, "args": []})

    def log(self, kind: str) -> list[dict[str, Any]]:
        return self.call("POST", f"{self.session}/se/log", {"type": kind})

    def requests(self) -> list[str]:
        """Addresses asked for since the last call."""
        events = [json.loads(entry["message"])["message"] for entry in self.log("performance")]
        sent = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        return [url for url in sent if not url.startswith("data:")]

    def open(self, file: Path, size: tuple[int, int] = DESKTOP, scheme: str = "light", media: str = "screen") -> None:
        width, height = size
        self.devtools("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                      mobile=width < 600)  # fmt: skip
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.devtools("Emulation.setEmulatedMedia", media=media, features=features)
        self.call("POST", f"{self.session}/url", {"url": file.as_uri()})

    def screenshot(self, full: bool = True) -> bytes:
        answer = self.devtools("Page.captureScreenshot", format="png", captureBeyondViewport=full)
        return base64.b64decode(answer["data"])

    def pixels(self) -> np.ndarray:
        from PIL import Image

        return np.array(Image.open(io.BytesIO(self.screenshot(full=False))).convert("RGB")).astype(int)

    def close(self) -> None:
        self.call("DELETE", self.session)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert DRIVER is not None
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen([DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    pytest.fail("chromedriver did not start")
                time.sleep(0.05)
        session = Browser(f"http://127.0.0.1:{port}", tmp_path_factory.mktemp("profile"))
        yield session
        session.close()
    finally:
        process.terminate()
        process.wait(timeout=10)


@pytest.fixture(scope="module")
def pages(tmp_path_factory, digits_run, points_run, hostile_run) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    empty = ReportData(title="empty")
    runs = {"digits": digits_run, "points": points_run, "hostile": hostile_run, "empty": empty}
    return {name: write_report(data, folder / f"{name}.html") for name, data in runs.items()}


NAMES = pytest.mark.parametrize("name", ["digits", "points", "hostile", "empty"])


@NAMES
def test_page_asks_for_nothing_and_complains_of_nothing(browser, pages, name):
    browser.call("POST", f"{browser.session}/url", {"url": "about:blank"})
    browser.log("browser"), browser.requests()
    browser.open(pages[name])
    assert browser.requests() == [pages[name].as_uri()]
    assert browser.log("browser") == []


@pytest.mark.parametrize(("name", "least"), [("digits", 10 + 1 + 12 + 12), ("points", 2 + 8), ("hostile", 4)])
def test_every_picture_is_decoded_at_its_declared_size_and_described(browser, pages, name, least):
    browser.open(pages[name])
    found = browser.run(
        "for (const d of document.querySelectorAll('details')) d.open = true;"
        "return [...document.images].map(i => [i.complete, i.naturalWidth, +i.getAttribute('width'),"
        " i.naturalHeight, +i.getAttribute('height'), i.alt.trim().length > 0, i.clientWidth > 0])"
    )
    assert len(found) >= least
    for complete, width, declared_width, height, declared_height, described, visible in found:
        assert complete
        assert width == declared_width > 0
        assert height == declared_height > 0
        assert described
        assert visible


@NAMES
@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_no_sideways_scrolling_at_any_width(browser, pages, name, width):
    browser.open(pages[name], (width, 844))
    scroll, client, beyond = browser.run(
        "for (const d of document.querySelectorAll('details')) d.open = true;"
        "const e = document.documentElement, beyond = [];"
        "for (const n of document.querySelectorAll('body *')) if (!n.closest('.scroll') && !n.closest('svg')"
        " && n.getBoundingClientRect().right > e.clientWidth + 0.5) beyond.push(n.tagName + '.' + n.className);"
        "return [e.scrollWidth, e.clientWidth, beyond]"
    )
    assert scroll <= client <= width
    assert beyond == []


def test_chart_text_is_readable_on_a_phone(browser, pages):
    browser.open(pages["digits"], PHONE)
    heights = browser.run(
        "return [...document.querySelectorAll('.chart text')].map(t => { const m = t.getScreenCTM();"
        " return parseFloat(getComputedStyle(t).fontSize) * m.d })"
    )
    assert len(heights) > 20
    assert min(heights) >= 9


def test_chart_labels_stay_inside_their_chart_and_apart(browser, pages):
    for size in (PHONE, DESKTOP):
        browser.open(pages["digits"], size)
        charts = browser.run(
            "return [...document.querySelectorAll('.chart')].map(c => { const o = c.getBoundingClientRect();"
            " return [[o.left, o.top, o.right, o.bottom], ...[...c.querySelectorAll('text')].map(t =>"
            " { const r = t.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom] })] })"
        )
        assert len(charts) == 4
        for (left, top, right, bottom), *labels in charts:
            for a, b, c, d in labels:
                # Half a pixel: the line box of a label is a little taller than its letters.
                assert left - 0.5 <= a
                assert top - 0.5 <= b
                assert c <= right + 0.5
                assert d <= bottom + 2.5
            for i, (a, b, c, d) in enumerate(labels):
                for e, f, g, h in labels[i + 1 :]:
                    assert min(c, g) - max(a, e) <= 0 or min(d, h) - max(b, f) <= 2.5, "labels overlap"


def test_dark_mode_is_dark_and_light_mode_light(browser, pages):
    shots = {}
    for scheme in ("light", "dark"):
        browser.open(pages["digits"], PHONE, scheme)
        shots[scheme] = browser.pixels()
    corner = {scheme: shot[3, 3].mean() for scheme, shot in shots.items()}
    assert corner["light"] > 230
    assert corner["dark"] < 40
    # Text is drawn in both: many pixels far from the background.
    for scheme, shot in shots.items():
        far = np.abs(shot.mean(axis=2) - corner[scheme]) > 120
        assert far.mean() > 0.01, scheme


def test_pictures_show_the_samples_themselves(browser, pages, digits_run):
    """The first pixel of the first zero on the screen is the first pixel of the tensor: square by square."""
    browser.open(pages["digits"])
    left, top, width, height = browser.run(
        "const i = document.querySelector('.row img'); i.scrollIntoView(); const r = i.getBoundingClientRect();"
        " return [r.left, r.top, r.width, r.height]"
    )
    shot = browser.pixels()
    zero = digits_run.samples[digits_run.labels == 0][0, 0]
    unit_x, unit_y = width / (10 * 8 + 9), height / 8
    for row in range(8):
        for column in range(8):
            seen = shot[int(top + (row + 0.5) * unit_y), int(left + (column + 0.5) * unit_x)]
            wanted = round((float(zero[row, column]) + 1) * 127.5)
            assert np.abs(seen - wanted).max() <= 1, (row, column)


def test_film_can_be_scrolled_to_its_end_by_keyboard(browser, pages):
    browser.open(pages["digits"], PHONE)
    before, after, room = browser.run(
        "const f = document.querySelector('.film'); f.focus(); const b = f.scrollLeft; f.scrollLeft = 1e6;"
        " return [document.activeElement === f ? b : -1, f.scrollLeft, f.scrollWidth - f.clientWidth]"
    )
    assert before == 0
    assert after == pytest.approx(room, abs=1)
    assert room > 100


def test_hostile_text_is_text(browser, pages, hostile_run):
    browser.open(pages["hostile"])
    title, scripts, handlers, foreign, heading = browser.run(
        "return [document.title, document.scripts.length,"
        " [...document.querySelectorAll('*')].filter(e => [...e.attributes].some(a => a.name.startsWith('on'))).length,"
        " [...document.images].filter(i => !i.src.startsWith('data:')).length,"
        " document.querySelector('h1').textContent]"
    )
    assert title.startswith("<script>")
    assert (scripts, handlers, foreign) == (0, 0, 0)
    assert heading == hostile_run.title


def test_policy_forbids_scripts_even_if_one_got_in(browser, pages, tmp_path):
    page = pages["digits"].read_text()
    broken = tmp_path / "broken.html"
    broken.write_text(page.replace("<main>", "<main><script>document.title = 'owned'</script>"))
    browser.open(broken)
    assert browser.run("return document.title").startswith("digits")
    assert any("Content Security Policy" in entry["message"] for entry in browser.log("browser"))


def test_structure_for_assistive_technology(browser, pages):
    browser.open(pages["digits"])
    headings, landmarks, unlabelled, broken = browser.run(
        "return [[...document.querySelectorAll('h1,h2,h3')].map(h => +h.tagName[1]),"
        " ['header', 'nav', 'main', 'footer'].map(t => document.querySelectorAll('body > ' + t).length),"
        " [...document.querySelectorAll('section')].filter(s => !document.getElementById("
        "s.getAttribute('aria-labelledby'))).length,"
        " [...document.querySelectorAll('nav a')].filter(a => !document.querySelector(a.getAttribute('href'))).length]"
    )
    assert headings[0] == 1
    assert headings.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(headings))
    assert landmarks == [1, 1, 1, 1]
    assert (unlabelled, broken) == (0, 0)
    nodes = browser.devtools("Accessibility.getFullAXTree")["nodes"]
    named = {(n["role"]["value"], n.get("name", {}).get("value", "")) for n in nodes if not n.get("ignored")}
    assert ("image", "10 samples of class 7") in named
    assert any(role == "image" and name.startswith("Loss by training step: from") for role, name in named)


def test_paper_is_light_and_shows_what_was_folded_away(browser, pages):
    browser.open(pages["digits"], DESKTOP, "dark", media="print")
    background, recipe, protocol, nav = browser.run(
        "return [getComputedStyle(document.documentElement).getPropertyValue('--bg').trim(),"
        " document.querySelector('#recipe pre').checkVisibility(),"
        " document.querySelector('#metrics details dl').checkVisibility(),"
        " getComputedStyle(document.querySelector('nav')).display]"
    )
    assert background == "#fbfaf8"
    assert recipe is True
    assert protocol is True
    assert nav == "none"


def test_hovering_a_curve_shows_its_value(browser, pages):
    browser.open(pages["digits"])
    x, y, text = browser.run(
        "const h = document.querySelectorAll('.chart .hint')[40]; h.scrollIntoView({block: 'center'});"
        " const r = h.querySelector('rect').getBoundingClientRect();"
        " return [r.left + r.width / 2, r.top + r.height / 2, h.querySelector('title').textContent]"
    )
    browser.devtools("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    shown = browser.run(
        "return [...document.querySelectorAll('.chart .hint')].map(h => getComputedStyle(h.querySelector('line'))"
        ".visibility)"
    )
    assert shown.count("visible") == 1
    assert shown[40] == "visible"
    assert text.startswith("step ")

"""The HTML report: what its file holds, and what a real browser makes of it.

The browser is Debian's Chromium, driven without a window (``apt install chromium-driver``).
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from auditor.records.measured import Segment
from auditor.records.report import AuditReport, BackendReport
from reports import _words as words
from reports import html, json_v1

HOSTILE = (
    "</script><script>window.pwned = 1</script>",
    "<img src=x onerror='window.pwned = 1'>",
    '"><svg onload=window.pwned=1>',
    "javascript:window.pwned=1",
    "'; window.pwned = 1; //",
    "<!--<script>",
    "\u2028window.pwned = 1\u2029",
    "\u202egnp.exe",
    "${window.pwned = 1}",
    "{0}{script}%s",
    "__proto__",
)


def render(report: AuditReport) -> str:
    return html.RENDERER.render(report, width=None, color=False)


class Page(HTMLParser):
    """The elements of a page, with the text of its scripts and style sheets."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.raw: list[tuple[str, str]] = []
        self._within: str | None = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._within = tag if tag in ("script", "style") else None
        if self._within:
            self.raw.append((tag, ""))

    def handle_endtag(self, tag: str) -> None:
        self._within = None

    def handle_data(self, data: str) -> None:
        if self._within:
            tag, before = self.raw[-1]
            self.raw[-1] = (tag, before + data)

    @property
    def data(self) -> Any:
        return json.loads(self.raw[1][1])

    @property
    def policy(self) -> str:
        return next(a["content"] or "" for tag, a in self.tags if "http-equiv" in a)


# --- the file ------------------------------------------------------------------------------------


def test_the_page_holds_the_json_report(report: AuditReport) -> None:
    page = Page(render(report))
    assert [tag for tag, _ in page.raw] == ["style", "script", "script"]
    assert page.data["report"] == json.loads(json.dumps(json_v1.dump(report)))
    assert json_v1.load(page.data["report"]) == report
    assert page.data["words"]["headline"] == words.headline(report)


def test_only_its_own_scripts_may_run(report: AuditReport) -> None:
    page = Page(render(report))
    (_, style), _, (_, script) = page.raw
    allowed = {
        kind: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for kind, text in (("style", style), ("script", script))
    }
    assert page.policy.split("; ") == [
        "default-src 'none'",
        f"style-src 'sha256-{allowed['style']}'",
        f"script-src 'sha256-{allowed['script']}'",
        "base-uri 'none'",
        "form-action 'none'",
    ]


def test_nothing_is_loaded_from_elsewhere(report: AuditReport) -> None:
    page = Page(render(report))
    assert not any({"src", "srcset", "data", "action"} & attrs.keys() for _, attrs in page.tags)
    assert [attrs["href"] for _, attrs in page.tags if "href" in attrs] == ["#main"]
    (_, style), _, (_, script) = page.raw
    assert not re.search(r"url\(|@import", style)
    assert re.findall(r"\w+://[^\"\s]*", script) == ["http://www.w3.org/2000/svg"]
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", script)


def test_any_report_stays_inside_its_element(any_reports: tuple[AuditReport, ...]) -> None:
    for report in any_reports:
        page = Page(render(report))
        assert [tag for tag, _ in page.raw] == ["style", "script", "script"]
        assert page.data["report"] == json_v1.dump(words.visible(report))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_ends_no_element(report: AuditReport, name: str) -> None:
    page = Page(render(replace(report, model=replace(report.model, path=name))))
    assert [tag for tag, _ in page.raw] == ["style", "script", "script"]
    assert page.data["report"]["model"]["path"] == words.visible(name)
    assert {tag for tag, _ in page.tags} <= {
        *("html", "head", "meta", "title", "style", "body", "a", "noscript", "p"),
        *("main", "aside", "script"),
    }


# --- in a browser --------------------------------------------------------------------------------


class Browser:
    """Chromium with one report open, which notices everything the page logs or requests."""

    def __init__(self, driver: Any, folder: Path) -> None:
        self.driver = driver
        self._folder = folder
        self.url = ""
        self.size(1400, 1000)
        self.media()

    def open(self, report: AuditReport, address: str = "") -> None:
        path = self._folder / "report.html"
        path.write_text(render(report), encoding="utf-8")
        self.driver.get("about:blank")  # so that a changed fragment loads the file again
        self.logged(), self.requested()
        self.url = path.as_uri()
        self.driver.get(self.url + address)

    def size(self, width: int, height: int) -> None:
        self._devtools(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
        )

    def media(self, medium: str = "screen", scheme: str = "light") -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self._devtools("Emulation.setEmulatedMedia", {"media": medium, "features": features})

    def _devtools(self, command: str, parameters: dict[str, object]) -> None:
        self.driver.execute_cdp_cmd(command, parameters)

    def js(self, code: str, *arguments: object) -> Any:
        return self.driver.execute_script(code, *arguments)

    def work(self, step: Callable[[], None]) -> float:
        """Processor seconds of the page's main thread until it is drawn: others may be busy."""

        def seconds() -> float:
            answer = self.driver.execute_cdp_cmd("Performance.getMetrics", {})
            return next(float(m["value"]) for m in answer["metrics"] if m["name"] == "TaskDuration")

        self.driver.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
        before = seconds()
        step()
        self.driver.execute_async_script(
            "requestAnimationFrame(() => requestAnimationFrame(arguments[0]))"
        )
        return seconds() - before

    def all(self, selector: str) -> list[Any]:
        found: list[Any] = self.driver.find_elements("css selector", selector)
        return found

    def one(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def wait_for(self, there: Callable[[], object]) -> None:
        """The page hears of some changes in an event, a moment after they happen."""
        end = time.monotonic() + 5
        while not there() and time.monotonic() < end:
            time.sleep(0.05)

    def text(self, selector: str) -> str:
        return str(self.one(selector).text)

    def click(self, selector: str) -> None:
        self.click_on(self.one(selector))

    def click_on(self, element: Any) -> None:
        """As soon as it is drawn, which a busy machine does late."""
        self.js("arguments[0].scrollIntoView({block: 'center'})", element)
        self.wait_for(element.is_displayed)
        element.click()

    def press(self, *keys: str) -> None:
        from selenium.webdriver.common.action_chains import ActionChains

        for key in keys:
            ActionChains(self.driver).send_keys(key).perform()

    @property
    def focused(self) -> Any:
        return self.driver.switch_to.active_element

    def logged(self) -> list[str]:
        """What the console has since this was last called, and errors that it is not told of."""
        said = [entry["message"] for entry in self.driver.get_log("browser")]
        return said + self.driver.execute_script("return (window.failed || []).splice(0)")

    def requested(self) -> list[str]:
        """Addresses that the page has asked for since this was last called, blocked ones too."""
        events = [json.loads(e["message"])["message"] for e in self.driver.get_log("performance")]
        return [
            event["params"]["request"]["url"]
            for event in events
            if event["method"] == "Network.requestWillBeSent"
        ]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    from selenium.webdriver.chrome.service import Service

    program = shutil.which("chromium") or shutil.which("google-chrome")
    helper = shutil.which("chromedriver")
    if not program or not helper:
        pytest.skip("no browser: install Chromium and its driver (apt install chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    arguments = ["--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    if os.geteuid() == 0:
        arguments.append("--no-sandbox")  # as root it does not start otherwise
    for argument in arguments:
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options=options, service=Service(helper))
    started.set_script_timeout(30)
    source = "window.failed = []; addEventListener('error', e => failed.push(e.message))"
    started.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": source})
    yield started
    started.quit()


@pytest.fixture
def browser(driver: Any, tmp_path: Path) -> Iterator[Browser]:
    """A browser; at the end nothing was logged and nothing but the file was requested."""
    opened = Browser(driver, tmp_path)
    yield opened
    assert opened.logged() == []
    assert {url.partition("#")[0] for url in opened.requested()} <= {opened.url}


def test_a_policys_verdict_is_told(browser: Browser, judged: AuditReport) -> None:
    browser.open(judged)
    said = browser.text("main dl")
    assert "3 broken rules (audit.toml); 1 finding waived; exit code 1" in said
    assert "output `Softmax:0` on ov: relative_l2 is 0.012" in said


def test_every_part_is_there(browser: Browser, report: AuditReport) -> None:
    browser.open(report)
    assert browser.requested() == [browser.url]
    assert browser.driver.title == "FAIL efficientnet_lite0.onnx"
    assert browser.text(".badge").lower() == "fail"
    assert browser.text(".headline").startswith("largest divergence of an output: 1.2e-2")
    titles = [heading.text for heading in browser.all("main > section > h2")]
    assert titles == [
        *("Backends", "Ranked offenders", "Along the network", "Agreement", "Not audited"),
        "Provenance",
    ]
    cards = [card.text for card in browser.all("#backends .card")]
    assert [card.split()[0] for card in cards] == ["ort", "ov", "tvm", "trt"]
    assert "proved: 50/51 tensors (9 by cone), outputs bitwise equal" in cards[1]
    assert "99.8% precision.bf16" in cards[1]
    assert "top-1 flips in 1 of 4 rows" in cards[1]
    assert "latency 2.1 ms, 0.42 times the 5 ms of ONNX Runtime's defaults" in cards[1]
    assert "Contributions do not add here" in cards[1]
    assert "pip install 'sysnoise-auditor[tvm]'" in cards[2]
    assert "built, not run: no CUDA device" in cards[3]
    assert len(browser.all(".offenders tbody tr")) == len(report.findings)
    remedies = words.remedies(report.findings)
    said = browser.text("#offenders ul")
    assert all(f"{who}, {cause} ({count} finding" in said for who, cause, _, count in remedies)
    assert browser.text("#agreement").endswith("Outlier: ov.")
    assert "observing it changed the program's fusion" in browser.text("#gaps")
    assert "TensorRT-RTX 1.7.1" in browser.text("#provenance")


def test_clicking_through_every_view(browser: Browser, report: AuditReport) -> None:
    browser.open(report)
    for button in browser.all("#main summary"):
        browser.click_on(button)
    browser.wait_for(lambda: browser.all(".causes article p"))
    assert browser.text(".causes article p") == (
        "Tensors are rounded to bfloat16. Engines with AMX compute in bfloat16 by default."
    )
    assert "brgconv_avx512_amx" in browser.text("#provenance")
    assert "CUDA initialization failure" in browser.text("#backends pre")

    browser.click(".offenders tbody tr:nth-child(4) td:nth-child(5)")  # anywhere on the row
    assert browser.text("#segment h2") == "s3 on ov"
    panel = browser.text("#segment")
    for said in (
        "medium" if report.findings[3].severity == "medium" else "low",
        "44.0% of the squared error at index 37 of axis 1 (size 112)",
        "inputs+weights bf16, f32 bias, output rounded",
        "-417",
        "replaying precision.bf16 explains 0.9998 of the error",
        "Set INFERENCE_PRECISION_HINT=f32",
        "efficientnet-lite0/model/blocks_3/Relu6",
        "computes bf16, writes bf16",
        "relative L2",
    ):
        assert said in panel, said
    assert len(browser.all("#segment .histogram")) == 2
    assert browser.js("return location.hash") == "#/ov/s3"
    assert len(browser.all(".node.chosen")) == 1

    browser.click("#segment [aria-label='Next segment']")
    assert browser.text("#segment h2") == "s4 on ov"
    browser.click("#segment .facts button.link")  # fed by
    assert browser.text("#segment h2") == "s3 on ov"
    browser.click("#segment [aria-label='Close']")
    assert not browser.one("#segment").is_displayed()
    assert browser.js("return location.hash") == ""

    browser.click("#tab-0")
    chart = "[role=tabpanel]:not([hidden]) .canvas"
    browser.click(chart)  # its middle
    assert browser.text("#segment h2") in ("s7 on ort", "s8 on ort")
    browser.click("[role=tabpanel]:not([hidden]) .node[data-segment='2']")
    assert browser.text("#segment h2") == "s2 on ort"
    for title in ("Zoom in", "Zoom out", "Show the whole graph", "Natural size", "Wider chart"):
        browser.click(f"[role=tabpanel]:not([hidden]) [aria-label='{title}']")


def test_a_tensor_is_pictured_on_both_sides(browser: Browser, report: AuditReport) -> None:
    browser.open(report, "#/ov/s0")
    drawn = browser.all("#segment .pictures canvas")
    assert [canvas.get_attribute("aria-label") for canvas in drawn] == [
        "reference: -3.14 to 5.99",
        "here: -3.14 to 5.99; blank where NaN or infinite",
        "difference: at most 4.1e-3; blank where NaN or infinite",
        "its own part: NaN or infinite throughout",
    ]
    pixels = browser.js(
        "return [...document.querySelectorAll('#segment .pictures canvas')].map((canvas) =>"
        " [...canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data])"
    )
    assert [len(each) for each in pixels] == [4 * 12] * 4
    reference, here, difference, own = ([p[i : i + 4] for i in range(0, 48, 4)] for p in pixels)
    assert reference[0] == [68, 1, 84, 255] and reference[11] == [253, 231, 37, 255]
    assert here[:11] == reference[:11] and here[11][3] == 0  # no number: nothing is drawn
    assert difference[1] == [47, 126, 216, 254] and difference[2] == [232, 113, 10, 254]
    assert {pixel[3] for pixel in (*difference[3:], *own)} == {0}
    said = browser.text("#segment")
    assert "[0, 37, :, :], 14×14 values in 3×4 cells, sample 1" in said
    browser.click("#segment [aria-label='Next segment']")
    assert "None kept" in browser.text("#segment")


def test_the_chart_tells_what_is_under_the_pointer(browser: Browser, report: AuditReport) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    browser.open(report)
    canvas = browser.one(".canvas")
    browser.js("arguments[0].scrollIntoView({block: 'center'})", canvas)
    ActionChains(browser.driver).move_to_element(canvas).perform()
    tip = browser.text(".tip")
    at = int(canvas.get_attribute("aria-valuenow"))
    segment = report.backends[1].segments[at]
    assert tip.startswith(segment.id)
    assert f"introduced {words.error(segment.introduced)}" in tip
    flags = browser.all(".canvas circle.flag")
    assert len(flags) == sum(s.introduced > s.floor for s in report.backends[1].segments)


def test_sorting_and_filtering(browser: Browser, report: AuditReport) -> None:
    browser.open(report)

    def column(number: int) -> list[str]:
        return [
            cell.text.split("\n")[0]
            for cell in browser.all(f".offenders tbody td:nth-child({number})")
        ]

    assert column(1) == [str(f.rank) for f in report.findings]
    browser.click(".offenders th:nth-child(9) button")  # introduced
    assert column(9) == [
        words.error(e) for e in sorted((f.introduced for f in report.findings), reverse=True)
    ]
    assert browser.one(".offenders th:nth-child(9)").get_attribute("aria-sort") == "descending"
    browser.click(".offenders th:nth-child(9) button")
    assert column(9) == [words.error(e) for e in sorted(f.introduced for f in report.findings)]
    browser.one("#filter").send_keys("unexplained")
    assert column(1) == ["3"]
    assert "1 of 16 findings" in browser.text("#offenders")


def finished(report: AuditReport) -> AuditReport:
    """The report with each last segment computing the model's output."""

    def backend(b: BackendReport) -> BackendReport:
        *others, last = b.segments or (None,)
        if last is None:
            return b
        return replace(b, segments=(*others, replace(last, outputs=("Softmax:0",))))

    return replace(report, backends=tuple(map(backend, report.backends)))


def test_the_keyboard_reaches_everything(browser: Browser, report: AuditReport) -> None:
    from selenium.webdriver.common.keys import Keys

    browser.open(finished(report))
    browser.press(Keys.TAB)
    assert browser.focused.text == "Skip to the report"

    browser.js("""
        window.walked = [];
        document.addEventListener("focusin", ({target}) => {
          const {outlineStyle, outlineWidth} = getComputedStyle(target);
          const seen = outlineStyle !== "none" && outlineWidth !== "0px";
          const name = target.id || target.ariaLabel || target.innerText;
          window.walked.push([name, seen || target.matches(".node")]);
        });
    """)
    browser.press(Keys.TAB * 120)
    walked = browser.js("return window.walked")
    assert len(walked) > 100  # the window itself may take one of them
    assert [name for name, visible in walked if not visible] == []
    names = {name for name, _ in walked}
    assert {
        *("Dark", "Backends", "Ranked offenders", "#", "filter", "Open segment s0 of ov"),
        *("tab-1", "find", "Wider chart", "metric-1", "Zoom in"),
    } <= names
    assert any("choose a segment" in name for name in names)

    # The chart: along it, and into a segment; Escape leads back.
    browser.js("document.querySelector('.canvas').focus()")
    browser.press(Keys.HOME, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    canvas = browser.one(".canvas")
    assert canvas.get_attribute("aria-valuenow") == "2"
    assert canvas.get_attribute("aria-valuetext").startswith("s2, Conv + BatchNormalization + Clip")
    browser.press(Keys.ENTER)
    assert browser.focused.get_attribute("id") == "segment-title"
    assert browser.text("#segment h2") == "s2 on ov"
    browser.press(Keys.ESCAPE)
    assert not browser.one("#segment").is_displayed()
    assert browser.focused == canvas
    browser.press(Keys.END)
    assert canvas.get_attribute("aria-valuenow") == "15"

    # The graph: down an edge and up again, into a segment.
    browser.js("document.querySelector('.node[tabindex=\"0\"]').focus()")
    browser.press(Keys.HOME)
    assert browser.focused.get_attribute("aria-label") == "input images:0"
    browser.press(Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ARROW_UP)
    assert browser.focused.get_attribute("data-segment") == "0"
    browser.press(Keys.ENTER)
    assert browser.text("#segment h2") == "s0 on ov"
    browser.press(Keys.ESCAPE)
    assert browser.focused.get_attribute("data-segment") == "0"
    browser.press(Keys.END)
    assert browser.focused.get_attribute("aria-label") == "output Softmax:0"

    # Backends, and finding by name.
    browser.js("document.getElementById('tab-1').focus()")
    browser.press(Keys.ARROW_LEFT)
    assert browser.focused.get_attribute("id") == "tab-0"
    assert browser.one("#network-0").is_displayed() and not browser.one("#network-1").is_displayed()
    browser.one("#find").send_keys("blocks_1/relu6:0", Keys.ENTER)
    assert browser.text("#segment h2") == "s1 on ort"
    assert "1 of 2" in browser.text("#network")
    browser.press(Keys.ENTER)  # the tensor's other segment
    assert browser.text("#segment h2") == "s2 on ort"


def test_an_address_opens_its_segment(browser: Browser, report: AuditReport) -> None:
    browser.open(report, "#/ort/s5")
    assert browser.text("#segment h2") == "s5 on ort"
    browser.open(report, "#/ort/%E0%A4%A")  # cut short by somebody
    assert not browser.one("#segment").is_displayed()


def test_dark_and_light(browser: Browser, report: AuditReport) -> None:
    browser.open(report)
    page = "return getComputedStyle(document.body).backgroundColor"
    light = browser.js(page)
    browser.media(scheme="dark")
    dark = browser.js(page)
    assert light != dark
    browser.wait_for(lambda: browser.text(".theme") == "Light")
    assert browser.text(".theme") == "Light"
    browser.click(".theme")
    assert browser.js(page) == light
    browser.click(".theme")
    assert browser.js(page) == dark


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_background(
    browser: Browser, report: AuditReport, scheme: str
) -> None:
    """WCAG 2.2, criterion 1.4.3: a contrast of at least 4.5."""
    browser.media(scheme=scheme)
    browser.open(report, "#/ov/s0")
    pairs = browser.js("""
        const canvas = document.createElement("canvas");
        const context = canvas.getContext("2d", {willReadFrequently: true});
        const rgb = (color) => {
          context.fillStyle = color;
          context.fillRect(0, 0, 1, 1);
          return [...context.getImageData(0, 0, 1, 1).data];
        };
        const back = (element) => {
          for (let e = element; e; e = e.parentElement) {
            const color = getComputedStyle(e).backgroundColor;
            if (rgb(color)[3] === 255 && color !== "rgba(0, 0, 0, 0)") return rgb(color);
          }
        };
        const words = [...document.querySelectorAll("p, td, th, dt, dd, h2, a, .badge, button")]
          .filter((e) => e.textContent.trim() && e.checkVisibility() && !e.disabled)
          .map((e) => [e.textContent.slice(0, 30), rgb(getComputedStyle(e).color), back(e)]);
        const nodes = [...document.querySelectorAll(".node")].map((e) => [e.getAttribute("class"),
          rgb(getComputedStyle(e.querySelector("text")).fill),
          rgb(getComputedStyle(e.querySelector("rect")).fill)]);
        return [...words, ...nodes];
    """)

    def luminance(color: list[int]) -> float:
        parts = [c / 255 for c in color[:3]]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    assert len(pairs) > 100
    for what, ink, paper in pairs:
        dark, light = sorted((luminance(ink), luminance(paper)))
        assert (light + 0.05) / (dark + 0.05) >= 4.5, what


NOT_WIDER = "const e = document.documentElement; return e.scrollWidth <= e.clientWidth"


@pytest.mark.parametrize("width", [400, 1600])
def test_nothing_is_wider_than_the_window(
    browser: Browser, report: AuditReport, width: int
) -> None:
    browser.size(width, 900)
    browser.open(report, "#/ov/s0")
    assert browser.js(NOT_WIDER)
    panel = browser.js("return document.getElementById('segment').getBoundingClientRect().width")
    inside = browser.js("return document.documentElement.clientWidth")
    assert panel == (inside if width == 400 else pytest.approx(434, abs=70))


def test_on_paper(browser: Browser, report: AuditReport) -> None:
    browser.open(report)
    browser.media(medium="print", scheme="dark")
    assert browser.js("return getComputedStyle(document.body).backgroundColor") == (
        "rgb(255, 255, 255)"
    )
    assert not browser.one(".frame").is_displayed()
    assert "The graph is not printed" in browser.text("#network")
    assert browser.one(".canvas svg").is_displayed()


# --- whatever is in it ---------------------------------------------------------------------------


def renamed(report: AuditReport, name: Callable[[str], str]) -> AuditReport:
    """The same report with other names of the model, the nodes and the tensors."""

    def segment(s: Segment) -> Segment:
        return replace(
            s,
            nodes=tuple(map(name, s.nodes)),
            node_keys=tuple(map(name, s.node_keys)),
            op_types=tuple(map(name, s.op_types)),
            inputs=tuple(map(name, s.inputs)),
            outputs=tuple(map(name, s.outputs)),
            kernel=name(s.kernel),
            hypotheses=tuple(replace(h, variant=name(h.variant)) for h in s.hypotheses),
            tensors=tuple(replace(t, name=name(t.name)) for t in s.tensors),
        )

    return replace(
        report,
        model=replace(report.model, path=name(report.model.path)),
        stimulus=replace(
            report.stimulus, shapes={name(k): v for k, v in report.stimulus.shapes.items()}
        ),
        backends=tuple(
            replace(
                b,
                segments=tuple(map(segment, b.segments)),
                outputs=tuple(replace(o, name=name(o.name)) for o in b.outputs),
                warnings=tuple(map(name, b.warnings)),
            )
            for b in report.backends
        ),
        findings=tuple(
            replace(
                f,
                nodes=tuple(map(name, f.nodes)),
                evidence=tuple(map(name, f.evidence)),
                remedy=f.remedy and name(f.remedy),
            )
            for f in report.findings
        ),
    )


def test_hostile_names_are_text(browser: Browser, report: AuditReport) -> None:
    names = itertools.cycle(HOSTILE)
    browser.open(renamed(report, lambda old: f"{next(names)}{old}"))
    shown = ""
    for number in range(len(report.backends[1].segments)):
        browser.js(f"openSegment(AUDITED[1], {number}, null)")
        browser.js("for (const each of document.querySelectorAll('details')) each.open = true")
        shown += browser.text("#segment")
    assert [name for name in HOSTILE if words.visible(name) not in shown] == []
    assert browser.js("return window.pwned ?? null") is None
    counts = "return ['script', 'img', 'iframe', 'object', 'style', 'link', 'base', 'form'].map("
    assert browser.js(counts + "(t) => document.querySelectorAll(t).length)") == [
        *(2, 0, 0, 0, 1, 0, 0, 0)
    ]
    assert (
        browser.js(
            "return [...document.querySelectorAll('*')].filter((e) => [...e.attributes].some("
            "(a) => a.name.startsWith('on') || a.name === 'src')).length"
        )
        == 0
    )
    addresses = browser.js("return [...document.links].map((link) => link.getAttribute('href'))")
    assert {address[0] for address in addresses} == {"#"}


def test_a_name_of_a_megabyte(browser: Browser, report: AuditReport) -> None:
    browser.size(400, 900)
    long = replace(report, backends=report.backends[:2], findings=report.findings[:1])
    browser.open(renamed(long, lambda old: f"{'x' * 2**20 if 'Relu6' in old else ''}{old}"))
    browser.click(".offenders tbody button")
    assert browser.text("#segment h2") == "s0 on ov"
    assert len(browser.text("body")) < 50_000
    assert browser.js(NOT_WIDER)


def test_the_policy_is_in_force(browser: Browser, report: AuditReport) -> None:
    """What the other tests rely on: injected code does not run, and is noticed."""
    browser.open(report)
    browser.js(
        "const script = document.createElement('script');"
        "script.textContent = 'window.pwned = 1'; document.body.append(script);"
        "const image = new Image(); image.src = 'https://example.org/x.png';"
    )
    assert browser.js("return window.pwned ?? null") is None
    messages = browser.logged()
    assert any("script-src" in message for message in messages)
    assert any("default-src 'none'" in message and "example.org" in message for message in messages)
    assert "https://example.org/x.png" in browser.requested()  # so that requests would be seen


def test_any_report_can_be_read(browser: Browser, any_reports: tuple[AuditReport, ...]) -> None:
    for report in any_reports[:12]:
        browser.open(report)
        assert browser.text(".badge").lower() == report.verdict
        for button in browser.all("summary, [role=tab]"):
            browser.js("arguments[0].click()", button)
        for number in range(min(3, len(browser.all(".node[data-segment]")))):
            browser.js(
                f"document.querySelectorAll('.node[data-segment]')[{number}]"
                ".dispatchEvent(new MouseEvent('click', {bubbles: true}))"
            )
        assert browser.logged() == []


def test_figures_read_as_in_the_other_formats(browser: Browser, report: AuditReport) -> None:
    browser.open(report)
    values = [0, 1, 0.5, 1 / 3, 1.26e-2, 9.96, 99.94, 123.4, 1e5, 8.7e8, 3e-9, 5e-324, 1.7e308]
    values += [0.9996, 0.99994, 0.99996, 0.999999, 4e-5, 0.00996, 0.0995, 12345.678]
    values += [-value for value in values[1:]]
    for name, figure in (
        ("error", words.error),
        ("plain", words.plain),
        ("percent", words.percent),
    ):
        shown = browser.js(f"return arguments[0].map((value) => {name}(value))", values)
        assert shown == [figure(float(value)) for value in values], name


# --- large networks ------------------------------------------------------------------------------


def enlarged(report: AuditReport, number: int) -> AuditReport:
    """The report with a chain of so many segments per backend, and skip connections."""

    def backend(b: BackendReport) -> BackendReport:
        if not b.segments:
            return b
        made = []
        for i in range(number):
            s = b.segments[i % len(b.segments)]
            inputs = [f"t{i - 1}" if i else "images:0"] + ([f"t{i - 4}"] if i % 4 == 0 < i else [])
            nodes = tuple(f"block{i}/{n}" for n in s.nodes)
            made.append(
                replace(s, id=f"s{i}", inputs=tuple(inputs), outputs=(f"t{i}",), nodes=nodes)
            )
        return replace(b, segments=tuple(made))

    backends = tuple(map(backend, report.backends))
    findings = tuple(
        replace(
            report.findings[i % len(report.findings)], rank=i + 1, segment=s.id, segments=(s.id,)
        )
        for i, s in enumerate(backends[1].segments)
    )
    return replace(report, backends=backends, findings=findings)


def test_two_thousand_segments_open_at_once(browser: Browser, report: AuditReport) -> None:
    spent = browser.work(lambda: browser.open(enlarged(report, 2000)))
    print(f"opened in {spent:.2f} s of the page's thread")
    assert 0 < spent < 2
    assert len(browser.all(".node[data-segment]")) == 2000
    assert len(browser.all(".offenders tbody tr")) == 100
    browser.click(".more")
    assert len(browser.all(".offenders tbody tr")) == 2000
    browser.js(
        "document.querySelector('.node[data-segment=\"1999\"]').dispatchEvent("
        "new MouseEvent('click', {bubbles: true}))"
    )
    assert browser.text("#segment h2") == "s1999 on ov"

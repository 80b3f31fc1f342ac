"""Audit models whose every name, and whose file's, is an attack; look at every report format.

``python -m tests.injection.run`` audits one model for each string, through the command, with a
candidate that diverges, so that findings carry the names. Each format is then parsed by what reads
it in earnest: JSON and XML parsers, a CommonMark renderer, and a headless Chromium for HTML
(``apt install chromium-driver``). Nothing may be interpreted: no control character may reach a
screen, no element, link or script may come from a name, and no page may load or log anything.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

ROOT = Path(__file__).parents[2]
STRINGS = (
    # Rich markup
    *("[red]x[/red]", "[/]", "[link=file:///etc/passwd]x[/link]", "[@click=app.quit]x[/]"),
    "\\[red]",
    # terminals: clear, title, link, clipboard, cursor, bell, 8-bit escapes, answers
    *("\x1b[2J", "\x1b]0;pwned\x07", "\x1b]8;;file:///etc/passwd\x1b\\x", "\x1b]52;c;cHduZWQ=\x07"),
    *("\x1b[1A\x1b[2K", "\x07\x08\x0c\x7f", "\x9b2J", "\x1b[6n", "\x1bP+q544e\x1b\\"),
    *("a\rb", "a\nb"),
    # HTML and script
    *("</script><script>window.pwned = 1</script>", "<img src=x onerror='window.pwned = 1'>"),
    *('"><svg onload=window.pwned=1>', "javascript:window.pwned=1", "'; window.pwned = 1; //"),
    *("<!--<script>", "-->", "]]>", "</title></style></pre>", "<iframe src=//x.example>"),
    "&lt;b&gt;",
    *("<a href=javascript:window.pwned=1>x</a>", "\u2028window.pwned = 1\u2029", "<base href=//x>"),
    *("__proto__", "constructor", "${window.pwned = 1}", "{{7*7}}", "{0}{script}%s%n"),
    # Markdown
    *("![x](http://x.example/a.png)", "[x](javascript:window.pwned=1)", "`|`", "```\n# x"),
    "| a | b |",
    *("<details open>", "@everyone #1 :x:", "http://x.example", "* a\n* b", "&#x1b;[2J"),
    # SARIF and XML
    *('{"level": "none"}', "{0}", "[x](1)", "<?xml version='1.0'?>"),
    "<!DOCTYPE a SYSTEM 'file:///etc/passwd'>",
    *("&xxe;", "<![CDATA[x", "\ufffe\uffff", "\x01\x02"),
    # paths and shells
    *("../../etc/passwd", "/etc/passwd", "..\\..\\x", "C:\\x", "~root", "$(touch pwned)"),
    "; touch pwned",
    *("-o", "--sandbox", "CON", "a" * 300, "%2e%2e%2f", "file:///etc/passwd"),
    # Unicode: direction, invisible, look-alikes, combining
    *("\u202egnp.exe", "a\u200bb\u2066c", "\ufeffx", "аudit", "e" + "\u0301" * 200, "\U000e0041x"),
    # spreadsheets
    *("=1+1", "+cmd|' /C calc'!A0"),
    "x" * 1_000_000,
)  # fmt: skip
# Bytes that are no UTF-8, in the model and in its file's name.
BYTES = (b"bad\xff\xfe!!", b"\xc0\xaf..\xc0\xaf", b"\xed\xa0\x80abc")
_STYLE = re.compile(r"\x1b\[[0-9;]*m")
_XML_TAGS = {"testsuites", "testsuite", "testcase", "failure", "error", "skipped"} | {
    *("properties", "property", "system-out", "system-err")
}
_MARKDOWN_TAGS = {"h2", "h3", "p", "ul", "li", "code", "strong", "details", "summary"} | {
    *("table", "thead", "tbody", "tr", "th", "td")
}


# --- one audit -----------------------------------------------------------------------------------


def model(path: str, name: str, weight: float) -> onnx.ModelProto:
    """A convolution network in which every name begins with ``name``."""
    numbers = np.random.default_rng(0)
    kernel = numbers.standard_normal((4, 3, 3, 3)).astype(np.float32) * np.float32(weight)
    graph = helper.make_graph(
        [
            helper.make_node("Conv", [f"{name}i", f"{name}w"], [f"{name}a"], name, doc_string=name),
            helper.make_node("Relu", [f"{name}a"], [f"{name}b"], f"{name}/relu"),
            helper.make_node("GlobalAveragePool", [f"{name}b"], [f"{name}y"], f"{name}:pool"),
        ],
        name or "g",
        [helper.make_tensor_value_info(f"{name}i", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info(f"{name}y", TensorProto.FLOAT, [1, 4, 1, 1])],
        [numpy_helper.from_array(kernel, f"{name}w")],
        doc_string=name,
    )
    opset = [helper.make_opsetid("", 17)]
    made = helper.make_model(graph, opset_imports=opset, ir_version=8, producer_name=name)
    return made


def file_name(text: bytes) -> bytes:
    """``text`` as a file's name: all of it that can be one."""
    return (text.replace(b"/", b"_").replace(b"\0", b"")[:150] or b"x") + b".onnx"


def tried(text: str | bytes, folder: Path) -> tuple[str, list[str], dict[str, str]]:
    """Audit a model with these names.

    Returns:
        ``audited`` or ``refused``; what was interpreted or went wrong; the reports by format.
    """
    from auditor import discovery
    from reports import json_v1

    raw = text if isinstance(text, bytes) else text.encode()
    stand_in = "q" * len(raw) if isinstance(text, bytes) else text
    path = os.fsdecode(os.path.join(os.fsencode(folder), file_name(raw)))
    for where, weight in ((path, 1.0), (f"{folder}/other.onnx", 1.25)):
        data = model(path, stand_in, weight).SerializeToString()
        if isinstance(text, bytes):
            data = data.replace(stand_in.encode(), raw)
        Path(where).write_bytes(data)
    report = folder / "report.json"
    command = [sys.executable, "-m", "auditor", "audit", "--backends", "ort", "--no-cache"]
    done = subprocess.run(
        [*command, "--candidate", f"{folder}/other.onnx", "-o", str(report), "--", path],
        cwd=folder,
        capture_output=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"},
        timeout=120,
        check=False,
    )
    screen = (done.stdout + done.stderr).decode("utf-8", "backslashreplace")
    wrong = [f"screen: {what}" for what in screen_wrong(screen)]
    if "Traceback" in screen or "internal error" in screen or done.returncode not in (0, 1, 2):
        wrong.append(f"exit code {done.returncode}: {screen[-300:]!r}")
    expected = {os.path.basename(path), "other.onnx", "report.json"}
    wrong += [f"wrote {name!r}" for name in set(os.listdir(folder)) - expected]
    if done.returncode == 2:
        return "refused", wrong, {}
    if not report.exists():
        return "refused", [*wrong, f"no report: {screen[-300:]!r}"], {}
    loaded = json_v1.load(report)
    texts = {}
    for name, renderer in discovery.renderers().items():
        for color in (False, True) if name == "terminal" else (False,):
            made = renderer.render(loaded, width=100, color=color)
            made.encode("utf-8")  # raises where half a character is left
            texts[f"{name}, coloured" if color else name] = made
    for name, made in texts.items():
        check = CHECKS.get(name, screen_wrong)
        wrong += [f"{name}: {what}" for what in check(made)]
    return "audited", wrong, texts


# --- what reads the formats ----------------------------------------------------------------------


def screen_wrong(text: str) -> list[str]:
    """Characters that a terminal would obey; colours aside, which are the report's own."""
    found = {c for line in _STYLE.sub("", text).split("\n") for c in line if not c.isprintable()}
    return [f"character {c!r}" for c in sorted(found)]


def json_wrong(text: str) -> list[str]:
    """A JSON text that is not what Python's parser takes, or that a terminal would obey."""
    try:
        json.loads(text)
    except ValueError as error:
        return [f"no JSON: {error}"]
    return screen_wrong(text)


def sarif_wrong(text: str) -> list[str]:
    """SARIF whose messages hold links that are not the report's own."""
    found = json_wrong(text)
    if not found:
        (run,) = json.loads(text)["runs"]
        for result in run["results"]:
            message = result["message"].get("markdown", "") + result["message"].get("text", "")
            found += [f"link {x!r}" for x in re.findall(r"(?<!\\)\]\((?!\d+\)).{0,40}", message)]
    return found


def junit_wrong(text: str) -> list[str]:
    """XML that is not well-formed, or elements that JUnit has not."""
    try:
        root = ET.fromstring(text)
    except ET.ParseError as error:
        return [f"no XML: {error}"]
    return [f"element {e.tag}" for e in root.iter() if e.tag not in _XML_TAGS] + screen_wrong(text)


class _Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in _MARKDOWN_TAGS or any(name != "align" for name, _ in attrs):
            self.found.append(f"element {tag} {attrs}"[:200])


def markdown_wrong(text: str) -> list[str]:
    """Elements of the rendered page that are not the report's own."""
    import cmarkgfm
    from cmarkgfm.cmark import Options

    page = cmarkgfm.github_flavored_markdown_to_html(text, Options.CMARK_OPT_UNSAFE)
    return _Tags(page).found + screen_wrong(text)


CHECKS: dict[str, Callable[[str], list[str]]] = {
    "json": json_wrong,
    "sarif": sarif_wrong,
    "junit": junit_wrong,
    "markdown": markdown_wrong,
    "model-explorer": json_wrong,
}


def browser() -> Any:
    """A headless Chromium with its logs, or None where none is installed."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    program, helper_program = shutil.which("chromium"), shutil.which("chromedriver")
    if not program or not helper_program:
        return None
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in ("--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--no-sandbox"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options=options, service=Service(helper_program))


_LOOK = """
document.querySelectorAll("details").forEach(d => d.open = true);
const row = document.querySelector(".offenders tbody tr td:nth-child(5)");
if (row) row.click();
const odd = [...document.querySelectorAll("*")].filter(e =>
  ["IMG", "IFRAME", "BASE", "OBJECT", "EMBED", "FORM", "LINK"].includes(e.tagName) ||
  [...e.attributes].some(a => a.name.startsWith("on") || /^\\s*javascript:/i.test(a.value)));
return [window.pwned === undefined, document.querySelectorAll("script").length,
        odd.map(e => e.outerHTML.slice(0, 100)), document.querySelectorAll("main tr").length];
"""


def html_wrong(driver: Any, text: str, folder: Path) -> list[str]:
    """What a browser made of a page that it must not."""
    path = folder / "report.html"
    path.write_text(text, "utf-8")
    driver.get_log("browser"), driver.get_log("performance")
    driver.get(path.as_uri())
    untouched, scripts, odd, rows = driver.execute_script(_LOOK)
    found = [f"element {element}" for element in odd]
    found += [] if untouched else ["a script of a name was run"]
    found += [] if scripts == 2 and rows else [f"{scripts} scripts, {rows} rows"]
    found += [f"logged: {entry['message'][:200]}" for entry in driver.get_log("browser")]
    events = [json.loads(e["message"])["message"] for e in driver.get_log("performance")]
    asked = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
    urls = {e["request"]["url"].partition("#")[0] for e in asked} - {path.as_uri()}
    return found + [f"asked for {url}" for url in sorted(urls)]


# --- all of them ---------------------------------------------------------------------------------


def trial(texts: list[str | bytes], driver: Any = None) -> dict[str, Any]:
    """Try strings, and count by format how often one was interpreted."""
    result: dict[str, Any] = {"strings": len(texts), "audited": 0, "refused": 0, "formats": {}}
    result["wrong"] = []
    for text in texts:
        with TemporaryDirectory(prefix="injection-") as name:
            folder = Path(name)
            what, wrong, reports = tried(text, folder)
            if driver and "html" in reports:
                wrong += [f"html: {w}" for w in html_wrong(driver, reports["html"], folder)]
        result[what] += 1
        for format in reports:
            if format != "html" or driver:
                result["formats"][format] = result["formats"].get(format, 0) + 1
        result["wrong"] += [f"{text[:60]!r}: {w}" for w in wrong]
    return result


def main() -> int:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, help="only the first strings")
    parser.add_argument("--json", type=Path, help="add the result to this file")
    asked = parser.parse_args()
    driver = browser()
    if driver is None:
        print("HTML is not tried: no Chromium here (apt install chromium-driver)", file=sys.stderr)
    try:
        result = trial([*STRINGS, *BYTES][: asked.count], driver)
    finally:
        if driver is not None:
            driver.quit()
    print(json.dumps(result, indent=1))
    if asked.json:
        earlier = json.loads(asked.json.read_text()) if asked.json.exists() else []
        asked.json.write_text(json.dumps([*earlier, result]))
    return 1 if result["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())

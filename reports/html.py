"""The report as one HTML file: for reading, and for drilling down with no auditor installed.

The file opens offline and requests nothing. It holds the JSON report as data; the style sheet and
the scripts of ``_html`` beside this file draw it. Names come from model files and engines and are
untrusted: the data cannot end its own element (``<`` is escaped), the scripts show it as text
only, and the page's Content Security Policy runs these scripts, by their hash, and nothing else.

A report holds figures about tensors and no tensors, so there are no pictures of feature maps.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
from typing import TYPE_CHECKING

from reports import _words as words
from reports.json_v1 import dump

if TYPE_CHECKING:
    from auditor.records.report import AuditReport, BackendReport

_SCRIPTS = ("base.js", "chart.js", "graph.js", "segment.js", "page.js")  # later ones use earlier
_TITLE = 200  # characters

# Inside a script element HTML looks for "<!--", "<script" and "</script" only (HTML Standard,
# section 4.12.1.3); ">" and "&" are escaped for readers that are less exact.
_ESCAPES = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"})


class _Html:
    """Report format ``html``."""

    name = "html"
    suffixes = (".html", ".htm")

    def render(self, report: AuditReport, *, width: int | None, color: bool) -> str:
        """The whole report as one page."""
        report = words.visible(report)
        style = _asset("page.css")
        script = "\n".join(map(_asset, _SCRIPTS))
        data = {
            "report": dump(report),
            "words": {
                "headline": words.headline(report),
                "remedies": words.remedies(report.findings),
                "backends": [_told(backend) for backend in report.backends],
            },
        }
        title = words.elide(os.path.basename(report.model.path), _TITLE)
        return _PAGE.format(
            policy=f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; "
            "base-uri 'none'; form-action 'none'",
            title=html.escape(f"{report.verdict.upper()} {title}"),
            headline=html.escape(words.headline(report)),
            style=style,
            data=json.dumps(data, allow_nan=False, separators=(",", ":")).translate(_ESCAPES),
            script=script,
        )


RENDERER = _Html()

_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the report</a>
<noscript><p>{title}: {headline}.</p>
<p>The rest of this report needs JavaScript. It requests nothing from any network.</p></noscript>
<main id="main" tabindex="-1"></main>
<aside id="segment" aria-labelledby="segment-title" hidden></aside>
<script id="data" type="application/json">{data}</script>
<script>{script}</script>
</body>
</html>
"""


def _told(backend: BackendReport) -> dict[str, object]:
    """The sentences about a backend that all formats share."""
    proof, made = backend.fidelity, backend.provenance
    return {
        "proof": words.proof(proof) if proof else "",
        "proved": bool(proof and words.proved(proof)),
        "ran": words.ran(made, backend.status) if made else "",
        "told": [said for output in backend.outputs if (said := words.told(output))]
        + words.end_to_end(backend)
        + [said for said in (words.latency(backend),) if said],
        "books": words.books(backend),
    }


def _asset(name: str) -> str:
    from importlib.resources import files  # here: every audit imports this module

    return files("reports").joinpath("_html", name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """The source expression that allows exactly this inline text (CSP Level 3, section 2.3.1)."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"

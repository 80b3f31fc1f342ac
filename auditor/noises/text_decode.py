"""How a text is read off a recogniser's scores."""

from __future__ import annotations

from auditor.noises._step import step

NOISE = step(
    "text_decode",
    stage="post-processing",
    type="text decoding",
    title="A text is read off the scores in another way",
    cause=(
        "Connectionist temporal classification merges repeated classes and drops blanks; a "
        "deployment that takes every step's best class, or another blank, reads other characters."
    ),
    advice="decode as training's evaluation did, with its blank",
    source="Graves et al., Connectionist temporal classification (ICML 2006), sec. 3.2",
)

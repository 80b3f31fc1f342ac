"""Which export is the most faithful (``audit export``)."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ExportTrial:
    """One exporter at one operator set.

    Attributes:
        exporter: its name; ``opset``: what was asked of it, None for its own choice.
        written: operator set of the file; ``nodes``: how many it has.
        distances: relative L2 of the worst output to PyTorch's, by backend; ``reference`` is the
            file itself without any runtime's optimisation.
        findings: how many there are on the training side, the export's own mistakes.
        causes: ids of the causes named among these.
        gaps: why a backend gave no comparison, by backend.
        frozen: lines of the module's code whose decisions and numbers tracing made constants.
        failure: why there is no usable file; the other fields are empty then.
        seconds: wall time of the export, and of the audit.
    """

    exporter: str
    opset: int | None
    written: int | None = None
    nodes: int = 0
    distances: dict[str, float] = field(default_factory=dict)
    findings: int = 0
    causes: tuple[str, ...] = ()
    gaps: dict[str, str] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()
    failure: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """``dynamo@18``."""
        return self.exporter if self.opset is None else f"{self.exporter}@{self.opset}"


@dataclass(frozen=True, slots=True)
class ExportReport:
    """Which export keeps a module most faithful.

    Attributes:
        source: what was exported; ``backends``: the runtimes to be faithful on.
        trials: in the order they were made.
        chosen: position of the most faithful; None where no export is usable.
        because: why that one, in a sentence.
        samples: how many the figures rest on.
    """

    source: str
    backends: tuple[str, ...]
    trials: tuple[ExportTrial, ...]
    chosen: int | None
    because: str
    samples: int

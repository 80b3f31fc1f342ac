"""A session of ONNX Runtime: what the user chose about it, running it, and what its errors say."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from auditor.errors import BackendError, UsageError
from auditor.ports import Array, Arrays
from backends import _ort_providers

if TYPE_CHECKING:
    from collections.abc import Mapping


ENGINE: Final = "ONNX Runtime"
LEVELS: Final = {
    "all": "ORT_ENABLE_ALL",
    "extended": "ORT_ENABLE_EXTENDED",
    "basic": "ORT_ENABLE_BASIC",
    "disable": "ORT_DISABLE_ALL",
}
# Prefixes of the keys in onnxruntime_session_options_config_keys.h. ONNX Runtime accepts any key
# in silence, so a mistyped one must be caught here.
_CONFIG_PREFIXES: Final = ("session.", "optimization.", "mlas.", "memory.", "ep.")
OWN_KEYS: Final = "session.optimized_model_external_initializers"
FOLDER: Final = "session.model_external_initializers_file_folder_path"  # of a model from memory
# Other types (sequences, strings, bfloat16, 4 bits) do not come out of its Python API as arrays.
COMPARABLE: Final = re.compile(r"tensor\((float|double|float16|bool|u?int(8|16|32|64))\)")
MAPS: Final = re.compile(r"seq\(map\((string|int64),tensor\(float\)\)\)")  # ZipMap's


@dataclass(frozen=True, slots=True)
class Options:
    """What the user chose about a session."""

    level: str
    config: dict[str, str]
    threads: int | None
    provider: str = _ort_providers.CPU
    provider_options: dict[str, str] = field(default_factory=dict)
    custom_ops: tuple[Path, ...] = ()

    @classmethod
    def parse(
        cls,
        given: Mapping[str, str],
        threads: int | None,
        level: str = "all",
        device: str | None = None,
    ) -> Options:
        """Read the user's options; ``level`` is the one where none is given."""
        config, special = {}, {}
        provider = _ort_providers.named(device)
        for key, value in given.items():
            if key.lower() == "level":
                level = value.lower()
            elif key.startswith(_ort_providers.OPTION) and provider != _ort_providers.CPU:
                special[key.removeprefix(_ort_providers.OPTION)] = value
            elif key.startswith(_CONFIG_PREFIXES) and not key.startswith(OWN_KEYS):
                config[key] = value
            else:
                raise UsageError(
                    f"The ort backend has no option {key!r}.",
                    "Use level=all|extended|basic|disable, or an ONNX Runtime session "
                    "configuration entry such as session.disable_prepacking=1.",
                )
        if level not in LEVELS:
            raise UsageError(
                f"The ort backend has no level {level!r}.", f"Use one of {', '.join(LEVELS)}."
            )
        return cls(level, config, threads, provider, special)

    def session(
        self,
        model: Path | bytes,
        dump: Path | None,
        level: str,
        extra: Mapping[str, str],
        *,
        stage: str,
    ) -> Any:
        """A session on ``model`` at ``level`` that writes the graph it executes to ``dump``."""
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 4  # errors come as exceptions
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, LEVELS[level])
        if dump is not None:
            options.optimized_model_filepath = str(dump)
        if self.threads is not None:
            options.intra_op_num_threads = self.threads
        try:
            for library in self.custom_ops:
                options.register_custom_ops_library(str(library))
            for key, value in {**self.config, **extra}.items():
                options.add_session_config_entry(key, value)
            if self.provider != _ort_providers.CPU:
                options.add_session_config_entry(_ort_providers.RECORD, "1")
            providers = _ort_providers.listed(self.provider, self.provider_options)
            source = model if isinstance(model, bytes) else _openable(model)
            session = ort.InferenceSession(source, options, providers=providers)
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            raise _refusal(error, stage) from error
        _ort_providers.require(session, self.provider)
        return session

    def blamed(
        self, error: BackendError, model: Path, feeds: Mapping[str, Array] | None = None
    ) -> BackendError:
        """The error, with the highest level at which the model compiles, or runs, as its remedy."""
        for level in list(LEVELS)[list(LEVELS).index(self.level) + 1 :]:
            try:
                session = self.session(model, None, level, {}, stage=error.stage)
                if feeds is not None:
                    run(session, outputs_of(session), feeds)
            except BackendError:
                continue
            hint = (
                f"Use --option ort.level={level}: there ONNX Runtime takes the model, so that an "
                f"optimiser of level {self.level} is what breaks it."
            )
            return BackendError(error.message, hint, stage=error.stage, log=error.log)
        return error

    def listed(self) -> dict[str, str]:
        """The options as a report shows them."""
        threads = {} if self.threads is None else {"intra_op_num_threads": str(self.threads)}
        special = {f"{_ort_providers.OPTION}{k}": v for k, v in self.provider_options.items()}
        libraries = {"custom_ops": " ".join(map(str, self.custom_ops))} if self.custom_ops else {}
        return {"level": self.level, **threads, **self.config, **special, **libraries}


def _openable(model: Path) -> str | bytes:
    """A path that ONNX Runtime can open, else what the file holds: it takes paths in UTF-8 only."""
    try:
        str(model).encode()
    except UnicodeEncodeError:
        return model.read_bytes()
    return str(model)


def outputs_of(session: Any) -> list[str]:
    """Names of the outputs that can be compared."""
    return [
        output.name
        for output in session.get_outputs()
        if COMPARABLE.fullmatch(output.type) or MAPS.fullmatch(output.type)
    ]


def run(session: Any, names: list[str], feeds: Mapping[str, Array]) -> Arrays:
    """Outputs by name; those that are a map for each row as tables in the order of their keys."""
    try:
        values = dict(zip(names, session.run(names, dict(feeds)), strict=True))
    except Exception as error:  # ONNX Runtime's exceptions have no common base
        raise _refusal(error, "run") from error
    return {name: _table(v) if isinstance(v, list) else v for name, v in values.items()}


def _table(rows: list[dict[Any, float]]) -> Array:
    """Maps with the same keys, float32 [rows, keys]."""
    return np.array([[value for _, value in sorted(row.items())] for row in rows], np.float32)


_BAD_OPERATOR: Final = (
    re.compile(r"implementation for (?P<op>\S+?)\(\S+\) node with name '(?P<node>[^']*)'"),
    re.compile(r"Fatal error: (?P<op>\S+?)\(\S+\) is not a registered"),
    re.compile(r"No Op registered for (?P<op>\S+)"),
    re.compile(r"Node \((?P<node>.*?)\) Op \((?P<op>.*?)\)"),
    re.compile(r"non-zero status code returned while running (?P<op>\S+) node. "
               r"Name:'(?P<node>[^']*)'", re.IGNORECASE),
)  # fmt: skip


def _refusal(error: Exception, stage: str) -> BackendError:
    """ONNX Runtime's error, with the operator it names."""
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : (\w+) : ", "", str(error)).strip()
    found = next((m for pattern in _BAD_OPERATOR if (m := pattern.search(text))), None)
    if found is None:
        return BackendError(
            f"ONNX Runtime failed: {text.splitlines()[0] if text else type(error).__name__}",
            "Check the model with onnx.checker and compare its opset with this version's.",
            stage=stage,
            log=tuple(text.splitlines()),
        )
    node = found.groupdict().get("node")
    where = f" (node {node!r})" if node else ""
    return BackendError(
        f"ONNX Runtime cannot run operator {found['op']}{where}: {text.splitlines()[0]}",
        "Another version of onnxruntime, or another form of this operator, may be supported.",
        stage=stage,
        log=tuple(text.splitlines()),
    )

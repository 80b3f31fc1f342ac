"""The application that every verb registers itself with."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from auditor.errors import UsageError

MAIN = "audit"  # the verb meant when none is given
# The parameters of its help page, by subject; those that stand nowhere are among the options.
PANELS: dict[str, tuple[str, ...]] = {
    "Arguments": ("model",),
    "Options": ("backends", "data", "option", "policy", "output"),
    "Inputs": (
        *("images", "pipeline", "samples", "shape", "seed", "allow_nonfinite", "calibration"),
    ),
    "What is compared": (
        *("candidate", "artifact", "trace", "trace_names", "source", "trust_source", "custom_ops"),
    ),
    "Verdict and report": (
        *("fail_on", "baseline", "output_kind", "tokens", "latency", "confirm", "pictures"),
        "format",
    ),
    "Resources": ("threads", "timeout", "memory", "worker_memory", "cache", "sandbox"),
}
UNRULED = "unruled"  # in the meta of an audit made again: no policy is looked for


class _Verbs(TyperGroup):
    """A group with a default verb: ``audit model.onnx`` is ``audit audit model.onnx``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Insert the default verb unless the first word is one (options may come first)."""
        if not args or args[0] not in self.commands:
            _check_verb(args[0] if args else "", self.commands)
            args = [MAIN, *args]
        return super().parse_args(ctx, args)


def _check_verb(word: str, verbs: Collection[str]) -> None:
    """Refuse a first word that is almost a verb, and neither a path, a file nor an option."""
    if word.startswith("-"):
        return
    close = difflib.get_close_matches(word, verbs, n=1, cutoff=0.7)
    if close and Path(word).name == word and not Path(word).suffix and not Path(word).exists():
        raise UsageError(
            f"there is no command `{word}`, nor a model of that name",
            f"Did you mean `audit {close[0]}`? `audit --help` lists the commands.",
        )


class MainVerb(TyperCommand):
    """The default verb, whose help page is that of the whole program."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Keep the arguments as they were given: a report says how to make it again."""
        ctx.meta[MAIN] = tuple(args)
        return super().parse_args(ctx, args)

    def format_usage(self, ctx: Any, formatter: Any) -> None:
        """Show the usage without the implied verb, and that there are others."""
        program = ctx.parent.command_path
        formatter.write_usage(program, "MODEL [OPTIONS]")
        formatter.write_usage(program, "COMMAND --help", "      ")

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """List the options, everyday ones first and the others by subject, then the other verbs."""
        left = {p.name: record for p in self.get_params(ctx) if (record := p.get_help_record(ctx))}
        grouped = {title: [left.pop(name) for name in names] for title, names in PANELS.items()}
        for title, records in grouped.items():
            with formatter.section(title):
                formatter.write_dl(records + [*left.values()] * (title == "Options"))
        ctx.parent.command.format_commands(ctx.parent, formatter)


def examples(*lines: str) -> str:
    """The part of a help page that shows how a verb is used."""
    return "\b\nExamples:\n" + "\n".join(f"  audit {line}" for line in lines)


app = typer.Typer(
    cls=_Verbs,
    add_completion=False,
    add_help_option=False,  # the default verb answers; and parsing one here costs 0.1 s
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

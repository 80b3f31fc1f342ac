"""What labels say of a result: one file for each task in ``tasks/``, found by listing.

A file of ``tasks/`` exports ``TASK``, which satisfies ``Task``; its stem names it for ``--task``.
A task judges one photograph at a time, in a few numbers that can be kept in a file; its metric is
made of many photographs' numbers by a library that others use for it, drawn anew for intervals.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from auditor.errors import UsageError
from auditor.pipeline.preprocessing.stages import Placement
from auditor.ports import Array
from auditor.records.terms import OutputKind

Label = Any  # what a task's own ``read`` makes; its ``repr`` tells two of them apart
Verdict = list[float]  # what a task says of one result; JSON


@dataclass(frozen=True, slots=True)
class Labels:
    """The truth about photographs.

    Attributes:
        values: by name; photographs without a label are not in it.
        notes: what of the labels does not match, as sentences.
    """

    values: dict[str, Label]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Case:
    """One photograph that a result is judged for.

    Attributes:
        photo: its name.
        label: its truth.
        place: where in the photograph the network's input is.
        gallery: results of the training pipeline by photograph, and their labels; only for tasks
            that ask for it.
        characters: the character of each class that a text recogniser tells apart.
    """

    photo: str
    label: Label
    place: Placement
    gallery: Gallery | None = None
    characters: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Gallery:
    """Results of the training pipeline that others are compared with.

    Attributes:
        vectors: ``[photographs, length]``, each of unit length.
        names: of the photographs.
        labels: theirs.
    """

    vectors: Array
    names: tuple[str, ...]
    labels: tuple[Label, ...]


class Task(Protocol):
    """One thing that networks are made for."""

    @property
    def metric(self) -> str:
        """The name of the figure: ``top-1``, ``mAP`` …; a fraction, the larger the better."""

    @property
    def kind(self) -> OutputKind:
        """The kind that the result must be read as."""

    @property
    def packages(self) -> Mapping[str, str]:
        """Import name to distribution, of the libraries that the metric comes from."""

    @property
    def labels(self) -> str:
        """What ``--labels`` takes, in words."""

    @property
    def draws(self) -> int:
        """How many bootstrap draws the metric can afford."""

    @property
    def gallery(self) -> bool:
        """Whether a result is judged against those of the other photographs."""

    def read(self, folder: Path, names: Sequence[str], source: str) -> Labels:
        """The labels of the photographs ``names`` in ``folder``.

        Raises:
            UsageError: ``source`` is nothing that this task takes.
        """

    def judge(self, value: Array, case: Case) -> Verdict | None:
        """What the label says of one result (one photograph: the first axis has length 1).

        None where it says nothing.

        Raises:
            PhotoError: the label cannot be read.
        """

    def score(self, verdicts: Sequence[Verdict], labels: Sequence[Label], weights: Array) -> Array:
        """The metric of photographs drawn with repetition.

        Args:
            verdicts: by photograph.
            labels: theirs.
            weights: ``[draws, photographs]``, how often each is drawn.

        Returns:
            ``[draws]``; NaN where a draw has nothing to judge.
        """


@cache
def names() -> tuple[str, ...]:
    """Every task."""
    package = importlib.import_module("auditor.pipeline.tasks")
    return tuple(sorted(m.name for m in pkgutil.iter_modules(package.__path__)))


def load(name: str) -> Task:
    """The task with this name; one of ``names``."""
    found: Task = importlib.import_module(f"auditor.pipeline.tasks.{name}").TASK
    return found


def reading(kind: OutputKind) -> str | None:
    """The task whose results are read like this, or None."""
    return next((name for name in names() if load(name).kind == kind), None)


def require(task: Task) -> None:
    """Check, before any work is done, that the metric's libraries are installed.

    Raises:
        UsageError: one is not.
    """
    for module, package in task.packages.items():
        if importlib.util.find_spec(module) is None:
            raise UsageError(
                f"--labels needs {package} for {task.metric}, and it is not installed",
                f"pip install {package}, or 'sysnoise-auditor[metrics]'; without --labels the "
                "results are compared with those of the training pipeline.",
            )


def listed(what: str, found: Sequence[str]) -> str:
    """A note of how many names there are, and the first ones."""
    first = ", ".join(found[:3]) + (" …" if len(found) > 3 else "")
    return f"{what} ({len(found)}): {first}."

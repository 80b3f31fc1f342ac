"""Figures of a table of options by photographs, with intervals."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from auditor.pipeline.sysnoise import networks, options
from auditor.pipeline.sysnoise.combinations import Choice, name_of, size_of
from auditor.pipeline.sysnoise.statistics import Drawn, Means, weights
from auditor.pipeline.sysnoise.sweep import Read, Table
from auditor.records.backend import Gap
from auditor.records.sysnoise import (
    Interval,
    SysnoiseEffect,
    SysnoiseFlip,
    SysnoiseOption,
    SysnoiseStep,
    SysnoiseType,
)

if TYPE_CHECKING:
    from auditor.pipeline.photos import Photos
    from auditor.pipeline.scoring import Task, Verdict

_CHANCE = 5  # times the accuracy of guessing: below it the labels are not the model's
_ENOUGH = 20  # photographs for that judgement


class Figures:
    """Figures from a table, all with intervals from the same draws of photographs."""

    def __init__(
        self,
        table: Table,
        photos: Photos,
        read: Read,
        before: Figures | None = None,
    ) -> None:
        """Draw; the columns of ``before`` stand beside the table's."""
        self._photos = photos
        self._table: Table = table
        self._scores: dict[tuple[tuple[int, ...], bytes], Drawn] = before._scores if before else {}
        tables = [table, before._table] if before is not None else [table]
        self._columns: dict[str, int] = {}
        offset = 0
        for each in tables:
            for name, column in each.columns.items():
                self._columns.setdefault(name, offset + column)
            offset += len(each.columns)
        self._valid = np.array([i for i in range(len(photos.names)) if i not in table.failed])
        self._changed, self._relative, self._top1 = (
            np.concatenate([getattr(t, field) for t in tables], axis=1)[self._valid]
            for field in ("changed", "relative_l2", "top1")
        )
        self.used = len(self._valid)
        self._l2 = Means(self._relative.astype(np.float64))
        self._moved = Means(self._changed.astype(np.float64)) if read.kind != "none" else None
        self._drop: Drawn | None = None
        self.accuracy: Interval | None = None
        self.labelled = 0
        if read.task is not None:
            columns = [t.verdicts[name].get() for t in tables for name in t.columns]
            self.labelled = len(columns[0])
            if self.labelled:
                base, self._drop = self._scored(read.task, columns)
                self.accuracy = base.interval(0)

    def _scored(self, task: Task, columns: Sequence[dict[int, Verdict]]) -> tuple[Drawn, Drawn]:
        """The metric of the training pipeline, and what every column loses of it.

        A column is compared with the training pipeline on the photographs that it could process.
        """
        place = {int(photo): row for row, photo in enumerate(self._valid)}
        names, labels = self._photos.names, self._photos.labels

        def score(column: dict[int, Verdict], photos: tuple[int, ...]) -> Drawn:
            verdicts = [column[photo] for photo in photos]
            key = photos, hashlib.blake2b(repr(verdicts).encode()).digest()
            if key not in self._scores:  # many options judge alike, and drawing is slow
                self._scores[key] = draw(verdicts, photos)
            return self._scores[key]

        def draw(verdicts: Sequence[Verdict], photos: tuple[int, ...]) -> Drawn:
            truth = [labels[names[photo]] for photo in photos]
            rows = [place[photo] for photo in photos]
            parts = (part[:, rows] for part in weights(self.used, task.draws))
            # What is made of the verdicts before they are weighted is made once for both.
            first = np.concatenate([np.ones((1, len(photos))), next(parts)])
            found = np.concatenate([task.score(verdicts, truth, p) for p in chain([first], parts)])
            return Drawn(found[:1], found[1:, None])

        every = tuple(columns[0])
        values, draws = [], []
        for column in columns:
            photos = tuple(photo for photo in every if photo in column)
            if photos:
                base, one = score(columns[0], photos), score(column, photos)
                values.append(base.value - one.value)
                draws.append(base.draws - one.draws)
            else:
                values.append(np.full(1, np.nan))
                draws.append(np.full((task.draws, 1), np.nan))
        return score(columns[0], every), Drawn(
            np.concatenate(values), np.concatenate(draws, axis=1)
        )

    def types(self, choices: Sequence[Choice]) -> tuple[SysnoiseType, ...]:
        """Options by type, the types with the largest effect first."""
        by_type: dict[str, list[Choice]] = {}
        for choice in choices:
            column = self._columns[choice.trial]
            if np.isnan(self._relative[:, column]).all():
                continue  # no photograph could be processed: a gap says so
            by_type.setdefault(choice.type, []).append(choice)
        found = []
        for type, members in by_type.items():
            made = sorted(
                (self.option(c.trial, c.name, c.tool) for c in members),
                key=lambda option: size_of(option.effect),
                reverse=True,
            )
            if type == options.ORIENTATION and made[0].same == made[0].photos:
                continue  # no photograph is turned
            columns = [self._columns[c.trial] for c in members]
            mean = self._effect(partial(Drawn.mean, columns=columns))
            most = self._effect(partial(Drawn.max, columns=columns))
            titles = options.TITLES | options.AFTER | networks.TITLES
            title = titles.get(type, type)
            found.append(SysnoiseType(type, title, tuple(made), mean, most, made[0].name))
        return tuple(sorted(found, key=lambda type: size_of(type.max), reverse=True))

    def option(self, trial: str, name: str, tool: str) -> SysnoiseOption:
        """One column."""
        column = self._columns[trial]
        values = self._relative[:, column]
        return SysnoiseOption(
            name=name,
            tool=tool,
            photos=int(np.count_nonzero(~np.isnan(values))),
            refused=int(np.count_nonzero(np.isnan(values))),
            same=int(np.count_nonzero(values == 0)),
            effect=self._effect(partial(Drawn.interval, column=column)),
        )

    def step(self, choices: Sequence[Choice]) -> SysnoiseStep:
        """Several types at once."""
        column = self._columns[name_of(choices)]
        parts = [self._columns[c.trial] for c in choices]
        return SysnoiseStep(
            types=tuple(c.type for c in choices),
            options=tuple(c.name for c in choices),
            effect=self._effect(partial(Drawn.interval, column=column)),
            surplus=self._effect(partial(Drawn.surplus, whole=column, parts=parts))
            if len(choices) > 1
            else None,
        )

    def flips(self, choices: Sequence[Choice]) -> tuple[SysnoiseFlip, ...]:
        """Every photograph whose top-1, or whose text, an option changes."""
        found = []
        for row, photo in enumerate(self._valid):
            name = self._photos.names[photo]
            before = int(self._top1[row, 0])
            for choice in choices:
                after = int(self._top1[row, self._columns[choice.trial]])
                if before >= 0 and after >= 0 and after != before:
                    label = self._photos.labels.get(name)
                    found.append(SysnoiseFlip(name, choice.trial, before, after, label))
        alone = {self._columns[choice.trial]: choice.trial for choice in choices}
        for (photo, column), text in sorted(self._table.texts.items()):
            if column in alone:
                name = self._photos.names[photo]
                original = self._table.texts[photo, 0]
                label = self._photos.labels.get(name)
                found.append(SysnoiseFlip(name, alone[column], original, text, label))
        return tuple(found)

    def refusals(self) -> list[Gap]:
        """What options could not process."""
        return [
            Gap(name, "run", f"{count} photograph{'s' * (count > 1)}: {first}")
            for name, (count, first) in self._table.refusals.items()
        ]

    def doubts(self, read: Read) -> list[str]:
        """Reasons to distrust the labels."""
        if self._photos.labels and not self.labelled:
            return ["No label could be held against a result: the labels are not used."]
        if read.kind != "scores" or self.accuracy is None or self.labelled < _ENOUGH:
            return []
        classes = 1 + max(*self._photos.labels.values(), int(self._top1[:, 0].max()))
        if self.accuracy.value * classes > _CHANCE:
            return []
        return [
            f"Top-1 of the training pipeline is {self.accuracy.value:.1%} on {classes} classes: "
            "the labels may not be those of the model, or the pipeline not that of its training."
        ]

    def _effect(self, take: Callable[[Drawn], Interval]) -> SysnoiseEffect:
        return SysnoiseEffect(
            drop=take(self._drop) if self._drop is not None else None,
            changed=take(self._moved) if self._moved is not None else None,
            relative_l2=take(self._l2),
        )

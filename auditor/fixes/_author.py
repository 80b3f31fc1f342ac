"""Writes a model anew, layer by layer, in the ways that the files of this package know."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import onnx

from auditor import discovery
from auditor.fixes._bench import Bench, Change
from auditor.fixes._view import MARK, View
from auditor.graphs import model as models
from auditor.graphs import surgery

if TYPE_CHECKING:
    from auditor.ports import Fix
    from auditor.records.report import Finding

_OPSETS = (13, 17, 18, 21)


class Author:
    """Writes the model anew, layer by layer, and keeps only what the reference agrees with."""

    def __init__(self, bench: Bench, found: Sequence[Finding]) -> None:
        self.notes: list[str] = []
        if bench.whole is None:
            self.notes.append("The model's weights exceed 2 GB: it is not rewritten.")
        self._bench = bench
        self._found = found
        self._fixes = discovery.fixes()

    def layers(self, number: int, *, around: bool = False) -> Change | None:
        """The model with the layers of the first ``number`` findings written otherwise.

        Each in the way that suits its cause; None where there is none. With ``around`` the nodes
        that read from these layers too: a value may overflow on its way between them.
        """
        model = self._bench.whole
        if model is None:
            return None
        keys = {key: f for f in self._found[:number] for key in self._bench.keys_of(f)}
        if around:
            made = {
                n: keys[models.key(node)]
                for node in model.graph.node
                if models.key(node) in keys
                for n in node.output
            }
            for node in model.graph.node:
                source = next((made[n] for n in node.input if n in made), None)
                if source is not None:
                    keys.setdefault(models.key(node), source)
        view = View(model, self._bench.values)
        replaced: dict[int, list[onnx.NodeProto]] = {}
        names: dict[str, None] = {}
        nodes, ranks = [], set()
        theirs = [
            (index, node, keys[models.key(node)])
            for index, node in enumerate(model.graph.node)
            if models.key(node) in keys
        ]
        # Where a way that suits the cause exists, a finding's other nodes are left as they are.
        suited = {
            finding.rank
            for _, node, finding in theirs
            for fix in self._fixes
            if finding.noise in fix.noises and fix.rewrite(node, View(model, self._bench.values))
        }
        for index, node, finding in theirs:
            for fix in self._suiting(finding):
                if finding.rank in suited and finding.noise not in fix.noises:
                    continue
                if (written := fix.rewrite(node, view)) is not None:
                    replaced[index] = written
                    names[fix.title] = None
                    nodes.append(self._bench.label(node))
                    ranks.add(finding.rank)
                    break
        if not replaced:
            return None
        changed = surgery.copied(model)
        del changed.graph.node[:]
        for index, node in enumerate(model.graph.node):
            changed.graph.node.extend(replaced.get(index, [node]))
        changed.graph.initializer.extend(view.initializers)
        _without_round_trips(changed)
        if (why := self._bench.disagrees(changed)) is not None:
            self.notes.append(f"{', '.join(names)}: not tried, {why}.")
            return None
        return Change("; ".join(names), tuple(sorted(ranks)), {}, tuple(nodes), changed)

    def wider(self) -> Iterator[Change | None]:
        """What is left to try: all layers, their neighbours too, and newer operator sets."""
        yield self.layers(len(self._found))
        yield self.layers(len(self._found), around=True)
        yield from self.newer(self._found)

    def _suiting(self, finding: Finding) -> list[Fix]:
        """Rewrites for its cause, the particular ones first; then all others, for causes overlap.

        None can do harm: each is checked on the reference, and counts by what its build shows.
        """
        return sorted(
            self._fixes, key=lambda f: (finding.noise not in f.noises, len(f.noises), f.id)
        )

    def newer(self, taken: Sequence[Finding]) -> Iterator[Change]:
        """The model in newer operator sets, which runtimes import in other ways."""
        model = self._bench.whole
        if model is None:
            return
        ranks = tuple(f.rank for f in taken)
        for opset in (o for o in _OPSETS if o > surgery.opset(model)):
            for changed in surgery.upgraded(model, opset):
                if self._bench.disagrees(changed) is None:
                    yield Change(f"operator set {opset}", ranks, {}, (), changed)
                    break


def _without_round_trips(model: onnx.ModelProto) -> None:
    """Neighbours computed in float32 hand it over: no cast to float16 and back in between."""
    narrowed = {
        node.output[0]: node.input[0]
        for node in model.graph.node
        if node.op_type == "Cast" and surgery.attributes(node)["to"] == onnx.TensorProto.FLOAT16
    }
    wide: dict[str, str] = {}
    for node in model.graph.node:
        for position, name in enumerate(node.input):
            node.input[position] = wide.get(name, name)
        if node.op_type == "Cast" and surgery.attributes(node)["to"] == onnx.TensorProto.FLOAT:
            source = narrowed.get(node.input[0])
            if source is not None and MARK in source:  # a cast that a rewrite put there
                wide[node.output[0]] = source
    finals = {o.name for o in model.graph.output}
    for index in reversed(range(len(model.graph.node))):  # what reads a dead cast may be dead too
        node = model.graph.node[index]
        read = any(node.output[0] in other.input for other in model.graph.node)
        if node.op_type == "Cast" and not read and node.output[0] not in finals:
            del model.graph.node[index]

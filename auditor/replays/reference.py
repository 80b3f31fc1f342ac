"""The reference: the model as written, run whole or segment by segment."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from auditor.errors import UsageError
from auditor.graphs.segments import Cut, Graph
from auditor.ports import Arrays
from auditor.processes import memory
from auditor.records.model import ReferenceInfo
from auditor.replays import integers
from auditor.replays.replay import BUDGET, Replayer
from auditor.replays.sessions import one_line, session
from auditor.replays.writer import Format

if TYPE_CHECKING:
    from auditor.graphs.model import Model


class Reference:
    """The model as written: ONNX Runtime on the CPU without optimisation, in its own precision.

    Attributes:
        graph, replayer: its graph, and its segments ready to run.
        labels: by node key, what a person calls the node.
        whole: whether one session runs the whole model; else it has more weights than may be held.
        narrow: by tensor, the format in which the model has it, where this one has float32.
    """

    def __init__(
        self,
        model: Model,
        threads: int,
        narrow: Mapping[str, Format] | None = None,
        budget: int = BUDGET,
    ) -> None:
        """Compile the reference.

        Args:
            model: the model, widened if its floats are narrow (``auditor.replays.widening``).
            threads: how many threads may work.
            narrow: of a widened model, the formats that its tensors have.
            budget: bytes of weights to hold. A model that has more is run node by node.

        Raises:
            UsageError: ONNX Runtime cannot run the model, so there is nothing to compare with.
        """
        self._proto = model.proto
        self.graph = Graph(model.proto)
        self.replayer = Replayer(self.graph, threads, model.weights, model.folder, budget)
        self.labels = model.labels
        self.narrow = narrow or {}
        fits = self.graph.size(self.graph.initializers) <= budget
        self.whole = fits or not all(map(self.computes, self.graph.outputs))
        self._session: Any = None
        if not self.whole:
            return
        self._compile = partial(session, model.proto, self.replayer.threads, model.folder)
        try:
            self._session = self._compile()
        except Exception as error:  # ORT raises a family of classes that share no base
            said = one_line(error)
            hint = "The reference is ONNX Runtime on the CPU: check that it has every operator."
            if "locale" in said:  # of StringNormalizer: with it scikit-learn's text models begin
                hint = "Install that locale on this machine (`locale-gen`, package locales)."
            raise UsageError(f"the reference cannot load the model: {said}", hint) from error

    @property
    def info(self) -> ReferenceInfo:
        """What the report says of the reference."""
        import onnxruntime as ort

        names = " and ".join(sorted({form.name for form in self.narrow.values()}))
        precision = f"float32 for the model's {names}" if names else "the model's own types"
        engine = "ONNX Runtime CPU, ORT_DISABLE_ALL"
        if not self.whole:
            engine += ", node by node (its weights exceed --memory)"
        if integers.concerns(self._proto):
            precision += ", int8 weights of integer products as uint8, which do not saturate here"
        return ReferenceInfo(engine, ort.__version__, precision)

    def wide(self, tensors: Arrays) -> Arrays:
        """Tensors of the model, or of a runtime, in the reference's types."""
        from auditor.replays.widening import wide

        return wide(tensors) if self.narrow else tensors

    def run(self, feeds: Arrays) -> Arrays:
        """Final outputs by ONNX name, for inputs in the model's own types.

        Raises:
            UsageError: the model fails on these inputs.
        """
        names = list(self.graph.outputs)
        try:
            if not self.whole:
                return self.replayer.stream(self.wide(feeds))
            self._session = self._session or self._compile()
            return dict(zip(names, self._session.run(names, self.wide(feeds)), strict=True))
        except Exception as error:
            said = one_line(error)
            hint = "Give real inputs with --data, or other shapes with --shape."
            if "umpy" in said:  # ONNX Runtime's words, by number: types that NumPy does not have
                odd = {f"`{n}` is {v.dtype}" for n, v in feeds.items() if v.dtype.kind == "V"}
                said = " and ".join(sorted(odd)) or said
                hint = (
                    "ONNX Runtime takes and gives NumPy's types: put a Cast to one of them there."
                )
            raise UsageError(
                f"the reference cannot run the model on this input: {said}", hint
            ) from error

    def own_type(self, cut: Cut) -> Format | None:
        """The narrow format that the model gives tensors of a segment, the coarsest if several."""
        made = (name for index in cut.nodes for name in self.graph.nodes[index].output)
        formats = [self.narrow[name] for name in (*cut.inputs, *made) if name in self.narrow]
        return min(formats, key=lambda form: form.bits, default=None)

    def release(self) -> None:
        """Free what runs the whole graph, until the next run; the segments stay."""
        self._session = None
        memory.give_back()

    def release_all(self) -> None:
        """Free what runs the segments too, until they are run again."""
        self.replayer.release()
        self.release()

    def computes(self, tensor: str) -> bool:
        """Whether a node computes the tensor from the stimulus."""
        return tensor in self.graph.producer and not self.graph.is_constant(tensor)

"""The planted-fault suite: does the auditor find what was put there, and only that?

``python -m benchmarks.plants --count 10 --seed 0`` changes one node of a real model in a known
way, lets a backend compile the changed model while the original stays the reference, and scores
the report. Results are appended to a file, so that an interrupted run goes on where it stopped;
``--table docs/planted-faults.md`` writes the confusion table from it.

A case is drawn from (seed, model, number) alone: first the plant, so that every form the model
can carry comes up equally often, then the node. A plant is kept when it changes its own node's
output by at least ``suite.MEASURABLE`` (relative L2), and what lies right behind it by
``suite.REACHES``, as ONNX Runtime computes them without optimisation; that is decided before the
auditor sees it. Changed weights do not stand in the changed file: they are the old ones plus a
constant, which the engine folds, since the auditor reads a compiled file's constants.

How a report is scored:

- *New* findings are those that the audit of the same build without the plant does not have: with
  the same causes at a segment that shares a node, or with those of all such segments together, as
  a plant may cut segments otherwise. Most builds have none of their own.
- *Located*: the segments of the top-ranked new finding hold the changed node. Of two faults, both
  must be held by the first two new findings.
- *Right cause*: located, and the finding names a cause that truly describes the plant. A defect
  that is no known noise, and what is *unexplained* in a noise, have no cause named.
- *False name*: a defect whose finding names a cause; *wrong cause*: a noise that is given another.
- *Stray*: new findings that hold no changed node.
- *False positive*: any new finding for a rewrite that changes nothing.
"""

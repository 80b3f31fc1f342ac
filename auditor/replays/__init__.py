"""Copies of a segment in which something is computed otherwise, and the sessions that run them.

- *Running*: ``sessions`` → ``replay`` (a segment) → ``reference`` (a network), ``turns`` (one whose
  sessions do not all fit); ``widening`` and ``integers`` are what the reference computes in.
- *Reading*: ``layout`` (constants, and what makes and reads a tensor), on it ``quantised`` (what is
  held in 8 bits) and ``kernel_layout`` (which nodes one kernel computes); ``qdq`` and ``blockwise``
  (fewer bits).
- *Taking apart*: ``portions``, ``branches``, ``loops``.
- *Writing anew*: ``editor``, node by node. Equal in exact arithmetic: ``reorder``, ``functions``,
  ``fused``, ``algebra``, ``linear``, ``positions``, ``decisions``. Nearly equal: ``patterns``.
- *Rounding*: ``rounder`` (where a kernel rounds) on ``writer`` (how), used by ``rounding`` (a whole
  segment).
- *As one runtime computes*: OpenVINO in ``kernels``, ``premultiplied``, ``folded``, ``dynamic`` and
  ``recurrent``; it and TVM in ``steps``; ONNX Runtime's own operators in ``qlinear``.
"""

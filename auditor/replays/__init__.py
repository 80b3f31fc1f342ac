"""Copies of a segment in which something is computed otherwise, and the sessions that run them.

- *Running*: ``sessions`` → ``replay`` (a segment) → ``reference`` (a network), ``turns`` (one whose
  sessions do not all fit); ``widening`` and ``integers`` are what the reference computes in.
- *Taking apart*: ``portions``, ``branches``, ``loops``; ``quantised`` and ``qdq`` read what is held
  in 8 bits, ``blockwise`` in fewer.
- *Writing anew*: ``editor``, node by node. Equal in exact arithmetic: ``reorder``, ``functions``,
  ``fused``, ``algebra``, ``linear``, ``positions``, ``decisions``. Nearly equal: ``patterns``.
- *Rounding*: ``layout`` (what a kernel computes) → ``rounder`` (where it rounds) → ``writer`` (how)
  → ``rounding`` (a whole segment).
- *As one runtime computes*: OpenVINO in ``kernels``, ``premultiplied``, ``folded``, ``dynamic`` and
  ``recurrent``; it and TVM in ``steps``; ONNX Runtime's own operators in ``qlinear``.
"""

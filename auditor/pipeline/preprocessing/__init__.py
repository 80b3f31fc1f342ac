"""From a photograph's file to the network's input tensor.

``stages`` says what one side does, as records, and ``steps`` does it. Its ``libraries`` are one
file each in ``decoders/``, ``resizers/`` and ``colours/``.
"""

"""One file per noise, each exporting one constant ``NOISE`` (see ``auditor.ports.Noise``).

Those that are words alone, steps of a pipeline, stand in one (``NOISES``).

Modules are found by listing this package: there is no registry to edit.
"""

"""One file per noise, each exporting one constant ``NOISE`` (see ``auditor.ports.Noise``).

Modules are found by listing this package: there is no registry to edit.
"""

"""One file per report format, each exporting one constant ``RENDERER``.

See ``auditor.ports.Renderer``. Modules are found by listing this package.
"""

"""One file per runtime; the file's stem is the id in ``--backends``.

Each module exports one constant ``BACKEND`` (see ``auditor.ports.Backend``) and must import
without its engine installed. Modules are found by listing this package: there is no registry.
"""

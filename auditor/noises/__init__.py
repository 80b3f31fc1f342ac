"""One file per noise, each exporting one constant ``NOISE`` (see ``auditor.ports.Noise``).

Modules are found by listing this package: there is no registry to edit. Files that begin with an
underscore are shared: ``_cause`` is what every noise states about itself, ``_rewritten`` makes
forms of function bodies, ``_step`` makes noises of steps around the network, and ``_calibrated``
(with ``_equations``, ``_grids`` and ``_levels``) fits numbers that only a backend's calibration
knows.
"""

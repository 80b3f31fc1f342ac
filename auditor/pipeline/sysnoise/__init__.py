"""The table of the SysNoise paper, for one model and one folder of photographs.

``table`` puts it together. ``options`` (around the network) and ``networks`` (inside it) say what
is switched, ``combinations`` what is switched at once, ``sweep`` measures it, ``checkpoint`` keeps
what was measured, and ``figures`` and ``statistics`` make means and intervals of it.
"""

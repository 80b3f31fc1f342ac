"""Equivalent ways to write an operator, one file each: what ``audit fix`` puts into a model.

A file exports ``FIX``, an ``auditor.ports.Fix``. What it writes must compute what the operator
specification says: it is checked on the reference before it is built on a backend.
"""

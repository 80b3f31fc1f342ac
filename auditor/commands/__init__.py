"""The command line's verbs, one file each: a new verb is one new file.

A verb reads its arguments, wires the parts together and returns the exit code; it imports what it
needs inside its function, so that ``audit --help`` answers at once. Files that begin with an
underscore are what verbs share.
"""

"""A wall clock that jumps, in every process of an audit. Never part of what is installed.

Linux has no namespace for the wall clock, and setting the machine's would meet everybody on it: so
``time.time`` is another one here, 400 days ahead and 400 days behind in turn.
"""

import time

_DAYS = 400 * 86400
_real, _turn = time.time, [1]


def _jumping() -> float:
    _turn[0] = -_turn[0]
    return _real() + _turn[0] * _DAYS


time.time = _jumping

"""From the network's outputs to the result that an application uses.

``post`` says what one side does, as a record, and ``results`` does it, with the candidates of a
detector's ``heads`` and ``masks`` of the photograph's size.
"""

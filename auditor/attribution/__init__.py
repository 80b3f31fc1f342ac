"""The causes: hypotheses replayed on a segment, and which of them may be named."""

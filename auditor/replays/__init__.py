"""Copies of a segment in which something is computed otherwise, and the sessions that run them."""

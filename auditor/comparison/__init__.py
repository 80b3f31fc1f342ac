"""Distances between tensors, and what people read off a model's outputs."""

"""The training side: where a node comes from in PyTorch code, and what its export changed."""

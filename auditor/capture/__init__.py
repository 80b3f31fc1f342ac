"""The tensors that a backend shows, and whose they are by the names of the reference."""

"""Models that are run again and again: decoders, streams, and embeddings that are searched."""

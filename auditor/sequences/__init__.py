"""Models that are run again and again: decoders and streams."""

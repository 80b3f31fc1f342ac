"""One file per library that resizes images."""

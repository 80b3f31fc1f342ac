"""One file per way to convert between RGB and YUV 4:2:0."""

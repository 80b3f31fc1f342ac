"""ONNX graphs: read and checked, cut into segments, edited, compared with another file."""

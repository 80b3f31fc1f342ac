"""The words of the domain as frozen records, one file per verb that reports them.

Records hold no arrays: a tensor appears by its ONNX name. An ONNX node is identified by its
*key*, the name of its first non-empty output, because node names may be empty or repeated
while tensor names are unique within a graph (ONNX IR specification, "Names Within a Graph").
"""

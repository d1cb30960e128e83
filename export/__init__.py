"""Bark checkpoint -> ONNX artifacts in a Triton model repository: `python -m barkstream.export CHECKPOINT`."""

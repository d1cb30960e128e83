"""Barkstream: Suno's Bark text-to-speech, streamed from NVIDIA Triton while it is being made."""

import os

__version__ = "0.1.0"

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # ONNX Runtime 1.32 reports its use over the network by default

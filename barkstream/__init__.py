"""Barkstream: Suno's Bark text-to-speech, streamed from NVIDIA Triton while it is being made."""

__version__ = "0.1.0"

"""Helpers of `scripts/build_tiny.py`: one file per part of the embedded models."""

"""Align text-to-image diffusion models with preferences and rewards."""

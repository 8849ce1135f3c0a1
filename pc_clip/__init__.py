"""Finetune CLIP so that the difference between two images means something in its embedding space."""

__version__ = "0.1.0"

"""The loop, the methods, losses and samplers."""

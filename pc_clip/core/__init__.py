"""Foundations: settings, files, caches, processes. Imports nothing else of pc_clip."""

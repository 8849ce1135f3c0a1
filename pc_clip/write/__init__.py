"""Captions in, sentences out: tasks and writers."""

"""What users call: the three scripts, the tools beside them, and the Python API."""

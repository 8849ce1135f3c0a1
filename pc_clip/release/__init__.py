"""The PC-CLIP authors' files, and clip-benchmark on our models."""

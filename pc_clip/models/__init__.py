"""CLIP and what is put on it: loading, adapters, the fast text tower, the change model, export."""

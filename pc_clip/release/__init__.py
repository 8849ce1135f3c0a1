"""Files of the PC-CLIP authors, and models beside CLIP_benchmark."""

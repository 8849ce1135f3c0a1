"""A procedural world of small scenes, its captions, and a tiny CLIP pretrained on them."""

"""CLIP4IDC: a pair of images through one image tower, and sentences on how they differ (arXiv 2206.00629).

encoder.py joins two images inside a vision transformer of open_clip's; decoder.py writes sentences from what it sees;
model.py holds both beside a CLIP model; apply.py puts them to the pairs of a data set.
"""

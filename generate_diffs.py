#!/usr/bin/env python
"""See pc_clip/interface/generate_diffs.py; python generate_diffs.py --help lists the settings."""

from pc_clip.interface.generate_diffs import command

if __name__ == "__main__":
    command()

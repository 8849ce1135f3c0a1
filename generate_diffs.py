#!/usr/bin/env python
"""python generate_diffs.py --help says what it does; pc_clip/interface/generate_diffs.py is the program."""

from pc_clip.interface.generate_diffs import command

if __name__ == "__main__":
    command()

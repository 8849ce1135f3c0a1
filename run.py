#!/usr/bin/env python
"""python run.py --help says what it does; pc_clip/interface/run.py is the program."""

from pc_clip.interface.run import command

if __name__ == "__main__":
    command()

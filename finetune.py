#!/usr/bin/env python
"""python finetune.py --help says what it does; pc_clip/interface/finetune.py is the program."""

from pc_clip.interface.finetune import command

if __name__ == "__main__":
    command()

#!/usr/bin/env python
"""See pc_clip/interface/finetune.py; python finetune.py --help lists the settings."""

from pc_clip.interface.finetune import command

if __name__ == "__main__":
    command()

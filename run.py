#!/usr/bin/env python
"""See pc_clip/interface/run.py; python run.py --help lists the settings."""

from pc_clip.interface.run import command

if __name__ == "__main__":
    command()

"""`minisgl profile env`: show this machine, and measure its ceilings: bandwidths, launch latency, matrix rate."""

from __future__ import annotations

import sys

from minisgl.cli import main

if __name__ == "__main__":
    sys.exit(main(["profile", "env", *sys.argv[1:]]))

"""`minisgl profile comm`: collectives by operation, path and size."""

from __future__ import annotations

import sys

from minisgl.cli import main

if __name__ == "__main__":
    sys.exit(main(["profile", "comm", *sys.argv[1:]]))

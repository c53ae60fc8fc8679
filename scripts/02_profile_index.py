"""`minisgl profile index`: the embedding lookup, every version and configuration."""

from __future__ import annotations

import sys

from minisgl.cli import main

if __name__ == "__main__":
    sys.exit(main(["profile", "index", *sys.argv[1:]]))

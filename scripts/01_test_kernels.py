"""`minisgl profile kernels`: check every registered kernel against its reference."""

from __future__ import annotations

import sys

from minisgl.cli import main

if __name__ == "__main__":
    sys.exit(main(["profile", "kernels", *sys.argv[1:]]))

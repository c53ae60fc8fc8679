"""`minisgl profile attention`: prefill and decode by each backend, against the ceilings."""

from __future__ import annotations

import sys

from minisgl.cli import main

if __name__ == "__main__":
    sys.exit(main(["profile", "attention", *sys.argv[1:]]))

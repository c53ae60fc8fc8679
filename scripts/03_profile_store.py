"""`minisgl profile store`: measure the KV store: every version and configuration, and what scattered slots cost."""

from __future__ import annotations

import sys

from minisgl.cli import main

if __name__ == "__main__":
    sys.exit(main(["profile", "store", *sys.argv[1:]]))

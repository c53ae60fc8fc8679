"""The project's own kernels, a folder each: `op.py` has the public function, its reference and what a call costs."""

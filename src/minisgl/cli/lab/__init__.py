"""The actions of `minisgl profile`: one module each, listed in `cli/profile.py`."""

"""Embedding rows by token id."""

"""Tensor parallelism: the group of ranks that share a model."""

from minisgl.distributed.group import TPGroup

__all__ = ["TPGroup"]

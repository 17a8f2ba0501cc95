"""Whole models: a backend for ``torch.compile``, `fuse` as one call on any model, and `explain`."""

from fastlenet.fusion.explain import Explanation, Site, explain
from fastlenet.fusion.fuse import fuse

__all__ = ["Explanation", "Site", "explain", "fuse"]

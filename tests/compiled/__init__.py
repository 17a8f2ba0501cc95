"""Tests that compile kernels for GPUs that need not be there; no kernel is executed."""

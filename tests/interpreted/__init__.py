"""Tests that execute kernels: interpreted with ``TRITON_INTERPRET=1``, natively on a machine with a GPU."""

"""Tests of the operators as PyTorch sees them, a file for each."""

"""Every Triton kernel of fastlenet with its launcher and launch configurations.

One file per operator, named after it. Importing this package does not import triton: the operators' files do, and
they are imported when a Triton kernel is first needed.
"""

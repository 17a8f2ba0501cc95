"""Helpers that the test-suite shares; nothing here imports Triton unless a Triton-side helper is asked for.

Modules:
    judge: numerical verdicts against a float64 reference, with stock PyTorch's own error as the yardstick.
    strides: tensors with awkward strides and poisoned surroundings.
    poison: outputs filled with a recognisable pattern before each launch.
    fuzz: hypothesis, its depth set by ``FASTLENET_FUZZ``. Tests that draw are skipped where it is not installed.
    modes: which of the three kinds of test process this is.
    bounds: checks every pointer that the interpreter follows (needs ``TRITON_INTERPRET=1``).
    fake_driver: compiles the real launchers for a GPU that is not there (needs ``TRITON_INTERPRET`` unset).
"""

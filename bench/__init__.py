"""Benchmarks: the work (`workloads`), the implementations (`baselines`), the timing (`timing`), and commands.

``fastlenet bench`` is `bench.run`, ``fastlenet report`` is `bench.report`. Raw results are in ``bench/results``.
"""

"""Benchmarks: the work (`workloads`), the implementations (`baselines`), the timing (`timing`), and commands.

``fastlenet bench`` is `bench.run`, ``fastlenet report`` is `bench.report`. ``pytest bench --benchmark-only`` times the
same work one implementation at a time. Raw results are in ``bench/results``.
"""

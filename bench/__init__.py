"""Benchmarks: what is measured (`workloads`), who computes it (`baselines`), how it is timed (`timing`), and commands.

``fastlenet bench`` is `bench.run`, ``fastlenet report`` is `bench.report`; ``pytest bench --benchmark-only`` times the
same work one implementation at a time. Raw results lie in ``bench/results``.
"""

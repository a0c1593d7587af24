"""Rivals that `benchmarks.bench_sim` measures the engines against."""

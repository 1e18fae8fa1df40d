"""What scripts/benchmark.py runs."""

"""What scripts/fault_test.py runs."""

"""The benchmarks behind ``scripts/bench.py``, one file each."""

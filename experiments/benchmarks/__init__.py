"""Speed: `python -m experiments.benchmarks`, one module for each part."""

"""What flows are like: stability, phase portraits, orders of convergence, comparisons."""

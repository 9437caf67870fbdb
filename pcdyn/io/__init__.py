"""Data sets, and files of results and problems."""

from pcdyn.io import datasets, equilibria, problems, results, trajectories

__all__ = ["datasets", "equilibria", "problems", "results", "trajectories"]

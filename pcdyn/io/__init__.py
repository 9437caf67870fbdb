"""Data sets, and files of trajectories, equilibria and problems."""

from pcdyn.io import datasets, equilibria, problems, trajectories

__all__ = ["datasets", "equilibria", "problems", "trajectories"]

"""Data sets, and files of trajectories, equilibria and problems."""

from pcdyn.io import datasets, problems, trajectories

__all__ = ["datasets", "problems", "trajectories"]

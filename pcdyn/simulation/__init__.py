"""`simulate`, and the trajectory that it returns."""

"""`compare`: integrators on one problem, their errors and costs, and a recommendation."""

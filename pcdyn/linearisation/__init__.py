"""Hessians of the free energy, their factorisations, rates and modes, and round-off."""

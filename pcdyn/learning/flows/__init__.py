"""Learning as flows that `pcdyn.simulate` integrates: of weights, and of precisions."""

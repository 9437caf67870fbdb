"""Learning rules: from a network and a batch to a weight gradient."""

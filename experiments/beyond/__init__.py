"""Questions beyond the paper, one module each."""

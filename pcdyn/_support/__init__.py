"""What every floor uses: checks of arguments, states as trees, files, timing, interruption."""

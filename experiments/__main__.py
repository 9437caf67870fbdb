"""Regenerate the paper's figures and check its claims: `python -m experiments --help`."""

import os
import signal
import sys

if __name__ == "__main__":
    # Before anything heavy is imported: Ctrl-C ends the process at once, also inside compiled code.
    # Every file is written at once or not at all, so that nothing partial stays.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # XLA would warn of each program that it finds in its cache.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

    from experiments.shared.command import main

    sys.exit(main(sys.argv[1:]))

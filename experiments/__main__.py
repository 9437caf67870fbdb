"""Regenerate the paper's figures and check its claims: `python -m experiments --help`."""

import os
import signal
import sys

if __name__ == "__main__":
    # Before anything heavy is imported: Ctrl-C ends the process at once, also inside compiled code.
    # Every file is written at once or not at all, so that nothing partial stays.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # jaxlib 0.9 prints errors, which are none, of programs that it finds in its cache. A level of 1
    # is JAX's own, from a process that has started this one.
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1":
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

    from experiments.shared.command import main

    sys.exit(main(sys.argv[1:]))

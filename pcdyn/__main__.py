"""`python -m pcdyn` is the command `pcdyn`."""

from pcdyn.cli import run

if __name__ == "__main__":
    run()

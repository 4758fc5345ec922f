"""`python -m elision` is the command `elision`."""

from elision.cli import main

if __name__ == "__main__":
    main()

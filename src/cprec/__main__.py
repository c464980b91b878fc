"""`python -m cprec`, the same as the command `cprec`."""

import sys

from cprec.cli import main

if __name__ == "__main__":
    sys.exit(main())

"""`python -m coalora`: the command line, from the working directory's own source where it has one."""

import sys

from coalora.cli import main

if __name__ == "__main__":
    sys.exit(main())

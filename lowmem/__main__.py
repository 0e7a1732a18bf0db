"""`python -m lowmem`: the same as the `lowmem` command."""

import sys

from lowmem.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

"""`python -m diffalign` is `diffalign`; launchers (torchrun, accelerate) use this form."""

import sys

from diffalign.cli import main

if __name__ == "__main__":
    sys.exit(main())

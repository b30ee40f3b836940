"""`python -m fedsieve` is the command line."""

import sys

from fedsieve.cli import main

sys.exit(main())

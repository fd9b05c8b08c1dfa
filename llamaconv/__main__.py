"""``python -m llamaconv``: the command line."""

import sys

from llamaconv.cli import main

sys.exit(main())

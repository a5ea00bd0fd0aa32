"""``python -m kimi_linear COMMAND``: the command line."""

import sys

from .cli import main

sys.exit(main())

"""``python -m atdiff``, and ``accelerate launch -m atdiff`` for many processes."""

import sys

from atdiff.cli import main

sys.exit(main())

"""``python -m atdiff``, and ``accelerate launch -m atdiff`` for many processes."""

import os
import sys

from atdiff.cli import main

code = main()
if int(os.environ.get("WORLD_SIZE", "1")) > 1:
    # All is written. Threads of torch's process groups can abort a process that takes itself down while another works.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
sys.exit(code)

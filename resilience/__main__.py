"""``python -m resilience probe``: ask a server for its health. See ``resilience.probe.command``."""

import os
import sys

from resilience.probe.command import main

if __name__ == "__main__":
    # Not sys.exit: that would wait for a name to resolve, long after its time was up.
    os._exit(main(sys.argv[1:]))

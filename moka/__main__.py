"""``python -m moka``, for launchers: ``accelerate launch -m moka train CONFIG.yaml``."""

import sys

from moka.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

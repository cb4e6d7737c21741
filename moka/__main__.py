"""``python -m moka``, for launchers: ``accelerate launch -m moka train CONFIG.yaml``."""

import sys

try:
    from moka.cli.main import main
except KeyboardInterrupt:
    sys.exit("moka: interrupted")

if __name__ == "__main__":
    sys.exit(main())

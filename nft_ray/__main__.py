"""`nft-ray`, also `python -m nft_ray`."""

import os
import signal
import sys


def main() -> int:
    """Run the command line. transformers reads its verbosity when it is imported, here and in every Ray worker."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from nft_ray.cli.main import main as run

    try:
        return run()
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the last line is said: its status stands


if __name__ == "__main__":
    sys.exit(main())

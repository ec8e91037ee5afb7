"""`nft-ray`, also `python -m nft_ray`."""

import sys

from nft_ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

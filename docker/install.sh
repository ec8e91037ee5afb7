#!/bin/sh
# The install steps of the image: called by the Dockerfile, and by check.sh in a clean root. Run in the repository's root.
#   TORCH_INDEX   index of the torch wheels; empty = pip's own
set -eu
apt-get update
# a C compiler and Python's headers: torch.compile builds with them when a run asks for it
apt-get install --yes --no-install-recommends python3 python3-venv ca-certificates g++ libc6-dev python3-dev
rm -rf /var/lib/apt/lists/*
python3 -m venv /opt/nft_ray
pip="/opt/nft_ray/bin/pip install --no-cache-dir --disable-pip-version-check --constraint constraints.txt"
# shellcheck disable=SC2086
$pip ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch
$pip .

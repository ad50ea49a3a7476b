#!/usr/bin/env bash
# Builds the sdist and a wheel for each platform that the package has kernels for, all on one machine, under dist/.
set -euo pipefail
python -m build --no-isolation --sdist
for target in linux-x86_64 linux-aarch64 macosx-arm64; do
    rm -rf build # holds the kernels of the platform before
    KERNELS_TARGET=$target python -m build --no-isolation --wheel
done

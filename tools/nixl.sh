#!/bin/sh
# Installs NIXL, the default transport of KV, without its requirements (they name a torch with CUDA). Usage: nixl.sh VENV_BIN
# There are wheels for Linux; elsewhere transfers use shared memory and gRPC. NIXL=0 leaves it out.
# What it leaves in the environment (.nixl) tells the tests that NIXL has to be there.
set -eu
marker="$1/../.nixl"
rm -f "$marker"
if [ "${NIXL:-1}" = 0 ] || [ "$(uname -s)" != Linux ]; then
  echo "NIXL is left out: KV moves by shared memory and gRPC"
  exit 0
fi
"$1/pip" install -q --disable-pip-version-check --no-deps "nixl-cu12>=1.5.1,<2"
touch "$marker"

#!/bin/sh
# What an image runs: `tpt`, unless the arguments name another program, such as torchrun.
set -eu
case "${1-}" in
    torchrun | python | python3 | bash | sh | sleep) exec "$@" ;;
    *) exec tpt "$@" ;;
esac

#!/bin/sh
# Installs what the tests marked `slurm` and `hosts` start: Slurm's controller, node daemon and commands, and `ip`. Debian and Ubuntu, as root.
set -eu
apt-get update
apt-get install --yes --no-install-recommends slurmctld slurmd slurm-client iproute2

#!/bin/sh
# Folders of the volume that the checkout's links point to; a new volume of Kubernetes is empty.
set -eu
mkdir -p /data/coalora /data/runs /data/prefect
exec "$@"

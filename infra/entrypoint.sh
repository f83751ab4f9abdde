#!/bin/sh
# Folders of the volume that the checkout's links point to; a new volume of Kubernetes is empty.
set -eu
for name in POSTGRES_PASSWORD AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY PREFECT_API_AUTH_STRING PREFECT_SERVER_API_AUTH_STRING \
  PREFECT_API_DATABASE_CONNECTION_URL; do
  case "$(printenv "$name" || true)" in
    *change-me*) echo "error: $name is an example's. Run infra/new-env, and start anew with what it makes." >&2; exit 2 ;;
  esac
done
mkdir -p /data/coalora /data/runs /data/prefect
exec "$@"

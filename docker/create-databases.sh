#!/bin/sh
# PostgreSQL's image runs this once, on an empty volume: a database for each server.
set -eu
for name in prefect mlflow; do
  psql --set ON_ERROR_STOP=1 --username "$POSTGRES_USER" --dbname postgres --command "CREATE DATABASE $name"
done

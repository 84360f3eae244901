#!/bin/sh
# Brings back what docker/backup.sh saved, in place of what the running stack has: docker/restore.sh FOLDER
# First stop what writes: docker compose ... stop prefect mlflow worker models; start them again afterwards.
set -eu
folder=${1:?usage: docker/restore.sh FOLDER}
compose=${COMPOSE:-docker compose --env-file $HOME/.config/fuselip/compose.env -f $(dirname "$0")/compose.yaml}
for name in prefect mlflow; do
  [ -s "$folder/$name.dump" ] || { echo "error: $folder has no $name.dump; name a folder of docker/backup.sh" >&2; exit 1; }
done
for name in prefect mlflow; do
  $compose exec -T database dropdb --username fuselip --if-exists --force "$name"
  $compose exec -T database createdb --username fuselip "$name"
  $compose exec -T database pg_restore --username fuselip --dbname "$name" < "$folder/$name.dump"
done
$compose exec -T store tar -C /data -xf - < "$folder/store.tar"
echo "restored from $folder"

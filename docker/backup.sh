#!/bin/sh
# Copies the stack's databases and object store into a new folder: docker/backup.sh FOLDER
# The secrets are not among them: keep ~/.config/fuselip/compose.env beside the copy, as safe as a password.
set -eu
umask 077
folder=${1:?usage: docker/backup.sh FOLDER}
compose=${COMPOSE:-docker compose --env-file $HOME/.config/fuselip/compose.env -f $(dirname "$0")/compose.yaml}
mkdir "$folder"
for name in prefect mlflow; do
  $compose exec -T database pg_dump --username fuselip --format custom "$name" > "$folder/$name.dump"
done
# Behind the databases: whatever they name is in the store by then.
$compose exec -T store tar -C /data -cf - . > "$folder/store.tar"
echo "saved in $folder"

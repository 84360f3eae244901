#!/bin/sh
# Finds caches that this user can write to, then becomes the command, so that signals reach it directly.
set -eu
umask 0022

# The published command lines mount the caller's ~/.cache and ~/.config here. Docker makes a missing one as root's.
cache=/.cache
[ -d "$cache" ] && [ -w "$cache" ] || cache=$HOME/.cache
[ -d /.config ] && [ -w /.config ] && : "${XDG_CONFIG_HOME:=/.config}"

export XDG_CACHE_HOME="${XDG_CACHE_HOME:-$cache}"
export XDG_CONFIG_HOME="${XDG_CONFIG_HOME:-$HOME/.config}"
export HF_HOME="${HF_HOME:-$XDG_CACHE_HOME/huggingface}"
export MPLCONFIGDIR="${MPLCONFIGDIR:-$XDG_CACHE_HOME/matplotlib}"
export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$XDG_CACHE_HOME/torchinductor}"
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$XDG_CACHE_HOME/triton}"
for folder in "${TMPDIR:-/tmp}" "$MPLCONFIGDIR"; do
  mkdir -p "$folder" 2>/dev/null && [ -w "$folder" ] || {
    echo "error: nothing can be written to $folder; with --read-only add --tmpfs /tmp" >&2
    exit 1
  }
done
exec "$@"

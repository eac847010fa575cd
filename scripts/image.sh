#!/usr/bin/env bash
# Builds the image with whichever of podman, docker and buildah is there.
#
# Usage: image.sh [--tool podman|docker|buildah] [--tag NAME] [-- BUILD OPTION…]
#
#   image.sh --tag registry.example/keybroker:1.0
#   image.sh -- --build-arg SOFTHSM=1        SoftHSM inside, for development and tests
#   image.sh -- --build-arg PROFILE=dev      builds faster, for looking at the image itself
set -euo pipefail
cd "$(dirname "$0")/.."

TOOL=
TAG=keybroker:latest

fail() {
  printf 'image: %s\n' "$1" >&2
  exit 1
}

# A docker client without a daemon is no tool.
works() {
  command -v "$1" >/dev/null || return 1
  [[ $1 != docker ]] || docker version >/dev/null 2>&1
}

choose() {
  local tool
  for tool in podman docker buildah; do
    works "$tool" && { TOOL=$tool; return; }
  done
  fail 'there is no podman, no docker with a running daemon and no buildah; install one of them'
}

main() {
  while [[ $# -gt 0 ]]; do
    case $1 in
      --tool) TOOL=${2:-}; works "$TOOL" || fail "$TOOL is not there, or its daemon does not answer"; shift 2 ;;
      --tag) TAG=${2:-}; shift 2 ;;
      --) shift; break ;;
      *) fail "unknown argument $1; usage: image.sh [--tool podman|docker|buildah] [--tag NAME] [-- BUILD OPTION…]" ;;
    esac
  done
  [[ -n $TOOL ]] || choose
  # The health check is part of docker's image format and not of OCI's.
  case $TOOL in
    docker) DOCKER_BUILDKIT=1 docker build --tag "$TAG" --file Dockerfile "$@" . ;;
    podman) podman build --format docker --tag "$TAG" --file Dockerfile "$@" . ;;
    buildah) buildah build --format docker --tag "$TAG" --file Dockerfile "$@" . ;;
    *) fail "--tool is podman, docker or buildah, not $TOOL" ;;
  esac
  printf 'image: %s\n' "$TAG"
}

main "$@"

#!/usr/bin/env bash
# Builds the image with podman, docker or buildah: the first one that is installed.
#
# Usage: image.sh [--tool podman|docker|buildah] [--tag NAME] [--release] [-- BUILD OPTION…]
#
#   --release    refuse base images that are named by a tag: a tag can be moved to another image, a digest cannot
#
#   image.sh --tag registry.example/keybroker:1.0
#   image.sh -- --build-arg SOFTHSM=1        SoftHSM inside, for development and tests
#   image.sh -- --build-arg PROFILE=dev      builds faster, for looking at the image itself
set -euo pipefail
cd "$(dirname "$0")/.."

TOOL=
TAG=keybroker:latest
RELEASE=no

fail() {
  printf 'image: %s\n' "$1" >&2
  exit 1
}

# A docker client without a daemon is not usable as a tool.
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

# The build arguments must name both base images by digest.
require_digests() {
  local base option
  for base in BUILD_IMAGE RUNTIME_IMAGE; do
    for option in "$@"; do
      [[ $option =~ ^(--build-arg=)?$base=.+@sha256:[0-9a-f]{64}$ ]] && continue 2
    done
    fail "--release: $base is not named by digest
hint: pass -- --build-arg $base=NAME@sha256:…"
  done
}

main() {
  while [[ $# -gt 0 ]]; do
    case $1 in
      --tool) TOOL=${2:-}; works "$TOOL" || fail "$TOOL is not there, or its daemon does not answer"; shift 2 ;;
      --tag) TAG=${2:-}; shift 2 ;;
      --release) RELEASE=yes; shift ;;
      --) shift; break ;;
      *) fail "unknown argument $1
usage: image.sh [--tool podman|docker|buildah] [--tag NAME] [--release] [-- BUILD OPTION…]" ;;
    esac
  done
  [[ $RELEASE == no ]] || require_digests "$@"
  [[ -n $TOOL ]] || choose
  # The health check is a part of docker's image format, but not of the OCI format.
  case $TOOL in
    docker) DOCKER_BUILDKIT=1 docker build --tag "$TAG" --file Dockerfile "$@" . ;;
    podman) podman build --format docker --tag "$TAG" --file Dockerfile "$@" . ;;
    buildah) buildah build --format docker --tag "$TAG" --file Dockerfile "$@" . ;;
    *) fail "--tool is podman, docker or buildah, not $TOOL" ;;
  esac
  printf 'image: %s\n' "$TAG"
}

main "$@"

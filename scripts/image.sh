#!/usr/bin/env bash
# Builds the image with podman, docker or buildah: the first one that is installed.
#
# Usage: image.sh [--tool podman|docker|buildah] [--tag NAME] [--release] [-- BUILD OPTION…]
#
#   --release    refuses base images without a digest, because a tag can be moved to another image
#
#   image.sh --tag registry.example/keybroker:1.0
#   image.sh -- --build-arg SOFTHSM=1        with SoftHSM, for development and tests
#   image.sh -- --build-arg PROFILE=dev      builds faster, to try the image itself
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
  fail 'podman, buildah and docker with a running daemon were not found; install one of them'
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
      --tool) TOOL=${2:-}; works "$TOOL" || fail "$TOOL is not installed, or its daemon does not answer"; shift 2 ;;
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

#!/usr/bin/env bash
# Builds the example and starts it with the given arguments. Generates the stubs and compiles main.go in a temporary folder,
# with the Go libraries of Debian. Exits with 3 if Go, protoc, a generator or the libraries are not installed.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)

# Debian's packages install the sources of libraries here, in the form of a GOPATH.
libraries=${KEYBROKER_GOCODE:-/usr/share/gocode}

missing() {
  printf 'run.sh: %s is not installed; examples/go/README.md lists the packages\n' "$1" >&2
  exit 3
}

main() {
  local tool work
  for tool in go protoc protoc-gen-go protoc-gen-go-grpc; do
    command -v "$tool" >/dev/null || missing "$tool"
  done
  [[ -d $libraries/src/google.golang.org/grpc ]] || missing "$libraries/src/google.golang.org/grpc"
  work=$(mktemp -d)
  # shellcheck disable=SC2064  # The path is fixed here.
  trap "rm -rf '$work'" EXIT
  mkdir -p "$work/src/keybroker.example/example"
  protoc --proto_path="$root/proto" \
    --go_out="$work/src" --go-grpc_out="$work/src" \
    keybroker/v1/user_key.proto keybroker/v1/control.proto
  cp "$here/main.go" "$work/src/keybroker.example/example"
  (
    export GO111MODULE=off GOPATH=$work:$libraries
    cd "$work/src/keybroker.example"
    go vet ./...
    go build -o "$work/enrol-and-unwrap" ./example
  )
  "$work/enrol-and-unwrap" "$@"
}

main "$@"

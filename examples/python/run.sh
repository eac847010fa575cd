#!/usr/bin/env bash
# Runs the example. Installs its requirements into a virtual environment, generates the stubs into a temporary folder, and
# starts enrol_and_unwrap.py with the given arguments. The virtual environment is kept in target/ for the next run.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)

main() {
  local venv stubs
  venv=${CARGO_TARGET_DIR:-$root/target}/example-python-$(sha256sum "$here/requirements.txt" | cut -c1-16)
  if [[ ! -e $venv/ready ]]; then
    python3 -m venv --clear "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check --requirement "$here/requirements.txt"
    touch "$venv/ready"
  fi

  stubs=$(mktemp -d)
  # shellcheck disable=SC2064  # The path is fixed here.
  trap "rm -rf '$stubs'" EXIT
  "$venv/bin/python" -m grpc_tools.protoc --proto_path="$root/proto" \
    --python_out="$stubs" --grpc_python_out="$stubs" \
    keybroker/v1/user_key.proto
  PYTHONPATH=$stubs "$venv/bin/python" "$here/enrol_and_unwrap.py" "$@"
}

main "$@"

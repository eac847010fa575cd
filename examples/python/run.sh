#!/usr/bin/env bash
# Runs an example: installs the requirements into a virtual environment, generates the stubs into a temporary folder, and
# starts the program. The first argument `devices` selects devices.py, and `device-app` selects device_app.py; otherwise
# enrol_and_unwrap.py gets all arguments. The virtual environment is kept in target/ for the next run.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)

main() {
  local venv stubs program=enrol_and_unwrap.py
  case ${1:-} in
    devices) program=devices.py; shift ;;
    device-app) program=device_app.py; shift ;;
  esac
  venv=${CARGO_TARGET_DIR:-$root/target}/example-python-$(sha256sum "$here/requirements.txt" | cut -c1-16)
  mkdir -p "$(dirname "$venv")"
  exec 9>"$venv.lock"
  flock --timeout 600 9 # Two runs at the same time would install into the same folder.
  if [[ ! -e $venv/ready ]]; then
    python3 -m venv --clear "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check --requirement "$here/requirements.txt"
    touch "$venv/ready"
  fi
  exec 9>&-

  stubs=$(mktemp -d)
  # shellcheck disable=SC2064  # The path is fixed here.
  trap "rm -rf '$stubs'" EXIT
  "$venv/bin/python" -m grpc_tools.protoc --proto_path="$root/proto" \
    --python_out="$stubs" --grpc_python_out="$stubs" \
    keybroker/v1/user_key.proto keybroker/v1/device.proto
  PYTHONPATH=$stubs "$venv/bin/python" "$here/$program" "$@"
}

main "$@"

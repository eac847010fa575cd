#!/usr/bin/env bash
# Installs the Debian packages that building, the tests and the demonstration need, on Debian 12 with Rust, as root or with
# sudo. With --tools, also installs the test runner and the PKCS#11 modules of the conformance tests. Does nothing if
# everything is installed.
set -euo pipefail

NEXTEST_VERSION=0.9.143

# Each entry is a command or a file that shows that a package is installed, and the package. MariaDB needs only the core
# package, without a service.
PARTS=(
  "cc build-essential"
  "make build-essential"
  "openssl openssl"
  "sqlite3 sqlite3"
  "curl curl"
  "ssh-keygen openssh-client"
  "script bsdutils"
  "softhsm2-util softhsm2"
  "pkcs11-tool opensc"
  "p11tool gnutls-bin"
  "shellcheck shellcheck"
  "systemd-analyze systemd"
  "/usr/lib/postgresql/*/bin/initdb postgresql"
  "/usr/sbin/pgbouncer pgbouncer"
  "/usr/sbin/mariadbd mariadb-server-core"
  "mariadb-dump mariadb-client"
  "/usr/lib/python3*/ensurepip python3-venv"
  "chromium chromium"
  "chromedriver chromium-driver"
)

# The same list for the conformance tests: modules, and the packages that building Kryoptic needs.
MODULE_PARTS=(
  "/usr/sbin/pkcsslotd opencryptoki"
  "p11-kit p11-kit"
  "/usr/lib/*/pkcs11/p11-kit-client.so p11-kit-modules"
  "certutil libnss3-tools"
  "/usr/lib/llvm-*/lib/libclang.so* libclang-dev"
  "/usr/include/openssl/evp.h libssl-dev"
  "/usr/include/sqlite3.h libsqlite3-dev"
  "pkg-config pkg-config"
)

fail() {
  printf 'install: %s\n' "$1" >&2
  exit 1
}

as_root() {
  if [[ $(id -u) -eq 0 ]]; then
    "$@"
  elif command -v sudo >/dev/null; then
    sudo "$@"
  else
    fail "this script is not running as root, and sudo is not installed; run this command as root: $*"
  fi
}

# The tests start their own servers. Without this setting, Debian's package would create a cluster and start it at every
# boot.
no_cluster() {
  local folder=/etc/postgresql-common
  as_root mkdir -p "$folder"
  [[ -e $folder/createcluster.conf ]] \
    || printf 'create_main_cluster = false\n' | as_root tee "$folder/createcluster.conf" >/dev/null
}

packages() {
  local part missing=()
  for part in "$@"; do
    command -v "${part%% *}" >/dev/null || compgen -G "${part%% *}" >/dev/null || missing+=("${part##* }")
  done
  [[ ${#missing[@]} -eq 0 ]] && return
  command -v apt-get >/dev/null \
    || fail "these packages are missing: ${missing[*]}. This script supports only apt-get; install the packages with your package manager"
  printf 'install: installing the packages %s\n' "${missing[*]}"
  [[ " ${missing[*]} " == *" postgresql "* ]] && no_cluster
  local log
  log=$(mktemp)
  if ! { as_root apt-get update && as_root env DEBIAN_FRONTEND=noninteractive \
    apt-get install -y --no-install-recommends "${missing[@]}"; } >"$log" 2>&1; then
    tail -n 20 "$log" >&2
    fail "apt-get could not install ${missing[*]}; the end of its output is above, the complete output is in $log"
  fi
  # Debian starts this service with the package, but the tests start their own.
  [[ " ${missing[*]} " == *" pgbouncer "* && -d /run/systemd/system ]] \
    && as_root systemctl disable --quiet --now pgbouncer.service
  [[ " ${missing[*]} " == *" opencryptoki "* && -d /run/systemd/system ]] \
    && as_root systemctl disable --quiet --now pkcsslotd.service
  rm -f "$log"
}

rust() {
  command -v cargo >/dev/null && return
  # rustup installs cargo in this directory, which only login shells have in PATH on some systems.
  if [[ -x $HOME/.cargo/bin/cargo ]]; then
    fail "cargo is in $HOME/.cargo/bin, which is not in PATH: run  . \"\$HOME/.cargo/env\"  and try again"
  fi
  fail "cargo is not installed; install Rust 1.94 or later from https://rustup.rs and try again"
}

cargo_tool() {
  local name=$1 version=$2 folder=${CARGO_HOME:-$HOME/.cargo}/bin
  command -v "$name" >/dev/null || [[ -x $folder/$name ]] && return
  printf 'install: building %s %s from source, which takes minutes\n' "$name" "$version"
  cargo install --locked --quiet "$name" --version "$version" \
    || fail "cargo could not install $name $version; the output of cargo is above"
}

main() {
  packages "${PARTS[@]}"
  rust
  if [[ ${1:-} == --tools ]]; then
    packages "${MODULE_PARTS[@]}"
    cargo_tool cargo-nextest "$NEXTEST_VERSION"
    # The dependency check reads every package of the lock file, including those of other platforms, and works without a
    # network.
    cargo fetch --locked --quiet || fail "cargo could not fetch the dependencies; the output of cargo is above"
  fi
}

main "$@"

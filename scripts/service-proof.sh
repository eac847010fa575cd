#!/usr/bin/env bash
# Tests the systemd unit under a real systemd. Boots a small Debian in a container of systemd-nspawn, installs the broker as
# docs/operations.md describes, starts it, makes calls, reloads it, lets the watchdog detect a broker that hangs, and stops it.
# Ends with "service: ok".
#
# Usage: service-proof.sh [PROGRAM]     on Debian 12, as root; the first run takes minutes and about 0.5 GB
#
#   SERVICE_CACHE  folder that keeps the Debian system between runs (/var/tmp/keybroker-service)
set -euo pipefail
umask 077
cd "$(dirname "$0")/.."
# shellcheck source=scripts/debian-mirror.sh
. scripts/debian-mirror.sh

CACHE=${SERVICE_CACHE:-/var/tmp/keybroker-service}
ROOT=$CACHE/root
BOOT_SECONDS=400
PROGRAM=${1:-}

fail() {
  printf 'service: %s\n' "$1" >&2
  exit 1
}

tools() {
  local part missing=()
  for part in debootstrap:debootstrap systemd-nspawn:systemd-container; do
    command -v "${part%%:*}" >/dev/null || missing+=("${part##*:}")
  done
  [[ ${#missing[@]} -eq 0 ]] && return
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
}

debian() {
  [[ -e $CACHE/complete ]] && return
  printf '== creating a Debian system with debootstrap\n'
  rm -rf "$ROOT"
  mkdir -p "$CACHE"
  (umask 022 && debootstrap --variant=minbase --include=systemd,systemd-sysv,dbus,libsofthsm2,procps bookworm "$ROOT" "$(debian_mirror)") \
    >"$CACHE/debootstrap.log" 2>&1 || { tail -n 5 "$CACHE/debootstrap.log" >&2; fail 'debootstrap failed'; }
  touch "$CACHE/complete"
}

inside() { chroot "$ROOT" "$@"; }

# Runs the steps of docs/operations.md up to the commands that need a running systemd.
install_broker() {
  local name
  install -m 0755 "$PROGRAM" "$ROOT/usr/bin/keybroker"
  inside id keybroker >/dev/null 2>&1 \
    || inside useradd --system --user-group --home-dir /var/lib/keybroker --shell /usr/sbin/nologin keybroker
  rm -rf "$ROOT"/{etc,var/lib,var/log}/keybroker "$ROOT"/root/{pki,proof.log,ok,ada} "$ROOT"/etc/systemd/system/*/keybroker.service
  inside install -d -m 0750 -o root -g keybroker /etc/keybroker /etc/keybroker/tls
  inside install -d -m 0700 -o keybroker -g keybroker /var/lib/keybroker /var/lib/keybroker/tokens /var/log/keybroker
  install -m 0644 packaging/systemd/keybroker.service "$ROOT/etc/systemd/system/keybroker.service"
  install -m 0755 packaging/systemd/as_broker "$ROOT/usr/local/sbin/as_broker"
  scripts/dev-ca.sh "$ROOT/root/pki" caller
  for name in server.pem server.key; do cp "$ROOT/root/pki/$name" "$ROOT/etc/keybroker/tls/"; done
  for name in client-ca.pem admin-ca.pem; do cp "$ROOT/root/pki/ca.pem" "$ROOT/etc/keybroker/tls/$name"; done
  sed -e "s|^pin_file = .*|pin_file = \"\$CREDENTIALS_DIRECTORY/pin\"\nallow_oaep_sha1 = true|" \
    -e 's|spiffe://example.org/vault|spiffe://dev.example/caller|' keybroker.example.toml >"$ROOT/etc/keybroker/keybroker.toml"
  sed 's|@TOKENS@|/var/lib/keybroker/tokens|' softhsm/softhsm2.conf.template >"$ROOT/etc/keybroker/softhsm2.conf"
  inside chown -R root:keybroker /etc/keybroker
  find "$ROOT/etc/keybroker" -type f -exec chmod 0640 {} +
  openssl rand -hex 12 >"$ROOT/etc/keybroker/pin"
  openssl rand -hex 12 >"$ROOT/etc/keybroker/so-pin"
}

# This script runs inside the container, as root, after the boot.
proof_script() {
  cat <<'PROOF'
#!/bin/bash
set -euxo pipefail
exec >/root/proof.log 2>&1
call() { keybroker client --endpoint https://127.0.0.1:8443 --ca /root/pki/ca.pem --cert /root/pki/caller.pem --key /root/pki/caller.key "$@"; }
as_broker config check
as_broker token init --so-pin-file /run/credentials/keybroker-command.service/so-pin
as_broker store migrate
as_broker key generate
as_broker token check
systemctl enable --now keybroker
keybroker probe ready
call create --user ada --key-name vault --generate 32 --out /root/ada
call unwrap --user ada --key-name vault --out /root/ada.back
cmp /root/ada /root/ada.back
rm /root/ada.back
systemctl reload keybroker
[[ $(systemctl show --property=StatusText --value keybroker) == serving ]]
main=$(systemctl show --property=MainPID --value keybroker)
for process in "$main" $(pgrep --parent "$main"); do
  grep -x 'CapEff:.0000000000000000' "/proc/$process/status"
  grep -x 'Seccomp:.2' "/proc/$process/status"
  grep -x 'NoNewPrivs:.1' "/proc/$process/status"
  grep VmRSS "/proc/$process/status"
done
# The signal stops the broker, so that the broker hangs. The watchdog ends the broker, and systemd starts it again.
kill -STOP "$main"
for _ in $(seq 120); do
  [[ $(systemctl show --property=NRestarts --value keybroker) == 0 ]] || break
  sleep 1
done
for _ in $(seq 60); do keybroker probe ready && break; sleep 1; done
call unwrap --user ada --key-name vault --out /root/ada.back
cmp /root/ada /root/ada.back
journalctl --no-pager --boot --unit keybroker | grep 'Watchdog timeout'
systemctl stop keybroker
[[ $(systemctl show --property=Result --value keybroker) == success ]]
[[ -z $(pgrep keybroker) ]]
as_broker audit verify
touch /root/ok
PROOF
}

boot() {
  proof_script >"$ROOT/root/proof.sh"
  chmod 0700 "$ROOT/root/proof.sh"
  cat >"$ROOT/etc/systemd/system/proof.service" <<'UNIT'
[Unit]
After=multi-user.target
SuccessAction=poweroff
FailureAction=poweroff
[Service]
Type=oneshot
ExecStart=/root/proof.sh
TimeoutStartSec=360
[Install]
WantedBy=default.target
UNIT
  inside systemctl --quiet enable proof.service
  printf '== booting systemd and running the unit\n'
  timeout --kill-after=10 "$BOOT_SECONDS" systemd-nspawn --quiet --directory="$ROOT" --register=no --keep-unit --boot \
    </dev/null >"$CACHE/boot.log" 2>&1 || true
  [[ -e $ROOT/root/ok ]] || { tail -n 30 "$ROOT/root/proof.log" >&2; fail "the test failed at the last line above; the complete output is in $ROOT/root/proof.log"; }
}

main() {
  [[ $(id -u) -eq 0 ]] || fail 'run this script as root, because debootstrap and systemd-nspawn need root'
  tools
  if [[ -z $PROGRAM ]]; then
    cargo build --release --locked --quiet
    PROGRAM=$(cargo metadata --format-version 1 --no-deps --offline | sed 's/.*"target_directory":"\([^"]*\)".*/\1/')/release/keybroker
  fi
  debian
  install_broker
  boot
  grep -E 'VmRSS|Watchdog timeout' "$ROOT/root/proof.log" | sed 's/^/   /'
  printf 'service: ok (%d s)\n' "$SECONDS"
}

main "$@"

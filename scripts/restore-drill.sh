#!/usr/bin/env bash
# Rehearses the loss of the token and the database. Enrols keys, takes a backup of both while the broker serves, destroys both,
# restores both, and unwraps every key. Also shows that a backup of only one of them is not sufficient. All files are in a
# temporary folder. Ends with "restore: ok".
#
# Usage: restore-drill.sh [--engine sqlite|postgres|mariadb] [PROGRAM]
#
# PROGRAM is the keybroker for the drill (by default built with the release profile). A database server is started for the drill,
# with its own data and socket.
set -euo pipefail
umask 077
cd "$(dirname "$0")/.."
# shellcheck source=scripts/database-servers.sh
. scripts/database-servers.sh
# shellcheck source=scripts/processes.sh
. scripts/processes.sh

USERS=25
READY_SECONDS=30

ENGINE=sqlite
PROGRAM=
WORK=
BROKER_PID=

step() { printf '== %s\n' "$1"; }

fail() {
  printf 'restore: %s\n' "$1" >&2
  [[ -z $WORK || ! -s $WORK/broker.log ]] || tail -n 20 "$WORK/broker.log" >&2
  exit 1
}

clean_up() {
  local status=$?
  trap - EXIT INT TERM
  stop_broker || true
  stop_server
  [[ -z $WORK ]] || rm -rf "$WORK"
  exit "$status"
}

# --- the database, one set of functions for each engine --------------------------------------------------------------

sqlite_start() { mkdir "$WORK/data"; }
sqlite_url() { printf 'sqlite:%s/data/keybroker.db' "$WORK"; }
sqlite_backup() {
  sqlite3 -cmd '.timeout 5000' "$WORK/data/keybroker.db" ".backup $WORK/backup/keybroker.db"
  [[ $(sqlite3 "$WORK/backup/keybroker.db" 'PRAGMA integrity_check') == ok ]] || fail 'the copy of the database is damaged'
}
sqlite_destroy() { rm -rf "$WORK/data"; }
# Restores into an empty folder: SQLite would apply a -wal file of the lost database to this one.
sqlite_restore() {
  mkdir "$WORK/data"
  install -m 0600 "$WORK/backup/keybroker.db" "$WORK/data/keybroker.db"
}

postgres_start() {
  # shellcheck disable=SC2119  # The drill needs no additional arguments of the server.
  postgres_server
  createdb keybroker
}
postgres_url() { printf 'postgres://keybroker@/keybroker?socket=%s' "$SERVER"; }
postgres_backup() { pg_dump --format=custom --file="$WORK/backup/keybroker.dump" keybroker; }
postgres_destroy() { dropdb --force keybroker; }
postgres_restore() {
  createdb keybroker
  pg_restore --exit-on-error --no-owner --dbname=keybroker "$WORK/backup/keybroker.dump"
}

mariadb_start() {
  # shellcheck disable=SC2119  # The drill needs no additional arguments of the server.
  mariadb_server
  mariadb_sql --execute='CREATE DATABASE keybroker; GRANT ALL ON keybroker.* TO keybroker@localhost'
}
mariadb_url() { printf 'mariadb://keybroker@/keybroker?socket=%s/socket' "$SERVER"; }
mariadb_backup() {
  mariadb-dump --no-defaults --user=root --socket="$SERVER/socket" --single-transaction --hex-blob keybroker >"$WORK/backup/keybroker.sql"
}
mariadb_destroy() { mariadb_sql --execute='DROP DATABASE keybroker'; }
mariadb_restore() {
  mariadb_sql --execute='CREATE DATABASE keybroker'
  mariadb_sql keybroker <"$WORK/backup/keybroker.sql"
}

# --- the broker ------------------------------------------------------------------------------------------------------

broker() { "$PROGRAM" --config "$WORK/keybroker.toml" "$@"; }

# Shows the output of a command only if the command fails.
quietly() { broker "$@" >"$WORK/said" 2>&1 || fail "keybroker $*: $(cat "$WORK/said")"; }

client() {
  local role=$1
  shift
  "$PROGRAM" client --endpoint "$ENDPOINT" --ca "$WORK/pki/ca.pem" --cert "$WORK/pki/$role.pem" --key "$WORK/pki/$role.key" "$@"
}

start_broker() {
  rm -f "$WORK/ready"
  "$PROGRAM" --config "$WORK/keybroker.toml" serve --ready-file "$WORK/ready" >>"$WORK/broker.log" 2>&1 &
  BROKER_PID=$!
  local deadline=$((SECONDS + READY_SECONDS))
  until [[ -s $WORK/ready ]]; do
    kill -0 "$BROKER_PID" 2>/dev/null || return 1
    ((SECONDS < deadline)) || fail "the broker was not ready after $READY_SECONDS s"
    sleep 0.05
  done
  ENDPOINT=https://$(grep -oE '127\.0\.0\.1:[0-9]+' "$WORK/ready" | head -n 1)
}

site() {
  local module role
  for module in /usr/lib/softhsm/libsofthsm2.so /usr/lib/*/softhsm/libsofthsm2.so; do [[ -e $module ]] && break; done
  scripts/dev-ca.sh "$WORK/pki" releaser enroller lifecycle
  mkdir "$WORK/tokens"
  "${ENGINE}_start"
  sed "s|@TOKENS@|$WORK/tokens|" softhsm/softhsm2.conf.template >"$WORK/softhsm2.conf"
  openssl rand -hex 12 >"$WORK/pin"
  openssl rand -hex 12 >"$WORK/so-pin"
  {
    cat <<CONF
[token]
module = "$module"
label = "drill"
pin_file = "$WORK/pin"
workers = 1
allow_oaep_sha1 = true
[token.environment]
SOFTHSM2_CONF = "$WORK/softhsm2.conf"
[store]
url = "$("${ENGINE}_url")"
$(socket_users)
[audit]
directory = "$WORK/audit"
[status]
address = "127.0.0.1:0"
[[listener]]
address = "127.0.0.1:0"
apis = ["grpc"]
[listener.tls]
certificate_file = "$WORK/pki/server.pem"
key_file = "$WORK/pki/server.key"
client_ca_file = "$WORK/pki/ca.pem"
CONF
    for role in releaser:release enroller:enrol lifecycle:lifecycle; do
      printf '[[principal]]\nsan = "URI:spiffe://dev.example/%s"\nroles = ["%s"]\nkey_names = ["*"]\n' "${role%%:*}" "${role##*:}"
    done
  } >"$WORK/keybroker.toml"
  quietly token init --so-pin-file "$WORK/so-pin"
  quietly store migrate
  quietly key generate --bits 2048
}

# Enrols a key for each user. The first key is replaced once, and the second is deleted.
enrol() {
  local user
  mkdir "$WORK/users"
  for user in $(seq -f 'user-%03g' "$USERS"); do
    client enroller create --user "$user" --key-name vault --generate 32 --out "$WORK/users/$user" >/dev/null
  done
  rm "$WORK/users/user-001"
  client enroller replace --user user-001 --key-name vault --expected-revision 1 --generate 32 --out "$WORK/users/user-001" >/dev/null
  client lifecycle delete --user user-002 --key-name vault --expected-revision 1 >/dev/null
}

# Backs up the database while the broker serves and writes. Then backs up the token, which must not be used during the copy.
backup() {
  mkdir "$WORK/backup"
  (
    local number
    for number in $(seq 20); do
      client enroller create --user "later-$number" --key-name vault --generate 32 --out "$WORK/later-$number" >/dev/null || exit 1
    done
  ) &
  local writer=$!
  "${ENGINE}_backup"
  wait "$writer" || fail 'a key could not be enrolled during the backup'
  stop_broker || fail 'the broker did not stop cleanly'
  cp --archive "$WORK/tokens" "$WORK/backup/tokens"
}

destroy() {
  rm -rf "$WORK/tokens"
  "${ENGINE}_destroy"
}

# Requires that the broker refuses the database without the token, and with another token that has the same label and PIN.
half_a_restore() {
  "${ENGINE}_restore"
  mkdir "$WORK/tokens"
  local status=0
  broker serve >"$WORK/said" 2>&1 || status=$?
  [[ $status -eq 4 ]] || fail "without the token the broker ended with code $status, not 4: $(cat "$WORK/said")"
  quietly token init --so-pin-file "$WORK/so-pin"
  status=0
  broker serve >"$WORK/said" 2>&1 || status=$?
  [[ $status -eq 4 || $status -eq 6 ]] || fail "on another token the broker ended with code $status: $(cat "$WORK/said")"
  destroy
}

compare() {
  local user same=0
  for user in $(seq -f 'user-%03g' "$USERS"); do
    [[ $user != user-002 ]] || continue
    client releaser unwrap --user "$user" --key-name vault --out "$WORK/back" >/dev/null || fail "the key of $user was not released"
    cmp --silent "$WORK/users/$user" "$WORK/back" || fail "the released key of $user differs from the enrolled key"
    rm "$WORK/back"
    same=$((same + 1))
  done
  client lifecycle undelete --user user-002 --key-name vault >/dev/null || fail 'the deleted record could not be undeleted'
  client releaser unwrap --user user-002 --key-name vault --out "$WORK/back" >/dev/null
  cmp --silent "$WORK/users/user-002" "$WORK/back" || fail 'the released key of user-002 differs from the enrolled key'
  printf '   %d released keys equal the enrolled keys; one of them was replaced before the backup, and one was deleted and undeleted\n' $((same + 1))
}

main() {
  while [[ $# -gt 0 ]]; do
    case $1 in
      --engine) ENGINE=${2:-}; shift 2 ;;
      *) PROGRAM=$1; shift ;;
    esac
  done
  check_engines "$ENGINE"
  trap clean_up EXIT
  trap 'exit 130' INT TERM
  release_program
  WORK=$(mktemp -d "${TMPDIR:-/tmp}/keybroker-drill.XXXXXX")
  step "Starting a broker and enrolling keys ($ENGINE)"
  site
  start_broker || fail 'the broker did not start'
  enrol
  step 'Backing up the database while the broker writes, and then the token'
  backup
  step 'Deleting the token and the database'
  destroy
  step 'Restoring only the database: the broker must not start'
  half_a_restore
  step 'Restoring the token and the database'
  cp --archive "$WORK/backup/tokens" "$WORK/tokens"
  "${ENGINE}_restore"
  broker store status
  quietly token check
  broker store check
  start_broker || fail 'the broker did not start after the restore'
  step 'Accepting the backup: the broker releases no key from an older database until an operator accepts it'
  if client releaser unwrap --user user-003 --key-name vault --out "$WORK/back" >"$WORK/said" 2>&1; then
    fail 'a key was released from a restored database before an operator accepted it'
  fi
  stop_broker || fail 'the broker did not stop cleanly'
  quietly store accept-restored
  start_broker || fail 'the broker did not start after the database was accepted'
  compare
  stop_broker || fail 'the broker did not stop cleanly'
  broker audit verify
  printf 'restore: ok\n'
}

main "$@"

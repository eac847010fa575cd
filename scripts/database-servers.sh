# Temporary database servers, for scripts that source this file. A server has its own folder and a local socket, and only
# one server runs at a time. The script that sources this file defines `fail`, WORK (for the server's log) and
# READY_SECONDS.
# shellcheck shell=bash

# The folder for data and socket. The server's user has no access to the script's own folder, so it is separate.
SERVER=
SERVER_PID=

check_engines() {
  local engine
  for engine in "$@"; do
    [[ $engine == @(sqlite|postgres|mariadb) ]] || fail "--engine is sqlite, postgres or mariadb, not $engine"
  done
}

# Builds a release of this commit if PROGRAM is empty, and sets PROGRAM.
release_program() {
  [[ -z $PROGRAM ]] || return 0
  scripts/install.sh
  cargo build --release --locked --quiet
  PROGRAM=$(cargo metadata --format-version 1 --no-deps --offline | sed 's/.*"target_directory":"\([^"]*\)".*/\1/')/release/keybroker
}

# Servers refuse to run as root, so they run as the user that their package created, or as the user `nobody`.
server_command() {
  COMMAND=("$@")
  [[ $(id -u) -ne 0 ]] || COMMAND=(setpriv --reuid "$(stat -c %u "$SERVER")" --clear-groups --regid nogroup -- "$@")
}

as_server() {
  server_command "$@"
  "${COMMAND[@]}"
}

# Starts a server in the background. SERVER_PID must be the id of the server and not of a shell around it, because ending
# that shell would leave the server running.
start_server() {
  server_command "$@"
  "${COMMAND[@]}" >>"$WORK/server.log" 2>&1 &
  SERVER_PID=$!
}

server_folder() {
  SERVER=$(mktemp -d "${TMPDIR:-/tmp}/keybroker-server.XXXXXX")
  [[ $(id -u) -ne 0 ]] || chown "$1:nogroup" "$SERVER" 2>/dev/null || chown nobody:nogroup "$SERVER"
}

until_it_answers() {
  local deadline=$((SECONDS + READY_SECONDS))
  until "$@" >/dev/null 2>&1; do
    kill -0 "$SERVER_PID" 2>/dev/null || fail "the database server did not start: $(tail -n 5 "$WORK/server.log")"
    ((SECONDS < deadline)) || fail 'the database server does not answer'
    sleep 0.1
  done
}

# Starts PostgreSQL with these additional arguments.
postgres_server() {
  server_folder postgres
  local bin
  bin=$(find /usr/lib/postgresql/*/bin -maxdepth 0 | sort -V | tail -n 1)
  as_server "$bin/initdb" --pgdata="$SERVER/data" --username=keybroker --auth=trust --data-checksums >"$WORK/server.log" 2>&1
  # A killed server would leave its shared memory in /dev/shm; a file in the data directory goes with the folder.
  start_server "$bin/postgres" -D "$SERVER/data" -c listen_addresses= -c unix_socket_directories="$SERVER" \
    -c dynamic_shared_memory_type=mmap "$@"
  export PGHOST=$SERVER PGUSER=keybroker
  until_it_answers psql --dbname=postgres --command='SELECT 1'
}

mariadb_sql() { mariadb --no-defaults --user=root --socket="$SERVER/socket" "$@"; }

# Starts MariaDB with these additional arguments.
mariadb_server() {
  server_folder mysql
  as_server mariadb-install-db --no-defaults --datadir="$SERVER/data" --auth-root-authentication-method=normal \
    --skip-test-db >"$WORK/server.log" 2>&1
  start_server /usr/sbin/mariadbd --no-defaults --datadir="$SERVER/data" --socket="$SERVER/socket" --pid-file="$SERVER/pid" \
    --skip-networking "$@"
  until_it_answers mariadb_sql --execute='SELECT 1'
  mariadb_sql --execute='CREATE USER keybroker@localhost'
}

# Prints the setting of [store] that trusts the server's user, because the broker may not trust this user by default.
socket_users() { [[ -z $SERVER ]] || printf 'socket_users = ["%s"]\n' "$(stat -c %u "$SERVER")"; }

stop_server() {
  [[ -z $SERVER_PID ]] || { kill -TERM "$SERVER_PID" && wait "$SERVER_PID"; } 2>/dev/null || true
  [[ -z $SERVER ]] || rm -rf "$SERVER"
  SERVER_PID='' SERVER=''
}

# Throwaway database servers, sourced by the scripts that need one: a separate folder, a local socket, one server at a
# time. Whoever sources it has `fail`, WORK (for the server's log) and READY_SECONDS.
# shellcheck shell=bash

# Data and socket, whose user passes through no folder of ours.
SERVER=
SERVER_PID=

# Servers refuse to run as root, so they run as the user that their package made, or as nobody.
server_command() {
  COMMAND=("$@")
  [[ $(id -u) -ne 0 ]] || COMMAND=(setpriv --reuid "$(stat -c %u "$SERVER")" --clear-groups --regid nogroup -- "$@")
}

as_server() {
  server_command "$@"
  "${COMMAND[@]}"
}

# In the background, with its own process id and not that of a shell around it: whoever ends that leaves the server behind.
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

# With PostgreSQL's arguments beyond those for a throwaway server.
postgres_server() {
  server_folder postgres
  local bin
  bin=$(find /usr/lib/postgresql/*/bin -maxdepth 0 | sort -V | tail -n 1)
  as_server "$bin/initdb" --pgdata="$SERVER/data" --username=keybroker --auth=trust --data-checksums >"$WORK/server.log" 2>&1
  start_server "$bin/postgres" -D "$SERVER/data" -c listen_addresses= -c unix_socket_directories="$SERVER" "$@"
  export PGHOST=$SERVER PGUSER=keybroker
  until_it_answers psql --dbname=postgres --command='SELECT 1'
}

mariadb_sql() { mariadb --no-defaults --user=root --socket="$SERVER/socket" "$@"; }

# With MariaDB's arguments beyond those for a throwaway server.
mariadb_server() {
  server_folder mysql
  as_server mariadb-install-db --no-defaults --datadir="$SERVER/data" --auth-root-authentication-method=normal \
    --skip-test-db >"$WORK/server.log" 2>&1
  start_server /usr/sbin/mariadbd --no-defaults --datadir="$SERVER/data" --socket="$SERVER/socket" --pid-file="$SERVER/pid" \
    --skip-networking "$@"
  until_it_answers mariadb_sql --execute='SELECT 1'
  mariadb_sql --execute='CREATE USER keybroker@localhost'
}

# The setting of [store] for the server, which may run as a user whom the broker does not trust by default.
socket_users() { [[ -z $SERVER ]] || printf 'socket_users = ["%s"]\n' "$(stat -c %u "$SERVER")"; }

stop_server() {
  [[ -z $SERVER_PID ]] || { kill -TERM "$SERVER_PID" && wait "$SERVER_PID"; } 2>/dev/null || true
  [[ -z $SERVER ]] || rm -rf "$SERVER"
  SERVER_PID='' SERVER=''
}

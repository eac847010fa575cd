#!/usr/bin/env bash
# Tests the container image on a machine without an image registry or a daemon. Creates the base images with debootstrap under
# the names in the Dockerfile, builds the image with buildah, and runs the broker from it with runc like a cluster: not as root,
# without capabilities, with a read-only root file system and a separate process namespace. The test creates a token in a volume,
# starts the broker, and runs the client's part of the demo before and after a restart.
#
# The test then runs the services of deploy/compose.yaml: two brokers with the same configuration, one PostgreSQL database and one
# token. One broker releases a key that the other broker enrolled. Ends with "image: ok".
#
# Usage: image-proof.sh          on Debian 12, as root; the first run takes minutes and about 6 GB
#
#   IMAGE_CACHE    folder that keeps base images and caches between runs (/var/tmp/keybroker-image)
#   IMAGE_PROFILE  Cargo profile of the build in the image (release)
#   IMAGE_PROGRAM  a keybroker binary that replaces the binary in the image of the previous run, instead of a new build
set -euo pipefail
umask 077
cd "$(dirname "$0")/.."
# shellcheck source=scripts/debian-mirror.sh
. scripts/debian-mirror.sh

CACHE=${IMAGE_CACHE:-/var/tmp/keybroker-image}
PROFILE=${IMAGE_PROFILE:-release}
PROGRAM=${IMAGE_PROGRAM:-}
RELEASE=bookworm
TAG=localhost/keybroker:proof
READY_SECONDS=60
# The user of the image.
ID=10001
GRPC=127.0.0.1:18443

WORK=
MOUNT=
CONTAINER=
NAME=keybroker-proof-$$
# Arguments of the next container: configuration, secrets, folders for data and log, the database's socket, network namespace,
# name of the instance.
CONFIG=
SECRETS=
DATA=
LOG=
SOCKET=
NETWORK=
INSTANCE=serve
# Process ids of the running brokers and servers, by name.
declare -A RUNNING=()

# --- output and clean-up -------------------------------------------------------------------------------------------------

step() { printf '\n== %s (%d s)\n' "$1" "$SECONDS"; }

fail() {
  printf '\nimage: %s\n' "$1" >&2
  [[ -z $WORK ]] || tail -n 20 "$WORK"/*.log >&2 2>/dev/null || true
  exit 1
}

stop_broker() {
  local name=$1 status=0
  [[ -n ${RUNNING[$name]:-} ]] || return 0
  runtime kill "$NAME-$name" TERM 2>/dev/null || true
  wait "${RUNNING[$name]}" || status=$?
  unset "RUNNING[$name]"
  return "$status"
}

stop_database() {
  [[ -n ${RUNNING[database]:-} ]] || return 0
  kill -TERM "${RUNNING[database]}" 2>/dev/null || true
  wait "${RUNNING[database]}" || true
  unset 'RUNNING[database]'
}

clean_up() {
  local status=$?
  trap - EXIT INT TERM
  local name
  for name in alone one two; do stop_broker "$name" || true; done
  stop_database
  for name in one two; do ip netns delete "$NAME-$name" 2>/dev/null || true; done
  [[ -z $CONTAINER ]] || buildah rm "$CONTAINER" >/dev/null 2>&1 || true
  [[ -z $WORK ]] || rm -rf "$WORK"
  exit "$status"
}

# --- tools and base images -------------------------------------------------------------------------------------------

tools() {
  local part missing=()
  for part in buildah debootstrap runc jq; do
    command -v "$part" >/dev/null || missing+=("$part")
  done
  command -v ip >/dev/null || missing+=(iproute2)
  [[ -d /usr/lib/postgresql ]] || missing+=(postgresql)
  if [[ ${#missing[@]} -gt 0 ]]; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
  fi
  mkdir -p "$CACHE/tmp"
  # Keep all files in one folder, and use no image store of the machine.
  cat >"$CACHE/storage.conf" <<CONF
[storage]
driver = "vfs"
graphroot = "$CACHE/images"
runroot = "$CACHE/run"
CONF
  export CONTAINERS_STORAGE_CONF=$CACHE/storage.conf BUILDAH_ISOLATION=chroot TMPDIR=$CACHE/tmp
}

has_image() { buildah inspect --type image "$1" >/dev/null 2>&1; }

# Debian's slim image is similar to debootstrap's smallest variant without documentation.
debian_image() {
  has_image "$1" && return
  step "debootstrap: $1"
  local root=$CACHE/$RELEASE container
  rm -rf "$root"
  debootstrap --variant=minbase "$RELEASE" "$root" "$(debian_mirror)" >"$CACHE/debootstrap.log" 2>&1 \
    || { tail -n 5 "$CACHE/debootstrap.log" >&2; fail 'debootstrap failed'; }
  rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/var/log/* \
    "$root"/usr/share/{doc,man,locale,info,lintian}/*
  container=$(buildah from scratch)
  buildah add --quiet "$container" "$root" / >/dev/null
  buildah config --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin --cmd bash "$container"
  buildah commit --quiet --rm "$container" "$1" >/dev/null
  rm -rf "$root"
}

# Rust's slim image is Debian's image with a C compiler and the toolchain. This function installs the toolchain of this machine.
rust_image() {
  has_image "$1" && return
  step "toolchain: $1"
  local container sysroot
  sysroot=$(rustc --print sysroot)
  container=$(buildah from --pull-never "$2")
  buildah run "$container" -- sh -euc 'apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends ca-certificates gcc libc6-dev >/dev/null
    rm -rf /var/lib/apt/lists/*'
  # This machine may use a proxy with its own certificate authority.
  buildah copy --quiet "$container" /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt >/dev/null
  buildah copy --quiet "$container" "$sysroot/bin" /usr/local/cargo/bin >/dev/null
  buildah copy --quiet "$container" "$sysroot/lib" /usr/local/cargo/lib >/dev/null
  buildah config --env CARGO_HOME=/usr/local/cargo --env PATH=/usr/local/cargo/bin:/usr/local/bin:/usr/bin:/bin "$container"
  buildah commit --quiet --rm "$container" "$1" >/dev/null
}

image_named() { sed -n "s/^ARG $1=//p" Dockerfile; }

build() {
  if [[ -n $PROGRAM ]]; then
    CONTAINER=$(buildah from --pull-never "$TAG")
    buildah copy --quiet "$CONTAINER" "$PROGRAM" /usr/bin/keybroker >/dev/null
    MOUNT=$(buildah mount "$CONTAINER")
    return
  fi
  local debian rust
  debian=$(image_named RUNTIME_IMAGE)
  rust=$(image_named BUILD_IMAGE)
  debian_image "$debian"
  rust_image "$rust" "$debian"
  step "scripts/image.sh (profile $PROFILE)"
  scripts/image.sh --tool buildah --tag "$TAG" -- --pull-never \
    --build-arg SOFTHSM=1 --build-arg PROFILE="$PROFILE" >"$CACHE/build.log" 2>&1 \
    || { tail -n 30 "$CACHE/build.log" >&2; fail "the image was not built; the complete output is in $CACHE/build.log"; }
  tail -n 1 "$CACHE/build.log"
  # Remove the build stage and images of earlier runs, which have a gigabyte each.
  buildah rmi --prune >/dev/null 2>&1 || true
  CONTAINER=$(buildah from --pull-never "$TAG")
  MOUNT=$(buildah mount "$CONTAINER")
  printf 'size: all files %s, the broker %s\n' \
    "$(du -sh --apparent-size "$MOUNT" | cut -f1)" "$(du -h --apparent-size "$MOUNT/usr/bin/keybroker" | cut -f1)"
  [[ $(buildah inspect --format '{{.OCIv1.Config.User}}' "$CONTAINER") == "$ID:$ID" ]] || fail "the image does not run as the user $ID:$ID"
  buildah inspect --format '{{.Docker.Config.Healthcheck}}' "$CONTAINER" | grep -q 'probe live' || fail 'the image has no health check with "probe live"'
  if grep --quiet --text -e '/usr/local/cargo/registry' -e '/build/src/' -e '/build/target/' "$MOUNT/usr/bin/keybroker"; then
    fail 'the program contains paths of the build machine'
  fi
}

# --- running the image -----------------------------------------------------------------------------------------------

runtime() { runc --root "$WORK/runc" "$@"; }

# The options of the container runtime: the image's user, no capabilities, and only the two volumes are writable.
bundle() {
  local folder=$1
  shift
  mkdir -p "$folder"
  jq --null-input --arg root "$MOUNT" --arg config "$CONFIG" --arg secrets "$SECRETS" --arg data "$DATA" --arg log "$LOG" \
    --arg socket "$SOCKET" --arg network "$NETWORK" --arg instance "$INSTANCE" --argjson id "$ID" '
    def bind($from; $to; $mode): {destination: $to, source: $from, type: "bind", options: ["rbind", $mode]};
    {ociVersion: "1.0.2",
     process: {user: {uid: $id, gid: $id}, args: $ARGS.positional, cwd: "/", env: ["PATH=/usr/bin:/bin", "KEYBROKER_AUDIT_INSTANCE=\($instance)"],
               capabilities: {}, noNewPrivileges: true, rlimits: [{type: "RLIMIT_CORE", soft: 0, hard: 0}]},
     root: {path: $root, readonly: true},
     mounts: ([{destination: "/proc", type: "proc", source: "proc"},
               {destination: "/dev", type: "tmpfs", source: "tmpfs", options: ["nosuid", "noexec", "mode=755", "size=64k"]},
               {destination: "/tmp", type: "tmpfs", source: "tmpfs", options: ["nosuid", "nodev", "noexec", "size=16m"]},
               bind($config; "/etc/keybroker/keybroker.toml"; "ro"),
               bind($secrets; "/run/secrets"; "ro"),
               bind($data; "/var/lib/keybroker"; "rw"),
               bind($log; "/var/log/keybroker"; "rw")]
              + if $socket == "" then [] else [bind($socket; "/run/postgresql"; "rw")] end),
     linux: {namespaces: ([{type: "pid"}, {type: "ipc"}, {type: "uts"}, {type: "mount"}]
                          + if $network == "" then [] else [{type: "network", path: $network}] end),
             maskedPaths: ["/proc/kcore", "/proc/keys", "/proc/timer_list"], readonlyPaths: ["/proc/sys", "/proc/sysrq-trigger"]}}
    ' --args -- "$@" >"$folder/config.json"
}

# Runs one command in its own container.
inside() {
  bundle "$WORK/once" "$@"
  runtime run --bundle "$WORK/once" "$NAME-once" </dev/null
}

start_broker() {
  local name=$1
  bundle "$WORK/serve-$name" keybroker serve
  runtime run --bundle "$WORK/serve-$name" "$NAME-$name" </dev/null >>"$WORK/$name.log" 2>&1 &
  RUNNING[$name]=$!
  local deadline=$((SECONDS + READY_SECONDS))
  until runtime exec "$NAME-$name" keybroker probe ready >/dev/null 2>&1; do
    kill -0 "${RUNNING[$name]}" 2>/dev/null || fail "broker $name did not start"
    ((SECONDS < deadline)) || fail "broker $name was not ready after $READY_SECONDS s"
    sleep 0.2
  done
  runtime exec "$NAME-$name" keybroker probe live
  runtime exec "$NAME-$name" keybroker probe ready
}

# Mounts secrets like Kubernetes: the files belong to root, and the group of the container may read them.
secrets() {
  local name
  mkdir -p "$WORK"/{etc,secrets,data/tokens,log}
  openssl rand -hex 12 >"$WORK/secrets/pin"
  openssl rand -hex 12 >"$WORK/secrets/so-pin"
  scripts/dev-ca.sh "$WORK/pki" releaser enroller admin auditor
  for name in server.pem server.key ca.pem; do cp "$WORK/pki/$name" "$WORK/secrets/$name"; done
  chown -R "0:$ID" "$WORK/secrets" "$WORK/etc"
  chmod 0750 "$WORK/secrets" "$WORK/etc"
  chmod 0440 "$WORK"/secrets/*
  chown -R "$ID:$ID" "$WORK/data" "$WORK/log"
  CONFIG=$WORK/etc/keybroker.toml SECRETS=$WORK/secrets DATA=$WORK/data LOG=$WORK/log
}

configuration() {
  cat >"$WORK/etc/keybroker.toml" <<CONF
[token]
module = "/usr/lib/softhsm/libsofthsm2.so"
label = "proof"
pin_file = "/run/secrets/pin"
allow_oaep_sha1 = true

[token.environment]
SOFTHSM2_CONF = "/etc/keybroker/softhsm2.conf"

[store]
url = "sqlite:/var/lib/keybroker/keybroker.db"

[audit]
directory = "/var/log/keybroker"

[status]
address = "127.0.0.1:19464"

[[listener]]
address = "$GRPC"
apis = ["grpc", "admin"]

[listener.tls]
certificate_file = "/run/secrets/server.pem"
key_file = "/run/secrets/server.key"
client_ca_file = "/run/secrets/ca.pem"
CONF
  local role
  for role in releaser:release enroller:enrol admin:admin auditor:auditor; do
    printf '\n[[principal]]\nsan = "URI:spiffe://dev.example/%s"\nroles = ["%s"]\nkey_names = ["*"]\n' "${role%%:*}" "${role##*:}" \
      >>"$WORK/etc/keybroker.toml"
  done
  chown "0:$ID" "$WORK/etc/keybroker.toml"
  chmod 0640 "$WORK/etc/keybroker.toml"
}

provision() {
  step 'Creating a token in a volume'
  secrets
  configuration
  inside keybroker token init --label proof --so-pin-file /run/secrets/so-pin
  inside keybroker store migrate
  inside keybroker key generate --bits 3072
  inside keybroker config check
  ! inside sh -c 'touch /usr/bin/x' 2>/dev/null || fail 'the root file system is writable'
  [[ $(inside sh -c 'id -u; grep -c "^CapEff:.0000000000000000$" /proc/self/status') == $'10001\n1' ]] \
    || fail 'the container runs as root or with capabilities'
}

# Runs the image's own program as a client beside the container, in a network namespace if one is given.
client_part() {
  local url=$1 users=$2
  shift 2
  PATH=$WORK/bin:$PATH "$@" scripts/demo.sh --against "$url" "$WORK/pki" "$users"
}

alone() {
  provision
  step 'Starting the broker from the image'
  start_broker alone
  client_part "https://$GRPC" "$WORK/users"
  step 'Starting another container with the same volumes'
  stop_broker alone || fail 'the broker did not stop cleanly'
  start_broker alone
  client_part "https://$GRPC" "$WORK/users"
  stop_broker alone || fail 'the broker did not stop cleanly'
  inside keybroker audit verify
}

# --- the services of deploy/compose.yaml ---------------------------------------------------------------------------------

# Starts a database like the service `database` of the compose file: a socket in a shared folder, passwords, no TCP.
start_database() {
  local bin deadline=$((SECONDS + READY_SECONDS))
  bin=$(find /usr/lib/postgresql/*/bin -maxdepth 0 | sort -V | tail -n 1)
  install -d -m 0755 -o postgres -g postgres "$WORK/database" "$WORK/socket"
  install -m 0400 -o postgres "$WORK/secrets-2/database_password" "$WORK/database/password"
  as_postgres "$bin/initdb" --pgdata="$WORK/database/data" --username=keybroker --pwfile="$WORK/database/password" \
    --auth-local=scram-sha-256 --auth-host=reject --data-checksums >"$WORK/database.log" 2>&1
  # Start the server directly and not through a function: the process id would be that of the function's shell, and ending this
  # shell would leave the server running.
  setpriv --reuid postgres --regid postgres --init-groups -- "$bin/postgres" -D "$WORK/database/data" -c listen_addresses= -c unix_socket_directories="$WORK/socket" \
    >>"$WORK/database.log" 2>&1 &
  RUNNING[database]=$!
  until PGPASSWORD=$(<"$WORK/secrets-2/database_password") createdb --host="$WORK/socket" --username=keybroker keybroker 2>/dev/null; do
    ((SECONDS < deadline)) || fail 'the database did not start'
    sleep 0.2
  done
}

as_postgres() { setpriv --reuid postgres --regid postgres --init-groups -- "$@"; }

# Creates the files under the names in the compose file.
compose_secrets() {
  local pair
  install -d -m 0750 -o 0 -g "$ID" "$WORK/secrets-2"
  openssl rand -hex 12 >"$WORK/secrets-2/database_password"
  for pair in pin:pin so-pin:so_pin server.pem:server_certificate server.key:server_key ca.pem:client_ca; do
    cp "$WORK/secrets/${pair%%:*}" "$WORK/secrets-2/${pair##*:}"
  done
  chown "0:$ID" "$WORK"/secrets-2/*
  chmod 0440 "$WORK"/secrets-2/*
}

two_brokers() {
  step 'Starting the services of deploy/compose.yaml'
  compose_secrets
  start_database
  local name
  install -d -m 0700 -o "$ID" -g "$ID" "$WORK"/{data-2,data-2/tokens,log-one,log-two,log-command}
  # The server runs as the user postgres of this machine and not of the database image.
  sed "s/^socket_users = .*/socket_users = [\"$(id -u postgres)\"]/" deploy/compose/keybroker.toml >"$WORK/compose.toml"
  chmod 0644 "$WORK/compose.toml"
  CONFIG=$WORK/compose.toml SECRETS=$WORK/secrets-2 DATA=$WORK/data-2 SOCKET=$WORK/socket LOG=$WORK/log-command
  inside keybroker token init --so-pin-file /run/secrets/so_pin
  inside keybroker store migrate
  inside keybroker key generate
  # Each broker has its own network with only a loopback interface, as in compose, so both can use the same ports.
  for name in one two; do
    ip netns add "$NAME-$name"
    ip -netns "$NAME-$name" link set lo up
    NETWORK=/run/netns/$NAME-$name LOG=$WORK/log-$name INSTANCE=keybroker-$name
    start_broker "$name"
  done
  step 'Enrolling keys with one broker, and releasing them with the other broker'
  client_part https://localhost:8443 "$WORK/users-2" ip netns exec "$NAME-one"
  stop_broker one || fail 'broker one did not stop cleanly'
  client_part https://localhost:8443 "$WORK/users-2" ip netns exec "$NAME-two"
  stop_broker two || fail 'broker two did not stop cleanly'
}

main() {
  [[ $(id -u) -eq 0 ]] || fail 'run this script as root, because debootstrap, buildah and runc need root'
  trap clean_up EXIT
  trap 'exit 130' INT TERM
  tools
  build
  WORK=$(mktemp -d "$CACHE/tmp/proof.XXXXXX")
  # The container's user needs access through this folder, but cannot list it.
  chmod 0711 "$CACHE" "$CACHE/tmp" "$WORK"
  mkdir "$WORK/bin"
  install -m 0755 "$MOUNT/usr/bin/keybroker" "$WORK/bin/keybroker"
  alone
  two_brokers
  step 'done'
  printf 'image: ok\n'
}

main "$@"

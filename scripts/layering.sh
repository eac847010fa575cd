#!/usr/bin/env bash
# Who may import whom. Fails when a foreign name stands outside its folder, naming file, line and rule.
#
# Usage: layering.sh [folder with src/] | layering.sh --self-test
#
# Tests may look anywhere: everything from `#[cfg(test)]` followed by `mod` to the end of a file, and files `tests.rs` or
# below `tests/`, are left out. Comments are left out too.
set -euo pipefail

product_files() {
  find "$1/src" -name '*.rs' ! -name tests.rs ! -path '*/tests/*' -print0 | sort -z
}

# Prints `file:line:name` for every crate or module that a source file mentions: `sqlx` for `sqlx::…`, `crate::store`
# for `crate::store::…` and for `use crate::{store::…}`.
mentions() {
  # shellcheck disable=SC2016  # The program is for awk.
  product_files "$1" | xargs -0 awk -v root="$1/" '
      function say(name) { printf "%s:%d:%s\n", file, FNR, name }
      FNR == 1 {
        file = FILENAME; sub("^" root, "", file)
        test_next = 0; skip = 0; depth = 0
      }
      skip { next }
      /^[ \t]*#\[cfg\(test\)\]/ { test_next = 1; next }
      test_next { test_next = 0; if ($0 ~ /^[ \t]*mod /) { skip = ($0 ~ /\{/); next } }
      {
        line = $0
        sub(/\/\/.*/, "", line)
        gsub(/"([^"\\]|\\.)*"/, "\"\"", line)
        # Inside `use crate::{ … }` the names at depth one are modules of ours.
        while (length(line) > 0) {
          if (depth == 0) {
            if (match(line, /[A-Za-z_][A-Za-z0-9_]*(::([A-Za-z_][A-Za-z0-9_]*|\{))?/) == 0) break
            word = substr(line, RSTART, RLENGTH)
            line = substr(line, RSTART + RLENGTH)
            if (word == "crate::{") { depth = 1; continue }
            if (word ~ /^(crate|keybroker)::/) { sub(/^keybroker/, "crate", word); say(word); continue }
            first = word; sub(/::.*/, "", first)
            if (word ~ /::/ || line ~ /^::/ || last == "use") say(first)
            last = word
          } else {
            if (match(line, /[{}]|[A-Za-z_][A-Za-z0-9_]*/) == 0) break
            word = substr(line, RSTART, RLENGTH)
            line = substr(line, RSTART + RLENGTH)
            if (word == "{") depth++
            else if (word == "}") depth--
            else if (depth == 1 && !path) say("crate::" word)
            path = (line ~ /^::[^{]/)
          }
        }
      }'
}

FOREIGN_CRATES='sqlx|cryptoki|cryptoki_sys|tonic|tonic_prost|tonic_types|tonic_health|tonic_reflection|prost|axum|hyper'
OURS_BUT_VOCABULARY='crate::(rpc|rest|broker|policy|hsm|store|auth|audit|cli|config|server|telemetry|proto)'

# One rule a line: files, names they must not mention (both Perl regular expressions), why.
rules() {
  cat <<RULES
^src/(?!hsm[./]) # cryptoki(_sys)? # only hsm/ knows PKCS#11
^src/(?!store[./]) # sqlx # only store/ knows SQL
^src/(?!rpc[./]|server[./]|cli/(client|bench|connect)[./]|proto\.rs|main\.rs) # tonic(_\w+)? # only the doors and clients know gRPC
^src/(?!rpc[./]|server[./]|cli/(client|bench|connect)[./]|proto\.rs|hsm/) # prost(_\w+)? # only the doors, clients and the worker's frames know protobuf
^src/(?!rpc[./]|rest[./]|server[./]) # axum # only the doors know HTTP
^src/(?!policy[./]) # cedar_policy(_\w+)? # only policy/ knows Cedar
^src/r(pc|est)[./] # crate::(policy|hsm|store|audit|cli|config) # doors end in broker
^src/broker[./] # crate::(rpc|rest|auth|cli|config|server|proto) # use cases know no door and no wiring
^src/broker[./] # $FOREIGN_CRATES # use cases know no foreign type
^src/policy[./] # crate::(rpc|rest|broker|hsm|store|auth|audit|cli|config|server|telemetry|proto) # policy/ knows the vocabulary alone
^src/policy[./] # $FOREIGN_CRATES # policy/ knows no foreign type but Cedar's
^src/hsm[./] # crate::(policy|store|auth|audit|broker|rpc|rest|cli|config|server|proto) # hsm/ knows the vocabulary alone
^src/store[./] # crate::(policy|hsm|auth|audit|broker|rpc|rest|cli|config|server|proto) # store/ knows the vocabulary alone
^src/auth[./] # crate::(policy|hsm|store|audit|broker|rpc|rest|cli|config|server|proto) # auth/ knows the vocabulary alone
^src/audit[./] # crate::(policy|hsm|store|auth|broker|rpc|rest|cli|config|server|proto) # audit/ knows the vocabulary alone
^src/(key|principal|secret|envelope|error|call|bitwarden|pem|trusted_file)[./] # $OURS_BUT_VOCABULARY # the vocabulary knows nothing else of ours
^src/(key|principal|secret|envelope|error|call|bitwarden)[./] # $FOREIGN_CRATES # the vocabulary knows no foreign type
^src/(main|config|server|telemetry)[./] # crate::secret # wiring never sees key material
RULES
}

# Where a principal may be made from nothing, and where a private RSA key may be named (nowhere: it is on the token).
call_sites() {
  local root=$1 found
  # shellcheck disable=SC2016  # The program is for awk.
  found=$(product_files "$root" | xargs -0 awk -v root="$root/" '
    FNR == 1 { file = FILENAME; sub("^" root, "", file); test_next = 0; skip = 0 }
    skip { next }
    /^[ \t]*#\[cfg\(test\)\]/ { test_next = 1; next }
    test_next { test_next = 0; if ($0 ~ /^[ \t]*mod /) { skip = ($0 ~ /\{/); next } }
    /^[ \t]*\/\// { next }
    /Principal::authenticated\(/ && file !~ /^src\/auth[.\/]/ { print file ":" FNR ": only auth/ makes a principal from a credential" }
    /RsaPrivateKey/ { print file ":" FNR ": the private RSA key lives on the token; only tests have one" }')
  [[ -z $found ]] && return
  printf '%s\n' "$found"
  return 1
}

layering() {
  local root=$1 all status=0 rule files names why found line
  [[ -d $root/src ]] || { printf 'layering: there is no %s/src\n' "$root" >&2; return 2; }
  all=$(mentions "$root")
  while IFS= read -r rule; do
    files=${rule%% # *}
    why=${rule##* # }
    names=${rule#* # }
    names=${names% # *}
    found=$(grep -P "${files}[^:]*:\\d+:(${names})\$" <<<"$all" || true)
    [[ -n $found ]] || continue
    while IFS= read -r line; do printf '%s: %s\n' "$line" "$why"; done <<<"$found"
    status=1
  done < <(rules)
  call_sites "$root" || status=1
  return "$status"
}

# The check must be able to fail: every planted violation is found, and an innocent tree passes.
self_test() {
  local folder failures=0
  folder=$(mktemp -d)
  # shellcheck disable=SC2064  # The path is fixed here.
  trap "rm -rf '$folder'" RETURN

  plant() {
    rm -rf "$folder/src"
    mkdir -p "$folder/src/$(dirname "$1")"
    printf '%s\n' "$2" >"$folder/src/$1"
  }
  refused() {
    plant "$1" "$2"
    if layering "$folder" >/dev/null; then
      printf 'layering self-test: not found in %s: %s\n' "$1" "$2" >&2
      failures=1
    fi
  }
  passes() {
    plant "$1" "$2"
    if ! layering "$folder" >&2; then
      printf 'layering self-test: wrongly refused in %s: %s\n' "$1" "$2" >&2
      failures=1
    fi
  }

  refused broker.rs 'use sqlx::Row;'
  refused broker/release.rs 'fn f(e: cryptoki::error::Error) {}'
  refused rpc/user_key.rs 'use crate::store::Store;'
  refused rpc/user_key.rs $'use crate::{\n    broker::Broker,\n    hsm::{\n        Token,\n    },\n};'
  refused rpc.rs 'use crate::{hsm, broker};'
  refused store/sqlite.rs 'use crate::{audit::Entry, key::UserId};'
  refused hsm/supervisor.rs 'type A = crate::store::Error;'
  refused audit.rs 'use crate::hsm;'
  refused server.rs 'use axum::Router; use sqlx::Row;'
  refused cli/key.rs 'use tonic::Status;'
  refused key.rs 'use crate::broker::Broker;'
  refused error.rs 'impl From<tonic::Status> for E {}'
  refused config.rs 'use crate::secret::KeyMaterial;'
  refused broker/x.rs 'let p = Principal::authenticated(name, tenant, roles);'
  refused broker/release.rs 'use cedar_policy::Authorizer;'
  refused rpc/edge.rs 'use crate::policy::Policy;'
  refused policy/engine.rs 'use crate::{key::UserId, store::Store};'
  refused policy.rs 'use sqlx::Row;'
  refused auth/token.rs 'use crate::policy;'
  refused principal.rs 'use crate::policy::Policy;'
  refused hsm/x.rs 'use rsa::RsaPrivateKey;'
  passes broker.rs $'//! sqlx::Row is not named here.\nuse crate::{\n    store::Store,\n    hsm::Token,\n};'
  passes broker.rs $'fn f() {}\n#[cfg(test)]\nmod tests {\n    use sqlx::Row;\n}'
  passes policy/engine.rs 'use cedar_policy::Authorizer; use crate::{hardening, principal::Action};'
  passes broker.rs 'use crate::policy::{Permit, Policy};'
  passes store/sqlite.rs 'use crate::{key::{audit, UserId}, error}; use sqlx::Row;'
  passes rpc.rs 'use crate::broker::{hsm, store}; use tonic::Status;'
  passes hsm/frame.rs 'use prost::Message as _; use cryptoki::context::Pkcs11;'
  return "$failures"
}

case ${1:-.} in
  --self-test) self_test ;;
  *) layering "${1:-.}" ;;
esac

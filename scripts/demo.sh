#!/usr/bin/env bash
# Demonstrates the broker with real parts: a SoftHSM token, SQLite, TLS and a gRPC client. All files are in a temporary
# folder that is removed at the end. Each story is a file in scripts/demo.
#
# Usage: demo.sh [--keep]                        --keep leaves the broker running and prints commands to try
#        demo.sh --bitwarden                     replaces the master password of a password manager account with a key
#                                                from the broker
#        demo.sh --devices                       gives the devices of a member access, refuses a thief, ends the trust of
#                                                a lost device, and searches the broker's memory for the user keys
#        demo.sh --against URL PKI USERS         runs only the client's part, against a running broker. PKI is a folder
#                                                that dev-ca.sh wrote. USERS is a folder for the users' keys; if it has
#                                                keys, the script does not enrol them again
set -euo pipefail
umask 077
cd "$(dirname "$0")/.."

# shellcheck source=scripts/demo/lib.sh
. scripts/demo/lib.sh

main() {
  trap clean_up EXIT
  trap interrupted INT TERM HUP
  local story=${1:-}
  case $story in
    '' | --keep)
      # shellcheck source=scripts/demo/keys.sh
      . scripts/demo/keys.sh
      scripts/install.sh
      keys_story "${story#--}"
      ;;
    --bitwarden)
      # shellcheck source=scripts/demo/bitwarden.sh
      . scripts/demo/bitwarden.sh
      scripts/install.sh
      bitwarden_story
      ;;
    --devices)
      # shellcheck source=scripts/demo/devices.sh
      . scripts/demo/devices.sh
      scripts/install.sh
      devices_story
      ;;
    --against)
      shift
      # shellcheck source=scripts/demo/keys.sh
      . scripts/demo/keys.sh
      against "$@"
      ;;
    *) fail "unknown argument $story; usage: demo.sh [--keep | --bitwarden | --devices | --against URL PKI USERS]" ;;
  esac
}

main "$@"

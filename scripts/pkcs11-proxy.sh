#!/usr/bin/env bash
# Builds pkcs11-proxy, a PKCS#11 module that asks a daemon for everything, for its report in docs/tokens: the module and the daemon.
# Neither Debian nor a registry has it. Prints the directory. Needs a C compiler, the headers of OpenSSL, and the network the first time,
# or a clone whose path KEYBROKER_PKCS11_PROXY_SOURCE names.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly COMMIT=2032875c95563c15cf77395f924191fdd6a1b33f
readonly SOURCE=${KEYBROKER_PKCS11_PROXY_SOURCE:-https://github.com/SUNET/pkcs11-proxy.git}
readonly SHARED=(gck-rpc-message.c gck-rpc-util.c egg-buffer.c gck-rpc-tls-psk.c)

main() {
  local folder=$PWD/target/pkcs11-proxy work
  if [[ ! -e $folder/pkcs11-daemon ]]; then
    work=$(mktemp -d)
    # shellcheck disable=SC2064 # The directory of now.
    trap "rm -rf '$work'" EXIT
    git clone --quiet "$SOURCE" "$work/source"
    git -C "$work/source" checkout --quiet "$COMMIT"
    (
      cd "$work/source"
      sh mksyscalls.sh
      # Its own list of files in CMakeLists.txt, without seccomp, which its config.h leaves out as well.
      cc -w -O2 -I. -shared -fPIC -o "$work/libpkcs11-proxy.so" gck-rpc-module.c "${SHARED[@]}" -lpthread -lssl -lcrypto
      cc -w -O2 -I. -o "$work/pkcs11-daemon" gck-rpc-daemon-standalone.c gck-rpc-dispatch.c syscall-reporter.c "${SHARED[@]}" \
        -ldl -lpthread -lssl -lcrypto
    )
    mkdir -p "$folder"
    cp "$work/libpkcs11-proxy.so" "$folder/"
    # Last, so that an interrupted build is not taken for both files.
    cp "$work/pkcs11-daemon" "$folder/"
  fi
  printf '%s\n' "$folder"
}

main "$@"

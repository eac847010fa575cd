#!/usr/bin/env bash
# Builds pkcs11-proxy for its report in docs/tokens. pkcs11-proxy is a PKCS#11 module that forwards each call to a daemon. Debian
# has no package of it. The script builds the module and the daemon, and prints their directory. It needs a C compiler and the
# headers of OpenSSL. The first build needs the network, or KEYBROKER_PKCS11_PROXY_SOURCE with the path of a clone.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly COMMIT=2032875c95563c15cf77395f924191fdd6a1b33f
readonly SOURCE=${KEYBROKER_PKCS11_PROXY_SOURCE:-https://github.com/SUNET/pkcs11-proxy.git}
readonly SHARED=(gck-rpc-message.c gck-rpc-util.c egg-buffer.c gck-rpc-tls-psk.c)

main() {
  local folder=$PWD/target/pkcs11-proxy work
  if [[ ! -e $folder/pkcs11-daemon ]]; then
    work=$(mktemp -d)
    # shellcheck disable=SC2064  # The path is fixed here.
    trap "rm -rf '$work'" EXIT
    git clone --quiet "$SOURCE" "$work/source"
    git -C "$work/source" checkout --quiet "$COMMIT"
    (
      cd "$work/source"
      sh mksyscalls.sh
      # The list of files is from CMakeLists.txt, without seccomp, which config.h does not enable.
      cc -w -O2 -I. -shared -fPIC -o "$work/libpkcs11-proxy.so" gck-rpc-module.c "${SHARED[@]}" -lpthread -lssl -lcrypto
      cc -w -O2 -I. -o "$work/pkcs11-daemon" gck-rpc-daemon-standalone.c gck-rpc-dispatch.c syscall-reporter.c "${SHARED[@]}" \
        -ldl -lpthread -lssl -lcrypto
    )
    mkdir -p "$folder"
    cp "$work/libpkcs11-proxy.so" "$folder/"
    # Copy the daemon last, because its existence shows that the build is complete.
    cp "$work/pkcs11-daemon" "$folder/"
  fi
  printf '%s\n' "$folder"
}

main "$@"

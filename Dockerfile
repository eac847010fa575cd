# The image of the broker. It runs as an unprivileged user, and its root file system can be mounted read-only.
#
#   scripts/image.sh --tag keybroker                            for a network HSM: mount the vendor's module
#   scripts/image.sh --tag keybroker -- --build-arg SOFTHSM=1   with SoftHSM, for development and tests
#
# docs/operations.md describes how to run the image. scripts/image-proof.sh tests the image without an image registry.
ARG BUILD_IMAGE=rust:1.95-slim-bookworm
ARG RUNTIME_IMAGE=debian:bookworm-slim

# --- build -----------------------------------------------------------------------------------------------------------
FROM ${BUILD_IMAGE} AS build
# Cargo profile. `dev` builds faster, to try the image itself.
ARG PROFILE=release
# Building the allocator needs `make`, which the Rust image does not have.
RUN set -eux; \
    apt-get update; \
    DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends make; \
    rm -rf /var/lib/apt/lists/*
WORKDIR /build
COPY Cargo.toml Cargo.lock README.md LICENSE ./
COPY proto proto
COPY migrations migrations
COPY src src
# The manifests refer to these files. They are not part of the image.
COPY tests tests
# Panic messages contain paths of source files. Replace the paths of the build machine.
ENV RUSTFLAGS="--remap-path-prefix=/usr/local/cargo/registry/src=/cargo --remap-path-prefix=/build=/keybroker" \
    CFLAGS="-ffile-prefix-map=/usr/local/cargo/registry/src=/cargo -ffile-prefix-map=/build=/keybroker"
# Both folders are caches of the build tool, and not part of the image.
RUN --mount=type=cache,id=keybroker-cargo,target=/usr/local/cargo/registry \
    --mount=type=cache,id=keybroker-target,target=/build/target \
    set -eux; \
    cargo build --locked --profile "$PROFILE" --bin keybroker; \
    case $PROFILE in dev) folder=debug ;; *) folder=$PROFILE ;; esac; \
    install -D -m 0755 "target/$folder/keybroker" /out/usr/bin/keybroker; \
    strip /out/usr/bin/keybroker; \
    /out/usr/bin/keybroker man --out /out/usr/share/man/man1

# --- runtime ---------------------------------------------------------------------------------------------------------
FROM ${RUNTIME_IMAGE}
# 1 installs SoftHSM, which stores its keys in files. With 0, mount the module of your HSM, and set `token.module` to its path.
ARG SOFTHSM=0
RUN set -eux; \
    case $SOFTHSM in \
      0) ;; \
      1) apt-get update; \
         DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends libsofthsm2; \
         rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/* ;; \
      *) echo "SOFTHSM is $SOFTHSM; it must be 0 or 1" >&2; exit 1 ;; \
    esac; \
    useradd --system --uid 10001 --user-group --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin keybroker; \
    install -d -m 0755 /etc/keybroker; \
    install -d -m 0700 -o keybroker -g keybroker /var/lib/keybroker /var/lib/keybroker/tokens /var/log/keybroker
COPY --from=build /out /
COPY packaging/container/softhsm2.conf /etc/keybroker/softhsm2.conf

# A number and not a name, so that Kubernetes can check that the user is not root.
USER 10001:10001
WORKDIR /
# The broker writes only to these directories: the database and SoftHSM's token, and the audit log.
VOLUME ["/var/lib/keybroker", "/var/log/keybroker"]
EXPOSE 8443 8444
STOPSIGNAL SIGTERM
# `probe live` fails only if a restart can help. To check the token and the database, use `probe ready`.
HEALTHCHECK --interval=10s --timeout=5s --start-period=90s --retries=3 CMD ["keybroker", "probe", "live"]
ENTRYPOINT ["keybroker"]
CMD ["serve"]

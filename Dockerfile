# The broker as an image: small, not root, made for a root file system that is mounted read-only.
#
#   scripts/image.sh --tag keybroker                            for a network HSM: mount the vendor's module
#   scripts/image.sh --tag keybroker -- --build-arg SOFTHSM=1   with SoftHSM, for development and tests
#
# docs/operations.md says how it is run, scripts/image-proof.sh builds and runs it without any registry.
ARG BUILD_IMAGE=rust:1.95-slim-bookworm
ARG RUNTIME_IMAGE=debian:bookworm-slim

# --- build -----------------------------------------------------------------------------------------------------------
FROM ${BUILD_IMAGE} AS build
# `release` takes minutes; `dev` is for looking at the image itself.
ARG PROFILE=release
# The allocator's build needs `make`, which the image of the toolchain does not have.
RUN set -eux; \
    apt-get update; \
    DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends make; \
    rm -rf /var/lib/apt/lists/*
WORKDIR /build
COPY Cargo.toml Cargo.lock README.md LICENSE ./
COPY proto proto
COPY migrations migrations
COPY src src
# Members of the workspace, and files that the manifests name. None of it gets into the image.
COPY tests tests
# Panic messages name source files: not by the paths of the machine that built them.
ENV RUSTFLAGS="--remap-path-prefix=/usr/local/cargo/registry/src=/cargo --remap-path-prefix=/build=/keybroker" \
    CFLAGS="-ffile-prefix-map=/usr/local/cargo/registry/src=/cargo -ffile-prefix-map=/build=/keybroker"
# Both folders are caches of the builder: neither is part of an image.
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
# 1: with SoftHSM, whose keys are files. Everybody else mounts the module of their HSM and names it in `token.module`.
ARG SOFTHSM=0
RUN set -eux; \
    case $SOFTHSM in \
      0) ;; \
      1) apt-get update; \
         DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends libsofthsm2; \
         rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/* ;; \
      *) echo "SOFTHSM is 0 or 1, not $SOFTHSM" >&2; exit 1 ;; \
    esac; \
    useradd --system --uid 10001 --user-group --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin keybroker; \
    install -d -m 0755 /etc/keybroker; \
    install -d -m 0700 -o keybroker -g keybroker /var/lib/keybroker /var/lib/keybroker/tokens /var/log/keybroker
COPY --from=build /out /
COPY packaging/container/softhsm2.conf /etc/keybroker/softhsm2.conf

# A number, so that Kubernetes can see that it is not root.
USER 10001:10001
WORKDIR /
# Database and, with SoftHSM, the token; and the audit log. The only places that are written to.
VOLUME ["/var/lib/keybroker", "/var/log/keybroker"]
EXPOSE 8443 8444
STOPSIGNAL SIGTERM
# Whether a restart would help, and not whether the token is there: that is `probe ready`.
HEALTHCHECK --interval=10s --timeout=5s --start-period=90s --retries=3 CMD ["keybroker", "probe", "live"]
ENTRYPOINT ["keybroker"]
CMD ["serve"]

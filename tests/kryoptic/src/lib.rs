//! Nothing: `scripts/kryoptic.sh` builds the dependency `kryoptic` itself, whose library is the module.

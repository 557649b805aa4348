#!/bin/sh
# Builds the bare-metal guest and prints the path of its ELF (and nothing else on stdout).
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
target=${CARGO_TARGET_DIR:-$here/target}
# An own target folder even when the caller set RUSTFLAGS or a target for the host crates.
cargo build --quiet --release --locked --manifest-path "$here/Cargo.toml" --bin bare --target-dir "$target" 1>&2
printf '%s\n' "$target/release/bare"

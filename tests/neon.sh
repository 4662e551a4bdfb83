#!/usr/bin/env bash
# Runs bitlinear's tests (without candle) for aarch64 under an emulator: once on a processor with NEON alone, once on one that has
# the dot product instructions too.
#
#   tests/neon.sh           run; where a tool is missing, say which and skip (exit 0; with NEON=required, exit 1)
#   tests/neon.sh --fetch   first unpack Debian's Rust under target/ (nothing is installed), then run
#
# Needs qemu-aarch64 and aarch64-linux-gnu-gcc (Debian: qemu-user gcc-aarch64-linux-gnu libc6-dev-arm64-cross), and a
# rustc with the standard library of aarch64-unknown-linux-gnu: from `rustup target add`, or, where rustup can download
# nothing, Debian's packages rustc-web and libstd-rust-web-dev:arm64, which --fetch gets. They are unpacked and not
# installed, because an installed one would need the arm64 architecture and stand beside rustup's on the PATH.
set -euo pipefail
cd "$(dirname "$0")/.."
target=aarch64-unknown-linux-gnu
debian=$PWD/target/debian-rust

skip() {
    echo "tests/neon.sh: skipped: $1"
    [[ ${NEON:-} != required ]]
    exit
}

# Debian's packages and those that they need and the system lacks, from package lists of our own.
fetch() {
    mkdir -p "$debian"/{lists,cache/archives}/partial
    local apt=(apt-get -qq -o Debug::NoLocking=true -o APT::Sandbox::User= -o Dir::State::Lists="$debian/lists"
        -o Dir::Cache="$debian/cache" -o APT::Architectures::=amd64 -o APT::Architectures::=arm64)
    "${apt[@]}" update
    "${apt[@]}" -y --no-install-recommends --download-only install rustc-web libstd-rust-web-dev:arm64
    for package in "$debian"/cache/archives/*.deb; do
        dpkg-deb -x "$package" "$debian"
    done
    rm -r "$debian"/{lists,cache}
}

has_target() {
    compgen -G "$("$1" --print target-libdir --target "$target" 2>/dev/null)/libstd-*.rlib" >/dev/null
}

[[ ${1:-} != --fetch ]] || fetch
command -v qemu-aarch64 >/dev/null || skip "no qemu-aarch64 (Debian: qemu-user)"
command -v aarch64-linux-gnu-gcc >/dev/null || skip "no aarch64-linux-gnu-gcc (Debian: gcc-aarch64-linux-gnu libc6-dev-arm64-cross)"
if ! has_target rustc; then
    export LD_LIBRARY_PATH=$debian/usr/lib/x86_64-linux-gnu${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
    export RUSTC=$debian/usr/bin/rustc
    has_target "$RUSTC" || skip "no Rust library for $target ('rustup target add $target', or 'tests/neon.sh --fetch' on Debian)"
fi

runner="qemu-aarch64 -L /usr/aarch64-linux-gnu"
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER=$runner
# A folder of its own: another rustc would rebuild everything in the usual one. And the tests that start themselves
# again must do so in the emulator.
export CARGO_TARGET_DIR=$PWD/target/neon BITLINEAR_TEST_RUNNER=$runner

tests=(cargo test --quiet --package bitlinear --no-default-features --target "$target")
for run in "cortex-a53:scalar neon" "cortex-a76:scalar neon neondot"; do
    export QEMU_CPU=${run%%:*} BITLINEAR_TEST_KERNELS=${run#*:}
    echo "tests/neon.sh: $QEMU_CPU must run: $BITLINEAR_TEST_KERNELS ($("${RUSTC:-rustc}" --version))"
    "${tests[@]}" --lib
    "${tests[@]}" --test forced_kernel
done
echo "tests/neon.sh: passed"

#!/usr/bin/env bash
# Build the kernels' generic level for aarch64, run it under qemu against plain loops, and compare its bits with those
# of this machine's build (tests/native/kernels_test.cpp). Needs Debian's g++-aarch64-linux-gnu and qemu-user-static.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

cross=aarch64-linux-gnu-g++ emulator=qemu-aarch64-static build=build/aarch64
for program in "$cross" "$emulator"; do
    command -v "$program" > /dev/null || {
        echo "$program is missing: apt-get install g++-aarch64-linux-gnu qemu-user-static" >&2
        exit 2
    }
done

compile() { # COMPILER OUTPUT, with the flags of CMakeLists.txt
    "$1" -std=c++17 -O3 -ffp-contract=off -fno-math-errno -Wall -Wextra -Wno-maybe-uninitialized -pthread -static \
        -DNEMOTRON_H_LEVEL=generic -Icsrc -o "$2" tests/native/kernels_test.cpp csrc/pool.cpp csrc/scratch.cpp \
        csrc/memory.cpp csrc/kernels/*.cpp
}

mkdir -p "$build"
compile "$cross" "$build/kernels"
"$emulator" "$build/kernels" | tee "$build/aarch64.txt"
compile "${CXX:-c++}" "$build/kernels_here"
"$build/kernels_here" > "$build/here.txt"
diff "$build/here.txt" "$build/aarch64.txt"
echo "aarch64: every kernel right, with the same bits as on $(uname -m)"

#!/usr/bin/env bash
# Run the kernels' level with matrix units, true instructions and all, where no CPU has them: under Linux in the emulator
# Bochs, one thread and three, and compare its bits with those of this machine's generic level
# (tests/native/kernels_test.cpp). Downloads about 60 MB of Debian's packages into build/amx, builds Bochs there once.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

kernel=${AMX_KERNEL:-linux-image-6.17.13+deb13-cloud-amd64}  # 6.12 and older hang or panic in Bochs 3.0
keys=/usr/share/keyrings/debian-archive-keyring.gpg
build=$PWD/build/amx

for program in apt-get dpkg-deb xorriso patch make "${CXX:-c++}"; do
    command -v "$program" > /dev/null || {
        echo "$program is missing: apt-get install xorriso patch make g++ (on Debian or a relative of it)" >&2
        exit 2
    }
done
[ -e "$keys" ] || { echo "$keys is missing: apt-get install debian-archive-keyring" >&2; exit 2; }
[ "$(uname -m)" = x86_64 ] || { echo "this is $(uname -m): the level is compiled for and run on x86-64" >&2; exit 2; }

# Debian 13's packages, whatever this system is: package lists of our own, nothing installed.
download() {
    local apt=$build/apt
    mkdir -p "$apt/lists/partial" "$apt/cache/archives/partial" "$build/packages"
    : > "$apt/status"
    for suite in trixie trixie-backports; do
        echo "deb [signed-by=$keys] http://deb.debian.org/debian $suite main"
        echo "deb-src [signed-by=$keys] http://deb.debian.org/debian $suite main"
    done > "$apt/sources.list"
    local options=(-qq -o Debug::NoLocking=1 -o APT::Sandbox::User= -o APT::Architecture=amd64
        -o Dir::Etc::SourceList="$apt/sources.list" -o Dir::Etc::SourceParts=/nonexistent -o Dir::State="$apt"
        -o Dir::State::Lists="$apt/lists" -o Dir::State::status="$apt/status" -o Dir::Cache="$apt/cache")
    apt-get "${options[@]}" update
    (cd "$build/packages" &&
        apt-get "${options[@]}" download bochsbios vgabios busybox-static isolinux syslinux-common "$kernel" &&
        apt-get "${options[@]}" source --tar-only bochs)
    for package in "$build"/packages/*.deb; do dpkg-deb -x "$package" "$build/root"; done
}

build_bochs() {
    rm -rf "$build/bochs"
    mkdir "$build/bochs"
    tar -xf "$build"/packages/bochs_3.0*.orig.tar.xz -C "$build/bochs" --strip-components=1
    patch -d "$build/bochs" -p1 < tools/bochs.patch
    (cd "$build/bochs" && CFLAGS=-O2 CXXFLAGS=-O2 ./configure --enable-x86-64 --enable-cpu-level=6 --enable-avx \
        --enable-evex --enable-amx --disable-debugger --disable-docbook --with-nogui && make -s) > "$build/bochs.log" 2>&1 || {
        tail "$build/bochs.log" >&2
        exit 1
    }
}

compile() { # OUTPUT LEVEL, with the flags of CMakeLists.txt
    "${CXX:-c++}" -std=c++17 -O3 -ffp-contract=off -fno-math-errno -Wall -Wextra -Wno-uninitialized \
        -Wno-maybe-uninitialized -pthread -static -DNEMOTRON_H_LEVEL="$2" "${@:3}" -Icsrc -o "$1" \
        tests/native/kernels_test.cpp csrc/pool.cpp csrc/scratch.cpp csrc/memory.cpp csrc/kernels/*.cpp
}

# A CD with boot loader, kernel and a file system in memory that holds busybox, the program and what to run.
write_image() {
    local cd=$build/cd files=$build/files
    rm -rf "$cd" "$files"
    mkdir -p "$cd/isolinux" "$files/bin"
    cp "$build/kernels_amx" "$files/kernels"
    cp "$build/root/usr/bin/busybox" "$files/bin/busybox"
    cat > "$files/init" <<- 'END'
		#!/bin/busybox sh
		echo begin
		/kernels
		echo "end $?"
		/bin/busybox sleep 1
		/bin/busybox poweroff -f
	END
    chmod +x "$files/init"
    (cd "$files" && find . | ./bin/busybox cpio -o -H newc) > "$cd/initrd" 2> /dev/null
    cp "$build"/root/boot/vmlinuz-* "$cd/linux"
    cp "$build/root/usr/lib/ISOLINUX/isolinux.bin" "$build/root/usr/lib/syslinux/modules/bios/ldlinux.c32" "$cd/isolinux"
    cat > "$cd/isolinux/isolinux.cfg" <<- 'END'
		DEFAULT linux
		LABEL linux
		KERNEL /linux
		APPEND initrd=/initrd console=ttyS0,115200 loglevel=0 mitigations=off nokaslr noapic no5lvl tsc=reliable panic=-1
	END
    xorriso -as mkisofs -quiet -o "$build/cd.iso" -b isolinux/isolinux.bin -c isolinux/boot.cat -no-emul-boot \
        -boot-load-size 4 -boot-info-table "$cd" 2> /dev/null
}

# Bochs takes a power off, and a reset after a panic, as a fatal error: its exit code says nothing.
run_bochs() {
    cat > "$build/bochsrc" <<- END
		config_interface: textconfig
		display_library: nogui
		megs: 512
		romimage: file=$build/root/usr/share/bochs/BIOS-bochs-latest
		vgaromimage: file=$build/root/usr/share/vgabios/vgabios.bin
		cpu: model=sapphire_rapids, count=1, ips=200000000, reset_on_triple_fault=0, ignore_bad_msrs=1
		clock: sync=none
		boot: cdrom
		ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14
		ata0-master: type=cdrom, path=$build/cd.iso, status=inserted
		com1: enabled=1, mode=file, dev=$build/serial.txt
		log: $build/run.log
		panic: action=fatal
		error: action=ignore
		info: action=ignore
	END
    rm -f "$build/serial.txt"
    timeout 1800 "$build/bochs/bochs" -q -f "$build/bochsrc" > "$build/run.txt" 2>&1 || true
    tr -d '\r' < "$build/serial.txt" | sed -n '/^begin$/,/^end /p' | sed 1d > "$build/amx.txt"
    grep -q '^end ' "$build/amx.txt" || {
        echo "Linux or the kernels stopped early (all of it: $build/serial.txt, $build/run.log):" >&2
        tail "$build/serial.txt" >&2
        exit 1
    }
}

if [ ! -e "$build/downloaded" ]; then
    download
    touch "$build/downloaded"
fi
if [ ! "$build/bochs/bochs" -nt tools/bochs.patch ]; then build_bochs; fi
avx512=(-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mavx512bf16)
compile "$build/kernels_amx" amx "${avx512[@]}" -mamx-tile -mamx-int8 -mamx-bf16
write_image
run_bochs
cat "$build/amx.txt"
compile "$build/kernels_here" generic
{ "$build/kernels_here" && echo "end 0"; } > "$build/here.txt"
grep -q '^tiles .* ok ' "$build/amx.txt"
diff "$build/here.txt" <(grep -v '^tiles ' "$build/amx.txt")
echo "amx: every kernel right, with the same bits as on this machine without matrix units"

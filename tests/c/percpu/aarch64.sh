#!/bin/sh
# The tests of per-CPU areas on aarch64, in a guest of qemu-system-aarch64 (qemu-user has no rseq): a Debian kernel by name, and the
# tests, static, behind an init of their own. Usage: aarch64.sh CSRC FOLDER. Exit status: 0 passed, 77 skipped with the reason, else failed.
#
# Needs Debian's gcc-aarch64-linux-gnu, libc6-dev-arm64-cross and qemu-system-arm. The kernel is downloaded and unpacked below FOLDER, by an apt with
# lists of its own: the machine's stay as they are.
set -eu
csrc=$1 out=$2
here=$(cd "$(dirname "$0")" && pwd)
skip() { echo "skipped: $*"; exit 77; }
command -v aarch64-linux-gnu-gcc >/dev/null || skip "no aarch64-linux-gnu-gcc; apt-get install gcc-aarch64-linux-gnu libc6-dev-arm64-cross"
command -v qemu-system-aarch64 >/dev/null || skip "no qemu-system-aarch64; apt-get install qemu-system-arm"
command -v cpio >/dev/null || skip "no cpio; apt-get install cpio"
mkdir -p "$out"
cd "$out"

if [ ! -s vmlinuz ]; then
    command -v apt-get >/dev/null || skip "no apt-get to get a kernel for aarch64 by"
    mkdir -p apt/state/lists/partial apt/cache/archives/partial kernel
    : >apt/status
    lists="-q -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o APT::Sandbox::User=root -o Dir::State=$PWD/apt/state
        -o Dir::State::status=$PWD/apt/status -o Dir::Cache=$PWD/apt/cache"
    apt-get $lists update >apt.log 2>&1 || skip "apt has no lists for arm64; see $PWD/apt.log"
    package=$(apt-cache $lists depends linux-image-cloud-arm64 2>>apt.log | awk '/Depends: linux-image-/ { print $2; exit }')
    [ -n "$package" ] || skip "apt knows no linux-image-cloud-arm64; see $PWD/apt.log"
    apt-get $lists download "$package" >>apt.log 2>&1 || skip "$package cannot be downloaded; see $PWD/apt.log"
    dpkg-deb -x linux-image-*.deb kernel
    cp kernel/boot/vmlinuz-* vmlinuz
    rm -rf kernel apt linux-image-*.deb
fi

build() { # NAME FLAG...
    name=$1
    shift
    aarch64-linux-gnu-gcc -static -O2 -g -D_GNU_SOURCE -std=gnu11 -DPV_TEST_EMULATED -Wall -Wextra -Werror -I"$csrc" -I"$here" "$@" -o "root/$name" -pthread
}
rm -rf root
mkdir -p root/proc root/sys root/dev
for test in adds area ring magazine trace context alias face break; do
    build "$test" "$here/test_$test.c" "$csrc"/percpu/*.c
done
build inject-ring -DPV_PERCPU_INJECT=100 "$here/test_ring.c" "$csrc"/percpu/*.c
build norseq "$here/norseq.c"
build init "$here/aarch64_init.c"
(cd root && find . | cpio -o -H newc --quiet) >initrd

status=0
timeout 600 qemu-system-aarch64 -machine virt -cpu max -smp 2 -m 512 -nodefaults -no-reboot -nographic -serial stdio \
    -kernel vmlinuz -initrd initrd -append "console=ttyAMA0 quiet panic=-1" </dev/null >console.log 2>&1 || status=$?
cat console.log
[ $status = 0 ] || { echo "the guest did not end by itself (status $status)"; exit 1; }
grep -q '^all passed' console.log

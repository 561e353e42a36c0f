#!/bin/sh
# The same tests where this library registers threads for rseq, and where nobody can. Usage: modes.sh FOLDER
set -eu
cd "$1"
for test in adds area ring magazine trace; do
    [ $test = adds ] && arguments=$((1 << 24)) || arguments=
    echo "-- $test, registered by this library"
    GLIBC_TUNABLES=glibc.pthread.rseq=0 ./percpu-$test $arguments
    echo "-- $test, no rseq"
    ./percpu-norseq "$PWD/percpu-$test" $arguments
done
echo "-- slice, registered by this library"
GLIBC_TUNABLES=glibc.pthread.rseq=0 ./percpu-slice
echo "-- areas made for one CPU"
./percpu-adds $((1 << 24)) 1

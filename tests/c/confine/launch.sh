#!/bin/sh
# Runs hv-confine through every step and most failures. Usage: launch.sh LAUNCHER WRITABLE_DIR
# (WRITABLE_DIR is shown in each private root: a launcher built for coverage writes its data there.)
set -u
launcher=$1
data=$2
failed=0
uid="--uid 2000400 --gid 2000400"
user=""
[ "$(id -u)" = 0 ] && user=$uid
tools=""
for path in /usr /bin /lib /lib64; do [ -e $path ] && tools="$tools --ro $path"; done

# expect WHAT EXIT_CODE TEXT COMMAND...: the command ends so and its output, complaints too, holds the text.
expect() {
    what=$1 code=$2 text=$3
    shift 3
    output=$("$@" 2>&1)
    status=$?
    case $output in *"$text"*) found=yes ;; *) found=no ;; esac
    if [ "$status" != "$code" ] || [ $found = no ]; then
        echo "FAILED: $what: exit code $status (wanted $code), output: $output (wanted: $text)"
        failed=1
    fi
}

sh="/bin/sh -c"
expect help 0 "usage: hv-confine" $launcher --help
expect "plain run" 7 "out" $launcher $user --filter -- $sh 'echo out; exit 7'
expect "own streams" 0 "to the third" $launcher $user --stdin 0 --stdout 2 --stderr 1 -- $sh 'echo to the third'
expect "bad words" 125 "unknown option" $launcher --what x -- /bin/true
expect "no program" 125 "executing /nowhere: No such file" $launcher $user -- /nowhere
expect "no directory" 125 "entering /nowhere" $launcher $user --chdir /nowhere -- /bin/true
expect "no cgroup" 125 "writing /nowhere/cgroup.procs" $launcher $user --cgroup /nowhere -- /bin/true
expect "no descriptor" 125 "using descriptor 1234" $launcher $user --stdin 1234 -- /bin/true
expect "nothing to keep" 125 "keeping descriptor 1234" $launcher $user --keep-fd 1234 -- /bin/true
expect limits 0 "0 64" $launcher $user --rlimit core=0 --rlimit nofile=64:128 --oom-score-adj 500 -- \
    $sh 'echo $(ulimit -c) $(ulimit -n)'
expect "limit above the hard one" 0 "64" \
    sh -c "ulimit -n 64; $launcher $user --rlimit nofile=unlimited -- $sh 'ulimit -n'"
expect "clean environment" 0 "A=b" $launcher $user --env A=b -- /usr/bin/env

in_chroot=no # where / is no mount point, no root can be exchanged for another
case $($launcher $user --private-root $tools -- /bin/true 2>&1) in *"cutting mount propagation: Invalid"*) in_chroot=yes ;; esac
if [ $in_chroot = yes ]; then
    echo "SKIPPED: what needs a private root (this is a chroot)"
elif [ "$(id -u)" = 0 ]; then
    view="$uid --private-root $tools --rw $data"
    expect "root without a user" 125 "root must name a user" $launcher -- /bin/true
    expect "private root" 0 "2000400 no" $launcher $view --new-network --filter --dev net/tun --chdir "$data" -- \
        $sh 'echo $(id -u) $([ -e /etc ] || echo no)'
    expect "nothing shown twice is lost" 0 "net null urandom zero" $launcher $view --dev net/tun -- \
        $sh 'echo $(ls /dev)'
    expect "missing path" 125 "showing /nowhere: No such file" $launcher $view --ro /nowhere -- /bin/true
    for group in /sys/fs/cgroup/pids /sys/fs/cgroup; do
        if mkdir "$group/hv-launch-test" 2>/dev/null; then
            expect cgroup 0 hv-launch-test $launcher $uid --cgroup "$group/hv-launch-test" -- /bin/cat /proc/self/cgroup
            rmdir "$group/hv-launch-test"
            break
        fi
    done
    setpriv="setpriv --reuid 2000401 --regid 2000401 --clear-groups"
    if $setpriv unshare -U true 2>/dev/null; then
        expect "user namespace" 0 "2000401" $setpriv $launcher --user-namespace --private-root $tools --rw "$data" -- \
            /usr/bin/id -u
        expect "not without a user namespace" 125 "making new namespaces" $setpriv $launcher --private-root -- /bin/true
        expect "no right to become another" 125 "Operation not permitted" $setpriv $launcher $uid -- /bin/true
    fi
fi
[ $failed = 0 ] && echo "ok: hv-confine launches"
exit $failed

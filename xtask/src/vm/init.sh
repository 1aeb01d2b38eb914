#!/sbin/busybox sh
# PID 1 of the machines that `cargo xtask vm` boots. It mounts file systems, brings up lo, loads modules, runs
# /plan.sh, prints a verdict on the second serial line, whose name is in /output, and powers off. The initramfs has
# nothing but this, busybox, and what the plan runs. The host reads the lines that begin with `selfconn-guest: ` and `FACT `:
# xtask/src/vm/boot.rs.

b=/sbin/busybox
say() { echo "selfconn-guest: $*"; }
read_first() { $b cat "$1" 2>/dev/null; }

# The first three are needed; a kernel may refuse the others, and then a test that needs one fails with a
# better reason.
refused=
for mount in proc:/proc sysfs:/sys devtmpfs:/dev tmpfs:/tmp tmpfs:/run tracefs:/sys/kernel/tracing \
    debugfs:/sys/kernel/debug securityfs:/sys/kernel/security bpf:/sys/fs/bpf cgroup2:/sys/fs/cgroup; do
    type=${mount%%:*} target=${mount#*:}
    $b mkdir -p "$target" 2>/dev/null
    $b mount -t "$type" "$type" "$target" 2>/dev/null || refused="$refused $target"
done

# The kernel's console is another line: a kernel message within a line of a test would make both unreadable.
output=/dev/$(read_first /output)
exec </dev/null >"$output" 2>&1
$b stty raw -echo -F "$output"
for target in $refused; do say "mount $target: refused"; done

end() {
    if [ "$1" = 0 ]; then say "all passed"; else say "not all passed"; fi
    # stty waits until the output has left the machine.
    $b stty -F "$output" raw >/dev/null
    $b sleep 0.2
    $b poweroff -f
}

# Runs a program with only these variables: `run NAME VARIABLE=VALUE... PROGRAM ARGUMENT...`.
failed=0
run() {
    name=$1
    shift
    say "start $name"
    (cd /tmp && exec $b env -i PATH=/bin RUST_BACKTRACE=1 "$@")
    status=$?
    if [ $status = 0 ]; then say "$name: passed"; else say "$name: failed, exit status $status"; failed=1; fi
}

# After the deadline: each process of user space, and where in the kernel each of its threads is.
show_processes() {
    for process in /proc/[0-9]*; do
        command=$($b tr '\0' ' ' <"$process/cmdline" 2>/dev/null)
        [ -n "$command" ] || continue
        say "$process $command"
        for thread in "$process"/task/*; do
            say "  $(read_first "$thread/comm") $($b grep State "$thread/status")"
            read_first "$thread/stack"
        done
    done
}

# Service managers set this limit on descriptors; the kernel's is lower.
ulimit -n 524288
$b ip link set lo up || say "lo is down"
while read -r module; do
    $b insmod "/modules/$module" || say "load $module: refused"
done </modules/order
echo "FACT kernel=$(read_first /proc/sys/kernel/osrelease)"
lockdown=$(read_first /sys/kernel/security/lockdown)
lockdown=${lockdown:-[unknown]}
lockdown=${lockdown#*[}
echo "FACT lockdown=${lockdown%%]*}"
echo "FACT cpus=$($b nproc)"
read -r uptime _ </proc/uptime
echo "FACT uptime_s=$uptime"

deadline=$($b cat /deadline)
(
    $b sleep "$deadline"
    echo
    say "the deadline of $deadline s has passed; processes:"
    show_processes
    end 1
) &
. /plan.sh
end $failed

#!/bin/sh
# The life of the package, run by systemd in the machine that `cargo xtask service` boots: a line for each step, a
# verdict, and the end of the machine. The host reads the lines that begin with `selfconn-guest: `:
# xtask/src/vm/boot.rs. Arguments: after how many seconds to give up; the package's format, deb or rpm; the serial line.
#
# Each step is a function. It runs in a subshell with `set -e`; its last line of output is what it found.
# Steps pass values to later steps by files in $state.

export LC_ALL=C DEBIAN_FRONTEND=noninteractive
unit=selfconn.service
log=/var/log/selfconn/events.jsonl
state=/run/selfconn-guest
# The machine is emulated, and may be slow.
timeout_s=90
# `systemd-analyze security` calls a service without any protection 10.
max_exposure=2.4

say() { echo "selfconn-guest: $*"; }
fail() {
    echo "$*"
    exit 1
}
property() { systemctl show --value --property "$1" $unit; }

# Waits until a command succeeds: `wait_for WHAT COMMAND...`.
wait_for() {
    what=$1
    shift
    end=$(($(date +%s) + timeout_s))
    until "$@" >/dev/null 2>&1; do
        [ "$(date +%s)" -lt $end ] || fail "$what: not within $timeout_s s"
        sleep 0.1
    done
}

# Waits for the service to be active with another process than in $state/pid, and notes the new one there.
wait_for_new_process() {
    old=$(cat $state/pid)
    is_active() {
        [ "$(property ActiveState)" = active ] && [ "$(property MainPID)" != "$old" ] && [ "$(property MainPID)" != 0 ]
    }
    wait_for "the service is active with a new process" is_active
    property MainPID >$state/pid
}

# Makes a self-connection, and waits until the log has its end. Its port is in $state/port.
connect_to_self() {
    selfconn repro --json | jq -s 'map(.port // empty) | last' >$state/port
    has_event() { jq -e -s "any(.event == \"$1\" and .port == $(cat $state/port))" $log; }
    wait_for "the log has the connection" has_event established
    wait_for "the log has its end" has_event closed
}

# All files, except virtual file systems and what apt, dpkg, rpm and ldconfig note.
list_files() {
    find / \( -path /proc -o -path /sys -o -path /dev -o -path /run -o -path /tmp -o -path /var/tmp \
        -o -path /var/lib/apt -o -path /var/cache/apt -o -path /var/log/apt \
        -o -path /var/lib/dpkg -o -path /var/lib/rpm -o -path /root/.rpmdb -o -path /var/cache/ldconfig \) \
        -prune -o -print | sort
}

# Installs the first or the second revision, also over the same one. rpm does not know what dpkg has installed, so it
# would miss /bin/sh.
install_package() {
    case $format in
    deb) dpkg --install "/packages/$1.deb" ;;
    rpm) rpm --upgrade --replacepkgs --nodeps "/packages/$1.rpm" ;;
    esac
}

system_is_up() {
    mkdir -p $state
    echo 0 >$state/pid
    is_up() { case $(systemctl is-system-running) in starting | initializing) return 1 ;; esac; }
    wait_for "systemd has started" is_up
    # The preset of the distributions with rpm.
    if [ $format = rpm ]; then
        mkdir -p /usr/lib/systemd/system-preset
        echo "disable *" >/usr/lib/systemd/system-preset/99-default-disable.preset
    fi
    list_files >$state/files
    # A unit of the system may fail in a machine that is all memory.
    echo "$(systemctl is-system-running || true), $(systemctl --version | head -n 1)"
}

# The first installation, as documented. There is no network: it must succeed with what the system has.
install_as_documented() {
    case $format in
    deb)
        # In a system that was unpacked, dpkg installs with --force-depends (rootfs.rs), which apt-get may not accept.
        if [ -e /second-stage ]; then
            by=dpkg
            install_package first
        else
            by=apt-get
            apt-get --yes install /packages/first.deb
        fi
        ;;
    rpm)
        # rpm itself provides rpmlib(...), and the package its own config(selfconn).
        required=$(rpm --query --package --requires /packages/first.rpm |
            grep -v -e '^rpmlib(' -e '^config(selfconn) = ' | sort --unique)
        [ "$required" = /bin/sh ] || fail "the package requires: $required"
        by=rpm
        install_package first
        ;;
    esac
}

installed() {
    install_as_documented
    if [ $format = rpm ]; then
        [ "$(systemctl is-enabled $unit)" = disabled ] || fail "the service is enabled against the preset"
        [ "$(property ActiveState)" = inactive ] || fail "the service is $(property ActiveState)"
        systemctl enable --now $unit
    fi
    [ "$(systemctl is-enabled $unit)" = enabled ] || fail "the service is not enabled"
    echo "by $by: $(selfconn --version | head -n 1)"
}

active_when_hooks_are_live() {
    wait_for_new_process
    [ "$(property Type)" = notify ] || fail "the service does not notify systemd"
    # The log's first line is written when the hooks are live, and READY=1 is sent after that.
    [ "$(head -n 1 $log | jq -r .event)" = started ] || fail "active before it started"
    took=$(($(property ActiveEnterTimestampMonotonic) - $(property InactiveExitTimestampMonotonic)))
    echo "$((took / 1000)) ms to READY=1, $(grep VmRSS "/proc/$(cat $state/pid)/status")"
}

self_connection_in_log() {
    connect_to_self
    jq -c "select(.event == \"established\" and .port == $(cat $state/port))" $log >$state/event
    jq -e '.comm == "selfconn" and .owner == "witnessed"' $state/event || fail "no opener: $(cat $state/event)"
    jq -r '"port \(.port), opened by \(.comm) [\(.pid)]"' $state/event
}

self_connection_in_journal() {
    entry() {
        journalctl --no-pager --unit $unit --output json |
            jq -e -c -s "map(select(.SELFCONN_PORT == \"$(cat $state/port)\")) | first" >$state/entry
    }
    wait_for "the journal has it" entry
    jq -e '(.MESSAGE_ID | length) == 32 and (.MESSAGE | startswith("{") | not)' $state/entry ||
        fail "the entry is not for people, or has no MESSAGE_ID: $(cat $state/entry)"
    jq -r .MESSAGE $state/entry
}

capabilities_given_up() {
    # Bits 38 and 39 are CAP_PERFMON and CAP_BPF. Before 5.19 the kernel requires CAP_BPF for reading a map (SECURITY.md).
    oldest=$(printf '%s\n' 5.19 "$(uname -r)" | sort -V | head -n 1)
    if [ "$oldest" = 5.19 ]; then given_up=3; else given_up=1; fi
    for set in CapPrm CapEff; do
        bits=$(awk "/^$set/ { print \$2 }" "/proc/$(cat $state/pid)/status")
        [ $((0x$bits >> 38 & given_up)) = 0 ] || fail "$set still has CAP_BPF or CAP_PERFMON: $bits"
        found="$found $set $bits"
    done
    echo "$found"
}

exposes_little() {
    level=$(systemd-analyze security --no-pager $unit | sed -n 's/.*Overall exposure level.*: \([0-9.]*\).*/\1/p')
    awk "BEGIN { exit !(\"$level\" != \"\" && $level + 0 <= $max_exposure) }" || fail "exposure level '$level'"
    echo "exposure level $level"
}

rotated() {
    old_port=$(cat $state/port)
    logrotate --force /etc/logrotate.d/selfconn
    [ -e $log.1 ] || fail "there is no $log.1"
    connect_to_self
    jq -e -s "any(.port == $old_port)" $log.1 || fail "$log.1 lost events"
    jq -e -s "all(.port != $(cat $state/port))" $log.1 || fail "the daemon still writes to $log.1"
    [ "$(property MainPID)" = "$(cat $state/pid)" ] || fail "the rotation ended the daemon"
    [ -z "$(tail -c 1 $log.1)" ] || fail "$log.1 ends in an incomplete line"
    echo "$(wc -l <$log.1) lines before, $(wc -l <$log) after"
}

restarted_after_sigkill() {
    systemctl kill --signal=KILL $unit
    wait_for_new_process
    [ "$(property NRestarts)" = 1 ] || fail "restarted $(property NRestarts) times"
    connect_to_self
    echo "as [$(cat $state/pid)]"
}

upgraded() {
    install_package second
    wait_for_new_process
    case $format in
    deb) version=$(dpkg-query --show --showformat '${Version}' selfconn) ;;
    rpm) version=$(rpm --query --queryformat '%{VERSION}-%{RELEASE}' selfconn) ;;
    esac
    case $version in *-2) ;; *) fail "the version is $version" ;; esac
    connect_to_self
    echo "to $version, as [$(cat $state/pid)]"
}

ports_reserved() {
    reserve=selfconn-reserve.service
    mkdir -p /etc/selfconn
    # A service that is down, so no listener shows its port.
    echo "44446 127.0.0.1" >/etc/selfconn/services
    audit() { selfconn audit --netns self --services /etc/selfconn/services --json; }
    if audit >$state/audit; then fail "not at risk before: $(cat $state/audit)"; fi
    cp /packages/$reserve /etc/systemd/system/
    systemctl daemon-reload
    systemctl start $reserve || fail "$(systemctl status --no-pager --full $reserve)"
    reserved=$(cat /proc/sys/net/ipv4/ip_local_reserved_ports)
    audit >$state/audit || fail "at risk with $reserved: $(cat $state/audit)"
    jq -e . /run/selfconn-audit.json || fail "the unit wrote no audit"
    # The system is as it was before.
    rm -r /etc/selfconn /etc/systemd/system/$reserve /etc/sysctl.d/90-selfconn.conf
    rmdir --ignore-fail-on-non-empty /etc/sysctl.d
    echo >/proc/sys/net/ipv4/ip_local_reserved_ports
    systemctl daemon-reload
    echo "$reserved"
}

# Restarts the service with the drop-in of this name, or without any.
switch_on() {
    drop_ins=/etc/systemd/system/$unit.d
    mkdir $drop_ins
    cp "/packages/$1" $drop_ins/
    systemctl daemon-reload
    systemctl restart $unit
    wait_for_new_process
}
switch_off() {
    rm -r $drop_ins
    systemctl daemon-reload
    systemctl restart $unit
    wait_for_new_process
}

destroyed_by_the_remedy() {
    switch_on remedy.conf
    selfconn repro --hold 600 --json >$state/held &
    client=$!
    has_port() { jq -s -e 'map(.port // empty) | last' $state/held; }
    wait_for "a self-connection" has_port
    port=$(has_port)
    is_destroyed() { jq -e -s "any(.event == \"remedied\" and .port == $port and .result == \"destroyed\")" $log; }
    wait_for "the drop-in has it destroyed" is_destroyed
    wait $client || true
    switch_off
    echo "port $port"
}

refused_by_the_guard() {
    switch_on guard.conf
    if refused=$(selfconn repro --mode bind 2>&1); then fail "a self-connection was made: $refused"; fi
    prevented() { jq -e -s 'map(select(.event == "prevented" and .comm == "selfconn").port) | last // empty' $log; }
    wait_for "the log has what was refused" prevented
    port=$(prevented)
    switch_off
    # Without the drop-in the same client is connected to itself.
    selfconn repro --mode bind
    echo "port $port"
}

files_are_unchanged() {
    case $format in
    # dpkg leaves documents out in this system.
    deb) changed=$(dpkg --verify selfconn | grep -v ^missing || true) ;;
    rpm) changed=$(rpm --verify --nodeps selfconn || true) ;;
    esac
    [ -z "$changed" ] || fail "$changed"
    echo "by $format"
}

stopped() {
    systemctl stop $unit
    [ "$(property Result)" = success ] || fail "stopped with $(property Result)"
    [ "$(tail -n 1 $log | jq -r .event)" = stopped ] || fail "the last event is $(tail -n 1 $log)"
    tail -n 1 $log
}

stays_disabled_when_installed_again() {
    systemctl disable $unit
    install_package second
    [ "$(systemctl is-enabled $unit || true)" = disabled ] || fail "it is enabled"
    [ "$(property ActiveState)" = inactive ] || fail "it is $(property ActiveState)"
    systemctl enable --now $unit
    echo 0 >$state/pid
    wait_for_new_process
    echo "and enabled again"
}

removed() {
    case $format in
    deb) dpkg --remove selfconn && kept="$log /etc/logrotate.d/selfconn" ;;
    # rpm keeps a configuration only if somebody has changed it.
    rpm) rpm --erase --nodeps selfconn && kept=$log ;;
    esac
    [ ! -e /usr/bin/selfconn ] || fail "the binary is still there"
    for file in $kept; do
        [ -e "$file" ] || fail "$file is gone"
    done
    [ "$(property ActiveState)" = inactive ] || fail "the service is $(property ActiveState)"
    echo "kept: $kept"
}

purged() {
    case $format in
    deb) dpkg --purge selfconn ;;
    # There is no such thing with rpm.
    rpm) rm -r /var/log/selfconn /var/log/private/selfconn ;;
    esac
    list_files >$state/files.after
    # The system itself writes into these directories.
    left=$(comm -13 $state/files $state/files.after |
        grep -v -E '^/var/(log|lib/systemd|lib/logrotate)/' || true)
    # Of the directories that packages share, a system with rpm has these.
    shared='/usr/share/(licenses|man/man1|fish(/vendor_completions.d)?|zsh/site-functions)'
    [ $format = deb ] || left=$(echo "$left" | grep -v -x -E "$shared" || true)
    # What this machine was booted with stays.
    left="$left$(grep selfconn $state/files.after | grep -v -e selfconn-service-guest -e ^/packages/ || true)"
    [ -z "$left" ] || fail "left behind: $left"
    gone=$(comm -23 $state/files $state/files.after)
    [ -z "$gone" ] || fail "removed with it: $gone"
    echo "$(wc -l <$state/files) files, as before"
}

show_state() {
    systemctl status --no-pager --full $unit
    journalctl --no-pager --lines=40 --unit $unit
    systemctl --no-pager --failed
}

end() {
    if [ "$1" = 0 ]; then say "all passed"; else say "not all passed"; fi
    stty -F "$line" raw
    sleep 0.2
    systemctl poweroff --force --force
}

[ -e "/packages/first.$2" ] || fail "this installs and purges packages, and powers off the machine it runs on"
deadline=$1
format=$2
line=/dev/$3
exec </dev/null >"$line" 2>&1
stty -F "$line" raw
(
    sleep "$deadline"
    say "the deadline of $deadline s has passed"
    show_state
    end 1
) &
failed=0
for step in system_is_up installed active_when_hooks_are_live self_connection_in_log self_connection_in_journal \
    capabilities_given_up exposes_little rotated restarted_after_sigkill upgraded ports_reserved destroyed_by_the_remedy \
    refused_by_the_guard files_are_unchanged stopped stays_disabled_when_installed_again removed purged; do
    output=$(
        set -e
        $step 2>&1
    )
    if [ $? = 0 ]; then
        say "$step: passed: $(echo "$output" | tail -n 1)"
    else
        say "$step: FAILED: $output"
        show_state
        failed=1
    fi
done
end $failed

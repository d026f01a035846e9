#!/bin/sh
# The first process of the guest image: loads the virtio modules, then runs what the host sends over a virtio-serial
# port (the other end is ringstone.hypervisor.guest).
#
# Host to guest, one line a command:   ID BASE64-OF-A-SHELL-SCRIPT
# Guest to host, at each boot:         RINGSTONE-GUEST-READY BOOT-ID
# Guest to host, when a command ends:  REPLY ID EXIT-CODE STDOUT-BYTES STDERR-BYTES, then those bytes
#
# Commands run beside each other; one writer sends the replies, so that they never mix.

export PATH=/bin:/sbin:/usr/bin:/usr/sbin HOME=/root TERM=dumb
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t tmpfs tmpfs /run
ulimit -n 65536

while read -r module; do
    insmod "/modules/$module" || echo "ringstone-guest: cannot load $module"
done </modules/order

# The port's name arrives a moment after the driver is loaded, and busybox has nothing that waits for a uevent.
port=
tries=0
while [ -z "$port" ]; do
    for name in /sys/class/virtio-ports/*/name; do
        if [ -e "$name" ] && [ "$(cat "$name")" = ringstone.agent ]; then
            port=/dev/$(basename "$(dirname "$name")")
        fi
    done
    tries=$((tries + 1))
    if [ "$tries" -gt 1500 ]; then
        echo "ringstone-guest: no virtio-serial port named ringstone.agent; powering off"
        poweroff -f
    fi
    [ -n "$port" ] || usleep 20000
done

mkfifo /run/done
exec 3<>"$port" 4<>/run/done

run() {
    job=/run/job.$1
    mkdir "$job"
    printf %s "$2" | base64 -d >"$job/script"
    sh "$job/script" </dev/null >"$job/out" 2>"$job/err" 3>&- 4>&-
    echo $? >"$job/code"
    echo "$1" >&4
}

send_replies() {
    while read -r id <&4; do
        job=/run/job.$id
        read -r code <"$job/code"
        printf 'REPLY %s %s %s %s\n' "$id" "$code" "$(stat -c %s "$job/out")" "$(stat -c %s "$job/err")" >&3
        cat "$job/out" "$job/err" >&3
        rm -r "$job"
    done
}

read -r boot_id </proc/sys/kernel/random/boot_id
printf '\nRINGSTONE-GUEST-READY %s\n' "$boot_id" >&3
echo "ringstone-guest: ready"
send_replies &

while read -r id script <&3; do
    run "$id" "$script" &
done
echo "ringstone-guest: the host closed the port; powering off"
poweroff -f

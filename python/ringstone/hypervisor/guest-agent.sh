#!/bin/sh
# Runs what the host sends over a virtio-serial port (the other end is ringstone.hypervisor.guest). Usage: agent PORT
#
# Host to guest, one line a command:   ID BASE64-OF-A-SHELL-SCRIPT
# Guest to host, at each boot:         RINGSTONE-GUEST-READY BOOT-ID
# Guest to host, when a command ends:  REPLY ID EXIT-CODE STDOUT-BYTES STDERR-BYTES, then those bytes
#
# Commands run beside each other; one writer sends the replies, so that they never mix.

port=$1
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

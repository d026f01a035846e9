#!/bin/sh
# The first process of the guest image: loads the virtio modules, virtio_blk with what the kernel's command line says of it
# (virtio_blk.NAME=VALUE), and waits for the virtio-serial port, unless that names another port (ringstone.agent=/dev/ttyS1).
# Then it becomes the agent (guest-agent.sh), or, where the command line names a disk by its serial number
# (ringstone.root=SERIAL), hands over to the init of the system on that disk, and the agent is a service of that system's
# systemd.

export PATH=/bin:/sbin:/usr/bin:/usr/sbin HOME=/root TERM=dumb
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t tmpfs -o mode=755 tmpfs /run
ulimit -n 65536

port=
root=
parameters=
for word in $(cat /proc/cmdline); do
    case $word in
        virtio_blk.*) parameters="$parameters ${word#virtio_blk.}" ;;
        ringstone.root=*) root=${word#ringstone.root=} ;;
        ringstone.agent=*)
            port=${word#ringstone.agent=}
            stty -F "$port" raw -echo
            ;;
    esac
done

while read -r module; do
    given=
    [ "$module" != virtio_blk.ko ] || given=$parameters
    # shellcheck disable=SC2086 # several of them
    insmod "/modules/$module" $given || echo "ringstone-guest: cannot load $module"
done </modules/order

# The port's name arrives a moment after the driver is loaded, and busybox has nothing that waits for a uevent.
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

[ -n "$root" ] || exec /agent "$port"

disk=
for name in /sys/block/vd*/serial; do
    if [ -e "$name" ] && [ "$(cat "$name")" = "$root" ]; then
        disk=/dev/$(basename "$(dirname "$name")")
    fi
done
if [ -z "$disk" ] || ! mount "$disk" /mnt; then
    echo "ringstone-guest: no disk $root that could be mounted; powering off"
    poweroff -f
fi
# systemd takes a /run that is mounted already, so nothing of the agent is in the disk's image.
mkdir -p /run/systemd/system/multi-user.target.wants
cp /agent /run/ringstone-agent
cat >/run/systemd/system/ringstone-agent.service <<END
[Service]
ExecStart=/bin/sh /run/ringstone-agent $port
KillMode=mixed
END
ln -s ../ringstone-agent.service /run/systemd/system/multi-user.target.wants/
for mounted in run dev sys proc; do
    mount --move "/$mounted" "/mnt/$mounted"
done
exec switch_root /mnt /sbin/init

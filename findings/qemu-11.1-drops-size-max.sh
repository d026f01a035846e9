#!/usr/bin/env bash
# The vhost-user-blk device of QEMU 10.0.13 (and 7.2.22) hands a backend's VIRTIO_BLK_F_SIZE_MAX on to the guest; that of
# 11.1.3 does not, for old machine types neither. So a guest that was given it is refused by 11.1.3 when it migrates
# there: "Features ... unsupported", where the features named are all allowed, as the refused bit is left out. A backend
# that does not offer it has no such trouble. Here they are qemu-storage-daemon 10.0.13, which offers it, and 11.1.3.
# What a user should do: have a backend that does not offer size_max before guests start. Ringstone does not.
# Without the migration capability return-path the source believes that it has succeeded.
# Needs root (mmdebstrap, chroot, mount namespaces) and mmdebstrap. Takes some 400 MB of downloads.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mirror=http://deb.debian.org/debian
unpack() { # NAME SUITE VERSION MORE
    printf 'deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] %s %s main\n' "$mirror" trixie "$mirror" "$2" |
        sort -u >"$folder/$1.list"
    mmdebstrap --quiet --mode=root --variant=extract --aptopt="APT::Default-Release \"$2\"" \
        --aptopt='APT::Install-Recommends "false"' --include="base-files,coreutils,libc-bin,qemu-system-x86=$3,qemu-utils=$3$4" \
        trixie "$folder/$1" - <"$folder/$1.list"
    chroot "$folder/$1" /usr/sbin/ldconfig
    chroot "$folder/$1" qemu-system-x86_64 --version | head -n 1
}
unpack 10.0 trixie 1:10.0.13+ds-0+deb13u1 ,linux-image-cloud-amd64,busybox-static
unpack 11.1 trixie-backports 1:11.1.3+ds-1~bpo13+1 ""
mkdir -p "$folder/shared" "$folder/10.0/mnt" "$folder/11.1/mnt"

# A guest that loads the driver and waits.
mkdir -p "$folder/guest/bin"
cp "$folder/10.0/usr/bin/busybox" "$folder/guest/bin/"
cp "$folder"/10.0/boot/vmlinuz-* "$folder/shared/vmlinuz"
python3 -c 'import lzma, sys; sys.stdout.buffer.write(lzma.open(sys.argv[1]).read())' \
    "$folder"/10.0/usr/lib/modules/*/kernel/drivers/block/virtio_blk.ko.xz >"$folder/guest/virtio_blk.ko"
cat >"$folder/guest/init" <<'INIT'
#!/bin/busybox sh
busybox insmod /virtio_blk.ko
echo driver loaded
exec busybox sleep 1000000
INIT
chmod +x "$folder/guest/init"
(cd "$folder/guest" && find . | bin/busybox cpio -o -H newc 2>/dev/null) >"$folder/shared/initrd"

cat >"$folder/move.py" <<'PYTHON'
import contextlib, json, os, socket, subprocess, sys, time

folder = sys.argv[1]
ENTER = 'mount --bind "$0/shared" "$0/$1/mnt" && root=$0/$1 && shift && exec chroot "$root" "$@"'
MONITOR = {"10.0": ["-mon", "chardev=monitor,mode=control"], "11.1": ["-object", "monitor-qmp,id=m,chardev=monitor"]}

def run(version, *command, fds=()):
    return subprocess.Popen(["unshare", "--mount", "sh", "-c", ENTER, folder, version, *command],
                            pass_fds=fds, stdin=subprocess.DEVNULL)

def disk(stack, name, version):
    daemon = run(version, "qemu-storage-daemon", "--blockdev", "driver=null-co,node-name=n,size=67108864,read-zeroes=on", "--export",
                 f"type=vhost-user-blk,id=e,node-name=n,addr.type=unix,addr.path=/mnt/{name}.sock,writable=on,num-queues=2")
    stack.callback(daemon.wait)
    stack.callback(daemon.terminate)
    while not os.path.exists(f"{folder}/shared/{name}.sock"):
        time.sleep(0.05)

def qemu(stack, version, name, *more):
    ours, theirs = socket.socketpair()
    process = run(version, "qemu-system-x86_64", "-nodefaults", "-display", "none", "-accel", "tcg", "-m", "256M",
                  "-machine", "pc-q35-10.0,memory-backend=memory", "-object", "memory-backend-memfd,id=memory,size=256M,share=on",
                  "-chardev", f"socket,id=disk,path=/mnt/{name}.sock",
                  "-device", "vhost-user-blk-pci,chardev=disk,queue-size=1024,num-queues=2",
                  "-kernel", "/mnt/vmlinuz", "-initrd", "/mnt/initrd", "-append", "console=ttyS0 mitigations=off",
                  "-serial", f"file:/mnt/{name}.console",
                  "-chardev", f"socket,id=monitor,fd={theirs.fileno()}", *MONITOR[version], *more, fds=[theirs.fileno()])
    stack.callback(process.wait)
    stack.callback(process.kill)
    theirs.close()
    file = ours.makefile("rw")
    def execute(command, **arguments):
        file.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        file.flush()
        while True:
            message = json.loads(file.readline())
            if "return" in message:
                return message["return"]
    file.readline()
    execute("qmp_capabilities")
    return execute

def move(source, destination, backend):
    for left in ("a.sock", "b.sock", "a.console", "b.console", "move.sock"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{folder}/shared/{left}")
    with contextlib.ExitStack() as stack:
        disk(stack, "a", backend)
        disk(stack, "b", backend)
        here = qemu(stack, source, "a")
        while b"driver loaded" not in open(f"{folder}/shared/a.console", "rb").read():
            time.sleep(0.2)
        qemu_there = qemu(stack, destination, "b", "-incoming", "unix:/mnt/move.sock")
        here("migrate-set-capabilities", capabilities=[{"capability": "return-path", "state": True}])
        with contextlib.suppress(OSError, ValueError):
            qemu_there("migrate-set-capabilities", capabilities=[{"capability": "return-path", "state": True}])
        here("migrate", uri="unix:/mnt/move.sock")
        while (status := here("query-migrate")["status"]) not in ("completed", "failed"):
            time.sleep(0.1)
    print(f"{source} to {destination} on a disk of {backend}: {status}", flush=True)
    return status

cases = {
    ("10.0", "10.0", "10.0"): "completed",
    ("11.1", "11.1", "10.0"): "completed",
    ("10.0", "11.1", "11.1"): "completed",
    ("10.0", "11.1", "10.0"): "failed",
}
sys.exit({case: move(*case) for case in cases} != cases)
PYTHON
timeout 240 python3 "$folder/move.py" "$folder"
echo "As seen: 11.1.3 refuses a guest that was given size_max."

#!/usr/bin/env bash
# QEMU 10.0.13 (Debian 13) gives every virtio queue 1024 entries, whatever `queue-size` says, and 128 is virtio-serial's own
# number. QEMU 11.1.3 (its backports) does as told, and refuses the state of such a queue when a guest migrates to it.
# What a user should do: give disks queue-size=1024 at both ends, and expect virtio-serial and virtio-rng to be refused.
# Needs root (mmdebstrap, chroot) and mmdebstrap. Takes some 400 MB of downloads.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mirror=http://deb.debian.org/debian
unpack() { # NAME SUITE VERSION
    printf 'deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] %s %s main\n' "$mirror" trixie "$mirror" "$2" |
        sort -u >"$folder/$1.list"
    mmdebstrap --quiet --mode=root --variant=extract --aptopt="APT::Default-Release \"$2\"" \
        --aptopt='APT::Install-Recommends "false"' --include="base-files,coreutils,libc-bin,qemu-system-x86=$3" \
        trixie "$folder/$1" - <"$folder/$1.list"
    chroot "$folder/$1" /usr/sbin/ldconfig
    chroot "$folder/$1" qemu-system-x86_64 --version | head -n 1
}
unpack old trixie 1:10.0.13+ds-0+deb13u1
unpack new trixie-backports 1:11.1.3+ds-1~bpo13+1

cat >"$folder/ask.py" <<'PYTHON'
import json, socket, subprocess, sys

folder, root, monitor = sys.argv[1:4]
ours, theirs = socket.socketpair()
qemu = subprocess.Popen(
    ["chroot", f"{folder}/{root}", "qemu-system-x86_64", "-nodefaults", "-display", "none", "-machine", "q35", "-accel", "tcg",
     "-drive", "driver=null-co,if=none,id=disk", "-device", "virtio-blk-pci,drive=disk,queue-size=256",
     "-device", "virtio-serial-pci", "-chardev", f"socket,id=monitor,fd={theirs.fileno()}", *monitor.split()],
    pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
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
sizes = {}
for device in execute("x-query-virtio"):
    sizes[device["name"]] = execute("x-query-virtio-queue-status", path=device["path"], queue=0)["vring-num-default"]
execute("quit")
qemu.wait()
print(root, "QEMU: entries of the first queue:", dict(sorted(sizes.items())))
wanted = {"old": {"virtio-blk": 1024, "virtio-serial": 1024}, "new": {"virtio-blk": 256, "virtio-serial": 128}}[root]
sys.exit(sizes != wanted)
PYTHON
python3 "$folder/ask.py" "$folder" old "-mon chardev=monitor,mode=control"
python3 "$folder/ask.py" "$folder" new "-object monitor-qmp,id=m,chardev=monitor"
echo "As seen: queue-size=256 is kept by 11.1.3 alone."

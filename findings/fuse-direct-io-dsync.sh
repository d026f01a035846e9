#!/usr/bin/env bash
# A FUSE filesystem whose files are open for direct I/O (FOPEN_DIRECT_IO, as with virtiofsd's cache=never or glusterfs's
# direct-io-mode) is not asked to sync by a write with RWF_DSYNC. The write is answered as if it were durable. With the same
# filesystem and O_DIRECT on a file that is not open so, the kernel sends FUSE_FSYNC behind the write.
# Seen with Linux 6.18 and mfusepy 3.1.1 on libfuse 3.14. Ringstone syncs by itself on FUSE (crates/blockdev/src/file.rs).
# Needs root, /dev/fuse, python3 with venv, and Debian's libfuse3.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet mfusepy==3.1.1
echo "Linux $(uname -r), mfusepy 3.1.1"
cat >"$folder/count.py" <<'PYTHON'
import mmap, os, stat, subprocess, sys, time
import mfusepy

class OneFile(mfusepy.Operations):
    use_ns = True
    def __init__(self, counter): self.data, self.counter = bytearray(4096), counter
    def getattr(self, path, fh=None):
        if path == "/":
            return {"st_mode": stat.S_IFDIR | 0o755, "st_nlink": 2}
        return {"st_mode": stat.S_IFREG | 0o600, "st_nlink": 1, "st_size": 4096}
    def readdir(self, path, fh): return [".", "..", "disk"]
    def open(self, path, flags): return 1
    def read(self, path, size, offset, fh): return bytes(self.data[offset:offset + size])
    def write(self, path, data, offset, fh):
        self.data[offset:offset + len(data)] = data
        return len(data)
    def fsync(self, path, datasync, fh):
        os.write(self.counter, b"s")
        return 0

def syncs(folder, direct_io):
    mount = f"{folder}/mount-{direct_io}"
    os.mkdir(mount)
    counted, counter = os.pipe()
    os.set_blocking(counted, False)
    child = os.fork()
    if child == 0:
        mfusepy.FUSE(OneFile(counter), mount, foreground=True, nothreads=True, fsname="one", direct_io=direct_io)
        os._exit(0)
    while not os.path.ismount(mount):
        time.sleep(0.01)
    try:
        fd = os.open(f"{mount}/disk", os.O_RDWR | os.O_DIRECT)
        block = mmap.mmap(-1, 4096)
        assert os.pwritev(fd, [block], 0, os.RWF_DSYNC) == 4096
        try:
            seen = len(os.read(counted, 100))
        except BlockingIOError:
            seen = 0
        os.close(fd)
    finally:
        subprocess.run(["umount", mount], check=True)
        os.waitpid(child, 0)
    return seen

without, with_it = (syncs(sys.argv[1], direct_io) for direct_io in (False, True))
print(f"syncs of one write with RWF_DSYNC: {without}, and {with_it} where files are open for direct I/O")
sys.exit(0 if (without, with_it) == (1, 0) else "this has changed")
PYTHON
"$folder/venv/bin/python" "$folder/count.py" "$folder"

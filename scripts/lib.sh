# shellcheck shell=bash
# Shared by the scripts beside it; sourced, never run.

# The lowest Rust that builds the workspace: what Cargo.toml promises.
rust_minimum() { sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml; }

# at_least HAVE WANT: dotted versions.
at_least() { [[ $(printf '%s\n' "$2" "$1" | sort -V | head -n 1) == "$2" ]]; }

on_debian() { command -v dpkg-query >/dev/null && command -v apt-get >/dev/null; }

# missing_packages PACKAGE...: those of them that are not installed, one a line.
missing_packages() {
    local package
    for package; do
        [[ $(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null) == installed ]] || echo "$package"
    done
}

# install_packages PACKAGE...: as root or through a sudo that asks nothing; otherwise say what to run.
install_packages() {
    local -a as_root=()
    if ((EUID != 0)); then
        if sudo -n true 2>/dev/null; then
            as_root=(sudo)
        else
            echo "Debian packages are missing and installing them takes root. Run this, then make again:" >&2
            echo "    sudo apt-get install -y $*" >&2
            return 1
        fi
    fi
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get update -q
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends "$@"
}

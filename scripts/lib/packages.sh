#!/bin/sh
# Installs Debian packages that are missing. Usage: packages.sh PACKAGE...
# Checks first, so that a machine which has everything needs neither root nor network.
set -eu

missing=
for package in "$@"; do
    dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed || missing="$missing $package"
done
[ -n "$missing" ] || exit 0

command -v apt-get >/dev/null || {
    echo "packages.sh: needs$missing, and this machine has no apt-get: install them by hand" >&2
    exit 1
}
root=
if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null || {
        echo "packages.sh: needs$missing: run 'apt-get install$missing' as root" >&2
        exit 1
    }
    root=sudo
fi
echo "packages: installing$missing" >&2
export DEBIAN_FRONTEND=noninteractive
# Deadlines: a mirror that hangs must not hang the caller.
timeout 300 $root apt-get -o Acquire::Retries=3 -o DPkg::Lock::Timeout=120 update -qq >&2
# shellcheck disable=SC2086 # a list of package names
timeout 900 $root env DEBIAN_FRONTEND=noninteractive apt-get -o Acquire::Retries=3 -o DPkg::Lock::Timeout=120 \
    install -y -qq --no-install-recommends $missing >&2

#!/usr/bin/env bash
# Runs the image's install steps in a clean Debian root, without Docker, and then the package inside it.
# Needs root. debootstrap is installed if it is absent; apt and pip are configured there as they are here.
set -euo pipefail
cd "$(dirname "$0")/.."
[ "$(id -u)" = 0 ] || { echo "docker/check.sh: run it as root: it makes a root file system" >&2; exit 1; }
command -v debootstrap > /dev/null || { apt-get update -qq && apt-get install -qq -y debootstrap > /dev/null; }
root=$(mktemp -d)
chmod 755 "$root"
mounts=()
cleanup() {
    for mount in "${mounts[@]}"; do umount -l "$mount" || true; done
    rm -rf --one-file-system "$root"
}
trap cleanup EXIT

share() { # a file or folder of this machine, at the same place in the root, read-only
    [ -e "$1" ] || return 0
    if [ -d "$1" ]; then mkdir -p "$root$1"; else mkdir -p "$(dirname "$root$1")" && touch "$root$1"; fi
    mount --bind -o ro "$1" "$root$1"
    mounts+=("$root$1")
}

mirror=$(sed -nE 's/^(URIs: |deb (\[[^]]*\] )?)(https?:[^ ]+).*/\3/p' /etc/apt/sources.list /etc/apt/sources.list.d/* 2> /dev/null | head -1 || true)
debootstrap --variant=minbase bookworm "$root" "${mirror:-http://deb.debian.org/debian}" > "$root.log" 2>&1 || { tail -5 "$root.log"; exit 1; }
rm -f "$root.log"
apt-config dump | grep -E '^Acquire::https?::' > "$root/etc/apt/apt.conf.d/99host" || true
cp -L /etc/resolv.conf /etc/hosts "$root/etc/" 2> /dev/null || true
mkdir -p "$root/usr/local/share/ca-certificates" # its own ca-certificates package then trusts what this machine trusts
cp -L /usr/local/share/ca-certificates/*.crt "$root/usr/local/share/ca-certificates/" 2> /dev/null || true
mount -t proc proc "$root/proc" && mounts+=("$root/proc")
mount --rbind /dev "$root/dev" && mount --make-rslave "$root/dev" && mounts+=("$root/dev")

# pip as it is configured here: its settings, and the folders of wheels that they name
python3 -m pip config list 2> /dev/null | sed -nE "s/^[a-z]+\.([a-z-]+)='(.*)'$/\1 = \2/p" | { echo "[global]"; cat; } > "$root/etc/pip.conf"
for folder in $(grep -oE '(file://)?/[^ ,;"\\]+' "$root/etc/pip.conf" | sed 's|^file://||; s|/simple$||' | grep -v '^/etc/'); do share "$(realpath -m "$folder")"; done

mkdir -p "$root/srv/nft_ray"
git ls-files -z -- pyproject.toml constraints.txt README.md docker nft_ray actors deployments configs | xargs -0 cp --parents -t "$root/srv/nft_ray"
# `local` = pip's own index: the CPU wheel comes from where this machine takes it
chroot "$root" /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root DEBIAN_FRONTEND=noninteractive \
    TORCH_INDEX="${TORCH_INDEX:-}" $(env | grep -E '^(PIP_|https?_proxy|HTTPS?_PROXY|no_proxy|SSL_CERT|REQUESTS_CA)' || true) \
    sh -c 'cd /srv/nft_ray && sh docker/install.sh'
inside() { chroot "$root" /usr/bin/env -i PATH=/opt/nft_ray/bin:/usr/bin:/bin HOME=/root OMP_NUM_THREADS=1 sh -c "cd /tmp && $1"; }
inside 'python -c "import nft_ray.trainer, actors.roles, deployments.build"'
inside 'python -c "import torch; from nft_ray.cores.device import check_compiler; check_compiler(); torch.compile(torch.sin)(torch.ones(8))"'
inside 'nft-ray train /srv/nft_ray/configs/quickstart.yaml --dry-run'
inside 'nft-ray train /srv/nft_ray/configs/quickstart.yaml --local --set run.num_epochs=1 --set evaluation.num_steps=2 --set sampler.num_steps=4'
echo "docker/check.sh: the install steps of the image work in a clean root"

#!/usr/bin/env bash
# Makes .venv with all Python packages, and installs a Vulkan driver if there is none.
# Without a GPU the driver renders on the CPU. When nothing is missing, this only checks.
set -euo pipefail
cd "$(dirname "$0")"
say() { echo "setup: $*"; }
fail() { say "$*" >&2; exit 2; }
pip() { .venv/bin/python -m pip --disable-pip-version-check -qq "$@"; }

device=cpu
if nvidia-smi > /dev/null 2>&1; then device=cuda; fi

# 1. Python packages
stamp="$device $(sha256sum < requirements.txt)"
if [ "$(cat .venv/stamp 2> /dev/null)" != "$stamp" ]; then
  if ! pip --version > /dev/null 2>&1; then
    for python in python3.11 python3.12 python3 ""; do
      if "$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] not in [(3, 11), (3, 12)])' 2> /dev/null; then break; fi
    done
    [ "$python" ] || fail "needs Python 3.11 or 3.12 with its venv module (Debian, Ubuntu: apt-get install python3-venv)"
    say "making .venv with $("$python" --version)"
    "$python" -m venv --clear .venv
  fi
  torch=$(grep -o '^torch==[0-9.]*' requirements.txt)
  cpu_index=https://download.pytorch.org/whl/cpu
  if [ $device = cuda ]; then
    # A CPU build that was installed without a GPU would satisfy the pin.
    if ls -d .venv/lib/python*/site-packages/torch-*+cpu.dist-info > /dev/null 2>&1; then pip uninstall -y torch; fi
  elif timeout 5 .venv/bin/python -c "import urllib.request as r; r.urlopen('$cpu_index/torch/')" 2> /dev/null; then
    say "no NVIDIA GPU: installing the CPU build of $torch"
    pip install --no-deps --index-url $cpu_index "$torch"
  fi
  say "installing the packages of requirements.txt (a few minutes the first time)"
  pip install -r requirements.txt
  echo "$stamp" > .venv/stamp
fi

# 2. System libraries. ManiSkill imports OpenCV, which needs libGL. SAPIEN draws through Vulkan: by
#    the GPU's driver, or without a GPU by Mesa's lavapipe.
check="import cv2, sapien; sapien.render.RenderSystem('$device')"
packages="libgl1 libglib2.0-0 libvulkan1"
hint="a container must be started with NVIDIA_DRIVER_CAPABILITIES=all, else the driver's Vulkan part is not in it"
if [ $device = cpu ]; then
  packages="$packages mesa-vulkan-drivers"
  hint="to render on the CPU, SAPIEN needs a newer Mesa than 22.3 (25.0 is known to work)"
fi
missing() { ! error=$(.venv/bin/python -c "$check" 2>&1 | tail -n 1); }
if missing; then
  command -v apt-get > /dev/null || fail "$error; install what Debian calls $packages; $hint"
  apt="apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y $packages"
  if [ $device = cpu ] && grep -q bookworm /etc/os-release; then  # Debian 12's own Mesa, 22.3, is too old for SAPIEN
    apt="$apt -t bookworm-backports"
    uris=$(apt-get update --print-uris)
    if ! grep -q /dists/bookworm-backports/ <<< "$uris"; then
      mirror=$(sed -n "s#^'\(.*\)/dists/bookworm/.*#\1#p" <<< "$uris" | head -n 1)
      apt="echo 'deb ${mirror:-http://deb.debian.org/debian} bookworm-backports main' > /etc/apt/sources.list.d/bookworm-backports.list && $apt"
    fi
  fi
  [ "$(id -u)" = 0 ] || fail "$error; run this, then ./setup.sh again: sudo sh -c \"$apt\""
  say "$error; running: $apt"
  sh -c "$apt" > /dev/null || fail "apt-get failed"
  if missing; then fail "$error; $hint"; fi
fi
say "ready; activate with: source .venv/bin/activate"

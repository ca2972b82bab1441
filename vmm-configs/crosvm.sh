#!/bin/sh
# crosvm with the VM "web1" of ballast.toml; made with `ballast vm args web1 --vmm crosvm --whole`. Checked against
# crosvm's source of August 2026 (f1e797a), not tried; --vhost-user is there since November 2023.
# Give the rest of the VM as arguments, the kernel last:
#   vmm-configs/crosvm.sh --block path=web1.raw --params "root=/dev/vda1 console=ttyS0" vmlinux
# It never connects again, and ends the VM when the daemon ends: restart the daemon only after its VMs.
exec crosvm run \
  --cpus 4 \
  --mem 2048 \
  --vhost-user type=block,socket=/run/ballast/web1.sock,max-queue-size=256 \
  "$@"

#!/bin/sh
# cloud-hypervisor with the VM "web1" of ballast.toml; made with `ballast vm args web1 --vmm cloud-hypervisor --whole`.
# Tried with cloud-hypervisor 53 and a guest without an operating system that checked every page, not with a Linux.
# Give the rest of the VM as arguments, its other disks first, as they go behind the one --disk:
#   vmm-configs/cloud-hypervisor.sh path=web1.raw,image_type=raw --kernel vmlinux --cmdline "root=/dev/vdb1 console=hvc0"
# It takes at most as many queues as the VM has vCPUs, and connects again for 60 s after the daemon has gone; then the
# disk is dead until the VM starts anew.
exec cloud-hypervisor \
  --memory size=2048M,shared=on \
  --cpus boot=4 \
  --disk vhost_user=true,socket=/run/ballast/web1.sock,num_queues=4,queue_size=256 \
  "$@"

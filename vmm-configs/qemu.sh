#!/bin/sh
# QEMU with the VM "web1" of ballast.toml; made with `ballast vm args web1 --vmm qemu`.
# Give the rest of the VM as arguments: vmm-configs/qemu.sh -accel kvm -smp 4 -drive file=web1.qcow2,if=virtio
# Before QEMU 9.2 write reconnect=1 (`--qemu-before-9.2`) instead of reconnect-ms=100.
exec qemu-system-x86_64 \
  -m 2048M \
  -object memory-backend-memfd,id=ballast-memory,size=2048M,share=on \
  -numa node,memdev=ballast-memory \
  -chardev socket,id=ballast-socket,path=/run/ballast/web1.sock,reconnect-ms=100 \
  -device vhost-user-blk-pci,chardev=ballast-socket,num-queues=4 \
  "$@"

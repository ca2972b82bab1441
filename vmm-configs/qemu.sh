#!/bin/sh
# QEMU with the VM "web1" of ballast.toml; made with `ballast vm args web1 --vmm qemu --whole`. Tried with QEMU 7.2 and 10.0.
# Give the rest of the VM as arguments: vmm-configs/qemu.sh -accel kvm -smp 4 -drive file=web1.qcow2,if=virtio
# It connects again for as long as it lives, and keeps an in-flight region: the daemon may be killed at any time.

# Before 9.2 QEMU counts in seconds how long it waits before it connects again.
case $(qemu-system-x86_64 --version) in
*' version '[0-8].* | *' version 9.'[01].*) reconnect=reconnect=1 ;;
*) reconnect=reconnect-ms=100 ;;
esac
exec qemu-system-x86_64 \
  -m 2048M \
  -object memory-backend-memfd,id=ballast-memory,size=2048M,share=on \
  -numa node,memdev=ballast-memory \
  -chardev socket,id=ballast-socket,path=/run/ballast/web1.sock,$reconnect \
  -device vhost-user-blk-pci,chardev=ballast-socket,num-queues=4 \
  "$@"

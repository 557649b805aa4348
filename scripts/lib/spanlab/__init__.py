"""The scripts' library: Debian's kernel, initramfs images, virtual hosts, and what is run in them.

common    paths, deadlines, progress, child processes
kernel    Debian's stock kernel package: download, unpack, module load order
cpio      initramfs archives, written without root
images    the guest's and the virtual host's initramfs, and the static programs inside
agent     client of the program that executes commands in a virtual host
qemu      a virtual host with AMD's semantics (or a fast one, where the machine has KVM)
bochs     a virtual host with Intel's semantics
lab       several hosts on one switch: up, exec, down
"""

//! One host's part of a VM: wires memory, vCPUs, interrupts and devices together.

//! What crosses members besides pages: interrupts, device accesses, queue notifies.

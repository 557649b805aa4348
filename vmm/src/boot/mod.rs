//! Loads a kernel into guest memory and says in which state vCPU 0 starts.

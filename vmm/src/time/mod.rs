//! One TSC for the whole VM: clock filter and offsets.

//! A set of interrupt vectors, as ISR, IRR and TMR hold it: eight 32-bit registers.

use serde::{Deserialize, Serialize};

/// 256 bits, one per vector.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VectorSet([u32; 8]);

impl VectorSet {
    /// Puts a vector in.
    pub fn insert(&mut self, vector: u8) {
        self.0[usize::from(vector >> 5)] |= 1 << (vector & 31);
    }

    /// Takes a vector out.
    pub fn remove(&mut self, vector: u8) {
        self.0[usize::from(vector >> 5)] &= !(1 << (vector & 31));
    }

    /// Puts in or takes out.
    pub fn set(&mut self, vector: u8, present: bool) {
        if present { self.insert(vector) } else { self.remove(vector) }
    }

    /// Is it in?
    pub fn contains(&self, vector: u8) -> bool {
        self.0[usize::from(vector >> 5)] & (1 << (vector & 31)) != 0
    }

    /// The highest vector, which is the one of highest priority (SDM vol. 3, 11.8.3).
    pub fn highest(&self) -> Option<u8> {
        let word = self.0.iter().rposition(|w| *w != 0)?;
        let bit = 31 - self.0[word].leading_zeros();
        u8::try_from(word * 32).ok().zip(u8::try_from(bit).ok()).map(|(w, b)| w + b)
    }

    /// The 32 vectors from `32 * index` on as a register shows them; 0 beyond the last.
    pub fn word(&self, index: usize) -> u32 {
        self.0.get(index).copied().unwrap_or(0)
    }

    /// No vector is in.
    pub fn is_empty(&self) -> bool {
        self.0 == [0; 8]
    }
}

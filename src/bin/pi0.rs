//! `pi0`: the offline tools.
fn main() {}

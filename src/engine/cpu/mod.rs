//! The float32 oracle: π0 and π0.5 on the CPU, plain to read first and reasonably fast second.

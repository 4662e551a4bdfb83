//! Tests over all crates live in this package's `tests/`; nothing here is used by them or by anyone.

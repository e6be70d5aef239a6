//! The system allocator, which tells a test of every call.

use std::alloc::{GlobalAlloc, Layout, System};

/// Calls this function, which must not allocate, before each call is passed on.
pub struct Counting(pub fn());

// SAFETY: every call is passed on to the system allocator unchanged, and the function allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        (self.0)();
        // SAFETY: the caller's promises are those of the system allocator.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        (self.0)();
        // SAFETY: as above; `ptr` came from `System.alloc`.
        unsafe { System.dealloc(ptr, layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        (self.0)();
        // SAFETY: as above.
        unsafe { System.realloc(ptr, layout, size) }
    }
}

//! Owning types over the driver API: device and memory. Every call's result is checked.

use std::ffi::{CStr, c_void};
use std::marker::PhantomData;
use std::mem::ManuallyDrop;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::sys;

use super::faults;
pub(super) use super::faults::check;
use super::kernels::Kernels;
use super::plan::Path;
use crate::engine::EngineError;

/// Compute capability, as `(major, minor)`.
pub type Capability = (u32, u32);

/// A context that is current on this thread until this goes; then the one before it is again.
pub(super) struct Current {
    /// Guards belong to the thread that entered.
    of: PhantomData<*const ()>,
}

impl Current {
    /// Enters `context`, which whoever calls keeps alive.
    pub fn enter(context: sys::CUcontext) -> Result<Self, EngineError> {
        // SAFETY: a live context: device and lanes own theirs and enter only from their own methods.
        check(unsafe { sys::cuCtxPushCurrent_v2(context) }, "binding the GPU's context")?;
        Ok(Self { of: PhantomData })
    }
}

impl Drop for Current {
    fn drop(&mut self) {
        let mut left = std::ptr::null_mut();
        // SAFETY: pops what `enter` pushed: guards of one thread go in the reverse order of their coming.
        unsafe { sys::cuCtxPopCurrent_v2(&mut left) };
    }
}

/// One GPU with its primary context and the kernels loaded into it.
pub struct Device {
    ordinal: usize,
    handle: sys::CUdevice,
    context: sys::CUcontext,
    name: String,
    sms: usize,
    capability: Capability,
    /// Unloaded by hand, before the context goes.
    kernels: ManuallyDrop<Kernels>,
    decoding: Mutex<()>,
}

// SAFETY: the handles are process-wide driver objects; the driver API is thread-safe.
unsafe impl Send for Device {}
// SAFETY: as above; nothing in here is mutated after construction.
unsafe impl Sync for Device {}

impl Device {
    /// Opens GPU `ordinal`, or says why that cannot be.
    pub fn open(ordinal: usize) -> Result<Arc<Self>, EngineError> {
        // SAFETY: only looks for the libraries; without this probe the first call would panic.
        let (driver, cublas) = unsafe { (sys::is_culib_present(), cudarc::cublaslt::sys::is_culib_present()) };
        faults::libraries(ordinal, driver, cublas)?;
        // SAFETY: plain driver calls on out-parameters that live on this stack.
        unsafe {
            let code = sys::cuInit(0);
            if code == sys::CUresult::CUDA_ERROR_NO_DEVICE {
                faults::number(ordinal, 0)?;
            }
            check(code, "initialising the driver")?;
            let mut version = 0;
            check(sys::cuDriverGetVersion(&mut version), "reading the driver version")?;
            faults::driver(ordinal, version)?;
            let mut count = 0;
            check(sys::cuDeviceGetCount(&mut count), "counting GPUs")?;
            let index = faults::number(ordinal, count)?;
            let mut handle = 0;
            check(sys::cuDeviceGet(&mut handle, index), "opening the GPU")?;
            let attribute = |a| -> Result<u32, EngineError> {
                let mut v = 0;
                check(sys::cuDeviceGetAttribute(&mut v, a, handle), "reading a GPU attribute")?;
                Ok(v.unsigned_abs())
            };
            use sys::CUdevice_attribute_enum as A;
            let capability = (
                attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            );
            let sms = attribute(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize;
            let mut name = [0; 128];
            check(sys::cuDeviceGetName(name.as_mut_ptr(), 128, handle), "reading the GPU's name")?;
            let name = CStr::from_ptr(name.as_ptr()).to_string_lossy().into_owned();
            let shared = attribute(A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
            faults::chip(ordinal, &name, capability, shared)?;
            let mut context = std::ptr::null_mut();
            check(sys::cuDevicePrimaryCtxRetain(&mut context, handle), "opening the GPU's context")?;
            let kernels = Current::enter(context).and_then(|_current| Kernels::load());
            if kernels.is_err() {
                sys::cuDevicePrimaryCtxRelease_v2(handle);
            }
            let kernels = ManuallyDrop::new(kernels?);
            Ok(Arc::new(Self { ordinal, handle, context, name, sms, capability, kernels, decoding: Mutex::default() }))
        }
    }

    /// Makes the primary context, which owns all memory, current on the calling thread until the guard goes.
    pub(super) fn enter(&self) -> Result<Current, EngineError> {
        Current::enter(self.context)
    }

    /// The right to have a decode in flight. Two grids that wait at barriers of their own can each hold SMs that the
    /// other one needs, so there is never more than one on a device.
    pub(super) fn decoding(&self) -> MutexGuard<'_, ()> {
        self.decoding.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The driver's number of it.
    pub(super) fn handle(&self) -> sys::CUdevice {
        self.handle
    }

    pub(super) fn kernels(&self) -> &Kernels {
        &self.kernels
    }

    /// Which kernels run here; `portable` asks for those that run everywhere.
    pub(super) fn path(&self, portable: bool) -> Path {
        Path::of(self.capability, self.kernels.hopper().is_some(), portable)
    }

    /// The GPU's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its number.
    pub fn ordinal(&self) -> usize {
        self.ordinal
    }

    /// Streaming multiprocessors.
    pub fn sms(&self) -> usize {
        self.sms
    }

    /// Compute capability.
    pub fn capability(&self) -> Capability {
        self.capability
    }

    /// Free and total memory in bytes.
    pub fn memory(&self) -> Result<(usize, usize), EngineError> {
        let _current = self.enter()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: two out-parameters on this stack.
        check(unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) }, "reading free memory")?;
        Ok((free, total))
    }

    /// Logs how much of its memory is in use, by whomever, once `what` is done.
    pub(super) fn log_memory(&self, what: &str) {
        if tracing::enabled!(tracing::Level::DEBUG)
            && let Ok((free, total)) = self.memory()
        {
            tracing::debug!("GPU memory: {} MiB in use, {what}", (total - free) >> 20);
        }
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        {
            let _current = self.enter();
            // SAFETY: dropped here and nowhere else, while the context is still there.
            unsafe { ManuallyDrop::drop(&mut self.kernels) };
        }
        // SAFETY: retained once in `open`; everything that used the context holds an Arc of this device and is gone.
        unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.handle) };
    }
}

/// A value that may be copied to the device byte for byte.
///
/// # Safety
/// Any bit pattern must be a valid value, and the type must hold no padding that matters.
pub(super) unsafe trait Plain: Copy {}
// SAFETY: numbers.
unsafe impl Plain for u8 {}
// SAFETY: numbers.
unsafe impl Plain for u16 {}
// SAFETY: numbers.
unsafe impl Plain for i32 {}
// SAFETY: numbers.
unsafe impl Plain for u64 {}
// SAFETY: numbers.
unsafe impl Plain for f32 {}

/// Waits for the default stream: copies and fills there are asynchronous, and the stages' streams do not wait for it.
fn settle() -> Result<(), EngineError> {
    // SAFETY: the null stream of the current context.
    check(unsafe { sys::cuStreamSynchronize(std::ptr::null_mut()) }, "waiting for a copy")
}

/// One allocation of the driver.
struct Allocation {
    device: Arc<Device>,
    pointer: sys::CUdeviceptr,
    bytes: usize,
}

impl Allocation {
    /// `bytes` zeros, at least one.
    fn zeroed(device: &Arc<Device>, bytes: usize) -> Result<Arc<Self>, EngineError> {
        let _current = device.enter()?;
        let bytes = bytes.max(1);
        let mut pointer = 0;
        // SAFETY: out-parameter on this stack; the size is not zero.
        let code = unsafe { sys::cuMemAlloc_v2(&mut pointer, bytes) };
        if code == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            let (free, _) = device.memory()?;
            return Err(EngineError::Memory { device: device.name.clone(), needed: bytes, free });
        }
        check(code, "allocating GPU memory")?;
        let allocation = Arc::new(Self { device: Arc::clone(device), pointer, bytes });
        // SAFETY: the whole of a live allocation.
        check(unsafe { sys::cuMemsetD8_v2(pointer, 0, bytes) }, "zeroing GPU memory")?;
        settle()?;
        Ok(allocation)
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        let _current = self.device.enter();
        // SAFETY: allocated in `zeroed`, freed once; cuMemFree waits for work that uses it.
        unsafe { sys::cuMemFree_v2(self.pointer) };
    }
}

/// Buffers in a [`Room`] begin at multiples of this.
pub(super) const ROOM_STEP: usize = 256;

/// Bytes that a room needs for buffers of so many bytes each.
pub(super) fn room_bytes(buffers: impl IntoIterator<Item = usize>) -> usize {
    buffers.into_iter().map(|bytes| bytes.next_multiple_of(ROOM_STEP)).sum()
}

/// One allocation that buffers lie in, one behind the other. The driver rounds every allocation of 1 MiB or more up to
/// whole pieces of 2 MiB, which is much for many matrices of a few MiB.
pub(super) struct Room {
    allocation: Arc<Allocation>,
    used: usize,
}

impl Room {
    /// Room for buffers of `bytes` in all, see [`room_bytes`].
    pub fn new(device: &Arc<Device>, bytes: usize) -> Result<Self, EngineError> {
        Ok(Self { allocation: Allocation::zeroed(device, bytes)?, used: 0 })
    }

    /// Bytes in it that no buffer has.
    pub fn left(&self) -> usize {
        self.allocation.bytes.saturating_sub(self.used)
    }

    /// All of it.
    pub fn span(&self) -> Span<'_> {
        Span { at: self.allocation.pointer, bytes: self.allocation.bytes, of: PhantomData }
    }

    /// Zeroed memory for `len` elements (at least one): in the room, or an allocation of its own once that is full.
    pub fn buffer<T: Plain>(&mut self, len: usize) -> Result<Buffer<T>, EngineError> {
        let bytes = len.max(1) * size_of::<T>();
        if bytes > self.left() {
            return Buffer::zeroed(&self.allocation.device, len);
        }
        let pointer = self.allocation.pointer + self.used as u64;
        self.used += bytes.next_multiple_of(ROOM_STEP);
        Ok(Buffer { allocation: Arc::clone(&self.allocation), pointer, len, of: PhantomData })
    }
}

/// A stretch of device memory that is lent for a while.
#[derive(Clone, Copy)]
pub(super) struct Span<'a> {
    pub at: u64,
    pub bytes: usize,
    of: PhantomData<&'a ()>,
}

/// `len` elements of device memory: an allocation of its own, or a part of one.
pub(super) struct Buffer<T> {
    allocation: Arc<Allocation>,
    pointer: sys::CUdeviceptr,
    len: usize,
    of: PhantomData<T>,
}

// SAFETY: a device address; access is ordered by streams.
unsafe impl<T> Send for Buffer<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Buffer<T> {}

impl<T: Plain> Buffer<T> {
    /// Zeroed memory for `len` elements (at least one).
    pub fn zeroed(device: &Arc<Device>, len: usize) -> Result<Self, EngineError> {
        let allocation = Allocation::zeroed(device, len.max(1) * size_of::<T>())?;
        Ok(Self { pointer: allocation.pointer, allocation, len, of: PhantomData })
    }

    /// A copy of `values`.
    pub fn from_slice(device: &Arc<Device>, values: &[T]) -> Result<Self, EngineError> {
        let buffer = Self::zeroed(device, values.len())?;
        buffer.write(0, values)?;
        Ok(buffer)
    }

    pub fn len(&self) -> usize {
        self.len
    }

    /// Device address of element `at`.
    pub fn at(&self, at: usize) -> u64 {
        debug_assert!(at <= self.len, "{at} of {}", self.len);
        self.pointer + (at * size_of::<T>()) as u64
    }

    pub fn pointer(&self) -> u64 {
        self.pointer
    }

    /// All of it.
    pub fn span(&self) -> Span<'_> {
        Span { at: self.pointer, bytes: self.len * size_of::<T>(), of: PhantomData }
    }

    /// Copies `values` to element `at` on and waits.
    pub fn write(&self, at: usize, values: &[T]) -> Result<(), EngineError> {
        assert!(at + values.len() <= self.len, "write past a device buffer");
        let _current = self.allocation.device.enter()?;
        // SAFETY: both ranges are live and checked.
        let code = unsafe { sys::cuMemcpyHtoD_v2(self.at(at), values.as_ptr().cast(), size_of_val(values)) };
        check(code, "copying to the GPU")?;
        settle()
    }

    /// Copies elements from `at` on into `out` and waits.
    pub fn read(&self, at: usize, out: &mut [T]) -> Result<(), EngineError> {
        assert!(at + out.len() <= self.len, "read past a device buffer");
        let _current = self.allocation.device.enter()?;
        // SAFETY: both ranges are live and checked.
        let code = unsafe { sys::cuMemcpyDtoH_v2(out.as_mut_ptr().cast(), self.at(at), size_of_val(out)) };
        check(code, "copying from the GPU")
    }

    /// Sets every byte to `byte` and waits: poison for tests.
    pub fn fill(&self, byte: u8) -> Result<(), EngineError> {
        let _current = self.allocation.device.enter()?;
        let bytes = self.len.max(1) * size_of::<T>();
        // SAFETY: the whole of a live buffer, which has room for one element at least.
        check(unsafe { sys::cuMemsetD8_v2(self.pointer, byte, bytes) }, "filling GPU memory")?;
        settle()
    }
}

impl Buffer<u16> {
    /// `len` bf16 values from element `at` on.
    pub fn read_bf16(&self, at: usize, len: usize) -> Result<Vec<f32>, EngineError> {
        let mut bits = vec![0; len];
        self.read(at, &mut bits)?;
        Ok(bits.into_iter().map(|b| half::bf16::from_bits(b).to_f32()).collect())
    }
}

/// `len` elements of page-locked host memory.
pub(super) struct Pinned<T> {
    device: Arc<Device>,
    pointer: NonNull<T>,
    len: usize,
}

// SAFETY: plain host memory owned by this value.
unsafe impl<T: Send> Send for Pinned<T> {}
// SAFETY: shared access only reads.
unsafe impl<T: Sync> Sync for Pinned<T> {}

impl<T: Plain> Pinned<T> {
    pub fn zeroed(device: &Arc<Device>, len: usize) -> Result<Self, EngineError> {
        let _current = device.enter()?;
        let bytes = len.max(1) * size_of::<T>();
        let mut p: *mut c_void = std::ptr::null_mut();
        // SAFETY: out-parameter on this stack.
        check(unsafe { sys::cuMemHostAlloc(&mut p, bytes, sys::CU_MEMHOSTALLOC_PORTABLE) }, "locking host memory")?;
        let pointer = NonNull::new(p.cast::<T>()).ok_or(EngineError::Device {
            what: "locking host memory",
            reason: "a null pointer".into(),
            remedy: "raise the limit of locked memory".into(),
        })?;
        // SAFETY: freshly allocated, `bytes` long; all-zero is valid for Plain types.
        unsafe { std::ptr::write_bytes(pointer.as_ptr().cast::<u8>(), 0, bytes) };
        Ok(Self { device: Arc::clone(device), pointer, len })
    }

    pub fn as_slice(&self) -> &[T] {
        // SAFETY: `len` initialised elements that live as long as `self`; the device writes them only between a launch
        // and the synchronisation that follows it in the same method.
        unsafe { std::slice::from_raw_parts(self.pointer.as_ptr(), self.len) }
    }

    pub fn as_mut_slice(&mut self) -> &mut [T] {
        // SAFETY: as above, and `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.as_ptr(), self.len) }
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn as_ptr(&self) -> *const T {
        self.pointer.as_ptr()
    }
}

impl AsRef<[u8]> for Pinned<u8> {
    fn as_ref(&self) -> &[u8] {
        self.as_slice()
    }
}

impl AsMut<[u8]> for Pinned<u8> {
    fn as_mut(&mut self) -> &mut [u8] {
        self.as_mut_slice()
    }
}

impl<T> Drop for Pinned<T> {
    fn drop(&mut self) {
        let _current = self.device.enter();
        // SAFETY: allocated by cuMemHostAlloc, freed once.
        unsafe { sys::cuMemFreeHost(self.pointer.as_ptr().cast()) };
    }
}

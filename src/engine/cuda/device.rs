//! Owning types over the driver API: device, stream, event, memory, graph. Every call's result is checked.

use std::ffi::{CStr, c_void};
use std::marker::PhantomData;
use std::mem::ManuallyDrop;
use std::ptr::NonNull;
use std::sync::Arc;

use cudarc::driver::sys;

use super::faults;
pub(super) use super::faults::check;
use super::kernels::Kernels;
use crate::engine::EngineError;

/// Compute capability, as `(major, minor)`.
pub type Capability = (u32, u32);

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
            let kernels =
                check(sys::cuCtxSetCurrent(context), "binding the GPU's context").and_then(|()| Kernels::load());
            if kernels.is_err() {
                sys::cuDevicePrimaryCtxRelease_v2(handle);
            }
            let kernels = ManuallyDrop::new(kernels?);
            Ok(Arc::new(Self { ordinal, handle, context, name, sms, capability, kernels }))
        }
    }

    /// Makes the context current on the calling thread.
    pub(super) fn bind(&self) -> Result<(), EngineError> {
        // SAFETY: the context is retained for as long as `self` lives.
        check(unsafe { sys::cuCtxSetCurrent(self.context) }, "binding the GPU's context")
    }

    pub(super) fn kernels(&self) -> &Kernels {
        &self.kernels
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
        self.bind()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: two out-parameters on this stack.
        check(unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) }, "reading free memory")?;
        Ok((free, total))
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        let _ = self.bind();
        // SAFETY: dropped here and nowhere else, while the context is still there.
        unsafe { ManuallyDrop::drop(&mut self.kernels) };
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

/// `len` elements of device memory.
pub(super) struct Buffer<T> {
    device: Arc<Device>,
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
        device.bind()?;
        let bytes = len.max(1) * size_of::<T>();
        let mut pointer = 0;
        // SAFETY: out-parameter on this stack; the size is not zero.
        let code = unsafe { sys::cuMemAlloc_v2(&mut pointer, bytes) };
        if code == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            let (free, _) = device.memory()?;
            return Err(EngineError::Memory { device: device.name.clone(), needed: bytes, free });
        }
        check(code, "allocating GPU memory")?;
        let buffer = Self { device: Arc::clone(device), pointer, len, of: PhantomData };
        // SAFETY: the whole of a live allocation.
        check(unsafe { sys::cuMemsetD8_v2(pointer, 0, bytes) }, "zeroing GPU memory")?;
        settle()?;
        Ok(buffer)
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

    /// Copies `values` to element `at` on and waits.
    pub fn write(&self, at: usize, values: &[T]) -> Result<(), EngineError> {
        assert!(at + values.len() <= self.len, "write past a device buffer");
        self.device.bind()?;
        // SAFETY: both ranges are live and checked.
        let code = unsafe { sys::cuMemcpyHtoD_v2(self.at(at), values.as_ptr().cast(), size_of_val(values)) };
        check(code, "copying to the GPU")?;
        settle()
    }

    /// Copies elements from `at` on into `out` and waits.
    pub fn read(&self, at: usize, out: &mut [T]) -> Result<(), EngineError> {
        assert!(at + out.len() <= self.len, "read past a device buffer");
        self.device.bind()?;
        // SAFETY: both ranges are live and checked.
        let code = unsafe { sys::cuMemcpyDtoH_v2(out.as_mut_ptr().cast(), self.at(at), size_of_val(out)) };
        check(code, "copying from the GPU")
    }

    /// Sets every byte to `byte` and waits: poison for tests.
    pub fn fill(&self, byte: u8) -> Result<(), EngineError> {
        self.device.bind()?;
        // SAFETY: the whole of a live allocation.
        check(unsafe { sys::cuMemsetD8_v2(self.pointer, byte, self.len * size_of::<T>()) }, "filling GPU memory")?;
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

impl Buffer<u8> {
    /// Queues setting every byte to `byte`.
    pub fn fill_queued(&self, stream: &Stream, byte: u8) -> Result<(), EngineError> {
        // SAFETY: the whole of a live allocation.
        check(unsafe { sys::cuMemsetD8Async(self.pointer, byte, self.len, stream.raw()) }, "filling GPU memory")
    }
}

impl<T> Drop for Buffer<T> {
    fn drop(&mut self) {
        let _ = self.device.bind();
        // SAFETY: allocated in `zeroed`, freed once; cuMemFree waits for work that uses it.
        unsafe { sys::cuMemFree_v2(self.pointer) };
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
        device.bind()?;
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

    pub fn as_ptr(&self) -> *const T {
        self.pointer.as_ptr()
    }
}

impl<T> Drop for Pinned<T> {
    fn drop(&mut self) {
        let _ = self.device.bind();
        // SAFETY: allocated by cuMemHostAlloc, freed once.
        unsafe { sys::cuMemFreeHost(self.pointer.as_ptr().cast()) };
    }
}

/// A queue of device work.
pub(super) struct Stream {
    device: Arc<Device>,
    raw: sys::CUstream,
}

// SAFETY: a driver handle; calls on it are thread-safe.
unsafe impl Send for Stream {}

impl Stream {
    pub fn new(device: &Arc<Device>) -> Result<Self, EngineError> {
        device.bind()?;
        let mut raw = std::ptr::null_mut();
        let flags = sys::CUstream_flags_enum::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: out-parameter on this stack.
        check(unsafe { sys::cuStreamCreate(&mut raw, flags) }, "creating a stream")?;
        Ok(Self { device: Arc::clone(device), raw })
    }

    pub fn raw(&self) -> sys::CUstream {
        self.raw
    }

    /// Waits for everything queued.
    pub fn synchronize(&self) -> Result<(), EngineError> {
        // SAFETY: a live stream.
        check(unsafe { sys::cuStreamSynchronize(self.raw) }, "waiting for the GPU")
    }

    /// Queues a copy of the first `len` elements of `from` to `to`, `at` elements in. `from` must stay as it is until
    /// the stream is synchronised, which every caller does before it returns.
    pub fn upload<T: Plain>(&self, from: &Pinned<T>, len: usize, to: &Buffer<T>, at: usize) -> Result<(), EngineError> {
        assert!(len <= from.len && at + len <= to.len, "upload past a buffer");
        // SAFETY: both ranges are checked and live.
        let code =
            unsafe { sys::cuMemcpyHtoDAsync_v2(to.at(at), from.as_ptr().cast(), len * size_of::<T>(), self.raw) };
        check(code, "copying to the GPU")
    }

    /// As [`upload`](Self::upload), for a range of elements that keep their places.
    pub fn upload_part<T: Plain>(
        &self,
        from: &Pinned<T>,
        part: std::ops::Range<usize>,
        to: &Buffer<T>,
    ) -> Result<(), EngineError> {
        let bytes = size_of_val(&from.as_slice()[part.clone()]);
        assert!(part.end <= to.len, "upload past a buffer");
        // SAFETY: both ranges are checked and live.
        let code = unsafe {
            let source = from.as_ptr().add(part.start).cast();
            sys::cuMemcpyHtoDAsync_v2(to.at(part.start), source, bytes, self.raw)
        };
        check(code, "copying to the GPU")
    }

    /// Queues a copy of `len` elements from element `at` of `from` into `to`.
    pub fn download<T: Plain>(&self, from: &Buffer<T>, len: usize, to: &Pinned<T>) -> Result<(), EngineError> {
        assert!(len <= to.len && len <= from.len, "download past a buffer");
        // SAFETY: both ranges are checked and live; the pinned memory is read only after synchronising.
        let code = unsafe {
            sys::cuMemcpyDtoHAsync_v2(to.pointer.as_ptr().cast(), from.pointer(), len * size_of::<T>(), self.raw)
        };
        check(code, "copying from the GPU")
    }

    /// Queues a copy between device buffers.
    pub fn copy<T: Plain>(&self, from: &Buffer<T>, len: usize, to: &Buffer<T>, at: usize) -> Result<(), EngineError> {
        assert!(len <= from.len && at + len <= to.len, "copy past a buffer");
        // SAFETY: both ranges are checked and live.
        let code = unsafe { sys::cuMemcpyDtoDAsync_v2(to.at(at), from.pointer(), len * size_of::<T>(), self.raw) };
        check(code, "copying on the GPU")
    }

    /// Records what `queue` puts on this stream as a graph instead of running it.
    pub fn capture(&self, queue: impl FnOnce() -> Result<(), EngineError>) -> Result<Graph, EngineError> {
        let mode = sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: a live stream that nobody else uses while `self` is borrowed by its stage.
        check(unsafe { sys::cuStreamBeginCapture_v2(self.raw, mode) }, "capturing a graph")?;
        let queued = queue();
        let mut graph = std::ptr::null_mut();
        // SAFETY: ends the capture begun above, also when `queue` failed.
        let ended = unsafe { sys::cuStreamEndCapture(self.raw, &mut graph) };
        queued?;
        check(ended, "capturing a graph")?;
        let mut exec = std::ptr::null_mut();
        // SAFETY: a graph just captured; it may be destroyed once instantiated.
        let code = unsafe {
            let code = sys::cuGraphInstantiateWithFlags(&mut exec, graph, 0);
            sys::cuGraphDestroy(graph);
            code
        };
        check(code, "instantiating a graph")?;
        // SAFETY: a live executable and stream.
        let code = unsafe { sys::cuGraphUpload(exec, self.raw) };
        let graph = Graph { device: Arc::clone(&self.device), exec };
        check(code, "uploading a graph")?;
        self.synchronize()?;
        Ok(graph)
    }

    /// Queues a run of `graph`, which must have been captured on this stream.
    pub fn launch_graph(&self, graph: &Graph) -> Result<(), EngineError> {
        // SAFETY: both are live.
        check(unsafe { sys::cuGraphLaunch(graph.exec, self.raw) }, "launching a graph")
    }

    /// Queues a time stamp.
    pub fn record(&self, event: &Event) -> Result<(), EngineError> {
        // SAFETY: both are live and of one context.
        check(unsafe { sys::cuEventRecord(event.raw, self.raw) }, "recording an event")
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let _ = self.device.bind();
        // SAFETY: created in `new`, destroyed once; the driver finishes its work first.
        unsafe { sys::cuStreamDestroy_v2(self.raw) };
    }
}

/// A captured sequence of device work. Buffers it uses belong to the stage that owns it.
pub(super) struct Graph {
    device: Arc<Device>,
    exec: sys::CUgraphExec,
}

// SAFETY: a driver handle, launched only through its stage.
unsafe impl Send for Graph {}

impl Drop for Graph {
    fn drop(&mut self) {
        let _ = self.device.bind();
        // SAFETY: instantiated in `capture`, destroyed once.
        unsafe { sys::cuGraphExecDestroy(self.exec) };
    }
}

/// A time stamp in a stream.
pub(super) struct Event {
    device: Arc<Device>,
    raw: sys::CUevent,
}

// SAFETY: a driver handle.
unsafe impl Send for Event {}

impl Event {
    pub fn new(device: &Arc<Device>) -> Result<Self, EngineError> {
        device.bind()?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: out-parameter on this stack.
        check(unsafe { sys::cuEventCreate(&mut raw, 0) }, "creating an event")?;
        Ok(Self { device: Arc::clone(device), raw })
    }

    /// Waits until it has passed; an event never recorded has.
    pub fn wait(&self) -> Result<(), EngineError> {
        // SAFETY: a live event.
        check(unsafe { sys::cuEventSynchronize(self.raw) }, "waiting for an event")
    }

    /// Milliseconds from `earlier` to this one; both must have passed.
    pub fn ms_since(&self, earlier: &Event) -> Result<f32, EngineError> {
        let mut ms = 0.0;
        // SAFETY: live events and an out-parameter on this stack.
        check(unsafe { sys::cuEventElapsedTime_v2(&mut ms, earlier.raw, self.raw) }, "reading an event")?;
        Ok(ms)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        let _ = self.device.bind();
        // SAFETY: created in `new`, destroyed once.
        unsafe { sys::cuEventDestroy_v2(self.raw) };
    }
}

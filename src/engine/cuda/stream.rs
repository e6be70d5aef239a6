//! Owning types over the driver API: stream, graph, event. Each belongs to the lane it was made on.

use std::sync::Arc;

use cudarc::driver::sys;

use super::device::{Buffer, Pinned, Plain, check};
use super::lane::Lane;
use super::plan::Path;
use crate::engine::EngineError;

/// A queue of device work.
pub(super) struct Stream {
    lane: Arc<Lane>,
    raw: sys::CUstream,
    /// Whether kernels may start before the one in front ends.
    dependent: bool,
}

// SAFETY: a driver handle; calls on it are thread-safe.
unsafe impl Send for Stream {}

impl Stream {
    /// A stream whose work stays on the lane's share, without dependent launches.
    pub fn new(lane: &Arc<Lane>) -> Result<Self, EngineError> {
        Ok(Self { lane: Arc::clone(lane), raw: lane.create_stream()?, dependent: false })
    }

    /// A stream for kernels of that path: those for Hopper may start before the one in front ends.
    pub fn of(lane: &Arc<Lane>, path: Path) -> Result<Self, EngineError> {
        let mut stream = Self::new(lane)?;
        stream.dependent = path == Path::Hopper;
        Ok(stream)
    }

    /// Whether kernels may start before the one in front ends.
    pub fn may_depend(&self) -> bool {
        self.dependent
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
        assert!(len <= from.len() && at + len <= to.len(), "upload past a buffer");
        // SAFETY: both ranges are checked, and live until the copy has been made, as above: whoever queues one borrows
        // `from`, a frame's memory too, until it has synchronised.
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
        assert!(part.end <= to.len(), "upload past a buffer");
        // SAFETY: both ranges are checked and live.
        let code = unsafe {
            let source = from.as_ptr().add(part.start).cast();
            sys::cuMemcpyHtoDAsync_v2(to.at(part.start), source, bytes, self.raw)
        };
        check(code, "copying to the GPU")
    }

    /// Queues setting every byte of `to` to `byte`.
    pub fn fill(&self, to: &Buffer<u8>, byte: u8) -> Result<(), EngineError> {
        // SAFETY: the whole of a live allocation.
        check(unsafe { sys::cuMemsetD8Async(to.pointer(), byte, to.len(), self.raw) }, "filling GPU memory")
    }

    /// Queues a copy of `len` elements from element `at` of `from` into `to`.
    pub fn download<T: Plain>(&self, from: &Buffer<T>, len: usize, to: &Pinned<T>) -> Result<(), EngineError> {
        assert!(len <= to.len() && len <= from.len(), "download past a buffer");
        // SAFETY: both ranges are checked and live; the pinned memory is read only after synchronising.
        let code = unsafe {
            sys::cuMemcpyDtoHAsync_v2(to.as_ptr().cast_mut().cast(), from.pointer(), len * size_of::<T>(), self.raw)
        };
        check(code, "copying from the GPU")
    }

    /// Queues a copy between device buffers.
    pub fn copy<T: Plain>(&self, from: &Buffer<T>, len: usize, to: &Buffer<T>, at: usize) -> Result<(), EngineError> {
        assert!(len <= from.len() && at + len <= to.len(), "copy past a buffer");
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
        let graph = Graph { lane: Arc::clone(&self.lane), exec };
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
        let _current = self.lane.enter();
        // SAFETY: created in `new`, destroyed once; the driver finishes its work first.
        unsafe { sys::cuStreamDestroy_v2(self.raw) };
    }
}

/// A captured sequence of device work. Buffers it uses belong to the stage that owns it.
pub(super) struct Graph {
    lane: Arc<Lane>,
    exec: sys::CUgraphExec,
}

// SAFETY: a driver handle, launched only through its stage.
unsafe impl Send for Graph {}

impl Drop for Graph {
    fn drop(&mut self) {
        let _current = self.lane.enter();
        // SAFETY: instantiated in `capture`, destroyed once.
        unsafe { sys::cuGraphExecDestroy(self.exec) };
    }
}

/// A time stamp in a stream.
pub(super) struct Event {
    lane: Arc<Lane>,
    raw: sys::CUevent,
}

// SAFETY: a driver handle.
unsafe impl Send for Event {}

impl Event {
    /// An event of the lane's context: only its streams may record it.
    pub fn new(lane: &Arc<Lane>) -> Result<Self, EngineError> {
        let _current = lane.enter()?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: out-parameter on this stack.
        check(unsafe { sys::cuEventCreate(&mut raw, 0) }, "creating an event")?;
        Ok(Self { lane: Arc::clone(lane), raw })
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
        let _current = self.lane.enter();
        // SAFETY: created in `new`, destroyed once.
        unsafe { sys::cuEventDestroy_v2(self.raw) };
    }
}

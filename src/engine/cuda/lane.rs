//! Where a stage runs: a context, a share of the multiprocessors, and the streams that stay on it.
//!
//! | grant | context | streams | kernels |
//! | --- | --- | --- | --- |
//! | whole, shared | primary | plain, with a priority | the device's |
//! | green | primary | of a green context | the device's |
//! | mps | own, with an SM count | plain | own copy |
//!
//! Memory always belongs to the primary context; kernels of the other contexts use it by address. A graph keeps the
//! share of the stream it was captured on, so each lane has its own stages.

use std::mem::ManuallyDrop;
use std::sync::Arc;

use cudarc::driver::sys;

use super::device::{Current, Device, check};
use super::kernels::Kernels;
use crate::engine::EngineError;
use crate::engine::partition::{Grant, Granularity, Kind, Offer, Refusal};

/// Most groups that a split is asked for: more than any chip has.
const MOST_GROUPS: usize = 64;

/// A context, a share of the SMs, and the kernels loaded for it.
pub(super) struct Lane {
    device: Arc<Device>,
    place: Place,
    sms: usize,
}

enum Place {
    /// Every SM; streams have this priority (lower goes first).
    Primary(i32),
    Green(sys::CUgreenCtx),
    Affinity {
        context: sys::CUcontext,
        /// Unloaded by hand, before the context goes.
        kernels: ManuallyDrop<Box<Kernels>>,
    },
}

// SAFETY: driver handles; the driver API is thread-safe, and nothing in here changes after construction.
unsafe impl Send for Lane {}
// SAFETY: as above.
unsafe impl Sync for Lane {}

impl Lane {
    /// All SMs, no priority.
    pub fn whole(device: &Arc<Device>) -> Arc<Self> {
        Arc::new(Self { device: Arc::clone(device), place: Place::Primary(0), sms: device.sms() })
    }

    /// The lanes of encoder and decoder.
    pub fn pair(device: &Arc<Device>, grant: Grant) -> Result<[Arc<Self>; 2], EngineError> {
        match grant.kind {
            Kind::Whole => Ok([Self::whole(device), Self::whole(device)]),
            Kind::Shared => Self::prioritised(device),
            Kind::Green => Self::green(device, grant),
            Kind::Mps => {
                let lane = |sms| Self::own_context(device, Some(sms));
                let lanes = [lane(grant.encoder)?, lane(grant.decoder)?];
                for (lane, asked) in lanes.iter().zip([grant.encoder, grant.decoder]) {
                    if lane.sms() != asked {
                        tracing::warn!("MPS granted {} SMs where {asked} were asked for", lane.sms());
                    }
                }
                Ok(lanes)
            }
        }
    }

    fn prioritised(device: &Arc<Device>) -> Result<[Arc<Self>; 2], EngineError> {
        let _current = device.enter()?;
        let (mut last, mut first) = (0, 0);
        // SAFETY: two out-parameters on this stack.
        check(unsafe { sys::cuCtxGetStreamPriorityRange(&mut last, &mut first) }, "reading stream priorities")?;
        let lane = |priority| {
            Arc::new(Self { device: Arc::clone(device), place: Place::Primary(priority), sms: device.sms() })
        };
        Ok([lane(last), lane(first)])
    }

    /// Both shares come from one split: two splits would overlap, and a rest cannot be split again (measured).
    fn green(device: &Arc<Device>, grant: Grant) -> Result<[Arc<Self>; 2], EngineError> {
        let all = all_sms(device)?;
        let (groups, rest) = split(&all, 1, grant.decoder)?;
        if sm(&rest).smCount as usize == grant.encoder {
            return Ok([Self::in_green(device, &mut [rest])?, Self::in_green(device, &mut groups.clone())?]);
        }
        // Shares that leave something to others: each is made of smallest groups.
        let least = sm(&all).minSmPartitionSize.max(1) as usize;
        let (mut groups, _) = split(&all, MOST_GROUPS, least)?;
        let (encoder, decoder) = (grant.encoder / least, grant.decoder / least);
        if groups.len() < encoder + decoder {
            return Err(Refusal(format!("the driver makes only {} groups of {least} SMs", groups.len())).into());
        }
        let mut rest = groups.split_off(decoder);
        Ok([Self::in_green(device, &mut rest[..encoder])?, Self::in_green(device, &mut groups)?])
    }

    fn in_green(device: &Arc<Device>, share: &mut [sys::CUdevResource]) -> Result<Arc<Self>, EngineError> {
        let _current = device.enter()?;
        let (mut description, mut context) = (std::ptr::null_mut(), std::ptr::null_mut());
        let flags = sys::CUgreenCtxCreate_flags::CU_GREEN_CTX_DEFAULT_STREAM as u32;
        // SAFETY: resources of this device from one split; out-parameters on this stack.
        unsafe {
            let made = sys::cuDevResourceGenerateDesc(&mut description, share.as_mut_ptr(), share.len() as u32);
            check(made, "describing a share of the GPU")?;
            let made = sys::cuGreenCtxCreate(&mut context, description, device.handle(), flags);
            check(made, "creating a green context")?;
        }
        let sms = share.iter().map(|s| sm(s).smCount as usize).sum();
        Ok(Arc::new(Self { device: Arc::clone(device), place: Place::Green(context), sms }))
    }

    /// A context of its own with so many SMs, which needs an MPS daemon; with `None` for a share, of the whole GPU.
    fn own_context(device: &Arc<Device>, share: Option<usize>) -> Result<Arc<Self>, EngineError> {
        let mut affinity = sys::CUexecAffinityParam {
            type_: sys::CUexecAffinityType::CU_EXEC_AFFINITY_TYPE_SM_COUNT,
            param: sys::CUexecAffinityParam_st__bindgen_ty_1 {
                smCount: sys::CUexecAffinitySmCount { val: share.unwrap_or(device.sms()) as u32 },
            },
        };
        let mut how = sys::CUctxCreateParams {
            execAffinityParams: &mut affinity,
            numExecAffinityParams: 1,
            cigParams: std::ptr::null_mut(),
        };
        let how = if share.is_some() { &raw mut how } else { std::ptr::null_mut() };
        let mut context = std::ptr::null_mut();
        // SAFETY: parameters and out-parameter live on this stack; the call makes the new context current, and it is
        // popped at once.
        unsafe {
            check(sys::cuCtxCreate_v4(&mut context, how, 0, device.handle()), "creating a context with an SM count")?;
            sys::cuCtxPopCurrent_v2(&mut std::ptr::null_mut());
        }
        let made = Current::enter(context).and_then(|_current| Ok((granted(device)?, Kernels::load()?)));
        if made.is_err() {
            // SAFETY: created above; nothing uses it yet.
            unsafe { sys::cuCtxDestroy_v2(context) };
        }
        let (sms, kernels) = made?;
        let place = Place::Affinity { context, kernels: ManuallyDrop::new(Box::new(kernels)) };
        Ok(Arc::new(Self { device: Arc::clone(device), place, sms }))
    }

    /// Two contexts of their own without SM counts, which take turns on the GPU: what of `mps` can be tested without a
    /// daemon.
    pub fn unpartitioned(device: &Arc<Device>) -> Result<[Arc<Self>; 2], EngineError> {
        Ok([Self::own_context(device, None)?, Self::own_context(device, None)?])
    }

    /// Makes the lane's context current on the calling thread until the guard goes.
    pub fn enter(&self) -> Result<Current, EngineError> {
        match self.place {
            Place::Affinity { context, .. } => Current::enter(context),
            Place::Primary(_) | Place::Green(_) => self.device.enter(),
        }
    }

    /// Where memory comes from.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// The kernels of this lane's context.
    pub fn kernels(&self) -> &Kernels {
        match &self.place {
            Place::Affinity { kernels, .. } => kernels,
            Place::Primary(_) | Place::Green(_) => self.device.kernels(),
        }
    }

    /// Multiprocessors that work on this lane may use: what a persistent kernel sizes its grid from.
    pub fn sms(&self) -> usize {
        self.sms
    }

    /// Whether clusters of blocks take as long whether the other share's SMs are held or idle; under MPS one took twice as long
    /// (docs/performance.md).
    pub fn fenced(&self) -> bool {
        !matches!(self.place, Place::Affinity { .. })
    }

    /// A stream whose work stays on this lane. The caller destroys it, before the lane goes.
    pub(super) fn create_stream(&self) -> Result<sys::CUstream, EngineError> {
        let _current = self.enter()?;
        let flags = sys::CUstream_flags_enum::CU_STREAM_NON_BLOCKING as u32;
        let mut raw = std::ptr::null_mut();
        // SAFETY: a live context, and an out-parameter on this stack.
        let code = unsafe {
            match self.place {
                Place::Primary(priority) => sys::cuStreamCreateWithPriority(&mut raw, flags, priority),
                Place::Green(context) => sys::cuGreenCtxStreamCreate(&mut raw, context, flags, 0),
                Place::Affinity { .. } => sys::cuStreamCreate(&mut raw, flags),
            }
        };
        check(code, "creating a stream")?;
        Ok(raw)
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        match &mut self.place {
            Place::Primary(_) => {}
            // SAFETY: created in `in_green`, destroyed once; streams of it hold an Arc of this lane and are gone.
            Place::Green(context) => unsafe {
                sys::cuGreenCtxDestroy(*context);
            },
            Place::Affinity { context, kernels } => {
                if let Ok(_current) = Current::enter(*context) {
                    // SAFETY: dropped here and nowhere else, while their context is still there.
                    unsafe { ManuallyDrop::drop(kernels) };
                }
                // SAFETY: created in `own_context`, destroyed once; streams and events of it are gone as above.
                unsafe { sys::cuCtxDestroy_v2(*context) };
            }
        }
    }
}

/// SMs of the current context: fewer than the chip's under MPS, where a count was asked for or the process has a limit.
fn granted(device: &Device) -> Result<usize, EngineError> {
    // SAFETY: all-zero is a valid value of this plain struct.
    let mut found: sys::CUexecAffinityParam = unsafe { std::mem::zeroed() };
    let kind = sys::CUexecAffinityType::CU_EXEC_AFFINITY_TYPE_SM_COUNT;
    // SAFETY: an out-parameter on this stack, read only where the call filled it.
    unsafe {
        match sys::cuCtxGetExecAffinity(&mut found, kind) {
            // Without MPS there is no affinity to ask for.
            sys::CUresult::CUDA_ERROR_UNSUPPORTED_EXEC_AFFINITY => Ok(device.sms()),
            code => check(code, "reading the SMs of a context").map(|()| found.param.smCount.val as usize),
        }
    }
}

/// The SMs of the device, to be split.
fn all_sms(device: &Device) -> Result<sys::CUdevResource, EngineError> {
    // SAFETY: all-zero is a valid value of this plain struct (type INVALID).
    let mut all: sys::CUdevResource = unsafe { std::mem::zeroed() };
    let kind = sys::CUdevResourceType::CU_DEV_RESOURCE_TYPE_SM;
    // SAFETY: a live device and an out-parameter on this stack.
    check(unsafe { sys::cuDeviceGetDevResource(device.handle(), &mut all, kind) }, "asking for the SMs")?;
    Ok(all)
}

/// Up to `most` groups of at least `sms` SMs of `from`, and what is left.
fn split(
    from: &sys::CUdevResource,
    most: usize,
    sms: usize,
) -> Result<(Vec<sys::CUdevResource>, sys::CUdevResource), EngineError> {
    // SAFETY: as in `all_sms`.
    let blank: sys::CUdevResource = unsafe { std::mem::zeroed() };
    let (mut groups, mut rest, mut made) = (vec![blank; most], blank, most as u32);
    // SAFETY: a resource of type SM; room for `most` groups; out-parameters on this stack.
    let code =
        unsafe { sys::cuDevSmResourceSplitByCount(groups.as_mut_ptr(), &mut made, from, &mut rest, 0, sms as u32) };
    check(code, "splitting the GPU")?;
    groups.truncate(made as usize);
    Ok((groups, rest))
}

fn sm(resource: &sys::CUdevResource) -> sys::CUdevSmResource {
    // SAFETY: every resource in this file is of type SM.
    unsafe { resource.__bindgen_anon_1.sm }
}

/// What this device can give this process.
pub(super) fn offer(device: &Device) -> Result<Offer, EngineError> {
    let _current = device.enter()?;
    let mut mps = 0;
    let attribute = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MPS_ENABLED;
    // SAFETY: an out-parameter on this stack.
    check(unsafe { sys::cuDeviceGetAttribute(&mut mps, attribute, device.handle()) }, "asking for MPS")?;
    let granularity = || {
        let all = all_sms(device)?;
        let (least, step) = (sm(&all).minSmPartitionSize as usize, sm(&all).smCoscheduledAlignment as usize);
        let (groups, _) = split(&all, MOST_GROUPS, least.max(1))?;
        Ok::<_, EngineError>(Granularity { least: least.max(1), step: step.max(1), groups: groups.len() })
    };
    let green = granularity().map_err(|e| format!("the driver splits no SMs ({e})"));
    Ok(Offer {
        sms: granted(device)?,
        chip: device.sms(),
        mps: mps != 0,
        green,
        least_decoder: 1,
        decoder_waits: false,
    })
}
